"""Whatever is sent to a method, random bytes and valid but odd messages: only what the contract names comes back."""

import asyncio
import collections
import collections.abc
import typing

import hypothesis
import pytest
import replicas
from afterhours.v1 import profile_pb2, profile_service_pb2, session_pb2, session_service_pb2
from google.protobuf import duration_pb2, message, timestamp_pb2
from hypothesis import strategies

pytestmark = pytest.mark.front_door

CONTRACT = {
    ("INVALID_ARGUMENT", "INVALID_REQUEST"),
    ("INVALID_ARGUMENT", "REQUEST_ID_REUSED"),
    ("OUT_OF_RANGE", "CURSOR_EXPIRED"),
    ("FAILED_PRECONDITION", "PROFILE_REQUIRED"),
    ("FAILED_PRECONDITION", "LOCATION_ERASED"),
    ("ALREADY_EXISTS", "SESSION_ALREADY_ACTIVE"),
    ("NOT_FOUND", "NO_ACTIVE_SESSION"),
    ("NOT_FOUND", "PROFILE_NOT_FOUND"),
    ("NOT_FOUND", "SESSION_NOT_FOUND"),
}
CALM = [hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large]

# Few users and ids, so that calls meet each other; and any text at all.
texts = strategies.one_of(
    strategies.sampled_from(["ada", "bob", "", "a\0b", 255 * "é", 256 * "x", "\U0010ffff", "'; DROP TABLE users; --"]),
    strategies.text(max_size=300),
)
ids = strategies.one_of(
    strategies.sampled_from(["00000000-0000-4000-8000-000000000001", "{00000000-0000-4000-8000-000000000001}", ""]),
    strategies.uuids().map(str),
    texts,
)
sizes = strategies.one_of(strategies.just(0), strategies.integers(-(2**31), 2**31 - 1))
tokens = strategies.one_of(
    strategies.just(""), strategies.sampled_from(["MQAAAAAAAAAA", "MQ", "====", 60 * "A"]), texts
)
seconds = strategies.one_of(
    strategies.sampled_from([0, 2, 900, 1800, 3600, -900]),
    strategies.integers(-(2**63), 2**63 - 1),
)
nanos = strategies.one_of(strategies.just(0), strategies.integers(-(2**31), 2**31 - 1))
durations = strategies.builds(duration_pb2.Duration, seconds=seconds, nanos=nanos)
times = strategies.builds(timestamp_pb2.Timestamp, seconds=seconds, nanos=nanos)
degrees = strategies.one_of(
    strategies.sampled_from([0.0, -0.0, 90.0, -90.0, 180.0, -180.0, float("nan"), float("inf"), 5e-324]),
    strategies.floats(),
)
places = strategies.builds(session_pb2.Location, latitude=degrees, longitude=degrees)
profiles = strategies.builds(
    profile_pb2.Profile,
    user_id=texts,
    premium_expire_time=strategies.none() | times,
    identity_verified=strategies.booleans(),
    location_consent=strategies.booleans(),
)


def _request(kind: typing.Any, **fields: strategies.SearchStrategy[typing.Any]) -> typing.Any:
    return strategies.builds(kind, **fields)


_S, _P = session_service_pb2, profile_service_pb2
MESSAGES: dict[str, strategies.SearchStrategy[message.Message]] = {
    "SessionService/StartSession": _request(
        _S.StartSessionRequest,
        user_id=texts,
        duration=strategies.none() | durations,
        location=strategies.none() | places,
        request_id=ids,
    ),
    "SessionService/EndSession": _request(_S.EndSessionRequest, user_id=texts, request_id=ids),
    "SessionService/ExtendSession": _request(
        _S.ExtendSessionRequest,
        user_id=texts,
        additional_duration=strategies.none() | durations,
        request_id=ids,
    ),
    "SessionService/GetSession": _request(_S.GetSessionRequest, user_id=texts),
    "SessionService/BatchGetSessions": _request(
        _S.BatchGetSessionsRequest,
        user_ids=strategies.lists(texts, max_size=5),
        min_remaining=strategies.none() | durations,
    ),
    "SessionService/ListSessions": _request(
        _S.ListSessionsRequest,
        user_id=texts,
        page_size=sizes,
        page_token=tokens,
    ),
    "SessionService/ListActiveSessions": _request(
        _S.ListActiveSessionsRequest,
        min_remaining=strategies.none() | durations,
        near=strategies.none() | places,
        radius_meters=degrees,
        page_size=sizes,
        page_token=tokens,
    ),
    "SessionService/WatchSessions": _request(
        _S.WatchSessionsRequest,
        user_ids=strategies.lists(texts, max_size=5),
        cursor=tokens,
    ),
    "SessionService/GetExactLocation": _request(_S.GetExactLocationRequest, session_id=ids, purpose=texts),
    "ProfileService/PutProfile": _request(_P.PutProfileRequest, profile=strategies.none() | profiles),
    "ProfileService/GetProfile": _request(_P.GetProfileRequest, user_id=texts),
    "ProfileService/DeleteProfile": _request(_P.DeleteProfileRequest, user_id=texts),
}


