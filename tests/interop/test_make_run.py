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
from contextlib import contextmanager
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
SHOWN_WITHIN = 60.0
STOPPED_WITHIN = 60.0
PRIVYSEAL = Path(sys.executable).with_name("privyseal")


@contextmanager
def _make_run(ports: tuple[int, int], screen: Path) -> Generator[str, None, None]:
    """Yield what is on the screen once it waits for Ctrl-C; press that at the end."""
    with screen.open("wb") as output:
        process = subprocess.Popen(
            (sys.executable, "deploy/run.py", *_options(ports)),
            cwd=REPOSITORY,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    try:
        deadline = time.monotonic() + SHOWN_WITHIN
        while "Ctrl-C" not in (shown := screen.read_text("utf-8")):
            assert process.poll() is None, shown
            assert time.monotonic() < deadline, shown
            time.sleep(0.1)
        yield shown
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(STOPPED_WITHIN)
    assert process.returncode == 0


def _options(ports: tuple[int, int]) -> tuple[str, ...]:
    return ("--port", str(ports[0]), "--ingest-port", str(ports[1]))


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
    operator = REPOSITORY / "var" / f"{ports[0]}-{ports[1]}" / "operator.json"
    with _make_run(ports, tmp_path / "first") as shown:
        assert f"POST http://127.0.0.1:{ports[0]}/oauth/token → 200 OK" in shown
        assert f"POST http://127.0.0.1:{ports[1]}/api/v1/ingest → 201 Created" in shown
        assert re.search(r"action +token\.issue\n(.*\n)*.* action +document\.ingest", shown)
        for kept in (operator, operator.with_name("ingest.json")):
            assert kept.stat().st_mode & 0o777 == 0o600
        uploaded = json.loads(_paste(_between(shown, "TOKEN=", "Be the operator")))
        assert (uploaded["service_user"], uploaded["source_system"]) == ("vkyc-prod", "vkyc")
        be_operator = _between(shown, "export ", "And prove")
        assert re.search(r"ok +audit log", _paste(f"{be_operator}\n{PRIVYSEAL} doctor"))
        prove = _between(shown, f"curl -sS http://127.0.0.1:{ports[0]}/api/v1/audit", "  console")
        said = _paste(be_operator + prove)
        assert len(re.findall(r"token\.issue +success", said)) >= 2
        assert "checkpoints: 1 from outside" in said
        assert "Nothing was changed." in said

    for port in ports:
        with socket.socket() as attempt:
            assert attempt.connect_ex(("127.0.0.1", port)) != 0

    kept = json.loads(operator.read_text("utf-8"))["client_id"]
    with _make_run(ports, tmp_path / "second") as shown:
        assert f"PRIVYSEAL_CLIENT_ID={kept}" in shown


def _between(shown: str, begin: str, end: str) -> str:
    return shown[shown.index(begin) : shown.index(end)]


def _paste(text: str) -> str:
    done = subprocess.run(
        ("bash", "-c", text), cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
