"""The audit log at the console, by its pages: what they show to whom, and what they prove."""

import asyncio
import hashlib
import html
import json
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from typing import Any, TypeAlias
from urllib.parse import urlencode

import asyncpg
import httpx
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.hashes import SHA256

from keys.token import Claims, unsigned_token
from keys.verifier import thumbprint
from keys.verifier.strict import base64url_encode
from service.app import Authority
from service.authority.audit import RecordFilter, new_record_id
from service.console.audit import PAGE
from service.console.audit_filters import COMMON, FURTHER
from service.settings import LOCAL_AUDIENCE, Settings
from tests.http.console_client import ConsoleClient

pytestmark = pytest.mark.anyio

Credential: TypeAlias = tuple[str, str]
Enrol: TypeAlias = Callable[..., Awaitable[Credential]]
SignIn: TypeAlias = Callable[..., Awaitable[httpx.AsyncClient]]
Records: TypeAlias = Callable[..., Awaitable[list[dict[str, Any]]]]
SQL: TypeAlias = Callable[..., Awaitable[list[asyncpg.Record]]]
Report: TypeAlias = Callable[..., Awaitable[None]]

WITHIN = 8.0
NOBODYS = "019ab7a4-5c00-7000-8000-000000000001"
HOSTILE = "<script>alert(1)</script>\N{RIGHT-TO-LEFT OVERRIDE}gpj.exe\N{ZERO WIDTH SPACE}'\"&"


@pytest.fixture
async def token(client: httpx.AsyncClient, vkyc: Credential) -> str:
    """A token of vkyc-prod."""
    return await exchanged(client, vkyc)


async def exchanged(client: httpx.AsyncClient, credential: Credential) -> str:
    answer = await client.post(
        "/oauth/token", auth=credential, data={"grant_type": "client_credentials"}
    )
    assert answer.status_code == 200, answer.text
    return answer.json()["access_token"]


@pytest.fixture
async def report(enrol: Enrol, sign_in: SignIn, settings: Settings) -> Report:
    """Report calls with a token: as many as `count`, members as given."""
    audiences = [settings.api_audience, LOCAL_AUDIENCE]
    reporter = await sign_in(await enrol("ingest", scopes=["audit:report"], audiences=audiences))

    async def reported(token: str, count: int = 1, **members: Any) -> None:
        events = [call(token, **members) for _ in range(count)]
        answer = await reporter.post("/api/v1/audit-events", json={"events": events})
        assert {result["status"] for result in answer.json()["results"]} == {"recorded"}, (
            answer.text
        )

    return reported


def call(token: str, **members: Any) -> dict[str, Any]:
    signing_input, _, signature = token.rpartition(".")
    return {
        "type": "api.call",
        "id": str(new_record_id(time.time())),
        "occurred_at": datetime.now(UTC).isoformat(),
        "jti": jti_of(token),
        "kid": jwt.get_unverified_header(token)["kid"],
        "signing_input_sha256": base64url_encode(hashlib.sha256(signing_input.encode()).digest()),
        "signature": signature,
        "action": "document.ingest",
        "resource": "documents/0c1f",
        "outcome": "success",
        "request_id": "upload-1",
        "client_address": "192.0.2.7",
        "user_agent": "vkyc/3",
        "department": "retail",
        **members,
    }


def jti_of(token: str) -> str:
    return jwt.decode(token, options={"verify_signature": False})["jti"]


def forged(key: RSAPrivateKey, settings: Settings) -> str:
    """A token by a key of ours that was never issued."""
    now = int(time.time())
    unsigned = unsigned_token(
        thumbprint(key.public_key()),
        Claims(
            iss=settings.issuer,
            sub="su_" + "f" * 24,
            client_id="su_" + "f" * 24,
            aud=LOCAL_AUDIENCE,
            iat=now,
            exp=now + 900,
            jti=str(new_record_id(now)),
            scope="ingest:write",
            service_user="vkyc-prod",
            source_system="vkyc",
        ),
    )
    return unsigned.signed(key.sign(unsigned.signing_input, PKCS1v15(), SHA256()))


def rows(answer: httpx.Response) -> list[str]:
    """The ids of the records that a page shows, in their order."""
    return re.findall(r'<tr id="r-([^"]+)"', answer.text)


