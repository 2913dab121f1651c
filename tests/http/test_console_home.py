"""Home: what needs a person is there, what does not is not, and nobody sees beyond their scopes."""

import html
import re
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias
from uuid import uuid4

import asyncpg
import httpx
import pytest

from service.app import Authority
from service.authority.audit import Action, AuditRecord, Outcome, new_record_id
from service.settings import Settings
from tests.http.console_client import ConsoleClient

pytestmark = pytest.mark.anyio

Credential: TypeAlias = tuple[str, str]
Enrol: TypeAlias = Callable[..., Awaitable[Credential]]
Records: TypeAlias = Callable[..., Awaitable[list[dict[str, Any]]]]
SQL: TypeAlias = Callable[..., Awaitable[list[asyncpg.Record]]]

GRANT = {"grant_type": "client_credentials"}
WELL = "All is well Nothing needs you now."
END_IN = (
    "UPDATE credentials SET expires_at = clock_timestamp() + $2::text::interval"
    " WHERE service_user_id = $1 AND label = 'first'"
)
HOLD = "UPDATE credentials SET held_at = clock_timestamp() WHERE service_user_id = $1"

SIX_MORE = (
    "INSERT INTO credentials (id, service_user_id, label, secret_sha256, created_at, expires_at)"
    " SELECT 'cr_' || repeat(chr(97 + n), 24), $1, 'copy ' || n, sha256(n::text::bytea),"
    " now() - interval '1 day', now() + interval '9 days' FROM generate_series(1, 6) n"
)


async def home(person: ConsoleClient) -> str:
    """What Home says, without tags and line breaks."""
    answer = await person.get("/")
    assert answer.status_code == 200
    assert len(answer.content) < 30_000
    main = answer.text[answer.text.index("<main") :]
    text = re.sub(r"<[^>]*>", " ", main)
    return re.sub(r" (?=[).,:])", "", " ".join(html.unescape(text).split()))


async def shown(person: ConsoleClient, words: str) -> str:
    """Home, once it says something that a record brings about."""
    deadline = time.monotonic() + 8
    while words not in (said := await home(person)):
        assert time.monotonic() < deadline, said
    return said


async def test_the_address_without_a_path_leads_a_browser_to_the_console_and_programs_nowhere(
    client: httpx.AsyncClient,
) -> None:
    browser = await client.get("/", headers={"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"})
    assert (browser.status_code, browser.headers["location"]) == (303, "/console")
    for accepted in ({}, {"Accept": "*/*"}, {"Accept": "application/json"}):
        program = await client.get("/", headers=accepted)
        assert program.status_code == 404
        assert program.headers["content-type"] == "application/problem+json"


async def test_a_fresh_installation_is_well_and_says_what_was_looked_at(
    operator_at_console: ConsoleClient,
) -> None:
    said = await shown(operator_at_console, "The newest checkpoint is over")
    assert said.startswith(f"Home {WELL}")
    assert "Looked at just now: signing keys, credentials, the audit log." in said
    assert "Refused" not in said


async def test_credentials_that_end_within_thirty_days_are_named_the_next_one_first(
    operator_at_console: ConsoleClient,
    enrol: Enrol,
    vkyc: Credential,
    client: httpx.AsyncClient,
    sql: SQL,
) -> None:
    later = await enrol("document-service", scopes=["ingest:write"])
    disabled = await enrol("gone", scopes=["ingest:write"])
    await client.post("/oauth/token", auth=vkyc, data=GRANT)
    for credential, ends in ((vkyc, "3 days"), (later, "29 days"), (disabled, "1 day")):
        await sql(END_IN, credential[0], ends)
    await sql("UPDATE service_users SET status = 'disabled' WHERE id = $1", disabled[0])
    said = await home(operator_at_console)
    assert WELL not in said
    assert re.search(r"vkyc-prod first in 3 days \d+ s ago document-service first", said)
    assert re.search(r"document-service first in 29 days never", said)
    assert "gone" not in said
    await sql(END_IN, later[0], "31 days")
    assert "document-service" not in await home(operator_at_console)


