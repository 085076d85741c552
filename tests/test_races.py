"""What holds when many do the same at once, over two replicas on one database."""

import asyncio
import collections
import collections.abc
import datetime
import time

import pytest
import replicas

from afterhours_grpc.expiry import clock, schedule
from afterhours_grpc.sessions import errors, location, service, session
from afterhours_grpc.store import batching, database, privacy, store

pytestmark = pytest.mark.store


@pytest.fixture
async def pair(
    engines: replicas.Engines,
) -> collections.abc.AsyncIterator[tuple[replicas.Client, replicas.Client]]:
    """Run two replicas."""
    async with replicas.replica(engines) as (_, one), replicas.replica(engines) as (_, two):
        yield one, two


async def test_of_many_starts_one_wins(
    engines: replicas.Engines, pair: tuple[replicas.Client, replicas.Client]
) -> None:
    """64 parallel starts of one user over two replicas give one OK and 63 ALREADY_EXISTS, nothing else."""
    await pair[0].put_profile("ada")
    results = await asyncio.gather(*(replicas.outcome(pair[n % 2].start("ada")) for n in range(64)))

    refusals = [each for each in results if isinstance(each, replicas.Refusal)]
    assert collections.Counter((each.code, each.reason) for each in refusals) == {
        ("ALREADY_EXISTS", "SESSION_ALREADY_ACTIVE"): 63
    }
    [started] = [each for each in results if not isinstance(each, replicas.Refusal)]
    assert {each.metadata["session_id"] for each in refusals} == {started.id}
    assert len(await engines.rows("SELECT FROM after_hours_sessions")) == 1


async def test_every_parallel_extension_counts(pair: tuple[replicas.Client, replicas.Client]) -> None:
    """40 parallel extends over two replicas add exactly 40 times their duration."""
    await pair[0].put_profile("ada")
    started = await pair[0].start("ada")
    extended = await asyncio.gather(*(pair[n % 2].extend("ada", 900) for n in range(40)))

    ends = sorted(each.expire_time.ToDatetime() for each in extended)
    step = datetime.timedelta(minutes=15)
    assert ends == [started.expire_time.ToDatetime() + step * (n + 1) for n in range(40)]
    found = await pair[1].get("ada")
    assert found.session.expire_time.ToDatetime() == ends[-1]


async def test_of_many_ends_one_wins(pair: tuple[replicas.Client, replicas.Client]) -> None:
    """32 parallel ends over two replicas give one OK and 31 NOT_FOUND."""
    await pair[0].put_profile("ada")
    await pair[0].start("ada")
    results = await asyncio.gather(*(replicas.outcome(pair[n % 2].end("ada")) for n in range(32)))

    refusals = [each.reason for each in results if isinstance(each, replicas.Refusal)]
    assert refusals == ["NO_ACTIVE_SESSION"] * 31


async def test_extensions_across_the_expiry_are_never_mixed(
    pair: tuple[replicas.Client, replicas.Client], engines: replicas.Engines
) -> None:
    """Extends fired across the expiry are OK and the session lives on, or refused and it is dead."""
    await asyncio.gather(*(pair[0].put_profile(f"user {n}") for n in range(40)))

    async def one(number: int) -> None:
        user = f"user {number}"
        started = await pair[0].start(user, 2)
        await asyncio.sleep(started.remaining.ToTimedelta().total_seconds() - 0.04 + number * 0.002)
        results = await asyncio.gather(*(replicas.outcome(pair[n % 2].extend(user)) for n in range(4)))
        added = [each for each in results if not isinstance(each, replicas.Refusal)]
        found = await pair[0].get(user)
        if added:
            expected = started.expire_time.ToDatetime() + datetime.timedelta(minutes=15) * len(added)
            assert len(added) == 4
            assert found.active
            assert found.session.expire_time.ToDatetime() == expected
        else:
            assert not found.active

    await asyncio.gather(*(one(number) for number in range(40)))
    rows = await engines.rows("SELECT expires_at, ended_at, end_reason FROM after_hours_sessions")
    assert all(row["ended_at"] in (None, row["expires_at"]) for row in rows)


async def test_a_start_racing_a_deletion_leaves_no_session_without_profile(
    pair: tuple[replicas.Client, replicas.Client], engines: replicas.Engines
) -> None:
    """A start racing DeleteProfile never leaves an active session without a profile."""

    async def race(user: str) -> None:
        await pair[0].put_profile(user)
        await asyncio.gather(replicas.outcome(pair[0].start(user)), replicas.outcome(pair[1].delete_profile(user)))

    for _ in range(5):
        await asyncio.gather(*(race(f"user {n}") for n in range(60)))
        orphans = await engines.rows(
            "SELECT FROM after_hours_sessions s WHERE ended_at IS NULL"
            " AND NOT EXISTS (SELECT FROM after_hours_profiles p WHERE p.user_id = s.user_id)"
        )
        assert not orphans


async def test_an_extension_that_waited_past_the_expiry_revives_nothing(
    engines: replicas.Engines,
) -> None:
    """An extension that waits for a writer until after the expiry is refused: the clock is read after the lock."""
    async with replicas.replica(engines) as (service, client):
        await client.put_profile("ada")
        await client.start("ada")
        async with replicas.locked(engines, "SELECT FROM after_hours_sessions WHERE user_id = 'ada' FOR UPDATE"):
            extending = asyncio.create_task(replicas.refused(client.extend("ada")))
            await asyncio.sleep(0.2)
            # The session expires while the extension waits.
            service.database.clock_offset = datetime.timedelta(minutes=16)
            await asyncio.sleep(0.4)
        assert (await extending).reason == "NO_ACTIVE_SESSION"
        assert not (await client.get("ada")).active


