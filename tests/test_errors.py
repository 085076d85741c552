"""What a caller is told when a call is refused: the code, the reason, and what goes with it."""

import asyncio
import collections
import collections.abc
import contextlib
import dataclasses
import datetime
import itertools
import json
import math
import typing
import urllib.parse
import uuid

import asyncpg
import grpc
import pytest
import pytest_asyncio
import replicas
from afterhours.v1 import (
    error_reason_pb2,
    profile_pb2,
    profile_service_pb2,
    session_pb2,
    session_service_pb2,
)
from google.protobuf import duration_pb2, message, timestamp_pb2
from grpc_status import rpc_status

from afterhours_grpc.embedded import postgres, redis

# One server for the module, in one event loop: each test has users of its own.
pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.front_door]

_numbers = itertools.count()

METHODS = (
    "SessionService/StartSession",
    "SessionService/EndSession",
    "SessionService/ExtendSession",
    "SessionService/GetSession",
    "ProfileService/PutProfile",
    "ProfileService/GetProfile",
    "ProfileService/DeleteProfile",
)
QUARTER = duration_pb2.Duration(seconds=900)
# Of SQL, of exceptions, of this code, and of the places that the tests send.
INDISCREET = (
    *("select", "insert", "update ", "delete from", "after_hours", "relation", "column", "constraint", "postgres"),
    *("asyncpg", "sqlalchemy", "traceback", "exception", ".py", "0x", "does not exist", "redis"),
    *("52.5162", "13.3777", "90.0001", "180.1", "12.34567", "98.76543"),
)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engines_of_module(
    postgres_server: postgres.Postgres, redis_server: redis.Redis, transport: str
) -> collections.abc.AsyncIterator[replicas.Engines]:
    """Give the module a copy of the migrated database."""
    place = postgres_server.url.rpartition("/")[0]
    administrator = await asyncpg.connect(f"{place}/postgres")
    await administrator.execute("CREATE DATABASE errors TEMPLATE afterhours")
    yield replicas.Engines(f"{place}/errors", redis_server.url, transport)
    await administrator.execute("DROP DATABASE errors WITH (FORCE)")
    await administrator.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(engines_of_module: replicas.Engines) -> collections.abc.AsyncIterator[replicas.Client]:
    """Run a server for all tests of the module."""
    async with replicas.replica(engines_of_module) as (_, client):
        yield client


@pytest.fixture
def user() -> str:
    """Name a user whom no other test knows."""
    return f"user {next(_numbers)}"


async def call(client: replicas.Client, method: str, request: message.Message | bytes) -> typing.Any:
    """Call a method by its name, with a message or with raw bytes; give the raw answer."""
    raw = request if isinstance(request, bytes) else request.SerializeToString()
    method_of_bytes = client.channel.unary_unary(f"/afterhours.v1.{method}", _as_it_is, _as_it_is)
    return await method_of_bytes(raw, timeout=10)


def _as_it_is(raw: bytes) -> bytes:
    return raw


async def refused(call: collections.abc.Awaitable[object]) -> replicas.Refusal:
    """Give what a call was refused for, once what holds for every refusal has been looked at."""
    refusal = await replicas.refused(call)
    info = refusal.details["ErrorInfo"]
    assert info.domain == "afterhours.v1"
    assert error_reason_pb2.ErrorReason.Value(f"ERROR_REASON_{info.reason}") > 0
    assert refusal.message
    told = f"{refusal.message} {refusal.details}".lower()
    assert [each for each in INDISCREET if each in told] == []
    return refusal


async def violations(call: collections.abc.Awaitable[object]) -> list[str]:
    """Give the fields for which a call was refused as INVALID_REQUEST."""
    refusal = await refused(call)
    assert (refusal.code, refusal.reason) == ("INVALID_ARGUMENT", "INVALID_REQUEST")
    found = refusal.details["BadRequest"].field_violations
    assert all(each.description for each in found)
    assert all(each.field in refusal.message for each in found)
    return [each.field for each in found]


def started(user_id: str, **fields: typing.Any) -> session_service_pb2.StartSessionRequest:
    """Make a valid StartSessionRequest but for `fields`."""
    return session_service_pb2.StartSessionRequest(
        **{"user_id": user_id, "duration": QUARTER, "location": replicas.BERLIN, **fields}
    )