async def test_a_credential_that_was_replaced_is_named_only_while_it_is_used(
    operator_at_console: ConsoleClient,
    operator: httpx.AsyncClient,
    vkyc: Credential,
    client: httpx.AsyncClient,
    sql: SQL,
) -> None:
    await client.post("/oauth/token", auth=vkyc, data=GRANT)
    await sql(END_IN, vkyc[0], "3 days")
    made = await operator.post(
        f"/api/v1/service-users/{vkyc[0]}/credentials", json={"label": "second"}
    )
    assert made.status_code == 201
    assert WELL in await home(operator_at_console), "it is replaced, and nobody used it since"
    await client.post("/oauth/token", auth=vkyc, data=GRANT)
    said = await shown(operator_at_console, "Credentials end within 30 days")
    assert "although a newer one exists since" in said
    await sql("UPDATE credentials SET revoked_at = clock_timestamp() WHERE label = 'second'")
    assert "although a newer one" not in await home(operator_at_console)


async def test_more_than_ten_are_ten_and_a_way_to_the_others(
    operator_at_console: ConsoleClient, vkyc: Credential, sql: SQL
) -> None:
    await sql(SIX_MORE.replace("6)", "12)"), vkyc[0])
    await sql(END_IN, vkyc[0], "8 days")
    said = await home(operator_at_console)
    assert said.count("copy") == 9, "after the one that ends before them"
    assert (await operator_at_console.get("/service-users/ending")).text.count("copy") == 12
    assert "See all that end" in said


async def test_so_many_that_not_all_are_looked_at_are_never_well(
    operator_at_console: ConsoleClient, vkyc: Credential, monkeypatch: pytest.MonkeyPatch, sql: SQL
) -> None:
    await sql(SIX_MORE, vkyc[0])
    assert WELL in await home(operator_at_console), "all are replaced by the one that stays"
    assert "copy" not in (await operator_at_console.get("/service-users/ending")).text
    monkeypatch.setattr("service.authority.attention.ENDING_LOOKED_AT", 6)
    said = await home(operator_at_console)
    assert WELL not in said
    assert "See all that end" in said


async def test_held_credentials_are_named_with_the_way_to_confirm_them(
    operator_at_console: ConsoleClient, vkyc: Credential, sql: SQL
) -> None:
    await sql(HOLD, vkyc[0])
    said = await home(operator_at_console)
    assert "Credentials are held" in said
    assert "vkyc-prod: first" in said
    assert f'href="/console/service-users/{vkyc[0]}"' in (await operator_at_console.get("/")).text
    assert WELL not in said


async def test_refusals_are_counted_by_reason_for_a_day_and_are_no_alarm(
    operator_at_console: ConsoleClient, vkyc: Credential, client: httpx.AsyncClient, sql: SQL
) -> None:
    mistaken = await operator_at_console.post(
        f"/service-users/{vkyc[0]}/credentials/new", {"label": ""}
    )
    assert mistaken.status_code == 422
    for _ in range(2):
        await client.post("/oauth/token", auth=(vkyc[0], "pvs_wrong"), data=GRANT)
    await client.post("/oauth/token", auth=vkyc, data={**GRANT, "scope": "search:all"})
    means = "The client id is known, and the secret is none of its own."
    said = await shown(operator_at_console, f"wrong_secret {means} 2 vkyc-prod")
    assert re.search("invalid_scope The exchange asked .* 1 vkyc-prod", said)
    assert " invalid 1 " not in said, "what somebody mistyped needs nobody else"
    assert WELL in said
    assert (
        'href="/console/audit?outcome=refused&amp;reason=wrong_secret"'
        in (await operator_at_console.get("/")).text
    )
    await sql(
        "UPDATE audit_records SET recorded_at = recorded_at - interval '25 hours'"
        " WHERE outcome = 'refused'"
    )
    assert "wrong_secret" not in await home(operator_at_console)


def reported(action: str, **fields: Any) -> AuditRecord:
    return AuditRecord(
        id=new_record_id(time.time()),
        action=action,
        outcome=fields.pop("outcome", Outcome.REFUSED),
        actor="ingest",
        **fields,
    )


@pytest.mark.parametrize(
    ("action", "what"),
    [(Action.TOKEN_UNKNOWN, "are on no record"), (Action.TOKEN_UNVERIFIABLE, "may be forged")],
)
async def test_tokens_on_no_record_are_told_for_a_week(
    operator_at_console: ConsoleClient, authority: Authority, sql: SQL, action: Action, what: str
) -> None:
    for _ in range(3):
        assert await authority.audit.append(reported(action, jti=uuid4(), outcome=Outcome.SUCCESS))
    said = await home(operator_at_console)
    assert f"Tokens were reported that {what} 3 in the last 7 days" in said
    assert WELL not in said
    await sql("UPDATE audit_records SET recorded_at = recorded_at - interval '8 days'")
    assert "Tokens were reported" not in await home(operator_at_console)


