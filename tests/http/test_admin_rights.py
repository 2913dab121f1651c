"""Who may do what at the admin API (TRIALS A1, A2, A7, A8), by outcome.

It must not know how rights are checked: only whose token opens which door.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import asyncpg
import httpx
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_der_public_key
from litestar.routes import ASGIRoute, HTTPRoute

from keys.envelope import KeyEncryptionKeys
from keys.signer import KeptKey, unseal
from service.app import Authority
from service.authority.audit import new_record_id
from service.authority.model import AdminScope
from service.settings import Settings

pytestmark = pytest.mark.anyio

Credential: TypeAlias = tuple[str, str]
Enrol: TypeAlias = Callable[..., Awaitable[Credential]]
SignIn: TypeAlias = Callable[..., Awaitable[httpx.AsyncClient]]
Records: TypeAlias = Callable[..., Awaitable[list[dict[str, Any]]]]
SQL: TypeAlias = Callable[..., Awaitable[list[asyncpg.Record]]]

USERS = "/api/v1/service-users"
NOBODY = "su_aaaaaaaaaaaaaaaaaaaaaaaa"


class Door(NamedTuple):
    """One admin endpoint: the scope that it takes, a fitting body, and how it answers with it."""

    scope: AdminScope | None
    status: int
    action: str
    json: Mapping[str, Any] | None = None
    query: str = ""


READ, WRITE = AdminScope.SERVICE_USERS_READ, AdminScope.SERVICE_USERS_WRITE
_ONE = "/service-users/{service_user_id:str}"
ADMIN = {
    ("POST", "/service-users"): Door(
        WRITE, 201, "service_user.create", {"name": "new", "source_system": "vkyc"}
    ),
    ("GET", "/service-users"): Door(READ, 200, "service_user.list"),
    ("GET", "/service-users/me"): Door(None, 200, "service_user.read"),
    ("GET", _ONE): Door(READ, 200, "service_user.read"),
    ("PATCH", _ONE): Door(WRITE, 200, "service_user.change", {"owner": "KYC"}),
    ("POST", f"{_ONE}/disable"): Door(WRITE, 200, "service_user.disable"),
    ("POST", f"{_ONE}/enable"): Door(WRITE, 200, "service_user.enable"),
    ("GET", f"{_ONE}/credentials"): Door(READ, 200, "credential.list"),
    ("POST", f"{_ONE}/credentials"): Door(WRITE, 201, "credential.create", {"label": "x"}),
    ("POST", f"{_ONE}/hand-overs"): Door(WRITE, 201, "credential.hand_over", {"label": "x"}),
    ("GET", "/service-users/me/credentials"): Door(None, 200, "credential.list"),
    ("POST", "/service-users/me/credentials/rotate"): Door(
        None, 201, "credential.rotate", {"label": "x"}
    ),
    ("POST", f"{_ONE}/credentials/{{credential_id:str}}/revoke"): Door(
        WRITE, 200, "credential.revoke"
    ),
    ("POST", f"{_ONE}/credentials/{{credential_id:str}}/confirm"): Door(
        WRITE, 200, "credential.confirm", {"reason": "a test"}
    ),
    ("POST", "/credentials/confirm"): Door(
        WRITE, 200, "credential.confirm_all", {"reason": "a test"}
    ),
    ("POST", f"{_ONE}/tokens"): Door(AdminScope.TOKENS_MINT, 201, "token.mint", {}),
    ("GET", "/signing-keys"): Door(AdminScope.SIGNING_KEYS_READ, 200, "signing_key.list"),
    ("POST", "/credentials/leaked"): Door(
        WRITE, 200, "credential.leaked", {"secrets_sha256": ["A" * 43]}
    ),
    ("GET", "/audit-records"): Door(AdminScope.AUDIT_READ, 200, "audit.query"),
    ("GET", "/audit-records/export"): Door(AdminScope.AUDIT_READ, 200, "audit.export"),
    ("GET", "/audit-records/{record_id:uuid}/proof"): Door(
        AdminScope.AUDIT_READ, 200, "audit.inclusion"
    ),
    ("GET", "/audit/consistency"): Door(
        AdminScope.AUDIT_READ, 200, "audit.consistency", query="?from=0"
    ),
    ("POST", "/audit-events"): Door(
        AdminScope.AUDIT_REPORT,
        200,
        "audit.report",
        {
            "events": [
                {
                    "type": "jwks.loaded",
                    "id": str(new_record_id(time.time())),
                    "occurred_at": "2026-11-24T19:00:00Z",
                    "instance": "instance-1",
                    "kids": [],
                }
            ]
        },
    ),
    ("POST", "/signing-keys/rotate"): Door(
        AdminScope.SIGNING_KEYS_ROTATE, 200, "signing_key.rotate", {"reason": "a test"}
    ),
    ("POST", "/signing-keys/{kid:str}/revoke"): Door(
        AdminScope.SIGNING_KEYS_REVOKE, 200, "signing_key.revoke", {"reason": "a test"}
    ),
    ("POST", "/signing-keys/revoke-all"): Door(
        AdminScope.SIGNING_KEYS_REVOKE, 200, "signing_key.revoke_all", {"reason": "a test"}
    ),
}
PUBLIC = {
    "/",
    "/oauth/token",
    "/.well-known/jwks.json",
    "/.well-known/oauth-authorization-server",
    "/.well-known/openid-configuration",
    "/healthz",
    "/readyz",
    "/metrics",
    "/schema",
    "/schema/{path:str}",
    "/schema/openapi.json",
}


def admin_routes(authority: Authority) -> set[tuple[str, str]]:
    """Method and path of every admin route that the app has, from its own route table."""
    return {
        (str(method), route.path.removeprefix("/api/v1"))
        for route in authority.litestar.routes
        if isinstance(route, HTTPRoute) and route.path.startswith("/api/v1")
        for handler in route.route_handlers
        for method in handler.http_methods
        if method != "OPTIONS"
    }


class Place(NamedTuple):
    """A service user, a credential of it and a key to knock at."""

    service_user_id: str
    credential_id: str
    kid: str
    record_id: str


async def knock(caller: httpx.AsyncClient, method: str, path: str, place: Place) -> httpx.Response:
    """Send the fitting request of ADMIN's `method` and `path`."""
    url = "/api/v1" + path
    for name, value in place._asdict().items():
        url = url.replace(f"{{{name}:str}}", value).replace(f"{{{name}:uuid}}", value)
    headers = {"If-Match": '"2"'} if method == "PATCH" else {}
    door = ADMIN[method, path]
    return await caller.request(method, url + door.query, json=door.json, headers=headers)


