"""REDIS_URL: checks it before anything connects, so that a mistake is one line and not a traceback."""

import collections.abc
import re
import ssl
import typing
import urllib.parse

import redis.asyncio
import redis.connection

# Messages repeat nothing of the URL: where a password is not percent-encoded, any part may be a piece of it.
_ENCODED = "special characters of a password must be percent-encoded"
_LARGEST_DATABASE = 2**31 - 1
_NUMBER = re.compile(r"[0-9]{1,10}", re.ASCII)
_LONGEST = 60.0


def _number(least: int, most: int) -> collections.abc.Callable[[str], bool]:
    return lambda text: bool(_NUMBER.fullmatch(text)) and least <= int(text) <= most


def _seconds(text: str) -> bool:
    try:
        return 0 < float(text) <= _LONGEST
    except ValueError:
        return False


def _flags(text: str) -> bool:
    return all(each.strip() in ssl.VerifyFlags.__members__ for each in text.strip("[]").split(","))


def _switch(text: str) -> bool:
    return text.upper() in {"1", "T", "TRUE", "Y", "YES", *redis.connection.FALSE_STRINGS}


_TEXT: collections.abc.Callable[[str], bool] = bool
_TLS_OPTIONS = {
    "ssl_keyfile": _TEXT,
    "ssl_certfile": _TEXT,
    "ssl_password": _TEXT,
    "ssl_cert_reqs": frozenset({"none", "optional", "required"}).__contains__,
    "ssl_ca_certs": _TEXT,
    "ssl_ca_data": _TEXT,
    "ssl_ca_path": _TEXT,
    "ssl_check_hostname": _switch,
    "ssl_include_verify_flags": _flags,
    "ssl_exclude_verify_flags": _flags,
    "ssl_min_version": _number(0, 65535),
    "ssl_ciphers": _TEXT,
}
_OPTIONS = {
    "db": _number(0, _LARGEST_DATABASE),
    "username": _TEXT,
    "password": _TEXT,
    "client_name": _TEXT,
    "protocol": _number(2, 3),
    "socket_timeout": _seconds,
    "socket_connect_timeout": _seconds,
    "socket_keepalive": _switch,
    "socket_read_size": _number(1, 2**24),
    "retry_on_timeout": _switch,
    "health_check_interval": _number(0, 2**31 - 1),
    "max_connections": _number(1, 2**31 - 1),
}


def parse(url: str) -> dict[str, typing.Any]:
    """Return the options of redis-py's pools and connections for `url`, which connect by its scheme.

    Raise ValueError for a URL that is not supported, which includes what redis-py would ignore, or would refuse only
    when it connects. The message is one line and repeats no part of the URL.
    """
    if not url.isprintable() or " " in url:
        raise ValueError("must contain no spaces and no control characters")
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port
    except ValueError:
        raise ValueError(f"must have a host, and a port from 1 to 65535 or none; {_ENCODED}") from None
    if parts.scheme in {"redis", "rediss"}:
        _check_place(parts, port)
    elif parts.scheme == "unix":
        if parts.hostname or parts.path in {"", "/"}:
            raise ValueError("must have an absolute path: unix:///path/to/socket")
    else:
        supported = "redis://, rediss:// or unix://"
        raise ValueError(f"must begin with {supported}: Redis Cluster and Sentinel are not supported")
    _check_options(parts)
    options = dict(redis.connection.parse_url(url))
    options.pop("connection_class", None)
    if parts.scheme == "rediss":
        _check_tls(options)
    return options


def _check_place(parts: urllib.parse.SplitResult, port: int | None) -> None:
    if port == 0:
        raise ValueError("must have a port from 1 to 65535, or none")
    host = urllib.parse.unquote(parts.hostname or "localhost")
    if "," in host:
        raise ValueError("must name one host: Redis Cluster and Sentinel are not supported")
    try:
        host.encode("idna")
    except UnicodeError:
        host = ""
    if not host.isprintable() or not host or " " in host:
        raise ValueError(f"must have a host name or an address; {_ENCODED}")
    if not re.fullmatch("/?|/[0-9]{1,10}", parts.path) or int(parts.path[1:] or 0) > _LARGEST_DATABASE:
        raise ValueError("must end in the number of a database, such as /0, or in none")


def _check_options(parts: urllib.parse.SplitResult) -> None:
    if parts.fragment:
        raise ValueError(f"must have nothing after a #; {_ENCODED}")
    known = _OPTIONS | _TLS_OPTIONS if parts.scheme == "rediss" else _OPTIONS
    for name, value in urllib.parse.parse_qsl(parts.query, keep_blank_values=True):
        check = known.get(name)
        if check is None:
            further = "; ssl_… with rediss://" if parts.scheme == "redis" else ""
            raise ValueError(f"has an option that is not supported; supported are {', '.join(known)}{further}")
        if not check(value):
            raise ValueError(f"has a value for the option {name} that is not valid")


def _check_tls(options: dict[str, typing.Any]) -> None:
    of_connection = {name: value for name, value in options.items() if name != "max_connections"}
    try:
        redis.asyncio.SSLConnection(**of_connection).ssl_context.get()
    except (OSError, ValueError, TypeError, redis.RedisError) as error:
        raise ValueError(f"has ssl_… options that cannot be used ({type(error).__name__}): check its files") from None
