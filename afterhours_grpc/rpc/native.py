"""The native transport, with a wait for slow readers that takes no thread."""

import asyncio
import typing

import pygrpc_native.aio

# Seconds between two attempts to send to a client that does not read: doubled each time.
_SHORTEST_PAUSE = 0.005
_LONGEST_PAUSE = 0.1


class Server(pygrpc_native.aio.Server):
    """A server of pygrpc-native.

    Its own waits for a client that does not read in a thread of the event loop's default executor. A few such clients
    take all of those threads, and then no other stream goes on, and no name is resolved for Postgres and Redis.
    """

    async def _send(self, call: typing.Any, context: typing.Any, response: typing.Any) -> bool:
        """Send a message of a stream. Return whether the stream is still open."""
        data = self._encode(call, context, response)
        if data is None or self._front is None:
            return False
        context._initial_sent = True  # noqa: SLF001 - as in the method that this one replaces
        pause = _SHORTEST_PAUSE
        while (sent := self._front.stream_try_send(call.call_id, data)) == pygrpc_native.STREAM_FULL:
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        return sent != pygrpc_native.STREAM_CLOSED
