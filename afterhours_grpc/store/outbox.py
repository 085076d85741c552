"""Events, from the outbox where transitions leave them to their places, where they are read.

A transition's event is committed with it, and in any order among those of other sessions. Then one transaction at a
time, whoever's, moves what is committed and gives it positions without a gap: it holds the one row of the log. So no
reader passes an event that is still to come, and a transaction that stays open delays no event but its own.
"""

import asyncio
import collections.abc
import contextlib
import dataclasses
import datetime

import asyncpg

from afterhours_grpc.sessions import errors, session
from afterhours_grpc.store import database, fragments, rows

CHANNEL = "afterhours_events"

_ANY = database.Statement("SELECT EXISTS (SELECT FROM after_hours_outbox) AS any")
LOCK = database.Statement("SELECT last_position FROM after_hours_event_log WHERE id = 1 FOR UPDATE")
_LOCK_IF_FREE = database.Statement(LOCK.sql + " SKIP LOCKED")
_LAST = database.Statement("SELECT last_position FROM after_hours_event_log WHERE id = 1")

_COLUMNS = """type, happened_at, session_id, user_id, started_at, expires_at, ended_at, end_reason,
    fuzzed_latitude, fuzzed_longitude, fuzz_radius_meters"""

# As rows.session_of reads them.
_READABLE = _COLUMNS.replace("expires_at", f"{fragments.readable('expires_at')} AS expires_at")
_READ = f"{_READABLE}, session_id AS id, happened_at AS as_of"

# Run with the log's row held, and so with a snapshot that has what others placed before.
_PLACE = database.Statement(f"""
WITH moved AS (
        DELETE FROM after_hours_outbox
        WHERE id = ANY(ARRAY(SELECT id FROM after_hours_outbox ORDER BY id LIMIT :most))
        RETURNING *
    ),
    placed AS (
        INSERT INTO after_hours_events (position, placed_at, {_COLUMNS})
        SELECT CAST(:last AS bigint) + row_number() OVER (ORDER BY id), clock_timestamp(), {_COLUMNS} FROM moved
        RETURNING position
    )
UPDATE after_hours_event_log SET last_position = :last + (SELECT count(*) FROM placed) WHERE id = 1
RETURNING last_position, pg_notify('{CHANNEL}', '')
""")

_AFTER = database.Statement(f"""
SELECT position, {_READ} FROM after_hours_events
WHERE position > :after AND position <= :upto ORDER BY position LIMIT :most
""")

_AFTER_OF_USERS = database.Statement(f"""
SELECT event.* FROM unnest(CAST(:user_ids AS text[])) AS asked(user_id) CROSS JOIN LATERAL (
    SELECT position, {_READ} FROM after_hours_events AS e
    WHERE e.user_id = asked.user_id AND position > :after AND position <= :upto ORDER BY position LIMIT :most
) AS event
ORDER BY position LIMIT :most
""")

_OLDEST = database.Statement("SELECT position FROM after_hours_events ORDER BY position LIMIT 1")

_REMOVE = database.Statement(f"""
DELETE FROM after_hours_events WHERE position <= (
    SELECT max(position) FROM (
        SELECT position, placed_at FROM after_hours_events ORDER BY position LIMIT :most
    ) AS oldest
    WHERE placed_at <= (SELECT {fragments.NOW}) - CAST(:retention AS interval)
)
RETURNING position
""")


@dataclasses.dataclass(frozen=True, slots=True)
class Event:
    """A transition in its place: `session` as it left it, or without its user and place if they were erased since."""

    position: int
    type: str
    happened_at: datetime.datetime
    session: session.Session


class Outbox:
    """The events in `database`. All raise `errors.StoreUnavailable`, and `database.Retry` if nothing was done."""

    def __init__(self, database: database.Database) -> None:
        self._database = database

    async def place(self, most: int, *, wait: bool = False) -> bool:
        """Give places to at most `most` committed events; whether there may be more.

        If another is at it, that is left to them; with `wait` it is waited for.
        """
        [outbox] = await self._database.fetch(_ANY)
        if not outbox["any"] and not wait:
            return False
        async with self._database.transaction() as run:
            held = await run(LOCK if wait else _LOCK_IF_FREE)
            if not held:
                return False
            last = held[0]["last_position"]
            [placed] = await run(_PLACE, last=last, most=most)
        return bool(placed["last_position"] - last == most)

    async def last(self) -> int:
        """Read the last position."""
        [row] = await self._database.fetch(_LAST)
        position: int = row["last_position"]
        return position

    async def after(
        self, position: int, upto: int, most: int, user_ids: collections.abc.Collection[session.UserId] | None = None
    ) -> list[Event]:
        """Read at most `most` events after a position, all or those of some users. Raise CursorExpired."""
        if user_ids is None:
            found = await self._database.fetch(_AFTER, after=position, upto=upto, most=most)
        else:
            found = await self._database.fetch(
                _AFTER_OF_USERS, user_ids=list(user_ids), after=position, upto=upto, most=most
            )
        # Looked at after the reading: positions have no gaps, and are removed from the first one on.
        oldest = await self._database.fetch(_OLDEST)
        if position < upto and (not oldest or oldest[0]["position"] > position + 1):
            raise errors.CursorExpired
        return [Event(row["position"], row["type"], row["happened_at"], rows.session_of(row)) for row in found]

    async def remove(self, retention: datetime.timedelta, most: int) -> int:
        """Remove at most `most` events that were placed `retention` ago or earlier, the oldest first."""
        return len(await self._database.fetch(_REMOVE, retention=retention, most=most))

    async def listen(self, wake: asyncio.Event) -> None:
        """Set `wake` whenever events were placed, until the connection is lost or the task is cancelled."""
        with contextlib.suppress(OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError):
            await self._database.listen(CHANNEL, wake.set)
