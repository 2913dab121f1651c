"""`audit verify` finds whatever a superuser of the database does to the log, and names the first
bad record; what it can only find with a checkpoint from outside, it does not find without."""

import asyncio
import gc
import json
import os
import subprocess
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import TypeAlias
from urllib.parse import urlsplit
from uuid import UUID

import asyncpg
import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from keys.checkpoint import Checkpoint, NoteSigner
from keys.envelope import KeyEncryptionKeys
from keys.log_key import open_log_key
from service.authority.audit import Action, AuditLog, AuditRecord, personal
from service.authority.audit.merkle import Frontier, leaf_hash
from service.authority.audit.verify import Finding, Flaw
from service.authority.model import ClientAddress
from service.cli import main
from service.cli.audit_offline import Pinned, Verdict, verify_database
from service.store.audit_tree import LEAF_COLUMNS, leaf_of, postgres_log
from service.store.embedded import OWNER, SUPERUSER, Running
from tests.conftest import in_database, open_audit_log
from tests.interop.terminal import PRIVYSEAL, at_terminal

pytestmark = pytest.mark.anyio

ORIGIN = "tokens.example/audit/1"
COUNT = 10

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"


class Log:
    """A log as it grows, by whoever holds its key: one record under each checkpoint."""

    def __init__(self, superuser: Connection, signer: NoteSigner) -> None:
        self.superuser = superuser
        self.signer = signer
        self.notes: list[bytes] = []
        """The checkpoints that are kept outside: the one of size n is `notes[n - 1]`."""

    async def sequence(self, *, size: int = 0, together: int = 1) -> None:
        """Make leaves of all records, from the leaf `size` on."""
        rows = await self.superuser.fetch(
            f"SELECT {LEAF_COLUMNS} FROM audit_records r ORDER BY r.commit_order, r.id"
        )
        frontier = Frontier()
        batch: list[tuple[UUID, bytes]] = []
        nodes: list[tuple[int, int, bytes]] = []
        for index, row in enumerate(rows):
            digest = leaf_hash(leaf_of(row).encode())
            new = frontier.append(digest)
            if index < size:
                continue
            batch.append((row["id"], digest))
            nodes += [(node.level, node.index, node.hash) for node in new]
            if len(batch) < together and index + 1 < len(rows):
                continue
            note = Checkpoint(origin=ORIGIN, size=frontier.size, root=frontier.root()).signed(
                self.signer
            )
            assert await self.superuser.fetchval(
                "SELECT append_leaves_1(1::smallint, $1, $2, $3, $4, $5, $6, $7, $8, $9, now())",
                frontier.size - len(batch),
                [record_id for record_id, _ in batch],
                [each for _, each in batch],
                [level for level, _, _ in nodes],
                [node_index for _, node_index, _ in nodes],
                [node_hash for _, _, node_hash in nodes],
                int(row["commit_order"]),
                row["id"],
                note,
            )
            self.notes.append(note)
            batch, nodes = [], []

    async def rebuild(self, size: int = 0) -> None:
        """Recompute every hash from leaf `size` on, as if nothing had happened."""
        del self.notes[size:]
        await cut(self.superuser, size)
        await self.sequence(size=size)

    async def ids(self) -> list[UUID]:
        rows = await self.superuser.fetch("SELECT id FROM audit_leaves ORDER BY leaf_index")
        return [row["id"] for row in rows]


async def cut(superuser: Connection, size: int) -> None:
    """Take away what the tree has beyond `size` leaves; the records stay."""
    await superuser.execute(f"DELETE FROM audit_leaves WHERE leaf_index >= {size}")
    await superuser.execute(f"DELETE FROM audit_nodes WHERE (node_index + 1) << level > {size}")
    await superuser.execute(f"DELETE FROM audit_checkpoints WHERE size > {size}")


@pytest.fixture
async def signer(database: Running, superuser: Connection, keks: KeyEncryptionKeys) -> NoteSigner:
    """The log's key, which the authority holds."""
    await open_audit_log(database, ORIGIN, keks)
    sealed = await superuser.fetchval("SELECT sealed_private FROM audit_logs")
    return open_log_key(ORIGIN, sealed, keks)


