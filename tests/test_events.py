"""Events are in order, cost the same however long somebody holds a snapshot, and are not lost without an error."""

import asyncio
import collections.abc
import contextlib
import dataclasses
import datetime
import random

import asyncpg
import proxy
import pytest
import replicas
import watches
from afterhours.v1 import session_pb2

from afterhours_grpc.store import outbox

pytestmark = pytest.mark.store

# An event of a user, as a transition writes it.
WRITE = """
INSERT INTO after_hours_outbox (type, happened_at, session_id, user_id, started_at, expires_at)
SELECT $1, now(), gen_random_uuid(), $2, now(), now() + interval '1 hour' FROM generate_series(1, $3)
"""


@contextlib.asynccontextmanager
async def held(engines: replicas.Engines, kind: str) -> collections.abc.AsyncIterator[None]:
    """Hold a snapshot as pg_dump does, or a transaction that has written, as a forgotten session does."""
    connection = await asyncpg.connect(engines.database_url)
    try:
        async with connection.transaction(isolation="repeatable_read"):
            await connection.execute("SELECT pg_current_xact_id()" if kind == "writing" else "SELECT FROM pg_class")
            yield
    finally:
        await connection.close()


async def placed(engines: replicas.Engines, count: int) -> None:
    """Write events, and wait until they have their positions."""
    await engines.rows(WRITE, "STARTED", "crowd", count)

    async def empty() -> bool:
        return not await engines.rows("SELECT FROM after_hours_outbox LIMIT 1")

    await replicas.eventually(empty, within=60)


async def entries_read(engines: replicas.Engines) -> int:
    """Return how many entries of the outbox's index were read so far.

    A server process may keep what it read to itself until it has been idle for ten seconds, but tells it when it ends.
    """
    await engines.rows(
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid <> pg_backend_pid() AND state = 'idle'"
    )
    [row] = await engines.rows(
        "SELECT sum(idx_tup_read)::bigint AS read FROM pg_stat_user_indexes WHERE relname = 'after_hours_outbox'"
    )
    return int(row["read"])


@pytest.mark.parametrize("kind", ["reading", "writing"])
async def test_a_held_snapshot_slows_no_event(engines: replicas.Engines, kind: str) -> None:
    """What was placed while a snapshot is held is not read again for the events that follow."""
    async with replicas.replica(engines) as (_, client), held(engines, kind):
        await client.put_profile("ada")
        await placed(engines, 20_000)
        before = await entries_read(engines)
        assert before >= 20_000
        async with watches.watching(client, ["ada"]) as watch:
            for _ in range(10):
                await client.start("ada")
                await client.end("ada")
            assert watches.types(await watch.events(20)) == 10 * ["STARTED", "ENDED"]
        # The old way walks over all 20,000 at every look, of which there are five a second and one for each event.
        assert await entries_read(engines) - before < 1000


async def test_a_held_transaction_s_own_events_come_at_last(engines: replicas.Engines) -> None:
    """An event of a transaction that was held while thousands of others were placed comes once it commits."""
    async with replicas.replica(engines) as (_, client), watches.watching(client, ["late"]) as watch:
        connection = await asyncpg.connect(engines.database_url)
        transaction = connection.transaction()
        await transaction.start()
        await connection.execute(WRITE, "EXTENDED", "late", 1)
        for _ in range(3):
            await placed(engines, 1000)
        await watch.silent(0.1)
        await transaction.commit()
        await connection.close()
        assert watches.users(await watch.events(1)) == ["late"]


async def test_a_late_event_comes_before_what_follows_it(engines: replicas.Engines) -> None:
    """A transition that commits late, after thousands of newer events, precedes what it made the same user wait for."""
    async with replicas.replica(engines) as (_, client), watches.watching(client, ["ada"]) as watch:
        await client.put_profile("ada")
        for _ in range(5):
            await client.start("ada")
            async with replicas.locked(
                engines, "UPDATE after_hours_sessions SET warn_at = NULL WHERE ended_at IS NULL"
            ) as transition:
                await transition.execute(WRITE, "EXTENDED", "ada", 1)
                await placed(engines, 100)
                ending = asyncio.create_task(client.end("ada"))
                await replicas.eventually(engines.in_flight, within=5)
            await ending
        assert watches.types(await watch.events(15)) == 5 * ["STARTED", "EXTENDED", "ENDED"]


async def overlapping(engines: replicas.Engines, users: list[str]) -> None:
    """Write events in five transactions at once: the later one began, the sooner it writes."""
    async with contextlib.AsyncExitStack() as stack:
        begun = [replicas.locked(engines, "SELECT pg_current_xact_id()") for _ in range(5)]
        transactions = [await stack.enter_async_context(each) for each in begun]
        for number, user in enumerate(users):
            await transactions[-1 - number % 5].execute(WRITE, "STARTED", user, 5)


