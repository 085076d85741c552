"""Where a user was, exactly: who may know, who is recorded, for how long, and that nobody else finds out."""

import asyncio
import collections.abc
import contextlib
import math
import pathlib
import random
import statistics
import typing
import urllib.request

import asyncpg
import keys
import pytest
import redis.asyncio
import replicas
from afterhours.v1 import session_pb2, session_service_pb2
from geographiclib import geodesic

from afterhours_grpc.embedded import postgres
from afterhours_grpc.sessions import location
from afterhours_grpc.store import schema

JWT = {"AFTERHOURS_AUTH": "jwt", "AFTERHOURS_JWT_SECRET": keys.SECRET}
READS = "SELECT caller, session_id::text, purpose, disclosed FROM after_hours_exact_reads ORDER BY id"
# Found in no other number: digits of it are looked for in all that is written.
MARKER = session_pb2.Location(latitude=43.2191817, longitude=-117.8918273)


async def recorded(engines: replicas.Engines) -> list[tuple[object, ...]]:
    """Read who asked for exact locations."""
    return [tuple(row) for row in await engines.rows(READS)]


async def test_an_exact_location_is_told_and_recorded(engines: replicas.Engines) -> None:
    """With the scope and a purpose the place is told as it was sent, active or ended; each call leaves its record."""
    async with (
        replicas.replica(engines, **JWT) as (service, _),
        replicas.Client(service.address, keys.token("root", keys.EVERYTHING)) as root,
        replicas.Client(service.address, keys.token("officer", "sessions:exact")) as officer,
        replicas.Client(service.address, keys.token("ada")) as ada,
    ):
        await root.put_profile("ada")
        started = await root.start("ada", location=MARKER)
        assert await officer.exact_location(started.id, "case 1") == MARKER
        await root.end("ada")
        assert await officer.exact_location(started.id.upper(), "case 2") == MARKER
        nobody = replicas.request_id()
        told = await replicas.refused(officer.exact_location(nobody, "case 3"))
        assert (told.code, told.reason) == ("NOT_FOUND", "SESSION_NOT_FOUND")
        # Not even of one's own session, without the scope.
        assert (await replicas.refused(ada.exact_location(started.id))).reason == "FORBIDDEN"
        expected = [
            ("officer", started.id, "case 1", True),
            ("officer", started.id, "case 2", True),
            ("officer", nobody, "case 3", False),
        ]
        assert await recorded(engines) == expected


@pytest.mark.parametrize(
    ("session_id", "purpose", "field"),
    [
        ("", "case", "session_id"),
        ("ada", "case", "session_id"),
        ("00000000-0000-4000-8000-000000000000", "", "purpose"),
        ("00000000-0000-4000-8000-000000000000", 256 * "x", "purpose"),
        ("00000000-0000-4000-8000-000000000000", "a\0b", "purpose"),
    ],
)
async def test_no_reading_without_a_purpose(
    engines: replicas.Engines, session_id: str, purpose: str, field: str
) -> None:
    """A session's id and a purpose of 1 to 255 code points are required, and what is refused reads nothing."""
    async with replicas.replica(engines) as (_, client):
        told = await replicas.refused(client.exact_location(session_id, purpose))
        assert [each.field for each in told.details["BadRequest"].field_violations] == [field]
        assert await recorded(engines) == []


@pytest.mark.store
async def test_no_record_no_reading(engines: replicas.Engines) -> None:
    """Where the record cannot be written, nothing is told."""
    async with replicas.replica(engines) as (_, client):
        await client.put_profile("ada")
        started = await client.start("ada", location=MARKER)
        await engines.rows("ALTER TABLE after_hours_exact_reads ADD CONSTRAINT broken CHECK (false)")
        told = await replicas.refused(client.exact_location(started.id))
        assert told.reason == "INTERNAL"


@pytest.mark.store
@pytest.mark.parametrize("table", ["after_hours_exact_reads", "after_hours_data_requests"])
@pytest.mark.parametrize("statement", ["DELETE FROM {}", "UPDATE {} SET id = DEFAULT", "TRUNCATE {}"])
async def test_records_are_append_only(engines: replicas.Engines, table: str, statement: str) -> None:
    """Whoever holds the service's own password changes no record and removes none."""
    with pytest.raises(asyncpg.InsufficientPrivilegeError, match="append-only"):
        await engines.rows(statement.format(table))


