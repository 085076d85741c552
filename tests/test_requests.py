"""A request_id makes a retry safe: the first answer again, byte for byte, wherever and whenever."""

import asyncio
import datetime
import typing

import pytest
import replicas
from afterhours.v1 import session_service_pb2
from google.protobuf import duration_pb2

pytestmark = pytest.mark.store

Call = typing.Callable[[replicas.Client, str], typing.Awaitable[typing.Any]]


async def test_a_replay_gives_the_first_answer(engines: replicas.Engines) -> None:
    """Start, extend and end give their first answers again, byte for byte, whatever happened since."""
    async with replicas.replica(engines) as (_, client):
        await client.put_profile("ada")
        ids = {name: replicas.request_id() for name in ("start", "extend", "end")}
        started = await client.start("ada", request_id=ids["start"])
        extended = await client.extend("ada", request_id=ids["extend"])
        ended = await client.end("ada", request_id=ids["end"])
        await client.delete_profile("ada")

        def raw(message: typing.Any) -> bytes:
            return bytes(message.SerializeToString())

        assert raw(await client.start("ada", request_id=ids["start"])) == raw(started)
        assert raw(await client.extend("ada", request_id=ids["extend"])) == raw(extended)
        assert raw(await client.end("ada", request_id=ids["end"])) == raw(ended)
        assert len(await engines.rows("SELECT FROM after_hours_sessions")) == 1


async def test_an_expired_session_is_replayed_as_it_was(engines: replicas.Engines) -> None:
    """The answer of a start is replayed as active, although the session has expired since."""
    async with replicas.replica(engines) as (service, client):
        await client.put_profile("ada")
        first = replicas.request_id()
        started = await client.start("ada", request_id=first)
        service.database.clock_offset = datetime.timedelta(hours=1)
        assert await client.start("ada", request_id=first) == started


async def test_another_body_is_refused(engines: replicas.Engines) -> None:
    """The same request_id with another body is REQUEST_ID_REUSED and applies nothing."""
    async with replicas.replica(engines) as (_, client):
        await client.put_profile("ada")
        await client.put_profile("bob")
        first = replicas.request_id()
        await client.start("ada", request_id=first)
        for call in (client.start("ada", 1800, request_id=first), client.start("bob", request_id=first)):
            refusal = await replicas.refused(call)
            assert (refusal.code, refusal.reason) == ("INVALID_ARGUMENT", "REQUEST_ID_REUSED")
        assert not (await client.get("bob")).active


async def test_an_id_is_of_one_method(engines: replicas.Engines) -> None:
    """The same request_id for another method is another call."""
    async with replicas.replica(engines) as (_, client):
        await client.put_profile("ada")
        first = replicas.request_id()
        await client.start("ada", request_id=first)
        await client.extend("ada", request_id=first)
        ended = await client.end("ada", request_id=first)
        assert ended.HasField("end_time")


async def test_a_refused_call_is_not_kept(engines: replicas.Engines) -> None:
    """A call that was refused may be sent again under its id, and is then applied."""
    async with replicas.replica(engines) as (_, client):
        first = replicas.request_id()
        assert (await replicas.refused(client.start("ada", request_id=first))).reason == "PROFILE_REQUIRED"
        await client.put_profile("ada")
        assert (await client.start("ada", request_id=first)).user_id == "ada"


@pytest.mark.parametrize("method", ["start", "extend", "end"])
async def test_duplicates_in_flight_get_one_answer(engines: replicas.Engines, method: str) -> None:
    """Duplicates that arrive while the first is in flight, on two replicas, get its answer; it is applied once."""
    async with replicas.replica(engines) as (_, one), replicas.replica(engines) as (_, two):
        for round_ in range(5):
            user = f"user {round_}"
            await one.put_profile(user)
            started = None if method == "start" else await one.start(user)
            first = replicas.request_id()
            answers = await asyncio.gather(
                *(getattr((one, two)[n % 2], method)(user, request_id=first) for n in range(16))
            )
            assert len({each.SerializeToString() for each in answers}) == 1
            if method == "extend" and started:
                [row] = await engines.rows("SELECT * FROM after_hours_sessions WHERE user_id = $1", user)
                assert row["expires_at"] - row["started_at"] == datetime.timedelta(minutes=30)