@pytest.fixture
def append(log: AuditLog, act: Callable[..., AuditRecord]) -> Callable[[int], Awaitable[None]]:
    """Put so many records on record, one after the other."""

    async def appended(count: int) -> None:
        async with asyncio.timeout(10):
            while not log.available:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        for number in range(count):
            origin = ClientAddress(
                address="192.0.2.7", user_agent=f'"client"\t{number}', request_id=f"r-{number}"
            )
            assert await log.append(
                act(Action.AUDIT_QUERY, details={"n": number}, **personal(origin))
            )

    return appended


Append = Callable[[int], Awaitable[None]]


@pytest.fixture
async def grown(superuser: Connection, signer: NoteSigner, append: Append) -> Log:
    """Ten records in the log, a checkpoint after each."""
    await append(COUNT)
    log = Log(superuser, signer)
    await log.sequence()
    return log


Check = Callable[..., Awaitable[Verdict]]


@pytest.fixture
def check(database: Running, signer: NoteSigner) -> Check:
    """Check the database as the service's role, with the log's key pinned."""

    async def checked(
        outside: Sequence[bytes] = (), *, pinned: bool = True, running: Running = database
    ) -> Verdict:
        brought = Pinned(
            keys={ORIGIN: signer.verifier} if pinned else {},
            unverified_notes=[(f"checkpoint {n}", note) for n, note in enumerate(outside)],
        )
        return await asyncio.to_thread(verify_database, running.service_dsn, brought, processes=1)

    return checked


def first_bad(verdict: Verdict) -> Finding:
    found = verdict.reports[0].first_bad
    assert found is not None
    return found


def assert_whole(verdict: Verdict) -> None:
    assert [finding.words for finding in verdict.reports[0].findings] == []


async def test_a_log_that_nobody_touched_is_whole(grown: Log, check: Check) -> None:
    verdict = await check(grown.notes)
    assert_whole(verdict)
    report = verdict.reports[0]
    assert (report.records, report.compared_outside, report.compared_inside) == (10, 10, 10)
    assert verdict.notices == []


async def test_an_edited_record_is_found(grown: Log, check: Check) -> None:
    record_id = (await grown.ids())[4]
    for change, back in (
        ("outcome = 'refused'", "outcome = 'success'"),
        (
            "recorded_at = recorded_at + interval '1 microsecond'",
            "recorded_at = recorded_at - interval '1 microsecond'",
        ),
        ("details = '{\"n\": 5}'", "details = '{\"n\": 4}'"),
        ("details = '{\"n\": 4.5}'", "details = '{\"n\": 4}'"),
        ("actor = 'somebody'", "actor = NULL"),
        ("commit_order = commit_order + 1", "commit_order = commit_order - 1"),
        ("jti = id", "jti = NULL"),
        ("personal_sha256 = NULL", ""),
    ):
        where = f"WHERE id = '{record_id}'"
        await grown.superuser.execute(f"UPDATE audit_records SET {change} {where}")
        found = first_bad(await check())
        assert (found.flaw, found.index, found.id) == (Flaw.EDITED, 4, record_id), change
        if back:
            await grown.superuser.execute(f"UPDATE audit_records SET {back} {where}")
            assert_whole(await check())


async def test_a_deleted_record_is_found(grown: Log, check: Check) -> None:
    record_id = (await grown.ids())[4]
    for table in ("audit_records", "audit_personal"):
        await grown.superuser.execute(f"DELETE FROM {table} WHERE id = '{record_id}'")
    found = first_bad(await check())
    assert (found.flaw, found.index, found.id) == (Flaw.MISSING, 4, record_id)


async def test_a_record_that_is_deleted_with_its_leaf_is_found(grown: Log, check: Check) -> None:
    await grown.superuser.execute("DELETE FROM audit_leaves WHERE leaf_index = 4")
    found = first_bad(await check())
    assert (found.flaw, found.index) == (Flaw.MISSING, 4)


async def test_an_inserted_record_is_found(grown: Log, check: Check) -> None:
    inserted = await grown.superuser.fetchval(
        "INSERT INTO audit_records (id, commit_order, recorded_at, action, outcome, request_id,"
        " repeats, details) SELECT overlay(id::text PLACING 'ffff' FROM 33)::uuid, commit_order,"
        " recorded_at, 'token.issue', 'success', '', 1, '{}' FROM audit_records"
        " WHERE id = $1 RETURNING id",
        (await grown.ids())[4],
    )
    found = first_bad(await check())
    assert (found.flaw, found.id) == (Flaw.INSERTED, inserted)


