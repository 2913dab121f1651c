"""Months that leave the database for an archive, and personal values that are erased, as the owner.

Drops nothing that was not written, made durable, read again and verified before.
"""

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import asyncpg
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from msgspec import Struct

from keys.checkpoint import NoteVerifier
from keys.secret import Secret
from service.authority.audit.merkle import STORED_EVERY, Node, Span
from service.authority.audit.record import Action, AuditRecord, Outcome, new_record_id
from service.authority.audit.verify import (
    KEPT_DAYS,
    Placed,
    aligned_levels,
    complete_root,
    encoded,
    month_of,
    subtrees,
)
from service.authority.errors import Conflict, StoreUnavailable
from service.store.archive_files import (
    ArchiveWriter,
    publish,
    read_manifest,
    staged_archive,
    verify_archive,
)
from service.store.audit_tree import LogHashes, always
from service.store.audit_verify import HAS_RECORDS, PAGE, SELECT_ARCHIVED, page, prepare
from service.store.database import (
    MIGRATING,
    Connection,
    connect,
    fetch_durable,
    loss_as_unavailable,
    sqlstate,
)
from service.store.service_users import as_json

ATTEMPTS: Final = 20
"""How often the drop is tried: each time it gives way to who reads the tables just then."""
LOCK_TIMEOUT: Final = 0.5
PAUSE: Final = 1.0

LOCK: Final = "SELECT pg_try_advisory_lock(7709, 4)"
UNLOCK: Final = "SELECT pg_advisory_unlock(7709, 4)"

IS_OWNER: Final = """
SELECT pg_has_role(relowner, 'USAGE') FROM pg_class WHERE oid = 'audit_records'::regclass
"""

SELECT_MONTHS: Final = """
SELECT substr(c.relname, 15) AS month
  FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
 WHERE i.inhparent = 'audit_records'::regclass ORDER BY 1
"""

COUNT_MONTH: Final = """
SELECT count(*) AS records, count(l.id) AS placed
  FROM audit_records r LEFT JOIN audit_leaves l ON l.id = r.id
 WHERE r.id >= uuidv7_floor_1($1) AND r.id < uuidv7_floor_1($1 + interval '1 month')
"""

SELECT_SPANS: Final = """
SELECT l.log, g.origin, g.public_key, min(l.leaf_index) AS first, max(l.leaf_index) AS last,
       (SELECT note FROM audit_checkpoints WHERE log = l.log ORDER BY size DESC LIMIT 1) AS note,
       (SELECT max(size) FROM audit_checkpoints WHERE log = l.log) AS size
  FROM audit_leaves l JOIN audit_logs g ON g.log = l.log
 WHERE l.id >= uuidv7_floor_1($1) AND l.id < uuidv7_floor_1($1 + interval '1 month')
 GROUP BY l.log, g.origin, g.public_key ORDER BY l.log
"""

# Those that CHECKPOINT_DIR keeps.
SELECT_DAILY_SIZES: Final = """
SELECT DISTINCT ON (signed_at::date) size FROM audit_checkpoints WHERE log = $1
 ORDER BY signed_at::date, size DESC
"""

# Keys that signed before that and are published still, the last to go first; for the one that signs
# now, as soon as it can be.
SELECT_STILL_PUBLISHED: Final = """
SELECT kid,
       coalesce(publish_until, greatest(rotate_at, statement_timestamp())
                               + make_interval(secs => lifetime_cap + 2 * $2::integer)) AS until
  FROM signing_keys WHERE state IN ('active', 'retiring') AND activated_at < $1
 ORDER BY until DESC LIMIT 1
"""

ARCHIVE_MONTH: Final = "SELECT archive_month_1($1, $2, $3, $4)"
COUNT_MATCHING: Final = "SELECT count(*) FROM matching_personal_1($1, $2, $3)"
ERASE: Final = "SELECT erase_personal_1($1, $2, $3, $4, $5)"
# Until then the bytes would still be in the table's files.
VACUUM: Final = "VACUUM audit_personal"

Progress = Callable[[int, int], None]
"""Told how many records of how many are written."""


class Archived(Struct, frozen=True, kw_only=True):
    """A month that is in files now, and no longer in the database."""

    month: str
    records: int
    manifests: Sequence[Path]


def closed_months(months: Sequence[str], now: datetime, older_than: int) -> list[str]:
    """Return those that ended at least `older_than` months and seven days before `now`."""
    this = now.year * 12 + now.month - 1
    return [
        month
        for month in months
        if this - _number(month) > older_than
        and (now - month_start(_next(month))).days >= KEPT_DAYS
    ]


def month_start(month: str) -> datetime:
    """Return the first moment of a month such as 2026-10; raise ValueError."""
    return datetime.strptime(month, "%Y-%m").replace(tzinfo=UTC)


