"""The commands, as a shell has them: what they print, where, and their exit status."""

import asyncio
import collections.abc
import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import typing
import urllib.parse

import asyncpg
import keys
import psutil
import pytest
import pytest_asyncio
import replicas

from afterhours_grpc.embedded import postgres
from afterhours_grpc.store import migration, schema

_numbers = itertools.count()

SECRET = "not-to-be-shown"


@dataclasses.dataclass(frozen=True)
class Ended:
    """A process that ended."""

    status: int
    out: str
    err: str

    def refusal(self) -> str:
        """Give the one line with which it refused to run."""
        assert (self.status, self.out) == (1, "")
        [line] = self.err.splitlines()
        assert line.startswith("afterhours-grpc: ")
        assert SECRET not in line
        return line


def inherited() -> dict[str, str]:
    """Give what a command needs of our environment."""
    return {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}


def begin(
    *arguments: str, env: collections.abc.Mapping[str, str] = {}, **options: typing.Any
) -> "subprocess.Popen[str]":
    """Start a command, in a session of its own as a terminal would."""
    return subprocess.Popen(
        [sys.executable, "-m", "afterhours_grpc", *arguments],
        env={**inherited(), **env},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    )


def finished(process: "subprocess.Popen[str]", within: float = 60) -> Ended:
    """Wait for the end of a process; kill one that does not come to it."""
    try:
        out, err = process.communicate(timeout=within)
    finally:
        process.kill()
        process.communicate()
    return Ended(process.returncode, out, err)


async def run(*arguments: str, env: collections.abc.Mapping[str, str] = {}) -> Ended:
    """Run a command to its end."""
    return await asyncio.to_thread(finished, begin(*arguments, env=env))


@pytest.fixture
async def empty(postgres_server: postgres.Postgres) -> collections.abc.AsyncIterator[str]:
    """Give the URL of a database with nothing in it."""
    name = f"empty_{next(_numbers)}"
    place = postgres_server.url.rpartition("/")[0]
    administrator = await asyncpg.connect(f"{place}/postgres")
    await administrator.execute(f"CREATE DATABASE {name} TEMPLATE template0")
    yield f"{place}/{name}"
    await administrator.execute(f"DROP DATABASE {name} WITH (FORCE)")
    await administrator.close()


@contextlib.asynccontextmanager
async def connected(url: str) -> collections.abc.AsyncIterator[asyncpg.Connection]:
    """Connect to a database."""
    connection = await asyncpg.connect(url)
    try:
        yield connection
    finally:
        await connection.close()


def changed(url: str, **parts: str) -> str:
    """Give a URL with other parts."""
    return urllib.parse.urlsplit(url)._replace(**parts).geturl()


async def test_serve_names_all_that_is_wrong() -> None:
    """Several bad settings are told in the same one line, and so are several missing ones."""
    bad, missing = await asyncio.gather(
        run("serve", env={**replicas.SERVABLE, "AFTERHOURS_DRAIN": "soon", "AFTERHOURS_LISTEN": "here"}), run("serve")
    )
    assert re.search("AFTERHOURS_DRAIN.*AFTERHOURS_LISTEN|AFTERHOURS_LISTEN.*AFTERHOURS_DRAIN", bad.refusal())
    for name in ("AFTERHOURS_AUTH", "DATABASE_URL", "AFTERHOURS_FUZZ_KEY"):
        assert name in missing.refusal()


async def test_a_transport_that_is_not_installed_is_refused(engines: replicas.Engines) -> None:
    """Without the extra, AFTERHOURS_TRANSPORT=native is refused in one line that says what to install."""
    hidden = "import sys; sys.modules['pygrpc_native'] = None; from afterhours_grpc import cli; cli.app(['serve'])"
    environment = engines.environment(AFTERHOURS_TRANSPORT="native")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", hidden, env=environment, stderr=asyncio.subprocess.PIPE
    )
    _, told = await process.communicate()
    assert process.returncode == 1
    assert told.decode().splitlines() == [
        "afterhours-grpc: AFTERHOURS_TRANSPORT=native is not installed: pip install 'afterhours-grpc[native]'"
    ]