def link(answer: httpx.Response, text: str) -> str:
    """The address of a link, as `ConsoleClient` takes it."""
    found = re.search(rf'<a [^>]*href="/console([^"]*)"[^>]*>{text}</a>', answer.text)
    assert found is not None, text
    return html.unescape(found[1])


def words(answer: httpx.Response) -> str:
    """The text of a page, without its elements."""
    text = re.sub(r"<[^>]*>", " ", answer.text.partition("<main")[2])
    return " ".join(html.unescape(text).split())


async def until(look: Callable[[], Awaitable[httpx.Response]], text: str) -> httpx.Response:
    """Look until a page says something."""
    deadline = time.monotonic() + WITHIN
    while text not in words(answer := await look()):
        assert time.monotonic() < deadline, words(answer)
        await asyncio.sleep(0.05)
    return answer


# The list


async def test_the_pages_lead_through_the_whole_log_the_newest_first_and_nothing_comes_twice(
    operator_at_console: ConsoleClient, report: Report, token: str, records: Records
) -> None:
    await report(token, 2 * PAGE + 7)
    expected = [record["id"] for record in await records(2 * PAGE + 7, actor="ingest")][::-1]
    seen: list[str] = []
    first = answer = await operator_at_console.get("/audit?actor=ingest&service_user=&since=")
    while True:
        assert answer.status_code == 200
        seen += rows(answer)
        if ">Older<" not in answer.text:
            break
        assert len(rows(answer)) == PAGE
        answer = await operator_at_console.get(link(answer, "Older"))
    assert seen == expected
    assert ">Newest<" not in first.text
    assert rows(await operator_at_console.get(link(answer, "Newest"))) == expected[:PAGE]


async def test_a_page_of_exactly_all_records_has_no_older_ones(
    operator_at_console: ConsoleClient, report: Report, token: str, records: Records
) -> None:
    await report(token, PAGE)
    await records(PAGE, actor="ingest")
    answer = await operator_at_console.get("/audit?actor=ingest")
    assert len(rows(answer)) == PAGE
    assert ">Older<" not in answer.text


async def test_every_filter_of_the_log_is_one_of_the_console_and_finds_what_the_api_finds(
    operator_at_console: ConsoleClient,
    operator: httpx.AsyncClient,
    client: httpx.AsyncClient,
    report: Report,
    token: str,
    vkyc: Credential,
    records: Records,
) -> None:
    await report(token)
    await client.post(
        "/oauth/token", auth=(vkyc[0], "pvs_wrong"), data={"grant_type": "client_credentials"}
    )
    (called,) = await records(actor="ingest", action="document.ingest")
    (refused,) = await records(outcome="refused", service_user="vkyc-prod")
    names = {
        "service_user": "vkyc-prod",
        "source_system": "vkyc",
        "credential": called["credential_id"],
        "actor": "ingest",
        "actor_credential": called["actor_credential_id"],
        "action": "document.ingest",
        "outcome": "refused",
        "reason": refused["reason"],
        "request_id": "upload-1",
        "jti": jti_of(token),
        "kid": called["kid"],
        "client_address": "192.0.2.7",
        "user_agent": "vkyc/",
        "department": "retail",
        "resource": "documents/",
        "since": called["recorded_at"],
        "until": called["recorded_at"],
    }
    offered = {each.attribute or each.name for each in (*COMMON, *FURTHER)}
    assert offered == set(RecordFilter.__struct_fields__) - {"id"}
    assert set(names) == {each.name for each in (*COMMON, *FURTHER)}
    for name, value in names.items():
        found = await operator.get(
            "/api/v1/audit-records", params={name: value, "order": "desc", "limit": PAGE}
        )
        assert found.status_code == 200, found.text
        answer = await operator_at_console.get(f"/audit?{urlencode({name: value})}")
        expected = [record["id"] for record in found.json()["records"]]
        assert rows(answer) == expected, name
        assert f'value="{html.escape(value)}"' in answer.text or f"selected>{value}" in answer.text


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("service_user", "VKYC prod", "Expected the name of a service user"),
        ("service_user", "vkyc\nprod", "Expected the name of a service user"),
        ("action", "issue", "Expected two words with a dot"),
        ("outcome", "ok", "Expected success, refused, failed."),
        ("since", "yesterday", "Expected 2027-01-31"),
        ("since", "2026-02-30", "Expected 2027-01-31"),
        ("since", "0001-01-01 00:00+23:00", "Expected 2027-01-31"),
        ("until", "999999w", "Expected 2027-01-31"),
        ("until", "9999-12-31", "Expected 2027-01-31"),
        ("jti", "no-token", "Expected the id of a token"),
        ("kid", "short", "Expected a kid"),
        ("credential", "cr_1", "Expected the id of a credential"),
        ("resource", "a\x00b", "one line"),
        ("resource", "x" * 301, "Expected up to 300 characters"),
        ("user_agent", "x" * 201, "Expected up to 200 characters"),
    ],
)
async def test_a_filter_that_cannot_be_is_told_beside_its_field_and_stays_there(
    operator_at_console: ConsoleClient, name: str, value: str, says: str
) -> None:
    query = urlencode({name: value, "department": "retail"})
    for path in ("/audit", "/audit/tail"):
        answer = await operator_at_console.get(f"{path}?{query}")
        assert answer.status_code == 422
        field = re.search(rf'id="{name}-says"[^>]*><strong>([^<]*)', answer.text)
        assert field is not None
        assert says in html.unescape(field[1])
        assert 'value="retail"' in answer.text
        assert rows(answer) == []
    assert (await operator_at_console.get(f"/audit/export?format=csv&{query}")).status_code == 400


