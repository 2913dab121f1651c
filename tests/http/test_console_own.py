"""What an integrator sees of itself, what it may do, and that every page of operators is shut."""

import html
import re
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any, TypeAlias

import asyncpg
import httpx
import pytest
from litestar.routes import HTTPRoute

from service.app import Authority
from service.authority.audit import Action, AuditRecord, Outcome, new_record_id
from service.console.gate import PUBLIC
from service.settings import Settings
from tests.http.console_client import ConsoleClient

pytestmark = pytest.mark.anyio

Credential: TypeAlias = tuple[str, str]
Enrol: TypeAlias = Callable[..., Awaitable[Credential]]
SignIn: TypeAlias = Callable[..., Awaitable[httpx.AsyncClient]]
Records: TypeAlias = Callable[..., Awaitable[list[dict[str, Any]]]]
SQL: TypeAlias = Callable[..., Awaitable[list[asyncpg.Record]]]

USERS = "/api/v1/service-users"
ME = f"{USERS}/me/credentials"
SECRET = re.compile("pvs_[0-9A-Za-z]{49}")

OWN = {
    "/console",
    "/console/me",
    "/console/me/rotate",
    "/console/session",
    "/console/sign-out",
    "/console/token",
    "/console/token/names",
    "/console/token/{service_user_id:str}",
    "/console/upload",
    "/console/upload/{service_user_id:str}",
    "/console/audit",
    "/console/audit/tail",
    "/console/audit/tail/next",
    "/console/audit/export",
}
"""What an integrator may open; the rules behind these show it nobody but itself."""
FITTING = {"reason": "a test", "label": "x", "lifetime": "30", "name": "x", "source_system": "x"}
"""Fields that a form may ask for, so that it is refused for nothing but its sender."""


def text_of(answer: httpx.Response) -> str:
    """What a person reads of a page, in one line."""
    main = answer.text.partition("<main")[2]
    return " ".join(html.unescape(re.sub("<[^>]+>", "", main)).split())


def at(time: str) -> datetime:
    return datetime.fromisoformat(time)


async def test_every_page_and_form_of_operators_is_refused(
    authority: Authority,
    integrator: ConsoleClient,
    vkyc: Credential,
    enrol: Enrol,
    operator: httpx.AsyncClient,
    sql: SQL,
) -> None:
    other, _ = await enrol("nobody-elses", scopes=["ingest:write"])
    held = (await operator.get(f"{USERS}/{other}/credentials")).json()["credentials"]
    (record,) = await sql("SELECT id FROM audit_records WHERE service_user_id = $1 LIMIT 1", other)
    assert authority.keys.ring.active is not None
    places = {
        "service_user_id:str": other,
        "credential_id:str": held[0]["id"],
        "kid:str": authority.keys.ring.active.kid,
        "record_id:uuid": str(record["id"]),
    }
    others = "SELECT id, version, status FROM service_users WHERE id <> $1 ORDER BY id"
    before = await sql(others, vkyc[0])
    knocked, let_in = 0, list[tuple[str, str, int]]()
    for route in authority.litestar.routes:
        if not isinstance(route, HTTPRoute) or not route.path.startswith("/console"):
            continue
        path = route.path.removeprefix("/console")
        for name, value in places.items():
            path = path.replace(f"{{{name}}}", value)
        if "{" in path or path in ("/sign-out", "/session"):
            continue
        for handler in route.route_handlers:
            if PUBLIC in handler.opt:
                continue
            for method in handler.http_methods & {"GET", "POST"}:
                get = method == "GET"
                answer = await (integrator.get(path) if get else integrator.post(path, FITTING))
                assert "nobody-elses" not in answer.text, (method, route.path)
                if route.path not in OWN:
                    knocked += 1
                    if answer.status_code not in (403, 404):
                        let_in.append((method, route.path, answer.status_code))
    assert let_in == []
    assert knocked > 10
    assert (
        await sql("SELECT FROM audit_records WHERE exp > 0 AND service_user_id = $1", other) == []
    )
    assert await sql(others, vkyc[0]) == before


