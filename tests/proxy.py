"""What may go wrong between a server and its engines: a TCP proxy that does to their bytes what it is told."""

import asyncio
import collections.abc
import contextlib
import time
import typing
import urllib.parse

_CHUNK = 65536
# What no engine of ours says: neither RESP nor Postgres' protocol.
_GARBAGE = b"\x00what is this?\r\n"


class _Memory:
    """What a NAT gateway knows of a connection: when it was used last."""

    def __init__(self) -> None:
        self._used = time.monotonic()
        self._forgotten = False

    def forget(self) -> None:
        """Lose what is sent from now on."""
        self._forgotten = True

    def holds(self, seconds: float | None) -> bool:
        """Use the connection; return whether it had not been forgotten."""
        now = time.monotonic()
        self._forgotten |= seconds is not None and now - self._used > seconds
        self._used = now
        return not self._forgotten


class Proxy:
    """Passes bytes on to the engine at `target`; what it is told holds for connections old and new."""

    def __init__(self, target: str) -> None:
        self._target = urllib.parse.urlsplit(target)
        self._port = 0
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        # Bytes on their way to the engine, and to its client, vanish; the connections stay.
        self.swallow_requests = False
        self.swallow_replies = False
        # Seconds that bytes on their way to the engine, and to its client, are held back.
        self.delay_requests = 0.0
        self.delay_replies = 0.0
        # Bytes a second on their way to the engine, on each connection; 0 is no limit.
        self.request_rate = 0
        # Every reply is something else.
        self.garble_replies = False
        # Seconds after which an idle connection is forgotten, as a NAT gateway does: what is sent on it vanishes.
        self.forget_after: float | None = None
        self._budget: int | None = None
        self.cuts = 0
        # Connections so far, and what the network knows of each.
        self.accepted = 0
        self._memories: list[_Memory] = []

    @property
    def url(self) -> str:
        """The engine's URL, by way of the proxy."""
        account = self._target.netloc.rpartition("@")[0]
        return self._target._replace(netloc=f"{account}@127.0.0.1:{self._port}").geturl()

    @property
    def address(self) -> str:
        """Host and port of the proxy."""
        return f"127.0.0.1:{self._port}"

    def strand(self) -> None:
        """Lose what is sent on the connections that there are, as if the engine had vanished; new ones are served."""
        for memory in self._memories:
            memory.forget()

    def lead_to(self, target: str) -> None:
        """Pass new connections on to another engine, as a name does that now stands for it; old ones stay."""
        self._target = urllib.parse.urlsplit(target)

    def swallow(self, does: bool = True) -> None:
        """Fall silent in both directions, or speak again; what was swallowed is lost."""
        self.swallow_requests = self.swallow_replies = does

    def cut(self) -> None:
        """Cut all connections; new ones are taken."""
        for connection in self._connections:
            connection.cancel()

    def cut_after(self, count: int) -> None:
        """Pass on `count` more bytes to the engine, and then cut the connection that brought one more, once."""
        self._budget = count

    def refuse(self) -> None:
        """Cut all connections, and have new ones refused."""
        if self._server:
            self._server.close()
        self._server = None
        self.cut()

    async def accept(self) -> None:
        """Take connections, on the port of before."""
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """Refuse, and wait until every connection is gone."""
        self.refuse()
        await asyncio.sleep(0)  # for one that was taken just now
        self.cut()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        memory = _Memory()
        self._memories.append(memory)
        # A task of our own: streams would log the cancellation of theirs.
        connection = asyncio.create_task(self._pass_on(reader, writer, memory))
        self._connections.add(connection)
        connection.add_done_callback(self._connections.discard)
        # Also if it is cancelled before it begins.
        connection.add_done_callback(lambda _: writer.transport.abort())

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, memory: _Memory) -> None:
        with contextlib.suppress(OSError):
            engine, to_engine = await asyncio.open_connection(self._target.hostname, self._target.port)
            pumps = [
                asyncio.create_task(self._pump(reader, to_engine, self._request, memory)),
                asyncio.create_task(self._pump(engine, writer, self._reply, memory)),
            ]
            try:
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            finally:
                to_engine.transport.abort()
                for pump in pumps:
                    pump.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)

    async def _pump(
        self,
        source: asyncio.StreamReader,
        sink: asyncio.StreamWriter,
        change: collections.abc.Callable[[bytes], collections.abc.Awaitable[bytes]],
        memory: "_Memory",
    ) -> None:
        while chunk := await source.read(_CHUNK):
            if memory.holds(self.forget_after):
                sink.write(await change(chunk))
                await sink.drain()

    async def _request(self, chunk: bytes) -> bytes:
        await asyncio.sleep(self.delay_requests + (len(chunk) / self.request_rate if self.request_rate else 0))
        if self.swallow_requests:
            return b""
        if self._budget is not None:
            if len(chunk) > self._budget:
                # The engine gets the beginning of a request, and its end never.
                self._budget = None
                self.cuts += 1
                raise ConnectionResetError
            self._budget -= len(chunk)
        return chunk

    async def _reply(self, chunk: bytes) -> bytes:
        await asyncio.sleep(self.delay_replies)
        if self.swallow_replies:
            return b""
        return _GARBAGE if self.garble_replies else chunk

    async def __aenter__(self) -> typing.Self:
        await self.accept()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