@pytest.mark.parametrize(
    ("since", "until", "found"),
    [
        ("1h", "", True),
        ("", "1h", False),
        ("{date}", "{date}", True),
        ("{minute}", "", True),
        ("{minute} UTC", "", True),
        ("{next_minute}", "", False),
        ("", "{next_minute}+00:00", True),
    ],
)
async def test_times_are_in_utc_or_back_from_now(
    operator_at_console: ConsoleClient, records: Records, since: str, until: str, found: bool
) -> None:
    (record,) = await records(action="operator.bootstrap")
    at = datetime.fromisoformat(record["recorded_at"])
    following = datetime.fromtimestamp(at.timestamp() + 61, UTC)
    written = {
        "date": f"{at:%Y-%m-%d}",
        "minute": f"{at:%Y-%m-%d %H:%M}",
        "next_minute": f"{following:%Y-%m-%d %H:%M}",
    }
    query = {
        "since": since.format(**written),
        "until": until.format(**written),
        "action": "operator.bootstrap",
    }
    answer = await operator_at_console.get(f"/audit?{urlencode(query)}")
    assert (rows(answer) == [record["id"]]) is found


async def test_who_finds_nothing_is_told_of_an_action_that_is_none_of_ours(
    operator_at_console: ConsoleClient,
) -> None:
    ours = words(await operator_at_console.get("/audit?action=signing_key.revoke_all"))
    assert "No record meets this filter" in ours
    assert "own actions" not in ours
    other = words(await operator_at_console.get("/audit?action=token.isue"))
    assert "token.isue is none of Privyseal's own actions" in other


@pytest.mark.parametrize(
    "query",
    ["cursor=1", "cursor=1.x", "action=a.b&action=c.d", "resource=%ff", "cursor=%27;--", "x=1"],
)
async def test_an_address_that_no_link_makes_leads_nowhere_and_breaks_nothing(
    operator_at_console: ConsoleClient, query: str
) -> None:
    answer = await operator_at_console.get(f"/audit?{query}")
    assert answer.status_code == (200 if query == "x=1" else 400)


async def test_what_others_chose_is_text_and_cannot_steer_the_page(
    operator_at_console: ConsoleClient, report: Report, token: str, records: Records
) -> None:
    await report(
        token, resource=HOSTILE, department=HOSTILE, user_agent=HOSTILE, request_id=HOSTILE
    )
    (record,) = await records(actor="ingest")
    for path in (
        "/audit?actor=ingest",
        f"/audit?{urlencode({'resource': HOSTILE[:25]})}",
        "/audit/tail",
        f"/audit/records/{record['id']}",
    ):
        answer = await operator_at_console.get(path)
        assert record["id"] in answer.text
        assert "<script>alert" not in answer.text
        assert "\N{RIGHT-TO-LEFT OVERRIDE}" not in answer.text.partition('id="proof"')[0]
        assert "\\u202egpj.exe\\u200b" in answer.text


