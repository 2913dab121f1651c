"""A month leaves the database for files that prove themselves, and personal values can be erased;
the log still verifies, and only the owner can do either."""

import asyncio
import gzip
import json
import os
import time
from base64 import b64encode
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeAlias
from uuid import UUID

import asyncpg
import pytest
from click.testing import CliRunner

from keys.checkpoint import Checkpoint, NoteSigner
from keys.envelope import KeyEncryptionKeys
from keys.log_key import open_log_key
from service.authority.audit.merkle import Frontier, inclusion_proof, leaf_hash, verify_inclusion
from service.authority.audit.verify import Finding, Flaw
from service.authority.errors import Conflict
from service.authority.model import Subject
from service.cli import main
from service.cli.audit_offline import Pinned, Verdict, verify_database, verify_files
from service.store.audit_archive import (
    Archive,
    Archived,
    closed_months,
    count_matching,
    erase,
    months_with_records,
    open_owner,
)
from service.store.audit_tree import LEAF_COLUMNS, LogHashes, always, leaf_of
from service.store.embedded import Running
from service.store.service_users import ServiceUsers
from tests.conftest import open_audit_log
from tests.interop.terminal import at_terminal

pytestmark = pytest.mark.anyio

ORIGIN = "tokens.example/audit/1"
MARCH, APRIL = "2025-03", "2025-04"
KID = "k" * 43
# March, but for these: events of March that were reported in April.
COUNT, LATE = 40, (22, 25, 26)
IN_MARCH = [index for index in range(COUNT) if index < 20 or index in LATE]

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"

_MAKE_PARTITIONS = """
CREATE TABLE audit_{table}_{suffix} (LIKE audit_{table} INCLUDING ALL);
ALTER TABLE audit_{table} ATTACH PARTITION audit_{table}_{suffix}
  FOR VALUES FROM ('{start}') TO ('{stop}')
"""


def drawn(index: int) -> datetime:
    """When the id of a record was drawn."""
    return datetime(2025, 3 if index in IN_MARCH else 4, 1 + index % 28, tzinfo=UTC)


class Log:
    """A log of two months that ended long ago."""

    def __init__(self, owner: Connection, signer: NoteSigner) -> None:
        self.owner = owner
        self.signer = signer
        self.ids: list[UUID] = []
        self.notes: dict[int, bytes] = {}

    async def fill(self, holder: Subject) -> None:
        """Write the records of March and April, as they were committed."""
        floor = await self.owner.fetchval("SELECT audit_era_floor_1()")
        for index in range(COUNT):
            at = drawn(index)
            record_id = await self.owner.fetchval(
                "INSERT INTO audit_records (id, commit_order, recorded_at, action, outcome,"
                " service_user_id, credential_id, request_id, repeats, details, personal_sha256)"
                " SELECT overlay(uuidv7_floor_1($1)::text PLACING $2 FROM 25)::uuid, $3,"
                " $4::timestamptz + $5 * interval '1 s', 'token.issue', 'success', $6, $7, '',"
                " 1, '{}', sha256('\\x00112233445566778899aabbccddeeff'::bytea"
                '  || convert_to(\'["192.0.2.\' || $5 || \'","curl","",""]\', \'UTF8\'))'
                " RETURNING id",
                at,
                f"{index:012}",
                floor + index,
                datetime(2025, 4, 2, tzinfo=UTC),
                index,
                holder.service_user.id if holder.service_user else None,
                holder.credentials[0].id,
            )
            await self.owner.execute(
                "INSERT INTO audit_personal VALUES ($1, '\\x00112233445566778899aabbccddeeff',"
                " '192.0.2.' || $2::integer, 'curl', '', '')",
                record_id,
                index,
            )
            self.ids.append(UUID(str(record_id)))

    async def sequence(self, *sizes: int) -> None:
        """Make leaves of the next records, in commits that end at these sizes."""
        kept = await self.owner.fetch("SELECT id, leaf_hash FROM audit_leaves ORDER BY leaf_index")
        new = await self.owner.fetch(
            f"SELECT {LEAF_COLUMNS} FROM audit_records r"
            " WHERE NOT EXISTS (SELECT FROM audit_leaves l WHERE l.id = r.id)"
            " ORDER BY r.commit_order, r.id"
        )
        rows, frontier, done = [*kept, *new], Frontier(), len(kept)
        digests = [row["leaf_hash"] for row in kept]
        digests += [leaf_hash(leaf_of(row).encode()) for row in new]
        for size in sizes:
            for digest in digests[frontier.size : size]:
                assert not frontier.append(digest)
            note = Checkpoint(origin=ORIGIN, size=size, root=frontier.root()).signed(self.signer)
            self.notes[size] = note
            assert await self.owner.fetchval(
                "SELECT append_leaves_1(1::smallint, $1, $2, $3, '{}', '{}', '{}', $4, $5, $6, $7)",
                done,
                [row["id"] for row in rows[done:size]],
                digests[done:size],
                int(rows[size - 1]["commit_order"]),
                rows[size - 1]["id"],
                note,
                drawn(size - 1),
            )
            done = size