async def test_an_integrator_comes_home_to_itself(
    integrator: ConsoleClient, vkyc: Credential, enrol: Enrol, sql: SQL
) -> None:
    await enrol("somebody-else")
    home = await integrator.get("/")
    assert "<h1>vkyc-prod</h1>" in home.text
    assert f"curl -u {vkyc[0]} \\ -d grant_type=client_credentials" in text_of(home)
    assert "somebody-else" not in home.text
    for page in ("service-users", "signing-keys"):
        assert f'href="/console/{page}"' not in home.text
    assert "ends in" not in text_of(home)
    await sql(
        "UPDATE credentials SET expires_at = now() + '10 days' WHERE service_user_id = $1", vkyc[0]
    )
    assert "first ends in 10 days" in text_of(await integrator.get("/"))


async def test_a_service_that_only_reports_is_no_operator(
    at_console: Callable[[Credential], Awaitable[ConsoleClient]],
    enrol_operator: Enrol,
    authority: Authority,
) -> None:
    forged = AuditRecord(
        id=new_record_id(time.time()), action=Action.TOKEN_FORGED, outcome=Outcome.SUCCESS
    )
    assert await authority.audit.append(forged)
    reporter = await at_console(await enrol_operator("ingest", "audit:report"))
    home = (await reporter.get("/")).text
    assert "<h1>ingest</h1>" in home
    assert "A signing key leaked." not in home
    assert re.findall('<li><a href="([^"]+)"', home) == [
        "/console",
        "/console/me",
        "/console/audit",
    ]
    # Tokens of whoever holds a scope of the admin API are not made by hand.
    assert "/console/token" not in home
    assert "Rotate" in (await reporter.get("/me")).text
    for path in ("/service-users", "/signing-keys", "/audit/records/" + str(forged.id)):
        assert (await reporter.get(path)).status_code in (403, 404), path


async def test_an_integrator_sees_its_own_credentials_and_facts(
    integrator: ConsoleClient, vkyc: Credential, operator: httpx.AsyncClient
) -> None:
    for label in ("<i>second</i>", "third"):
        answer = await operator.post(f"{USERS}/{vkyc[0]}/credentials", json={"label": label})
        assert answer.status_code == 201
    await operator.post(f"{USERS}/{vkyc[0]}/credentials/{answer.json()['id']}/revoke")
    page = await integrator.get("/me")
    words = text_of(page)
    assert re.search("first you signed in with it cr_[a-z2-7]{24} live", words)
    assert re.search("<i>second</i> cr_[a-z2-7]{24} live never", words)
    assert re.search("third cr_[a-z2-7]{24} revoked", words)
    assert "kyc-team@example.com" in words
    assert "ingest:write, search:read" in words


async def test_a_rotation_gives_one_successor_and_lets_the_old_one_end_in_7_days(
    integrator: ConsoleClient,
    client: httpx.AsyncClient,
    vkyc: Credential,
    operator: httpx.AsyncClient,
    records: Records,
    settings: Settings,
) -> None:
    asked = text_of(await integrator.get("/me/rotate"))
    assert "first, which you signed in with, ends after 7 days" in asked
    made = await integrator.post("/me/rotate", {"label": "second"})
    assert made.status_code == 200
    (secret,) = set(SECRET.findall(made.text))
    grant = {"grant_type": "client_credentials"}
    for each in (vkyc[1], secret):
        exchanged = await client.post("/oauth/token", auth=(vkyc[0], each), data=grant)
        assert exchanged.status_code == 200
    listed = (await operator.get(f"{USERS}/{vkyc[0]}/credentials")).json()["credentials"]
    second, first = listed
    assert second["succeeds"] == first["id"]
    week, year = timedelta(days=7), timedelta(days=365)
    assert abs(at(first["expires_at"]) - datetime.now(UTC) - week) < timedelta(minutes=1)
    assert abs(at(second["expires_at"]) - datetime.now(UTC) - year) < timedelta(minutes=1)
    (record,) = await records(action="credential.rotate")
    assert record["actor_credential_id"] == first["id"]
    assert (record["credential_id"], record["actor"]) == (second["id"], "vkyc-prod")
    assert secret not in str(record)

    me = await integrator.get("/me")
    assert "Rotated: sign in with second." in text_of(me)
    assert re.search("second cr_[a-z2-7]{24} successor of first live", text_of(me))
    assert 'href="/console/me/rotate"' not in me.text
    again = await integrator.post("/me/rotate", {"label": "third"})
    assert again.status_code == 409
    assert "its successor is “second”" in text_of(again)
    assert 'value="third"' in again.text
    (refused,) = await records(action="credential.rotate", outcome="refused")
    assert refused["actor"] == "vkyc-prod"

    with_second = ConsoleClient(client, settings.issuer)
    await with_second.sign_in((vkyc[0], secret))
    assert (await with_second.post("/me/rotate", {"label": "third"})).status_code == 200


