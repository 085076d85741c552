"""The bodies of the calls, made before the clock runs: frames as gRPC has them, each of another user."""

import collections.abc
import pathlib
import struct
import urllib.parse
import uuid

from afterhours.v1 import session_pb2, session_service_pb2
from google.protobuf import duration_pb2

OPERATIONS = ("start", "get", "extend", "end")

_PLACE = session_pb2.Location(latitude=52.516275, longitude=13.377704)
_QUARTER = duration_pb2.Duration(seconds=900)
_HALF_HOUR = duration_pb2.Duration(seconds=1800)

_Request = (
    session_service_pb2.StartSessionRequest
    | session_service_pb2.GetSessionRequest
    | session_service_pb2.ExtendSessionRequest
    | session_service_pb2.EndSessionRequest
)


def user(number: int) -> str:
    """Give a user id, as the fill statements make them too."""
    return f"user {number}"


def write(path: pathlib.Path, payloads: collections.abc.Iterable[bytes]) -> pathlib.Path:
    """Write one frame a payload, and give the path."""
    path.write_bytes(b"".join(b"\0" + struct.pack(">I", len(payload)) + payload for payload in payloads))
    return path


def ours(
    operation: str, numbers: collections.abc.Iterable[int], *, with_request_ids: bool = False
) -> collections.abc.Iterator[bytes]:
    """Give a request of each of these users to afterhours.v1.SessionService."""
    for number in numbers:
        request_id = str(uuid.uuid4()) if with_request_ids else ""
        request: _Request
        match operation:
            case "start":
                request = session_service_pb2.StartSessionRequest(
                    user_id=user(number), duration=_HALF_HOUR, location=_PLACE, request_id=request_id
                )
            case "extend":
                request = session_service_pb2.ExtendSessionRequest(
                    user_id=user(number), additional_duration=_QUARTER, request_id=request_id
                )
            case "end":
                request = session_service_pb2.EndSessionRequest(user_id=user(number), request_id=request_id)
            case _:
                request = session_service_pb2.GetSessionRequest(user_id=user(number))
        yield request.SerializeToString()


def express(operation: str, users: int) -> collections.abc.Iterator[bytes]:
    """Give a whole HTTP/1.1 request of each user to the Express service."""
    more = {
        "start": f',"duration":1800,"latitude":{_PLACE.latitude},"longitude":{_PLACE.longitude}',
        "extend": ',"additional_duration":900',
    }.get(operation, "")
    for number in range(users):
        if operation == "get":
            query = urllib.parse.urlencode({"user_id": user(number)})
            yield f"GET /session?{query} HTTP/1.1\r\nHost: bench\r\n\r\n".encode()
        else:
            body = f'{{"user_id":"{user(number)}"{more}}}'
            yield (
                f"POST /session/{operation} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\n\r\n{body}"
            ).encode()


def lease(operation: str, leases: int) -> collections.abc.Iterator[bytes]:
    """Give a request of each lease to etcdserverpb.Lease, whose protos are no dependency of ours."""
    for number in range(1, leases + 1):
        # LeaseGrantRequest { int64 TTL = 1; int64 ID = 2; }; in the three others ID = 1.
        yield b"\x08" + _varint(1800) + b"\x10" + _varint(number) if operation == "start" else b"\x08" + _varint(number)


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*encoded, value))
