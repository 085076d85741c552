"""The watch: every transition, in order, none missing, whoever caused it, whatever broke."""

import asyncio
import base64
import collections
import collections.abc
import contextlib
import dataclasses
import datetime
import random
import signal
import time
import typing

import asyncpg
import keys
import proxy
import pytest
import redis.asyncio
import replicas
import watches
from afterhours.v1 import session_event_pb2

import afterhours_client
from afterhours_grpc.events import feed
from afterhours_grpc.store import outbox

JWT = {"AFTERHOURS_AUTH": "jwt", "AFTERHOURS_JWT_SECRET": keys.SECRET}


@pytest.mark.front_door
async def test_every_transition_whoever_caused_it(engines: replicas.Engines) -> None:
    """Start, extension, end, expiry, a removed profile, a closed gate and an operator's end come as they happen."""
    async with replicas.replica(engines, AFTERHOURS_GATES="consent") as (_, client), watches.watching(client) as watch:
        for user_id in ("ada", "bob", "eve", "joe"):
            await client.put_profile(user_id, location_consent=True)
        started = await client.start("ada")
        extended = await client.extend("ada")
        ended = await client.end("ada")
        events = await watch.events(3)
        assert watches.told(events) == [
            ("STARTED", "ada", watches.NONE),
            ("EXTENDED", "ada", watches.NONE),
            ("ENDED", "ada", "USER"),
        ]
        assert [each.session for each in events] == [started, extended, ended]
        assert events[0].event_time == started.start_time
        assert events[2].event_time == ended.end_time
        assert started.start_time.ToDatetime() < events[1].event_time.ToDatetime() <= ended.end_time.ToDatetime()

        short = await client.start("ada", 2)
        await client.start("bob")
        await client.delete_profile("bob")
        await client.start("eve")
        await client.put_profile("eve")
        await client.start("joe")
        operator = await replicas.Process(engines.environment(), "end", "joe").start()
        assert await operator.wait() == 0
        events = await watch.events(8)
        assert collections.Counter(watches.told(events)) == {
            ("STARTED", "ada", watches.NONE): 1,
            ("ENDED", "ada", "EXPIRED"): 1,
            ("STARTED", "bob", watches.NONE): 1,
            ("ENDED", "bob", "PROFILE_REMOVED"): 1,
            ("STARTED", "eve", watches.NONE): 1,
            ("ENDED", "eve", "INELIGIBLE"): 1,
            ("STARTED", "joe", watches.NONE): 1,
            ("ENDED", "joe", "ADMIN"): 1,
        }
        expired = next(each for each in events if each.session.id == short.id and watches.name(each) == "ENDED")
        assert expired.event_time == expired.session.end_time == short.expire_time
        # A start closes what nothing has swept yet.
        assert await engines.rows("SELECT FROM after_hours_outbox") == []


@pytest.mark.front_door
async def test_refused_and_replayed_calls_leave_no_event(engines: replicas.Engines) -> None:
    """What changed nothing is no event, and what was replayed is none again."""
    async with replicas.replica(engines) as (_, client), watches.watching(client) as watch:
        await replicas.refused(client.start("ada"))
        await client.put_profile("ada")
        first = replicas.request_id()
        await client.start("ada", request_id=first)
        await client.start("ada", request_id=first)
        await replicas.refused(client.start("ada"))
        await client.end("ada")
        await replicas.refused(client.end("ada"))
        assert [kind for kind, _, _ in watches.told(await watch.events(2))] == ["STARTED", "ENDED"]
        await watch.silent()


