"""The chaos run in its short form; `make chaos` is the long one."""

import random

import chaos
import replicas


async def test_what_callers_see_under_chaos_is_linearizable(engines: replicas.Engines) -> None:
    """Three replicas, killed, stopped and restarted under load, answer as one that does one thing at a time would."""
    plan = chaos.Plan(random.randrange(10**6), seconds=9, users=40, rate=250, stopped=2, interval=1, quiet=1)
    report = await chaos.run(engines, plan)
    assert not report.faults, str(report)
    assert report.calls["start OK"] > 40
