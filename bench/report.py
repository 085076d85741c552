"""What the rounds saw, as tables for people and as JSON: medians with least and most, and ratios within a round."""

import collections
import collections.abc
import dataclasses
import statistics
import typing

import generator


@dataclasses.dataclass(frozen=True)
class Cell:
    """One system's operation at one concurrency in one round. `cpu` are seconds by tree, the generator's among them."""

    round: int
    system: str
    operation: str
    concurrency: int
    seen: generator.Seen
    cpu: dict[str, float]

    @property
    def rate(self) -> float:
        """Calls answered OK, a second."""
        return self.seen.calls / self.seen.seconds if self.seen.calls else 0.0

    def micros(self, tree: str) -> float | None:
        """CPU microseconds of a tree for each call, or None if the system has no such tree."""
        return self.cpu[tree] / self.seen.calls * 1e6 if tree in self.cpu and self.seen.calls else None


# At least so many times E's rate, at concurrency 32 and 128, and Express'; see the README.
_OF_EMPTY = {
    "grpcio": {"start": 0.70, "get": 0.90, "extend": 0.75, "end": 0.75},
    "native": {"start": 0.30, "get": 0.50, "extend": 0.35, "end": 0.35},
}
_OF_EXPRESS = {
    "grpcio": {"start": 3.5, "get": 1.2, "extend": 2.5, "end": 1.6},
    "native": {"start": 8.0, "get": 4.0, "extend": 7.0, "end": 4.0},
}
_OF_ETCD = {"grpcio": {}, "native": {"start": 1.0, "get": 1.0}}
# At most so many times the p50 of a lone empty call.
_LONE = {"get": 2.0, "start": 3.5}

_TREES = ("server", "postgres", "redis", "generator")
_LINE = "{:<8}{:<9}{:>22}{:>9}{:>9}{:>8}{:>9}{:>7}{:>10}{:>8}"
_Key = tuple[str, str, int]


class Report:
    """All cells of a run."""

    def __init__(self, cells: collections.abc.Sequence[Cell], transport: str, about: dict[str, typing.Any]) -> None:
        self._cells: dict[_Key, list[Cell]] = collections.defaultdict(list)
        for cell in cells:
            self._cells[cell.operation, cell.system, cell.concurrency].append(cell)
        self._transport = transport
        self._about = about

    def json(self) -> dict[str, typing.Any]:
        """Give everything, for a program."""
        cells = [
            {
                **dataclasses.asdict(cell),
                "calls_per_second": cell.rate,
                "cpu_us_per_call": {tree: cell.micros(tree) for tree in cell.cpu},
            }
            for cells in self._cells.values()
            for cell in cells
        ]
        return {"about": self._about, "cells": cells, "ratios": list(self._ratios())}

    def lines(self) -> collections.abc.Iterator[str]:
        """Give the tables."""
        yield from (f"{name}: {value}" for name, value in self._about.items())
        for concurrency in sorted({concurrency for _, _, concurrency in self._cells}):
            yield f"\nconcurrency {concurrency}; CPU in microseconds a call"
            yield _LINE.format(
                *("call", "system", "calls/s (least-most)", "p50 ms", "p99 ms"),
                *("server", "postgres", "redis", "generator", "errors"),
            )
            for operation, system, _ in (key for key in self._cells if key[2] == concurrency):
                yield self._line(operation, system, self._cells[operation, system, concurrency])
        yield "\nratios of calls/s within a round, of p50 for `lone`"
        for ratio in self._ratios():
            target = ratio["target"]
            told = f"target {ratio['sense']} {target}: {'reached' if ratio['reached'] else 'MISSED'}" if target else ""
            yield (
                f"{ratio['name']:<26}x{ratio['concurrency']:<5}{ratio['median']:>7.2f}"
                f"  ({ratio['least']:.2f}-{ratio['most']:.2f})  {told}"
            )

    def _line(self, operation: str, system: str, cells: list[Cell]) -> str:
        rates = [cell.rate for cell in cells]
        trees = []
        for tree in _TREES:
            micros = [used for cell in cells if (used := cell.micros(tree)) is not None]
            trees.append(f"{statistics.median(micros):.0f}" if micros else "-")
        errors = sum(sum(cell.seen.errors.values()) for cell in cells)
        return _LINE.format(
            operation,
            system,
            f"{statistics.median(rates):,.0f} ({min(rates):,.0f}-{max(rates):,.0f})",
            f"{statistics.median(cell.seen.p50_ms for cell in cells):.2f}",
            f"{statistics.median(cell.seen.p99_ms for cell in cells):.2f}",
            *trees,
            errors,
        )

    def _ratios(self) -> collections.abc.Iterator[dict[str, typing.Any]]:
        for operation, system, concurrency in self._cells:
            if system != "ours":
                continue
            targets = {
                "empty": _OF_EMPTY[self._transport].get(operation) if concurrency > 1 else None,
                "express": _OF_EXPRESS[self._transport].get(operation) if concurrency == 32 else None,
                "etcd": _OF_ETCD[self._transport].get(operation) if concurrency == 32 else None,
                "pgbench": None,
            }
            for other, target in targets.items():
                key = ("empty" if other == "empty" else operation, other, concurrency)
                pairs = self._pairs((operation, system, concurrency), key)
                ratios = [ours.rate / theirs.rate for ours, theirs in pairs if theirs.rate]
                yield from self._ratio(f"{operation} / {other}", concurrency, ratios, target, ">=")
            if concurrency == 1 and operation in _LONE:
                pairs = self._pairs((operation, system, 1), ("empty", "empty", 1))
                ratios = [ours.seen.p50_ms / theirs.seen.p50_ms for ours, theirs in pairs if theirs.rate]
                yield from self._ratio(f"{operation} / empty, lone", 1, ratios, _LONE[operation], "<=")

    def _pairs(self, ours: _Key, theirs: _Key) -> list[tuple[Cell, Cell]]:
        by_round = {cell.round: cell for cell in self._cells.get(theirs, ())}
        return [(cell, by_round[cell.round]) for cell in self._cells[ours] if cell.round in by_round]

    def _ratio(
        self, name: str, concurrency: int, ratios: list[float], target: float | None, sense: str
    ) -> collections.abc.Iterator[dict[str, typing.Any]]:
        if not ratios:
            return
        median = statistics.median(ratios)
        yield {
            "name": name,
            "concurrency": concurrency,
            "median": median,
            "least": min(ratios),
            "most": max(ratios),
            "sense": sense,
            "target": target,
            "reached": None if target is None else median >= target if sense == ">=" else median <= target,
        }
