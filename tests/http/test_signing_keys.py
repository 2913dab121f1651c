"""Signing keys by hand through the admin API, and what every process makes of it."""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, TypeAlias

import asyncpg
import httpx
import jwt
import pytest
import structlog

from keys.envelope import KeyEncryptionKeys, new_kek_line
from keys.signer import generate, unseal
from keys.verifier import InvalidToken, decode, parse_jwks
from keys.verifier.jwks_client import MAX_STALE
from service.app import Authority, kek_reader
from service.authority.audit import Action, AuditRecord, Outcome, new_record_id
from service.settings import RING_POLL, Settings
from service.store.embedded import Running
from service.store.service_users import as_json
from service.store.signing_keys import key_as_json

pytestmark = pytest.mark.anyio

Credential: TypeAlias = tuple[str, str]
SignIn: TypeAlias = Callable[..., Awaitable[httpx.AsyncClient]]
Records: TypeAlias = Callable[..., Awaitable[list[dict[str, Any]]]]
SQL: TypeAlias = Callable[..., Awaitable[list[asyncpg.Record]]]

KEYS = "/api/v1/signing-keys"
REASON = {"reason": "seen in a backup"}
JWKS = "/.well-known/jwks.json"
LEAD = timedelta(days=1)
RIPEN = (
    "UPDATE signing_keys SET published_at = clock_timestamp() - interval '1 day' - $1::interval"
    " WHERE state = 'pending'"
)


@pytest.fixture
def old_line() -> str:
    """The one key-encryption key that there is at first."""
    return new_kek_line()


@pytest.fixture
def kek_file(tmp_path: Path, old_line: str) -> Path:
    """The file that each authority of these tests reads."""
    put(tmp_path / "kek", old_line)
    return tmp_path / "kek"


def put(kek_file: Path, *lines: str) -> None:
    kek_file.write_text("\n".join(lines) + "\n")


@pytest.fixture
def keks(kek_file: Path) -> KeyEncryptionKeys:
    """What the file holds at first."""
    return kek_reader(kek_file)()


@pytest.fixture
async def start(
    database: Running, settings: Settings, kek_file: Path, operator_credential: Credential
) -> AsyncGenerator[Callable[..., Awaitable[Authority]], None]:
    """Start an authority on the database of this test; `deaf` ones hear of no change."""
    assert operator_credential[0].startswith("su_"), "the keys stand there before anyone starts"
    async with AsyncExitStack() as running:

        async def started(
            *, deaf: bool = False, wall: Callable[[], float] = time.time
        ) -> Authority:
            built = Authority(
                settings, dsn=database.service_dsn, read_keks=kek_reader(kek_file), wall=wall
            )
            if deaf:
                # A listener without a network, as F7 has it: it never hears and never connects.
                built.listener.run = asyncio.Event().wait  # type: ignore[method-assign]
            await running.enter_async_context(built.litestar.lifespan())
            assert built.health().ready
            return built

        yield started


@pytest.fixture
async def authority(start: Callable[..., Awaitable[Authority]]) -> Authority:
    """The authority that answers, with KEK_FILE read at each use."""
    return await start()


async def exchange(authority: Authority, settings: Settings, credential: Credential) -> str:
    """Exchange at one authority; the new token."""
    app: Any = authority.asgi
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url=settings.issuer) as client:
        answer = await client.post(
            "/oauth/token", auth=credential, data={"grant_type": "client_credentials"}
        )
    assert answer.status_code == 200, answer.text
    return answer.json()["access_token"]


def kid_of(token: str) -> str:
    return jwt.get_unverified_header(token)["kid"]


async def published(client: httpx.AsyncClient) -> list[str]:
    return list(parse_jwks((await client.get(JWKS)).content))


