"""The database's clock, as this process knows it between two looks at it."""

import asyncio
import contextlib
import time
import typing

from afterhours_grpc.sessions import errors
from afterhours_grpc.store import database, store

# Looks a measurement takes; the quickest answer tells the time best.
_LOOKS = 3
# Seconds after which a measurement is repeated, however rarely the sweep takes one: clocks drift and are set, another
# server's differs, and time.monotonic() stands still while a machine is suspended.
_LONGEST_AGE = 6.0


class Clock:
    """An estimate of the database's clock, in epoch seconds, that needs neither this machine's clock nor Redis'.

    It is off by at most half the quickest round trip of the last `measure`, and by what the clocks drifted since.
    Read by the scheduler's thread; a float is replaced as a whole.
    """

    def __init__(self) -> None:
        self._offset: float | None = None
        self._measured_at = float("-inf")

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
        self._measured_at = time.monotonic()

    async def run(self, store: store.Store) -> typing.NoReturn:
        """Repeat measurements that are 6 s old, until cancelled."""
        while True:
            await asyncio.sleep(1)
            if time.monotonic() - self._measured_at >= _LONGEST_AGE:
                with contextlib.suppress(errors.StoreUnavailable, database.Retry):
                    await self.measure(store)