@pytest.fixture
async def owner(database: Running) -> AsyncGenerator[Connection, None]:
    connection = await open_owner(database.owner_dsn)
    await connection.reset_type_codec("jsonb", schema="pg_catalog")
    yield connection
    connection.terminate()


@pytest.fixture
async def grown(
    database: Running,
    owner: Connection,
    superuser: Connection,
    keks: KeyEncryptionKeys,
    holder: Subject,
) -> Log:
    """March and April in the log, with a checkpoint within each and at the end."""
    await open_audit_log(database, ORIGIN, keks)
    sealed = await owner.fetchval("SELECT sealed_private FROM audit_logs")
    for suffix, start, stop in (
        ("2025_03", "2025-03-01", "2025-04-01"),
        ("2025_04", "2025-04-01", "2025-05-01"),
    ):
        for table in ("records", "personal"):
            floors = [
                await owner.fetchval(
                    "SELECT uuidv7_floor_1($1::text::timestamptz)", f"{day} 00:00+00"
                )
                for day in (start, stop)
            ]
            await owner.execute(
                _MAKE_PARTITIONS.format(table=table, suffix=suffix, start=floors[0], stop=floors[1])
            )
    # What stands there from before is none of this log's business.
    await superuser.execute("DELETE FROM audit_records; DELETE FROM audit_personal")
    log = Log(owner, open_log_key(ORIGIN, sealed, keks))
    await log.fill(holder)
    await log.sequence(13, 24, COUNT)
    return log


Take = Callable[..., Awaitable[Archived]]


@pytest.fixture
async def take(database: Running, tmp_path: Path) -> AsyncGenerator[Take, None]:
    """Archive a month, as the owner."""
    connection = await open_owner(database.owner_dsn)

    async def taken(month: str, directory: Path = tmp_path) -> Archived:
        store = Archive(connection, directory, clock=time.time, clock_skew=60)
        return await store.take(month, lambda done, total: None)

    yield taken
    connection.terminate()


def brought(log: Log, *sizes: int) -> Pinned:
    return Pinned(
        keys={ORIGIN: log.signer.verifier},
        unverified_notes=[(f"the checkpoint of {size}", log.notes[size]) for size in sizes],
    )


Check = Callable[..., Awaitable[Verdict]]


@pytest.fixture
def check(database: Running, grown: Log) -> Check:
    """Check the database with the log's key and these checkpoints."""

    async def checked(*sizes: int) -> Verdict:
        return await asyncio.to_thread(
            verify_database, database.service_dsn, brought(grown, *sizes), processes=1
        )

    return checked


def words(verdict: Verdict) -> list[str]:
    return [finding.words for finding in verdict.reports[0].findings]


def first_bad(verdict: Verdict) -> Finding:
    found = verdict.reports[0].first_bad
    assert found is not None
    return found


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]


def rewrite(path: Path, changed: Sequence[dict[str, Any]]) -> None:
    text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in changed)
    path.write_bytes(gzip.compress(text.encode()))