@pytest.fixture
async def place(
    operator: httpx.AsyncClient, vkyc: Credential, authority: Authority, sql: SQL
) -> Place:
    """vkyc-prod and its credential, the key that signs, and a record that has its place."""
    assert authority.keys.ring.active is not None
    held = (await operator.get(f"{USERS}/{vkyc[0]}/credentials")).json()["credentials"]
    async with asyncio.timeout(10):
        while not (leaves := await sql("SELECT id FROM audit_leaves LIMIT 1")):  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    return Place(vkyc[0], held[0]["id"], authority.keys.ring.active.kid, str(leaves[0]["id"]))


async def test_a1_every_route_is_listed_here(authority: Authority) -> None:
    assert admin_routes(authority) == ADMIN.keys()
    # The console's are in `test_console_own.py` and `tests/browser/pages.py`.
    others = {
        route.path
        for route in authority.litestar.routes
        if not route.path.startswith(("/api/v1", "/console"))
    }
    assert others == PUBLIC
    assert all(isinstance(route, HTTPRoute | ASGIRoute) for route in authority.litestar.routes)


async def test_a1_without_a_token_no_door_opens(
    client: httpx.AsyncClient, place: Place, records: Records
) -> None:
    for (method, path), door in ADMIN.items():
        answer = await knock(client, method, path, place)
        assert answer.status_code == 401, (method, path)
        assert answer.headers["www-authenticate"] == "Bearer"
        request_id = answer.headers["x-request-id"]
        (record,) = await records(action=door.action, request_id=request_id)
        assert (record["outcome"], record["reason"]) == ("refused", "invalid_token")
        assert record["actor"] is None


