"""The types of settings: how the text of each kind is read, and what it may be.

The functions raise ValueError, whose message says what the setting must be.
"""

import datetime
import pathlib
import re
import typing
import urllib.parse

import jwt.algorithms
import pydantic
import pydantic_settings

from afterhours_grpc import address, redis_url
from afterhours_grpc.sessions import location, session

_UNIT = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
_LENGTH = re.compile(r"([0-9]{1,15})(s|m|h|d)|0")


def length(text: object) -> datetime.timedelta:
    """Read a length of time such as `2s`, `15m`, `1h`, `30d`."""
    if isinstance(text, datetime.timedelta):
        return text
    found = _LENGTH.fullmatch(str(text).strip())
    if not found:
        raise ValueError("must be a length of time such as 2s, 15m, 1h or 30d")
    try:
        return datetime.timedelta(**{_UNIT[found[2]]: int(found[1])}) if found[2] else datetime.timedelta()
    except OverflowError:
        raise ValueError("must be a length of time of at most 999999999 days") from None


def _within(least: str, most: str) -> pydantic.AfterValidator:
    def check(value: datetime.timedelta) -> datetime.timedelta:
        if not length(least) <= value <= length(most):
            raise ValueError(f"must be from {least} to {most}")
        return value

    return pydantic.AfterValidator(check)


def _lengths(text: object) -> tuple[datetime.timedelta, ...]:
    lengths = tuple(length(each) for each in str(text).split(","))
    if not all(datetime.timedelta() < each <= datetime.timedelta(days=366) for each in lengths):
        raise ValueError("each must be from 1s to 366d")
    return lengths


def _unless_off(text: object) -> object:
    return None if text == "off" else text


def _path(text: object) -> object:
    if text == "":
        raise ValueError("must be a path")
    return text


def _gates(text: object) -> frozenset[session.Gate]:
    try:
        return frozenset(session.Gate(each.strip()) for each in str(text).split(",") if each.strip())
    except ValueError:
        raise ValueError(f"each must be one of {', '.join(session.Gate)}") from None


def _fuzz_key(text: object) -> tuple[location.FuzzKey, ...] | None:
    return None if text is None else location.FuzzKey.parse(str(text))


def _redis_url(url: str) -> str:
    redis_url.parse(url)
    return url


def _secret(secret: pydantic.SecretStr) -> pydantic.SecretStr:
    text = secret.get_secret_value()
    try:
        if len(text.encode()) < 32:
            raise ValueError("must have at least 32 bytes: make one by `openssl rand -hex 32`")
        # A secret that PyJWT refuses here would make it refuse every token.
        jwt.algorithms.HMACAlgorithm(jwt.algorithms.HMACAlgorithm.SHA256).prepare_key(text)
    except UnicodeEncodeError:
        raise ValueError("must be UTF-8: make one by `openssl rand -hex 32`") from None
    except jwt.InvalidKeyError:
        raise ValueError("must be no public key and no certificate: those belong into AFTERHOURS_JWKS_URL") from None
    return secret


def _key_set_url(url: str) -> str:
    try:
        parts = urllib.parse.urlsplit(url)
        usable = parts.port != 0 and parts.username is None and url.isprintable() and " " not in url
    except ValueError:
        usable = False
    if not usable or not (parts.hostname if parts.scheme == "https" else parts.path):
        raise ValueError("must be https://HOST/PATH, without a user or a password, or file:///PATH")
    return url


Length = typing.Annotated[datetime.timedelta, pydantic.BeforeValidator(length)]
Bounded = typing.Annotated[Length, _within("0s", "36500d")]
Positive = typing.Annotated[Length, _within("1s", "36500d")]
# Answers are kept for 24 hours and removed with their sessions: a retry without one would be applied again.
History = typing.Annotated[Length, _within("24h", "36500d")]
Durations = typing.Annotated[
    tuple[datetime.timedelta, ...], pydantic.BeforeValidator(_lengths), pydantic_settings.NoDecode
]
Address = typing.Annotated[address.Address, pydantic.BeforeValidator(address.parse), pydantic_settings.NoDecode]
AddressOrOff = typing.Annotated[
    address.Address | None,
    pydantic.BeforeValidator(lambda text: _unless_off(text) and address.parse(text)),
    pydantic_settings.NoDecode,
]
Path = typing.Annotated[pathlib.Path, pydantic.BeforeValidator(_path)]
PostgresUrl = typing.Annotated[str, pydantic.Field(pattern=r"^postgres(ql)?://")]
RedisUrl = typing.Annotated[str, pydantic.AfterValidator(_redis_url)]
Secret = typing.Annotated[pydantic.SecretStr, pydantic.AfterValidator(_secret)]
KeySetUrl = typing.Annotated[str, pydantic.Field(pattern=r"^(https://|file:/)"), pydantic.AfterValidator(_key_set_url)]
Gates = typing.Annotated[frozenset[session.Gate], pydantic.BeforeValidator(_gates), pydantic_settings.NoDecode]
# Redis keeps the times of all that are counted.
RateOrOff = typing.Annotated[
    typing.Annotated[int, pydantic.Field(ge=1, le=100_000)] | None, pydantic.BeforeValidator(_unless_off)
]
FuzzKeys = typing.Annotated[
    tuple[location.FuzzKey, ...] | None, pydantic.BeforeValidator(_fuzz_key), pydantic_settings.NoDecode
]