async def test_an_archived_month_proves_itself_and_the_database_still_verifies(
    grown: Log, take: Take, check: Check, tmp_path: Path, users: ServiceUsers, holder: Subject
) -> None:
    assert holder.service_user is not None
    (credential,) = await users.credentials(holder.service_user.id)
    used_at = credential.last_used_at
    archived = await take(MARCH)
    (manifest,) = archived.manifests
    assert (archived.month, archived.records) == (MARCH, len(IN_MARCH))
    assert manifest == tmp_path / "tokens.example_audit_1-2025-03.json"
    assert sorted(os.listdir(tmp_path)) == [
        f"tokens.example_audit_1-2025-03{suffix}"
        for suffix in ("-personal.ndjson.gz", "-proof.ndjson.gz", ".json", ".ndjson.gz")
    ]
    records = lines(manifest.with_suffix(".ndjson.gz"))
    assert [line["leaf_index"] for line in records] == IN_MARCH
    assert [line["leaf"]["id"] for line in records] == [str(grown.ids[i]) for i in IN_MARCH]
    assert "192.0.2" not in str(records)
    # The file by itself; 13 and 24 are last checkpoints of a day, and 24 is among what is missing.
    verdict = verify_files([manifest], brought(grown, 13, 24, COUNT))
    assert words(verdict) == []
    report = verdict.reports[0]
    assert (report.records, report.erased, report.compared_outside) == (len(IN_MARCH), 0, 3)
    # The database without it.
    assert await grown.owner.fetchval("SELECT to_regclass('audit_records_2025_03')") is None
    assert await grown.owner.fetchval("SELECT to_regclass('audit_personal_2025_03')") is None
    verdict = await check(13, 24, COUNT)
    assert words(verdict) == []
    assert verdict.reports[0].archived == {MARCH: len(IN_MARCH)}
    assert verdict.reports[0].records == COUNT - len(IN_MARCH)
    assert verdict.waiting == 1
    (credential,) = await users.credentials(holder.service_user.id)
    assert credential.last_used_at == used_at
    assert used_at is not None


async def test_a_proof_of_an_archived_record_can_still_be_made(grown: Log, take: Take) -> None:
    (manifest,) = (await take(MARCH)).manifests
    line = lines(manifest.with_suffix(".ndjson.gz"))[-1]
    leaf = json.dumps(line["leaf"], separators=(",", ":")).encode()
    hashes = LogHashes(always(grown.owner), 1)
    verify_inclusion(
        await inclusion_proof(line["leaf_index"], COUNT, hashes),
        leaf_hash=leaf_hash(leaf),
        index=line["leaf_index"],
        size=COUNT,
        root=Checkpoint.open(grown.notes[COUNT], grown.signer.verifier).root,
    )


async def test_the_last_use_of_a_credential_survives_the_archive_of_all_its_records(
    grown: Log, take: Take, users: ServiceUsers, holder: Subject
) -> None:
    assert holder.service_user is not None
    (before,) = await users.credentials(holder.service_user.id)
    await take(MARCH)
    await take(APRIL)
    (after,) = await users.credentials(holder.service_user.id)
    assert before.last_used_at is not None
    assert after.last_used_at == before.last_used_at


async def test_each_archive_is_on_record_with_all_that_went_before(
    grown: Log, take: Take, check: Check
) -> None:
    await take(MARCH)
    (manifest,) = (await take(APRIL)).manifests
    rows = await grown.owner.fetch(
        "SELECT details, actor FROM audit_records WHERE action = 'audit.archive'"
        " ORDER BY commit_order"
    )
    assert [json.loads(row["details"])["month"] for row in rows] == [MARCH, APRIL]
    archived = json.loads(rows[1]["details"])["archived"]
    assert list(archived) == [MARCH, APRIL]
    digest = json.loads(manifest.read_text())["files"]["records"]["sha256"]
    assert archived[APRIL] == {"records": COUNT - len(IN_MARCH), "sha256": [digest]}
    assert words(await check(COUNT)) == []
    with pytest.raises(Conflict, match="already"):
        await take(MARCH)


