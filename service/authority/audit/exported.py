"""The check of an export without a database: every record against its hash, all of them with what
lies between them against the checkpoint that they came with, and against others.

Opens no file: lines come in as they were read, in blocks that processes of their own can examine;
`ExportCheck` joins what they found.
"""

import math
import re
from base64 import b64decode
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from keys.checkpoint import NoteRefused, NoteVerifier
from service.authority.audit.archive import Unreadable
from service.authority.audit.export import LogHeader
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
)

_MAX_LEVEL: Final = 62
_OWN: Final = "its own checkpoint"

_ID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_COMMIT_ORDER: Final = re.compile(r"[0-9]{1,18}")
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
    gc=False,
)
_decoder: Any = msgspec.json.Decoder(_ExportedLine)
_decode_line, _decode_lines = _decoder.decode, _decoder.decode_lines
_NoRecord: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What a line raises that is none."""


class _Header(LogHeader, frozen=True, kw_only=True, forbid_unknown_fields=True):
    proof: tuple[Node, ...] = ()


_decode_header = msgspec.json.Decoder(_Header).decode
HEADER_BEGINS: Final = b'{"log_origin":'


class Pinning(Struct, frozen=True, kw_only=True):
    """What the reader of an export knows of a log: its key, and what checkpoints of it say."""

    verifier: NoteVerifier
    outside: Sequence[Claim]


class Block(Struct, frozen=True, kw_only=True):
    """Some lines of an export, in order, of one log; a process of its own can examine them."""

    header: bytes
    """The line that the records of this log come under."""
    begins: bool
    """Whether these lines come right after it."""
    first_line: int
    lines: int
    """How many there are."""
    cuts: Sequence[int]
    """Sizes at which the tree is compared with checkpoints from outside."""


def examine(block: Block, lines: bytes) -> list[Part]:
    """Return what is in these lines, in order; what is between two parts is missing, or twice.

    Some hundred are faster than thousands, which no cache would hold. Raise Unreadable if the
    header makes no sense.
    """
    return _Examined(block).of(lines)


class ExportCheck:
    """Joins the parts of an export, in order, and compares each log with its checkpoint."""

    def __init__(self, pinning: Callable[[str], Pinning]) -> None:
        self._pinning = pinning
        self._reports: list[LogReport] = []
        self._check: LogCheck | None = None
        self._at = self._size = 0

    def add(self, block: Block, parts: Iterable[Part]) -> None:
        """Take the next block; raise Unreadable, and whatever `pinning` raises."""
        if block.begins:
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
        self._at = self._size = 0
        note = header.checkpoint.encode()
        try:
            own = claim_of(note, pinned.verifier, place=_OWN, outside=False)
        except NoteRefused as refused:
            check = LogCheck(header.log_origin, 0, archive=True)
            words = f"The export's own checkpoint is not one of this log: {refused}."
            check.report(Finding(flaw=Flaw.CHECKPOINT, words=words))
            check.give_up()
            return check
        self._size = own.size
        return LogCheck(header.log_origin, own.size, outside=pinned.outside, archive=True)

    def _end(self) -> None:
        if self._check is not None:
            if self._at < self._size:
                self._gap(self._check, self._size)
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
        header = _header(block.header)
        self._block = block
        self._origin = header.log_origin
        self._claims = _unverified_claims(header.checkpoint)
        self._size = min((own.size for own in self._claims), default=math.inf)
        self._parts: list[Part] = []
        self._at = 0
        self._run: list[Placed] = []
        if block.begins:
            self._prove(header.proof)

    def of(self, lines: bytes) -> list[Part]:
        for number, record in enumerate(_records(lines, self._block.lines)):
            if isinstance(record, _NoRecord):
                self._examine()
                line = self._block.first_line + number
                words = f"Line {line:,} is no record of an export ({record})."
                self._found(Finding(flaw=Flaw.EDITED, words=words))
            else:
                self._take(record)
        self._examine()
        return self._parts

    def _take(self, record: Any) -> None:
        index: int | None = record.leaf_index
        if index is None or index >= self._size:
            self._examine()
            words = f"Record {record.id} has no place under this checkpoint: nothing proves it."
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
                words = f"Record {index:,} ({record.id}) was edited: {error}."
                self._found(Finding(flaw=Flaw.EDITED, words=words, index=index))
                self._add([Subtree(0, record.leaf_hash)] if record.leaf_hash else [])
        if record.proof:
            self._examine()
            self._prove(record.proof)

    def _examine(self) -> None:
        """Examine the neighbours that were collected."""
        run, self._run = self._run, []
        if not run:
            return
        start, stop = self._at, self._at + len(run)
        examination = Examination(start, stop)
        examination.add(run)
        cuts = [cut for cut in self._block.cuts if start < cut <= stop]
        self._parts.append(examination.part(claims=self._claims, cuts=cuts))
        self._at = stop

    def _prove(self, proof: Iterable[Node]) -> None:
        """Take the roots over leaves that are not in the export."""
        for node in proof:
            level = min(max(node.level, 0), _MAX_LEVEL)
            self._at = max(node.index, 0) << level
            self._add([Subtree(level, node.hash)])

    def _add(self, subtrees: Sequence[Subtree]) -> None:
        start = self._at
        self._at += sum(1 << subtree.level for subtree in subtrees)
        self._parts.append(_part(start, subtrees, claims=self._claims))

    def _found(self, finding: Finding) -> None:
        """Add what leaves no head to be computed."""
        self._parts.append(_part(self._at, whole=False, findings=[finding]))


def _records(lines: bytes, count: int) -> Sequence[Any]:
    """Return what each of so many lines says, an error where it is no record."""
    with suppress(*_NoRecord):
        # All at once, without cutting them first; what is no line of its own shows in the number.
        if len(records := _decode_lines(lines)) == count:
            return records
    return [_record_or_error(line) for line in lines.splitlines()]


def _record_or_error(line: bytes) -> Any:
    try:
        return _decode_line(line)
    except _NoRecord as error:
        return error


def _header(line: bytes) -> _Header:
    try:
        return _decode_header(line)
    except msgspec.DecodeError as error:
        raise Unreadable(f"It has a checkpoint that makes no sense ({error}).") from None


def _unverified_claims(note: str) -> list[Claim]:
    """Return what a checkpoint says; whoever joins the parts verifies it."""
    try:
        _, size, root, *_ = note.split("\n")
        return [
            Claim(size=int(size), root=b64decode(root, validate=True), place=_OWN, outside=False)
        ]
    except ValueError:
        return []


def _part(
    start: int,
    subtrees: Sequence[Subtree] = (),
    *,
    whole: bool = True,
    findings: Sequence[Finding] = (),
    claims: Sequence[Claim] = (),
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
        claims=claims,
    )


def _members(line: Any, origin: str) -> Sequence[Any]:
    """Return what the leaf of a line is made of; raise ValueError saying what cannot be true."""
    commit_order, _, record_id = line.cursor.partition(".")
    occurred_at, personal_sha256 = line.occurred_at, line.personal_sha256
    signing_input_sha256 = line.signing_input_sha256
    if not _ID.fullmatch(line.id):
        raise ValueError("its id is none")
    if not _COMMIT_ORDER.fullmatch(commit_order) or record_id != line.id:
        raise ValueError("its cursor is that of another record")
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
        commit_order,
        line.credential_id,
        line.details,
        line.exp,
        line.iat,
        line.id,
        # An issuance is shown with its own id there.
        None if line.exp is not None and line.jti == line.id else line.jti,
        line.kid,
        occurred_at and (occurred_at - _EPOCH) // _MICROSECOND,
        line.outcome,
        personal_sha256 and _from_hex(personal_sha256),
        line.reason,
        (line.recorded_at - _EPOCH) // _MICROSECOND,
        line.repeats,
        line.request_id,
        line.scope,
        line.service_user,
        line.service_user_id,
        signing_input_sha256 and _from_hex(signing_input_sha256),
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
    return (line.id, _from_hex(salt or ""), *values)