async def test_serve_refuses_a_database_that_it_cannot_use(engines: replicas.Engines, empty: str) -> None:
    """An empty database and a nonsensical URL are refused in one line."""
    urls = {
        "afterhours-grpc migrate": empty,
        "DATABASE_URL cannot be used": f"postgresql://ada:{SECRET}@localhost:port/afterhours",
    }
    ended = await asyncio.gather(*(run("serve", env=engines.environment(DATABASE_URL=url)) for url in urls.values()))
    for told, each in zip(urls, ended, strict=True):
        assert told in each.refusal()


@pytest.mark.store
async def test_an_older_schema_is_refused_and_a_newer_one_accepted(engines: replicas.Engines) -> None:
    """A schema older than needed is refused in one line; a newer one is served, and is left as it is by migrate."""
    await engines.rows("UPDATE after_hours_schema SET version_num = '0000'")
    assert "run `afterhours-grpc migrate`" in (await run("serve", env=engines.environment())).refusal()
    await engines.rows("UPDATE after_hours_schema SET version_num = '9999'")
    async with replicas.process(engines) as (_, client):
        await client.put_profile("ada")
        assert (await client.start("ada")).user_id == "ada"
        migrated = await run("migrate", env=engines.environment())
        assert (migrated.status, migrated.err) == (0, "")
        assert "9999" in migrated.out
    assert [row["version_num"] for row in await engines.rows("SELECT * FROM after_hours_schema")] == ["9999"]


@pytest_asyncio.fixture(scope="module", loop_scope="module", autouse=True)
async def waiting(
    postgres_server: postgres.Postgres,
) -> collections.abc.AsyncIterator[dict[str, "subprocess.Popen[str]"]]:
    """Start first, since they wait for 10 s, the commands that are to give up; the last test looks at them."""
    place = postgres_server.url.rpartition("/")[0]
    async with contextlib.AsyncExitStack() as stack:
        administrator = await stack.enter_async_context(connected(f"{place}/postgres"))
        for name, template in (("waiting", "afterhours"), ("waiting_empty", "template0")):
            await administrator.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
            stack.push_async_callback(administrator.execute, f"DROP DATABASE {name} WITH (FORCE)")
        one = await stack.enter_async_context(connected(f"{place}/waiting"))
        await stack.enter_async_context(one.transaction())
        await one.execute("LOCK TABLE after_hours_schema")
        other = await stack.enter_async_context(connected(f"{place}/waiting_empty"))
        await other.execute(f"SELECT pg_advisory_lock({migration._ADVISORY_LOCK})")
        silent = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        silence = f"postgresql://ada:{SECRET}@127.0.0.1:{silent.getsockname()[1]}/ada"
        server = urllib.parse.urlsplit(place).netloc.rpartition("@")[2]
        stranger = f"postgresql://afterhours:{SECRET}@{server}/waiting"
        started = {
            "serve, nobody there": begin("serve", env=replicas.SERVABLE),
            "serve, no database": begin("serve", env={**replicas.SERVABLE, "DATABASE_URL": f"{place}/nowhere"}),
            "serve, a wrong password": begin("serve", env={**replicas.SERVABLE, "DATABASE_URL": stranger}),
            "migrate, a wrong password": begin("migrate", env={"DATABASE_URL": stranger}),
            "serve, silence": begin("serve", env={**replicas.SERVABLE, "DATABASE_URL": silence}),
            "migrate, a table locked": begin("migrate", env={"DATABASE_URL": f"{place}/waiting"}),
            "migrate, another migration": begin("migrate", env={"DATABASE_URL": f"{place}/waiting_empty"}),
        }
        try:
            yield started
        finally:
            for each in started.values():
                each.kill()
                each.communicate()


