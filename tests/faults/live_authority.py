"""`privyseal serve` as processes that can be killed: one with its embedded Postgres, or several
instances on one Postgres.

Signals no process that it did not start, and reads nothing that an operator could not read.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final
from urllib.parse import urlsplit

import httpx
import psutil

from keys.envelope import KeyEncryptionKeys, new_kek_line
from keys.secret import Secret
from service.store.embedded import Running, find_running
from tests.conftest import open_audit_log

REPOSITORY: Final = Path(__file__).parents[2]
PRIVYSEAL: Final = str(Path(sys.executable).with_name("privyseal"))
START_DEADLINE: Final = 60.0
STOP_DEADLINE: Final = 30.0
NOTHING: Final[Mapping[str, str]] = MappingProxyType({})


class LiveAuthority:
    """The parent process, its workers, and the credential of the first operator."""

    def __init__(
        self,
        data_dir: Path,
        *,
        workers: int,
        factory: str | None = None,
        issuer: str | None = None,
        environ: Mapping[str, str] = NOTHING,
    ) -> None:
        """`factory` names a sabotaged application (`variants.py`); None is the product itself.

        `issuer` is its own address unless something stands in front of it; `environ` holds further
        settings.
        """
        self.data_dir = data_dir
        self.worker_count = workers
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.issuer = issuer or self.url
        self._serve = (
            [PRIVYSEAL, "serve"]
            if factory is None
            else [sys.executable, "-m", "tests.faults.serve_variant", factory]
        )
        self._environ = {
            **{name: value for name, value in os.environ.items() if "PRIVYSEAL_" not in name},
            "PRIVYSEAL_ISSUER": self.issuer,
            "PRIVYSEAL_DATA_DIR": str(data_dir),
            **environ,
        }
        self._parent: psutil.Popen | None = None

    @property
    def service_dsn(self) -> Secret:
        """How the service's own role enters the database; changes with a restart."""
        if (database_url := self._environ.get("PRIVYSEAL_DATABASE_URL")) is not None:
            return Secret(database_url)
        running = find_running(self.data_dir)
        assert running is not None
        return Secret(running.service_dsn)

    def start(self) -> None:
        """Return once all workers serve; raise AssertionError with the log within 60 s."""
        self.launch()
        self.wait_until_it_serves()

    def launch(self) -> None:
        """Start the parent, and wait for nothing."""
        arguments = ["--port", str(self.port), "--workers", str(self.worker_count)]
        with self._log.open("ab") as output:
            self._parent = psutil.Popen(
                [*self._serve, *arguments],
                env=self._environ,
                cwd=REPOSITORY,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def wait_until_it_serves(self) -> None:
        """Return once all workers serve; raise AssertionError with the log within 60 s."""
        assert self._parent is not None
        deadline = time.monotonic() + START_DEADLINE
        while not (self._answers() and len(self.serving_workers()) == self.worker_count):
            assert self._parent.poll() is None, self._log.read_text()
            assert time.monotonic() < deadline, self._log.read_text()
            time.sleep(0.05)

    def wait_until_it_dies(self, seconds: float) -> None:
        """Return once SIGKILL has ended the parent, whoever sent it; raise AssertionError."""
        assert self._parent is not None
        try:
            status = self._parent.wait(seconds)
        except psutil.TimeoutExpired:
            raise AssertionError(f"alive after {seconds} s: {self._log.read_text()}") from None
        assert status == -signal.SIGKILL, self._log.read_text()
        self._parent = None

    def stop(self) -> None:
        """End the parent, and with it everything that it started."""
        if self._parent is None:
            return
        workers = self._workers()
        try:
            self._parent.terminate()
            self._parent.wait(STOP_DEADLINE)
        except psutil.NoSuchProcess:
            pass  # it did not even start: why that is was said already
        except psutil.TimeoutExpired:
            self._parent.kill()
            self._parent.wait()
        self._parent = None
        for worker in psutil.wait_procs(workers, timeout=5)[1]:
            with suppress(psutil.NoSuchProcess):
                worker.kill()

    def kill_parent(self) -> list[psutil.Process]:
        """SIGKILL the parent; return the workers that it leaves behind."""
        assert self._parent is not None
        workers = self._workers()
        self._parent.send_signal(signal.SIGKILL)
        self._parent.wait()
        self._parent = None
        return workers

    def serving_workers(self) -> list[psutil.Process]:
        """The workers that are past their start: those that hold connections to Postgres."""
        port = self._postgres_port()
        return [
            worker
            for worker in self._workers()
            if port is not None and port in _remote_ports(worker)
        ]

    def port_is_free(self) -> bool:
        """Whether nobody listens any more."""
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) != 0

    @cached_property
    def operator(self) -> tuple[str, str]:
        """`client_id` and `client_secret` of the first operator, made when first asked for."""
        done = subprocess.run(
            [PRIVYSEAL, "bootstrap", "--json"],
            env=self._environ,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        made: dict[str, Any] = json.loads(done.stdout)
        return made["client_id"], made["client_secret"]

    @property
    def _log(self) -> Path:
        return self.data_dir / "serve.log"

    def _postgres_port(self) -> int | None:
        if (database_url := self._environ.get("PRIVYSEAL_DATABASE_URL")) is not None:
            return urlsplit(database_url).port
        running = find_running(self.data_dir)
        return None if running is None else running.port

    def _workers(self) -> list[psutil.Process]:
        assert self._parent is not None
        if self.worker_count == 1:
            return [self._parent]  # uvicorn then serves in the parent itself
        try:
            return [
                child
                for child in self._parent.children()
                if any("spawn_main" in argument for argument in _command_line(child))
            ]
        except psutil.NoSuchProcess:
            return []

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/readyz", timeout=1).status_code == 200
        except httpx.TransportError:
            return False


@contextmanager
def live_authority(
    *, workers: int, factory: str | None = None
) -> Generator[LiveAuthority, None, None]:
    """Run an authority on an empty data directory until the end of the block."""
    # Not tmp_path: Postgres may run as nobody, who cannot pass through that.
    data_dir = Path(tempfile.mkdtemp(prefix="privyseal-live-"))
    data_dir.chmod(0o711)
    authority = LiveAuthority(data_dir, workers=workers, factory=factory)
    try:
        authority.start()
        yield authority
    finally:
        authority.stop()
        shutil.rmtree((data_dir / "postgres").resolve(), ignore_errors=True)  # may be a link
        shutil.rmtree(data_dir)


@asynccontextmanager
async def live_instances(
    database: Running,
    environs: Sequence[Mapping[str, str]],
    *,
    factory: str | None = None,
    issuer: str | None = None,
) -> AsyncGenerator[list[LiveAuthority]]:
    """Run an instance for each of `environs` until the end of the block: one process each, on one
    database, with one KEK file and one issuer, which is the first one's address unless told."""
    directory = Path(tempfile.mkdtemp(prefix="privyseal-live-"))
    kek_file = directory / "kek"
    kek_line = new_kek_line()
    kek_file.write_text(kek_line + "\n", "utf-8")
    await open_audit_log(database, "tests/audit/1", KeyEncryptionKeys.parse(kek_line))
    instances: list[LiveAuthority] = []
    try:
        for number, environ in enumerate(environs):
            data_dir = directory / str(number)
            data_dir.mkdir()
            shared = {
                "PRIVYSEAL_DATABASE_URL": database.service_dsn.reveal(),
                "PRIVYSEAL_KEK_FILE": str(kek_file),
                "PRIVYSEAL_CHECKPOINT_DIR": str(directory / "checkpoints"),
            }
            instance = LiveAuthority(
                data_dir,
                workers=1,
                factory=factory,
                issuer=issuer or (instances[0].url if instances else None),
                environ={**shared, **environ},
            )
            instances.append(instance)
            instance.launch()
        for instance in instances:
            instance.wait_until_it_serves()
        yield instances
    finally:
        for instance in instances:
            instance.stop()
        shutil.rmtree(directory)


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:  # gone meanwhile
        return []


def _remote_ports(process: psutil.Process) -> set[int]:
    try:
        connections = process.net_connections("tcp")
    except psutil.Error:
        return set()
    return {each.raddr.port for each in connections if each.raddr}
