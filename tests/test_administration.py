"""What an operator does to one user by command: end, erase, export, and sign a token."""

import asyncio
import hashlib
import json
import signal

import keys
import pytest
import redis.asyncio
import replicas
import watches
from afterhours.v1 import session_pb2

from afterhours_grpc import failpoints


async def command(engines: replicas.Engines, *words: str, **settings: str) -> tuple[int, list[str]]:
    """Run a command to its end: its exit status, and what it printed."""
    process = await replicas.Process(engines.environment(**settings), *words).start()
    try:
        return await process.wait(), process.lines
    finally:
        await process.stop()


async def jobs(engines: replicas.Engines) -> int:
    """Count the expiry jobs."""
    async with redis.asyncio.Redis.from_url(engines.redis_url) as connection:
        return int(await connection.zcard("afterhours:jobs"))


async def test_end(engines: replicas.Engines) -> None:
    """An operator's end is one with ADMIN, at once, and takes its timer with it; without a session it fails."""
    async with replicas.replica(engines, AFTERHOURS_GATES="consent") as (_, client):
        await client.put_profile("ada", location_consent=True)
        started = await client.start("ada")
        assert await jobs(engines) == 1
        assert await command(engines, "end", "ada") == (0, [f"ended session {started.id}"])
        assert not (await client.get("ada")).active
        [row] = await engines.rows("SELECT * FROM after_hours_sessions")
        assert row["end_reason"] == "ADMIN"
        assert await jobs(engines) == 0
        assert await command(engines, "end", "ada") == (1, ["afterhours-grpc: the user has no active session"])


async def test_export_and_erase(engines: replicas.Engines) -> None:
    """An export has all that is stored of a user, an erasure leaves none of it; both are recorded."""
    marker = session_pb2.Location(latitude=12.125, longitude=98.625)
    async with replicas.replica(engines) as (_, client):
        for user_id in ("ada", "bob"):
            await client.put_profile(user_id, identity_verified=True)
            await client.start(user_id, location=marker, request_id=replicas.request_id())
        await client.end("ada", request_id=replicas.request_id())
        active = await client.start("ada", request_id=replicas.request_id())
        await client.exact_location(active.id, "case 7")

        status, lines = await command(engines, "export-user", "ada", "--reference", "ticket 1")
        assert status == 0
        exported = json.loads("\n".join(lines))
        assert exported["user_id"] == "ada"
        assert exported["profile"]["identity_verified"] is True
        assert [each["end_reason"] for each in exported["sessions"]] == ["USER", None]
        assert [each["latitude"] for each in exported["sessions"]] == [12.125, replicas.BERLIN.latitude]
        assert len(exported["answers"]) == 3
        assert [each["type"] for each in exported["events"]] == ["STARTED", "ENDED", "STARTED"]
        assert [each["purpose"] for each in exported["exact_location_reads"]] == ["case 7"]
        assert [each["kind"] for each in exported["data_requests"]] == ["EXPORT"]
        assert "bob" not in "\n".join(lines)

        status, lines = await command(engines, "erase-user", "ada", "--reference", "ticket 2")
        assert (status, lines) == (0, ["erased the profile and 2 sessions, of which 1 ended now"])
        assert not (await client.get("ada")).active
        assert (await client.get("bob")).active
        assert (await replicas.refused(client.start("ada"))).reason == "PROFILE_REQUIRED"
        assert (await replicas.refused(client.exact_location(active.id))).reason == "SESSION_NOT_FOUND"
        assert await jobs(engines) == 1
        left = await engines.rows(
            "SELECT to_jsonb(t)::text AS row FROM after_hours_sessions AS t UNION ALL"
            " SELECT to_jsonb(t)::text FROM after_hours_profiles AS t UNION ALL"
            " SELECT to_jsonb(t)::text FROM after_hours_requests AS t"
        )
        assert len(left) == 3
        assert not [row for row in left if '"ada"' in row["row"]]
        records = await engines.rows("SELECT kind, user_digest, reference FROM after_hours_data_requests ORDER BY id")
        digest = hashlib.sha256(b"ada").digest()
        assert [tuple(row) for row in records] == [("EXPORT", digest, "ticket 1"), ("ERASE", digest, "ticket 2")]
        # Once more: nothing is left to be erased, and that is recorded, too.
        status, lines = await command(engines, "erase-user", "ada", "--reference", "ticket 3")
        assert (status, lines) == (0, ["erased no profile and 0 sessions, of which 0 ended now"])


