"""Lists: of many users, of one user's history, of all that are active, and of those near a place."""

import asyncio
import base64
import datetime
import itertools
import math
import random
import typing

import keys
import pytest
import replicas
from afterhours.v1 import session_pb2, session_service_pb2
from google.protobuf import duration_pb2

pytestmark = pytest.mark.store

JWT = {"AFTERHOURS_AUTH": "jwt", "AFTERHOURS_JWT_SECRET": keys.SECRET}
EARTH = 6371008.8


def length(**parts: float) -> duration_pb2.Duration:
    """Give a Duration."""
    found = duration_pb2.Duration()
    found.FromTimedelta(datetime.timedelta(**parts))
    return found


async def batch(client: replicas.Client, user_ids: list[str], **fields: typing.Any) -> list[str]:
    """Call BatchGetSessions, and give whose sessions came."""
    request = session_service_pb2.BatchGetSessionsRequest(user_ids=user_ids, **fields)
    return [each.user_id for each in (await client.sessions.BatchGetSessions(request)).sessions]


async def active(client: replicas.Client, **fields: typing.Any) -> session_service_pb2.ListActiveSessionsResponse:
    """Call ListActiveSessions."""
    return await client.sessions.ListActiveSessions(session_service_pb2.ListActiveSessionsRequest(**fields))


async def history(client: replicas.Client, **fields: typing.Any) -> session_service_pb2.ListSessionsResponse:
    """Call ListSessions."""
    return await client.sessions.ListSessions(session_service_pb2.ListSessionsRequest(**fields))


async def pages(
    client: replicas.Client, call: typing.Callable[..., typing.Any], **fields: typing.Any
) -> list[session_pb2.Session]:
    """Read all pages."""
    found: list[session_pb2.Session] = []
    token = ""
    while True:
        page = await call(client, page_token=token, **fields)
        found += page.sessions
        token = page.next_page_token
        if not token:
            return found


def fields_of(told: replicas.Refusal) -> list[str]:
    """Give the fields that a refusal names."""
    assert (told.code, told.reason) == ("INVALID_ARGUMENT", "INVALID_REQUEST"), told
    return [each.field for each in told.details["BadRequest"].field_violations]


async def test_batch_get(engines: replicas.Engines) -> None:
    """Active sessions come in request order, absentees are left out, and a repeated user is answered once."""
    async with replicas.replica(engines) as (service, client):
        for user_id, seconds in (("ada", 900), ("bob", 3600), ("eve", 1800), ("joe", 900)):
            await client.put_profile(user_id)
            await client.start(user_id, seconds)
        await client.end("joe")
        asked = ["eve", "nobody", "ada", "joe", "bob", "ada", "eve"]
        assert await batch(client, asked) == ["eve", "ada", "bob"]
        assert await batch(client, asked, min_remaining=length(minutes=20)) == ["eve", "bob"]
        assert await batch(client, asked, min_remaining=length(hours=1)) == []
        assert await batch(client, asked, min_remaining=duration_pb2.Duration(seconds=315_576_000_000)) == []
        assert await batch(client, []) == []
        assert await batch(client, [f"user {number}" for number in range(999)] + ["ada"]) == ["ada"]
        service.database.clock_offset = datetime.timedelta(minutes=20)
        assert await batch(client, asked) == ["eve", "bob"]


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"user_ids": 1001 * ["ada"]}, ["user_ids"]),
        ({"user_ids": ["ada", "", "a\0b"]}, ["user_ids[1]", "user_ids[2]"]),
        ({"user_ids": ["ada"], "min_remaining": duration_pb2.Duration(seconds=-1)}, ["min_remaining"]),
        ({"user_ids": ["ada"], "min_remaining": duration_pb2.Duration(nanos=10**9)}, ["min_remaining"]),
    ],
    ids=["too many", "bad ids", "negative", "no Duration"],
)
async def test_a_bad_batch(engines: replicas.Engines, fields: dict[str, typing.Any], wrong: list[str]) -> None:
    """What breaks a rule is named, by its place in the list."""
    async with replicas.replica(engines) as (_, client):
        request = session_service_pb2.BatchGetSessionsRequest(**fields)
        assert fields_of(await replicas.refused(client.sessions.BatchGetSessions(request))) == wrong


