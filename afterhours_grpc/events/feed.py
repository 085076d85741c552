"""The watch: one reading of the events for all who watch in this process, and one for each who has to catch up."""

import asyncio
import collections
import collections.abc
import contextlib
import dataclasses
import math
import time
import typing

from afterhours_grpc.sessions import errors, session
from afterhours_grpc.store import database, outbox

Event = outbox.Event
Rendered = typing.TypeVar("Rendered")

# Seconds between two looks that nothing woke, and at least between two that something did: what comes together is
# placed and read together.
_POLL = 0.2
_PACE = 0.02
# Seconds that opening a watch may take.
_JOIN_TIMEOUT = 4.5
HEARTBEAT = 15.0
"""Seconds between two heartbeats."""

# Events of one statement.
_PAGE = 1000
# Events that wait for one watcher; beyond them it reads by itself what the others are told. Who is behind, and took
# that many seconds for one event, is slow.
_ROOM = 1000
_SLOW = 2.0


@dataclasses.dataclass(frozen=True, slots=True)
class Told(typing.Generic[Rendered]):
    """An event, rendered once for all who watch; a heartbeat where `event` is None."""

    position: int
    event: Rendered | None


@dataclasses.dataclass(slots=True, eq=False)
class _Watcher(typing.Generic[Rendered]):
    # None for everybody.
    user_ids: frozenset[session.UserId] | None
    position: int = 0
    waiting: collections.deque[Told[Rendered]] = dataclasses.field(default_factory=collections.deque)
    wanted: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)
    behind: bool = False

    def take(self, told: Told[Rendered]) -> None:
        if len(self.waiting) >= _ROOM:
            self.fall_behind()
        if not self.behind:
            self.waiting.append(told)
        self.wanted.set()

    def fall_behind(self) -> None:
        self.behind = True
        self.waiting.clear()


