"""The end of the process: requests to stop, and the time limit from then on, both outside the event loop."""

import asyncio
import collections.abc
import contextlib
import os
import select
import signal
import threading
import time

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stop:
    """Receives SIGTERM and SIGINT, and ends the process in time even if the event loop is blocked.

    Signals are received by a thread, through the interpreter's wakeup file descriptor, so that no signal is ever
    blocked, in this process or in those that it starts. The first one sets `requested` in the event loop; `seconds`
    later the thread calls `end` with the exit status, which is 0 unless `limit` has set another one. Further signals
    change nothing. The end of file on `parent`, if given, counts as a signal.

    Construct it in the main thread, in the event loop that it is for.
    """

    def __init__(self, seconds: float, end: collections.abc.Callable[[int], None], parent: int | None = None) -> None:
        self.requested = asyncio.Event()
        self._seconds = seconds
        self._end = end
        self._status = 0
        self._loop = asyncio.get_running_loop()
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        threading.Thread(target=self._run, args=(reader, parent), name="stop", daemon=True).start()
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in SIGNALS:
            # A signal without a handler would not reach the descriptor.
            signal.signal(number, lambda *_: None)

    def limit(self, status: int) -> None:
        """End the process with `status`, at the latest when the time limit from now or from the signal is over."""
        self._status = status
        with contextlib.suppress(BlockingIOError):
            os.write(self._writer, b"\0")

    def _run(self, reader: int, parent: int | None) -> None:
        poll = select.poll()
        for descriptor in (reader, parent):
            if descriptor is not None:
                poll.register(descriptor, select.POLLIN)
        # What the interpreter writes is the number of a signal, of any that has a handler.
        while (reader, select.POLLIN) in poll.poll() and not {0, *SIGNALS} & {*os.read(reader, 64)}:
            pass
        with contextlib.suppress(RuntimeError):  # the event loop has ended by itself
            self._loop.call_soon_threadsafe(self.requested.set)
        time.sleep(self._seconds)
        self._end(self._status)
