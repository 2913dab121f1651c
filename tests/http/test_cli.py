"""The client half of the command line when it is used wrongly, or the authority is not well.

The authorities here are stand-ins that fail as no real one can be made to; `tests/interop` has the
real one.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeAlias, cast

import pytest
from click.testing import CliRunner, Result

from service.cli import api, main

CLIENT_ID = "su_" + "a2" * 12
CLIENT_SECRET = "pvs_" + "S3cr3t" * 8 + "x"
PRIVYSEAL = (sys.executable, "-c", "from service.cli import main; main(prog_name='privyseal')")
SERVER_PARTS = ("litestar", "asyncpg", "cryptography", "prometheus_client", "service.authority")
KID = "k" * 43
DEPLOY = Path(__file__).parents[2] / "deploy"


Answer: TypeAlias = tuple[int, dict[str, Any], dict[str, str]]
"""Status, body, headers."""


class StandIn(ThreadingHTTPServer):
    """Answers as `answers` say: one a request, the last one for ever."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.token_answers: list[Answer] = [
            (200, {"access_token": "t0ken", "token_type": "Bearer", "expires_in": 900}, {})
        ]
        self.api_answers: list[Answer] = [(200, {}, {})]
        self.issuer = self.url
        self.seen: list[str] = []
        self.drip = False

    def metadata(self) -> dict[str, Any]:
        return {"issuer": self.issuer, "token_endpoint": f"{self.url}/oauth/token"}


class _Handler(BaseHTTPRequestHandler):
    @property
    def stand_in(self) -> StandIn:
        return cast("StandIn", self.server)

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer()

    def do_PATCH(self) -> None:
        self.do_POST()

    def _answer(self) -> None:
        self.stand_in.seen.append(f"{self.command} {self.path}")
        if self.stand_in.drip:
            self._drip()
            return
        headers: dict[str, str] = {}
        if self.path.startswith("/.well-known/"):
            status, body = 200, self.stand_in.metadata()
        else:
            token = self.path == "/oauth/token"
            answers = self.stand_in.token_answers if token else self.stand_in.api_answers
            status, body, headers = answers.pop(0) if len(answers) > 1 else answers[0]
        content = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def _drip(self) -> None:
        """Send an answer that never ends, a byte before every read could time out."""
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        for _ in range(60):
            try:
                self.wfile.write(b" ")
                self.wfile.flush()
            except OSError:
                return
            time.sleep(0.5)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def stand_in() -> Generator[StandIn, None, None]:
    server = StandIn()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def environ(url: str, **variables: str) -> dict[str, str]:
    outside = {name: value for name, value in os.environ.items() if "PRIVYSEAL_" not in name}
    client = {"PRIVYSEAL_CLIENT_ID": CLIENT_ID, "PRIVYSEAL_CLIENT_SECRET": CLIENT_SECRET}
    return {**outside, "PRIVYSEAL_URL": url, **client, **variables}


