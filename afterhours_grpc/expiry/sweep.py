"""Mends the timers in Redis by what is true in Postgres."""

import collections.abc
import dataclasses
import datetime
import itertools
import time
import uuid

from afterhours_grpc.expiry import jobs, timers
from afterhours_grpc.sessions import session
from afterhours_grpc.store import store

# Sessions of one slice, statement or request, and of one statement that only counts.
_SLICE = 1000
_COUNTED = 50 * _SLICE
# Slices that are compared one by one in each run though their counts agree, and that take turns at it.
_BY_TURN = 5
_LAST_ID = session.SessionId(uuid.UUID(int=2**128 - 1))
_LAST = datetime.datetime.max.replace(tzinfo=datetime.UTC)

# Statements of `store.Store` for a kind of timer.
ReadDue = collections.abc.Callable[
    [datetime.datetime, session.SessionId, datetime.datetime, int], collections.abc.Awaitable[list[store.Due]]
]
CountSlices = collections.abc.Callable[[datetime.datetime, int, int], collections.abc.Awaitable[list[store.Slice]]]
ReadStill = collections.abc.Callable[
    [collections.abc.Sequence[session.SessionId]],
    collections.abc.Awaitable[dict[session.SessionId, datetime.datetime]],
]


@dataclasses.dataclass(slots=True)
class Mended:
    """Counts of timers that were missing or elsewhere, and of members that were no session's timer."""

    armed: int = 0
    dropped: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class _Run:
    """One run: the database's time at its beginning, when it is to stop by time.monotonic(), and what it did."""

    now: datetime.datetime
    stop: float
    mended: Mended

    @property
    def over(self) -> bool:
        return time.monotonic() >= self.stop


@dataclasses.dataclass(frozen=True, slots=True)
class _Range:
    """Due times after `after` up to `until`."""

    after: datetime.datetime
    until: datetime.datetime

    @property
    def scores(self) -> tuple[str, str]:
        highest = "+inf" if self.until == _LAST else jobs.score(self.until.timestamp())
        return f"({jobs.score(self.after.timestamp())}", highest


async def pages(
    read: ReadDue, after: datetime.datetime, until: datetime.datetime, most: int
) -> collections.abc.AsyncGenerator[list[store.Due], None]:
    """Read what is due after one time and up to another, at most `most` at a time."""
    last = _LAST_ID
    while True:
        due = await read(after, last, until, most)
        if due:
            yield due
        if len(due) < most:
            return
        last, after = due[-1]


class Sweep:
    """Mends the timers of a kind: sets the missing ones, corrects those that moved, and drops those of no session.

    What is due soon is compared one by one in every run. The rest is counted, in slices of 1,000, which costs little
    however many sessions there are, and where the counts differ the slice is compared; a few others take turns. So one
    run finds every timer that was lost, and a timer that moved within its slice is found when its turn comes.
    """

    def __init__(self, timers: timers.Timers, due: ReadDue, slices: CountSlices, still: ReadStill) -> None:
        self._timers = timers
        self._due = due
        self._slices = slices
        self._still = still
        # Where the next run goes on, if the last one had not enough time, and where the next turn begins.
        self._reached: datetime.datetime | None = None
        self._turn: datetime.datetime | None = None

    async def run_once(self, now: datetime.datetime, soon: datetime.datetime, seconds: float) -> Mended:
        """Compare what is due up to `soon`, and the rest for at most `seconds`. Raise RedisError or StoreUnavailable.

        What is due by `now` is left to whoever has claimed it.
        """
        run = _Run(now, time.monotonic() + seconds, Mended())
        await self._compare(run, _Range(now, soon))
        after = max(soon, self._reached or soon)
        by_turn: list[_Range] = []
        while after < _LAST and not run.over:
            counted = await self._count(after)
            present = await self._timers.count([each.scores for each, _ in counted])
            for (slice_, sessions), members in zip(counted, present, strict=True):
                if sessions != members:
                    await self._compare(run, slice_)
                elif len(by_turn) < _BY_TURN and slice_.until > (self._turn or soon):
                    by_turn.append(slice_)
                after = slice_.until
                if run.over:
                    break
        self._reached = after if after < _LAST else None
        for slice_ in by_turn:
            if not run.over:
                await self._compare(run, slice_)
                self._turn = slice_.until if slice_.until < _LAST else None
        return run.mended

    async def _count(self, after: datetime.datetime) -> list[tuple[_Range, int]]:
        """Count sessions in slices. The last slice of all has no session: what is in Redis beyond them is no timer."""
        counted: list[tuple[_Range, int]] = []
        found = await self._slices(after, _SLICE, _COUNTED)
        # Slices whose sessions are all due at the same instant are one.
        for until, slices in itertools.groupby(found, lambda each: each[0]):
            counted.append((_Range(after, until), sum(sessions for _, sessions in slices)))
            after = until
        if sum(sessions for _, sessions in found) < _COUNTED:
            counted.append((_Range(after, _LAST), 0))
        return counted

    async def _compare(self, run: _Run, range_: _Range) -> None:
        """Set every timer of a range to where it belongs, and drop whatever else is there."""
        expected: set[uuid.UUID] = set()
        async for due in pages(self._due, range_.after, range_.until, _SLICE):
            await self._arm(run, due)
            expected.update(session_id for session_id, _ in due)
        [members] = await self._timers.count([range_.scores])
        if members > len(expected):
            await self._drop(run, range_, expected)

    async def _arm(self, run: _Run, due: list[store.Due]) -> None:
        changed = await self._timers.arm(due)
        run.mended.armed += changed
        if changed:
            # Sessions may have ended, or been extended, since they were read, and their timers been removed or moved
            # just before they were set again.
            still = await self._still([id for id, _ in due])
            await self._timers.drop_of([id for id, _ in due if id not in still])
            await self._timers.arm([(id, still[id]) for id, at in due if still.get(id, at) != at])

    async def _drop(self, run: _Run, range_: _Range, expected: collections.abc.Set[uuid.UUID]) -> None:
        offset = 0
        # There may be any number of them, if somebody else wrote them; the next run goes on.
        while not run.over and (members := await self._timers.members(*range_.scores, offset, _SLICE)):
            others = {member: session_id for member, session_id in members.items() if session_id not in expected}
            # Read after the timers: a session is committed before its timer is set.
            still = await self._still([session_id for session_id in others.values() if session_id])
            stale = [member for member, session_id in others.items() if session_id not in still]
            await self._timers.drop(stale)
            # One that is due already has been claimed, and its score is the end of a lease.
            await self._timers.arm([(session_id, due) for session_id, due in still.items() if due > run.now])
            run.mended.dropped += len(stale)
            offset += len(members) - len(stale)