async def test_the_largest_page_that_others_can_fill_stays_under_100_kilobytes(
    operator_at_console: ConsoleClient, report: Report, token: str, records: Records
) -> None:
    await report(
        token,
        PAGE + 1,
        action=f"{'a' * 32}.{'b' * 32}",
        resource='"' * 300,
        department='"' * 128,
        client_address="f" * 64,
    )
    await records(PAGE + 1, actor="ingest")
    page = await operator_at_console.get("/audit?actor=ingest")
    assert len(rows(page)) == PAGE
    assets = set(re.findall(r'(?:href|src)="(/console/static/[^"]+)"', page.text))
    assert assets
    files = [await operator_at_console.get(path.removeprefix("/console")) for path in assets]
    assert all(each.status_code == 200 for each in files)
    weight = len(page.content) + sum(len(each.content) for each in files)
    assert weight < 100_000


async def test_tokens_that_are_on_no_record_stand_on_top_with_their_keys_and_what_to_do(
    operator_at_console: ConsoleClient,
    integrator: ConsoleClient,
    report: Report,
    token: str,
    records: Records,
    rsa_keys: list[RSAPrivateKey],
    settings: Settings,
    sql: SQL,
) -> None:
    assert "on no record, in the last 7 days" not in words(await operator_at_console.get("/audit"))
    leaked, foreign = (forged(key, settings) for key in (rsa_keys[0], rsa_keys[3]))
    await report(leaked)
    await report(foreign)
    (alarm,) = await records(action="token.forged")
    (claim,) = await records(action="token.unknown")
    await sql("UPDATE signing_keys SET activated_at = activated_at - interval '3 months'")
    await report(forged(rsa_keys[0], settings))
    (doubt,) = await records(action="token.unverifiable")
    listed = (await operator_at_console.get("/audit")).text
    answer = await operator_at_console.get("/audit?action=token.mint")
    assert rows(answer) == []
    said = words(answer)
    assert "Forged: a signing key is in other hands" in said
    assert "Revoke the key" in said
    assert "Unverifiable: only the archives can tell" in said
    for record in (alarm, claim, doubt):
        assert f'id="r-{record["id"]}" class="alarm"' in listed
        assert f"key {record['kid']}" in said
        assert f'href="/console/audit/records/{record["id"]}"' in answer.text
    assert "signing key is in other hands" in words(
        await operator_at_console.get(f"/audit/records/{alarm['id']}")
    )
    assert "on no record, in the last 7 days" not in words(await integrator.get("/audit"))
    await sql("UPDATE audit_records SET recorded_at = recorded_at - interval '7 days'")
    assert "on no record, in the last 7 days" not in words(await operator_at_console.get("/audit"))


# One record


async def test_a_record_is_shown_with_the_story_of_its_token_and_is_verified_anew(
    operator_at_console: ConsoleClient,
    report: Report,
    token: str,
    records: Records,
    operator: httpx.AsyncClient,
) -> None:
    await report(token, 2)
    (issuance, *calls) = await records(3, jti=jti_of(token))
    path = f"/audit/records/{calls[0]['id']}"
    answer = await until(lambda: operator_at_console.get(path), "In the log: verified")
    said = words(answer)
    for name, value in calls[0].items():
        if isinstance(value, str) and name not in (
            "cursor", "leaf_hash", "recorded_at", "occurred_at", "personal_salt", "personal_sha256"
        ):  # fmt: skip
            assert value in said, name
    assert rows(answer) == [record["id"] for record in (issuance, *calls)]
    proof = (await operator.get(f"/api/v1/audit-records/{calls[0]['id']}/proof")).json()
    assert proof["leaf"] in said
    assert f"Leaf {proof['leaf_index']} (from 0), in a log of " in said
    assert f"privyseal audit export --jti {calls[0]['id']}" in said


async def test_a_record_of_no_token_has_no_story(
    operator_at_console: ConsoleClient, records: Records
) -> None:
    (record,) = await records(action="operator.bootstrap")
    answer = await operator_at_console.get(f"/audit/records/{record['id']}")
    assert answer.status_code == 200
    assert rows(answer) == []