async def test_a1_a_token_for_another_audience_opens_no_door(
    sign_in: SignIn, enrol: Enrol, vkyc: Credential, place: Place, settings: Settings
) -> None:
    integrator = await sign_in(vkyc)
    elsewhere = await sign_in(
        await enrol(
            "elsewhere",
            scopes=[*AdminScope, "ingest:write"],
            audiences=["https://other.example", settings.api_audience],
        )
    )
    for caller in (integrator, elsewhere):
        for method, path in ADMIN:
            answer = await knock(caller, method, path, place)
            assert answer.status_code == 401, (method, path)
            challenge = answer.headers["www-authenticate"]
            assert challenge.startswith('Bearer error="invalid_token", error_description="aud: ')


async def test_a1_without_its_scope_no_door_opens_and_the_refusal_names_it(
    operator_credential: Credential, sign_in: SignIn, place: Place, records: Records
) -> None:
    for (method, path), door in ADMIN.items():
        if door.scope is None:
            continue
        others = " ".join(scope for scope in AdminScope if scope != door.scope)
        caller = await sign_in(operator_credential, scope=others)
        answer = await knock(caller, method, path, place)
        assert answer.status_code == 403, (method, path)
        assert answer.headers["www-authenticate"] == (
            f'Bearer error="insufficient_scope", scope="{door.scope}"'
        )
        (record,) = await records(action=door.action, request_id=answer.headers["x-request-id"])
        assert (record["outcome"], record["reason"]) == ("refused", "insufficient_scope")
        assert record["actor_id"] == operator_credential[0]


async def test_a1_with_exactly_its_scope_each_door_opens(
    operator_credential: Credential,
    sign_in: SignIn,
    operator: httpx.AsyncClient,
    enrol: Enrol,
    place: Place,
) -> None:
    places: list[Place] = []
    for number in range(len(ADMIN)):
        client_id, _ = await enrol(f"user-{number}", scopes=["ingest:write"])
        held = (await operator.get(f"{USERS}/{client_id}/credentials")).json()["credentials"]
        places.append(Place(client_id, held[0]["id"], place.kid, place.record_id))
    # The keys come last: whoever revokes the one that signs has to sign in again.
    for ((method, path), door), own in zip(ADMIN.items(), places, strict=True):
        scope = {"scope": door.scope} if door.scope else {}
        caller = await sign_in(operator_credential, **scope)
        answer = await knock(caller, method, path, own)
        assert answer.status_code == door.status, (method, path, answer.text)


async def test_me_takes_no_scope_at_all(sign_in: SignIn, enrol: Enrol, settings: Settings) -> None:
    bare = await enrol("bare", audiences=[settings.api_audience])
    caller = await sign_in(bare)
    answer = await caller.get(f"{USERS}/me")
    assert (answer.status_code, answer.json()["name"]) == (200, "bare")
    assert (await caller.get(USERS)).status_code == 403