async def test_an_export_has_what_the_user_did(engines: replicas.Engines) -> None:
    """Calls that the user made about others, and exact locations read, are in it, without what is the others'."""
    jwt = {"AFTERHOURS_AUTH": "jwt", "AFTERHOURS_JWT_SECRET": keys.SECRET}
    async with (
        replicas.replica(engines, **jwt) as (service, _),
        replicas.Client(service.address, keys.token("bob", keys.EVERYTHING)) as bob,
    ):
        for user_id in ("ada", "bob"):
            await bob.put_profile(user_id)
        of_ada, own = replicas.request_id(), replicas.request_id()
        session = await bob.start("ada", request_id=of_ada)
        await bob.start("bob", request_id=own)
        await bob.exact_location(session.id, "case 7")

        exported = {}
        for user_id in ("ada", "bob"):
            status, lines = await command(engines, "export-user", user_id, "--reference", "ticket 1")
            assert status == 0
            exported[user_id] = json.loads("\n".join(lines))
        by_id = {each["request_id"]: each for each in exported["bob"]["answers"]}
        assert by_id.keys() == {of_ada, own}
        assert by_id[of_ada].keys() == {"caller", "method", "request_id", "session_id", "answered_at"}
        assert by_id[own].keys() > by_id[of_ada].keys()
        assert [each["request_id"] for each in exported["ada"]["answers"]] == [of_ada]
        assert [each["purpose"] for each in exported["bob"]["exact_location_reads_made"]] == ["case 7"]
        assert exported["ada"]["exact_location_reads_made"] == exported["bob"]["exact_location_reads"] == []
        assert '"ada"' not in json.dumps(exported["bob"])
        assert len(exported["bob"]["sessions"]) == 1


async def test_an_export_has_events_that_no_server_has_placed(engines: replicas.Engines) -> None:
    """What a server that was killed left in the outbox is part of an export."""
    async with replicas.locked(engines, f"SELECT pg_advisory_xact_lock({int.from_bytes(b'outbox')})"):
        async with replicas.process(engines) as (server, client):
            for user_id in ("ada", "bob"):
                await client.put_profile(user_id)
                await client.start(user_id)
            await client.end("ada")
            server.signal(signal.SIGKILL)
        status, lines = await command(engines, "export-user", "ada", "--reference", "ticket 1")
    assert status == 0
    exported = json.loads("\n".join(lines))
    assert [each["type"] for each in exported["events"]] == ["STARTED", "ENDED"]
    [session] = exported["sessions"]
    assert {each["session_id"] for each in exported["events"]} == {session["id"]}


# Stands for a user with tens of thousands of sessions, whose rows take so long.
SLOW = """
CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep({seconds}); RETURN NULL; END $$;
CREATE TRIGGER slow AFTER {event} ON {table} FOR EACH STATEMENT EXECUTE FUNCTION slow();
"""


async def test_a_user_with_a_long_history(engines: replicas.Engines) -> None:
    """An export and an erasure may take longer than a call."""
    await engines.execute(SLOW.format(seconds=4.1, event="INSERT", table="after_hours_data_requests"))
    results = await asyncio.gather(
        command(engines, "export-user", "ada", "--reference", "ticket 1"),
        command(engines, "erase-user", "bob", "--reference", "ticket 2"),
    )
    assert [status for status, _ in results] == [0, 0], results


async def test_an_erasure_delays_no_event_of_others(engines: replicas.Engines) -> None:
    """While the sessions of a user are removed, the events of others are delivered."""
    async with replicas.replica(engines) as (_, client), watches.watching(client, ["bob"]) as watch:
        for user_id in ("ada", "bob"):
            await client.put_profile(user_id)
        await client.start("ada")
        await engines.execute(SLOW.format(seconds=1.5, event="DELETE", table="after_hours_sessions"))
        erasing = asyncio.create_task(command(engines, "erase-user", "ada", "--reference", "ticket 1"))

        async def sleeps() -> bool:
            return bool(await engines.rows("SELECT FROM pg_stat_activity WHERE wait_event = 'PgSleep'"))

        await replicas.eventually(sleeps, within=20)
        await client.start("bob")
        await watch.events(1, within=1)
        assert not erasing.done()
        assert (await erasing)[0] == 0