@pytest.mark.store
async def test_exact_locations_are_erased_after_their_retention(engines: replicas.Engines) -> None:
    """The sweep erases them from the retention after the end on, in batches, and leaves active ones and the fuzzed."""
    settings = {"AFTERHOURS_EXACT_LOCATION_RETENTION": "2d", "AFTERHOURS_RECONCILE_INTERVAL": "1s"}
    async with replicas.replica(engines, **settings) as (_, client):
        for user_id in ("ada", "bob", "eve"):
            await client.put_profile(user_id)
        kept = await client.start("ada", location=MARKER)
        ended, fresh = await client.start("bob", location=MARKER), await client.start("eve", location=MARKER)
        await client.end("bob")
        await client.end("eve")
        await _aged(engines, ended.id, "2 days")
        await _aged(engines, fresh.id, "47 hours")
        # More than a batch of others.
        await engines.rows(
            "INSERT INTO after_hours_sessions (user_id, started_at, expires_at, ended_at, end_reason, latitude,"
            " longitude, fuzzed_latitude, fuzzed_longitude, fuzz_radius_meters, fuzz_key_version, fuzz_cell)"
            " SELECT 'old', now() - interval '3 d 1 h', now() - interval '3 d', now() - interval '3 d', 'EXPIRED',"
            " 1, 2, 1, 2, 1000, 1, 1 FROM generate_series(1, 2500)"
        )

        async def erased() -> bool:
            told = await replicas.outcome(client.exact_location(ended.id))
            left = await engines.rows("SELECT FROM after_hours_sessions WHERE user_id = 'old' AND latitude IS NOT NULL")
            return isinstance(told, replicas.Refusal) and told.reason == "LOCATION_ERASED" and not left

        await replicas.eventually(erased, within=10)
        told = await replicas.refused(client.exact_location(ended.id))
        assert told.code == "FAILED_PRECONDITION"
        assert await client.exact_location(kept.id) == await client.exact_location(fresh.id) == MARKER
        [row] = await engines.rows("SELECT * FROM after_hours_sessions WHERE user_id = 'bob'")
        assert (row["latitude"], row["longitude"]) == (None, None)
        assert row["fuzzed_latitude"] == ended.fuzzed_location.latitude


@pytest.mark.store
async def test_sessions_are_removed_after_their_retention(engines: replicas.Engines) -> None:
    """The sweep removes ended sessions, with the answers kept of them, and no active one however old."""
    settings = {"AFTERHOURS_HISTORY_RETENTION": "30d", "AFTERHOURS_RECONCILE_INTERVAL": "1s"}
    async with replicas.replica(engines, **settings) as (_, client):
        for user_id in ("ada", "bob"):
            await client.put_profile(user_id)
        active = await client.start("ada")
        await engines.rows("UPDATE after_hours_sessions SET started_at = started_at - interval '90 days'")
        ended = await client.start("bob", request_id=replicas.request_id())
        await client.end("bob")
        await _aged(engines, ended.id, "30 days")

        async def removed() -> bool:
            return [str(row["id"]) for row in await engines.rows("SELECT id FROM after_hours_sessions")] == [active.id]

        await replicas.eventually(removed, within=5)
        assert (await replicas.refused(client.exact_location(ended.id))).reason == "SESSION_NOT_FOUND"
        assert await engines.rows("SELECT FROM after_hours_requests") == []


async def _aged(engines: replicas.Engines, session_id: str, age: str) -> None:
    await engines.rows(
        "UPDATE after_hours_sessions SET started_at = started_at - $2::text::interval,"
        " expires_at = expires_at - $2::text::interval, ended_at = ended_at - $2::text::interval WHERE id = $1",
        session_id,
        age,
    )