async def test_a_flag_overrides_the_environment(engines: replicas.Engines) -> None:
    """A flag of a setting's name overrides the environment, for better and for worse."""
    worse = await run("serve", "--drain", "soon", env=engines.environment())
    assert "AFTERHOURS_DRAIN" in worse.refusal()
    environment = engines.environment(AFTERHOURS_LISTEN="nowhere", AFTERHOURS_FUZZ_KEY="short")
    better = await replicas.Process(
        environment, "serve", "--listen", "127.0.0.1:0", "--fuzz-key", replicas.FUZZ_KEY
    ).start()
    try:
        client = await better.client()
        assert await client.health() == "SERVING"
        await client.close()
    finally:
        await better.stop()


@pytest.mark.parametrize("log_format", ["json", "console"])
async def test_stdout_says_where_it_listens_and_stderr_is_the_log(engines: replicas.Engines, log_format: str) -> None:
    """The one line on stdout is `listening on HOST:PORT`; the log is on stderr, and as JSON each line is an object."""
    process = begin("serve", env=engines.environment(AFTERHOURS_LOG_FORMAT=log_format))
    try:
        assert process.stdout
        line = await asyncio.to_thread(process.stdout.readline)
        assert re.fullmatch(r"listening on 127\.0\.0\.1:\d+\n", line)
        client = replicas.Client(line.split()[-1])
        assert await client.health() == "SERVING"  # by the time that it says so
        await client.put_profile("ada")
        assert (await replicas.refused(client.end("ada"))).reason == "NO_ACTIVE_SESSION"
        await client.close()
        process.send_signal(signal.SIGTERM)
    finally:
        ended = await asyncio.to_thread(finished, process)
    assert (ended.status, ended.out) == (0, "")
    logged = ended.err.splitlines()
    if log_format == "json":
        calls = [each for each in map(json.loads, logged) if each["event"] == "call"]
        assert [(each["method"], each["code"]) for each in calls] == [("PutProfile", "OK"), ("EndSession", "NOT_FOUND")]
    else:
        assert [line for line in logged if "PutProfile" in line and "OK" in line]


@pytest.mark.store
async def test_migrate_is_safe_to_run_again_and_at_once(engines: replicas.Engines, empty: str) -> None:
    """Four migrations of an empty database at once, and one after them, all end well, with one schema to serve on."""
    at_once = await asyncio.gather(*(run("migrate", env={"DATABASE_URL": empty}) for _ in range(4)))
    again = await run("migrate", "--database-url", empty, env={"DATABASE_URL": engines.database_url})
    for each in (*at_once, again):
        assert each == Ended(0, f"the schema is at version {schema.newest()}\n", "")
    async with replicas.replica(dataclasses.replace(engines, database_url=empty)) as (_, client):
        await client.put_profile("ada")
        assert (await client.start("ada")).user_id == "ada"


async def test_migrate_refuses_a_database_that_it_cannot_use(empty: str) -> None:
    """Migrate without a database, or without the right to create tables, says so in one line, at once."""
    role = f"reader_{next(_numbers)}"
    as_reader = changed(empty, netloc=f"{role}:{SECRET}@127.0.0.1:{urllib.parse.urlsplit(empty).port}")
    async with connected(empty) as administrator:
        await administrator.execute(f"CREATE ROLE {role} LOGIN PASSWORD '{SECRET}'")
        await administrator.execute("REVOKE CREATE ON SCHEMA public FROM public")
        try:
            unset, reader = await asyncio.gather(run("migrate"), run("migrate", env={"DATABASE_URL": as_reader}))
        finally:
            await administrator.execute(f"DROP ROLE {role}")
    assert "DATABASE_URL" in unset.refusal()
    assert "InsufficientPrivilegeError" in reader.refusal()


@pytest.mark.parametrize("command", ["migrate", "erase-user ada --reference case-1"])
async def test_a_command_that_is_stopped_was_not_done(engines: replicas.Engines, command: str) -> None:
    """A command that SIGTERM ends has the signal's exit status, and changed nothing."""
    await engines.rows("INSERT INTO after_hours_profiles VALUES ('ada', NULL, true, true)")
    async with replicas.locked(engines, "LOCK TABLE after_hours_schema, after_hours_profiles"):
        process = begin(*command.split(), env=engines.environment())
        await replicas.eventually(engines.in_flight, within=30)
        process.send_signal(signal.SIGTERM)
        ended = await asyncio.to_thread(finished, process)
    assert ended == Ended(128 + signal.SIGTERM, "", "")
    assert len(await engines.rows("SELECT FROM after_hours_profiles")) == 1