async def test_what_is_gone_without_an_archive_is_missing(
    grown: Log, take: Take, check: Check
) -> None:
    await take(MARCH)
    await grown.owner.execute("DROP TABLE audit_records_2025_04, audit_personal_2025_04")
    found = first_bad(await check(COUNT))
    assert (found.flaw, found.index) == (Flaw.MISSING, 20)


async def name_archived(log: Log, archived: object, recorded_at: datetime) -> None:
    """Put on record that months were archived: who has the service's password can."""
    await log.owner.execute(
        "INSERT INTO audit_records (id, commit_order, recorded_at, action, outcome, actor,"
        " request_id, repeats, details)"
        " SELECT overlay(uuidv7_floor_1(clock_timestamp())::text PLACING $3 FROM 25)::uuid,"
        "  audit_era_floor_1() + 1000 + $2::integer, $1, 'audit.archive', 'success',"
        "  'privyseal audit archive', '', 1, jsonb_build_object('archived', $4::jsonb)",
        recorded_at,
        (number := await log.owner.fetchval("SELECT count(*)::integer FROM audit_records")),
        f"{number:012}",
        json.dumps(archived),
    )


async def test_a_deleted_record_is_not_explained_by_a_month_of_which_others_remain(
    grown: Log, check: Check
) -> None:
    await grown.owner.execute("DELETE FROM audit_records WHERE id = $1", grown.ids[4])
    await name_archived(grown, {MARCH: {"records": 1}}, datetime.now(UTC))
    verdict = await check(13, 24, COUNT)
    found = first_bad(verdict)
    assert (found.flaw, found.index, found.id) == (Flaw.MISSING, 4, grown.ids[4])
    assert verdict.reports[0].archived == {}
    assert [line for line in words(verdict) if f"{MARCH} was archived. That cannot be" in line]


async def test_a_month_that_was_not_over_for_seven_days_was_not_archived(
    grown: Log, check: Check
) -> None:
    await grown.owner.execute(
        "DELETE FROM audit_records_2025_04; DELETE FROM audit_personal_2025_04"
    )
    claim = {APRIL: {"records": COUNT - len(IN_MARCH)}}
    await name_archived(grown, claim, datetime(2025, 5, 7, 23, tzinfo=UTC))
    # A later one that repeats it, as each does, makes it no truer.
    await name_archived(grown, claim, datetime.now(UTC))
    assert (first_bad(await check(COUNT)).flaw, first_bad(await check(COUNT)).index) == (
        Flaw.MISSING,
        20,
    )


async def test_of_a_month_that_is_over_only_the_archive_shows_what_it_had(
    grown: Log, take: Take, check: Check, march: Path
) -> None:
    verdict = await check(COUNT)
    assert words(verdict) == []
    assert [each for each in verdict.notices if f"Of {MARCH} only hashes are here" in each]
    whole = verify_files([march], brought(grown, COUNT))
    assert f"{len(IN_MARCH)} of {COUNT} records are in the file" in whole.notices[0]


@pytest.mark.parametrize(
    "archived",
    [
        {"2025-13": {"records": 1}},
        {"x": {"records": 1}},
        {"1969-12": {"records": 1}},
        {"9999-12": {"records": 1}},
        {MARCH: {}},
        {MARCH: 1},
        {MARCH: {"records": "1"}},
        {MARCH: {"records": 1.5}},
    ],
)
async def test_a_record_of_an_archive_that_makes_no_sense_is_told_in_words(
    grown: Log, check: Check, archived: object
) -> None:
    await name_archived(grown, archived, datetime.now(UTC))
    assert [line for line in words(await check(COUNT)) if "That cannot be" in line]


async def test_a_record_of_an_archive_without_months_changes_nothing(
    grown: Log, check: Check
) -> None:
    without: list[object] = [dict[str, int](), list[int](), MARCH, None]
    for archived in without:
        await name_archived(grown, archived, datetime.now(UTC))
    assert words(await check(COUNT)) == []


