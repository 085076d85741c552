"""What the Python client makes of what went wrong: typed errors, whatever a proxy did to them, and clear refusals."""

import asyncio
import collections.abc
import contextlib
import copy
import datetime
import math
import pickle
import typing

import grpc
import keys
import pytest
import replicas
from google.protobuf import any_pb2, message
from google.rpc import error_details_pb2, status_pb2

import afterhours_client
from afterhours_client import aio, errors

JWT = {"AFTERHOURS_AUTH": "jwt", "AFTERHOURS_JWT_SECRET": keys.SECRET}
QUARTER, NOWHERE = datetime.timedelta(minutes=15), (91.0, 0.0)


async def raised(address: str, **arguments: typing.Any) -> list[Exception]:
    """Get a session with a client of each kind, which must fail; return what they raise."""

    def block() -> None:
        with afterhours_client.Client(address, **arguments) as client:
            client.get("ada")

    async def wait() -> None:
        async with aio.Client(address, **arguments) as client:
            await client.get("ada")

    found = await asyncio.gather(asyncio.to_thread(block), wait(), return_exceptions=True)
    assert all(isinstance(each, Exception) for each in found)
    return typing.cast("list[Exception]", found)


async def test_an_error_is_copied_and_pickled(engines: replicas.Engines) -> None:
    """An error keeps its class and all that it says in a copy, and in the process that it is sent to."""
    async with replicas.replica(engines) as (service, _), aio.Client(service.address) as client:
        with pytest.raises(errors.InvalidRequest) as invalid:
            await client.start("ada", QUARTER, NOWHERE)
    for error in (invalid.value, errors.ClientClosed()):
        for each in (copy.copy(error), copy.deepcopy(error), pickle.loads(pickle.dumps(error))):  # noqa: S301 - ours
            assert type(each) is type(error)
            assert (str(each), vars(each)) == (str(error), vars(error))
    assert invalid.value.violations


class _Refusing(grpc.GenericRpcHandler):
    """Refuses each call, with details that it is given."""

    def __init__(self, details: bytes) -> None:
        self._details = details

    def service(self, _: grpc.HandlerCallDetails) -> typing.Any:
        async def refuse(_: bytes, context: typing.Any) -> None:
            trailers = (("grpc-status-details-bin", self._details),)
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "a message of the proxy's", trailers)

        return grpc.unary_unary_rpc_method_handler(refuse)


@contextlib.asynccontextmanager
async def refusing(details: bytes) -> collections.abc.AsyncIterator[str]:
    """Run a server that refuses each call, as a service behind a proxy may appear; give its address."""
    server = grpc.aio.server(handlers=[_Refusing(details)])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


def _status(*details: any_pb2.Any) -> bytes:
    status: message.Message = status_pb2.Status(code=9, message="another message", details=details)
    return status.SerializeToString()


async def test_a_message_that_a_proxy_changed() -> None:
    """The reason counts, whatever became of the message beside it."""
    info = any_pb2.Any()
    info.Pack(error_details_pb2.ErrorInfo(reason="PROFILE_REQUIRED", domain="afterhours.v1"))
    async with refusing(_status(info)) as address:
        for error in await raised(address):
            assert isinstance(error, errors.ProfileRequired)
            assert str(error) == "FAILED_PRECONDITION PROFILE_REQUIRED: a message of the proxy's"


@pytest.mark.parametrize(
    "details", [b"\xff", _status(any_pb2.Any(type_url="type.googleapis.com/google.rpc.ErrorInfo", value=b"\xff"))]
)
async def test_details_that_are_none(details: bytes) -> None:
    """A failure whose details cannot be read is an error without a reason."""
    async with refusing(details) as address:
        for error in await raised(address):
            assert isinstance(error, errors.AfterhoursError)
            assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "")


async def test_a_token_as_a_file_has_it(engines: replicas.Engines) -> None:
    """A token may end with a line break; one that metadata cannot carry is refused, and not repeated."""
    async with replicas.replica(engines, **JWT) as (service, _):
        for token in (f"{keys.token('ada')}\n", lambda: f" {keys.token('ada')}\r\n"):
            async with aio.Client(service.address, token=token) as client:
                assert await client.get("") is None
        for token in ("sécret", "two\nlines", "a\0b"):
            for error in await raised(service.address, token=token):
                assert isinstance(error, ValueError)
                assert "printable ASCII" in str(error)
                assert token not in repr(error)


async def test_a_deadline_that_never_comes(engines: replicas.Engines) -> None:
    """An endless timeout, and one of a million years, are no timeout that has passed."""

    def block(address: str) -> None:
        with afterhours_client.Client(address, timeout=math.inf) as client:
            assert client.get("ada") is None

    async with replicas.replica(engines) as (service, _), aio.Client(service.address, timeout=3e13) as client:
        assert await client.get("ada") is None
        assert await client.get("ada", timeout=math.inf) is None
        await asyncio.to_thread(block, service.address)


async def test_a_task_that_cancels_itself(engines: replicas.Engines) -> None:
    """A cancellation that is pending when a call or a watch begins, as after Ctrl-C, ends the task as cancelled."""

    async def interrupted(client: aio.Client, *, watch: bool) -> None:
        task = asyncio.current_task()
        assert task
        task.cancel()
        if watch:
            await anext(aiter(client.watch()))
        else:
            await client.get("ada")

    async with replicas.replica(engines) as (service, _), aio.Client(service.address) as client:
        for watch in (False, True):
            with pytest.raises(asyncio.CancelledError):
                await asyncio.create_task(interrupted(client, watch=watch))
        assert await client.get("ada") is None


async def test_one_id_is_no_list(engines: replicas.Engines) -> None:
    """An id where a list of ids belongs is refused; its characters would be taken for users."""
    async with replicas.replica(engines) as (service, _), aio.Client(service.address) as client:
        with pytest.raises(TypeError, match="list of user ids"):
            client.watch("ada")
        with pytest.raises(TypeError, match="list of user ids"):
            await client.batch_get("ada")
