"""The database's clock, as this process knows it between two looks at it."""

import time

from afterhours_grpc.store import store

# Looks a measurement takes; the quickest answer tells the time best.
_LOOKS = 3


class Clock:
    """An estimate of the database's clock, in epoch seconds, that needs neither this machine's clock nor Redis'.

    It is off by at most half the quickest round trip of the last `measure`, and by what the clocks drifted since.
    Read by the scheduler's thread; a float is replaced as a whole.
    """

    def __init__(self) -> None:
        self._offset: float | None = None

    @property
    def known(self) -> bool:
        """Whether it has been measured."""
        return self._offset is not None

    def now(self) -> float:
        """Give the database's time; nothing is due before the first measurement."""
        return float("-inf") if self._offset is None else time.monotonic() + self._offset

    async def measure(self, store: store.Store) -> None:
        """Look at the database's clock. Raise `errors.StoreUnavailable`."""
        looks = []
        for _ in range(_LOOKS):
            asked = time.monotonic()
            at = await store.clock()
            answered = time.monotonic()
            looks.append((answered - asked, at.timestamp() - (asked + answered) / 2))
        self._offset = min(looks)[1]
