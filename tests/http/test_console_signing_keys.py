"""Signing keys in the console: what it shows, what it does, and that it asks before it does it."""

import html
import re
import time
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any, TypeAlias

import asyncpg
import httpx
import jwt
import pytest

from service.app import Authority
from service.authority.audit import new_record_id
from tests.http.console_client import ConsoleClient

pytestmark = pytest.mark.anyio

Credential: TypeAlias = tuple[str, str]
EnrolOperator: TypeAlias = Callable[..., Awaitable[Credential]]
Records: TypeAlias = Callable[..., Awaitable[list[dict[str, Any]]]]
SQL: TypeAlias = Callable[..., Awaitable[list[asyncpg.Record]]]
SignIn: TypeAlias = Callable[..., Awaitable[httpx.AsyncClient]]

KEYS = "/signing-keys"
WHY = "seen in a backup"
DUE = (
    "UPDATE signing_keys SET rotate_at = clock_timestamp() - $1::interval,"
    " published_at = least(published_at, clock_timestamp() - interval '40 days')"
)

# The API's clients of these tests have tokens of a key that is revoked.
SELECT_DONE = "SELECT kid, reason, actor FROM audit_records WHERE outcome = 'success' AND action ="


def words(answer: httpx.Response) -> str:
    """What the page says, without its tags and line breaks."""
    text = re.sub(r"<(head|svg).*?</\1>|<[^>]*>", " ", answer.text, flags=re.DOTALL)
    return re.sub(r" (?=[).,:])|(?<=\() ", "", " ".join(html.unescape(text).split()))


def kids(authority: Authority) -> tuple[str, str]:
    """The kids of the key that signs and of the next one."""
    ring = authority.keys.ring
    assert ring.active is not None
    assert ring.pending is not None
    return ring.active.kid, ring.pending.kid


@pytest.fixture
async def lacks_it(authority: Authority, enrol_operator: EnrolOperator, sign_in: SignIn) -> str:
    """A verifier that reported that it has the key that signs and not the next one."""
    client = await sign_in(await enrol_operator("ingest", "audit:report"))
    event = {
        "type": "jwks.loaded",
        "id": str(new_record_id(time.time())),
        "occurred_at": "2026-11-24T19:00:00Z",
        "instance": "lacks-it",
        "kids": [kids(authority)[0]],
    }
    answer = await client.post("/api/v1/audit-events", json={"events": [event]})
    assert [each["status"] for each in answer.json()["results"]] == ["recorded"]
    return "ingest/lacks-it"


# Looking


async def test_the_ring_is_shown_with_what_signs_what_will_and_when(
    authority: Authority, operator_at_console: ConsoleClient
) -> None:
    active, pending = kids(authority)
    answer = await operator_at_console.get(KEYS)
    assert answer.status_code == 200
    said = words(answer)
    assert f"Signs now {active[:8]}… since" in said
    assert re.search(rf"Signs next {pending[:8]}… from 2\d{{3}}-.* \(in (29|30) days\)", said)
    assert "Waits for nobody: no verifier is known to lack the next key" in said
    for kid in (active, pending):
        assert f">{kid}</pre>" in answer.text, "the whole kid can be copied"
    assert "<svg" in answer.text
    assert len(answer.content) < 30_000


async def test_keys_that_ended_are_shown_for_ninety_days(
    authority: Authority, operator_at_console: ConsoleClient, sql: SQL
) -> None:
    active, _ = kids(authority)
    await operator_at_console.post(
        f"{KEYS}/{active}/revoke", {"reason": WHY, "confirm": active[:8]}
    )
    said = words(await operator_at_console.get(KEYS))
    assert re.search(rf"{active[:8]}….* revoked .* ended .* nothing left", said)
    await sql(
        "UPDATE signing_keys SET ended_at = clock_timestamp() - interval '91 days'"
        " WHERE state = 'revoked'"
    )
    assert active[:8] not in words(await operator_at_console.get(KEYS))


async def test_whom_a_rotation_waits_for_is_named_with_until_when_and_on_home_once_it_is_due(
    authority: Authority, operator_at_console: ConsoleClient, lacks_it: str, sql: SQL
) -> None:
    said = words(await operator_at_console.get(KEYS))
    assert re.search(r"Waits for 1 verifier that lacks it, until 2\d{3}-.* at the latest", said)
    assert lacks_it in said
    assert "The rotation waits" not in said, "it is not due"
    await sql(DUE, timedelta(days=1))
    await authority.rotator.tick()
    for path in (KEYS, "/"):
        said = words(await operator_at_console.get(path))
        assert "The rotation waits for 1 verifier" in said
        assert lacks_it in said


# Rotating