async def test_an_erasure_is_all_or_nothing(engines: replicas.Engines) -> None:
    """Killed before its commit, an erasure has erased nothing; run again, all."""
    async with replicas.replica(engines) as (_, client):
        await client.put_profile("ada")
        await client.start("ada")
        words = ("erase-user", "ada", "--reference", "ticket 1")
        status, _ = await command(engines, *words, AFTERHOURS_FAIL_POINT=failpoints.Point.ERASED.value)
        assert status == -signal.SIGKILL
        assert (await client.get("ada")).active
        assert await engines.rows("SELECT FROM after_hours_data_requests") == []
        assert (await command(engines, *words))[0] == 0
        assert not (await client.get("ada")).active


async def test_erasures_racing_starts_leave_nobody_active(engines: replicas.Engines) -> None:
    """A start beside an erasure is either erased with the rest or refused."""
    async with replicas.replica(engines) as (_, client):
        await client.put_profile("ada")
        erasing = asyncio.create_task(command(engines, "erase-user", "ada", "--reference", "ticket 1"))
        while not erasing.done():
            await replicas.outcome(client.start("ada"))
            await replicas.outcome(client.end("ada"))
        assert (await erasing)[0] == 0
        assert (await replicas.refused(client.start("ada"))).reason == "PROFILE_REQUIRED"
        assert await engines.rows("SELECT FROM after_hours_sessions") == []


async def test_a_session_that_starts_during_an_erasure(engines: replicas.Engines) -> None:
    """A user without a profile who gets one during an erasure comes after it: their session is not removed silently."""
    async with replicas.replica(engines) as (_, client):
        await client.put_profile("ada")
        await client.start("ada")
        await client.end("ada")
        await client.delete_profile("ada")

        async def placed() -> bool:
            return len(await engines.rows("SELECT FROM after_hours_events")) == 2

        await replicas.eventually(placed, within=5)

        async def register() -> session_pb2.Session:
            await client.put_profile("ada")
            return await client.start("ada")

        # Holds up the erasure after it looked for an active session, and before it removes sessions.
        async with replicas.locked(engines, "SELECT FROM after_hours_events FOR UPDATE"):
            erasing = asyncio.create_task(command(engines, "erase-user", "ada", "--reference", "ticket 1"))
            await replicas.eventually(engines.in_flight, within=20)
            registering = asyncio.create_task(register())
            await asyncio.wait([registering], timeout=0.2)
        assert (await erasing)[0] == 0
        started = await registering

        async def events() -> list[str]:
            found = "SELECT type FROM after_hours_events WHERE session_id = $1 ORDER BY position"
            return [row["type"] for row in await engines.rows(found, started.id)]

        if (await client.get("ada")).active:
            await client.end("ada")

        async def complete() -> bool:
            return await events() == ["STARTED", "ENDED"]

        await replicas.eventually(complete, within=5)


async def test_an_erasure_of_an_id_that_nobody_can_have(engines: replicas.Engines) -> None:
    """It is refused, and nothing is recorded."""
    status, said = await command(engines, "erase-user", 300 * "x", "--reference", "ticket 1")
    assert status == 2
    assert "1 to 255 code" in " ".join(said)
    assert not await engines.rows("SELECT FROM after_hours_data_requests")


async def test_without_redis(engines: replicas.Engines) -> None:
    """Without Redis an operator ends sessions all the same; the timer is left to the sweep."""
    async with replicas.replica(engines, AFTERHOURS_RECONCILE_INTERVAL="1s") as (_, client):
        await client.put_profile("ada")
        await client.start("ada")
        assert (await command(engines, "end", "ada", REDIS_URL="redis://127.0.0.1:1"))[0] == 0
        assert not (await client.get("ada")).active

        async def dropped() -> bool:
            return await jobs(engines) == 0

        await replicas.eventually(dropped, within=5)


