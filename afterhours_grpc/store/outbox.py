"""Events, from the outbox where transitions write them to the positions where they are read.

A transition's event is committed with it, in no order relative to those of other users. `place` then moves whatever is
committed to `after_hours_events` and gives it positions without a gap, one transaction at a time. So a reader has
missed nothing before the position that it has read, and a transaction that stays open delays no event but its own.

While somebody holds a snapshot (a dump, a forgotten session, a standby's feedback), rows that were deleted or updated
stay in the way of every scan, so neither is asked for here:

- Positions are locked by an advisory lock, and the last one is that of the newest event, not a row that counts.
- The newest event of each placing stores the snapshot that the outbox was read with, as its `horizon`: everything that
  was committed by then has its position. What is left in the outbox are rows of transactions that were not, and these
  are found by transaction id, without a scan of what was moved before.
"""

import asyncio
import collections.abc
import dataclasses
import datetime

from afterhours_grpc.sessions import errors, session
from afterhours_grpc.store import database, fragments, rows

CHANNEL = "afterhours_events"

# Held until the transaction ends, which works behind a pooler, too. One number for every database: "outbox" as
# big-endian bytes.
_KEY = int.from_bytes(b"outbox")
# The events of all users wait for the lock, so a process that vanishes or stops while it holds it loses it after 0.5 s.
_BRIEFLY = "set_config('idle_in_transaction_session_timeout', '500', true)"
# Waits longer than a vanished process keeps the lock. Postgres evaluates the columns from left to right.
_LOCKED = f"""set_config('lock_timeout', '2000', true), pg_advisory_xact_lock({_KEY}),
    set_config('lock_timeout', '500', true), {_BRIEFLY}"""
LOCK = database.Statement(f"SELECT {_LOCKED}")
# For placing: a bitmap scan would read and sort a whole backlog to place the first part of it.
_IN_ORDER = "set_config('enable_bitmapscan', 'off', true)"
_WAIT = database.Statement(f"SELECT true AS held, {_LOCKED}, {_IN_ORDER}")
_TRY = database.Statement(f"SELECT pg_try_advisory_xact_lock({_KEY}) AS held, {_BRIEFLY}, {_IN_ORDER}")

# Events that one statement moves, and among how many of the outbox it looks for the oldest. Events of one user have
# ids in their order, while transaction ids may be in another where transactions overlapped: the difference is more rows
# than all transactions that can run at once write.
_PLACED = 10_000
_CANDIDATES = 200_000
_MOST_POSITIONS = 2**63 - 1

_COLUMNS = """type, happened_at, session_id, user_id, started_at, expires_at, ended_at, end_reason,
    fuzzed_latitude, fuzzed_longitude, fuzz_radius_meters"""

# As rows.session_of reads them.
_READABLE = _COLUMNS.replace("expires_at", f"{fragments.readable('expires_at')} AS expires_at")
_READ = f"{_READABLE}, session_id AS id, happened_at AS as_of"

# The newest event. A horizon that lies in the future is that of another server, from which this database was restored:
# then everything in the outbox is looked at, as it is where there is no event yet.
LAST = """
    last AS MATERIALIZED (
        SELECT coalesce(event.position, 0) AS position, coalesce(event.placed_at, 'epoch') AS placed_at,
            CASE WHEN pg_snapshot_xmax(CAST(event.horizon AS pg_snapshot)) <= pg_snapshot_xmax(pg_current_snapshot())
                THEN CAST(event.horizon AS pg_snapshot) ELSE '1:1:' END AS horizon
        FROM (SELECT) AS always LEFT JOIN LATERAL (
            SELECT position, placed_at, horizon FROM after_hours_events ORDER BY position DESC LIMIT 1
        ) AS event ON true
    )"""


