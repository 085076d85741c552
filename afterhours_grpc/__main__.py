"""`python -m afterhours_grpc`, and the console script."""

import importlib.util
import os
import signal
import sys


def main() -> None:
    """Run the commands, or say what to install: the stubs alone come without them."""
    _open_standard_files()
    # A server that is stopped before it serves has nothing to drain. Of any other command the status must not say that
    # it was done. Until all is imported not by an exception, which Python 3.11 turns into another in some places.
    status = 0 if sys.argv[1:2] in (["serve"], ["dev"]) else 128 + signal.SIGTERM
    signal.signal(signal.SIGTERM, lambda *_: os._exit(status))
    if sys.argv[1:2] == ["serve"]:
        signal.signal(signal.SIGINT, lambda *_: os._exit(status))
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

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(status))
    cli.app()


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
