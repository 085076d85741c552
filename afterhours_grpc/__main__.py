"""`python -m afterhours_grpc`, and the console script."""

import collections.abc
import importlib.util
import os
import signal
import sys


def main() -> None:
    """Run the commands, or say what to install: the stubs alone come without them."""
    _open_standard_files()
    # A server that is stopped before it serves has nothing to drain. Of any other command the status must not say that
    # it was done. Until all is imported not by an exception, which Python 3.11 turns into another in some places.
    serves = sys.argv[1:2] in (["serve"], ["dev"])
    status = 0 if serves else 128 + signal.SIGTERM
    signals = (signal.SIGTERM, signal.SIGINT) if serves else (signal.SIGTERM,)
    _handle(signals, lambda *_: os._exit(status))
    try:
        "".join(sys.argv).encode()
    except UnicodeEncodeError:
        sys.exit("afterhours-grpc: an argument is not valid UTF-8: check what was typed")
    missing = [name for name in ("typer", "sqlalchemy", "apscheduler") if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit("afterhours-grpc: the service is not installed: pip install 'afterhours-grpc[server]'")
    # The library's core would write lines of its own to stderr, beside the one that a refusal promises.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # noqa: TID251 - written, and before grpc is loaded
    from afterhours_grpc import cli  # noqa: PLC0415 - only now is it known to be importable

    def undo(*_: object) -> None:
        # A second signal must not interrupt what the first one has begun.
        _handle(signals, lambda *_: None)
        sys.exit(status)

    if sys.argv[1:2] != ["serve"]:  # it has nothing to undo until it receives signals itself
        _handle(signals, undo)
    try:
        cli.app()
    finally:
        # At its end the interpreter drops handlers, and a signal would kill the process with another status.
        _handle(signals, signal.SIG_IGN)


def _handle(
    signals: collections.abc.Iterable[signal.Signals], handler: collections.abc.Callable[..., object] | signal.Handlers
) -> None:
    for number in signals:
        signal.signal(number, handler)


def _open_standard_files() -> None:
    """Open those of stdin, stdout and stderr that are closed: a connection in their place would be written to."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # It gets the lowest descriptor that is free.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


if __name__ == "__main__":
    main()
