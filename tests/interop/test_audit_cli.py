"""`privyseal audit export`, `audit tail` and `credentials leaked` against a live authority.

Looks at what programs behind a pipe get, and at what is left after a kill; never into the program.
"""

import asyncio
import base64
import csv
import io
import itertools
import json
import os
import random
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any, Protocol

import asyncpg
import pytest
from click.testing import CliRunner, Result

from service.authority.audit import Action, AuditRecord, Outcome, new_record_id
from service.cli import main
from service.cli.tail import PAGE
from service.store.embedded import find_running
from service.store.service_users import as_json
from tests.interop.terminal import PRIVYSEAL

WRITERS = 6
WITHIN = 20.0
"""Seconds for anything that takes no longer than a few."""

pytestmark = pytest.mark.anyio


class Authority(Protocol):
    """What the fixture `authority` of this folder gives."""

    @property
    def issuer(self) -> str: ...
    @property
    def environ(self) -> Mapping[str, str]: ...
    @property
    def client_id(self) -> str: ...
    @property
    def client_secret(self) -> str: ...


class Shell:
    """Runs `privyseal` with the credential of one service user."""

    def __init__(self, authority: Authority, client_id: str, client_secret: str) -> None:
        self.environ = {
            **{name: text for name, text in authority.environ.items() if "PRIVYSEAL_" not in name},
            "PRIVYSEAL_URL": authority.issuer,
            "PRIVYSEAL_CLIENT_ID": client_id,
            "PRIVYSEAL_CLIENT_SECRET": client_secret,
        }

    def __call__(self, *arguments: str, given: bytes | None = None) -> Result:
        """Run a command in this process, where there is no terminal."""
        return CliRunner(env=self.environ).invoke(main, arguments, input=given)

    def json(self, *arguments: str, given: bytes | None = None) -> Any:
        """Run a command that succeeds and return its JSON."""
        done = self(*arguments, "--json", given=given)
        assert done.exit_code == 0, done.stderr
        return json.loads(done.stdout)

    def start(self, *arguments: str, output: Any = subprocess.PIPE) -> "subprocess.Popen[bytes]":
        """Run a command in a process of its own."""
        return subprocess.Popen(
            (PRIVYSEAL, *arguments), env=self.environ, stdout=output, stderr=subprocess.PIPE
        )


@pytest.fixture(scope="module")
def shell(authority: Authority) -> Shell:
    """The operator's shell."""
    return Shell(authority, authority.client_id, authority.client_secret)


@pytest.fixture
def credential(shell: Shell) -> dict[str, Any]:
    """A credential of a fresh service user, whom kyc-team@example.com answers for."""
    name = f"leaky-{uuid.uuid4().hex[:8]}"
    create = ("service-users", "create", "--name", name, "--source-system", "vkyc")
    shell.json(*create, "--scope", "ingest:write", "--contact", "kyc-team@example.com")
    return {"name": name, **shell.json("credentials", "create", name, "--label", "in a chat")}


# Exports


def test_an_export_is_written_in_one_step_or_streams_to_a_pipe(
    shell: Shell, credential: Mapping[str, str], tmp_path: Path
) -> None:
    wanted = ("--service-user", credential["name"])
    file = tmp_path / "log.ndjson"
    until_visible(lambda: len(shell.json("audit", "list", *wanted)) == 2)
    done = shell("audit", "export", *wanted, "--output", str(file))
    assert (done.exit_code, done.stdout) == (0, "")
    assert done.stderr.endswith("2 records exported.\n")
    header, *lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert header["checkpoint"].startswith(header["log_origin"])
    assert [line["action"] for line in lines] == ["service_user.create", "credential.create"]
    assert file.stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == ["log.ndjson"]
    piped = shell("audit", "export", *wanted)
    assert [json.loads(line)["id"] for line in piped.stdout.splitlines()[1:]] == [
        line["id"] for line in lines
    ]
    table = shell("audit", "export", "--format", "csv", *wanted)
    rows = list(csv.DictReader(io.StringIO(table.stdout)))
    assert [row["id"] for row in rows] == [line["id"] for line in lines]


