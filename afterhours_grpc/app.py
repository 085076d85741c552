"""The composition root: one context manager builds the service in order, and tears it down in reverse."""

import asyncio
import collections.abc
import contextlib
import time

import asyncpg
import prometheus_client
import structlog
import tenacity

from afterhours_grpc import background, credentials, metrics, settings, throttle
from afterhours_grpc.events import feed
from afterhours_grpc.expiry import clock, reconciler, schedule
from afterhours_grpc.rpc import auth, certificates, cursors, rendering, server, wire
from afterhours_grpc.sessions import errors, listing, location, service
from afterhours_grpc.store import database, outbox, privacy, schema, store
from afterhours_grpc.store import lists as store_lists

log = structlog.get_logger()

# Seconds for which Postgres may be unreachable at the start, and later before health says NOT_SERVING.
_PATIENCE_AT_START = 10
_PATIENCE = 5.0
# Seconds between two looks at Postgres and at the scheduler, and that a look may take.
_LOOK = 1.0
# Seconds for which new calls are told that the server is shutting down, before its port closes.
_FAREWELL = 0.5
# Of the longest time from SIGTERM to exit, the share in which calls in flight may end.
_DRAINING = 0.7


class StartError(Exception):
    """The service cannot start; the message is one line and says what to do."""


def cannot_listen(variable: str, host: str, port: int) -> StartError:
    """Give the error for an address, of a setting, that is not to be had."""
    return StartError(f"cannot listen on {host}:{port}: set {variable} to a free address")


class Service:
    """A running service, at `address`."""

    def __init__(
        self,
        database: database.Database,
        store: store.Store,
        server: server.Server,
        schedule: schedule.Schedule,
        reconciler: reconciler.Reconciler,
        address: str,
    ) -> None:
        self.database = database
        self.address = address
        # Set when something died that only a new process brings back.
        self.failed = asyncio.Event()
        self._store = store
        self._server = server
        self._schedule = schedule
        self._reconciler = reconciler

    async def watch(self) -> None:
        """Keep health honest: SERVING while Postgres answers, once what is overdue has been closed."""
        answered = time.monotonic()
        serving = True
        while True:
            looked = time.monotonic()
            await asyncio.sleep(_LOOK)
            # Where the whole process was stopped (SIGSTOP, a machine that slept) the scheduler has not looked either,
            # and is given until the next look.
            was_stopped = time.monotonic() - looked > 2 * _LOOK
            if not self._schedule.alive and not was_stopped:
                log.error("scheduler_died")
                self.failed.set()
            try:
                async with asyncio.timeout(_LOOK):
                    await self._store.clock()
                if not serving:
                    await self._reconciler.close_overdue()
                    log.info("serving_again")
                    serving = True
                answered = time.monotonic()
            except (errors.StoreUnavailable, database.Retry, TimeoutError):
                away = time.monotonic() - answered
                if serving and away > _PATIENCE:
                    serving = False
                    log.error("postgres_unreachable", seconds=round(away, 1))
            await self._server.serving(serving)


