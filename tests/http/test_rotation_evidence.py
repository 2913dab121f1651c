"""A rotation that looks at evidence, and what of it shows outside: API, readiness, metrics."""

import asyncio
import re
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias, cast

import asyncpg
import httpx
import jwt
import msgspec
import pytest
import structlog

from keys.envelope import KeyEncryptionKeys
from keys.keyring import Concern, Wait
from keys.verifier import parse_jwks
from service.app import Authority
from service.authority.audit import new_record_id
from service.settings import Settings
from service.store.embedded import Running

pytestmark = pytest.mark.anyio

Credential: TypeAlias = tuple[str, str]
SQL: TypeAlias = Callable[..., Awaitable[list[asyncpg.Record]]]
Report: TypeAlias = Callable[..., Awaitable[None]]

KEYS = "/api/v1/signing-keys"
DUE = (
    "UPDATE signing_keys SET rotate_at = clock_timestamp() - $1::text::interval,"
    " published_at = least(published_at, clock_timestamp() - interval '40 days')"
)


def kids(authority: Authority) -> tuple[str, str]:
    """The kids of the key that signs and of the next one."""
    ring = authority.keys.ring
    assert ring.active is not None
    assert ring.pending is not None
    return ring.active.kid, ring.pending.kid


def signing_kid(authority: Authority) -> str | None:
    return authority.health().signing_kid


@pytest.fixture
async def report(
    enrol_operator: Callable[..., Awaitable[Credential]],
    sign_in: Callable[..., Awaitable[httpx.AsyncClient]],
) -> Report:
    """Report, as an instance of the service `ingest`, that it has loaded some keys."""
    client = await sign_in(await enrol_operator("ingest", "audit:report"))

    async def reported(instance: str, *loaded: str) -> None:
        event = {
            "type": "jwks.loaded",
            "id": str(new_record_id(time.time())),
            "occurred_at": "2026-11-24T19:00:00Z",
            "instance": instance,
            "kids": loaded,
        }
        answer = await client.post("/api/v1/audit-events", json={"events": [event]})
        assert [each["status"] for each in answer.json()["results"]] == ["recorded"]

    return reported


async def activation(sql: SQL, kid: str) -> dict[str, Any]:
    (row,) = await sql(
        "SELECT details FROM audit_records WHERE action = 'signing_key.activate' AND kid = $1", kid
    )
    return msgspec.json.decode(row["details"])


async def following(operator: httpx.AsyncClient) -> dict[str, Any]:
    listed = (await operator.get(KEYS)).json()["signing_keys"]
    return next(key for key in listed if key["state"] == "pending")


async def test_a_rotation_waits_for_a_verifier_that_lacks_the_next_key_and_shows_it(
    authority: Authority, operator: httpx.AsyncClient, report: Report, sql: SQL
) -> None:
    active, pending = kids(authority)
    await report("has-it-0", active, pending)
    await report("lacks-it", active)
    await sql(DUE, "1 day")
    step = await authority.rotator.tick()
    assert isinstance(step, Wait)
    assert step.awaited == {"ingest/lacks-it"}
    shown = (await following(operator))["verifiers"]
    assert [(each["instance"], each["has_loaded"]) for each in shown] == [
        ("lacks-it", False),
        ("has-it-0", True),
    ]
    assert shown[0]["missing_since"] <= shown[0]["last_heard_at"]
    assert shown[1]["missing_since"] is None
    assert (await operator.get("/readyz")).json()["concerns"] == [
        "verifiers that lack the next key delay the rotation"
    ]

    await report("lacks-it", active, pending)
    await authority.rotator.tick()
    assert signing_kid(authority) == pending, "nobody lacks it any more"
    assert await activation(sql, pending) == {"cause": "due"}


async def test_evidence_delays_for_a_tenth_of_the_period_and_then_is_put_on_record(
    authority: Authority, report: Report, sql: SQL
) -> None:
    active, pending = kids(authority)
    await report("lacks-it", active)
    await sql(DUE, "3 days -5 seconds")  # a tenth of 30 days
    assert isinstance(await authority.rotator.tick(), Wait)
    assert signing_kid(authority) == active
    await sql(DUE, "3 days 1 second")
    await authority.rotator.tick()
    assert signing_kid(authority) == pending
    assert await activation(sql, pending) == {
        "cause": "due",
        "not_awaited": ["ingest/lacks-it"],
        "not_awaited_count": 1,
    }


async def test_a_verifier_that_was_not_heard_from_for_two_hours_is_not_awaited(
    authority: Authority, report: Report, sql: SQL
) -> None:
    active, pending = kids(authority)
    await report("lacks-it", active)
    await sql(
        "UPDATE audit_records SET recorded_at = clock_timestamp() - interval '2 hours 1 second'"
        " WHERE action = 'jwks.loaded'"
    )
    await sql(DUE, "1 second")
    await authority.rotator.tick()
    assert signing_kid(authority) == pending


async def test_an_operator_who_rotates_waits_for_no_verifier_and_is_told_whom(
    authority: Authority, operator: httpx.AsyncClient, report: Report, sql: SQL
) -> None:
    active, pending = kids(authority)
    await report("lacks-it", active)
    await sql(DUE, "1 second")
    assert isinstance(await authority.rotator.tick(), Wait)
    answer = await operator.post(f"{KEYS}/rotate", json={"reason": "enough waited"})
    assert [each["instance"] for each in answer.json()["missing"]] == ["lacks-it"]
    await authority.rotator.tick()
    assert signing_kid(authority) == pending
    details = await activation(sql, pending)
    assert details["cause"] == "asked for by an operator"
    assert details["not_awaited"] == ["ingest/lacks-it"]


