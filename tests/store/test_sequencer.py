"""Every committed record gets its place in the tree, once, and whatever else was done to the log is
noticed by the checkpoint that is kept outside."""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import urlsplit
from uuid import UUID

import asyncpg
import pytest
import structlog

from keys.checkpoint import Checkpoint, NoteVerifier
from keys.envelope import EnvelopeError, KeyEncryptionKeys, new_kek_line
from keys.signer import LocalCustody
from service.authority.audit import Action, AuditLog, AuditRecord, new_record_id
from service.authority.audit.continuity import NO_LOG, Continuity
from service.authority.audit.merkle import (
    Frontier,
    consistency_proof,
    inclusion_proof,
    leaf_hash,
    verify_consistency,
    verify_inclusion,
)
from service.authority.audit.sequencer import Growth, Sequencer
from service.authority.errors import AuditUnavailable, StoreUnavailable
from service.authority.key_administration import rewrap_log_key
from service.store.audit_logs import newest_vkey, open_log
from service.store.audit_tree import LEAF_COLUMNS, AuditTree, PostgresLog, leaf_of, postgres_log
from service.store.checkpoint_files import CheckpointFiles
from service.store.database import Database
from service.store.embedded import OWNER, SUPERUSER, Running
from tests.conftest import in_database, open_audit_log

pytestmark = pytest.mark.anyio

ORIGIN = "tokens.example/audit/1"
VISIBLE_WITHIN = 8.0
"""Seconds: no older transaction of the whole server may be under way, and tests share it."""

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"
MakeAct = Callable[..., AuditRecord]
Copy = Callable[[], Awaitable[Running]]


@pytest.fixture(autouse=True)
async def opened(database: Running, keks: KeyEncryptionKeys) -> None:
    """The audit log is open."""
    await open_audit_log(database, ORIGIN, keks)


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


def custody(keks: KeyEncryptionKeys) -> LocalCustody:
    # An executor that is given nothing has no thread.
    return LocalCustody(lambda: keks, ThreadPoolExecutor(1))


class Process:
    """What of one server process has to do with the tree."""

    def __init__(
        self, database: Running, outside: CheckpointFiles, keks: KeyEncryptionKeys, kind: Any
    ) -> None:
        self.continuity = Continuity(outside=outside, log_keys=custody(keks))

        @asynccontextmanager
        async def connected() -> AsyncGenerator[PostgresLog, None]:
            async with postgres_log(database.service_dsn) as store:
                yield kind(store.connection)

        self.connected = connected
        self.sequencer = Sequencer(
            connect=connected, continuity=self.continuity, outside=outside, clock=time.time
        )

    async def compare(self) -> str | None:
        """Compare once; what is wrong, in words."""
        async with self.connected() as store:
            await self.continuity.compare(store)
        return self.continuity.broken

    async def sequence(self, size: int) -> None:
        """Add to the tree until it has `size` leaves; fail if it gets more, or not that many."""
        async with self.connected() as store:
            await wait_until(lambda: ticked_to(self, store, size))
            assert await self.tick(store) == size

    async def tick(self, store: PostgresLog) -> int:
        await self.sequencer.tick(store)
        head = await store.head(1)
        return head.size if head else 0


@pytest.fixture
def process(
    database: Running, checkpoints: Path, keks: KeyEncryptionKeys
) -> Callable[..., Process]:
    """Make a process on this database, or on another one; with these checkpoints, or others."""

    def made(
        database: Running = database,
        outside: CheckpointFiles | None = None,
        keks: KeyEncryptionKeys = keks,
        kind: Any = PostgresLog,
    ) -> Process:
        return Process(database, outside or CheckpointFiles(checkpoints), keks, kind)

    return made


@pytest.fixture
def append(log: AuditLog, act: MakeAct) -> Callable[[int], Awaitable[list[AuditRecord]]]:
    """Put so many records on record."""

    async def available() -> bool:
        return log.available

    async def appended(count: int) -> list[AuditRecord]:
        await wait_until(available)  # it connects again after a copy was made
        records = [act(Action.AUDIT_QUERY, request_id=f"r-{number}") for number in range(count)]
        assert all(await asyncio.gather(*map(log.append, records)))
        return records

    return appended


