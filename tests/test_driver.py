"""What the driver leaves behind where an attempt to connect is cancelled."""

import asyncio
import gc
import typing
import urllib.parse

import proxy
import replicas

from afterhours_grpc.store import connections, driver


async def test_a_cancelled_attempt_leaves_nothing(engines: replicas.Engines) -> None:
    """An attempt that is cancelled, at whatever step, ends as cancelled, and asyncio has nothing to complain of."""
    complaints: list[typing.Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    for steps in range(40):
        attempt = asyncio.create_task(driver.connect(engines.database_url))
        for _ in range(steps):
            await asyncio.sleep(0)
        attempt.cancel()
        await asyncio.wait({attempt})
        if not attempt.cancelled():
            attempt.result().terminate()
    await asyncio.sleep(0.1)
    gc.collect()
    assert complaints == []


async def test_a_connection_that_nobody_waits_for_any_more(engines: replicas.Engines) -> None:
    """One that is made beside an attempt at a silent host, and cancelled while that attempt is given up, is closed."""
    async with proxy.Proxy(engines.database_url) as silent:
        silent.swallow()
        parts = urllib.parse.urlsplit(engines.database_url)
        account, _, host = parts.netloc.rpartition("@")
        url = parts._replace(netloc=f"{account}@{silent.address},{host}").geturl()
        connecting = asyncio.create_task(connections.connect(url, {"application_name": "unwanted"}))
        found = """SELECT FROM pg_stat_activity WHERE application_name = 'unwanted' AND state = 'idle'
            AND query LIKE '%pg_control_system%'"""

        async def connected() -> bool:
            return bool(await engines.rows(found))

        await replicas.eventually(connected, within=5)
        assert not connecting.done()
        connecting.cancel()
        await asyncio.wait({connecting})
        assert connecting.cancelled()

        async def closed() -> bool:
            return not await connected()

        await replicas.eventually(closed, within=1)


async def test_the_server_finds_out_that_a_process_vanished(engines: replicas.Engines) -> None:
    """It asks an idle connection after 15 s whether its client is there, not after the two hours of the kernel."""
    connection = await connections.connect(engines.database_url)
    try:
        for name, value in connections.KEEPALIVE_SETTINGS.items():
            assert await connection.fetchval("SELECT setting FROM pg_settings WHERE name = $1", name) == value
    finally:
        connection.terminate()
