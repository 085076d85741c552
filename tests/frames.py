"""HTTP/2 by hand, for clients that do what no library does."""

import struct

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY = 0, 1, 3, 4, 6, 7
ACK = 1
END_STREAM, END_HEADERS = 1, 4
_INITIAL_WINDOW_SIZE = 4


def frame(kind: int, payload: bytes = b"", *, flags: int = 0, stream: int = 0) -> bytes:
    """Encode a frame."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def _literal(name: str, value: str) -> bytes:
    """Encode a header without HPACK's tables."""
    return bytes([0, len(name), *name.encode(), len(value), *value.encode()])


def headers(path: str) -> bytes:
    """Encode the headers of a call."""
    fields = {
        ":method": "POST",
        ":scheme": "http",
        ":path": path,
        ":authority": "nobody",
        "content-type": "application/grpc",
        "te": "trailers",
    }
    return b"".join(_literal(*each) for each in fields.items())


def opening(window: int | None = None) -> bytes:
    """Encode what a client sends first; `window` is how many bytes of each stream the server may send."""
    return PREFACE + frame(SETTINGS, b"" if window is None else struct.pack(">HI", _INITIAL_WINDOW_SIZE, window))


def call(path: str, request: bytes, stream: int = 1) -> bytes:
    """Encode a call with one message."""
    message = b"\x00" + struct.pack(">I", len(request)) + request
    return frame(HEADERS, headers(path), flags=END_HEADERS, stream=stream) + frame(
        DATA, message, flags=END_STREAM, stream=stream
    )


def kinds(received: bytes) -> list[int]:
    """Return the kinds of the frames that were received whole."""
    found = []
    while len(received) >= 9:
        length = int.from_bytes(received[:3], "big")
        found.append(received[3])
        received = received[9 + length :]
    return found
