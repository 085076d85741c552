"""`call`: a client for people. Prints an answer that can be read, or with --json the message itself."""

import collections.abc
import contextlib
import dataclasses
import inspect
import json
import pathlib
import typing
import uuid

import grpc
import typer
from afterhours.v1 import session_event_pb2, session_pb2, session_service_pb2, session_service_pb2_grpc
from google.protobuf import duration_pb2, json_format, message

from afterhours_client import errors, requests
from afterhours_grpc import flags, output, setting_types, settings

app = typer.Typer(help="Call a server, as a person would.", no_args_is_help=True)

User = typing.Annotated[str, typer.Argument(help="The user's id.", metavar="USER")]
RequestId = typing.Annotated[
    str | None, typer.Option(help="A UUID that makes a retry safe; a new one by default.", show_default=False)
]
Length = typing.Annotated[str, typer.Option(help="How long: 15m, 30m or 60m, unless the operator says otherwise.")]
_File = pathlib.Path | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Connection:
    """What every command takes: the server, the caller, and how to print."""

    target: typing.Annotated[
        str | None, typer.Option(help="host:port of the server; by default AFTERHOURS_LISTEN.", show_default=False)
    ] = None
    token: typing.Annotated[
        str | None,
        typer.Option(
            help="A token, as `afterhours-grpc token` signs one.", envvar="AFTERHOURS_TOKEN", show_default=False
        ),
    ] = None
    ca: typing.Annotated[_File, typer.Option(help="PEM: TLS, with this CA.", show_default=False)] = None
    cert: typing.Annotated[_File, typer.Option(help="PEM: TLS, with this client certificate.", show_default=False)] = (
        None
    )
    key: typing.Annotated[_File, typer.Option(help="PEM: its key.", show_default=False)] = None
    timeout: typing.Annotated[float, typer.Option(help="Deadline in seconds.")] = 5
    as_json: typing.Annotated[bool, typer.Option("--json", help="Print the answer, or the error, as JSON.")] = False

    @property
    def options(self) -> dict[str, typing.Any]:
        """What goes with each call: its deadline and its credentials."""
        return {
            "timeout": min(self.timeout, requests.LONGEST_TIMEOUT),
            "metadata": requests.metadata(self.token),
        }

    @contextlib.contextmanager
    def stub(self) -> collections.abc.Iterator[session_service_pb2_grpc.SessionServiceStub]:
        """Give a stub; tell a failed call, and end with exit status 1."""
        try:
            requests.metadata(self.token)
            address = self.target or str(settings.load({}).listen)
            channel = self._channel(address)
        except (settings.SettingsError, ValueError) as error:
            flags.refuse(error)
        except OSError as error:
            flags.refuse(f"{error.filename} cannot be read: choose another file")
        with channel:
            try:
                yield session_service_pb2_grpc.SessionServiceStub(channel)
            except grpc.RpcError as error:
                _tell_failure(errors.AfterhoursError.of(error), address, self.as_json)
                raise typer.Exit(1) from None

    def _channel(self, address: str) -> grpc.Channel:
        if bool(self.cert) != bool(self.key):
            flags.refuse("--cert and --key belong together: give both or neither")
        if not self.ca and not self.cert:
            return grpc.insecure_channel(address)
        # Without a CA the library trusts those that it brings.
        ca, key, cert = (each.read_bytes() if each else None for each in (self.ca, self.key, self.cert))
        return grpc.secure_channel(address, grpc.ssl_channel_credentials(ca, key, cert))


def _connected(command: collections.abc.Callable[..., None]) -> collections.abc.Callable[..., None]:
    """Give a command, beside its own parameters, those of a connection."""
    own = [each for each in inspect.signature(command).parameters.values() if each.name != "connection"]
    shared = list(inspect.signature(Connection).parameters.values())

    def run(**arguments: typing.Any) -> None:
        connection = Connection(**{each.name: arguments.pop(each.name) for each in shared})
        command(connection=connection, **arguments)

    return flags.taking([*own, *shared], run, command)


@app.command()
@_connected
def start(
    connection: Connection,
    user: User,
    latitude: typing.Annotated[float, typer.Option(help="Degrees, WGS 84.")],
    longitude: typing.Annotated[float, typer.Option(help="Degrees, WGS 84.")],
    duration: Length = "15m",
    request_id: RequestId = None,
) -> None:
    """Open the user's session."""
    request = session_service_pb2.StartSessionRequest(
        user_id=user,
        duration=_duration(duration),
        location=session_pb2.Location(latitude=latitude, longitude=longitude),
        request_id=request_id or str(uuid.uuid4()),
    )
    with connection.stub() as stub:
        _tell(stub.StartSession(request, **connection.options), connection.as_json)