class Feed(typing.Generic[Rendered]):
    """Tells events in their order, each to every watcher whom it concerns, and to nobody twice in one watch.

    `noted` is set when this process wrote events. `render` is called once for each event.
    """

    def __init__(
        self,
        events: outbox.Outbox,
        noted: asyncio.Event,
        render: collections.abc.Callable[[outbox.Event], Rendered],
    ) -> None:
        self._events = events
        self._noted = noted
        self._render = render
        # Every event up to here was told to those who watched then. Kept up while somebody watches.
        self._position = 0
        self._watchers: set[_Watcher[Rendered]] = set()
        # The same by whom they watch, those of everybody under None.
        self._by_user: dict[session.UserId | None, set[_Watcher[Rendered]]] = {}
        self._joiners: list[tuple[_Watcher[Rendered], asyncio.Future[int]]] = []
        self._joining = asyncio.Lock()
        self._admitting: set[asyncio.Task[None]] = set()
        self._draining = False

    def drain(self) -> None:
        """End every watch, with ShuttingDown."""
        self._draining = True
        for watcher in self._watchers:
            watcher.wanted.set()

    async def listen(self) -> None:
        """Be woken by what others place, until the connection is lost."""
        await self._events.listen(self._noted)

    async def run(self) -> None:
        """Place events and tell them, until cancelled. A Postgres that is away is tried again."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_POLL):
                    await self._noted.wait()
            self._noted.clear()
            with contextlib.suppress(errors.StoreUnavailable, database.Retry):
                while await self._events.place(_PAGE):
                    pass
                await self._tell()
            await asyncio.sleep(_PACE)

    async def _tell(self) -> None:
        if not self._watchers:
            return
        async with self._joining:
            last = await self._events.last()
            while self._position < last:
                try:
                    found = await self._events.after(self._position, last, _PAGE)
                except errors.CursorExpired:
                    # They find out by themselves.
                    for watcher in self._watchers:
                        watcher.fall_behind()
                    found = []
                for event in found:
                    self._dispatch(event)
                self._position = found[-1].position if found else last

    def _dispatch(self, event: outbox.Event) -> None:
        concerned = [*self._by_user.get(None, ()), *self._by_user.get(event.session.user_id, ())]
        if concerned:
            told = Told(event.position, self._render(event))
            for watcher in concerned:
                watcher.take(told)

    def _add(self, watcher: _Watcher[Rendered]) -> None:
        self._watchers.add(watcher)
        for user_id in watcher.user_ids or (None,):
            self._by_user.setdefault(user_id, set()).add(watcher)

    def _remove(self, watcher: _Watcher[Rendered]) -> None:
        if watcher in self._watchers:
            self._watchers.remove(watcher)
            for user_id in watcher.user_ids or (None,):
                self._by_user[user_id].remove(watcher)
                if not self._by_user[user_id]:
                    del self._by_user[user_id]

    async def watch(
        self,
        user_ids: frozenset[session.UserId] | None,
        after: int | None,
        until: float | None,
        expired: collections.abc.Callable[[], errors.SessionError],
    ) -> collections.abc.AsyncGenerator[Told[Rendered], None]:
        """Tell the events of these users, or of all, after a position or from now on, and at once a heartbeat.

        Raise CursorExpired, SlowConsumer, ShuttingDown, StoreUnavailable, InvalidRequest for a position that is still
        to come, and at `until`, in seconds of time.monotonic(), what `expired` gives.
        """
        watcher: _Watcher[Rendered] = _Watcher(user_ids)
        try:
            now = await self._join(watcher)
            if after is not None and after > now:
                raise errors.InvalidRequest((errors.Violation("cursor", "must be one that this service gave"),))
            watcher.position = now if after is None else after
            yield Told(watcher.position, None)
            async for told in self._from(watcher, math.inf if until is None else until):
                began = time.monotonic()
                yield told
                watcher.position = told.position
                if watcher.behind and time.monotonic() - began > _SLOW:
                    raise errors.SlowConsumer(watcher.position)
                if self._draining:
                    raise errors.ShuttingDown
            raise errors.ShuttingDown if self._draining else expired()
        finally:
            self._remove(watcher)

    async def _join(self, watcher: _Watcher[Rendered]) -> int:
        """Deliver to a watcher what comes from here on; return the last position as of now.

        Raise StoreUnavailable after 4.5 s: those who came before may wait for a silent Postgres as well.
        """
        joined: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._joiners.append((watcher, joined))
        if len(self._joiners) == 1:
            admitting = asyncio.create_task(self._admit())
            self._admitting.add(admitting)
            admitting.add_done_callback(self._admitting.discard)
        try:
            async with asyncio.timeout(_JOIN_TIMEOUT):
                return await joined
        except TimeoutError as error:
            raise errors.StoreUnavailable from error

    async def _admit(self) -> None:
        """Let in all who came meanwhile, by one look at where the events are."""
        async with self._joining:
            joiners, self._joiners = self._joiners, []
            try:
                # What was committed before they came is before now.
                while await self._events.place(_PAGE, wait=True):
                    pass
                now = await self._events.last()
            except (errors.StoreUnavailable, database.Retry):
                for _, joined in joiners:
                    if not joined.done():
                        joined.set_exception(errors.StoreUnavailable())
                return
            if not self._watchers:
                self._position = now
            for watcher, joined in joiners:
                if not joined.done():
                    self._add(watcher)
                    joined.set_result(now)

    async def _from(
        self, watcher: _Watcher[Rendered], until: float
    ) -> collections.abc.AsyncGenerator[Told[Rendered], None]:
        """Tell what comes after the watcher's position, which moves on with what is sent, up to `until` or a drain."""
        beat = time.monotonic() + HEARTBEAT
        watcher.behind = True
        while time.monotonic() < until and not self._draining:
            if watcher.behind:
                watcher.behind = False
                async for told in self._missed(watcher, until):
                    yield told
            elif watcher.waiting:
                told = watcher.waiting.popleft()
                if told.position > watcher.position:
                    yield told
            elif time.monotonic() >= beat:
                beat = time.monotonic() + HEARTBEAT
                # Nothing waits, so that all up to there was sent.
                yield Told(max(watcher.position, self._position), None)
            else:
                watcher.wanted.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min(beat, until) - time.monotonic()):
                        await watcher.wanted.wait()

    async def _missed(
        self, watcher: _Watcher[Rendered], until: float
    ) -> collections.abc.AsyncGenerator[Told[Rendered], None]:
        """Read what was told to the others before, up to where the watcher is told with them."""
        upto, position = self._position, watcher.position
        while position < upto and time.monotonic() < until:
            found = await self._events.after(position, upto, _PAGE, watcher.user_ids)
            for event in found:
                yield Told(event.position, self._render(event))
            position = found[-1].position if len(found) == _PAGE else upto
