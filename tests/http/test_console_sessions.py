"""Who gets into the console and how long, and what a form must bring (TRIALS A4)."""

import hashlib
import re
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import asyncpg
import httpx
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

from keys.verifier import thumbprint
from service.authority.audit import new_record_id
from service.authority.model import AdminScope
from service.authority.sessions import LIFETIME, SESSION
from service.console.page import COOKIE
from service.settings import Settings
from tests.http.console_client import ConsoleClient

pytestmark = pytest.mark.anyio

Credential: TypeAlias = tuple[str, str]
Records: TypeAlias = Callable[..., Awaitable[list[dict[str, Any]]]]
SQL: TypeAlias = Callable[..., Awaitable[list[asyncpg.Record]]]


@pytest.fixture
def person(client: httpx.AsyncClient, settings: Settings) -> ConsoleClient:
    """Somebody who has not signed in."""
    return ConsoleClient(client, settings.issuer)


@pytest.fixture
async def operator_at_console(
    person: ConsoleClient, operator_credential: Credential
) -> ConsoleClient:
    """The first operator, signed in."""
    assert (await person.sign_in(operator_credential)).status_code == 303
    return person


def claims_of(person: ConsoleClient) -> dict[str, Any]:
    """What the token in the cookie says."""
    assert person.cookie is not None
    return jwt.decode(person.cookie, options={"verify_signature": False})


async def test_a_session_is_a_recorded_token_for_the_console_alone(
    operator_at_console: ConsoleClient,
    client: httpx.AsyncClient,
    records: Records,
    settings: Settings,
    operator_credential: Credential,
) -> None:
    claims = claims_of(operator_at_console)
    assert claims["aud"] == f"{settings.issuer}/console"
    assert claims["exp"] - claims["iat"] == LIFETIME
    (record,) = await records(jti=claims["jti"])
    assert (record["action"], record["aud"]) == ("token.issue", claims["aud"])
    assert record["service_user_id"] == operator_credential[0]

    bearer = {"Authorization": f"Bearer {operator_at_console.cookie}"}
    assert (await client.get("/api/v1/service-users", headers=bearer)).status_code == 401
    cookie = {"Cookie": f"{COOKIE}={operator_at_console.cookie}"}
    assert (await client.get("/api/v1/service-users", headers=cookie)).status_code == 401


async def test_no_exchange_gives_a_session_and_no_bearer_token_opens_a_page(
    client: httpx.AsyncClient,
    operator: httpx.AsyncClient,
    operator_credential: Credential,
    settings: Settings,
) -> None:
    exchanged = await client.post(
        "/oauth/token",
        auth=operator_credential,
        data={"grant_type": "client_credentials", "resource": settings.console_audience},
    )
    assert (exchanged.status_code, exchanged.json()["error"]) == (400, "invalid_target")
    new = {"name": "x", "source_system": "x", "audiences": [settings.console_audience]}
    assert (await operator.post("/api/v1/service-users", json=new)).status_code == 422

    bearer = operator.headers["Authorization"]
    answer = await operator.get("/console")
    assert (answer.status_code, answer.headers["location"]) == (303, "/console/sign-in")
    cookie = {"Cookie": f"{COOKIE}={bearer.removeprefix('Bearer ')}"}
    answer = await client.get("/console", headers=cookie)
    assert answer.status_code == 303


@pytest.mark.parametrize("origin", ["https://evil.example", "null", None])
async def test_a_form_from_elsewhere_is_refused(
    operator_at_console: ConsoleClient,
    client: httpx.AsyncClient,
    operator_credential: Credential,
    origin: str | None,
) -> None:
    headers = {"Cookie": f"{COOKIE}={operator_at_console.cookie}"}
    if origin is not None:
        headers["Origin"] = origin
    form = {"csrf": operator_at_console.csrf}
    signed_out = await client.post("/console/sign-out", data=form, headers=headers)
    assert signed_out.status_code == 403
    assert "set-cookie" not in signed_out.headers
    credential = {"client_id": operator_credential[0], "client_secret": operator_credential[1]}
    signed_in = await client.post("/console/sign-in", data=credential, headers=headers)
    assert signed_in.status_code == 403
    assert "set-cookie" not in signed_in.headers


