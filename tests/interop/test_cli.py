"""The command line against a live authority, as operators and integrators use it.

Looks at exit status, output and the tokens themselves; never into the program.
"""

import asyncio
import json
import re
import shutil
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Protocol

import asyncpg
import httpx
import pytest
from click.testing import CliRunner, Result

from keys.verifier import Verifier
from service.cli import main
from tests.interop.terminal import PRIVYSEAL, at_terminal

AUDIENCE = "https://ingest.example"
SECRETS = ("pvs_", "eyJ")
VISIBLE_WITHIN = 8.0


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

    def __call__(self, *arguments: str) -> Result:
        """Run a command in this process, where there is no terminal."""
        return CliRunner(env=self.environ).invoke(main, arguments)

    def json(self, *arguments: str) -> Any:
        """Run a command that succeeds and return its JSON."""
        done = self(*arguments, "--json")
        assert done.exit_code == 0, done.stderr
        return json.loads(done.stdout)

    def records(self, *filters: str, at_least: int = 1) -> list[dict[str, Any]]:
        """Return audit records; they show once no older transaction is under way."""
        deadline = time.monotonic() + VISIBLE_WITHIN
        while len(found := self.json("audit", "list", *filters)) < at_least:
            assert time.monotonic() < deadline, found
            time.sleep(0.05)
        return found

    def at_terminal(self, *arguments: str, typed: str = "", columns: int = 80) -> tuple[int, str]:
        """Run a command in a terminal; return its exit status and what the screen shows."""
        return at_terminal(arguments, self.environ, columns=columns, typed=typed)


@pytest.fixture(scope="module")
def shell(authority: Authority) -> Shell:
    """The operator's shell."""
    return Shell(authority, authority.client_id, authority.client_secret)


@pytest.fixture
def name(shell: Shell) -> str:
    """The name of a fresh service user of the source system vkyc, which may ingest."""
    name = f"cli-{uuid.uuid4().hex[:8]}"
    create = ("service-users", "create", "--name", name, "--source-system", "vkyc")
    done = shell(*create, "--scope", "ingest:write search:read", "--audience", AUDIENCE)
    assert done.exit_code == 0, done.stderr
    return name


@pytest.fixture
def credential(shell: Shell, name: str) -> dict[str, Any]:
    return shell.json("credentials", "create", name, "--label", "2026 autumn")


@pytest.fixture
def integrator(authority: Authority, credential: Mapping[str, str]) -> Shell:
    return Shell(authority, credential["client_id"], credential["client_secret"])


@pytest.fixture(scope="module")
def verifier(authority: Authority) -> Verifier:
    return Verifier(authority.issuer, AUDIENCE)


def test_a_credential_made_in_a_shell_gets_a_token_that_verifies(
    integrator: Shell, name: str, verifier: Verifier
) -> None:
    done = integrator("token", "--scope", "ingest:write")
    assert done.exit_code == 0, done.stderr
    claims = verifier.verify(done.stdout.removesuffix("\n"))
    assert (claims.service_user, claims.source_system) == (name, "vkyc")
    assert list(claims.scope) == ["ingest:write"]


def test_token_as_json_is_the_answer_of_the_token_endpoint(integrator: Shell) -> None:
    answer = integrator.json("token")
    assert answer["token_type"] == "Bearer"
    assert answer["scope"] == "ingest:write search:read"


def test_a_wrong_secret_ends_with_1_and_says_which_variables_to_check(
    authority: Authority, credential: Mapping[str, str]
) -> None:
    wrong = credential["client_secret"][::-1][:49]
    done = Shell(authority, credential["client_id"], f"pvs_{wrong.replace('_', 'x')}")("token")
    assert done.exit_code == 1
    assert "that in PRIVYSEAL_CLIENT_ID and PRIVYSEAL_CLIENT_SECRET." in done.stderr
    assert wrong not in done.stderr


def test_an_integrator_is_told_that_the_admin_api_takes_an_operator(integrator: Shell) -> None:
    done = integrator("service-users", "list")
    assert done.exit_code == 1
    assert "Use an operator's credential." in done.stderr


