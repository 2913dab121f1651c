"""Checkpoint and proofs as served, and what a server does when its log is not what was signed."""

import asyncio
import time
from base64 import b64decode
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import asyncpg
import httpx
import pytest

from keys.checkpoint import Checkpoint, NoteVerifier
from keys.envelope import KeyEncryptionKeys, new_kek_line
from service.app import Authority
from service.authority.audit.merkle import leaf_hash, verify_consistency, verify_inclusion
from service.authority.model import Subject
from service.settings import Settings
from service.store.audit_logs import newest_vkey
from service.store.embedded import Running

pytestmark = pytest.mark.anyio

CHECKPOINT = "/api/v1/audit/checkpoint"
CONSISTENCY = "/api/v1/audit/consistency"

Credential = tuple[str, str]
SQL = Callable[..., Awaitable[list[asyncpg.Record]]]
VISIBLE_WITHIN = 8.0


@pytest.fixture
async def verifier(database: Running, operator_credential: Credential) -> NoteVerifier:
    """The log's verifier key, as `migrate` prints it and a reader pins it."""
    assert operator_credential[0], "the log is open"
    connection = await asyncpg.connect(database.owner_dsn.reveal(), timeout=10)
    try:
        vkey = await newest_vkey(connection)
    finally:
        await connection.close(timeout=5)
    assert vkey is not None
    return NoteVerifier.parse(vkey)


@pytest.fixture
def checkpoint_of(
    client: httpx.AsyncClient, verifier: NoteVerifier
) -> Callable[..., Awaitable[Checkpoint]]:
    """The newest checkpoint, once it has at least so many records."""

    async def found(size: int = 1) -> Checkpoint:
        async with asyncio.timeout(VISIBLE_WITHIN):
            while True:
                answer = await client.get(CHECKPOINT)
                if answer.status_code == 200:
                    checkpoint = Checkpoint.open(answer.content, verifier)
                    if checkpoint.size >= size:
                        return checkpoint
                await asyncio.sleep(0.05)

    return found


CheckpointOf = Callable[..., Awaitable[Checkpoint]]


async def test_the_checkpoint_is_public_plain_text_with_an_etag(
    client: httpx.AsyncClient, checkpoint_of: CheckpointOf, settings: Settings
) -> None:
    checkpoint = await checkpoint_of()
    assert checkpoint.origin == "127.0.0.1:8080/audit/1"
    answer = await client.get(CHECKPOINT)
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    assert answer.headers["cache-control"] == "no-cache"
    again = await client.get(CHECKPOINT, headers={"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert (await client.post(CHECKPOINT)).status_code == 405
    kept = sorted(settings.checkpoint_path.iterdir())
    assert kept[-1].read_bytes() == answer.content


async def test_a_token_is_proven_to_be_in_the_log_within_a_second(
    client: httpx.AsyncClient,
    operator: httpx.AsyncClient,
    vkyc: Credential,
    verifier: NoteVerifier,
    records: Callable[..., Awaitable[list[dict[str, Any]]]],
) -> None:
    await client.post("/oauth/token", auth=vkyc, data={"grant_type": "client_credentials"})
    (record,) = await records(action="token.issue", service_user="vkyc-prod")
    began = time.monotonic()
    url = f"/api/v1/audit-records/{record['id']}/proof"
    while (answer := await operator.get(url)).status_code == 404:
        assert time.monotonic() < began + VISIBLE_WITHIN
        await asyncio.sleep(0.05)
    proof = answer.json()
    checkpoint = Checkpoint.open(proof["checkpoint"].encode(), verifier)
    leaf = leaf_hash(proof["leaf"].encode())
    assert record["id"] in proof["leaf"]
    assert b64decode(proof["leaf_hash"]) == leaf
    assert proof["tree_size"] == checkpoint.size
    verify_inclusion(
        [b64decode(each) for each in proof["hashes"]],
        leaf_hash=leaf,
        index=proof["leaf_index"],
        size=checkpoint.size,
        root=checkpoint.root,
    )


async def test_the_log_is_proven_to_have_only_grown(
    operator: httpx.AsyncClient, checkpoint_of: CheckpointOf, vkyc: Credential
) -> None:
    old = await checkpoint_of()
    await operator.get("/api/v1/audit-records", params={"limit": 0})  # refused, on record
    new = await checkpoint_of(old.size + 1)
    answer = await operator.get(CONSISTENCY, params={"from": old.size, "to": new.size})
    assert answer.status_code == 200, answer.text
    assert (answer.json()["old_tree_size"], answer.json()["tree_size"]) == (old.size, new.size)
    verify_consistency(
        [b64decode(each) for each in answer.json()["hashes"]],
        old_size=old.size,
        old_root=old.root,
        size=new.size,
        root=new.root,
    )
    whole = await operator.get(CONSISTENCY)
    assert whole.json()["old_tree_size"] == 0
    assert whole.json()["tree_size"] >= new.size
    assert whole.json()["hashes"] == []


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("from=2&to=1", 404),
        ("to=1000000", 404),
        ("from=-1", 422),
        ("to=9007199254740992", 422),
        ("from=x", 422),
        ("from=1&from=2", 400),
        ("old_size=1", 400),
        ("to=null", 400),
    ],
)
async def test_sizes_that_the_log_never_had_are_refused(
    operator: httpx.AsyncClient, checkpoint_of: CheckpointOf, query: str, status: int
) -> None:
    await checkpoint_of(2)
    answer = await operator.get(f"{CONSISTENCY}?{query}")
    assert answer.status_code == status, answer.text