async def test_a_form_of_another_session_is_refused(
    operator_at_console: ConsoleClient,
    client: httpx.AsyncClient,
    settings: Settings,
    operator_credential: Credential,
) -> None:
    other = ConsoleClient(client, settings.issuer)
    await other.sign_in(operator_credential)
    assert other.csrf != operator_at_console.csrf
    for csrf in (other.csrf, "", operator_at_console.csrf[:-1]):
        answer = await operator_at_console.post("/sign-out", {"csrf": csrf})
        assert answer.status_code == 403
    signed_out = await operator_at_console.post("/sign-out")
    assert signed_out.status_code == 303
    assert operator_at_console.cookie is None
    led_to = signed_out.headers["location"].removeprefix("/console")
    assert "You are signed out." in (await operator_at_console.get(led_to)).text


async def test_json_as_a_form_is_refused(
    operator_at_console: ConsoleClient, client: httpx.AsyncClient, settings: Settings
) -> None:
    for content_type in ("text/plain", "application/json", "multipart/form-data"):
        answer = await client.post(
            "/console/sign-out",
            content=f"csrf={operator_at_console.csrf}",
            headers={
                "Cookie": f"{COOKIE}={operator_at_console.cookie}",
                "Origin": settings.issuer,
                "Content-Type": content_type,
            },
        )
        assert answer.status_code == 415


async def test_every_page_brings_its_policy_and_is_kept_nowhere(
    operator_at_console: ConsoleClient,
) -> None:
    for path in ("/", "/sign-in", "/no/such/page"):
        answer = await operator_at_console.get(path)
        policy = answer.headers["content-security-policy"]
        assert "unsafe-" not in policy
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert answer.headers["x-frame-options"] == "DENY"
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert (await operator_at_console.get("/no/such/page")).status_code == 404


@pytest.mark.parametrize("where", ["/token", "/upload", "/service-users"])
async def test_an_address_with_a_line_end_is_none(
    operator_at_console: ConsoleClient, operator_credential: Credential, where: str
) -> None:
    # It would reach a header of the answer.
    assert (
        await operator_at_console.get(f"{where}/{operator_credential[0]}%0A")
    ).status_code == 404


async def test_static_files_are_named_by_their_content_and_kept_for_ever(
    operator_at_console: ConsoleClient,
) -> None:
    home = await operator_at_console.get("/")
    addresses = re.findall(r'(?:href|src)="/console(/static/[^"]+)"', home.text)
    assert len(addresses) == 3
    for address in addresses:
        answer = await operator_at_console.get(address)
        assert answer.status_code == 200
        assert "immutable" in answer.headers["cache-control"]
    assert (await operator_at_console.get("/static/..%2fpage.py")).status_code == 404


@pytest.mark.parametrize(
    "following",
    ["https://evil.example", "//evil.example", "/console/../api", "/console//evil", "javascript:x"],
)
async def test_the_way_back_leads_nowhere_else(
    person: ConsoleClient, operator_credential: Credential, following: str
) -> None:
    answer = await person.sign_in(operator_credential, next=following)
    assert answer.headers["location"] == "/console"


async def test_the_way_back_leads_to_a_key_whose_kid_begins_with_a_hyphen(
    person: ConsoleClient, operator_credential: Credential
) -> None:
    path = f"/signing-keys/-{'k' * 42}/revoke"
    person.cookie = "no.such.session"
    answer = await person.post(path, {"reason": "it leaked"})
    assert answer.status_code == 401
    assert f'name="next" value="/console{path}"' in answer.text
    answer = await person.sign_in(
        operator_credential, **{"next": f"/console{path}", "kept:reason": "it leaked"}
    )
    assert f'action="/console{path}"' in answer.text


async def test_what_was_typed_waits_for_a_new_sign_in(
    person: ConsoleClient, operator_credential: Credential
) -> None:
    person.cookie = "no.such.session"
    typed = {"name": "vkyc <prod>", "client_secret": "pvs_x"}
    answer = await person.post("/service-users/new", typed)
    assert answer.status_code == 401
    assert 'name="kept:name" value="vkyc &lt;prod&gt;"' in answer.text
    assert "pvs_x" not in answer.text
    answer = await person.sign_in(
        operator_credential, **{"next": "/console/service-users/new", "kept:name": "vkyc <prod>"}
    )
    assert answer.status_code == 200
    assert "Nothing was done yet" in answer.text
    assert 'action="/console/service-users/new"' in answer.text
    assert 'name="name" value="vkyc &lt;prod&gt;"' in answer.text


