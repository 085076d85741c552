"""Who may call, by token: nobody without, the own user without a scope, and each scope its row and nothing else."""

import base64
import collections.abc
import json
import time
import typing

import jwt
import keys
import pytest
import replicas
from afterhours.v1 import profile_pb2, profile_service_pb2, session_service_pb2
from cryptography.hazmat.primitives import serialization
from google.protobuf import duration_pb2

pytestmark = pytest.mark.front_door

JWT = {"AFTERHOURS_AUTH": "jwt", "AFTERHOURS_JWT_SECRET": keys.SECRET}
NOBODY = "00000000-0000-4000-8000-000000000000"


async def get(address: str, token: str, user_id: str = "") -> session_service_pb2.GetSessionResponse | replicas.Refusal:
    """Call GetSession with a token."""
    async with replicas.Client(address, token) as client:
        return await replicas.outcome(client.get(user_id))


def forged(claims: dict[str, typing.Any], **header: typing.Any) -> str:
    """Give an unsigned token."""
    parts = [json.dumps(part).encode() for part in ({"typ": "JWT", **header}, claims)]
    return b".".join([*(base64.urlsafe_b64encode(part).rstrip(b"=") for part in parts), b""]).decode()


def _later() -> int:
    return int(time.time()) + 60


BAD: dict[str, collections.abc.Callable[[], str]] = {
    "no token at all": lambda: "x",
    "three dots": lambda: "...",
    "another secret": lambda: keys.token(key="another secret of thirty-two characters"),
    "alg none": lambda: forged({"sub": "ada", "exp": _later()}, alg="none"),
    "alg None": lambda: forged({"sub": "ada", "exp": _later()}, alg="None"),
    "no alg": lambda: forged({"sub": "ada", "exp": _later()}),
    "another algorithm": lambda: keys.token(key=64 * "k", algorithm="HS512"),
    "another algorithm, our secret": lambda: keys.token(key=2 * keys.SECRET, algorithm="HS384"),
    "a body that was changed": lambda: _swapped(keys.token("ada"), keys.token("bob")),
    "a key id that is a number": lambda: forged({"sub": "ada", "exp": _later()}, alg="HS256", kid=7),
    "a critical extension": lambda: keys.token(headers={"crit": ["new"], "new": 1}),
    "deep JSON": lambda: f"{base64.urlsafe_b64encode(6000 * b'[').decode().rstrip('=')}.e30.e30",
    "expired 31 s ago": lambda: keys.token(lifetime=-32),
    "no exp": lambda: keys.token(exp=None),
    "exp a text": lambda: keys.token(exp="tomorrow"),
    "exp infinite": lambda: keys.token(exp=float("inf")),
    "exp no number": lambda: keys.token(exp=float("nan")),
    "not before 32 s from now": lambda: keys.token(nbf=int(time.time()) + 33),
    "no sub": lambda: keys.token(sub=None),
    "an empty sub": lambda: keys.token(""),
    "a sub that is too long": lambda: keys.token(256 * "a"),
    "a sub with U+0000": lambda: keys.token("a\0"),
    "a sub that is half a character": lambda: keys.token("\ud800"),
    "a scope that is a list": lambda: keys.token(scope=["sessions:any"]),  # type: ignore[arg-type]
    "claims that are a list": lambda: jwt.PyJWS().encode(b"[]", keys.SECRET, algorithm="HS256"),
}


def _swapped(signed: str, other: str) -> str:
    header, _, signature = signed.split(".")
    return f"{header}.{other.split('.')[1]}.{signature}"


@pytest.mark.filterwarnings("ignore:The HMAC key")
async def test_bad_tokens(engines: replicas.Engines) -> None:
    """Whatever is no token, or not one of ours, is UNAUTHENTICATED, and nothing of it is repeated."""
    async with replicas.replica(engines, **JWT) as (service, _):
        for name, make in BAD.items():
            told = await get(service.address, make())
            assert isinstance(told, replicas.Refusal), name
            assert (told.code, told.reason) == ("UNAUTHENTICATED", "UNAUTHENTICATED"), name
            assert "token" in told.message.lower()
        assert isinstance(await get(service.address, keys.token()), session_service_pb2.GetSessionResponse)


@pytest.mark.parametrize(
    "metadata",
    [
        (),
        (("authorization", ""),),
        (("authorization", "Bearer"),),
        (("authorization", "Bearer "),),
        (("authorization", f"Basic {keys.token()}"),),
        (("authorization", keys.token()),),
        (("authorization", f"Bearer {keys.token()}"), ("authorization", f"Bearer {keys.token('bob')}")),
        (("x-authorization", f"Bearer {keys.token()}"),),
    ],
    ids=["none", "empty", "a scheme", "a scheme and a space", "Basic", "no scheme", "two", "another name"],
)
async def test_metadata_without_a_token(engines: replicas.Engines, metadata: tuple[tuple[str, str], ...]) -> None:
    """A call without exactly one bearer token is told how to send one, before anything else about it."""
    async with replicas.replica(engines, **JWT) as (_, client):
        request = session_service_pb2.GetSessionRequest(user_id="\0")
        told = await replicas.refused(client.sessions.GetSession(request, metadata=metadata))
        assert (told.code, told.reason) == ("UNAUTHENTICATED", "UNAUTHENTICATED")
        assert "authorization: Bearer TOKEN" in told.message