async def test_proofs_take_the_right_to_read_and_a_record_that_is_there(
    client: httpx.AsyncClient,
    operator: httpx.AsyncClient,
    sign_in: Callable[..., Awaitable[httpx.AsyncClient]],
    enrol_operator: Callable[..., Awaitable[Credential]],
    checkpoint_of: CheckpointOf,
) -> None:
    await checkpoint_of()
    nobody = "/api/v1/audit-records/019ab7a4-5c00-7000-8000-000000000001/proof"
    writer = await sign_in(await enrol_operator("writer", "service-users:write"))
    for url in (nobody, CONSISTENCY):
        assert (await client.get(url)).status_code == 401
        assert (await writer.get(url)).status_code == 403
    answer = await operator.get(nobody)
    assert answer.status_code == 404
    assert "within about a second" in answer.json()["detail"]


# A log that is not what was signed


@pytest.fixture
async def restored(
    database: Running,
    settings: Settings,
    keks: KeyEncryptionKeys,
    authority: Authority,
    vkyc: Credential,
    checkpoint_of: CheckpointOf,
    sql: SQL,
) -> AsyncGenerator[tuple[Authority, httpx.AsyncClient], None]:
    """Another server on the same database after its newest records were cut."""
    checkpoint = await checkpoint_of(5)
    size = checkpoint.size - 2
    await sql("DELETE FROM audit_checkpoints")
    await sql("DELETE FROM audit_leaves WHERE leaf_index >= $1", size)
    built = Authority(settings, dsn=database.service_dsn, read_keks=lambda: keks)
    transport = httpx.ASGITransport(app=cast("Any", built.asgi))
    async with (
        built.litestar.lifespan(),
        httpx.AsyncClient(transport=transport, base_url=settings.issuer) as client,
    ):
        yield built, client


