"""What the log knows of the calls that a live service takes, and of tokens that nobody issued.

The thief of these tests reads the database and the key-encryption key; everybody else uses HTTP.
"""

import asyncio
import hashlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, RSAPublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_der_public_key

from keys.envelope import KeyEncryptionKeys
from keys.signer import KeptKey, unseal
from keys.token import Claims, unsigned_token
from keys.verifier.strict import base64url_encode
from service.authority.audit import new_record_id
from service.store.embedded import find_running
from tests.interop.conftest import Authority, IngestService

NOTICED_WITHIN = 5.0
"""Seconds from the first use of a forged token to its record."""
REPORTED_WITHIN = 10.0
METADATA = {
    "source_tag": "vkyc",
    "external_id": "session-123",
    "document_category": "kyc_vkyc",
    "department": "retail",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class House:
    """An authority of our own, a service that reports to it, and clients of both."""

    authority: Authority
    ingest: IngestService
    operator: httpx.Client
    vkyc: tuple[str, str] = field(repr=False)
    reporter: tuple[str, str] = field(repr=False)

    def enrol(self, name: str, **fields: Any) -> tuple[str, str]:
        return enrol(self.operator, name, **fields)

    def exchange(self, credential: tuple[str, str], **form: str) -> str:
        return exchange(self.authority, credential, **form)

    def upload(self, token: str) -> httpx.Response:
        return httpx.post(
            f"{self.ingest.url}/api/v1/ingest",
            headers={
                "Authorization": f"Bearer {token}",
                "X-Approver-Department": "retail",
                "X-Request-Id": "upload-1",
            },
            files={"file": ("document.pdf", b"%PDF-1.7")},
            data={"metadata": json.dumps(METADATA)},
            timeout=10,
        )

    def search(self, token: str) -> httpx.Response:
        bearer = {"Authorization": f"Bearer {token}"}
        return httpx.get(f"{self.ingest.url}/api/v1/search", headers=bearer, timeout=10)

    def records(self, count: int, within: float, **filters: str) -> list[dict[str, Any]]:
        """Return the records that meet the filters once there are so many; fail after a while."""
        deadline = time.monotonic() + within
        while True:
            answer = self.operator.get("/audit-records", params=filters)
            assert answer.status_code == 200, answer.text
            found: list[dict[str, Any]] = answer.json()["records"]
            if len(found) >= count or time.monotonic() > deadline:
                assert len(found) == count, found
                return found
            time.sleep(0.05)


def exchange(authority: Authority, credential: tuple[str, str], **form: str) -> str:
    answer = httpx.post(
        f"{authority.issuer}/oauth/token",
        data={"grant_type": "client_credentials", **form},
        auth=credential,
        timeout=10,
    )
    assert answer.status_code == 200, answer.text
    return answer.json()["access_token"]


def enrol(operator: httpx.Client, name: str, **fields: Any) -> tuple[str, str]:
    body = {"name": name, "source_system": "vkyc", **fields}
    made = operator.post("/service-users", json=body)
    assert made.status_code == 201, made.text
    credentials = f"/service-users/{made.json()['id']}/credentials"
    made = operator.post(credentials, json={"label": "first"})
    assert made.status_code == 201, made.text
    return made.json()["client_id"], made.json()["client_secret"]


@pytest.fixture(scope="module")
def house(
    start_authority: Callable[..., AbstractContextManager[Authority]],
    start_ingest: Callable[..., AbstractContextManager[IngestService]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Generator[House, None, None]:
    with start_authority(PRIVYSEAL_LOG_LEVEL="error") as authority:
        api = f"{authority.issuer}/api/v1"
        entry = exchange(authority, (authority.client_id, authority.client_secret))
        with httpx.Client(
            base_url=api, headers={"Authorization": f"Bearer {entry}"}, timeout=10
        ) as operator:
            vkyc = enrol(operator, "vkyc-prod", scopes=["ingest:write", "search:read"])
            reporter = enrol(
                operator,
                "ingest",
                scopes=["audit:report"],
                audiences=[api, "http://127.0.0.1:8081"],
            )
            with start_ingest(
                authority,
                INGEST_CLIENT_ID=reporter[0],
                INGEST_CLIENT_SECRET=reporter[1],
                INGEST_SPOOL_DIR=str(tmp_path_factory.mktemp("spool")),
            ) as ingest:
                yield House(
                    authority=authority,
                    ingest=ingest,
                    operator=operator,
                    vkyc=vkyc,
                    reporter=reporter,
                )


def test_the_log_tells_the_whole_story_of_a_service_user_in_order(house: House) -> None:
    token = house.exchange(house.enrol("vkyc-story", scopes=["ingest:write"]))
    jti = unverified_claims(token)["jti"]
    uploaded = house.upload(token)
    assert uploaded.status_code == 201, uploaded.text
    story = house.records(4, REPORTED_WITHIN, service_user="vkyc-story")
    assert [record["action"] for record in story] == [
        "service_user.create",
        "credential.create",
        "token.issue",
        "document.ingest",
    ]
    issued, ingested = story[2:]
    assert issued["id"] == jti == ingested["jti"]
    assert ingested["department"] == "retail"
    assert ingested["resource"] == f"documents/{uploaded.json()['document_id']}"
    assert (ingested["outcome"], ingested["actor"]) == ("success", "ingest")
    assert ingested["credential_id"] == issued["credential_id"] == story[1]["credential_id"]
    assert ingested["request_id"] == "upload-1"


@pytest.fixture(scope="module")
def forge(house: House) -> Callable[..., str]:
    """Sign whatever claims with the private half of the active key."""
    data_dir = Path(house.authority.environ["PRIVYSEAL_DATA_DIR"])
    kept = asyncio.run(_stolen(data_dir))
    private_key: RSAPrivateKey = unseal(
        kept, KeyEncryptionKeys.parse((data_dir / "kek").read_text("utf-8"))
    )

    def forged(**claims: Any) -> str:
        unsigned = unsigned_token(kept.kid, Claims(**claims))
        return unsigned.signed(private_key.sign(unsigned.signing_input, PKCS1v15(), SHA256()))

    return forged


async def _stolen(data_dir: Path) -> KeptKey:
    running = find_running(data_dir)
    assert running is not None
    connection = await asyncpg.connect(running.service_dsn, timeout=10)
    try:
        row = await connection.fetchrow(
            "SELECT kid, signer, public_der, sealed_private FROM signing_keys"
            " WHERE state = 'active'"
        )
    finally:
        await connection.close(timeout=5)
    assert row is not None
    public_key = load_der_public_key(row["public_der"])
    assert isinstance(public_key, RSAPublicKey)
    return KeptKey(
        kid=row["kid"],
        uri=row["signer"],
        public_key=public_key,
        sealed_private=row["sealed_private"],
    )


def test_a_token_of_a_stolen_key_with_an_invented_jti_is_noticed(
    house: House, forge: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    genuine = unverified_claims(house.exchange(house.vkyc))
    forged = forge(**{**genuine, "jti": str(new_record_id(time.time()))})
    jti = unverified_claims(forged)["jti"]
    used_at = time.monotonic()
    assert house.upload(forged).status_code == 201  # offline, nobody can tell
    (record,) = house.records(1, NOTICED_WITHIN, action="token.forged", jti=jti)
    noticed_after = time.monotonic() - used_at
    with capsys.disabled():
        print(f"\nP5: a forged token is on record {noticed_after:.1f} s after its first use")
    assert noticed_after <= NOTICED_WITHIN
    assert record["reason"] == "never_issued"
    assert (record["actor"], record["service_user"]) == ("ingest", None)
    assert record["kid"] == jwt.get_unverified_header(forged)["kid"]
    assert record["department"] == "retail"


def test_a_token_of_a_stolen_key_with_a_borrowed_jti_and_one_scope_more_is_noticed(
    house: House, forge: Callable[..., str]
) -> None:
    genuine = unverified_claims(house.exchange(house.vkyc))
    forged = forge(**{**genuine, "scope": genuine["scope"] + " search:all"})
    used_at = time.monotonic()
    assert house.search(forged).status_code == 200
    (record,) = house.records(1, NOTICED_WITHIN, action="token.forged", jti=genuine["jti"])
    assert time.monotonic() - used_at <= NOTICED_WITHIN
    assert record["reason"] == "differs_from_its_record"
    assert (record["actor"], record["service_user"]) == ("ingest", "vkyc-prod")
    assert record["details"] == {"action": "document.search"}


def test_a_forged_token_is_the_first_thing_that_an_operator_sees(
    house: House, forge: Callable[..., str]
) -> None:
    genuine = unverified_claims(house.exchange(house.vkyc))
    forged = forge(**{**genuine, "jti": str(new_record_id(time.time()))})
    assert house.search(forged).status_code == 200
    house.records(
        1, NOTICED_WITHIN, action="token.forged", jti=str(unverified_claims(forged)["jti"])
    )
    time.sleep(2.1)  # a count is good for two seconds
    client = {
        "PRIVYSEAL_URL": house.authority.issuer,
        "PRIVYSEAL_CLIENT_ID": house.authority.client_id,
        "PRIVYSEAL_CLIENT_SECRET": house.authority.client_secret,
    }
    listed = privyseal(house, "service-users", "list", **client)
    assert listed.returncode == 0
    assert listed.stderr.startswith("ALERT: ")
    assert "a signing key is in other hands" in listed.stderr
    doctor = privyseal(house, "doctor")
    assert doctor.returncode == 1
    assert "forged tokens were noticed" in doctor.stdout
    metrics = httpx.get(f"{house.authority.issuer}/metrics", timeout=10).text
    found = re.search(r"^privyseal_forged_tokens_total ([0-9.]+)$", metrics, re.MULTILINE)
    assert found is not None, metrics
    assert float(found[1]) >= 1


def test_a_reporter_cannot_call_a_real_token_forged(house: House) -> None:
    """It has the tokens that were sent to it, with their signatures: under another jti each is a
    token that we signed and did not issue, but for its digest."""
    before = len(house.operator.get("/audit-records?action=token.forged").json()["records"])
    token, other = house.exchange(house.vkyc), house.exchange(house.vkyc)
    assert house.upload(token).status_code == 201
    signing_input, _, signature = token.rpartition(".")
    digest = base64url_encode(hashlib.sha256(signing_input.encode()).digest())
    api = f"{house.authority.issuer}/api/v1"
    bearer = house.exchange(house.reporter, scope="audit:report", resource=api)

    def lie(jti: str, **members: str) -> dict[str, str]:
        now = time.time()
        return {
            "type": "api.call",
            "id": str(new_record_id(now)),
            "occurred_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now)),
            "jti": jti,
            "kid": jwt.get_unverified_header(token)["kid"],
            "signing_input_sha256": digest,
            "action": "document.ingest",
            "resource": "documents/1",
            "outcome": "success",
            "request_id": "lie-1",
            "signature": signature,
            **members,
        }

    lies = [
        lie(str(new_record_id(time.time()))),
        lie(unverified_claims(other)["jti"]),
        lie(unverified_claims(token)["jti"], signing_input_sha256="A" * 43),
    ]
    answer = httpx.post(
        f"{api}/audit-events",
        json={"events": lies},
        headers={"Authorization": f"Bearer {bearer}"},
        timeout=10,
    )
    assert [result["status"] for result in answer.json()["results"]] == ["recorded"] * 3
    unknown = house.records(3, REPORTED_WITHIN, action="token.unknown")
    assert {(record["actor"], record["service_user"]) for record in unknown} == {("ingest", None)}
    forged = house.operator.get("/audit-records?action=token.forged").json()["records"]
    assert len(forged) == before


def test_each_checkpoint_is_a_line_of_the_servers_log_whatever_its_level(house: House) -> None:
    api = f"{house.authority.issuer}/api/v1"
    note = httpx.get(f"{api}/audit/checkpoint", timeout=10).text
    server_log = Path(house.authority.environ["PRIVYSEAL_DATA_DIR"]) / "serve.log"
    deadline = time.monotonic() + REPORTED_WITHIN  # it is published a moment before it is logged
    while note not in [
        line["note"] for line in logged(server_log) if line["event"] == "checkpoint"
    ]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert {line["event"] for line in logged(server_log) if line["level"] == "info"} == {
        "checkpoint"
    }


def logged(server_log: Path) -> list[dict[str, Any]]:
    whole = server_log.read_text().rpartition("\n")[0]
    return [json.loads(line) for line in whole.splitlines() if line.startswith("{")]


def unverified_claims(token: str) -> dict[str, Any]:
    claims: dict[str, Any] = jwt.decode(token, options={"verify_signature": False})
    return claims


def privyseal(house: House, *arguments: str, **environ: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        (str(Path(sys.executable).with_name("privyseal")), *arguments),
        env={**house.authority.environ, **environ},
        capture_output=True,
        text=True,
        timeout=60,
    )
