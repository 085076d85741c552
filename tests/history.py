"""What callers saw, and whether one service that does one thing at a time could have shown it to them.

The idea is Porcupine's: each call has the time it was made and the time it was answered, and the history is accepted if
its calls can be put in an order that keeps every answer before every later call, and that a model the size of a dict
would have answered alike (Herlihy and Wing, "Linearizability", 1990). Users are independent, so each is checked alone.
The search is Lowe's just-in-time linearization ("Testing for linearizability", 2017): at each answer, every way to have
got there is kept, without those that another one makes needless.

Times are microseconds of the machine's clock, which is the database's too: an answer's own clock lies within its call.
"""

import asyncio
import bisect
import collections
import collections.abc
import dataclasses
import datetime
import heapq
import itertools
import operator
import sys
import time
import typing

import grpc
import replicas
from afterhours.v1 import session_pb2, session_service_pb2

SECOND = 1_000_000
FOREVER = sys.maxsize

OK = "OK"
# May have been applied, at any time after the call, or never.
UNKNOWN = "UNKNOWN"
# Not applied, whatever the state was.
NOT_APPLIED = frozenset({"DEADLINE_EXCEEDED", "OVERLOADED", "RATE_LIMITED", "SHUTTING_DOWN"})
REFUSALS = frozenset(
    {
        "NO_ACTIVE_SESSION",
        "PROFILE_NOT_FOUND",
        "PROFILE_REQUIRED",
        "REQUEST_ID_REUSED",
        "SESSION_ALREADY_ACTIVE",
    }
)
READS = frozenset({"get", "get_profile"})

Key = tuple[str, str, int]
_Id = tuple[str, str]


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """A session as an answer told it; `as_of` is the service's clock at that moment."""

    id: str
    start: int
    expire: int
    as_of: int
    active: bool = True
    reason: str = "UNSPECIFIED"
    raw: bytes = b""


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
    """A call of one user. `outcome` is OK, a reason of refusal, or UNKNOWN, with `returned` FOREVER then."""

    operation: str
    user: str
    called: int
    returned: int
    outcome: str = OK
    seconds: int = 0
    request_id: str = ""
    # Of an OK start, extend, end, and of a get that found an active session.
    session: Answer | None = None
    # Of SESSION_ALREADY_ACTIVE: the id and the expire_time of the session that is.
    told: tuple[str, int] | None = None
    # For people: the code, the replica.
    note: str = ""

    @property
    def key(self) -> Key | None:
        """What the service keeps its answer by, with its body."""
        return (self.operation, self.request_id, self.seconds) if self.request_id else None

    def line(self, since: int) -> str:
        """Tell it in one line, with times in seconds since an instant."""

        def at(instant: int) -> str:
            return "…" if instant == FOREVER else f"{(instant - since) / SECOND:.6f}"

        told = [self.operation, str(self.seconds or ""), self.request_id[:8], "->", self.outcome, self.note]
        if self.session:
            seen = self.session
            told.append(f"{seen.id[:8]} {at(seen.start)}..{at(seen.expire)} as of {at(seen.as_of)} {seen.reason}")
        if self.told:
            told.append(f"{self.told[0][:8]} ..{at(self.told[1])}")
        return f"{at(self.called):>12} {at(self.returned):>12}  " + " ".join(each for each in told if each)


def now() -> int:
    """Give the machine's clock, in microseconds, rounded down as Postgres does."""
    return time.time_ns() // 1000


def answer(told: session_pb2.Session) -> Answer:
    """Read a session of an answer."""
    expire = told.expire_time.ToMicroseconds()
    active = told.state == session_pb2.SESSION_STATE_ACTIVE
    return Answer(
        id=told.id,
        start=told.start_time.ToMicroseconds(),
        expire=expire,
        as_of=expire - told.remaining.ToMicroseconds() if active else told.end_time.ToMicroseconds(),
        active=active and not told.HasField("end_time"),
        reason=session_pb2.EndReason.Name(told.end_reason).removeprefix("END_REASON_"),
        raw=told.SerializeToString(deterministic=True),
    )