async def test_a_record_that_was_deleted_before_its_month_is_archived_stops_that(
    grown: Log, take: Take
) -> None:
    await grown.owner.execute("DELETE FROM audit_records WHERE id = $1", grown.ids[4])
    with pytest.raises(Conflict, match=r"Record 4 .* is missing"):
        await take(MARCH)


async def test_a_record_that_was_edited_stops_it_too(
    grown: Log, take: Take, tmp_path: Path
) -> None:
    await grown.owner.execute("UPDATE audit_records SET scope = '' WHERE id = $1", grown.ids[4])
    with pytest.raises(Conflict, match=r"Nothing was dropped\. Record 4 .* was edited"):
        await take(MARCH)
    count = "SELECT count(*) FROM audit_records_2025_03"
    assert await grown.owner.fetchval(count) == len(IN_MARCH)
    assert [name for name in os.listdir(tmp_path) if not name.startswith(".")] == []


async def test_a_record_without_its_place_in_the_log_stops_it_too(grown: Log, take: Take) -> None:
    await grown.owner.execute(
        "INSERT INTO audit_records (id, commit_order, recorded_at, action, outcome, request_id,"
        " repeats, details) SELECT overlay(id::text PLACING 'ff' FROM 35)::uuid, commit_order,"
        " recorded_at, action, outcome, '', 1, '{}' FROM audit_records WHERE id = $1",
        grown.ids[4],
    )
    with pytest.raises(Conflict, match="1 records of 2025-03 have no place"):
        await take(MARCH)


@pytest.mark.parametrize("state", ["active", "retiring"])
async def test_p5_a_month_stays_while_a_key_that_signed_in_it_is_published(
    grown: Log, take: Take, superuser: Connection, tmp_path: Path, state: str
) -> None:
    until = datetime.now(UTC) + timedelta(days=3)
    await superuser.execute(
        "INSERT INTO signing_keys (kid, state, signer, public_der, published_at, activated_at,"
        " rotate_at, lifetime_cap, publish_until)"
        " VALUES ($1, $2, 'local:', '', '2025-03-01', '2025-03-31 23:59+00', $3, 900, $4)",
        KID,
        state,
        # What is issued in the last moment lives 15 minutes; clocks may be a minute apart, twice.
        until - timedelta(minutes=17),
        until if state == "retiring" else None,
    )
    ends = until.strftime("%Y-%m-%d %H:%M UTC at the earliest")
    with pytest.raises(Conflict, match=f"2025-03 is needed here, .* {KID}, until {ends}"):
        await take(MARCH)
    assert os.listdir(tmp_path) == []
    await superuser.execute("UPDATE signing_keys SET activated_at = '2025-04-01 00:00+00'")
    assert (await take(MARCH)).records == len(IN_MARCH)
    with pytest.raises(Conflict, match="2025-04 is needed here"):
        await take(APRIL)
    await superuser.execute("UPDATE signing_keys SET state = 'retired', ended_at = now()")
    assert (await take(APRIL)).records == COUNT - len(IN_MARCH)


def test_a_month_can_be_archived_seven_days_after_its_end() -> None:
    months = ["2026-08", "2026-09", "2026-10", "2026-11", "2026-12"]

    def on(day: int, older_than: int = 0) -> list[str]:
        return closed_months(months, datetime(2026, 11, day, tzinfo=UTC), older_than)

    assert on(7) == ["2026-08", "2026-09"]
    assert on(8) == ["2026-08", "2026-09", "2026-10"]
    assert on(8, 1) == ["2026-08", "2026-09"]
    assert on(8, 2) == ["2026-08"]


async def test_the_database_refuses_to_drop_a_month_that_has_not_ended_seven_days_ago(
    grown: Log,
) -> None:
    month = await grown.owner.fetchval("SELECT date_trunc('month', clock_timestamp(), 'UTC')")
    assert not await grown.owner.fetchval("SELECT archive_month_1($1, 0, '{}', 60)", month)


