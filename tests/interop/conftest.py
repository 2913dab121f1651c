"""A live authority and a live ingest service, each a process of its own behind TCP.

It must not reach into either: what tests know of them came over HTTP or from their commands.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from email import message_from_string
from email.message import Message
from pathlib import Path
from typing import Any, NoReturn

import httpx
import pytest

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
class Integrator:
    """A service user and one of its credentials."""

    id: str
    name: str
    source_system: str
    scopes: tuple[str, ...]
    client_id: str
    client_secret: str = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class IngestService:
    """A running example service."""

    url: str
    pid: int
    audience: str
    data_dir: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class CurlAnswer:
    """What curl printed; header names are looked up in any case."""

    status: int
    headers: Message
    body: str

    @property
    def json(self) -> Any:
        return json.loads(self.body)


Exchange = Callable[..., str]
Curl = Callable[..., CurlAnswer]
Node = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def authority() -> Generator[Authority, None, None]:
    """An authority with an embedded Postgres, for all tests of this folder."""
    with _authority() as running:
        yield running


@pytest.fixture(scope="session")
def start_authority() -> Callable[..., AbstractContextManager[Authority]]:
    """`start_authority(PRIVYSEAL_…=…)` runs one of your own, whose keys you may revoke."""
    return _authority


@pytest.fixture(scope="session")
def exchange(authority: Authority) -> Exchange:
    """`exchange(who, **parameters)` returns an access token of an integrator or the operator."""

    def access_token(who: Integrator | Authority, **parameters: str) -> str:
        answer = httpx.post(
            f"{authority.issuer}/oauth/token",
            data={"grant_type": "client_credentials", **parameters},
            auth=(who.client_id, who.client_secret),
            timeout=10,
        )
        assert answer.status_code == 200, answer.text
        return answer.json()["access_token"]

    return access_token


@pytest.fixture(scope="session")
def operator(authority: Authority, exchange: Exchange) -> Generator[httpx.Client, None, None]:
    """A client of the admin API with the operator's token; paths begin after `/api/v1`."""
    api = f"{authority.issuer}/api/v1"
    bearer = {"Authorization": f"Bearer {exchange(authority, resource=api)}"}
    with httpx.Client(base_url=api, headers=bearer, timeout=10) as client:
        yield client


@pytest.fixture(scope="session")
def new_integrator(operator: httpx.Client) -> Callable[..., Integrator]:
    """`new_integrator(name, source_system, *scopes)` makes a service user with a credential."""

    def make(name: str, source_system: str, *scopes: str) -> Integrator:
        service_user = operator.post(
            "/service-users",
            json={"name": name, "source_system": source_system, "scopes": scopes},
        )
        assert service_user.status_code == 201, service_user.text
        found = service_user.json()
        credential = operator.post(
            f"/service-users/{found['id']}/credentials", json={"label": "interop"}
        )
        assert credential.status_code == 201, credential.text
        return Integrator(
            id=found["id"],
            name=name,
            source_system=source_system,
            scopes=scopes,
            client_id=credential.json()["client_id"],
            client_secret=credential.json()["client_secret"],
        )

    return make


@pytest.fixture(scope="session")
def vkyc(new_integrator: Callable[..., Integrator]) -> Integrator:
    """The integrator of the README: it may write and search."""
    return new_integrator("vkyc-prod", "vkyc", "ingest:write", "search:read")


@pytest.fixture(scope="session")
def ingest(authority: Authority) -> Generator[IngestService, None, None]:
    """The example ingest service, which trusts the authority."""
    with _ingest(authority) as running:
        yield running


@pytest.fixture(scope="session")
def start_ingest() -> Callable[..., AbstractContextManager[IngestService]]:
    """`start_ingest(authority, INGEST_…=…)` runs one of your own, which may report."""
    return _ingest


@pytest.fixture(scope="session")
def curl(skip_or_fail: Callable[[str], NoReturn]) -> Curl:
    """`curl(*arguments)` runs the program and returns the last answer that it got."""
    program = shutil.which("curl")
    if program is None:
        skip_or_fail("there is no curl")

    def run(*arguments: str) -> CurlAnswer:
        done = subprocess.run(
            (program, "--silent", "--show-error", "--max-time", "20", "--include", *arguments),
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert done.returncode == 0, done.stderr
        head, _, body = done.stdout.partition("\n\n")
        while head.split()[1] == "100":  # the interim answer to Expect: 100-continue
            head, _, body = body.partition("\n\n")
        status_line, _, headers = head.partition("\n")
        return CurlAnswer(
            status=int(status_line.split()[1]), headers=message_from_string(headers), body=body
        )

    return run


@contextmanager
def _authority(**settings: str) -> Generator[Authority, None, None]:
    """Run an authority, with its embedded Postgres and its first operator, until the block ends."""
    port = _free_port()
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
def _ingest(authority: Authority, **settings: str) -> Generator[IngestService, None, None]:
    """Run the example service until the block ends."""
    port = _free_port()
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


def _free_port() -> int:
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


@pytest.fixture(scope="session")
def node(node_packages: Path) -> Node:
    """`node(program, **given)` runs a program of `node/` with `given` as JSON on its input."""

    def run(name: str, **given: Any) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            ("node", node_packages / name),
            input=json.dumps(given),
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run