async def test_what_was_erased_is_said_to_be_and_the_record_still_verifies(
    operator_at_console: ConsoleClient, report: Report, token: str, records: Records, sql: SQL
) -> None:
    await report(token)
    (record,) = await records(actor="ingest")
    await sql("DELETE FROM audit_personal WHERE id = $1", record["id"])
    path = f"/audit/records/{record['id']}"
    answer = await until(lambda: operator_at_console.get(path), "In the log: verified")
    assert "were erased" in words(answer)
    assert "192.0.2.7" not in answer.text


@pytest.mark.parametrize(
    ("tampering", "says"),
    [
        (
            "UPDATE audit_records SET source_system = 'other' WHERE id = $1",
            "The record was edited: it has another hash",
        ),
        (
            "UPDATE audit_records SET details = '{\"x\": 1.5}' WHERE id = $1",
            "The record was edited: float has no canonical form",
        ),
        (
            "UPDATE audit_personal SET client_address = '203.0.113.9' WHERE id = $1",
            "are not those that were recorded",
        ),
    ],
)
async def test_a_record_that_was_changed_is_told_in_red(
    operator_at_console: ConsoleClient,
    report: Report,
    token: str,
    records: Records,
    sql: SQL,
    tampering: str,
    says: str,
) -> None:
    await report(token)
    (record,) = await records(actor="ingest")
    path = f"/audit/records/{record['id']}"
    await until(lambda: operator_at_console.get(path), "In the log: verified")
    await sql(tampering, record["id"])
    answer = await operator_at_console.get(path)
    assert "Not verified" in words(answer)
    assert says in words(answer)
    assert '<section class="notice bad"' in answer.text


async def test_a_record_beside_a_leaf_that_was_replaced_does_not_lead_to_the_signed_root(
    operator_at_console: ConsoleClient, report: Report, token: str, records: Records, sql: SQL
) -> None:
    await report(token, 2)
    first, second = await records(2, actor="ingest")
    path = f"/audit/records/{first['id']}"
    await until(lambda: operator_at_console.get(path), "In the log: verified")
    await sql("UPDATE audit_leaves SET leaf_hash = sha256('another') WHERE id = $1", second["id"])
    answer = await until(lambda: operator_at_console.get(path), "Not verified")
    assert "newest checkpoint" in words(answer)


async def test_a_log_that_was_cut_is_told_on_every_record(
    operator_at_console: ConsoleClient, report: Report, token: str, records: Records, sql: SQL
) -> None:
    await report(token)
    (record,) = await records(actor="ingest")
    (first,) = await records(action="operator.bootstrap")
    last = f"/audit/records/{record['id']}"
    await until(lambda: operator_at_console.get(last), "In the log: verified")
    await sql("DELETE FROM audit_checkpoints")
    await sql("DELETE FROM audit_leaves WHERE leaf_index > 1")
    answer = await until(
        lambda: operator_at_console.get(f"/audit/records/{first['id']}"), "Not verified"
    )
    assert "Restored or cut" in words(answer)


async def test_a_record_without_a_place_waits_a_moment_and_is_told_in_red_after_a_minute(
    operator_at_console: ConsoleClient,
    authority: Authority,
    client: httpx.AsyncClient,
    vkyc: Credential,
    records: Records,
    sql: SQL,
) -> None:
    stopped = asyncio.Event()

    async def never() -> None:
        stopped.set()
        await asyncio.Event().wait()

    authority.sequencer.tick = lambda _: never()  # type: ignore[method-assign, assignment]
    await stopped.wait()
    jti = jti_of(await exchanged(client, vkyc))
    (record,) = await records(jti=jti)
    path = f"/audit/records/{record['id']}"
    assert "not in the log's tree yet" in words(await operator_at_console.get(path))
    await sql("UPDATE audit_records SET recorded_at = now() - interval '2 minutes'")
    assert "should have had its place" in words(await operator_at_console.get(path))


async def test_there_is_no_page_of_a_record_that_there_is_not(
    operator_at_console: ConsoleClient,
) -> None:
    for path in (NOBODYS, "x", f"{NOBODYS}/x"):
        assert (await operator_at_console.get(f"/audit/records/{path}")).status_code == 404


# The log as it grows