@pytest.mark.front_door
async def test_from_now_on_from_a_cursor_and_of_some_users(engines: replicas.Engines) -> None:
    """An empty cursor means now; another one goes on after it, with other users, too, and on another server."""
    async with replicas.replica(engines) as (_, client), replicas.replica(engines) as (_, other):
        for user_id in ("ada", "bob"):
            await client.put_profile(user_id)
        async with watches.watching(client) as watch:
            beginning = watch.cursor
            await client.start("ada")
            [first] = await watch.events(1)
            await client.start("bob")
        async with watches.watching(other, cursor=first.cursor) as watch:
            assert watches.told(await watch.events(1)) == [("STARTED", "bob", watches.NONE)]
        async with watches.watching(other) as watch, watches.watching(client, ["ada", "nobody"]) as of_ada:
            await client.end("bob")
            await client.end("ada")
            assert watches.told(await watch.events(2)) == [("ENDED", "bob", "USER"), ("ENDED", "ada", "USER")]
            assert watches.told(await of_ada.events(1)) == [("ENDED", "ada", "USER")]
        async with watches.watching(other, ["bob"], beginning) as watch:
            assert watches.told(await watch.events(2)) == [("STARTED", "bob", watches.NONE), ("ENDED", "bob", "USER")]
            await watch.silent()


