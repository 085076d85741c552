"""Start, end, extend and get, through the front door."""

import datetime
import itertools

import pytest
import replicas
from afterhours.v1 import session_pb2, session_service_pb2
from google.protobuf import duration_pb2

pytestmark = pytest.mark.front_door


async def test_a_started_session_is_active_for_exactly_its_duration(engines: replicas.Engines) -> None:
    """A started session is active, and expires exactly its duration after it started."""
    async with replicas.replica(engines) as (_, client):
        await client.put_profile("ada")
        session = await client.start("ada", 1800)

        assert session.state == session_pb2.SESSION_STATE_ACTIVE
        assert session.user_id == "ada"
        assert session.expire_time.ToDatetime() - session.start_time.ToDatetime() == datetime.timedelta(minutes=30)
        assert session.remaining == duration_pb2.Duration(seconds=1800)
        assert not session.HasField("end_time")
        assert session.end_reason == session_pb2.END_REASON_UNSPECIFIED
        assert session.fuzz_radius_meters == 1000
        found = await client.get("ada")
        assert found.active
        assert found.session.id == session.id
        assert found.session.remaining.ToTimedelta() < datetime.timedelta(minutes=30)


async def test_the_row_has_both_places_and_the_answer_only_the_fuzzed_one(engines: replicas.Engines) -> None:
    """The exact location is stored, and only the fuzzed one is answered."""
    async with replicas.replica(engines) as (_, client):
        await client.put_profile("ada")
        session = await client.start("ada")
        [row] = await engines.rows("SELECT * FROM after_hours_sessions")

        assert (row["latitude"], row["longitude"]) == (replicas.BERLIN.latitude, replicas.BERLIN.longitude)
        shown = session.fuzzed_location
        assert (row["fuzzed_latitude"], row["fuzzed_longitude"]) == (shown.latitude, shown.longitude)
        assert shown != replicas.BERLIN


async def test_an_ended_session_is_over(engines: replicas.Engines) -> None:
    """An ended session says when and why it ended, and is no longer got."""
    async with replicas.replica(engines) as (_, client):
        await client.put_profile("ada")
        started = await client.start("ada")
        ended = await client.end("ada")

        assert ended.id == started.id
        assert ended.state == session_pb2.SESSION_STATE_ENDED
        assert ended.end_reason == session_pb2.END_REASON_USER
        assert started.start_time.ToDatetime() <= ended.end_time.ToDatetime() < ended.expire_time.ToDatetime()
        assert ended.remaining == duration_pb2.Duration()
        assert await client.get("ada") == session_service_pb2.GetSessionResponse(active=False)
        assert (await replicas.refused(client.end("ada"))).reason == "NO_ACTIVE_SESSION"
        assert (await client.start("ada")).id != ended.id


async def test_an_extension_adds_exactly_its_duration(engines: replicas.Engines) -> None:
    """Each extension moves expire_time by exactly its duration, as often as wanted."""
    async with replicas.replica(engines) as (_, client):
        await client.put_profile("ada")
        started = await client.start("ada", 900)
        expected = started.expire_time.ToDatetime()
        for seconds in (900, 1800, 3600):
            extended = await client.extend("ada", seconds)
            expected += datetime.timedelta(seconds=seconds)
            assert extended.expire_time.ToDatetime() == expected
            assert extended.id == started.id
            assert extended.start_time == started.start_time


async def test_the_same_place_is_shown_again(engines: replicas.Engines) -> None:
    """A user who starts again from a place is shown at the same one, also when the place jitters."""
    async with replicas.replica(engines) as (_, client):
        await client.put_profile("ada")
        shown = set()
        for step in range(40):
            # A walk of 33 m north and back, which crosses a cell's edge or not: the last cell is kept.
            place = session_pb2.Location(
                latitude=replicas.BERLIN.latitude + (step % 2) * 0.0003, longitude=replicas.BERLIN.longitude
            )
            session = await client.start("ada", location=place)
            shown.add((session.fuzzed_location.latitude, session.fuzzed_location.longitude))
            await client.end("ada")
        assert len(shown) == 1


async def test_the_last_cell_is_kept_near_its_edge(engines: replicas.Engines) -> None:
    """A user who walks over a cell's edge is shown in the last cell while at most 100 m from it, then in the next."""
    async with replicas.replica(engines) as (_, client):
        await client.put_profile("ada")
        shown = []
        for step in range(120):  # 11 m each, more than a cell is long
            place = session_pb2.Location(latitude=step * 0.0001, longitude=0.0)
            session = await client.start("ada", location=place)
            shown.append((session.fuzzed_location.latitude, session.fuzzed_location.longitude))
            await client.end("ada")
        back = await client.start("ada", location=session_pb2.Location(latitude=0.0, longitude=0.0))
        changes = sum(one != other for one, other in itertools.pairwise(shown))
        assert 1 <= changes <= 3
        assert (back.fuzzed_location.latitude, back.fuzzed_location.longitude) == shown[0]


async def test_deleting_a_profile_ends_the_session(engines: replicas.Engines) -> None:
    """Deleting a profile ends its active session, as PROFILE_REMOVED, and its user needs a new one to start."""
    async with replicas.replica(engines) as (_, client):
        await client.put_profile("ada")
        await client.start("ada")
        await client.delete_profile("ada")

        assert not (await client.get("ada")).active
        [row] = await engines.rows("SELECT end_reason FROM after_hours_sessions")
        assert row["end_reason"] == "PROFILE_REMOVED"
        assert (await replicas.refused(client.start("ada"))).reason == "PROFILE_REQUIRED"
