"""Named points at which the process kills itself, as a power cut would: tests show what the next one makes of it.

Off, and then one comparison each, unless AFTERHOURS_FAIL_POINT names one.
"""

import enum
import os
import signal


class Point(enum.StrEnum):
    """Where a process may die."""

    STARTED = "started"  # a start is committed, its timer is not written
    TIMED = "timed"  # its timer is written, its caller is not answered
    SWEPT = "swept"  # a batch of overdue sessions is closed, the next is not
    DELETED = "deleted"  # a profile is deleted and not committed, its session is not ended
    PUT = "put"  # a profile that closes a gate is written and not committed, its session is not ended
    ERASED = "erased"  # a user is erased and that is not committed
    MIGRATED = "migrated"  # a migration has run and is not committed


_armed: set[Point] = set()


def arm(point: Point) -> None:
    """Die at the first pass of this point."""
    _armed.add(point)


def reach(point: Point) -> None:
    """Die here, if this point is armed."""
    if _armed and point in _armed:
        os.kill(os.getpid(), signal.SIGKILL)
