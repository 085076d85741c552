"""JSON Web Tokens: `authorization: Bearer …`, signed with a shared secret or with a key of a JWKS."""

import asyncio
import collections.abc
import contextlib
import dataclasses
import json
import pathlib
import time
import typing
import urllib.parse
import urllib.request

import jwt
import structlog

from afterhours_grpc.rpc import auth
from afterhours_grpc.sessions import errors

log = structlog.get_logger()

LEEWAY = 30
"""Seconds by which the clock of who signed a token may differ from ours."""

SYMMETRIC, ASYMMETRIC = ("HS256",), ("RS256", "ES256", "EdDSA")
# Members of a JWK that are read, each a string; not those of a private key.
_MEMBERS = ("kty", "kid", "use", "alg", "crv", "n", "e", "x", "y")
# Seconds between two looks at a JWKS, after one that did not find a key id, and that a look may take.
_REFRESH = 300.0
_COOLDOWN = 5.0
_FETCH_TIMEOUT = 5.0
# Tokens remembered as verified: a signature takes a tenth of a call to verify, and callers send theirs with each.
_REMEMBERED = 4096
_LONGEST_SUBJECT = 255

_MISSING = "Send the metadata `authorization: Bearer TOKEN`, once."
_EXPIRED = "The token has expired; get a new one."
_REFUSED = "The token's signature, issuer, audience, times or claims are not what this server asks for; get a new one."


class KeySetError(Exception):
    """The JWKS cannot be had or used; the message is one line."""


@dataclasses.dataclass(frozen=True, slots=True)
class Expected:
    """What a token must say of itself: its issuer and its audience, where they are set."""

    issuer: str | None = None
    audience: str | None = None


class Secret:
    """A shared secret: the one key of all tokens."""

    algorithms = SYMMETRIC

    def __init__(self, secret: str) -> None:
        self._secret = secret

    async def find(self, _: str | None) -> str:
        """Give the secret."""
        return self._secret


class KeySet:
    """The public keys at a URL, https or file: looked at every five minutes, and for a key id that is not known.

    Those found last serve on while the URL cannot be had. Key ids that are not found cause at most one look in 5 s.
    """

    algorithms = ASYMMETRIC

    def __init__(self, url: str) -> None:
        self._url = url
        self._keys: dict[str | None, jwt.PyJWK] = {}
        # Not before then for key ids that are not known, of which strangers can make up any number.
        self._look_again = 0.0
        self._looking: asyncio.Task[None] | None = None
        # Called when keys changed: what was verified with the old ones no longer counts.
        self.changed: collections.abc.Callable[[], None] = lambda: None

    async def find(self, key_id: str | None) -> jwt.PyJWK:
        """Give a key by its id, or the only one for a token that names none. Raise Unauthenticated."""
        if key_id not in self._keys and (self._looking or time.monotonic() >= self._look_again):
            if not self._looking:
                self._look_again = time.monotonic() + _COOLDOWN
                self._looking = asyncio.create_task(self._look())
            await asyncio.shield(self._looking)
            if key_id in self._keys:
                self._look_again = 0.0
        try:
            return self._keys[key_id]
        except KeyError:
            raise errors.Unauthenticated(_REFUSED) from None

    async def _look(self) -> None:
        try:
            await self.refresh()
        except KeySetError as error:
            log.warning("jwks_unavailable", error=str(error))
        finally:
            self._looking = None

    async def refresh(self) -> None:
        """Look at the URL. Raise KeySetError."""
        try:
            usable = _usable(await asyncio.to_thread(_fetched, self._url))
        except (OSError, ValueError, RecursionError, jwt.PyJWTError) as error:
            raise KeySetError(f"the JWKS cannot be read ({type(error).__name__}): check AFTERHOURS_JWKS_URL") from error
        if not usable:
            raise KeySetError(f"the JWKS has no key for {', '.join(ASYMMETRIC)}: check AFTERHOURS_JWKS_URL")
        self._keys = {key.key_id: key for key in usable if key.key_id}
        if len(usable) == 1:
            self._keys[None] = usable[0]
        self.changed()

    async def run(self) -> None:
        """Look at the URL from time to time, until cancelled."""
        while True:
            await asyncio.sleep(_REFRESH if self._keys else _COOLDOWN)
            await self._look()


