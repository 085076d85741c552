"""Replicas under load of all calls, while much goes wrong; then everything that callers saw is checked.

Replicas are killed, stopped, terminated, left with a stderr that nobody reads and with watchers that read nothing;
Redis forgets everything, or becomes a replica of another; Postgres fails over to its standby.

`make chaos`, or `python tests/chaos.py --seconds 120 --users 200 --replicas 3 --seed 1`. A seed makes the choices of
the callers and of the faults again, though not the moments at which the machine gets to them.

At least one replica is left alone at any time: it is the one that the guarantees are asked of.
"""

import asyncio
import collections
import collections.abc
import contextlib
import dataclasses
import fcntl
import json
import math
import random
import signal
import socket
import sys
import time
import uuid

import asyncpg
import history
import onlooker
import replicas
import stage
import typer
from afterhours.v1 import profile_pb2, profile_service_pb2, profile_service_pb2_grpc, session_service_pb2
from redis import asyncio as redis

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
# Of what goes wrong, what is of no replica alone.
_OF_ALL = ("flush", "fail_over", "switch")
# Of what a server must never say in its log.
_FATAL = ("bug", "background_task_died", "scheduler_died")
# Seconds after which a caller gives up on an answer, and for which all then leave a replica alone: from one failure
# to the next twice as long.
_PATIENCE = 2.5
_REST = 0.25, 4.0
# Seconds from SIGTERM to a replica's exit, and how much later a loaded machine may see it.
_DRAIN = 5
_LOADED = 3.0
# Seconds after a promotion within which every replica that is left alone answers calls again.
_FOUND = 5.0
# Of the watchers that never read, in bytes: what a server may send before they would have to.
_WINDOW = 1024

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
    # What goes wrong, by name; empty: everything that can.
    only: tuple[str, ...] = ()


@dataclasses.dataclass
class Report:
    """What a run showed; `faults` is what contradicts the contract."""

    plan: Plan
    calls: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    made: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    worst_overdue: float = 0
    # Before this, in seconds of time.monotonic(), sessions may be overdue, for no Postgres took writes.
    calm_from: float = 0
    # How soon after a promotion each replica answered again, and after SIGTERM each exited.
    found: list[float] = dataclasses.field(default_factory=list)
    exited: list[float] = dataclasses.field(default_factory=list)
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
                f"answered again after a promotion: {_spread(sorted(self.found))}",
                f"exited after SIGTERM: {_spread(sorted(self.exited))}",
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


class _Process(replicas.Process):
    """A server whose output may be left in its pipe."""

    @property
    def ended(self) -> bool:
        """Whether it exited; `wait` waits until all its output was read, too."""
        return self._process is not None and self._process.returncode is not None

    def read(self, does: bool) -> None:
        """Read what it writes, or leave it in the pipe, which is then full soon."""
        assert self._process
        transport = self._process._transport.get_pipe_transport(1)  # type: ignore[attr-defined]
        if does:
            transport.resume_reading()
        else:
            transport.pause_reading()
            with contextlib.suppress(OSError):  # more than that is in it
                fcntl.fcntl(transport.get_extra_info("pipe"), fcntl.F_SETPIPE_SZ, 4096)