def test_whoever_holds_a_credential_rotates_it_and_both_get_tokens(
    authority: Authority, shell: Shell, integrator: Shell, name: str
) -> None:
    rotate = ("credentials", "rotate", "--label", "2027 spring")
    refused = integrator(*rotate)
    api = f"{authority.issuer}/api/v1"
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert f"“My credentials” in {authority.issuer}/console" in refused.stderr
    assert f"have an operator add the audience {api}." in refused.stderr

    audiences = ("--audience", AUDIENCE, "--audience", api)
    assert shell("service-users", "change", name, *audiences).exit_code == 0
    done = integrator(*rotate)
    assert done.exit_code == 0, done.stderr
    fields = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert "shown this once" in done.stderr
    assert "(2026 autumn) gets tokens until" in done.stderr
    assert done.output.count("pvs_") == 1
    successor = Shell(authority, fields["client_id"], fields["client_secret"])
    assert all(each("token").exit_code == 0 for each in (integrator, successor))
    again = successor.json("credentials", "rotate", "--label", "2027 autumn")
    assert again["old"]["label"] == "2027 spring"


def test_an_operator_is_told_the_scope_that_is_missing(
    authority: Authority, shell: Shell, name: str
) -> None:
    shell.json("service-users", "change", name, "--audience", f"{authority.issuer}/api/v1")
    shell.json("service-users", "change", name, "--add-scope", "audit:read")
    made = shell.json("credentials", "create", name, "--label", "auditor")
    auditor = Shell(authority, made["client_id"], made["client_secret"])
    assert auditor("audit", "list").exit_code == 0
    done = auditor("keys", "list")
    assert done.exit_code == 1
    assert "names a service user without signing-keys:read" in done.stderr


def test_lists_are_whole_and_names_are_found_beyond_the_first_page(
    shell: Shell, operator: httpx.Client
) -> None:
    names = [f"many-{number:03}" for number in range(201)]
    for name in names:
        answer = operator.post("/service-users", json={"name": name, "source_system": "many"})
        assert answer.status_code == 201, answer.text
    listed = shell.json("service-users", "list", "--source-system", "many")
    assert [user["name"] for user in listed] == names
    assert shell.json("service-users", "list", "--search", "MANY 20") == listed[-1:]
    last = shell.json("service-users", "show", names[-1])
    assert last == listed[-1]
    assert shell.json("service-users", "show", last["id"]) == last


def test_a_name_is_matched_whole(shell: Shell, name: str) -> None:
    done = shell("service-users", "show", name[:-1])
    assert done.exit_code == 1
    assert f"no service user named {name[:-1]}" in done.stderr


def test_a_change_touches_only_what_was_named(shell: Shell, name: str) -> None:
    before = shell.json("service-users", "show", name)
    change = ("service-users", "change", name, "--token-lifetime", "300")
    after = shell.json(*change, "--remove-scope", "search:read", "--add-scope", "other:read")
    assert after.pop("live_tokens") == {"count": 0, "last_ends_at": None}
    assert after == before | {
        "token_lifetime": 300,
        "scopes": ["ingest:write", "other:read"],
        "version": before["version"] + 1,
    }


def test_a_scope_that_is_not_there_cannot_be_removed(shell: Shell, name: str) -> None:
    done = shell("service-users", "change", name, "--remove-scope", "ingest:wirte")
    assert done.exit_code == 1
    assert "does not have the scope ingest:wirte" in done.stderr
    assert shell.json("service-users", "show", name)["version"] == 1


def test_a_field_of_the_wrong_form_is_named_in_one_line(shell: Shell) -> None:
    done = shell("service-users", "create", "--name", "Bad Name", "--source-system", "vkyc")
    assert done.exit_code == 1
    assert done.stderr.startswith("Error: name: ")
    assert done.stderr.count("name") == 1
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("expires", "expected"),
    [
        ("2027-01-31", datetime(2027, 1, 31, 23, 59, 59, tzinfo=UTC)),
        ("2027-01-31T12:00:00+02:00", datetime(2027, 1, 31, 10, tzinfo=UTC)),
    ],
)
def test_a_credential_ends_when_it_was_told_to(
    shell: Shell, name: str, expires: str, expected: datetime
) -> None:
    made = shell.json("credentials", "create", name, "--label", "x", "--expires", expires)
    assert datetime.fromisoformat(made["expires_at"]) == expected


