"""Replicas are killed, stopped and restarted under load of all calls; then everything that callers saw is checked.

`make chaos`, or `python tests/chaos.py --seconds 120 --users 200 --replicas 3 --seed 1`. A seed makes the choices of
the callers and of the faults again, though not the moments at which the machine gets to them.

At least one replica is left alone at any time: it is the one that the guarantees are asked of.
"""

import asyncio
import collections
import collections.abc
import contextlib
import dataclasses
import json
import pathlib
import random
import signal
import socket
import sys
import tempfile
import time
import uuid

import asyncpg
import history
import onlooker
import replicas
import typer
from afterhours.v1 import profile_pb2, profile_service_pb2, profile_service_pb2_grpc
from redis import asyncio as redis

from afterhours_grpc.embedded import postgres
from afterhours_grpc.embedded import redis as embedded_redis
from afterhours_grpc.store import schema

# Below the ports that the system gives to clients, so that a replica finds its own free when it comes back.
_PORTS = range(20_000, 32_768)
# How often each call is made, and for how many seconds a start or an extension asks.
_CALLS = {
    "get": 30,
    "start": 22,
    "extend": 16,
    "end": 10,
    "put_profile": 10,
    "get_profile": 4,
    "delete_profile": 3,
}
_LENGTHS = [2, 2, 2, 2, 900, 3600]
# What is asked for at once, by one user in so many: these meet in the rows.
_TOGETHER = [
    ("start", "delete_profile"),
    ("start", "end", "start"),
    ("extend", "end"),
    ("extend", "delete_profile"),
    ("start", "start", "put_profile"),
]
_OFTEN = 0.08
# Seconds before and after the end of a session at which calls are made, if they come at most so long before it.
_AIM = -0.012, 0.004
_AHEAD = 1.0
# Of what a server must never say in its log.
_FATAL = ("bug", "background_task_died", "scheduler_died")
# Seconds after which a caller gives up on an answer, and for which all then leave a replica alone: from one failure
# to the next twice as long.
_PATIENCE = 2.5
_REST = 0.25, 4.0

