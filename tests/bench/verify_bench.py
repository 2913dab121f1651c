"""`audit verify` beside `hashlib.sha256` alone: the same leaves, in the same run.

Measures the check of a database and of an export, with as many processes as there are cores, and
that of an archive; and what memory the command takes for each, of a log and of one as long again.
"""

import asyncio
import hashlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import asyncpg
import click
import psutil
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from msgspec import Struct
from rich.console import Console

from keys.checkpoint import Checkpoint, NoteSigner, NoteVerifier
from service.authority.audit import RecordFilter
from service.authority.audit.export import LogHeader, Proven
from service.authority.audit.exported import Pinning
from service.authority.audit.merkle import Frontier, leaf_hash
from service.authority.audit.verify import LogCheck, LogReport, encoded, month_of
from service.http.export import ndjson
from service.store.archive_files import publish, staged_archive, verify_archive
from service.store.audit_log import AuditRecords
from service.store.audit_tree import LEAF_COLUMNS
from service.store.audit_verify import PAGE, Job, Survey, open_reader, page, parts, survey
from service.store.database import MIGRATING, Database, connect
from service.store.embedded import DATABASE, OWNER, SUPERUSER, EmbeddedPostgres, Running
from service.store.export_files import verify_export
from service.store.migrate import migrate
from tests.conftest import in_database

BAR: Final = 0.1
ROUNDS: Final = 5
FULL: Final = (100_000, 400_000)
"""Records of the log whose memory is compared, and of the one that is measured."""
QUICK: Final = (70_000, 140_000)
MEMORY_BAR: Final = 1.2
"""What the command takes for the longer log, beside the shorter one: it reads piece by piece."""
SAMPLE_EVERY: Final = 0.02

# A day of tokens, ten a millisecond, each with what is personal. A thousand share a commit: readers
# stop at numbers that no transaction of this server has had yet.
_INSERT: Final = """
CREATE TEMP TABLE drawn AS
SELECT i, (substr(uuidv7_floor_1(clock_timestamp() - interval '1 hour'
                                 + i * interval '0.1 ms')::text, 1, 14) || '7'
           || substr(md5(i::text), 1, 3) || '-8' || substr(md5(i::text), 4, 3) || '-'
           || substr(md5(i::text), 8, 12))::uuid AS id
  FROM generate_series(1, $1::integer) AS i
"""
_INSERT_RECORDS: Final = """
INSERT INTO audit_records (id, commit_order, recorded_at, action, outcome, service_user_id,
    service_user, source_system, version, credential_id, kid, iat, exp, aud, scope,
    signing_input_sha256, request_id, repeats, details, personal_sha256)
SELECT id, audit_era_floor_1() + i / 1000, clock_timestamp(), 'token.issue', 'success',
       'su_abcdefghijklmnopqrstuvwx', 'vkyc-prod', 'vkyc', 3, 'cr_abcdefghijklmnopqrstuvwx',
       'Zs3vNq0b7wYV5xT9kQe1uJm2pRr8oLhXcDfGaBtIyUk', 1800000000 + i, 1800000900 + i,
       'https://ingest.example', 'ingest:write', sha256(i::text::bytea), md5('r' || i), 1, '{}',
       sha256(decode(md5(i::text), 'hex')
              || convert_to('["192.0.2.' || i % 256 || '","privyseal-client/1.0","",""]', 'UTF8'))
  FROM drawn
"""
_INSERT_PERSONAL: Final = """
INSERT INTO audit_personal (id, salt, client_address, user_agent, resource, department)
SELECT id, decode(md5(i::text), 'hex'), '192.0.2.' || i % 256, 'privyseal-client/1.0', '', ''
  FROM drawn
"""
_SELECT_LEAVES: Final = f"""
SELECT {LEAF_COLUMNS.replace("r.version", "1 AS v, r.version")} FROM audit_records r
 WHERE (r.commit_order, r.id) > ($1::bigint, $2::uuid)
 ORDER BY r.commit_order, r.id LIMIT 10000
"""


class Log(Struct, frozen=True, kw_only=True):
    """One log, in each of the forms that can be checked."""

    database: Running
    leaves: Sequence[bytes]
    archive: Path
    export: Path
    verifier: NoteVerifier