async def test_who_looks_again_sees_every_record_once(
    operator_at_console: ConsoleClient, report: Report, token: str, records: Records
) -> None:
    await report(token, 3)
    before = [record["id"] for record in await records(3, actor="ingest")]
    answer = await operator_at_console.get("/audit/tail?actor=ingest")
    assert rows(answer) == before[::-1]
    seen = list(before)
    for count in (0, 1, 130):
        if count:
            await report(token, count)
        everything = [r["id"] for r in await records(len(seen) + count, actor="ingest")]
        while True:
            answer = await operator_at_console.get(link(answer, "Look again"))
            seen += rows(answer)[::-1]
            if not rows(answer):
                break
        assert seen == everything
    assert "Nothing new since you last looked" in words(answer)


async def test_the_rows_for_an_open_page_are_those_of_the_page_itself(
    operator_at_console: ConsoleClient, report: Report, token: str, records: Records
) -> None:
    begun = await operator_at_console.get("/audit/tail?actor=ingest")
    assert rows(begun) == []
    await report(token, 2)
    expected = [record["id"] for record in await records(2, actor="ingest")][::-1]
    then = re.search(r'data-tail="/console([^"]+)"', begun.text)
    assert then is not None
    answer = await operator_at_console.get(html.unescape(then[1]))
    assert (
        rows(answer) == expected == rows(await operator_at_console.get(link(begun, "Look again")))
    )
    assert "data-full" not in answer.text
    assert (await operator_at_console.get("/audit/tail/next?actor=ingest")).status_code == 400


# Files


async def test_an_export_is_what_the_api_exports_and_is_on_record(
    operator_at_console: ConsoleClient, report: Report, token: str, records: Records
) -> None:
    await report(token, 3)
    expected = [record["id"] for record in await records(3, actor="ingest")]
    page = await operator_at_console.get("/audit?actor=ingest")
    answer = await operator_at_console.get(link(page, "Export NDJSON"))
    assert answer.headers["content-type"] == "application/x-ndjson"
    header, *lines = map(json.loads, answer.text.splitlines())
    assert "checkpoint" in header
    assert [line["id"] for line in lines] == expected
    table = await operator_at_console.get(link(page, "Export CSV"))
    assert table.headers["content-type"].startswith("text/csv")
    assert len(table.text.splitlines()) == 4
    for file in (answer, table):
        assert file.headers["content-disposition"].startswith("attachment")
        assert file.headers.get_list("cache-control") == ["no-store"]
        assert file.headers["x-content-type-options"] == "nosniff"
    exports = await records(2, action="audit.export", outcome="success")
    assert [record["details"]["format"] for record in exports] == ["ndjson", "csv"]
    assert all(record["actor"] == "operator" for record in exports)
    assert (await operator_at_console.get("/audit/export?format=xlsx")).status_code == 422


# Who may read what


def paths(record: str) -> Sequence[str]:
    return ("/audit", "/audit/tail", f"/audit/tail/next?cursor=0.{NOBODYS}",
            f"/audit/records/{record}", "/audit/export?format=ndjson")  # fmt: skip


async def test_an_operator_without_the_right_to_read_is_refused_and_that_is_on_record(
    client: httpx.AsyncClient, settings: Settings, enrol_operator: Enrol, records: Records
) -> None:
    writer = ConsoleClient(client, settings.issuer)
    await writer.sign_in(await enrol_operator("writer", "service-users:write", "audit:report"))
    (bootstrap,) = await records(action="operator.bootstrap")
    for path in paths(bootstrap["id"]):
        answer = await writer.get(path)
        assert answer.status_code == 403, path
        assert "audit:read" in words(answer)
    await records(3, action="audit.query", outcome="refused", actor="writer")
    await records(1, action="audit.inclusion", outcome="refused", actor="writer")
    await records(1, action="audit.export", outcome="refused", actor="writer")


async def test_an_integrator_reads_what_is_on_record_of_itself(
    integrator: ConsoleClient, report: Report, token: str, records: Records, vkyc: Credential
) -> None:
    await report(token)
    await records(actor="ingest")
    own = [r["id"] for r in (await records(5, service_user="vkyc-prod"))[::-1]]
    answer = await integrator.get("/audit")
    assert rows(answer) == own
    assert "Export" not in words(answer)
    assert rows(await integrator.get("/audit/tail")) == own
    assert rows(await integrator.get("/audit?action=document.ingest")) == [
        r["id"] for r in await records(action="document.ingest")
    ]
    (called,) = await records(action="document.ingest")
    page = await until(
        lambda: integrator.get(f"/audit/records/{called['id']}"), "In the log: verified"
    )
    assert rows(page) == [r["id"] for r in await records(2, jti=jti_of(token))]


