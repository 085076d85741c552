"""Logging: to stderr, JSON or for people, and never the text of an exception, which may carry a row."""

import collections.abc
import contextlib
import logging
import sys
import traceback
import typing

import msgspec
import structlog


class _Lines:
    """A file for lines, each written through at once but for those that are held back to be written together."""

    stream: typing.BinaryIO | None = None
    held = False

    def write(self, line: bytes) -> None:
        if self.stream:
            self.stream.write(line)

    def flush(self) -> None:
        if self.stream and not self.held:
            self.stream.flush()


_lines = _Lines()


@contextlib.contextmanager
def together() -> collections.abc.Iterator[None]:
    """Write the lines of JSON that are logged in here when it is left: a system call for each would cost more."""
    _lines.held = True
    try:
        yield
    finally:
        _lines.held = False
        _lines.flush()


def configure(format: typing.Literal["console", "json"]) -> None:
    """Set logging up for the process."""
    renderer: structlog.typing.Processor
    factory: typing.Any
    if format == "console":
        renderer, factory = structlog.dev.ConsoleRenderer(), structlog.PrintLoggerFactory(sys.stderr)
    else:
        # A line is written for every call: of what structlog offers, this costs half.
        _lines.stream = sys.stderr.buffer
        renderer = structlog.processors.JSONRenderer(_json)
        factory = structlog.BytesLoggerFactory(typing.cast("typing.BinaryIO", _lines))
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _without_nones,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=factory,
        cache_logger_on_first_use=True,
    )
    # Libraries log only what is wrong, and only their own words: an exception's text may carry a row.
    logging.basicConfig(stream=sys.stderr, level=logging.ERROR, format="%(levelname)s %(name)s", force=True)


def described(error: BaseException) -> dict[str, object]:
    """Tell an exception for the log: its types, its frames, and Postgres' code; never its text."""
    types: list[str] = []
    at: BaseException | None = error
    while at is not None:
        types.append(type(at).__name__)
        at = at.__cause__ or at.__context__
    frames = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(error.__traceback__)]
    return {
        "types": types,
        "frames": frames,
        "sqlstate": getattr(error, "sqlstate", None),
        "constraint": getattr(error, "constraint_name", None),
    }


def _json(event: structlog.typing.EventDict, **_: object) -> bytes:
    return msgspec.json.encode(event, enc_hook=repr)


def _without_nones(_: object, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    return {key: value for key, value in event.items() if value is not None}
