"""A server of one empty unary call, on the settings of `afterhours_grpc.rpc.server`: the floor of its transport."""

import asyncio
import importlib
import sys
import typing

import grpc
import typer

# As the server's own; an answer of about the size of a status.
_OPTIONS = [
    ("grpc.so_reuseport", 0),
    ("grpc.server.max_pending_requests", 20_000),
    ("grpc.server.max_pending_requests_hard_limit", 40_000),
]
_ANSWER = bytes(16)
_SERVICE = "bench.Empty"


async def _answer(_: bytes, __: typing.Any) -> bytes:
    return _ANSWER


async def _serve(transport: str) -> None:
    if transport == "native":
        # An extra, measured only if it is asked for.
        server = importlib.import_module("pygrpc_native.aio").server()
    else:
        server = grpc.aio.server(options=_OPTIONS)
    methods: dict[str, typing.Any] = {"empty": grpc.unary_unary_rpc_method_handler(_answer)}
    # Both, as generated code does: the native transport serves by itself what is registered, and by a grpcio server
    # behind it what is not.
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, methods),))
    server.add_registered_method_handlers(_SERVICE, methods)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    typer.echo(f"listening on 127.0.0.1:{port}")
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(_serve(*sys.argv[1:]))
