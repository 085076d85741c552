"""JSON Web Tokens: `authorization: Bearer …`, signed with a shared secret or with a key of a JWKS."""

import dataclasses
import time
import typing

import jwt

from afterhours_grpc.rpc import auth, key_sets
from afterhours_grpc.sessions import errors

SYMMETRIC = ("HS256",)
# Tokens remembered as verified: a signature takes a tenth of a call to verify, and callers send theirs with each.
_REMEMBERED = 4096
_LONGEST_SUBJECT = 255

_MISSING = "Send the metadata `authorization: Bearer TOKEN`, once."
_EXPIRED = "The token has expired; get a new one."
_REFUSED = "The token's signature, issuer, audience, times or claims are not what this server asks for; get a new one."


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


class Tokens:
    """Gives the caller of a token that is signed by one of `keys`, and is what is expected."""

    def __init__(self, keys: Secret | key_sets.KeySet, expected: Expected) -> None:
        self._keys = keys
        self._expected = expected
        self._verified: dict[str, auth.Caller] = {}
        if isinstance(keys, key_sets.KeySet):
            keys.changed = self._verified.clear

    async def __call__(self, context: auth.Context) -> auth.Caller:
        """Give who calls. Raise Unauthenticated."""
        sent = [str(value) for name, value in context.invocation_metadata() or () if name == "authorization"]
        scheme, _, token = sent[0].partition(" ") if len(sent) == 1 else ("", "", "")
        if scheme.lower() != "bearer" or not token:
            raise errors.Unauthenticated(_MISSING)
        caller = self._verified.get(token) or await self._verify(token)
        if typing.cast("float", caller.expires_at) + auth.LEEWAY <= time.time():
            raise errors.Unauthenticated(_EXPIRED)
        return caller

    async def _verify(self, token: str) -> auth.Caller:
        try:
            key = await self._keys.find(jwt.get_unverified_header(token).get("kid"))
            if key is None:
                raise errors.Unauthenticated(_REFUSED)  # noqa: TRY301 - with the others
            claims = jwt.decode(
                token,
                key,
                algorithms=self._keys.algorithms,
                issuer=self._expected.issuer,
                audience=self._expected.audience,
                leeway=auth.LEEWAY,
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