Append = Callable[[int], Awaitable[list[AuditRecord]]]
NewProcess = Callable[..., Process]


@pytest.fixture
async def copy(postgres: Running, database: Running) -> AsyncGenerator[Copy, None]:
    """Copy the database as it is now: a backup, restored elsewhere."""
    name = urlsplit(database.superuser_dsn.reveal()).path[1:]
    administer = await asyncpg.connect(
        in_database(postgres, SUPERUSER).superuser_dsn.reveal(), timeout=10
    )
    copies: list[str] = []

    async def copied() -> Running:
        copies.append(f"{name}_{len(copies)}")
        # A template is in nobody's use: whoever is connected connects again afterwards.
        await administer.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        await administer.execute(
            f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"
        )
        await administer.execute(f"CREATE DATABASE {copies[-1]} TEMPLATE {name} OWNER {OWNER}")
        await administer.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
        return in_database(database, copies[-1])

    yield copied
    for each in copies:
        await administer.execute(f"DROP DATABASE {each} WITH (FORCE)")
    await administer.close(timeout=5)


@asynccontextmanager
async def connected_as_superuser(database: Running) -> AsyncGenerator[Connection, None]:
    connection = await asyncpg.connect(database.superuser_dsn.reveal(), timeout=10)
    try:
        yield connection
    finally:
        await connection.close(timeout=5)


async def leaves_in_order(superuser: Connection) -> list[bytes]:
    """Every record as its leaf, in the order of commits: made without the sequencer."""
    rows = await superuser.fetch(
        f"SELECT {LEAF_COLUMNS} FROM audit_records r ORDER BY r.commit_order, r.id"
    )
    return [leaf_of(row).encode() for row in rows]


# Every record has its place


async def test_every_record_is_a_leaf_in_the_order_of_commits_under_a_signed_head(
    append: Append, process: NewProcess, superuser: Connection, checkpoints: Path
) -> None:
    await append(700)
    one = process()
    await one.sequence(700)
    await append(30)
    await one.sequence(730)

    leaves = await leaves_in_order(superuser)
    stored = await superuser.fetch("SELECT leaf_hash FROM audit_leaves ORDER BY leaf_index")
    assert [row["leaf_hash"] for row in stored] == [leaf_hash(leaf) for leaf in leaves]
    frontier = Frontier()
    for leaf in leaves:
        frontier.append(leaf_hash(leaf))
    vkey = await newest_vkey(superuser)
    assert vkey is not None
    (newest,) = kept(checkpoints)
    checkpoint = Checkpoint.open(newest.read_bytes(), NoteVerifier.parse(vkey))
    assert checkpoint == Checkpoint(origin=ORIGIN, size=730, root=frontier.root())
    assert one.continuity.latest_note == newest.read_bytes()
    assert one.continuity.broken is None


async def test_proofs_from_the_stored_hashes_verify_against_signed_heads(
    append: Append, process: NewProcess, superuser: Connection
) -> None:
    await append(300)
    one = process()
    await one.sequence(300)
    await append(261)
    await one.sequence(561)

    vkey = await newest_vkey(superuser)
    assert vkey is not None
    verifier = NoteVerifier.parse(vkey)
    notes = await superuser.fetch("SELECT note FROM audit_checkpoints ORDER BY size")
    heads = [Checkpoint.open(row["note"], verifier) for row in notes]
    newest = heads[-1]
    leaves = await leaves_in_order(superuser)
    async with one.connected() as store:
        hashes = store.hashes(1)
        for index in (0, 1, 255, 256, 299, 300, 560):
            proof = await inclusion_proof(index, 561, hashes)
            verify_inclusion(
                proof,
                leaf_hash=leaf_hash(leaves[index]),
                index=index,
                size=newest.size,
                root=newest.root,
            )
        for old in heads:
            verify_consistency(
                await consistency_proof(old.size, newest.size, hashes),
                old_size=old.size,
                old_root=old.root,
                size=newest.size,
                root=newest.root,
            )


