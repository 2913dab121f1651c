"""`privyseal audit verify`, `archive` and `erase`: what is done with the log where the database is.

Opens no key of the service: a checkpoint is verified with the log's public key, which its reader
has pinned.
"""

import asyncio
import os
import re
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import click
import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from msgspec import Struct
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from keys.checkpoint import MAX_NOTE_BYTES, NoteRefused, NoteVerifier
from keys.secret import Secret
from service.authority.audit.archive import Unreadable
from service.authority.audit.exported import Pinning
from service.authority.audit.verify import (
    Claim,
    Finding,
    Flaw,
    LogCheck,
    LogReport,
    claim_of,
    unverified_origin,
)
from service.authority.errors import Conflict, StartRefused
from service.cli.arguments import confirm
from service.cli.render import print_json, printable
from service.cli.server import command_settings, owner_dsn, refusing
from service.settings import Settings
from service.store.archive_files import manifest_path, read_manifest, verify_archive
from service.store.audit_archive import (
    Archive,
    Archived,
    closed_months,
    count_matching,
    erase,
    months_with_records,
    open_owner,
)
from service.store.audit_verify import (
    CLOSING,
    Job,
    StoredLog,
    Survey,
    inserted,
    open_reader,
    parts,
    survey,
    waiting,
)
from service.store.embedded import require_running
from service.store.export_files import is_export, verify_export

MAX_PROCESSES: Final = 8

_SIZE: Final = re.compile(rb"[^\n]*\n([0-9]{1,19})\n")
_VKEY: Final = "name+8 hex digits+base64"

_DRAW_EVERY: Final = 0.1
"""Seconds between two looks of a bar."""

NOT_COMPARED: Final = 3
"""Exit status: nothing was found, and a checkpoint that was given could not be compared with."""

NOT_OUTSIDE: Final = (
    "Compared with no checkpoint from outside the database: a log that was cut, restored from an "
    "older backup, forked, or rewritten by who holds its key would look whole. Give one that was "
    "kept elsewhere: --checkpoint."
)


class Pinned(Struct, frozen=True, kw_only=True):
    """What the reader of a log brings along: verifier keys, and checkpoints not verified yet."""

    keys: Mapping[str, NoteVerifier]
    unverified_notes: Sequence[tuple[str, bytes]]
    """Where each was found, and what it says."""


class Verdict(Struct, frozen=True, kw_only=True):
    """What the check of a database or of an archive found."""

    reports: Sequence[LogReport]
    notices: Sequence[str]
    waiting: int = 0
    erased_on_record: int = 0


def verify(
    *,
    database: str | None,
    files: Sequence[Path],
    checkpoints: Sequence[Path],
    keys: Sequence[str],
    as_json: bool,
) -> None:
    """Check, print, and exit with 1 if anything is wrong, with NOT_COMPARED if nothing else is."""
    settings = None if files or database else command_settings()
    if settings is not None and not checkpoints and settings.checkpoint_path.is_dir():
        checkpoints = [settings.checkpoint_path]
    pinned = Pinned(keys=_pinned_keys(keys), unverified_notes=_notes(checkpoints))
    if files:
        verdict = verify_files(files, pinned)
    else:
        dsn = Secret(database) if database else _reading_dsn(settings)
        verdict = refusing(lambda: verify_database(dsn, pinned, processes=_processes()))
    if as_json:
        print_json(_as_json(verdict))
    else:
        _print(verdict)
    flaws = {finding.flaw for report in verdict.reports for finding in report.findings}
    sys.exit(NOT_COMPARED if flaws == {Flaw.UNCOMPARED} else bool(flaws))


def verify_files(files: Sequence[Path], pinned: Pinned) -> Verdict:
    """Check archives and exports, each by itself. Needs the key of each one's log."""
    reports: list[LogReport] = []
    for file in files:
        if _is_csv(file):
            raise click.UsageError(f"{file}: a CSV cannot be verified. Export NDJSON.")
        try:
            reports += (_verify_export if is_export(file) else _verify_archive)(file, pinned)
        except Unreadable as damage:
            raise click.ClickException(str(damage)) from None
    notices = [
        f"{printable(report.origin)}: {report.records:,} of {report.size:,} records are in the "
        "file. It proves those, and not that none was left out. How many records an archive has, "
        "and the digest of its file, says the log's own record (audit.archive)."
        for report in reports
        if report.records < report.size and not report.findings
    ]
    notices += [
        f"{printable(report.origin)}: {_from(report.agreed_outside)}only the file's own checkpoint "
        "vouches for it. That shows that the file is whole and signed. It does not show that the "
        "log was not rewritten by who holds its key: for that, give a later one that was kept "
        "elsewhere (--checkpoint)."
        for report in reports
        if report.agreed_outside < report.size and not report.findings
    ]
    return Verdict(reports=reports, notices=notices)


