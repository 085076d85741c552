"""Connecting with asyncpg, which leaves something behind when it is cancelled in its first steps."""

import asyncio
import typing

import asyncpg

# Seconds that a cancelled attempt may go on: long enough to leave those steps, and too short to be waited for.
_GRACE = 0.1


async def connect(url: str, **options: typing.Any) -> asyncpg.Connection:
    """Return a connection, as `asyncpg.connect` does.

    Between the connection of its socket and its first message asyncpg must not be cancelled: the protocol that asks for
    TLS then sets an exception on a future that nobody awaits, and asyncio logs an error. So a cancelled attempt gets a
    moment to finish, and its connection is closed.
    """
    attempt: asyncio.Task[asyncpg.Connection] = asyncio.create_task(asyncpg.connect(url, **options))
    try:
        return await asyncio.shield(attempt)
    except asyncio.CancelledError:
        attempt.add_done_callback(_close)
        try:
            await asyncio.wait({attempt}, timeout=_GRACE)
        finally:
            attempt.cancel()
        raise


def _close(attempt: "asyncio.Task[asyncpg.Connection]") -> None:
    """Close what an attempt has made that nobody waits for; its failure is of no interest."""
    if not attempt.cancelled() and not attempt.exception():
        attempt.result().terminate()