async def test_of_two_commits_in_the_other_order_than_their_ids_none_is_missed(
    log: AuditLog,
    act: MakeAct,
    process: NewProcess,
    connect_as: Callable[[str], Awaitable[Connection]],
    superuser: Connection,
) -> None:
    slow, fast = act(Action.AUDIT_QUERY), act(Action.AUDIT_QUERY)
    late = await connect_as("superuser")
    transaction = late.transaction()
    await transaction.start()
    await late.execute(
        "INSERT INTO audit_records (id, commit_order, recorded_at, action, outcome, request_id,"
        " repeats, details) VALUES ($1, audit_era_floor_1() + pg_current_xact_id()::text::bigint,"
        " clock_timestamp(), 'audit.query', 'success', '', 1, '{}')",
        slow.id,
    )
    assert await log.append(fast)
    one = process()
    async with one.connected() as store:
        assert await one.tick(store) == 0, "what may still come before it is waited for"
    await transaction.commit()
    await one.sequence(2)
    rows = await superuser.fetch("SELECT id FROM audit_leaves ORDER BY leaf_index")
    assert [row["id"] for row in rows] == [slow.id, fast.id]


async def test_one_of_several_is_elected_and_another_takes_over_when_it_is_gone(
    append: Append, process: NewProcess, superuser: Connection
) -> None:
    await append(3)
    first, second = process(), process()
    async with first.connected() as elected:
        await wait_until(lambda: ticked_to(first, elected, 3))
        await append(2)
        async with second.connected() as standby:
            assert await second.tick(standby) == 3
            assert second.continuity.broken is None
            await superuser.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_locks"
                " WHERE locktype = 'advisory' AND (classid, objid) = (7709, 3)"
                " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
            )
            with pytest.raises(StoreUnavailable):
                await first.tick(elected)
            await wait_until(lambda: ticked_to(second, standby, 5))


async def test_an_elected_process_that_hangs_does_not_stay_elected(process: NewProcess) -> None:
    async with process().connected() as store:
        assert await store.elect()
        shown = await store.connection.fetchval("SHOW idle_session_timeout")
        assert shown == "10s"
        await store.connection.execute("SET idle_session_timeout = '50ms'")
        async with process().connected() as other, asyncio.timeout(8):
            while not await other.elect():  # noqa: ASYNC110
                await asyncio.sleep(0.05)


class Stubborn(PostgresLog):
    """Believes to be elected, whoever else is."""

    async def elect(self) -> bool:
        return True


async def test_two_that_both_believe_to_be_elected_give_every_record_one_place(
    append: Append, process: NewProcess, superuser: Connection
) -> None:
    rivals = [process(kind=Stubborn) for _ in range(3)]
    async with AsyncExitStack() as connections:
        stores = [await connections.enter_async_context(each.connected()) for each in rivals]
        for round_number in range(1, 6):
            await append(20)
            async with asyncio.timeout(VISIBLE_WITHIN):
                while True:
                    sizes = await asyncio.gather(
                        *(each.tick(store) for each, store in zip(rivals, stores, strict=True))
                    )
                    if min(sizes) == 20 * round_number:
                        break
            assert max(sizes) == 20 * round_number
    leaves = await superuser.fetch("SELECT leaf_hash FROM audit_leaves ORDER BY leaf_index")
    assert [row["leaf_hash"] for row in leaves] == [
        leaf_hash(leaf) for leaf in await leaves_in_order(superuser)
    ]
    assert {each.continuity.broken for each in rivals} == {None}