def _from(index: int) -> str:
    return f"from record {index:,} on (counted from 0), " if index else ""


def _is_csv(file: Path) -> bool:
    """Say whether a file begins with a quote: of all that is exported or archived only CSV does."""
    with file.open("rb") as opened:
        return opened.read(1) == b'"'


def _verify_archive(file: Path, pinned: Pinned) -> list[LogReport]:
    path = manifest_path(file)
    manifest = read_manifest(path)
    pinning, refused = _pinning(path, manifest.origin, pinned)
    with _bar(path.name, manifest.records) as advance:
        report = verify_archive(
            path, verifier=pinning.verifier, outside=pinning.outside, on_progress=advance
        )
    return [_with(report, refused)]


def _verify_export(file: Path, pinned: Pinned) -> list[LogReport]:
    refused: dict[str, list[Finding]] = {}
    known: dict[str, Pinning] = {}

    def pinning(origin: str) -> Pinning:
        if origin not in known:
            known[origin], refused[origin] = _pinning(file, origin, pinned)
        return known[origin]

    size = file.stat().st_size
    try:
        with _bar(file.name, size) as advance:
            reports = verify_export(
                file,
                pinning=pinning,
                cuts=_unverified_sizes(pinned),
                processes=_processes(),
                on_progress=lambda done: advance(done, size),
            )
    except Unreadable as damage:
        raise Unreadable(f"{file} is no export that can be verified. {damage}") from None
    return [_with(report, refused[report.origin]) for report in reports]


def _unverified_sizes(pinned: Pinned) -> list[int]:
    """Return the sizes that the given checkpoints name on their second lines."""
    found = [_SIZE.match(note) for _, note in pinned.unverified_notes]
    return sorted({int(size[1]) for size in found if size})


def _pinning(path: Path, origin: str, pinned: Pinned) -> tuple[Pinning, list[Finding]]:
    """Return what is pinned of the log that a file is of, and which checkpoints are none of it."""
    verifier = pinned.keys.get(origin)
    if verifier is None:
        raise click.UsageError(
            f"{path} is of the log {printable(origin)}: give its verifier key, as `privyseal "
            "migrate` prints it (--key)."
        )
    outside, refused = _claims(origin, verifier, pinned)
    return Pinning(verifier=verifier, outside=outside), refused


def verify_database(dsn: Secret, pinned: Pinned, *, processes: int) -> Verdict:
    """Check every log of a database; raise StoreUnavailable."""
    found = asyncio.run(_survey(dsn))
    reports: list[LogReport] = []
    notices: list[str] = []
    for log in found.logs:
        verifier, refused = _verifier(log, pinned, notices)
        outside, refused_notes = _claims(log.origin, verifier, pinned)
        refused += refused_notes
        check = LogCheck(log.origin, log.size, outside=outside)
        job = Job(
            log=log.number,
            size=log.size,
            archived=found.archived,
            cuts=[claim.size for claim in outside],
        )
        with _bar(log.origin, log.size) as advance:
            for part in parts(dsn, job, processes=processes):
                check.add(part)
                advance(part.stop, log.size)
        if log.newest_note is not None:
            refused += _newest_refused(log.newest_note, verifier)
        reports.append(_with(check.finish(newest_inside=log.newest_size or 0), refused))
    known = {log.origin for log in found.logs}
    strangers = _strangers(known, pinned)
    records = sum(report.records for report in reports)
    beside, not_yet = asyncio.run(_beside(dsn, found, records))
    if not reports:
        raise StartRefused("The database has no audit log yet: privyseal migrate.")
    reports[-1] = _with(reports[-1], [*_miscounted(found, reports), *beside, *strangers])
    if not pinned.unverified_notes:
        notices.append(NOT_OUTSIDE)
    if found.archived:
        notices.append(
            f"Of {', '.join(found.archived)} only hashes are here. Which records there were shows "
            "the archive: verify its files."
        )
    return Verdict(reports=reports, notices=notices, waiting=not_yet, erased_on_record=found.erased)


