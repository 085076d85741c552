"""Gates: what the operator asks of a profile for a start and an extension, and what ends when it is withdrawn."""

import asyncio
import collections.abc
import datetime
import random
import signal
import typing

import pytest
import replicas
from afterhours.v1 import session_pb2
from google.protobuf import timestamp_pb2

from afterhours_grpc import failpoints

pytestmark = pytest.mark.store

ALL = {"AFTERHOURS_GATES": "premium,verified,consent"}


def after(**length: float) -> timestamp_pb2.Timestamp:
    """Give a time from now."""
    at = timestamp_pb2.Timestamp()
    at.FromDatetime(datetime.datetime.now(datetime.UTC) + datetime.timedelta(**length))
    return at


def open_profile(**changed: typing.Any) -> dict[str, typing.Any]:
    """Give a profile for which every gate is open, but for what is changed; None leaves a field out."""
    fields = {
        "premium_expire_time": after(days=1),
        "identity_verified": True,
        "location_consent": True,
        **changed,
    }
    return {name: value for name, value in fields.items() if value is not None}


CLOSED: dict[str, tuple[str, collections.abc.Callable[[], dict[str, typing.Any]]]] = {
    "premium unset": ("PREMIUM_REQUIRED", lambda: open_profile(premium_expire_time=None)),
    "premium over": ("PREMIUM_REQUIRED", lambda: open_profile(premium_expire_time=after(seconds=-1))),
    "not verified": ("VERIFICATION_REQUIRED", lambda: open_profile(identity_verified=False)),
    "no consent": ("CONSENT_REQUIRED", lambda: open_profile(location_consent=False)),
    "all": ("PREMIUM_REQUIRED", dict),
    "the latter two": (
        "VERIFICATION_REQUIRED",
        lambda: open_profile(identity_verified=False, location_consent=False),
    ),
}


@pytest.mark.parametrize("name", CLOSED)
async def test_a_closed_gate(engines: replicas.Engines, name: str) -> None:
    """A start through a closed gate is refused with the first reason in order; putting what it asks for opens it."""
    reason, fields = CLOSED[name]
    async with replicas.replica(engines, **ALL) as (_, client):
        await client.put_profile("ada", **fields())
        for _ in range(2):
            told = await replicas.refused(client.start("ada"))
            assert (told.code, told.reason) == ("PERMISSION_DENIED", reason)
            assert "PutProfile" in told.message
        assert (await replicas.refused(client.extend("ada"))).reason == reason
        assert (await replicas.refused(client.end("ada"))).reason == "NO_ACTIVE_SESSION"
        assert not (await client.get("ada")).active
        assert await engines.rows("SELECT FROM after_hours_sessions") == []
        await client.put_profile("ada", **open_profile())
        assert (await client.start("ada")).state == session_pb2.SESSION_STATE_ACTIVE


async def test_only_the_gates_that_are_on(engines: replicas.Engines) -> None:
    """Without gates a bare profile is enough; each gate asks for its own field alone."""
    async with replicas.replica(engines) as (_, client):
        await client.put_profile("ada")
        await client.start("ada")
        await client.put_profile("ada", location_consent=False)
        await client.extend("ada")
        await client.end("ada")
    async with replicas.replica(engines, AFTERHOURS_GATES=" consent ") as (_, client):
        assert (await replicas.refused(client.start("ada"))).reason == "CONSENT_REQUIRED"
        await client.put_profile("ada", location_consent=True)
        await client.start("ada")


@pytest.mark.parametrize("name", CLOSED)
async def test_withdrawing_ends_the_session(engines: replicas.Engines, name: str) -> None:
    """A put that closes a gate ends the active session as INELIGIBLE, with its timer, and no other user's."""
    _, fields = CLOSED[name]
    async with replicas.replica(engines, **ALL) as (_, client):
        for user_id in ("ada", "bob"):
            await client.put_profile(user_id, **open_profile())
            await client.start(user_id)
        await client.put_profile("ada", **fields())
        assert not (await client.get("ada")).active
        assert (await client.get("bob")).active
        [row] = await engines.rows("SELECT * FROM after_hours_sessions WHERE user_id = 'ada'")
        assert row["end_reason"] == "INELIGIBLE"
        assert row["started_at"] <= row["ended_at"] < row["expires_at"]