async def verifies(client: httpx.AsyncClient, token: str, settings: Settings) -> bool:
    """Whether a verifier that reads the keys now accepts a token."""
    keys = parse_jwks((await client.get(JWKS)).content)
    try:
        decode(
            token,
            keys,
            issuer=settings.issuer,
            audience=settings.audience,
            now=time.time(),
            skew=60,
        )
    except InvalidToken:
        return False
    return True


async def by_state(operator: httpx.AsyncClient) -> dict[str, dict[str, Any]]:
    listed = (await operator.get(KEYS)).json()["signing_keys"]
    return {key["state"]: key for key in listed}


async def shown(operator: httpx.AsyncClient, action: str) -> list[dict[str, Any]]:
    """The records of an action, once they are shown to a reader."""
    async with asyncio.timeout(8):
        while True:
            answer = await operator.get("/api/v1/audit-records", params={"action": action})
            if found := answer.json()["records"]:
                return found
            await asyncio.sleep(0.05)


def at(text: str) -> datetime:
    return datetime.fromisoformat(text)


async def settled(authority: Authority, active_kid: str) -> None:
    """Wait until this process signs with a key, and another stands ready."""

    def is_so() -> bool:
        ring = authority.keys.ring
        return ring.active is not None and ring.active.kid == active_kid and bool(ring.pending)

    async with asyncio.timeout(8):
        while not is_so():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


# Rotate


async def test_rotate_says_when_the_next_key_may_sign_and_it_does_so_then_by_itself(
    authority: Authority,
    settings: Settings,
    client: httpx.AsyncClient,
    operator: httpx.AsyncClient,
    vkyc: Credential,
    sql: SQL,
) -> None:
    keys = await by_state(operator)
    old, new = keys["active"]["kid"], keys["pending"]["kid"]
    answer = await operator.post(f"{KEYS}/rotate", json=REASON)
    assert answer.status_code == 200
    assert answer.json() == {
        "signing_kid": old,
        "next_kid": new,
        "may_sign_from": keys["pending"]["may_sign_from"],
        "asked_before_at": None,
        "missing": [],
    }
    assert at(keys["pending"]["may_sign_from"]) - at(keys["pending"]["published_at"]) == LEAD
    await authority.rotator.tick()
    before = await exchange(authority, settings, vkyc)
    assert kid_of(before) == old, "a day is not over"

    await sql(RIPEN, timedelta(minutes=-1))
    await authority.rotator.tick()
    assert kid_of(await exchange(authority, settings, vkyc)) == old, "a minute is left"
    await sql(RIPEN, timedelta())
    await authority.rotator.tick()
    after = await exchange(authority, settings, vkyc)
    assert kid_of(after) == new
    assert await verifies(client, before, settings)
    assert await verifies(client, after, settings)
    assert (await by_state(operator))["retiring"]["kid"] == old


async def test_rotate_of_a_ripe_key_is_done_in_every_process_within_seconds(
    authority: Authority,
    settings: Settings,
    start: Callable[..., Awaitable[Authority]],
    operator: httpx.AsyncClient,
    vkyc: Credential,
    sql: SQL,
) -> None:
    other = await start()
    await sql(RIPEN, timedelta(hours=1))
    answer = (await operator.post(f"{KEYS}/rotate", json=REASON)).json()
    assert at(answer["may_sign_from"]).timestamp() < time.time()
    for each in (authority, other):
        await settled(each, answer["next_kid"])
        assert kid_of(await exchange(each, settings, vkyc)) == answer["next_kid"]


async def test_rotate_twice_is_rotate_once_and_each_is_on_record_with_reason_and_operator(
    operator: httpx.AsyncClient, operator_credential: Credential, records: Records, sql: SQL
) -> None:
    first = await operator.post(f"{KEYS}/rotate", json=REASON)
    due = "SELECT kid, state, rotate_at FROM signing_keys ORDER BY kid"
    once = await sql(due)
    second = await operator.post(f"{KEYS}/rotate", json={"reason": "once more"})
    asked_at = (await by_state(operator))["active"]["rotation_asked_at"]
    assert first.json() | {"asked_before_at": asked_at} == second.json()
    assert asked_at is not None
    assert await sql(due) == once
    found = await records(2, action="signing_key.rotate")
    assert [record["reason"] for record in found] == [REASON["reason"], "once more"]
    for record in found:
        assert record["outcome"] == "success"
        assert (record["actor"], record["actor_id"]) == ("operator", operator_credential[0])
        assert record["kid"] == first.json()["signing_kid"]


