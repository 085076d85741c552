"""The size of a status: every client library delivers it, whatever was wrong with the request."""

import base64
import datetime
import typing
import urllib.parse
import uuid

import grpc
import hypothesis
import pytest
import replicas
from afterhours.v1 import session_service_pb2
from google.rpc import error_details_pb2, status_pb2
from hypothesis import strategies

from afterhours_grpc.rpc import status
from afterhours_grpc.sessions import errors, session

pytestmark = pytest.mark.front_door

# A client that drops whatever is larger, always and not just at random.
STRICT = [("grpc.max_metadata_size", 8192), ("grpc.absolute_max_metadata_size", 8192)]


async def test_many_violations(engines: replicas.Engines) -> None:
    """However many fields are bad, the first 20 are reported, in order; the message says how many more there are."""
    async with replicas.replica(engines) as (service, _), replicas.Client(service.address, further=STRICT) as client:

        async def get(bad: list[str]) -> None:
            await client.sessions.BatchGetSessions(session_service_pb2.BatchGetSessionsRequest(user_ids=bad))

        async def watch(bad: list[str]) -> None:
            stream: typing.Any = client.sessions.WatchSessions(session_service_pb2.WatchSessionsRequest(user_ids=bad))
            assert await stream.read() is grpc.aio.EOF

        for count in (20, 21, 60, 1000):
            for call in (get([""] * count), watch(count * [300 * "🦉"])):
                told = await replicas.refused(call)
                assert (told.code, told.reason) == ("INVALID_ARGUMENT", "INVALID_REQUEST")
                found = [each.field for each in told.details["BadRequest"].field_violations]
                assert found == [f"user_ids[{at}]" for at in range(20)]
                assert all(field in told.message for field in found)
                assert told.message.endswith(f"; and {count - 20} more." if count > 20 else "U+0000.")


async def test_many_durations(engines: replicas.Engines) -> None:
    """A rule that lists more durations than a status has room for is cut short."""
    many = ",".join(f"{seconds}s" for seconds in range(1000, 3000))
    async with (
        replicas.replica(engines, AFTERHOURS_DURATIONS=many) as (service, _),
        replicas.Client(service.address, further=STRICT) as client,
    ):
        told = await replicas.refused(client.start("ada", 1))
        [violation] = told.details["BadRequest"].field_violations
        assert violation.field == "duration"
        assert violation.description.startswith("must be one of 1000s, 1001s, ")
        assert violation.description.endswith("...")


async def test_the_longest_user_id(engines: replicas.Engines) -> None:
    """The subject of a precondition is the whole user id, however long."""
    async with replicas.replica(engines) as (service, _), replicas.Client(service.address, further=STRICT) as client:
        told = await replicas.refused(client.start(255 * "🦉"))
        assert told.reason == "PROFILE_REQUIRED"
        assert [each.subject for each in told.details["PreconditionFailure"].violations] == [255 * "🦉"]


texts = strategies.text(max_size=3000) | strategies.sampled_from([5000 * "🦉", 9000 * "%", 9000 * "x", ""])
violations = strategies.lists(strategies.builds(errors.Violation, texts, texts), max_size=30).map(tuple)
refusals = strategies.one_of(
    strategies.builds(errors.InvalidRequest, violations),
    strategies.builds(errors.Unauthenticated, texts),
    strategies.builds(errors.ProfileRequired, strategies.text(min_size=1, max_size=255).map(session.UserId)),
    strategies.builds(errors.RateLimited, strategies.timedeltas(min_value=datetime.timedelta())),
    strategies.builds(
        errors.SessionAlreadyActive,
        strategies.uuids().map(session.SessionId),
        strategies.datetimes(timezones=strategies.just(datetime.UTC)),
    ),
    strategies.builds(
        errors.SlowConsumer,
        strategies.builds(
            session.Position,
            strategies.integers(0, 2**63 - 1),
            strategies.datetimes(datetime.datetime(1970, 1, 1), timezones=strategies.just(datetime.UTC)),  # noqa: DTZ001
        ),
    ),
    strategies.just(errors.Bug(uuid.uuid4().hex)),
)


@hypothesis.given(refusals)
@hypothesis.settings(max_examples=300, database=None)
def test_any_status_is_below_8_kib(error: errors.SessionError) -> None:
    """Whatever an error says, its status as it is sent is small, and its reason and its message are in it."""
    rendered = status.status(error)
    details = base64.b64encode(rendered.SerializeToString())
    message = urllib.parse.quote_from_bytes(rendered.message.encode(), safe=" !\"#$&'()*+,/:;<=>?@[\\]^`{|}")
    assert len("grpc-status-details-bin") + len(details) + len("grpc-message") + len(message) < 7500
    info = error_details_pb2.ErrorInfo()
    assert rendered.details[0].Unpack(info)
    assert info.reason == status.reason(error)
    assert rendered.message
    assert status_pb2.Status.FromString(rendered.SerializeToString()) == rendered
