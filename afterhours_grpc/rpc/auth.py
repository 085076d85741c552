"""Who calls, what they may do, and by when it must be applied."""

import collections.abc
import contextvars
import dataclasses
import enum
import time
import typing

import grpc

from afterhours_grpc.sessions import errors, session

Context: typing.TypeAlias = "grpc.aio.ServicerContext[typing.Any, typing.Any]"


LEEWAY = 30
"""Seconds by which the clock of the issuer of a token may differ from ours."""


class Scope(enum.StrEnum):
    """What a caller may be given beside what is its own. Each grants its row of the contract and nothing else."""

    ANY = "sessions:any"
    WATCH = "sessions:watch"
    EXACT = "sessions:exact"
    PROFILES = "profiles:write"


@dataclasses.dataclass(frozen=True, slots=True)
class Caller:
    """Whoever the credentials are of: `id` is also the id of the user that they are, if they are one.

    `expires_at`, in seconds since the epoch, is when the credentials end; None for those that the transport renews.
    """

    id: str
    scopes: collections.abc.Set[str]
    expires_at: float | None = None

    def named(self, user_id: str) -> str:
        """Give the user that a request is about: an empty id means the caller, unless it may mean everybody."""
        return user_id if user_id or Scope.ANY in self.scopes else self.id

    def until(self) -> float | None:
        """Return when a stream with these credentials ends, in seconds of time.monotonic().

        That is when they expire. Those that are past that by our clock, and were accepted, last as long as calls do.
        """
        if self.expires_at is None:
            return None
        left = self.expires_at - time.time()
        return time.monotonic() + (left if left > 0 else left + LEEWAY)

    @property
    def may_watch_all(self) -> bool:
        """Whether the caller may watch every user."""
        return not self.scopes.isdisjoint((Scope.ANY, Scope.WATCH))

    def check(self, *scopes: Scope, user_id: session.UserId | None = None) -> None:
        """Raise Forbidden for one who has none of the scopes, and is not that user."""
        if self.scopes.isdisjoint(scopes) and user_id != self.id:
            raise errors.Forbidden


# Gives who calls, by the credentials of the call. Raises Unauthenticated.
Authenticator = collections.abc.Callable[[Context], collections.abc.Awaitable[Caller]]


_ANYONE = Caller("anonymous", frozenset(Scope))


async def anyone(_: Context) -> Caller:
    """Take every caller for the one who may do everything."""
    return _ANYONE


# Set by the interceptor for the length of a call.
caller: contextvars.ContextVar[Caller] = contextvars.ContextVar("caller")
deadline: contextvars.ContextVar[session.Deadline] = contextvars.ContextVar("deadline")