async def test_a_process_keeps_the_head_that_another_has_signed(
    append: Append, process: NewProcess, tmp_path: Path
) -> None:
    await append(3)
    here, there = process(), process(outside=CheckpointFiles(tmp_path / "elsewhere"))
    async with here.connected() as elected, there.connected() as standby:
        await wait_until(lambda: ticked_to(here, elected, 3))
        assert await there.tick(standby) == 3
    (copied,) = kept(tmp_path / "elsewhere")
    assert copied.read_bytes() == here.continuity.latest_note


async def test_the_role_of_the_service_opens_no_log(
    connect_as: Callable[[str], Awaitable[Connection]], keks: KeyEncryptionKeys
) -> None:
    key = await custody(keks).new_log_key("tokens.example/audit/2")
    service = await connect_as("service")
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await open_log(service, key)


async def test_another_key_encryption_key_takes_over_and_the_log_goes_on_under_its_own(
    database: Running, append: Append, process: NewProcess, superuser: Connection, pool: Database
) -> None:
    old, new = new_kek_line(), new_kek_line()
    await superuser.execute("TRUNCATE audit_logs CASCADE")
    await open_audit_log(database, ORIGIN, KeyEncryptionKeys.parse(old))
    vkey = await newest_vkey(superuser)
    await append(1)
    await process(keks=KeyEncryptionKeys.parse(old)).sequence(1)

    tree = AuditTree(pool.connection)
    only_new = KeyEncryptionKeys.parse(new)
    with pytest.raises(EnvelopeError):
        await rewrap_log_key(tree, only_new, time.time())
    assert await rewrap_log_key(tree, KeyEncryptionKeys.parse(f"{new}\n{old}"), time.time())
    assert await rewrap_log_key(tree, only_new, time.time()), "it is done already"

    await process(keks=only_new).sequence(2)
    assert await newest_vkey(superuser) == vkey
    recorded = await superuser.fetch("SELECT action FROM audit_records ORDER BY commit_order")
    assert [row["action"] for row in recorded] == ["audit.query", "audit_log.rewrap"]


# Killed between its steps


class Killed(Exception):
    """The process ended here."""


class KilledBeforeTheCommit(PostgresLog):
    async def append(self, growth: Growth) -> bool:
        raise Killed


class KilledAfterTheCommit(PostgresLog):
    async def append(self, growth: Growth) -> bool:
        assert await super().append(growth)
        raise Killed


@pytest.mark.parametrize(("kind", "left"), [(KilledBeforeTheCommit, 0), (KilledAfterTheCommit, 4)])
async def test_what_a_killed_sequencer_left_the_next_one_goes_on_from(
    append: Append, process: NewProcess, checkpoints: Path, kind: Any, left: int
) -> None:
    await append(4)
    killed = process(kind=kind)
    async with killed.connected() as store:
        with pytest.raises(Killed):
            await wait_until(lambda: killed.sequencer.tick(store))
        head = await store.head(1)
        assert (head.size if head else 0) == left
    assert kept(checkpoints) == []
    await append(1)
    one = process()
    await one.sequence(5)
    assert one.continuity.broken is None
    assert [each.name[5:25] for each in kept(checkpoints)] == [f"{5:020}"]


class FullDisk(CheckpointFiles):
    """A place where nothing can be kept."""

    async def keep(self, log_number: int, size: int, note: bytes, signed_at: datetime) -> None:
        raise OSError(28, "No space left on device", "checkpoints")


async def test_no_head_is_signed_while_the_one_before_it_cannot_be_kept_outside(
    append: Append, process: NewProcess, checkpoints: Path
) -> None:
    await append(2)
    full = process(outside=FullDisk(checkpoints))
    async with full.connected() as store:
        with pytest.raises(OSError, match="No space"):
            await wait_until(lambda: full.sequencer.tick(store))
        await append(2)
        for _ in range(3):
            with pytest.raises(OSError, match="No space"):
                await full.sequencer.tick(store)
        head = await store.head(1)
        assert head is not None
        assert head.size == 2
    await process().sequence(4)


