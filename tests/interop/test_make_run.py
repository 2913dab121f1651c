"""What a newcomer meets: `make run` shows an accepted upload, and what it prints can be pasted.

It must not know more of the authority than what was printed.
"""

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
SHOWN_WITHIN = 60.0


class Run:
    """One `make run` on its own ports, from its start to Ctrl-C."""

    def __init__(self, port: int, ingest_port: int, screen: Path) -> None:
        self._screen = screen
        ports = ("--port", str(port), "--ingest-port", str(ingest_port))
        with screen.open("wb") as output:
            self._process = subprocess.Popen(
                (sys.executable, "deploy/run.py", *ports),
                cwd=REPOSITORY,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    def shown(self) -> str:
        """Return what is on the screen once it waits for Ctrl-C."""
        deadline = time.monotonic() + SHOWN_WITHIN
        while "Ctrl-C" not in (text := self._screen.read_text("utf-8")):
            assert self._process.poll() is None, text
            assert time.monotonic() < deadline, text
            time.sleep(0.1)
        return text

    def stop(self) -> int:
        self._process.send_signal(signal.SIGINT)
        return self._process.wait(60)


@pytest.fixture
def ports() -> Generator[tuple[int, int], None, None]:
    with socket.socket() as one, socket.socket() as two:
        for each in (one, two):
            each.bind(("127.0.0.1", 0))
        free = (one.getsockname()[1], two.getsockname()[1])
    yield free
    var = REPOSITORY / "var" / f"{free[0]}-{free[1]}"
    shutil.rmtree((var / "postgres").resolve(), ignore_errors=True)  # may be a link
    shutil.rmtree(var, ignore_errors=True)


def test_what_make_run_prints_can_be_pasted_and_a_second_run_keeps_the_operator(
    ports: tuple[int, int], tmp_path: Path
) -> None:
    run = Run(*ports, tmp_path / "first")
    shown = run.shown()
    assert f"POST http://127.0.0.1:{ports[0]}/oauth/token → 200 OK" in shown
    assert f"POST http://127.0.0.1:{ports[1]}/api/v1/ingest → 201 Created" in shown
    operator = REPOSITORY / "var" / f"{ports[0]}-{ports[1]}" / "operator.json"
    assert operator.stat().st_mode & 0o777 == 0o600

    uploaded = json.loads(_paste(shown, "TOKEN=", "Be the operator"))
    assert (uploaded["service_user"], uploaded["source_system"]) == ("vkyc-prod", "vkyc")
    assert len(re.findall(r"token\.issue +success", _paste(shown, "export ", "  API"))) >= 2

    assert run.stop() == 0
    for port in ports:
        with socket.socket() as attempt:
            assert attempt.connect_ex(("127.0.0.1", port)) != 0

    again = Run(*ports, tmp_path / "second")
    kept = json.loads(operator.read_text("utf-8"))["client_id"]
    assert f"PRIVYSEAL_CLIENT_ID={kept}" in again.shown()
    assert again.stop() == 0


def _paste(shown: str, begin: str, end: str) -> str:
    text = shown[shown.index(begin) : shown.index(end)]
    done = subprocess.run(
        ("bash", "-c", text), cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