async def _survey(dsn: Secret) -> Survey:
    connection = await open_reader(dsn)
    try:
        return await survey(connection)
    finally:
        await connection.close(timeout=CLOSING)


async def _beside(dsn: Secret, found: Survey, records: int) -> tuple[list[Finding], int]:
    """Look for records that are in no leaf although the log has passed them."""
    if not found.logs:
        return [], 0
    reached = found.logs[-1].reached
    connection = await open_reader(dsn)
    try:
        strangers = await inserted(connection, reached, records)
        not_yet = await waiting(connection, reached)
    finally:
        await connection.close(timeout=CLOSING)
    findings = [
        Finding(
            flaw=Flaw.INSERTED,
            words=f"Record {record_id} was inserted: it stands among records that are in the log, "
            "and is in none of its leaves.",
            id=record_id,
        )
        for record_id in strangers
    ]
    return findings, not_yet


def _miscounted(found: Survey, reports: Sequence[LogReport]) -> list[Finding]:
    """Compare how many records are in archives with what the log says."""
    findings = [
        Finding(
            flaw=Flaw.MISSING,
            words=f"The log says that {printable(month)} was archived. That cannot be: a month "
            "goes whole, and not before it is over for seven days.",
        )
        for month in found.not_archived
    ]
    for month, records in found.archived.items():
        gone = sum(report.archived.get(month, 0) for report in reports)
        if gone != records:
            findings.append(
                Finding(
                    flaw=Flaw.MISSING,
                    words=f"Of {month}, {gone:,} records are not in the database any more, and the "
                    f"log says that {records:,} were archived.",
                )
            )
    return findings


def _verifier(
    log: StoredLog, pinned: Pinned, notices: list[str]
) -> tuple[NoteVerifier, list[Finding]]:
    stored = NoteVerifier(log.origin, Ed25519PublicKey.from_public_bytes(log.public_key))
    verifier = pinned.keys.get(log.origin)
    if verifier is None:
        notices.append(
            f"The key of {log.origin} was taken from the database itself, which could name any: "
            f"{stored.vkey}. Pin the one that `privyseal migrate` printed: --key."
        )
        return stored, []
    if verifier.vkey == stored.vkey:
        return verifier, []
    words = f"The database names another key for {log.origin} than the one that is pinned."
    return verifier, [Finding(flaw=Flaw.CHECKPOINT, words=words)]


def _newest_refused(note: bytes, verifier: NoteVerifier) -> list[Finding]:
    try:
        claim_of(note, verifier, place="", outside=False)
    except NoteRefused as refused:
        words = f"The newest checkpoint in the database is not one of this log: {refused}."
        return [Finding(flaw=Flaw.CHECKPOINT, words=words)]
    return []


def _claims(
    origin: str, verifier: NoteVerifier, pinned: Pinned
) -> tuple[list[Claim], list[Finding]]:
    """Return what the given checkpoints of a log say, and which of them its key did not sign."""
    claims: list[Claim] = []
    refused: list[Finding] = []
    for place, note in pinned.unverified_notes:
        if unverified_origin(note) != origin:
            continue
        try:
            claims.append(claim_of(note, verifier, place=place, outside=True))
        except NoteRefused as error:
            words = f"{place} is no checkpoint that the key of {origin} signed: {error}."
            refused.append(Finding(flaw=Flaw.CHECKPOINT, words=words))
    return claims, refused


def _strangers(known: set[str], pinned: Pinned) -> list[Finding]:
    """Return the given checkpoints and keys of logs that the database does not have."""
    origins = {unverified_origin(note): place for place, note in pinned.unverified_notes}
    origins |= dict.fromkeys(pinned.keys, "the key that is pinned")
    return [
        Finding(
            flaw=Flaw.CHECKPOINT,
            words=f"The database has no log {printable(origin)}, of which there is {place}: it is "
            "another one, or was restored from before that log began.",
        )
        for origin, place in origins.items()
        if origin not in known
    ]


def _with(report: LogReport, more: Sequence[Finding]) -> LogReport:
    if not more:
        return report
    findings = [*report.findings, *more]
    return msgspec.structs.replace(report, findings=findings, flaws=report.flaws + len(more))