@app.command()
@_connected
def end(connection: Connection, user: User, request_id: RequestId = None) -> None:
    """End the user's active session."""
    request = session_service_pb2.EndSessionRequest(user_id=user, request_id=request_id or str(uuid.uuid4()))
    with connection.stub() as stub:
        _tell(stub.EndSession(request, **connection.options), connection.as_json)


@app.command()
@_connected
def extend(
    connection: Connection, user: User, additional_duration: Length = "15m", request_id: RequestId = None
) -> None:
    """Move the end of the user's active session."""
    request = session_service_pb2.ExtendSessionRequest(
        user_id=user,
        additional_duration=_duration(additional_duration),
        request_id=request_id or str(uuid.uuid4()),
    )
    with connection.stub() as stub:
        _tell(stub.ExtendSession(request, **connection.options), connection.as_json)


@app.command()
@_connected
def get(connection: Connection, user: User) -> None:
    """Show the user's active session."""
    request = session_service_pb2.GetSessionRequest(user_id=user)
    with connection.stub() as stub:
        _tell(stub.GetSession(request, **connection.options), connection.as_json)


@app.command()
@_connected
def watch(
    connection: Connection,
    users: typing.Annotated[list[str] | None, typer.Argument(help="Whose sessions; by default everybody's.")] = None,
    cursor: typing.Annotated[str, typer.Option(help="Go on after this one; by default from now on.")] = "",
) -> None:
    """Print what happens to sessions as it happens, until Ctrl-C. Each line ends with its cursor."""
    request = session_service_pb2.WatchSessionsRequest(user_ids=users or [], cursor=cursor)
    with connection.stub() as stub, contextlib.suppress(KeyboardInterrupt):
        for response in stub.WatchSessions(request, metadata=connection.options["metadata"]):
            _tell_event(response.event, connection.as_json)


def _tell_event(event: session_event_pb2.SessionEvent, as_json: bool) -> None:
    if as_json:
        typer.echo(json_format.MessageToJson(event, indent=None))
        return
    kind = session_event_pb2.SessionEventType.Name(event.type).removeprefix("SESSION_EVENT_TYPE_")
    told = [event.event_time.ToJsonString(), f"{kind:9}"]
    if event.HasField("session"):
        session = event.session
        told += [
            session.id,
            output.printable(session.user_id) or "(erased)",
            f"expires {session.expire_time.ToJsonString()}",
        ]
        if session.HasField("end_time"):
            told.append(session_pb2.EndReason.Name(session.end_reason).removeprefix("END_REASON_"))
    typer.echo("  ".join([*told, event.cursor]))


def _duration(text: str) -> duration_pb2.Duration:
    try:
        length = setting_types.length(text)
    except ValueError as error:
        raise typer.BadParameter(f"{error}") from None
    duration = duration_pb2.Duration()
    duration.FromTimedelta(length)
    return duration


def _tell(response: message.Message, as_json: bool) -> None:
    if as_json:
        typer.echo(json_format.MessageToJson(response, always_print_fields_with_no_presence=True))
        return
    if not response.HasField("session"):
        typer.echo("no active session")
        return
    session: session_pb2.Session = response.session  # type: ignore[attr-defined]
    state = session_pb2.SessionState.Name(session.state).removeprefix("SESSION_STATE_").lower()
    typer.echo(f"session {session.id} of {output.printable(session.user_id)} is {state}")
    typer.echo(f"  started    {session.start_time.ToJsonString()}")
    typer.echo(f"  expires    {session.expire_time.ToJsonString()}")
    if session.HasField("end_time"):
        reason = session_pb2.EndReason.Name(session.end_reason).removeprefix("END_REASON_")
        typer.echo(f"  ended      {session.end_time.ToJsonString()} ({reason})")
    else:
        typer.echo(f"  remaining  {session.remaining.ToTimedelta()}")
    shown = session.fuzzed_location
    typer.echo(f"  shown at   {shown.latitude}, {shown.longitude}, within {session.fuzz_radius_meters:.0f} m")


def _tell_failure(error: errors.AfterhoursError, address: str, as_json: bool) -> None:
    code, told = error.code.name, str(error.args[0])
    if not error.reason and error.code is grpc.StatusCode.UNAVAILABLE:
        told = (
            f"No server can be reached at {output.printable(address)} ({output.printable(told)}):"
            " start one by `afterhours-grpc dev`, or check --target, --ca, --cert and --key."
        )
    if as_json:
        failure = {"code": code, "reason": error.reason, "message": told, "metadata": error.metadata}
        typer.echo(json.dumps({**failure, "violations": error.violations}, indent=2))
        return
    typer.echo(" ".join(part for part in (code, error.reason) if part), err=True)
    typer.echo(told, err=True)
    for name, value in sorted(error.metadata.items()):
        typer.echo(f"  {name}: {value}", err=True)