def privyseal(*arguments: str, url: str = "http://127.0.0.1:1", **variables: str) -> Result:
    return CliRunner(env=environ(url, **variables)).invoke(main, arguments)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("service-users", "show"), "Missing argument 'SU'"),
        (("service-users", "change", "vkyc-prod"), "nothing to change"),
        (
            ("service-users", "change", "vkyc-prod", "--scope", "a", "--add-scope", "b"),
            "--scope replaces all",
        ),
        (("service-users", "create", "--name", "vkyc-prod"), "Missing option '--source-system'"),
        (("credentials", "revoke", "vkyc-prod", "autumn", "--yes"), "no credential id"),
        (("credentials", "create", "x", "--label", "l", "--expires", "tomorrow"), "is no time"),
        (("credentials", "create", "x", "--label", "l", "--expires", "2027-02-30"), "is no time"),
        (
            ("credentials", "create", "x", "--label", "l", "--expires", "2027-01-31T12:00:00"),
            "with its offset",
        ),
        (("key", "list"), "No such command 'key'. Did you mean 'keys'"),
        (("service-user", "list"), "Did you mean 'service-users'?"),
        (("audit", "list", "--limit", "0"), "--limit"),
        (("audit", "list", "--jti", "autumn"), "not a valid UUID"),
        (("audit", "list", "--credential", "autumn"), "no credential id"),
        (("keys", "show", "autumn"), "is no kid"),
        (("keys", "show", KID, "--jsno"), "unexpected extra argument"),
        (("keys", "revoke", "--al", "--reason", "leaked"), "No such option '--al'"),
        (("keys", "revoke", "-y", "--reason", "leaked"), "No such option '-y'"),
        (("keys", "revoke", KID, "--reason", "x"), "3 to 200 characters"),
        (("token", "--keep", "token", "--json"), "--keep prints nothing"),
    ],
)
def test_wrong_usage_ends_with_2_and_a_sentence(arguments: Sequence[str], said: str) -> None:
    result = privyseal(*arguments)
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"PRIVYSEAL_CLIENT_ID": ""}, "PRIVYSEAL_CLIENT_ID is not set"),
        ({"PRIVYSEAL_CLIENT_SECRET": ""}, "PRIVYSEAL_CLIENT_SECRET is not set"),
        ({"PRIVYSEAL_CLIENT_ID": CLIENT_SECRET}, "PRIVYSEAL_CLIENT_ID cannot be right"),
        ({"PRIVYSEAL_CLIENT_SECRET": f"{CLIENT_SECRET}9"}, "PRIVYSEAL_CLIENT_SECRET cannot be"),
        ({"PRIVYSEAL_URL": "http://tokens.example"}, "in the clear"),
        ({"PRIVYSEAL_URL": "http://127.0.0.1:8080/api"}, "scheme, host and port only"),
    ],
)
def test_a_variable_that_cannot_be_right_is_named_and_no_secret_shown(
    variables: dict[str, str], said: str
) -> None:
    result = CliRunner(env=environ("http://127.0.0.1:1") | variables).invoke(main, ("token",))
    assert result.exit_code == 2
    assert said in result.stderr
    assert CLIENT_SECRET not in result.output


@pytest.mark.parametrize("command", ["service-users", "credentials", "tokens", "keys", "audit"])
def test_every_group_explains_its_commands(command: str) -> None:
    group = privyseal(command, "--help")
    assert group.exit_code == 0
    for line in group.output.partition("Commands:\n")[2].splitlines():
        name, _, text = line.strip().partition(" ")
        assert text.strip(), line
        assert not text.endswith("..."), f"cut off: {line}"
        for option in ("--help", "-h"):
            explained = privyseal(command, name, option)
            assert explained.exit_code == 0
            assert explained.output.startswith(f"Usage: main {command} {name} ")


def test_nobody_listening_is_one_sentence_with_the_url_and_without_the_secret() -> None:
    done = privyseal("keys", "list", url="http://127.0.0.1:1")
    assert done.exit_code == 1
    assert done.stderr == (
        "Error: Nothing answers at http://127.0.0.1:1. Is the authority running (privyseal "
        "serve), and is PRIVYSEAL_URL right? Where it is not set, it is http://127.0.0.1:8080.\n"
    )
    assert CLIENT_SECRET not in done.output