async def test_a_refused_session_is_on_record_and_a_browser_without_one_is_not(
    person: ConsoleClient, client: httpx.AsyncClient, settings: Settings, records: Records
) -> None:
    for path in ("/", "/service-users", "/sign-in"):
        await person.get(path)
    await person.post("/service-users/new")
    await records(0, outcome="refused")
    person.cookie = "no.such.session"
    await person.get("/", User_Agent="thief/1")
    await person.get("/service-users")
    await person.get("/sign-in")
    await person.post("/service-users/new")
    await person.post("/sign-in/resume")
    refused = await records(4, reason="invalid_token", outcome="refused")
    assert {record["action"] for record in refused} == {
        "service_user.read",
        "service_user.list",
        "service_user.create",
        "token.issue",
    }
    assert {record["client_address"] for record in refused} == {"127.0.0.1"}
    assert "thief/1" in {record["user_agent"] for record in refused}
    elsewhere = {"Origin": "https://evil.example"}
    assert (await client.post("/console/sign-in/resume", headers=elsewhere)).status_code == 403
    await records(1, reason="invalid_request", action="token.issue", outcome="refused")


# Time: sessions that began long ago are made by a thief of the key and the database


PLANT = """
INSERT INTO audit_records (id, commit_order, recorded_at, action, outcome, service_user_id,
    credential_id, signing_input_sha256, request_id, repeats, details)
SELECT $1, 1, now(), 'token.issue', 'success', $2, c.id, $3, '', 1, '{}'
  FROM credentials c WHERE c.service_user_id = $2
"""


@pytest.fixture
def session_since(
    settings: Settings, rsa_keys: list[RSAPrivateKey], operator_credential: Credential, sql: SQL
) -> Callable[..., Awaitable[str]]:
    """`session_since(ago, ends_in)` is the token of a session of the operator."""

    async def made(ago: int, ends_in: int, **changes: Any) -> str:
        now, jti = int(time.time()), new_record_id(time.time())
        claims = {
            "iss": settings.issuer,
            "sub": operator_credential[0],
            "client_id": operator_credential[0],
            "aud": settings.console_audience,
            "exp": now + ends_in,
            "iat": now + ends_in - LIFETIME,
            "jti": str(jti),
            "scope": " ".join(sorted(AdminScope)),
            "service_user": "operator",
            "source_system": "operators",
            "sid": "s" * 22,
            "auth_time": now - ago,
            **changes,
        }
        given = {name: value for name, value in claims.items() if value is not ...}
        kid = thumbprint(rsa_keys[0].public_key())
        headers = {"typ": "at+jwt", "kid": kid}
        token = jwt.encode(given, rsa_keys[0], "RS256", headers=headers)
        digest = hashlib.sha256(token.rpartition(".")[0].encode()).digest()
        await sql(PLANT, jti, operator_credential[0], digest)
        return token

    return made


