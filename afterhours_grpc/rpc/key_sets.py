"""The public keys of a JWKS, in a file or at an https endpoint that may be slow, away, or talk nonsense."""

import asyncio
import collections.abc
import concurrent.futures
import contextlib
import functools
import http
import json
import pathlib
import time
import typing
import urllib.parse
import urllib.request

import jwt
import structlog

from afterhours_grpc import threads

log = structlog.get_logger()

ALGORITHMS = ("RS256", "ES256", "EdDSA")
# Members of a JWK that are read, each a string; not those of a private key.
_MEMBERS = ("kty", "kid", "use", "alg", "crv", "n", "e", "x", "y")
# Seconds between two fetches, between two for key ids that are not known, and that a fetch may take.
_REFRESH = 300.0
_COOLDOWN = 5.0
_FETCH_TIMEOUT = 5.0
# Bytes of a JWKS, and of one read of it.
_LARGEST = 1024 * 1024
_CHUNK = 64 * 1024


class KeySetError(Exception):
    """The JWKS cannot be fetched or used; the message is one line."""


class KeySet:
    """The public keys at a URL, https or file: fetched every five minutes, and for a key id that is not known.

    The keys that were fetched last serve on while the URL cannot be fetched. Key ids that are not found cause at most
    one fetch in 5 s, and nobody waits longer than 5 s for one.
    """

    algorithms = ALGORITHMS

    def __init__(self, url: str) -> None:
        self._url = url
        self._keys: dict[str | None, jwt.PyJWK] = {}
        # Not before then for key ids that are not known, of which strangers can make up any number.
        self._look_again = 0.0
        self._looking: asyncio.Task[None] | None = None
        self._fetching: concurrent.futures.Future[typing.Any] | None = None
        # Called when keys changed: what was verified with the old ones no longer counts.
        self.changed: collections.abc.Callable[[], None] = lambda: None

    async def find(self, key_id: str | None) -> jwt.PyJWK | None:
        """Return a key by its id, or the only one for a token that names none."""
        if key_id not in self._keys and (self._looking or time.monotonic() >= self._look_again):
            await self._look()
            if key_id in self._keys:
                self._look_again = 0.0
        return self._keys.get(key_id)

    async def run(self) -> None:
        """Fetch the keys from time to time, until cancelled."""
        while True:
            await asyncio.sleep(_REFRESH if self._keys else _COOLDOWN)
            await self._look()

    async def refresh(self) -> None:
        """Fetch the keys. Raise KeySetError, after 5 s at the latest."""
        # One at a time, for a thread that waits for an endpoint cannot be stopped.
        if self._fetching is None or self._fetching.done():
            self._fetching = threads.run(functools.partial(_fetch, self._url))
        try:
            async with asyncio.timeout(_FETCH_TIMEOUT):
                usable = _usable(await asyncio.wrap_future(self._fetching))
        except KeySetError:
            raise
        except Exception as error:  # whatever an endpoint answers, the keys that are known serve on
            told = f"the JWKS cannot be fetched ({type(error).__name__}): check AFTERHOURS_JWKS_URL"
            raise KeySetError(told) from error
        if not usable:
            raise KeySetError(f"the JWKS has no key for {', '.join(ALGORITHMS)}: check AFTERHOURS_JWKS_URL")
        self._keys = {key.key_id: key for key in usable if key.key_id}
        if len(usable) == 1:
            self._keys[None] = usable[0]
        self.changed()

    async def _look(self) -> None:
        """Fetch the keys, once for all who ask meanwhile."""
        if not self._looking:
            self._look_again = time.monotonic() + _COOLDOWN
            self._looking = asyncio.create_task(self._refresh_if_possible())
        await asyncio.shield(self._looking)

    async def _refresh_if_possible(self) -> None:
        try:
            await self.refresh()
        except KeySetError as error:
            log.warning("jwks_unavailable", error=str(error))
        finally:
            self._looking = None


def _fetch(url: str) -> typing.Any:
    """Return the JSON at a URL, whatever it is."""
    if url.startswith("file:"):
        path = urllib.request.url2pathname(urllib.parse.urlsplit(url).path)
        text = pathlib.Path(path).read_bytes()
    else:
        text = _get(url)
    return json.loads(text)


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
    return [key for key in usable if key.algorithm_name in ALGORITHMS and key.public_key_use in {None, "sig"}]


def _get(url: str) -> bytes:
    """GET a URL by https alone. Raise OSError, also for a redirect, or ValueError for a body that is too large."""
    opener = urllib.request.OpenerDirector()
    for handler in (urllib.request.ProxyHandler, urllib.request.HTTPSHandler, urllib.request.UnknownHandler):
        opener.add_handler(handler())
    deadline = time.monotonic() + _FETCH_TIMEOUT
    found = bytearray()
    with opener.open(url, timeout=_FETCH_TIMEOUT) as response:
        if response.status != http.HTTPStatus.OK:
            raise OSError(f"status {response.status}")
        # The timeout is that of one read: an endpoint that sends a byte now and then never reaches it.
        while chunk := response.read1(_CHUNK):
            found += chunk
            if time.monotonic() > deadline:
                raise TimeoutError
            if len(found) > _LARGEST:
                raise ValueError("a JWKS has at most 1 MiB")
    return bytes(found)
