"""Callers that go away leave nothing behind, and their calls are applied wholly or not at all."""

import asyncio
import contextlib
import random

import grpc
import pytest
import replicas
from redis import asyncio as redis

pytestmark = [pytest.mark.front_door, pytest.mark.alone]

_CALLS = 10_000
_USERS = 200


async def test_cancelled_and_late_callers_leak_nothing(engines: replicas.Engines) -> None:
    """10,000 calls cancelled or past their deadline at random moments leak no connection, task or job."""
    chance = random.Random(3)
    users = [f"user {n}" for n in range(_USERS)]
    async with replicas.replica(engines, AFTERHOURS_RECONCILE_INTERVAL="1s") as (service, client):
        await asyncio.gather(*(client.put_profile(user) for user in users))
        await asyncio.gather(*(client.get(user) for user in users))
        before = len(asyncio.all_tasks())
        room = asyncio.Semaphore(100)

        async def one() -> None:
            async with room:
                user = chance.choice(users)
                make = chance.choice((client.start, client.extend, client.end, client.get))
                with contextlib.suppress(grpc.aio.AioRpcError):
                    if chance.random() < 0.5:
                        await make(user, timeout=chance.uniform(0.0005, 0.06))
                        return
                    call = asyncio.create_task(make(user))
                    await asyncio.wait({call}, timeout=chance.uniform(0, 0.06))
                    call.cancel()
                    await asyncio.gather(call, return_exceptions=True)

        await asyncio.gather(*(one() for _ in range(_CALLS)))

        async def quiet() -> bool:
            return service.database.checked_out == 0 and len(asyncio.all_tasks()) <= before + 2

        await replicas.eventually(quiet, within=10)
        backends = await engines.rows(
            "SELECT FROM pg_stat_activity WHERE datname = current_database() AND state <> 'idle'"
            " AND pid <> pg_backend_pid()"
        )
        assert not backends

        # Whole or not at all: what the rows say is what Get says, and each active session has its one job.
        rows = await engines.rows("SELECT * FROM after_hours_sessions WHERE ended_at IS NULL")
        assert len({row["user_id"] for row in rows}) == len(rows)
        quarters = [(row["expires_at"] - row["started_at"]).total_seconds() / 900 for row in rows]
        assert all(each == int(each) for each in quarters)
        found = await asyncio.gather(*(client.get(user) for user in users))
        assert {each.session.id for each in found if each.active} == {str(row["id"]) for row in rows}

        async def timed() -> bool:
            async with redis.Redis.from_url(engines.redis_url, decode_responses=True) as jobs:
                members = set(await jobs.zrange("afterhours:jobs", 0, -1))
            return members == {f"session:expire:{row['id']}" for row in rows}

        await replicas.eventually(timed, within=5)


async def test_a_deadline_that_passes_while_waiting_is_told(engines: replicas.Engines) -> None:
    """A call is answered DEADLINE_EXCEEDED at its deadline, however long the database makes it wait."""
    async with replicas.replica(engines) as (_, client):
        await client.put_profile("ada")
        refusal = await replicas.refused(client.start("ada", timeout=0.0001))
        assert refusal.code == "DEADLINE_EXCEEDED"
        assert not await engines.rows("SELECT FROM after_hours_sessions WHERE ended_at IS NULL AND false")
