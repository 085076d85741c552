"""The chaos run in its short form; `make chaos` is the long one."""

import asyncio
import random

import chaos
import pair
import pytest
import replicas
import stage

pytestmark = pytest.mark.alone


async def test_what_callers_see_under_chaos_is_linearizable(engines: replicas.Engines) -> None:
    """Three replicas, killed, stopped and restarted under load, answer as one that does one thing at a time would."""
    plan = chaos.Plan(random.randrange(10**6), seconds=9, users=40, rate=250, stopped=2, interval=1, quiet=1)
    report = await chaos.run(stage.Stage(engines, engines), plan)
    assert not report.faults, str(report)
    assert report.calls["start OK"] > 40


@pair.needed
def test_failovers_under_chaos() -> None:
    """The same while Postgres fails over, Redis becomes a replica, nobody reads a log, and watchers read nothing."""
    only = ("fail_over", "switch", "stall", "stick", "terminate")
    plan = chaos.Plan(random.randrange(10**6), 9, 40, rate=150, stopped=2, interval=1, quiet=1, only=only)

    async def staged(servers: stage.Servers) -> chaos.Report:
        async with servers.stage() as reached:
            return await chaos.run(reached, plan)

    with stage.running() as servers:
        report = asyncio.run(staged(servers))
    assert not report.faults, str(report)
    assert report.calls["start OK"] > 20
