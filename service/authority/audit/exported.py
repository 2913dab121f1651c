"""The check of an export without a database: every record against its hash, all of them with what
lies between them against the checkpoint that they came with, and against others.

Opens no file: lines come in as they were read, in blocks that processes of their own can examine;
`ExportCheck` joins what they found.
"""

import math
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from keys.checkpoint import NoteRefused, NoteVerifier
from service.authority.audit.archive import Unreadable
from service.authority.audit.export import LogHeader, for_all_readers
from service.authority.audit.merkle import Node
from service.authority.audit.record import StoredRecord
from service.authority.audit.verify import (
    Claim,
    Examination,
    Finding,
    Flaw,
    LogCheck,
    LogReport,
    Part,
    Placed,
    Subtree,
    claim_of,
    placed_subtree,
)

_CURSOR: Final = re.compile(r"([0-9]{1,18})\.([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})")
_SIZE: Final = re.compile(r"[0-9]{1,19}")
_BRIEF: Final = 200
"""Characters that are shown of what a file says."""
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)
_from_hex = bytes.fromhex

# A line as it was exported, ids and digests as the texts that they are there.
_AS_TEXT: Final = ("id", "jti", "outcome")
_MEMBERS: Final[list[tuple[str, Any]]] = [
    (field.name, str | None if field.name in _AS_TEXT else field.type)
    for field in msgspec.structs.fields(StoredRecord)
]
_ExportedLine: Any = msgspec.defstruct(
    "_ExportedLine",
    [*_MEMBERS, ("proof", tuple[Node, ...], ())],
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    omit_defaults=True,
    gc=False,
)
_decoder: Any = msgspec.json.Decoder(_ExportedLine)
_decode_line, _decode_lines = _decoder.decode, _decoder.decode_lines
_encode_lines = msgspec.json.Encoder().encode_lines
_NoRecord: Final = (msgspec.DecodeError, ValueError, OverflowError, RecursionError)
"""What a line raises that is none."""