async def months_with_records(connection: Connection) -> list[str]:
    """Return the months that are in the database and have any records."""
    with loss_as_unavailable():
        found = [row["month"].replace("_", "-") for row in await connection.fetch(SELECT_MONTHS)]
        return [
            month for month in found if await connection.fetchval(HAS_RECORDS, month_start(month))
        ]


async def open_owner(dsn: Secret) -> "asyncpg.Connection[asyncpg.Record]":
    """Open a connection for `Archive`; raise StoreUnavailable, or InsufficientPrivilegeError."""
    connection = await connect(dsn, application_name="privyseal archive", deadlines=MIGRATING)
    try:
        with loss_as_unavailable():
            await prepare(connection)
            # Now, not with the first month that is old enough.
            if not await connection.fetchval(IS_OWNER):
                raise asyncpg.InsufficientPrivilegeError("must be owner of audit_records")
    except BaseException:
        connection.terminate()
        raise
    return connection


class Archive:
    """Takes months out of the database, on a connection of `open_owner` that is its own."""

    def __init__(
        self,
        connection: "asyncpg.Connection[asyncpg.Record]",
        directory: Path,
        *,
        clock: Callable[[], float],
        clock_skew: int,
    ) -> None:
        self._connection = connection
        self._directory = directory
        self._clock = clock
        self._clock_skew = clock_skew

    async def take(self, month: str, on_progress: Progress) -> Archived:
        """Archive one month; raise Conflict saying why not, StoreUnavailable, OSError."""
        with loss_as_unavailable():
            if not await self._connection.fetchval(LOCK):
                raise Conflict("A check of the log is under way. Archive when it has ended.")
            try:
                return await self._take(month, on_progress)
            finally:
                await self._connection.fetchval(UNLOCK)

    async def _take(self, month: str, on_progress: Progress) -> Archived:
        start = month_start(month)
        before: dict[str, Any] = (
            await self._connection.fetchval(SELECT_ARCHIVED, Action.AUDIT_ARCHIVE) or {}
        )
        if month in before:
            raise Conflict(f"{month} is in an archive already, says the log.")
        await self._require_over(month)
        counted = await self._connection.fetchrow(COUNT_MONTH, start)
        assert counted is not None
        if counted["records"] != counted["placed"]:
            raise Conflict(
                f"{counted['records'] - counted['placed']:,} records of {month} have no place in "
                "the log. If that stays so: privyseal audit verify."
            )
        self._directory.mkdir(parents=True, exist_ok=True)
        manifests: list[Path] = []
        records = 0
        for span in await self._connection.fetch(SELECT_SPANS, start):
            staged, written = await self._write(
                span, month, records, counted["records"], on_progress
            )
            records += written
            await asyncio.to_thread(_require_sound, staged, span)
            manifests.append(await asyncio.to_thread(publish, staged))
        if records != counted["records"]:
            raise Conflict(f"{month} has records that are in no log: privyseal audit verify.")
        await self._drop(start, records, self._record(month, records, manifests, before))
        return Archived(month=month, records=records, manifests=manifests)

    async def _require_over(self, month: str) -> None:
        """Refuse while tokens of a key that signed in this month are accepted anywhere: whether one
        of them was issued can only be told by the records."""
        key = await self._connection.fetchrow(
            SELECT_STILL_PUBLISHED, month_start(_next(month)), self._clock_skew
        )
        if key is not None:
            until = key["until"].astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")
            raise Conflict(
                f"{month} is needed here, to tell which tokens are forged, while a key that signed "
                f"in it is published: {key['kid']}, until {until} at the earliest."
            )

    async def _write(
        self, span: Any, month: str, done: int, total: int, on_progress: Progress
    ) -> tuple[Path, int]:
        hashes = LogHashes(always(self._connection), span["log"])
        daily = await self._connection.fetch(SELECT_DAILY_SIZES, span["log"])
        cuts = sorted({row["size"] for row in daily})
        first, stop = span["first"], span["last"] + 1
        with staged_archive(self._directory, span["origin"], month) as writer:
            await _prove(writer, hashes, 0, first, cuts)
            for at in range(first, stop, PAGE):
                leaves = await page(self._connection, span["log"], at, min(at + PAGE, stop))
                _write_page(writer, leaves, month, cuts)
                on_progress(done + writer.records, total)
            await _prove(writer, hashes, stop, span["size"], cuts)
        return await asyncio.to_thread(writer.finish, span["note"]), writer.records

    def _record(
        self, month: str, records: int, manifests: Sequence[Path], before: dict[str, Any]
    ) -> AuditRecord:
        files = [read_manifest(path).files.records for path in manifests]
        archived = {"records": records, "sha256": [file.sha256 for file in files]}
        return AuditRecord(
            id=new_record_id(self._clock()),
            action=Action.AUDIT_ARCHIVE,
            outcome=Outcome.SUCCESS,
            actor="privyseal audit archive",
            # All months, so that the newest of these records says what is in archives.
            details={"month": month, "archived": {**before, month: archived}},
        )

    async def _drop(self, start: datetime, records: int, record: AuditRecord) -> None:
        """Drop the month; it waits for who reads, and makes nobody wait for long."""
        await self._connection.execute(f"SET lock_timeout = '{LOCK_TIMEOUT}s'")
        for _ in range(ATTEMPTS):
            try:
                dropped = await fetch_durable(
                    self._connection,
                    ARCHIVE_MONTH,
                    start,
                    records,
                    as_json(record),
                    self._clock_skew,
                )
            except asyncpg.PostgresError as error:
                if sqlstate(error) not in ("55P03", "40P01"):
                    raise
                await asyncio.sleep(PAUSE)
                continue
            if not dropped:
                raise Conflict(
                    "Records of the month were changed meanwhile: privyseal audit verify."
                )
            return
        raise Conflict(
            "The files are complete, but the tables are in use all the time. Run this again."
        )