def unplaced(limit: str = "") -> str:
    """Return a query for what has no position yet: of transactions in progress at the horizon, then of newer ones."""
    return f"""(
        SELECT ctid AS row, id, user_id FROM after_hours_outbox
        WHERE xid = ANY(ARRAY(SELECT pg_snapshot_xip(last.horizon) FROM last)) {limit}
    ) UNION ALL (
        SELECT ctid AS row, id, user_id FROM after_hours_outbox
        WHERE xid >= (SELECT pg_snapshot_xmax(last.horizon) FROM last) ORDER BY xid, id {limit}
    )"""


_LOOK = database.Statement(f"""
WITH {LAST},
    waiting AS ({unplaced("LIMIT 1")})
SELECT last.position, last.placed_at, (SELECT count(*) FROM waiting) > 0 AS waiting FROM last
""")

# Run while the lock is held, and so with a snapshot that has what others placed before.
_PLACE = database.Statement(f"""
WITH {LAST},
    candidate AS MATERIALIZED ({unplaced("LIMIT :candidates")}),
    extent AS MATERIALIZED (SELECT count(*) <= CAST(:most AS bigint) AS complete FROM candidate),
    moved AS (
        DELETE FROM after_hours_outbox
        WHERE ctid = ANY(ARRAY(SELECT candidate.row FROM candidate ORDER BY candidate.id LIMIT :most))
        RETURNING *
    ),
    placed AS (
        INSERT INTO after_hours_events (position, placed_at, horizon, {_COLUMNS})
        SELECT last.position + row_number() OVER (ORDER BY moved.id), clock_timestamp(),
            CASE WHEN row_number() OVER (ORDER BY moved.id DESC) > 1 THEN NULL
                WHEN extent.complete THEN CAST(pg_current_snapshot() AS text) ELSE CAST(last.horizon AS text) END,
            {_COLUMNS}
        FROM moved CROSS JOIN extent CROSS JOIN last
        RETURNING position, placed_at
    )
SELECT extent.complete, coalesce(newest.position, last.position) AS position,
    coalesce(newest.placed_at, last.placed_at) AS placed_at,
    CASE WHEN newest.position IS NOT NULL THEN pg_notify('{CHANNEL}', '') END
FROM last CROSS JOIN extent LEFT JOIN (
    SELECT position, placed_at FROM placed ORDER BY position DESC LIMIT 1
) AS newest ON true
""")

_LAST = database.Statement(f"WITH {LAST} SELECT last.position, last.placed_at FROM last")

# Whether the history still has the event that was read last, in the same snapshot as what comes after it. Before the
# first event there is nothing that a history could have lost.
_ORIGIN = """
    origin AS MATERIALIZED (
        SELECT CASE WHEN CAST(:after AS bigint) > 0 THEN EXISTS (
            SELECT FROM after_hours_events WHERE position = :after AND placed_at = CAST(:placed_at AS timestamptz)
        ) ELSE EXISTS (SELECT FROM after_hours_events WHERE position = 1)
            OR (SELECT position FROM after_hours_events ORDER BY position DESC LIMIT 1) IS NULL END AS known
    )"""

_AFTER = database.Statement(f"""
WITH {_ORIGIN}
SELECT origin.known, event.* FROM origin LEFT JOIN LATERAL (
    SELECT position, placed_at, {_READ} FROM after_hours_events
    WHERE origin.known AND position > :after AND position <= :upto ORDER BY position LIMIT :most
) AS event ON true
ORDER BY position
""")

_AFTER_OF_USERS = database.Statement(f"""
WITH {_ORIGIN}
SELECT origin.known, event.* FROM origin LEFT JOIN LATERAL (
    SELECT of_user.* FROM unnest(CAST(:user_ids AS text[])) AS asked(user_id) CROSS JOIN LATERAL (
        SELECT position, placed_at, {_READ} FROM after_hours_events AS e
        WHERE origin.known AND e.user_id = asked.user_id AND position > :after AND position <= :upto
        ORDER BY position LIMIT :most
    ) AS of_user
    ORDER BY position LIMIT :most
) AS event ON true
ORDER BY position
""")