@pytest.mark.parametrize(
    ("method", "request_", "fields"),
    [
        (
            "SessionService/StartSession",
            session_service_pb2.StartSessionRequest(request_id="once"),
            ["user_id", "duration", "location", "request_id"],
        ),
        (
            "SessionService/StartSession",
            started("", location=session_pb2.Location(latitude=90.0001, longitude=-180.1)),
            ["user_id", "location.latitude", "location.longitude"],
        ),
        (
            "SessionService/EndSession",
            session_service_pb2.EndSessionRequest(request_id="once"),
            ["user_id", "request_id"],
        ),
        (
            "SessionService/ExtendSession",
            session_service_pb2.ExtendSessionRequest(request_id="once"),
            ["user_id", "additional_duration", "request_id"],
        ),
        ("SessionService/GetSession", session_service_pb2.GetSessionRequest(), ["user_id"]),
        ("ProfileService/PutProfile", profile_service_pb2.PutProfileRequest(), ["profile"]),
        (
            "ProfileService/PutProfile",
            profile_service_pb2.PutProfileRequest(
                profile=profile_pb2.Profile(premium_expire_time=timestamp_pb2.Timestamp(nanos=-1))
            ),
            ["profile.user_id", "profile.premium_expire_time"],
        ),
        ("ProfileService/GetProfile", profile_service_pb2.GetProfileRequest(), ["user_id"]),
        ("ProfileService/DeleteProfile", profile_service_pb2.DeleteProfileRequest(), ["user_id"]),
    ],
)
async def test_every_bad_field_is_named(
    client: replicas.Client, method: str, request_: message.Message, fields: list[str]
) -> None:
    """A request whose fields break their rules is INVALID_REQUEST, with a violation for each of them at once."""
    found = await violations(call(client, method, request_))
    assert sorted(found) == sorted(fields)


@pytest.mark.parametrize(
    "duration",
    [
        None,
        duration_pb2.Duration(),
        duration_pb2.Duration(seconds=-900),
        duration_pb2.Duration(seconds=899),
        duration_pb2.Duration(seconds=900, nanos=1),
        duration_pb2.Duration(seconds=900, nanos=-1),
        duration_pb2.Duration(seconds=899, nanos=10**9),
        duration_pb2.Duration(seconds=315576000000),
        duration_pb2.Duration(seconds=2**63 - 1, nanos=2**31 - 1),
        duration_pb2.Duration(seconds=-(2**63), nanos=-(2**31)),
    ],
)
async def test_only_the_allowed_durations(
    client: replicas.Client, user: str, duration: duration_pb2.Duration | None
) -> None:
    """Start and extend take the allowed durations and no other, however near or far."""
    await client.put_profile(user)
    start = client.sessions.StartSession(started(user, duration=duration))
    assert await violations(start) == ["duration"]
    session = await client.start(user)
    extension = session_service_pb2.ExtendSessionRequest(user_id=user, additional_duration=duration)
    assert await violations(client.sessions.ExtendSession(extension)) == ["additional_duration"]
    assert (await client.get(user)).session.expire_time == session.expire_time


@pytest.mark.parametrize(
    ("latitude", "longitude", "fields"),
    [
        (math.nan, 0.0, ["latitude"]),
        (0.0, math.nan, ["longitude"]),
        (math.inf, -math.inf, ["latitude", "longitude"]),
        (90.0001, 0.0, ["latitude"]),
        (-90.0001, 0.0, ["latitude"]),
        (math.nextafter(90.0, 91.0), 0.0, ["latitude"]),
        (0.0, -180.1, ["longitude"]),
        (0.0, math.nextafter(180.0, 181.0), ["longitude"]),
        (1e308, 1e308, ["latitude", "longitude"]),
    ],
)
async def test_a_place_that_is_none(
    client: replicas.Client, user: str, latitude: float, longitude: float, fields: list[str]
) -> None:
    """A coordinate beyond its range, infinite or not a number is refused by name, and its value is not repeated."""
    await client.put_profile(user)
    place = session_pb2.Location(latitude=latitude, longitude=longitude)
    found = await violations(client.sessions.StartSession(started(user, location=place)))
    assert found == [f"location.{each}" for each in fields]
    assert not (await client.get(user)).active


async def test_an_unset_place(client: replicas.Client, user: str) -> None:
    """A start without a location is refused, and one at 0, 0 is not without."""
    await client.put_profile(user)
    assert await violations(client.sessions.StartSession(started(user, location=None))) == ["location"]
    assert (await client.start(user, location=session_pb2.Location())).user_id == user