async def test_a_premium_time_that_passes_ends_nothing(engines: replicas.Engines) -> None:
    """Passing refuses the next extension and start, and ends nothing, nor does a put that keeps it or takes it away."""
    async with replicas.replica(engines, **ALL) as (service, client):
        premium = after(minutes=5)
        await client.put_profile("ada", **open_profile(premium_expire_time=premium))
        started = await client.start("ada")
        service.database.clock_offset = datetime.timedelta(minutes=6)
        assert (await replicas.refused(client.extend("ada"))).reason == "PREMIUM_REQUIRED"
        for over in (premium, None, after(days=-1), None):
            await client.put_profile("ada", **open_profile(premium_expire_time=over))
            assert (await client.get("ada")).session.id == started.id
        assert (await client.end("ada")).end_reason == session_pb2.END_REASON_USER
        assert (await replicas.refused(client.start("ada"))).reason == "PREMIUM_REQUIRED"


async def test_the_place_of_gates_in_the_order(engines: replicas.Engines) -> None:
    """A replay comes before the gates, a missing profile too, and an active session after them."""
    async with replicas.replica(engines, **ALL) as (service, client):
        assert (await replicas.refused(client.start("ada"))).reason == "PROFILE_REQUIRED"
        assert (await replicas.refused(client.extend("ada"))).reason == "NO_ACTIVE_SESSION"
        await client.put_profile("ada", **open_profile(premium_expire_time=after(minutes=5)))
        start, extend = replicas.request_id(), replicas.request_id()
        started, extended = await client.start("ada", request_id=start), await client.extend("ada", request_id=extend)
        service.database.clock_offset = datetime.timedelta(minutes=6)
        assert (await replicas.refused(client.start("ada"))).reason == "PREMIUM_REQUIRED"
        assert await client.start("ada", request_id=start) == started
        assert await client.extend("ada", request_id=extend) == extended


async def test_an_extension_that_waited_for_a_withdrawal_is_refused(engines: replicas.Engines) -> None:
    """An extension, and a start, that wait for a profile being changed see what it became."""
    async with replicas.replica(engines, **ALL) as (_, client):
        for user_id in ("ada", "bob"):
            await client.put_profile(user_id, **open_profile())
        await client.start("ada")
        for end in ("ROLLBACK", "COMMIT"):
            async with replicas.locked(engines, "UPDATE after_hours_profiles SET location_consent = false") as writer:
                calls = [client.extend("ada"), client.start("bob")]
                waiting = [asyncio.create_task(replicas.outcome(call)) for call in calls]
                await replicas.eventually(engines.in_flight, within=4)
                await writer.execute(f"{end}; BEGIN")
                told = await asyncio.gather(*waiting)
            reasons = {each.reason if isinstance(each, replicas.Refusal) else "applied" for each in told}
            assert reasons == {"applied" if end == "ROLLBACK" else "CONSENT_REQUIRED"}
            await replicas.outcome(client.end("bob"))


async def test_withdrawals_racing_starts_leave_nobody_active(engines: replicas.Engines) -> None:
    """Whatever the order, nobody is active whose last put closed a gate, nor extended after it."""
    users = [f"user {number}" for number in range(150)]
    chance = random.Random(3)
    async with (
        replicas.replica(engines, **ALL) as (_, one),
        replicas.replica(engines, **ALL) as (_, other),
    ):
        await asyncio.gather(*(one.put_profile(user, **open_profile()) for user in users))
        await asyncio.gather(*(one.start(user) for user in users[::2]))

        async def race(user: str) -> None:
            calls = [
                other.put_profile(user, **open_profile(location_consent=False)),
                one.start(user),
                one.extend(user),
                other.extend(user),
            ]
            chance.shuffle(calls)
            await asyncio.gather(*(replicas.outcome(call) for call in calls))

        await asyncio.gather(*(race(user) for user in users))
        assert await engines.rows("SELECT FROM after_hours_sessions WHERE ended_at IS NULL") == []
        ended = await engines.rows("SELECT DISTINCT end_reason FROM after_hours_sessions")
        assert [row["end_reason"] for row in ended] == ["INELIGIBLE"]


async def test_killed_between_the_put_and_the_end(engines: replicas.Engines) -> None:
    """Killed after a withdrawal is written and before its session is ended: neither, and the retry does both."""
    async with replicas.replica(engines, **ALL) as (_, client):
        await client.put_profile("ada", **open_profile())
        await client.start("ada")
    async with replicas.process(engines, **ALL, AFTERHOURS_FAIL_POINT=failpoints.Point.PUT.value) as (process, client):
        assert (await replicas.refused(client.put_profile("ada"))).code == "UNAVAILABLE"
        assert await process.wait() == -signal.SIGKILL
    async with replicas.replica(engines, **ALL) as (_, client):
        assert (await client.get("ada")).active
        await client.put_profile("ada")
        assert not (await client.get("ada")).active
