"""Who may open and do what (TRIALS A1, A2, A4, A7), and that every page is looked at.

Generated from the route table: a route that nobody listed fails the build.
"""

import html
import json
import re
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeAlias

import asyncpg
import httpx
import pytest
from litestar.routes import HTTPRoute

from service.app import Authority
from service.authority.model import AdminScope
from service.console.gate import PUBLIC
from service.settings import Settings
from tests.browser.pages import INTEGRATOR, OPERATOR
from tests.browser.pages import PUBLIC as PUBLIC_PAGES
from tests.http.console_client import ConsoleClient

pytestmark = pytest.mark.anyio

Credential: TypeAlias = tuple[str, str]
Enrol: TypeAlias = Callable[..., Awaitable[Credential]]
SQL: TypeAlias = Callable[..., Awaitable[list[asyncpg.Record]]]
Records: TypeAlias = Callable[..., Awaitable[list[dict[str, Any]]]]

READ, WRITE = AdminScope.SERVICE_USERS_READ, AdminScope.SERVICE_USERS_WRITE
MINT, AUDIT = AdminScope.TOKENS_MINT, AdminScope.AUDIT_READ
KEYS, ROTATE = AdminScope.SIGNING_KEYS_READ, AdminScope.SIGNING_KEYS_ROTATE
REVOKE = AdminScope.SIGNING_KEYS_REVOKE
ONE = "/service-users/{service_user_id}"
CREDENTIAL = f"{ONE}/credentials/{{credential_id}}"

# The scopes that it takes, all of them.
DOORS: Final = {
    ("GET", "/"): frozenset[AdminScope](),
    ("GET", "/audit"): {AUDIT},
    ("GET", "/audit/export"): {AUDIT},
    ("GET", "/audit/records/{record_id}"): {AUDIT},
    ("GET", "/audit/tail"): {AUDIT},
    ("GET", "/audit/tail/next"): {AUDIT},
    ("GET", "/service-users"): {READ},
    ("GET", "/service-users/ending"): {READ},
    ("GET", "/service-users/new"): {WRITE},
    ("POST", "/service-users/new"): {WRITE},
    ("GET", ONE): {READ},
    ("GET", f"{ONE}/change"): {READ, WRITE},
    ("POST", f"{ONE}/change"): {WRITE},
    ("GET", f"{ONE}/disable"): {READ, WRITE},
    ("POST", f"{ONE}/disable"): {WRITE},
    ("POST", f"{ONE}/enable"): {WRITE},
    ("GET", f"{ONE}/credentials/new"): {READ, WRITE},
    ("POST", f"{ONE}/credentials/new"): {READ, WRITE},
    ("GET", f"{CREDENTIAL}/confirm"): {READ, WRITE},
    ("POST", f"{CREDENTIAL}/confirm"): {WRITE},
    ("GET", f"{CREDENTIAL}/revoke"): {READ, WRITE},
    ("POST", f"{CREDENTIAL}/revoke"): {READ, WRITE},
    ("GET", f"{ONE}/hand-over"): {READ, WRITE},
    ("POST", f"{ONE}/hand-over"): {READ, WRITE},
    ("GET", "/signing-keys"): {KEYS},
    ("POST", "/signing-keys/rotate"): {ROTATE},
    ("GET", "/signing-keys/{kid}/revoke"): {REVOKE},
    ("POST", "/signing-keys/{kid}/revoke"): {REVOKE},
    ("GET", "/signing-keys/revoke-all"): {REVOKE},
    ("POST", "/signing-keys/revoke-all"): {REVOKE},
    ("GET", "/token"): {MINT},
    ("GET", "/token/names"): {MINT},
    ("POST", "/token/{service_user_id}"): {MINT},
    ("GET", "/upload"): {MINT},
    ("POST", "/upload/{service_user_id}"): {MINT},
}
# Of integrators; the sign-in and what is before it; redirects to a form; what is on no page.
OTHERS: Final = {
    *(("GET", "/me"), ("GET", "/me/rotate"), ("POST", "/me/rotate")),
    *(("GET", "/sign-in"), ("POST", "/sign-in"), ("POST", "/sign-in/resume")),
    *(("GET", "/sign-in/provider"), ("GET", "/sign-in/callback")),
    *(("GET", "/hand-over"), ("POST", "/hand-over")),
    *(("POST", "/session"), ("POST", "/sign-out"), ("GET", "/static/{name}"), ("GET", "/{path}")),
    *(("GET", "/token/{service_user_id}"), ("GET", "/upload/{service_user_id}")),
}
FITTING: Final = {
    "name": "made",
    "source_system": "vkyc",
    "reason": "a test",
    "label": "a test",
    "lifetime": "30",
}