@pytest.mark.parametrize("place", [(90, 180), (-90, -180), (90, -180), (-0.0, -0.0)])
async def test_the_ends_of_the_earth(client: replicas.Client, user: str, place: tuple[float, float]) -> None:
    """The poles and both sides of the antimeridian are places."""
    await client.put_profile(user)
    session = await client.start(user, location=session_pb2.Location(latitude=place[0], longitude=place[1]))
    assert -90 <= session.fuzzed_location.latitude <= 90
    assert -180 <= session.fuzzed_location.longitude <= 180


@pytest.mark.parametrize("name", ["", "a" * 256, "🦉" * 256, "\0", "ada\0", "a" * 100_000])
async def test_a_user_id_that_is_none(client: replicas.Client, name: str) -> None:
    """A user id that is empty, longer than 255 code points, or has a U+0000, is refused by every method."""
    requests: list[tuple[str, message.Message, str]] = [
        ("SessionService/StartSession", started(name), "user_id"),
        ("SessionService/EndSession", session_service_pb2.EndSessionRequest(user_id=name), "user_id"),
        (
            "SessionService/ExtendSession",
            session_service_pb2.ExtendSessionRequest(user_id=name, additional_duration=QUARTER),
            "user_id",
        ),
        ("SessionService/GetSession", session_service_pb2.GetSessionRequest(user_id=name), "user_id"),
        (
            "ProfileService/PutProfile",
            profile_service_pb2.PutProfileRequest(profile=profile_pb2.Profile(user_id=name)),
            "profile.user_id",
        ),
        ("ProfileService/GetProfile", profile_service_pb2.GetProfileRequest(user_id=name), "user_id"),
        ("ProfileService/DeleteProfile", profile_service_pb2.DeleteProfileRequest(user_id=name), "user_id"),
    ]
    assert {method for method, _, _ in requests} == set(METHODS)
    for method, request, field in requests:
        assert await violations(call(client, method, request)) == [field]


@pytest.mark.parametrize(
    "name",
    [
        "a",
        "x" * 255,
        "🦉" * 255,
        "👩‍💻 ada",
        "' OR 1=1 --",
        '"; DROP TABLE users; --',
        "%s $1 :user_id {0} \\",
        " ",
        "\n",
        "\uffff\U0010ffff\u202e",
        "google_109331234567890123456",
    ],
)
@pytest.mark.store
async def test_a_user_id_is_opaque(client: replicas.Client, name: str) -> None:
    """Any other user id of up to 255 code points goes through every method as it is, and is nobody else."""
    assert (await refused(client.start(name))).reason == "PROFILE_REQUIRED"
    await client.put_profile(name)
    stored = await client.profiles.GetProfile(profile_service_pb2.GetProfileRequest(user_id=name))
    assert stored.profile.user_id == name
    session = await client.start(name)
    assert session.user_id == name
    assert (await client.get(name)).session.id == session.id
    assert (await client.extend(name)).id == session.id
    assert (await client.end(name)).id == session.id
    await client.delete_profile(name)


BAD_REQUEST_IDS = [
    "once",
    "{123e4567-e89b-12d3-a456-426614174000}",
    "urn:uuid:123e4567-e89b-12d3-a456-426614174000",
    "123e4567e89b12d3a456426614174000",
    "123e4567-e89b-12d3-a456-42661417400",
    "123e4567-e89b-12d3-a456-4266141740000",
    "123e4567-e89b-12d3-a456-42661417400g",
    "123e4567-e89b-12d3-a456-426614174000\n",
    " 123e4567-e89b-12d3-a456-426614174000",
    "123e4567-e89b-12d3-a456-42661417400\N{FULLWIDTH DIGIT ONE}",
    "123e4567-e89b-12d3-a456-42661417400\0",
]


@pytest.mark.parametrize("request_id", BAD_REQUEST_IDS)
async def test_a_request_id_that_is_none(client: replicas.Client, user: str, request_id: str) -> None:
    """A request_id in any other form than a UUID's usual one is refused by each method that has it."""
    await client.put_profile(user)
    assert await violations(client.start(user, request_id=request_id)) == ["request_id"]
    await client.start(user)
    assert await violations(client.extend(user, request_id=request_id)) == ["request_id"]
    assert await violations(client.end(user, request_id=request_id)) == ["request_id"]
    assert (await client.get(user)).active