async def test_a_lost_successor_is_revoked_by_an_operator_and_rotated_again(
    integrator: ConsoleClient, vkyc: Credential, operator: httpx.AsyncClient
) -> None:
    assert (await integrator.post("/me/rotate", {"label": "lost"})).status_code == 200
    listed = (await operator.get(f"{USERS}/{vkyc[0]}/credentials")).json()["credentials"]
    lost, first = listed
    await operator.post(f"{USERS}/{vkyc[0]}/credentials/{lost['id']}/revoke")
    assert (await integrator.post("/me/rotate", {"label": "found"})).status_code == 200
    found, _, still = (await operator.get(f"{USERS}/{vkyc[0]}/credentials")).json()["credentials"]
    assert still["expires_at"] == first["expires_at"]
    year = timedelta(days=365)
    assert abs(at(found["expires_at"]) - datetime.now(UTC) - year) < timedelta(minutes=1)


async def test_who_revokes_a_rotated_credential_is_told_what_came_of_it(
    integrator: ConsoleClient,
    vkyc: Credential,
    operator: httpx.AsyncClient,
    client: httpx.AsyncClient,
    operator_credential: Credential,
    settings: Settings,
) -> None:
    await integrator.post("/me/rotate", {"label": "second"})
    listed = (await operator.get(f"{USERS}/{vkyc[0]}/credentials")).json()["credentials"]
    second, first = (f"/service-users/{vkyc[0]}/credentials/{each['id']}" for each in listed)
    at_console = ConsoleClient(client, settings.issuer)
    await at_console.sign_in(operator_credential)
    for _ in range(2):
        asked = await at_console.get(f"{first}/revoke")
        assert "It was rotated to second, which is not revoked with it" in text_of(asked)
        assert f'href="/console{second}/revoke"' in asked.text
        await at_console.post(f"{first}/revoke", {"label": "first"})
    await at_console.post(f"{second}/revoke", {"label": "second"})
    assert "It was rotated" not in text_of(await at_console.get(f"{first}/revoke"))


async def test_a_successor_lives_no_longer_than_what_an_operator_meant(
    client: httpx.AsyncClient, vkyc: Credential, operator: httpx.AsyncClient, settings: Settings
) -> None:
    ends_at = (datetime.now(UTC) + timedelta(days=3)).isoformat()
    short = await operator.post(
        f"{USERS}/{vkyc[0]}/credentials", json={"label": "short", "expires_at": ends_at}
    )
    person = ConsoleClient(client, settings.issuer)
    await person.sign_in((vkyc[0], short.json()["client_secret"]))
    assert (await person.post("/me/rotate", {"label": "next"})).status_code == 200
    listed = (await operator.get(f"{USERS}/{vkyc[0]}/credentials")).json()["credentials"]
    successor = next(each for each in listed if each["label"] == "next")
    old = next(each for each in listed if each["label"] == "short")
    assert old["expires_at"] == short.json()["expires_at"]
    assert at(successor["expires_at"]) < datetime.now(UTC) + timedelta(days=3, minutes=1)


async def test_there_is_room_for_ten(
    integrator: ConsoleClient, vkyc: Credential, operator: httpx.AsyncClient
) -> None:
    for number in range(9):
        await operator.post(f"{USERS}/{vkyc[0]}/credentials", json={"label": f"{number}"})
    answer = await integrator.post("/me/rotate", {"label": "eleventh"})
    assert (answer.status_code, "that is the most" in text_of(answer)) == (409, True)