async def test_an_integrator_sees_which_operator_acted_and_not_from_where(
    integrator: ConsoleClient, operator: httpx.AsyncClient, vkyc: Credential, records: Records
) -> None:
    await operator.post(
        f"/api/v1/service-users/{vkyc[0]}/enable", headers={"User-Agent": "desk-of-an-operator"}
    )
    (record,) = await records(action="service_user.enable")
    assert record["user_agent"] == "desk-of-an-operator"
    page = await until(
        lambda: integrator.get(f"/audit/records/{record['id']}"), "In the log: verified"
    )
    assert "Done or reported by operator" in words(page)
    assert "desk-of-an-operator" not in page.text
    assert (
        record["client_address"] not in words(page).partition("From where")[2].partition("Token")[0]
    )
    (own,) = await records(action="token.issue", service_user="vkyc-prod")
    assert own["client_address"] in words(await integrator.get(f"/audit/records/{own['id']}"))
    # Nor does a filter tell.
    everything = rows(await integrator.get("/audit"))
    assert record["id"] in everything
    for tried in ("user_agent=d", "user_agent=x", "client_address=192.0.2.1"):
        assert rows(await integrator.get(f"/audit?{tried}")) == everything


async def test_no_parameter_leads_an_integrator_to_the_record_of_another(
    integrator: ConsoleClient,
    client: httpx.AsyncClient,
    enrol: Enrol,
    report: Report,
    records: Records,
    operator_credential: Credential,
) -> None:
    docs = await enrol("docs-prod", source_system="docs", scopes=["ingest:write"])
    others = await exchanged(client, docs)
    await report(others, client_address="192.0.2.99", department="claims", resource="secret/1")
    (called,) = await records(action="document.ingest")
    own = set(rows(await integrator.get("/audit")))
    values = {
        "service_user": ["docs-prod", docs[0], "operator", operator_credential[0]],
        "source_system": ["docs"],
        "credential": [called["credential_id"]],
        "actor": ["ingest", called["actor_id"]],
        "actor_credential": [called["actor_credential_id"]],
        "action": ["document.ingest", "operator.bootstrap", "audit.report"],
        "outcome": ["success", "refused"],
        "request_id": ["upload-1"],
        "jti": [jti_of(others), called["id"]],
        "kid": [called["kid"]],
        "client_address": ["192.0.2.99"],
        "user_agent": ["vkyc/"],
        "department": ["claims"],
        "resource": ["secret/"],
        "since": ["7d"],
        "cursor": [f"999999999999.{called['id']}"],
        "id": [called["id"]],
    }
    for name, tries in values.items():
        for value in tries:
            query = urlencode({name: value})
            for path in ("/audit", "/audit/tail"):
                answer = await integrator.get(f"{path}?{query}")
                assert answer.status_code == 200
                assert set(rows(answer)) <= own, (path, name)
            start = f"cursor=0.{NOBODYS}&" if name != "cursor" else ""
            answer = await integrator.get(f"/audit/tail/next?{start}{query}")
            assert set(rows(answer)) <= own, name
    for other in (called["id"], jti_of(others)):
        page = await integrator.get(f"/audit/records/{other}")
        assert page.status_code == 404
        assert "secret/1" not in page.text
    for format_ in ("ndjson", "csv"):
        answer = await integrator.get(f"/audit/export?format={format_}")
        assert answer.status_code == 403
    # Not even the place in the log where somebody else's newest record is.
    assert called["id"] not in (await integrator.get("/audit/tail?action=x.y")).text


async def test_the_pages_take_a_session(
    client: httpx.AsyncClient, operator: httpx.AsyncClient
) -> None:
    for path in paths(NOBODYS):
        for caller in (client, operator):
            answer = await caller.get(f"/console{path}")
            assert answer.status_code == 303
            assert answer.headers["location"].startswith("/console/sign-in?next=")