async def test_a_session_is_renewed_by_what_is_asked_for_and_goes_back_to_its_sign_in(
    person: ConsoleClient, session_since: Callable[..., Awaitable[str]], records: Records
) -> None:
    person.cookie = await session_since(3600, LIFETIME // 2 + 100)
    before = person.cookie
    assert (await person.get("/")).status_code == 200
    assert person.cookie == before

    person.cookie = await session_since(3600, LIFETIME // 2 - 100)
    before = claims_of(person)
    assert (await person.get("/")).status_code == 200
    after = claims_of(person)
    assert after["jti"] != before["jti"]
    assert (after["sid"], after["auth_time"]) == (before["sid"], before["auth_time"])
    assert after["exp"] > before["exp"]
    await records(jti=after["jti"])


async def test_after_8_hours_it_takes_a_new_sign_in(
    person: ConsoleClient, session_since: Callable[..., Awaitable[str]]
) -> None:
    person.cookie = await session_since(SESSION - 300, 100)
    assert (await person.get("/")).status_code == 200
    claims = claims_of(person)
    assert claims["exp"] <= claims["auth_time"] + SESSION

    person.cookie = await session_since(SESSION + 1, 600)
    assert (await person.get("/")).headers["location"] == "/console/sign-in?ended=1"
    assert "8 hours" in (await person.get("/sign-in?ended=true")).text


@pytest.mark.parametrize("why", ["idle", "its key was revoked"])
async def test_a_person_is_told_that_the_session_ended_and_not_what_is_wrong_with_its_token(
    person: ConsoleClient,
    operator: httpx.AsyncClient,
    session_since: Callable[..., Awaitable[str]],
    why: str,
) -> None:
    person.cookie = await session_since(3600, 600)
    assert (await person.get("/")).status_code == 200
    if why == "idle":
        person.cookie = await session_since(3600, -120)
    else:
        revoked = await operator.post(
            "/api/v1/signing-keys/revoke-all", json={"reason": "it leaked"}
        )
        assert revoked.status_code == 200, revoked.text
    assert (await person.get("/")).headers["location"] == "/console/sign-in?ended=1"
    for answer in (
        await person.get("/sign-in?ended=true"),
        await person.post("/session"),
        await person.post("/sign-in/resume", next="/console"),
    ):
        assert "Your session has ended" in answer.text
        assert "expected" not in answer.text


async def test_a_session_that_merely_ended_needs_no_record_and_one_that_was_ended_has_one(
    person: ConsoleClient,
    operator: httpx.AsyncClient,
    operator_credential: Credential,
    enrol_operator: Callable[..., Awaitable[Credential]],
    session_since: Callable[..., Awaitable[str]],
    records: Records,
) -> None:
    signed_out = await session_since(3600, 600, sid="o" * 22)
    person.cookie = signed_out
    await person.get("/")
    assert (await person.post("/sign-out")).status_code == 303
    for cookie in (
        signed_out,
        await session_since(SESSION + 1, 600),
        await session_since(3600, -120),
    ):
        person.cookie = cookie
        assert (await person.get("/")).headers["location"] == "/console/sign-in?ended=1"
        assert (await person.post("/session")).status_code == 401
    await records(0, outcome="refused")

    credential = await enrol_operator("second", AdminScope.SERVICE_USERS_READ)
    assert (await person.sign_in(credential)).status_code == 303
    disabled = await operator.post(f"/api/v1/service-users/{credential[0]}/disable")
    assert disabled.status_code == 200
    assert (await person.get("/service-users")).status_code == 303
    await records(1, outcome="refused", action="service_user.list", reason="invalid_token")


async def test_after_a_sign_out_no_copy_of_the_cookie_opens_or_renews_anything(
    person: ConsoleClient,
    operator_credential: Credential,
    session_since: Callable[..., Awaitable[str]],
    client: httpx.AsyncClient,
    settings: Settings,
    records: Records,
) -> None:
    older = person.cookie = await session_since(3600, LIFETIME // 2 - 100)
    await person.get("/")
    renewed, signed_in = person.cookie, claims_of(person)
    assert renewed != older
    assert (await person.post("/sign-out")).status_code == 303
    assert person.cookie is None
    for cookie in (older, renewed):
        copy = ConsoleClient(client, settings.issuer)
        copy.cookie, copy.csrf = cookie, person.csrf
        answer = await copy.get("/")
        assert (answer.status_code, answer.headers["location"]) == (
            303,
            "/console/sign-in?ended=1",
        )
        assert "You signed out" in (await copy.post("/session")).text
        assert copy.cookie == cookie

    (end,) = await records(action="token.end_session")
    assert end["service_user_id"] == end["actor_id"] == operator_credential[0]
    (first,) = await records(jti=signed_in["jti"])
    assert end["details"] == first["details"]
    assert signed_in["sid"] not in str((first, end))

    # Only that session: the credential is as good as before.
    assert (await person.sign_in(operator_credential)).status_code == 303
    assert (await person.get("/")).status_code == 200


@pytest.mark.parametrize("changes", [{"sid": ...}, {"auth_time": ...}, {"auth_time": "now"}])
async def test_a_token_that_goes_back_to_no_sign_in_opens_nothing(
    person: ConsoleClient,
    session_since: Callable[..., Awaitable[str]],
    changes: dict[str, object],
) -> None:
    person.cookie = await session_since(0, 600, **changes)
    assert (await person.get("/")).status_code == 303


async def test_a_session_ends_with_the_credential_behind_it(
    operator_at_console: ConsoleClient,
    operator: httpx.AsyncClient,
    operator_credential: Credential,
    client: httpx.AsyncClient,
    settings: Settings,
    enrol_operator: Callable[..., Awaitable[Credential]],
) -> None:
    reader = ConsoleClient(client, settings.issuer)
    credential = await enrol_operator("reader", AdminScope.AUDIT_READ)
    assert (await reader.sign_in(credential)).status_code == 303
    assert (await reader.get("/")).status_code == 200
    disabled = await operator.post(f"/api/v1/service-users/{credential[0]}/disable")
    assert disabled.status_code == 200
    assert (await reader.get("/")).headers["location"] == "/console/sign-in?ended=1"
    answer = await reader.post("/session")
    assert answer.status_code == 401
    assert "disabled" in answer.text
    assert (await operator_at_console.get("/")).status_code == 200
