"""Real engines: one Postgres and one Redis for a test run's worker, a database of its own for each test."""

import asyncio
import collections.abc
import itertools
import os
import pathlib
import signal

import asyncpg
import hypothesis
import pytest
import redis as redis_client
import replicas

from afterhours_grpc import app
from afterhours_grpc.embedded import postgres, redis
from afterhours_grpc.store import schema

_numbers = itertools.count()

# A loaded machine is slow, and that is no fault of what is tested.
hypothesis.settings.register_profile("loaded", deadline=None)
hypothesis.settings.load_profile("loaded")

# A shell that runs the tests in the background ignores SIGINT, and so would all that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Nothing here needs to survive a power cut, and everything is to be quick.
_FAST = {"fsync": "off", "full_page_writes": "off", "max_connections": "300"}


def postgres_bin() -> pathlib.Path | None:
    """Give the folder of the Postgres to test on, or None for the embedded one."""
    found = os.environ.get("AFTERHOURS_POSTGRES_BIN")
    return pathlib.Path(found) if found else None


@pytest.fixture(scope="session")
def postgres_server(
    tmp_path_factory: pytest.TempPathFactory,
) -> collections.abc.Iterator[postgres.Postgres]:
    """Run a Postgres, migrated."""
    directory = tmp_path_factory.mktemp("postgres")
    with postgres.Postgres(directory, bindir=postgres_bin(), settings=_FAST) as server:
        asyncio.run(schema.migrate(server.url))
        yield server


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> collections.abc.Iterator[redis.Redis]:
    """Run a Redis."""
    with redis.Redis(tmp_path_factory.mktemp("redis")) as server:
        yield server


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run what is marked `front_door` on both transports."""
    if "transport" in metafunc.fixturenames and metafunc.definition.get_closest_marker("front_door"):
        metafunc.parametrize("transport", ["grpcio", "native"], scope="module")


@pytest.fixture(scope="session")
def transport() -> str:
    """Name the transport, which is the default one for what is not marked."""
    return "grpcio"


@pytest.fixture(autouse=True)
def _farewell(monkeypatch: pytest.MonkeyPatch) -> None:
    """Close servers of this process without waiting for late callers, half a second each; tests of that use others."""
    monkeypatch.setattr(app, "_FAREWELL", 0.0)


@pytest.fixture
async def engines(
    postgres_server: postgres.Postgres, redis_server: redis.Redis, transport: str
) -> collections.abc.AsyncIterator[replicas.Engines]:
    """Give a test its own copy of the migrated database, and an empty Redis."""
    name = f"test_{next(_numbers)}"
    administrator = await asyncpg.connect(postgres_server.url.rpartition("/")[0] + "/postgres")
    await administrator.execute(f"CREATE DATABASE {name} TEMPLATE afterhours")
    with redis_client.Redis.from_url(redis_server.url) as client:
        client.flushall()
    yield replicas.Engines(postgres_server.url.rpartition("/")[0] + f"/{name}", redis_server.url, transport)
    await administrator.execute(f"DROP DATABASE {name} WITH (FORCE)")
    await administrator.close()