async def test_a_record_without_a_canonical_form_stops_the_log_and_is_named(
    append: Append, process: NewProcess, superuser: Connection
) -> None:
    (good,) = await append(1)
    one = process()
    await one.sequence(1)
    (bad,) = await append(1)
    await superuser.execute(
        "UPDATE audit_records SET details = '{\"share\": 0.5}' WHERE id = $1", bad.id
    )
    with structlog.testing.capture_logs() as logs:
        running = asyncio.create_task(one.sequencer.run())
        await wait_until(lambda: logged(logs, "record_not_encodable"))
        running.cancel()
    (line,) = [each for each in logs if each["event"] == "record_not_encodable"]
    assert str(bad.id) in line["error"]
    assert await superuser.fetchval("SELECT max(id::text) FROM audit_leaves") == str(good.id)


# What the service's password alone can do to the log


APPEND = "SELECT append_leaves_1(1::smallint, $1, $2, $3, '{}', '{}', '{}', $4, $5, 'x', now())"


async def test_only_the_next_records_in_their_order_get_places(
    append: Append, process: NewProcess, database: Running, superuser: Connection
) -> None:
    await append(3)
    one = process()
    await one.sequence(3)
    await append(3)
    rows = await superuser.fetch(
        "SELECT id, commit_order FROM audit_records ORDER BY commit_order, id"
    )
    ids, orders = [row["id"] for row in rows], [row["commit_order"] for row in rows]
    new = ids[3:]
    async with postgres_log(database.service_dsn) as store:

        async def appended(
            *leaves: UUID, size: int = 3, last: UUID = new[-1], reaches: int = orders[-1]
        ) -> bool:
            hashes = [bytes(32)] * len(leaves)
            arguments = (size, leaves, hashes, reaches, last)
            return await store.connection.fetchval(APPEND, *arguments)

        invented = new_record_id(time.time())
        for leaves in (
            new[:-1],
            new[1:],
            [new[1], new[0], new[2]],
            [*new, invented],
            [invented, *new],
            [ids[0], *new],
            [*new[:-1], new[0]],
            [],
        ):
            assert not await appended(*leaves), leaves
        # Nor a head that reaches further: what comes next would never get a place.
        assert not await appended(*new, reaches=orders[-1] + 1_000_000)
        assert not await appended(*new, size=2)
        assert await superuser.fetchval("SELECT count(*) FROM audit_leaves") == 3
        assert await appended(*new)
    # A wrong hash is noticed, and the owner is told who names it.
    assert await one.compare() is not None
    assert "`privyseal audit verify` names the first record" in str(one.continuity.broken)
    await superuser.execute("DELETE FROM audit_leaves WHERE leaf_index >= 3")
    await superuser.execute("DELETE FROM audit_checkpoints WHERE size > 3")
    await one.sequence(6)


# Whatever else was done to the log


async def test_an_older_backup_is_noticed_and_says_which_records_are_missing(
    append: Append, process: NewProcess, copy: Copy
) -> None:
    await append(5)
    one = process()
    await one.sequence(5)
    backup = await copy()
    await append(7)
    await one.sequence(12)

    restored = process(backup)
    async with restored.connected() as store:
        assert not await restored.sequencer.tick(store)
        head = await store.head(1)
        assert head is not None
        assert head.size == 5, "nothing is signed"
    assert restored.continuity.broken is not None
    assert restored.continuity.broken.startswith("Restored or cut: records 5-11 are missing")
    with pytest.raises(AuditUnavailable, match="records 5-11 are missing"):
        restored.continuity.require()
    assert await process().compare() is None, "the right database is whole all the time"


async def test_a_connection_from_before_cannot_say_that_a_restored_database_is_whole(
    append: Append, process: NewProcess, copy: Copy
) -> None:
    """Connections outlive a name: those to the old database, and old server, find it whole."""
    await append(5)
    one = process()
    await one.sequence(5)
    backup = await copy()
    await append(7)
    await one.sequence(12)
    async with one.connected() as before, process(backup).connected() as restored:
        assert await one.continuity.compare(before) is not None
        assert await one.continuity.compare(restored) is None
        with pytest.raises(StoreUnavailable, match="newer connections lead to another database"):
            await one.sequencer.tick(before)
        with pytest.raises(AuditUnavailable, match="records 5-11 are missing"):
            one.continuity.require()
    assert await one.compare() is None, "a new connection leads to the right database again"


