"""The clients' side: ours for Python, blocking and not, the generated one for TypeScript, and what the docs show."""

import asyncio
import collections.abc
import datetime
import os
import pathlib
import re
import shutil
import signal
import sys

import grpc
import keys
import proxy
import pytest
import replicas
from afterhours.v1 import error_reason_pb2, profile_pb2, session_event_pb2, session_pb2

import afterhours_client
from afterhours_client import errors

ROOT = pathlib.Path(__file__).parent.parent
JWT = {"AFTERHOURS_AUTH": "jwt", "AFTERHOURS_JWT_SECRET": keys.SECRET}
QUARTER, BERLIN = datetime.timedelta(minutes=15), (52.516275, 13.377704)


def test_every_reason_is_a_class() -> None:
    """Each reason of the proto has its exception, and no other has."""
    names = {name.removeprefix("ERROR_REASON_") for name in error_reason_pb2.ErrorReason.DESCRIPTOR.values_by_name}
    assert set(errors.AfterhoursError._by_reason) == names - {"UNSPECIFIED"}


async def test_the_async_client(engines: replicas.Engines) -> None:
    """Every method does what its RPC does, and failures are exceptions by reason, with what goes with them."""
    async with (
        replicas.replica(engines, **JWT) as (service, _),
        afterhours_client.aio.Client(service.address, token=keys.token("root", keys.EVERYTHING)) as root,
        afterhours_client.aio.Client(service.address, token=lambda: keys.token("ada")) as ada,
        afterhours_client.aio.Client(service.address) as nobody,
    ):
        profile = profile_pb2.Profile(user_id="ada", identity_verified=True)
        assert await root.put_profile(profile) == await root.get_profile("ada") == profile
        started = await ada.start("", QUARTER, BERLIN)
        with pytest.raises(errors.SessionAlreadyActive) as already:
            await ada.start("", QUARTER, BERLIN)
        assert already.value.metadata["session_id"] == started.id
        assert already.value.code is grpc.StatusCode.ALREADY_EXISTS
        found = await root.get("ada")
        assert found
        assert found.id == started.id
        extended = await ada.extend("", QUARTER, request_id="00000000-0000-4000-8000-000000000001")
        assert await ada.extend("", QUARTER, request_id="00000000-0000-4000-8000-000000000001") == extended
        assert [each.id for each in await root.batch_get(["bob", "ada"])] == [started.id]
        near = root.active(near=BERLIN, radius_meters=2000)
        assert [each.id async for each in near] == [each.id async for each in root.active()] == [started.id]
        exact = await root.exact_location(started.id, "case 7")
        assert (exact.latitude, exact.longitude) == BERLIN
        assert (await ada.end("")).end_reason == session_pb2.END_REASON_USER
        assert await ada.get("") is None
        for _ in range(4):
            await ada.start("", QUARTER, BERLIN)
            await ada.end("")
        assert len([each async for each in ada.history("", page_size=2)]) == 5
        with pytest.raises(errors.InvalidRequest) as invalid:
            await ada.start("", datetime.timedelta(minutes=16), (91.0, 0.0))
        assert set(invalid.value.violations) == {"duration", "location.latitude"}
        assert "INVALID_ARGUMENT INVALID_REQUEST: " in str(invalid.value)
        with pytest.raises(errors.Unauthenticated):
            await nobody.get("ada")
        with pytest.raises(errors.Forbidden):
            await ada.delete_profile("ada")
        await root.delete_profile("ada")
        with pytest.raises(errors.ProfileNotFound):
            await ada.get_profile("")


async def test_the_blocking_client(engines: replicas.Engines) -> None:
    """The client whose calls block does the same."""

    def use(address: str) -> list[str]:
        with afterhours_client.Client(address, token=keys.token("root", keys.EVERYTHING)) as client:
            client.put_profile(profile_pb2.Profile(user_id="ada"))
            watch = client.watch(["ada"])
            started = client.start("ada", QUARTER, BERLIN)
            assert client.get_profile("ada").user_id == "ada"
            found = client.get("ada")
            assert found
            assert found.id == client.extend("ada", QUARTER).id == started.id
            assert [each.id for each in client.batch_get(["ada"])] == [each.id for each in client.active()]
            assert client.exact_location(started.id, "case 7").latitude == BERLIN[0]
            # From before the start: the history is watched as it was.
            events = iter(client.watch(["ada"], cursor=_beginning()))
            assert next(events).session.id == started.id
            client.end("ada")
            assert client.get("ada") is None
            assert len(list(client.history("ada"))) == 1
            assert [next(events).type, next(events).type] == [
                session_event_pb2.SESSION_EVENT_TYPE_EXTENDED,
                session_event_pb2.SESSION_EVENT_TYPE_ENDED,
            ]
            client.delete_profile("ada")
            with pytest.raises(errors.ProfileRequired):
                client.start("ada", QUARTER, BERLIN)
            watch.close()
            return list(watch.cursor)

    async with replicas.replica(engines, **JWT) as (service, _):
        assert await asyncio.to_thread(use, service.address) == []


