"""Lines for stdout and stderr, written by a thread: whoever reads them, or does not, cannot stop the service."""

import atexit
import collections.abc
import contextlib
import fcntl
import itertools
import os
import queue
import select
import stat
import threading
import time
import typing

# What waits for a slow reader at most. Under full load a call's line has some 180 bytes, and a second 1.2 MiB.
_MAX_LINES = 20_000
_MAX_BYTES = 4 * 1024 * 1024
# Bytes of one write. The thread waits up to 5 ms for the interpreter's lock after each, so that small writes could not
# keep up with a busy event loop. To a pipe, more than PIPE_BUF are atomic only under a lock.
_CHUNK = 256 * 1024
_UNLOCKED_CHUNK = select.PIPE_BUF
# Seconds between two writes. Waking up the thread takes the interpreter's lock from the event loop, so it happens at
# most 50 times a second.
_PAUSE = 0.02
# Seconds between two attempts to write to what fails.
_RETRY = 0.5
FLUSH_SECONDS = 0.5
"""How long the process waits at its end for the reader of its last lines."""


def printable(text: str) -> str:
    """Return a text with its control characters escaped, which a terminal would obey."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


class LineWriter:
    """Writes lines to a file descriptor from a daemon thread of its own.

    `write` never raises and never waits for the reader. Lines that do not fit into the buffer, or that cannot be
    written, are dropped and counted. `recovered` is called, by the thread, with the number of lines that were dropped
    when a write succeeds again.
    """

    def __init__(self, descriptor: int, recovered: collections.abc.Callable[[int], None] = lambda _: None) -> None:
        self._descriptor = descriptor
        self._recovered = recovered
        self._shared = _lock_of(descriptor)
        self._chunk = _UNLOCKED_CHUNK if self._shared is None and not _regular(descriptor) else _CHUNK
        # Reentrant, as are the queues of the standard library, but not its events: a finalizer may log at any point
        # of this class, if the garbage collector runs there.
        self._lock = threading.RLock()
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._lines: list[bytes] = []
        self._size = 0
        self._accepted = 0
        self._settled = 0
        self._dropped = 0
        self._reported = 0
        # The rest of a line whose beginning was written before the disk was full.
        self._rest = b""
        threading.Thread(target=self._run, name=f"writer of {descriptor}", daemon=True).start()
        atexit.register(self.flush)

    @property
    def dropped(self) -> int:
        """The number of lines dropped so far."""
        return self._dropped

    def write(self, line: bytes) -> None:
        """Write a line soon, without its newline."""
        with self._lock:
            if len(self._lines) >= _MAX_LINES or self._size + len(line) >= _MAX_BYTES:
                self._dropped += 1
                return
            self._lines.append(line)
            self._size += len(line) + 1
            self._accepted += 1
            if len(self._lines) == 1:
                self._wake.put(None)

    def flush(self, seconds: float = FLUSH_SECONDS) -> None:
        """Wait until the lines so far are written or dropped, for at most `seconds`."""
        accepted = self._accepted
        deadline = time.monotonic() + seconds
        while self._settled < accepted and time.monotonic() < deadline:
            time.sleep(0.002)

    def _run(self) -> None:
        while True:
            self._wake.get()
            written = False
            with contextlib.suppress(Exception):  # without this thread nothing would be written any more
                written = self._write_waiting()
            time.sleep(_PAUSE if written else _RETRY)

    def _write_waiting(self) -> bool:
        """Write what waits. Return whether all of it was written."""
        with self._lock:
            lines, self._lines, self._size = self._lines, [], 0
        written = True
        for chunk in _chunks(lines, self._chunk):
            written = self._write(chunk)
            self._settled += len(chunk)
        if written and self._dropped > self._reported:
            count, self._reported = self._dropped - self._reported, self._dropped
            self._recovered(count)
        return written

    def _write(self, lines: list[bytes]) -> bool:
        """Write lines, or drop those that cannot be written. Return whether all were written."""
        data = b"".join((self._rest, b"\n".join(lines), b"\n"))
        with _locked(self._shared):
            written = _write_all(self._descriptor, data)
        begin = data.rfind(b"\n", 0, written) + 1
        within_a_line = written > begin or (begin == 0 and self._rest)
        if written == len(data) or not within_a_line:
            self._rest = b""
        else:
            self._rest = data[written : data.index(b"\n", written) + 1]
        with self._lock:
            self._dropped += data.count(b"\n", written) - bool(self._rest)
        return written == len(data)


class Console:
    """The stdout of a process that serves, and the end of that process; `log` writes its stderr."""

    def __init__(self, log: LineWriter) -> None:
        self._writers = (LineWriter(1), log)

    def print(self, text: str) -> None:
        """Print a line, or several, soon."""
        self._writers[0].write(text.encode(errors="backslashreplace"))

    def end(self, status: int) -> typing.NoReturn:
        """End the process at once, but for at most FLUSH_SECONDS for its last lines."""
        deadline = time.monotonic() + FLUSH_SECONDS
        for writer in self._writers:
            writer.flush(deadline - time.monotonic())
        os._exit(status)


def _regular(descriptor: int) -> bool:
    """Return whether it is a regular file, which Linux writes to under a lock of its own."""
    try:
        return stat.S_ISREG(os.fstat(descriptor).st_mode)
    except OSError:
        return False


def _lock_of(descriptor: int) -> int | None:
    """Return a descriptor whose lock excludes the other processes that write to the same pipe; None if there is none.

    A lock belongs to an open file, which workers inherit and would share, so the pipe is opened once more.
    """
    try:
        if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
            return os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_NONBLOCK)
    except OSError:  # no /proc, no reader, or the pipe belongs to another user
        pass
    return None


@contextlib.contextmanager
def _locked(descriptor: int | None) -> collections.abc.Iterator[None]:
    if descriptor is None:
        yield
        return
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)


def _chunks(lines: list[bytes], size: int) -> collections.abc.Iterator[list[bytes]]:
    """Group lines so that each group, with its newlines, has at most `size` bytes; a longer line is alone."""
    ends = itertools.accumulate(len(line) + 1 for line in lines)
    first, before = 0, 0
    total = 0
    for index, end in enumerate(ends):
        if end - before > size and index > first:
            yield lines[first:index]
            first, before = index, total
        total = end
    if lines:
        yield lines[first:]


def _write_all(descriptor: int, data: bytes) -> int:
    """Write to a descriptor, waiting for its reader. Return how many bytes were written before an error."""
    written = 0
    while written < len(data):
        try:
            written += os.write(descriptor, data[written:])
        except BlockingIOError:  # another process made non-blocking what it shares with us
            poll = select.poll()
            poll.register(descriptor, select.POLLOUT)
            poll.poll()
        except OSError:
            break
    return written
