"""A model the size of a dict, stepped beside the service: whatever is asked in whatever order, both say the same."""

import asyncio
import collections.abc
import contextlib
import dataclasses
import datetime
import itertools
import typing

import asyncpg
import hypothesis
import hypothesis.stateful
import onlooker
import replicas
from afterhours.v1 import session_pb2
from hypothesis import strategies
from redis import asyncio as redis

Result = typing.TypeVar("Result")

_numbers = itertools.count()
LENGTHS = strategies.sampled_from([900, 1800, 3600])
# A kept answer is forgotten after 24 hours, and nothing here is to come near that.
_LONGEST = datetime.timedelta(hours=20)
# Restarts take most of the time.
_RESTARTS = 1


class Service:
    """A replica on real engines, with its own event loop, that steps can wait for; its clock goes forward only."""

    def __init__(self, engines: replicas.Engines) -> None:
        self.engines = engines
        self.offset = datetime.timedelta()
        self._runner = asyncio.Runner()
        self._stack = contextlib.AsyncExitStack()

    def __enter__(self) -> typing.Self:
        self._runner.__enter__()
        self.wait(self._start())
        self._connection = self.wait(asyncpg.connect(self.engines.database_url))
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.wait(self._connection.close())
            self.wait(self._stack.aclose())
        finally:
            self._runner.close()

    def wait(self, coroutine: collections.abc.Coroutine[object, object, Result]) -> Result:
        """Give the result of a coroutine."""
        return self._runner.run(coroutine)

    async def _start(self) -> None:
        running = replicas.replica(self.engines, AFTERHOURS_RECONCILE_INTERVAL="1s")
        self._service, self.client = await self._stack.enter_async_context(running)
        self._service.database.clock_offset = self.offset

    async def restart(self) -> None:
        """Drain and close it, and start another."""
        await self._stack.aclose()
        await self._start()

    def forward(self, length: datetime.timedelta) -> None:
        """Move its clock."""
        self.offset += length
        self._service.database.clock_offset = self.offset

    async def now(self) -> datetime.datetime:
        """Read its clock."""
        [(at,)] = await self.rows("SELECT clock_timestamp()")
        now: datetime.datetime = at + self.offset
        return now

    async def rows(self, query: str, *arguments: object) -> list[asyncpg.Record]:
        """Run SQL, past the service."""
        found: list[asyncpg.Record] = await self._connection.fetch(query, *arguments)
        return found

    async def forget_timers(self) -> None:
        """Have Redis lose everything."""
        async with redis.Redis.from_url(self.engines.redis_url) as client:
            await client.flushall()


@dataclasses.dataclass
class Row:
    """A session, as the model knows it."""

    id: str
    start: datetime.datetime
    expire: datetime.datetime
    end: datetime.datetime | None = None
    reason: str | None = None


@dataclasses.dataclass(frozen=True)
class Sent:
    """A call that was applied under a request_id, and its answer."""

    method: str
    seconds: int
    request_id: str
    answer: session_pb2.Session


