"""One engine: its directory, its locks, its process.

Run as a script, this file is the shim between us and an engine: it gives up root, asks the kernel for a
signal when its parent dies, and becomes the engine. A fresh interpreter rather than a `preexec_fn`: Python
code between fork and exec can deadlock in a process that has threads, as a gRPC server has.
"""

import contextlib
import ctypes
import fcntl
import os
import pwd
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

DATA = "{data}"  # an argument: the shim replaces it by the path under which the engine sees its data

_START_SECONDS = 30.0
_STOP_SECONDS = 10.0
_POLL_SECONDS = 0.02
_PORTS = range(20000, 32768)  # below the ephemeral range, so that no outgoing connection holds one
_INHERITED = ("PATH", "LD_LIBRARY_PATH")
_PR_SET_PDEATHSIG = 1


class EngineError(Exception):
    """The engine cannot run. The message is one line for a person: what is wrong, where, and what to do."""


class Engine:
    """The directory of one engine and, once launched, its process.

    The directory holds `data/` (the engine's account only), and `password`, `log` and two lock files (the
    caller only). At most one `Engine` has it: `lock` is ours alone, and `running` is inherited by the engine
    and all its children, so it is free only when the last of them is gone, whatever became of us.
    """

    def __init__(self, name: str, directory: Path, death: signal.Signals) -> None:
        self.name = name
        self.directory = directory.absolute()
        self.data = self.directory / "data"
        self.log = self.directory / "log"
        self.port = 0
        self._death = death  # what the kernel sends the engine when the thread that launched it ends
        self._locks: list[int] = []
        self._child: subprocess.Popen[bytes] | None = None
        self._log_start = 0

    @property
    def pid(self) -> int:
        """Process id of the last launch, 0 before the first."""
        return self._child.pid if self._child else 0

    @property
    def alive(self) -> bool:
        """Whether the launched process still runs."""
        return self._child is not None and self._child.poll() is None

    @contextlib.contextmanager
    def starting(self) -> Iterator[None]:
        """Create and lock the directory, after at most 10 s for the processes of a killed owner to end.

        A body that fails stops what it launched and unlocks. Raises EngineError for each OSError.
        """
        with contextlib.ExitStack() as undo:
            undo.callback(self.stop, self._death)
            try:
                self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._lock("lock", 0.0, "is in use by another process")
                self._lock("running", _STOP_SECONDS, "is still in use by processes of an earlier run")
                yield
            except OSError as error:
                raise EngineError(f"{self.name} cannot start in {self.directory}: {error}") from error
            undo.pop_all()

    def _lock(self, name: str, patience: float, complaint: str) -> None:
        descriptor = os.open(self.directory / name, os.O_RDWR | os.O_CREAT, 0o600)
        self._locks.append(descriptor)
        deadline = time.monotonic() + patience
        while True:
            try:
                return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise EngineError(f"{self.directory} {complaint}") from None
            time.sleep(_POLL_SECONDS)

    def password(self) -> str:
        """Return the password of this directory, made on first use."""
        path = self.directory / "password"
        if not path.exists() or not path.read_text():
            write_private(path, secrets.token_hex(24))
        return path.read_text()

    def make_data(self, path: Path) -> None:
        """Create an empty folder at `path` that belongs to the engine's account."""
        path.mkdir(mode=0o700)
        if owner := account():
            os.chown(path, *owner)

    def run(self, argv: Sequence[str], data: Path, text: str = "") -> bool:
        """Run a command on `data` to its end, with `text` as its input; whether it succeeded."""
        with self._append() as log:
            child = self._spawn(argv, data, signal.SIGKILL, subprocess.PIPE, log)
        try:
            child.communicate(text.encode())
        finally:
            child.kill()
        return child.returncode == 0

    def launch(self, argv: Callable[[int], list[str]], ready: Callable[[], bool], stdin: Path) -> None:
        """Start `argv(port)` on the data and return once `ready` holds.

        The port of the last launch is kept unless something else has it. Raises EngineError with the last
        line of the log as soon as the process ends, or after 30 s.
        """
        for _ in range(5):
            self.port = _free_port(self.port)
            with self._append() as log, stdin.open("rb") as source:
                self._child = self._spawn(argv(self.port), self.data, self._death, source, log)
            if self._becomes(ready):
                return
            # The port may be bound between our look and the engine's; nothing else gets better by itself.
            if "Address already in use" not in self._written():
                break
        raise self.failure("did not start")

    def _becomes(self, ready: Callable[[], bool]) -> bool:
        deadline = time.monotonic() + _START_SECONDS
        while self.alive:
            if ready():
                return True
            if time.monotonic() > deadline:
                raise self.failure(f"was not ready after {_START_SECONDS:.0f} s")
            time.sleep(_POLL_SECONDS)
        return False

    def stop(self, *signals: signal.Signals) -> None:
        """Send each signal, then SIGKILL, 10 s apart, until the process ended; then unlock. Idempotent."""
        for number in (*signals, signal.SIGKILL):
            if self._child is not None and self.alive:
                self._child.send_signal(number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._child.wait(_STOP_SECONDS)
        while self._locks:
            os.close(self._locks.pop())

    def failure(self, problem: str) -> EngineError:
        """Make an error of the problem, the last telling line the engine wrote, and its log."""
        lines = [line.strip() for line in self._written().splitlines() if line.strip()]
        # Having said why, Postgres adds a hint, and at level LOG that it is shut down.
        telling = [line for line in lines if not re.search(" (LOG|HINT): ", line)] or lines
        return EngineError(f"{self.name} {problem}: {(telling or ['no word'])[-1]} (log: {self.log})")

    def _written(self) -> str:
        with self.log.open("rb") as log:
            log.seek(self._log_start)
            return log.read().decode(errors="replace")

    def _append(self) -> IO[bytes]:
        self.log.touch(0o600)
        log = self.log.open("ab")
        self._log_start = log.tell()
        return log

    def _spawn(
        self, argv: Sequence[str], data: Path, death: signal.Signals, stdin: int | IO[bytes], log: IO[bytes]
    ) -> "subprocess.Popen[bytes]":
        drop = ":".join(map(str, account() or ()))
        # -I: the folder of this file holds a redis.py. -S: site-packages would only cost time.
        shim = [sys.executable, "-I", "-S", __file__, str(os.getpid()), str(int(death)), drop, str(data)]
        return subprocess.Popen(
            [*shim, *argv],
            stdin=stdin,
            stdout=log,
            stderr=log,
            pass_fds=self._locks[-1:],
            start_new_session=True,  # Ctrl-C in a terminal must not end it before the service has drained
            cwd="/",
            # The rest of ours holds secrets, which the engine's account could read from /proc.
            env={"LC_ALL": "C"} | {name: os.environ[name] for name in _INHERITED if name in os.environ},
        )


def write_private(path: Path, text: str) -> None:
    """Replace a file by `text`, at once and readable by its owner only."""
    draft = path.with_name(f"{path.name}.draft")
    draft.touch(0o600)
    draft.write_text(text)
    draft.replace(path)


def account() -> tuple[int, int] | None:
    """Return the user and group for engines: `nobody` if we are root, whom Postgres refuses, else None."""
    if os.geteuid() != 0:
        return None
    try:
        nobody = pwd.getpwnam("nobody")
    except KeyError:
        raise EngineError("root has no user nobody to run engines as: use an ordinary user") from None
    return nobody.pw_uid, nobody.pw_gid


def _free_port(wanted: int) -> int:
    for port in (wanted or secrets.choice(_PORTS), *secrets.SystemRandom().sample(_PORTS, 100)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return port
    raise EngineError(f"found no free port between {_PORTS[0]} and {_PORTS[-1]}")


def _become(parent: int, death: int, drop: str, data: str, argv: list[str]) -> None:
    """Turn this process into `argv`; every step has to come where it is."""
    program: str | int = argv[0]
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it
    if drop:
        # Opened as root: the folders above may be closed to the account.
        program = os.open(argv[0], os.O_RDONLY)
        folder = os.open(data, os.O_RDONLY | os.O_DIRECTORY)
        os.set_inheritable(program, True)
        os.set_inheritable(folder, True)
        data = f"/proc/self/fd/{folder}"
        user, group = map(int, drop.split(":"))
        os.setgroups([])
        os.setgid(group)
        os.setuid(user)
    if sys.platform == "linux":
        # After setuid, which clears it.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, death, 0, 0, 0)
        if os.getppid() != parent:  # it died before the kernel knew of our wish
            sys.exit("the parent process is gone")
    argv = [data if word == DATA else word for word in argv]
    os.execve(program, argv, os.environ)  # noqa: S606 # no shell is the point


if __name__ == "__main__":
    try:
        _become(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4], sys.argv[5:])
    except OSError as error:
        sys.exit(f"cannot run {sys.argv[5]}: {error.strerror}")