async def test_without_its_outside_checkpoint_an_older_backup_is_not_noticed(
    append: Append, process: NewProcess, copy: Copy, tmp_path: Path
) -> None:
    await append(5)
    await process().sequence(5)
    backup = await copy()
    await append(7)
    await process().sequence(12)
    forgetful = process(backup, outside=CheckpointFiles(tmp_path / "none"))
    assert await forgetful.compare() is None


async def test_a_fork_is_noticed_once_both_sides_have_grown(
    append: Append, process: NewProcess, copy: Copy, tmp_path: Path
) -> None:
    await append(5)
    one = process()
    await one.sequence(5)
    clone = await copy()
    await append(3)
    await one.sequence(8)

    # The clone's owner keeps other checkpoints, with which it looks whole.
    async with connected_as_superuser(clone) as superuser:
        await superuser.execute(COPY_RECORDS, 4)
    forked = process(clone, outside=CheckpointFiles(tmp_path / "clone"))
    await forked.sequence(9)
    assert forked.continuity.broken is None

    words = await process(clone).compare()
    assert words is not None
    assert words.startswith("Changed or forked: the first 8 records")
    assert await one.compare() is None


COPY_RECORDS = """
INSERT INTO audit_records (id, commit_order, recorded_at, action, outcome, request_id, repeats,
                           details)
SELECT overlay(r.id::text PLACING '7aaa' FROM 15 FOR 4)::uuid,
       audit_era_floor_1() + pg_current_xact_id()::text::bigint, r.recorded_at, r.action,
       r.outcome, r.request_id, r.repeats, r.details
  FROM audit_records r ORDER BY r.id LIMIT $1
"""
"""More records, alike."""

TAMPERED = {
    "Restored or cut: records 500-599 are missing": [
        "DELETE FROM audit_leaves WHERE leaf_index >= 500",
        "DELETE FROM audit_checkpoints WHERE size > 500",
    ],
    "Restored or cut: records 0-599 are missing": ["DELETE FROM audit_checkpoints"],
    "Cut: the audit log": ["DELETE FROM audit_leaves WHERE leaf_index = 599"],
    "Cut: the audit log tokens.example/audit/1 lacks hashes": ["DELETE FROM audit_nodes"],
    "Changed or forked: the first 600 records": [
        "UPDATE audit_leaves SET leaf_hash = sha256('edited') WHERE leaf_index = 550"
    ],
    "Changed or forked: the first 600": [
        "UPDATE audit_leaves SET leaf_hash = (SELECT leaf_hash FROM audit_leaves b"
        " WHERE b.leaf_index = 1101 - audit_leaves.leaf_index) WHERE leaf_index IN (550, 551)"
    ],
    "Changed or forked: the first": [
        "UPDATE audit_nodes SET node_hash = sha256('edited') WHERE node_index = 1"
    ],
    "Changed or forked: the newest checkpoint in the database": [
        "UPDATE audit_checkpoints SET note = convert_to(replace(convert_from(note, 'UTF8'),"
        " E'\\n600\\n', E'\\n599\\n'), 'UTF8') WHERE size = 600"
    ],
    "The key of the audit log tokens.example/audit/1 cannot be used (its private half does not": [
        "UPDATE audit_logs SET public_key = sha256('mine')"
    ],
    "The key of the audit log": ["UPDATE audit_logs SET sealed_private = sha256('mine')"],
    "The key of the audit log tokens.example/audit/2": [
        "INSERT INTO audit_logs SELECT 2, 'tokens.example/audit/2', public_key, sealed_private,"
        " begins_after, opened_at FROM audit_logs"
    ],
    NO_LOG: ["TRUNCATE audit_checkpoints, audit_nodes, audit_leaves, audit_logs"],
}