_INVARIANTS = {
    "more than one active session of a user": """
        SELECT user_id FROM after_hours_sessions WHERE ended_at IS NULL GROUP BY user_id HAVING count(*) > 1""",
    "an active session without a profile": """
        SELECT user_id FROM after_hours_sessions AS s WHERE ended_at IS NULL
            AND NOT EXISTS (SELECT FROM after_hours_profiles AS p WHERE p.user_id = s.user_id)""",
    "an end beyond expires_at, or an expiry not at it": """
        SELECT user_id FROM after_hours_sessions
        WHERE ended_at > expires_at OR ended_at < started_at OR (end_reason = 'EXPIRED' AND ended_at <> expires_at)""",
    "sessions of a user that overlap": """
        SELECT user_id FROM (
            SELECT user_id, started_at, lag(ended_at, 1, '-infinity')
                OVER (PARTITION BY user_id ORDER BY started_at, id) AS before
            FROM after_hours_sessions
        ) AS s WHERE started_at < before OR before IS NULL""",
}
_OVERDUE = """
SELECT coalesce(max(extract(epoch FROM clock_timestamp() - expires_at)), 0)::float8
FROM after_hours_sessions WHERE ended_at IS NULL AND expires_at < clock_timestamp()
"""
# When a row's last change was committed, as Postgres dates it where it is asked to; and whether the session lived when
# Redis lost everything, so that only a sweep knew of it.
_LATENESS = """
SELECT extract(epoch FROM pg_xact_commit_timestamp(xmin) - expires_at)::float8 AS late,
    EXISTS (SELECT FROM unnest($1::float8[]) AS flushed
        WHERE flushed BETWEEN extract(epoch FROM started_at) - 1 AND extract(epoch FROM expires_at) + 1) AS swept
FROM after_hours_sessions WHERE end_reason = 'EXPIRED' ORDER BY late
"""


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run: for how long, with how many, and how rough. Times are in seconds, the rate in calls a second."""

    seed: int
    seconds: float = 120
    users: int = 200
    replicas: int = 3
    rate: float = 400
    stopped: float = 10
    interval: int = 5
    # Between two faults at most.
    quiet: float = 4


@dataclasses.dataclass
class Report:
    """What a run showed; `faults` is what contradicts the contract."""

    plan: Plan
    calls: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    made: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    worst_overdue: float = 0
    # When Redis lost everything; how late the other sessions expired, and those that only a sweep knew of then.
    flushed: list[float] = dataclasses.field(default_factory=list)
    lateness: list[float] = dataclasses.field(default_factory=list)
    swept: list[float] = dataclasses.field(default_factory=list)
    checked: float = 0
    faults: list[str] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        """Give the summary."""
        return "\n".join(
            [
                str(self.plan),
                f"{sum(self.calls.values())} calls:",
                *(f"  {count:>7} {name}" for name, count in sorted(self.calls.items())),
                "made: " + ", ".join(f"{count} {name}" for name, count in sorted(self.made.items())),
                f"worst overdue seen: {self.worst_overdue:.3f} s",
                f"expired late, by their timers: {_spread(self.lateness)}",
                f"expired late, after Redis lost them: {_spread(self.swept)}",
                f"checked in {self.checked:.1f} s",
                *(f"FAULT: {fault}" for fault in self.faults),
                "rejected" if self.faults else "accepted",
            ]
        )


def _spread(late: list[float]) -> str:
    if not late:
        return "none"
    median, most = late[len(late) // 2], late[-1]
    return f"{len(late)}, p50 {median:.3f} s, p99 {onlooker.p99(late):.3f} s, at most {most:.3f} s"


class Member:
    """A replica on a port of its own, started again whenever it exits."""

    def __init__(self, number: int, environment: dict[str, str], report: Report) -> None:
        self.serving = asyncio.Event()
        self.troubled = False
        self.resting_until = 0.0
        self._rest = _REST[0]
        # How it may exit; without any it must not.
        self.allowed: set[int] = set()
        self._name = f"replica {number}"
        self._environment = environment
        self._report = report
        self._clients: list[replicas.Client] = []
        self._process = replicas.Process(environment)

    @property
    def client(self) -> replicas.Client:
        """Its latest client; nobody answers while it is down."""
        return self._clients[-1]

    def rest(self) -> None:
        """Have callers leave it alone for a while, for it did not answer."""
        at = time.monotonic()
        if at >= self.resting_until:
            self.resting_until = at + self._rest
            self._rest = min(self._rest * 2, _REST[1])

    def answered(self) -> None:
        """Have callers come again."""
        self._rest = _REST[0]

    def signal(self, number: signal.Signals, *, allowed: set[int] | None = None) -> None:
        """Send a signal, after which it may exit with these statuses."""
        self.allowed = allowed or set()
        self._process.signal(number)

    async def keep(self) -> None:
        """Run it again and again, until cancelled."""
        while True:
            self._process = await replicas.Process(self._environment).start()
            try:
                self._clients.append(await self._process.client())
            except (AssertionError, TimeoutError) as error:
                self._report.faults.append(f"{self._name} did not start: {error}")
            else:
                self.serving.set()
            await self._exited()
            self.serving.clear()

    async def _exited(self) -> None:
        status: int | None = None
        while status is None:
            with contextlib.suppress(TimeoutError):  # it runs for longer than `wait` waits
                status = await self._process.wait()
        self._judge()
        if status not in self.allowed:
            told = "\n".join(self._process.lines[-20:])
            self._report.faults.append(f"{self._name} exited with {status}, allowed {self.allowed}:\n{told}")
        self.allowed = set()

    def _judge(self) -> None:
        for line in self._process.lines:
            if any(f'"{event}"' in line for event in _FATAL) and json.loads(line).get("event") in _FATAL:
                self._report.faults.append(f"{self._name} logged {line}")
        self._process.lines.clear()

    async def stop(self) -> None:
        """Kill it, after `keep` was cancelled, and close its clients."""
        await self._process.stop()
        self._judge()
        for client in self._clients:
            await client.close()


class Callers:
    """The load: two callers a user, each making one call after the other, some of them twice at once."""

    def __init__(self, plan: Plan, members: list[Member], recorder: history.Recorder) -> None:
        self._plan = plan
        self._members = members
        self._recorder = recorder
        self.users = [f"user {n}" for n in range(plan.users)]
        # When each user's session expires, as far as answers tell.
        self._expiry: dict[str, float] = {}

    async def run(self) -> None:
        """Call until the time is over, and everything in flight was answered."""
        until = time.monotonic() + self._plan.seconds
        await asyncio.gather(*(self._caller(user, n, until) for user in self.users for n in range(2)))

    async def get_all(self) -> dict[str, history.Call]:
        """Get every user's session once more."""
        chance = random.Random(self._plan.seed)
        calls = await asyncio.gather(*(self._call("get", user, 0, "", chance) for user in self.users))
        return {call.user: call for call in calls if call}

    async def _caller(self, user: str, number: int, until: float) -> None:
        chance = random.Random(f"{self._plan.seed} {user} {number}")
        pause = 2 * self._plan.users / self._plan.rate
        while time.monotonic() < until:
            await asyncio.sleep(chance.expovariate(1 / pause))
            operations = chance.choices(list(_CALLS), list(_CALLS.values()))
            ahead = self._expiry.get(user, 0) - time.time()
            if 0 < ahead < _AHEAD:
                operations = chance.choices(["start", "extend", "end", "get"], k=2)
                await asyncio.sleep(max(0.0, ahead + chance.uniform(*_AIM)))
            elif chance.random() < _OFTEN:
                operations = list(chance.choice(_TOGETHER))
            await asyncio.gather(
                *(self._act(user, operation, random.Random(chance.random())) for operation in operations)
            )

    async def _act(self, user: str, operation: str, chance: random.Random) -> None:
        seconds = chance.choice(_LENGTHS) if operation in ("start", "extend") else 0
        retriable = operation in ("start", "extend", "end") and chance.random() < 0.85
        request_id = str(uuid.UUID(bytes=chance.randbytes(16))) if retriable else ""
        at_once = chance.choice([2, 3]) if retriable and chance.random() < 0.08 else 1
        calls = await asyncio.gather(
            *(self._call(operation, user, seconds, request_id, chance) for _ in range(at_once))
        )
        if operation in history.READS or chance.random() < 0.1:
            return
        # Most try again until they know: with the same request_id, or for a profile once more.
        for _ in range(20):
            if not (retriable or "profile" in operation) or not any(map(_unanswered, calls)):
                return
            await asyncio.sleep(chance.uniform(0.05, 0.4))
            calls = [await self._call(operation, user, seconds, request_id, chance)]

    async def _call(
        self, operation: str, user: str, seconds: int, request_id: str, chance: random.Random
    ) -> history.Call | None:
        """Make a call, or give None if the caller went away before it was answered."""
        at = time.monotonic()
        rested = [member for member in self._members if member.resting_until <= at]
        member = chance.choice(rested or self._members)
        hurry = chance.random()
        timeout = chance.uniform(0.001, 0.03) if hurry < 0.03 else _PATIENCE
        recording = self._recorder.record(
            operation,
            user,
            _made(member.client, operation, user, seconds, request_id, timeout),
            seconds=seconds,
            request_id=request_id,
            note=str(self._members.index(member)),
        )
        try:
            call = await asyncio.wait_for(recording, chance.uniform(0, 0.03) if hurry > 0.98 else None)
        except TimeoutError:
            return None
        if call.session and call.session.active:
            self._expiry[user] = call.session.expire / history.SECOND
        if not _unanswered(call):
            member.answered()
        elif timeout == _PATIENCE:
            member.rest()
        return call


