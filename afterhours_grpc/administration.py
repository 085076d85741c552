"""What an operator does to one user: end a session, answer data-protection requests, sign a token for development."""

import asyncio
import collections.abc
import dataclasses
import time
import typing

import tenacity
import typer

from afterhours_grpc import setting_types, settings
from afterhours_grpc.expiry import clock, schedule
from afterhours_grpc.flags import refuse, with_settings
from afterhours_grpc.rpc import tokens
from afterhours_grpc.sessions import errors, session
from afterhours_grpc.store import connections, database, privacy, schema, store

app = typer.Typer()

Result = typing.TypeVar("Result")

# Seconds for which a command tries to get a lock that others hold.
_PATIENCE = 10.0

_LONGEST_TEXT = 255


def _text(value: str) -> str:
    if not 0 < len(value) <= _LONGEST_TEXT:
        raise typer.BadParameter(f"must have 1 to {_LONGEST_TEXT} code points")
    return value


User = typing.Annotated[str, typer.Argument(help="The user's id.", metavar="USER", callback=_text)]
Reference = typing.Annotated[
    str,
    typer.Option(
        help="What is recorded of the reason, such as a ticket's number. Nothing about the user.", callback=_text
    ),
]


@app.command()
@with_settings
def end(flags: dict[str, str], user: User) -> None:
    """End the user's active session, with the end reason ADMIN."""
    ended = _run(flags, lambda opened: opened.end(session.UserId(user)))
    if not ended:
        refuse("the user has no active session")
    typer.echo(f"ended session {ended.id}")


@app.command()
@with_settings
def erase_user(flags: dict[str, str], user: User, reference: Reference) -> None:
    """End the user's session, remove all that is stored of the user, and record that under a digest of the id."""
    erased = _run(flags, lambda opened: opened.erase(session.UserId(user), reference))
    profile = "the profile" if erased.profile else "no profile"
    typer.echo(f"erased {profile} and {erased.sessions} sessions, of which {len(erased.ended)} ended now")


@app.command()
@with_settings
def export_user(flags: dict[str, str], user: User, reference: Reference) -> None:
    """Print all that is stored of the user as JSON, exact locations included, and record that."""
    typer.echo(_run(flags, lambda opened: opened.personal.export_user(session.UserId(user), reference)))


@app.command()
@with_settings
def token(
    flags: dict[str, str],
    user: User,
    scope: typing.Annotated[str, typer.Option(help="Scopes, separated by spaces.")] = "",
    lifetime: typing.Annotated[str, typer.Option(help="How long it is good for, such as 15m.")] = "1h",
) -> None:
    """Sign a token with AFTERHOURS_JWT_SECRET, for development."""
    try:
        config = settings.load(flags)
        seconds = setting_types.length(lifetime).total_seconds()
    except (settings.SettingsError, ValueError) as error:
        refuse(error)
    if not config.jwt_secret:
        refuse("AFTERHOURS_JWT_SECRET is not set: set it to the secret of the server")
    expected = tokens.Expected(config.jwt_issuer, config.jwt_audience)
    typer.echo(tokens.signed(config.jwt_secret.get_secret_value(), user, scope, seconds, expected))


@dataclasses.dataclass(frozen=True)
class _Opened:
    sessions: store.Store
    personal: privacy.Privacy
    schedule: schedule.Schedule

    async def end(self, user_id: session.UserId) -> session.Session | None:
        deadline = session.Deadline(time.monotonic() + _PATIENCE, of_caller=False)
        [ended] = await self.sessions.end([session.End(user_id, None, deadline)], session.EndReason.ADMIN)
        await self.schedule.drop_of([ended.id] if ended else [])
        return ended

    async def erase(self, user_id: session.UserId, reference: str) -> privacy.Erased:
        erased = await self.personal.erase_user(user_id, reference)
        await self.schedule.drop_of(erased.ended)
        return erased


def _run(flags: dict[str, str], do: collections.abc.Callable[[_Opened], collections.abc.Awaitable[Result]]) -> Result:
    """Do something on the database, again while another holds what it needs; end with one line if it cannot be done."""

    async def run(config: settings.Settings, url: str) -> Result:
        await schema.check(url)
        opened = database.Database(url)
        sessions = store.Store(opened)
        timed = schedule.Schedule(config.redis_url, sessions, clock.Clock())
        try:
            async for attempt in tenacity.AsyncRetrying(
                retry=tenacity.retry_if_exception_type(database.Retry),
                wait=tenacity.wait_random_exponential(multiplier=0.05, max=1),
                stop=tenacity.stop_after_delay(_PATIENCE),
                reraise=True,
            ):
                with attempt:
                    return await do(_Opened(sessions, privacy.Privacy(opened), timed))
        finally:
            await timed.close()
            await opened.close()
        raise database.Retry

    try:
        config = settings.load(flags)
        if not config.database_url:
            refuse("DATABASE_URL is not set: set it to postgresql://…")
        return asyncio.run(run(config, config.database_url))
    except (settings.SettingsError, schema.SchemaError, connections.CannotConnect) as error:
        refuse(error)
    except (errors.StoreUnavailable, database.StatementFailed) as error:
        refuse(connections.cannot_connect(error.__cause__ or error))
    except database.Retry:
        refuse(f"another one held the user's rows for {_PATIENCE:.0f} s: run it again")