class Recorder:
    """Records calls as they are made."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    async def record(
        self,
        operation: str,
        user: str,
        making: collections.abc.Awaitable[object],
        *,
        seconds: int = 0,
        request_id: str = "",
        note: str = "",
    ) -> Call:
        """Make a call and record what came of it; only a cancellation is raised."""
        call = Call(operation, user, now(), FOREVER, UNKNOWN, seconds, request_id, note=note)
        try:
            result = await making
        except grpc.aio.AioRpcError as error:
            call = _refused(call, replicas.refusal(error))
        except asyncio.CancelledError:
            self.calls.append(call)
            raise
        else:
            call = _answered(call, result)
        self.calls.append(call)
        return call


def _answered(call: Call, result: object) -> Call:
    found: Answer | None = None
    if isinstance(result, session_pb2.Session):
        found = answer(result)
    elif isinstance(result, session_service_pb2.GetSessionResponse) and result.active:
        found = answer(result.session)
    return dataclasses.replace(call, returned=now() + 1, outcome=OK, session=found)


def _refused(call: Call, refusal: replicas.Refusal) -> Call:
    call = dataclasses.replace(call, note=f"{call.note} {refusal.code} {refusal.reason}".strip())
    if refusal.reason not in REFUSALS | NOT_APPLIED:
        return call
    told = None
    if refusal.reason == "SESSION_ALREADY_ACTIVE":
        expire = datetime.datetime.fromisoformat(refusal.metadata["expire_time"])
        epoch = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
        told = refusal.metadata["session_id"], (expire - epoch) // datetime.timedelta(microseconds=1)
    return dataclasses.replace(call, returned=now() + 1, outcome=refusal.reason, told=told)


class Running(typing.NamedTuple):
    """A session that was started and not ended; it may be overdue.

    One that was opened by a start without an answer has no id before somebody sees it; `start` is the earliest then.
    """

    id: str | None
    start: int
    length: int

    @property
    def expire(self) -> int:
        """When it expires, or the earliest that it may."""
        return self.start + self.length


class State(typing.NamedTuple):
    """All that the model knows of a user."""

    profile: bool = False
    session: Running | None = None
    # The calls that were applied under a request_id, as far as somebody still asks.
    kept: frozenset[Key] = frozenset()
    # The ids that were found to be those of starts without an answer.
    bound: frozenset[str] = frozenset()


class Model:
    """What one user's calls may be answered; `answers` are the ones that are known by request_id.

    Expiry is a matter of each call's own clock, which is known from most answers and else lies within the call. A
    session counts as expired for a call whose clock may have reached its `expire`, and as active for one that may not
    have.
    """

    def __init__(self, calls: collections.abc.Iterable[Call]) -> None:
        self._answers = {call.key: call.session for call in calls if call.key and call.session}
        self._started = {call.session.id for call in calls if call.operation == "start" and call.session}
        self._steps: dict[str, collections.abc.Callable[[State, Call, int], State | None]] = {
            "start": self._start,
            "extend": self._extend,
            "end": self._end,
            "get": self._get,
            "put_profile": self._put_profile,
            "delete_profile": self._delete_profile,
            "get_profile": self._get_profile,
        }

    def step(self, state: State, call: Call, at: int) -> State | None:
        """Give the state after a call that took effect by `at`, or None if it cannot have been answered so.

        A call of unknown outcome must have changed something: one that did not need not have been.
        """
        key = call.key
        until = at if call.outcome == UNKNOWN else call.returned
        applied = [kept for kept in state.kept if key and kept[:2] == key[:2]]
        if applied:
            replayed = OK if key in applied else "REQUEST_ID_REUSED"
            return state if call.outcome == replayed else None
        if call.outcome == "REQUEST_ID_REUSED":
            return None
        after = self._steps[call.operation](state, call, until)
        if after is not None and key and call.outcome in (OK, UNKNOWN):
            after = after._replace(kept=after.kept | {key})
        return after

    def _told(self, call: Call) -> Answer | None:
        """Give the answer, or the one that a retry of the call was given."""
        return call.session or (self._answers.get(call.key) if call.key else None)

    def _seen(self, state: State, id: str, start: int | None, expire: int) -> State | None:
        """Give the state if the user's session is this one; a session without id becomes it."""
        session = state.session
        if session is None:
            return None
        start = expire - session.length if start is None else start
        seen = Running(id, start, expire - start)
        if session.id is not None:
            return state if session == seen else None
        fits = session.start <= start and session.length == seen.length
        if not fits or id in self._started or id in state.bound:
            return None
        return state._replace(session=seen, bound=state.bound | {id})

    def _start(self, state: State, call: Call, until: int) -> State | None:
        if call.outcome == "PROFILE_REQUIRED":
            return None if state.profile else state
        if not state.profile:
            return None
        if call.outcome == "SESSION_ALREADY_ACTIVE":
            if not call.told or call.called >= call.told[1]:
                return None
            return self._seen(state, call.told[0], None, call.told[1])
        return self._opened(state, call, until)

    def _opened(self, state: State, call: Call, until: int) -> State | None:
        told, session, length = self._told(call), state.session, call.seconds * SECOND
        if told is None:
            start = max(call.called, session.expire) if session else call.called
            return state._replace(session=Running(None, start, length)) if start <= until else None
        if not call.called <= told.start <= until or (session and session.expire > told.start):
            return None
        return state._replace(session=Running(told.id, told.start, length))

    def _extend(self, state: State, call: Call, until: int) -> State | None:
        added = call.seconds * SECOND
        before = self._changed(state, call, until, added)
        if before is None or call.outcome == "NO_ACTIVE_SESSION":
            return before
        session = before.session
        return before._replace(session=session._replace(length=session.length + added)) if session else None

    def _end(self, state: State, call: Call, until: int) -> State | None:
        before = self._changed(state, call, until, 0)
        if before is None or call.outcome == "NO_ACTIVE_SESSION":
            return before
        return before._replace(session=None)

    def _changed(self, state: State, call: Call, until: int, added: int) -> State | None:
        """Give the state that an extend or end met, with its session active, or for a refusal without one."""
        session = state.session
        if call.outcome == "NO_ACTIVE_SESSION":
            return state if session is None or session.expire <= until else None
        told = self._told(call)
        if told is None:
            open_ = session and (session.id is None or call.called < session.expire)
            return state if open_ else None
        if not call.called <= told.as_of <= until or not told.start <= told.as_of < told.expire - added:
            return None
        return self._seen(state, told.id, told.start, told.expire - added)

    def _get(self, state: State, call: Call, until: int) -> State | None:
        told, session = call.session, state.session
        if told is None:
            return state if session is None or session.expire <= until else None
        if not call.called <= told.as_of <= until or not told.start <= told.as_of < told.expire:
            return None
        return self._seen(state, told.id, told.start, told.expire)

    def _put_profile(self, state: State, call: Call, _: int) -> State | None:
        if call.outcome == UNKNOWN and state.profile:
            return None
        return state._replace(profile=True)

    def _delete_profile(self, state: State, call: Call, _: int) -> State | None:
        if call.outcome == "PROFILE_NOT_FOUND":
            return None if state.profile else state
        return state._replace(profile=False, session=None) if state.profile else None

    def _get_profile(self, state: State, call: Call, _: int) -> State | None:
        return state if state.profile == (call.outcome == OK) else None


