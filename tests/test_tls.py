"""TLS, and callers by their client certificates."""

import asyncio
import ipaddress
import pathlib
import shutil

import grpc
import keys
import pytest
import replicas
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from afterhours_grpc import app

GATEWAY, ADA, STRANGER = "spiffe://corp/gateway", "ada", "spiffe://corp/stranger"


@pytest.fixture
def authority(tmp_path: pathlib.Path) -> keys.Authority:
    """Give a certificate authority."""
    return keys.Authority(tmp_path)


def tls(authority: keys.Authority) -> dict[str, str]:
    """Give the settings of a server with a certificate, and tokens."""
    certificate, key = authority.server()
    return {
        "AFTERHOURS_TLS_CERT": str(certificate),
        "AFTERHOURS_TLS_KEY": str(key),
        "AFTERHOURS_AUTH": "jwt",
        "AFTERHOURS_JWT_SECRET": keys.SECRET,
    }


def mtls(authority: keys.Authority, tmp_path: pathlib.Path) -> dict[str, str]:
    """Give the settings of a server that knows its callers by certificate."""
    allow = tmp_path / "allow"
    allow.write_text(f"# who may call\n\n{GATEWAY} sessions:any profiles:write\n{ADA}\n")
    return {
        **tls(authority),
        "AFTERHOURS_AUTH": "mtls",
        "AFTERHOURS_TLS_CLIENT_CA": str(authority.file),
        "AFTERHOURS_MTLS_ALLOW": str(allow),
    }


async def unreachable(address: str, credentials: grpc.ChannelCredentials | None) -> bool:
    """Whether no call gets through."""
    async with replicas.Client(address, credentials=credentials) as client:
        told = await replicas.outcome(client.get("ada", timeout=3))
        return isinstance(told, replicas.Refusal) and told.code == "UNAVAILABLE" and not told.reason


async def test_tokens_over_tls(engines: replicas.Engines, authority: keys.Authority, tmp_path: pathlib.Path) -> None:
    """With a certificate the service answers over TLS only, to clients that trust its authority."""
    async with replicas.replica(engines, **tls(authority)) as (service, _):
        async with replicas.Client(service.address, keys.token(), authority.trusting()) as client:
            assert not (await client.get("")).active
            assert await client.health() == "SERVING"
        assert await unreachable(service.address, None)
        other = keys.Authority(tmp_path, "another")
        assert await unreachable(service.address, other.trusting())


async def test_certificates_are_reloaded(
    engines: replicas.Engines, authority: keys.Authority, tmp_path: pathlib.Path
) -> None:
    """New files serve new connections, and half of a pair changes nothing; a call in flight goes on."""
    settings = tls(authority)
    certificate, key = pathlib.Path(settings["AFTERHOURS_TLS_CERT"]), pathlib.Path(settings["AFTERHOURS_TLS_KEY"])
    successor = keys.Authority(tmp_path, "successor")
    new_certificate, new_key = successor.server("new")
    async with (
        replicas.replica(engines, **settings) as (service, _),
        replicas.Client(service.address, keys.token("root", keys.EVERYTHING), authority.trusting()) as before,
    ):
        await before.put_profile("ada")
        async with replicas.locked(engines, "SELECT FROM after_hours_profiles FOR UPDATE"):
            start = asyncio.create_task(before.start("ada", timeout=4))
            await replicas.eventually(engines.in_flight, within=4)
            shutil.copy(new_key, key)  # not the certificate's, yet
            async with replicas.Client(service.address, keys.token(), authority.trusting()) as client:
                await client.get("")
            shutil.copy(new_certificate, certificate)
            async with replicas.Client(service.address, keys.token(), successor.trusting()) as client:
                await client.get("")
            assert await unreachable(service.address, authority.trusting())
        assert (await start).user_id == "ada"
        assert (await before.get("ada")).active


async def test_callers_by_certificate(
    engines: replicas.Engines, authority: keys.Authority, tmp_path: pathlib.Path
) -> None:
    """A caller is the SAN of their certificate, with the scopes of its line; one that is not listed is nobody."""
    uri = x509.UniformResourceIdentifier
    gateway = authority.issue("gateway", x509.DNSName("gateway.corp"), uri(GATEWAY))
    ada = authority.issue("somebody", x509.DNSName(ADA))
    # The common name is no name of a caller's.
    stranger = authority.issue("ada", uri(STRANGER))
    forger = keys.Authority(tmp_path, "forger").issue("forged", uri(GATEWAY))
    async with replicas.replica(engines, **mtls(authority, tmp_path)) as (service, _):
        async with replicas.Client(service.address, credentials=authority.trusting(gateway)) as client:
            await client.put_profile("ada")
            started = await client.start("ada")
            assert (await replicas.refused(client.get(""))).reason == "INVALID_REQUEST"
            assert (await replicas.refused(client.exact_location(started.id))).reason == "FORBIDDEN"
        async with replicas.Client(service.address, credentials=authority.trusting(ada)) as client:
            assert (await client.get("")).session.id == started.id
            assert (await replicas.refused(client.get("bob"))).reason == "FORBIDDEN"
        async with replicas.Client(service.address, keys.token(), authority.trusting(stranger)) as client:
            told = await replicas.refused(client.get(""))
            assert (told.code, told.reason) == ("UNAUTHENTICATED", "UNAUTHENTICATED")
            assert "certificate" in told.message
        assert await unreachable(service.address, authority.trusting())
        assert await unreachable(service.address, authority.trusting(forger))
        assert await unreachable(service.address, None)