async def test_an_id_in_flight_for_two_users_is_applied_once(engines: replicas.Engines) -> None:
    """One request_id sent at once for many users is applied for one of them, and REQUEST_ID_REUSED for the others."""
    async with replicas.replica(engines) as (_, one), replicas.replica(engines) as (_, two):
        users = [f"user {n}" for n in range(16)]
        await asyncio.gather(*(one.put_profile(user) for user in users))
        first = replicas.request_id()
        results = await asyncio.gather(
            *(replicas.outcome((one, two)[n % 2].start(user, request_id=first)) for n, user in enumerate(users))
        )
        reasons = [each.reason for each in results if isinstance(each, replicas.Refusal)]
        assert reasons == ["REQUEST_ID_REUSED"] * 15
        assert len(await engines.rows("SELECT FROM after_hours_sessions")) == 1


async def test_a_replay_after_a_restart_and_on_another_replica(engines: replicas.Engines) -> None:
    """An answer is kept across kill -9, and another replica gives it too."""
    first = replicas.request_id()
    async with replicas.process(engines) as (process, client):
        await client.put_profile("ada")
        started = await client.start("ada", request_id=first)
        await process.stop()
    async with replicas.replica(engines) as (_, one), replicas.replica(engines) as (_, two):
        assert await one.start("ada", request_id=first) == started
        assert await two.start("ada", request_id=first) == started


async def test_an_answer_is_kept_for_a_day(engines: replicas.Engines) -> None:
    """An answer is forgotten by the sweep after 24 hours and not before."""
    async with replicas.replica(engines, AFTERHOURS_RECONCILE_INTERVAL="1s") as (service, client):
        await client.put_profile("ada")
        first = replicas.request_id()
        await client.start("ada", request_id=first)

        async def kept() -> int:
            return len(await engines.rows("SELECT FROM after_hours_requests"))

        swept = len(await engines.rows("SELECT FROM after_hours_sessions WHERE ended_at IS NOT NULL"))
        assert (await kept(), swept) == (1, 0)
        service.database.clock_offset = datetime.timedelta(hours=23, minutes=59)

        async def expired() -> bool:
            return bool(await engines.rows("SELECT FROM after_hours_sessions WHERE ended_at IS NOT NULL"))

        await replicas.eventually(expired, within=5)
        assert await kept() == 1
        service.database.clock_offset = datetime.timedelta(hours=24, minutes=1)

        async def forgotten() -> bool:
            return await kept() == 0

        await replicas.eventually(forgotten, within=5)


async def test_an_answer_outlives_the_shortest_history(engines: replicas.Engines) -> None:
    """With the shortest retention of sessions, an answer is still there for as long as answers are kept."""
    settings = {"AFTERHOURS_HISTORY_RETENTION": "24h", "AFTERHOURS_RECONCILE_INTERVAL": "1s"}
    async with replicas.replica(engines, **settings) as (service, client):
        for user_id in ("ada", "bob"):
            await client.put_profile(user_id)
            first = replicas.request_id()
            started = await client.start(user_id, request_id=first)
            await client.end(user_id)
        await engines.rows(
            "UPDATE after_hours_sessions SET started_at = started_at - interval '1 h',"
            " ended_at = started_at - interval '1 h' WHERE user_id = 'ada'"
        )
        service.database.clock_offset = datetime.timedelta(hours=23, minutes=59)

        async def removed() -> bool:
            return not await engines.rows("SELECT FROM after_hours_sessions WHERE user_id = 'ada'")

        await replicas.eventually(removed, within=5)
        assert await client.start("bob", request_id=first) == started


async def test_unknown_fields_are_part_of_the_body(engines: replicas.Engines) -> None:
    """A field that this release does not know makes another body: a newer client's retry is the same call."""
    async with replicas.replica(engines) as (_, client):
        await client.put_profile("ada")
        request = session_service_pb2.StartSessionRequest(
            user_id="ada",
            duration=duration_pb2.Duration(seconds=900),
            location=replicas.BERLIN,
            request_id=replicas.request_id(),
        )
        newer = session_service_pb2.StartSessionRequest.FromString(request.SerializeToString() + b"\xf8\x07\x01")
        first = await client.sessions.StartSession(newer)
        assert await client.sessions.StartSession(newer) == first
        assert (await replicas.refused(client.sessions.StartSession(request))).reason == "REQUEST_ID_REUSED"