@dataclasses.dataclass(frozen=True, slots=True)
class Rejection:
    """Why a user's calls cannot have been answered so: the call that nothing explains, and what was possible before."""

    user: str
    why: str
    call: Call
    before: tuple[State, ...]
    calls: tuple[Call, ...]

    def __str__(self) -> str:
        """Tell it, with the user's calls up to the end of the one that nothing explains."""
        since = self.calls[0].called
        lines = [
            f"{'>' if call is self.call else ' '} {call.line(since)}"
            for call in self.calls
            if call.called <= self.call.returned
        ]
        possible = [f"  {state}" for state in self.before[:5]]
        return "\n".join([f"{self.user}: {self.why}, times since {since}", *lines, "possible before it:", *possible])


def check(calls: collections.abc.Iterable[Call]) -> list[Rejection]:
    """Give what no order of the calls explains, at most one rejection a user; empty: the history is accepted."""
    by_user: dict[str, list[Call]] = collections.defaultdict(list)
    for call in calls:
        changed_nothing = call.outcome in NOT_APPLIED or (call.outcome == UNKNOWN and call.operation in READS)
        if not changed_nothing:
            by_user[call.user].append(call)
    found = [_check_user(user, sorted(own, key=lambda call: call.called)) for user, own in by_user.items()]
    return [each for each in found if each]


