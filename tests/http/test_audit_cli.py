"""`privyseal audit export` and `audit tail` while the authority is not well.

The authority here is a stand-in that breaks off and goes away when it is told to; `tests/interop`
has the real one.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

import pytest

PRIVYSEAL = (sys.executable, "-c", "from service.cli import main; main(prog_name='privyseal')")
WITHIN = 20.0


class StandIn(ThreadingHTTPServer):
    """Has `records`, shows as many of them as are `visible`, and answers 401 to `dead` tokens."""

    daemon_threads = True

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.visible = 0
        self.tokens = 0
        self.dead = 0
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def go_away(self) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def stand_in(self) -> StandIn:
        return cast("StandIn", self.server)

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        if path.startswith("/.well-known/"):
            url = self.stand_in.url
            self._answer(200, {"issuer": url, "token_endpoint": f"{url}/oauth/token"})
        elif self.headers["Authorization"] in (
            f"Bearer {n}" for n in range(self.stand_in.dead + 1)
        ):
            self._answer(401, {"detail": "This token is not live."})
        elif path.endswith("/export"):
            self._break_off()
        else:
            asked = dict(pair.split("=") for pair in query.split("&"))
            after = int(asked.get("cursor", "0.").split(".")[0])
            newest = asked.get("order") == "desc"
            numbers = (
                range(self.stand_in.visible) if newest else range(after, self.stand_in.visible)
            )
            page = [_record(number + 1) for number in numbers][-1 if newest else 0 :][:250]
            self._answer(200, {"records": page, "next_cursor": None})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.stand_in.tokens += 1
        self._answer(200, {"access_token": str(self.stand_in.tokens), "expires_in": 900})

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(content)

    def _break_off(self) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        line = json.dumps(_record(1)).encode() + b"\n"
        self.wfile.write(b"%x\r\n%b\r\n" % (len(line), line))
        self.wfile.flush()
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None: ...


def _record(number: int) -> dict[str, Any]:
    names = ("reason", "service_user_id", "actor", "client_address")
    return {
        "id": number,
        "cursor": f"{number}.00000000-0000-7000-8000-{number:012}",
        "recorded_at": "2026-11-24T20:00:00Z",
        "action": "token.issue",
        "outcome": "success",
        "service_user": "kyc\x1b[2J\u202e",
        **dict.fromkeys(names),
    }


@pytest.fixture
def stand_in() -> Generator[StandIn, None, None]:
    server = StandIn()
    yield server
    server.go_away()


def start(server: StandIn, *arguments: str, output: Any = subprocess.PIPE) -> Any:
    environ = {
        **{name: value for name, value in os.environ.items() if "PRIVYSEAL_" not in name},
        "PRIVYSEAL_URL": server.url,
        "PRIVYSEAL_CLIENT_ID": "su_" + "a2" * 12,
        "PRIVYSEAL_CLIENT_SECRET": "pvs_" + "S3cr3t" * 8 + "x",
    }
    return subprocess.Popen(
        [*PRIVYSEAL, *arguments], env=environ, stdout=output, stderr=subprocess.PIPE, text=True
    )


def test_an_export_that_was_cut_says_so_and_leaves_the_old_file_as_it_was(
    stand_in: StandIn, tmp_path: Path
) -> None:
    file = tmp_path / "log.ndjson"
    file.write_text("of yesterday\n")
    process = start(stand_in, "audit", "export", "--output", str(file))
    _, said = process.communicate(timeout=WITHIN)
    assert process.returncode == 1
    assert "cut after 1 records" in said
    assert "was not written" in said
    assert file.read_text() == "of yesterday\n"
    assert os.listdir(tmp_path) == ["log.ndjson"]
    piped = start(stand_in, "audit", "export")
    printed, said = piped.communicate(timeout=WITHIN)
    assert (piped.returncode, len(printed.splitlines())) == (1, 1)
    assert "cut after 1 records" in said


def test_a_tail_waits_for_an_authority_that_is_away_and_for_a_fresh_token(tmp_path: Path) -> None:
    lines = tmp_path / "lines"
    server = StandIn()
    server.visible = 300
    with lines.open("wb") as output:
        tail = start(server, "audit", "tail", "-f", "--json", "--from-start", output=output)

    def wait_for(count: int) -> None:
        deadline = time.monotonic() + WITHIN
        while lines.read_bytes().count(b"\n") < count:
            assert tail.poll() is None, tail.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.02)

    wait_for(300)
    server.go_away()
    said = ""
    while "Waiting for it." not in said:
        line = tail.stderr.readline()
        assert line, said
        said += line
    back = StandIn(server.server_port)
    back.visible = 600
    back.tokens = 1
    wait_for(600)
    back.dead, back.visible = back.tokens, 700
    wait_for(700)
    tail.send_signal(signal.SIGTERM)
    said += tail.communicate(timeout=WITHIN)[1]
    back.go_away()
    assert tail.returncode == 0
    assert said.count("Waiting for it.") == 1
    assert said.count("is back.") == 1
    ids = [json.loads(line)["id"] for line in lines.read_bytes().splitlines()]
    assert ids == list(range(1, 701))


def test_a_text_line_of_a_tail_cannot_steer_the_terminal(stand_in: StandIn) -> None:
    stand_in.visible = 1
    process = start(stand_in, "audit", "tail", "--from-start")
    printed, _ = process.communicate(timeout=WITHIN)
    assert printed == "2026-11-24 20:00:00Z  token.issue  success  kyc\\x1b[2J\\u202e  -  -\n"