async def test_a_rotation_is_asked_for_with_a_reason_and_says_when_and_for_whom_it_will_not_wait(
    authority: Authority,
    operator_at_console: ConsoleClient,
    lacks_it: str,
    records: Records,
) -> None:
    active, pending = kids(authority)
    before = words(await operator_at_console.get(KEYS))
    assert re.search(
        r"If you rotate now, the next key signs .* That cannot be taken back\.", before
    )
    answer = await operator_at_console.post(f"{KEYS}/rotate", {"reason": f" {WHY} "})
    assert (answer.status_code, answer.headers["location"]) == (303, "/console/signing-keys")
    said = words(await operator_at_console.get(KEYS))
    assert re.search(rf"A rotation was asked for .* {pending[:8]}… signs from 2\d{{3}}-", said)
    assert f"It does not wait for 1 verifier that lacks it: {lacks_it}" in said
    assert "it needs nothing more" in said
    (record,) = await records(action="signing_key.rotate")
    assert (record["kid"], record["reason"], record["actor"]) == (active, WHY, "operator")


@pytest.mark.parametrize("reason", ["", "ab", "x" * 201])
async def test_without_a_fitting_reason_nothing_is_done_and_what_was_typed_is_still_there(
    authority: Authority, operator_at_console: ConsoleClient, reason: str, records: Records
) -> None:
    active, _ = kids(authority)
    for act, typed in (
        ("rotate", ""),
        ("revoke-all", "revoke all"),
        (f"{active}/revoke", active[:8]),
    ):
        answer = await operator_at_console.post(
            f"{KEYS}/{act}", {"reason": reason, "confirm": typed, "signing": active}
        )
        assert answer.status_code == 422, act
        assert "Say why in 3 to 200 characters." in words(answer)
        assert f'value="{reason}"' in answer.text
        assert not typed or f'value="{typed}"' in answer.text
    ring = (await authority.keys.fresh()).active
    assert ring is not None
    assert (ring.kid, ring.released_at) == (active, None)
    assert len(await records(3, outcome="refused", reason="invalid")) == 3


async def test_without_a_next_key_a_rotation_is_a_conflict_beside_the_form(
    operator_at_console: ConsoleClient, authority: Authority, sql: SQL
) -> None:
    authority.rotator.tick = authority.keys.fresh  # type: ignore[method-assign]
    await sql("DELETE FROM signing_keys WHERE state = 'pending'")
    answer = await operator_at_console.post(f"{KEYS}/rotate", {"reason": WHY})
    assert answer.status_code == 409
    assert "There is no next key yet." in words(answer)


# Revoking


async def test_what_a_revocation_costs_is_told_before(
    authority: Authority,
    operator_at_console: ConsoleClient,
    vkyc: Credential,
    client: httpx.AsyncClient,
) -> None:
    active, pending = kids(authority)
    for _ in range(3):
        exchanged = await client.post(
            "/oauth/token", auth=vkyc, data={"grant_type": "client_credentials"}
        )
        assert exchanged.status_code == 200
    said = words(await operator_at_console.get(f"{KEYS}/{active}/revoke"))
    assert "held by 2 service users, each of which has to exchange again" in said
    assert re.search(r"vkyc-prod 3 2\d{3}-", said)
    assert f"{pending[:8]}…, at once: it is not published long enough" in said
    assert "Could that one have leaked with this one? Then revoke all keys." in said
    assert f"Type “{active[:8]}” to confirm" in said
    said = words(await operator_at_console.get(f"{KEYS}/{pending}/revoke"))
    assert "none: nobody has to exchange again" in said
    assert "the same key as now" in said
    assert "leaked with" not in said
    said = words(await operator_at_console.get(f"{KEYS}/revoke-all"))
    assert active in said
    assert pending in said
    assert "a new key, at once" in said