def _check_user(user: str, calls: list[Call]) -> Rejection | None:
    first: dict[object, Call] = {}
    for call in calls:
        why = _malformed(call)
        told = call.session
        if told and call.operation != "get":
            if call.key and first.setdefault(call.key, call).session != told:
                why = "another answer to the same request_id"
            other = first.setdefault(told.id, call) if call.operation == "start" else call
            if other is not call and (not call.key or other.key != call.key):
                why = "two starts opened one session"
        if why:
            return Rejection(user, why, call, (), tuple(calls))
    return _Search(calls).run(user)


def _malformed(call: Call) -> str | None:
    """Give what is wrong with an answer in itself."""
    told = call.session
    if call.outcome != OK or told is None:
        needed = call.outcome == OK and call.operation in ("start", "extend", "end")
        return "an answer without a session" if needed else None
    if call.operation == "end":
        return None if not told.active and told.reason == "USER" else "an end that did not end"
    if not told.active or told.reason != "UNSPECIFIED":
        return "not active"
    if call.operation == "start" and (told.as_of != told.start or told.expire - told.start != call.seconds * SECOND):
        return "expire_time is not start_time + duration"
    return None


class _Config(typing.NamedTuple):
    """A way to have got here.

    `done` are the calls in flight that took effect already, `used` how many of each class of those without an answer.
    """

    state: State
    done: frozenset[int]
    used: tuple[int, ...]


class _Ways:
    """Ways to have got here, without those that used more calls without an answer than another to the same state.

    What is not used may still take effect, so that the other one can go on as it likes.
    """

    def __init__(self) -> None:
        self._fewest: dict[tuple[State, frozenset[int]], list[tuple[int, ...]]] = collections.defaultdict(list)

    def add(self, config: _Config) -> bool:
        """Add a way, unless it is needless."""
        fewest = self._fewest[config.state, config.done]
        if any(all(map(operator.le, used, config.used)) for used in fewest):
            return False
        fewest[:] = [used for used in fewest if not all(map(operator.le, config.used, used))]
        fewest.append(config.used)
        return True

    def all(self) -> set[_Config]:
        """Give them all."""
        return {_Config(*way, used) for way, fewest in self._fewest.items() for used in fewest}


