"""GOAWAY for the clients of a server that drains, so that they move before its connections are closed.

grpc has a server send GOAWAY only by `stop`, which also closes the port, and answers CANCELLED, which nobody retries,
to the calls that arrive until the clients have read it. So the frame is written to the connections' sockets beside
grpc. It says that no further stream is welcome and that none is given up: streams that are open go on.
"""

import contextlib
import fcntl
import os
import pathlib
import socket
import stat
import struct

_DESCRIPTORS = pathlib.Path("/proc/self/fd")
_GOAWAY, _NO_ERROR, _LAST_STREAM = 7, 0, 2**31 - 1
_FRAME = struct.pack(">HBBBIII", 0, 8, _GOAWAY, 0, 0, _LAST_STREAM, _NO_ERROR)

# Linux, and not named by the standard library: the bytes that were written to a socket and not sent yet, and where
# tcp_info has the number of those that the other side has acknowledged.
_SIOCOUTQNSD = 0x894B
_ACKNOWLEDGED = struct.Struct("120xQ")


class GoAway:
    """Sends GOAWAY to each connection of a port once; needs Linux, and connections in the clear."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._told: set[object] = set()

    def send(self) -> None:
        """Send it to the connections that have not got it yet."""
        with contextlib.suppress(OSError):
            for path in _DESCRIPTORS.iterdir():
                with contextlib.suppress(OSError):  # it was closed meanwhile, or is no connection
                    if stat.S_ISSOCK(path.stat().st_mode):
                        self._visit(int(path.name))

    def _visit(self, descriptor: int) -> None:
        """Send GOAWAY if this is a connection of the port, now or when called again.

        The server's settings come first, and they have when anything was acknowledged. No frame of grpc's is cut in
        two: it writes a part of one only to a socket whose buffer is full.
        """
        with socket.socket(fileno=os.dup(descriptor)) as connection:
            name = connection.getsockname()
            if not isinstance(name, tuple) or name[1] != self._port:
                return
            peer = connection.getpeername()
            if peer in self._told:
                return
            information = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _ACKNOWLEDGED.size)
            (acknowledged,) = _ACKNOWLEDGED.unpack(information)
            if acknowledged and not any(fcntl.ioctl(connection, _SIOCOUTQNSD, bytes(4))):
                connection.send(_FRAME, socket.MSG_DONTWAIT)
                self._told.add(peer)