# What an address alone is not enough for.
QUERIES: Final = {
    "/audit/export": "?format=csv",
    "/audit/tail/next": "?cursor=0.00000000-0000-7000-8000-000000000000",
    "/token/names": "?beginning=s",
}


@pytest.fixture
async def places(
    authority: Authority, enrol: Enrol, operator: httpx.AsyncClient, records: Records
) -> dict[str, str]:
    """What fills the parameters of a path: a service user, its credential, its record, a key."""
    other, _ = await enrol("somebody", scopes=["ingest:write"])
    held = (await operator.get(f"/api/v1/service-users/{other}/credentials")).json()
    (record,) = await records(service_user=other, action="service_user.create")
    assert authority.keys.ring.active is not None
    return {
        "service_user_id": other,
        "credential_id": held["credentials"][0]["id"],
        "kid": authority.keys.ring.active.kid,
        "record_id": record["id"],
    }


def routes(authority: Authority) -> dict[tuple[str, str], bool]:
    """Method and path of every route of the console, and whether it is public."""
    return {
        (str(method), _plain(route.path)): PUBLIC in handler.opt
        for route in authority.litestar.routes
        if isinstance(route, HTTPRoute) and route.path.startswith("/console")
        for handler in route.route_handlers
        for method in handler.http_methods
        if method != "OPTIONS"
    }


def _plain(path: str) -> str:
    path = path.removeprefix("/console") or "/"
    for kind in ("str", "uuid", "path"):
        path = path.replace(f":{kind}}}", "}")
    return path


async def test_every_route_is_listed(authority: Authority) -> None:
    assert {*routes(authority)} == DOORS.keys() | OTHERS
    public = {key for key, is_public in routes(authority).items() if is_public}
    assert public <= OTHERS


async def test_every_page_is_looked_at(authority: Authority) -> None:
    seen = {
        path.partition("?")[0] or "/"
        for pages in (OPERATOR, INTEGRATOR, PUBLIC_PAGES)
        for path in pages.values()
    }
    pages = {path for method, path in routes(authority) if method == "GET"}
    # Data, files, redirects, and what an address alone does not bring about.
    assert pages - seen == {
        "/audit/export",
        "/audit/tail/next",
        "/sign-in/callback",
        "/sign-in/provider",
        "/static/{name}",
        "/token/names",
        "/token/{service_user_id}",
        "/upload/{service_user_id}",
        "/{path}",
    }


SETS: Final = [
    # Who only reports is no operator: tests/http/test_console_own.py.
    *(frozenset({scope}) for scope in sorted(AdminScope) if scope != AdminScope.AUDIT_REPORT),
    *(frozenset(AdminScope) - {scope} for scope in sorted(AdminScope)),
]


@pytest.mark.parametrize("held_scopes", SETS, ids=lambda scopes: " ".join(sorted(scopes)))
async def test_scopes_open_the_doors_that_take_no_other(
    client: httpx.AsyncClient,
    settings: Settings,
    enrol_operator: Enrol,
    places: dict[str, str],
    held_scopes: frozenset[AdminScope],
) -> None:
    person = ConsoleClient(client, settings.issuer)
    assert (
        await person.sign_in(await enrol_operator("some-scopes", *held_scopes))
    ).status_code == 303
    wrong: dict[tuple[str, str], int] = {}
    for (method, path), needed in DOORS.items():
        address = path.format(**places) + QUERIES.get(path, "")
        answer = await (
            person.get(address) if method == "GET" else person.post(address, dict(FITTING))
        )
        assert answer.status_code < 500, (method, path, answer.text)
        if (answer.status_code != 403) != (needed <= held_scopes):
            wrong[method, path] = answer.status_code
    assert wrong == {}


