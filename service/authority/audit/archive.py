"""An archived month: its lines, what proves them, and the check of them without a database.

Opens no file: lines come in as they were read.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, Final, Literal, TypeAlias
from uuid import UUID

import msgspec
from msgspec import Meta, Raw, Struct

from keys.checkpoint import NoteRefused, NoteVerifier
from service.authority.audit.merkle import Node
from service.authority.audit.verify import (
    Claim,
    Finding,
    Flaw,
    LogCheck,
    LogReport,
    Part,
    Subtree,
    claim_of,
    leaf_digest,
    month_bounds,
    placed_subtree,
    subtrees,
)

_DRAWN_BEFORE: Final = timedelta(days=8)
_DRAWN_AFTER: Final = timedelta(hours=1)
"""How long before its commit the id of a record is drawn, which may be reported seven days later,
and how long after it, by a clock that is ahead; with room."""

_sha256 = hashlib.sha256
_Number: TypeAlias = Annotated[int, Meta(ge=0, le=2**63 - 1)]


class ArchivedLine(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, gc=False):
    """A record with its place. `leaf` is what was hashed, byte for byte."""

    leaf_index: _Number
    leaf_hash: bytes
    leaf: Raw


class PersonalLine(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, gc=False):
    """What is personal of a record: client address, user agent, resource, department.

    `values` is the array of them that was hashed behind the salt, byte for byte.
    """

    leaf_index: _Number
    salt: bytes
    values: Raw


class ArchivedFile(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A file as it was written; the digest is of the compressed bytes, in hex."""

    name: str
    sha256: str