async def test_of_very_many_tokens_the_newest_are_counted(
    authority: Authority,
    operator_at_console: ConsoleClient,
    vkyc: Credential,
    client: httpx.AsyncClient,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("service.authority.key_administration.MAX_TOKENS_COUNTED", 2)
    for _ in range(3):
        await client.post("/oauth/token", auth=vkyc, data={"grant_type": "client_credentials"})
    said = words(await operator_at_console.get(f"{KEYS}/{kids(authority)[0]}/revoke"))
    assert "at least 2, held by 1 service user," in said
    assert "as far as the newest ones tell" in said


@pytest.mark.parametrize("typed", ["", "revoke", "REVOKE ALL", "wrong678"])
async def test_nothing_is_revoked_unless_it_is_typed(
    authority: Authority, operator_at_console: ConsoleClient, typed: str
) -> None:
    before = kids(authority)
    for act in ("revoke-all", f"{before[0]}/revoke"):
        answer = await operator_at_console.post(
            f"{KEYS}/{act}", {"reason": WHY, "confirm": typed, "signing": before[0]}
        )
        assert answer.status_code == 422
        assert 'aria-invalid="true"' in answer.text
        assert f'value="{WHY}"' in answer.text
    await authority.keys.fresh()
    assert kids(authority) == before


async def test_whoever_revokes_a_key_stays_signed_in_and_others_of_that_key_sign_in_again(
    authority: Authority,
    operator_at_console: ConsoleClient,
    new_person: Callable[[], ConsoleClient],
    enrol_operator: EnrolOperator,
    vkyc: Credential,
    client: httpx.AsyncClient,
    sql: SQL,
) -> None:
    active, pending = kids(authority)
    other = new_person()
    await other.sign_in(await enrol_operator("second", "signing-keys:read"))
    assert (await other.get(KEYS)).status_code == 200
    grant = {"grant_type": "client_credentials"}
    assert (await client.post("/oauth/token", auth=vkyc, data=grant)).status_code == 200

    answer = await operator_at_console.post(
        f"{KEYS}/{active}/revoke", {"reason": WHY, "confirm": active[:8]}
    )
    assert answer.status_code == 200
    said = words(answer)
    assert f"{pending[:8]}… signs now." in said
    assert f"Revoked {active} Signs now {pending} Until 2" in said
    assert "Could the key that signs now have leaked with it? Then revoke all keys." in said
    assert re.search(r"vkyc-prod 1 2\d{3}-", said)
    assert kid_of(operator_at_console) == pending

    assert (await operator_at_console.get(KEYS)).status_code == 200
    again = await operator_at_console.post(f"{KEYS}/rotate", {"reason": ""})
    assert again.status_code == 422, "its forms are taken, too"
    refused = await other.get(KEYS)
    assert refused.status_code == 303
    assert refused.headers["location"].startswith("/console/sign-in?next=/console/signing-keys")
    (record,) = await sql(f"{SELECT_DONE} 'signing_key.revoke'")
    assert (record["kid"], record["reason"], record["actor"]) == (active, WHY, "operator")


async def test_all_keys_are_revoked_once_however_often_the_page_is_sent(
    authority: Authority, operator_at_console: ConsoleClient, sql: SQL
) -> None:
    before = kids(authority)
    form = {"reason": WHY, "confirm": "revoke all", "signing": before[0]}
    answer = await operator_at_console.post(f"{KEYS}/revoke-all", form)
    assert answer.status_code == 200
    assert "All keys are revoked" in words(answer)
    after = kids(authority)
    assert not {*before} & {*after}
    assert kid_of(operator_at_console) == after[0]

    again = await operator_at_console.post(f"{KEYS}/revoke-all", form)
    assert again.status_code == 412
    assert "Another key signs since you looked" in words(again)
    assert kids(authority) == after
    (record,) = await sql(f"{SELECT_DONE} 'signing_key.revoke_all'")
    assert (record["kid"], record["reason"], record["actor"]) == (after[0], WHY, "operator")


async def test_a_key_that_is_published_no_more_is_not_found(
    authority: Authority, operator_at_console: ConsoleClient
) -> None:
    active, _ = kids(authority)
    form = {"reason": WHY, "confirm": active[:8]}
    assert (await operator_at_console.post(f"{KEYS}/{active}/revoke", form)).status_code == 200
    again = await operator_at_console.post(f"{KEYS}/{active}/revoke", form)
    assert again.status_code == 404
    assert "nothing is left to revoke" in words(again)
    assert (await operator_at_console.get(f"{KEYS}/{active}/revoke")).status_code == 404


# Rights


async def test_each_page_takes_the_scope_that_the_api_takes(
    authority: Authority,
    new_person: Callable[[], ConsoleClient],
    enrol_operator: EnrolOperator,
    records: Records,
) -> None:
    before = kids(authority)
    reader = new_person()
    await reader.sign_in(await enrol_operator("reader", "signing-keys:read"))
    page = await reader.get(KEYS)
    assert page.status_code == 200
    assert '<form method="post" action="/console/signing-keys' not in page.text
    assert "/revoke" not in page.text
    blind = new_person()
    await blind.sign_in(await enrol_operator("blind", "audit:read"))
    assert (await blind.get(KEYS)).status_code == 403
    form = {"reason": WHY, "confirm": "revoke all", "signing": before[0]}
    for person in (reader, blind):
        assert (await person.post(f"{KEYS}/rotate", form)).status_code == 403
        for act in ("revoke-all", f"{before[0]}/revoke"):
            assert (await person.get(f"{KEYS}/{act}")).status_code == 403
            typed = {**form, "confirm": before[0][:8]} if "/" in act else form
            assert (await person.post(f"{KEYS}/{act}", typed)).status_code == 403
    await authority.keys.fresh()
    assert kids(authority) == before
    assert await records(2, action="signing_key.rotate", outcome="refused")


async def test_who_may_only_rotate_or_revoke_can(
    authority: Authority, new_person: Callable[[], ConsoleClient], enrol_operator: EnrolOperator
) -> None:
    active, _ = kids(authority)
    person = new_person()
    await person.sign_in(
        await enrol_operator("alarm", "signing-keys:rotate", "signing-keys:revoke")
    )
    assert (await person.post(f"{KEYS}/rotate", {"reason": WHY})).status_code == 303
    assert (await person.get(f"{KEYS}/{active}/revoke")).status_code == 200
    answer = await person.post(f"{KEYS}/{active}/revoke", {"reason": WHY, "confirm": active[:8]})
    assert answer.status_code == 200


def kid_of(person: ConsoleClient) -> str:
    """Which key signed the session."""
    assert person.cookie is not None
    return jwt.get_unverified_header(person.cookie)["kid"]
