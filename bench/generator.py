"""The load generator, `load/load.c`: what it is told, and what it saw."""

import asyncio
import dataclasses
import json
import pathlib

PROGRAM = pathlib.Path(__file__).parent / "build" / "load"


@dataclasses.dataclass(frozen=True)
class Target:
    """Calls of one operation. `wraps` if each user may be called again; `least` bytes are in an answer that counts."""

    protocol: str
    address: str
    path: str
    requests: pathlib.Path
    wraps: bool = False
    least: int = 0


@dataclasses.dataclass(frozen=True)
class Seen:
    """What a run saw. Only calls answered OK are in `calls` and the latencies; `cpu` are the generator's seconds."""

    calls: int
    seconds: float
    p50_ms: float
    p99_ms: float
    max_ms: float
    cpu: float
    errors: dict[str, int]


async def run(target: Target, concurrency: int, seconds: float, connections: int = 4) -> Seen:
    """Keep `concurrency` calls in flight for `seconds`, or until no user is left."""
    arguments = (target.protocol, target.address, target.path or "/", target.requests, concurrency)
    limits = (min(concurrency, connections), seconds, int(target.wraps), target.least)
    process = await asyncio.create_subprocess_exec(
        PROGRAM, *map(str, (*arguments, *limits)), stdout=asyncio.subprocess.PIPE
    )
    output, _ = await process.communicate()
    if process.returncode:
        raise RuntimeError(f"the load generator ended with status {process.returncode}")
    return Seen(**json.loads(output))
