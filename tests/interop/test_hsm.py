"""The whole exchange with a signing key that was made in an HSM and never left it.

The HSM is SoftHSM 2, a token of its own in a new folder; the clients are none of ours.
"""

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NoReturn

import asyncpg
import httpx
import jwt
import pytest

from keys.checkpoint import Checkpoint, NoteRefused, NoteVerifier
from keys.envelope import KeyEncryptionKeys, new_kek_line
from keys.pkcs11 import Pkcs11Custody
from keys.signer import Custody, LocalCustody
from service.store.embedded import find_running
from tests import softhsm
from tests.interop.conftest import Authority
from tests.softhsm import Token

StartAuthority = Callable[..., AbstractContextManager[Authority]]

PRIVYSEAL = str(Path(sys.executable).with_name("privyseal"))
SECONDS_OF_SIGNING = 1.5
AT_ONCE = 8
KEY_AWAY = "audit_log_key_out_of_reach"


@pytest.fixture(scope="module")
def token(skip_or_fail: Callable[[str], NoReturn]) -> Generator[Token, None, None]:
    if missing := softhsm.missing():
        skip_or_fail(missing)
    with softhsm.token() as made:
        yield made


@pytest.fixture(scope="module")
def authority(token: Token, start_authority: StartAuthority) -> Generator[Authority, None, None]:
    with start_authority(
        **token.environ,
        PRIVYSEAL_KEY_CUSTODY=token.uri,
        # The shortest lead that there is: 16 s.
        PRIVYSEAL_JWKS_MAX_AGE="1",
        PRIVYSEAL_CLOCK_SKEW="5",
        PRIVYSEAL_KEY_PUBLISH_LEAD="16",
    ) as running:
        # It serves while its first key is being made.
        until(lambda: httpx.get(f"{running.issuer}/readyz").json()["can_sign"])
        yield running