async def test_records_that_changed_places_are_found(grown: Log, check: Check) -> None:
    ids = await grown.ids()
    await grown.superuser.execute(
        "UPDATE audit_leaves SET leaf_index = 100 WHERE leaf_index = 3;"
        "UPDATE audit_leaves SET leaf_index = 3 WHERE leaf_index = 6;"
        "UPDATE audit_leaves SET leaf_index = 6 WHERE leaf_index = 100"
    )
    found = first_bad(await check())
    assert (found.flaw, found.index, found.id) == (Flaw.REORDERED, 3, ids[6])


async def test_leaves_that_are_under_no_checkpoint_are_found(
    grown: Log, check: Check, append: Append
) -> None:
    await append(1)
    await grown.sequence(size=COUNT)
    await grown.superuser.execute(f"DELETE FROM audit_checkpoints WHERE size > {COUNT}")
    found = first_bad(await check())
    assert (found.flaw, found.index) == (Flaw.INSERTED, COUNT)


async def test_a_record_that_is_edited_with_its_hash_is_found_by_the_checkpoints_beside_it(
    grown: Log, check: Check
) -> None:
    await grown.superuser.execute(
        "UPDATE audit_records SET reason = 'none' WHERE id = $1", (await grown.ids())[4]
    )
    row = await grown.superuser.fetchrow(
        f"SELECT {LEAF_COLUMNS} FROM audit_records r WHERE r.id = $1", (await grown.ids())[4]
    )
    assert row is not None
    await grown.superuser.execute(
        "UPDATE audit_leaves SET leaf_hash = $1 WHERE leaf_index = 4",
        leaf_hash(leaf_of(row).encode()),
    )
    found = first_bad(await check())
    assert (found.flaw, found.index) == (Flaw.REWRITTEN, 4)


async def test_a_changed_hash_of_the_tree_is_found(
    superuser: Connection, signer: NoteSigner, append: Append, check: Check
) -> None:
    await append(300)
    log = Log(superuser, signer)
    await log.sequence(together=300)
    assert_whole(await check(log.notes))
    await superuser.execute("UPDATE audit_nodes SET node_hash = sha256(node_hash)")
    found = first_bad(await check(log.notes))
    assert found.flaw == Flaw.REWRITTEN
    await superuser.execute("DELETE FROM audit_nodes")
    assert first_bad(await check(log.notes)).flaw == Flaw.REWRITTEN


# The four that need a checkpoint from outside


async def test_a_leaf_with_a_wrong_hash_under_a_head_that_nobody_signed_is_named(
    grown: Log, check: Check, append: Append, database: Running, superuser: Connection
) -> None:
    """As whoever has the service's password can add it."""
    await append(2)
    rows = await superuser.fetch(
        "SELECT id, commit_order FROM audit_records ORDER BY commit_order DESC, id DESC LIMIT 2"
    )
    async with postgres_log(database.service_dsn) as store:
        size = await superuser.fetchval("SELECT max(size) FROM audit_checkpoints")
        assert await store.connection.fetchval(
            "SELECT append_leaves_1(1::smallint, $1, $2, $3, '{}', '{}', '{}', $4, $5, 'x', now())",
            size,
            [rows[1]["id"], rows[0]["id"]],
            [bytes(32)] * 2,
            rows[0]["commit_order"],
            rows[0]["id"],
        )
    found = first_bad(await check())
    assert (found.index, found.id) == (size, rows[1]["id"])


async def test_a_cut_tail_is_found_with_a_checkpoint_from_outside_only(
    grown: Log, check: Check
) -> None:
    gone = (await grown.ids())[6:]
    await cut(grown.superuser, 6)
    for table in ("audit_records", "audit_personal"):
        await grown.superuser.execute(f"DELETE FROM {table} WHERE id = ANY ($1)", gone)
    verdict = await check()
    assert_whole(verdict)
    assert "Compared with no checkpoint from outside" in verdict.notices[0]
    assert_whole(await check(grown.notes[:6]))
    found = first_bad(await check(grown.notes[9:]))
    assert (found.flaw, found.index) == (Flaw.CUT, 6)


