"""The use cases. Each transition is tried, and only what came back without an answer is explained, by one read."""

import collections.abc
import dataclasses
import functools
import typing

import structlog

from afterhours_grpc import failpoints, logs
from afterhours_grpc.sessions import errors, location, session
from afterhours_grpc.store import batching, database, privacy, rows, store

log = structlog.get_logger()

Answers = list[session.Session | Exception]
_Timed = typing.TypeVar("_Timed")

_CLOSED: dict[session.Gate, type[errors.SessionError]] = {
    session.Gate.PREMIUM: errors.PremiumRequired,
    session.Gate.VERIFIED: errors.VerificationRequired,
    session.Gate.CONSENT: errors.ConsentRequired,
}


class Timers(typing.Protocol):
    """Where the end of a session is timed. It never fails: what it could not write is swept up later."""

    async def set(self, sessions: collections.abc.Sequence[session.Session]) -> None:
        """Time sessions, or move their timers to a later time."""

    async def cancel(self, ids: collections.abc.Sequence[session.SessionId]) -> None:
        """Drop the timers of sessions that ended."""


class Limiter(typing.Protocol):
    """How often a user may start and extend. It never waits long, and never raises."""

    async def admit(self, user_ids: collections.abc.Sequence[session.UserId]) -> list[errors.RateLimited | None]:
        """Count a call of each of these users, which are distinct, or return what it is refused with."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Placed:
    """A start, and the places at which it may be shown."""

    call: session.Start
    candidates: tuple[location.Candidate, ...]


class Sessions:
    """Start, end, extend and get sessions, and keep their timers in step: commit, then set the timer."""

    def __init__(
        self,
        store: store.Store,
        privacy: privacy.Privacy,
        timers: Timers,
        fuzzer: location.Fuzzer,
        limiter: Limiter | None,
    ) -> None:
        self._store = store
        self._privacy = privacy
        self._limiter = limiter
        self._timers = timers
        self._fuzzer = fuzzer
        self._starts = batching.Batcher(
            self._start, lambda placed: _keys(placed.call), admit=self._admit_starts if limiter else None
        )
        self._ends = batching.Batcher(self._end, _keys)
        self._extends = batching.Batcher(
            self._extend, _keys, admit=functools.partial(self._admit, session.Method.EXTEND) if limiter else None
        )
        self._gets = batching.Batcher(self._get, lambda user_id: (user_id,), reads=True)
        self._exact = batching.Batcher(self._read_exact, lambda call: (str(call.id),), max_batch=1)

    async def start(self, call: session.Start) -> session.Session:
        """Open a session.

        Raise RequestIdReused, RateLimited, ProfileRequired, one of the gates' refusals, or SessionAlreadyActive.
        """
        # Here, and not in the batch, where an error would be that of all its calls.
        placed = _Placed(call, self._fuzzer.candidates(call.user_id, call.exact))
        return await self._starts.submit(placed, call.deadline)

    async def end(self, call: session.End) -> session.Session:
        """End the active session, or raise RequestIdReused or NoActiveSession."""
        return await self._ends.submit(call, call.deadline)

    async def extend(self, call: session.Extend) -> session.Session:
        """Move the end of the active session.

        Raise RequestIdReused, RateLimited, one of the gates' refusals, or NoActiveSession.
        """
        return await self._extends.submit(call, call.deadline)

    async def get(self, user_id: session.UserId, deadline: session.Deadline) -> session.Session | None:
        """Read the active session."""
        return await self._gets.submit(user_id, deadline)

    async def exact_location(self, call: session.ExactRead) -> location.ExactLocation:
        """Read where a session was started, and record who did. Raise SessionNotFound or LocationErased."""
        return await self._exact.submit(call, call.deadline)

    async def close(self) -> None:
        """Wait until what was taken has been answered."""
        for batcher in (self._starts, self._ends, self._extends, self._gets, self._exact):
            await batcher.close()

    async def _admit_starts(self, placed: list[_Placed]) -> list[Exception | None]:
        return await self._admit(session.Method.START, [each.call for each in placed])

    async def _admit(
        self, method: session.Method, calls: collections.abc.Sequence[session.Start | session.Extend]
    ) -> list[Exception | None]:
        """Count calls, but for those that were applied before: a replay is answered whatever the limit."""
        assert self._limiter  # noqa: S101 - asked only where there is one
        requests = [(method, call.request) for call in calls if call.request]
        applied = iter(await self._store.kept(requests) if requests else ())
        replays = [call.request is not None and next(applied) for call in calls]
        new = [call.user_id for call, is_replay in zip(calls, replays, strict=True) if not is_replay]
        refusals = iter(await self._limiter.admit(new) if new else ())
        return [None if is_replay else next(refusals) for is_replay in replays]

    async def _start(self, placed: list[_Placed]) -> Answers:
        calls = [each.call for each in placed]
        opened = await self._store.start(calls, [each.candidates for each in placed])
        failpoints.reach(failpoints.Point.STARTED)
        await _after_commit(self._timers.set, [each for each in opened if each])
        failpoints.reach(failpoints.Point.TIMED)
        return await self._explained(session.Method.START, calls, opened)

    async def _end(self, calls: list[session.End]) -> Answers:
        ended = await self._store.end(calls, session.EndReason.USER)
        await _after_commit(self._timers.cancel, [each.id for each in ended if each])
        return await self._explained(session.Method.END, calls, ended)

    async def _extend(self, calls: list[session.Extend]) -> Answers:
        extended = await self._store.extend(calls)
        await _after_commit(self._timers.set, [each for each in extended if each])
        return await self._explained(session.Method.EXTEND, calls, extended)

    async def _get(self, user_ids: list[session.UserId]) -> list[session.Session | None]:
        return await self._store.get(user_ids)

    async def _read_exact(self, calls: list[session.ExactRead]) -> list[location.ExactLocation]:
        return [await self._privacy.read_exact(call) for call in calls]

    async def _explained(
        self,
        method: session.Method,
        calls: collections.abc.Sequence[rows.Call],
        found: list[session.Session | None],
    ) -> Answers:
        refused = [call for call, each in zip(calls, found, strict=True) if each is None]
        reasons: collections.abc.Iterable[session.Session | Exception] = ()
        if refused:
            try:
                explanations = await self._store.explain(method, refused)
                reasons = [_why(method, *each) for each in zip(refused, explanations, strict=True)]
            except Exception as error:  # noqa: BLE001 - the other calls were applied, and are answered as such
                # These were not, so that each may be tried by itself: the error is of one of them, and no other.
                alone = len(refused) == 1 or isinstance(error, errors.SessionError)
                reasons = [error if alone else database.Retry()] * len(refused)
        reason = iter(reasons)
        return [each or next(reason) for each in found]


class Profiles:
    """Put, get and delete profiles."""

    def __init__(self, store: store.Store, timers: Timers) -> None:
        self._store = store
        self._timers = timers
        # One statement a call, in a task that a cancelled caller leaves behind to finish.
        self._puts = batching.Batcher(self._put, lambda profile: (profile.user_id,), max_batch=1)
        self._gets = batching.Batcher(self._get, lambda user_id: (user_id,), reads=True)
        self._deletes = batching.Batcher(self._delete, lambda user_id: (user_id,), max_batch=1)

    async def put(self, profile: session.Profile, deadline: session.Deadline) -> session.Profile:
        """Create or replace a profile."""
        return await self._puts.submit(profile, deadline)

    async def get(self, user_id: session.UserId, deadline: session.Deadline) -> session.Profile:
        """Read a profile, or raise ProfileNotFound."""
        return await self._gets.submit(user_id, deadline)

    async def delete(self, user_id: session.UserId, deadline: session.Deadline) -> None:
        """Delete a profile and end its active session, or raise ProfileNotFound."""
        await self._deletes.submit(user_id, deadline)

    async def close(self) -> None:
        """Wait until what was taken has been answered."""
        for batcher in (self._puts, self._gets, self._deletes):
            await batcher.close()

    async def _put(self, profiles: list[session.Profile]) -> list[session.Profile]:
        for profile in profiles:
            await _after_commit(self._timers.cancel, await self._store.put_profile(profile))
        return profiles

    async def _get(self, user_ids: list[session.UserId]) -> list[session.Profile | Exception]:
        profiles = await self._store.get_profiles(user_ids)
        return [profiles.get(user_id) or errors.ProfileNotFound() for user_id in user_ids]

    async def _delete(self, user_ids: list[session.UserId]) -> list[Exception | None]:
        answers: list[Exception | None] = []
        for user_id in user_ids:
            found, ended = await self._store.delete_profile(user_id)
            await _after_commit(self._timers.cancel, ended)
            answers.append(None if found else errors.ProfileNotFound())
        return answers


async def _after_commit(
    change: collections.abc.Callable[[collections.abc.Sequence[_Timed]], collections.abc.Awaitable[None]],
    what: collections.abc.Sequence[_Timed],
) -> None:
    """Change timers. No error of it reaches a caller whose call was applied: the next sweep mends the timers."""
    try:
        await change(what)
    except Exception as error:  # noqa: BLE001 - see above
        log.error("timers_not_changed", **logs.described(error))


def _keys(call: rows.Call) -> tuple[collections.abc.Hashable, ...]:
    """Return what two calls of one statement must not share."""
    if call.request is None:
        return (call.user_id,)
    return (call.user_id, (call.request.caller, call.request.id))


def _why(method: session.Method, call: rows.Call, explanation: rows.Explanation) -> session.Session | Exception:
    """Decide what a call without an answer is told, in the order of the contract's checks."""
    kept = explanation.kept
    if kept is not None:
        same = call.request is not None and call.request.fingerprint == kept.fingerprint
        return kept.session if same else errors.RequestIdReused()
    if method is session.Method.START and not explanation.has_profile:
        return errors.ProfileRequired(call.user_id)
    if method is not session.Method.END and explanation.closed:
        return _CLOSED[explanation.closed]()
    starting = method is session.Method.START
    if starting is (explanation.active is not None):
        return errors.SessionAlreadyActive(*explanation.active) if explanation.active else errors.NoActiveSession()
    if field := explanation.too_long(call):
        return errors.InvalidRequest((errors.Violation(field, "must not move the end past the year 9998"),))
    # Nothing stands against it now: it was the deadline, or what did ended, or began, between the two statements.
    return database.Retry()