async def test_a_label_is_asked_for(integrator: ConsoleClient, sql: SQL) -> None:
    for label in ("", "x" * 101):
        answer = await integrator.post("/me/rotate", {"label": label})
        assert answer.status_code == 422
        assert "Expected 1 to 100 characters." in text_of(answer)
    assert await sql("SELECT FROM credentials WHERE succeeds IS NOT NULL") == []


async def test_a_successor_may_have_the_label_of_what_it_succeeds_and_of_nothing_else(
    integrator: ConsoleClient,
    at_console: Callable[[Credential], Awaitable[ConsoleClient]],
    operator_credential: Credential,
    operator: httpx.AsyncClient,
    vkyc: Credential,
) -> None:
    api = f"{USERS}/{vkyc[0]}/credentials"
    assert (await operator.post(api, json={"label": "beside"})).status_code == 201
    refused = await integrator.post("/me/rotate", {"label": "beside"})
    assert refused.status_code == 409
    assert 'aria-invalid="true"' in refused.text
    assert "has a live credential with the label “beside”" in text_of(refused)
    # A job that rotates says the same each time.
    successor = await integrator.post("/me/rotate", {"label": "first"})
    assert successor.status_code == 200
    # The one before the last lives for seven days still.
    third = at_console((vkyc[0], SECRET.findall(successor.text)[0]))
    assert (await (await third).post("/me/rotate", {"label": "first"})).status_code == 200
    old = (await operator.get(api)).json()["credentials"][-1]
    operator_at_console = await at_console(operator_credential)
    revoke = f"/service-users/{vkyc[0]}/credentials/{old['id']}/revoke"
    assert f"Its id ends in {old['id'][-6:]}" in text_of(await operator_at_console.get(revoke))
    assert (await operator_at_console.post(revoke, {"label": "first"})).status_code == 422
    assert (await operator_at_console.post(revoke, {"label": old["id"][-6:]})).status_code == 303


# The same at the admin API


async def test_the_api_lets_a_service_user_do_the_same_for_itself(
    enrol: Enrol, sign_in: SignIn, settings: Settings, client: httpx.AsyncClient
) -> None:
    own = await enrol("bare", audiences=[settings.api_audience])
    caller = await sign_in(own)
    listed = (await caller.get(ME)).json()["credentials"]
    assert [each["label"] for each in listed] == ["first"]
    made = await caller.post(f"{ME}/rotate", json={"label": "second"})
    assert made.status_code == 201
    assert made.headers["cache-control"] == "no-store"
    assert made.json()["old"]["id"] == listed[0]["id"] == made.json()["succeeds"]
    grant = {"grant_type": "client_credentials"}
    credential = (made.json()["client_id"], made.json()["client_secret"])
    assert (await client.post("/oauth/token", auth=credential, data=grant)).status_code == 200
    assert (await caller.post(f"{ME}/rotate", json={"label": "third"})).status_code == 409


async def test_who_minted_a_token_for_somebody_gets_no_secret_by_it(
    enrol: Enrol,
    operator: httpx.AsyncClient,
    connect_client: Callable[..., httpx.AsyncClient],
    settings: Settings,
    sql: SQL,
) -> None:
    client_id, _ = await enrol("bare", audiences=[settings.api_audience])
    minted = await operator.post(f"{USERS}/{client_id}/tokens", json={})
    caller = connect_client(Authorization=f"Bearer {minted.json()['access_token']}")
    answer = await caller.post(f"{ME}/rotate", json={"label": "mine"})
    assert answer.status_code == 401
    assert await sql("SELECT FROM credentials WHERE succeeds IS NOT NULL") == []


async def test_a_token_with_less_than_its_holder_has_gets_no_secret_that_has_more(
    operator_credential: Credential, sign_in: SignIn, sql: SQL
) -> None:
    caller = await sign_in(operator_credential, scope="audit:read")
    answer = await caller.post(f"{ME}/rotate", json={"label": "mine"})
    assert answer.status_code == 403
    assert await sql("SELECT FROM credentials WHERE succeeds IS NOT NULL") == []
