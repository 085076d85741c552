"""Several processes on one port: one supervisor, a dead worker comes back, and one clean end."""

import asyncio
import contextlib
import pathlib
import signal
import typing

import psutil
import pytest
import replicas

pytestmark = pytest.mark.timed

_COUNT = 3


def _workers(process: replicas.Process) -> list[psutil.Process]:
    return psutil.Process(process.pid).children()


async def _that_answer(process: replicas.Process, address: str) -> int:
    """Call over 40 new connections, and give how many workers have some of them."""
    clients = [replicas.Client(address) for _ in range(40)]
    try:
        await asyncio.gather(*(each.get("ada") for each in clients))
        return sum(any(_is_of(each, address) for each in worker.net_connections()) for worker in _workers(process))
    finally:
        await asyncio.gather(*(each.close() for each in clients))


def _blocked_signals(pid: int) -> int:
    """Return the mask of the signals that a process blocks."""
    lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
    [mask] = [line.split()[1] for line in lines if line.startswith("SigBlk:")]
    return int(mask, 16)


def _is_of(connection: typing.Any, address: str) -> bool:
    established: bool = connection.status == psutil.CONN_ESTABLISHED
    return established and connection.laddr.port == int(address.rpartition(":")[2])


@pytest.mark.front_door
async def test_workers_share_a_port(engines: replicas.Engines) -> None:
    """Every worker gets calls and blocks no signal, sessions end on time, one line has the port, SIGTERM ends all."""
    async with replicas.process(engines, AFTERHOURS_WORKERS=str(_COUNT)) as (process, client):
        workers = _workers(process)
        assert len(workers) == _COUNT
        await client.put_profile("ada")
        assert await _that_answer(process, client.address) == _COUNT
        assert {_blocked_signals(pid) for pid in (process.pid, *(each.pid for each in workers))} == {0}
        session = await client.start("ada", 2)

        async def ended() -> bool:
            rows = await engines.rows("SELECT id FROM after_hours_sessions WHERE ended_at = expires_at")
            return [str(row["id"]) for row in rows] == [session.id]

        await replicas.eventually(ended, within=4)
        process.signal(signal.SIGTERM)
        assert await process.wait() == 0
        assert not any(each.is_running() for each in workers)
    assert [each for each in process.lines if not each.startswith("{")] == [f"listening on {client.address}"]


@pytest.mark.front_door
async def test_a_call_in_flight_ends_before_its_worker(engines: replicas.Engines) -> None:
    """From SIGTERM on calls are told SHUTTING_DOWN, and the one in flight is answered."""

    async def refused() -> bool:
        outcome = await replicas.outcome(client.get("ada"))
        return isinstance(outcome, replicas.Refusal) and outcome.reason == "SHUTTING_DOWN"

    async with replicas.process(engines, AFTERHOURS_WORKERS="2") as (process, client):
        await client.put_profile("ada")
        await client.start("ada")
        async with replicas.locked(engines, "SELECT FROM after_hours_sessions FOR UPDATE"):
            ending = asyncio.create_task(client.end("ada"))
            await replicas.eventually(engines.in_flight, within=10)
            process.signal(signal.SIGTERM)
            await replicas.eventually(refused, within=10)
            assert not ending.done()
        assert (await ending).user_id == "ada"
        assert await process.wait() == 0


async def test_a_killed_worker_comes_back(engines: replicas.Engines) -> None:
    """A worker that is killed is started again, and the other one answers meanwhile."""
    async with replicas.process(engines, AFTERHOURS_WORKERS="2") as (process, client):
        await client.put_profile("ada")
        first, second = _workers(process)
        first.kill()
        first.wait(10)

        async def answered() -> bool:
            fresh = replicas.Client(client.address)
            try:
                return not isinstance(await replicas.outcome(fresh.get("ada")), replicas.Refusal)
            finally:
                await fresh.close()

        await replicas.eventually(answered, within=1)

        async def back() -> bool:
            return len(_workers(process)) == 2 and any("worker_restarted" in line for line in process.lines)

        await replicas.eventually(back, within=20)
        assert second in _workers(process)
        assert await _that_answer(process, client.address) == 2


async def test_workers_end_with_their_supervisor(engines: replicas.Engines) -> None:
    """Nobody serves on after a supervisor that was killed."""
    async with replicas.process(engines, AFTERHOURS_WORKERS="2") as (process, _):
        workers = _workers(process)
        process.signal(signal.SIGKILL)
        gone, _ = await asyncio.to_thread(psutil.wait_procs, workers, 15)
        assert len(gone) == 2


async def test_workers_have_their_port_to_themselves(engines: replicas.Engines) -> None:
    """A port that is taken is refused, by workers beside a server and by a server beside workers, in one line."""
    for first, second in (("1", "2"), ("2", "1"), ("2", "2")):
        async with replicas.process(engines, AFTERHOURS_WORKERS=first) as (_, client):
            environment = engines.environment(AFTERHOURS_LISTEN=client.address, AFTERHOURS_WORKERS=second)
            assert client.address in await replicas.refusal_to_start(environment)


async def test_what_keeps_one_from_starting_is_told_once(engines: replicas.Engines) -> None:
    """A database without a schema, and a number of workers that is none, are refused in one line."""
    empty = engines.database_url.rpartition("/")[0] + "/postgres"
    told = await replicas.refusal_to_start(engines.environment(AFTERHOURS_WORKERS="3", DATABASE_URL=empty))
    assert "migrate" in told
    for number in ("0", "65", "many"):
        assert "AFTERHOURS_WORKERS" in await replicas.refusal_to_start(engines.environment(AFTERHOURS_WORKERS=number))


async def test_metrics_ports_that_there_are_not(engines: replicas.Engines) -> None:
    """A metrics port of which the last worker's would be past 65535 is refused in one line."""
    overrides = {"AFTERHOURS_METRICS_LISTEN": "127.0.0.1:65535", "AFTERHOURS_WORKERS": "2"}
    refusal = await replicas.refusal_to_start(engines.environment(**overrides))
    assert "AFTERHOURS_METRICS_LISTEN" in refusal
    assert "65534" in refusal


async def test_a_stop_while_workers_start_is_a_clean_exit(engines: replicas.Engines) -> None:
    """SIGTERM before the workers serve ends all of them, with status 0."""
    process = await replicas.Process(engines.environment(AFTERHOURS_WORKERS="2")).start()
    try:

        async def started() -> bool:
            with contextlib.suppress(psutil.NoSuchProcess):
                return bool(_workers(process))
            return False

        await replicas.eventually(started, within=20)
        workers = _workers(process)
        process.signal(signal.SIGTERM)
        assert await process.wait() == 0
        assert not any(each.is_running() for each in workers)
    finally:
        await process.stop()
