"""`privyseal keys` against an authority of its own: rotated, revoked and rewrapped for real.

Looks at exit status, output, published keys and tokens; never into the program.
"""

import json
import re
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

import httpx
import jwt
import pytest
from click.testing import CliRunner, Result

from keys.envelope import new_kek_line
from keys.verifier import parse_jwks
from service.cli import main
from tests.interop.terminal import at_terminal

LEAD = 16
"""Seconds: the shortest that JWKS max-age 1, ring poll 10 and skew 5 allow."""
TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\dZ"
REASON = ("--reason", "seen in a backup")


class Authority(Protocol):
    """What `start_authority` of this folder gives."""

    @property
    def issuer(self) -> str: ...
    @property
    def environ(self) -> Mapping[str, str]: ...
    @property
    def client_id(self) -> str: ...
    @property
    def client_secret(self) -> str: ...


class Keys:
    """Runs `privyseal keys …` as the operator, and looks at what verifiers see."""

    def __init__(self, authority: Authority) -> None:
        self.authority = authority
        self.environ = {
            **authority.environ,
            "PRIVYSEAL_URL": authority.issuer,
            "PRIVYSEAL_CLIENT_ID": authority.client_id,
            "PRIVYSEAL_CLIENT_SECRET": authority.client_secret,
        }
        self.data_dir = Path(authority.environ["PRIVYSEAL_DATA_DIR"])
        self.kek_file = self.data_dir / "kek"

    def __call__(self, *arguments: str) -> Result:
        """Run a command in this process, where there is no terminal."""
        return CliRunner(env=self.environ).invoke(main, ("keys", *arguments))

    def json(self, *arguments: str) -> Any:
        done = self(*arguments, "--json")
        assert done.exit_code == 0, done.stderr
        return json.loads(done.stdout)

    def standing(self) -> dict[str, str]:
        """The kid by state, once a key signs and another stands ready."""
        deadline = time.monotonic() + 15
        while True:
            found = {key["state"]: key["kid"] for key in self.json("list")}
            if found.keys() >= {"active", "pending"}:
                return found
            assert time.monotonic() < deadline, found
            time.sleep(0.1)

    def published(self) -> set[str]:
        answer = httpx.get(f"{self.authority.issuer}/.well-known/jwks.json", timeout=10)
        return set(parse_jwks(answer.content))

    def signing(self) -> str:
        """The kid of a token that is issued now."""
        answer = httpx.post(
            f"{self.authority.issuer}/oauth/token",
            data={"grant_type": "client_credentials"},
            auth=(self.authority.client_id, self.authority.client_secret),
            timeout=10,
        )
        assert answer.status_code == 200, answer.text
        return jwt.get_unverified_header(answer.json()["access_token"])["kid"]

    def at_terminal(self, *arguments: str, columns: int, typed: str = "") -> tuple[int, str]:
        """Run a command in a terminal; return its exit status and what the screen shows."""
        return at_terminal(("keys", *arguments), self.environ, columns=columns, typed=typed)


@pytest.fixture(scope="module")
def keys(
    start_authority: Callable[..., AbstractContextManager[Authority]],
) -> Generator[Keys, None, None]:
    """The keys of an authority that publishes a key for 16 s before it signs."""
    with start_authority(
        PRIVYSEAL_JWKS_MAX_AGE="1",
        PRIVYSEAL_CLOCK_SKEW="5",
        PRIVYSEAL_KEY_PUBLISH_LEAD=str(LEAD),
    ) as running:
        yield Keys(running)


def test_rotate_says_when_the_next_key_may_sign_and_from_then_on_it_does(keys: Keys) -> None:
    pending = keys.standing()["pending"]
    # A fresh one, so that its lead has just begun.
    assert keys("revoke", pending, *REASON, "--yes").exit_code == 0
    before = keys.standing()
    rotation = keys.json("rotate", *REASON)
    assert (rotation["signing_kid"], rotation["next_kid"]) == (before["active"], before["pending"])
    may_sign_from = datetime.fromisoformat(rotation["may_sign_from"]).timestamp()
    shown = {key["kid"]: key for key in keys.json("list")}[before["pending"]]
    assert shown["may_sign_from"] == rotation["may_sign_from"]
    assert may_sign_from - datetime.fromisoformat(shown["published_at"]).timestamp() == LEAD
    assert may_sign_from > time.time()
    asked_at = rf"asked for at {TIME}: the next key signs within seconds of {TIME}, by itself"
    assert re.search(asked_at, " ".join(keys("list").stderr.split()))
    assert rotation["asked_before_at"] is None
    assert re.search(rf"asked for already, at {TIME}", keys("rotate", *REASON).stderr)

    deadline = may_sign_from + 12  # the ring is polled every 10 s
    while (asked_at := time.time()) < deadline and keys.signing() == before["active"]:
        time.sleep(0.1)
    assert keys.signing() == before["pending"]
    assert time.time() > may_sign_from, "it signed early"
    assert asked_at < deadline, "it signs late"
    after = keys.standing()
    assert (after["active"], after["retiring"]) == (before["pending"], before["active"])
    assert keys.published() == set(after.values())