async def test_months_with_records_are_those_that_are_still_there(grown: Log, take: Take) -> None:
    assert (await months_with_records(grown.owner))[:2] == [MARCH, APRIL]
    await take(MARCH)
    assert (await months_with_records(grown.owner))[0] == APRIL


# The files, in wrong hands


@pytest.fixture
async def march(take: Take, grown: Log) -> Path:
    """The manifest of March."""
    (manifest,) = (await take(MARCH)).manifests
    return manifest


async def test_an_edited_line_of_an_archive_is_found(grown: Log, march: Path) -> None:
    path = march.with_suffix(".ndjson.gz")
    changed = lines(path)
    changed[7]["leaf"]["outcome"] = "refused"
    rewrite(path, changed)
    found = first_bad(verify_files([march], brought(grown)))
    assert (found.flaw, found.index, found.id) == (Flaw.EDITED, 7, grown.ids[7])


async def test_a_line_edited_with_its_hash_is_found_by_the_archives_own_checkpoint(
    grown: Log, march: Path
) -> None:
    path = march.with_suffix(".ndjson.gz")
    changed = lines(path)
    changed[7]["leaf"]["outcome"] = "refused"
    leaf = json.dumps(changed[7]["leaf"], separators=(",", ":")).encode()
    changed[7]["leaf_hash"] = b64encode(leaf_hash(leaf)).decode()
    rewrite(path, changed)
    found = first_bad(verify_files([march], brought(grown)))
    assert found.flaw == Flaw.REWRITTEN
    # The checkpoints in between show it more closely.
    found = first_bad(verify_files([march], brought(grown, 13, COUNT)))
    assert (found.flaw, found.index) == (Flaw.REWRITTEN, 0)
    assert "among 0 to 12" in found.words


async def test_lines_that_are_gone_or_out_of_order_are_found(grown: Log, march: Path) -> None:
    path = march.with_suffix(".ndjson.gz")
    whole = lines(path)
    rewrite(path, whole[:7] + whole[8:])
    found = first_bad(verify_files([march], brought(grown)))
    assert (found.flaw, found.index) == (Flaw.MISSING, 7)
    rewrite(path, whole[:-1])
    found = first_bad(verify_files([march], brought(grown)))
    assert (found.flaw, found.index) == (Flaw.MISSING, IN_MARCH[-1])
    rewrite(path, [*whole[:7], whole[8], whole[7], *whole[9:]])
    found = first_bad(verify_files([march], brought(grown)))
    assert (found.flaw, found.index) == (Flaw.MISSING, 7)
    path.write_bytes(path.read_bytes()[:-20])
    found = first_bad(verify_files([march], brought(grown)))
    assert "cannot be read to its end" in found.words


async def test_personal_values_of_an_archive_can_be_erased_and_not_changed(
    grown: Log, march: Path
) -> None:
    path = march.with_name(march.stem + "-personal.ndjson.gz")
    whole = lines(path)
    assert whole[3]["values"] == ["192.0.2.3", "curl", "", ""]
    rewrite(path, whole[:3] + whole[4:])
    verdict = verify_files([march], brought(grown, COUNT))
    assert words(verdict) == []
    assert verdict.reports[0].erased == 1
    whole[3]["values"][0] = "192.0.2.4"
    rewrite(path, whole)
    found = first_bad(verify_files([march], brought(grown, COUNT)))
    assert (found.flaw, found.index) == (Flaw.PERSONAL, 3)
    path.unlink()
    verdict = verify_files([march], brought(grown, COUNT))
    assert words(verdict) == []
    assert verdict.reports[0].erased == len(IN_MARCH)


async def test_an_archive_says_which_checkpoints_it_cannot_be_compared_with(
    grown: Log, march: Path
) -> None:
    await grown.sequence(COUNT + 1)
    found = first_bad(verify_files([march], brought(grown, COUNT + 1)))
    assert (found.flaw, found.index) == (Flaw.UNCOMPARED, None)
    assert "cannot be compared" in found.words
    # Whoever gives a directory gives newer ones, too: one that can be compared is enough.
    verdict = verify_files([march], brought(grown, COUNT, COUNT + 1))
    assert (words(verdict), verdict.reports[0].compared_outside) == ([], 1)