def test_an_answer_that_never_ends_is_given_up_at_the_deadline(
    stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert api.DEADLINE == 10
    monkeypatch.setattr(api, "DEADLINE", 2.0)
    stand_in.drip = True
    started = time.monotonic()
    done = privyseal("token", url=stand_in.url)
    assert done.exit_code == 1
    assert "did not answer within 2 s" in done.stderr
    assert time.monotonic() - started < 5


def test_503_is_tried_again_when_retry_after_says(stand_in: StandIn) -> None:
    stand_in.token_answers.insert(0, (503, {}, {"Retry-After": "2"}))
    started = time.monotonic()
    done = privyseal("token", url=stand_in.url)
    assert (done.exit_code, done.stdout) == (0, "t0ken\n")
    assert "trying again in 2 s" in done.stderr
    assert time.monotonic() - started > 2


def test_503_is_given_up_after_three_tries(stand_in: StandIn) -> None:
    problem = {"error": "temporarily_unavailable", "error_description": "Try again later."}
    stand_in.token_answers = [(503, problem, {"Retry-After": "1", "X-Request-Id": "r-1"})]
    done = privyseal("token", url=stand_in.url)
    assert done.exit_code == 1
    assert "Try again later. (request id r-1)" in done.stderr
    assert stand_in.seen.count("POST /oauth/token") == 3


def test_503_is_not_waited_for_beyond_fifteen_seconds(stand_in: StandIn) -> None:
    stand_in.token_answers = [(503, {}, {"Retry-After": "60"})]
    started = time.monotonic()
    assert privyseal("token", url=stand_in.url).exit_code == 1
    assert time.monotonic() - started < 10


def test_what_must_not_be_done_twice_is_not_repeated_after_503(stand_in: StandIn) -> None:
    stand_in.api_answers = [(503, {"detail": "Try again later."}, {"Retry-After": "1"})]
    done = privyseal("credentials", "create", CLIENT_ID, "--label", "ci", url=stand_in.url)
    assert done.exit_code == 1
    assert "It may have been done: look before you repeat it." in done.stderr
    assert stand_in.seen.count(f"POST /api/v1/service-users/{CLIENT_ID}/credentials") == 1


def test_a_revocation_is_repeated_after_503(stand_in: StandIn) -> None:
    credential_id = "cr_" + "a" * 24
    revoked = {"id": credential_id, "label": "ci", "live_tokens": {"count": 0}}
    stand_in.api_answers = [(503, {}, {"Retry-After": "1"}), (200, revoked, {})]
    done = privyseal("credentials", "revoke", CLIENT_ID, credential_id, "--yes", url=stand_in.url)
    assert done.exit_code == 0, done.stderr
    assert f"{credential_id} (ci) is revoked." in done.stdout


@pytest.mark.parametrize("kid", ["-Cehy" + "j" * 38, "--all" + "j" * 38])
def test_a_kid_may_begin_with_a_dash(stand_in: StandIn, kid: str) -> None:
    stand_in.api_answers = [(200, {"signing_keys": [KEY | {"kid": kid}]}, {})]
    assert f"{kid}\n" in privyseal("keys", "show", kid, url=stand_in.url).stdout
    stand_in.api_answers = [(404, {"detail": "No such key."}, {})]
    privyseal("keys", "revoke", kid, "--reason", "leaked", "--yes", url=stand_in.url)
    assert stand_in.seen[-1] == f"POST /api/v1/signing-keys/{kid}/revoke"


def test_whoever_takes_a_name_that_is_taken_is_told_how_to_see_whose(stand_in: StandIn) -> None:
    taken = {"detail": "T.", "errors": [{"pointer": "/name", "detail": "T."}]}
    create = ("service-users", "create", "--name", "vkyc", "--source-system", "vkyc")
    stand_in.api_answers = [(409, taken, {})]
    done = privyseal(*create, url=stand_in.url)
    assert done.stderr == "Error: T. `privyseal service-users show vkyc` shows whose it is.\n"
    stand_in.api_answers = [(200, {"version": 1}, {}), (409, taken, {})]
    done = privyseal("service-users", "change", CLIENT_ID, "--name", "vkyc", url=stand_in.url)
    assert done.stderr == "Error: T. `privyseal service-users show vkyc` shows whose it is.\n"


def test_verifiers_that_lack_the_next_key_are_no_alarm_while_they_have_time(
    stand_in: StandIn,
) -> None:
    lacking = {
        "service_user": "ingest",
        "instance": "hVx3q0Zr",
        "last_heard_at": "2026-11-28T11:50:00Z",
        "has_loaded": False,
        "missing_since": None,
    }
    following = KEY | {"state": "pending", "verifiers": [lacking]}
    stand_in.api_answers = [(200, {"signing_keys": [following]}, {})]
    done = privyseal("keys", "list", url=stand_in.url)
    said = " ".join(done.stderr.split())
    assert "Not loaded the next key yet: 1; of these have not reported since" in said
    assert "no report since it was published" in done.stdout
    rotation = {
        "signing_kid": KID,
        "next_kid": KID,
        "may_sign_from": "2026-11-29T11:49:00Z",
        "asked_before_at": None,
        "missing": [lacking],
    }
    stand_in.api_answers = [(200, rotation, {})]
    done = privyseal("keys", "rotate", "--reason", "a test", url=stand_in.url)
    assert "They have until 2026-11-29 11:49:00Z to fetch it" in " ".join(done.stderr.split())


def test_a_column_that_says_nothing_of_any_credential_is_left_out(stand_in: StandIn) -> None:
    credential = {"id": "cr_1", "label": "ci", "state": "live", "held_at": None}
    stand_in.api_answers = [(200, {"credentials": [credential]}, {})]
    list_ = ("credentials", "list", CLIENT_ID)
    shown = privyseal(*list_, url=stand_in.url).stdout
    assert shown.split("\n")[0].split()[-2:] == ["created_at", "expires_at"]
    held = credential | {"held_at": "2026-11-28T11:50:00Z"}
    stand_in.api_answers = [(200, {"credentials": [credential, held]}, {})]
    shown = privyseal(*list_, url=stand_in.url).stdout
    assert shown.split("\n")[0].split()[-1] == "held_at"


def test_the_beginning_of_two_kids_names_neither(stand_in: StandIn) -> None:
    keys = [KEY | {"kid": "a" * 12 + letter * 31} for letter in "bc"]
    stand_in.api_answers = [(200, {"signing_keys": keys}, {})]
    for command in (("show",), ("revoke", "--reason", "leaked", "--yes")):
        done = privyseal("keys", *command, "a" * 12, url=stand_in.url)
        assert done.exit_code == 1
        assert "Give more of it." in done.stderr
    assert not [seen for seen in stand_in.seen if "revoke" in seen]
    assert privyseal("keys", "show", "a" * 12 + "b", url=stand_in.url).exit_code == 0


def test_the_commands_that_the_alerts_name_are_whole() -> None:
    rules = " ".join((DEPLOY / "prometheus" / "alerts.yaml").read_text().split())
    commands = set(re.findall("`privyseal ([^`]*)`", rules))
    assert any(command.startswith("keys revoke KID") for command in commands)
    for command in commands:
        typed = shlex.split(command.replace("KID", KID).replace("…", "leaked"))
        done = privyseal(*typed, *(["--yes"] if "revoke" in typed else []))
        assert "Usage:" not in done.stderr, done.stderr
        assert done.exit_code == 1, "nobody answers there"


def test_a_revocation_whose_live_tokens_were_not_counted_is_done_all_the_same(
    stand_in: StandIn,
) -> None:
    credential_id = "cr_" + "a" * 24
    revoked = {"id": credential_id, "label": "ci", "live_tokens": None}
    stand_in.api_answers = [(200, revoked, {})]
    done = privyseal("credentials", "revoke", CLIENT_ID, credential_id, "--yes", url=stand_in.url)
    assert done.exit_code == 0, done.stderr
    assert "could not be counted" in done.stderr


def test_no_secret_goes_to_an_authority_of_another_name(stand_in: StandIn) -> None:
    stand_in.issuer = "https://tokens.example"
    done = privyseal("token", url=stand_in.url)
    assert done.exit_code == 1
    assert "Set PRIVYSEAL_URL=https://tokens.example" in done.stderr
    assert "POST /oauth/token" not in stand_in.seen


def test_text_of_an_answer_cannot_steer_the_terminal(stand_in: StandIn) -> None:
    stand_in.token_answers = [(400, {"error_description": "\x1b]0;owned\x07 \u202enot"}, {})]
    done = privyseal("token", url=stand_in.url)
    assert r"\x1b]0;owned\x07 \u202enot" in done.stderr


def test_something_that_is_no_authority_is_a_sentence_and_no_traceback(stand_in: StandIn) -> None:
    stand_in.token_answers = [(200, {"hello": "world"}, {})]
    done = privyseal("token", url=stand_in.url)
    assert done.exit_code == 1
    assert "Check PRIVYSEAL_URL" in done.stderr
    assert "Traceback" not in done.stderr


@contextmanager
def keeping(file: Path, url: str) -> Generator[subprocess.Popen[str], None, None]:
    process = subprocess.Popen(
        (*PRIVYSEAL, "token", "--keep", str(file)),
        env=environ(url),
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "nothing of the kind within 20 s"
        time.sleep(0.05)


def issued(token: str) -> Answer:
    return 200, {"access_token": token, "token_type": "Bearer", "expires_in": 1}, {}


def test_a_kept_token_is_renewed_and_stays_while_the_authority_fails(
    stand_in: StandIn, tmp_path: Path
) -> None:
    refused: Answer = (400, {"error": "invalid_client", "error_description": "No."}, {})
    stand_in.token_answers = [issued("first"), (500, {}, {}), refused, issued("second")]
    file = tmp_path / "token"
    with keeping(file, stand_in.url) as process:
        eventually(file.exists)
        assert file.read_text() == "first"
        assert file.stat().st_mode & 0o777 == 0o600
        eventually(lambda: file.read_text() == "second")
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=10)
    assert process.returncode == 0
    assert said.count("Trying again in") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["token"]
    assert CLIENT_SECRET not in said
    assert "first" not in said


def test_sigterm_ends_keeping_while_the_authority_hangs(stand_in: StandIn, tmp_path: Path) -> None:
    stand_in.drip = True
    with keeping(tmp_path / "token", stand_in.url) as process:
        eventually(lambda: bool(stand_in.seen))
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=10)
    assert process.returncode == 0
    assert time.monotonic() - started < 3


