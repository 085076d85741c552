"""What operators and tools see of a server: health, reflection, metrics, its port, and how it goes away."""

import asyncio
import pathlib
import signal
import socket
import sys
import typing
import urllib.request

import grpc
import pytest
import replicas
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

pytestmark = [pytest.mark.front_door, pytest.mark.timed]

SESSIONS = "afterhours.v1.SessionService"
PROFILES = "afterhours.v1.ProfileService"
V1 = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"
V1_ALPHA = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"


async def test_a_server_is_healthy(engines: replicas.Engines) -> None:
    """The process and both services are SERVING, and a service that there is not is NOT_FOUND."""
    async with replicas.replica(engines) as (_, client):
        for name in ("", SESSIONS, PROFILES):
            assert await client.health(name) == "SERVING"
        refusal = await replicas.refused(client.health("afterhours.v1.Nonsense"))
        assert refusal.code == "NOT_FOUND"


async def grpcurl(*arguments: str) -> tuple[int, str]:
    """Run grpcurl; give its exit status and what it wrote."""
    program = pathlib.Path(sys.executable).with_name("grpcurl")
    process = await asyncio.create_subprocess_exec(
        program, "-plaintext", *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    written, _ = await process.communicate()
    return process.returncode or 0, written.decode()


async def test_grpcurl_needs_no_protos(engines: replicas.Engines) -> None:
    """Grpcurl lists the services, describes them, and calls them, by reflection."""
    async with replicas.replica(engines) as (_, client):
        status, listed = await grpcurl(client.address, "list")
        assert status == 0, listed
        assert {SESSIONS, PROFILES, "grpc.health.v1.Health"} <= set(listed.split())
        status, described = await grpcurl(client.address, "describe", SESSIONS)
        assert status == 0, described
        for method in ("StartSession", "EndSession", "ExtendSession", "GetSession"):
            assert f"rpc {method} ( .afterhours.v1.{method}Request )" in described
        status, described = await grpcurl(client.address, "describe")
        assert status == 0, described
        assert "grpc.reflection.v1.ServerReflection is a service" in described
        status, answer = await grpcurl(
            "-d", '{"profile": {"user_id": "ada"}}', client.address, f"{PROFILES}/PutProfile"
        )
        assert status == 0, answer
        assert (await client.start("ada")).user_id == "ada"


async def reflected(
    client: replicas.Client, method: str, **question: typing.Any
) -> reflection_pb2.ServerReflectionResponse:
    """Ask reflection one question; its v1 differs from v1alpha by the name alone."""
    stream = client.channel.stream_stream(
        method,
        reflection_pb2.ServerReflectionRequest.SerializeToString,
        reflection_pb2.ServerReflectionResponse.FromString,
    )
    call = stream(iter([reflection_pb2.ServerReflectionRequest(**question)]), timeout=10)
    [answer] = [each async for each in call]
    return answer


@pytest.mark.parametrize("method", [V1, V1_ALPHA])
async def test_reflection(engines: replicas.Engines, method: str) -> None:
    """Reflection v1 and v1alpha list the services, themselves too, and give the file of each."""
    async with replicas.replica(engines) as (_, client):
        answer = await reflected(client, method, list_services="")
        names = {each.name for each in answer.list_services_response.service}
        assert {SESSIONS, PROFILES, "grpc.health.v1.Health", method.split("/")[1]} <= names
        for name in names:
            answer = await reflected(client, method, file_containing_symbol=name)
            assert answer.file_descriptor_response.file_descriptor_proto, name
        answer = await reflected(client, method, file_containing_symbol="afterhours.v1.Nonsense")
        assert answer.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]


async def test_reflection_can_be_turned_off(engines: replicas.Engines) -> None:
    """With AFTERHOURS_REFLECTION=off neither version of reflection is served, and the services are."""
    async with replicas.replica(engines, AFTERHOURS_REFLECTION="off") as (_, client):
        for method in (V1, V1_ALPHA):
            refusal = await replicas.refused(reflected(client, method, list_services=""))
            assert refusal.code == "UNIMPLEMENTED"
        await client.put_profile("ada")
        assert await client.health() == "SERVING"