async def test_a_bar_shows_how_far_the_check_of_an_archive_is(grown: Log, march: Path) -> None:
    verify = ("audit", "verify", f"--key={grown.signer.verifier.vkey}", str(march))
    status, screen = await asyncio.to_thread(at_terminal, verify, os.environ, columns=100, typed="")
    assert status == 0, screen
    done, total = len(IN_MARCH), len(IN_MARCH)
    assert screen.index(f"0/{total}") < screen.index(f"{done}/{total}")
    assert screen.index(f"{done}/{total}") < screen.index("Nothing was changed.")


@pytest.mark.parametrize("damage", ["cut", "twice", "no gzip"])
async def test_an_archive_whose_compressed_bytes_are_damaged_is_unreadable_from_there(
    grown: Log, march: Path, damage: str
) -> None:
    path = march.with_suffix(".ndjson.gz")
    packed = path.read_bytes()
    path.write_bytes({"cut": packed[:-9], "twice": packed * 2, "no gzip": b"x" + packed}[damage])
    verdict = verify_files([march], brought(grown))
    said = [line for line in words(verdict) if f"{path.name} cannot be read to its end" in line]
    assert len(said) == 1
    why = "no end, or more than one" if damage != "no gzip" else "incorrect header check"
    assert why in said[0]


# Erasing


async def test_personal_values_are_erased_by_what_they_match_and_that_is_on_record(
    grown: Log, check: Check, holder: Subject
) -> None:
    assert holder.service_user is not None

    async def erased(kind: str, wanted: str, before: datetime | None = None) -> int:
        counted = await count_matching(grown.owner, kind, wanted, before)
        done = await erase(
            grown.owner,
            kind,
            wanted,
            before,
            reason="asked for",
            now=time.time(),
            clock_skew=60,
        )
        assert done == counted
        return done

    assert await erased("client_address", "192.0.2.3") == 1
    assert await erased("client_address", "192.0.2.3") == 0
    assert await erased("user_agent", "curl", datetime(2025, 4, 1, tzinfo=UTC)) == 22
    assert await erased("service_user", holder.service_user.name) == 17
    verdict = await check(COUNT)
    assert words(verdict) == []
    assert (verdict.reports[0].erased, verdict.erased_on_record) == (COUNT, COUNT)
    rows = await grown.owner.fetch(
        "SELECT r::text AS everything, details FROM audit_records r WHERE action = 'audit.erase'"
        " ORDER BY commit_order"
    )
    assert [json.loads(row["details"]) for row in rows] == [
        {"match": "client_address", "reason": "asked for", "erased": 1},
        {"match": "user_agent", "reason": "asked for", "erased": 22},
        {"match": "service_user", "reason": "asked for", "erased": 17},
    ]
    assert "192.0.2.3" not in str(rows)


async def test_values_of_a_department_or_of_a_resource_are_erased(grown: Log, check: Check) -> None:
    for kind, ours, left in (("department", (3, 5), COUNT - 2), ("resource", (7,), COUNT - 3)):
        for value, indexes in (("retail/100%_a", ours), ("retail/100%_ab", (20, 21))):
            await grown.owner.execute(
                f"UPDATE audit_personal SET {kind} = $1 WHERE id = ANY ($2)",
                value,
                [grown.ids[index] for index in indexes],
            )
        given = (grown.owner, kind, "retail/100%_a", None)
        assert await count_matching(*given) == len(ours)
        assert await count_matching(grown.owner, kind, "retail/", None) == 0
        done = await erase(*given, reason="asked for", now=time.time(), clock_skew=60)
        assert done == len(ours)
        assert await grown.owner.fetchval("SELECT count(*) FROM audit_personal") == left
        assert not await grown.owner.fetch(
            "SELECT FROM audit_personal WHERE id = ANY ($1)", [grown.ids[index] for index in ours]
        )
    await grown.owner.execute("UPDATE audit_personal SET department = '', resource = ''")
    verdict = await check(COUNT)
    assert words(verdict) == []
    assert (verdict.reports[0].erased, verdict.erased_on_record) == (3, 3)