def _unanswered(call: history.Call | None) -> bool:
    return call is None or call.outcome == history.UNKNOWN or call.outcome in history.NOT_APPLIED


async def _made(
    client: replicas.Client, operation: str, user: str, seconds: int, request_id: str, timeout: float
) -> object:
    match operation:
        case "start":
            return await client.start(user, seconds, request_id, timeout=timeout)
        case "extend":
            return await client.extend(user, seconds, request_id, timeout=timeout)
        case "end":
            return await client.end(user, request_id, timeout=timeout)
        case "get":
            return await client.get(user, timeout=timeout)
    return await _made_of_profile(client.profiles, operation, user, timeout)


async def _made_of_profile(
    profiles: "profile_service_pb2_grpc.ProfileServiceAsyncStub", operation: str, user: str, timeout: float
) -> object:
    if operation == "put_profile":
        profile = profile_pb2.Profile(user_id=user)
        return await profiles.PutProfile(profile_service_pb2.PutProfileRequest(profile=profile), timeout=timeout)
    if operation == "delete_profile":
        request = profile_service_pb2.DeleteProfileRequest(user_id=user)
        return await profiles.DeleteProfile(request, timeout=timeout)
    return await profiles.GetProfile(profile_service_pb2.GetProfileRequest(user_id=user), timeout=timeout)


