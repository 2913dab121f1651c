"""What services report to the log: `POST /api/v1/audit-events`, by its answers and its records."""

import asyncio
import hashlib
import re
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeAlias
from uuid import UUID, uuid4

import asyncpg
import httpx
import jwt
import msgspec
import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, RSAPublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_der_public_key

from keys.envelope import KeyEncryptionKeys
from keys.signer import LOCAL, KeptKey, unseal
from keys.token import Claims, unsigned_token
from keys.verifier.strict import base64url_encode
from service.app import Authority
from service.authority.audit import Action, new_record_id
from service.authority.audit.reading import MAX_ALARMS
from service.authority.audit.unproven import MAX_UNPROVEN
from service.console.page import COOKIE
from service.settings import LOCAL_AUDIENCE, Settings
from service.store.embedded import Running
from tests.http.console_client import ConsoleClient

pytestmark = pytest.mark.anyio

Credential: TypeAlias = tuple[str, str]
Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"
Enrol: TypeAlias = Callable[..., Awaitable[Credential]]
SignIn: TypeAlias = Callable[..., Awaitable[httpx.AsyncClient]]
Records: TypeAlias = Callable[..., Awaitable[list[dict[str, Any]]]]
SQL: TypeAlias = Callable[..., Awaitable[list[asyncpg.Record]]]

EVENTS = "/api/v1/audit-events"
KIDS = ["a" * 43, "b" * 43]
DAY = 86_400.0
WEEK = 7 * DAY
SKEW = 60
COUNT = "SELECT count(*) AS count FROM audit_records WHERE action = 'jwks.loaded'"


@pytest.fixture
async def ingest(enrol: Enrol, settings: Settings) -> Credential:
    """A service that reports, and that tokens are for."""
    audiences = [settings.api_audience, LOCAL_AUDIENCE]
    return await enrol("ingest", scopes=["audit:report"], audiences=audiences)


@pytest.fixture
async def reporter(ingest: Credential, sign_in: SignIn) -> httpx.AsyncClient:
    """A client with its token."""
    return await sign_in(ingest)


def loaded(*, ago: float = 0, **members: Any) -> dict[str, Any]:
    """An event of `ago` seconds before now; members as given."""
    return {
        "type": "jwks.loaded",
        "id": str(new_record_id(time.time() - ago)),
        "occurred_at": "2026-11-24T20:00:00+01:00",
        "instance": "hVx3q0Zr9T1c",
        "kids": KIDS,
        **members,
    }


async def report(client: httpx.AsyncClient, *events: dict[str, Any]) -> list[str]:
    """Report events; the status of each, once ids and details are as they must be."""
    answer = await client.post(EVENTS, json={"events": events})
    assert answer.status_code == 200, answer.text
    results = answer.json()["results"]
    assert [result["id"] for result in results] == [event["id"] for event in events]
    for result in results:
        assert result.keys() == {"id", "status", "detail"}
        assert bool(result["detail"]) == (result["status"] == "refused"), result
    return [result["status"] for result in results]


async def test_an_event_is_a_record_under_its_own_id_whose_actor_is_the_reporter(
    ingest: Credential, reporter: httpx.AsyncClient, records: Records
) -> None:
    event = loaded()
    answer = await reporter.post(
        EVENTS, json={"events": [event]}, headers={"User-Agent": "ingest/1"}
    )
    assert answer.json() == {"results": [{"id": event["id"], "status": "recorded", "detail": ""}]}
    (record,) = await records(action="jwks.loaded")
    assert (record["id"], record["outcome"]) == (event["id"], "success")
    assert (record["actor_id"], record["actor"]) == (ingest[0], "ingest")
    assert record["actor_credential_id"].startswith("cr_")
    assert record["details"] == {
        "occurred_at": event["occurred_at"],
        "instance": event["instance"],
        "kids": KIDS,
    }
    assert record["service_user_id"] is None
    assert record["request_id"] == answer.headers["x-request-id"]
    assert (record["client_address"], record["user_agent"]) == ("127.0.0.1", "ingest/1")


async def test_to_report_again_is_harmless(
    reporter: httpx.AsyncClient, records: Records, sign_in: SignIn, ingest: Credential
) -> None:
    first, second = loaded(), loaded()
    assert await report(reporter, first, second, first) == ["recorded", "recorded", "known"]
    assert await report(await sign_in(ingest), second, loaded()) == ["known", "recorded"]
    await records(3, action="jwks.loaded")