def test_keeping_starts_while_the_authority_is_away(tmp_path: Path) -> None:
    with keeping(tmp_path / "token", "http://127.0.0.1:1") as process:
        assert process.stderr is not None
        said = process.stderr.readline()
    assert "Nothing answers at http://127.0.0.1:1." in said
    assert "There is no token yet. Trying again in" in said


def test_what_is_wrong_from_the_start_ends_keeping_at_once(
    stand_in: StandIn, tmp_path: Path
) -> None:
    def said_by(file: Path) -> str:
        with keeping(file, stand_in.url) as process:
            _, said = process.communicate(timeout=20)
        assert process.returncode == 1
        return said

    assert "cannot be written" in said_by(tmp_path / "absent" / "token")
    stand_in.token_answers = [
        (401, {"error": "invalid_client", "error_description": "Unknown client."}, {})
    ]
    said = said_by(tmp_path / "token")
    assert "that in PRIVYSEAL_CLIENT_ID and PRIVYSEAL_CLIENT_SECRET." in said


def loaded_by(*arguments: str, url: str) -> set[str]:
    """The modules that a command has imported when it ends."""
    program = (
        "import atexit, sys\n"
        "atexit.register(lambda: print(*sys.modules, sep='\\n', file=sys.stderr))\n"
        "from service.cli import main\n"
        "main(prog_name='privyseal')"
    )
    done = subprocess.run(
        (sys.executable, "-c", program, *arguments),
        env=environ(url),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stderr.splitlines())