async def test_a_request_id_in_either_case(client: replicas.Client, user: str) -> None:
    """A request_id in upper case is fine, and is the UUID that it is in lower case; the nil UUID is one too."""
    await client.put_profile(user)
    request_id = replicas.request_id()
    session = await client.start(user, request_id=request_id.upper())
    assert await client.start(user, request_id=request_id) == session
    assert (await client.end(user, request_id=str(uuid.UUID(int=0)))).id == session.id


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("raw", [b"\xff\xff", b"\x00", b"\x0a\x05ab", b"\x0a\x01\xff", b"\x0a\x03\x0a\x01\xff"])
async def test_undecodable_bytes(client: replicas.Client, method: str, raw: bytes) -> None:
    """Bytes that are no message, cut off or not UTF-8, are INVALID_REQUEST without a violation."""
    assert await violations(call(client, method, raw)) == []


@pytest.mark.parametrize("method", ["SessionService/Nonsense", "Nonsense/GetSession", "ProfileService/"])
async def test_an_unknown_method(client: replicas.Client, method: str) -> None:
    """A method that there is not is UNIMPLEMENTED."""
    refusal = await replicas.refused(call(client, method, b""))
    assert refusal.code == "UNIMPLEMENTED"


async def test_no_profile(client: replicas.Client, user: str) -> None:
    """A start without a profile is PROFILE_REQUIRED, and the PreconditionFailure is about the user."""
    refusal = await refused(client.start(user))
    assert (refusal.code, refusal.reason) == ("FAILED_PRECONDITION", "PROFILE_REQUIRED")
    [violation] = refusal.details["PreconditionFailure"].violations
    assert violation.type
    assert violation.subject == user
    assert violation.description


async def test_an_active_session(client: replicas.Client, user: str) -> None:
    """A second start is SESSION_ALREADY_ACTIVE, with the id and the expire_time of the first, as extended."""
    await client.put_profile(user)
    await client.start(user)
    session = await client.extend(user)
    refusal = await refused(client.start(user, 1800))
    assert (refusal.code, refusal.reason) == ("ALREADY_EXISTS", "SESSION_ALREADY_ACTIVE")
    expire_time = timestamp_pb2.Timestamp()
    expire_time.FromJsonString(refusal.metadata.pop("expire_time"))
    assert expire_time == session.expire_time
    assert refusal.metadata == {"session_id": session.id}


async def test_no_active_session(client: replicas.Client, user: str) -> None:
    """End and extend are NO_ACTIVE_SESSION for a user who is unknown, who never started, and who ended."""

    async def neither() -> None:
        for attempt in (client.extend(user), client.end(user)):
            refusal = await refused(attempt)
            assert (refusal.code, refusal.reason) == ("NOT_FOUND", "NO_ACTIVE_SESSION")

    await neither()
    await client.put_profile(user)
    await neither()
    await client.start(user)
    await client.end(user)
    await neither()


@pytest.mark.store
async def test_an_expired_session(client: replicas.Client, engines_of_module: replicas.Engines, user: str) -> None:
    """End and extend are NO_ACTIVE_SESSION for a session that expired, whether or not its row was swept."""
    for attempt in (client.extend, client.end):
        await client.put_profile(user)
        await client.start(user)
        await engines_of_module.rows(
            "UPDATE after_hours_sessions SET started_at = now() - interval '2 s', expires_at = now()"
            " WHERE user_id = $1 AND ended_at IS NULL",
            user,
        )
        refusal = await refused(attempt(user))
        assert (refusal.code, refusal.reason) == ("NOT_FOUND", "NO_ACTIVE_SESSION")
        assert not (await client.get(user)).active


async def test_a_request_id_with_another_body(client: replicas.Client, user: str) -> None:
    """A request_id that was applied with another body is REQUEST_ID_REUSED, for each method that has one."""
    await client.put_profile(user)
    request_id = replicas.request_id()
    await client.start(user, request_id=request_id)
    await client.extend(user, request_id=request_id)
    await client.end(user, request_id=request_id)
    for attempt in (
        client.start(user, 1800, request_id=request_id),
        client.extend(user, 1800, request_id=request_id),
        client.end("somebody else", request_id=request_id),
    ):
        refusal = await refused(attempt)
        assert (refusal.code, refusal.reason) == ("INVALID_ARGUMENT", "REQUEST_ID_REUSED")


