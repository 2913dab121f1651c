"""Which scope opens which page (TRIALS A1), and that every page is among those that are looked at.

Generated from the route table: a route that nobody listed fails the build.
"""

from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeAlias

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
        path or "/" for pages in (OPERATOR, INTEGRATOR, PUBLIC_PAGES) for path in pages.values()
    }
    pages = {path for method, path in routes(authority) if method == "GET"}
    # Data, files, redirects, and what an address alone does not bring about.
    assert pages - seen == {
        "/audit/export",
        "/audit/tail/next",
        "/service-users/{service_user_id}/credentials/{credential_id}/confirm",
        "/service-users/{service_user_id}/credentials/{credential_id}/revoke",
        "/sign-in/callback",
        "/sign-in/provider",
        "/signing-keys/{kid}/revoke",
        "/static/{name}",
        "/token/names",
        "/token/{service_user_id}",
        "/upload/{service_user_id}",
        "/{path}",
    }


SETS: Final = [
    *(frozenset({scope}) for scope in sorted(AdminScope)),
    *(frozenset(AdminScope) - {scope} for scope in sorted(AdminScope)),
]


@pytest.mark.parametrize("held_scopes", SETS, ids=lambda scopes: " ".join(sorted(scopes)))
async def test_scopes_open_the_doors_that_take_no_other(
    authority: Authority,
    client: httpx.AsyncClient,
    settings: Settings,
    enrol: Enrol,
    enrol_operator: Enrol,
    operator: httpx.AsyncClient,
    records: Records,
    held_scopes: frozenset[AdminScope],
) -> None:
    other, _ = await enrol("somebody", scopes=["ingest:write"])
    held = (await operator.get(f"/api/v1/service-users/{other}/credentials")).json()
    (record,) = await records(service_user=other, action="service_user.create")
    assert authority.keys.ring.active is not None
    places = {
        "service_user_id": other,
        "credential_id": held["credentials"][0]["id"],
        "kid": authority.keys.ring.active.kid,
        "record_id": record["id"],
    }
    person = ConsoleClient(client, settings.issuer)
    assert (
        await person.sign_in(await enrol_operator("some-scopes", *held_scopes))
    ).status_code == 303
    query = {"/audit/export": "?format=csv", "/token/names": "?begins=s"}
    wrong: dict[tuple[str, str], int] = {}
    for (method, path), needed in DOORS.items():
        address = path.format(**places) + query.get(path, "")
        answer = await (
            person.get(address) if method == "GET" else person.post(address, dict(FITTING))
        )
        assert answer.status_code < 500, (method, path, answer.text)
        if (answer.status_code != 403) != (needed <= held_scopes):
            wrong[method, path] = answer.status_code
    assert wrong == {}