class Machine(hypothesis.stateful.RuleBasedStateMachine):
    """One user's calls; each example has a user of its own, and all have one service."""

    service: typing.ClassVar[Service]

    def __init__(self) -> None:
        super().__init__()
        self.user = f"user {next(_numbers)}"
        self.profile = False
        self.rows: list[Row] = []
        self.sent: list[Sent] = []
        self.passed = datetime.timedelta()
        self.restarts = 0

    def active(self) -> Row | None:
        """Give the active session: what is overdue has ended, whether or not anything has closed it."""
        now = self.service.wait(self.service.now())
        last = self.rows[-1] if self.rows else None
        if last and last.end is None and last.expire <= now:
            last.end, last.reason = last.expire, "EXPIRED"
        return last if last and last.end is None else None

    def call(self, method: str, seconds: int = 0, request_id: str = "") -> session_pb2.Session | replicas.Refusal:
        """Call start, extend or end."""
        arguments = [seconds] if seconds else []
        calling = getattr(self.service.client, method)(self.user, *arguments, request_id=request_id)
        return self.service.wait(replicas.outcome(calling))

    def apply(self, method: str, seconds: int, kept: bool) -> session_pb2.Session | replicas.Refusal:
        """Call, and remember an answer that is kept."""
        request_id = replicas.request_id() if kept else ""
        answer = self.call(method, seconds, request_id)
        if request_id and isinstance(answer, session_pb2.Session):
            self.sent.append(Sent(method, seconds, request_id, answer))
        elif request_id and isinstance(answer, replicas.Refusal):
            # A refused call is not kept: it is refused again, and not as a replay.
            again = self.call(method, seconds, request_id)
            assert isinstance(again, replicas.Refusal)
            assert again.reason == answer.reason
        return answer

    @hypothesis.stateful.rule(seconds=LENGTHS, kept=strategies.booleans())
    def start(self, seconds: int, kept: bool) -> None:
        """Start."""
        active = self.active()
        answer = self.apply("start", seconds, kept)
        if not self.profile:
            assert refused(answer) == "PROFILE_REQUIRED"
        elif active:
            assert refused(answer) == "SESSION_ALREADY_ACTIVE"
            assert isinstance(answer, replicas.Refusal)
            assert answer.metadata["session_id"] == active.id
            assert datetime.datetime.fromisoformat(answer.metadata["expire_time"]) == active.expire
        else:
            told = row(answer)
            assert told.expire - told.start == datetime.timedelta(seconds=seconds)
            assert (told.end, told.reason) == (None, None)
            assert told.id not in [each.id for each in self.rows]
            assert not self.rows or (self.rows[-1].end or told.start) <= told.start
            self.rows.append(told)

    @hypothesis.stateful.rule(seconds=LENGTHS, kept=strategies.booleans())
    def extend(self, seconds: int, kept: bool) -> None:
        """Extend."""
        active = self.active()
        answer = self.apply("extend", seconds, kept)
        if not active:
            assert refused(answer) == "NO_ACTIVE_SESSION"
        else:
            active.expire += datetime.timedelta(seconds=seconds)
            assert row(answer) == active

    @hypothesis.stateful.rule(kept=strategies.booleans())
    def end(self, kept: bool) -> None:
        """End."""
        active = self.active()
        before = self.service.wait(self.service.now())
        answer = self.apply("end", 0, kept)
        if not active:
            assert refused(answer) == "NO_ACTIVE_SESSION"
        else:
            told = row(answer)
            assert told.end
            assert before <= told.end <= self.service.wait(self.service.now())
            active.end, active.reason = told.end, "USER"
            assert told == active

    @hypothesis.stateful.precondition(lambda self: bool(self.sent))
    @hypothesis.stateful.rule(data=strategies.data())
    def replay(self, data: strategies.DataObject) -> None:
        """Send an applied call again: it is answered as it was, byte for byte."""
        sent = data.draw(strategies.sampled_from(self.sent))
        assert self.call(sent.method, sent.seconds, sent.request_id) == sent.answer

    @hypothesis.stateful.precondition(lambda self: any(each.seconds for each in self.sent))
    @hypothesis.stateful.rule(data=strategies.data())
    def reuse(self, data: strategies.DataObject) -> None:
        """Send an applied call's request_id with another body: it is refused, and changes nothing."""
        sent = data.draw(strategies.sampled_from([each for each in self.sent if each.seconds]))
        other = 1800 if sent.seconds == 900 else 900
        assert refused(self.call(sent.method, other, sent.request_id)) == "REQUEST_ID_REUSED"

    @hypothesis.stateful.initialize()
    def begin(self) -> None:
        """Begin with a profile, as most do."""
        self.put_profile()

    @hypothesis.stateful.rule()
    def put_profile(self) -> None:
        """Put a profile."""
        self.service.wait(self.service.client.put_profile(self.user))
        self.profile = True

    @hypothesis.stateful.rule()
    def delete_profile(self) -> None:
        """Delete the profile."""
        active = self.active()
        before = self.service.wait(self.service.now())
        answer = self.service.wait(replicas.outcome(self.service.client.delete_profile(self.user)))
        assert refused(answer) == (None if self.profile else "PROFILE_NOT_FOUND")
        self.profile = False
        if active:
            [stored] = self.stored()[-1:]
            assert stored.end
            assert before <= stored.end <= self.service.wait(self.service.now())
            active.end, active.reason = stored.end, "PROFILE_REMOVED"

    @hypothesis.stateful.precondition(lambda self: self.passed < _LONGEST)
    @hypothesis.stateful.rule(minutes=strategies.sampled_from([14, 16, 60]))
    def pass_time(self, minutes: int) -> None:
        """Let time pass."""
        self.passed += datetime.timedelta(minutes=minutes)
        self.service.forward(datetime.timedelta(minutes=minutes))

    @hypothesis.stateful.precondition(lambda self: self.passed < _LONGEST)
    @hypothesis.stateful.rule(then=strategies.sampled_from(["start", "extend", "end"]))
    def expire(self, then: str) -> None:
        """Let time pass to the very end of the active session, and call at once: nothing has closed it yet."""
        active = self.active()
        left = active.expire - self.service.wait(self.service.now()) if active else datetime.timedelta()
        if left > _LONGEST - self.passed:
            return
        self.passed += left
        self.service.forward(left)
        if then == "end":
            self.end(kept=False)
        else:
            getattr(self, then)(seconds=900, kept=False)

    @hypothesis.stateful.precondition(lambda self: self.restarts < _RESTARTS and bool(self.rows))
    @hypothesis.stateful.rule()
    def restart(self) -> None:
        """Restart the service."""
        self.restarts += 1
        self.service.wait(self.service.restart())

    @hypothesis.stateful.rule()
    def forget_timers(self) -> None:
        """Have Redis lose everything."""
        self.service.wait(self.service.forget_timers())

    @hypothesis.stateful.invariant()
    def told_alike(self) -> None:
        """Get the active session, or none."""
        active = self.active()
        found = self.service.wait(self.service.client.get(self.user))
        assert found.active == found.HasField("session") == (active is not None)
        if active:
            assert row(found.session) == active
            assert found.session.remaining.ToTimedelta() > datetime.timedelta()

    @hypothesis.stateful.invariant()
    def stored_alike(self) -> None:
        """Find the model's rows, but that an overdue one may wait to be closed."""
        self.active()
        stored = self.stored()
        for each, known in zip(stored, self.rows, strict=True):
            waits = each.end is None and known.reason == "EXPIRED"
            assert (each if not waits else dataclasses.replace(each, end=known.end, reason="EXPIRED")) == known
        profiles = self.service.wait(
            self.service.rows("SELECT FROM after_hours_profiles WHERE user_id = $1", self.user)
        )
        assert len(profiles) == self.profile

    def stored(self) -> list[Row]:
        """Read the user's rows."""
        query = "SELECT * FROM after_hours_sessions WHERE user_id = $1 ORDER BY started_at"
        return [
            Row(str(each["id"]), each["started_at"], each["expires_at"], each["ended_at"], each["end_reason"])
            for each in self.service.wait(self.service.rows(query, self.user))
        ]

    def teardown(self) -> None:
        """In the end everything overdue is closed, and each active session has its job, whatever Redis lost."""
        self.service.wait(replicas.eventually(self._settled, within=3))

    async def _settled(self) -> bool:
        now = await self.service.now()
        rows = await self.service.rows("SELECT id, expires_at FROM after_hours_sessions WHERE ended_at IS NULL")
        jobs = await onlooker.jobs(self.service.engines.redis_url)
        due = {f"session:expire:{each['id']}": each["expires_at"].timestamp() for each in rows}
        return jobs == due and all(each["expires_at"] > now for each in rows)