def test_an_export_into_nowhere_and_one_without_the_right_say_so(
    authority: Authority, shell: Shell, credential: Mapping[str, str], tmp_path: Path
) -> None:
    nowhere = shell("audit", "export", "--output", str(tmp_path / "none" / "x"))
    assert nowhere.exit_code == 1
    assert "cannot be written: No such file or directory" in nowhere.stderr
    reader = Shell(authority, credential["client_id"], credential["client_secret"])
    refused = reader("audit", "export", "--output", str(tmp_path / "x"))
    assert refused.exit_code == 1
    assert not os.listdir(tmp_path)


# The tail (U4)


class Tail:
    """A tail that writes into a file, and is ended and resumed as often as one likes."""

    def __init__(self, shell: Shell, directory: Path, *filters: str) -> None:
        self._shell = shell
        self._cursor = directory / "cursor"
        self._output = directory / "lines"
        self._filters = filters
        self.runs: list[list[str]] = []

    def run_until(self, signal_number: int, ready: Callable[[list[str]], bool]) -> int:
        """Run until what this run printed is `ready`, then send the signal; return the status."""
        arguments = ("audit", "tail", "-f", "--json", "--cursor-file", str(self._cursor))
        with self._output.open("wb") as output:
            process = self._shell.start(*arguments, *self._filters, output=output)
        deadline = time.monotonic() + WITHIN
        while not ready(self._lines()):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline, self._lines()
            time.sleep(0.01)
        process.send_signal(signal_number)
        _, said = process.communicate(timeout=WITHIN)
        assert b"Traceback" not in said, said
        self.runs.append(self._lines())
        return process.returncode

    def _lines(self) -> list[str]:
        # A line that was cut by a kill is none.
        return [
            json.loads(line)["request_id"]
            for line in self._output.read_bytes().splitlines(keepends=True)
            if line.endswith(b"\n")
        ]


@pytest.fixture
def tail(shell: Shell, tmp_path: Path) -> Callable[..., Tail]:
    def made(*filters: str) -> Tail:
        return Tail(shell, tmp_path, *filters)

    return made


@pytest.fixture
async def write(authority: Authority) -> Any:
    """Write records under an actor of the test alone, by transactions that commit in any order:
    some keep their record back while others, which began later, commit theirs."""
    running = find_running(Path(authority.environ["PRIVYSEAL_DATA_DIR"]))
    assert running is not None
    dsn = running.service_dsn

    async def written(actor: str, until: asyncio.Event) -> list[str]:
        dice = random.Random(7)
        names: list[str] = []

        async def one(number: int) -> None:
            connection = await asyncpg.connect(dsn, timeout=10)
            try:
                for round_ in itertools.count():
                    if until.is_set():
                        return
                    name = f"{number}-{round_}"
                    record = AuditRecord(
                        # In no order at all, too.
                        id=new_record_id(time.time() - dice.uniform(0, 5)),
                        action=Action.AUDIT_QUERY,
                        outcome=Outcome.SUCCESS,
                        actor=actor,
                        request_id=name,
                    )
                    await connection.execute("BEGIN")
                    await connection.fetchval(
                        "SELECT recorded FROM commit_records_1($1, 60)", as_json([record])
                    )
                    await asyncio.sleep(dice.uniform(0, 0.1))
                    await connection.execute("COMMIT")
                    names.append(name)
            finally:
                await connection.close(timeout=5)

        async with asyncio.TaskGroup() as tasks:
            for number in range(WRITERS):
                tasks.create_task(one(number))
        return names

    return written


def seen_growing(lines: list[str]) -> bool:
    """So many are of several pages that ended where the log did, among open transactions."""
    return len(lines) >= 150


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
async def test_u4_a_tail_that_is_stopped_and_resumed_misses_nothing_and_repeats_nothing(
    tail: Callable[..., Tail], write: Any, stop: int
) -> None:
    actor = f"writers-{uuid.uuid4().hex[:8]}"
    running = tail("--actor", actor, "--from-start")
    enough = asyncio.Event()
    writing = asyncio.create_task(write(actor, enough))
    for _ in range(3):
        status = await asyncio.to_thread(running.run_until, stop, seen_growing)
        assert status == 0
    enough.set()
    names = await writing
    before = sum(map(len, running.runs))
    await asyncio.to_thread(
        running.run_until, stop, lambda lines: before + len(lines) >= len(names)
    )
    printed = [line for run in running.runs for line in run]
    assert len(printed) == len(set(printed))
    assert set(printed) == set(names)
    # Each writer's own records, at least, have one order that everybody agrees on.
    for number in range(WRITERS):
        own = [line for line in printed if line.startswith(f"{number}-")]
        assert own == [f"{number}-{round_}" for round_ in range(len(own))]