KEY: dict[str, Any] = {
    "kid": KID,
    "state": "active",
    "activated_at": None,
    "rotation_asked_at": None,
    "verifiers": None,
}


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (("token",), {}),
        (("keys", "list"), {"signing_keys": [KEY]}),
        (("keys", "show", KID), {"signing_keys": [KEY]}),
        (("audit", "list"), {"records": [], "next_cursor": None}),
        (("service-users", "list"), {"service_users": [], "next_cursor": None}),
        (("credentials", "list", CLIENT_ID), {"credentials": []}),
    ],
)
def test_a_client_command_loads_nothing_of_the_server(
    stand_in: StandIn, arguments: Sequence[str], answer: dict[str, Any]
) -> None:
    stand_in.api_answers = [(200, answer, {})]
    assert not loaded_by(*arguments, url=stand_in.url) & set(SERVER_PARTS)


@pytest.mark.parametrize(
    "arguments", [("--help",), ("token", "--help"), ("service-users", "create", "--help")]
)
def test_help_loads_no_http_client_and_no_tables(arguments: Sequence[str]) -> None:
    loaded = loaded_by(*arguments, url="http://127.0.0.1:1")
    assert not loaded & {*SERVER_PARTS, "httpx", "rich", "asyncio", "msgspec"}


def test_that_a_key_leaked_is_told_once_and_not_where_programs_read(stand_in: StandIn) -> None:
    alarm = {"Privyseal-Alert": "token.forged 2"}
    full = (200, {"service_users": [{"name": "a"}] * 200, "next_cursor": "a"}, alarm)
    last = (200, {"service_users": [{"name": "b"}], "next_cursor": None}, alarm)
    stand_in.api_answers = [full, last]
    done = privyseal("service-users", "list", "--json", url=stand_in.url)
    assert done.exit_code == 0, done.output
    assert len(json.loads(done.stdout)) == 201
    assert done.stderr.count("ALERT: 2 forged tokens were noticed in the last 7 days") == 1


def test_an_alert_that_is_none_of_ours_is_not_shown(stand_in: StandIn) -> None:
    strange = {"Privyseal-Alert": "token.forged 1\x1b[2J"}
    stand_in.api_answers = [(200, {"service_users": [], "next_cursor": None}, strange)]
    done = privyseal("service-users", "list", url=stand_in.url)
    assert done.exit_code == 0, done.output
    assert "ALERT" not in done.output
