"""Tokens of a key set: by file and over https, while keys come and go, and while the endpoint is away."""

import asyncio
import collections
import collections.abc
import contextlib
import http.server
import json
import pathlib
import ssl
import threading
import time
import typing

import hypothesis
import keys
import pytest
import replicas
from hypothesis import strategies

from afterhours_grpc import app
from afterhours_grpc.rpc import key_sets

KEYS: dict[str, tuple[str, typing.Any]] = {
    f"{algorithm} key": (algorithm, make()) for algorithm, make in keys.ALGORITHMS.items()
}


def signed(key_id: str, **more: typing.Any) -> str:
    """Sign a token with a key of the set."""
    algorithm, key = KEYS[key_id]
    return keys.token(key=key, algorithm=algorithm, headers={"kid": key_id}, **more)


async def accepted(address: str, token: str) -> bool:
    """Whether a call with this token is answered; a refusal is UNAUTHENTICATED."""
    async with replicas.Client(address, token) as client:
        told = await replicas.outcome(client.get(""))
    assert not isinstance(told, replicas.Refusal) or told.reason == "UNAUTHENTICATED"
    return not isinstance(told, replicas.Refusal)


def by_file(file: pathlib.Path) -> dict[str, str]:
    """Give the settings of a server with a key set in a file."""
    return {"AFTERHOURS_AUTH": "jwt", "AFTERHOURS_JWKS_URL": file.as_uri()}


async def test_every_algorithm(engines: replicas.Engines, tmp_path: pathlib.Path) -> None:
    """RS256, ES256 and EdDSA are accepted, each with its own key only; a token that names no key is not."""
    file = tmp_path / "jwks.json"
    file.write_text(keys.key_set(KEYS))
    async with replicas.replica(engines, **by_file(file)) as (service, _):
        for name, (algorithm, key) in KEYS.items():
            assert await accepted(service.address, signed(name)), name
            stranger = keys.ALGORITHMS[algorithm]()
            assert not await accepted(
                service.address, keys.token(key=stranger, algorithm=algorithm, headers={"kid": name})
            )
            assert not await accepted(service.address, keys.token(key=key, algorithm=algorithm))
        assert not await accepted(service.address, keys.token(headers={"kid": "RS256 key"}))
        assert not await accepted(service.address, signed("RS256 key", lifetime=-60))


async def test_a_set_of_one_key_needs_no_key_id(engines: replicas.Engines, tmp_path: pathlib.Path) -> None:
    """Where there is one key, a token need not name it."""
    file = tmp_path / "jwks.json"
    file.write_text(keys.key_set({"only": KEYS["ES256 key"]}))
    async with replicas.replica(engines, **by_file(file)) as (service, _):
        assert await accepted(service.address, keys.token(key=KEYS["ES256 key"][1], algorithm="ES256"))


async def test_a_symmetric_key_in_a_set_is_no_key(engines: replicas.Engines, tmp_path: pathlib.Path) -> None:
    """A key set is of public keys: one with a secret alone is refused at the start, as is no file, and no JSON."""
    bad = {
        "oct": '{"keys": [{"kty": "oct", "kid": "one", "alg": "HS256", "k": "%s"}]}' % (44 * "k"),
        "empty": '{"keys": []}',
        "text": "no JSON",
        "list": "[]",
    }
    for name, text in bad.items():
        (tmp_path / name).write_text(text)
    for name in (*bad, "nowhere"):
        line = await replicas.not_served(engines, **by_file(tmp_path / name))
        assert "AFTERHOURS_JWKS_URL" in line, name


def no_key_set(file: typing.Any) -> None:
    """Send what no key set is, for as long as it is read."""
    while True:
        file.write(1_000_000 * b" ")


def slowly(file: typing.Any) -> None:
    """Send a byte now and then, sooner than any read gives up."""
    while True:
        file.write(b" ")
        time.sleep(0.05)


