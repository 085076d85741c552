"""Blocking calls in threads of their own, for calls that may block longer than their callers can wait."""

import collections.abc
import concurrent.futures
import threading
import typing

Result = typing.TypeVar("Result")


def run(call: collections.abc.Callable[[], Result]) -> concurrent.futures.Future[Result]:
    """Run `call` in a new thread, and return the future of its result, which cannot be cancelled.

    The event loop's executor has few threads: a handful of calls that wait for a silent name server keep every other
    call from starting, and the process from exiting. Here calls do not share threads, and the threads are daemons.
    """
    future: concurrent.futures.Future[Result] = concurrent.futures.Future()
    future.set_running_or_notify_cancel()
    threading.Thread(target=_run, args=(future, call), name="blocking call", daemon=True).start()
    return future


def _run(future: concurrent.futures.Future[Result], call: collections.abc.Callable[[], Result]) -> None:
    try:
        result = call()
    except BaseException as error:  # noqa: BLE001 - whoever waits for the future gets it
        future.set_exception(error)
    else:
        future.set_result(result)
