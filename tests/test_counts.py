"""`afterhours_sessions_expired_total`: every session that ended as EXPIRED, once, whoever closed it."""

import datetime
import uuid

import pytest
import redis.asyncio
import replicas
from google.protobuf import timestamp_pb2

from afterhours_grpc import app, metrics
from afterhours_grpc.sessions import session
from afterhours_grpc.store import privacy, store

pytestmark = pytest.mark.store

# No timer and no sweep closes what a call is to close.
CALLS_ALONE = {"REDIS_URL": "redis://127.0.0.1:1", "AFTERHOURS_RECONCILE_INTERVAL": "1h"}
LATER = datetime.timedelta(minutes=16)


class Count:
    """How many sessions this process has closed as EXPIRED since it was last asked."""

    def __init__(self) -> None:
        self._before = self._total()

    def _total(self) -> int:
        return int(metrics.REGISTRY.get_sample_value("afterhours_sessions_expired_total") or 0)

    def more(self) -> int:
        """Return how many more there are."""
        before, self._before = self._before, self._total()
        return self._before - before


async def overdue(service: app.Service, client: replicas.Client, *user_ids: str) -> None:
    """Start sessions that are overdue at once, and that nothing has closed."""
    for user_id in user_ids:
        await client.put_profile(user_id, location_consent=True)
        await client.start(user_id)
    service.database.clock_offset += LATER


async def test_calls_that_close_an_overdue_session(engines: replicas.Engines) -> None:
    """A start, an end, a profile's change or deletion, and an erasure count the session that they close, if any."""
    async with replicas.replica(engines, **CALLS_ALONE, AFTERHOURS_GATES="consent") as (service, client):
        users = ["start", "refused start", "end", "put", "delete", "erase", "ended"]
        count = Count()
        await overdue(service, client, *users[:-1])
        await client.put_profile("ended", location_consent=True)
        await client.start("ended")
        assert count.more() == 0

        await client.start("start")
        assert count.more() == 1
        await engines.rows("UPDATE after_hours_profiles SET location_consent = false WHERE user_id = 'refused start'")
        assert (await replicas.refused(client.start("refused start"))).reason == "CONSENT_REQUIRED"
        assert count.more() == 1
        assert (await replicas.refused(client.end("end"))).reason == "NO_ACTIVE_SESSION"
        assert count.more() == 1
        await client.put_profile("put", premium_expire_time=timestamp_pb2.Timestamp(seconds=1))
        assert count.more() == 1
        await client.delete_profile("delete")
        assert count.more() == 1
        await privacy.Privacy(service.database).erase_user(session.UserId("erase"), "ticket 1")
        assert count.more() == 1

        # What ends for another reason, or has ended, is not counted.
        await client.end("ended")
        for user_id in users:
            await replicas.outcome(client.end(user_id))
            await replicas.outcome(client.delete_profile(user_id))
        assert count.more() == 0
        expired = await engines.rows("SELECT FROM after_hours_sessions WHERE end_reason = 'EXPIRED'")
        assert len(expired) == 5  # and the one that was erased


async def test_timers_and_sweeps(engines: replicas.Engines) -> None:
    """A timer counts what it closed, not what had ended when it fired; a sweep too, the one before SERVING included."""
    count = Count()
    async with replicas.replica(engines, AFTERHOURS_RECONCILE_INTERVAL="1h") as (_, client):
        for user_id in ("ada", "bob"):
            await client.put_profile(user_id)
        ended = await client.start("ada")
        await client.end("ada")
        async with redis.asyncio.Redis.from_url(engines.redis_url) as connection:
            await connection.zadd("afterhours:jobs", {f"session:expire:{ended.id}": 1.0})
        await client.start("bob", 2)

        async def fired() -> bool:
            async with redis.asyncio.Redis.from_url(engines.redis_url) as connection:
                return not await connection.zcard("afterhours:jobs")

        await replicas.eventually(fired, within=5)
        assert count.more() == 1
    async with replicas.replica(engines, **CALLS_ALONE) as (service, client):
        await overdue(service, client, "ada", "bob")
        assert count.more() == 0
    await engines.rows(
        "UPDATE after_hours_sessions SET started_at = started_at - interval '1 h', expires_at = now()"
        " WHERE ended_at IS NULL"
    )
    async with replicas.replica(engines, **CALLS_ALONE):
        assert count.more() == 2
    assert count.more() == 0


async def test_a_timer_that_fires_twice_at_once(engines: replicas.Engines) -> None:
    """Two claims of one session in a batch are one end."""
    async with replicas.replica(engines, **CALLS_ALONE) as (service, client):
        await overdue(service, client, "ada")
        [row] = await engines.rows("SELECT id FROM after_hours_sessions")
        count, id = Count(), session.SessionId(uuid.UUID(str(row["id"])))
        assert [each.over for each in await store.Store(service.database).expire([id, id])] == [True]
        assert count.more() == 1


async def test_what_was_rolled_back_is_not_counted(engines: replicas.Engines) -> None:
    """A deletion whose commit fails has ended nothing."""
    async with replicas.replica(engines, **CALLS_ALONE) as (service, client):
        await overdue(service, client, "ada")
        await engines.rows(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'no'; END $$"
        )
        await engines.rows(
            "CREATE CONSTRAINT TRIGGER refuse AFTER UPDATE ON after_hours_sessions DEFERRABLE INITIALLY DEFERRED"
            " FOR EACH ROW EXECUTE FUNCTION refuse()"
        )
        count = Count()
        assert (await replicas.refused(client.delete_profile("ada"))).reason == "STORE_UNAVAILABLE"
        assert count.more() == 0
        await engines.rows("DROP TRIGGER refuse ON after_hours_sessions")
        await client.delete_profile("ada")
        assert count.more() == 1