def test_a_duration_counts_from_now(shell: Shell, name: str) -> None:
    made = shell.json("credentials", "create", name, "--label", "x", "--expires", "90d")
    left = datetime.fromisoformat(made["expires_at"]) - datetime.fromisoformat(made["created_at"])
    assert abs(left - timedelta(days=90)) < timedelta(minutes=1)


def test_the_secret_is_shown_once_and_only_as_the_result(
    shell: Shell, name: str, credential: Mapping[str, str]
) -> None:
    done = shell("credentials", "create", name, "--label", "for people")
    assert done.stdout.count("pvs_") == 1
    assert "shown this once" in done.stderr
    for command in (("list", name), ("list", name, "--json")):
        assert "pvs_" not in shell("credentials", *command).stdout
    assert {each["state"] for each in shell.json("credentials", "list", name)} == {"live"}


def test_a_handed_over_credential_is_a_link_and_shows_no_secret(
    shell: Shell, authority: Authority, name: str
) -> None:
    offered = shell.json("credentials", "hand-over", name, "--label", "branch 7")
    link, code = f"{authority.issuer}/console/hand-over", offered["link"].partition("#")[2]
    done = shell("credentials", "hand-over", name, "--label", "for people")
    assert f"{link}#" in done.stdout
    assert "shown this once" in done.stderr
    listed = shell("credentials", "list", name).stdout
    assert code not in listed
    assert {each["state"] for each in shell.json("credentials", "list", name)} == {"offered"}
    opened = httpx.post(link, data={"code": code}, headers={"Origin": authority.issuer}, timeout=10)
    assert opened.status_code == 200
    held = shell.json("credentials", "list", name)
    assert next(each for each in held if each["id"] == offered["id"])["state"] == "live"


def test_without_a_terminal_nothing_is_ended_unless_yes_is_given(
    shell: Shell, integrator: Shell, name: str
) -> None:
    assert integrator("token").exit_code == 0
    for command in (
        ("service-users", "disable", name),
        ("credentials", "revoke", name, shell.json("credentials", "list", name)[0]["id"]),
        ("keys", "revoke", "--all", "--reason", "leaked"),
    ):
        refused = shell(*command)
        assert refused.exit_code == 2
        assert "without a terminal: add --yes" in refused.stderr
    assert integrator("token").exit_code == 0

    disabled = shell.json("service-users", "disable", name, "--yes")
    assert disabled["status"] == "disabled"
    assert disabled["live_tokens"]["count"] == 2
    assert integrator("token").exit_code == 1
    assert shell.json("service-users", "enable", name)["status"] == "active"
    assert integrator("token").exit_code == 0


def test_at_a_terminal_it_says_what_will_break_and_takes_no_for_no(
    shell: Shell, integrator: Shell, name: str, credential: Mapping[str, str]
) -> None:
    assert integrator("token").exit_code == 0
    revoke = ("credentials", "revoke", name, credential["id"])
    status, screen = shell.at_terminal(*revoke, typed="n\n")
    assert status == 1
    assert "(2026 autumn) is live; last used: 20" in screen
    assert "Nothing was changed." in screen
    assert integrator("token").exit_code == 0

    status, screen = shell.at_terminal(*revoke, typed="y\n")
    assert status == 0
    assert "is revoked." in screen
    assert "Tokens issued before that are still accepted: 2." in screen
    assert integrator("token").exit_code == 1


def test_whoever_disables_itself_is_warned(shell: Shell, authority: Authority) -> None:
    _, screen = shell.at_terminal("service-users", "disable", authority.client_id, typed="n\n")
    assert "you shut yourself out" in screen.replace("\r\n", " ")