async def test_a2_fields_that_nobody_asked_for_are_refused(
    operator: httpx.AsyncClient, place: Place
) -> None:
    extra: dict[str, object] = {
        "id": "su_bbbbbbbbbbbbbbbbbbbbbbbb",
        "created_at": "2026-01-01T00:00:00Z",
        "secret_sha256": "00" * 32,
        "status": "active",
        "version": 7,
        "client_secret": "x",
        "Name": "x",
        "__class__": "x",
    }
    before = (await operator.get(f"{USERS}/{place.service_user_id}")).json()
    for (method, path), door in ADMIN.items():
        if door.json is None:
            continue
        for name, value in extra.items():
            url = "/api/v1" + path.replace("{service_user_id:str}", place.service_user_id)
            answer = await operator.request(
                method, url, json={**door.json, name: value}, headers={"If-Match": '"2"'}
            )
            assert answer.status_code == 422, (method, path, name)
            assert name in answer.text
    assert (await operator.get(f"{USERS}/{place.service_user_id}")).json() == before
    names = [user["name"] for user in (await operator.get(USERS)).json()["service_users"]]
    assert names == ["operator", "vkyc-prod"]


@pytest.mark.parametrize("extra", list(AdminScope))
async def test_a7_no_road_leads_upwards(
    extra: AdminScope,
    operator: httpx.AsyncClient,
    enrol_operator: Enrol,
    sign_in: SignIn,
    settings: Settings,
) -> None:
    """The caller has every admin scope but one; the target has that one only, and is disabled."""
    others = [scope for scope in AdminScope if scope != extra]
    own = await enrol_operator("caller", *others)
    caller = await sign_in(own)
    above, _ = await enrol_operator("above", extra)
    plain, _ = await enrol_operator("plain", "ingest:write")

    def etag(version: int) -> dict[str, str]:
        return {"If-Match": f'"{version}"'}

    new = {"name": "new", "source_system": "x", "audiences": [settings.api_audience]}
    roads = {
        "create": await caller.post(USERS, json={**new, "scopes": [extra]}),
        "create with both": await caller.post(USERS, json={**new, "scopes": [*others, extra]}),
        "grant to oneself": await caller.patch(
            f"{USERS}/{own[0]}", json={"scopes": [*others, extra]}, headers=etag(2)
        ),
        "grant to another": await caller.patch(
            f"{USERS}/{plain}", json={"scopes": ["ingest:write", extra]}, headers=etag(2)
        ),
        "change the higher": await caller.patch(
            f"{USERS}/{above}", json={"contact": "me@evil.example"}, headers=etag(2)
        ),
        "take it from the higher": await caller.patch(
            f"{USERS}/{above}", json={"scopes": []}, headers=etag(2)
        ),
        "credential of the higher": await caller.post(
            f"{USERS}/{above}/credentials", json={"label": "mine"}
        ),
        "mint for the higher": await caller.post(f"{USERS}/{above}/tokens", json={}),
        "mint for oneself": await caller.post(f"{USERS}/{own[0]}/tokens", json={}),
        "mint an admin scope": await caller.post(
            f"{USERS}/{plain}/tokens", json={"scope": extra, "resource": settings.api_audience}
        ),
    }
    assert (await operator.post(f"{USERS}/{above}/disable")).status_code == 200
    roads["enable the higher"] = await caller.post(f"{USERS}/{above}/enable")
    for road, answer in roads.items():
        lacks_mint = extra is AdminScope.TOKENS_MINT
        expected = 422 if road == "mint an admin scope" and not lacks_mint else 403
        assert answer.status_code == expected, (road, answer.text)
    found = {u["name"]: u for u in (await operator.get(USERS)).json()["service_users"]}
    assert found.keys() == {"above", "caller", "operator", "plain"}
    assert found["caller"]["scopes"] == others
    assert found["plain"]["scopes"] == ["ingest:write"]
    assert (found["above"]["scopes"], found["above"]["status"]) == ([extra], "disabled")
    held = (await operator.get(f"{USERS}/{above}/credentials")).json()["credentials"]
    assert len(held) == 1


