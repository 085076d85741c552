"""What the driver leaves behind where an attempt to connect is cancelled."""

import asyncio
import gc
import typing

import replicas

from afterhours_grpc.store import driver


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