async def test_on_a_cut_log_nothing_is_issued_and_the_keys_are_served(
    restored: tuple[Authority, httpx.AsyncClient],
    vkyc: Credential,
    verifier: NoteVerifier,
    sql: SQL,
) -> None:
    _, client = restored
    before = await sql("SELECT count(*) FROM audit_records")
    for credential in (vkyc, (vkyc[0], "wrong")):
        answer = await client.post(
            "/oauth/token", auth=credential, data={"grant_type": "client_credentials"}
        )
        assert answer.status_code == 503
        assert answer.json()["error"] == "temporarily_unavailable"
        assert int(answer.headers["retry-after"]) > 0
    assert await sql("SELECT count(*) FROM audit_records") == before
    assert await sql("SELECT FROM audit_checkpoints") == [], "nothing is signed"

    assert len((await client.get("/.well-known/jwks.json")).json()["keys"]) == 2
    ready = await client.get("/readyz")
    assert ready.status_code == 200, "it serves the keys"
    assert ready.json()["audit_log"].startswith("Restored or cut: records 0-")
    metrics = (await client.get("/metrics")).text
    assert "\nprivyseal_audit_log_broken 1.0\n" in metrics
    # Whoever asks is shown what the log was, not what is left of it.
    assert Checkpoint.open((await client.get(CHECKPOINT)).content, verifier).size >= 5


async def test_a_log_that_is_right_again_is_found_so_within_seconds(
    restored: tuple[Authority, httpx.AsyncClient], vkyc: Credential, settings: Settings
) -> None:
    built, client = restored
    assert built.health().audit_log is not None
    # As if an operator had accepted it: there is nothing outside that contradicts.
    for kept in list(settings.checkpoint_path.iterdir()):
        kept.unlink()
    async with asyncio.timeout(5):
        while built.health().audit_log is not None:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    answer = await client.post("/oauth/token", auth=vkyc, data={"grant_type": "client_credentials"})
    assert answer.status_code == 200


async def test_no_token_leaves_through_a_new_connection_before_the_log_was_compared(
    authority: Authority,
    client: httpx.AsyncClient,
    vkyc: Credential,
    checkpoint_of: CheckpointOf,
    sql: SQL,
) -> None:
    await checkpoint_of(5)

    async def never() -> None:
        await asyncio.Event().wait()

    # The sequencer's own look is not what saves this: the connection is compared as it opens.
    authority.sequencer.tick = lambda _: never()  # type: ignore[method-assign, assignment]
    await sql("DELETE FROM audit_checkpoints")
    read = authority.directory.cached

    async def read_until_it_is_compared(client_id: str) -> Subject:
        subject = await read(client_id)
        while authority.continuity.broken is None or not authority.audit.available:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        return subject

    async def exchange() -> httpx.Response:
        return await client.post(
            "/oauth/token", auth=vkyc, data={"grant_type": "client_credentials"}
        )

    authority.directory.cached = read_until_it_is_compared  # type: ignore[method-assign]
    under_way = asyncio.create_task(exchange())
    await sql(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE"
        " 'privyseal audit writer%' AND datname = current_database()"
    )
    async with asyncio.timeout(VISIBLE_WITHIN):
        answer = await under_way
    assert answer.status_code == 503, answer.text
    # Who was let in before the comparison is on record, and has no token. Nobody is let in since.
    before = await sql("SELECT count(*) FROM audit_records")
    for _ in range(3):
        assert (await exchange()).status_code == 503
    assert await sql("SELECT count(*) FROM audit_records") == before


async def test_a_server_without_an_audit_log_is_not_ready_and_says_what_to_do(
    database: Running, settings: Settings, keks: KeyEncryptionKeys, monkeypatch: Any
) -> None:
    monkeypatch.setattr("service.app.START_PATIENCE", 0.5)
    built = Authority(settings, dsn=database.service_dsn, read_keks=lambda: keks)
    async with built.litestar.lifespan():
        health = built.health()
    assert not health.ready
    assert health.audit_log is not None
    assert "privyseal migrate" in health.audit_log


async def test_another_key_encryption_key_opens_no_log_and_issues_nothing(
    database: Running, settings: Settings, operator_credential: Credential, tmp_path: Path
) -> None:
    other = KeyEncryptionKeys.parse(new_kek_line())
    built = Authority(settings, dsn=database.service_dsn, read_keks=lambda: other)
    async with built.litestar.lifespan():
        assert built.continuity.broken is not None
        assert built.continuity.broken.startswith("The key of the audit log 127.0.0.1:8080/audit/1")
        assert "KEK_FILE" in built.continuity.broken
