"""The commands. Every setting is also a flag of the commands that serve."""

import asyncio
import contextlib
import dataclasses
import json
import os
import pathlib
import secrets
import shlex
import shutil
import sys
import typing

import typer

from afterhours_grpc import administration, calls, logs, metrics, output, serving, settings
from afterhours_grpc import app as service_app
from afterhours_grpc import doctor as examination
from afterhours_grpc.embedded import postgres, process, redis
from afterhours_grpc.flags import refuse, with_settings
from afterhours_grpc.sessions import location, session
from afterhours_grpc.store import connections, database, schema, store

app = typer.Typer(
    help="Afterhours: sessions that end by themselves, on time.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(calls.app, name="call")
app.add_typer(administration.app)

DEMO = session.UserId("demo")
# Seconds between two looks at the engines of dev.
_LOOK = 0.5


@app.command()
@with_settings
def serve(flags: dict[str, str]) -> None:
    """Serve on DATABASE_URL and REDIS_URL until SIGTERM."""
    try:
        config = settings.load(flags)
        failed = asyncio.run(serving.serve(config, flags, _console(config), leave=True))
    except (settings.SettingsError, service_app.StartError) as error:
        refuse(error)
    raise typer.Exit(failed)


@app.command()
@with_settings
def migrate(flags: dict[str, str]) -> None:
    """Bring the database to the newest schema; safe to run twice, and by two at once."""
    try:
        url = settings.load(flags).database_url
        if not url:
            refuse("DATABASE_URL is not set: set it to postgresql://…")
        version = asyncio.run(database.patiently(lambda: schema.migrate(url)))
    except (settings.SettingsError, schema.SchemaError, connections.CannotConnect) as error:
        refuse(error)
    typer.echo(f"the schema is at version {version}")


@app.command()
@with_settings
def dev(
    flags: dict[str, str],
    data_dir: typing.Annotated[
        pathlib.Path | None, typer.Option(help="Where data is kept between runs.", show_default=False)
    ] = None,
) -> None:
    """Serve on a Postgres and a Redis of its own, with a profile for the user demo."""
    directory = (data_dir or _data_dir()).resolve()
    try:
        flags = {**_defaults(settings.load(flags), directory), **flags}
        with (
            postgres.Postgres(directory / "postgres", bindir=settings.load(flags).postgres_bin) as truth,
            redis.Redis(directory / "redis") as timers,
        ):
            flags = {**flags, "DATABASE_URL": truth.url, "REDIS_URL": timers.url}
            config = settings.load(flags)
            config.check()
            console = _console(config)
            console.print(f"data      {directory}\nPostgres  {truth.url}\nRedis     {timers.url}")
            failed = asyncio.run(_dev(config, flags, console, truth, timers))
    except (process.EngineError, settings.SettingsError, service_app.StartError) as error:
        refuse(error)
    except (schema.SchemaError, connections.CannotConnect) as error:
        refuse(error)
    raise typer.Exit(failed)


@app.command()
@with_settings
def doctor(
    flags: dict[str, str],
    as_json: typing.Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Look at all that the service stands on, and say what is wrong and what to do."""
    try:
        config = settings.load(flags)
    except settings.SettingsError as error:
        refuse(error)
    findings = asyncio.run(examination.examine(config))
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(each) for each in findings], indent=2))
    else:
        for each in findings:
            advice = f"; {each.advice}" if each.advice else ""
            typer.echo(f"{each.level.value:8}{each.name}: {each.told}{advice}")
    raise typer.Exit(int(any(each.level is examination.Level.WRONG for each in findings)))


def _console(config: settings.Settings) -> output.Console:
    """Set up logging and stdout, neither of which waits for its reader."""
    log = logs.configure(config.log_format)
    metrics.count("afterhours_log_lines_dropped", "Lines of the log that could not be written.", lambda: log.dropped)
    return output.Console(log)


def _data_dir() -> pathlib.Path:
    # Root's home is closed to the user that Postgres runs as.
    return pathlib.Path("/var/lib/afterhours") if os.geteuid() == 0 else pathlib.Path.home() / ".local/share/afterhours"


def _defaults(given: settings.Settings, directory: pathlib.Path) -> dict[str, str]:
    """Return the settings of `dev` that nobody gave. Raise SettingsError."""
    for name, listen in (("AFTERHOURS_LISTEN", given.listen), ("AFTERHOURS_METRICS_LISTEN", given.metrics_listen)):
        if listen and not listen.on_loopback:
            raise settings.SettingsError(f"{name} of dev must be a loopback address, such as 127.0.0.1:0: see `serve`")
    defaults = {} if "auth" in given.model_fields_set else {"AFTERHOURS_AUTH": "none"}
    return defaults if given.fuzz_key else {**defaults, "AFTERHOURS_FUZZ_KEY": _fuzz_key(directory)}


def _fuzz_key(directory: pathlib.Path) -> str:
    """Return the fuzz key that is kept with the data, made at the first run. Raise SettingsError."""
    kept = directory / "fuzz_key"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not kept.exists():
            # Linked when it is written, so that nobody reads half a key, whoever is killed or runs at the same time.
            draft = directory / f"fuzz_key.{os.getpid()}"
            process.write_private(draft, f"1:{secrets.token_urlsafe(32)}")
            with contextlib.suppress(FileExistsError):
                os.link(draft, kept)
            draft.unlink()
        text = kept.read_text()
        location.FuzzKey.parse(text)
    except OSError as error:
        told = f"{directory} cannot be used ({error.strerror}): choose another by --data-dir"
        raise settings.SettingsError(told) from error
    except ValueError:
        raise settings.SettingsError(f"{kept} is damaged: put it back, or remove it, which moves everyone") from None
    return text


async def _dev(
    config: settings.Settings,
    flags: dict[str, str],
    console: output.Console,
    truth: postgres.Postgres,
    timers: redis.Redis,
) -> int:
    """Serve until SIGTERM or SIGINT, and return the exit status. Raise EngineError when an engine ends before."""
    await schema.migrate(truth.url)
    db = database.Database(truth.url)
    try:
        profiles = store.Store(db)
        if not await profiles.get_profiles([DEMO]):
            await profiles.put_profile(session.Profile(DEMO, identity_verified=True, location_consent=True))
    finally:
        await db.close()
    serve = asyncio.create_task(serving.serve(config, flags, console, _greeting))
    while not serve.done():
        await asyncio.wait({serve}, timeout=_LOOK)
        for name, engine in (("Postgres", truth), ("Redis", timers)):
            if not engine.alive and not serve.done():
                serve.cancel()
                await asyncio.wait({serve})
                raise process.EngineError(f"the {name} of dev ended: start dev again (log: {engine.log})")
    return serve.result()


def _greeting(address: str) -> str:
    body = '{"user_id": "demo", "duration": "900s", "location": {"latitude": 52.5163, "longitude": 13.3777}}'
    method = "afterhours.v1.SessionService/StartSession"
    return f"""
Try it in another terminal:

  {_program("grpcurl")} -plaintext -d {shlex.quote(body)} {address} {method}
  {_program("afterhours-grpc")} call extend demo --target {address}
  {_program("afterhours-grpc")} call end demo --target {address}
  {_program("afterhours-grpc")} call start demo --latitude 52.5163 --longitude 13.3777 --target {address}
  {_program("afterhours-grpc")} call get demo --target {address}
"""


def _program(name: str) -> str:
    """Give a program as it can be called from here: by name, or by its path beside our interpreter."""
    beside = pathlib.Path(sys.prefix) / "bin" / name
    found = shutil.which(name)
    if not beside.exists() or (found and pathlib.Path(found).samefile(beside)):
        return name
    return shlex.quote(os.path.relpath(beside))
