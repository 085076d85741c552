"""A network between servers, or between clients and a server: a name that leads elsewhere, a peer that vanishes."""

import asyncio
import collections.abc
import typing
import urllib.parse

import proxy


class Network(proxy.Proxy):
    """A proxy whose connections can be stranded: what is sent on them is lost, and neither end is told."""

    def __init__(self, target: str) -> None:
        super().__init__(target)
        # How many connections were made, and how many of these, the first ones, are stranded.
        self.connected = 0
        self._stranded = 0

    @property
    def address(self) -> str:
        """Host and port."""
        return f"127.0.0.1:{self._port}"

    def strand(self) -> None:
        """Lose what is sent on the connections that there are; new ones are served."""
        self._stranded = self.connected

    def lead_to(self, target: str) -> None:
        """Connect new connections to another engine, as a name whose address changes does; old ones stay."""
        self._target = urllib.parse.urlsplit(target)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connected += 1
        number = self.connected

        def stranded() -> bool:
            return number <= self._stranded

        await super()._pass_on(
            typing.cast("asyncio.StreamReader", _Reader(reader, stranded)),
            typing.cast("asyncio.StreamWriter", _Writer(writer, stranded)),
        )


class _Reader:
    """What a client sends, unless its connection is stranded."""

    def __init__(self, reader: asyncio.StreamReader, stranded: collections.abc.Callable[[], bool]) -> None:
        self._reader = reader
        self._stranded = stranded

    async def read(self, count: int) -> bytes:
        while (chunk := await self._reader.read(count)) and self._stranded():
            pass
        return chunk


class _Writer:
    """What is sent to a client, unless its connection is stranded."""

    def __init__(self, writer: asyncio.StreamWriter, stranded: collections.abc.Callable[[], bool]) -> None:
        self._writer = writer
        self._stranded = stranded

    def write(self, chunk: bytes) -> None:
        if not self._stranded():
            self._writer.write(chunk)

    async def drain(self) -> None:
        await self._writer.drain()
