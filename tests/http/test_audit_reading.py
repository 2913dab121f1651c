"""Reading the audit log over HTTP: every filter, exports that stream, and found secrets.

It must not know how a page is found, only what comes over the wire.
"""

import asyncio
import csv
import hashlib
import io
import json
import re
import socket
from base64 import urlsafe_b64encode
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any, TypeAlias

import asyncpg
import httpx
import pytest
import uvicorn

from service.app import Authority
from service.authority.audit.export import MAX_EXPORTS, PAGE
from service.authority.model import AdminScope
from service.settings import Settings

pytestmark = pytest.mark.anyio

Credential: TypeAlias = tuple[str, str]
Enrol: TypeAlias = Callable[..., Awaitable[Credential]]
SignIn: TypeAlias = Callable[..., Awaitable[httpx.AsyncClient]]
Records: TypeAlias = Callable[..., Awaitable[list[dict[str, Any]]]]
SQL: TypeAlias = Callable[..., Awaitable[list[asyncpg.Record]]]

USERS = "/api/v1/service-users"
LOG = "/api/v1/audit-records"
EXPORT = f"{LOG}/export"
LEAKED = "/api/v1/credentials/leaked"
MANY = 30_000
"""Records that no buffer of a connection holds."""
NOTHING = {"source_system": "none"}

# Records of one integrator, committed before all others.
BULK = """
WITH made AS (
    SELECT (to_hex(floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint * 65536 + 28672)
            || '8' || lpad(to_hex(number), 15, '0')) AS digits, number
      FROM generate_series(1, $1) AS number
), personal AS (
    INSERT INTO audit_personal (id, salt, client_address, user_agent, resource, department,
                                commit_order)
    SELECT lpad(digits, 32, '0')::uuid, '\\x00000000000000000000000000000000', '192.0.2.7',
           'bulk', 'document/' || number, 'retail', number FROM made
)
INSERT INTO audit_records (id, commit_order, recorded_at, action, outcome, service_user_id,
                           source_system, request_id, repeats, details)
SELECT lpad(digits, 32, '0')::uuid, number, clock_timestamp(), 'token.issue', 'success',
       'su_' || repeat('a', 24), 'bulk', 'r' || number, 1, '{"n": 1}' FROM made
"""


def digest(secret: str) -> str:
    sha256 = hashlib.sha256(secret.encode()).digest()
    return urlsafe_b64encode(sha256).decode().rstrip("=")


