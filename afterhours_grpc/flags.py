"""What commands share: a flag for each setting, and one line for what keeps them from running."""

import collections.abc
import inspect
import typing

import typer

from afterhours_grpc import output, settings


def refuse(error: object) -> typing.NoReturn:
    """End with one line and exit status 1, whether or not anybody reads stderr."""
    output.LineWriter(2).write(f"afterhours-grpc: {error}".encode(errors="backslashreplace"))
    raise typer.Exit(1)


def with_settings(command: collections.abc.Callable[..., None]) -> collections.abc.Callable[..., None]:
    """Give a command, beside its own parameters, a flag for each setting; it gets those that were given."""
    own = [each for each in inspect.signature(command).parameters.values() if each.name != "flags"]
    fields = settings.Settings.model_fields
    generated = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=typing.Annotated[
                str | None,
                typer.Option(
                    f"--{name.replace('_', '-')}",
                    help=f"{field.description} [{field.validation_alias}]",
                    show_default=False,
                ),
            ],
        )
        for name, field in fields.items()
    ]

    def run(**arguments: typing.Any) -> None:
        flags = {
            str(fields[name].validation_alias): value
            for name, value in arguments.items()
            if name in fields and value is not None
        }
        command(flags=flags, **{each.name: arguments[each.name] for each in own})

    return taking([*own, *generated], run, command)


def taking(
    parameters: collections.abc.Iterable[inspect.Parameter],
    run: collections.abc.Callable[..., None],
    command: collections.abc.Callable[..., None],
) -> collections.abc.Callable[..., None]:
    """Give `run` the parameters that typer is to see, and the name and the help of `command`."""
    parameters = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in parameters]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    return run