# Who may


async def test_the_service_can_neither_archive_nor_erase(
    grown: Log, connect_as: Callable[[str], Awaitable[Connection]]
) -> None:
    service = await connect_as("service")
    for statement in (
        "SELECT archive_month_1('2025-03-01', 23, '{}', 60)",
        "SELECT erase_personal_1('user_agent', 'curl', NULL, '{}', 60)",
        "SELECT matching_personal_1('user_agent', 'curl', NULL)",
        "ALTER TABLE audit_records DETACH PARTITION audit_records_2025_03",
        "DROP TABLE audit_records_2025_03",
        "DELETE FROM audit_personal",
        "UPDATE credentials SET archived_use_at = NULL",
    ):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await service.execute(statement)
    assert await grown.owner.fetchval("SELECT count(*) FROM audit_personal") == COUNT


# The commands


async def test_the_commands_archive_what_is_old_enough_and_erase_only_when_asked_to(
    grown: Log, database: Running, superuser: Connection, tmp_path: Path
) -> None:
    environ = {
        "PRIVYSEAL_DATABASE_URL": database.owner_dsn.reveal(),
        "PRIVYSEAL_DATA_DIR": str(tmp_path / "var"),
        "PRIVYSEAL_AUDIT_KEY": grown.signer.verifier.vkey,
    }

    async def run(*arguments: str, **more: str) -> tuple[int, str]:
        result = await asyncio.to_thread(
            CliRunner().invoke, main, ["audit", *arguments], env={**environ, **more}
        )
        return result.exit_code, result.output

    erasing = ("erase", "--match", "user_agent=curl", "--reason", "asked for")
    assert await run(*erasing, "--dry-run") == (0, "40 records have personal values that match.\n")
    assert (await run(*erasing))[0] == 2  # nobody can be asked
    assert (await run("erase", "--match", "reason=x", "--reason", "asked for"))[0] == 2
    for kind in ("client_address", "resource", "department", "service_user"):
        none = await run("erase", "--match", f"{kind}=x", "--reason", "asked for", "--yes")
        assert none == (0, "0 records have personal values that match.\n")
    to = ("archive", "--to", str(tmp_path / "kept"))
    assert (await run(*to))[0] == 2
    assert (await run(*to, "--month", "2026-13"))[0] == 2
    code, out = await run(*to, "--month", "2025-05")
    assert (code, "no month with records" in out) == (1, True)
    await superuser.execute(
        "INSERT INTO signing_keys (kid, state, signer, public_der, published_at, activated_at,"
        " rotate_at, lifetime_cap)"
        " VALUES ($1, 'active', 'local:', '', now(), '2025-04-09', now(), 900)",
        KID,
    )
    code, out = await run(*to, "--older-than-months", "1")
    assert (code, "2025-04 is needed here" in out) == (1, True)
    assert "2025-03: 23 records are in" in out, "what was done before is told"
    await superuser.execute("DELETE FROM signing_keys")
    code, out = await run(*to, "--json", PRIVYSEAL_AUDIT_RETENTION_MONTHS="1")
    assert code == 0
    assert [each["month"] for each in json.loads(out[: out.rindex("]") + 1])] == [APRIL]
    code, out = await run(*erasing, "--yes")
    assert (code, out) == (0, "0 records have personal values that match.\n")
    code, out = await run("verify", f"--database={database.service_dsn.reveal()}", "--json")
    assert code == 0
    assert json.loads(out)["logs"][0]["archived"] == {MARCH: 23, APRIL: 17}
    kept = sorted(str(path) for path in (tmp_path / "kept").glob("*.json"))
    code, out = await run("verify", *kept)
    assert (code, out.count("Nothing was changed.")) == (0, 2)
