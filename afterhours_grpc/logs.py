"""Logging: to stderr, JSON or for people, and never the text of an exception, which may carry a row."""

import logging
import sys
import traceback
import typing

import msgspec
import structlog


def configure(format: typing.Literal["console", "json"]) -> None:
    """Set logging up for the process."""
    renderer: structlog.typing.Processor
    factory: typing.Any
    if format == "console":
        renderer, factory = structlog.dev.ConsoleRenderer(), structlog.PrintLoggerFactory(sys.stderr)
    else:
        # A line is written for every call: of what structlog offers, this costs half.
        renderer, factory = structlog.processors.JSONRenderer(_json), structlog.BytesLoggerFactory(sys.stderr.buffer)
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