def _fetched(url: str) -> typing.Any:
    """Return the JSON at a URL, whatever it is."""
    if url.startswith("file:"):
        path = urllib.request.url2pathname(urllib.parse.urlsplit(url).path)
        return json.loads(pathlib.Path(path).read_text())
    return jwt.PyJWKClient(url, cache_jwk_set=False, timeout=_FETCH_TIMEOUT).fetch_data()


def _usable(found: typing.Any) -> list[jwt.PyJWK]:
    """Return the keys that tokens may be signed by, without those that cannot be read, as RFC 7517 says.

    Raise KeySetError for what is no key set.
    """
    keys = found.get("keys") if isinstance(found, dict) else None
    if not isinstance(keys, list):
        raise KeySetError("the JWKS is not a JSON object with an array of keys: check AFTERHOURS_JWKS_URL")
    usable = []
    for each in keys:
        described = {name: each[name] for name in _MEMBERS if name in each} if isinstance(each, dict) else {}
        if described and all(isinstance(value, str) for value in described.values()):
            # Besides PyJWTError, others escape from where it looks for members and from its cryptography.
            with contextlib.suppress(Exception):
                usable.append(jwt.PyJWK(described))
    return [key for key in usable if key.algorithm_name in ASYMMETRIC and key.public_key_use in {None, "sig"}]


class Tokens:
    """Gives the caller of a token that is signed by one of `keys`, and is what is expected."""

    def __init__(self, keys: Secret | KeySet, expected: Expected) -> None:
        self._keys = keys
        self._expected = expected
        self._verified: dict[str, auth.Caller] = {}
        if isinstance(keys, KeySet):
            keys.changed = self._verified.clear

    async def __call__(self, context: auth.Context) -> auth.Caller:
        """Give who calls. Raise Unauthenticated."""
        sent = [str(value) for name, value in context.invocation_metadata() or () if name == "authorization"]
        scheme, _, token = sent[0].partition(" ") if len(sent) == 1 else ("", "", "")
        if scheme.lower() != "bearer" or not token:
            raise errors.Unauthenticated(_MISSING)
        caller = self._verified.get(token) or await self._verify(token)
        if typing.cast("float", caller.expires_at) + LEEWAY <= time.time():
            raise errors.Unauthenticated(_EXPIRED)
        return caller

    async def _verify(self, token: str) -> auth.Caller:
        try:
            key = await self._keys.find(jwt.get_unverified_header(token).get("kid"))
            claims = jwt.decode(
                token,
                key,
                algorithms=self._keys.algorithms,
                issuer=self._expected.issuer,
                audience=self._expected.audience,
                leeway=LEEWAY,
                options={
                    "require": ["exp", "sub"],
                    "verify_aud": self._expected.audience is not None,
                    "verify_iat": False,
                    "enforce_minimum_key_length": True,
                },
            )
            caller = _caller(claims)
        except errors.Unauthenticated:
            raise
        except jwt.ExpiredSignatureError:
            raise errors.Unauthenticated(_EXPIRED) from None
        except Exception:  # noqa: BLE001 - a stranger's bytes; whatever they do to a parser, they are no credentials
            raise errors.Unauthenticated(_REFUSED) from None
        if len(self._verified) >= _REMEMBERED:
            self._verified.clear()
        self._verified[token] = caller
        return caller


def _caller(claims: dict[str, typing.Any]) -> auth.Caller:
    subject, scope = claims["sub"], claims.get("scope", "")
    subject.encode()  # a lone surrogate is no text
    if not 0 < len(subject) <= _LONGEST_SUBJECT or "\0" in subject:
        raise ValueError("a subject is 1 to 255 code points, none of them U+0000")
    return auth.Caller(subject, frozenset(scope.split()), float(claims["exp"]))


def expired() -> errors.SessionError:
    """Give what a stream is told whose token has ended."""
    return errors.Unauthenticated(_EXPIRED)


def signed(secret: str, subject: str, scope: str, lifetime: float, expected: Expected) -> str:
    """Sign a token for development, good for `lifetime` seconds."""
    claims = {"sub": subject, "exp": int(time.time() + lifetime), "iss": expected.issuer, "aud": expected.audience}
    if scope:
        claims["scope"] = scope
    present = {name: value for name, value in claims.items() if value is not None}
    return jwt.encode(present, secret, algorithm=SYMMETRIC[0])