async def test_another_key_size_counts_for_the_next_key_and_both_verify_meanwhile(
    operator_credential: Credential,
    settings: Settings,
    sql: SQL,
    database: Running,
    keks: KeyEncryptionKeys,
) -> None:
    changed = msgspec.structs.replace(settings, key_bits=3072)
    authority = Authority(changed, dsn=database.service_dsn, read_keks=lambda: keks)
    transport = httpx.ASGITransport(app=cast("Any", authority.asgi))
    tokens: list[str] = []
    async with (
        authority.litestar.lifespan(),
        httpx.AsyncClient(transport=transport, base_url=settings.issuer) as client,
    ):
        # First the two keys that were there before, then one that was made since.
        for _ in range(3):
            tokens.append(await exchange(client, operator_credential))
            async with asyncio.timeout(20):
                while authority.keys.ring.pending is None:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            await sql(DUE, "1 second")
            await authority.rotator.tick()
        keys = parse_jwks((await client.get("/.well-known/jwks.json")).content)
    signed_with = [keys[jwt.get_unverified_header(token)["kid"]] for token in tokens]
    assert [key.key_size for key in signed_with] == [2048, 2048, 3072]
    for token, key in zip(tokens, signed_with, strict=True):
        jwt.decode(token, key, algorithms=["RS256"], audience=settings.api_audience)


async def exchange(client: httpx.AsyncClient, credential: Credential) -> str:
    answer = await client.post(
        "/oauth/token", auth=credential, data={"grant_type": "client_credentials"}
    )
    assert answer.status_code == 200, answer.text
    return answer.json()["access_token"]


# Seen from outside


async def figures(client: httpx.AsyncClient) -> dict[str, float]:
    """The metrics of signing keys, by series."""
    text = (await client.get("/metrics")).text
    found = re.findall(r"^(privyseal_\S+) (\S+)$", text, re.MULTILINE)
    return {series: float(value) for series, value in found}


async def test_metrics_show_each_key_its_age_and_when_the_next_one_may_sign(
    authority: Authority, client: httpx.AsyncClient, operator_credential: Credential, sql: SQL
) -> None:
    active, pending = kids(authority)
    await sql(
        "UPDATE signing_keys SET published_at = clock_timestamp() - interval '10 hours'"
        " WHERE state = 'pending'"
    )
    await sql(
        "UPDATE signing_keys SET rotate_at = clock_timestamp() + interval '20 hours'"
        " WHERE state = 'active'"
    )
    await authority.keys.fresh()
    before = await figures(client)
    age = 'privyseal_signing_key_age_seconds{kid="%s",state="%s"}'
    assert before[age % (pending, "pending")] == pytest.approx(36_000, abs=30)
    assert before[age % (active, "active")] > 0
    assert before["privyseal_can_sign"] == 1
    assert before["privyseal_next_activation_seconds"] == pytest.approx(72_000, abs=30)
    assert before["privyseal_ring_read_at_seconds"] == pytest.approx(time.time(), abs=30)
    concerns = [name for name in before if name.startswith("privyseal_signing_key_concern{")]
    assert len(concerns) == len(Concern)
    assert sum(before[name] for name in concerns) == 0
    await exchange(client, operator_credential)
    signed = f'privyseal_signatures_total{{kid="{active}"}}'
    assert (await figures(client))[signed] == before.get(signed, 0) + 1


async def test_readiness_and_a_metric_say_when_no_key_may_sign_and_keys_are_served_all_the_same(
    authority: Authority, client: httpx.AsyncClient, sql: SQL
) -> None:
    authority.rotator.tick = authority.keys.fresh  # type: ignore[assignment]  # it would mend it
    await sql(
        "UPDATE signing_keys SET state = 'revoked', sealed_private = NULL WHERE state = 'active'"
    )
    await authority.keys.fresh()
    state = await client.get("/readyz")
    assert state.status_code == 200, "who verifies must still find the keys"
    assert (state.json()["can_sign"], state.json()["signing_kid"]) == (False, None)
    assert state.json()["concerns"] == ["no key signs"]
    found = await figures(client)
    assert found["privyseal_can_sign"] == 0
    assert found['privyseal_signing_key_concern{concern="no_key_signs"}'] == 1
    assert len(parse_jwks((await client.get("/.well-known/jwks.json")).content)) == 1


async def test_a_next_key_that_cannot_be_used_is_a_warning_once_weeks_before_its_turn(
    operator_credential: Credential,
    settings: Settings,
    database: Running,
    keks: KeyEncryptionKeys,
    sql: SQL,
) -> None:
    assert operator_credential[0], "the keys stand there before anyone starts"
    await sql(
        "UPDATE signing_keys SET sealed_private = set_bit(sealed_private, 300,"
        " 1 - get_bit(sealed_private, 300)) WHERE state = 'pending'"
    )
    authority = Authority(settings, dsn=database.service_dsn, read_keks=lambda: keks)
    with structlog.testing.capture_logs() as logs:
        async with authority.litestar.lifespan():
            await authority.rotator.tick()
            await authority.rotator.tick()
            health = authority.health()
            figures = authority.rotator.figures()
    warnings = [log for log in logs if log["event"] == "signing_keys_need_attention"]
    assert [(log["log_level"], log["concerns"]) for log in warnings] == [
        ("warning", ["the next key cannot be used by this process"])
    ]
    assert health.can_sign
    assert [name for name, stands in figures.concerns.items() if stands] == ["next_key_unusable"]
