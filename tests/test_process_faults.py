"""A process that dies, or is told to stop, at the worst moment."""

import asyncio
import signal
import time

import pytest
import replicas

from afterhours_grpc import failpoints

pytestmark = [pytest.mark.front_door, pytest.mark.timed]

_OVERDUE = """
INSERT INTO after_hours_sessions (user_id, started_at, expires_at, latitude, longitude, fuzzed_latitude,
    fuzzed_longitude, fuzz_radius_meters, fuzz_key_version, fuzz_cell)
SELECT 'user ' || n, now() - interval '1 hour', now() - interval '1 minute', 0, 0, 0, 0, 1000, 1, 1
FROM generate_series(1, $1::int) AS n
"""


@pytest.mark.parametrize("point", [failpoints.Point.STARTED, failpoints.Point.TIMED])
async def test_a_start_whose_process_died_is_told_by_its_request_id(
    engines: replicas.Engines, point: failpoints.Point
) -> None:
    """Killed after the commit of a start, before or after its timer: the same request_id tells the session, once."""
    first = replicas.request_id()
    async with replicas.replica(engines) as (_, client):
        await client.put_profile("ada")
    async with replicas.process(engines, AFTERHOURS_FAIL_POINT=point.value) as (process, client):
        refusal = await replicas.refused(client.start("ada", 2, request_id=first))
        assert refusal.code == "UNAVAILABLE"
        assert await process.wait() == -signal.SIGKILL
    async with replicas.replica(engines, AFTERHOURS_RECONCILE_INTERVAL="1s") as (_, client):
        told = await client.start("ada", 2, request_id=first)
        [row] = await engines.rows("SELECT * FROM after_hours_sessions")
        assert told.id == str(row["id"])

        async def closed() -> bool:
            return bool(await engines.rows("SELECT FROM after_hours_sessions WHERE ended_at = expires_at"))

        await replicas.eventually(closed, within=4)


async def test_a_start_killed_in_the_middle_of_its_statement_is_whole_or_not_there(engines: replicas.Engines) -> None:
    """Killed between a start's insert and its commit: the same request_id starts it, and there is one session."""
    await engines.rows(
        "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(0.7); RETURN NULL; END'"
    )
    await engines.rows("CREATE TRIGGER slow AFTER INSERT ON after_hours_sessions FOR EACH ROW EXECUTE FUNCTION slow()")
    first = replicas.request_id()
    async with replicas.process(engines) as (process, client):
        await client.put_profile("ada")
        starting = asyncio.create_task(replicas.refused(client.start("ada", request_id=first)))
        await asyncio.sleep(0.3)
        process.signal(signal.SIGKILL)
        assert (await starting).code == "UNAVAILABLE"
    await engines.rows("DROP TRIGGER slow ON after_hours_sessions")
    async with replicas.replica(engines) as (_, client):
        assert (await client.start("ada", request_id=first)).user_id == "ada"
        assert len(await engines.rows("SELECT FROM after_hours_sessions")) == 1


async def test_a_sweep_killed_in_the_middle_is_finished_by_the_next(engines: replicas.Engines) -> None:
    """Killed in the middle of the first sweep, the next process closes the rest before it serves."""
    await engines.rows(_OVERDUE, 2500)
    dying = await replicas.Process(engines.environment(AFTERHOURS_FAIL_POINT="swept")).start()
    assert await dying.wait() == -signal.SIGKILL
    assert len(await engines.rows("SELECT FROM after_hours_sessions WHERE ended_at IS NULL")) == 1500
    async with replicas.process(engines):
        assert not await engines.rows("SELECT FROM after_hours_sessions WHERE ended_at IS NULL")


async def test_a_deletion_killed_in_the_middle_did_not_happen(engines: replicas.Engines) -> None:
    """Killed between the deletion of a profile and the end of its session: both are still there."""
    async with replicas.process(engines, AFTERHOURS_FAIL_POINT="deleted") as (process, client):
        await client.put_profile("ada")
        await client.start("ada")
        assert (await replicas.refused(client.delete_profile("ada"))).code == "UNAVAILABLE"
        await process.wait()
    async with replicas.replica(engines) as (_, client):
        assert (await client.get("ada")).active
        await client.delete_profile("ada")
        assert not (await client.get("ada")).active


