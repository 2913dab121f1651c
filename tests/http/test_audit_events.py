"""What services report to the log: `POST /api/v1/audit-events`, by its answers and its records."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias
from uuid import UUID, uuid4

import asyncpg
import httpx
import msgspec
import pytest

from service.authority.audit import new_record_id
from service.store.embedded import Running

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
async def ingest(enrol_operator: Enrol) -> Credential:
    """A service that reports."""
    return await enrol_operator("ingest", "audit:report")


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
    whole = msgspec.json.encode({"events": [loaded(kids=KIDS[:1] * 64) for _ in range(330)]})
    json = {"Content-Type": "application/json"}
    fitting = whole + b" " * (1_048_576 - len(whole))
    assert len(whole) > 1_000_000
    answer = await reporter.post(EVENTS, content=fitting, headers=json)
    assert answer.status_code == 200, answer.text
    assert {result["status"] for result in answer.json()["results"]} == {"recorded"}
    answer = await reporter.post(EVENTS, content=fitting + b" ", headers=json)
    assert answer.status_code == 413
    assert answer.json()["detail"] == "The body is larger than this resource takes."
    await records(330, action="jwks.loaded")


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
