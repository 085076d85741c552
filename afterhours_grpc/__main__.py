"""`python -m afterhours_grpc`, and the console script."""

import importlib.util
import os
import signal
import sys


def main() -> None:
    """Run the commands, or say what to install: the stubs alone come without them."""
    # Told to stop while it still imports, a server has nothing to drain.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    missing = [name for name in ("typer", "sqlalchemy", "apscheduler") if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit("afterhours-grpc: the service is not installed: pip install 'afterhours[server]'")
    # The library's core would write lines of its own to stderr, beside the one that a refusal promises.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # noqa: TID251 - written, and before grpc is loaded
    from afterhours_grpc import cli  # noqa: PLC0415 - only now is it known to be importable

    cli.app()


if __name__ == "__main__":
    main()
