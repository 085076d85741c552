"""The hosts of a Postgres URL, one by one, so that each can be tried by itself."""

import dataclasses
import re
import urllib.parse

_LOCATION = re.compile(r"(?P<name>/.+?|\[[^\]]+\]|[^:\[\]]*)(:(?P<port>\d*))?")


@dataclasses.dataclass(frozen=True, slots=True)
class Host:
    """Where a server may be. `name` may be a socket's directory; None stands for the driver's default."""

    name: str | None
    port: int | None


def read(url: str) -> list[Host]:
    """Return the hosts that a URL names, in their order, or the default one. Raise ValueError.

    As in libpq, the parameters `host` and `port` override what stands before the path, each may be a list, and one port
    is for all hosts.
    """
    parts = urllib.parse.urlsplit(url)
    parameters = dict(urllib.parse.parse_qsl(parts.query))
    if given := parameters.get("host"):
        hosts = [_host(each) for each in given.split(",")]
    else:
        account, at, location = parts.netloc.partition("@")
        hosts = [_host(urllib.parse.unquote(each)) for each in (location if at else account).split(",")]
    if given := parameters.get("port"):
        ports = given.split(",")
        hosts = [
            Host(host.name, int(port))
            for host, port in zip(hosts, ports * len(hosts) if len(ports) == 1 else ports, strict=True)
        ]
    return hosts


def _host(text: str) -> Host:
    if text.count(":") > 1 and not text.startswith(("[", "/")):
        return Host(text, None)  # a bare IPv6 address, which parameters may have
    found = _LOCATION.fullmatch(text)
    if not found:
        raise ValueError("a host is NAME, NAME:PORT, [ADDRESS]:PORT, or a socket's directory")
    port = found["port"]
    return Host(found["name"].strip("[]") or None, int(port) if port else None)
