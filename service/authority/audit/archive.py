"""An archived month: its lines, what proves them, and the check of them without a database.

Opens no file: lines come in as they were read.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal
from uuid import UUID

import msgspec
from msgspec import Raw, Struct

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
    subtrees,
)

_sha256 = hashlib.sha256


class ArchivedLine(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, gc=False):
    """A record with its place. `leaf` is what was hashed, byte for byte."""

    leaf_index: int
    leaf_hash: bytes
    leaf: Raw


class PersonalLine(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, gc=False):
    """What is personal of a record: client address, user agent, resource, department.

    `values` is the array of them that was hashed behind the salt, byte for byte.
    """

    leaf_index: int
    salt: bytes
    values: Raw


class ArchivedFile(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A file as it was written; the digest is of the compressed bytes, in hex."""

    name: str
    sha256: str


class Manifest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an archive is: one month of one log, under a checkpoint.

    The file with the personal values has no digest here: it may be erased, or parts of it.
    """

    format: Literal[1] = 1
    origin: str
    month: str
    records: int
    first_index: int
    last_index: int
    checkpoint: str
    files: Mapping[Literal["records", "proof"], ArchivedFile]
    personal: str


class _Member(Struct, frozen=True, gc=False):
    """What the check needs of a leaf."""

    id: str
    commit_order: str
    personal_sha256: bytes | None


_member_of = msgspec.json.Decoder(_Member).decode
_members_of = msgspec.json.Decoder(list[_Member]).decode


class Unreadable(Exception):
    """An archive is damaged; the text says which file, and how."""


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
        check = LogCheck(manifest.origin, 0, archive=True)
        check.report(
            Finding(
                flaw=Flaw.CHECKPOINT,
                words=f"The archive's own checkpoint is not one of this log: {refused}.",
            )
        )
        return check.finish()
    check = LogCheck(manifest.origin, own.size, outside=outside, archive=True)
    try:
        _check(check, own, records, proof, _Personal(personal))
    except Unreadable as damage:
        check.report(Finding(flaw=Flaw.MISSING, words=str(damage)))
    return check.finish()


def _check(
    check: LogCheck,
    own: Claim,
    records: Iterable[Sequence[ArchivedLine]],
    proof: Iterator[Node],
    personal: "_Personal",
) -> None:
    runs = filter(None, records)
    at = 0
    ahead = next(proof, None)
    run = next(runs, ())
    while run or ahead:
        if ahead is not None and ahead.index << ahead.level == at:
            size = 1 << ahead.level
            check.add(_proven(at, at + size, Subtree(ahead.level, ahead.hash), own))
            at, ahead = at + size, next(proof, None)
            continue
        if not run or run[0].leaf_index != at:
            _disagreement(check, run[0].leaf_index if run else None, at)
            return
        length = 1
        while length < len(run) and run[length].leaf_index == at + length:
            length += 1
        cuts = check.cuts(at, at + length)
        check.add(_examined(run[:length], personal, cuts, own))
        at += length
        run = run[length:] or next(runs, ())
    if at != own.size:
        _disagreement(check, None, at)


def _disagreement(check: LogCheck, found: int | None, expected: int) -> None:
    if found is not None and found < expected:
        words = f"Record {found:,} stands where it does not belong, or twice."
        check.report(Finding(flaw=Flaw.INSERTED, words=words, index=found))
    else:
        words = f"Record {expected:,} is missing from the file, or from its proof."
        check.report(Finding(flaw=Flaw.MISSING, words=words, index=expected))
    check.give_up()


def _proven(start: int, stop: int, subtree: Subtree, own: Claim) -> Part:
    return Part(
        start=start,
        stop=stop,
        records=0,
        erased=0,
        archived={},
        subtrees=[subtree],
        whole=True,
        first=None,
        last=None,
        findings=(),
        flaws=0,
        claims=[own],
    )


def _examined(
    lines: Sequence[ArchivedLine], personal: "_Personal", cuts: Sequence[int], own: Claim
) -> Part:
    findings: list[Finding] = []
    first: tuple[int, str] | None = None
    last: tuple[int, str] | None = None
    erased = 0
    for line, member in zip(lines, _members(lines), strict=True):
        if member is None:
            findings.append(_flaw(Flaw.EDITED, line, None, "was edited: it is no record"))
            continue
        if leaf_digest(line.leaf) != line.leaf_hash:
            findings.append(_flaw(Flaw.EDITED, line, member.id, "was edited: it has another hash"))
        place = (int(member.commit_order), member.id)
        if last is None:
            first = place
        elif place < last:
            findings.append(
                _flaw(Flaw.REORDERED, line, member.id, "stands behind one that was committed later")
            )
        last = place
        values = personal.of(line.leaf_index)
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
    return Part(
        start=start,
        stop=start + len(lines),
        records=len(lines),
        erased=erased,
        archived={},
        subtrees=subtrees([line.leaf_hash for line in lines], start, cuts),
        whole=True,
        first=first,
        last=last,
        findings=findings,
        flaws=len(findings),
        claims=[own],
    )


def _members(lines: Sequence[ArchivedLine]) -> Sequence[_Member | None]:
    """Return what each leaf says, None where it is no record."""
    try:
        # As one array: half the time that they take one by one.
        return _members_of(b"[%b]" % b",".join([line.leaf for line in lines]))
    except msgspec.DecodeError:
        return [_member_or_none(line.leaf) for line in lines]


def _member_or_none(leaf: Raw) -> _Member | None:
    try:
        return _member_of(leaf)
    except msgspec.DecodeError:
        return None


def _flaw(flaw: Flaw, line: ArchivedLine, record_id: str | None, what: str) -> Finding:
    named = f" ({record_id})" if record_id else ""
    return Finding(
        flaw=flaw,
        words=f"Record {line.leaf_index:,}{named} {what}.",
        index=line.leaf_index,
        id=UUID(record_id) if record_id else None,
    )


class _Personal:
    """Finds the personal values of a record among lines that come in order, with gaps."""

    def __init__(self, lines: Iterator[PersonalLine]) -> None:
        self._lines = lines
        self._ahead = next(lines, None)

    def of(self, leaf_index: int) -> PersonalLine | None:
        while (ahead := self._ahead) is not None and ahead.leaf_index <= leaf_index:
            self._ahead = next(self._lines, None)
            if ahead.leaf_index == leaf_index:
                return ahead
        return None