def _pinned_keys(given: Sequence[str]) -> dict[str, NoteVerifier]:
    """Read verifier keys, or files with some, among whatever `privyseal migrate` says beside."""
    verifiers: dict[str, NoteVerifier] = {}
    for value in given:
        path = Path(value)
        is_file = "+" not in value and path.is_file()
        text = path.read_text(errors="replace") if is_file else value
        # No word of a sentence has a plus.
        found = [word for word in text.split() if "+" in word]
        if not found:
            place = f"{path} has no" if is_file else f"there is no file {path}, and it is no"
            raise click.BadParameter(f"{place} verifier key ({_VKEY}).", param_hint="--key")
        for word in found:
            try:
                verifier = NoteVerifier.parse(word)
            except NoteRefused as refused:
                place = f"{path}: " if is_file else ""
                raise click.BadParameter(f"{place}{refused}.", param_hint="--key") from None
            verifiers[verifier.name] = verifier
    return verifiers


def _notes(paths: Sequence[Path]) -> list[tuple[str, bytes]]:
    """Read checkpoints, or directories of them."""
    notes: list[tuple[str, bytes]] = []
    for path in paths:
        for file in sorted(path.glob("*.txt")) if path.is_dir() else [path]:
            with file.open("rb") as note:
                notes.append((str(file), note.read(MAX_NOTE_BYTES + 1)))
    return notes


def _reading_dsn(settings: Settings | None) -> Secret:
    assert settings is not None
    if settings.database_url is not None:
        return settings.database_url
    return Secret(refusing(lambda: require_running(settings.data_dir)).service_dsn)


def _processes() -> int:
    return min(len(os.sched_getaffinity(0)), MAX_PROCESSES)


@contextmanager
def _bar(what: str, total: int) -> Generator[Callable[[int, int], None], None, None]:
    """Show how far it is, on a terminal; yields what takes the number that is done."""
    console = Console(stderr=True)
    progress = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
        auto_refresh=False,
    )
    with progress:
        task: TaskID = progress.add_task(printable(what), total=total)

        drawn = 0.0

        def advance(done: int, total: int) -> None:
            nonlocal drawn
            now = time.monotonic()
            # To draw it takes longer than to check the records between two calls.
            due = done >= total or now - drawn >= _DRAW_EVERY
            drawn = now if due else drawn
            progress.update(task, completed=done, total=total, refresh=due)

        yield advance


def _print(verdict: Verdict) -> None:
    for report in verdict.reports:
        _print_report(report)
    if verdict.waiting:
        click.echo(f"{verdict.waiting:,} records have no place in the log yet.")
    erased = sum(report.erased for report in verdict.reports)
    if erased > verdict.erased_on_record:
        click.echo(
            f"Of the personal values that are gone, the log accounts for "
            f"{verdict.erased_on_record:,}.",
            err=True,
        )
    for notice in verdict.notices:
        click.echo(f"Note: {notice}", err=True)


def _print_report(report: LogReport) -> None:
    first = report.first_bad
    counted = [f"{report.records:,} records"]
    if archived := sum(report.archived.values()):
        counted.append(f"{archived:,} in archives ({', '.join(sorted(report.archived))})")
    if report.erased:
        counted.append(f"{report.erased:,} with personal values erased")
    checkpoints = f"{report.compared_outside:,} from outside, {report.compared_inside:,} beside it"
    click.echo(f"{printable(report.origin)}: {', '.join(counted)}; checkpoints: {checkpoints}.")
    if first is None:
        click.echo(click.style("Nothing was changed.", fg="green"))
        return
    verdict = "NOT COMPARED" if first.flaw is Flaw.UNCOMPARED else "TAMPERED"
    click.echo(click.style(f"{verdict}. {printable(first.words)}", fg="red"))
    for finding in report.findings:
        if finding is not first:
            click.echo(f"  {finding.flaw}: {printable(finding.words)}")
    if report.flaws > len(report.findings):
        click.echo(f"  and {report.flaws - len(report.findings):,} more")


def _as_json(verdict: Verdict) -> dict[str, Any]:
    return {
        "ok": not any(report.findings for report in verdict.reports),
        "logs": [
            {
                "origin": report.origin,
                "size": report.size,
                "records": report.records,
                "archived": dict(report.archived),
                "erased": report.erased,
                "checkpoints_outside": report.compared_outside,
                "checkpoints_inside": report.compared_inside,
                "first_bad": _finding(report.first_bad),
                "findings": [_finding(finding) for finding in report.findings],
                "flaws": report.flaws,
            }
            for report in verdict.reports
        ],
        "waiting": verdict.waiting,
        "erased_on_record": verdict.erased_on_record,
        "notices": list(verdict.notices),
    }


