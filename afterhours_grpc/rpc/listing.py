"""Protobuf -> domain, for lists and the watch."""

import collections.abc
import dataclasses
import datetime
import struct
import typing

from afterhours.v1 import session_service_pb2
from google.protobuf import duration_pb2, message

from afterhours_grpc.rpc import auth, cursors, wire
from afterhours_grpc.sessions import listing, session

_MOST_USERS = 1000
_PAGE, _LONGEST_PAGE = 50, 1000
_LEAST_METERS, _MOST_METERS = 1.0, 200_000.0
# The longest that google.protobuf.Duration allows.
_LONGEST_SECONDS = 315_576_000_000
_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_MICROSECOND = datetime.timedelta(microseconds=1)


class _Paged(typing.Protocol):
    page_size: int
    page_token: str


@dataclasses.dataclass(frozen=True, slots=True)
class Page:
    """A page of at most `size` sessions, after `key`."""

    size: int
    key: cursors.Key | None

    def started(self, otherwise: listing.Start) -> listing.Start:
        """Give the key of what is sorted by (started_at, id)."""
        if not self.key:
            return otherwise
        return _EPOCH + struct.unpack(">q", self.key.value)[0] * _MICROSECOND, session.SessionId(self.key.id)


def started_key(value: session.Session) -> cursors.Key:
    """Give the key of a session in what is sorted by (started_at, id)."""
    return cursors.Key(struct.pack(">q", (value.started_at - _EPOCH) // _MICROSECOND), value.id)


def distance_key(value: session.Session, meters: float) -> cursors.Key:
    """Give the key of a session in what is sorted by (distance, id)."""
    return cursors.Key(struct.pack(">d", meters), value.id)


def _page(form: wire.Form, request: message.Message, pages: cursors.Pages, caller: auth.Caller) -> Page:
    asked = typing.cast("_Paged", request)
    form.must(asked.page_size >= 0, "page_size", "must not be negative")
    key = pages.read(request, caller.id) if asked.page_token else None
    form.must(bool(key or not asked.page_token), "page_token", "must be that of the page before, of the same query")
    return Page(min(asked.page_size or _PAGE, _LONGEST_PAGE), key)


def _min_remaining(form: wire.Form, value: duration_pb2.Duration) -> datetime.timedelta:
    good = 0 <= value.seconds <= _LONGEST_SECONDS and 0 <= value.nanos < 10**9
    form.must(good, "min_remaining", "must be a valid Duration that is not negative")
    if not good:
        return datetime.timedelta()
    return datetime.timedelta(seconds=value.seconds, microseconds=-(-value.nanos // 1000))


def _user_ids(form: wire.Form, values: collections.abc.Sequence[str]) -> list[session.UserId]:
    form.must(len(values) <= _MOST_USERS, "user_ids", "must be at most 1,000")
    return [form.user_id(value, f"user_ids[{at}]") for at, value in enumerate(values[:_MOST_USERS])]


def of_users(
    request: session_service_pb2.BatchGetSessionsRequest,
) -> tuple[list[session.UserId], datetime.timedelta]:
    """Parse, or raise InvalidRequest."""
    form = wire.Form()
    parsed = _user_ids(form, request.user_ids), _min_remaining(form, request.min_remaining)
    form.check()
    return parsed


def history(
    request: session_service_pb2.ListSessionsRequest, pages: cursors.Pages, caller: auth.Caller
) -> tuple[session.UserId, Page]:
    """Parse, or raise InvalidRequest."""
    form = wire.Form()
    parsed = form.user_id(caller.named(request.user_id)), _page(form, request, pages, caller)
    form.check()
    return parsed


def active(
    request: session_service_pb2.ListActiveSessionsRequest, pages: cursors.Pages, caller: auth.Caller
) -> tuple[datetime.timedelta, Page, listing.Near | None]:
    """Parse, or raise InvalidRequest."""
    form = wire.Form()
    min_remaining, page = _min_remaining(form, request.min_remaining), _page(form, request, pages, caller)
    near = None
    if request.HasField("near"):
        place = form.place(request.near, "near")
        good = _LEAST_METERS <= request.radius_meters <= _MOST_METERS
        form.must(good, "radius_meters", "must be from 1 to 200000 metres")
        distance = struct.unpack(">d", page.key.value)[0] if page.key else -1.0
        id = session.SessionId(page.key.id) if page.key else listing.FIRST[1]
        near = listing.Near(place, request.radius_meters, distance, id)
    else:
        form.must(request.radius_meters == 0, "radius_meters", "must be left out without near")
    form.check()
    return min_remaining, page, near


def watch(
    request: session_service_pb2.WatchSessionsRequest, caller: auth.Caller
) -> tuple[frozenset[session.UserId] | None, session.Position | None]:
    """Parse the users, None for everybody, and the position, None for now; or raise InvalidRequest."""
    form = wire.Form()
    user_ids = frozenset(_user_ids(form, request.user_ids))
    if not user_ids and not caller.may_watch_all:
        user_ids = frozenset({session.UserId(caller.id)})
    position = cursors.decode(request.cursor) if request.cursor else None
    form.must(position is not None or not request.cursor, "cursor", "must be one that this service gave")
    form.check()
    return user_ids or None, position
