"""A `privyseal serve` of one's own, with its embedded Postgres, as processes that can be killed.

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
from collections.abc import Generator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import httpx
import psutil

from keys.secret import Secret
from service.store.embedded import find_running

REPOSITORY: Final = Path(__file__).parents[2]
PRIVYSEAL: Final = str(Path(sys.executable).with_name("privyseal"))
START_DEADLINE: Final = 60.0
STOP_DEADLINE: Final = 30.0


class LiveAuthority:
    """The parent process, its workers, and the credential of the first operator."""

    def __init__(self, data_dir: Path, *, workers: int, factory: str | None = None) -> None:
        """`factory` names a sabotaged application (`variants.py`); None is the product itself."""
        self.data_dir = data_dir
        self.worker_count = workers
        self.port = _free_port()
        self.issuer = f"http://127.0.0.1:{self.port}"
        self._serve = (
            [PRIVYSEAL, "serve"]
            if factory is None
            else [sys.executable, "-m", "tests.faults.serve_variant", factory]
        )
        self._environ = {
            **{name: value for name, value in os.environ.items() if "PRIVYSEAL_" not in name},
            "PRIVYSEAL_ISSUER": self.issuer,
            "PRIVYSEAL_DATA_DIR": str(data_dir),
        }
        self._parent: psutil.Popen | None = None

    @property
    def service_dsn(self) -> Secret:
        """How the service's own role enters the database; changes with a restart."""
        running = find_running(self.data_dir)
        assert running is not None
        return Secret(running.service_dsn)

    def start(self) -> None:
        """Return once all workers serve; raise AssertionError with the log within 60 s."""
        arguments = ["--port", str(self.port), "--workers", str(self.worker_count)]
        log = self.data_dir / "serve.log"
        with log.open("ab") as output:
            self._parent = psutil.Popen(
                [*self._serve, *arguments],
                env=self._environ,
                cwd=REPOSITORY,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        deadline = time.monotonic() + START_DEADLINE
        while not (self._answers() and len(self.serving_workers()) == self.worker_count):
            assert self._parent.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)

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
        running = find_running(self.data_dir)
        return [
            worker
            for worker in self._workers()
            if running is not None and running.port in _remote_ports(worker)
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
            return httpx.get(f"{self.issuer}/readyz", timeout=1).status_code == 200
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


def _free_port() -> int:
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