async def test_a7_a_token_with_fewer_scopes_than_its_holder_gives_no_more_than_it_has(
    operator_credential: Credential, sign_in: SignIn, enrol_operator: Enrol, settings: Settings
) -> None:
    caller = await sign_in(operator_credential, scope=WRITE)
    above, _ = await enrol_operator("above", AdminScope.AUDIT_READ)
    new = {"name": "new", "source_system": "x", "audiences": [settings.api_audience]}
    for scopes, status in (([WRITE], 201), ([WRITE, AdminScope.AUDIT_READ], 403)):
        answer = await caller.post(USERS, json={**new, "scopes": scopes})
        assert answer.status_code == status, scopes
    answer = await caller.post(f"{USERS}/{above}/credentials", json={"label": "mine"})
    assert answer.status_code == 403


async def test_a7_disabling_and_revoking_need_only_write(
    operator: httpx.AsyncClient, sign_in: SignIn, enrol_operator: Enrol
) -> None:
    caller = await sign_in(await enrol_operator("guard", WRITE))
    above, _ = await enrol_operator("above", AdminScope.AUDIT_READ)
    held = (await operator.get(f"{USERS}/{above}/credentials")).json()["credentials"]
    revoke = f"{USERS}/{above}/credentials/{held[0]['id']}/revoke"
    assert (await caller.post(revoke)).status_code == 200
    assert (await caller.post(f"{USERS}/{above}/disable")).status_code == 200


async def test_a7_a_minted_token_never_opens_the_admin_api(
    operator: httpx.AsyncClient,
    enrol: Enrol,
    settings: Settings,
    connect_client: Any,
    records: Records,
) -> None:
    bare, _ = await enrol("bare", audiences=[settings.api_audience])
    minted = await operator.post(f"{USERS}/{bare}/tokens", json={})
    assert minted.status_code == 201
    caller = connect_client(Authorization=f"Bearer {minted.json()['access_token']}")
    assert (await caller.get(f"{USERS}/me")).status_code == 401
    # It was issued, so nobody forged it.
    (refused,) = await records(reason="invalid_token", action="service_user.read")
    assert refused["actor"] is None
    await records(0, action="token.forged")


async def _last_holder(
    operator: httpx.AsyncClient, client_id: str, settings: Settings
) -> dict[str, httpx.Response]:
    user = f"{USERS}/{client_id}"
    version = (await operator.get(user)).headers["etag"]
    held = (await operator.get(f"{user}/credentials")).json()["credentials"]
    live = [each["id"] for each in held if each["state"] == "live"]
    without = [scope for scope in AdminScope if scope != WRITE]
    etag = {"If-Match": version}
    return {
        "disable": await operator.post(f"{user}/disable"),
        "strip": await operator.patch(user, json={"scopes": without}, headers=etag),
        "strip all": await operator.patch(user, json={"scopes": []}, headers=etag),
        "revoke": await operator.post(f"{user}/credentials/{live[0]}/revoke"),
        "audience": await operator.patch(
            user, json={"audiences": ["https://other.example"]}, headers=etag
        ),
    }


async def test_a7_the_last_who_can_administer_stays(
    operator: httpx.AsyncClient,
    operator_credential: Credential,
    enrol_operator: Enrol,
    settings: Settings,
    records: Records,
) -> None:
    client_id, _ = operator_credential
    await enrol_operator("reader", READ)
    disabled, _ = await enrol_operator("disabled", WRITE)
    await operator.post(f"{USERS}/{disabled}/disable")
    revoked, _ = await enrol_operator("revoked", WRITE)
    held = (await operator.get(f"{USERS}/{revoked}/credentials")).json()["credentials"]
    await operator.post(f"{USERS}/{revoked}/credentials/{held[0]['id']}/revoke")
    tried = await _last_holder(operator, client_id, settings)
    assert {road: answer.status_code for road, answer in tried.items()} == {
        "disable": 409,
        "strip": 409,
        "strip all": 409,
        "revoke": 409,
        "audience": 422,
    }
    assert (await operator.get(f"{USERS}/me")).json()["status"] == "active"
    await records(4, outcome="refused", reason="conflict")
    await records(1, outcome="refused", reason="invalid")


