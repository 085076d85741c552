"""Whoever may write to Redis can delay a timer, and nothing else: run no code, and end, prolong or open no session."""

import asyncio
import datetime
import os
import pathlib
import pickle
import time

import redis.asyncio
import replicas


class Payload:
    """What APScheduler's own store would have run when it read its jobs."""

    def __init__(self, mark: pathlib.Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self._mark),)


async def test_a_redis_writer(engines: replicas.Engines, tmp_path: pathlib.Path) -> None:
    """Pickles, jobs of nobody, and jobs moved, doubled and removed leave each session as it is, to its very end."""
    mark = tmp_path / "ran"
    pickled = pickle.dumps({"func": Payload(mark), "args": (), "id": "one"})
    settings = {"AFTERHOURS_RECONCILE_INTERVAL": "1s", "AFTERHOURS_RATE_LIMIT": "100"}
    async with (
        replicas.process(engines, **settings) as (process, client),
        redis.asyncio.Redis.from_url(engines.redis_url) as writer,
    ):
        for user_id in ("ada", "bob", "eve"):
            await client.put_profile(user_id)
        short = {user_id: await client.start(user_id, 2) for user_id in ("ada", "bob")}
        long = await client.start("eve")
        now, later = time.time(), time.time() + 86400

        def job(session_id: str) -> str:
            return f"session:expire:{session_id}"

        # Due at once, a day late, and gone.
        await writer.zadd("afterhours:jobs", {job(long.id): 0, job(short["ada"].id): later})
        await writer.zrem("afterhours:jobs", job(short["bob"].id))
        forged = ["../../etc/passwd", replicas.request_id()]
        members = [pickled, b"session:end:ada", b"\xff\x00", *(job(each).encode() for each in forged)]
        await writer.zadd("afterhours:jobs", dict.fromkeys(members, now))
        for key in ("apscheduler.jobs", "afterhours:apscheduler.jobs"):
            await writer.hset(key, "one", pickled)
            await writer.zadd(f"{key[:-4]}run_times", {"one": now})

        async def over() -> bool:
            return not await engines.rows(
                "SELECT FROM after_hours_sessions WHERE ended_at IS NULL AND user_id <> 'eve'"
            )

        await replicas.eventually(over, within=5)
        rows = await engines.rows("SELECT * FROM after_hours_sessions ORDER BY user_id")
        assert [(row["user_id"], row["end_reason"]) for row in rows] == [
            ("ada", "EXPIRED"),
            ("bob", "EXPIRED"),
            ("eve", None),
        ]
        assert all(row["expires_at"] - row["started_at"] == datetime.timedelta(seconds=2) for row in rows[:2])
        assert (await client.get("eve")).session.expire_time == long.expire_time
        # Whoever forges the counts of a limit gives or takes what Redis is asked for, and never an end.
        async for key in writer.scan_iter("afterhours:rate*"):
            await writer.delete(key)
            # Within the last minute: what lies in the future does not count.
            await writer.lpush(key, *(200 * [str(now)]))
        assert (await replicas.refused(client.extend("eve"))).reason == "RATE_LIMITED"
        assert (await client.end("eve")).id == long.id
        await asyncio.sleep(0.5)
        assert not mark.exists()
        assert process.pid