async def test_rotate_without_a_next_key_is_a_conflict_in_words(
    authority: Authority, operator: httpx.AsyncClient, sql: SQL
) -> None:
    assert authority.health().ready
    await sql("DELETE FROM signing_keys WHERE state = 'pending'")
    answer = await operator.post(f"{KEYS}/rotate", json=REASON)
    assert answer.status_code == 409
    assert "There is no next key yet." in answer.json()["detail"]


async def test_a_start_at_which_the_keys_cannot_be_read_at_first_is_ready_soon_after(
    start: Callable[..., Awaitable[Authority]],
    database: Running,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Less than what a process waits that has nothing to mend.
    monkeypatch.setattr("service.app.START_PATIENCE", RING_POLL * 0.7)
    other = await asyncpg.connect(database.superuser_dsn.reveal(), timeout=10)
    try:
        transaction = other.transaction()
        await transaction.start()
        await other.execute("LOCK signing_keys IN ACCESS EXCLUSIVE MODE")
        with structlog.testing.capture_logs() as logs:

            async def release_once_it_was_refused() -> None:
                while all(entry["event"] != "rotator_stopped" for entry in logs):  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
                await transaction.rollback()

            releasing = asyncio.create_task(release_once_it_was_refused())
            authority = await start(deaf=True)
            await releasing
        assert authority.keys.ring.active is not None
    finally:
        other.terminate()


async def test_k5_an_authority_whose_clock_is_an_hour_ahead_does_not_sign_early(
    start: Callable[..., Awaitable[Authority]],
    settings: Settings,
    operator: httpx.AsyncClient,
    vkyc: Credential,
    sql: SQL,
) -> None:
    ahead = await start(wall=lambda: time.time() + 3600)
    await sql(RIPEN, timedelta(minutes=-30))
    rotation = (await operator.post(f"{KEYS}/rotate", json=REASON)).json()
    await ahead.rotator.tick()
    token = await exchange(ahead, settings, vkyc)
    assert kid_of(token) == rotation["signing_kid"]
    await sql(RIPEN, timedelta(0))
    await ahead.rotator.tick()
    assert kid_of(await exchange(ahead, settings, vkyc)) == rotation["next_kid"]


# Revoke one


async def test_p2_revoke_of_the_active_key_is_final_in_every_process_when_it_returns(
    authority: Authority,
    settings: Settings,
    start: Callable[..., Awaitable[Authority]],
    client: httpx.AsyncClient,
    operator: httpx.AsyncClient,
    vkyc: Credential,
) -> None:
    deaf = await start(deaf=True)
    keys = await by_state(operator)
    old, new = keys["active"]["kid"], keys["pending"]["kid"]
    token = await exchange(deaf, settings, vkyc)
    assert kid_of(token) == old
    assert await verifies(client, token, settings)

    answer = await operator.post(f"{KEYS}/{old}/revoke", json=REASON)
    assert answer.status_code == 200, answer.text
    assert old not in await published(client)
    assert not await verifies(client, token, settings)
    cached = deaf.keys.ring.active
    assert cached is not None
    assert cached.kid == old, "it has not heard of it: its next exchange is decided on old memory"
    for each in (deaf, authority, deaf):
        fresh = await exchange(each, settings, vkyc)
        assert kid_of(fresh) == new, "unripe as it is"
        assert await verifies(client, fresh, settings)


async def test_p2_no_exchange_that_begins_after_a_revocation_returned_gets_the_revoked_key(
    authority: Authority,
    settings: Settings,
    start: Callable[..., Awaitable[Authority]],
    operator: httpx.AsyncClient,
    vkyc: Credential,
) -> None:
    deaf = await start(deaf=True)
    old = (await by_state(operator))["active"]["kid"]
    over, began_after, kids = asyncio.Event(), list[str](), list[str]()
    returned = False

    async def keep_exchanging(each: Authority) -> None:
        while not over.is_set():
            after = returned
            kid = kid_of(await exchange(each, settings, vkyc))
            (began_after if after else kids).append(kid)

    clients = [asyncio.create_task(keep_exchanging(each)) for each in (authority, deaf) * 3]
    async with asyncio.timeout(8):
        while len(kids) < 2 * len(clients):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    answer = await operator.post(f"{KEYS}/{old}/revoke", json=REASON)
    returned = True
    async with asyncio.timeout(8):
        while len(began_after) < 2 * len(clients):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    over.set()
    await asyncio.gather(*clients)
    assert answer.status_code == 200
    assert old in kids
    assert set(began_after) == {answer.json()["signing_kid"]}


async def test_the_answer_says_until_when_verifiers_may_differ_and_who_holds_tokens(
    authority: Authority,
    settings: Settings,
    operator: httpx.AsyncClient,
    operator_credential: Credential,
    vkyc: Credential,
    sign_in: SignIn,
) -> None:
    keys = await by_state(operator)
    for _ in range(3):
        await exchange(authority, settings, vkyc)
    answer = (await operator.post(f"{KEYS}/{keys['active']['kid']}/revoke", json=REASON)).json()
    assert answer["revoked_kids"] == [keys["active"]["kid"]]
    assert answer["signing_kid"] == keys["pending"]["kid"]
    until = at(answer["old_accepted_until"])
    # The last process that missed the notification reads the ring within the poll.
    assert abs(until.timestamp() - time.time() - settings.jwks_max_age - RING_POLL) < 5
    assert at(answer["old_accepted_offline_until"]) - until == timedelta(seconds=MAX_STALE)
    assert "Could the key that signs now have leaked with it?" in answer["advice"]
    holders = {holder["service_user"]: holder for holder in answer["holders"]}
    assert {name: holder["count"] for name, holder in holders.items()} == {
        "operator": 1,
        "vkyc-prod": 3,
    }
    ends = at(holders["vkyc-prod"]["last_ends_at"]).timestamp()
    assert abs(ends - time.time() - settings.token_lifetime) < 5
    assert holders["operator"]["service_user_id"] == operator_credential[0]

    assert (await operator.get(KEYS)).status_code == 401, "its own token was of that key"
    again = await sign_in(operator_credential)
    assert (await by_state(again))["active"]["kid"] == answer["signing_kid"]


async def test_a_revocation_is_on_record_with_reason_operator_and_the_state_that_it_ended(
    operator: httpx.AsyncClient, operator_credential: Credential, records: Records
) -> None:
    pending = (await by_state(operator))["pending"]["kid"]
    assert (await operator.post(f"{KEYS}/{pending}/revoke", json=REASON)).status_code == 200
    (record,) = await records(1, action="signing_key.revoke")
    assert (record["outcome"], record["reason"]) == ("success", REASON["reason"])
    assert (record["actor"], record["actor_id"]) == ("operator", operator_credential[0])
    assert record["kid"] == pending
    assert record["details"] == {"state": "pending"}


async def test_a_revoked_pending_key_is_replaced_and_the_active_one_goes_on(
    authority: Authority,
    settings: Settings,
    client: httpx.AsyncClient,
    operator: httpx.AsyncClient,
    vkyc: Credential,
) -> None:
    keys = await by_state(operator)
    active, pending = keys["active"]["kid"], keys["pending"]["kid"]
    answer = (await operator.post(f"{KEYS}/{pending}/revoke", json=REASON)).json()
    assert (answer["signing_kid"], answer["holders"], answer["advice"]) == (active, [], "")
    assert kid_of(await exchange(authority, settings, vkyc)) == active
    await settled(authority, active)
    following = (await by_state(operator))["pending"]["kid"]
    assert following != pending
    assert set(await published(client)) == {active, following}


async def test_a_key_that_only_the_databases_password_put_there_opens_nothing_and_is_shown(
    authority: Authority,
    settings: Settings,
    client: httpx.AsyncClient,
    operator: httpx.AsyncClient,
    operator_credential: Credential,
    vkyc: Credential,
    sql: SQL,
) -> None:
    keys = await by_state(operator)
    active, pending = keys["active"]["kid"], keys["pending"]["kid"]
    thiefs_keks = KeyEncryptionKeys.parse(new_kek_line())
    thiefs = generate(2048, thiefs_keks)

    def record() -> str:
        made = new_record_id(time.time())
        return as_json(AuditRecord(id=made, action=Action.AUDIT_QUERY, outcome=Outcome.SUCCESS))

    # As one call, so that no rotator comes in between.
    await sql(
        "SELECT revoke_key_1($1, 'pending', 3600, '1 day', $2, 60), prepare_key_1($3, $4, 60)",
        pending,
        record(),
        key_as_json(thiefs),
        record(),
    )
    await authority.keys.fresh()

    assert await published(client) == [active]
    forged = jwt.encode(
        {
            "iss": settings.issuer,
            "sub": operator_credential[0],
            "client_id": operator_credential[0],
            "aud": settings.api_audience,
            "iat": int(time.time()),
            "exp": int(time.time()) + 900,
            "jti": str(new_record_id(time.time())),
            "scope": "signing-keys:read",
            "service_user": "operator",
            "source_system": "operators",
        },
        unseal(thiefs, thiefs_keks),
        algorithm="RS256",
        headers={"kid": thiefs.kid, "typ": "at+jwt"},
    )
    refused = await client.get(KEYS, headers={"Authorization": f"Bearer {forged}"})
    assert refused.status_code == 401
    assert (
        "a key that was not made here is in the database, and is not published"
        in (await client.get("/readyz")).json()["concerns"]
    )
    # All else goes on, but nothing that would let that key sign.
    assert kid_of(await exchange(authority, settings, vkyc)) == active
    for path in ("rotate", f"{active}/revoke"):
        answer = await operator.post(f"{KEYS}/{path}", json=REASON)
        assert answer.status_code == 409, path
        assert thiefs.kid in answer.json()["detail"]
    assert (await operator.post(f"{KEYS}/{thiefs.kid}/revoke", json=REASON)).status_code == 200
    await settled(authority, active)
    assert len(await published(client)) == 2
    assert (await client.get("/readyz")).json()["concerns"] == []


async def test_a_revoked_retiring_key_is_published_no_more_and_names_its_holders(
    authority: Authority,
    settings: Settings,
    client: httpx.AsyncClient,
    operator: httpx.AsyncClient,
    operator_credential: Credential,
    sign_in: SignIn,
    vkyc: Credential,
    sql: SQL,
) -> None:
    token = await exchange(authority, settings, vkyc)
    await sql(RIPEN, timedelta(hours=1))
    rotation = (await operator.post(f"{KEYS}/rotate", json=REASON)).json()
    await settled(authority, rotation["next_kid"])
    assert await verifies(client, token, settings)
    again = await sign_in(operator_credential)
    answer = await again.post(f"{KEYS}/{rotation['signing_kid']}/revoke", json=REASON)
    assert answer.json()["signing_kid"] == rotation["next_kid"]
    assert {"vkyc-prod"} < {holder["service_user"] for holder in answer.json()["holders"]}
    assert rotation["signing_kid"] not in await published(client)
    assert not await verifies(client, token, settings)


async def test_a_key_that_is_revoked_already_or_was_never_published_is_not_found(
    operator: httpx.AsyncClient, records: Records
) -> None:
    pending = (await by_state(operator))["pending"]["kid"]
    url = f"{KEYS}/{pending}/revoke"
    assert (await operator.post(url, json=REASON)).status_code == 200
    for again in (url, f"{KEYS}/{'k' * 43}/revoke"):
        answer = await operator.post(again, json=REASON)
        assert answer.status_code == 404
        assert "nothing is left to revoke" in answer.json()["detail"]
    await records(2, action="signing_key.revoke", outcome="refused")


@pytest.mark.parametrize("body", [{}, {"reason": "no"}, {"reason": "x" * 201}, {**REASON, "a": 1}])
async def test_every_act_needs_a_reason_of_fitting_length_and_nothing_else(
    operator: httpx.AsyncClient, body: dict[str, Any]
) -> None:
    before = await by_state(operator)
    for act in ("rotate", "revoke-all", f"{before['active']['kid']}/revoke"):
        answer = await operator.post(f"{KEYS}/{act}", json=body)
        assert answer.status_code == 422, act
        assert answer.headers["content-type"] == "application/problem+json"
    assert await by_state(operator) == before
    assert (await operator.post(f"{KEYS}/short/revoke", json=REASON)).status_code == 422


async def test_k4_of_ten_revocations_of_one_key_at_once_one_is_done(
    operator: httpx.AsyncClient, records: Records
) -> None:
    pending = (await by_state(operator))["pending"]["kid"]
    answers = await asyncio.gather(
        *(operator.post(f"{KEYS}/{pending}/revoke", json=REASON) for _ in range(10))
    )
    assert sorted(answer.status_code for answer in answers) == [200] + [404] * 9
    await records(1, action="signing_key.revoke", outcome="success")


# Revoke all


async def test_k9_revoke_all_leaves_nothing_that_the_old_kek_opens(
    authority: Authority,
    settings: Settings,
    start: Callable[..., Awaitable[Authority]],
    client: httpx.AsyncClient,
    operator: httpx.AsyncClient,
    operator_credential: Credential,
    sign_in: SignIn,
    vkyc: Credential,
    kek_file: Path,
    old_line: str,
    sql: SQL,
) -> None:
    deaf = await start(deaf=True)
    await sql(RIPEN, timedelta(hours=1))
    rotation = (await operator.post(f"{KEYS}/rotate", json=REASON)).json()
    await settled(authority, rotation["next_kid"])
    old_kids = set(await published(client))
    assert len(old_kids) == 3
    new_line = new_kek_line()
    put(kek_file, new_line, old_line)

    answer = await operator.post(f"{KEYS}/revoke-all", json=REASON)
    assert answer.status_code == 200, answer.text
    revocation = answer.json()
    assert set(revocation["revoked_kids"]) == old_kids
    now = await published(client)
    assert len(now) == 2
    assert not old_kids & set(now)
    assert revocation["signing_kid"] in now
    for each in (deaf, authority):
        token = await exchange(each, settings, vkyc)
        assert kid_of(token) == revocation["signing_kid"]
        assert await verifies(client, token, settings)
    rows = await sql("SELECT kid, state, sealed_private FROM signing_keys")
    new_kek = KeyEncryptionKeys.parse(new_line)
    for row in rows:
        assert (row["sealed_private"] is not None) == (row["kid"] in now)
        assert row["sealed_private"] is None or new_kek.seals(row["sealed_private"])
    assert {row["kid"] for row in rows if row["state"] == "revoked"} == old_kids

    put(kek_file, new_line)
    later = await start()
    assert kid_of(await exchange(later, settings, vkyc)) == revocation["signing_kid"]
    again = await sign_in(operator_credential)
    (record,) = await shown(again, "signing_key.revoke_all")
    assert (record["reason"], record["actor"]) == (REASON["reason"], "operator")
    assert set(record["details"]["revoked"]) == old_kids
    assert record["kid"] == revocation["signing_kid"]


async def test_a_process_that_has_not_heard_of_the_new_key_accepts_its_token_at_once(
    authority: Authority,
    settings: Settings,
    start: Callable[..., Awaitable[Authority]],
    operator: httpx.AsyncClient,
    operator_credential: Credential,
) -> None:
    deaf = await start(deaf=True)
    answer = await operator.post(f"{KEYS}/revoke-all", json=REASON)
    assert answer.status_code == 200, answer.text
    token = await exchange(authority, settings, operator_credential)
    assert kid_of(token) not in deaf.keys.ring.published
    app: Any = deaf.asgi
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url=settings.issuer) as client:
        answer = await client.get(KEYS, headers={"Authorization": f"Bearer {token}"})
    assert answer.status_code == 200, answer.text