async def test_a_port_has_one_server(engines: replicas.Engines) -> None:
    """A second server on the port of another refuses to start, in one line, and the first one has all the calls."""
    async with replicas.process(engines) as (_, client):
        line = await replicas.refusal_to_start(engines.environment(AFTERHOURS_LISTEN=client.address))
        assert line.startswith("afterhours-grpc: ")
        assert client.address in line
        assert "AFTERHOURS_LISTEN" in line
        assert await client.health() == "SERVING"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_server_drains(engines: replicas.Engines, number: signal.Signals) -> None:
    """From SIGTERM on a server is NOT_SERVING, refuses what is new, answers what is in flight, and ends with 0."""

    async def not_serving() -> bool:
        return await client.health() == "NOT_SERVING"

    async with replicas.process(engines) as (process, client):
        await client.put_profile("ada")
        await client.put_profile("bob")
        started = await client.start("ada")
        async with replicas.locked(engines, "SELECT FROM after_hours_sessions FOR UPDATE"):
            ending = asyncio.create_task(client.end("ada"))
            await replicas.eventually(engines.in_flight, within=10)
            process.signal(number)
            await replicas.eventually(not_serving, within=10)
            assert await client.health("afterhours.v1.ProfileService") == "NOT_SERVING"
            assert await client.health("") == "SERVING"
            for attempt in (client.start("bob"), client.put_profile("eve"), client.get("ada")):
                refusal = await replicas.refused(attempt)
                assert (refusal.code, refusal.reason) == ("UNAVAILABLE", "SHUTTING_DOWN")
                assert refusal.details["RetryInfo"].retry_delay.ToTimedelta().total_seconds() > 0
            assert not ending.done()
        ended = await ending
        assert ended.id == started.id
        assert ended.end_time.ToDatetime() > started.start_time.ToDatetime()
        assert await process.wait() == 0
    [row] = await engines.rows("SELECT user_id, end_reason FROM after_hours_sessions")
    assert tuple(row) == ("ada", "USER")
    assert await engines.rows("SELECT FROM after_hours_profiles WHERE user_id = 'eve'") == []


async def test_watchers_of_health_are_told(engines: replicas.Engines) -> None:
    """Who watches a service's health is told SERVING at once, and NOT_SERVING from SIGTERM on."""
    async with replicas.process(engines) as (process, client):
        stub: typing.Any = health_pb2_grpc.HealthStub(client.channel)
        watching = stub.Watch(health_pb2.HealthCheckRequest(service=SESSIONS), timeout=20)
        assert (await watching.read()).status == health_pb2.HealthCheckResponse.SERVING
        process.signal(signal.SIGTERM)
        assert (await watching.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert await process.wait() == 0


async def test_a_signal_while_it_starts(engines: replicas.Engines) -> None:
    """A server that is told to stop while it still waits for Postgres ends with 0, without a word."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        host, port = silent.getsockname()
        starting = await replicas.Process(
            engines.environment(DATABASE_URL=f"postgresql://ada@{host}:{port}/afterhours?sslmode=disable")
        ).start()
        try:
            accepted, _ = await asyncio.to_thread(silent.accept)  # now it waits, and its handlers are set
            with accepted:
                starting.signal(signal.SIGTERM)
                assert await starting.wait() == 0
        finally:
            await starting.stop()
    assert starting.lines == []


def free_port() -> int:
    """Give a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def scraped(address: str) -> str:
    """Give what Prometheus would be given."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as response:
        return typing.cast("str", response.read().decode())


async def test_metrics(engines: replicas.Engines) -> None:
    """The metrics count each call by method, code and reason, and name no user."""
    address = f"127.0.0.1:{free_port()}"
    async with replicas.process(engines, AFTERHOURS_METRICS_LISTEN=address) as (_, client):
        user = "somebody-whom-no-metric-names"
        assert (await replicas.refused(client.start(user))).reason == "PROFILE_REQUIRED"
        await client.put_profile(user)
        session = await client.start(user)
        await client.get(user)
        await client.get(user)
        told = await asyncio.to_thread(scraped, address)
        for method, code, reason, count in (
            ("StartSession", "FAILED_PRECONDITION", "PROFILE_REQUIRED", 1),
            ("StartSession", "OK", "", 1),
            ("PutProfile", "OK", "", 1),
            ("GetSession", "OK", "", 2),
        ):
            line = f'afterhours_calls_total{{code="{code}",method="{method}",reason="{reason}"}} {count}.0'
            assert line in told.splitlines()
        assert 'afterhours_call_seconds_count{method="GetSession"} 2.0' in told.splitlines()
        assert user not in told
        assert session.id not in told

        line = await replicas.refusal_to_start(engines.environment(AFTERHOURS_METRICS_LISTEN=address))
        assert line.startswith("afterhours-grpc: ")
        assert "AFTERHOURS_METRICS_LISTEN" in line