class Endpoint:
    """A key set over https, which counts its visitors; `send` writes the answer's body."""

    def __init__(self, authority: keys.Authority | None) -> None:
        endpoint = self
        self.text, self.status, self.visits, self.elsewhere = "", 200, 0, "http://127.0.0.1:1/"
        self.send: typing.Callable[[typing.Any], object] = lambda file: file.write(endpoint.text.encode())

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                endpoint.visits += 1
                self.send_response(endpoint.status)
                self.send_header("Location", endpoint.elsewhere)
                self.end_headers()
                with contextlib.suppress(OSError):  # the visitor went away
                    endpoint.send(self.wfile)

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/jwks.json"
        if authority:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*authority.server("endpoint"))
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
            self.url = self.url.replace("http:", "https:")
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def authority(tmp_path: pathlib.Path) -> keys.Authority:
    """Give a certificate authority."""
    return keys.Authority(tmp_path)


@pytest.fixture
def endpoint(authority: keys.Authority) -> collections.abc.Iterator[Endpoint]:
    """Give a key set over https."""
    serving = Endpoint(authority)
    with contextlib.closing(serving):
        yield serving


def by_https(endpoint: Endpoint, authority: keys.Authority) -> dict[str, str]:
    """Give the settings of a server with a key set over https; OpenSSL's own variable names whom it trusts."""
    return {
        "AFTERHOURS_AUTH": "jwt",
        "AFTERHOURS_JWKS_URL": endpoint.url,
        "SSL_CERT_FILE": str(authority.file),
    }


async def test_keys_come_while_it_serves(
    engines: replicas.Engines, endpoint: Endpoint, authority: keys.Authority
) -> None:
    """A key that is new is found, by one look however many tokens name it; strangers cause no more than that."""
    endpoint.text = keys.key_set({"ES256 key": KEYS["ES256 key"]})
    async with replicas.process(engines, **by_https(endpoint, authority)) as (_, client):
        assert await accepted(client.address, signed("ES256 key"))
        assert endpoint.visits == 1
        endpoint.text = keys.key_set(KEYS)

        assert all(await asyncio.gather(*(accepted(client.address, signed("EdDSA key")) for _ in range(5))))
        assert endpoint.visits == 2
        stranger = keys.ALGORITHMS["ES256"]()
        unknown = [
            keys.token(key=stranger, algorithm="ES256", headers={"kid": f"unknown {number}"}) for number in range(50)
        ]
        assert not any(await asyncio.gather(*(accepted(client.address, each) for each in unknown)))
        assert not await accepted(client.address, unknown[0])
        assert endpoint.visits == 3


async def test_the_endpoint_goes_away(engines: replicas.Engines, endpoint: Endpoint, authority: keys.Authority) -> None:
    """While the endpoint fails, or sends elsewhere, the keys that are known go on to serve."""
    endpoint.text = keys.key_set({"ES256 key": KEYS["ES256 key"]})
    async with replicas.process(engines, **by_https(endpoint, authority)) as (process, client):
        for status in (500, 302):
            endpoint.status = status
            visits = endpoint.visits

            async def looked(before: int = visits) -> bool:
                assert not await accepted(client.address, signed("EdDSA key"))
                return endpoint.visits > before

            await replicas.eventually(looked, within=15)
            assert await accepted(client.address, signed("ES256 key"))
        endpoint.close()
        assert await accepted(client.address, signed("ES256 key", scope="fresh"))
        await process.terminate()
        assert sum("jwks_unavailable" in line for line in process.lines) == 2


async def test_an_endpoint_that_is_away_at_the_start(
    engines: replicas.Engines, endpoint: Endpoint, authority: keys.Authority
) -> None:
    """The service starts without its keys, for sessions must end, and calls are answered once it has them."""
    endpoint.status, endpoint.text = 503, keys.key_set(KEYS)
    async with replicas.process(engines, **by_https(endpoint, authority)) as (_, client):
        assert await client.health() == "SERVING"
        assert not await accepted(client.address, signed("RS256 key"))
        endpoint.status = 200
        await replicas.eventually(lambda: accepted(client.address, signed("RS256 key")), within=15)