class _Header(LogHeader, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    proof: tuple[Node, ...] = ()


_decode_header = msgspec.json.Decoder(_Header).decode
HEADER_BEGINS: Final = b'{"log_origin":'


class Pinning(Struct, frozen=True, kw_only=True):
    """What the reader of an export knows of a log: its key, and what checkpoints of it say."""

    verifier: NoteVerifier
    outside: Sequence[Claim]


class Heading(Struct, frozen=True, kw_only=True):
    """What the line says that records come under; nothing of it is verified."""

    unverified_origin: str
    unverified_size: float
    """How many leaves the checkpoint is of: infinite if it does not say."""


class Block(Struct, frozen=True, kw_only=True):
    """Some lines of an export, in order, of one log; a process of its own can examine them."""

    heading: Heading
    header: bytes | None
    """The line that says so, if these lines come right after it."""
    first_line: int
    lines: int
    """How many there are."""
    cuts: Sequence[int]
    """Sizes at which the tree is compared with checkpoints from outside."""


def examine(block: Block, lines: bytes) -> list[Part]:
    """Return what is in these lines, in order; what is between two parts is missing, or twice.

    Some hundred are faster than thousands, which no cache would hold.
    """
    return _Examined(block).of(lines)


class ExportCheck:
    """Joins the parts of an export, in order, and compares each log with its checkpoint."""

    def __init__(self, pinning: Callable[[str], Pinning]) -> None:
        self._pinning = pinning
        self._reports: list[LogReport] = []
        self._check: LogCheck | None = None
        self._at = 0

    def add(self, block: Block, parts: Iterable[Part]) -> None:
        """Take the next block; raise Unreadable, and whatever `pinning` raises."""
        if block.header is not None:
            self._end()
            self._check = self._begun(_header(block.header))
        assert self._check is not None
        for part in parts:
            if part.stop > part.start:
                if part.start != self._at:
                    self._gap(self._check, part.start)
                self._at = part.stop
            self._check.add(self._placed(part))

    def finish(self) -> list[LogReport]:
        """Return a report for each log, once all blocks are in."""
        self._end()
        return self._reports

    def _begun(self, header: _Header) -> LogCheck:
        pinned = self._pinning(header.log_origin)
        self._at = 0
        note = header.checkpoint.encode()
        try:
            own = claim_of(note, pinned.verifier, place="its own checkpoint", outside=False)
        except NoteRefused as refused:
            check = LogCheck(header.log_origin, 0)
            words = f"The export's own checkpoint is not one of this log: {refused}."
            check.report(Finding(flaw=Flaw.CHECKPOINT, words=words))
            check.give_up()
            return check
        return LogCheck(header.log_origin, own.size, outside=pinned.outside, own=own)

    def _end(self) -> None:
        if self._check is not None:
            self._reports.append(self._check.finish())

    def _placed(self, part: Part) -> Part:
        """Name the record that belongs where a line made no sense."""
        if part.whole or not part.findings or part.findings[0].index is not None:
            return part
        (finding,) = part.findings
        words = f"{finding.words} Record {self._at:,} or one behind it belongs there."
        return replace(part, findings=[replace(finding, words=words, index=self._at)])

    def _gap(self, check: LogCheck, index: int) -> None:
        if index < self._at:
            words = f"Record {index:,} stands where it does not belong, or twice."
            finding = Finding(flaw=Flaw.INSERTED, words=words, index=index)
        else:
            words = f"Record {self._at:,} is missing from the export, or from its proof."
            finding = Finding(flaw=Flaw.MISSING, words=words, index=self._at)
        check.add(_part(self._at, whole=False, findings=[finding]))


class _Examined:
    """Turns lines into parts: neighbours in the log together, and what lies between them."""

    def __init__(self, block: Block) -> None:
        self._block = block
        self._origin = block.heading.unverified_origin
        self._size = block.heading.unverified_size
        self._parts: list[Part] = []
        self._at = 0
        self._run: list[Placed] = []
        if block.header is not None:
            self._prove(_header(block.header).proof, block.first_line - 1)

    def of(self, lines: bytes) -> list[Part]:
        records = _records(lines, self._block.lines)
        for line, record in enumerate(records, start=self._block.first_line):
            if isinstance(record, _NoRecord):
                self._examine()
                words = f"Line {line:,} is no record of an export ({_brief(record)})."
                self._found(Finding(flaw=Flaw.EDITED, words=words))
            else:
                self._take(record, line)
        self._examine()
        return self._parts

    def _take(self, record: Any, line: int) -> None:
        index: int | None = record.leaf_index
        if index is None or index >= self._size:
            self._examine()
            named = f"Record {_brief(record.id)} of line {line:,}"
            words = f"{named} has no place under this checkpoint: nothing proves it."
            finding = Finding(flaw=Flaw.INSERTED, words=words, index=index)
            self._parts.append(_part(self._at, findings=[finding]))
        else:
            if index != self._at + len(self._run):
                self._examine()
                self._at = index
            try:
                leaf = (index, record.id, record.leaf_hash)
                self._run.append((leaf, _members(record, self._origin), _personal(record)))
            # TypeError: a time that has no offset.
            except (ValueError, TypeError) as error:
                self._examine()
                words = f"Record {index:,} ({_brief(record.id)}) was edited: {_brief(error)}."
                self._found(Finding(flaw=Flaw.EDITED, words=words, index=index))
                self._add([Subtree(0, record.leaf_hash)] if record.leaf_hash else [])
        if record.proof:
            self._examine()
            self._prove(record.proof, line)

    def _examine(self) -> None:
        """Examine the neighbours that were collected."""
        run, self._run = self._run, []
        if not run:
            return
        start, stop = self._at, self._at + len(run)
        examination = Examination(start, stop)
        examination.add(run)
        cuts = self._block.cuts
        cuts = cuts[bisect_right(cuts, start) : bisect_right(cuts, stop)]
        self._parts.append(examination.part(cuts=cuts))
        self._at = stop

    def _prove(self, proof: Sequence[Node], line: int) -> None:
        """Take the roots over neighbours that are not in the export."""
        if not proof:
            return
        roots: list[Subtree] = []
        try:
            self._at, _ = placed_subtree(proof[0])
            at = self._at
            for node in proof:
                start, root = placed_subtree(node)
                if start != at:
                    raise ValueError("its nodes are no neighbours")
                roots.append(root)
                at += 1 << root.level
        except ValueError as error:
            words = f"The proof of line {line:,} makes no sense: {error}."
            self._found(Finding(flaw=Flaw.EDITED, words=words))
        else:
            self._add(roots)

    def _add(self, subtrees: Sequence[Subtree]) -> None:
        part = _part(self._at, subtrees)
        self._parts.append(part)
        self._at = part.stop

    def _found(self, finding: Finding) -> None:
        """Add what leaves no head to be computed."""
        self._parts.append(_part(self._at, whole=False, findings=[finding]))


def _records(lines: bytes, count: int) -> Sequence[Any]:
    """Return what each of so many lines says, an error where it is no record."""
    lines = lines.removesuffix(b"\n")
    with suppress(*_NoRecord):
        # All at once, without cutting them first; what is no line of its own shows in the number.
        if len(records := _decode_lines(lines)) == count and _spelt(records) == lines:
            return records
    return [_record_or_error(line) for line in lines.split(b"\n")]


def _record_or_error(line: bytes) -> Any:
    try:
        record = _decode_line(line)
        if _spelt([record]) != line:
            raise ValueError("an export writes it in another way")
        return record
    except _NoRecord as error:
        return error


def _spelt(lines: Sequence[Any]) -> bytes:
    """Return the one way to write lines: whatever else they could be read from may be read as
    something else, too."""
    return for_all_readers(_encode_lines(lines)).removesuffix(b"\n")


def _header(line: bytes) -> _Header:
    try:
        header = _decode_header(line)
        if _spelt([header]) != line.removesuffix(b"\n"):
            raise ValueError("an export writes it in another way")
        return header
    except _NoRecord as error:
        words = f"It has a checkpoint that makes no sense ({_brief(error)})."
        raise Unreadable(words) from None


def heading_of(header: bytes) -> Heading:
    """Return what records come under; raise Unreadable if the line makes no sense."""
    decoded = _header(header)
    _, _, text = decoded.checkpoint.partition("\n")
    size, _, _ = text.partition("\n")
    return Heading(
        unverified_origin=decoded.log_origin,
        unverified_size=int(size) if _SIZE.fullmatch(size) else math.inf,
    )


def _brief(text: object) -> str:
    """Return the beginning of what a file says: a line may be long."""
    return str(text)[:_BRIEF]


def _part(
    start: int,
    subtrees: Sequence[Subtree] = (),
    *,
    whole: bool = True,
    findings: Sequence[Finding] = (),
) -> Part:
    return Part(
        start=start,
        stop=start + sum(1 << subtree.level for subtree in subtrees),
        records=0,
        erased=0,
        archived={},
        subtrees=subtrees,
        whole=whole,
        first=None,
        last=None,
        findings=findings,
        flaws=len(findings),
    )


def _members(line: Any, origin: str) -> Sequence[Any]:
    """Return what the leaf of a line is made of; raise ValueError saying what cannot be true."""
    cursor = _CURSOR.fullmatch(line.cursor)
    if cursor is None or cursor[2] != line.id:
        raise ValueError("its cursor is that of another record, or of none")
    occurred_at, personal_sha256 = line.occurred_at, line.personal_sha256
    signing_input_sha256 = line.signing_input_sha256
    jti = line.jti
    if line.exp is not None:
        if jti is None:
            raise ValueError("it is an issuance and does not show its jti")
        if jti == line.id:
            # An issuance is shown with its own id there.
            jti = None
    if line.log_origin != origin:
        raise ValueError("it says to be of another log")
    if line.leaf_hash is None:
        raise ValueError("it has no hash")
    return (
        line.action,
        line.actor,
        line.actor_credential_id,
        line.actor_id,
        line.aud,
        cursor[1],
        line.credential_id,
        line.details,
        line.exp,
        line.iat,
        line.id,
        jti,
        line.kid,
        occurred_at and (occurred_at - _EPOCH) // _MICROSECOND,
        line.outcome,
        personal_sha256 and _bytes(personal_sha256),
        line.reason,
        (line.recorded_at - _EPOCH) // _MICROSECOND,
        line.repeats,
        line.request_id,
        line.scope,
        line.service_user,
        line.service_user_id,
        signing_input_sha256 and _bytes(signing_input_sha256),
        line.source_system,
        1,
        line.version,
    )


def _personal(line: Any) -> tuple[Any, ...] | None:
    """Return what is personal of a line; None if it was erased, or never was."""
    salt = line.personal_salt
    values = (line.client_address, line.user_agent, line.resource, line.department)
    if salt is None and values == (None, None, None, None):
        return None
    return (line.id, _bytes(salt or ""), *values)


def _bytes(digits: str) -> bytes:
    """Return what was written in hex; raise ValueError if it was not in the one way."""
    decoded = _from_hex(digits)
    if decoded.hex() != digits:
        raise ValueError("a digest or salt of it is not in hex of lower case")
    return decoded