class Trouble:
    """What goes wrong, one thing after the other and some at once; at least one replica is left alone."""

    def __init__(self, plan: Plan, members: list[Member], engines: replicas.Engines, report: Report) -> None:
        self._plan = plan
        self._members = members
        self._engines = engines
        self._report = report
        self._chance = random.Random(f"{plan.seed} trouble")

    async def run(self) -> None:
        """Make trouble until the time is over, and put everything right again."""
        until = time.monotonic() + self._plan.seconds
        makers = [self._kill, self._stop, self._terminate, self._flush]
        async with asyncio.TaskGroup() as under_way:
            while time.monotonic() < until:
                await asyncio.sleep(self._chance.uniform(self._plan.quiet / 8, self._plan.quiet))
                well = [member for member in self._members if not member.troubled and member.serving.is_set()]
                [maker] = self._chance.choices(makers, [4, 3, 3, 2])
                chance = random.Random(self._chance.random())
                if maker == self._flush or len(well) > 1:
                    under_way.create_task(self._trouble(maker, chance.choice(well), chance))

    async def _trouble(
        self,
        maker: collections.abc.Callable[[Member, random.Random], collections.abc.Awaitable[None]],
        member: Member,
        chance: random.Random,
    ) -> None:
        self._report.made[maker.__name__.removeprefix("_")] += 1
        troubled = maker != self._flush
        member.troubled = member.troubled or troubled
        await maker(member, chance)
        if troubled:
            await asyncio.wait_for(member.serving.wait(), 30)
            await replicas.eventually(lambda: serves(member), within=15)
            member.troubled = False

    async def _kill(self, member: Member, _: random.Random) -> None:
        member.serving.clear()
        member.signal(signal.SIGKILL, allowed={-signal.SIGKILL})

    async def _terminate(self, member: Member, chance: random.Random) -> None:
        member.serving.clear()
        member.signal(signal.SIGTERM, allowed={0})
        if chance.random() < 0.2:
            await asyncio.sleep(chance.uniform(0, 0.3))
            member.signal(signal.SIGTERM, allowed={0})

    async def _stop(self, member: Member, chance: random.Random) -> None:
        member.signal(signal.SIGSTOP)
        await asyncio.sleep(self._plan.stopped)
        if chance.random() < 0.2:
            await self._kill(member, chance)
        else:
            member.signal(signal.SIGCONT)

    async def _flush(self, _: Member, __: random.Random) -> None:
        async with redis.Redis.from_url(self._engines.redis_url) as client:
            await client.flushall()
        self._report.flushed.append(time.time())


async def serves(member: Member) -> bool:
    """Say whether a replica says that it serves."""
    status = await replicas.outcome(member.client.health())
    return status == "SERVING"


async def run(engines: replicas.Engines, plan: Plan) -> Report:
    """Run the plan, and check all that was seen."""
    report, recorder = Report(plan), history.Recorder()
    members = [
        Member(
            number,
            engines.environment(
                AFTERHOURS_LISTEN=f"127.0.0.1:{port}",
                AFTERHOURS_RECONCILE_INTERVAL=f"{plan.interval}s",
                AFTERHOURS_DRAIN="5s",
            ),
            report,
        )
        for number, port in enumerate(_free_ports(plan.replicas))
    ]
    callers = Callers(plan, members, recorder)
    keepers = [asyncio.create_task(member.keep()) for member in members]
    watching = asyncio.create_task(_watch(engines, report))
    try:
        await asyncio.gather(*(asyncio.wait_for(member.serving.wait(), 30) for member in members))
        await asyncio.gather(callers.run(), Trouble(plan, members, engines, report).run())
        await _settled(engines, plan, members, report)
        await _compare(engines, await callers.get_all(), report)
    finally:
        for task in (watching, *keepers):
            task.cancel()
        await asyncio.gather(watching, *keepers, return_exceptions=True)
        await asyncio.gather(*(member.stop() for member in members))
    if report.worst_overdue > plan.interval + 1:
        report.faults.append(f"a session was overdue by {report.worst_overdue:.3f} s")
    await _rows_agree(engines, recorder.calls, report)
    report.calls.update(f"{call.operation} {call.outcome}" for call in recorder.calls)
    began = time.monotonic()
    report.faults += map(str, history.check(recorder.calls))
    report.checked = time.monotonic() - began
    report.faults += sorted({call.note for call in recorder.calls if call.note.endswith(" INTERNAL")})
    return report