async def test_history(engines: replicas.Engines) -> None:
    """A user's sessions come newest first, active and ended, in pages without repeats or gaps."""
    async with replicas.replica(engines) as (service, client):
        for user_id in ("ada", "bob"):
            await client.put_profile(user_id)
        started = []
        for _ in range(7):
            started.append((await client.start("ada")).id)
            await client.end("ada")
        await client.start("ada", 2)
        service.database.clock_offset = datetime.timedelta(seconds=5)
        started.append((await client.start("ada")).id)
        await client.start("bob")
        everything = (await history(client, user_id="ada")).sessions
        assert [each.id for each in everything][:1] == started[-1:]
        assert len(everything) == 9
        reasons = [session_pb2.EndReason.Name(each.end_reason) for each in everything]
        assert reasons == ["END_REASON_UNSPECIFIED", "END_REASON_EXPIRED"] + 7 * ["END_REASON_USER"]
        for size in (1, 2, 3, 9, 10, 1000, 2**31 - 1):
            read = await pages(client, history, user_id="ada", page_size=size)
            assert [each.id for each in read] == [each.id for each in everything], size
        assert (await history(client, user_id="ada", page_size=9)).next_page_token == ""
        assert list((await history(client, user_id="nobody")).sessions) == []


async def test_page_sizes(engines: replicas.Engines) -> None:
    """0 means 50, more than 1,000 means 1,000, and less than 0 is refused."""
    async with replicas.replica(engines) as (_, client):
        await _fill(engines, 1200)
        assert len((await active(client)).sessions) == 50
        assert len((await active(client, page_size=5000)).sessions) == 1000
        assert len((await active(client, page_size=1000)).sessions) == 1000
        assert fields_of(await replicas.refused(active(client, page_size=-1))) == ["page_size"]
        assert fields_of(await replicas.refused(history(client, user_id="ada", page_size=-1))) == ["page_size"]


async def _fill(engines: replicas.Engines, count: int) -> None:
    """Give users sessions, all of one instant, so that only their ids put them in order."""
    await engines.rows(
        "INSERT INTO after_hours_sessions (user_id, started_at, expires_at, latitude, longitude, fuzzed_latitude,"
        " fuzzed_longitude, fuzz_radius_meters, fuzz_key_version, fuzz_cell)"
        " SELECT 'user ' || n, now(), now() + interval '1 h', 0, 0, 0, 0, 1000, 1, 1"
        " FROM generate_series(1, $1::int) AS n",
        count,
    )


async def test_active_throughout_the_paging_is_seen_once(engines: replicas.Engines) -> None:
    """While others start and end between pages, who is active all the time is in exactly one of them."""
    async with replicas.replica(engines) as (_, client):
        await _fill(engines, 300)
        chance = random.Random(4)
        seen: list[str] = []
        token, ended = "", set()
        for turn in range(100):
            page = await active(client, page_size=7, page_token=token)
            seen += [each.user_id for each in page.sessions]
            token = page.next_page_token
            if not token:
                break
            for _ in range(3):
                user_id = f"user {chance.randint(1, 300)}"
                await replicas.outcome(client.end(user_id))
                ended.add(user_id)
            await client.put_profile(f"new {turn}")
            await client.start(f"new {turn}")
        assert len(seen) == len(set(seen))
        assert {f"user {number}" for number in range(1, 301)} - ended <= set(seen)


async def test_active_with_a_least_remaining_time(engines: replicas.Engines) -> None:
    """Overdue sessions are left out, and those that run for less than asked."""
    async with replicas.replica(engines, AFTERHOURS_RECONCILE_INTERVAL="1h") as (service, client):
        for user_id, seconds in (("ada", 2), ("bob", 900), ("eve", 3600)):
            await client.put_profile(user_id)
            await client.start(user_id, seconds)

        async def listed(**fields: typing.Any) -> list[str]:
            return [each.user_id for each in (await active(client, **fields)).sessions]

        assert await listed() == ["ada", "bob", "eve"]
        assert await listed(min_remaining=length(minutes=14)) == ["bob", "eve"]
        service.database.clock_offset = datetime.timedelta(seconds=3)
        assert await listed() == ["bob", "eve"]
        assert await listed(min_remaining=length(minutes=15)) == ["eve"]
        # Extended again and again, a session may run for longer than anybody lives.
        await engines.rows("UPDATE after_hours_sessions SET expires_at = started_at + interval '150 years'")
        assert await listed(min_remaining=length(days=149 * 365)) == ["ada", "bob", "eve"]
        assert await listed(min_remaining=length(days=151 * 366)) == []
        assert await listed(min_remaining=duration_pb2.Duration(seconds=315_576_000_000, nanos=999_999_999)) == []