async def test_a_log_rewritten_by_who_has_its_key_is_found_with_a_checkpoint_from_outside_only(
    grown: Log, check: Check
) -> None:
    outside = list(grown.notes)
    await grown.superuser.execute(
        "UPDATE audit_records SET reason = 'none' WHERE id = $1", (await grown.ids())[4]
    )
    await grown.rebuild()
    assert_whole(await check())
    found = first_bad(await check(outside[9:]))
    assert (found.flaw, found.index) == (Flaw.REWRITTEN, 0)
    assert "among 0 to 9" in found.words
    # With those that were kept on the way, it is the very record.
    found = first_bad(await check(outside))
    assert (found.flaw, found.index) == (Flaw.REWRITTEN, 4)
    assert "bad record is 4." in found.words


async def test_a_log_rewritten_under_another_key_is_found_by_who_has_pinned_the_right_one(
    grown: Log, check: Check
) -> None:
    grown.signer = NoteSigner(ORIGIN, Ed25519PrivateKey.generate())
    await grown.superuser.execute(
        "UPDATE audit_logs SET public_key = $1",
        grown.signer.verifier.public_key.public_bytes_raw(),
    )
    outside = list(grown.notes)
    await grown.rebuild()
    verdict = await check(pinned=False)
    assert_whole(verdict)
    assert "taken from the database itself" in verdict.notices[0]
    assert first_bad(await check()).flaw == Flaw.CHECKPOINT
    assert first_bad(await check(outside, pinned=False)).flaw == Flaw.CHECKPOINT


@pytest.fixture
async def copy(
    postgres: Running, database: Running
) -> AsyncGenerator[Callable[[], Awaitable[Running]], None]:
    """Copy the database as it is now: a backup, or a clone."""
    name = urlsplit(database.superuser_dsn.reveal()).path[1:]
    administer = await asyncpg.connect(
        in_database(postgres, SUPERUSER).superuser_dsn.reveal(), timeout=10
    )

    async def copied() -> Running:
        # A template is in nobody's use: whoever is connected connects again afterwards.
        await administer.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        await administer.execute(
            f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"
        )
        await administer.execute(f"CREATE DATABASE {name}_copy TEMPLATE {name} OWNER {OWNER}")
        await administer.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
        await administer.execute(f"ALTER DATABASE {name}_copy ALLOW_CONNECTIONS true")
        return in_database(postgres, f"{name}_copy")

    yield copied
    await administer.execute(f"DROP DATABASE IF EXISTS {name}_copy WITH (FORCE)")
    await administer.close()


async def test_a_restored_backup_and_a_fork_are_found_with_a_checkpoint_from_outside_only(
    grown: Log,
    check: Check,
    append: Append,
    database: Running,
    copy: Callable[[], Awaitable[Running]],
) -> None:
    backup = await copy()
    grown.superuser = await asyncpg.connect(database.superuser_dsn.reveal(), timeout=10)
    await append(3)
    await grown.sequence(size=COUNT)
    assert len(grown.notes) == COUNT + 3
    assert_whole(await check(grown.notes))
    # The backup is back: it is whole, and ends too early.
    assert_whole(await check(running=backup))
    found = first_bad(await check(grown.notes, running=backup))
    assert (found.flaw, found.index) == (Flaw.CUT, COUNT)
    # It goes on as if nothing had been after it: a fork.
    clone = await asyncpg.connect(backup.superuser_dsn.reveal(), timeout=10)
    fork = Log(clone, grown.signer)
    await clone.execute(
        "INSERT INTO audit_records (id, commit_order, recorded_at, action, outcome, request_id,"
        " repeats, details) SELECT uuidv7_floor_1(clock_timestamp() + n * interval '1 s'),"
        " (SELECT max(commit_order) FROM audit_records) + n, clock_timestamp(), 'token.issue',"
        " 'success', '', 1, '{}' FROM generate_series(1, 5) AS n"
    )
    await fork.sequence(size=COUNT)
    assert_whole(await check(running=backup))
    found = first_bad(await check(grown.notes, running=backup))
    assert (found.flaw, found.index) == (Flaw.REWRITTEN, COUNT)
    for connection in (clone, grown.superuser):
        await connection.close(timeout=5)