def _free_ports(count: int) -> list[int]:
    free: list[int] = []
    for port in random.sample(_PORTS, len(_PORTS)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            free.append(port)
        if len(free) == count:
            break
    return free


async def _watch(engines: replicas.Engines, report: Report) -> None:
    """Look at the rows five times a second, until cancelled."""
    connection = await asyncpg.connect(engines.database_url)
    try:
        while True:
            report.worst_overdue = max(report.worst_overdue, await connection.fetchval(_OVERDUE))
            await _hold(connection, report)
            await asyncio.sleep(0.2)
    finally:
        connection.terminate()


async def _hold(connection: asyncpg.Connection, report: Report) -> None:
    for name, query in list(_INVARIANTS.items())[:2]:
        for row in await connection.fetch(query):
            report.faults.append(f"{name}: {row['user_id']}")


async def _settled(engines: replicas.Engines, plan: Plan, members: list[Member], report: Report) -> None:
    """Wait for what must come to rest by itself."""
    for number, member in enumerate(members):
        try:
            await replicas.eventually(lambda member=member: serves(member), within=10)  # type: ignore[misc]
        except TimeoutError:
            report.faults.append(f"replica {number} does not serve")
    await asyncio.sleep(plan.interval + 1)
    for name, query in _INVARIANTS.items():
        report.faults += [f"{name}: {row['user_id']}" for row in await engines.rows(query)]
    [(overdue,)] = await engines.rows(_OVERDUE)
    if overdue > plan.interval + 1:
        report.faults.append(f"in the end a session is overdue by {overdue:.3f} s")
    try:
        await replicas.eventually(lambda: onlooker.timed(engines), within=plan.interval + 1)
    except TimeoutError:
        report.faults.append(f"jobs after a sweep are {await onlooker.jobs(engines.redis_url)}, and sessions not alike")
    [(dated,)] = await engines.rows("SELECT current_setting('track_commit_timestamp')")
    if dated == "on":
        for row in await engines.rows(_LATENESS, report.flushed):
            (report.swept if row["swept"] else report.lateness).append(row["late"])
    early = min([0.0, *report.swept, *report.lateness])
    if early < 0:
        report.faults.append(f"a session expired {-early:.6f} s early")


_ROWS = """
SELECT *, extract(epoch FROM started_at) * 1000000 AS start, extract(epoch FROM expires_at) * 1000000 AS expire,
    extract(epoch FROM ended_at) * 1000000 AS end
FROM after_hours_sessions
"""


async def _compare(engines: replicas.Engines, gets: dict[str, history.Call], report: Report) -> None:
    """Compare what each user is told in the end with the rows."""
    rows = {row["user_id"]: row for row in await engines.rows(f"{_ROWS} WHERE ended_at IS NULL")}
    for user, call in gets.items():
        row, told = rows.get(user), call.session
        stored = (str(row["id"]), int(row["start"]), int(row["expire"])) if row else None
        # One that expires at this very moment may be told and closed, or still stored and no longer told.
        over = any(expire <= history.now() for expire in (told and told.expire, stored and stored[2]) if expire)
        if call.outcome == history.OK and not over and (told and (told.id, told.start, told.expire)) != stored:
            report.faults.append(f"{user} is told {told}, and stored is {stored}")


async def _rows_agree(engines: replicas.Engines, calls: list[history.Call], report: Report) -> None:
    """No session that was answered is missing, none ended before the last expire_time that was answered."""
    rows = {str(row["id"]): row for row in await engines.rows(_ROWS)}
    for call in calls:
        told = call.session
        if told is None:
            continue
        row = rows.get(told.id)
        agrees = row and row["user_id"] == call.user and row["start"] == told.start and row["expire"] >= told.expire
        if row and call.operation == "end":
            agrees = agrees and (row["end"], row["end_reason"]) == (told.as_of, "USER")
        if not agrees:
            report.faults.append(f"stored is {row}, answered was {call}")


@contextlib.contextmanager
def _engines() -> collections.abc.Iterator[replicas.Engines]:
    settings = {"fsync": "off", "full_page_writes": "off", "max_connections": "300", "track_commit_timestamp": "on"}
    with tempfile.TemporaryDirectory(prefix="afterhours-chaos-") as folder:
        directory = pathlib.Path(folder)
        with (
            postgres.Postgres(directory / "postgres", settings=settings) as truth,
            embedded_redis.Redis(directory / "redis") as timers,
        ):
            asyncio.run(schema.migrate(truth.url))
            yield replicas.Engines(truth.url, timers.url)


def main(seconds: float = 120, users: int = 200, replicas: int = 3, seed: int | None = None, rate: float = 400) -> None:
    """Run, print what was seen, and exit with 1 if it contradicts the contract."""
    plan = Plan(random.randrange(10**6) if seed is None else seed, seconds, users, replicas, rate)
    typer.echo(f"seed {plan.seed}")
    with _engines() as engines:
        report = asyncio.run(run(engines, plan))
    typer.echo(str(report))
    sys.exit(bool(report.faults))


if __name__ == "__main__":
    typer.run(main)