async def test_an_unknown_profile(client: replicas.Client, user: str) -> None:
    """To get or delete a profile that there is not, or no longer is, is PROFILE_NOT_FOUND."""
    for _ in range(2):
        for attempt in (
            client.profiles.GetProfile(profile_service_pb2.GetProfileRequest(user_id=user)),
            client.delete_profile(user),
        ):
            refusal = await refused(attempt)
            assert (refusal.code, refusal.reason) == ("NOT_FOUND", "PROFILE_NOT_FOUND")
        await client.put_profile(user)
        await client.delete_profile(user)


async def test_the_order_of_the_checks(client: replicas.Client, engines_of_module: replicas.Engines, user: str) -> None:
    """The form comes before the replay, the replay before the profile, the profile before the active session."""
    bad = duration_pb2.Duration(seconds=899)
    assert await violations(client.sessions.StartSession(started(user, duration=bad))) == ["duration"]
    await client.put_profile(user)
    request_id = replicas.request_id()
    session = await client.start(user, request_id=request_id)
    assert (await refused(client.start(user))).reason == "SESSION_ALREADY_ACTIVE"
    # Past the service, which would end the session with it.
    await engines_of_module.rows("DELETE FROM after_hours_profiles WHERE user_id = $1", user)

    request = started(user, duration=bad, request_id=request_id)
    assert await violations(client.sessions.StartSession(request)) == ["duration"]
    assert (await refused(client.start(user, 1800, request_id=request_id))).reason == "REQUEST_ID_REUSED"
    assert await client.start(user, request_id=request_id) == session
    assert (await refused(client.start(user))).reason == "PROFILE_REQUIRED"
    bad_extension = session_service_pb2.ExtendSessionRequest(user_id="nobody", additional_duration=bad)
    assert await violations(client.sessions.ExtendSession(bad_extension)) == ["additional_duration"]


async def at_work(engines: replicas.Engines) -> bool:
    """Whether Postgres is busy with a transition of the service."""
    return bool(
        await engines.rows(
            "SELECT FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
            " AND state = 'active' AND query LIKE '%WITH%'"
        )
    )


async def idle(engines: replicas.Engines) -> bool:
    """Whether Postgres is busy with none."""
    return not await at_work(engines)


@pytest.mark.parametrize("lock_outlives_the_statement", [True, False])
@pytest.mark.store
async def test_the_deadline_passes(engines: replicas.Engines, lock_outlives_the_statement: bool) -> None:
    """A start whose deadline passes before it is applied is DEADLINE_EXCEEDED, and is not applied later either."""
    async with replicas.replica(engines) as (_, client):
        await client.put_profile("ada")
        async with replicas.locked(engines, "SELECT FROM after_hours_profiles FOR UPDATE"):
            # As metadata, so that only the server minds it, and what the server says is heard.
            starting = client.sessions.StartSession(started("ada"), metadata=(("grpc-timeout", "200m"),))
            refusal = await refused(starting)
            assert (refusal.code, refusal.reason) == ("DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED")
            if lock_outlives_the_statement:
                await replicas.eventually(lambda: idle(engines), within=10)
        await replicas.eventually(lambda: idle(engines), within=10)
        assert await engines.rows("SELECT FROM after_hours_sessions") == []
        assert (await client.start("ada")).user_id == "ada"


@pytest.mark.store
async def test_the_deadline_passes_during_the_commit(engines: replicas.Engines) -> None:
    """A call whose commit outlasts its deadline is not told the reason DEADLINE_EXCEEDED, for it is applied."""
    await engines.rows(
        "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(0.4); RETURN NULL; END'"
    )
    async with replicas.replica(engines) as (_, client):
        await client.put_profile("ada")
        await engines.rows(
            "CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON after_hours_sessions DEFERRABLE INITIALLY DEFERRED"
            " FOR EACH ROW EXECUTE FUNCTION slow()"
        )
        refusal = await replicas.refused(client.start("ada", timeout=0.3))
        assert (refusal.code, refusal.reason) == ("DEADLINE_EXCEEDED", "")
        await replicas.eventually(lambda: idle(engines), within=10)
        assert (await client.get("ada")).active