async def test_opening_pages_changes_nothing(
    authority: Authority,
    client: httpx.AsyncClient,
    settings: Settings,
    operator_credential: Credential,
    places: dict[str, str],
    vkyc: Credential,
    sql: SQL,
) -> None:
    """TRIALS A4: that somebody looked goes on record, and that is all."""
    handed = await client.get("/.well-known/jwks.json")
    before = await _all_but_records(sql)
    assert {"service_users", "credentials", "signing_keys"} <= before.keys()
    opened = set[str]()
    for credential in (operator_credential, vkyc, None):
        person = ConsoleClient(client, settings.issuer)
        if credential is not None:
            await person.sign_in(credential)
        for method, path in routes(authority):
            if method == "GET":
                address = path.format(**places, name="console.css", path="nothing")
                answer = await person.get(address + QUERIES.get(path, ""))
                assert answer.status_code < 500, (path, answer.text)
                if answer.status_code == 200:
                    opened.add(path)
    # But for redirects, and for a portal that there is not here.
    assert {path for method, path in routes(authority) if method == "GET"} - opened == {
        "/sign-in/callback",
        "/sign-in/provider",
        "/token/{service_user_id}",
        "/upload/{service_user_id}",
        "/{path}",
    }
    assert await _all_but_records(sql) == before
    assert (await client.get("/.well-known/jwks.json")).content == handed.content


async def test_fields_that_no_form_has_change_nothing(
    client: httpx.AsyncClient,
    settings: Settings,
    operator: httpx.AsyncClient,
    operator_credential: Credential,
    sql: SQL,
) -> None:
    """TRIALS A2: what a form does not ask for is not read."""
    person = ConsoleClient(client, settings.issuer)
    await person.sign_in(operator_credential)
    extra = {
        "id": "su_bbbbbbbbbbbbbbbbbbbbbbbb",
        "service_user_id": operator_credential[0],
        "created_at": "2020-01-01T00:00:00Z",
        "expires_at": "2099-01-01T00:00:00Z",
        "secret_sha256": "00" * 32,
        "client_secret": "pvs_chosen",
        "status": "disabled",
        "version": "7",
        "scopes": "audit:read",
        "is_operator": "1",
        "__class__": "x",
    }
    new = {
        "name": "vkyc-new",
        "source_system": "vkyc",
        "scope": "ingest:write",
        "audiences": "https://ingest.example",
        "token_lifetime": "600",
    }
    made = await person.post("/service-users/new", {**new, **extra})
    assert made.status_code == 303, made.text
    path = made.headers["location"].removeprefix("/console").partition("?")[0]
    service_user_id = path.rpartition("/")[2]
    assert service_user_id != extra["id"]
    user = (await operator.get(f"/api/v1/service-users/{service_user_id}")).json()
    expected = {"status": "active", "version": 1, "scopes": ["ingest:write"]}
    assert {name: user[name] for name in expected} == expected
    assert user["created_at"] > "2026"

    for form in ("credentials/new", "hand-over"):
        answer = await person.post(f"{path}/{form}", {**FITTING, "label": form, **extra})
        assert answer.status_code < 300, answer.text
        assert "pvs_chosen" not in answer.text
    held = (await operator.get(f"/api/v1/service-users/{service_user_id}/credentials")).json()
    assert {each["label"] for each in held["credentials"]} == {"credentials/new", "hand-over"}
    assert max(each["expires_at"] for each in held["credentials"]) < "2099"
    zeros = "SELECT FROM credentials WHERE secret_sha256 = decode(repeat('00', 32), 'hex')"
    assert await sql(zeros) == []

    # A change in which nobody touched a field.
    base = re.search(r'name="base" value="([^"]+)"', (await person.get(f"{path}/change")).text)
    assert base is not None
    same = {**new, "base": html.unescape(base[1])}
    answer = await person.post(f"{path}/change", {**same, "owner": "KYC", **extra})
    assert answer.status_code == 303, answer.text
    after = (await operator.get(f"/api/v1/service-users/{service_user_id}")).json()
    assert after == {**user, "owner": "KYC", "version": after["version"]}


