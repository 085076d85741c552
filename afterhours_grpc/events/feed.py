"""The watch: all watchers in this process share one reading of the events; one that is behind reads by itself."""

import asyncio
import collections.abc
import contextlib
import math
import time
import typing

from afterhours_grpc.events import watchers
from afterhours_grpc.sessions import errors, session
from afterhours_grpc.store import database, outbox

Event = outbox.Event
Rendered = typing.TypeVar("Rendered")

# Seconds between two polls without a wake-up, and at least between two with one: what comes together is placed and read
# together.
_POLL = 0.2
_PACE = 0.02
# Seconds that opening a watch may take.
_JOIN_TIMEOUT = 4.5
HEARTBEAT = 15.0
"""Seconds between two heartbeats."""

# Events that one statement reads.
_PAGE = 1000
# A watcher that is behind and takes longer than this over one event is disconnected.
_SLOW = 2.0
# Watchers that read by themselves at once: however many resume, they leave most of the connections to calls.
_READERS = 4


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
        # Every event up to here was passed on to those that watched then. Maintained while there are watchers.
        self._position = session.BEGINNING
        self._watchers: watchers.Watchers[Rendered] = watchers.Watchers()
        self._joiners: list[tuple[watchers.Watcher[Rendered], asyncio.Future[session.Position]]] = []
        self._joining = asyncio.Lock()
        self._reading = asyncio.Semaphore(_READERS)
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
        """Place events and pass them on, until cancelled. A Postgres that is away is tried again."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_POLL):
                    await self._noted.wait()
            self._noted.clear()
            with contextlib.suppress(errors.StoreUnavailable, database.Retry):
                await self._tell(await self._events.place())
            await asyncio.sleep(_PACE)

    async def _tell(self, last: session.Position) -> None:
        """Pass on the events up to the last one and later ones, if it is not the one that was passed on last."""
        more = bool(self._watchers) and self._position != last
        while more:
            try:
                found = await self._events.after(self._position, _PAGE)
            except errors.CursorExpired:
                # The database has lost what was passed on. A watcher that has sent none of it can go on.
                found, self._position = [], await self._events.last()
                for watcher in self._watchers:
                    watcher.fall_behind()
            for event in found:
                self._dispatch(event)
                self._position = event.position
            more = len(found) == _PAGE

    def _dispatch(self, event: outbox.Event) -> None:
        concerned = self._watchers.of(event.session.user_id)
        if concerned:
            told = watchers.Told(event.position, self._render(event))
            for watcher in concerned:
                watcher.take(told)

    async def watch(
        self,
        user_ids: frozenset[session.UserId] | None,
        after: session.Position | None,
        until: float | None,
        expired: collections.abc.Callable[[], errors.SessionError],
    ) -> collections.abc.AsyncGenerator[watchers.Told[Rendered], None]:
        """Yield a heartbeat at once, then the events of these users, or of all, after a position or from now on.

        Raise CursorExpired, SlowConsumer, ShuttingDown, StoreUnavailable, and at `until`, in seconds of
        time.monotonic(), what `expired` returns.
        """
        watcher: watchers.Watcher[Rendered] = watchers.Watcher(
            user_ids, after or session.BEGINNING, behind=after is not None
        )
        try:
            now = await self._join(watcher)
            if watcher.position.number > now.number:
                raise errors.CursorExpired
            if after is None:
                watcher.position = now
            yield watchers.Told(watcher.position, None)
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
            self._watchers.remove(watcher)

    async def _join(self, watcher: watchers.Watcher[Rendered]) -> session.Position:
        """Deliver to a watcher what comes from here on; return the last position as of now.

        Raise StoreUnavailable after 4.5 s: those who came before may wait for a silent Postgres as well.
        """
        joined: asyncio.Future[session.Position] = asyncio.get_running_loop().create_future()
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
        """Add all watchers that came meanwhile, by one look at the last position."""
        async with self._joining:
            joiners, self._joiners = self._joiners, []
            try:
                # What was committed before they came is before now.
                now = await self._events.place(wait=True)
            except (errors.StoreUnavailable, database.Retry):
                for _, joined in joiners:
                    if not joined.done():
                        joined.set_exception(errors.StoreUnavailable())
                return
            if not self._watchers:
                self._position = now
            for watcher, joined in joiners:
                if not joined.done():
                    self._watchers.add(watcher)
                    joined.set_result(now)

    async def _from(
        self, watcher: watchers.Watcher[Rendered], until: float
    ) -> collections.abc.AsyncGenerator[watchers.Told[Rendered], None]:
        """Yield what comes after the watcher's position, which moves on with what is sent, up to `until` or a drain."""
        beat = time.monotonic() + HEARTBEAT
        while time.monotonic() < until and not self._draining:
            if watcher.behind:
                watcher.behind = False
                async for told in self._missed(watcher, until):
                    yield told
            elif watcher.waiting:
                told = watcher.waiting.popleft()
                if told.position.number > watcher.position.number:
                    yield told
            elif time.monotonic() >= beat:
                beat = time.monotonic() + HEARTBEAT
                # Nothing is queued, so everything up to here was sent.
                yield watchers.Told(max(watcher.position, self._position, key=lambda each: each.number), None)
            else:
                watcher.wanted.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min(beat, until) - time.monotonic()):
                        await watcher.wanted.wait()

    async def _missed(
        self, watcher: watchers.Watcher[Rendered], until: float
    ) -> collections.abc.AsyncGenerator[watchers.Told[Rendered], None]:
        """Read what was passed on to the others before, up to where this watcher gets it with them.

        Read at least once, which shows whether the history is still that of the watcher's position.
        """
        upto, position, more = self._position, watcher.position, True
        while more and time.monotonic() < until:
            found = await self._read(watcher.user_ids, position, upto)
            for event in found:
                yield watchers.Told(event.position, self._render(event))
                position = event.position
            more = len(found) == _PAGE

    async def _read(
        self, user_ids: frozenset[session.UserId] | None, position: session.Position, upto: session.Position
    ) -> list[outbox.Event]:
        try:
            async with self._reading:
                return await self._events.after(position, _PAGE, upto=upto, user_ids=user_ids)
        except database.Retry:
            raise errors.StoreUnavailable from None