# Key-encryption keys


async def test_a_process_that_runs_reads_a_changed_kek_file_by_itself(
    authority: Authority, operator: httpx.AsyncClient, kek_file: Path, old_line: str, sql: SQL
) -> None:
    new_line = new_kek_line()
    put(kek_file, new_line, old_line)
    pending = (await by_state(operator))["pending"]["kid"]
    answer = await operator.post(f"{KEYS}/{pending}/revoke", json=REASON)
    await settled(authority, answer.json()["signing_kid"])
    rows = await sql("SELECT sealed_private FROM signing_keys WHERE state = 'pending'")
    assert KeyEncryptionKeys.parse(new_line).seals(rows[0]["sealed_private"])
    following = authority.keys.ring.pending
    assert following is not None
    assert following.signer is not None


@pytest.mark.parametrize("state", ["active", "pending"])
async def test_a_key_is_revoked_although_the_kek_file_cannot_be_read(
    authority: Authority,
    settings: Settings,
    client: httpx.AsyncClient,
    operator: httpx.AsyncClient,
    vkyc: Credential,
    kek_file: Path,
    state: str,
) -> None:
    kid = (await by_state(operator))[state]["kid"]
    put(kek_file, "no key")
    answer = await operator.post(f"{KEYS}/{kid}/revoke", json=REASON)
    assert answer.status_code == 200, answer.text
    assert kid not in await published(client)
    assert kid_of(await exchange(authority, settings, vkyc)) == answer.json()["signing_kid"]