def _beginning() -> str:
    # A client has no cursor before its first event.
    from afterhours_grpc.rpc import cursors  # noqa: PLC0415
    from afterhours_grpc.sessions import session  # noqa: PLC0415

    return cursors.encode(session.BEGINNING)


async def test_calls_go_on_while_servers_come_and_go(engines: replicas.Engines) -> None:
    """Calls are spread over the addresses of the target, and made again where a server was not to be had."""
    async with (
        replicas.process(engines) as (_, one),
        replicas.process(engines) as (doomed, other),
        afterhours_client.aio.Client(f"ipv4:{one.address},{other.address}") as client,
    ):
        for number in range(20):
            await client.put_profile(profile_pb2.Profile(user_id=f"user {number}"))

        async def use(number: int) -> None:
            for _ in range(10):
                await client.start(f"user {number}", QUARTER, BERLIN)
                await client.extend(f"user {number}", QUARTER)
                await client.end(f"user {number}")

        using = asyncio.gather(*(use(number) for number in range(20)))
        await replicas.until(lambda: any("StartSession" in line for line in doomed.lines))
        doomed.signal(signal.SIGTERM)
        await using
        rows = await engines.rows("SELECT end_reason, expires_at - started_at AS length FROM after_hours_sessions")
        # Each call applied once, whatever was made again.
        assert len(rows) == 200
        assert {(row["end_reason"], row["length"]) for row in rows} == {("USER", 2 * QUARTER)}


async def test_a_watch_goes_on_by_itself(engines: replicas.Engines) -> None:
    """Across a kill, a stop and a token that ends, a watch of the client's misses nothing."""
    tokens = 0

    def token() -> str:
        nonlocal tokens
        tokens += 1
        return keys.token("root", keys.EVERYTHING, lifetime=2)

    async with (
        replicas.process(engines, **JWT) as (killed, one),
        replicas.process(engines, **JWT) as (stopped, other),
        replicas.replica(engines, **JWT) as (service, _),
        replicas.Client(service.address, keys.token("root", keys.EVERYTHING)) as writer,
        afterhours_client.aio.Client(f"ipv4:{one.address},{other.address},{service.address}", token=token) as client,
    ):
        await writer.put_profile("ada")
        watch = client.watch()
        seen: list[tuple[str, str]] = []

        async def collect() -> None:
            async for event in watch:
                seen.append((event.cursor, event.session.id))  # noqa: PERF401 - looked at while it goes on

        collecting = asyncio.create_task(collect())

        async def begun() -> bool:
            return bool(watch.cursor)

        await replicas.eventually(begun, within=5)
        expected = []
        for turn in range(30):
            expected += 2 * [(await writer.start("ada")).id]
            await writer.end("ada")
            if turn == 8:
                killed.signal(signal.SIGKILL)
            if turn == 16:
                stopped.signal(signal.SIGTERM)
            await asyncio.sleep(0.1)

        async def complete() -> bool:
            return len(dict(seen)) == len(expected)

        await replicas.eventually(complete, within=10)
        assert list(dict(seen).values()) == expected
        assert tokens >= 2
        watch.close()
        await asyncio.wait_for(collecting, 5)


async def test_a_watch_that_cannot_go_on(engines: replicas.Engines) -> None:
    """What no retry mends ends the watch: missing rights, and a cursor that is none."""
    async with (
        replicas.replica(engines, **JWT) as (service, _),
        afterhours_client.aio.Client(service.address, token=keys.token("ada")) as ada,
    ):
        with pytest.raises(errors.Forbidden):
            await anext(aiter(ada.watch(["bob"])))
        with pytest.raises(errors.InvalidRequest):
            await anext(aiter(ada.watch(cursor="nonsense")))


def blocks(language: str) -> list[str]:
    """Give the examples of a language in docs/clients.md."""
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / "docs/clients.md").read_text(), re.DOTALL | re.MULTILINE)


