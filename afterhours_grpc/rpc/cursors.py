"""Cursors, of the watch, and page tokens, of the lists: what callers keep for us and must not make themselves."""

import base64
import binascii
import collections.abc
import dataclasses
import datetime
import hmac
import struct
import typing
import uuid

from google.protobuf import message

from afterhours_grpc.sessions import session

# The position's number, and when its event got it in microseconds since 1970: what tells whether it is still the same.
_CURSOR = struct.Struct(">cQq")
_VERSION = b"2"
_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_MICROSECOND = datetime.timedelta(microseconds=1)
_KEY = struct.Struct(">8s16s")
_MAC_BYTES = 16


def encode(position: session.Position) -> str:
    """Return the cursor of a position."""
    return _text(_CURSOR.pack(_VERSION, position.number, (position.placed_at - _EPOCH) // _MICROSECOND))


def decode(cursor: str) -> session.Position | None:
    """Return the position of a cursor, or None if it is malformed."""
    raw = _raw(cursor)
    if raw is None or len(raw) != _CURSOR.size:
        return None
    version, number, microseconds = _CURSOR.unpack(raw)
    if version != _VERSION or number >= 2**63:
        return None
    try:
        return session.Position(number, _EPOCH + microseconds * _MICROSECOND)
    except OverflowError:
        return None


@dataclasses.dataclass(frozen=True, slots=True)
class Key:
    """Where a page ends: the bytes of what it is sorted by, and the session's id."""

    value: bytes
    id: uuid.UUID


class _Paged(typing.Protocol):
    page_token: str


class Pages:
    """Signs page tokens, so that each is good for its caller, its method and its query alone. Any server knows them."""

    def __init__(self, secrets: collections.abc.Iterable[str]) -> None:
        """Take secrets, newest first: the first one signs, all are known."""
        self._keys = [hmac.digest(each.encode(errors="surrogatepass"), b"page tokens", "sha256") for each in secrets]

    def sign(self, request: message.Message, caller: str, key: Key) -> str:
        """Give the token of the page after `key`."""
        packed = _KEY.pack(key.value, key.id.bytes)
        return _text(packed + _mac(self._keys[0], request, caller, packed))

    def read(self, request: message.Message, caller: str) -> Key | None:
        """Give where the page of a request begins, or None for a token that is not of this caller and query."""
        raw = _raw(typing.cast("_Paged", request).page_token)
        if raw is None or len(raw) != _KEY.size + _MAC_BYTES:
            return None
        packed, mac = raw[: _KEY.size], raw[_KEY.size :]
        if not any(hmac.compare_digest(mac, _mac(key, request, caller, packed)) for key in self._keys):
            return None
        value, id = _KEY.unpack(packed)
        return Key(value, uuid.UUID(bytes=id))


def _mac(key: bytes, request: message.Message, caller: str, packed: bytes) -> bytes:
    query = type(request)()
    query.CopyFrom(request)
    for field in ("page_token", "page_size"):
        query.ClearField(field)
    of = [type(request).DESCRIPTOR.full_name.encode(), caller.encode(), query.SerializeToString(deterministic=True)]
    said = b"".join(len(each).to_bytes(8, "big") + each for each in of)
    return hmac.digest(key, said + packed, "sha256")[:_MAC_BYTES]


def _text(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def _raw(text: str) -> bytes | None:
    try:
        raw = base64.b64decode(text.encode() + b"=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        return None
    # One text for one meaning.
    return raw if _text(raw) == text else None
