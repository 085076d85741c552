"""The composition root: one context manager builds the service in order, and tears it down in reverse."""

import asyncio
import collections.abc
import contextlib
import functools

import prometheus_client
import structlog

from afterhours_grpc import address, background, credentials, health_monitor, metrics, settings, throttle
from afterhours_grpc.events import feed
from afterhours_grpc.expiry import clock, reconciler, schedule
from afterhours_grpc.rpc import auth, certificates, cursors, rendering, server, wire
from afterhours_grpc.sessions import listing, location, service
from afterhours_grpc.store import connections, database, outbox, privacy, schema, store
from afterhours_grpc.store import lists as store_lists

log = structlog.get_logger()

# Seconds for which new calls are told that the server is shutting down, before its port closes.
_FAREWELL = 0.5
# Of the longest time from SIGTERM to exit, the share in which calls in flight may end.
_DRAINING = 0.7


class StartError(Exception):
    """The service cannot start; the message is one line and says what to do."""


def cannot_listen(variable: str, host: str, port: int) -> StartError:
    """Give the error for an address, of a setting, that is not to be had."""
    return StartError(f"cannot listen on {address.Address(host, port)}: set {variable} to a free address")


class Service:
    """A running service, at `address`."""

    def __init__(
        self,
        database: database.Database,
        store: store.Store,
        schedule: schedule.Schedule,
        reconciler: reconciler.Reconciler,
        address: str,
        failed: asyncio.Event,
    ) -> None:
        self.database = database
        self.address = address
        # Set when something died that only a new process brings back.
        self.failed = failed
        # Tests look at these.
        self._store = store
        self._schedule = schedule
        self._reconciler = reconciler


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
        tasks.keep("clock", functools.partial(database_clock.run, session_store))
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
        listening = await _listening(grpc_server, *config.listen)
        grpc_server.serving(True)
        failed = asyncio.Event()
        monitor = health_monitor.HealthMonitor(
            db, session_store, sweeper.close_overdue, lambda: timed.alive, grpc_server.serving, failed
        )
        tasks.keep("health", monitor.run)
        last.callback(leave)
        try:
            yield Service(db, session_store, timed, sweeper, listening, failed)
        finally:
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

    async def begin() -> None:
        await schema.check(url)
        await sweeper.close_overdue()

    try:
        await database.patiently(begin)
    except (schema.SchemaError, connections.CannotConnect) as error:
        raise StartError(str(error)) from error
    except database.StatementFailed as error:
        raise StartError(str(connections.cannot_connect(error.__cause__ or error))) from error


async def _known(
    config: settings.Settings, tasks: background.Background
) -> tuple[auth.Authenticator, certificates.Encryption | None]:
    try:
        return await credentials.configured(config, tasks)
    except credentials.CredentialsError as error:
        raise StartError(str(error)) from error


async def _listening(grpc_server: server.Server, host: str, port: int) -> str:
    try:
        return str(address.Address(host, await grpc_server.start(host, port)))
    except OSError:
        raise cannot_listen("AFTERHOURS_LISTEN", host, port) from None


def _export(host: str, port: int) -> collections.abc.Callable[[], None]:
    try:
        exporter, _ = prometheus_client.start_http_server(port, host, registry=metrics.REGISTRY)
    except OSError:
        raise cannot_listen("AFTERHOURS_METRICS_LISTEN", host, port) from None
    return exporter.shutdown