async def ran(*command: str, within: float = 60, **environment: str) -> str:
    """Run a program to its end, and give what it printed; it must succeed."""
    process = await asyncio.create_subprocess_exec(
        *command,
        env={**os.environ, **environment},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    printed, _ = await asyncio.wait_for(process.communicate(), within)
    assert process.returncode == 0, printed.decode()
    return printed.decode()


@pytest.fixture
async def serving(engines: replicas.Engines) -> collections.abc.AsyncIterator[str]:
    """Give the address of a server with a profile for ada."""
    async with (
        replicas.process(engines, **JWT) as (_, client),
        replicas.Client(client.address, keys.token("root", keys.EVERYTHING)) as root,
    ):
        await root.put_profile("ada")
        yield client.address


@pytest.mark.parametrize("number", [0, 1])
async def test_the_python_of_the_docs(serving: str, number: int) -> None:
    """The examples for Python run as they stand, but for the address and the token."""
    example = blocks("python")[number].replace("127.0.0.1:50051", serving)
    printed = await ran(sys.executable, "-c", f"TOKEN = {keys.token('ada')!r}\n{example}")
    assert ("shown at", "1 ")[number] in printed
    assert len(printed.splitlines()) == (3, 2)[number]


async def test_the_python_of_the_docs_without_a_token(serving: str) -> None:
    """The example that waits for its watch ends when that is refused."""
    example = blocks("python")[1].replace("127.0.0.1:50051", serving)
    with pytest.raises(AssertionError, match="UNAUTHENTICATED"):
        await ran(sys.executable, "-c", f"TOKEN = 'old'\n{example}", within=20)


async def test_the_grpcurl_of_the_docs(serving: str) -> None:
    """The commands for grpcurl run as they stand, one after another, but for the address."""
    if not shutil.which("grpcurl"):
        pytest.skip("there is no grpcurl for this machine")
    [_, *_] = commands = [
        line.removeprefix("$ ")
        for line in next(block for block in blocks("console") if "grpcurl" in block).splitlines()
        if line.startswith("$ ")
    ]
    printed = []
    for command in commands[1:]:
        # A watch ends by its -max-time, with a status of its own.
        tolerant = f"{command} || true" if "Watch" in command else command
        printed.append(await ran("sh", "-c", tolerant.replace("127.0.0.1:50051", serving), TOKEN=keys.token("ada")))
    assert "SESSION_STATE_ACTIVE" in printed[0]
    assert '"active": true' in printed[1]
    assert "SESSION_EVENT_TYPE_HEARTBEAT" in printed[2]
    assert "END_REASON_USER" in printed[3]


@pytest.fixture
async def typescript(tmp_path: pathlib.Path) -> pathlib.Path:
    """Give a folder with the TypeScript example, compiled against the generated client with strict types."""
    if not shutil.which("npm"):
        pytest.skip("there is no Node here")
    folder = tmp_path / "typescript"
    folder.mkdir()
    for name in ("package.json", "package-lock.json", "tsconfig.json", "example.ts"):
        shutil.copy(ROOT / "clients/typescript" / name, folder)
    shutil.copytree(ROOT / "generated/typescript", folder / "generated")
    await ran("npm", "--prefix", str(folder), "ci", "--silent", "--no-audit", "--no-fund", within=120)
    await ran(str(folder / "node_modules/.bin/tsc"), "--project", str(folder), within=120)
    return folder


async def test_typescript(serving: str, typescript: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """A Node program starts, watches and ends a session by the generated client, and reads errors by reason.

    It gets through a server that vanished before it answered, noticed 20 times sooner than by the example's own pings,
    and through a token that has expired.
    """
    program = typescript / "example.js"
    hurried = program.read_text().replace("30_000", "1_500").replace("10_000", "500")
    assert "pingIntervalMs: 1_500" in hurried and "pingTimeoutMs: 500" in hurried
    program.write_text(hurried)
    token = tmp_path / "token"
    token.write_text(keys.token("ada", lifetime=-60))
    async with proxy.Proxy(f"http://{serving}") as way:
        way.swallow()
        running = asyncio.create_task(ran("node", str(program), f"http://{way.address}", str(token)))
        await replicas.until(lambda: way.accepted == 1)
        way.strand()
        way.swallow(False)
        await replicas.until(lambda: way.accepted == 2)
        await asyncio.sleep(0.5)  # the token is refused meanwhile
        token.write_text(keys.token("ada"))
        printed = await running
    first, refused, began, ended = printed.splitlines()
    session_id = first.removeprefix("started ")
    assert refused == "SESSION_ALREADY_ACTIVE"
    assert (began, ended) == (f"STARTED {session_id}", f"ENDED {session_id}")
    assert blocks("typescript") == [(ROOT / "clients/typescript/example.ts").read_text()]


async def test_a_person_watches(serving: str, engines: replicas.Engines) -> None:
    """`call watch` prints events as they come, and goes on after a cursor."""
    words = ("call", "watch", "--target", serving, "--token", keys.token("chat", "sessions:watch"))
    watching = await replicas.Process(engines.environment(), *words).start()
    try:

        async def printed(count: int) -> bool:
            return len(watching.lines) >= count

        await replicas.eventually(lambda: printed(1), within=10)
        async with replicas.Client(serving, keys.token("ada")) as ada:
            started = await ada.start("")
            await ada.end("")
        await replicas.eventually(lambda: printed(3), within=5)
        watching.signal(signal.SIGINT)
        assert await watching.wait() == 0
    finally:
        await watching.stop()
    beat, began, ended = (line.split() for line in watching.lines)
    assert (beat[1], began[1], ended[1]) == ("HEARTBEAT", "STARTED", "ENDED")
    assert began[2:4] == ended[2:4] == [started.id, "ada"]
    assert ended[-2] == "USER"
    again = await replicas.Process(engines.environment(), *words, "--json", "--cursor", began[-1]).start()
    try:

        async def both() -> bool:
            return len(again.lines) >= 2

        await replicas.eventually(both, within=10)
    finally:
        await again.stop()
    assert "HEARTBEAT" in again.lines[0]
    assert ended[-1] in again.lines[1]