async def test_heartbeats(engines: replicas.Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    """They come by themselves, with a cursor that has passed what concerned others."""
    monkeypatch.setattr(feed, "HEARTBEAT", 0.3)
    async with replicas.replica(engines) as (_, client), watches.watching(client, ["nobody"]) as watch:
        first = watch.cursor
        await client.put_profile("ada")
        await client.start("ada")
        began = time.monotonic()
        beats = [await watch.next() for _ in range(4)]
        assert {watches.name(each) for each in beats} == {watches.HEARTBEAT}
        assert 1.0 < time.monotonic() - began < 3
        assert beats[-1].cursor != first
        assert abs(beats[-1].event_time.ToDatetime(datetime.UTC) - datetime.datetime.now(datetime.UTC)).seconds < 2
        async with watches.watching(client, cursor=beats[-1].cursor) as later:
            await later.silent(0.4)


def forged(version: bytes, *numbers: int) -> str:
    """Return a cursor that no server has given."""
    raw = version + b"".join(each.to_bytes(8, "big", signed=True) for each in numbers)
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


@pytest.mark.parametrize(
    "cursor",
    ["x", "é", "AAAA", forged(b"1", 7), forged(b"3", 7, 0), forged(b"2", -7, 0), forged(b"2", 7, 2**63 - 1)],
)
async def test_a_cursor_that_is_none(engines: replicas.Engines, cursor: str) -> None:
    """A malformed cursor is refused by name."""
    async with replicas.replica(engines) as (_, client):
        refusal = await replicas.refused(watches.Watch(client, cursor=cursor).next())
        assert refusal.reason == "INVALID_REQUEST"
        assert [each.field for each in refusal.details["BadRequest"].field_violations] == ["cursor"]
        many = await replicas.refused(watches.Watch(client, [f"user {number}" for number in range(1001)]).next())
        assert [each.field for each in many.details["BadRequest"].field_violations] == ["user_ids"]


async def test_a_cursor_of_no_event(engines: replicas.Engines) -> None:
    """A cursor of an event that the database does not have, or that got its position at another time, has expired."""
    async with replicas.replica(engines) as (_, client):
        await client.put_profile("ada")
        async with watches.watching(client) as watch:
            await client.start("ada")
            await watch.events(1)
        for cursor in (forged(b"2", 1, 0), forged(b"2", 10**6, 0), forged(b"2", 2**63 - 1, 0)):
            refusal = await watches.failure(watches.Watch(client, cursor=cursor))
            assert (refusal.code, refusal.reason) == ("OUT_OF_RANGE", "CURSOR_EXPIRED")
        async with watches.watching(client, cursor=watch.cursor) as again:
            await client.end("ada")
            assert watches.types(await again.events(1)) == ["ENDED"]


@pytest.mark.store
async def test_a_cursor_that_is_too_old(engines: replicas.Engines) -> None:
    """Events are removed after their retention, in their order; a cursor before what is kept is CURSOR_EXPIRED.

    The newest event that is past its retention stays, for the cursor there: it may be idle for longer than that.
    """
    settings = {"AFTERHOURS_EVENT_RETENTION": "7d", "AFTERHOURS_RECONCILE_INTERVAL": "1s"}
    async with replicas.replica(engines, **settings) as (service, client):
        await client.put_profile("ada")
        async with watches.watching(client) as watch:
            beginning = watch.cursor
            for _ in range(5):
                await client.start("ada")
                await client.end("ada")
            events = await watch.events(10)
        await engines.rows("UPDATE after_hours_events SET placed_at = placed_at + interval '1 day' WHERE position > 6")
        service.database.clock_offset = datetime.timedelta(days=7)
        await replicas.eventually(lambda: _kept(engines, 5), within=5)
        for cursor, user_ids in ((beginning, []), (events[4].cursor, []), (beginning, ["ada"]), (beginning, ["eve"])):
            refusal = await watches.failure(watches.Watch(client, user_ids, cursor))
            assert (refusal.code, refusal.reason) == ("OUT_OF_RANGE", "CURSOR_EXPIRED")
        async with watches.watching(client, cursor=events[5].cursor) as watch:
            newer = await watch.events(4)
        assert [each.session for each in newer] == [each.session for each in events[6:]]

        service.database.clock_offset = datetime.timedelta(days=9)
        await replicas.eventually(lambda: _kept(engines, 1), within=5)
        assert (await watches.failure(watches.Watch(client, cursor=newer[2].cursor))).reason == "CURSOR_EXPIRED"
        async with watches.watching(client, cursor=newer[3].cursor) as watch:
            await client.start("ada")
            assert watches.told(await watch.events(1)) == [("STARTED", "ada", watches.NONE)]


async def _kept(engines: replicas.Engines, count: int) -> bool:
    return len(await engines.rows("SELECT FROM after_hours_events")) == count


async def test_who_may_watch(engines: replicas.Engines) -> None:
    """The own user without a scope, named or not; everybody with one; and nobody without credentials."""
    async with (
        replicas.replica(engines, **JWT) as (service, anybody),
        replicas.Client(service.address, keys.token("root", keys.EVERYTHING)) as root,
        replicas.Client(service.address, keys.token("ada")) as ada,
        replicas.Client(service.address, keys.token("chat", "sessions:watch")) as chat,
        replicas.Client(service.address, keys.token("gateway", "sessions:any")) as gateway,
        replicas.Client(service.address, keys.token("officer", "sessions:exact profiles:write")) as officer,
    ):
        for user_id in ("ada", "bob"):
            await root.put_profile(user_id)
        assert (await replicas.refused(watches.Watch(anybody).next())).reason == "UNAUTHENTICATED"
        for client, user_ids in ((ada, ["bob"]), (ada, ["ada", "bob"]), (officer, ["ada"])):
            assert (await replicas.refused(watches.Watch(client, user_ids).next())).reason == "FORBIDDEN"
        assert (await replicas.refused(chat.get("ada"))).reason == "FORBIDDEN"
        async with (
            watches.watching(ada) as own,
            watches.watching(ada, ["ada"]) as named,
            watches.watching(chat) as of_all,
            watches.watching(gateway, ["bob"]) as of_bob,
        ):
            await root.start("bob")
            await root.start("ada")
            assert (
                watches.told(await own.events(1))
                == watches.told(await named.events(1))
                == [("STARTED", "ada", watches.NONE)]
            )
            assert len(await of_all.events(2)) == 2
            assert watches.told(await of_bob.events(1)) == [("STARTED", "bob", watches.NONE)]


@pytest.mark.front_door
async def test_the_watches_of_a_user_are_bounded(engines: replicas.Engines) -> None:
    """The 65th watch of a user without a scope for others is OVERLOADED until one ends; others' watches are not."""
    async with (
        replicas.replica(engines, **JWT) as (service, _),
        replicas.Client(service.address, keys.token("ada")) as ada,
        replicas.Client(service.address, keys.token("bob")) as bob,
        replicas.Client(service.address, keys.token("chat", "sessions:watch")) as chat,
        afterhours_client.aio.Client(service.address, token=keys.token("ada")) as patient,
    ):
        opened = [watches.Watch(ada, ["ada"]) for _ in range(64)]
        await asyncio.gather(*(each.next() for each in opened))
        refusal = await replicas.refused(watches.Watch(ada).next())
        assert (refusal.code, refusal.reason) == ("RESOURCE_EXHAUSTED", "OVERLOADED")
        assert refusal.details["RetryInfo"].HasField("retry_delay")
        await asyncio.gather(*(watches.Watch(each).next() for each in (bob, *65 * [chat])))
        resumed = patient.watch()
        reading: asyncio.Future[object] = asyncio.ensure_future(anext(aiter(resumed)))
        opened.pop().cancel()
        await replicas.until(lambda: bool(resumed.cursor), within=5)
        reading.cancel()


@pytest.mark.front_door
async def test_a_stream_ends_with_its_token(engines: replicas.Engines) -> None:
    """At the token's exp the stream ends as UNAUTHENTICATED, whether or not events come."""
    async with (
        replicas.replica(engines, **JWT) as (service, _),
        replicas.Client(service.address, keys.token("ada", exp=time.time() + 1.5)) as client,
        watches.watching(client) as watch,
    ):
        began = time.monotonic()
        refusal = await replicas.refused(watch.next())
        assert (refusal.code, refusal.reason) == ("UNAUTHENTICATED", "UNAUTHENTICATED")
        assert 0.5 < time.monotonic() - began < 3


async def test_a_stream_within_the_leeway(engines: replicas.Engines) -> None:
    """A token that is past its exp by less than clocks may differ opens a stream as it opens calls, until then."""
    async with (
        replicas.replica(engines, **JWT) as (service, _),
        replicas.Client(service.address, keys.token("ada", exp=time.time() - 28)) as client,
        watches.watching(client) as watch,
    ):
        began = time.monotonic()
        refusal = await replicas.refused(watch.next())
        assert (refusal.code, refusal.reason) == ("UNAUTHENTICATED", "UNAUTHENTICATED")
        assert 0.5 < time.monotonic() - began < 4


@pytest.mark.front_door
async def test_a_shutdown_ends_streams_at_once(engines: replicas.Engines) -> None:
    """On SIGTERM streams end as SHUTTING_DOWN, and go on elsewhere from their cursors."""
    async with replicas.replica(engines) as (_, other), replicas.process(engines) as (process, client):
        await other.put_profile("ada")
        async with watches.watching(client) as watch:
            process.signal(signal.SIGTERM)
            refusal = await replicas.refused(watch.next())
            assert (refusal.code, refusal.reason) == ("UNAVAILABLE", "SHUTTING_DOWN")
        assert await process.wait() == 0
        await other.start("ada")
        async with watches.watching(other, cursor=watch.cursor) as again:
            assert watches.told(await again.events(1)) == [("STARTED", "ada", watches.NONE)]


@pytest.mark.store
@pytest.mark.parametrize("where", ["elsewhere", "a transition"])
async def test_a_transaction_that_stays_open_stops_nobody(engines: replicas.Engines, where: str) -> None:
    """An open transaction, even with an event of its own in it, delays no other; its event comes when it commits."""
    async with replicas.replica(engines) as (_, client), watches.watching(client) as watch:
        for user_id in ("ada", "bob"):
            await client.put_profile(user_id)
        await client.start("ada")
        await watch.events(1)
        connection = await asyncpg.connect(engines.database_url)
        transaction = connection.transaction()
        await transaction.start()
        await connection.execute("CREATE TABLE elsewhere (id int)")
        if where == "a transition":
            await connection.execute(
                "INSERT INTO after_hours_outbox (type, happened_at, session_id, user_id, started_at, expires_at)"
                " SELECT 'EXTENDED', now(), id, user_id, started_at, expires_at FROM after_hours_sessions"
            )
        for _ in range(20):
            await client.start("bob")
            await client.end("bob")
        others = await watch.events(40)
        assert {each.session.user_id for each in others} == {"bob"}
        cursor = watch.cursor
        await transaction.commit()
        await connection.close()
        if where == "a transition":
            assert watches.told(await watch.events(1)) == [("EXTENDED", "ada", watches.NONE)]
            async with watches.watching(client, cursor=cursor) as later:
                assert watches.told(await later.events(1)) == [("EXTENDED", "ada", watches.NONE)]
        else:
            await watch.silent()


async def _collected(
    watchers: list[tuple[watches.Watch, list[session_event_pb2.SessionEvent]]], done: asyncio.Event
) -> None:
    async def collect(watch: watches.Watch, into: list[session_event_pb2.SessionEvent]) -> None:
        while not done.is_set():
            with contextlib.suppress(TimeoutError):
                event = await watch.next(0.5)
                if watches.name(event) != watches.HEARTBEAT:
                    into.append(event)

    await asyncio.gather(*(collect(*each) for each in watchers))


async def _table(engines: replicas.Engines) -> collections.Counter[tuple[str, str]]:
    """Give what the sessions say must have happened: a start of each, and its end."""
    rows = await engines.rows("SELECT id, ended_at FROM after_hours_sessions")
    expected = collections.Counter(("STARTED", str(row["id"])) for row in rows)
    expected.update(("ENDED", str(row["id"])) for row in rows if row["ended_at"])
    return expected


async def test_sixteen_writers_a_held_transaction_and_streams_that_break(engines: replicas.Engines) -> None:
    """Of all that 16 writers on two servers do, a watch that breaks at random, and goes on, misses nothing."""
    chance = random.Random(9)
    async with (
        replicas.replica(engines) as (_, one),
        replicas.replica(engines) as (_, other),
        replicas.locked(engines, "SELECT pg_current_xact_id()"),
    ):
        users = [f"user {number}" for number in range(64)]
        await asyncio.gather(*(one.put_profile(user) for user in users))
        seen: list[session_event_pb2.SessionEvent] = []
        done = asyncio.Event()
        extended = 0

        async def write(number: int) -> None:
            nonlocal extended
            for _ in range(25):
                client, user = chance.choice((one, other)), users[number * 4 + chance.randint(0, 3)]
                await client.start(user)
                if chance.random() < 0.3:
                    await client.extend(user)
                    extended += 1
                await client.end(user)

        async def watch() -> None:
            first = watches.Watch(one)
            cursor = (await first.next()).cursor
            first.cancel()
            started.set()
            while not done.is_set():
                async with watches.watching(chance.choice((one, other)), cursor=cursor) as stream:
                    for _ in range(chance.randint(1, 120)):
                        with contextlib.suppress(TimeoutError):
                            event = await stream.next(1)
                            if watches.name(event) != watches.HEARTBEAT:
                                seen.append(event)
                        cursor = stream.cursor
                        if done.is_set():
                            break

        started = asyncio.Event()
        watcher = asyncio.create_task(watch())
        await started.wait()
        await asyncio.gather(*(write(number) for number in range(16)))
        expected = await _table(engines)

        async def complete() -> bool:
            return len({each.cursor for each in seen}) >= sum(expected.values()) + extended

        await replicas.eventually(complete, within=20)
        done.set()
        await watcher
        _check(seen, expected, extended)


def _check(
    seen: list[session_event_pb2.SessionEvent], expected: collections.Counter[tuple[str, str]], extended: int
) -> None:
    """Check that after leaving out repeats all came once, and those of each session in order."""
    once = {each.cursor: each for each in seen}
    found = collections.Counter((watches.name(each), each.session.id) for each in once.values())
    assert sum(count for (kind, _), count in found.items() if kind == "EXTENDED") == extended
    assert {key: count for key, count in found.items() if key[0] not in {"EXTENDED", "EXPIRING"}} == dict(expected)
    orders = collections.defaultdict(list)
    for each in once.values():
        orders[each.session.id].append(watches.name(each))
    for order in orders.values():
        assert order[0] == "STARTED"
        assert "ENDED" not in order[:-1]
    watches.in_order(once.values())


async def test_kills_of_replicas_leave_no_gap(engines: replicas.Engines) -> None:
    """Replicas that are killed under load, at any point, lose no event of what was committed."""
    seen: list[session_event_pb2.SessionEvent] = []
    async with replicas.replica(engines) as (_, client):
        users = [f"user {number}" for number in range(40)]
        await asyncio.gather(*(client.put_profile(user) for user in users))
        async with watches.watching(client) as stream:
            done = asyncio.Event()
            collecting = asyncio.create_task(_collected([(stream, seen)], done))
            for _ in range(3):
                async with replicas.process(engines) as (process, doomed):
                    calls = [asyncio.create_task(replicas.outcome(doomed.start(user))) for user in users]
                    calls += [asyncio.create_task(replicas.outcome(doomed.end(user))) for user in users]
                    await asyncio.sleep(0.15)
                    process.signal(signal.SIGKILL)
                    await asyncio.gather(*calls)
            for user in users:
                await replicas.outcome(client.end(user))
            expected = await _table(engines)

            async def complete() -> bool:
                return len(seen) >= sum(expected.values())

            await replicas.eventually(complete, within=5)
            done.set()
            await collecting
            _check(seen, expected, 0)


async def test_postgres_drops_every_connection(engines: replicas.Engines) -> None:
    """A watch whose server loses its connections, that of its notifications too, goes on."""
    async with replicas.replica(engines) as (_, client), watches.watching(client) as watch:
        await client.put_profile("ada")
        for _ in range(3):
            await client.start("ada")
            await client.end("ada")
            await engines.rows(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE pid <> pg_backend_pid() AND datname = current_database()"
            )
            await replicas.eventually(lambda: watches.answers(client), within=5)
        assert [kind for kind, _, _ in watches.told(await watch.events(6))] == 3 * ["STARTED", "ENDED"]


async def test_a_slow_reader_is_told_and_harms_nobody(engines: replicas.Engines) -> None:
    """Who does not read is given bounded memory, and then SLOW_CONSUMER with the cursor to go on from."""
    async with (
        replicas.replica(engines) as (service, client),
        # Else its library reads megabytes ahead.
        replicas.Client(service.address, further=[("grpc.http2.bdp_probe", 0)]) as stalling,
        watches.watching(client) as watch,
    ):
        slow = watches.Watch(stalling)
        assert watches.name(await slow.next()) == watches.HEARTBEAT
        users = [f"user {number}" for number in range(250)]
        await asyncio.gather(*(client.put_profile(user) for user in users))
        seen: list[session_event_pb2.SessionEvent] = []
        done = asyncio.Event()
        collecting = asyncio.create_task(_collected([(watch, seen)], done))
        for _ in range(12):
            await asyncio.gather(*(client.start(user) for user in users))
            await asyncio.gather(*(client.end(user) for user in users))

        async def complete() -> bool:
            return len(seen) == 6_000

        await replicas.eventually(complete, within=20)
        done.set()
        await collecting
        read = 0
        while not isinstance(refusal := await replicas.outcome(slow.next()), replicas.Refusal):
            assert watches.name(refusal) != watches.HEARTBEAT
            read += 1
        assert (refusal.code, refusal.reason) == ("RESOURCE_EXHAUSTED", "SLOW_CONSUMER")
        assert refusal.metadata["cursor"] == slow.cursor
        assert read < 5_000
        async with watches.watching(client, cursor=slow.cursor) as again:
            assert await again.events(6_000 - read, within=30) == seen[read:]


@pytest.mark.front_door
async def test_a_thousand_watchers(engines: replicas.Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 watchers on one server all get what is theirs, and share one reading of the events."""
    readings = 0
    read = outbox.Outbox.after

    async def counted(*arguments: typing.Any) -> list[outbox.Event]:
        nonlocal readings
        readings += 1
        return await read(*arguments)

    monkeypatch.setattr(outbox.Outbox, "after", counted)
    async with replicas.replica(engines) as (_, client), contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(replicas.Client(client.address)) for _ in range(10)]
        users = [f"user {number}" for number in range(1000)]
        await asyncio.gather(*(client.put_profile(user) for user in users))
        opened = [watches.Watch(clients[number % 10], [user]) for number, user in enumerate(users)]
        for each in opened:
            stack.callback(each.cancel)
        assert {watches.name(each) for each in await asyncio.gather(*(watch.next(20) for watch in opened))} == {
            watches.HEARTBEAT
        }
        await asyncio.gather(*(client.start(user) for user in users))
        events = await asyncio.gather(*(watch.events(1, 20) for watch in opened))
        assert [watches.told(each) for each in events] == [[("STARTED", user, watches.NONE)] for user in users]
    assert 0 < readings < 100


async def test_a_storm_of_watchers_that_resume(engines: replicas.Engines) -> None:
    """While 400 watchers catch up, with a slow Postgres, calls find a connection at once."""
    async with (
        proxy.Proxy(engines.database_url) as network,
        replicas.replica(dataclasses.replace(engines, database_url=network.url)) as (_, client),
        contextlib.AsyncExitStack() as stack,
    ):
        clients = [await stack.enter_async_context(replicas.Client(client.address)) for _ in range(10)]
        async with watches.watching(client) as watch:
            beginning = watch.cursor
            await client.put_profile("ada")
            await client.start("ada")
            await watch.events(1)
            network.delay_replies = 0.1
            resumed = [watches.Watch(clients[number % 10], [f"user {number}"], beginning) for number in range(400)]
            for each in resumed:
                stack.callback(each.cancel)
            await asyncio.gather(*(each.next(20) for each in resumed))
            began = time.monotonic()
            await client.end("ada")
            assert time.monotonic() - began < 2.5
            network.delay_replies = 0


@pytest.mark.store
async def test_warnings(engines: replicas.Engines) -> None:
    """EXPIRING comes once, a lead before the end, moves with an extension, and is left out where less is left."""
    settings = {"AFTERHOURS_WARNING_LEAD": "3s", "AFTERHOURS_DURATIONS": "2s,3s,4s,5s"}
    async with (
        replicas.replica(engines, **settings) as (_, client),
        replicas.replica(engines, **settings) as (_, other),
        watches.watching(other) as watch,
    ):
        for user_id in ("ada", "bob", "eve"):
            await client.put_profile(user_id)
        ada, bob, eve = await client.start("ada", 4), await client.start("bob", 2), await client.start("eve", 5)
        moved = await client.extend("eve", 2)
        events = await watch.events(4)
        # One second after its start, and not again.
        [warned] = await watch.events(1, within=3)
        assert (watches.name(warned), warned.session.id, warned.session.expire_time) == (
            "EXPIRING",
            ada.id,
            ada.expire_time,
        )
        assert 3 > warned.session.remaining.ToTimedelta().total_seconds() > 2
        later = await watch.events(4, within=10)
        assert watches.told([each for each in later if each.session.id == bob.id]) == [("ENDED", "bob", "EXPIRED")]
        assert watches.told([each for each in later if each.session.id == ada.id]) == [("ENDED", "ada", "EXPIRED")]
        of_eve = [each for each in later if each.session.id == eve.id]
        assert [watches.name(each) for each in of_eve] == ["EXPIRING", "ENDED"]
        assert of_eve[0].session.expire_time == moved.expire_time
        assert len(events) == 4
        await watch.silent()


@pytest.mark.store
async def test_a_warning_for_each_end(engines: replicas.Engines) -> None:
    """After a warning an extension brings another one; an end takes it away; a lead of 0 turns warnings off."""
    settings = {"AFTERHOURS_WARNING_LEAD": "3s", "AFTERHOURS_DURATIONS": "4s,15m"}
    async with replicas.replica(engines, **settings) as (_, client), watches.watching(client) as watch:
        for user_id in ("ada", "bob"):
            await client.put_profile(user_id)
        await client.start("ada", 4)
        await client.start("bob", 4)
        await client.end("bob")
        events = await watch.events(4)
        assert [watches.name(each) for each in events] == ["STARTED", "STARTED", "ENDED", "EXPIRING"]
        await client.extend("ada", 4)
        assert [watches.name(each) for each in await watch.events(2)] == ["EXTENDED", "EXPIRING"]
        await client.extend("ada", 900)
        assert len(await _warnings(engines)) == 1
        await client.end("ada")
        assert [watches.name(each) for each in await watch.events(2)] == ["EXTENDED", "ENDED"]

        async def gone() -> bool:
            return await _warnings(engines) == []

        await replicas.eventually(gone, within=2)
    async with replicas.replica(engines, AFTERHOURS_WARNING_LEAD="0") as (_, client):
        await client.start("ada")
        assert await _warnings(engines) == []


async def _warnings(engines: replicas.Engines) -> list[str]:
    async with redis.asyncio.Redis.from_url(engines.redis_url, decode_responses=True) as connection:
        found = typing.cast("list[str]", await connection.zrange("afterhours:warnings", 0, -1))
    assert all(each.startswith("session:warn:") for each in found)
    return found


@pytest.mark.store
async def test_warnings_survive_redis(engines: replicas.Engines) -> None:
    """A warning whose timer Redis lost, or doubled, comes by the sweep, once."""
    settings = {"AFTERHOURS_WARNING_LEAD": "3s", "AFTERHOURS_DURATIONS": "5s", "AFTERHOURS_RECONCILE_INTERVAL": "1s"}
    async with (
        replicas.replica(engines, **settings) as (_, client),
        watches.watching(client) as watch,
        redis.asyncio.Redis.from_url(engines.redis_url) as connection,
    ):
        for user_id in ("ada", "bob"):
            await client.put_profile(user_id)
        await client.start("ada", 5)
        bob = await client.start("bob", 5)
        await connection.flushall()
        # Too early, and foreign.
        foreign = [f"session:warn:{bob.id}".encode(), b"session:warn:nobody", b"\xff"]
        await connection.zadd("afterhours:warnings", dict.fromkeys(foreign, 1))
        events = await watch.events(6, within=10)
        assert collections.Counter(watches.name(each) for each in events) == {"STARTED": 2, "EXPIRING": 2, "ENDED": 2}
        for each in events:
            if watches.name(each) == "EXPIRING":
                assert each.session.remaining.ToTimedelta().total_seconds() < 3


@pytest.mark.store
async def test_warnings_without_redis(engines: replicas.Engines) -> None:
    """Without a Redis a warning comes by the sweep, once, from one of two replicas."""
    settings = {
        "REDIS_URL": "redis://127.0.0.1:1",
        "AFTERHOURS_WARNING_LEAD": "3s",
        "AFTERHOURS_DURATIONS": "4s",
        "AFTERHOURS_RECONCILE_INTERVAL": "1s",
    }
    async with (
        replicas.replica(engines, **settings) as (_, client),
        replicas.replica(engines, **settings),
        watches.watching(client) as watch,
    ):
        await client.put_profile("ada")
        await client.start("ada", 4)
        events = await watch.events(3, within=7)
        assert [watches.name(each) for each in events] == ["STARTED", "EXPIRING", "ENDED"]
        assert events[1].session.remaining.ToTimedelta().total_seconds() > 0


async def test_an_erased_user(engines: replicas.Engines) -> None:
    """What events say of an erased user is gone, for those who come later, too; the end that it caused is told."""
    async with replicas.replica(engines) as (_, client):
        for user_id in ("ada", "bob"):
            await client.put_profile(user_id)
        async with watches.watching(client) as watch, watches.watching(client, ["ada"]) as of_ada:
            beginning = watch.cursor
            first = await client.start("ada")
            await client.end("ada")
            second = await client.start("ada")
            await client.start("bob")
            await watch.events(4)
            await of_ada.events(3)
            erasing = await replicas.Process(engines.environment(), "erase-user", "ada", "--reference", "1").start()
            assert await erasing.wait() == 0
            for each in (watch, of_ada):
                [ended] = await each.events(1)
                assert watches.told([ended]) == [("ENDED", "ada", "ADMIN")]
                assert not ended.session.HasField("fuzzed_location")
        async with watches.watching(client, cursor=beginning) as later:
            events = await later.events(5)
        assert [(watches.name(each), each.session.id) for each in events[:3]] == [
            ("STARTED", first.id),
            ("ENDED", first.id),
            ("STARTED", second.id),
        ]
        assert {event.session.user_id for event in events[:3]} == {""}
        assert not any(event.session.HasField("fuzzed_location") for event in events[:3])
        assert watches.told(events[3:]) == [("STARTED", "bob", watches.NONE), ("ENDED", "ada", "ADMIN")]
        left = await engines.rows("SELECT to_jsonb(e)::text AS row FROM after_hours_events AS e WHERE user_id = 'ada'")
        assert len(left) == 1