def test_revoke_of_the_key_that_signs_is_done_when_the_command_returns(keys: Keys) -> None:
    before = keys.standing()
    assert keys.signing() == before["active"]
    done = keys("revoke", before["active"], *REASON, "--yes")
    assert done.exit_code == 0, done.stderr
    assert keys.signing() == before["pending"]
    assert before["active"] not in keys.published()
    assert done.stdout.splitlines()[:2] == [
        f"{before['active']} is revoked.",
        f"{before['pending']} signs.",
    ]
    holders = [line.split() for line in done.stdout.splitlines() if line.startswith("operator ")]
    assert int(holders[0][1]) >= 1
    said = " ".join(done.stderr.split())
    assert re.search(
        rf"until they read the keys again: by {TIME}; those that cannot reach the authority, "
        rf"by {TIME}\.",
        said,
    )
    assert "have to exchange again" in said
    assert "Could the key that signs now have leaked with it?" in said
    again = keys("revoke", before["active"], *REASON, "--yes")
    assert again.exit_code == 1
    assert "nothing is left to revoke" in again.stderr


def test_the_beginning_of_a_kid_is_enough_and_the_whole_of_it_is_shown_before_it_is_revoked(
    keys: Keys,
) -> None:
    standing = keys.standing()
    # What begins like an option is one, unless it is whole.
    enough = {kid: kid if kid.startswith("--") else kid[:8] for kid in standing.values()}
    for kid, beginning in enough.items():
        assert keys.json("show", beginning)["kid"] == kid
    target = standing["pending"]
    _, screen = keys.at_terminal("revoke", enough[target], *REASON, columns=80, typed="n\n")
    assert target in screen.partition("Go on?")[0]
    assert keys.standing() == standing
    done = keys("revoke", enough[target], *REASON, "--yes")
    assert done.exit_code == 0, done.stderr
    assert f"{target} is revoked." in done.stdout


def test_revoke_asks_first_and_a_no_changes_nothing(keys: Keys) -> None:
    before = keys.standing()
    for target in (before["active"], before["pending"], "--all"):
        status, screen = keys.at_terminal("revoke", target, *REASON, columns=80, typed="n\n")
        assert status == 1
        asked = " ".join(screen.partition("Go on?")[0].split())
        assert "revoked for good" in asked
        assert ("Could that one have leaked with it?" in asked) is (target != "--all")
        assert "Nothing was changed." in screen
        assert keys("revoke", target, *REASON).exit_code == 2, "nobody can be asked"
    assert keys.standing() == before


@pytest.mark.parametrize(
    "arguments",
    [
        ("revoke", *REASON, "--yes"),
        ("revoke", "k" * 43, "--all", *REASON, "--yes"),
        ("revoke", "k" * 43, "--yes"),
        ("rotate",),
    ],
)
def test_wrong_usage_is_said_and_changes_nothing(keys: Keys, arguments: tuple[str, ...]) -> None:
    before = keys.standing()
    done = keys(*arguments)
    assert done.exit_code == 2
    assert "Usage:" in done.stderr
    assert keys.standing() == before


@pytest.mark.parametrize(
    ("kid", "status"),
    [
        ("../rotate", 2),
        ("..%2frotate", 2),
        ("a b", 2),
        ("k" * 7, 2),
        ("k" * 8, 1),
        ("k" * 42, 1),
        ("k" * 44, 2),
        ("?", 2),
        ("--unknown", 2),
        ("k" * 43, 1),
        # One kid in 64 begins like an option.
        ("-" + "k" * 42, 1),
        ("--" + "k" * 41, 1),
        ("-h" + "k" * 41, 1),
    ],
)
def test_a_kid_that_names_no_key_is_refused_and_leads_nowhere_else(
    keys: Keys, kid: str, status: int
) -> None:
    before = keys.json("list")
    for done in (keys("revoke", kid, *REASON, "--yes"), keys("show", kid)):
        assert done.exit_code == status, done.output
        assert "Error: " in done.stderr
        assert "Traceback" not in done.stderr
    assert keys.json("list") == before