async def test_an_endpoint_that_is_not_trusted(engines: replicas.Engines, endpoint: Endpoint) -> None:
    """A certificate of nobody's is no endpoint: its keys are not taken."""
    endpoint.text = keys.key_set(KEYS)
    settings = {"AFTERHOURS_AUTH": "jwt", "AFTERHOURS_JWKS_URL": endpoint.url}
    async with replicas.process(engines, **settings) as (_, client):
        assert not await accepted(client.address, signed("RS256 key"))
        assert endpoint.visits == 0


# What JSON may say where a string is expected, or an array, or an object.
_ODD: tuple[typing.Any, ...] = (
    None,
    True,
    0,
    -1,
    1.5,
    10**400,
    "",
    "\0",
    "\ud800",
    "AQAB",
    [],
    ["RS256"],
    {},
    {"a": []},
)
_values = strategies.sampled_from(_ODD) | strategies.recursive(
    strategies.none() | strategies.booleans() | strategies.integers() | strategies.text(max_size=20),
    lambda inner: strategies.lists(inner, max_size=3) | strategies.dictionaries(strategies.text(max_size=3), inner),
    max_leaves=5,
)
_described: list[dict[str, typing.Any]] = json.loads(keys.key_set(KEYS))["keys"]
_members = strategies.sampled_from(
    ["kty", "kid", "use", "alg", "crv", "n", "e", "x", "y", "d", "p", "k", "key_ops", "x5c"]
)
_changed = strategies.builds(
    lambda key, changes: {**key, **changes},
    strategies.sampled_from(_described),
    strategies.dictionaries(_members, _values, min_size=1, max_size=3),
)
_sets = strategies.one_of(
    _values,
    strategies.fixed_dictionaries({"keys": _values}),
    strategies.fixed_dictionaries({"keys": strategies.lists(_changed | _values, max_size=4)}),
)


async def test_no_key_set_is_too_odd(tmp_path: pathlib.Path) -> None:
    """Whatever JSON a key set is, its keys are read, or KeySetError is raised; and those that are well serve."""
    file = tmp_path / "jwks.json"
    loop = asyncio.get_running_loop()
    met: collections.Counter[str] = collections.Counter()

    async def read(text: str) -> None:
        file.write_text(text, encoding="utf-8", errors="surrogatepass")
        key_set = key_sets.KeySet(file.as_uri())
        try:
            await key_set.refresh()
        except key_sets.KeySetError as error:
            met["refused"] += 1
            met[str(error).rpartition(": ")[2]] += 1
            return
        met["read"] += 1
        for id in ("RS256 key", "nobody's", None):
            found = await key_set.find(id)
            assert found is None or found.algorithm_name in key_sets.ALGORITHMS

    @hypothesis.settings(max_examples=300, deadline=None, database=None)
    @hypothesis.given(_sets)
    def probe(drawn: typing.Any) -> None:
        asyncio.run_coroutine_threadsafe(read(json.dumps(drawn)), loop).result(20)

    await asyncio.to_thread(probe)
    assert met["read"]
    assert met["refused"] == met["check AFTERHOURS_JWKS_URL"] > 0
    for text in (100_000 * "[", "1" * 100_000, "\ud800", '{"keys": [' + 50_000 * "[" + "]}"):
        file.write_text(text, encoding="utf-8", errors="surrogatepass")
        with pytest.raises(key_sets.KeySetError):
            await key_sets.KeySet(file.as_uri()).refresh()


@pytest.mark.parametrize("member", ["kid", "use", "alg"])
async def test_an_odd_key_among_others(engines: replicas.Engines, tmp_path: pathlib.Path, member: str) -> None:
    """A key of which a member is a list is ignored, beside others; alone it is refused at the start, in one line."""
    odd = {**_described[1], "kid": "odd", member: ["RS256"]}
    file = tmp_path / "jwks.json"
    file.write_text(json.dumps({"keys": [odd, *_described]}))
    async with replicas.replica(engines, **by_file(file)) as (service, _):
        assert await accepted(service.address, signed("ES256 key"))
    file.write_text(json.dumps({"keys": [odd]}))
    with pytest.raises(app.StartError, match="AFTERHOURS_JWKS_URL"):
        async with replicas.replica(engines, **by_file(file)):
            pass