async def test_page_tokens(engines: replicas.Engines) -> None:
    """A token is good for its caller, its method and its query, on any server; any other is refused by name."""
    async with (
        replicas.replica(engines, **JWT) as (service, _),
        replicas.replica(engines, **JWT) as (other_service, _),
        replicas.Client(service.address, keys.token("root", keys.EVERYTHING)) as root,
        replicas.Client(other_service.address, keys.token("root", keys.EVERYTHING)) as elsewhere,
        replicas.Client(service.address, keys.token("other", keys.EVERYTHING)) as other,
    ):
        await _fill(engines, 20)
        first = await active(root, page_size=5)
        token = first.next_page_token
        second = await active(root, page_size=5, page_token=token)
        again = await active(elsewhere, page_size=5, page_token=token)
        assert [each.id for each in again.sessions] == [each.id for each in second.sessions]
        assert again.next_page_token == second.next_page_token
        assert len((await active(root, page_size=9, page_token=token)).sessions) == 9
        raw = base64.urlsafe_b64decode(token + "==")
        damaged = base64.urlsafe_b64encode(bytes([raw[0] ^ 1]) + raw[1:]).rstrip(b"=").decode()
        near = {"near": session_pb2.Location(), "radius_meters": 1000.0}
        for call in (
            active(other, page_token=token),
            active(root, page_token=token, min_remaining=length(seconds=1)),
            active(root, page_token=token, **near),
            history(root, user_id="user 1", page_token=token),
            *(active(root, page_token=each) for each in (damaged, token[:-1], token + "=", "x", "é", 5000 * "A")),
        ):
            assert fields_of(await replicas.refused(call)) == ["page_token"]


async def test_who_may_list(engines: replicas.Engines) -> None:
    """Without `sessions:any` there is the own history, and of the others nothing but FORBIDDEN."""
    async with (
        replicas.replica(engines, **JWT) as (service, _),
        replicas.Client(service.address, keys.token("root", keys.EVERYTHING)) as root,
        replicas.Client(service.address, keys.token("ada", "sessions:watch sessions:exact profiles:write")) as ada,
    ):
        for user_id in ("ada", "bob"):
            await root.put_profile(user_id)
            await root.start(user_id)
        assert [each.user_id for each in (await history(ada)).sessions] == ["ada"]
        assert [each.user_id for each in (await history(ada, user_id="ada")).sessions] == ["ada"]
        assert fields_of(await replicas.refused(history(root))) == ["user_id"]
        request = session_service_pb2.BatchGetSessionsRequest(user_ids=["ada"])
        for call in (active(ada), history(ada, user_id="bob"), ada.sessions.BatchGetSessions(request)):
            told = await replicas.refused(call)
            assert (told.code, told.reason) == ("PERMISSION_DENIED", "FORBIDDEN")


def meters(one: tuple[float, float], other: tuple[float, float]) -> float:
    """Give a great-circle distance, by another formula than the service's."""
    (a, b), (c, d) = (tuple(map(math.radians, each)) for each in (one, other))
    across = math.hypot(
        math.cos(c) * math.sin(d - b),
        math.cos(a) * math.sin(c) - math.sin(a) * math.cos(c) * math.cos(d - b),
    )
    along = math.sin(a) * math.sin(c) + math.cos(a) * math.cos(c) * math.cos(d - b)
    return EARTH * math.atan2(across, along)


async def _scatter(engines: replicas.Engines, places: list[tuple[float, float]]) -> None:
    await engines.rows(
        "INSERT INTO after_hours_sessions (user_id, started_at, expires_at, latitude, longitude, fuzzed_latitude,"
        " fuzzed_longitude, fuzz_radius_meters, fuzz_key_version, fuzz_cell)"
        " SELECT 'user ' || n, now(), now() + interval '1 h', 77, 77, p.latitude, p.longitude, 1000, 1, 1"
        " FROM unnest($1::float8[], $2::float8[]) WITH ORDINALITY AS p(latitude, longitude, n)",
        [latitude for latitude, _ in places],
        [longitude for _, longitude in places],
    )


CENTRES = {
    "a city": (52.5, 13.4),
    "zero": (0.0, 0.0),
    "the antimeridian": (10.0, 179.999),
    "west of the antimeridian": (-45.0, -180.0),
    "the north pole": (90.0, 50.0),
    "near the south pole": (-89.6, 120.0),
    "high in the north": (84.0, 179.0),
}