async def test_a_real_expiry_while_a_writer_holds_the_row(engines: replicas.Engines) -> None:
    """The same with the real clock: a writer held across the expiry instant."""
    async with replicas.replica(engines) as (_, client):
        await client.put_profile("ada")
        started = await client.start("ada", 2)
        await asyncio.sleep(0.9)
        await asyncio.sleep(0.9)
        async with replicas.locked(engines, "SELECT FROM after_hours_sessions WHERE user_id = 'ada' FOR UPDATE"):
            extending = asyncio.create_task(replicas.refused(client.extend("ada")))
            ending = asyncio.create_task(replicas.refused(client.end("ada")))
            await asyncio.sleep(0.4)
        assert (await extending).reason == (await ending).reason == "NO_ACTIVE_SESSION"

        async def closed() -> bool:
            rows = await engines.rows("SELECT * FROM after_hours_sessions WHERE ended_at = expires_at")
            return [str(row["id"]) for row in rows] == [started.id]

        await replicas.eventually(closed, within=1.5)


async def test_a_held_row_delays_nobody_else(engines: replicas.Engines) -> None:
    """While one user's row is held, others in the same batch are answered, and that user once it is free."""
    async with replicas.replica(engines) as (_, client):
        for user in ("ada", "bob"):
            await client.put_profile(user)
            await client.start(user)
        async with replicas.locked(engines, "SELECT FROM after_hours_sessions WHERE user_id = 'ada' FOR UPDATE"):
            extending = asyncio.create_task(client.extend("ada"))
            await asyncio.wait_for(asyncio.gather(*(client.extend("bob") for _ in range(20)), client.get("ada")), 3)
            assert not extending.done()
        await extending


async def test_an_overdue_session_blocks_no_start(engines: replicas.Engines) -> None:
    """A start closes an overdue session that nothing has swept, at its expires_at, and opens another."""
    async with replicas.replica(engines, AFTERHOURS_RECONCILE_INTERVAL="1h") as (service, client):
        await client.put_profile("ada")
        first = await client.start("ada")
        service.database.clock_offset = datetime.timedelta(minutes=15)
        assert not (await client.get("ada")).active
        assert (await replicas.refused(client.extend("ada"))).reason == "NO_ACTIVE_SESSION"
        second = await client.start("ada")

        rows = await engines.rows("SELECT * FROM after_hours_sessions ORDER BY started_at")
        assert [str(row["id"]) for row in rows] == [first.id, second.id]
        assert rows[0]["ended_at"] == rows[0]["expires_at"]
        assert rows[0]["end_reason"] == "EXPIRED"
        assert rows[1]["ended_at"] is None


async def test_a_clock_that_steps_back_ends_no_session_before_its_start(engines: replicas.Engines) -> None:
    """When the database's clock steps back, a session ends at its start at the earliest."""
    async with replicas.replica(engines) as (service, client):
        await client.put_profile("ada")
        started = await client.start("ada")
        service.database.clock_offset = datetime.timedelta(minutes=-5)
        ended = await client.end("ada")
        assert ended.end_time == started.start_time


@pytest.mark.parametrize("method", ["end", "extend"])
async def test_a_call_past_its_deadline_is_not_told_that_nothing_is_active(
    engines: replicas.Engines, method: str
) -> None:
    """An end or extension that comes past its deadline is told so, not NO_ACTIVE_SESSION, and is not applied."""
    async with replicas.replica(engines) as (replica, client):
        await client.put_profile("ada")
        started = await client.start("ada")
        sessions_store = store.Store(replica.database)
        use_cases = service.Sessions(
            sessions_store,
            privacy.Privacy(replica.database),
            schedule.Schedule(engines.redis_url, sessions_store, clock.Clock()),
            location.Fuzzer(location.FuzzKey.parse(replicas.FUZZ_KEY)),
            limiter=None,
        )
        user, past = session.UserId("ada"), session.Deadline(time.monotonic() - 1, of_caller=True)
        late = {
            "end": lambda: use_cases.end(session.End(user, None, past)),
            "extend": lambda: use_cases.extend(session.Extend(user, datetime.timedelta(minutes=15), None, past)),
        }
        with pytest.raises(errors.DeadlineExceeded):
            await late[method]()
        await use_cases.close()
        found = await client.get("ada")
        assert (found.active, found.session.expire_time) == (True, started.expire_time)


async def test_a_call_after_one_that_was_tried_again_does_not_wait_for_others() -> None:
    """After a batch of which one call was tried again by itself, a lone call still goes at once."""
    met: set[str] = set()

    async def flush(calls: list[str]) -> list[str | Exception]:
        first = {call for call in calls if call == "b" and call not in met}
        met.update(calls)
        return [database.Retry() if call in first else call for call in calls]

    batcher = batching.Batcher(flush, lambda call: (call,))
    deadline = session.Deadline(time.monotonic() + 10, of_caller=True)
    assert await asyncio.gather(*(batcher.submit(call, deadline) for call in "abc")) == ["a", "b", "c"]
    assert await asyncio.wait_for(batcher.submit("d", deadline), 0.5) == "d"
    await batcher.close()