async def test_a_forged_token_is_never_well(
    operator_at_console: ConsoleClient, authority: Authority
) -> None:
    assert await authority.audit.append(reported(Action.TOKEN_FORGED, outcome=Outcome.SUCCESS))
    said = await shown(operator_at_console, "A signing key leaked.")
    assert WELL not in said


async def test_an_opening_that_was_refused_is_told_with_whose_it_is(
    operator_at_console: ConsoleClient, authority: Authority, vkyc: Credential, sql: SQL
) -> None:
    (credential,) = await sql("SELECT id FROM credentials WHERE service_user_id = $1", vkyc[0])
    assert await authority.audit.append(
        reported(
            "credential.open",
            service_user_id=vkyc[0],
            service_user="vkyc-prod",
            credential_id=credential["id"],
        )
    )
    said = await home(operator_at_console)
    assert "A hand-over was opened a second time, or too late 1 refused in the last 7 days" in said
    assert "vkyc-prod" in said


async def test_a_log_that_waits_for_its_checkpoint_is_told_and_an_idle_one_is_not(
    operator_at_console: ConsoleClient, authority: Authority, sql: SQL
) -> None:
    await sql("UPDATE audit_checkpoints SET signed_at = signed_at - interval '3 days'")
    assert WELL in await home(operator_at_console), "nothing came, so there was nothing to sign"
    # Somebody holds what the sequencer needs, as when it hangs.
    authority.sequencer.tick = _never  # type: ignore[method-assign]
    assert await authority.audit.append(reported(Action.AUDIT_QUERY, outcome=Outcome.SUCCESS))
    await sql("UPDATE audit_records SET recorded_at = recorded_at - interval '61 seconds'")
    said = await shown(operator_at_console, "Records wait for their checkpoint")
    assert "The oldest since 61 s ago" in said or "The oldest since 62 s ago" in said
    assert WELL not in said


async def _never(_: object) -> bool:
    return False


async def test_a_log_that_does_not_go_on_from_what_was_signed_is_told_to_everybody(
    operator_at_console: ConsoleClient, authority: Authority
) -> None:
    async def finds_it_cut(_: object) -> bool:
        authority.continuity.broken = "Restored or cut: records 5-9 are missing."
        return False

    authority.sequencer.tick = finds_it_cut  # type: ignore[method-assign]
    nothing = "Nothing is issued: the audit log does not go on from what was signed"
    said = await shown(operator_at_console, nothing)
    assert "records 5-9 are missing" in said
    assert WELL not in said


@pytest.fixture
async def broken_next_key(operator_credential: Credential, sql: SQL) -> None:
    """A next key that no process can open, in the database before one starts."""
    assert operator_credential[0], "the keys stand there"
    await sql(
        "UPDATE signing_keys SET sealed_private = set_bit(sealed_private, 300,"
        " 1 - get_bit(sealed_private, 300)) WHERE state = 'pending'"
    )


@pytest.mark.usefixtures("broken_next_key")
async def test_a_next_key_that_cannot_be_used_is_told_weeks_before_its_turn(
    operator_at_console: ConsoleClient, authority: Authority
) -> None:
    await authority.rotator.tick()
    said = await home(operator_at_console)
    assert "This server cannot use the next key" in said
    assert WELL not in said


@pytest.mark.usefixtures("broken_next_key")
@pytest.mark.parametrize(
    ("scope", "seen"),
    [
        ("service-users:read", "Credentials end within 30 days"),
        ("audit:read", "Refused in the last 24 hours"),
        ("signing-keys:read", "This server cannot use the next key"),
        ("tokens:mint", "Your scopes show nothing else."),
    ],
)
async def test_each_scope_shows_its_part_and_no_other(
    scope: str,
    seen: str,
    authority: Authority,
    new_person: Callable[[], ConsoleClient],
    settings: Settings,
    enrol: Enrol,
    vkyc: Credential,
    client: httpx.AsyncClient,
    sql: SQL,
) -> None:
    person = new_person()
    await person.sign_in(await enrol("partial", scopes=[scope], audiences=[settings.api_audience]))
    await client.post("/oauth/token", auth=(vkyc[0], "pvs_wrong"), data=GRANT)
    await sql(END_IN, vkyc[0], "3 days")
    await authority.rotator.tick()
    said = await home(person)
    parts = {
        "Credentials end within 30 days",
        "Refused in the last 24 hours",
        "This server cannot use the next key",
        "Your scopes show nothing else.",
    }
    assert {part for part in parts if part in said} == {seen}
