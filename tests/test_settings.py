"""Settings that nothing could be served with: each is refused in one line, which repeats nothing of the value."""

import os

import keys
import pytest
import replicas
from cryptography.hazmat.primitives import serialization

from afterhours_grpc import address, settings

SECRET = "not-to-be-shown"
NO_TEXT = os.fsdecode(b"\xff" + SECRET.encode() + b"\xff" * 32)


def public_key() -> str:
    """Return a public key as a file of it has it."""
    key = keys.ALGORITHMS["RS256"]().public_key()
    encoding, form = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    return str(key.public_bytes(encoding, form).decode())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AFTERHOURS_JWT_SECRET", NO_TEXT),
        ("AFTERHOURS_JWT_SECRET", public_key()),
        ("AFTERHOURS_JWKS_URL", "https://"),
        ("AFTERHOURS_JWKS_URL", "https:///jwks.json"),
        ("AFTERHOURS_JWKS_URL", "https://issuer:port/jwks.json"),
        ("AFTERHOURS_JWKS_URL", "https://[::1/jwks.json"),
        ("AFTERHOURS_JWKS_URL", "https://issuer/jwks .json"),
        ("AFTERHOURS_JWKS_URL", f"https://me:{SECRET}@issuer/jwks.json"),
        ("AFTERHOURS_RATE_LIMIT", "100001"),
        ("AFTERHOURS_RATE_LIMIT", 5000 * "9"),
        ("AFTERHOURS_TLS_KEY", ""),
        ("AFTERHOURS_LISTEN", "[]:0"),
        ("AFTERHOURS_LISTEN", "127.0.0.1\n:0"),
        ("AFTERHOURS_LISTEN", "127.0.0.1:" + 5000 * "9"),
        ("AFTERHOURS_METRICS_LISTEN", "[::1:0"),
        ("AFTERHOURS_METRICS_LISTEN", "metrics..test:0"),
        ("AFTERHOURS_LISTEN", 64 * "a" + ":0"),
        ("AFTERHOURS_RECONCILE_INTERVAL", "٣s"),
        ("AFTERHOURS_DRAIN", 5000 * "9" + "s"),
        ("AFTERHOURS_FUZZ_KEY", 5000 * "9" + f":{SECRET}, and long enough for a key"),
        ("AFTERHOURS_FUZZ_KEY", f"1:{SECRET}, and long enough,1:{SECRET}, and of the same version"),
    ],
)
def test_a_value_that_could_not_be_served(name: str, value: str) -> None:
    """It is refused before anything is started, by its name."""
    with pytest.raises(settings.SettingsError) as refusal:
        settings.load({name: value})
    told = str(refusal.value)
    assert told.startswith(f"{name}: ")
    assert len(told.splitlines()) == 1
    assert SECRET not in told
    assert "\udcff" not in told
    assert len(told) < 250
    assert "sys." not in told


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DATABASE_URL", f"mysql://ada:{SECRET}@localhost/afterhours"),
        ("DATABASE_URL", ""),
        ("REDIS_URL", f"http://:{SECRET}@localhost"),
        ("AFTERHOURS_LISTEN", "127.0.0.1:65536"),
        ("AFTERHOURS_DURATIONS", "15m,0s"),
        ("AFTERHOURS_DRAIN", "-1s"),
        ("AFTERHOURS_REFLECTION", "perhaps"),
        ("AFTERHOURS_METRICS_LISTEN", "9090"),
        ("AFTERHOURS_FUZZ_KEY", f"1:{SECRET}"),
        ("AFTERHOURS_FUZZ_KEY", f"{SECRET}, and long enough, but of no version"),
        ("AFTERHOURS_FUZZ_KEY", ""),
        ("AFTERHOURS_FUZZ_KEY", f"1:{SECRET}, and long enough,1:{SECRET}, twice the same version"),
        ("AFTERHOURS_AUTH", "basic"),
        ("AFTERHOURS_AUTH", "jwt"),
        ("AFTERHOURS_AUTH", "mtls"),
        ("AFTERHOURS_LISTEN", "0.0.0.0:0"),
        ("AFTERHOURS_JWT_SECRET", SECRET),
        ("AFTERHOURS_JWKS_URL", "http://localhost/jwks.json"),
        ("AFTERHOURS_GATES", "gold"),
        ("AFTERHOURS_RATE_LIMIT", "0"),
        ("AFTERHOURS_EVENT_RETENTION", "36501d"),
        ("AFTERHOURS_HISTORY_RETENTION", "86399s"),
    ],
)
def test_a_setting_that_is_bad_or_missing(name: str, value: str) -> None:
    """It is refused in one line, which names it and repeats no secret, where all else is well."""
    with pytest.raises(settings.SettingsError) as refusal:
        settings.load({key: each for key, each in {**replicas.SERVABLE, name: value}.items() if each}).check()
    [told] = str(refusal.value).splitlines()
    assert name in told
    assert SECRET not in told


@pytest.mark.parametrize(
    ("text", "host", "told", "on_loopback"),
    [
        ("127.0.0.1:50051", "127.0.0.1", "127.0.0.1:50051", True),
        ("[::1]:50051", "::1", "[::1]:50051", True),
        ("::1:50051", "::1", "[::1]:50051", True),
        ("localhost:50051", "localhost", "localhost:50051", True),
        ("[2001:db8::1]:50051", "2001:db8::1", "[2001:db8::1]:50051", False),
        ("192.0.2.1:50051", "192.0.2.1", "192.0.2.1:50051", False),
    ],
)
def test_an_address(text: str, host: str, told: str, on_loopback: bool) -> None:
    """An IPv6 address may be in brackets or not, and is printed with them, as clients need it."""
    found = address.parse(text)
    assert (found.host, found.port, str(found), found.on_loopback) == (host, 50051, told, on_loopback)


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_what_a_server_prints_is_what_clients_connect_to(engines: replicas.Engines, workers: str) -> None:
    """Of an IPv6 address too."""
    listen = {"AFTERHOURS_LISTEN": "[::1]:0", "AFTERHOURS_WORKERS": workers}
    async with replicas.process(engines, **listen) as (_, client):
        assert client.address.startswith("[::1]:")
        assert await client.health() == "SERVING"