class Member:
    """A replica on a port of its own, started again whenever it exits."""

    def __init__(self, number: int, environment: dict[str, str], report: Report) -> None:
        self.serving = asyncio.Event()
        self.troubled = False
        self.resting_until = 0.0
        self._rest = _REST[0]
        # How it may exit; without any it must not.
        self.allowed: set[int] = set()
        self.name = f"replica {number}"
        self._terminated: float | None = None
        self._environment = environment
        self._report = report
        self._clients: list[replicas.Client] = []
        self._process = _Process(environment)

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
        if number == signal.SIGTERM and self._terminated is None:
            self._terminated = time.monotonic()
        self._process.signal(number)

    def read_log(self, does: bool) -> None:
        """Read what it writes to stderr, or leave that in its pipe."""
        self._process.read(does)

    async def gone(self) -> None:
        """Wait until it exited, or should have."""
        with contextlib.suppress(TimeoutError):
            await replicas.until(lambda: self._process.ended, _DRAIN + _LOADED)

    async def keep(self) -> None:
        """Run it again and again, until cancelled."""
        while True:
            self._process = await _Process(self._environment).start()
            try:
                self._clients.append(await self._process.client())
            except (AssertionError, TimeoutError) as error:
                self._report.faults.append(f"{self.name} did not start: {error}")
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
        self._judge_exit(status)
        if status not in self.allowed:
            told = "\n".join(self._process.lines[-20:])
            self._report.faults.append(f"{self.name} exited with {status}, allowed {self.allowed}:\n{told}")
        self.allowed = set()

    def _judge_exit(self, status: int) -> None:
        began, self._terminated = self._terminated, None
        if began is not None and status == 0:
            seconds = time.monotonic() - began
            self._report.exited.append(seconds)
            if seconds > _DRAIN + _LOADED:
                self._report.faults.append(f"{self.name} took {seconds:.1f} s from SIGTERM to its exit")

    def _judge(self) -> None:
        for line in self._process.lines:
            if any(f'"{event}"' in line for event in _FATAL) and json.loads(line).get("event") in _FATAL:
                self._report.faults.append(f"{self.name} logged {line}")
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

    def __init__(self, plan: Plan, members: list[Member], stage: stage.Stage, report: Report) -> None:
        self._plan = plan
        self._members = members
        self._stage = stage
        self._report = report
        self._chance = random.Random(f"{plan.seed} trouble")
        self._one_at_a_time = {"fail_over": asyncio.Lock(), "switch": asyncio.Lock()}

    async def run(self) -> None:
        """Make trouble until the time is over, and put everything right again."""
        until = time.monotonic() + self._plan.seconds
        makers: dict[str, int] = {"kill": 4, "stop": 3, "terminate": 3, "stall": 3, "stick": 3, "flush": 2}
        if self._stage.servers:
            makers["fail_over"] = 2
        if self._stage.timers:
            makers["switch"] = 2
        makers = {name: weight for name, weight in makers.items() if not self._plan.only or name in self._plan.only}
        async with asyncio.TaskGroup() as under_way:
            while time.monotonic() < until:
                await asyncio.sleep(self._chance.uniform(self._plan.quiet / 8, self._plan.quiet))
                well = [member for member in self._members if not member.troubled and member.serving.is_set()]
                [maker] = self._chance.choices(list(makers), list(makers.values()))
                chance = random.Random(self._chance.random())
                if maker in _OF_ALL:
                    under_way.create_task(self._make(maker, chance))
                elif len(well) > 1:
                    under_way.create_task(self._trouble(maker, chance.choice(well), chance))

    async def _make(self, maker: str, *arguments: object) -> None:
        lock = self._one_at_a_time.get(maker, contextlib.nullcontext())
        if isinstance(lock, asyncio.Lock) and lock.locked():
            return
        async with lock:
            self._report.made[maker] += 1
            await getattr(self, f"_{maker}")(*arguments)

    async def _trouble(self, maker: str, member: Member, chance: random.Random) -> None:
        member.troubled = True
        await self._make(maker, member, chance)
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

    async def _stall(self, member: Member, chance: random.Random) -> None:
        """Leave its stderr unread for a while; it serves all the same, and ends in time."""
        member.read_log(False)
        until = time.monotonic() + self._plan.stopped
        while time.monotonic() < until:
            await asyncio.sleep(0.2)
            if time.monotonic() > self._report.calm_from and not await serves(member):
                self._report.faults.append(f"{member.name} did not serve while nobody read its stderr")
                break
        if chance.random() < 0.4:
            await self._terminate(member, chance)
            await member.gone()
        member.read_log(True)

    async def _stick(self, member: Member, chance: random.Random) -> None:
        """Watch, and read nothing, up to a SIGTERM and beyond."""
        # No subchannel that others share, and a window that is full soon.
        further = [("grpc.http2.lookahead_bytes", _WINDOW), ("grpc.http2.bdp_probe", 0)]
        async with replicas.Client(member.client.address, further=further) as client:
            watches = [client.sessions.WatchSessions(session_service_pb2.WatchSessionsRequest()) for _ in range(3)]
            await asyncio.sleep(chance.uniform(0.5, self._plan.stopped))
            if chance.random() < 0.6:
                await self._terminate(member, chance)
                await member.gone()
            for watch in watches:
                watch.cancel()

    async def _flush(self, _: random.Random) -> None:
        async with redis.Redis.from_url(self._stage.checks.redis_url) as client:
            await client.flushall()
        self._report.flushed.append(time.time())

    async def _switch(self, _: random.Random) -> None:
        """Make the replica of Redis the primary; the old one becomes its replica, and its connections stay."""
        assert self._stage.timers
        await self._stage.timers.switch()
        # What had not reached the replica is lost.
        self._report.flushed.append(time.time())
        # Long enough for what is left behind to be seen.
        await asyncio.sleep(self._plan.quiet)

    async def _fail_over(self, chance: random.Random) -> None:
        """Kill the primary of Postgres, or let it fall silent, promote its synchronous standby, and replace that."""
        servers = self._stage.servers
        assert servers
        self._report.calm_from = math.inf
        if chance.random() < 0.3:
            servers.primary.freeze()
        else:
            await servers.primary.kill()
        await asyncio.sleep(chance.uniform(0, 1))
        await servers.promote()
        promoted = time.monotonic()
        await asyncio.gather(*(self._answers(member, promoted) for member in self._members))
        self._report.calm_from = time.monotonic() + self._plan.interval + 1
        await servers.rejoin()

    async def _answers(self, member: Member, promoted: float) -> None:
        """Wait until a replica answers again after a promotion, unless it has trouble of its own."""
        while not member.troubled and member.serving.is_set():
            call = _made(member.client, "put_profile", "prober", 0, "", 1.0)
            if not isinstance(await replicas.outcome(call), replicas.Refusal):
                self._report.found.append(time.monotonic() - promoted)
                return
            if time.monotonic() - promoted > _FOUND + _LOADED:
                self._report.faults.append(f"{member.name} still refuses calls {_FOUND + _LOADED} s after a promotion")
                return
            await asyncio.sleep(0.05)