def test_a_minted_token_verifies_and_is_found_in_the_log_by_its_jti(
    shell: Shell, name: str, verifier: Verifier
) -> None:
    minted = shell.json("tokens", "mint", name, "--scope", "search:read")
    claims = verifier.verify(minted["access_token"])
    assert claims.jti == minted["jti"]
    (record,) = shell.records("--jti", minted["jti"])
    assert (record["action"], record["service_user"]) == ("token.mint", name)
    assert shell("tokens", "mint", name).stdout.count("\n") == 1


def test_the_log_shows_the_last_records_with_the_newest_at_the_bottom(
    shell: Shell, integrator: Shell, name: str
) -> None:
    for _ in range(3):
        integrator("token")
    issued = ("--service-user", name, "--action", "token.issue")
    times = [record["recorded_at"] for record in shell.records(*issued, at_least=3)]
    assert len(times) == 3
    assert times == sorted(times)
    last_two = shell("audit", "list", *issued, "--limit", "2")
    assert "last 2; more meet the filters" in last_two.stderr
    assert [each["recorded_at"] for each in shell.records(*issued, "--limit", "2")] == times[1:]
    first = shell.records(*issued, "--limit", "1", "--oldest-first")
    assert [each["recorded_at"] for each in first] == times[:1]
    assert shell.records(*issued, "--until", "1h", at_least=0) == []
    assert len(shell.records(*issued, "--since", "1h")) == 3


def test_a_log_without_records_of_nobody_says_that_there_is_no_such_service_user(
    authority: Authority, shell: Shell, name: str
) -> None:
    nobody = ("audit", "list", "--service-user", "nobody-at-all")
    done = shell(*nobody)
    assert done.exit_code == 1
    assert "There is no service user named nobody-at-all." in done.stderr
    known = shell("audit", "list", "--service-user", name, "--outcome", "refused")
    assert known.exit_code == 0
    assert "No record meets these filters." in known.stderr

    shell.json("service-users", "change", name, "--audience", f"{authority.issuer}/api/v1")
    shell.json("service-users", "change", name, "--add-scope", "audit:read")
    made = shell.json("credentials", "create", name, "--label", "auditor")
    auditor = Shell(authority, made["client_id"], made["client_secret"])
    assert auditor(*nobody).exit_code == 0, "who may not read service users reads the log"


def test_a_refusal_is_in_the_log_with_its_reason(shell: Shell, name: str) -> None:
    assert shell("tokens", "mint", name, "--scope", "nobody:granted").exit_code == 1
    refused = ("--action", "token.mint", "--outcome", "refused")
    shell.records(*refused)
    assert "refused: invalid_scope" in shell("audit", "list", *refused).stdout


def test_keys_are_listed_and_shown_by_kid(shell: Shell) -> None:
    keys = shell.json("keys", "list")
    assert {"pending", "active"} <= {key["state"] for key in keys}
    assert shell.json("keys", "show", keys[0]["kid"]) == keys[0]
    first, rest = keys[0]["kid"][0], keys[0]["kid"][1:]
    missing = shell("keys", "show", ("A" if first == "-" else "-") + rest)
    assert missing.exit_code == 1
    assert "privyseal keys list" in missing.stderr


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("command", ["service-users", "keys", "audit"])
def test_tables_fit_the_terminal_and_keep_identifiers_whole(
    shell: Shell, operator: httpx.Client, command: str, columns: int
) -> None:
    status, screen = shell.at_terminal(command, "list", columns=columns)
    assert status == 0
    lines = screen.split("\r\n")
    assert max(map(len, lines)) <= columns
    assert ("Not shown for want of width" in screen) == (columns == 80)
    assert "…" not in screen
    if command == "keys":
        for key in operator.get("/signing-keys").json()["signing_keys"]:
            assert key["kid"] in screen


def test_without_a_terminal_tables_are_plain_lines_with_every_column(
    shell: Shell, name: str
) -> None:
    header, *lines = shell("service-users", "list", "--source-system", "vkyc").stdout.splitlines()
    assert header.split() == ["name", "source_system", "status", "id", "scopes"]
    (line,) = (line for line in lines if line.startswith(f"{name} "))
    assert line.split()[1:3] == ["vkyc", "active"]
    assert line.endswith("ingest:write search:read")
    assert "\x1b" not in "".join(lines)


