"""A call is applied once at most, whatever fails after its commit, and an error is told to those whom it concerns."""

import asyncio
import collections
import collections.abc
import datetime
import json
import time
import typing

import pytest
import replicas

from afterhours_grpc.sessions import location, service, session
from afterhours_grpc.store import privacy, store

pytestmark = pytest.mark.store

USERS = [f"user {n}" for n in range(20)]


def among(user: str) -> list[str]:
    """Put a user among the others: the first call goes alone, and those after it share a batch."""
    return [*USERS[:10], user, *USERS[10:]]


# The driver cannot decode such a time, which Postgres can hold.
UNDECODABLE = """
CREATE FUNCTION odd() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN NEW.warn_at = '20000-01-01'; RETURN NEW; END $$;
CREATE TRIGGER odd BEFORE UPDATE ON after_hours_sessions
    FOR EACH ROW WHEN (NEW.user_id = 'mallory' AND NEW.ended_at IS NULL) EXECUTE FUNCTION odd()
"""
# An error that Postgres raises at the commit, of the kind after which a statement is run again.
FAILING_COMMIT = """
CREATE SEQUENCE tries;
CREATE FUNCTION failing() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN PERFORM nextval('tries'); RAISE 'another one' USING ERRCODE = '40001'; END $$;
CREATE CONSTRAINT TRIGGER failing AFTER DELETE ON after_hours_profiles DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION failing()
"""


async def with_sessions(client: replicas.Client, *users: str) -> None:
    """Start a session of each user."""
    await asyncio.gather(*(client.put_profile(user) for user in users))
    await asyncio.gather(*(client.start(user) for user in users))


async def quarters(engines: replicas.Engines) -> dict[str, int]:
    """Read for how many quarters of an hour each user's session runs."""
    rows = await engines.rows(
        "SELECT user_id, extract(epoch FROM expires_at - started_at) / 900 AS quarters FROM after_hours_sessions"
    )
    return {row["user_id"]: int(row["quarters"]) for row in rows}


async def outcomes(calls: dict[str, collections.abc.Awaitable[typing.Any]]) -> dict[str, typing.Any]:
    """Send a call of each user at once."""
    return dict(zip(calls, await asyncio.gather(*map(replicas.outcome, calls.values())), strict=True))


async def test_an_answer_that_cannot_be_decoded(engines: replicas.Engines) -> None:
    """A batch whose rows the driver cannot decode was applied: it fails, and is not applied again."""
    async with replicas.process(engines, AFTERHOURS_LOG_FORMAT="json") as (process, client):
        await with_sessions(client, "mallory", *USERS)
        await engines.execute(UNDECODABLE)
        ok: collections.Counter[str] = collections.Counter()
        ids: set[str] = set()
        for _ in range(3):
            told = await outcomes({user: client.extend(user) for user in among("mallory")})
            ok.update(user for user, each in told.items() if not isinstance(each, replicas.Refusal))
            refusals = [each for each in told.values() if isinstance(each, replicas.Refusal)]
            assert {(each.code, each.reason) for each in refusals} == {("INTERNAL", "INTERNAL")}
            ids |= {each.metadata["error_id"] for each in refusals}
        applied = await quarters(engines)
        assert all(1 + ok[user] <= applied[user] <= 4 for user in USERS)
        assert ok["mallory"] == 0
        await process.terminate()
    logged = [json.loads(line) for line in process.lines if line.startswith("{")]
    assert sorted(each["error_id"] for each in logged if "error_id" in each) == sorted(ids)


async def test_what_cannot_be_explained(engines: replicas.Engines) -> None:
    """If the reason of a refusal cannot be read, the calls of the batch that were applied are OK, and applied once."""
    async with replicas.replica(engines) as (_, client):
        await with_sessions(client, *USERS)
        # Explanations read it, and extensions do not.
        await engines.rows("ALTER TABLE after_hours_profiles RENAME TO after_hours_profiles_gone")
        for round_ in range(1, 4):
            told = await outcomes({user: client.extend(user) for user in among("nobody")})
            refusal = told.pop("nobody")
            assert (refusal.code, refusal.reason) == ("INTERNAL", "INTERNAL")
            assert [each for each in told.values() if isinstance(each, replicas.Refusal)] == []
            assert set((await quarters(engines)).values()) == {1 + round_}


async def test_one_calls_fault_is_told_to_it_alone(engines: replicas.Engines) -> None:
    """A row that Postgres refuses fails the call that it is of, and no other in the batch."""
    async with replicas.replica(engines) as (_, client):
        await asyncio.gather(*(client.put_profile(user) for user in among("mallory")))
        await engines.rows("ALTER TABLE after_hours_sessions ADD CONSTRAINT others CHECK (user_id <> 'mallory')")
        told = await outcomes({user: client.start(user) for user in among("mallory")})
        assert told.pop("mallory").code == "INTERNAL"
        assert [each for each in told.values() if isinstance(each, replicas.Refusal)] == []
        assert set((await quarters(engines)).values()) == {1}


async def test_a_read_that_cannot_be_decoded(engines: replicas.Engines) -> None:
    """A row that cannot be decoded fails the reads of its user, and none that shares their batch."""
    async with replicas.replica(engines) as (_, client):
        await with_sessions(client, "mallory", *USERS)
        await engines.rows("UPDATE after_hours_sessions SET warn_at = '20000-01-01' WHERE user_id = 'mallory'")
        told = await outcomes({user: client.get(user) for user in among("mallory")})
        assert told.pop("mallory").code == "INTERNAL"
        assert [each for each in told.values() if isinstance(each, replicas.Refusal)] == []


async def test_an_error_of_the_commit_is_not_tried_again(engines: replicas.Engines) -> None:
    """A transaction whose COMMIT fails is not known to be rolled back: it is told so, and not run again."""
    await engines.execute(FAILING_COMMIT)
    async with replicas.replica(engines) as (_, client):
        await client.put_profile("ada")
        refusal = await replicas.refused(client.delete_profile("ada"))
        assert (refusal.code, refusal.reason) == ("UNAVAILABLE", "STORE_UNAVAILABLE")
        [tries] = await engines.rows("SELECT last_value FROM tries")
        assert tries["last_value"] == 1
        # The connection is not left in a transaction.
        await client.put_profile("ada")


class _BrokenTimers:
    async def set(self, _: object) -> None:
        raise ValueError

    async def cancel(self, _: object) -> None:
        raise ValueError


async def test_timers_that_fail(engines: replicas.Engines) -> None:
    """Calls whose timers cannot be changed for a bug were applied all the same, and are answered so, once."""
    async with replicas.replica(engines) as (replica, client):
        await with_sessions(client, *USERS)
        sessions_store = store.Store(replica.database)
        use_cases = service.Sessions(
            sessions_store,
            privacy.Privacy(replica.database),
            _BrokenTimers(),
            location.Fuzzer(location.FuzzKey.parse(replicas.FUZZ_KEY)),
            limiter=None,
        )
        deadline = session.Deadline(time.monotonic() + 5, of_caller=False)
        quarter = datetime.timedelta(minutes=15)
        extended = await asyncio.gather(
            *(use_cases.extend(session.Extend(session.UserId(user), quarter, None, deadline)) for user in USERS)
        )
        assert {(each.expires_at - each.started_at) / quarter for each in extended} == {2}
        assert set((await quarters(engines)).values()) == {2}
        ended = await asyncio.gather(
            *(use_cases.end(session.End(session.UserId(user), None, deadline)) for user in USERS)
        )
        assert not any(each.active for each in ended)
        await use_cases.close()
