"""What a killed process leaves behind is put right by the next one, before it serves."""

import asyncio

import pytest
import replicas

pytestmark = pytest.mark.timed


async def test_what_expired_meanwhile_is_closed_before_serving(engines: replicas.Engines) -> None:
    """After kill -9 and a restart beyond its end a session is closed before health says SERVING."""
    async with replicas.process(engines) as (process, client):
        await client.put_profile("ada")
        await client.start("ada", 2)
        await process.stop()
    await asyncio.sleep(0.9)
    await asyncio.sleep(0.9)
    await asyncio.sleep(0.4)
    rows = await engines.rows("SELECT FROM after_hours_sessions WHERE ended_at IS NULL")
    assert len(rows) == 1
    async with replicas.process(engines) as (_, client):
        assert await client.health() == "SERVING"
        [row] = await engines.rows("SELECT * FROM after_hours_sessions")
        assert row["ended_at"] == row["expires_at"]
        assert row["end_reason"] == "EXPIRED"


async def test_what_has_not_expired_ends_on_time(engines: replicas.Engines) -> None:
    """After kill -9 and a restart before its end a session ends on time, by its timer."""
    async with replicas.process(engines) as (process, client):
        await client.put_profile("ada")
        await client.put_profile("bob")
        await client.start("ada", 900)
        await process.stop()
    # The restart takes about a second, so the session's end is moved to 6 s from now, past the service.
    await engines.rows(
        "UPDATE after_hours_sessions SET started_at = now() - interval '1 s', expires_at = now() + interval '6 s'"
    )
    async with replicas.process(engines, AFTERHOURS_RECONCILE_INTERVAL="1h") as (_, client):
        assert (await client.get("ada")).active

        async def closed_on_time() -> bool:
            rows = await engines.rows("SELECT ended_at, expires_at, clock_timestamp() AS at FROM after_hours_sessions")
            overdue = (rows[0]["at"] - rows[0]["expires_at"]).total_seconds()
            assert overdue < 1.1
            return bool(rows[0]["ended_at"] == rows[0]["expires_at"])

        await replicas.eventually(closed_on_time, within=9)