async def test_u4_after_sigkill_at_any_moment_nothing_is_missing_and_a_page_may_come_twice(
    tail: Callable[..., Tail], write: Any
) -> None:
    actor = f"writers-{uuid.uuid4().hex[:8]}"
    running = tail("--actor", actor, "--from-start")
    enough = asyncio.Event()
    writing = asyncio.create_task(write(actor, enough))
    for _ in range(4):
        await asyncio.to_thread(running.run_until, signal.SIGKILL, lambda lines: len(lines) >= 1)
    enough.set()
    names = await writing
    await asyncio.to_thread(
        running.run_until,
        signal.SIGTERM,
        lambda lines: {*lines, *(line for run in running.runs for line in run)} >= set(names),
    )
    for run in running.runs:
        assert len(run) == len(set(run))
    for earlier, later in zip(running.runs, running.runs[1:], strict=False):
        assert len(set(earlier) & set(later)) <= PAGE


def test_a_tail_without_a_cursor_begins_now_and_one_that_is_behind_ends_without_f(
    shell: Shell, tail: Callable[..., Tail], tmp_path: Path
) -> None:
    name = f"after-{uuid.uuid4().hex[:8]}"
    running = tail("--action", "service_user.create")
    status = running.run_until(signal.SIGTERM, lambda _: (tmp_path / "cursor").exists())
    assert (status, running.runs) == (0, [[]])
    shell.json("service-users", "create", "--name", name, "--source-system", "vkyc")
    until_visible(lambda: len(shell.json("audit", "list", "--service-user", name)) == 1)
    resume = ("audit", "tail", "--cursor-file", str(tmp_path / "cursor"))
    (line,) = shell(*resume, "--service-user", name).stdout.splitlines()
    assert line.split("  ")[1:4] == ["service_user.create", "success", name]
    assert shell(*resume, "--service-user", name).stdout == ""


def test_a_tail_refuses_what_would_print_nothing_and_a_file_that_is_no_cursor(
    shell: Shell, tmp_path: Path
) -> None:
    nothing = shell("audit", "tail")
    assert nothing.exit_code == 2
    assert "audit list" in nothing.stderr
    (tmp_path / "cursor").write_text("rm -rf\n")
    garbage = shell("audit", "tail", "-f", "--cursor-file", str(tmp_path / "cursor"))
    assert garbage.exit_code == 1
    assert "holds no cursor" in garbage.stderr
    assert (tmp_path / "cursor").read_text() == "rm -rf\n"


def test_a_tail_says_in_words_that_its_credential_has_ended(
    authority: Authority, shell: Shell, tmp_path: Path
) -> None:
    name = f"shipper-{uuid.uuid4().hex[:8]}"
    audience = f"{authority.issuer}/api/v1"
    create = ("service-users", "create", "--name", name, "--source-system", "logs")
    shell.json(*create, "--scope", "audit:read", "--audience", audience)
    held = shell.json("credentials", "create", name, "--label", "shipper")
    shipper = Shell(authority, held["client_id"], held["client_secret"])
    process = shipper.start("audit", "tail", "-f", "--cursor-file", str(tmp_path / "cursor"))
    until_visible(lambda: (tmp_path / "cursor").exists())
    assert shell("credentials", "revoke", name, held["id"], "--yes").exit_code == 0
    _, said = process.communicate(timeout=WITHIN)
    assert process.returncode == 1
    assert b"PRIVYSEAL_CLIENT_SECRET" in said
    assert b"Traceback" not in said


def test_a_tail_that_cannot_print_notes_nothing_as_printed(shell: Shell, tmp_path: Path) -> None:
    cursor = tmp_path / "cursor"
    with open("/dev/full", "wb") as full:
        process = shell.start(
            "audit", "tail", "--from-start", "--cursor-file", str(cursor), output=full
        )
        process.communicate(timeout=WITHIN)
    assert process.returncode == 1
    assert not cursor.exists()


