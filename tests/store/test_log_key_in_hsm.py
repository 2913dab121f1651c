"""The key of the audit log in an HSM: it signs there, and an HSM that is away stops nothing else.

The HSM is SoftHSM 2, a token of its own in a new folder.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn, TypeAlias

import asyncpg
import pkcs11
import pytest
import structlog

from keys.checkpoint import Checkpoint, NoteVerifier
from keys.envelope import KeyEncryptionKeys
from keys.keyring import RotationPolicy
from keys.pkcs11 import PKCS11, Pkcs11Custody
from keys.signer import LOCAL, CustodyBySchemes, LocalCustody
from service.authority.audit import Action, AuditLog, AuditRecord
from service.authority.audit import sequencer as sequencer_module
from service.authority.audit.continuity import Continuity
from service.authority.audit.sequencer import Sequencer
from service.authority.errors import AuditUnavailable
from service.authority.key_administration import rewrap_log_key
from service.authority.restore import Restorer, difference
from service.store.audit_logs import newest_vkey, open_log
from service.store.audit_tree import AuditTree, postgres_log
from service.store.checkpoint_files import CheckpointFiles
from service.store.database import Database
from service.store.embedded import Running
from service.store.restored import RestoredDatabase
from tests import softhsm
from tests.store.conftest import SKEW

pytestmark = pytest.mark.anyio

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"
Append = Callable[[int], Awaitable[None]]

ORIGIN = "tokens.example/audit/1"


@pytest.fixture
def token(skip_or_fail: Callable[[str], NoReturn]) -> Generator[softhsm.Token, None, None]:
    if (reason := softhsm.missing()) is not None:
        skip_or_fail(reason)
    with softhsm.token() as token, softhsm.visible_here(token):
        yield token


@pytest.fixture
def custody(token: softhsm.Token, keks: KeyEncryptionKeys) -> CustodyBySchemes:
    return custodies(token, keks)


@pytest.fixture
async def vkey(custody: CustodyBySchemes, owner_of_log: Connection, superuser: Connection) -> str:
    """The log is open, with its key in the token; what its readers pin."""
    assert await open_log(owner_of_log, await custody.new_log_key(ORIGIN))
    vkey = await newest_vkey(superuser)
    assert vkey is not None
    return vkey


@pytest.fixture
async def owner_of_log(connect_as: Callable[[str], Awaitable[Connection]]) -> Connection:
    return await connect_as("owner")


@pytest.fixture
def append(log: AuditLog, act: Callable[..., AuditRecord]) -> Append:
    async def appended(count: int) -> None:
        for _ in range(count):
            await log.append(act(Action.AUDIT_QUERY))

    return appended


class Process:
    """What of one server process has to do with the log."""

    def __init__(self, database: Running, checkpoints: Path, custody: CustodyBySchemes) -> None:
        self.outside = CheckpointFiles(checkpoints)
        self.continuity = Continuity(outside=self.outside, log_keys=custody)
        self.connect = lambda: postgres_log(database.service_dsn)
        self.sequencer = Sequencer(
            connect=self.connect,
            continuity=self.continuity,
            outside=self.outside,
            clock=time.time,
        )

    async def compare(self) -> str | None:
        async with self.connect() as store:
            await self.continuity.compare(store)
        return self.continuity.broken


@pytest.fixture
def new_process(
    database: Running, tmp_path: Path, custody: CustodyBySchemes
) -> Callable[..., Process]:
    def made(custody: CustodyBySchemes = custody) -> Process:
        return Process(database, tmp_path / "checkpoints", custody)

    return made


@pytest.fixture
async def process(
    new_process: Callable[..., Process], monkeypatch: pytest.MonkeyPatch
) -> AsyncGenerator[Process, None]:
    """A process whose sequencer runs, and waits less than usual for an HSM that is away."""
    monkeypatch.setattr(sequencer_module, "KEY_AWAY", 0.05)
    process = new_process()
    running = asyncio.create_task(process.sequencer.run())
    yield process
    running.cancel()
    await asyncio.wait([running])


async def test_checkpoints_are_signed_in_the_token_and_the_database_holds_no_private_half(
    vkey: str, process: Process, append: Append, superuser: Connection
) -> None:
    await append(3)
    await until(lambda: size_of(process.continuity.latest_note, vkey) == 3)
    for row in await superuser.fetch("SELECT size, note FROM audit_checkpoints"):
        assert size_of(row["note"], vkey) == row["size"]
    (row,) = await superuser.fetch("SELECT signer, sealed_private FROM audit_logs")
    assert row["signer"].startswith("pkcs11:token=privyseal%20test;id=%")
    assert row["sealed_private"] is None


async def test_while_the_token_is_away_nothing_is_signed_all_else_goes_on_and_it_heals(
    vkey: str, token: softhsm.Token, process: Process, append: Append
) -> None:
    await append(1)
    await until(lambda: size_of(process.continuity.latest_note, vkey) == 1)
    with structlog.testing.capture_logs() as logs:
        with away(token):
            await append(2)
            await until(lambda: process.sequencer.trouble == "audit_log_key_out_of_reach")
            assert await process.compare() is None
            process.continuity.require()  # what issuance asks
            assert size_of(process.continuity.latest_note, vkey) == 1
        await until(lambda: size_of(process.continuity.latest_note, vkey) == 3)
    await until(lambda: process.sequencer.trouble is None)
    complaints = [line for line in logs if line["log_level"] == "error"]
    assert [line["event"] for line in complaints] == ["audit_log_key_out_of_reach"]


async def test_who_starts_while_the_token_is_away_issues_nothing_until_it_answers(
    vkey: str,
    token: softhsm.Token,
    new_process: Callable[..., Process],
    custody: CustodyBySchemes,
) -> None:
    one = new_process()
    with away(token):
        words = await one.compare()
        assert words is not None
        assert words.startswith(f"The key of the audit log {ORIGIN} cannot be used (no token is")
        assert "restore accept" in words
        with pytest.raises(AuditUnavailable):
            one.continuity.require()
    assert await one.compare() is None
    one.continuity.require()


@pytest.mark.parametrize(
    ("tampering", "words"),
    [
        (
            # Records before `begins_after` would be nobody's.
            "INSERT INTO audit_logs (log, origin, public_key, signer, begins_after, opened_at)"
            " SELECT 2, 'tokens.example/audit/2', public_key, signer, 99, opened_at"
            " FROM audit_logs",
            "was not made for this log",
        ),
        ("UPDATE audit_logs SET public_key = $1", "does not verify under its public half"),
        (
            "UPDATE audit_logs SET signer ="
            " overlay(signer PLACING '%00' FROM position('%' IN split_part(signer, ';', 2))"
            " + length(split_part(signer, ';', 1)) + 1 FOR 3)",
            "does not hold its private half",
        ),
        ("UPDATE audit_logs SET signer = 'file:key'", "which this process does not have"),
    ],
)
async def test_a_database_alone_names_no_other_key(
    vkey: str,
    new_process: Callable[..., Process],
    superuser: Connection,
    custody: CustodyBySchemes,
    tampering: str,
    words: str,
) -> None:
    seen = new_process()
    assert await seen.compare() is None
    other = (await custody.new_log_key(ORIGIN)).public_key.public_bytes_raw()
    await superuser.execute(tampering, *([other] if "$1" in tampering else []))
    for process in (seen, new_process()):
        found = await process.compare()
        assert found is not None
        assert found.startswith("The key of the audit log")
        assert words in found


async def test_there_is_nothing_to_seal_under_another_key_encryption_key(
    vkey: str, pool: Database, keks: KeyEncryptionKeys
) -> None:
    assert await rewrap_log_key(AuditTree(pool.connection), keks, time.time())


async def test_a_log_whose_token_is_lost_goes_on_as_another_whose_key_is_where_new_ones_are(
    vkey: str,
    database: Running,
    new_process: Callable[..., Process],
    keks: KeyEncryptionKeys,
    policy: RotationPolicy,
    superuser: Connection,
) -> None:
    with ThreadPoolExecutor(1) as executor:
        local = CustodyBySchemes(LOCAL, {LOCAL: LocalCustody(lambda: keks, executor)}, lambda: keks)
        after = new_process(local)
        async with Database(database.owner_dsn, application_name="test owner") as owner:
            found = await difference(AuditTree(owner.connection), after.outside, local)
            assert found is not None
            assert "kept under pkcs11:, which this process does not have" in found.found
            restorer = Restorer(
                store=RestoredDatabase(owner, clock_skew=SKEW),
                custody=local,
                policy=policy,
                key_bits=2048,
            )
            verifier = await restorer.accept(found, "the HSM burnt")
    assert verifier.vkey == await newest_vkey(superuser) != vkey
    assert await after.compare() is None


async def test_a_sealed_log_that_was_restored_goes_on_with_a_key_in_the_token(
    database: Running,
    new_process: Callable[..., Process],
    custody: CustodyBySchemes,
    keks: KeyEncryptionKeys,
    policy: RotationPolicy,
    owner_of_log: Connection,
    superuser: Connection,
) -> None:
    with ThreadPoolExecutor(1) as executor:
        sealed = await LocalCustody(lambda: keks, executor).new_log_key(ORIGIN)
    assert await open_log(owner_of_log, sealed)
    assert await new_process().compare() is None, "a sealed log stays as it is"
    # A checkpoint of a later log than the database knows: it was restored.
    await new_process().outside.keep(2, 1, b"tokens.example/audit/2\n", datetime.now(UTC))
    async with Database(database.owner_dsn, application_name="test owner") as owner:
        outside = new_process().outside
        found = await difference(AuditTree(owner.connection), outside, custody)
        assert found is not None
        restorer = Restorer(
            store=RestoredDatabase(owner, clock_skew=SKEW),
            custody=custody,
            policy=policy,
            key_bits=2048,
        )
        verifier = await restorer.accept(found, "restored")
    rows = await superuser.fetch("SELECT signer, sealed_private FROM audit_logs ORDER BY log")
    assert [row["sealed_private"] is None for row in rows] == [False, True]
    assert verifier.name == "tokens.example/audit/3"
    assert await new_process().compare() is None


def custodies(token: softhsm.Token, keks: KeyEncryptionKeys) -> CustodyBySchemes:
    # An executor that is given nothing has no thread.
    local = LocalCustody(lambda: keks, ThreadPoolExecutor(1))
    return CustodyBySchemes(PKCS11, {LOCAL: local, PKCS11: Pkcs11Custody(token.uri)}, lambda: keks)


def size_of(note: bytes | None, vkey: str) -> int:
    return Checkpoint.open(note, NoteVerifier.parse(vkey)).size if note else 0


@contextmanager
def away(token: softhsm.Token) -> Generator[None, None, None]:
    """The module finds no token until the block ends."""
    elsewhere = token.token_dir.with_name("away")
    pkcs11.lib(str(token.module_path)).finalize()
    token.token_dir.rename(elsewhere)
    token.token_dir.mkdir()
    yield
    token.token_dir.rmdir()
    elsewhere.rename(token.token_dir)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(15):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.02)
