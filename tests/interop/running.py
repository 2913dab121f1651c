"""An authority and an example ingest service as processes of their own, until a block ends.

Reaches into neither, and ends only what it started.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

REPOSITORY = Path(__file__).parents[2]
START_DEADLINE = 60.0
STOP_DEADLINE = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Authority:
    """A running `privyseal serve` and the credential of its first operator."""

    issuer: str
    pid: int
    environ: Mapping[str, str] = field(repr=False)
    client_id: str
    client_secret: str = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class IngestService:
    """A running example service."""

    url: str
    pid: int
    audience: str
    data_dir: Path


@contextmanager
def running_authority(**settings: str) -> Generator[Authority, None, None]:
    """Run an authority, with its embedded Postgres and its first operator, until the block ends."""
    port = free_port()
    issuer = f"http://127.0.0.1:{port}"
    with _data_dir("authority") as data_dir:
        environ = {
            **{name: value for name, value in os.environ.items() if "PRIVYSEAL_" not in name},
            "PRIVYSEAL_ISSUER": issuer,
            "PRIVYSEAL_DATA_DIR": str(data_dir),
            **settings,
        }
        privyseal = str(Path(sys.executable).with_name("privyseal"))
        serve = (privyseal, "serve", "--port", str(port))
        with _process(serve, environ, f"{issuer}/readyz", data_dir / "serve.log") as pid:
            bootstrap = subprocess.run(
                (privyseal, "bootstrap", "--json"),
                env=environ,
                capture_output=True,
                text=True,
                timeout=60,
            )
            assert bootstrap.returncode == 0, bootstrap.stderr
            yield Authority(issuer=issuer, pid=pid, environ=environ, **json.loads(bootstrap.stdout))


@contextmanager
def running_ingest(
    authority: Authority, *, port: int | None = None, **settings: str
) -> Generator[IngestService, None, None]:
    """Run the example service until the block ends."""
    port = port or free_port()
    audience = "http://127.0.0.1:8081"  # the default of a fresh installation, whatever the port
    with _data_dir("ingest") as data_dir:
        environ = {
            **{name: value for name, value in os.environ.items() if "PRIVYSEAL_" not in name},
            "INGEST_ISSUER": authority.issuer,
            "INGEST_AUDIENCE": audience,
            "INGEST_DATA_DIR": str(data_dir / "documents"),
            **settings,
        }
        example = str(REPOSITORY / "deploy" / "examples" / "ingest")
        uvicorn = (sys.executable, "-m", "uvicorn", "--app-dir", example, "--port", str(port))
        url = f"http://127.0.0.1:{port}"
        with _process(
            (*uvicorn, "app:app"), environ, f"{url}/healthz", data_dir / "uvicorn.log"
        ) as pid:
            yield IngestService(
                url=url, pid=pid, audience=audience, data_dir=data_dir / "documents"
            )


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def _data_dir(name: str) -> Generator[Path, None, None]:
    # Not tmp_path: Postgres may run as nobody, who cannot pass through that.
    path = Path(tempfile.mkdtemp(prefix=f"privyseal-interop-{name}-"))
    path.chmod(0o711)
    try:
        yield path
    finally:
        shutil.rmtree((path / "postgres").resolve(), ignore_errors=True)  # may be a link
        shutil.rmtree(path)


@contextmanager
def _process(
    command: tuple[str, ...], environ: Mapping[str, str], ready: str, log: Path
) -> Generator[int, None, None]:
    """Run `command` until the end of the block, which begins once `ready` answers 200."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=environ, cwd=log.parent, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        deadline = time.monotonic() + START_DEADLINE
        while not _answers(ready):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield process.pid
    finally:
        process.terminate()
        try:
            process.wait(STOP_DEADLINE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=1).status_code == 200
    except httpx.TransportError:
        return False
