"""Credentials that are held after a restore, and operators who confirm them."""

from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import asyncpg
import httpx
import pytest

from service.authority.confirmation import PAGE

pytestmark = pytest.mark.anyio

Credential: TypeAlias = tuple[str, str]
Enrol: TypeAlias = Callable[..., Awaitable[Credential]]
SignIn: TypeAlias = Callable[..., Awaitable[httpx.AsyncClient]]
Records: TypeAlias = Callable[..., Awaitable[list[dict[str, Any]]]]
SQL: TypeAlias = Callable[..., Awaitable[list[asyncpg.Record]]]

USERS = "/api/v1/service-users"
ALL = "/api/v1/credentials/confirm"
REASON = {"reason": "asked by phone"}

# What accepting a restored database does to them; the caller's own stays as `bootstrap` makes it.
HOLD = """
WITH held AS (
    UPDATE credentials SET held_at = clock_timestamp() WHERE service_user_id <> ALL ($1)
    RETURNING service_user_id
)
UPDATE service_users SET version = version + 1 WHERE id IN (SELECT service_user_id FROM held)
"""


@pytest.fixture
def hold(sql: SQL, operator_credential: Credential) -> Callable[..., Awaitable[None]]:
    """Hold every credential but those of the first operator and of these."""

    async def held(*but: Credential) -> None:
        await sql(HOLD, [operator_credential[0], *(client_id for client_id, _ in but)])

    return held


async def exchange(client: httpx.AsyncClient, credential: Credential) -> httpx.Response:
    grant = {"grant_type": "client_credentials"}
    return await client.post("/oauth/token", auth=credential, data=grant)


async def credential_of(operator: httpx.AsyncClient, holder: Credential) -> dict[str, Any]:
    (only,) = (await operator.get(f"{USERS}/{holder[0]}/credentials")).json()["credentials"]
    return only


async def test_a_held_credential_is_refused_until_it_is_confirmed_and_both_are_on_record(
    operator: httpx.AsyncClient,
    client: httpx.AsyncClient,
    vkyc: Credential,
    hold: Callable[..., Awaitable[None]],
    records: Records,
) -> None:
    assert (await exchange(client, vkyc)).status_code == 200
    await hold()
    refused = await exchange(client, vkyc)
    assert refused.status_code == 401
    assert refused.json()["error"] == "invalid_client"
    assert "kyc-team@example.com" in refused.json()["error_description"]
    guessed = await exchange(client, (vkyc[0], "pvs_guessed"))
    assert "held" not in guessed.json()["error_description"]
    held = await credential_of(operator, vkyc)
    assert held["state"] == "held"
    assert held["held_at"]
    confirm = f"{USERS}/{vkyc[0]}/credentials/{held['id']}/confirm"
    for _ in range(2):
        confirmed = await operator.post(confirm, json=REASON)
        assert confirmed.status_code == 200
        assert (confirmed.json()["state"], confirmed.json()["held_at"]) == ("live", None)
    assert (await exchange(client, vkyc)).status_code == 200
    (record,) = await records(action="credential.confirm")
    assert (record["service_user"], record["credential_id"]) == ("vkyc-prod", held["id"])
    assert (record["reason"], record["actor"]) == ("asked by phone", "operator")
    (refusal,) = await records(reason="credential_held")
    assert refusal["service_user"] == "vkyc-prod"


async def test_a_held_operator_is_let_in_nowhere_even_with_a_token_from_before(
    enrol_operator: Enrol, sign_in: SignIn, hold: Callable[..., Awaitable[None]]
) -> None:
    caller = await sign_in(await enrol_operator("reader", "service-users:read"))
    assert (await caller.get(USERS)).status_code == 200
    await hold()
    assert (await caller.get(USERS)).status_code == 401


async def test_whoever_confirms_holds_every_admin_scope_of_the_service_user(
    enrol_operator: Enrol,
    sign_in: SignIn,
    operator: httpx.AsyncClient,
    vkyc: Credential,
    hold: Callable[..., Awaitable[None]],
) -> None:
    own = await enrol_operator("caller", "service-users:read", "service-users:write")
    above = await enrol_operator("above", "audit:read")
    caller = await sign_in(own)
    await hold(own)
    held = await credential_of(operator, above)
    confirm = f"{USERS}/{above[0]}/credentials/{held['id']}/confirm"
    refused = await caller.post(confirm, json=REASON)
    assert refused.status_code == 403
    assert 'scope="audit:read"' in refused.headers["www-authenticate"]
    answer = await caller.post(ALL, json=REASON)
    assert answer.json() == {
        "confirmed": 1,
        "left": [
            {
                "id": held["id"],
                "label": "first",
                "service_user_id": above[0],
                "service_user": "above",
            }
        ],
    }
    assert (await credential_of(operator, above))["state"] == "held"
    assert (await credential_of(operator, vkyc))["state"] == "live"
    assert (await operator.post(confirm, json=REASON)).status_code == 200


async def test_all_are_confirmed_of_one_service_user_or_of_everybody_page_by_page(
    operator: httpx.AsyncClient,
    enrol: Enrol,
    vkyc: Credential,
    hold: Callable[..., Awaitable[None]],
    sql: SQL,
) -> None:
    branch = await enrol("branch-7")
    await sql(
        "INSERT INTO credentials SELECT 'cr_' || translate(lpad(n::text, 24, 'a'), '0189', 'bcde'),"
        " $1, 'many', sha256(n::text::bytea), now(), now() + interval '1 day'"
        " FROM generate_series(1, $2) n",
        branch[0],
        PAGE,
    )
    await hold()
    one = await operator.post(ALL, json={**REASON, "service_user_id": vkyc[0]})
    assert one.json() == {"confirmed": 1, "left": []}
    everybody = await operator.post(ALL, json=REASON)
    assert everybody.json() == {"confirmed": PAGE + 1, "left": []}
    assert await sql("SELECT FROM credentials WHERE held_at IS NOT NULL") == []
    assert (await operator.post(ALL, json=REASON)).json() == {"confirmed": 0, "left": []}


async def test_what_has_ended_cannot_be_confirmed(
    operator: httpx.AsyncClient, vkyc: Credential, hold: Callable[..., Awaitable[None]]
) -> None:
    held = await credential_of(operator, vkyc)
    await hold()
    path = f"{USERS}/{vkyc[0]}/credentials/{held['id']}"
    assert (await operator.post(f"{path}/revoke")).json()["state"] == "revoked"
    assert (await operator.post(f"{path}/confirm", json=REASON)).status_code == 409
    assert (await operator.post(ALL, json=REASON)).json()["confirmed"] == 0
    assert (await credential_of(operator, vkyc))["state"] == "revoked"


async def test_held_credentials_count_among_the_ten_and_take_no_admin_scope_meanwhile(
    operator: httpx.AsyncClient,
    vkyc: Credential,
    hold: Callable[..., Awaitable[None]],
    settings: Any,
) -> None:
    url = f"{USERS}/{vkyc[0]}"
    for number in range(9):
        await operator.post(f"{url}/credentials", json={"label": str(number)})
    await hold()
    assert (await operator.post(f"{url}/credentials", json={"label": "11"})).status_code == 409
    etag = (await operator.get(url)).headers["etag"]
    change = {"scopes": ["audit:read"], "audiences": [settings.api_audience]}
    risen = await operator.patch(url, json=change, headers={"If-Match": etag})
    assert risen.status_code == 409