@pytest.mark.parametrize("words", [("end", "ada"), ("erase-user", "ada", "--reference", "1"), ("export-user", "ada")])
async def test_without_postgres(engines: replicas.Engines, words: tuple[str, ...]) -> None:
    """A command that cannot reach Postgres, or is not told all, says so in a line."""
    status, lines = await command(engines, *words, DATABASE_URL="postgresql://ada@127.0.0.1:1/afterhours")
    if words[0] == "export-user":
        assert status == 2
        assert "--reference" in "\n".join(lines)
    else:
        assert (status, len(lines)) == (1, 1)
        assert "DATABASE_URL" in lines[0]


async def test_a_user_and_a_reason_must_be_named(engines: replicas.Engines) -> None:
    """No user, no reference, or one that the service would refuse, is a mistyped flag, and nothing is done."""
    for words in (
        ("erase-user", "ada", "--reference", ""),
        ("export-user", 256 * "a", "--reference", "ticket 1"),
        ("token", ""),
    ):
        status, lines = await command(engines, *words, AFTERHOURS_JWT_SECRET=keys.SECRET)
        assert status == 2, words
        assert "1 to 255" in "".join(lines), words
    assert await engines.rows("SELECT FROM after_hours_data_requests") == []


async def test_token(engines: replicas.Engines) -> None:
    """A token that was signed by command opens what its scopes do, on a server with the same settings."""
    settings = {
        "AFTERHOURS_AUTH": "jwt",
        "AFTERHOURS_JWT_SECRET": keys.SECRET,
        "AFTERHOURS_JWT_ISSUER": "accounts",
        "AFTERHOURS_JWT_AUDIENCE": "afterhours",
    }
    (own_status, [own]), (status, [wide]), (dead_status, [dead]) = await asyncio.gather(
        command(engines, "token", "ada", **settings),
        command(engines, "token", "gateway", "--scope", keys.EVERYTHING, **settings),
        command(engines, "token", "ada", "--lifetime", "0s", **settings),
    )
    assert (own_status, status, dead_status) == (0, 0, 0)
    async with (
        replicas.process(engines, **settings) as (_, anybody),
        replicas.Client(anybody.address, own) as ada,
        replicas.Client(anybody.address, wide) as gateway,
    ):
        await gateway.put_profile("ada")
        started = await ada.start("")
        assert (await gateway.get("ada")).session == started or (await gateway.get("ada")).session.id == started.id
        assert (await replicas.refused(ada.get("bob"))).reason == "FORBIDDEN"
        assert (await replicas.refused(anybody.get("ada"))).reason == "UNAUTHENTICATED"
        called = await command(engines, "call", "get", "ada", "--target", anybody.address, "--token", own)
        assert called[0] == 0
        assert called[1][0].endswith("of ada is active")
        called = await command(engines, "call", "get", "ada", "--target", anybody.address)
        assert (called[0], called[1][0]) == (1, "UNAUTHENTICATED UNAUTHENTICATED")
    assert dead.count(".") == 2
    assert await command(engines, "token", "ada") == (
        1,
        ["afterhours-grpc: AFTERHOURS_JWT_SECRET is not set: set it to the secret of the server"],
    )


async def test_a_person_calls_over_tls(engines: replicas.Engines, tmp_path_factory: pytest.TempPathFactory) -> None:
    """`call` takes a CA for TLS, and a client certificate with its key."""
    folder = tmp_path_factory.mktemp("tls")
    authority = keys.Authority(folder)
    certificate, key = authority.server()
    settings = {
        "AFTERHOURS_AUTH": "jwt",
        "AFTERHOURS_JWT_SECRET": keys.SECRET,
        "AFTERHOURS_TLS_CERT": str(certificate),
        "AFTERHOURS_TLS_KEY": str(key),
        "AFTERHOURS_TLS_CLIENT_CA": str(authority.file),
    }
    async with replicas.process(engines, **settings) as (_, client):
        words = ("call", "get", "ada", "--target", client.address, "--token", keys.token(), "--ca", str(authority.file))
        own = ("--cert", str(certificate), "--key", str(key))
        assert await command(engines, *words, *own) == (0, ["no active session"])
        assert (await command(engines, *words, "--timeout", "2"))[0] == 1
