"""CPU time of trees of processes."""

import contextlib
import typing

import psutil


def seconds(pid: int) -> float:
    """Give the CPU seconds that a process, its children of now and those that ended before have used."""
    root = psutil.Process(pid)
    used = 0.0
    for process in (root, *root.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            used += times.user + times.system + times.children_user + times.children_system
    return used


def resident(pid: int) -> int:
    """Give the bytes of memory that a process and its children hold."""
    root = psutil.Process(pid)
    held = 0
    for process in (root, *root.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            held += typing.cast("int", process.memory_info().rss)
    return held


class Meter:
    """Measures what the trees of some pids use from its construction on."""

    def __init__(self, pids: dict[str, int]) -> None:
        self._pids = pids
        self._before = {name: seconds(pid) for name, pid in pids.items()}

    def used(self) -> dict[str, float]:
        """Give the CPU seconds of each tree since the construction."""
        return {name: seconds(pid) - self._before[name] for name, pid in self._pids.items()}
