"""The health monitor: what the services' health says, by what Postgres answers."""

import asyncio
import collections.abc
import time

import structlog

from afterhours_grpc import logs
from afterhours_grpc.sessions import errors
from afterhours_grpc.store import database, store

log = structlog.get_logger()

# Seconds between two checks of Postgres and of the scheduler, and that a check may take. A check that is given up costs
# a connection, so a slow Postgres gets the time that a new connection and a statement need.
_INTERVAL = 1.0
_TIMEOUT = 2.0
# Seconds for which Postgres may be unreachable before health says NOT_SERVING.
_PATIENCE = 5.0


class HealthMonitor:
    """Keeps health honest: NOT_SERVING while Postgres does not accept writes for more than 5 s.

    SERVING comes back once what is overdue has been closed. What it knows survives a restart of `run`. `serving` sets
    the health of the services, and `failed` is set when the scheduler has died, which only a new process brings back.
    """

    def __init__(
        self,
        database: database.Database,
        store: store.Store,
        close_overdue: collections.abc.Callable[[], collections.abc.Awaitable[object]],
        scheduler_alive: collections.abc.Callable[[], bool],
        serving: collections.abc.Callable[[bool], None],
        failed: asyncio.Event,
    ) -> None:
        self._database = database
        self._store = store
        self._close_overdue = close_overdue
        self._scheduler_alive = scheduler_alive
        self._set_serving = serving
        self._failed = failed
        self._serving = True
        self._answered = time.monotonic()

    async def run(self) -> None:
        """Check every second, until cancelled."""
        while True:
            began = time.monotonic()
            await asyncio.sleep(_INTERVAL)
            if time.monotonic() - began > 2 * _INTERVAL:
                # The whole process was stopped (SIGSTOP, a machine that slept). Nothing is known of that time, and the
                # scheduler was stopped too.
                self._answered = time.monotonic()
            elif not self._scheduler_alive():
                log.error("scheduler_died")
                self._failed.set()
            await self.run_once()

    async def run_once(self) -> None:
        """Check Postgres, and set the services' health."""
        began = time.monotonic()
        try:
            async with asyncio.timeout(_TIMEOUT):
                await self._store.check_writable()
            await self._recover()
        except (errors.StoreUnavailable, TimeoutError):
            self._give_up(began)
        except database.Retry:  # a lock on the table: the server is there
            self._answered = time.monotonic()
        except Exception as error:  # noqa: BLE001 - whatever it is, Postgres did not answer as it should
            log.error("health_check_failed", **logs.described(error))
            self._give_up(began)
        self._set_serving(self._serving)

    async def _recover(self) -> None:
        self._answered = time.monotonic()
        if not self._serving:
            await self._close_overdue()
            self._serving = True
            log.info("serving_again")

    def _give_up(self, began: float) -> None:
        """Count a check that failed, unless it shows nothing about Postgres.

        Other statements were answered, so that it is only busy with what callers do; or the whole process was stopped
        during the check.
        """
        stopped = time.monotonic() - began > 2 * _TIMEOUT
        if self._database.answered_at > began or stopped:
            self._answered = time.monotonic()
        away = time.monotonic() - self._answered
        if self._serving and away > _PATIENCE:
            self._serving = False
            log.error("postgres_unreachable", seconds=round(away, 1))