async def test_a_replica_that_vanishes_while_it_places_events(engines: replicas.Engines) -> None:
    """The lock of a replica that falls silent while it holds it is released, and the events of others go on."""
    async with (
        replicas.replica(engines) as (_, client),
        proxy.Proxy(engines.database_url) as network,
        replicas.replica(dataclasses.replace(engines, database_url=network.url)) as (_, vanishing),
        watches.watching(client, ["bob"]) as watch,
    ):
        for user_id in ("ada", "bob"):
            await client.put_profile(user_id)
        async with replicas.locked(engines, f"SELECT pg_advisory_xact_lock({int.from_bytes(b'outbox')})"):
            await client.start("ada")
            # Places what is committed before it begins, and so is the next one to hold the lock.
            opening = watches.Watch(vanishing)
            refused = asyncio.create_task(replicas.refused(opening.next()))
            await replicas.eventually(engines.in_flight, within=5)
            network.swallow_replies = True

        async def holds() -> bool:
            return bool(await engines.rows("SELECT FROM pg_locks WHERE locktype = 'advisory' AND granted"))

        await replicas.eventually(holds, within=5)
        await client.start("bob")
        await watch.events(1, within=1.5)
        network.swallow_replies = False
        network.cut()
        assert (await refused).reason == "STORE_UNAVAILABLE"


