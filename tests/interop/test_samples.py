"""The programs that integrators copy, run on: what they live through without anybody's help.

They are what the Upload page shows; each knows nothing but its credential.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import NoReturn, TypeAlias

import httpx
import pytest

from service.console.samples import Installation, Upload, node_sample, python_sample
from tests.interop.running import Authority, IngestService, running_authority, running_ingest

UPLOAD = Upload(
    source_system="vkyc",
    department="retail",
    category="kyc_vkyc",
    external_id="session-123",
    file_name="document.pdf",
)
LANGUAGES = ("python", "node")
# A second upload by the same program, once a line was read.
AGAIN = {
    "python": "\ninput()\nprint(json.dumps(upload(session, FILE)))\n",
    "node": (
        '\nawait new Promise((go) => process.stdin.once("data", go));\n'
        "console.log(JSON.stringify(await upload(FILE)));\nprocess.stdin.destroy();\n"
    ),
}

Program: TypeAlias = "subprocess.Popen[str]"


@pytest.fixture(scope="module")
def place() -> Generator[tuple[Authority, IngestService], None, None]:
    """An installation whose keys may be revoked."""
    with running_authority() as authority, running_ingest(authority) as ingest:
        yield authority, ingest


@pytest.fixture
def run(tmp_path: Path, skip_or_fail: Callable[[str], NoReturn]) -> Callable[..., Program]:
    """`run(language, at, url, credential)` starts the sample, which uploads twice."""

    def started(language: str, at: Installation, url: str, credential: tuple[str, str]) -> Program:
        program = shutil.which("node") if language == "node" else sys.executable
        if program is None:
            skip_or_fail("there is no node")
        sample = (node_sample if language == "node" else python_sample)(at, url, UPLOAD)
        path = tmp_path / ("upload.mjs" if language == "node" else "upload.py")
        path.write_text(sample + AGAIN[language])
        (tmp_path / UPLOAD.file_name).write_bytes(b"%PDF-1.7\n")
        environ = {
            **os.environ,
            "PRIVYSEAL_CLIENT_ID": credential[0],
            "PRIVYSEAL_CLIENT_SECRET": credential[1],
        }
        return subprocess.Popen(
            (program, path.name),
            cwd=tmp_path,
            env=environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return started


def exchange(authority: Authority, credential: tuple[str, str], resource: str) -> str:
    answer = httpx.post(
        f"{authority.issuer}/oauth/token",
        data={"grant_type": "client_credentials", "resource": resource},
        auth=credential,
        timeout=10,
    )
    assert answer.status_code == 200, answer.text
    return answer.json()["access_token"]


@contextmanager
def admin(authority: Authority) -> Generator[httpx.Client, None, None]:
    """The admin API with a token of the key that signs now."""
    api = f"{authority.issuer}/api/v1"
    token = exchange(authority, (authority.client_id, authority.client_secret), api)
    with httpx.Client(
        base_url=api, headers={"Authorization": f"Bearer {token}"}, timeout=60
    ) as client:
        yield client


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_copied_sample_goes_on_after_an_emergency_revocation(
    language: str, place: tuple[Authority, IngestService], run: Callable[..., Program]
) -> None:
    authority, ingest = place
    url = f"{ingest.url}/api/v1/ingest"
    with admin(authority) as api:
        new = {"name": language, "source_system": "vkyc", "scopes": ["ingest:write"]}
        made = api.post("/service-users", json=new).json()
        held = api.post(f"/service-users/{made['id']}/credentials", json={"label": "one"}).json()
        credential = held["client_id"], held["client_secret"]
        at = Installation(
            token_url=f"{authority.issuer}/oauth/token",
            ingest_url=url,
            ingest_audience=ingest.audience,
        )
        with run(language, at, url, credential) as program:
            assert program.stdout is not None
            first = json.loads(program.stdout.readline())
            revoked = api.post("/signing-keys/revoke-all", json={"reason": "it leaked"})
            assert revoked.status_code == 200, revoked.text
            # A token of the new key lets the ingest service read the keys anew.
            fresh = {"Authorization": f"Bearer {exchange(authority, credential, ingest.audience)}"}
            deadline = time.monotonic() + 20
            while httpx.post(url, headers=fresh, timeout=10).status_code == 401:
                assert time.monotonic() < deadline
                time.sleep(0.2)
            printed, errors = program.communicate("\n", timeout=30)
        assert errors == ""
        second = json.loads(printed)
        assert first["service_user"] == second["service_user"] == language
        assert first["jti"] != second["jti"]


class _BusyOnce(BaseHTTPRequestHandler):
    """A service that asks to wait at the first call of each address, and takes the next one."""

    asked: list[tuple[str, float]]

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        busy = self.path not in {path for path, _ in self.asked}
        self.asked.append((self.path, time.monotonic()))
        body = b"{}" if busy else json.dumps({"access_token": "x", "expires_in": 900}).encode()
        self.send_response(503 if busy else 200)
        if busy:
            self.send_header("Retry-After", "1")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_copied_sample_waits_as_long_as_it_is_asked_to(
    language: str, run: Callable[..., Program]
) -> None:
    asked: list[tuple[str, float]] = []
    handler = type("BusyOnce", (_BusyOnce,), {"asked": asked})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_port}"
            at = Installation(token_url=f"{url}/token", ingest_url=url, ingest_audience=url)
            with run(language, at, f"{url}/ingest", ("su_x", "pvs_x")) as program:
                printed, errors = program.communicate("\n", timeout=30)
        finally:
            server.shutdown()
            thread.join()
    assert errors == ""
    assert len(printed.splitlines()) == 2
    assert [path for path, _ in asked] == ["/token", "/token", "/ingest", "/ingest", "/ingest"]
    for (_, refused), (_, repeated) in ((asked[0], asked[1]), (asked[2], asked[3])):
        assert repeated - refused >= 1