class _Search:
    def __init__(self, calls: list[Call]) -> None:
        self._calls = calls
        self._model = Model(calls)
        self._flying: set[int] = set()
        # When a request_id is last told about, and those that were applied for certain.
        self._asked: dict[_Id, int] = {}
        self._applied: set[_Id] = set()
        for call in calls:
            if call.request_id and call.outcome != UNKNOWN:
                self._asked[_id(call)] = max(self._asked.get(_id(call), 0), call.returned)
                if call.outcome in (OK, "REQUEST_ID_REUSED"):
                    self._applied.add(_id(call))
        # Calls without an answer: those whose request_id somebody is still told about, and the others. Of these, which
        # of two alike took effect makes no difference, so they are counted by class. One request_id counts once.
        self._live: dict[Key, int] = {}
        self._classes = sorted({_class(call) for call in calls if call.outcome == UNKNOWN})
        self._units: list[list[int]] = [[] for _ in self._classes]
        self._counted: set[_Id] = set()

    def run(self, user: str) -> Rejection | None:
        calls = self._calls
        events = [(call.called, 0, number) for number, call in enumerate(calls)]
        events += [(call.returned, 1, number) for number, call in enumerate(calls) if call.outcome != UNKNOWN]
        configs = {_Config(State(), frozenset(), (0,) * len(self._classes))}
        for at, is_return, number in sorted(events):
            if not is_return:
                self._made(number)
                continue
            after = self._after(configs, number, at)
            if not after:
                before = tuple({config.state for config in configs})
                return Rejection(user, "no order explains it", calls[number], before, tuple(calls))
            self._flying.discard(number)
            if self._asked.get(_id(calls[number])) == at:
                after = self._forgotten(after, _id(calls[number]))
            configs = after
        return None

    def _made(self, number: int) -> None:
        call = self._calls[number]
        id = _id(call)
        if call.outcome != UNKNOWN:
            self._flying.add(number)
        elif call.key and self._asked.get(id, 0) >= call.called:
            self._live.setdefault(call.key, number)
        elif id not in self._applied:
            self._count(number)

    def _count(self, number: int) -> None:
        call = self._calls[number]
        if not call.request_id or _id(call) not in self._counted:
            bisect.insort(self._units[self._classes.index(_class(call))], number)
            self._counted.add(_id(call))

    def _forgotten(self, configs: set[_Config], id: _Id) -> set[_Config]:
        """Drop what is kept for a request_id that nobody is told about any more."""
        for key in [key for key in self._live if key[:2] == id]:
            number = self._live.pop(key)
            if id not in self._applied:
                self._count(number)
        after = set()
        for state, done, used in configs:
            kept = {key for key in state.kept if key[:2] == id}
            taken = [(key[0], key[2]) for key in kept if id not in self._applied]
            counts = tuple(used[index] + taken.count(each) for index, each in enumerate(self._classes))
            after.add(_Config(state._replace(kept=state.kept - kept), done, counts))
        return after

    def _after(self, configs: set[_Config], number: int, at: int) -> set[_Config]:
        """Give every way in which a call may have taken effect by now, without those that another makes needless."""
        after = _Ways()
        # Those that used fewest calls without an answer come first: others may be needless then.
        seen = _Ways()
        order = itertools.count()
        left = [(sum(config.used), next(order), config) for config in configs]
        heapq.heapify(left)
        while left:
            config = self._with_reads(heapq.heappop(left)[2], at)
            if number in config.done:
                after.add(config._replace(done=config.done - {number}))
            elif seen.add(config):
                for further in self._further(config, at):
                    heapq.heappush(left, (sum(further.used), next(order), further))
        return after.all()

    def _with_reads(self, config: _Config, at: int) -> _Config:
        """Have every call take effect that changes nothing, and never will: to wait with it is of no use."""
        state, done, used = config
        pure = {number for number in self._flying - done if self._changes_nothing(state, self._calls[number], at)}
        return _Config(state, done | pure, used) if pure else config

    def _changes_nothing(self, state: State, call: Call, at: int) -> bool:
        replayed = call.outcome == OK and call.operation not in READS and call.key in state.kept
        never = replayed or call.operation in READS or call.outcome != OK
        return never and self._model.step(state, call, at) == state

    def _further(self, config: _Config, at: int) -> collections.abc.Iterator[_Config]:
        state, done, used = config
        for number in self._flying - done:
            after = self._model.step(state, self._calls[number], at)
            if after is not None:
                yield _Config(after, done | {number}, used)
        for number in self._live.values():
            after = self._model.step(state, self._calls[number], at)
            if after is not None:
                yield _Config(after, done, used)
        for index, units in enumerate(self._units):
            count = used[index]
            if count == len(units):
                continue
            # Starts are in the order of their clocks. Of others the earliest is allowed most.
            number = units[count if self._classes[index][0] == "start" else 0]
            after = self._model.step(state, self._calls[number], at)
            if after is not None:
                after = after._replace(kept=state.kept)
                yield _Config(after, done, (*used[:index], count + 1, *used[index + 1 :]))


def _id(call: Call) -> _Id:
    return call.operation, call.request_id


def _class(call: Call) -> tuple[str, int]:
    return call.operation, call.seconds