def _finding(finding: Finding | None) -> dict[str, Any] | None:
    if finding is None:
        return None
    return {
        "flaw": str(finding.flaw),
        "index": finding.index,
        "id": str(finding.id) if finding.id else None,
        "words": finding.words,
    }


def archive(*, month: str | None, older_than: int | None, directory: Path, as_json: bool) -> None:
    """Archive one month, or all that are old enough."""
    settings = command_settings()
    if month is None and older_than is None:
        older_than = settings.audit_retention_months
    if month is None and older_than is None:
        raise click.UsageError(
            "Give --month, --older-than-months or PRIVYSEAL_AUDIT_RETENTION_MONTHS."
        )
    dsn = owner_dsn(settings)
    done: list[Archived] = []
    try:
        refusing(
            lambda: asyncio.run(
                _archive(dsn, settings.clock_skew, month, older_than, directory, done)
            )
        )
        if not done and not as_json:
            click.echo("Nothing to archive.", err=True)
    finally:
        # Whatever stopped it: what left the database is told.
        _tell_archived(done, as_json)


def _tell_archived(done: Sequence[Archived], as_json: bool) -> None:
    if as_json:
        print_json(
            [
                {
                    "month": each.month,
                    "records": each.records,
                    "manifests": [str(path) for path in each.manifests],
                }
                for each in done
            ]
        )
        return
    for each in done:
        files = ", ".join(str(path) for path in each.manifests)
        click.echo(f"{each.month}: {each.records:,} records are in {files}, verified, and dropped.")
    if done:
        click.echo(
            "Keep the files in two places: nothing else has these records. Those with -personal in "
            "their names can be erased on their own.",
            err=True,
        )


async def _archive(
    dsn: Secret,
    clock_skew: int,
    month: str | None,
    older_than: int | None,
    directory: Path,
    done: list[Archived],
) -> None:
    """Archive the months, the oldest first, and add each to `done` once it left the database."""
    connection = await open_owner(dsn)
    try:
        now = datetime.fromtimestamp(time.time(), UTC)
        there = await months_with_records(connection)
        closed = closed_months(there, now, older_than or 0)
        if month is not None:
            if month not in closed:
                raise Conflict(
                    f"{month} is no month with records that ended at least seven days ago."
                )
            closed = [month]
        store = Archive(connection, directory, clock=time.time, clock_skew=clock_skew)
        for each in closed:
            with _bar(each, 0) as advance:
                done.append(await store.take(each, advance))
    except OSError as error:
        raise StartRefused(f"{directory}: {error.strerror or error}.") from None
    finally:
        connection.terminate()


def erase_matching(
    *, kind: str, wanted: str, before: str | None, reason: str, dry_run: bool, yes: bool
) -> None:
    """Erase personal values, after a question."""
    settings = command_settings()
    dsn = owner_dsn(settings)
    until = datetime.fromisoformat(before) if before else None
    count = refusing(lambda: asyncio.run(_matching(dsn, kind, wanted, until)))
    click.echo(f"{count:,} records have personal values that match.")
    if dry_run or not count:
        return
    if not yes:
        confirm(
            f"Client address, user agent, resource and department of {count:,} records are erased "
            "for good. Backups and archives keep theirs. The records stay."
        )
    erased = refusing(
        lambda: asyncio.run(_erased(dsn, kind, wanted, until, reason, settings.clock_skew))
    )
    click.echo(f"Erased: those of {erased:,} records.")


async def _matching(dsn: Secret, kind: str, wanted: str, before: datetime | None) -> int:
    connection = await open_owner(dsn)
    try:
        return await count_matching(connection, kind, wanted, before)
    finally:
        connection.terminate()


async def _erased(
    dsn: Secret, kind: str, wanted: str, before: datetime | None, reason: str, clock_skew: int
) -> int:
    connection = await open_owner(dsn)
    try:
        return await erase(
            connection,
            kind,
            wanted,
            before,
            reason=reason,
            now=time.time(),
            clock_skew=clock_skew,
        )
    finally:
        connection.terminate()