async def test_a7_once_another_can_administer_the_first_may_go(
    operator: httpx.AsyncClient, operator_credential: Credential, enrol_operator: Enrol
) -> None:
    await enrol_operator("second", WRITE)
    answer = await operator.post(f"{USERS}/{operator_credential[0]}/disable")
    assert answer.status_code == 200
    assert (await operator.get(f"{USERS}/me")).status_code == 401


@pytest.fixture
async def stolen_key(sql: SQL, keks: KeyEncryptionKeys) -> tuple[str, RSAPrivateKey]:
    """The active signing key, as whoever has the database and the KEK would open it."""
    (row,) = await sql(
        "SELECT kid, signer, sealed_private, public_der FROM signing_keys WHERE state = 'active'"
    )
    public_key = load_der_public_key(row["public_der"])
    assert isinstance(public_key, RSAPublicKey)
    kept = KeptKey(
        kid=row["kid"],
        uri=row["signer"],
        public_key=public_key,
        sealed_private=row["sealed_private"],
    )
    return row["kid"], unseal(kept, keks)


async def test_a8_a_token_signed_with_the_stolen_key_opens_no_door(
    operator: httpx.AsyncClient,
    operator_credential: Credential,
    sign_in: SignIn,
    stolen_key: tuple[str, RSAPrivateKey],
    connect_client: Callable[..., httpx.AsyncClient],
    place: Place,
    records: Records,
    sql: SQL,
) -> None:
    kid, key = stolen_key

    def signed(claims: Mapping[str, object]) -> str:
        headers = {"typ": "at+jwt", "kid": kid}
        return jwt.encode(dict(claims), key, algorithm="RS256", headers=headers)

    real = operator.headers["authorization"].removeprefix("Bearer ")
    claims = jwt.decode(real, options={"verify_signature": False})
    narrow = await sign_in(operator_credential, scope=READ)
    narrow_token = narrow.headers["authorization"].removeprefix("Bearer ")
    narrow_claims = jwt.decode(narrow_token, options={"verify_signature": False})
    now = int(time.time())
    forged = {
        "never issued": {**claims, "jti": "0199f0a0-1111-7222-8333-444444444444"},
        "jti of the same month": {**claims, "jti": claims["jti"][:-4] + "0000"},
        "borrowed jti, one scope more": {**narrow_claims, "scope": f"{READ} {WRITE}"},
        "borrowed jti, a later end": {**claims, "iat": now, "exp": now + 3600},
        "borrowed jti, another holder": {
            **claims,
            "sub": place.service_user_id,
            "client_id": place.service_user_id,
        },
        "same claims in another order": dict(reversed(claims.items())),
    }
    for name, forged_claims in forged.items():
        caller = connect_client(Authorization=f"Bearer {signed(forged_claims)}")
        for method, path in ADMIN:
            answer = await knock(caller, method, path, place)
            assert answer.status_code == 401, (name, method, path)
            assert "no record of it" in answer.json()["detail"], name
    logged = await sql(
        "SELECT DISTINCT kid, reason FROM audit_records WHERE action = 'token.forged'"
    )
    reasons = {"never_issued", "differs_from_its_record"}
    assert {tuple(row) for row in logged} == {(kid, reason) for reason in reasons}
    await records(0, outcome="refused", reason="invalid_token")
    assert (await knock(operator, "GET", "/audit-records", place)).status_code == 200


