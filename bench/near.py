"""What a page of ListActiveSessions near a place costs Postgres, with a million active sessions: by EXPLAIN ANALYZE."""

import argparse
import asyncio
import datetime
import json
import pathlib
import statistics
import sys
import tempfile
import time
import typing

import asyncpg

from afterhours_grpc.embedded import postgres
from afterhours_grpc.sessions import listing, location
from afterhours_grpc.store import database, lists, schema

CITY = location.ExactLocation(52.52, 13.405)
_FILL = """
INSERT INTO after_hours_sessions (user_id, started_at, expires_at, latitude, longitude, fuzzed_latitude,
    fuzzed_longitude, fuzz_radius_meters, fuzz_key_version, fuzz_cell)
SELECT 'user ' || n, now() - random() * interval '14 min', now() + interval '1 h', 0, 0,
    -- Evenly over a disc of 10 km around the city, and the others all over the land between two latitudes.
    CASE WHEN n <= $1 THEN 52.52 + r * sin(a) * 10 / 111.195 ELSE degrees(asin(random() * 1.8 - 0.9)) END,
    CASE WHEN n <= $1 THEN 13.405 + r * cos(a) * 10 / (111.195 * cosd(52.52)) ELSE random() * 360 - 180 END,
    1000, 1, 1
FROM (SELECT n, sqrt(random()) AS r, random() * 2 * pi() AS a FROM generate_series(1, $2::int) AS n) AS scattered
"""


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")


class Explained(database.Database):
    """A database that explains each statement that it runs, and adds up their times, in milliseconds."""

    def __init__(self, url: str, connection: asyncpg.Connection) -> None:
        super().__init__(url)
        self._plain = connection
        self.milliseconds = 0.0
        self.plan = ""

    async def fetch(self, statement: database.Statement, **parameters: typing.Any) -> list[database.Row]:
        """Run a statement, and explain it."""
        known = {**parameters, "clock_offset": self.clock_offset}
        values = [known[name] for name in statement.names]
        explained = await self._plain.fetchval(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {statement.sql}", *values)
        self.milliseconds += json.loads(explained)[0]["Execution Time"]
        lines = await self._plain.fetch(f"EXPLAIN (ANALYZE, COSTS OFF) {statement.sql}", *values)
        self.plan = "\n".join(line[0] for line in lines)
        return await super().fetch(statement, **parameters)


async def main(sessions: int, within: int, rounds: int) -> None:
    """Fill a Postgres of its own, and measure pages of several sizes and radii."""
    with tempfile.TemporaryDirectory() as folder, postgres.Postgres(pathlib.Path(folder) / "postgres") as truth:
        await schema.migrate(truth.url)
        connection = await database.connect(truth.url)
        await connection.execute("SET statement_timeout = 0")
        began = time.monotonic()
        await connection.execute(_FILL.replace("$1", str(within)).replace("$2::int", str(sessions)))
        await connection.execute("VACUUM ANALYZE after_hours_sessions")
        _say(f"{sessions:,} active sessions, {within:,} within 10 km; filled in {time.monotonic() - began:.0f} s")
        for radius, size in ((10_000.0, 50), (10_000.0, 1000), (500.0, 50), (200_000.0, 50)):
            times = []
            for _ in range(rounds):
                explained = Explained(truth.url, connection)
                near = listing.Near(CITY, radius, -1.0, listing.FIRST[1])
                found = await lists.Lists(explained).near(near, datetime.timedelta(), size + 1)
                times.append(explained.milliseconds)
                await explained.close()
            _say(
                f"radius {radius / 1000:g} km, first {size}: {statistics.median(times):.1f} ms of Postgres"
                f" ({min(times):.1f}-{max(times):.1f}); {len(found)} found, the last {found[-1][1]:.0f} m away"
            )
            if (radius, size) == (10_000.0, 50):
                _say(explained.plan)
        await connection.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sessions", type=int, default=1_000_000)
    parser.add_argument("--within", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    asyncio.run(main(arguments.sessions, arguments.within, arguments.rounds))