async def test_whatever_the_superuser_does_to_the_tree_is_noticed_and_nothing_is_signed(
    append: Append, process: NewProcess, superuser: Connection
) -> None:
    await append(500)
    one = process()
    await one.sequence(500)
    await append(100)
    await one.sequence(600)
    await append(1)
    for words, statements in TAMPERED.items():
        # The tampering ends with the transaction: each of them on the same log.
        transaction = superuser.transaction()
        await transaction.start()
        for statement in statements:
            await superuser.execute(statement)
        tampered = process(kind=Stubborn)
        reader = Stubborn(superuser)
        assert not await tampered.sequencer.tick(reader), words
        assert tampered.continuity.broken is not None, words
        assert tampered.continuity.broken.startswith(words), tampered.continuity.broken
        await transaction.rollback()
    await one.sequence(601)


async def test_a_checkpoint_of_another_log_under_the_same_name_is_noticed(
    database: Running, append: Append, process: NewProcess, copy: Copy, superuser: Connection
) -> None:
    await append(2)
    await process().sequence(2)
    await superuser.execute("TRUNCATE audit_checkpoints, audit_nodes, audit_leaves, audit_logs")
    keks = KeyEncryptionKeys.parse(new_kek_line())
    await open_audit_log(database, ORIGIN, keks)
    words = await process(keks=keks).compare()
    assert words is not None
    assert words.startswith("Changed or forked: the newest checkpoint in /")


async def test_a_checkpoint_of_a_later_log_than_the_database_knows_is_noticed(
    append: Append, process: NewProcess, checkpoints: Path
) -> None:
    await append(2)
    one = process()
    await one.sequence(2)
    (newest,) = kept(checkpoints)
    newest.rename(newest.with_name(f"0002{newest.name[4:]}"))
    words = await one.compare()
    assert words is not None
    assert words.startswith("Restored or cut: ")
    assert "2. audit log" in words


async def test_trouble_is_logged_once_a_minute_and_heals_by_itself(
    append: Append, checkpoints: Path, process: NewProcess, keks: KeyEncryptionKeys
) -> None:
    await append(2)
    one = process()
    await one.sequence(2)
    times = iter((0.0, 30.0, 59.0, 61.0, 90.0, 91.0))
    continuity = Continuity(
        outside=CheckpointFiles(checkpoints),
        log_keys=custody(keks),
        monotonic=lambda: next(times),
    )
    (newest,) = kept(checkpoints)
    content = newest.read_bytes()
    with structlog.testing.capture_logs() as logs:
        async with one.connected() as store:
            with pytest.raises(AuditUnavailable, match="not compared"):
                continuity.require()
            newest.write_bytes(content.replace(b"\n2\n", b"\n3\n"))
            for _ in range(5):
                assert await continuity.compare(store) is None
            newest.write_bytes(content)
            assert await continuity.compare(store) is not None
            continuity.require()
    assert [line["event"] for line in logs] == ["nothing_is_issued"] * 2


def kept(checkpoints: Path) -> list[Path]:
    return sorted(checkpoints.iterdir()) if checkpoints.exists() else []


async def ticked_to(process: Process, store: PostgresLog, size: int) -> bool:
    return await process.tick(store) == size


async def logged(logs: list[Any], event: str) -> bool:
    return any(line["event"] == event for line in logs)


async def wait_until(holds: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(VISIBLE_WITHIN):
        while not await holds():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_a_record_is_found_by_its_id_through_the_pool(
    pool: Database, append: Append, process: NewProcess
) -> None:
    (record,) = await append(1)
    await process().sequence(1)
    tree = AuditTree(pool.connection)
    place, leaf = await tree.place_of(record.id), await tree.leaf(record.id)
    assert place is not None
    assert leaf is not None
    assert (place.log_number, place.leaf_index) == (1, 0)
    assert place.leaf_hash == leaf_hash(leaf.encode())