async def test_a_backlog_keeps_its_order(engines: replicas.Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backlog of more than a statement looks at, from transactions that overlapped, is placed in the order of ids."""
    monkeypatch.setattr(outbox, "_PLACED", 50)
    monkeypatch.setattr(outbox, "_CANDIDATES", 300)
    users = [f"user {number}" for number in range(200)]
    for first in range(0, 200, 40):
        await overlapping(engines, users[first : first + 40])
    async with replicas.replica(engines):
        await placed(engines, 0)
    found = await engines.rows("SELECT position, user_id FROM after_hours_events ORDER BY position")
    assert [row["position"] for row in found] == list(range(1, 1001))
    assert [row["user_id"] for row in found] == [user for user in users for _ in range(5)]


async def test_an_overdue_session_ends_before_the_next_starts(engines: replicas.Engines) -> None:
    """A start that closes an overdue session emits its ENDED before its own STARTED."""
    users = [f"user {number}" for number in range(20)]
    async with replicas.replica(engines) as (service, client), watches.watching(client) as watch:
        await asyncio.gather(*(client.put_profile(user) for user in users))
        await asyncio.gather(*(client.start(user) for user in users))
        service.database.clock_offset = datetime.timedelta(hours=1)
        await asyncio.gather(*(client.start(user) for user in users))
        events = await watch.events(60)
    for user in users:
        own = [each for each in events if each.session.user_id == user]
        assert watches.types(own) == ["STARTED", "ENDED", "STARTED"]
        assert own[0].session.id == own[1].session.id != own[2].session.id
        assert own[1].session.end_reason == session_pb2.END_REASON_EXPIRED


async def test_a_session_ends_before_the_next_starts(engines: replicas.Engines) -> None:
    """Of one user, ENDED comes before STARTED, whatever eight writers on two servers do, and whoever ends sessions."""
    chance = random.Random(11)
    users = ["ada", "bob", "eve"]
    async with (
        replicas.replica(engines) as (one, first),
        replicas.replica(engines) as (other, second),
        watches.watching(first) as watch,
    ):
        for user in users:
            await first.put_profile(user)

        async def write() -> None:
            for _ in range(25):
                client, user = chance.choice((first, second)), chance.choice(users)
                match chance.choice(("start", "start", "start", "end", "delete", "wait")):
                    case "start":
                        await replicas.outcome(client.start(user))
                    case "end":
                        await replicas.outcome(client.end(user))
                    case "delete":
                        await replicas.outcome(client.delete_profile(user))
                        await client.put_profile(user)
                    case _:  # Every session is overdue now.
                        one.database.clock_offset += datetime.timedelta(hours=1)
                        other.database.clock_offset = one.database.clock_offset

        await asyncio.gather(*(write() for _ in range(8)))
        for user in users:
            await replicas.outcome(first.end(user))
        count = len(await engines.rows("SELECT FROM after_hours_sessions"))
        watches.in_order(await watch.events(2 * count))
    reasons = await engines.rows("SELECT DISTINCT end_reason FROM after_hours_sessions")
    assert {row["end_reason"] for row in reasons} == {"USER", "EXPIRED", "PROFILE_REMOVED"}


async def test_a_database_of_another_server(engines: replicas.Engines) -> None:
    """In a database restored from a dump of a server that had counted further, events still come."""
    async with replicas.replica(engines) as (_, client):
        await client.put_profile("ada")
        async with watches.watching(client) as watch:
            await client.start("ada")
            await watch.events(1)
            await engines.rows("UPDATE after_hours_events SET horizon = '9000000000:9000000009:9000000004'")
            await client.end("ada")
            assert watches.types(await watch.events(1)) == ["ENDED"]


class Rewinding:
    """A database behind a proxy that can be set back to how it was, while nobody is connected."""

    def __init__(self, engines: replicas.Engines) -> None:
        self._place, _, self._name = engines.database_url.rpartition("/")
        self._engines = engines
        self._network = proxy.Proxy(engines.database_url)

    async def open(self) -> replicas.Engines:
        """Return the engines by way of the proxy."""
        await self._network.accept()
        return dataclasses.replace(self._engines, database_url=self._network.url)

    async def save(self) -> None:
        """Save how it is now."""
        await self._alone(f"CREATE DATABASE {self._name}_saved TEMPLATE {self._name}")

    async def restore(self) -> None:
        """Set it back to how it was."""
        await self._alone(
            f"DROP DATABASE {self._name} WITH (FORCE)", f"ALTER DATABASE {self._name}_saved RENAME TO {self._name}"
        )

    async def _alone(self, *statements: str) -> None:
        await self._network.close()
        connection = await asyncpg.connect(f"{self._place}/postgres")
        try:
            await connection.execute(
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = $1", self._name
            )
            for statement in statements:
                await connection.execute(statement)
        finally:
            await connection.close()
        await self._network.accept()

    async def close(self) -> None:
        """Close the proxy."""
        await self._network.close()


@pytest.fixture
async def rewinding(engines: replicas.Engines) -> collections.abc.AsyncIterator[Rewinding]:
    """Return the test's database as one that can be set back."""
    rewinding = Rewinding(engines)
    yield rewinding
    await rewinding.close()


async def started(client: replicas.Client, *users: str) -> None:
    """Start sessions, once calls are answered."""
    for user in users:
        await client.put_profile(user)
        await client.start(user)


async def test_a_history_that_was_lost(rewinding: Rewinding) -> None:
    """A restore of an older state ends the watches that saw what is lost, and no other; neither misses an event."""
    async with replicas.replica(await rewinding.open()) as (_, client), contextlib.AsyncExitStack() as stack:
        everybody, of_one = [await stack.enter_async_context(watches.watching(client, of)) for of in ([], ["eve"])]
        await started(client, "ada", "eve")
        await everybody.events(2)
        await of_one.events(1)
        kept = everybody.cursor
        await rewinding.save()
        await replicas.eventually(lambda: watches.answers(client), within=10)
        await started(client, "bob", "joe", "kim")
        await everybody.events(3)
        lost = everybody.cursor
        await rewinding.restore()
        await replicas.eventually(lambda: watches.answers(client), within=10)
        # As many as were lost, and more: a position alone would not tell them apart.
        new = ["liz", "max", "ned", "oto", "pia"]
        await started(client, *new)
        await client.end("eve")
        for watch in (everybody, watches.Watch(client, cursor=lost), watches.Watch(client, ["eve"], lost)):
            refusal = await watches.failure(watch)
            assert (refusal.code, refusal.reason) == ("OUT_OF_RANGE", "CURSOR_EXPIRED")
        assert watches.types(await of_one.events(1)) == ["ENDED"]
        async with watches.watching(client, cursor=kept) as watch:
            assert watches.users(await watch.events(6)) == [*new, "eve"]


async def test_a_history_that_was_lost_and_not_made_anew(rewinding: Rewinding) -> None:
    """Without a new event, too, a watch that saw what is lost ends, and a cursor from there is refused."""
    async with replicas.replica(await rewinding.open()) as (_, client), watches.watching(client) as watch:
        await started(client, "ada")
        beginning = watch.cursor
        await watch.events(1)
        await rewinding.save()
        await replicas.eventually(lambda: watches.answers(client), within=10)
        await client.end("ada")
        await watch.events(1)
        await rewinding.restore()
        assert (await watches.failure(watch)).reason == "CURSOR_EXPIRED"
        assert (await watches.failure(watches.Watch(client, cursor=watch.cursor))).reason == "CURSOR_EXPIRED"
        async with watches.watching(client, cursor=beginning) as again:
            assert watches.types(await again.events(1)) == ["STARTED"]
            await client.end("ada")
            assert watches.types(await again.events(1)) == ["ENDED"]