@pytest.mark.parametrize("command", ["serve", "dev"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_server_that_is_stopped_while_it_imports(command: str, number: signal.Signals) -> None:
    """SIGTERM and SIGINT end it with status 0 and without a word, wherever in an import they come."""
    stopped = """
import os, sys

number, sys.argv = int(sys.argv[2]), ["afterhours-grpc", sys.argv[1]]

class Trap:
    def __set_name__(self, owner, name):
        os.kill(os.getpid(), number)

class Finder:
    def find_spec(self, name, *_):
        if name == "afterhours_grpc.cli":
            type("Class", (), {"trap": Trap()})

sys.meta_path.insert(0, Finder())
from afterhours_grpc import __main__
__main__.main()
"""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", stopped, command, str(int(number))), env=inherited(), stderr=asyncio.subprocess.PIPE
    )
    _, written = await process.communicate()
    assert (process.returncode, written) == (0, b"")


async def test_an_argument_that_is_no_text() -> None:
    """An argument that is not UTF-8 is refused in one line, before it gets anywhere."""
    bad = os.fsdecode(b"\xffada")
    for each in await asyncio.gather(run("call", "get", bad), run("export-user", bad, "--reference", "x")):
        assert "UTF-8" in each.refusal()


async def test_a_person_can_call(engines: replicas.Engines) -> None:
    """`call` starts, shows, extends and ends a session, and prints what a person wants to know."""
    async with replicas.replica(engines) as (_, client):
        await client.put_profile("ada")
        here = {"AFTERHOURS_LISTEN": client.address}
        place = ("--latitude", "-33.4489", "--longitude", "-70.6693")
        started = await run("call", "start", "ada", *place, "--duration", "30m", "--target", client.address)
        assert (started.status, started.err) == (0, "")
        session = (await client.get("ada")).session
        assert f"session {session.id} of ada is active" in started.out
        assert session.expire_time.ToJsonString() in started.out
        assert session.expire_time.seconds - session.start_time.seconds == 1800
        assert "-33.4489" not in started.out
        got, extended = await asyncio.gather(
            run("call", "get", "ada", env=here), run("call", "extend", "ada", "--additional-duration", "60m", env=here)
        )
        assert (got.status, extended.status) == (0, 0)
        assert session.id in got.out
        assert "remaining" in got.out
        session = (await client.get("ada")).session
        assert session.expire_time.ToJsonString() in extended.out
        assert session.expire_time.seconds - session.start_time.seconds == 5400
        ended, nobody = await asyncio.gather(
            run("call", "end", "ada", env=here), run("call", "get", "somebody else", env=here)
        )
        assert (ended.status, ended.err) == (0, "")
        assert f"session {session.id} of ada is ended" in ended.out
        assert "USER" in ended.out
        assert nobody == Ended(0, "no active session\n", "")


async def test_a_script_can_call(engines: replicas.Engines) -> None:
    """With --json `call` prints the message as JSON, and a request_id given twice gives the same twice."""
    async with replicas.replica(engines) as (_, client):
        await client.put_profile("ada")
        options = ("--json", "--target", client.address)
        start = ("call", "start", "ada", "--latitude", "0", "--longitude", "0", "--request-id", replicas.request_id())
        twice = await asyncio.gather(*(run(*start, *options) for _ in range(2)))
        assert twice[0] == twice[1]
        assert twice[0].status == 0
        session = json.loads(twice[0].out)["session"]
        assert (session["userId"], session["state"]) == ("ada", "SESSION_STATE_ACTIVE")
        found, nobody = await asyncio.gather(run("call", "get", "ada", *options), run("call", "get", "bob", *options))
        assert json.loads(found.out)["active"] is True
        assert json.loads(nobody.out)["active"] is False
        extended = json.loads((await run("call", "extend", "ada", *options)).out)["session"]
        ended = json.loads((await run("call", "end", "ada", *options)).out)["session"]
        assert ended["id"] == extended["id"] == session["id"]
        assert ended["state"] == "SESSION_STATE_ENDED"


async def test_a_call_that_fails(engines: replicas.Engines) -> None:
    """A failed call prints its code, its reason and what to do, or the same as JSON, and its exit status is 1."""
    async with replicas.replica(engines) as (_, client):
        await client.put_profile("ada")
        session = await client.start("ada")
        start = ("--latitude", "0", "--longitude", "0", "--target", client.address)
        taken, unknown, told, bad = await asyncio.gather(
            run("call", "start", "ada", *start),
            run("call", "end", "bob", "--target", client.address),
            run("call", "start", "bob", *start, "--json"),
            run("call", "start", "", *start, "--duration", "1h", "--request-id", "once", "--json"),
        )
        assert [each.status for each in (taken, unknown, told, bad)] == [1, 1, 1, 1]
        assert taken.out == ""
        assert taken.err.startswith("ALREADY_EXISTS SESSION_ALREADY_ACTIVE\n")
        assert "end it before" in taken.err
        assert session.id in taken.err
        assert session.expire_time.ToJsonString() in taken.err
        assert unknown.err.startswith("NOT_FOUND NO_ACTIVE_SESSION\n")
        assert "start a new one" in unknown.err
        failure = json.loads(told.out)
        assert (failure["code"], failure["reason"]) == ("FAILED_PRECONDITION", "PROFILE_REQUIRED")
        assert "PutProfile" in failure["message"]
        failure = json.loads(bad.out)
        assert failure["reason"] == "INVALID_REQUEST"
        assert sorted(failure["violations"]) == ["request_id", "user_id"]


async def test_a_person_calls_over_tls(engines: replicas.Engines, tmp_path: pathlib.Path) -> None:
    """A client certificate means TLS, with --ca or without, so that no token leaves in the clear."""
    authority = keys.Authority(tmp_path)
    certificate, key = authority.server()
    settings = {
        "AFTERHOURS_AUTH": "jwt",
        "AFTERHOURS_JWT_SECRET": keys.SECRET,
        "AFTERHOURS_TLS_CERT": str(certificate),
        "AFTERHOURS_TLS_KEY": str(key),
    }
    pair = ("--cert", str(certificate), "--key", str(key))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        plain = f"127.0.0.1:{listener.getsockname()[1]}"
        async with replicas.replica(engines, **settings) as (service, _):
            get = ("call", "get", "ada", "--token", keys.token("ada"), "--target")
            good, untrusted, half, _ = await asyncio.gather(
                run(*get, service.address, "--ca", str(authority.file)),
                run(*get, service.address, *pair),
                run(*get, plain, "--ca", str(authority.file), *pair[:2]),
                run(*get, plain, *pair, "--timeout", "1"),
            )
        assert good == Ended(0, "no active session\n", "")
        assert "CERTIFICATE_VERIFY_FAILED" in untrusted.err
        assert "--key" in half.refusal()
        connection, _ = await asyncio.to_thread(listener.accept)
        with connection:
            assert connection.recv(1) == b"\x16"  # a handshake


async def test_a_person_calls_with_a_token(engines: replicas.Engines) -> None:
    """The token may come from the environment, where `ps` does not show it; one that no call can carry is refused."""
    jwt = {"AFTERHOURS_AUTH": "jwt", "AFTERHOURS_JWT_SECRET": keys.SECRET}
    async with replicas.replica(engines, **jwt) as (service, _):
        get = ("call", "get", "", "--target", service.address)
        good, bad = await asyncio.gather(
            run(*get, env={"AFTERHOURS_TOKEN": f"{keys.token('ada')}\n"}), run(*get, "--token", "sécret")
        )
    assert good == Ended(0, "no active session\n", "")
    assert "printable ASCII" in bad.refusal()
    assert "sécret" not in bad.err


async def test_what_a_person_is_shown_is_harmless(engines: replicas.Engines) -> None:
    """A user's id may be any text, and none of it is obeyed by the terminal that shows it."""
    user_id = "ada\x1b]0;title\x07\nbob"
    async with replicas.replica(engines) as (_, client):
        await client.put_profile(user_id)
        await client.start(user_id)
        shown = await run("call", "get", user_id, "--target", client.address)
    assert shown.status == 0
    assert "of ada\\x1b]0;title\\x07\\nbob is active" in shown.out


async def test_nobody_listens() -> None:
    """A call to where nobody listens says that, and where, and what to do."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{probe.getsockname()[1]}"
        ended = await run("call", "get", "ada", "--target", address)
    assert (ended.status, ended.out) == (1, "")
    assert ended.err.startswith("UNAVAILABLE\n")
    assert address in ended.err
    assert "afterhours-grpc dev" in ended.err
    assert len(ended.err.splitlines()) == 2


class Dev:
    """A running `dev`, and the lines that it printed for people to run."""

    def __init__(self, directory: pathlib.Path, **settings: str) -> None:
        words = ("dev", "--data-dir", str(directory), "--listen", "127.0.0.1:0")
        self.process = begin(*words, env=settings, cwd=directory.parent)
        self.directory = directory
        self.address = ""
        self.lines: list[str] = []

    async def ready(self) -> typing.Self:
        """Wait until it has printed what it prints."""
        assert self.process.stdout
        while len(self.lines) < 5:
            line = await asyncio.wait_for(asyncio.to_thread(self.process.stdout.readline), 60)
            assert line, await asyncio.to_thread(finished, self.process)
            if line.startswith("listening on "):
                self.address = line.removeprefix("listening on ").rstrip()
            if line.startswith("  "):
                self.lines.append(line.strip())
        return self

    async def typed(self, line: str) -> str:
        """Run a line as one would who pastes it into another terminal; give what it printed."""
        process = await asyncio.create_subprocess_exec(
            *("bash", "-c", line),
            cwd=self.directory.parent,
            env=inherited(),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        written, _ = await asyncio.wait_for(process.communicate(), 60)
        assert process.returncode == 0, written.decode()
        return written.decode()

    def engines(self) -> list[psutil.Process]:
        """Give its Postgres and its Redis, with all their processes."""
        return psutil.Process(self.process.pid).children(recursive=True)

    async def interrupted(self) -> Ended:
        """Press Ctrl-C, which goes to all that the terminal runs."""
        os.killpg(self.process.pid, signal.SIGINT)
        return await asyncio.to_thread(finished, self.process)


@contextlib.asynccontextmanager
async def dev(directory: pathlib.Path, **settings: str) -> collections.abc.AsyncIterator[Dev]:
    """Run `dev`; whatever happens, it is gone afterwards."""
    running = Dev(directory, **settings)
    try:
        yield await running.ready()
    finally:
        running.process.kill()
        await asyncio.to_thread(running.process.communicate)


async def test_dev_from_end_to_end(tmp_path: pathlib.Path) -> None:
    """The lines that dev prints work as they stand; Ctrl-C ends it with 0; its data are there when it runs again."""
    async with dev(tmp_path / "data") as running:
        by_grpcurl, extend, end, start, get = running.lines
        assert json.loads(await running.typed(by_grpcurl))["session"]["state"] == "SESSION_STATE_ACTIVE"
        assert "is active" in await running.typed(extend)
        assert "is ended" in await running.typed(end)
        assert "is active" in await running.typed(start)
        answer = json.loads(await running.typed(get + " --json"))
        session = answer["session"]["id"]
        engines = running.engines()
        assert len(engines) > 2
        ended = await running.interrupted()
        assert ended.status == 0, ended.err
        assert "Traceback" not in ended.err
        assert [each for each in engines if each.is_running()] == []
    async with dev(tmp_path / "data") as running:
        client = replicas.Client(running.address)
        assert (await client.get("demo")).session.id == session
        await client.close()
        assert (await running.interrupted()).status == 0


async def test_dev_leaves_nothing_behind_when_killed(tmp_path: pathlib.Path) -> None:
    """After kill -9 of dev its engines are gone within 5 s, and dev starts again on the same data."""
    async with dev(tmp_path / "data") as running:
        client = replicas.Client(running.address)
        session = await client.start("demo")
        await client.close()
        engines = running.engines()
        names = {each.name() for each in engines}
        assert any("postgres" in name for name in names)
        assert any("valkey" in name or "redis" in name for name in names)
        running.process.kill()
        _, left = await asyncio.to_thread(psutil.wait_procs, engines, timeout=5)
        assert left == []
    async with dev(tmp_path / "data") as running:
        client = replicas.Client(running.address)
        assert (await client.get("demo")).session.id == session.id
        await client.close()


async def test_dev_is_stopped_while_its_engines_start(tmp_path: pathlib.Path) -> None:
    """Ctrl-C at the first start, also twice, ends dev with status 0 and without a word, and leaves nothing behind."""
    process = begin("dev", "--data-dir", str(tmp_path / "data"), "--listen", "127.0.0.1:0")
    try:
        draft = tmp_path / "data" / "postgres" / "data.draft"
        await replicas.until((draft / "base").exists, within=30)
        engines = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGINT)
        assert await asyncio.to_thread(finished, process) == Ended(0, "", "")
        _, left = await asyncio.to_thread(psutil.wait_procs, engines, timeout=5)
        assert left == []
    finally:
        process.kill()


async def test_dev_keeps_to_the_environment_and_ends_with_its_engines(tmp_path: pathlib.Path) -> None:
    """Who sets AFTERHOURS_AUTH for dev gets it; when an engine dies, dev ends with status 1 and says which."""
    async with dev(tmp_path / "data", AFTERHOURS_AUTH="jwt", AFTERHOURS_JWT_SECRET=keys.SECRET) as running:
        async with replicas.Client(running.address) as anybody, replicas.Client(running.address, keys.token()) as ada:
            assert (await replicas.refused(anybody.get("demo"))).reason == "UNAUTHENTICATED"
            assert not (await ada.get("")).active
        [truth] = [
            each for each in running.engines() if each.ppid() == running.process.pid and "postgres" in each.name()
        ]
        truth.kill()
        ended = await asyncio.to_thread(finished, running.process)
    assert ended.status == 1
    assert "Postgres of dev ended" in ended.err.splitlines()[-1]
    assert "Traceback" not in ended.err


async def test_dev_is_for_this_machine_and_keeps_its_key(tmp_path: pathlib.Path) -> None:
    """It listens on loopback alone, and a damaged key is named, not replaced: another one would move everyone."""
    (tmp_path / "fuzz_key").touch()
    directory = ("dev", "--data-dir", str(tmp_path))
    jwt = ("--auth", "jwt", "--jwt-secret", keys.SECRET)
    calls, metrics, damaged = await asyncio.gather(
        run(*directory, *jwt, "--listen", "0.0.0.0:0"),
        run(*directory, *jwt, "--metrics-listen", "[::]:0"),
        run(*directory),
    )
    assert "AFTERHOURS_LISTEN" in calls.refusal()
    assert "AFTERHOURS_METRICS_LISTEN" in metrics.refusal()
    assert str(tmp_path / "fuzz_key") in damaged.refusal()


async def test_dev_without_an_engine(tmp_path: pathlib.Path) -> None:
    """A folder without Postgres' programs, and a data folder that cannot be made, are refused in one line."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    broken, occupied = await asyncio.gather(
        run("dev", "--data-dir", str(tmp_path / "data"), env={"AFTERHOURS_POSTGRES_BIN": str(tmp_path / "empty")}),
        run("dev", "--data-dir", str(tmp_path / "file")),
    )
    assert str(tmp_path / "empty") in broken.refusal()
    assert str(tmp_path / "file") in occupied.refusal()


async def test_what_is_not_to_be_had_is_waited_for_and_then_refused(
    waiting: dict[str, "subprocess.Popen[str]"],
) -> None:
    """What may pass, such as a silence, a wrong password or a lock, is waited for for 10 s, and told in one line."""
    for name, process in waiting.items():
        ended = await asyncio.to_thread(finished, process)
        assert ("lock" if name in {"migrate, a table locked", "migrate, another migration"} else "DATABASE_URL") in (
            ended.refusal()
        ), name