@click.command()
@click.option("--quick", is_flag=True, help="Fewer records: shows that it runs.")
def main(quick: bool) -> None:
    """Measure, print, and exit with 1 if a bar is missed."""
    console = Console()
    processes = os.cpu_count() or 1
    with _postgres() as running, tempfile.TemporaryDirectory(prefix="privyseal-bench-") as to:
        shorter, longer = (_log(running, count, Path(to)) for count in (QUICK if quick else FULL))
        met = True
        for what, check in (
            (f"a database, {processes} processes", lambda: _checked(longer.database, processes)),
            (
                "an archive",
                lambda: verify_archive(longer.archive, verifier=longer.verifier, outside=()),
            ),
            (f"an export, {processes} processes", lambda: _checked_export(longer, processes)),
        ):
            ratio = statistics.median(
                _ratio(console, what, longer.leaves, check) for _ in range(ROUNDS)
            )
            met = met and ratio >= BAR
            console.print(
                f"[bold {'green' if ratio >= BAR else 'red'}]`audit verify` of {what}: {ratio:.2f} "
                f"of hashlib.sha256 alone; the bar is {BAR}: {'met' if ratio >= BAR else 'MISSED'}."
            )
        both = (shorter, longer)
        for what, peaks in (
            ("a database", [_peak(log) for log in both]),
            ("an archive", [_peak(log, log.archive) for log in both]),
            ("an export", [_peak(log, log.export) for log in both]),
        ):
            ratio = peaks[1] / peaks[0]
            met = met and ratio <= MEMORY_BAR
            megabytes = ", ".join(
                f"{peak / 1e6:,.0f} MB for {len(log.leaves):,} records"
                for peak, log in zip(peaks, both, strict=True)
            )
            console.print(
                f"[bold {'green' if ratio <= MEMORY_BAR else 'red'}]`audit verify` of {what}: "
                f"{megabytes}: {ratio:.2f} times; the bar is {MEMORY_BAR}: "
                f"{'met' if ratio <= MEMORY_BAR else 'MISSED'}.",
                soft_wrap=True,
            )
    sys.exit(not met)


def _log(running: Running, count: int, directory: Path) -> Log:
    directory = directory / str(count)
    directory.mkdir()
    database = asyncio.run(_new_database(running, f"log_{count}"))
    leaves = asyncio.run(_filled(database, count))
    archive, verifier = asyncio.run(_archived(database, directory))
    export = asyncio.run(_exported(database, directory / "export.ndjson"))
    return Log(database=database, leaves=leaves, archive=archive, export=export, verifier=verifier)