def test_a_kept_token_verifies(integrator: Shell, tmp_path: Path, verifier: Verifier) -> None:
    file = tmp_path / "token"
    process = subprocess.Popen(
        (PRIVYSEAL, "token", "--keep", str(file)),
        env=integrator.environ,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        assert "holds a token until" in process.stderr.readline()
        assert verifier.verify(file.read_text()).source_system == "vkyc"
        assert file.stat().st_mode & 0o777 == 0o600
    finally:
        process.terminate()
        process.communicate(timeout=10)
    assert process.returncode == 0


def test_no_command_but_those_whose_result_it_is_prints_a_secret_or_a_token(
    shell: Shell, name: str, credential: Mapping[str, str]
) -> None:
    for command in (
        ("service-users", "show", name),
        ("credentials", "list", name),
        ("audit", "list", "--service-user", name, "--json"),
        ("keys", "list", "--json"),
    ):
        done = shell(*command)
        assert done.exit_code == 0, done.stderr
        assert not any(secret in done.output for secret in SECRETS)


def where_the_database_is(
    authority: Authority, *arguments: str, **variables: str
) -> "subprocess.CompletedProcess[str]":
    """Run `privyseal` with the environment of the server."""
    return subprocess.run(
        (PRIVYSEAL, *arguments),
        env={**authority.environ, **variables},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_port_that_is_taken_is_refused_before_anything_starts(authority: Authority) -> None:
    port = authority.issuer.rpartition(":")[2]
    done = where_the_database_is(authority, "serve", "--port", port)
    assert done.returncode == 1
    assert done.stderr == f"Port {port} on 127.0.0.1 is taken. Choose another: --port\n"


def test_a_key_encryption_key_file_that_was_named_is_never_made(
    authority: Authority, tmp_path: Path
) -> None:
    missing = tmp_path / "not-mounted" / "kek"
    places = {"PRIVYSEAL_DATA_DIR": str(tmp_path), "PRIVYSEAL_KEK_FILE": str(missing)}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = str(probe.getsockname()[1])
    try:
        done = where_the_database_is(authority, "serve", "--port", free, **places)
    finally:
        shutil.rmtree((tmp_path / "postgres").resolve(), ignore_errors=True)  # may be a link
    assert done.returncode == 1
    assert f"{missing} cannot be read (No such file or directory)" in done.stderr
    assert not missing.exists()


def test_bootstrap_prints_what_the_client_commands_need(authority: Authority) -> None:
    recover = ("--recover", "--reason", "a test")
    done = where_the_database_is(authority, "bootstrap", "--name", "another", *recover)
    assert done.returncode == 0, done.stderr
    given = dict(line.removeprefix("export ").split("=") for line in done.stdout.splitlines())
    assert given["PRIVYSEAL_URL"] == authority.issuer
    another = Shell(authority, given["PRIVYSEAL_CLIENT_ID"], given["PRIVYSEAL_CLIENT_SECRET"])
    assert another("service-users", "show", "another").exit_code == 0


def test_doctor_is_well_where_the_authority_is(authority: Authority) -> None:
    done = where_the_database_is(authority, "doctor")
    assert done.returncode == 0, done.stdout
    assert {line.split()[0] for line in done.stdout.splitlines()} == {"ok"}
    done = where_the_database_is(authority, "doctor", PRIVYSEAL_ISSUER="http://127.0.0.1:1")
    assert done.returncode == 0, done.stdout
    (weak,) = [line for line in done.stdout.splitlines() if line.startswith("weak")]
    assert f"{authority.issuer.removeprefix('http://')}/audit/1, which is not of" in weak


def test_doctor_says_once_what_is_wrong_and_skips_what_relies_on_it(authority: Authority) -> None:
    away = "postgresql://privyseal_service:S3cr3t@127.0.0.1:1/privyseal"
    done = where_the_database_is(authority, "doctor", PRIVYSEAL_DATABASE_URL=away)
    assert done.returncode == 1
    assert done.stderr == ""
    marks = [line.split()[0] for line in done.stdout.splitlines()]
    assert marks[:2] == ["ok", "FAIL"]
    assert set(marks[2:]) == {"skip"}
    assert "No answer at 127.0.0.1:1 (ConnectionRefusedError)" in done.stdout
    assert "S3cr3t" not in done.stdout


def test_doctor_names_the_months_that_should_be_in_an_archive_by_now(
    start_authority: Callable[[], AbstractContextManager[Authority]],
) -> None:
    with start_authority() as authority:
        asyncio.run(_put_a_record_into_march_2025(authority))
        done = where_the_database_is(authority, "doctor")
        assert {line.split()[0] for line in done.stdout.splitlines()} == {"ok"}
        done = where_the_database_is(authority, "doctor", PRIVYSEAL_AUDIT_RETENTION_MONTHS="1200")
        assert {line.split()[0] for line in done.stdout.splitlines()} == {"ok"}
        done = where_the_database_is(authority, "doctor", PRIVYSEAL_AUDIT_RETENTION_MONTHS="1")
    # It is a warning: nothing is broken.
    assert done.returncode == 0, done.stdout
    (weak,) = [line for line in done.stdout.splitlines() if not line.startswith("ok")]
    assert " ".join(weak.split()) == (
        "weak records 2025-03: older than PRIVYSEAL_AUDIT_RETENTION_MONTHS. Run "
        "`privyseal audit archive --to DIR` as the owner."
    )


async def _put_a_record_into_march_2025(authority: Authority) -> None:
    running = json.loads(
        (Path(authority.environ["PRIVYSEAL_DATA_DIR"]) / "postgres.json").read_text()
    )
    owner = await asyncpg.connect(running["owner_dsn"], timeout=10)
    try:
        march, april = [
            await owner.fetchval("SELECT uuidv7_floor_1($1)", datetime(2025, month, 1, tzinfo=UTC))
            for month in (3, 4)
        ]
        await owner.execute(
            f"CREATE TABLE audit_records_2025_03 PARTITION OF audit_records"
            f" FOR VALUES FROM ('{march}') TO ('{april}')"
        )
        await owner.execute(
            "INSERT INTO audit_records"
            " (id, commit_order, recorded_at, action, outcome, request_id, repeats, details)"
            " SELECT $1, max(commit_order), now(), 'audit.query', 'success', '', 1, '{}'"
            "   FROM audit_records",
            march,
        )
    finally:
        await owner.close(timeout=5)


def test_a_wrong_password_or_role_is_said_in_words(authority: Authority, tmp_path: Path) -> None:
    running = json.loads(
        (Path(authority.environ["PRIVYSEAL_DATA_DIR"]) / "postgres.json").read_text()
    )
    wrong = re.sub(":[^:@]*@", ":wrong@", running["owner_dsn"])
    service = running["service_dsn"]
    done = where_the_database_is(authority, "migrate", PRIVYSEAL_DATABASE_URL=wrong)
    assert (done.returncode, done.stderr) == (
        1,
        "Postgres refuses role or password. Correct those in PRIVYSEAL_DATABASE_URL.\n",
    )
    erase = ("audit", "erase", "--match", "client_address=192.0.2.1", "--reason", "gdpr", "--yes")
    archive = ("audit", "archive", "--older-than-months", "1", "--to", str(tmp_path))
    for command in (("migrate",), erase, archive):
        done = where_the_database_is(authority, *command, PRIVYSEAL_DATABASE_URL=service)
        assert (done.returncode, done.stdout) == (1, "")
        assert "migrate, audit archive, audit erase and restore accept are for" in done.stderr


@pytest.mark.parametrize(
    "command",
    [
        "migrate",
        "bootstrap",
        "audit verify",
        "audit archive --older-than-months 1 --to .",
        "audit erase --match client_address=192.0.2.1 --reason gdpr",
    ],
)
def test_where_no_database_runs_the_setting_that_says_where_is_named(
    authority: Authority, tmp_path: Path, command: str
) -> None:
    done = where_the_database_is(authority, *command.split(), PRIVYSEAL_DATA_DIR=str(tmp_path))
    assert (done.returncode, done.stdout) == (1, "")
    assert f"runs under {tmp_path}. Set PRIVYSEAL_DATA_DIR to where one does" in done.stderr