async def test_an_endpoint_that_becomes_odd(
    engines: replicas.Engines, endpoint: Endpoint, authority: keys.Authority
) -> None:
    """A set that can no longer be read is a warning in the log, and the keys that are known go on to serve."""
    endpoint.text = keys.key_set({"ES256 key": KEYS["ES256 key"]})
    async with replicas.process(engines, **by_https(endpoint, authority)) as (process, client):
        assert await accepted(client.address, signed("ES256 key"))
        endpoint.text = json.dumps({"keys": [{**_described[0], "alg": ["RS256"]}]})
        assert not await accepted(client.address, signed("RS256 key"))
        assert endpoint.visits == 2
        assert await accepted(client.address, signed("ES256 key", scope="fresh"))
        await process.terminate()
    assert sum("jwks_unavailable" in line for line in process.lines) == 1
    assert not [line for line in process.lines if "Traceback" in line or "died" in line]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch, authority: keys.Authority) -> None:
    """Have servers in this process wait for a tenth of the time, and trust the endpoint."""
    monkeypatch.setattr(key_sets, "_FETCH_TIMEOUT", 0.5)
    monkeypatch.setattr(key_sets, "_COOLDOWN", 0.2)
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.file))


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("send", [no_key_set, slowly])
async def test_an_endpoint_that_does_not_come_to_an_end(
    engines: replicas.Engines, endpoint: Endpoint, send: typing.Callable[[typing.Any], None]
) -> None:
    """It delays neither the start nor a call whose key is known, others only for a while, and is asked again."""
    good, endpoint.send, endpoint.text = endpoint.send, send, keys.key_set({"ES256 key": KEYS["ES256 key"]})
    async with replicas.replica(engines, AFTERHOURS_AUTH="jwt", AFTERHOURS_JWKS_URL=endpoint.url) as (service, _):
        endpoint.send = good
        await replicas.eventually(lambda: accepted(service.address, signed("ES256 key")), within=10)
        endpoint.send = send
        unknown = asyncio.create_task(accepted(service.address, signed("EdDSA key")))
        assert await accepted(service.address, signed("ES256 key", scope="fresh"))
        assert not await asyncio.wait_for(unknown, 5)
        endpoint.send, endpoint.text = good, keys.key_set(KEYS)
        await replicas.eventually(lambda: accepted(service.address, signed("EdDSA key")), within=10)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    "text",
    [100_000 * "[", '{"keys": [{"kty": "RSA", "kid": "RS256 key", "alg": ["RS256"], "n": "AQAB", "e": "AQAB"}]}'],
    ids=["deep", "a list of algorithms"],
)
async def test_an_endpoint_that_talks_nonsense(engines: replicas.Engines, endpoint: Endpoint, text: str) -> None:
    """What is no key set is as good as no answer: the service starts, and fetches its keys later."""
    endpoint.text = text
    async with replicas.replica(engines, AFTERHOURS_AUTH="jwt", AFTERHOURS_JWKS_URL=endpoint.url) as (service, _):
        assert not await accepted(service.address, signed("RS256 key"))
        endpoint.text = keys.key_set(KEYS)
        await replicas.eventually(lambda: accepted(service.address, signed("RS256 key")), within=10)


@pytest.mark.usefixtures("impatient")
async def test_an_endpoint_that_redirects(engines: replicas.Engines, endpoint: Endpoint) -> None:
    """Keys are taken from where the operator says, and from nowhere that it redirects to."""
    with contextlib.closing(Endpoint(None)) as plain:
        plain.text = keys.key_set(KEYS)
        endpoint.status, endpoint.elsewhere = 302, plain.url
        async with replicas.replica(engines, AFTERHOURS_AUTH="jwt", AFTERHOURS_JWKS_URL=endpoint.url) as (service, _):
            assert not await accepted(service.address, signed("RS256 key"))
        assert endpoint.visits > 0
        assert plain.visits == 0