def _require_sound(manifest: Path, span: Any) -> None:
    """Read what was written, as anybody will, and raise Conflict for what is wrong with it."""
    public_key = Ed25519PublicKey.from_public_bytes(span["public_key"])
    verifier = NoteVerifier(span["origin"], public_key)
    report = verify_archive(manifest, verifier=verifier, outside=())
    if (bad := report.first_bad) is not None:
        raise Conflict(f"Nothing was dropped. {bad.words} See: privyseal audit verify.")


def _write_page(
    writer: ArchiveWriter, page: Iterable[Placed], month: str, cuts: Sequence[int]
) -> None:
    others: list[bytes] = []
    stop = 0
    for (index, record_id, leaf_hash), members, personal in page:
        stop = index + 1
        if month_of(record_id) != month:
            others.append(leaf_hash)
            continue
        _prove_run(writer, others, index, cuts)
        if members is None:
            raise Conflict(f"Record {index:,} ({record_id}) is missing: privyseal audit verify.")
        writer.record(index, leaf_hash, encoded(members))
        if personal is not None:
            _, salt, *values = personal
            writer.personal(index, salt, values)
    _prove_run(writer, others, stop, cuts)


def _prove_run(writer: ArchiveWriter, hashes: list[bytes], stop: int, cuts: Sequence[int]) -> None:
    """Write the hashes of neighbours before `stop`, joined as far as may be, and forget them."""
    at = stop - len(hashes)
    for subtree in subtrees(hashes, at, [cut for cut in cuts if at < cut < stop]):
        writer.proof(Node(level=subtree.level, index=at >> subtree.level, hash=subtree.hash))
        at += 1 << subtree.level
    hashes.clear()


async def _prove(
    writer: ArchiveWriter, stored: LogHashes, start: int, stop: int, cuts: Sequence[int]
) -> None:
    """Write the roots over leaves that are far from the month, computed from stored hashes."""
    for level, index in _subtrees_between(start, stop, cuts):
        depth = level % STORED_EVERY
        span = Span(level=level - depth, start=index << depth, stop=(index + 1) << depth)
        (hashes,) = await stored.read([span])
        if len(hashes) != 1 << depth:
            raise Conflict("The log lacks hashes of its tree: privyseal audit verify.")
        writer.proof(Node(level=level, index=index, hash=complete_root(hashes)))


def _subtrees_between(start: int, stop: int, cuts: Sequence[int]) -> Iterator[tuple[int, int]]:
    at = start
    for end in (*(cut for cut in cuts if start < cut < stop), stop):
        for level in aligned_levels(at, end):
            yield level, at >> level
            at += 1 << level


async def count_matching(
    connection: Connection, kind: str, wanted: str, before: datetime | None
) -> int:
    """Return how many records have personal values that match."""
    with loss_as_unavailable():
        return await connection.fetchval(COUNT_MATCHING, kind, wanted, before)


async def erase(
    connection: Connection,
    kind: str,
    wanted: str,
    before: datetime | None,
    *,
    reason: str,
    now: float,
    clock_skew: int,
) -> int:
    """Erase personal values that match; return how many. On record is the kind, not the value."""
    record = AuditRecord(
        id=new_record_id(now),
        action=Action.AUDIT_ERASE,
        outcome=Outcome.SUCCESS,
        actor="privyseal audit erase",
        details={"match": kind, "reason": reason},
    )
    with loss_as_unavailable():
        erased = await fetch_durable(
            connection, ERASE, kind, wanted, before, as_json(record), clock_skew
        )
        if not isinstance(erased, int):
            raise StoreUnavailable("no answer to an erasure")
        await connection.execute(VACUUM)
    return erased


def _number(month: str) -> int:
    start = month_start(month)
    return start.year * 12 + start.month - 1


def _next(month: str) -> str:
    following = _number(month) + 1
    return f"{following // 12:04}-{following % 12 + 1:02}"