@pytest.mark.store
async def test_a_new_fuzz_key(engines: replicas.Engines) -> None:
    """Sessions keep the version that they were made with; who stays where they were last shown stays there."""
    two = f"2:another fuzz key of many characters,{replicas.FUZZ_KEY}"
    async with replicas.replica(engines) as (_, client):
        for user_id in ("ada", "bob"):
            await client.put_profile(user_id)
        old = await client.start("ada")
        await client.end("ada")
    async with replicas.replica(engines, AFTERHOURS_FUZZ_KEY=two) as (_, client):
        assert (await client.start("ada")).fuzzed_location == old.fuzzed_location
        new = await client.start("bob")
        versions = await engines.rows("SELECT user_id, fuzz_key_version FROM after_hours_sessions ORDER BY started_at")
        assert [tuple(row) for row in versions] == [("ada", 1), ("ada", 1), ("bob", 2)]
        await client.end("ada")
    async with replicas.replica(engines, AFTERHOURS_FUZZ_KEY=two.split(",", maxsplit=1)[0]) as (_, client):
        moved = await client.start("ada")
        assert moved.fuzzed_location != old.fuzzed_location
        assert (await client.get("bob")).session.fuzzed_location == new.fuzzed_location


_LOGGED = {"log_statement": "all", "log_error_verbosity": "terse", "fsync": "off"}


@contextlib.asynccontextmanager
async def _logging_all(tmp_path: pathlib.Path) -> collections.abc.AsyncIterator[postgres.Postgres]:
    """Run a Postgres that logs every statement, without what is bound to it."""
    server = postgres.Postgres(tmp_path / "postgres", settings=_LOGGED)
    await asyncio.to_thread(server.__enter__)
    try:
        await schema.migrate(server.url)
        yield server
    finally:
        await asyncio.to_thread(server.__exit__, None, None, None)


async def _all_of_redis(url: str) -> bytes:
    async with redis.asyncio.Redis.from_url(url) as connection:
        found = []
        async for key in connection.scan_iter("*"):
            found += [key, await connection.dump(key) or b""]
            if await connection.type(key) == b"zset":
                found += [repr(await connection.zrange(key, 0, -1, withscores=True)).encode()]
        return b"\n".join(found)


async def test_no_exact_location_anywhere(engines: replicas.Engines, tmp_path: pathlib.Path) -> None:
    """A marker is in one row, and in the answer to who may know: in no log, error, event, metric or byte of Redis."""
    async with _logging_all(tmp_path) as truth:
        logged = replicas.Engines(truth.url, engines.redis_url)
        settings = {"AFTERHOURS_LOG_FORMAT": "json", "AFTERHOURS_RATE_LIMIT": "100", "AFTERHOURS_GATES": "consent"}
        told: list[object] = []
        async with (
            replicas.process(logged, **settings, AFTERHOURS_METRICS_LISTEN="127.0.0.1:29464") as (process, client),
        ):
            start = session_service_pb2.StartSessionRequest(location=MARKER, user_id="\0")
            told.append(await replicas.refused(client.sessions.StartSession(start)))
            told.append(await replicas.refused(client.start("ada", location=MARKER)))
            await client.put_profile("ada")
            told.append(await replicas.refused(client.start("ada", location=MARKER)))
            await client.put_profile("ada", location_consent=True)
            first = replicas.request_id()
            watching: typing.Any = client.sessions.WatchSessions(session_service_pb2.WatchSessionsRequest())
            told.append(await watching.read())
            started = await client.start("ada", location=MARKER, request_id=first)
            told += [started, await client.start("ada", location=MARKER, request_id=first)]
            told.append(await replicas.refused(client.start("ada", location=MARKER)))
            near = session_service_pb2.ListActiveSessionsRequest(near=started.fuzzed_location, radius_meters=1)
            told += [
                await client.extend("ada"),
                await client.get("ada"),
                await client.sessions.ListActiveSessions(near),
            ]
            told += [await client.end("ada"), *[await watching.read() for _ in range(3)]]
            watching.cancel()
            history = session_service_pb2.ListSessionsRequest(user_id="ada")
            told.append(await client.sessions.ListSessions(history))
            told += await logged.rows("SELECT * FROM after_hours_events")
            # A bug: the row is refused by Postgres, which quotes it where it is let.
            await logged.rows("ALTER TABLE after_hours_sessions ADD CONSTRAINT south CHECK (latitude < 0) NOT VALID")
            told.append(await replicas.refused(client.start("ada", location=MARKER)))
            assert await client.exact_location(started.id) == MARKER
            stored = await _all_of_redis(engines.redis_url)
            with urllib.request.urlopen("http://127.0.0.1:29464/metrics", timeout=10) as response:  # noqa: ASYNC210
                metrics = response.read().decode()
        written = {
            "answers": repr(told),
            "metrics": metrics,
            "Redis": stored.decode(errors="replace"),
            "log": "\n".join(process.lines),
            "Postgres' log": truth.log.read_text(),
        }
    assert "afterhours_calls_total" in metrics
    assert "StartSession" in written["log"]
    assert "INSERT INTO after_hours_sessions" in written["Postgres' log"]
    assert "south" in written["Postgres' log"]
    assert b"afterhours:rate" in stored
    for name, text in written.items():
        for digits in ("43.219", "117.891", "2191817", "8918273"):
            assert digits not in text, name