def privyseal(authority: Authority, *arguments: str, exits: int = 0, **environ: str) -> str:
    done = subprocess.run(
        (PRIVYSEAL, *arguments),
        env={
            **authority.environ,
            "PRIVYSEAL_URL": authority.issuer,
            "PRIVYSEAL_CLIENT_ID": authority.client_id,
            "PRIVYSEAL_CLIENT_SECRET": authority.client_secret,
            **environ,
        },
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == exits, done.stdout + done.stderr
    return done.stdout


def exchange(authority: Authority) -> str:
    answer = httpx.post(
        f"{authority.issuer}/oauth/token",
        data={"grant_type": "client_credentials"},
        auth=(authority.client_id, authority.client_secret),
        timeout=10,
    )
    assert answer.status_code == 200, answer.text
    return answer.json()["access_token"]


def signing(authority: Authority) -> str:
    """The kid of a token that is issued now."""
    return jwt.get_unverified_header(exchange(authority))["kid"]


def verified(authority: Authority, access_token: str) -> dict[str, Any]:
    """Return the claims, if the token verifies with the keys that are published now."""
    keys = jwt.PyJWKClient(f"{authority.issuer}/.well-known/jwks.json")
    return jwt.decode(
        access_token,
        keys.get_signing_key_from_jwt(access_token),
        algorithms=["RS256"],
        issuer=authority.issuer,
        audience=f"{authority.issuer}/api/v1",
    )


def destroyed(authority: Authority) -> list[str]:
    """The kids of the private halves that are on record as destroyed."""
    arguments = ("audit", "list", "--json", "--action", "signing_key.destroy")
    return [record["kid"] for record in json.loads(privyseal(authority, *arguments))]


def kids(authority: Authority) -> dict[str, str]:
    listed: list[dict[str, Any]] = json.loads(privyseal(authority, "keys", "list", "--json"))
    return {key["state"]: key["kid"] for key in listed}


def held(token: Token) -> list[str]:
    with softhsm.visible_here(token):
        return asyncio.run(Pkcs11Custody(token.uri).listed())


def vkey_of(printed: str) -> NoteVerifier:
    return NoteVerifier.parse(printed.strip().rpartition(" ")[2])


def checkpoint_size(authority: Authority, verifier: NoteVerifier) -> int:
    """The size of the published checkpoint, if it is one of this log; 0 if not."""
    try:
        answer = httpx.get(f"{authority.issuer}/api/v1/audit/checkpoint")
        return Checkpoint.open(answer.content, verifier).size
    except NoteRefused:
        return 0


def sequencer(authority: Authority) -> str | None:
    return httpx.get(f"{authority.issuer}/readyz").json()["sequencer"]


async def log_keys(authority: Authority) -> list[tuple[str, bytes | None]]:
    """Where the keys of its logs are, as the database has it."""
    running = find_running(Path(authority.environ["PRIVYSEAL_DATA_DIR"]))
    assert running is not None
    connection = await asyncpg.connect(running.service_dsn, timeout=10)
    try:
        rows = await connection.fetch("SELECT signer, sealed_private FROM audit_logs")
    finally:
        await connection.close(timeout=5)
    return [(row["signer"], row["sealed_private"]) for row in rows]


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_tokens_are_signed_in_the_hsm_and_verify_anywhere(
    authority: Authority, token: Token
) -> None:
    claims = verified(authority, exchange(authority))
    assert claims["client_id"] == authority.client_id
    until(lambda: len(held(token)) == 3)  # the key that signs, the next one, the audit log's
    doctor = privyseal(authority, "doctor")
    assert "pkcs11:token=privyseal%20test" in doctor
    assert "does not name" not in doctor


def test_a_rotated_key_is_destroyed_in_the_hsm_and_its_tokens_verify_on(
    authority: Authority, token: Token
) -> None:
    until(lambda: "pending" in kids(authority))
    before, held_before, old_token = kids(authority), held(token), exchange(authority)
    assert jwt.get_unverified_header(old_token)["kid"] == before["active"]
    privyseal(authority, "keys", "rotate", "--reason", "a trial")
    until(lambda: signing(authority) == before["pending"])
    until(lambda: len(set(held_before) & set(held(token))) == 2)
    assert kids(authority)["retiring"] == before["active"]
    verified(authority, old_token)
    verified(authority, exchange(authority))
    until(lambda: destroyed(authority) == [before["active"]])
    until(lambda: len(held(token)) == 3)


def test_a_revoked_key_is_destroyed_in_the_hsm_and_the_next_one_goes_on(
    authority: Authority, token: Token
) -> None:
    until(lambda: "pending" in kids(authority))
    before, held_before = kids(authority), held(token)
    privyseal(authority, "keys", "revoke", before["active"], "--reason", "a trial", "--yes")
    assert signing(authority) == before["pending"]
    until(lambda: len(set(held_before) & set(held(token))) == 2)
    until(lambda: len(held(token)) == 3)
    until(lambda: before["active"] in destroyed(authority))


def test_the_audit_log_is_signed_in_the_hsm_and_verifies_with_the_key_that_migrate_prints(
    authority: Authority, token: Token, tmp_path: Path
) -> None:
    vkey = tmp_path / "vkey"
    vkey.write_text(privyseal(authority, "migrate"))
    verifier = vkey_of(vkey.read_text())
    until(lambda: checkpoint_size(authority, verifier) > 0)
    kept, export = tmp_path / "kept.txt", tmp_path / "records.ndjson"
    kept.write_bytes(httpx.get(f"{authority.issuer}/api/v1/audit/checkpoint").content)
    privyseal(authority, "audit", "export", "--checkpoint", str(kept), "--output", str(export))
    privyseal(
        authority, "audit", "verify", "--key", str(vkey), "--checkpoint", str(kept), str(export)
    )
    ((signer, sealed_private),) = asyncio.run(log_keys(authority))
    assert signer in held(token)
    assert sealed_private is None
    doctor = privyseal(authority, "doctor")
    assert "weak  audit log" not in doctor


def test_a_pair_that_nothing_names_is_shown_by_doctor_and_left_alone(
    authority: Authority, token: Token
) -> None:
    with softhsm.visible_here(token):
        made = asyncio.run(Pkcs11Custody(token.uri).new_key(2048))
    assert made.uri in privyseal(authority, "doctor")
    assert made.uri in held(token)


def test_without_the_hsm_doctor_says_what_to_do_and_recover_needs_no_token(
    authority: Authority, token: Token
) -> None:
    said = privyseal(authority, "doctor", exits=1, PRIVYSEAL_KEY_CUSTODY="local:")
    assert "kept under pkcs11:, which this process does not have" in said
    assert "privyseal keys recover" in said
    old = kids(authority)
    recover = ("keys", "recover", "--reason", "the HSM burnt", "--yes")
    privyseal(authority, *recover, PRIVYSEAL_KEY_CUSTODY="local:")
    until(lambda: kids(authority).get("active") not in old.values())
    assert set(kids(authority).values()).isdisjoint(old.values())
    assert signing(authority) == kids(authority)["active"]


def test_while_the_hsm_is_away_tokens_are_issued_and_the_log_waits_for_its_key(
    authority: Authority, token: Token
) -> None:
    # They are signed beside the HSM by now.
    verifier = vkey_of(privyseal(authority, "migrate"))
    away = token.token_dir.with_name("away")
    exchange(authority)
    token.token_dir.rename(away)
    try:
        until(lambda: bool(exchange(authority)) and sequencer(authority) == KEY_AWAY)
        size = checkpoint_size(authority, verifier)
        assert exchange(authority)
        assert "The key of the audit log" in privyseal(authority, "doctor", exits=1)
        assert httpx.get(f"{authority.issuer}/readyz").json()["audit_log"] is None
        waiting = "privyseal_audit_records_waiting "
        metrics = httpx.get(f"{authority.issuer}/metrics").text.splitlines()
        assert max(float(line.split()[-1]) for line in metrics if line.startswith(waiting)) > 0
        assert checkpoint_size(authority, verifier) == size
    finally:
        away.rename(token.token_dir)
    until(lambda: checkpoint_size(authority, verifier) > size and sequencer(authority) is None)


def test_a_log_whose_hsm_is_lost_goes_on_as_another_when_an_operator_accepts(
    authority: Authority,
) -> None:
    said = privyseal(authority, "doctor", exits=1, PRIVYSEAL_KEY_CUSTODY="local:")
    assert "kept under pkcs11:, which this process does not have" in said
    assert "privyseal restore accept" in said
    accept = ("restore", "accept", "--reason", "the HSM burnt", "--yes")
    verifier = vkey_of(privyseal(authority, *accept, PRIVYSEAL_KEY_CUSTODY="local:"))
    assert verifier.name.endswith("/audit/2")
    until(lambda: checkpoint_size(authority, verifier) > 0)
    assert "weak  audit log" in privyseal(authority, "doctor")


def test_signatures_a_second_in_the_hsm_and_beside_it(
    token: Token, capsys: pytest.CaptureFixture[str]
) -> None:
    keks = KeyEncryptionKeys.parse(new_kek_line())
    with ThreadPoolExecutor(1) as executor, softhsm.visible_here(token):
        rates = {
            "SoftHSM": asyncio.run(signatures_a_second(Pkcs11Custody(token.uri))),
            "local": asyncio.run(signatures_a_second(LocalCustody(lambda: keks, executor))),
        }
    assert min(rates.values()) > 0
    ratio = rates["SoftHSM"] / rates["local"]
    with capsys.disabled():
        print(
            "\nRS256 signatures a second, 2048 bits, one thread: "
            + ", ".join(f"{name} {rate:,.0f}" for name, rate in rates.items())
            + f", ratio {ratio:.2f}"
        )


async def signatures_a_second(custody: Custody) -> float:
    """The rate at which one process signs, `AT_ONCE` requests at a time."""
    signer = await custody.open(await custody.new_key(2048))
    signed, started = 0, time.perf_counter()
    while time.perf_counter() - started < SECONDS_OF_SIGNING:
        await asyncio.gather(*(signer.sign(b"signing input") for _ in range(AT_ONCE)))
        signed += AT_ONCE
    return signed / (time.perf_counter() - started)