@pytest.mark.parametrize("reason", ["no", "x" * 201])
def test_a_reason_of_another_length_is_refused_in_words(keys: Keys, reason: str) -> None:
    done = keys("rotate", "--reason", reason)
    assert done.exit_code == 2
    assert "3 to 200 characters" in done.stderr


@pytest.mark.parametrize("columns", [80, 120])
def test_every_screen_fits_and_shows_its_times_alike(keys: Keys, columns: int) -> None:
    standing = keys.standing()
    for arguments in (
        ("list",),
        ("show", standing["pending"]),
        ("rotate", *REASON),
        ("revoke", standing["pending"], *REASON, "--yes"),
        ("revoke", "--all", *REASON, "--yes"),
        ("list",),
    ):
        status, screen = keys.at_terminal(*arguments, columns=columns)
        assert status == 0, screen
        lines = screen.split("\r\n")
        assert max(map(len, lines)) <= columns, arguments
        assert "…" not in screen
        # Names of fields aside, whatever looks like a time is shown to the second, with its Z.
        assert re.search(r"\d{4}-\d\d-\d\dT", screen) is None, screen
        text = " ".join(screen.split())  # a sentence may be wrapped within a time
        assert len(re.findall(r"\d{4}-\d\d-\d\d", text)) == len(re.findall(TIME, text)) > 0
    for kid in keys.standing().values():
        assert kid in screen
    assert ("may_sign_from" in screen.splitlines()[0]) == (columns == 120)


def test_k9_after_a_new_kek_revoke_all_and_rewrap_the_old_kek_is_needed_no_more(
    keys: Keys,
) -> None:
    before = set(keys.standing().values())
    old, new = keys.kek_file.read_text().strip(), new_kek_line()
    replace(keys.kek_file, f"{new}\n{old}\n")
    revocation = keys.json("revoke", "--all", *REASON, "--yes")
    assert set(revocation["revoked_kids"]) >= before
    assert keys.signing() == revocation["signing_kid"]
    after = keys.published()
    assert len(after) == 2
    assert not after & before
    rewrapped = keys("rewrap")
    assert rewrapped.exit_code == 0, rewrapped.output
    assert rewrapped.stdout.count("is under the first key already") == 2
    replace(keys.kek_file, f"{new}\n")
    assert doctor(keys) == 0
    replace(keys.kek_file, f"{old}\n")
    assert doctor(keys) == 1, "what the old one opens is not there any more"
    replace(keys.kek_file, f"{new}\n")


def test_k2_a_server_goes_on_while_its_keys_are_rewrapped_and_its_kek_file_changes(
    keys: Keys,
) -> None:
    before = keys.standing()
    old, new = keys.kek_file.read_text().strip(), new_kek_line()
    replace(keys.kek_file, f"{new}\n{old}\n")
    done = keys("rewrap")
    assert done.exit_code == 0, done.output
    assert re.fullmatch(r"1 of 2  \S{43}  rewrapped\n2 of 2  \S{43}  rewrapped\n", done.stdout)
    replace(keys.kek_file, f"{new}\n")
    assert doctor(keys) == 0
    assert keys.signing() == before["active"]
    # What it makes from now on is sealed under the new key, and it opens it: no restart.
    assert keys("revoke", before["active"], *REASON, "--yes").exit_code == 0
    assert keys.signing() == before["pending"]
    following = keys.standing()["pending"]
    assert doctor(keys) == 0
    assert keys("revoke", before["pending"], *REASON, "--yes").exit_code == 0
    assert keys.signing() == following


def replace(kek_file: Path, text: str) -> None:
    """Change the file as an operator should: in one step."""
    fresh = kek_file.with_suffix(".new")
    fresh.write_text(text)
    fresh.replace(kek_file)


def doctor(keys: Keys) -> int:
    """Exit status of `privyseal doctor`, which opens every key with KEK_FILE."""
    return CliRunner(env=keys.environ).invoke(main, ("doctor",)).exit_code