@pytest.mark.store
async def test_the_deadline_passes_in_the_queue(engines: replicas.Engines) -> None:
    """A call that waits behind another one of its user is told DEADLINE_EXCEEDED in time, and is never applied."""
    async with replicas.replica(engines) as (_, client):
        await client.put_profile("ada")
        first = await client.start("ada")
        async with replicas.locked(engines, "SELECT FROM after_hours_sessions FOR UPDATE"):
            extending = asyncio.create_task(client.extend("ada"))
            await replicas.eventually(lambda: at_work(engines), within=10)
            refusal = await refused(client.extend("ada", timeout=0.2))
            assert (refusal.code, refusal.reason) == ("DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED")
        extended = await extending
        quarter = datetime.timedelta(minutes=15)
        assert extended.expire_time.ToDatetime() - first.expire_time.ToDatetime() == quarter
        assert (await client.get("ada")).session.expire_time == extended.expire_time


@pytest.mark.alone
async def test_too_many_starts_wait(engines: replicas.Engines) -> None:
    """Past the bound of its queue a start is OVERLOADED and not applied; ends and profiles do not wait behind it."""
    async with replicas.replica(engines) as (service, client), contextlib.AsyncExitStack() as stack:
        await client.put_profile("ada")
        await client.start("ada")
        # Of one connection the native transport takes 1,024 calls at a time.
        callers = [replicas.Client(service.address) for _ in range(5)]
        for each in callers:
            stack.push_async_callback(each.close)
        async with replicas.locked(engines, "LOCK TABLE after_hours_profiles IN ACCESS EXCLUSIVE MODE"):
            starting = [
                asyncio.create_task(replicas.refused(caller.start(f"user {number} {n}", timeout=30)))
                for n in range(900)
                for number, caller in enumerate(callers)
            ]
            first, _ = await asyncio.wait(starting, return_when=asyncio.FIRST_COMPLETED)
            refusal = first.pop().result()
            assert refusal.reason == "OVERLOADED", refusal
            assert (await client.end("ada", timeout=2)).user_id == "ada"
        told = collections.Counter((each.code, each.reason) for each in await asyncio.gather(*starting))
        overloaded = ("RESOURCE_EXHAUSTED", "OVERLOADED")
        # Those that were let in were answered when the lock was gone, or gave up waiting for it.
        assert told.keys() <= {
            overloaded,
            ("FAILED_PRECONDITION", "PROFILE_REQUIRED"),
            ("UNAVAILABLE", "STORE_UNAVAILABLE"),
        }
        assert refusal.details["RetryInfo"].retry_delay.ToMilliseconds() == 500


@dataclasses.dataclass
class Link:
    """The network between a server and its Postgres, which can be cut."""

    url: str
    cut: collections.abc.Callable[[], collections.abc.Awaitable[None]]


@contextlib.asynccontextmanager
async def link(url: str) -> collections.abc.AsyncIterator[Link]:
    """Pass bytes on to the Postgres at a URL."""
    parts = urllib.parse.urlsplit(url)
    writers: list[asyncio.StreamWriter] = []

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
        writer.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(parts.hostname, parts.port)
        writers.extend((writer, far_writer))
        await asyncio.gather(copy(reader, far_writer), copy(far_reader, writer))

    server = await asyncio.start_server(accept, "127.0.0.1", 0)

    async def cut() -> None:
        server.close()
        for writer in writers:
            writer.transport.abort()

    port = server.sockets[0].getsockname()[1]
    netloc = f"{parts.username}:{parts.password}@127.0.0.1:{port}"
    try:
        yield Link(parts._replace(netloc=netloc).geturl(), cut)
    finally:
        await cut()


def of_every_method(user_id: str) -> dict[str, message.Message]:
    """Give a valid request of every method, in an order in which all of them are answered."""
    profile = profile_pb2.Profile(user_id=user_id)
    return {
        "ProfileService/PutProfile": profile_service_pb2.PutProfileRequest(profile=profile),
        "ProfileService/GetProfile": profile_service_pb2.GetProfileRequest(user_id=user_id),
        "SessionService/StartSession": started(user_id),
        "SessionService/GetSession": session_service_pb2.GetSessionRequest(user_id=user_id),
        "SessionService/ExtendSession": session_service_pb2.ExtendSessionRequest(
            user_id=user_id, additional_duration=QUARTER
        ),
        "SessionService/EndSession": session_service_pb2.EndSessionRequest(user_id=user_id),
        "ProfileService/DeleteProfile": profile_service_pb2.DeleteProfileRequest(user_id=user_id),
    }