async def test_revoke_all_without_a_readable_kek_file_says_so_and_changes_nothing(
    operator: httpx.AsyncClient, kek_file: Path, records: Records
) -> None:
    before = await by_state(operator)
    put(kek_file, "no key")
    answer = await operator.post(f"{KEYS}/revoke-all", json=REASON)
    assert answer.status_code == 409
    assert "line 1 is no key-encryption key" in answer.json()["detail"]
    assert await by_state(operator) == before
    await records(1, action="signing_key.revoke_all", outcome="refused")


async def test_k6_of_an_older_database_that_was_restored_no_unpublished_key_signs(
    authority: Authority,
    client: httpx.AsyncClient,
    operator: httpx.AsyncClient,
    settings: Settings,
    vkyc: Credential,
    start: Callable[..., Awaitable[Authority]],
    sql: SQL,
) -> None:
    await sql("CREATE TABLE backup AS TABLE signing_keys")
    before = await by_state(operator)
    answer = await operator.post(f"{KEYS}/{before['active']['kid']}/revoke", json=REASON)
    await settled(authority, answer.json()["signing_kid"])
    newer = await exchange(authority, settings, vkyc)
    await sql("DELETE FROM signing_keys")
    await sql("INSERT INTO signing_keys SELECT * FROM backup")

    # One process has gone on over the restore, the other begins with it.
    for process in (authority, await start()):
        token = await exchange(process, settings, vkyc)
        assert kid_of(token) == before["active"]["kid"]
        assert kid_of(token) in parse_jwks(process.keys.ring.jwks)
    assert await verifies(client, token, settings)
    assert kid_of(newer) == before["pending"]["kid"], "which stands ready again"