@pytest.fixture
async def url(authority: Authority) -> AsyncGenerator[str, None]:
    """Where the same authority answers over TCP: only there is an answer seen as it travels."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(
            authority.asgi,  # type: ignore[arg-type]
            lifespan="off",
            log_config=None,
            access_log=False,
            http="httptools",
            timeout_graceful_shutdown=1,
        )
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        await serving


@pytest.fixture
def bearer(operator: httpx.AsyncClient) -> dict[str, str]:
    return {"Authorization": operator.headers["Authorization"]}


# Queries


async def test_every_filter_of_the_api_finds_what_it_names(
    operator: httpx.AsyncClient, records: Records, vkyc: Credential, client: httpx.AsyncClient
) -> None:
    wrong = await client.post(
        "/oauth/token", auth=(vkyc[0], "wrong"), data={"grant_type": "client_credentials"}
    )
    assert wrong.status_code == 401
    (refused,) = await records(reason="wrong_secret", outcome="refused")
    granted = await client.post(
        "/oauth/token", auth=vkyc, data={"grant_type": "client_credentials"}
    )
    assert granted.status_code == 200
    (issued,) = await records(service_user="vkyc-prod", action="token.issue", outcome="success")
    assert issued["jti"] == issued["id"]
    for query, expected in (
        ({"reason": "wrong_secret"}, [refused]),
        ({"reason": "wrong"}, []),
        ({"jti": issued["jti"]}, [issued]),
        ({"kid": issued["kid"], "service_user": "vkyc-prod"}, [issued]),
        ({"client_address": "127.0.0.1", "reason": "wrong_secret"}, [refused]),
        ({"client_address": "192.0.2.1"}, []),
        ({"user_agent": refused["user_agent"][:6], "reason": "wrong_secret"}, [refused]),
        ({"user_agent": refused["user_agent"][1:]}, []),
        ({"request_id": refused["request_id"]}, [refused]),
        ({"department": "retail"}, []),
        ({"resource": "kyc/"}, []),
        ({"action": "document.ingest"}, []),
    ):
        found = (await operator.get(LOG, params=query)).json()["records"]
        assert [_placeless(each) for each in found] == [_placeless(each) for each in expected], (
            query
        )


def _placeless(record: dict[str, Any]) -> dict[str, Any]:
    """Return what does not change any more once a record gets its place in the log."""
    return {**record, "log_origin": None, "leaf_index": None, "leaf_hash": None}


async def test_the_acts_of_an_operator_are_found_by_the_credential_that_it_used(
    operator: httpx.AsyncClient, records: Records, vkyc: Credential
) -> None:
    created = await records(2, actor="operator", service_user="vkyc-prod")
    credential = created[0]["actor_credential_id"]
    found = await records(2, actor_credential=credential)
    assert [record["id"] for record in found] == [record["id"] for record in created]
    assert await records(0, actor_credential="cr_" + "a" * 24) == []


# Exports


async def test_an_export_is_the_query_line_by_line_and_is_itself_on_record(
    operator: httpx.AsyncClient, vkyc: Credential, records: Records
) -> None:
    await records(2, service_user="vkyc-prod")
    answer = await operator.get(EXPORT, params={"service_user": "vkyc-prod", "resource": ""})
    assert answer.status_code == 422
    answer = await operator.get(
        EXPORT, params={"service_user": "vkyc-prod", "client_address": "127.0.0.1"}
    )
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/x-ndjson"
    header, *lines = [json.loads(line) for line in answer.content.splitlines()]
    assert header["checkpoint"].startswith(f"{header['log_origin']}\n")
    queried = (await operator.get(LOG, params={"service_user": "vkyc-prod"})).json()["records"]
    assert [{**line, "proof": None} for line in lines] == [
        {**record, "proof": None} for record in queried
    ]
    assert [line["action"] for line in lines] == ["service_user.create", "credential.create"]
    (exported,) = await records(1, action="audit.export", outcome="success")
    assert exported["actor"] == "operator"
    # An address is personal: in what can never be erased stands only that it was asked for.
    assert exported["details"] == {
        "format": "ndjson",
        "filters": {"service_user": "vkyc-prod", "client_address": "given"},
    }


async def test_an_export_goes_through_all_pages_and_ends_where_it_began(
    operator: httpx.AsyncClient, sql: SQL
) -> None:
    await sql(BULK, 2 * PAGE)
    answer = await operator.get(EXPORT, params={"source_system": "bulk"})
    _, *lines = answer.content.splitlines()
    numbers = [json.loads(line)["request_id"] for line in lines]
    assert numbers == [f"r{number}" for number in range(1, 2 * PAGE + 1)]
    whole = [json.loads(line) for line in (await operator.get(EXPORT)).content.splitlines()]
    assert len(whole) > 2 * PAGE
    assert len({record["id"] for record in whole[1:]}) == len(whole) - 1


HOSTILE = ("=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1")


async def test_a6_csv_cells_that_a_spreadsheet_would_run_are_neutralised(
    operator: httpx.AsyncClient, sql: SQL
) -> None:
    await sql(BULK, len(HOSTILE))
    for number, text in enumerate(HOSTILE, 1):
        await sql(
            "UPDATE audit_personal SET resource = $1, department = $2 WHERE resource = $3",
            text,
            'a "quoted", one',
            f"document/{number}",
        )
    answer = await operator.get(EXPORT, params={"source_system": "bulk", "format": "csv"})
    assert answer.headers["content-type"].startswith("text/csv")
    text = answer.content.decode()
    assert text.count("\r\n") == len(HOSTILE) + 1
    header, *rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    queried = (await operator.get(LOG, params={"source_system": "bulk"})).json()["records"]
    assert header == list(queried[0])
    by_name = [dict(zip(header, row, strict=True)) for row in rows]
    assert [row["resource"] for row in by_name] == [f"'{text}" for text in HOSTILE]
    assert {row["department"] for row in by_name} == {'a "quoted", one'}
    assert {row["details"] for row in by_name} == {'{"n":1}'}
    assert {row["actor"] for row in by_name} == {""}
    assert [row["recorded_at"] for row in by_name] == [record["recorded_at"] for record in queried]


async def test_a5_one_record_is_one_line_for_every_reader(
    operator: httpx.AsyncClient, sql: SQL
) -> None:
    await sql(BULK, 1)
    hostile = "a\u2028b\u2029c\u202ed\x85e\x0bf\x1b[31m"
    await sql("UPDATE audit_personal SET resource = $1 WHERE user_agent = 'bulk'", hostile)
    answer = await operator.get(EXPORT, params={"source_system": "bulk"})
    _, line = answer.content.decode().splitlines()
    assert json.loads(line)["resource"] == hostile


async def test_an_export_that_cannot_go_on_is_cut_and_not_ended(
    url: str, bearer: dict[str, str], sql: SQL
) -> None:
    await sql(BULK, MANY)
    async with httpx.AsyncClient(base_url=url, headers=bearer) as client:
        async with client.stream("GET", EXPORT, params={"source_system": "bulk"}) as answer:
            assert answer.status_code == 200
            received = answer.aiter_raw(1024)
            await anext(received)
            await sql("ALTER TABLE audit_leaves RENAME TO leaves_elsewhere")
            with pytest.raises(httpx.RemoteProtocolError, match="incomplete chunked read"):
                async for _ in received:
                    pass
        await sql("ALTER TABLE leaves_elsewhere RENAME TO audit_leaves")
        # Its place is free again.
        for _ in range(MAX_EXPORTS + 1):
            whole = await client.get(EXPORT, params=NOTHING)
            assert (whole.status_code, whole.content.count(b"\n")) == (200, 1)


BUSY = (
    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
    " AND application_name = 'privyseal' AND state <> 'idle'"
)


async def test_exports_leave_room_for_everything_else(
    url: str, bearer: dict[str, str], vkyc: Credential, sql: SQL
) -> None:
    """Readers that take nothing hold no connection; one too many is refused; one that leaves makes
    room at once; and exchange goes on."""
    await sql(BULK, MANY)
    request = (
        f"GET {EXPORT}?source_system=bulk HTTP/1.1\r\nHost: x\r\n"
        f"Authorization: {bearer['Authorization']}\r\n\r\n"
    )
    async with asyncio.timeout(20), AsyncExitStack() as idle:
        streams = [
            await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
            for _ in range(MAX_EXPORTS)
        ]
        for reader, writer in streams:
            idle.callback(writer.transport.abort)
            writer.write(request.encode())
            assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
        client = await idle.enter_async_context(httpx.AsyncClient(base_url=url, headers=bearer))
        refused = await client.get(EXPORT)
        assert (refused.status_code, refused.json()["status"]) == (429, 429)
        # The sequencer and its like are busy for a moment each; an export would be for long.
        async with asyncio.timeout(5):
            while (await sql(BUSY))[0]["count"]:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        granted = await client.post(
            "/oauth/token", auth=vkyc, data={"grant_type": "client_credentials"}
        )
        assert granted.status_code == 200
        streams[0][1].transport.abort()
        async with asyncio.timeout(5):
            while (await client.get(EXPORT, params=NOTHING)).status_code == 429:  # noqa: ASYNC110
                await asyncio.sleep(0.02)


async def test_what_is_wrong_with_an_export_is_said_before_it_begins(
    operator: httpx.AsyncClient, sql: SQL
) -> None:
    for query, status in (
        ({"format": "xml"}, 422),
        ({"cursor": "1"}, 400),
        ({"since": "2026-01-01T00:00:00"}, 400),
        ({"client_address": ""}, 422),
    ):
        answer = await operator.get(EXPORT, params=query)
        assert answer.status_code == status, query
        assert answer.headers["content-type"] == "application/problem+json"
    await sql("ALTER TABLE audit_leaves RENAME TO leaves_elsewhere")
    answer = await operator.get(EXPORT)
    assert (answer.status_code, answer.json()["status"]) == (500, 500)


# Found secrets


async def test_a_leaked_secret_is_revoked_by_its_digest_with_its_reason_on_record(
    operator: httpx.AsyncClient, vkyc: Credential, client: httpx.AsyncClient, records: Records
) -> None:
    grant = {"grant_type": "client_credentials"}
    assert (await client.post("/oauth/token", auth=vkyc, data=grant)).status_code == 200
    await records(1, service_user="vkyc-prod", action="token.issue")
    stranger = digest("pvs_" + "x" * 49)
    asked = {"secrets_sha256": [digest(vkyc[1]), stranger]}

    looked = await operator.post(LEAKED, json={**asked, "dry_run": True})
    assert looked.status_code == 200
    (found,) = looked.json()["credentials"]
    assert (found["outcome"], found["state"], found["revoked_at"]) == ("kept", "live", None)
    assert (found["service_user"], found["contact"]) == ("vkyc-prod", "kyc-team@example.com")
    assert (found["label"], found["live_tokens"]["count"]) == ("first", 1)
    assert found["last_used_at"] is not None
    assert looked.json()["unknown"] == [stranger]
    assert (await client.post("/oauth/token", auth=vkyc, data=grant)).status_code == 200

    done = await operator.post(LEAKED, json=asked)
    (revoked,) = done.json()["credentials"]
    assert (revoked["outcome"], revoked["state"]) == ("revoked", "revoked")
    assert revoked["last_used_at"] is not None
    assert revoked["live_tokens"]["count"] == 2
    assert (await client.post("/oauth/token", auth=vkyc, data=grant)).status_code == 401
    (record,) = await records(1, action="credential.revoke")
    assert (record["reason"], record["credential_id"]) == ("found leaked", revoked["id"])
    assert vkyc[1] not in json.dumps(record)

    again = await operator.post(LEAKED, json=asked)
    assert again.json()["credentials"][0]["outcome"] == "revoked_before"
    await records(1, action="credential.revoke")


async def test_what_a_leaked_secret_was_rotated_to_is_named(
    operator: httpx.AsyncClient,
    vkyc: Credential,
    enrol: Callable[..., Awaitable[Credential]],
    sign_in: Callable[..., Awaitable[httpx.AsyncClient]],
    settings: Settings,
) -> None:
    secrets = [await enrol("tools", audiences=[settings.api_audience])]
    for label in ("second", "third"):
        caller = await sign_in(secrets[-1])
        rotated = await caller.post(f"{USERS}/me/credentials/rotate", json={"label": label})
        assert rotated.status_code == 201
        secrets.append((rotated.json()["client_id"], rotated.json()["client_secret"]))

    found = await operator.post(LEAKED, json={"secrets_sha256": [digest(secrets[0][1])]})
    (leak,) = found.json()["credentials"]
    assert leak["outcome"] == "revoked"
    assert re.search(r"rotated to second \(cr_\w+\), third \(cr_\w+\)", leak["detail"])
    rest = {"secrets_sha256": [digest(secret) for _, secret in secrets[1:]]}
    assert {
        each["outcome"] for each in (await operator.post(LEAKED, json=rest)).json()["credentials"]
    } == {"revoked"}
    again = await operator.post(LEAKED, json={"secrets_sha256": [digest(secrets[0][1])]})
    assert again.json()["credentials"][0]["detail"] == ""


async def test_nobody_revokes_the_credential_that_they_call_with_but_the_rest_is_revoked(
    operator: httpx.AsyncClient, operator_credential: Credential, vkyc: Credential
) -> None:
    both = {"secrets_sha256": [digest(operator_credential[1]), digest(vkyc[1])]}
    done = await operator.post(LEAKED, json=both)
    outcomes = {each["service_user"]: each for each in done.json()["credentials"]}
    assert outcomes["vkyc-prod"]["outcome"] == "revoked"
    assert outcomes["operator"]["outcome"] == "kept"
    assert "you call with" in outcomes["operator"]["detail"]
    assert (await operator.get(f"{USERS}/me")).status_code == 200


async def test_the_last_operator_is_not_locked_out_by_a_leak(
    operator_credential: Credential,
    enrol_operator: Enrol,
    sign_in: SignIn,
    sql: SQL,
) -> None:
    guard = await sign_in(await enrol_operator("guard", AdminScope.SERVICE_USERS_WRITE))
    await sql("UPDATE service_users SET scopes = '{}' WHERE name = 'guard'")
    body = {"secrets_sha256": [digest(operator_credential[1])]}
    assert (await guard.post(LEAKED, json=body)).status_code == 403
    await sql("UPDATE service_users SET scopes = '{service-users:write}' WHERE name = 'guard'")
    await sql(
        "UPDATE credentials SET expires_at = clock_timestamp() + interval '1 day'"
        " WHERE service_user_id = (SELECT id FROM service_users WHERE name = 'guard')"
    )
    answer = await guard.post(LEAKED, json=body)
    (kept,) = answer.json()["credentials"]
    assert kept["outcome"] == "kept"
    assert "nobody who can administer" in kept["detail"]


async def test_a_dry_run_takes_only_the_right_to_read_and_revoking_the_right_to_write(
    operator_credential: Credential, sign_in: SignIn, vkyc: Credential
) -> None:
    reader = await sign_in(operator_credential, scope=AdminScope.SERVICE_USERS_READ)
    writer = await sign_in(operator_credential, scope=AdminScope.SERVICE_USERS_WRITE)
    asked = {"secrets_sha256": [digest(vkyc[1])]}
    assert (await writer.post(LEAKED, json={**asked, "dry_run": True})).status_code == 403
    assert (await reader.post(LEAKED, json=asked)).status_code == 403
    assert (await reader.post(LEAKED, json={**asked, "dry_run": True})).status_code == 200
    assert (await writer.post(LEAKED, json=asked)).status_code == 200


async def test_a_thousand_digests_are_taken_and_no_more_and_nothing_else(
    operator: httpx.AsyncClient,
) -> None:
    digests = [digest(str(number)) for number in range(1001)]
    most = await operator.post(LEAKED, json={"secrets_sha256": digests[:1000]})
    assert (most.status_code, len(most.json()["unknown"])) == (200, 1000)
    for wrong in (digests, [], ["pvs_" + "a" * 49], ["A" * 42], ["A" * 42 + "B"], [7]):
        answer = await operator.post(LEAKED, json={"secrets_sha256": wrong})
        assert answer.status_code == 422, wrong
