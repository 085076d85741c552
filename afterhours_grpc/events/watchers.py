"""The watchers of this process, with what is queued for each."""

import asyncio
import collections
import collections.abc
import dataclasses
import typing

from afterhours_grpc.sessions import session

Rendered = typing.TypeVar("Rendered")

# Events queued for one watcher; with more, it is behind and reads by itself.
_ROOM = 1000


@dataclasses.dataclass(frozen=True, slots=True)
class Told(typing.Generic[Rendered]):
    """An event, rendered once for all watchers; a heartbeat where `event` is None."""

    position: session.Position
    event: Rendered | None


@dataclasses.dataclass(slots=True, eq=False)
class Watcher(typing.Generic[Rendered]):
    """A stream of the events of some users, or of everybody where `user_ids` is None.

    `position` is that of the message that was sent last. `wanted` is set when there may be something to send.
    """

    user_ids: frozenset[session.UserId] | None
    position: session.Position
    behind: bool
    waiting: collections.deque[Told[Rendered]] = dataclasses.field(default_factory=collections.deque)
    wanted: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)

    def take(self, told: Told[Rendered]) -> None:
        """Queue an event, unless this watcher is behind."""
        if len(self.waiting) >= _ROOM:
            self.fall_behind()
        if not self.behind:
            self.waiting.append(told)
        self.wanted.set()

    def fall_behind(self) -> None:
        """Make it read on from its position by itself."""
        self.behind = True
        self.waiting.clear()
        self.wanted.set()


class Watchers(typing.Generic[Rendered]):
    """A set of watchers, found by the users that they watch."""

    def __init__(self) -> None:
        self._all: set[Watcher[Rendered]] = set()
        # Those of everybody under None.
        self._by_user: dict[session.UserId | None, set[Watcher[Rendered]]] = {}

    def __bool__(self) -> bool:
        return bool(self._all)

    def __iter__(self) -> collections.abc.Iterator[Watcher[Rendered]]:
        return iter(self._all)

    def of(self, user_id: session.UserId) -> list[Watcher[Rendered]]:
        """Return the watchers of a user, and of everybody."""
        return [*self._by_user.get(None, ()), *self._by_user.get(user_id, ())]

    def add(self, watcher: Watcher[Rendered]) -> None:
        """Add a watcher."""
        self._all.add(watcher)
        for user_id in watcher.user_ids or (None,):
            self._by_user.setdefault(user_id, set()).add(watcher)

    def remove(self, watcher: Watcher[Rendered]) -> None:
        """Remove a watcher, if it is there."""
        if watcher in self._all:
            self._all.remove(watcher)
            for user_id in watcher.user_ids or (None,):
                self._by_user[user_id].remove(watcher)
                if not self._by_user[user_id]:
                    del self._by_user[user_id]
