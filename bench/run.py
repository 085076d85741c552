"""The table of `make bench`: our calls beside what they are compared with, on this machine, in one run.

In each round every system has every operation measured at every concurrency, so that what else happens on the machine
meets all of them. All systems run throughout, on one Postgres and one Redis with default durability; one at a time is
under load.
"""

import asyncio
import contextlib
import json
import os
import pathlib
import platform
import sys
import typing

import cost
import peers
import report
import systems
import typer

# Seconds of a first run of each operation that is not counted: connections, prepared statements, compilers.
_WARM_UP = 1.0


def main(
    rounds: int = 3,
    seconds: float = 3.0,
    concurrency: str = "1,32,128",
    users: int = 20_000,
    only: typing.Annotated[str, typer.Option(help="Systems, comma-separated; all by default.")] = "",
    transport: typing.Annotated[str, typer.Option(help="grpcio or native, of ours and of the empty call.")] = "grpcio",
    setting: typing.Annotated[list[str] | None, typer.Option(help="NAME=VALUE, a setting of ours.")] = None,
    request_ids: typing.Annotated[bool, typer.Option(help="Give each of our calls a request_id.")] = False,
    json_file: typing.Annotated[pathlib.Path | None, typer.Option("--json", help="Write all figures there.")] = None,
) -> None:
    """Measure, and print the table."""
    settings = dict(each.split("=", 1) for each in setting or ())
    if transport != "grpcio":
        settings["AFTERHOURS_TRANSPORT"] = transport
    levels = [int(each) for each in concurrency.split(",")]
    before = os.getloadavg()
    with systems.bench(users) as bench:
        measured = _systems(bench, settings, transport, set(filter(None, only.split(","))), request_ids=request_ids)
        cells = asyncio.run(_measured(measured, rounds, seconds, levels))
    about = {
        "machine": f"{os.cpu_count()} CPUs, {platform.machine()}, {platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "run": f"{rounds} rounds of {seconds:g} s, {users} users, {transport}, settings {setting or 'default'}",
        "load average": f"{before[0]:.1f} before, {os.getloadavg()[1]:.1f} in the last five minutes",
    }
    found = report.Report(cells, transport, about)
    for line in found.lines():
        typer.echo(line)
    if json_file:
        json_file.write_text(json.dumps(found.json(), indent=1))
    if any(cell.seen.errors for cell in cells):
        _tell("some calls failed: the counts stand in the table, the statuses in the lines above")
        raise typer.Exit(1)


def _systems(
    bench: systems.Bench, settings: dict[str, str], transport: str, only: set[str], *, request_ids: bool
) -> list[systems.System]:
    ours = systems.Ours(bench, settings, with_request_ids=request_ids)
    all_of_them: list[tuple[systems.System, str | None]] = [
        (ours, None),
        (systems.Empty(bench, transport), None),
        (peers.Pgbench(bench, ours), None if peers.Pgbench.program() else "pgbench is not found"),
        (peers.Express(bench), peers.Express.missing()),
        (peers.Etcd(bench), peers.Etcd.missing()),
    ]
    wanted = [(system, missing) for system, missing in all_of_them if not only or system.name in only | {"ours"}]
    for system, missing in wanted:
        if missing:
            _tell(f"{system.name} is left out: {missing}; `make bench-setup` installs it")
    return [system for system, missing in wanted if not missing]


async def _measured(
    measured: list[systems.System], rounds: int, seconds: float, levels: list[int]
) -> list[report.Cell]:
    cells: list[report.Cell] = []
    async with contextlib.AsyncExitStack() as stack:
        for system in measured:
            await stack.enter_async_context(system.running())
            for operation in system.operations:
                await system.prepare(operation)
                await system.measure(operation, max(levels), _WARM_UP)
        for number in range(1, rounds + 1):
            for level in levels:
                for system in measured:
                    cells.extend([await _cell(system, each, level, number, seconds) for each in system.operations])
    return cells


async def _cell(system: systems.System, operation: str, level: int, number: int, seconds: float) -> report.Cell:
    await system.prepare(operation)
    meter = cost.Meter(system.pids)
    seen = await system.measure(operation, level, seconds)
    cell = report.Cell(number, system.name, operation, level, seen, {**meter.used(), "generator": seen.cpu})
    failed = f", FAILED {seen.errors}" if seen.errors else ""
    _tell(f"round {number} {system.name} {operation} x{level}: {cell.rate:.0f}/s{failed}")
    return cell


def _tell(line: str) -> None:
    sys.stderr.write(f"{line}\n")


if __name__ == "__main__":
    typer.run(main)