class ArchivedFiles(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The files that may lose nothing."""

    records: ArchivedFile
    proof: ArchivedFile


class Manifest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an archive is: one month of one log, under a checkpoint.

    The file with the personal values has no digest here: it may be erased, or parts of it.
    """

    format: Literal[1] = 1
    origin: str
    month: str
    records: _Number
    first_index: _Number
    last_index: _Number
    checkpoint: str
    files: ArchivedFiles
    personal: str


class _Member(Struct, frozen=True, gc=False):
    """What the check needs of a leaf."""

    id: str
    commit_order: str
    recorded_at: int
    personal_sha256: bytes | None


_member_of = msgspec.json.Decoder(_Member).decode
_members_of = msgspec.json.Decoder(list[_Member]).decode
NO_JSON: Final = (msgspec.DecodeError, ValueError, OverflowError, RecursionError)
"""What JSON raises that is none, or none of ours."""


class Unreadable(Exception):
    """A file is damaged, or none of ours; the text says which, and how."""


class _Month:
    """The month that an archive is of."""

    def __init__(self, month: str) -> None:
        """Raise ValueError if it is none."""
        start, end = month_bounds(month)
        self.name: Final = month
        self._ids = _first_id(start), _first_id(end)
        self._alone = _microseconds(start + _DRAWN_BEFORE), _microseconds(end - _DRAWN_AFTER)

    def has(self, record_id: str) -> bool:
        """Say whether a record of this id is of this month."""
        first, stop = self._ids
        return first <= record_id < stop

    def is_alone(self, after: int, before: int) -> bool:
        """Say whether none but records of this month are committed between these two times."""
        start, end = self._alone
        return start <= after and before < end


def _microseconds(at: datetime) -> int:
    return (at - datetime.fromtimestamp(0, UTC)) // timedelta(microseconds=1)


def _first_id(at: datetime) -> str:
    # RFC 9562 §5.7: the milliseconds come first.
    digits = f"{_microseconds(at) // 1000:012x}"
    return f"{digits[:8]}-{digits[8:]}"


class _Seen(Struct, kw_only=True):
    """The records that have come until now."""

    records: int = 0
    first_index: int = 0
    last_index: int = 0
    last_at: int | None = None
    """When the last one was recorded, if it says so."""


def check_archive(
    manifest: Manifest,
    *,
    verifier: NoteVerifier,
    outside: Sequence[Claim],
    records: Iterable[Sequence[ArchivedLine]],
    proof: Iterator[Node],
    personal: Iterator[PersonalLine],
) -> LogReport:
    """Check the lines against each other and against checkpoints, with memory that stays flat.

    `records` come in pieces: some hundred are faster than thousands, which no cache would hold.
    """
    try:
        own = claim_of(
            manifest.checkpoint.encode(), verifier, place="its own checkpoint", outside=False
        )
    except NoteRefused as refused:
        check = LogCheck(manifest.origin, 0)
        check.report(
            Finding(
                flaw=Flaw.CHECKPOINT,
                words=f"The archive's own checkpoint is not one of this log: {refused}.",
            )
        )
        return check.finish()
    check = LogCheck(manifest.origin, own.size, outside=outside, own=own)
    try:
        _check(check, manifest, records, proof, _Personal(personal))
    except Unreadable as damage:
        check.report(Finding(flaw=Flaw.MISSING, words=str(damage)))
        check.give_up()
    return check.finish()


def _check(
    check: LogCheck,
    manifest: Manifest,
    records: Iterable[Sequence[ArchivedLine]],
    proof: Iterator[Node],
    personal: "_Personal",
) -> None:
    month, seen = _month(manifest), _Seen()
    runs = filter(None, records)
    at = 0
    ahead = _placed(next(proof, None))
    run = next(runs, ())
    while run or ahead:
        if ahead is not None and ahead[0] == at:
            part = _part(at, [ahead[1]])
            check.add(part)
            at, ahead = part.stop, _placed(next(proof, None))
            continue
        if not run or run[0].leaf_index != at:
            _disagreement(check, run[0].leaf_index if run else None, at)
            return
        length = 1
        while length < len(run) and run[length].leaf_index == at + length:
            length += 1
        check.add(_examined(run[:length], month, seen, personal, check.cuts(at, at + length)))
        at += length
        run = run[length:] or next(runs, ())
    _compare_counts(check, manifest, seen)
    if (stray := personal.stray()) is not None:
        words = (
            f"There are personal values of record {stray.leaf_index:,}, which has none or has them "
            "in another place."
        )
        check.report(Finding(flaw=Flaw.PERSONAL, words=words, index=stray.leaf_index))


def _month(manifest: Manifest) -> _Month:
    try:
        return _Month(manifest.month)
    except ValueError as error:
        raise Unreadable(f"The manifest is of no month: {error}.") from None


def _placed(node: Node | None) -> tuple[int, Subtree] | None:
    try:
        return None if node is None else placed_subtree(node)
    except ValueError as error:
        raise Unreadable(f"The proof makes no sense: {error}.") from None


def _disagreement(check: LogCheck, found: int | None, expected: int) -> None:
    if found is not None and found < expected:
        words = f"Record {found:,} stands where it does not belong, or twice."
        check.report(Finding(flaw=Flaw.INSERTED, words=words, index=found))
    else:
        words = f"Record {expected:,} is missing from the file, or from its proof."
        check.report(Finding(flaw=Flaw.MISSING, words=words, index=expected))
    check.give_up()


def _compare_counts(check: LogCheck, manifest: Manifest, seen: _Seen) -> None:
    said = manifest.records, manifest.first_index, manifest.last_index
    found = seen.records, seen.first_index, seen.last_index
    if said != found:
        words = (
            "The manifest says {:,} records, from {:,} to {:,}, and it has {:,}, from {:,} to {:,}."
        )
        check.report(Finding(flaw=Flaw.EDITED, words=words.format(*said, *found)))


def _examined(
    lines: Sequence[ArchivedLine],
    month: _Month,
    seen: _Seen,
    personal: "_Personal",
    cuts: Sequence[int],
) -> Part:
    findings: list[Finding] = []
    first: tuple[int, str] | None = None
    last: tuple[int, str] | None = None
    erased = 0
    members = _members(lines)
    for line, member in zip(lines, members, strict=True):
        values = personal.of(line.leaf_index)
        try:
            place = None if member is None else (int(member.commit_order), member.id)
        except ValueError:
            place = None
        if member is None or place is None:
            findings.append(_flaw(Flaw.EDITED, line, None, "was edited: it is no record"))
            continue
        if leaf_digest(line.leaf) != line.leaf_hash:
            findings.append(_flaw(Flaw.EDITED, line, member.id, "was edited: it has another hash"))
        if not month.has(member.id):
            findings.append(_flaw(Flaw.INSERTED, line, member.id, f"is not of {month.name}"))
        if last is None:
            first = place
        elif place < last:
            findings.append(
                _flaw(Flaw.REORDERED, line, member.id, "stands behind one that was committed later")
            )
        last = place
        if values is None:
            erased += member.personal_sha256 is not None
        elif _sha256(values.salt + values.values).digest() != member.personal_sha256:
            findings.append(
                _flaw(
                    Flaw.PERSONAL,
                    line,
                    member.id,
                    "has other personal values than it was written with",
                )
            )
    start = lines[0].leaf_index
    findings += _left_out(start, members[0], month, seen)
    _see(seen, start, members)
    return _part(
        start,
        subtrees([line.leaf_hash for line in lines], start, cuts),
        records=len(lines),
        erased=erased,
        first=first,
        last=last,
        findings=findings,
    )


def _left_out(start: int, member: _Member | None, month: _Month, seen: _Seen) -> list[Finding]:
    """Find records of the month of which the file has hashes only, where it can be told that they
    are: at its ends those of others stand between them."""
    missing = seen.last_index + 1
    if not seen.records or start == missing or seen.last_at is None or member is None:
        return []
    if not month.is_alone(seen.last_at, member.recorded_at):
        return []
    up_to = f", and so are those up to {start - 1:,}" if start - missing > 1 else ""
    words = (
        f"Record {missing:,} is missing{up_to}: only hashes are there, and none but records of "
        f"{month.name} were committed then."
    )
    return [Finding(flaw=Flaw.MISSING, words=words, index=missing)]


def _see(seen: _Seen, start: int, members: Sequence[_Member | None]) -> None:
    if not seen.records:
        seen.first_index = start
    seen.records += len(members)
    seen.last_index = start + len(members) - 1
    last = members[-1]
    seen.last_at = last.recorded_at if last is not None else None


def _part(
    start: int,
    subtrees: Sequence[Subtree],
    *,
    records: int = 0,
    erased: int = 0,
    first: tuple[int, str] | None = None,
    last: tuple[int, str] | None = None,
    findings: Sequence[Finding] = (),
) -> Part:
    return Part(
        start=start,
        stop=start + sum(1 << subtree.level for subtree in subtrees),
        records=records,
        erased=erased,
        archived={},
        subtrees=subtrees,
        whole=True,
        first=first,
        last=last,
        findings=findings,
        flaws=len(findings),
    )


def _members(lines: Sequence[ArchivedLine]) -> Sequence[_Member | None]:
    """Return what each leaf says, None where it is no record."""
    try:
        # As one array: half the time that they take one by one.
        return _members_of(b"[%b]" % b",".join([line.leaf for line in lines]))
    except NO_JSON:
        return [_member_or_none(line.leaf) for line in lines]


def _member_or_none(leaf: Raw) -> _Member | None:
    try:
        return _member_of(leaf)
    except NO_JSON:
        return None


def _flaw(flaw: Flaw, line: ArchivedLine, record_id: str | None, what: str) -> Finding:
    id_ = _uuid(record_id)
    named = f" ({id_})" if id_ else ""
    return Finding(
        flaw=flaw, words=f"Record {line.leaf_index:,}{named} {what}.", index=line.leaf_index, id=id_
    )


def _uuid(text: str | None) -> UUID | None:
    try:
        return UUID(text) if text else None
    except ValueError:
        return None


class _Personal:
    """Finds the personal values of a record among lines that come in order, with gaps."""

    def __init__(self, lines: Iterator[PersonalLine]) -> None:
        self._lines = lines
        self._ahead = next(lines, None)
        self._stray: PersonalLine | None = None

    def of(self, leaf_index: int) -> PersonalLine | None:
        while (ahead := self._ahead) is not None and ahead.leaf_index <= leaf_index:
            self._ahead = next(self._lines, None)
            if ahead.leaf_index == leaf_index:
                return ahead
            self._stray = self._stray or ahead
        return None

    def stray(self) -> PersonalLine | None:
        """Return a line that was of no record, once all records were asked for."""
        return self._stray or self._ahead