# The newest event that is past its retention stays: a cursor there has missed nothing. What was removed before is
# skipped, unless it is there again because a backup was restored.
_REMOVE = database.Statement(f"""
WITH since AS MATERIALIZED (
        SELECT CASE WHEN EXISTS (SELECT FROM after_hours_events WHERE position = :removed)
            THEN 0 ELSE CAST(:removed AS bigint) END AS removed
    ),
    kept AS MATERIALIZED (
        SELECT max(position) AS position FROM (
            SELECT position, placed_at FROM after_hours_events
            WHERE position > (SELECT removed FROM since) ORDER BY position LIMIT CAST(:most AS bigint) + 1
        ) AS oldest
        WHERE placed_at <= (SELECT {fragments.NOW}) - CAST(:retention AS interval)
    )
DELETE FROM after_hours_events
WHERE position > (SELECT removed FROM since) AND position < (SELECT position FROM kept)
RETURNING position
""")


@dataclasses.dataclass(frozen=True, slots=True)
class Event:
    """A transition in its place: `session` as it left it, or without its user and place if they were erased since."""

    position: session.Position
    type: str
    happened_at: datetime.datetime
    session: session.Session


class Outbox:
    """The events in `database`. All raise `errors.StoreUnavailable`, and `database.Retry` if nothing was done."""

    def __init__(self, database: database.Database) -> None:
        self._database = database
        # Every event up to here was removed.
        self._removed = 0

    async def place(self, *, wait: bool = False) -> session.Position:
        """Give positions to the events that are committed, and return the last position.

        If another process does so already, it is left to that one; with `wait` it is waited for.
        """
        while True:
            [look] = await self._database.fetch(_LOOK)
            if not look["waiting"]:
                return _position(look)
            async with self._database.transaction() as run:
                [lock] = await run(_WAIT if wait else _TRY)
                if not lock["held"]:
                    return _position(look)
                [placed] = await run(_PLACE, most=_PLACED, candidates=_CANDIDATES)
            if placed["complete"]:
                return _position(placed)

    async def last(self) -> session.Position:
        """Read the last position."""
        [row] = await self._database.fetch(_LAST)
        return _position(row)

    async def after(
        self,
        position: session.Position,
        most: int,
        *,
        upto: session.Position | None = None,
        user_ids: collections.abc.Collection[session.UserId] | None = None,
    ) -> list[Event]:
        """Read at most `most` events after a position, up to another one; all, or those of some users.

        Raise CursorExpired if the database does not have the event at the position, which it removed, or lost.
        """
        span = {
            "after": position.number,
            "placed_at": position.placed_at,
            "upto": upto.number if upto else _MOST_POSITIONS,
            "most": most,
        }
        if user_ids is None:
            found = await self._database.fetch(_AFTER, **span)
        else:
            found = await self._database.fetch(_AFTER_OF_USERS, **span, user_ids=list(user_ids))
        if not found[0]["known"]:
            raise errors.CursorExpired
        return [
            Event(_position(row), row["type"], row["happened_at"], rows.session_of(row))
            for row in found
            if row["position"]
        ]

    async def remove(self, retention: datetime.timedelta, most: int) -> int:
        """Remove at most `most` events that were placed `retention` ago or earlier, the oldest first.

        The newest of these stays.
        """
        found = await self._database.fetch(_REMOVE, retention=retention, most=most, removed=self._removed)
        self._removed = max((row["position"] for row in found), default=self._removed)
        return len(found)

    async def listen(self, wake: asyncio.Event) -> None:
        """Set `wake` whenever events were placed, until the connection is lost or the task is cancelled."""
        await self._database.listen(CHANNEL, wake.set)


def _position(row: database.Row) -> session.Position:
    return session.Position(row["position"], row["placed_at"])