# Found secrets


def test_a_found_secret_is_revoked_and_everything_about_it_is_shown(
    authority: Authority, shell: Shell, credential: Mapping[str, str]
) -> None:
    holder = Shell(authority, credential["client_id"], credential["client_secret"])
    assert holder("token").exit_code == 0
    secret = credential["client_secret"]
    text = f"erika: use {secret} for now\npvs_{'x' * 49}\n".encode()
    until_visible(lambda: len(shell.json("audit", "list", "--credential", credential["id"])) == 2)

    looked = shell("credentials", "leaked", "--dry-run", given=text)
    assert looked.exit_code == 0, looked.stderr
    for fact in (
        credential["name"],
        "kyc-team@example.com",
        "in a chat",
        "is live",
        "127.0.0.1  1 times",
        "Calls since",
        f"{secret[:8]}...",
    ):
        assert fact in looked.stdout, (fact, looked.stdout)
    assert secret[:9] not in looked.stdout + looked.stderr
    assert holder("token").exit_code == 0

    asked = shell("credentials", "leaked", given=text)
    assert asked.exit_code == 2
    assert "--dry-run only looks, --yes revokes." in asked.stderr
    assert holder("token").exit_code == 0

    report = shell.json("credentials", "leaked", "--yes", given=text)
    (leak,) = report["credentials"]
    assert (leak["outcome"], leak["service_user"]) == ("revoked", credential["name"])
    assert leak["live_tokens"]["count"] == 3
    assert [used["client_address"] for used in leak["addresses"]] == ["127.0.0.1"]
    assert leak["calls"] == []
    assert secret[:9] not in json.dumps(report)
    refused = holder("token")
    assert refused.exit_code == 1
    assert shell("credentials", "leaked", given=text).stdout.count("was revoked at") == 1


def test_a_secret_is_found_in_whatever_it_was_left(
    shell: Shell, credential: Mapping[str, str]
) -> None:
    secret, client_id = credential["client_secret"], credential["client_id"]
    basic = base64.b64encode(f"{client_id}:{secret}".encode())
    wrong_checksum = f"{secret[:-1]}{'b' if secret[-1] == 'a' else 'a'}".encode()
    garbage = random.Random(1).randbytes(1 << 20)
    for left_in, found in (
        (secret.encode(), True),
        (b"x" * ((1 << 20) - 20) + secret.encode() + b"y" * 100, True),
        (garbage + secret.encode() + garbage, True),
        (f"+client_secret='{secret}'\r\n".encode("utf-16"), True),
        (f"https://x.example/?client_secret={secret}&a=b".encode(), True),
        (b"> Authorization: Basic " + basic + b"\r\n", True),
        (f"pvs_{'a' * 46}{secret}".encode(), True),
        (wrong_checksum, False),
        (secret[:-1].encode(), False),
        (garbage, False),
        (b"", False),
    ):
        report = shell.json("credentials", "leaked", "--dry-run", given=left_in)
        assert [each["id"] for each in report["credentials"]] == [credential["id"]] * found
        assert report["unknown"] == []


def test_a_secret_of_nobody_is_said_to_be_unknown_and_ones_own_is_kept(
    authority: Authority, shell: Shell
) -> None:
    stranger = "pvs_" + "0" * 43 + "2CZclj"
    given = f"{stranger} {authority.client_secret}".encode()
    done = shell("credentials", "leaked", "--yes", given=given)
    assert done.exit_code == 1
    assert f"{stranger[:8]}...  a secret of another installation" in done.stdout
    assert "you call with" in " ".join(done.stdout.split())
    assert authority.client_secret[:9] not in done.stdout
    assert shell("service-users", "list").exit_code == 0


def until_visible(shown: Callable[[], bool]) -> None:
    """Return once it holds: a record is shown once no older transaction is under way."""
    deadline = time.monotonic() + WITHIN
    while not shown():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(autouse=True)
def _own_signals() -> Generator[None, None, None]:
    """A tail in this process puts handlers of its own."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)