@strategies.composite
def bodies(draw: strategies.DrawFn) -> tuple[str, bytes]:
    """Draw a method and a body: random bytes, an odd message, or one that was cut, changed or said twice."""
    method = draw(strategies.sampled_from(list(MESSAGES)))
    if draw(strategies.integers(0, 3)) == 0:
        return method, draw(strategies.binary(max_size=200))
    body = draw(MESSAGES[method]).SerializeToString()
    at = draw(strategies.integers(0, len(body)))
    damaged = {
        "whole": body,
        "cut": body[:at],
        "changed": body[:at] + draw(strategies.binary(max_size=3)) + body[at + 1 :],
        "twice": body + body,
    }
    return method, damaged[draw(strategies.sampled_from(list(damaged)))]


async def test_only_the_contracts_answers(engines: replicas.Engines) -> None:
    """No body gives INTERNAL or UNKNOWN, or an answer without a reason; and each kind of answer was met."""
    async with replicas.replica(engines) as (_, client):
        for user_id in ("ada", "bob"):
            await client.put_profile(user_id)
        loop = asyncio.get_running_loop()
        met: collections.Counter[str] = collections.Counter()

        async def send(method: str, body: bytes) -> None:
            path = f"/afterhours.v1.{method}"
            if method.endswith("WatchSessions"):
                watch: typing.Any = client.channel.unary_stream(path)
                stream = watch(body, timeout=10)
                told = await replicas.outcome(stream.read())
                stream.cancel()
            else:
                call: typing.Any = client.channel.unary_unary(path)
                told = await replicas.outcome(call(body, timeout=10))
            if isinstance(told, replicas.Refusal):
                assert (told.code, told.reason) in CONTRACT, told
            met[told.reason if isinstance(told, replicas.Refusal) else "OK"] += 1

        @hypothesis.settings(max_examples=2000, deadline=None, database=None, suppress_health_check=CALM)
        @hypothesis.given(bodies())
        def probe(drawn: tuple[str, bytes]) -> None:
            asyncio.run_coroutine_threadsafe(send(*drawn), loop).result(20)

        await asyncio.to_thread(probe)
        assert {"OK", "INVALID_REQUEST", "NO_ACTIVE_SESSION", "PROFILE_NOT_FOUND"} <= met.keys(), met


TOO_LONG: dict[str, collections.abc.Callable[[replicas.Client], collections.abc.Awaitable[object]]] = {
    "a user id of 10 MB": lambda client: client.get(10_000_000 * "x"),
    "a purpose of 10 MB": lambda client: client.exact_location(replicas.request_id(), 10_000_000 * "x"),
}


@pytest.mark.parametrize("name", TOO_LONG)
async def test_a_message_that_is_too_long(engines: replicas.Engines, name: str) -> None:
    """What is longer than 2 MiB is refused by the library, what is shorter by its form; others are served."""
    async with replicas.replica(engines) as (service, client):
        assert (await replicas.refused(TOO_LONG[name](client))).code == "RESOURCE_EXHAUSTED"
        assert (await replicas.refused(client.get(2_000_000 * "x"))).reason == "INVALID_REQUEST"
        async with replicas.Client(service.address) as other:
            assert not (await other.get("ada")).active


async def test_metadata_that_is_too_long(engines: replicas.Engines) -> None:
    """More than 16 KiB of metadata is refused by the library, 8 KiB are not; others are served."""
    # As HTTP's status 431, which clients of gRPC take for UNKNOWN.
    code = "UNKNOWN" if engines.transport == "native" else "RESOURCE_EXHAUSTED"
    async with replicas.replica(engines) as (service, client):
        request = session_service_pb2.GetSessionRequest(user_id="ada")
        await client.sessions.GetSession(request, metadata=(("x-long", 8_000 * "x"),))
        told = await replicas.refused(client.sessions.GetSession(request, metadata=(("x-long", 40_000 * "x"),)))
        assert (told.code, told.reason) == (code, "")
        async with replicas.Client(service.address) as other:
            assert not (await other.get("ada")).active