async def test_times_within_the_leeway(engines: replicas.Engines) -> None:
    """Clocks may differ by 30 s; the scheme may be written in any case."""
    async with replicas.replica(engines, **JWT) as (service, client):
        for each in (keys.token(lifetime=-27), keys.token(nbf=int(time.time()) + 27), keys.token(iat=_later() + 600)):
            assert not isinstance(await get(service.address, each), replicas.Refusal)
        request = session_service_pb2.GetSessionRequest()
        await client.sessions.GetSession(request, metadata=(("authorization", f"bEARER {keys.token()}"),))


async def test_a_token_that_was_good_expires(engines: replicas.Engines) -> None:
    """A token that was accepted before is refused from 30 s after its exp on."""
    async with replicas.replica(engines, **JWT) as (service, _):
        dying = keys.token(exp=int(time.time()) - 28)
        assert not isinstance(await get(service.address, dying), replicas.Refusal)

        async def over() -> bool:
            told = await get(service.address, dying)
            return isinstance(told, replicas.Refusal) and "expired" in told.message

        await replicas.eventually(over, within=5)


async def test_issuer_and_audience(engines: replicas.Engines) -> None:
    """Where the operator names an issuer and an audience, a token must name them too."""
    expected = {"AFTERHOURS_JWT_ISSUER": "accounts", "AFTERHOURS_JWT_AUDIENCE": "afterhours"}
    async with replicas.replica(engines, **JWT, **expected) as (service, _):
        good: dict[str, typing.Any] = {"iss": "accounts", "aud": ["afterhours", "chat"]}
        assert not isinstance(await get(service.address, keys.token(**good)), replicas.Refusal)
        for bad in ({"iss": "others"}, {"iss": None}, {"aud": "chat"}, {"aud": None}):
            told = await get(service.address, keys.token(**{**good, **bad}))
            assert isinstance(told, replicas.Refusal), bad
            assert told.reason == "UNAUTHENTICATED", bad
    async with replicas.replica(engines, **JWT) as (service, _):
        assert not isinstance(await get(service.address, keys.token(aud="anybody")), replicas.Refusal)


def calls(client: replicas.Client, user_id: str) -> dict[str, collections.abc.Awaitable[object]]:
    """Give a call of each method about a user."""
    duration = duration_pb2.Duration(seconds=900)
    sessions, profiles = client.sessions, client.profiles
    profile = profile_pb2.Profile(user_id=user_id)
    return {
        "StartSession": client.start(user_id),
        "ExtendSession": sessions.ExtendSession(
            session_service_pb2.ExtendSessionRequest(user_id=user_id, additional_duration=duration)
        ),
        "GetSession": client.get(user_id),
        "EndSession": client.end(user_id),
        "GetProfile": profiles.GetProfile(profile_service_pb2.GetProfileRequest(user_id=user_id)),
        "PutProfile": profiles.PutProfile(profile_service_pb2.PutProfileRequest(profile=profile)),
        "GetExactLocation": client.exact_location(NOBODY),
        "DeleteProfile": client.delete_profile(user_id),
    }


OWN = {"StartSession", "ExtendSession", "GetSession", "EndSession", "GetProfile"}
OPENS = {
    "": set(),
    "sessions:any": OWN,
    "sessions:watch": set(),
    "sessions:exact": {"GetExactLocation"},
    "profiles:write": {"PutProfile", "DeleteProfile", "GetProfile"},
    "sessions:anything sessions profiles:write:all": set(),
    keys.EVERYTHING: {*OWN, "GetExactLocation", "PutProfile", "DeleteProfile"},
}


@pytest.mark.parametrize("scope", OPENS)
async def test_scopes(engines: replicas.Engines, scope: str) -> None:
    """Each scope opens its methods for every user, and grants nothing else; whether a user exists is not told."""
    async with (
        replicas.replica(engines, **JWT) as (service, _),
        replicas.Client(service.address, keys.token("root", keys.EVERYTHING)) as everything,
        replicas.Client(service.address, keys.token("ada", scope)) as client,
    ):
        await everything.put_profile("bob")
        for user_id in ("bob", "nobody"):
            outcomes = {name: await replicas.outcome(call) for name, call in calls(client, user_id).items()}
            forbidden = {
                name: told.message
                for name, told in outcomes.items()
                if isinstance(told, replicas.Refusal) and told.reason == "FORBIDDEN"
            }
            assert forbidden.keys() == {*OWN, "GetExactLocation", "PutProfile", "DeleteProfile"} - OPENS[scope]
            assert len(set(forbidden.values())) <= 1
        assert await engines.rows("SELECT FROM after_hours_profiles WHERE user_id = 'ada'") == []