@pytest.mark.parametrize("name", CENTRES)
async def test_near(engines: replicas.Engines, name: str) -> None:
    """Within the radius, nearest first and without repeats or gaps across pages, at the poles and the antimeridian."""
    latitude, longitude = CENTRES[name]
    chance = random.Random(6)
    places = []
    for _ in range(400):
        # Around the centre, by distance and bearing.
        angle, bearing = 250_000 / EARTH * chance.random() ** 2, chance.uniform(0, math.tau)
        north = math.sin(math.radians(latitude)) * math.cos(angle) + math.cos(math.radians(latitude)) * math.sin(
            angle
        ) * math.cos(bearing)
        east = math.atan2(
            math.sin(bearing) * math.sin(angle) * math.cos(math.radians(latitude)),
            math.cos(angle) - math.sin(math.radians(latitude)) * north,
        )
        places.append(
            (math.degrees(math.asin(max(-1, min(1, north)))), math.remainder(longitude + math.degrees(east), 360))
        )
    places += 10 * [places[0]]  # ties
    await _scatter(engines, places)
    near = session_pb2.Location(latitude=latitude, longitude=longitude)
    async with replicas.replica(engines) as (_, client):
        for radius, size in ((1.0, 50), (3_000.0, 7), (50_000.0, 50), (200_000.0, 1000), (200_000.0, 33)):
            found = await pages(client, active, near=near, radius_meters=radius, page_size=size)
            shown = [(each.fuzzed_location.latitude, each.fuzzed_location.longitude) for each in found]
            distances = [meters((latitude, longitude), each) for each in shown]
            assert all(each <= radius + 0.01 for each in distances)
            assert all(later - sooner > -0.01 for sooner, later in itertools.pairwise(distances))
            assert len({each.id for each in found}) == len(found)
            within = sum(meters((latitude, longitude), each) <= radius for each in places)
            assert abs(len(found) - within) <= (0 if name != "the north pole" else 1), (radius, size)


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"near": session_pb2.Location(), "radius_meters": 0.5}, ["radius_meters"]),
        ({"near": session_pb2.Location(), "radius_meters": 200_001.0}, ["radius_meters"]),
        ({"near": session_pb2.Location(), "radius_meters": math.nan}, ["radius_meters"]),
        ({"near": session_pb2.Location()}, ["radius_meters"]),
        ({"radius_meters": 5.0}, ["radius_meters"]),
        (
            {"near": session_pb2.Location(latitude=91, longitude=math.nan), "radius_meters": 5.0},
            ["near.latitude", "near.longitude"],
        ),
    ],
)
async def test_a_bad_place(engines: replicas.Engines, fields: dict[str, typing.Any], wrong: list[str]) -> None:
    """A radius beyond 1 m to 200 km, or without a place, and a place that is none, are named."""
    async with replicas.replica(engines) as (_, client):
        assert fields_of(await replicas.refused(active(client, **fields))) == wrong


async def test_trilateration_stays_in_the_cell(engines: replicas.Engines) -> None:
    """Whoever measures a user from all around, to the metre, finds the fuzzed place and nothing of the exact one."""
    async with replicas.replica(engines) as (_, client):
        await client.put_profile("ada")
        started = await client.start("ada")
        await client.end("ada")
        # A step to the side, within the cell or to its edge.
        aside = session_pb2.Location(latitude=replicas.BERLIN.latitude + 0.0003, longitude=replicas.BERLIN.longitude)
        shown = started.fuzzed_location

        async def least_radius(around: session_pb2.Location) -> float:
            low, high = 1.0, 200_000.0
            while high - low > 0.5:
                middle = (low + high) / 2
                found = await active(client, near=around, radius_meters=middle)
                low, high = (low, middle) if found.sessions else (middle, high)
            return high

        around = [
            session_pb2.Location(latitude=shown.latitude + north, longitude=shown.longitude + east)
            for north, east in ((0.05, 0.0), (-0.05, 0.01), (0.0, 0.08))
        ]
        measured = []
        for place in (replicas.BERLIN, aside):
            await client.start("ada", location=place)
            measured.append(await asyncio.gather(*(least_radius(each) for each in around)))
            await client.end("ada")
        assert measured[0] == measured[1]
        for point, radius in zip(around, measured[0], strict=True):
            to_shown = meters((point.latitude, point.longitude), (shown.latitude, shown.longitude))
            assert abs(radius - to_shown) < 1
