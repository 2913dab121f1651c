"""A live authority and a live ingest service, each a process of its own behind TCP.

It must not reach into either: what tests know of them came over HTTP or from their commands.
"""

import json
import shutil
import subprocess
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from email import message_from_string
from email.message import Message
from pathlib import Path
from typing import Any, NoReturn

import httpx
import pytest

from tests.interop.running import Authority, IngestService, running_authority, running_ingest


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
    with running_authority() as running:
        yield running


@pytest.fixture(scope="session")
def start_authority() -> Callable[..., AbstractContextManager[Authority]]:
    """`start_authority(PRIVYSEAL_…=…)` runs one of your own, whose keys you may revoke."""
    return running_authority


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
    with running_ingest(authority) as running:
        yield running


@pytest.fixture(scope="session")
def start_ingest() -> Callable[..., AbstractContextManager[IngestService]]:
    """`start_ingest(authority, INGEST_…=…)` runs one of your own, which may report."""
    return running_ingest


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