@pytest.mark.store
async def test_postgres_is_away(engines: replicas.Engines) -> None:
    """While Postgres cannot be reached, every method is STORE_UNAVAILABLE, with the delay to retry after."""
    async with link(engines.database_url) as network:
        through = dataclasses.replace(engines, database_url=network.url)
        async with replicas.replica(through) as (_, client):
            await client.put_profile("ada")
            await network.cut()
            for method, request in of_every_method("ada").items():
                refusal = await refused(call(client, method, request))
                assert (refusal.code, refusal.reason) == ("UNAVAILABLE", "STORE_UNAVAILABLE"), method
                assert refusal.details["RetryInfo"].retry_delay.ToTimedelta().total_seconds() > 0
    assert await engines.rows("SELECT FROM after_hours_sessions") == []


@pytest.mark.store
async def test_a_table_is_locked_for_a_moment(engines: replicas.Engines) -> None:
    """A lock on the tables, such as a migration takes, holds every method up for as long, and none fails by it."""
    async with replicas.replica(engines) as (_, client):
        requests = of_every_method("ada")
        for method in requests:  # so that each of them would be answered, whatever the order
            user_id = f"ada of {method}"
            await client.put_profile(user_id)
            if method not in ("SessionService/StartSession", "ProfileService/PutProfile"):
                await client.start(user_id)
        async with replicas.locked(engines, "LOCK TABLE after_hours_sessions, after_hours_profiles"):
            calls = [
                asyncio.create_task(replicas.outcome(call(client, method, of_every_method(f"ada of {method}")[method])))
                for method in requests
            ]
            await asyncio.sleep(0.8)
        outcomes = dict(zip(requests, await asyncio.gather(*calls), strict=True))
        assert {method: each for method, each in outcomes.items() if isinstance(each, replicas.Refusal)} == {}


async def test_a_bug(engines: replicas.Engines) -> None:
    """A bug is INTERNAL, with an error_id that the log has too, and without a word on what it is."""
    async with replicas.process(engines, AFTERHOURS_LOG_FORMAT="json") as (process, client):
        for table in ("sessions", "profiles"):
            await engines.rows(f"ALTER TABLE after_hours_{table} RENAME TO after_hours_{table}_gone")
        ids = []
        for method, request in of_every_method("ada").items():
            refusal = await refused(call(client, method, request))
            assert (refusal.code, refusal.reason) == ("INTERNAL", "INTERNAL"), method
            assert list(refusal.metadata) == ["error_id"]
            ids.append(refusal.metadata["error_id"])
        for table in ("sessions", "profiles"):
            await engines.rows(f"ALTER TABLE after_hours_{table}_gone RENAME TO after_hours_{table}")
        for method, request in of_every_method("ada").items():
            await call(client, method, request)  # it has recovered
    assert len(set(ids)) == len(METHODS)
    logged = [json.loads(line) for line in process.lines if line.startswith("{")]
    assert [each["error_id"] for each in logged if "error_id" in each] == ids


async def test_the_log_has_no_place(engines: replicas.Engines) -> None:
    """No coordinate is in an answer or in the log, not even where Postgres refuses a row and quotes it."""
    place = session_pb2.Location(latitude=12.3456789, longitude=98.7654321)
    beyond = session_pb2.Location(latitude=112.3456789, longitude=198.7654321)
    async with replicas.process(engines, AFTERHOURS_LOG_FORMAT="json") as (process, client):
        await client.put_profile("ada")
        await engines.rows("ALTER TABLE after_hours_sessions ADD CONSTRAINT south CHECK (latitude < 0)")
        assert (await refused(client.start("ada", location=place))).reason == "INTERNAL"
        # The row is quoted, so that there is something to be discreet about.
        with pytest.raises(asyncpg.CheckViolationError) as quoted:
            await engines.rows(
                "INSERT INTO after_hours_sessions (user_id, started_at, expires_at, latitude, longitude,"
                " fuzzed_latitude, fuzzed_longitude, fuzz_radius_meters, fuzz_key_version, fuzz_cell)"
                " VALUES ('ada', now(), now() + interval '1 h', 12.3456789, 98.7654321, 0, 0, 0, 1, 0)"
            )
        assert "12.3456789" in quoted.value.as_dict()["detail"]
        await engines.rows("ALTER TABLE after_hours_sessions DROP CONSTRAINT south")
        assert (await refused(client.start("ada", location=beyond))).reason == "INVALID_REQUEST"
        raw = started("ada", location=place).SerializeToString() + b"\xff"
        assert await violations(call(client, "SessionService/StartSession", raw)) == []
        await client.start("ada", location=place)
        assert (await refused(client.start("ada", location=place))).reason == "SESSION_ALREADY_ACTIVE"
        await client.end("ada")
        await process.terminate()
    written = "\n".join(process.lines)
    assert written.count('"StartSession"') == 5
    assert "12.34567" not in written
    assert "98.76543" not in written