async def test_an_id_that_another_reporter_took_is_refused_and_its_neighbours_are_not(
    reporter: httpx.AsyncClient,
    sign_in: SignIn,
    enrol_operator: Enrol,
    records: Records,
    ingest: Credential,
) -> None:
    other = await sign_in(await enrol_operator("search", "audit:report"))
    event = loaded()
    assert await report(reporter, event) == ["recorded"]
    assert await report(other, loaded(), event, loaded()) == ["recorded", "refused", "recorded"]
    (record,) = await records(action="jwks.loaded", jti=event["id"])
    assert record["actor_id"] == ingest[0]


async def test_the_jti_of_a_token_is_no_id_for_an_event(
    reporter: httpx.AsyncClient, records: Records, ingest: Credential
) -> None:
    (issuance,) = await records(action="token.issue", service_user=ingest[0])
    assert await report(reporter, loaded(id=issuance["id"])) == ["refused"]
    await records(0, action="jwks.loaded")


async def test_an_id_must_be_of_the_last_week_and_not_ahead_of_the_clock(
    reporter: httpx.AsyncClient, records: Records
) -> None:
    ages = {
        WEEK + 30: "refused",
        WEEK - 30: "recorded",
        DAY: "recorded",
        -SKEW + 20: "recorded",
        -SKEW - 20: "refused",
        -DAY: "refused",
        -100 * 365 * DAY: "refused",
    }
    events = [loaded(ago=ago) for ago in ages]
    assert await report(reporter, *events) == list(ages.values())
    await records(3, action="jwks.loaded")


TOKEN = ".".join(("A" * 40, "B" * 300, "C" * 342))
AWAY = "00000000-0000-7000-8000-000000000000"


def call(token: str = TOKEN, *, jti: str | None = None, ago: float = 0, **members: Any) -> Any:
    """The event of a call with this token, `ago` seconds before now; members as given."""
    signing_input, _, _ = token.rpartition(".")
    if jti is None:
        jti = AWAY if token is TOKEN else claims_of(token)["jti"]
    return {
        "type": "api.call",
        "id": str(new_record_id(time.time() - ago)),
        "occurred_at": datetime.fromtimestamp(time.time() - ago, UTC).isoformat(),
        "jti": jti,
        "kid": KIDS[0] if token is TOKEN else jwt.get_unverified_header(token)["kid"],
        "signing_input_sha256": base64url_encode(hashlib.sha256(signing_input.encode()).digest()),
        "action": "document.ingest",
        "resource": "documents/0c1f",
        "outcome": "success",
        "request_id": "request-1",
        **members,
    }