# What is personal


async def test_an_erased_personal_value_is_reported_as_erased_and_a_changed_one_as_tampered(
    grown: Log, check: Check
) -> None:
    ids = await grown.ids()
    await grown.superuser.execute("DELETE FROM audit_personal WHERE id = $1", ids[2])
    verdict = await check(grown.notes)
    assert_whole(verdict)
    assert verdict.reports[0].erased == 1
    assert verdict.reports[0].compared_outside == COUNT
    await grown.superuser.execute(
        "UPDATE audit_personal SET client_address = '192.0.2.8' WHERE id = $1", ids[5]
    )
    found = first_bad(await check(grown.notes))
    assert (found.flaw, found.index, found.id) == (Flaw.PERSONAL, 5, ids[5])


async def test_a_check_leaves_the_collector_of_cycles_as_it_was(grown: Log, check: Check) -> None:
    for enabled in (True, False):
        (gc.enable if enabled else gc.disable)()
        try:
            await check(grown.notes)
            assert gc.isenabled() is enabled
        finally:
            gc.enable()


# The command


async def test_the_command_says_it_in_json_and_by_its_exit_status(
    grown: Log, database: Running, signer: NoteSigner, tmp_path: Path
) -> None:
    (tmp_path / "note").write_bytes(grown.notes[-1])

    async def run(*arguments: str) -> tuple[int, str]:
        result = await asyncio.to_thread(
            CliRunner().invoke, main, ["audit", "verify", *arguments], env={"NO_COLOR": "1"}
        )
        return result.exit_code, result.stdout

    usual = [
        f"--database={database.service_dsn.reveal()}",
        f"--key={signer.verifier.vkey}",
        f"--checkpoint={tmp_path / 'note'}",
    ]
    code, out = await run(*usual, "--json")
    assert code == 0
    assert json.loads(out)["ok"] is True
    await grown.superuser.execute("UPDATE audit_records SET scope = 'all'")
    code, out = await run(*usual, "--json")
    assert code == 1
    found = json.loads(out)
    assert found["ok"] is False
    assert found["logs"][0]["first_bad"]["index"] == 0
    assert found["logs"][0]["flaws"] == COUNT
    code, out = await run(*usual)
    assert code == 1
    assert f"Record 0 ({(await grown.ids())[0]}) was edited" in out
    assert (await run("--key=nonsense"))[0] == 2
    assert (await run(*usual, str(tmp_path / "note")))[0] == 2


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u:S3#cretPw@127.0.0.1/x",
        "postgresql://u:S3cretPw@127.0.0.1:port/x",
        "postgresql://u:S3cretPw@[::1/x",
        "postgresql://u:S3cretPw@127.0.0.1/x?sslmode=S3cretPw",
        "S3cretPw",
    ],
)
async def test_a_url_that_makes_no_sense_is_said_so_in_words_without_the_password(url: str) -> None:
    done = await asyncio.to_thread(
        CliRunner().invoke, main, ["audit", "verify", f"--database={url}"]
    )
    assert isinstance(done.exception, SystemExit)
    assert (done.exit_code, "makes no sense" in done.stderr) == (1, True)
    assert "S3" not in done.output


async def test_a_bar_shows_how_far_the_check_is_on_a_terminal_and_nowhere_else(
    grown: Log, database: Running, signer: NoteSigner, tmp_path: Path
) -> None:
    (tmp_path / "note").write_bytes(grown.notes[-1])
    verify = (
        "audit",
        "verify",
        f"--database={database.service_dsn.reveal()}",
        f"--key={signer.verifier.vkey}",
        f"--checkpoint={tmp_path / 'note'}",
    )
    status, screen = await asyncio.to_thread(at_terminal, verify, os.environ, columns=100, typed="")
    assert status == 0, screen
    (before, after) = (screen.index(f"{done}/{COUNT}") for done in (0, COUNT))
    assert before < after < screen.index("Nothing was changed.")
    assert f"{ORIGIN} \u2501" in screen
    piped = await asyncio.to_thread(
        subprocess.run, (PRIVYSEAL, *verify), capture_output=True, text=True, timeout=60
    )
    assert (piped.returncode, piped.stderr) == (0, "")
    assert f"/{COUNT}" not in piped.stdout
