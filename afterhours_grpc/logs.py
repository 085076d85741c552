"""Logging: to stderr, JSON or for people, and never the text of an exception, which may carry a row."""

import collections.abc
import io
import itertools
import logging
import sys
import threading
import time
import traceback
import types
import typing
import warnings

import msgspec
import structlog

from afterhours_grpc import output

log = structlog.get_logger()

# Of a chain of exceptions, and of a traceback its innermost frames.
_MAX_TYPES = 10
_MAX_FRAMES = 20


def configure(format: typing.Literal["console", "json"]) -> output.LineWriter:
    """Set up logging for the process, and return what writes its lines.

    From here on no log call raises or waits, and what libraries and the interpreter would write to stderr becomes a
    line of ours.
    """
    writer = output.LineWriter(2, _recovered)
    render = _json if format == "json" else _Console()
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _without_nones,
            render,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=lambda *_: _Logger(writer),
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(handlers=[_Libraries()], level=logging.ERROR, force=True)
    warnings.showwarning = typing.cast("typing.Any", _warned)  # its names of arguments differ
    sys.excepthook = lambda _, error, __: log.error("exception", **described(error))
    threading.excepthook = _thread_died
    sys.unraisablehook = _unraisable
    sys.stderr = _Stray()
    return writer


def described(error: BaseException | None) -> dict[str, object]:
    """Describe an exception for the log: its types, its frames, and Postgres' code; never its text."""
    if error is None:
        return {}
    return {
        "types": [type(each).__name__ for each in itertools.islice(_chain(error), _MAX_TYPES)],
        "frames": [_place(frame.f_code, line) for frame, line in traceback.walk_tb(error.__traceback__)][-_MAX_FRAMES:],
        "sqlstate": getattr(error, "sqlstate", None),
        "constraint": getattr(error, "constraint_name", None),
    }


def _chain(error: BaseException | None) -> collections.abc.Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _place(code: types.CodeType, line: int) -> str:
    return f"{code.co_filename}:{line} {code.co_name}"


class _Logger:
    """What structlog calls with a rendered line, by its level's name."""

    def __init__(self, writer: output.LineWriter) -> None:
        self.debug = self.info = self.warning = self.error = self.critical = writer.write


def _json(_: object, __: str, event: structlog.typing.EventDict) -> bytes:
    try:
        return msgspec.json.encode(event, enc_hook=repr)
    except Exception as error:  # noqa: BLE001 - whatever it is, a log call does not raise
        return _unrendered(event, error)


class _Console:
    """Renders for people, whose terminals must not obey what callers send."""

    def __init__(self) -> None:
        self._render = structlog.dev.ConsoleRenderer()

    def __call__(self, logger: typing.Any, name: str, event: structlog.typing.EventDict) -> bytes:
        try:
            texts = {key: output.printable(value) for key, value in event.items() if isinstance(value, str)}
            return self._render(logger, name, {**event, **texts}).encode(errors="backslashreplace")
        except Exception as error:  # noqa: BLE001 - as in _json
            return _unrendered(event, error)


def _unrendered(event: structlog.typing.EventDict, error: Exception) -> bytes:
    """Render, of an event that cannot be rendered, what certainly can be."""
    return msgspec.json.encode({"event": "log_line_unrendered", "fields": sorted(event), **described(error)})


def _without_nones(_: object, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    return {key: value for key, value in event.items() if value is not None}


def _recovered(count: int) -> None:
    log.warning("log_lines_dropped", count=count)


class _Libraries(logging.Handler):
    """Logs that a library logged an error, and where: its words may quote an exception's text."""

    def emit(self, record: logging.LogRecord) -> None:
        """Log a record's origin and its exception."""
        error = record.exc_info[1] if record.exc_info else None
        place = f"{record.pathname}:{record.lineno} {record.funcName}"
        log.error("library_error", logger=record.name, place=place, **described(error))


def _warned(_: object, category: type[Warning], filename: str, lineno: int, *__: object) -> None:
    log.warning("warning", types=[category.__name__], place=f"{filename}:{lineno}")


def _thread_died(died: threading.ExceptHookArgs) -> None:
    log.error("thread_died", thread=died.thread.name if died.thread else None, **described(died.exc_value))


def _unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
    log.error("unraisable", object=type(unraisable.object).__name__, **described(unraisable.exc_value))


class _Stray(io.TextIOBase):
    """Stands for stderr: of what a library prints there, often a traceback, logs the place, at most once a second."""

    def __init__(self) -> None:
        super().__init__()
        self._next = 0.0

    def writable(self) -> bool:
        """Return True."""
        return True

    def write(self, text: str, /) -> int:
        """Drop a text, and log which function wrote it."""
        if time.monotonic() >= self._next and text.strip():
            self._next = time.monotonic() + 1
            caller = sys._getframe(1)  # noqa: SLF001 - as the standard library's logging finds its callers
            log.error("stderr_written", place=_place(caller.f_code, caller.f_lineno))
        return len(text)