async def serves(member: Member) -> bool:
    """Say whether a replica says that it serves."""
    status = await replicas.outcome(member.client.health())
    return status == "SERVING"


async def run(stage: stage.Stage, plan: Plan) -> Report:
    """Run the plan, and check all that was seen."""
    report, recorder = Report(plan), history.Recorder()
    members = [
        Member(
            number,
            stage.engines.environment(
                AFTERHOURS_LISTEN=f"127.0.0.1:{port}",
                AFTERHOURS_RECONCILE_INTERVAL=f"{plan.interval}s",
                AFTERHOURS_DRAIN=f"{_DRAIN}s",
            ),
            report,
        )
        for number, port in enumerate(_free_ports(plan.replicas))
    ]
    callers = Callers(plan, members, recorder)
    keepers = [asyncio.create_task(member.keep()) for member in members]
    watching = asyncio.create_task(_watch(stage.checks, report))
    try:
        await _begun(members, report)
        await asyncio.gather(callers.run(), Trouble(plan, members, stage, report).run())
        await _settled(stage.checks, plan, members, report)
        await _compare(stage.checks, await callers.get_all(), report)
    finally:
        for task in (watching, *keepers):
            task.cancel()
        for ended in await asyncio.gather(watching, *keepers, return_exceptions=True):
            if isinstance(ended, Exception):
                report.faults.append(f"the run itself failed: {ended!r}")
        await asyncio.gather(*(member.stop() for member in members))
    if report.worst_overdue > plan.interval + 1:
        report.faults.append(f"a session was overdue by {report.worst_overdue:.3f} s")
    await _rows_agree(stage.checks, recorder.calls, report)
    report.calls.update(f"{call.operation} {call.outcome}" for call in recorder.calls)
    began = time.monotonic()
    report.faults += map(str, history.check(recorder.calls))
    report.checked = time.monotonic() - began
    report.faults += sorted({call.note for call in recorder.calls if call.note.endswith(" INTERNAL")})
    return report


async def _begun(members: list[Member], report: Report) -> None:
    try:
        async with asyncio.timeout(60):
            await asyncio.gather(*(member.serving.wait() for member in members))
    except TimeoutError:
        raise AssertionError("\n".join(report.faults)) from None


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
    """Look at the rows five times a second, until cancelled, but for while there is no Postgres to look at."""
    while True:
        try:
            connection = await asyncpg.connect(engines.database_url, timeout=5, command_timeout=5)
            try:
                await _look(connection, report)
            finally:
                connection.terminate()
        except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError):
            if time.monotonic() > report.calm_from:
                raise
        await asyncio.sleep(0.2)


async def _look(connection: asyncpg.Connection, report: Report) -> None:
    while True:
        overdue = await connection.fetchval(_OVERDUE)
        if time.monotonic() > report.calm_from:
            report.worst_overdue = max(report.worst_overdue, overdue)
        await _hold(connection, report)
        await asyncio.sleep(0.2)


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


def main(
    seconds: float = 120,
    users: int = 200,
    replicas: int = 3,
    seed: int | None = None,
    rate: float = 400,
    stopped: float = 10,
    quiet: float = 4,
    only: list[str] | None = None,
) -> None:
    """Run, print what was seen, and exit with 1 if it contradicts the contract; `only` names what may go wrong."""
    seed = random.randrange(10**6) if seed is None else seed
    plan = Plan(seed, seconds, users, replicas, rate, stopped, quiet=quiet, only=tuple(only or ()))
    typer.echo(f"seed {plan.seed}")

    async def staged(servers: stage.Servers) -> Report:
        async with servers.stage() as reached:
            return await run(reached, plan)

    with stage.running() as servers:
        report = asyncio.run(staged(servers))
    typer.echo(str(report))
    sys.exit(bool(report.faults))


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    app.command()(main)
    app()