async def test_a8_a_real_token_dies_with_what_stands_behind_it(
    operator: httpx.AsyncClient, sign_in: SignIn, enrol_operator: Enrol, place: Place, sql: SQL
) -> None:
    scopes = list(AdminScope)

    async def revoke(client_id: str) -> None:
        held = (await operator.get(f"{USERS}/{client_id}/credentials")).json()["credentials"]
        url = f"{USERS}/{client_id}/credentials/{held[0]['id']}/revoke"
        assert (await operator.post(url)).status_code == 200

    async def disable(client_id: str) -> None:
        assert (await operator.post(f"{USERS}/{client_id}/disable")).status_code == 200

    async def expire(client_id: str) -> None:
        await sql(
            "UPDATE credentials SET expires_at = clock_timestamp() WHERE service_user_id = $1",
            client_id,
        )

    for end in (revoke, disable, expire):
        credential = await enrol_operator(end.__name__, *scopes)
        caller = await sign_in(credential)
        assert (await caller.get(f"{USERS}/me")).status_code == 200
        await end(credential[0])
        for method, path in ADMIN:
            answer = await knock(caller, method, path, place)
            assert answer.status_code == 401, (end.__name__, method, path)
            assert 'error="invalid_token"' in answer.headers["www-authenticate"]


async def test_a7_a_secret_that_somebody_kept_never_gains_an_admin_scope(
    operator: httpx.AsyncClient, enrol: Enrol, settings: Settings
) -> None:
    client_id, _ = await enrol("kept", audiences=[settings.api_audience])
    url = f"{USERS}/{client_id}"
    (held,) = (await operator.get(f"{url}/credentials")).json()["credentials"]
    grant = {"scopes": [READ]}
    refused = await operator.patch(url, json=grant, headers={"If-Match": '"2"'})
    assert refused.status_code == 409
    assert "live credentials" in refused.json()["detail"]
    assert (await operator.post(f"{url}/credentials/{held['id']}/revoke")).status_code == 200
    granted = await operator.patch(url, json=grant, headers={"If-Match": '"3"'})
    assert (granted.status_code, granted.json()["scopes"]) == (200, [READ])


async def test_a8_a_token_does_what_it_says_and_its_holder_still_may(
    operator: httpx.AsyncClient, sign_in: SignIn, enrol_operator: Enrol
) -> None:
    credential = await enrol_operator("clerk", READ, WRITE, AdminScope.AUDIT_READ)
    whole = await sign_in(credential)
    narrow = await sign_in(credential, scope=f"{READ} {AdminScope.AUDIT_READ}")
    new = {"name": "new", "source_system": "x"}
    assert (await narrow.post(USERS, json=new)).status_code == 403
    assert (await narrow.get("/api/v1/audit-records")).status_code == 200
    changed = await operator.patch(
        f"{USERS}/{credential[0]}", json={"scopes": [READ, WRITE]}, headers={"If-Match": '"2"'}
    )
    assert changed.status_code == 200
    for caller in (whole, narrow):
        assert (await caller.get("/api/v1/audit-records")).status_code == 403
        assert (await caller.get(USERS)).status_code == 200
    assert (await narrow.post(USERS, json=new)).status_code == 403
    assert (await whole.post(USERS, json=new)).status_code == 201


async def test_a7_a_secret_that_somebody_may_have_kept_gets_no_new_right(
    operator: httpx.AsyncClient, sign_in: SignIn, enrol_operator: Enrol
) -> None:
    credential = await enrol_operator("clerk", READ)
    user = f"{USERS}/{credential[0]}"

    async def promote(version: int) -> int:
        body = {"scopes": [READ, AdminScope.AUDIT_READ]}
        answer = await operator.patch(user, json=body, headers={"If-Match": f'"{version}"'})
        return answer.status_code

    assert await promote(2) == 409
    (held,) = (await operator.get(f"{user}/credentials")).json()["credentials"]
    await operator.post(f"{user}/credentials/{held['id']}/revoke")
    assert await promote(3) == 200
    fresh = await operator.post(f"{user}/credentials", json={"label": "fresh"})
    caller = await sign_in((credential[0], fresh.json()["client_secret"]))
    assert (await caller.get("/api/v1/audit-records")).status_code == 200