async def test_a_migration_killed_in_the_middle_did_not_happen(engines: replicas.Engines) -> None:
    """Killed in the middle of a migration, the next one does it whole."""
    await engines.rows("DROP SCHEMA public CASCADE")
    await engines.rows("CREATE SCHEMA public")
    dying = replicas.Process(engines.environment(AFTERHOURS_FAIL_POINT="migrated"), "migrate")
    assert await (await dying.start()).wait() == -signal.SIGKILL
    assert not await engines.rows("SELECT FROM pg_tables WHERE tablename LIKE 'after_hours%'")
    migrating = replicas.Process(engines.environment(), "migrate")
    assert await (await migrating.start()).wait() == 0
    async with replicas.process(engines) as (_, client):
        await client.put_profile("ada")
        await client.start("ada")


async def test_ten_thousand_overdue_are_closed_before_serving(engines: replicas.Engines) -> None:
    """10,000 sessions overdue at the start delay SERVING by at most a second, and are closed by then."""

    async def until_listening() -> float:
        began = time.monotonic()
        async with replicas.process(engines):
            listening = time.monotonic() - began
            assert not await engines.rows("SELECT FROM after_hours_sessions WHERE ended_at IS NULL")
        return listening

    nothing_to_do = await until_listening()
    await engines.rows(_OVERDUE, 10_000)
    assert await until_listening() < nothing_to_do + 1
    assert len(await engines.rows("SELECT FROM after_hours_sessions WHERE ended_at = expires_at")) == 10_000


async def _load(client: replicas.Client, user: str, outcomes: list[object]) -> None:
    """Call until told otherwise; keep every outcome."""
    while True:
        for call in (client.start, client.extend, client.get, client.end):
            outcome: object = await replicas.outcome(call(user))
            outcomes.append(outcome)
            if isinstance(outcome, replicas.Refusal) and outcome.code == "UNAVAILABLE" and not outcome.reason:
                return


@pytest.mark.parametrize("again", [False, True])
async def test_a_stop_under_load_loses_no_accepted_call(engines: replicas.Engines, again: bool) -> None:
    """SIGTERM under load, also twice: calls are answered or refused as SHUTTING_DOWN, and it exits 0 in time."""
    async with replicas.process(engines, AFTERHOURS_DRAIN="5s") as (process, client):
        outcomes: list[object] = []
        users = [f"user {n}" for n in range(30)]
        await asyncio.gather(*(client.put_profile(user) for user in users))
        loads = [asyncio.create_task(_load(client, user, outcomes)) for user in users]
        await asyncio.sleep(0.5)
        told = time.monotonic()
        process.signal(signal.SIGTERM)
        if again:
            await asyncio.sleep(0.2)
            process.signal(signal.SIGTERM)
        assert await process.wait() == 0
        assert time.monotonic() - told < 5
        await asyncio.gather(*loads)
    refusals = [each for each in outcomes if isinstance(each, replicas.Refusal)]
    assert len(outcomes) - len(refusals) > 30
    # The last of each load finds the port closed: it was never accepted.
    assert {each.reason for each in refusals} <= {"SHUTTING_DOWN", "NO_ACTIVE_SESSION", ""}
    assert sum(each.reason == "" for each in refusals) <= len(users)
    assert any(each.reason == "SHUTTING_DOWN" for each in refusals)
    assert {each.code for each in refusals} <= {"UNAVAILABLE", "NOT_FOUND", "ALREADY_EXISTS"}


async def test_a_stop_while_starting_is_a_clean_exit(engines: replicas.Engines) -> None:
    """SIGTERM while it still waits for Postgres ends it with exit status 0 and no traceback."""
    unreachable = engines.environment(DATABASE_URL="postgresql://nobody@127.0.0.1:1/nothing")
    process = await replicas.Process(unreachable).start()
    # Wherever it is by then: it imports, or waits for Postgres.
    await asyncio.sleep(0.9)
    await asyncio.sleep(0.9)
    process.signal(signal.SIGTERM)
    assert await process.wait() == 0
    assert not any("Traceback" in line for line in process.lines)
