"""What verifiers and monitors read without a credential: metadata, keys, health, metrics.

It must not verify a token: `tests/interop` does, with real clients.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import asyncpg
import httpx
import pytest

from keys.verifier import thumbprint
from keys.verifier.jwk import parse_jwks
from service.app import Authority

pytestmark = pytest.mark.anyio

SQL: TypeAlias = Callable[..., Awaitable[list[asyncpg.Record]]]
Credential: TypeAlias = tuple[str, str]

JWKS = "/.well-known/jwks.json"
METADATA = ("/.well-known/oauth-authorization-server", "/.well-known/openid-configuration")
ISSUER = "http://127.0.0.1:8080"

CUT_OFF = """
DO $$ BEGIN
    UPDATE pg_database SET datallowconn = false WHERE datname = current_database();
    COMMIT;
    PERFORM pg_terminate_backend(pid) FROM pg_stat_activity
      WHERE datname = current_database() AND pid <> pg_backend_pid();
END $$
"""


async def test_metadata_is_that_of_rfc_8414_under_both_names(client: httpx.AsyncClient) -> None:
    for path in METADATA:
        answer = await client.get(path)
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "application/json"
        assert answer.json() == {
            "issuer": ISSUER,
            "token_endpoint": f"{ISSUER}/oauth/token",
            "jwks_uri": f"{ISSUER}{JWKS}",
            "response_types_supported": [],
            "grant_types_supported": ["client_credentials"],
            "token_endpoint_auth_methods_supported": ["client_secret_basic", "client_secret_post"],
            "service_documentation": f"{ISSUER}/schema/openapi.json",
        }
        for url in ("token_endpoint", "jwks_uri", "service_documentation"):
            method = "OPTIONS" if url == "token_endpoint" else "GET"
            found = await client.request(method, answer.json()[url])
            assert found.status_code in (200, 204), url


async def test_what_is_public_can_be_cached_and_read_from_any_page(
    client: httpx.AsyncClient,
) -> None:
    for path in (JWKS, *METADATA):
        answer = await client.get(path)
        assert answer.status_code == 200
        assert answer.headers["cache-control"] == "public, max-age=300"
        assert answer.headers["access-control-allow-origin"] == "*"
        assert answer.headers["content-length"] == str(len(answer.content))
        assert answer.headers["x-request-id"]
        etag = answer.headers["etag"]
        assert etag.startswith('"')
        for condition in (etag, f'"other", {etag}', f"W/{etag}"):
            again = await client.get(path, headers={"If-None-Match": condition})
            assert (again.status_code, again.content) == (304, b""), condition
            assert again.headers["etag"] == etag
            assert again.headers["cache-control"] == "public, max-age=300"
            assert "content-length" not in again.headers
        for condition in ('"other"', etag[:-2] + '"', ""):
            again = await client.get(path, headers={"If-None-Match": condition})
            assert (again.status_code, again.content) == (200, answer.content), condition


async def test_head_options_and_other_methods(client: httpx.AsyncClient) -> None:
    for path in (JWKS, *METADATA, "/healthz", "/readyz", "/metrics"):
        got = await client.get(path)
        head = await client.head(path)
        assert (head.status_code, head.content) == (got.status_code, b""), path
        assert head.headers["content-type"] == got.headers["content-type"]
        assert int(head.headers["content-length"]) > 0
        options = await client.options(path)
        assert (options.status_code, options.headers["allow"]) == (204, "GET, HEAD, OPTIONS")
        for method in ("POST", "PUT", "PATCH", "DELETE", "TRACE"):
            answer = await client.request(method, path)
            assert (answer.status_code, answer.content) == (405, b""), (method, path)
            assert answer.headers["allow"] == "GET, HEAD, OPTIONS"


async def test_j11_the_members_of_a_key_are_these_six_in_every_state(
    client: httpx.AsyncClient, authority: Authority, sql: SQL
) -> None:
    async def published() -> dict[str, str]:
        await authority.keys.fresh()
        answer = await client.get(JWKS)
        assert answer.headers["content-type"] == "application/jwk-set+json"
        document = answer.json()
        assert document.keys() == {"keys"}
        for key in document["keys"]:
            assert set(key) == {"kty", "use", "alg", "kid", "n", "e"}
            assert (key["kty"], key["use"], key["alg"], key["e"]) == ("RSA", "sig", "RS256", "AQAB")
        for kid, public_key in parse_jwks(answer.content).items():
            assert kid == thumbprint(public_key)
        rows = await sql("SELECT kid, state FROM signing_keys")
        states = {row["kid"]: row["state"] for row in rows}
        return {key["kid"]: states[key["kid"]] for key in document["keys"]}

    def set_state(state: str) -> Awaitable[Any]:
        return sql(
            "UPDATE signing_keys SET state = $1, sealed_private = NULL, "
            "publish_until = clock_timestamp() + interval '1 h' WHERE state NOT IN ('pending')",
            state,
        )

    assert sorted((await published()).values()) == ["active", "pending"]
    await set_state("retiring")
    assert sorted((await published()).values()) == ["pending", "retiring"]
    for ended in ("retired", "revoked"):
        await set_state(ended)
        assert sorted((await published()).values()) == ["pending"]


async def test_the_etag_changes_with_the_keys(
    client: httpx.AsyncClient, authority: Authority, sql: SQL
) -> None:
    before = await client.get(JWKS)
    await sql(
        "UPDATE signing_keys SET state = 'revoked', sealed_private = NULL WHERE state = 'pending'"
    )
    await authority.keys.fresh()
    after = await client.get(JWKS, headers={"If-None-Match": before.headers["etag"]})
    assert after.status_code == 200
    assert len(after.json()["keys"]) == len(before.json()["keys"]) - 1


async def test_health_says_what_stands_behind_it_and_nothing_secret(
    client: httpx.AsyncClient, operator: httpx.AsyncClient
) -> None:
    assert (await client.get("/healthz")).json() == {"alive": True}
    answer = await client.get("/readyz")
    assert answer.status_code == 200
    assert answer.headers["cache-control"] == "no-store"
    keys = (await operator.get("/api/v1/signing-keys")).json()["signing_keys"]
    state = answer.json()
    assert state == {
        "ready": True,
        "key_ring": True,
        "schema": True,
        "draining": False,
        "postgres": True,
        "ring_age_seconds": state["ring_age_seconds"],
        "can_sign": True,
        "signing_kid": next(key["kid"] for key in keys if key["state"] == "active"),
        "concerns": [],
        "audit_log": None,
        "sequencer": None,
    }


async def test_p6_keys_and_metadata_outlive_postgres_and_an_exchange_fails_quickly(
    client: httpx.AsyncClient,
    operator: httpx.AsyncClient,
    operator_credential: Credential,
    sql: SQL,
) -> None:
    jwks = (await client.get(JWKS)).content
    grant = {"grant_type": "client_credentials"}
    before = await client.post("/oauth/token", auth=operator_credential, data=grant)
    assert before.status_code == 200
    await sql(CUT_OFF)
    loop = asyncio.get_running_loop()
    started = loop.time()
    answer = await client.post("/oauth/token", auth=operator_credential, data=grant)
    assert loop.time() - started < 3
    assert answer.status_code == 503
    assert answer.json()["error"] == "temporarily_unavailable"
    assert 1 <= int(answer.headers["retry-after"]) <= 5
    assert answer.headers["cache-control"] == "no-store"
    assert (await client.get(JWKS)).content == jwks
    assert (await client.get(METADATA[0])).status_code == 200
    assert (await operator.get("/api/v1/service-users")).status_code == 503
    async with asyncio.timeout(5):  # until every writer has seen that its connection is gone
        while (ready := await client.get("/readyz")).json()["postgres"]:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert ready.status_code == 200


async def test_l2_random_client_ids_and_paths_make_no_metric_series(
    client: httpx.AsyncClient, operator: httpx.AsyncClient, vkyc: Credential
) -> None:
    async def series() -> set[str]:
        text = (await client.get("/metrics")).text
        return {line.rpartition(" ")[0] for line in text.splitlines() if line[:1] not in ("#", "")}

    async def try_everything(number: int) -> None:
        form = {"grant_type": "client_credentials", "client_id": f"su_{number:a>24}"}
        for more in ({}, {"client_secret": "x"}, {"scope": f"s{number}"}):
            await client.post("/oauth/token", data={**form, **more})
        await client.post("/oauth/token", auth=vkyc, data={**form, "client_id": vkyc[0]})
        await client.get(f"/{number}")
        await operator.get(f"/api/v1/service-users/su_{number:a>24}")
        await operator.get("/api/v1/service-users", params={f"p{number}": "x"})

    await try_everything(0)
    before = await series()
    assert any(line.startswith("privyseal_token_requests_total") for line in before)
    for number in range(1, 60):
        await try_everything(number)
    assert await series() == before
