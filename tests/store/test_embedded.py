"""The embedded server belongs to one process, dies with it, and loses nothing by that."""

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import asyncpg
import psutil
import pytest

from keys.secret import Secret
from service.authority.errors import StartRefused
from service.store.embedded import EmbeddedPostgres, Running, find_running


@pytest.fixture
def as_root(skip_or_fail: Callable[[str], NoReturn]) -> None:
    """Only root runs the server as another user."""
    if os.geteuid() != 0:
        skip_or_fail("only root runs the server as another user")


# Stands for `privyseal serve`: starts the server and does nothing else until it is ended.
PARENT = """
import signal, sys
from pathlib import Path
from service.authority.errors import StartRefused
from service.store.embedded import EmbeddedPostgres
try:
    running = EmbeddedPostgres(Path(sys.argv[1])).start()
except StartRefused as refusal:
    print(refusal, flush=True)
    sys.exit(1)
print(running.pid, flush=True)
signal.pause()
"""


@pytest.fixture(scope="module")
def started(shared_data_dir: Path) -> Generator[tuple[Path, Running], None, None]:
    """A server for the tests that only look at it."""
    with EmbeddedPostgres(shared_data_dir) as running:
        yield shared_data_dir, running


@contextmanager
def parent_process(data_dir: Path) -> Generator[subprocess.Popen[str], None, None]:
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(data_dir)], stdout=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def query(dsn: Secret, *statements: str) -> object:
    """Run the statements on one connection; return the value of the last."""

    async def run() -> object:
        connection = await asyncpg.connect(dsn.reveal(), timeout=5, command_timeout=10)
        try:
            for statement in statements[:-1]:
                await connection.execute(statement)
            return await connection.fetchval(statements[-1])
        finally:
            await connection.close(timeout=5)

    return asyncio.run(run())


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.02)


def test_each_role_enters_with_its_password_only(started: tuple[Path, Running]) -> None:
    _, running = started
    who = "SELECT current_user || '@' || current_database()"
    assert query(running.service_dsn, who) == "privyseal_service@privyseal"
    assert query(running.owner_dsn, who) == "privyseal_owner@privyseal"
    assert query(running.superuser_dsn, who) == "postgres@privyseal"
    wrong = Secret(re.sub(r":[0-9a-f]{64}@", ":wrong@", running.service_dsn.reveal()))
    with pytest.raises(asyncpg.InvalidPasswordError):
        query(wrong, "SELECT 1")


def test_the_owner_owns_the_database_and_no_role_but_postgres_is_superuser(
    started: tuple[Path, Running],
) -> None:
    _, running = started
    owner = "SELECT datdba::regrole::text FROM pg_database WHERE datname = 'privyseal'"
    assert query(running.service_dsn, owner) == "privyseal_owner"
    superusers = "SELECT string_agg(rolname, ' ') FROM pg_roles WHERE rolsuper"
    assert query(running.service_dsn, superusers) == "postgres"