FULL = profile_pb2.Profile(
    user_id="filled in by the test",
    premium_expire_time=timestamp_pb2.Timestamp(seconds=1_900_000_000, nanos=123_456_000),
    identity_verified=True,
    location_consent=True,
)


async def put(client: replicas.Client, profile: profile_pb2.Profile) -> profile_pb2.Profile:
    """Put a profile, and give what is stored; PutProfile has answered the same."""
    answer = await client.profiles.PutProfile(profile_service_pb2.PutProfileRequest(profile=profile))
    request = profile_service_pb2.GetProfileRequest(user_id=profile.user_id)
    stored = await client.profiles.GetProfile(request)
    assert answer.profile == stored.profile
    return stored.profile


async def test_a_profile_is_replaced_as_a_whole(client: replicas.Client, user: str) -> None:
    """A profile is kept with all its fields, and what the next one leaves unset is unset."""
    full = profile_pb2.Profile()
    full.CopyFrom(FULL)
    full.user_id = user
    assert await put(client, full) == full
    assert await put(client, full) == full
    bare = profile_pb2.Profile(user_id=user)
    assert await put(client, bare) == bare
    assert not (await put(client, bare)).HasField("premium_expire_time")
    for one in (
        profile_pb2.Profile(user_id=user, identity_verified=True),
        profile_pb2.Profile(user_id=user, location_consent=True),
    ):
        assert await put(client, one) == one


@pytest.mark.parametrize(
    ("seconds", "nanos"),
    [
        (-62135596800, 0),
        (-62135596800, 1000),
        (-1, 999_999_000),
        (0, 0),
        (253402300799, 0),
        (253402300799, 999_999_000),
    ],
)
@pytest.mark.store
async def test_the_edges_of_time(client: replicas.Client, user: str, seconds: int, nanos: int) -> None:
    """A premium_expire_time from year 1 to the last microsecond of 9999 is kept exactly."""
    profile = profile_pb2.Profile(
        user_id=user, premium_expire_time=timestamp_pb2.Timestamp(seconds=seconds, nanos=nanos)
    )
    assert await put(client, profile) == profile
    assert (await client.start(user)).user_id == user


@pytest.mark.parametrize("nanos", [1, 999, 1_001, 999_999_999])
@pytest.mark.store
async def test_time_is_kept_to_the_microsecond(client: replicas.Client, user: str, nanos: int) -> None:
    """A premium_expire_time is kept to less than a microsecond, and never becomes a later one, even in 9999."""
    asked = timestamp_pb2.Timestamp(seconds=253402300799, nanos=nanos)
    stored = await put(client, profile_pb2.Profile(user_id=user, premium_expire_time=asked))
    assert stored.premium_expire_time.seconds == asked.seconds
    assert nanos - 1000 < stored.premium_expire_time.nanos <= nanos


@pytest.mark.parametrize(
    ("seconds", "nanos"),
    [(0, -1), (0, 10**9), (-62135596801, 0), (253402300800, 0), (2**63 - 1, 0), (-(2**63), -(2**31))],
)
async def test_a_time_that_is_none(client: replicas.Client, user: str, seconds: int, nanos: int) -> None:
    """A premium_expire_time that is no Timestamp is refused, and what was stored stays."""
    bare = profile_pb2.Profile(user_id=user)
    await put(client, bare)
    bad = profile_pb2.Profile(user_id=user, premium_expire_time=timestamp_pb2.Timestamp(seconds=seconds, nanos=nanos))
    putting = client.profiles.PutProfile(profile_service_pb2.PutProfileRequest(profile=bad))
    assert await violations(putting) == ["profile.premium_expire_time"]
    found = await client.profiles.GetProfile(profile_service_pb2.GetProfileRequest(user_id=user))
    assert found.profile == bare


async def test_a_failure_is_one_status(client: replicas.Client, user: str) -> None:
    """The code and message of the rich status are those of the call, and ErrorInfo is its first detail, and once."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.start(user)
    error = caught.value
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    packed = rpc_status.from_call(typing.cast("grpc.Call", error))
    assert packed is not None
    assert packed.message == error.details()
    kinds = [each.type_url.rpartition(".")[2] for each in packed.details]
    assert kinds == ["ErrorInfo", "PreconditionFailure"]