IMPOSTORS: dict[str, x509.GeneralName] = {
    "cut at a NUL": x509.DNSName("gateway.corp\0.example.com"),
    "a URI cut at a NUL": x509.UniformResourceIdentifier(f"{GATEWAY}\0.example.com"),
    "an email address cut at a NUL": x509.RFC822Name._init_without_validation("ada@corp\0.example.com"),
    "a DNS name like a URI": x509.DNSName(GATEWAY),
    "a DNS name like an email address": x509.DNSName("ada@corp"),
    "a DNS name like an IP address": x509.DNSName("10.1.2.3"),
    "a URI like a DNS name": x509.UniformResourceIdentifier("gateway.corp"),
    "a registered id": x509.RegisteredID(x509.ObjectIdentifier("1.2.3.4")),
}
GENUINE: dict[str, x509.GeneralName] = {
    "gateway.corp": x509.DNSName("gateway.corp"),
    GATEWAY: x509.UniformResourceIdentifier(GATEWAY),
    "ada@corp": x509.RFC822Name("ada@corp"),
    "10.1.2.3": x509.IPAddress(ipaddress.ip_address("10.1.2.3")),
    "2001:db8::1": x509.IPAddress(ipaddress.ip_address("2001:db8::1")),
}


async def test_a_name_counts_whole_and_by_its_kind(
    engines: replicas.Engines, authority: keys.Authority, tmp_path: pathlib.Path
) -> None:
    """A certificate is a caller by a name of the right kind, up to its last byte, not by one that begins with it."""
    settings = mtls(authority, tmp_path)
    (tmp_path / "allow").write_text("".join(f"{name}\n" for name in (*GENUINE, "1.2.3.4")))

    async with replicas.replica(engines, **settings) as (service, _):

        async def told(name: str, san: x509.GeneralName) -> object:
            files = authority.issue(name.replace("/", "_"), san)
            async with replicas.Client(service.address, credentials=authority.trusting(files)) as client:
                return await replicas.outcome(client.get(""))

        for name, san in GENUINE.items():
            assert not isinstance(await told(name, san), replicas.Refusal), name
        for name, san in IMPOSTORS.items():
            refused = await told(name, san)
            assert isinstance(refused, replicas.Refusal), name
            assert refused.reason == "UNAUTHENTICATED", name


async def test_a_key_that_grpc_does_not_know(engines: replicas.Engines, authority: keys.Authority) -> None:
    """At the start it is refused as what it is, and later it leaves what was there."""
    odd_certificate, odd_key = authority.issue("odd", x509.DNSName("localhost"), curve=ec.SECP256K1())
    settings = tls(authority)
    certificate, key = settings["AFTERHOURS_TLS_CERT"], settings["AFTERHOURS_TLS_KEY"]
    odd = {"AFTERHOURS_TLS_CERT": str(odd_certificate), "AFTERHOURS_TLS_KEY": str(odd_key)}
    with pytest.raises(app.StartError, match=str(odd_key)):
        async with replicas.replica(engines, **{**settings, **odd}):
            pass
    async with replicas.replica(engines, **settings) as (service, _):
        shutil.copy(odd_certificate, certificate)
        shutil.copy(odd_key, key)
        async with replicas.Client(service.address, keys.token(), authority.trusting()) as client:
            assert not (await client.get("")).active


async def test_what_cannot_be_served_is_refused(
    engines: replicas.Engines, authority: keys.Authority, tmp_path: pathlib.Path
) -> None:
    """Files that are missing, of no use or of no pair, and a transport without TLS, are refused in a line."""
    good = mtls(authority, tmp_path)
    _, other_key = authority.server("other")
    (tmp_path / "empty").write_text("")
    (tmp_path / "unknown").write_text(f"{GATEWAY} sessions:all\n")
    (tmp_path / "twice").write_text(f"{GATEWAY} sessions:any\n{GATEWAY}\n")
    bad = [
        ("AFTERHOURS_TLS_KEY", str(other_key)),
        ("AFTERHOURS_TLS_KEY", str(tmp_path / "nowhere")),
        ("AFTERHOURS_TLS_KEY", ""),
        ("AFTERHOURS_TLS_CERT", str(tmp_path / "empty")),
        ("AFTERHOURS_TLS_CERT", ""),
        ("AFTERHOURS_TLS_CLIENT_CA", str(tmp_path / "empty")),
        ("AFTERHOURS_TLS_CLIENT_CA", ""),
        ("AFTERHOURS_MTLS_ALLOW", str(tmp_path / "empty")),
        ("AFTERHOURS_MTLS_ALLOW", str(tmp_path / "unknown")),
        ("AFTERHOURS_MTLS_ALLOW", str(tmp_path / "twice")),
        ("AFTERHOURS_MTLS_ALLOW", str(tmp_path / "nowhere")),
        ("AFTERHOURS_MTLS_ALLOW", ""),
        ("AFTERHOURS_TRANSPORT", "native"),
    ]
    for name, value in bad:
        changed = {key: each for key, each in {**good, name: value}.items() if each}
        line = await replicas.not_served(engines, **changed)
        assert name in line or (value and value in line), (name, value, line)
