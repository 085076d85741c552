"""`python -m afterhours_grpc`, and the console script."""

import importlib.util
import sys


def main() -> None:
    """Run the commands, or say what to install: the stubs alone come without them."""
    missing = [name for name in ("typer", "sqlalchemy", "apscheduler") if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit("afterhours-grpc: the service is not installed: pip install 'afterhours[server]'")
    from afterhours_grpc import cli  # noqa: PLC0415 - only now is it known to be importable

    cli.app()


if __name__ == "__main__":
    main()