@pytest.mark.parametrize("extra", list(AdminScope))
async def test_no_form_leads_upwards(
    extra: AdminScope,
    client: httpx.AsyncClient,
    settings: Settings,
    operator: httpx.AsyncClient,
    enrol_operator: Enrol,
) -> None:
    """TRIALS A7: the caller has every admin scope but one; the target has that one only."""
    others = [scope for scope in AdminScope if scope != extra]
    caller = ConsoleClient(client, settings.issuer)
    own = await enrol_operator("caller", *others)
    assert (await caller.sign_in(own)).status_code == 303
    above, _ = await enrol_operator("above", extra)
    plain, _ = await enrol_operator("plain", "ingest:write")
    users = "/api/v1/service-users"

    async def change(service_user_id: str, **fields: Any) -> httpx.Response:
        now = (await operator.get(f"{users}/{service_user_id}")).json()
        was = {
            name: str(now[name]) if name == "token_lifetime" else now[name]
            for name in (
                *("name", "source_system", "owner", "contact", "description"),
                *("scopes", "audiences", "token_lifetime"),
            )
        }
        typed = {
            **{name: was[name] for name in was if name not in ("scopes", "audiences")},
            "scope": was["scopes"],
            "audiences": " ".join(was["audiences"]),
            "base": json.dumps({"version": now["version"], "was": was}),
        }
        return await caller.post(f"/service-users/{service_user_id}/change", {**typed, **fields})

    new = {
        **{"name": "new", "source_system": "x", "audiences": settings.api_audience},
        "token_lifetime": "900",
    }
    roads = {
        "create": await caller.post("/service-users/new", {**new, "scope": [extra]}),
        "create with both": await caller.post(
            "/service-users/new", {**new, "scope": [*others, extra]}
        ),
        "grant to oneself": await change(own[0], scope=[*others, extra]),
        "grant to another": await change(
            plain, scope=["ingest:write", extra], audiences=settings.api_audience
        ),
        "change the higher": await change(above, contact="me@evil.example"),
        "take it from the higher": await change(above, scope=[]),
        "credential of the higher": await caller.post(
            f"/service-users/{above}/credentials/new", FITTING
        ),
        "hand over the higher": await caller.post(f"/service-users/{above}/hand-over", FITTING),
        "mint for the higher": await caller.post(f"/token/{above}", {}),
        "try as the higher": await caller.post(f"/upload/{above}", {"do": "try"}),
        "mint for oneself": await caller.post(f"/token/{own[0]}", {}),
    }
    assert (await operator.post(f"{users}/{above}/disable")).status_code == 200
    roads["enable the higher"] = await caller.post(f"/service-users/{above}/enable")
    # Minted for somebody without admin scopes, no token has one, whatever is asked for.
    asked = {"scope": [extra], "audience": settings.api_audience}
    assert (await caller.post(f"/token/{plain}", asked)).status_code >= 400

    assert {road: answer.status_code for road, answer in roads.items()} == dict.fromkeys(roads, 403)
    found = {user["name"]: user for user in (await operator.get(users)).json()["service_users"]}
    assert found.keys() == {"above", "caller", "operator", "plain"}
    assert {*found["caller"]["scopes"]} == {*others}
    assert found["plain"]["scopes"] == ["ingest:write"]
    assert (found["above"]["scopes"], found["above"]["status"]) == ([extra], "disabled")
    for service_user_id in (above, own[0]):
        held = (await operator.get(f"{users}/{service_user_id}/credentials")).json()
        assert len(held["credentials"]) == 1


async def _all_but_records(sql: SQL) -> dict[str, list[str]]:
    """Every row of every table, but for the audit log, which grows with whatever happens."""
    tables = await sql(
        "SELECT tablename FROM pg_tables WHERE schemaname NOT IN ('pg_catalog',"
        " 'information_schema') AND tablename NOT LIKE 'audit\\_%'"
    )
    return {
        name: [row[0] for row in await sql(f'SELECT t::text FROM "{name}" AS t ORDER BY 1')]
        for (name,) in tables
    }
