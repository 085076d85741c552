"""`python -m afterhours_grpc`, and the console script."""

import importlib.util
import os
import signal
import sys


def main() -> None:
    """Run the commands, or say what to install: the stubs alone come without them."""
    _open_standard_files()
    # Stopped while it still imports, a server has nothing to drain. A migration that is stopped has failed.
    if sys.argv[1:2] == ["serve"]:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: os._exit(0))
    elif sys.argv[1:2] == ["dev"]:
        # It stops its engines.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    missing = [name for name in ("typer", "sqlalchemy", "apscheduler") if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit("afterhours-grpc: the service is not installed: pip install 'afterhours[server]'")
    # The library's core would write lines of its own to stderr, beside the one that a refusal promises.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # noqa: TID251 - written, and before grpc is loaded
    from afterhours_grpc import cli  # noqa: PLC0415 - only now is it known to be importable

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