MALFORMED: dict[str, tuple[dict[str, Any], str]] = {
    "no events": ({}, ""),
    "events null": ({"events": None}, "/events"),
    "events empty": ({"events": []}, "/events"),
    "more than 1,000 events": ({"events": [loaded() for _ in range(1001)]}, "/events"),
    "another member": ({"events": [loaded()], "more": 1}, ""),
    "an event of another member": ({"events": [loaded(), loaded(more=1)]}, "/events/1"),
    "an event that is none": ({"events": [loaded(), "x"]}, "/events/1"),
    "an event without type": (
        {"events": [{k: v for k, v in loaded().items() if k != "type"}]},
        "/events/0",
    ),
    "an event of another type": ({"events": [loaded(type="token.issue")]}, "/events/0/type"),
    "an id of version 4": ({"events": [loaded(id=str(uuid4()))]}, "/events/0/id"),
    "an id in capitals": (
        {"events": [loaded(id="019AB7A4-5C00-7000-8000-00000000000A")]},
        "/events/0/id",
    ),
    "an id without hyphens": (
        {"events": [loaded(id=UUID(loaded()["id"]).hex)]},
        "/events/0/id",
    ),
    "a time without offset": (
        {"events": [loaded(occurred_at="2026-11-24T20:00:00")]},
        "/events/0/occurred_at",
    ),
    "a time in seconds": ({"events": [loaded(occurred_at=1_795_000_000)]}, "/events/0/occurred_at"),
    "a short instance": ({"events": [loaded(instance="x" * 7)]}, "/events/0/instance"),
    "a long instance": ({"events": [loaded(instance="x" * 65)]}, "/events/0/instance"),
    "an instance with a space": ({"events": [loaded(instance="in stance")]}, "/events/0/instance"),
    "a kid that is none": ({"events": [loaded(kids=[KIDS[0], "x"])]}, "/events/0/kids/1"),
    "more than 64 kids": ({"events": [loaded(kids=KIDS[:1] * 65)]}, "/events/0/kids"),
    "a call with kids": ({"events": [loaded(), call(kids=KIDS)]}, "/events/1"),
    "a call without jti": (
        {"events": [{k: v for k, v in call().items() if k != "jti"}]},
        "/events/0",
    ),
    "a jti that is none": ({"events": [call(jti="token-1")]}, "/events/0/jti"),
    "a digest in hex": (
        {"events": [call(signing_input_sha256="0f" * 32)]},
        "/events/0/signing_input_sha256",
    ),
    "a digest with bits too many": (
        {"events": [call(signing_input_sha256="A" * 42 + "B")]},
        "/events/0/signing_input_sha256",
    ),
    "an action of one word": ({"events": [call(action="ingest")]}, "/events/0/action"),
    "an action in capitals": ({"events": [call(action="Document.ingest")]}, "/events/0/action"),
    "a resource too long": ({"events": [call(resource="x" * 301)]}, "/events/0/resource"),
    "an outcome of another name": ({"events": [call(outcome="ok")]}, "/events/0/outcome"),
    "a signature that is none": ({"events": [call(signature="a.b")]}, "/events/0/signature"),
    "a signature too long": ({"events": [call(signature="A" * 1367)]}, "/events/0/signature"),
    "a call at a time without offset": (
        {"events": [call(occurred_at="2026-11-24T20:00:00")]},
        "/events/0/occurred_at",
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
async def test_a_malformed_report_is_refused_as_a_whole_with_a_pointer_to_where(
    name: str, reporter: httpx.AsyncClient, sql: SQL, records: Records
) -> None:
    body, pointer = MALFORMED[name]
    answer = await reporter.post(EVENTS, json=body)
    assert answer.status_code == 422, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    found = [error["pointer"] for error in answer.json().get("errors", [])]
    assert found == ([pointer] if pointer else [])
    assert (await sql(COUNT))[0]["count"] == 0
    await records(1, action="audit.report", reason="invalid", outcome="refused")


async def test_a_report_of_almost_a_mebibyte_is_taken_and_a_larger_one_is_not(
    reporter: httpx.AsyncClient, records: Records
) -> None:
    events = [loaded(kids=KIDS[:1] * 64) for _ in range(330)]
    whole = msgspec.json.encode({"events": events})
    json = {"Content-Type": "application/json"}
    fitting = whole + b" " * (1_048_576 - len(whole))
    assert len(whole) > 1_000_000
    answer = await reporter.post(EVENTS, content=fitting, headers=json)
    assert answer.status_code == 200, answer.text
    # Each instance has a few to make an hour: what is beyond that would only fill the log.
    statuses = [result["status"] for result in answer.json()["results"]]
    assert statuses == ["recorded"] * 120 + ["refused"] * 210
    assert "More than 120 reports" in answer.json()["results"][-1]["detail"]
    answer = await reporter.post(EVENTS, content=fitting + b" ", headers=json)
    assert answer.status_code == 413
    assert answer.json()["detail"] == "The body is larger than this resource takes."
    await records(120, action="jwks.loaded")


@pytest.fixture
async def changing(database: Running) -> Any:
    """A connection that holds the fence, as whoever changes a service user does."""
    connection = await asyncpg.connect(database.superuser_dsn.reveal(), timeout=10)
    await connection.execute("BEGIN")
    await connection.execute("SELECT pg_advisory_xact_lock(7709, 0)")
    yield connection
    await connection.close(timeout=5)


async def report_while(
    changing: Connection, reporter: httpx.AsyncClient, sql: SQL, *changes: tuple[str, str]
) -> httpx.Response:
    """Report an event, let it wait for the fence, and commit the changes before it is recorded."""
    answer = asyncio.create_task(reporter.post(EVENTS, json={"events": [loaded()]}))
    async with asyncio.timeout(5):
        while not await sql(WAITING_FOR_THE_FENCE):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    for statement, argument in changes:
        await changing.execute(statement, argument)
    await changing.execute("COMMIT")
    return await answer


WAITING_FOR_THE_FENCE = (
    "SELECT FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
    " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
)
VERSION = "UPDATE service_users SET version = version + 1 WHERE id = $1"


async def test_a_report_of_someone_who_is_changed_meanwhile_is_decided_on_what_is_in_force(
    ingest: Credential, reporter: httpx.AsyncClient, changing: Connection, sql: SQL
) -> None:
    answer = await report_while(changing, reporter, sql, (VERSION, ingest[0]))
    assert answer.status_code == 200, answer.text
    assert answer.json()["results"][0]["status"] == "recorded"
    assert (await sql(COUNT))[0]["count"] == 1


async def test_a_report_of_someone_who_is_disabled_meanwhile_is_refused(
    ingest: Credential, reporter: httpx.AsyncClient, changing: Connection, sql: SQL
) -> None:
    disable = "UPDATE service_users SET status = 'disabled' WHERE id = $1"
    answer = await report_while(changing, reporter, sql, (VERSION, ingest[0]), (disable, ingest[0]))
    assert answer.status_code == 401
    assert (await sql(COUNT))[0]["count"] == 0


async def test_a_report_of_someone_whose_right_is_taken_meanwhile_is_refused(
    ingest: Credential, reporter: httpx.AsyncClient, changing: Connection, sql: SQL
) -> None:
    strip = "UPDATE service_users SET scopes = '{}' WHERE id = $1"
    answer = await report_while(changing, reporter, sql, (VERSION, ingest[0]), (strip, ingest[0]))
    assert answer.status_code == 403
    assert 'scope="audit:report"' in answer.headers["www-authenticate"]
    assert (await sql(COUNT))[0]["count"] == 0


# Calls


def claims_of(token: str) -> dict[str, Any]:
    return jwt.decode(token, options={"verify_signature": False})


def signature_of(token: str) -> str:
    return token.rpartition(".")[2]


async def exchanged(client: httpx.AsyncClient, credential: Credential, **form: str) -> str:
    answer = await client.post(
        "/oauth/token", auth=credential, data={"grant_type": "client_credentials", **form}
    )
    assert answer.status_code == 200, answer.text
    return answer.json()["access_token"]


@pytest.fixture
async def token(client: httpx.AsyncClient, vkyc: Credential) -> str:
    """A token of vkyc-prod for the service that reports."""
    return await exchanged(client, vkyc)


async def test_a_call_is_a_record_of_whom_its_token_was_issued_to_and_its_actor_is_the_reporter(
    reporter: httpx.AsyncClient, records: Records, token: str, vkyc: Credential, ingest: Credential
) -> None:
    event = call(
        token,
        outcome="failed",
        request_id="upload 7/ä",
        client_address="192.0.2.7",
        user_agent="vkyc/3",
        department="retail",
        resource="documents/grüße",
        occurred_at="2026-11-24T20:00:00.123+01:00",
    )
    assert await report(reporter, event) == ["recorded"]
    (record,) = await records(actor="ingest")
    (issuance,) = await records(action="token.issue", service_user=vkyc[0])
    assert issuance["id"] == event["jti"]
    assert (record["id"], record["jti"]) == (event["id"], event["jti"])
    assert (record["action"], record["outcome"]) == ("document.ingest", "failed")
    for field in ("service_user_id", "service_user", "source_system", "credential_id", "kid"):
        assert record[field] == issuance[field] is not None
    assert (record["actor_id"], record["actor"]) == (ingest[0], "ingest")
    assert record["signing_input_sha256"] == issuance["signing_input_sha256"]
    assert record["occurred_at"].startswith("2026-11-24T19:00:00.123")
    assert record["request_id"] == "upload 7/ä"
    assert (record["client_address"], record["user_agent"]) == ("192.0.2.7", "vkyc/3")
    assert (record["department"], record["resource"]) == ("retail", "documents/grüße")
    assert (record["version"], record["reason"], record["details"]) == (None, None, {})


async def test_a_call_is_recorded_once_however_often_it_is_reported(
    reporter: httpx.AsyncClient, records: Records, token: str
) -> None:
    first, second = call(token), call(token)
    assert await report(reporter, first, second, first) == ["recorded", "recorded", "known"]
    assert await report(reporter, {**second, "signature": signature_of(token)}) == ["known"]
    assert await report(reporter, call(token, id=loaded()["id"]), call(token)) == ["recorded"] * 2
    await records(4, actor="ingest")


async def test_a_call_with_a_token_for_others_is_refused_in_words(
    sign_in: SignIn, enrol_operator: Enrol, token: str, records: Records
) -> None:
    other = await sign_in(await enrol_operator("search", "audit:report"))
    answer = await other.post(EVENTS, json={"events": [call(token), call(bearer(other))]})
    refused, own = answer.json()["results"]
    assert refused["status"] == "refused"
    assert refused["detail"] == "The token is for an audience that is none of yours."
    assert own["status"] == "recorded"
    await records(1, actor="search")


def bearer(client: httpx.AsyncClient) -> str:
    return client.headers["authorization"].removeprefix("Bearer ")


async def test_no_report_can_look_like_an_act_of_the_authority(
    reporter: httpx.AsyncClient, records: Records, token: str
) -> None:
    own = [*Action, "token.read", "credential.use"]
    events = [call(token, action=action) for action in own]
    answer = await reporter.post(EVENTS, json={"events": events})
    for result, action in zip(answer.json()["results"], own, strict=True):
        assert result["status"] == "refused"
        word = action.partition(".")[0]
        assert result["detail"].startswith(f"Actions that begin with {word} are the authority's")
    await records(0, actor="ingest")


async def test_a_call_must_have_happened_in_the_last_week(
    reporter: httpx.AsyncClient, records: Records, token: str
) -> None:
    times = {
        "2026-01-01T00:00:00Z": "refused",
        "9999-12-31T23:59:59Z": "refused",
        datetime.fromtimestamp(time.time() + SKEW + 20, UTC).isoformat(): "refused",
        datetime.fromtimestamp(time.time() + SKEW - 20, UTC).isoformat(): "recorded",
        datetime.fromtimestamp(time.time() - WEEK + 30, UTC).isoformat(): "recorded",
    }
    events = [call(token, occurred_at=at) for at in times]
    assert await report(reporter, *events) == list(times.values())
    await records(2, actor="ingest")


async def test_a_thousand_calls_are_one_report(
    reporter: httpx.AsyncClient, sql: SQL, token: str
) -> None:
    events = [call(token, user_agent="u" * 150) for _ in range(1000)]
    assert await report(reporter, *events) == ["recorded"] * 1000
    assert await report(reporter, *events) == ["known"] * 1000
    (row,) = await sql(
        "SELECT count(*), count(DISTINCT jti) AS tokens FROM audit_records"
        " WHERE action = 'document.ingest'"
    )
    assert tuple(row) == (1000, 1)


# Tokens that were never issued


@pytest.fixture
async def forge(
    operator_credential: Credential, keks: KeyEncryptionKeys, sql: SQL, settings: Settings
) -> Callable[..., str]:
    """Sign a token with the private half of the active key, taken out of the database."""
    (row,) = await sql(
        "SELECT kid, signer, public_der, sealed_private FROM signing_keys WHERE state = 'active'"
    )
    public_key = load_der_public_key(row["public_der"])
    assert isinstance(public_key, RSAPublicKey)
    assert row["signer"] == LOCAL
    kept = KeptKey(
        kid=row["kid"], uri=LOCAL, public_key=public_key, sealed_private=row["sealed_private"]
    )
    stolen: RSAPrivateKey = unseal(kept, keks)

    def forged(**claims: Any) -> str:
        now = int(time.time())
        defaults: dict[str, Any] = {
            "iss": settings.issuer,
            "sub": operator_credential[0],
            "client_id": operator_credential[0],
            "aud": LOCAL_AUDIENCE,
            "iat": now,
            "exp": now + 900,
            "jti": str(new_record_id(time.time())),
            "scope": "ingest:write",
            "service_user": "vkyc-prod",
            "source_system": "vkyc",
        }
        unsigned = unsigned_token(kept.kid, Claims(**{**defaults, **claims}))
        return unsigned.signed(stolen.sign(unsigned.signing_input, PKCS1v15(), SHA256()))

    return forged


Forge: TypeAlias = Callable[..., str]


async def metric(client: httpx.AsyncClient, name: str) -> float:
    found = re.search(rf"^{name} ([0-9.]+)$", (await client.get("/metrics")).text, re.MULTILINE)
    assert found is not None, name
    return float(found[1])


async def alerted(client: httpx.AsyncClient, alert: str) -> None:
    """Return once an answer of the admin API brings the alert."""
    async with asyncio.timeout(8):
        while (  # noqa: ASYNC110
            await client.get("/api/v1/service-users/me")
        ).headers.get("privyseal-alert") != alert:
            await asyncio.sleep(0.2)


async def test_a_token_with_an_invented_jti_is_forged_once_its_signature_came(
    reporter: httpx.AsyncClient,
    operator: httpx.AsyncClient,
    records: Records,
    forge: Forge,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = await metric(operator, "privyseal_forged_tokens_total")
    forged = forge()
    event = call(forged, client_address="192.0.2.66", department="retail")
    assert await report(reporter, event) == ["signature_wanted"]
    await records(0, actor="ingest")
    event["signature"] = signature_of(forged)
    assert await report(reporter, event) == ["recorded"]
    assert await report(reporter, event) == ["known"]
    (record,) = await records(action="token.forged")
    assert (record["id"], record["jti"], record["kid"]) == (
        event["id"],
        event["jti"],
        event["kid"],
    )
    assert (record["reason"], record["outcome"]) == ("never_issued", "success")
    assert record["details"] == {"action": "document.ingest"}
    assert (record["actor"], record["service_user"]) == ("ingest", None)
    assert (record["client_address"], record["department"]) == ("192.0.2.66", "retail")
    assert await metric(operator, "privyseal_forged_tokens_total") == before + 1
    assert "token_forged" in capsys.readouterr().out


async def test_a_token_with_a_borrowed_jti_and_one_scope_more_is_forged(
    reporter: httpx.AsyncClient, records: Records, forge: Forge, token: str, vkyc: Credential
) -> None:
    borrowed = claims_of(token)
    forged = forge(**{**borrowed, "scope": borrowed["scope"] + " search:all"})
    genuine, event = call(token), call(forged)
    assert event["jti"] == genuine["jti"]
    assert await report(reporter, genuine, event) == ["recorded", "signature_wanted"]
    assert await report(reporter, {**event, "signature": signature_of(forged)}) == ["recorded"]
    (record,) = await records(action="token.forged")
    assert record["reason"] == "differs_from_its_record"
    assert (record["service_user_id"], record["service_user"]) == (vkyc[0], "vkyc-prod")
    assert record["jti"] == genuine["jti"]


async def test_a_forged_token_that_borrows_the_jti_of_a_token_for_others_is_noticed(
    reporter: httpx.AsyncClient, operator: httpx.AsyncClient, records: Records, forge: Forge
) -> None:
    forged = forge(jti=claims_of(bearer(operator))["jti"])
    event = call(forged, signature=signature_of(forged))
    assert await report(reporter, event) == ["recorded"]
    (record,) = await records(action="token.forged")
    assert record["service_user"] == "operator"


# Forged tokens that come to the authority itself

THIEF = {"User-Agent": "thief/1"}


async def test_a_forged_token_that_comes_to_the_api_is_noticed_at_once(
    client: httpx.AsyncClient,
    operator: httpx.AsyncClient,
    records: Records,
    forge: Forge,
    settings: Settings,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = await metric(client, "privyseal_forged_tokens_total")
    borrowed = claims_of(bearer(operator))
    forged = {
        "never_issued": forge(aud=settings.api_audience, scope="audit:read"),
        "differs_from_its_record": forge(**{**borrowed, "exp": borrowed["exp"] + 1}),
    }
    for token in forged.values():
        headers = {"Authorization": f"Bearer {token}", **THIEF}
        answer = await client.get("/api/v1/audit-records", headers=headers)
        assert answer.status_code == 401
        assert 'error="invalid_token"' in answer.headers["www-authenticate"]
    noticed = {record["reason"]: record for record in await records(2, action="token.forged")}
    for reason, token in forged.items():
        record = noticed[reason]
        assert record["kid"] == jwt.get_unverified_header(token)["kid"]
        assert record["jti"] == claims_of(token)["jti"]
        signing_input = token.rpartition(".")[0].encode()
        assert record["signing_input_sha256"] == hashlib.sha256(signing_input).hexdigest()
        assert (record["outcome"], record["actor"]) == ("refused", None)
        assert record["details"] == {"action": "audit.query"}
        assert (record["client_address"], record["user_agent"]) == ("127.0.0.1", "thief/1")
    assert noticed["never_issued"]["service_user"] is None
    assert noticed["differs_from_its_record"]["service_user"] == "operator"
    await records(0, action="audit.query", outcome="refused")
    assert await metric(client, "privyseal_forged_tokens_total") == before + 2
    assert "token_forged" in capsys.readouterr().out
    await alerted(operator, "token.forged 2")


async def test_a_forged_session_is_noticed_wherever_the_console_is_asked(
    client: httpx.AsyncClient,
    records: Records,
    forge: Forge,
    settings: Settings,
    operator_at_console: ConsoleClient,
) -> None:
    tried = {
        ("GET", "/console"): "service_user.read",
        ("GET", "/console/service-users"): "service_user.list",
        ("GET", "/console/sign-in"): None,
        ("GET", "/console/no/such/page"): None,
        ("POST", "/console/service-users/new"): "service_user.create",
        ("POST", "/console/sign-in/resume"): "token.issue",
    }
    for method, path in tried:
        token = forge(aud=settings.console_audience, sid="s" * 22, auth_time=int(time.time()))
        headers = {"Cookie": f"{COOKIE}={token}", "Origin": settings.issuer, **THIEF}
        form = {"csrf": ""} if method == "POST" else None
        answer = await client.request(method, path, headers=headers, data=form)
        assert answer.status_code == (401 if method == "POST" else 200 if "in" in path else 303)
    noticed = await records(len(tried), action="token.forged", outcome="refused")
    assert sorted(str(record["details"].get("action")) for record in noticed) == sorted(
        map(str, tried.values())
    )
    assert {record["user_agent"] for record in noticed} == {"thief/1"}
    alarms = (await operator_at_console.get("/audit")).text
    assert alarms.count("presented to this authority, used from") == MAX_ALARMS
    async with asyncio.timeout(8):
        while "A signing key leaked." not in (await operator_at_console.get("/")).text:  # noqa: ASYNC110
            await asyncio.sleep(0.2)


async def test_a_flood_of_forged_tokens_is_counted_like_claims(
    client: httpx.AsyncClient, records: Records, forge: Forge, settings: Settings
) -> None:
    before = await metric(client, "privyseal_forged_tokens_total")
    for _ in range(MAX_UNPROVEN + 20):
        headers = {"Authorization": f"Bearer {forge(aud=settings.api_audience)}"}
        assert (await client.get("/api/v1/service-users", headers=headers)).status_code == 401
    noticed = await records(MAX_UNPROVEN, action="token.forged")
    assert len({record["jti"] for record in noticed}) == MAX_UNPROVEN
    counted = await metric(client, "privyseal_forged_tokens_total") - before
    assert counted == MAX_UNPROVEN + 20


async def test_a_live_token_is_judged_by_its_own_age_and_not_by_that_of_its_key(
    reporter: httpx.AsyncClient,
    client: httpx.AsyncClient,
    records: Records,
    forge: Forge,
    settings: Settings,
    sql: SQL,
) -> None:
    # A month is archived seven days after its end: the record of a live token is always here.
    await sql("UPDATE signing_keys SET activated_at = now() - interval '70 days'")
    token = forge(aud=settings.api_audience)
    assert await report(reporter, call(token, signature=signature_of(token))) == ["recorded"]
    await records(1, action="token.unverifiable")
    headers = {"Authorization": f"Bearer {token}"}
    assert (await client.get("/api/v1/service-users", headers=headers)).status_code == 401
    (record,) = await records(1, action="token.forged")
    assert record["jti"] == claims_of(token)["jti"]


async def test_while_records_may_be_missing_no_token_is_called_forged(
    client: httpx.AsyncClient,
    authority: Authority,
    records: Records,
    forge: Forge,
    settings: Settings,
    sql: SQL,
) -> None:
    async with asyncio.timeout(10):
        while not await sql("DELETE FROM audit_checkpoints RETURNING size"):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        while authority.continuity.broken is None:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    headers = {"Authorization": f"Bearer {forge(aud=settings.api_audience)}"}
    assert (await client.get("/api/v1/service-users", headers=headers)).status_code == 401
    await records(1, action="service_user.list", outcome="refused", reason="invalid_token")
    await records(0, action="token.forged")


async def test_every_operator_is_told_of_forged_tokens_and_who_only_reports_is_not(
    reporter: httpx.AsyncClient,
    operator: httpx.AsyncClient,
    sign_in: SignIn,
    enrol_operator: Enrol,
    forge: Forge,
) -> None:
    for _ in range(2):
        forged = forge()
        event = call(forged, signature=signature_of(forged))
        assert await report(reporter, event) == ["recorded"]
    minter = await sign_in(await enrol_operator("minter", "tokens:mint"))
    await alerted(minter, "token.forged 2")
    refused = await minter.get("/api/v1/service-users")
    assert (refused.status_code, refused.headers["privyseal-alert"]) == (403, "token.forged 2")
    answer = await reporter.get("/api/v1/service-users/me")
    assert answer.status_code == 200
    assert "privyseal-alert" not in answer.headers
    assert "privyseal-alert" not in (await operator.get("/.well-known/jwks.json")).headers


async def test_a_lying_reporter_cannot_raise_the_alarm(
    reporter: httpx.AsyncClient,
    client: httpx.AsyncClient,
    operator: httpx.AsyncClient,
    records: Records,
    token: str,
    vkyc: Credential,
) -> None:
    second = await exchanged(client, vkyc)
    signature = signature_of(token)
    jti = claims_of(token)["jti"]
    lies = [
        # Digests of its own invention, for a real jti and for an invented one.
        call(token, signing_input_sha256="A" * 43, signature=signature),
        call(jti=jti, kid=jwt.get_unverified_header(token)["kid"], signature=signature),
        call(signature="C" * 342),
        # A real token under the jti of another one, or under none.
        call(token, jti=claims_of(second)["jti"], signature=signature),
        call(token, jti=str(new_record_id(time.time())), signature=signature),
        # A real token under another kid; and one that is for somebody else.
        call(token, jti=str(uuid4()), kid=KIDS[1], signature=signature),
        call(bearer(operator), jti=jti, signature=signature_of(bearer(operator))),
    ]
    assert await report(reporter, *lies) == ["recorded"] * len(lies)
    unknown = await records(len(lies), action="token.unknown")
    assert {record["actor"] for record in unknown} == {"ingest"}
    assert {record["service_user_id"] for record in unknown} == {None}
    reasons = {record["id"]: record["reason"] for record in unknown}
    assert [reasons[lie["id"]] for lie in lies] == [
        *["not_signed_here"] * 3,
        *["digest_of_another_token"] * 2,
        "not_signed_here",
        "digest_of_another_token",
    ]
    await records(0, action="token.forged")


async def test_claims_that_nothing_proves_are_limited_for_each_reporter(
    reporter: httpx.AsyncClient,
    client: httpx.AsyncClient,
    records: Records,
    sign_in: SignIn,
    enrol_operator: Enrol,
    token: str,
) -> None:
    before = await metric(client, "privyseal_unknown_tokens_total")
    lies = [call(signature="C" * 342) for _ in range(MAX_UNPROVEN + 40)]
    assert await report(reporter, *lies, call(token)) == ["recorded"] * (MAX_UNPROVEN + 41)
    other = await sign_in(await enrol_operator("search", "audit:report"))
    assert await report(other, call(signature="C" * 342)) == ["recorded"]
    await records(MAX_UNPROVEN, action="token.unknown", actor="ingest")
    await records(1, action="token.unknown", actor="search")
    counted = await metric(client, "privyseal_unknown_tokens_total") - before
    assert counted == MAX_UNPROVEN + 41


async def test_the_alert_rules_speak_of_metrics_that_exist(client: httpx.AsyncClient) -> None:
    path = Path(__file__).parents[2] / "deploy" / "prometheus" / "alerts.yaml"
    groups = yaml.safe_load(path.read_text("utf-8"))["groups"]
    exposed = set(
        re.findall(r"^(privyseal_\w+)", (await client.get("/metrics")).text, re.MULTILINE)
    )
    rules = [rule for group in groups for rule in group["rules"]]
    assert "PrivysealTokenForged" in {rule["alert"] for rule in rules}
    for rule in rules:
        used = set(re.findall(r"privyseal_\w+", rule["expr"]))
        assert used, rule
        assert used <= exposed, rule
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"].keys() == {"summary", "description"}