@contextlib.asynccontextmanager
async def running(
    config: settings.Settings, leave: collections.abc.Callable[[], None] = lambda: None
) -> collections.abc.AsyncIterator[Service]:
    """Run the service: SERVING when entered; drained, then closed when left. Raise StartError or SettingsError.

    `leave` is called when all but the port is closed, and may end the process: calls that come so late are then told
    UNAVAILABLE by their transport, while grpc's own stop tells those in its queue CANCELLED, which nobody retries.
    """
    config.check()
    assert config.database_url and config.fuzz_key  # noqa: S101, PT018 - checked just now
    async with contextlib.AsyncExitStack() as last, contextlib.AsyncExitStack() as stack:
        db = database.Database(config.database_url)
        stack.push_async_callback(db.close)
        session_store = store.Store(db, store.Rules(config.gates, config.warning_lead))
        personal = privacy.Privacy(db)
        events = outbox.Outbox(db)
        database_clock = clock.Clock()
        timed = schedule.Schedule(config.redis_url, session_store, database_clock)
        stack.push_async_callback(timed.close)
        sweeper = reconciler.Reconciler(
            session_store,
            personal,
            events,
            timed,
            database_clock,
            config.reconcile_interval,
            reconciler.Retention(config.exact_location_retention, config.history_retention, config.event_retention),
        )
        tasks = background.Background()
        stack.push_async_callback(tasks.stop)
        authenticate, encryption = await _known(config, tasks)
        for each in timed.kinds:
            tasks.keep("timer writes", each.write)
        await _ready(config.database_url, sweeper)

        for each in timed.kinds:
            tasks.keep("timer fires", each.fire)
        tasks.keep("reconciler", sweeper.run)
        timed.start()
        stack.push_async_callback(timed.stop)
        watched = feed.Feed(events, session_store.noted, rendering.event_bytes)
        tasks.keep("events", watched.run)
        tasks.keep("notifications", watched.listen)
        if config.metrics_listen:
            host, port = config.metrics_listen
            stack.callback(_export(host, port + (config.worker or 0) if port else 0))

        sessions, profiles, lists = _use_cases(config, stack, db, session_store, personal, timed)
        grpc_server = server.Server(
            sessions,
            profiles,
            lists,
            watched,
            wire.Durations(config.durations),
            cursors.Pages(key.secret for key in config.fuzz_key),
            authenticate,
            encryption=encryption,
            transport=config.transport,
            with_reflection=config.reflection,
            shared=config.worker is not None,
        )
        last.push_async_callback(grpc_server.stop)
        address = await _listening(grpc_server, *config.listen)
        await grpc_server.serving(True)
        built = Service(db, session_store, grpc_server, timed, sweeper, address)
        watch = tasks.keep("watch", built.watch)
        last.callback(leave)
        try:
            yield built
        finally:
            watch.cancel()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(config.drain.total_seconds() * _DRAINING):
                    await grpc_server.drain(_FAREWELL)


def _use_cases(
    config: settings.Settings,
    stack: contextlib.AsyncExitStack,
    db: database.Database,
    session_store: store.Store,
    personal: privacy.Privacy,
    timed: schedule.Schedule,
) -> tuple[service.Sessions, service.Profiles, listing.Listing]:
    limiter = throttle.Throttle(config.redis_url, config.rate_limit) if config.rate_limit else None
    if limiter:
        stack.push_async_callback(limiter.close)
    fuzzer = location.Fuzzer(config.fuzz_key or ())
    sessions = service.Sessions(session_store, personal, timed, fuzzer, limiter)
    profiles = service.Profiles(session_store, timed)
    lists = listing.Listing(store_lists.Lists(db))
    for each in (sessions, profiles, lists):
        stack.push_async_callback(each.close)
    return sessions, profiles, lists


async def _ready(url: str, sweeper: reconciler.Reconciler) -> None:
    """Wait for Postgres, check its schema, and close what is overdue. Raise StartError."""
    away = (OSError, TimeoutError, asyncpg.CannotConnectNowError, errors.StoreUnavailable)
    try:
        async for attempt in tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(away),
            wait=tenacity.wait_fixed(0.2),
            stop=tenacity.stop_after_delay(_PATIENCE_AT_START),
            reraise=True,
        ):
            with attempt:
                await schema.check(url)
                await sweeper.close_overdue()
    except schema.SchemaError as error:
        raise StartError(str(error)) from error
    except (*away, asyncpg.PostgresError, asyncpg.InterfaceError, ValueError) as error:
        raise StartError(
            f"Postgres at DATABASE_URL cannot be used ({type(error).__name__}): check the URL, and that it runs"
        ) from error


async def _known(
    config: settings.Settings, tasks: background.Background
) -> tuple[auth.Authenticator, certificates.Encryption | None]:
    try:
        return await credentials.configured(config, tasks)
    except credentials.CredentialsError as error:
        raise StartError(str(error)) from error


async def _listening(grpc_server: server.Server, host: str, port: int) -> str:
    try:
        return f"{host}:{await grpc_server.start(host, port)}"
    except OSError:
        raise cannot_listen("AFTERHOURS_LISTEN", host, port) from None


def _export(host: str, port: int) -> collections.abc.Callable[[], None]:
    try:
        exporter, _ = prometheus_client.start_http_server(port, host, registry=metrics.REGISTRY)
    except OSError:
        raise cannot_listen("AFTERHOURS_METRICS_LISTEN", host, port) from None
    return exporter.shutdown