async def test_the_own_user(engines: replicas.Engines) -> None:
    """Without a scope a caller has their own session and profile, named or not, and no other."""
    async with (
        replicas.replica(engines, **JWT) as (service, _),
        replicas.Client(service.address, keys.token("root", "profiles:write")) as accounts,
        replicas.Client(service.address, keys.token("ada")) as ada,
        replicas.Client(service.address, keys.token("root", "sessions:any")) as gateway,
    ):
        await accounts.put_profile("ada")
        started = await ada.start("")
        assert started.user_id == "ada"
        assert (await ada.get("ada")).session.id == (await ada.get("")).session.id == started.id
        assert (await ada.extend("")).id == started.id
        profile = await ada.profiles.GetProfile(profile_service_pb2.GetProfileRequest())
        assert profile.profile.user_id == "ada"
        assert (await gateway.get("ada")).session.id == started.id
        assert (await replicas.refused(ada.get("bob"))).reason == "FORBIDDEN"
        assert (await ada.end("")).id == started.id
        # Whoever may mean everybody must say whom.
        for call in (gateway.get(""), gateway.start(""), gateway.end(""), gateway.extend("")):
            told = await replicas.refused(call)
            assert (told.reason, [each.field for each in told.details["BadRequest"].field_violations]) == (
                "INVALID_REQUEST",
                ["user_id"],
            )
        assert (await replicas.refused(accounts.delete_profile(""))).reason == "INVALID_REQUEST"


async def test_the_order_of_checks(engines: replicas.Engines) -> None:
    """Credentials come before the form, the form before the authorization, that before anything about the user."""
    async with (
        replicas.replica(engines, **JWT) as (service, anybody),
        replicas.Client(service.address, keys.token("ada")) as ada,
    ):
        request = session_service_pb2.StartSessionRequest(user_id="bob", duration=duration_pb2.Duration(seconds=1))
        assert (await replicas.refused(anybody.sessions.StartSession(request))).reason == "UNAUTHENTICATED"
        assert (await replicas.refused(ada.sessions.StartSession(request))).reason == "INVALID_REQUEST"
        assert (await replicas.refused(ada.start("bob"))).reason == "FORBIDDEN"
        assert (await replicas.refused(ada.start("ada"))).reason == "PROFILE_REQUIRED"
        raw: typing.Any = anybody.channel.unary_unary("/afterhours.v1.SessionService/GetSession")
        assert (await replicas.refused(raw(b"\xff"))).reason == "UNAUTHENTICATED"


async def test_request_ids_are_the_callers_own(engines: replicas.Engines) -> None:
    """A request_id of one caller is none of another's."""
    request_id = replicas.request_id()
    async with (
        replicas.replica(engines, **JWT) as (service, _),
        replicas.Client(service.address, keys.token("root", keys.EVERYTHING)) as root,
        replicas.Client(service.address, keys.token("ada")) as ada,
    ):
        await root.put_profile("ada")
        started = await root.start("ada", request_id=request_id)
        assert await root.start("ada", request_id=request_id) == started
        assert (await replicas.refused(ada.start("ada", request_id=request_id))).reason == "SESSION_ALREADY_ACTIVE"


async def test_health_and_reflection_are_open(engines: replicas.Engines) -> None:
    """Health, and reflection, answer without credentials."""
    async with replicas.replica(engines, **JWT) as (service, client):
        assert await client.health() == "SERVING"
        assert await client.health("") == "SERVING"
        assert service.address


async def test_the_public_key_is_no_secret(engines: replicas.Engines, tmp_path: typing.Any) -> None:
    """A token signed by HMAC with a public key's text is refused by a server that has that key."""
    key = keys.ALGORITHMS["RS256"]()
    file = tmp_path / "jwks.json"
    file.write_text(keys.key_set({"one": ("RS256", key)}))
    pem = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    body = {"sub": "ada", "exp": _later()}
    confused = jwt.PyJWS(algorithms=["HS256"])
    # PyJWT itself refuses to sign so.
    confused._algorithms["HS256"].prepare_key = lambda given: given  # type: ignore[assignment, method-assign]
    forged_token = confused.encode(json.dumps(body).encode(), pem, algorithm="HS256", headers={"kid": "one"})
    async with replicas.replica(engines, AFTERHOURS_AUTH="jwt", AFTERHOURS_JWKS_URL=file.as_uri()) as (service, _):
        told = await get(service.address, forged_token)
        assert isinstance(told, replicas.Refusal)
        assert told.reason == "UNAUTHENTICATED"
        good = keys.token(key=key, algorithm="RS256", headers={"kid": "one"})
        assert not isinstance(await get(service.address, good), replicas.Refusal)