def test_it_listens_on_loopback_tcp_only(started: tuple[Path, Running]) -> None:
    _, running = started
    server = psutil.Process(running.pid)
    listening = [c for c in server.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    assert [c.laddr[:2] for c in listening] == [("127.0.0.1", running.port)]
    assert not [c for c in server.net_connections("unix") if c.laddr]


def test_commits_are_durable_and_pages_are_checked(started: tuple[Path, Running]) -> None:
    _, running = started
    for name in ("fsync", "full_page_writes", "synchronous_commit", "data_checksums"):
        assert query(running.service_dsn, f"SHOW {name}") == "on"


def test_postgres_json_lets_other_commands_in_and_is_private(
    started: tuple[Path, Running],
) -> None:
    data_dir, running = started
    file = data_dir / "postgres.json"
    assert file.stat().st_mode & 0o777 == 0o600
    assert (data_dir / "postgres.log").stat().st_mode & 0o777 == 0o600
    found = find_running(data_dir)
    assert found is not None
    assert (found.pid, found.port) == (running.pid, running.port)
    assert query(Secret(found.owner_dsn), "SELECT current_user") == "privyseal_owner"


def test_no_password_is_in_a_repr_the_log_or_the_process_list(
    started: tuple[Path, Running],
) -> None:
    data_dir, running = started
    dsns = (running.service_dsn, running.owner_dsn, running.superuser_dsn)
    passwords = [re.findall(r":([0-9a-f]{64})@", dsn.reveal())[0] for dsn in dsns]
    seen = repr(running) + repr(find_running(data_dir)) + (data_dir / "postgres.log").read_text()
    seen += " ".join(psutil.Process(running.pid).cmdline())
    assert not any(password in seen for password in passwords)


@pytest.mark.usefixtures("as_root")
def test_as_root_the_server_runs_as_nobody(started: tuple[Path, Running]) -> None:
    assert psutil.Process(started[1].pid).username() == "nobody"


def test_a_second_server_on_the_same_directory_is_refused_in_words(
    started: tuple[Path, Running],
) -> None:
    data_dir, _ = started
    with parent_process(data_dir) as second:
        assert first_line(second) == (
            f"Another privyseal (process {os.getpid()}) runs the embedded PostgreSQL of "
            f"{data_dir}. Stop it, or choose another PRIVYSEAL_DATA_DIR."
        )
        assert second.wait(10) == 1


def test_killing_the_parent_ends_the_server_and_loses_no_commit(data_dir: Path) -> None:
    with parent_process(data_dir) as parent:
        server = psutil.Process(int(first_line(parent)))
        found = find_running(data_dir)
        assert found is not None
        query(
            Secret(found.owner_dsn),
            "CREATE TABLE kept (id integer)",
            "INSERT INTO kept SELECT generate_series(1, 1000)",
            "SELECT 1",
        )
        parent.kill()
        parent.wait(10)
        wait_until(lambda: not server.is_running())
        assert (data_dir / "postgres.json").exists()
        assert find_running(data_dir) is None
    with EmbeddedPostgres(data_dir) as running:
        assert query(running.owner_dsn, "SELECT count(*) FROM kept") == 1000
    assert find_running(data_dir) is None


def test_a_start_waits_until_the_server_of_a_killed_parent_is_gone(data_dir: Path) -> None:
    with parent_process(data_dir) as parent:
        old = psutil.Process(int(first_line(parent)))
        old.suspend()  # it cannot obey the signal that its parent's death sends
        parent.kill()
        parent.wait(10)
        waker = threading.Timer(1.5, old.resume)
        waker.start()
        try:
            with EmbeddedPostgres(data_dir) as running:
                assert not old.is_running() or old.status() == psutil.STATUS_ZOMBIE
                assert query(running.service_dsn, "SELECT 1") == 1
        finally:
            waker.join()


def test_a_killed_server_comes_back_on_the_same_port_with_the_same_passwords(
    data_dir: Path,
) -> None:
    server = EmbeddedPostgres(data_dir)
    before = server.start()
    try:
        os.kill(before.pid, signal.SIGKILL)
        after = server.start()
        assert after.pid != before.pid
        assert after.service_dsn == before.service_dsn
        assert query(before.service_dsn, "SELECT 1") == 1
    finally:
        server.stop()


def test_a_left_over_pid_file_naming_a_live_process_does_not_stop_the_start(
    data_dir: Path,
) -> None:
    with EmbeddedPostgres(data_dir):
        pid_file = data_dir / "postgres" / "data" / "postmaster.pid"
        lines = pid_file.read_text().splitlines()
    # The number of the dead server belongs to this process now.
    pid_file.write_text("\n".join([str(os.getpid()), *lines[1:]]))
    (data_dir / "postgres.json").write_text(
        json.dumps({"pid": os.getpid(), "port": 1, "service_dsn": "", "owner_dsn": ""})
    )
    assert find_running(data_dir) is None
    with EmbeddedPostgres(data_dir) as running:
        assert query(running.service_dsn, "SELECT 1") == 1


def test_an_interrupted_first_start_is_begun_anew(data_dir: Path) -> None:
    with EmbeddedPostgres(data_dir):
        pass
    (data_dir / "postgres" / "data").rename(data_dir / "postgres" / "data.new")
    with EmbeddedPostgres(data_dir) as running:
        assert query(running.service_dsn, "SELECT 1") == 1


@pytest.mark.usefixtures("as_root")
def test_where_nobody_cannot_pass_a_link_leads_to_a_place_where_it_can(data_dir: Path) -> None:
    closed = data_dir / "closed"
    closed.mkdir(mode=0o700)
    place = closed / "var" / "postgres"
    try:
        with EmbeddedPostgres(place.parent) as running:
            query(running.owner_dsn, "CREATE TABLE kept ()", "SELECT 1")
            assert place.resolve().is_relative_to("/var/lib/privyseal")
            assert find_running(place.parent) is not None
        assert closed.stat().st_mode & 0o777 == 0o700
        closed.chmod(0o755)
        with EmbeddedPostgres(place.parent) as running:
            assert query(running.owner_dsn, "SELECT count(*) FROM kept") == 0
    finally:
        shutil.rmtree(place.resolve())
    with pytest.raises(StartRefused, match="which is gone with its database"):
        EmbeddedPostgres(place.parent).start()


@pytest.mark.usefixtures("as_root")
def test_a_database_that_nobody_can_no_longer_reach_is_refused_not_replaced(
    data_dir: Path,
) -> None:
    open_dir = data_dir / "open"
    open_dir.mkdir(mode=0o755)
    with EmbeddedPostgres(open_dir):
        pass
    open_dir.chmod(0o700)
    with pytest.raises(StartRefused, match="The server cannot reach"):
        EmbeddedPostgres(open_dir).start()


def test_other_binaries_that_are_none_are_refused(data_dir: Path) -> None:
    with pytest.raises(StartRefused, match="PRIVYSEAL_PG_BIN="):
        EmbeddedPostgres(data_dir, bin_dir=data_dir).start()


def test_a_refused_start_gives_the_directory_back(data_dir: Path) -> None:
    with pytest.raises(StartRefused):
        EmbeddedPostgres(data_dir, bin_dir=data_dir).start()
    with EmbeddedPostgres(data_dir) as running:
        assert query(running.service_dsn, "SELECT 1") == 1


def test_a_start_outside_the_main_thread_is_refused(data_dir: Path) -> None:
    raised: list[BaseException] = []

    def start() -> None:
        try:
            EmbeddedPostgres(data_dir).start()
        except RuntimeError as error:
            raised.append(error)

    thread = threading.Thread(target=start)
    thread.start()
    thread.join(10)
    assert len(raised) == 1
