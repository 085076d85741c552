"""host:port, as settings have it, as a server listens on it, and as a client connects to it."""

import ipaddress
import re
import typing

_FORM = re.compile(r"(?:\[(?P<bracketed>[^\[\]\s]+)\]|(?P<host>[^\[\]\s]+)):(?P<port>[0-9]{1,5})")


class Address(typing.NamedTuple):
    """A host and a port; as text an IPv6 address is in brackets, as clients need it."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine reaches it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def parse(text: object) -> Address:
    """Read `host:port`, with an IPv6 address in brackets or without. Raise ValueError."""
    found = _FORM.fullmatch(str(text))
    if not found or int(found["port"]) > 65535:
        raise ValueError("must be host:port, with a port from 0 to 65535")
    host = found["bracketed"] or found["host"]
    try:
        # As it is resolved later, where this error would not be expected.
        host.encode("idna")
    except UnicodeError:
        raise ValueError("must be host:port, with a host name or an address") from None
    return Address(host, int(found["port"]))