def _displaced(place: location.ExactLocation, bearing: float, meters: float) -> location.ExactLocation:
    moved = geodesic.Geodesic.WGS84.Direct(place.latitude, place.longitude, bearing, meters)
    return location.ExactLocation(moved["lat2"], moved["lon2"])


def _meters(one: location.ExactLocation, other: tuple[float, float]) -> float:
    return float(geodesic.Geodesic.WGS84.Inverse(one.latitude, one.longitude, *other)["s12"])


def _guesses(shown: list[location.FuzzedLocation]) -> list[tuple[float, float]]:
    """Guess a home from the places shown: their mean, the middle of the smallest box around them, the most frequent."""
    latitudes, longitudes = [each.latitude for each in shown], [each.longitude for each in shown]
    return [
        (statistics.fmean(latitudes), statistics.fmean(longitudes)),
        ((min(latitudes) + max(latitudes)) / 2, (min(longitudes) + max(longitudes)) / 2),
        max(set(zip(latitudes, longitudes, strict=True)), key=list(zip(latitudes, longitudes, strict=True)).count),
    ]


def test_an_attacker_with_a_thousand_sessions_of_each_of_a_thousand_users() -> None:
    """The best of averaging, the smallest circle and counting cells: median error at least 350 m, a tenth 150 m."""
    fuzzer = location.Fuzzer(location.FuzzKey.parse(replicas.FUZZ_KEY))
    chance = random.Random(11)
    errors = []
    for number in range(1000):
        user_id = f"user {number}"
        home = location.ExactLocation(chance.uniform(-60, 60), chance.uniform(-179, 179))
        shown: list[location.FuzzedLocation] = []
        last: location.Candidate | None = None
        # A place has one set of candidates: each of a hundred fixes is that of ten sessions.
        fixes = [_displaced(home, chance.uniform(0, 360), min(abs(chance.gauss(0, 15)), 45)) for _ in range(100)]
        for fix in fixes:
            candidates = fuzzer.candidates(user_id, fix)
            last = last if last in candidates else candidates[0]
            shown += 10 * [last.fuzzed]
        errors.append(min(_meters(home, guess) for guess in _guesses(shown)))
    errors.sort()
    assert statistics.median(errors) >= 350
    assert errors[100] >= 150
    assert not any(math.isnan(each) for each in errors)


async def test_a_thousand_sessions_through_the_front_door_show_one_place(engines: replicas.Engines) -> None:
    """What callers see of a user who starts again and again from one spot, by a receiver that errs, is one place."""
    home = location.ExactLocation(replicas.BERLIN.latitude, replicas.BERLIN.longitude)
    chance = random.Random(12)
    async with replicas.replica(engines) as (_, client):
        users = [f"user {number}" for number in range(50)]
        await asyncio.gather(*(client.put_profile(user) for user in users))

        async def shown(user: str) -> set[tuple[float, float]]:
            found = set()
            for _ in range(20):
                fix = _displaced(home, chance.uniform(0, 360), chance.uniform(0, 45))
                place = session_pb2.Location(latitude=fix.latitude, longitude=fix.longitude)
                fuzzed = (await client.start(user, location=place)).fuzzed_location
                found.add((fuzzed.latitude, fuzzed.longitude))
                await client.end(user)
            return found

        places = await asyncio.gather(*(shown(user) for user in users))
    assert {len(each) for each in places} == {1}
    errors = sorted(_meters(home, place) for found in places for place in found)
    assert errors[len(errors) // 2] >= 350