def row(answer: session_pb2.Session | replicas.Refusal) -> Row:
    """Read an answer; it must be one."""
    assert isinstance(answer, session_pb2.Session), answer
    reason = session_pb2.EndReason.Name(answer.end_reason).removeprefix("END_REASON_")
    ended = answer.HasField("end_time")
    assert (answer.state == session_pb2.SESSION_STATE_ENDED) == ended
    return Row(
        answer.id,
        answer.start_time.ToDatetime(datetime.UTC),
        answer.expire_time.ToDatetime(datetime.UTC),
        answer.end_time.ToDatetime(datetime.UTC) if ended else None,
        reason if ended else None,
    )


def refused(answer: object) -> str | None:
    """Give what a call was refused for, if it was."""
    return answer.reason if isinstance(answer, replicas.Refusal) else None


def test_the_service_does_what_its_model_does(engines: replicas.Engines) -> None:
    """Through calls, replays, profile changes, time, restarts and the loss of Redis, service, rows and model agree."""
    with Service(engines) as service:
        Machine.service = service
        hypothesis.stateful.run_state_machine_as_test(
            Machine,
            settings=hypothesis.settings(
                max_examples=25,
                stateful_step_count=25,
                deadline=None,
                suppress_health_check=list(hypothesis.HealthCheck),
            ),
        )