def _peak(log: Log, *files: Path) -> int:
    """Return the most memory that the command had at a time, with its processes: bytes."""
    privyseal = str(Path(sys.executable).with_name("privyseal"))
    peak = 0
    with psutil.Popen(
        (privyseal, "audit", "verify", "--key", log.verifier.vkey, *files),
        env={**os.environ, "PRIVYSEAL_DATABASE_URL": log.database.service_dsn.reveal()},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as command:
        while command.poll() is None:
            peak = max(peak, sum(map(_resident, _with_children(command))))
            time.sleep(SAMPLE_EVERY)
    assert command.returncode == 0
    return peak


def _with_children(command: psutil.Process) -> Sequence[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        return [command, *command.children(recursive=True)]
    return []


def _resident(process: psutil.Process) -> int:
    with suppress(psutil.Error):  # it has ended meanwhile
        resident: int = process.memory_info().rss
        return resident
    return 0


def _ratio(
    console: Console, what: str, leaves: Sequence[bytes], check: Callable[[], LogReport]
) -> float:
    before = _hashed_alone(leaves)
    started = time.perf_counter()
    report = check()
    seconds = time.perf_counter() - started
    alone = (before + _hashed_alone(leaves)) / 2
    assert report.records == len(leaves)
    assert not report.findings
    megabytes = sum(map(len, leaves)) / 1e6
    console.print(
        f"{what}: {len(leaves) / seconds:,.0f} records/s, {megabytes / seconds:,.0f} MB/s; "
        f"hashlib alone: {len(leaves) / alone:,.0f} leaves/s, {megabytes / alone:,.0f} MB/s; "
        f"ratio {alone / seconds:.3f}; load {os.getloadavg()[0]:.1f}",
        soft_wrap=True,
    )
    return alone / seconds


def _hashed_alone(leaves: Sequence[bytes]) -> float:
    """Return the seconds that hashing each leaf takes, and nothing else."""
    started = time.perf_counter()
    for leaf in leaves:
        hashlib.sha256(leaf).digest()
    return time.perf_counter() - started


def _checked(running: Running, processes: int) -> LogReport:
    log = asyncio.run(_surveyed(running)).logs[0]
    check = LogCheck(log.origin, log.size)
    job = Job(log=log.number, size=log.size, archived={}, cuts=())
    for part in parts(running.service_dsn, job, processes=processes):
        check.add(part)
    return check.finish(newest_inside=log.newest_size)


async def _surveyed(running: Running) -> Survey:
    connection = await open_reader(running.service_dsn)
    try:
        return await survey(connection)
    finally:
        await connection.close(timeout=5)


async def _archived(running: Running, directory: Path) -> tuple[Path, NoteVerifier]:
    """Write the whole log as one archive; return its manifest and the log's key."""
    connection = await open_reader(running.service_dsn)
    try:
        log = (await survey(connection)).logs[0]
        (((_, first_id, _), _, _),) = await page(connection, log.number, 0, 1)
        with staged_archive(directory, log.origin, month_of(first_id)) as writer:
            for at in range(0, log.size, PAGE):
                leaves = await page(connection, log.number, at, min(at + PAGE, log.size))
                for (index, _, digest), members, personal in leaves:
                    writer.record(index, digest, encoded(members))
                    _, salt, *values = personal
                    writer.personal(index, salt, values)
    finally:
        await connection.close(timeout=5)
    assert log.newest_note is not None
    verifier = NoteVerifier(log.origin, Ed25519PublicKey.from_public_bytes(log.public_key))
    return publish(writer.finish(log.newest_note)), verifier


async def _exported(running: Running, path: Path) -> Path:
    """Write the whole log as an export without filters is written; return where."""
    connection = await open_reader(running.service_dsn)
    try:
        log = (await survey(connection)).logs[0]
    finally:
        await connection.close(timeout=5)
    assert log.newest_note is not None
    header = LogHeader(log_origin=log.origin, checkpoint=log.newest_note.decode())
    async with Database(running.service_dsn, application_name="bench") as database:
        with path.open("wb") as file:
            file.write(ndjson([Proven(line=header)]))
            records, cursor = AuditRecords(database), None
            while page := await records.read(
                RecordFilter(), cursor=cursor, newest_first=False, limit=PAGE
            ):
                file.write(ndjson([Proven(line=record) for record in page]))
                cursor = page[-1].cursor
    return path


def _checked_export(log: Log, processes: int) -> LogReport:
    (report,) = verify_export(
        log.export,
        pinning=lambda _: Pinning(verifier=log.verifier, outside=()),
        cuts=(),
        processes=processes,
        on_progress=lambda _: None,
    )
    return report


@contextmanager
def _postgres() -> Generator[Running, None, None]:
    data_dir = Path(tempfile.mkdtemp(prefix="privyseal-bench-"))
    data_dir.chmod(0o711)  # the server may run as another user
    bin_dir = os.environ.get("PRIVYSEAL_PG_BIN")
    try:
        with EmbeddedPostgres(data_dir, bin_dir=Path(bin_dir) if bin_dir else None) as running:
            yield running
    finally:
        shutil.rmtree((data_dir / "postgres").resolve(), ignore_errors=True)
        shutil.rmtree(data_dir, ignore_errors=True)


async def _new_database(running: Running, name: str) -> Running:
    superuser = in_database(running, SUPERUSER).superuser_dsn
    connection = await asyncpg.connect(superuser.reveal(), timeout=10)
    try:
        await connection.execute(f"CREATE DATABASE {name} TEMPLATE {DATABASE} OWNER {OWNER}")
    finally:
        await connection.close(timeout=5)
    return in_database(running, name)


async def _filled(running: Running, count: int) -> list[bytes]:
    """Fill the log as a sequencer would, in one go; return the leaves."""
    connection = await connect(running.owner_dsn, application_name="bench", deadlines=MIGRATING)
    try:
        await migrate(connection)
        await connection.set_type_codec(
            "jsonb", schema="pg_catalog", encoder=str, decoder=lambda _: {}
        )
        await connection.execute(_INSERT.replace("$1", str(count)))
        await connection.execute(_INSERT_RECORDS)
        await connection.execute(_INSERT_PERSONAL)
        leaves: list[bytes] = []
        hashes: list[tuple[int, int, Any, bytes]] = []
        nodes: list[tuple[int, int, int, bytes]] = []
        frontier, place = Frontier(), (0, None)
        while True:
            rows = await connection.fetch(
                _SELECT_LEAVES, place[0], place[1] or "00000000-0000-0000-0000-000000000000"
            )
            if not rows:
                break
            for row in rows:
                leaves.append(encoded(tuple(row)))
                digest = leaf_hash(leaves[-1])
                hashes.append((1, len(hashes), row["id"], digest))
                nodes += [(1, n.level, n.index, n.hash) for n in frontier.append(digest)]
            place = (int(rows[-1]["commit_order"]), rows[-1]["id"])
        signer = NoteSigner("bench.example/audit/1", Ed25519PrivateKey.generate())
        origin = signer.verifier.name
        note = Checkpoint(origin=origin, size=frontier.size, root=frontier.root()).signed(signer)
        await connection.execute(
            "INSERT INTO audit_logs VALUES (1, $1, $2, '', 0, clock_timestamp())",
            origin,
            signer.verifier.public_key.public_bytes_raw(),
        )
        await connection.copy_records_to_table("audit_leaves", records=hashes)
        await connection.copy_records_to_table("audit_nodes", records=nodes)
        await connection.execute(
            "INSERT INTO audit_checkpoints VALUES (1, $1, $2, $3, $4, clock_timestamp())",
            frontier.size,
            place[0],
            place[1],
            note,
        )
        await connection.execute("VACUUM ANALYZE")
        return leaves
    finally:
        await connection.close(timeout=5)


if __name__ == "__main__":
    main()
