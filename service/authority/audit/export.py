"""Exports: the log, or a part of it, page by page, with what proves it.

Writes no format and holds nothing while nobody asks for the next page.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Final, TypeAlias
from uuid import UUID

import structlog
from msgspec import Struct, field
from msgspec.structs import replace

from service.authority.audit.continuity import Head, OutsideCheckpoints, Place
from service.authority.audit.log import AuditLog
from service.authority.audit.merkle import STORED_EVERY, Node, Span, StoredHashes
from service.authority.audit.proofs import ProvableLog
from service.authority.audit.record import (
    Action,
    AuditRecord,
    Outcome,
    RecordFilter,
    RecordReader,
    StoredRecord,
    new_record_id,
    personal,
)
from service.authority.audit.verify import aligned_levels, complete_root
from service.authority.errors import TooMany
from service.authority.model import AdminScope, ClientAddress, Clock
from service.authority.operators import Operator, Operators

PAGE: Final = 200
"""Records at a time, so that the requests of this process never wait long for the event loop."""

MAX_EXPORTS: Final = 2
"""At a time and process: half of its connections, and no exchange waits for those."""


PLACE_PATIENCE: Final = 3.0
"""Seconds for which an export waits until all that it is of has its place in the log."""
_LOOK_EVERY: Final = 0.1

# Some readers of lines end one here, too; JSON has these characters in strings only.
_LINE_ENDS: Final = {end.encode(): b"\\u%04x" % ord(end) for end in "\x85\u2028\u2029"}

_MAX_HASHES: Final = 2_048
"""Stored hashes of one query, for the reason of PAGE."""

log = structlog.stdlib.get_logger()


class LogHeader(Struct, frozen=True, kw_only=True):
    """Which log the records that follow are of, and the signed head that they are under."""

    log_origin: str
    checkpoint: str


Line: TypeAlias = LogHeader | StoredRecord


class Proven(Struct, frozen=True, kw_only=True):
    """A line, and the roots over all leaves between it and the next record, or the end of the log.

    Records and these roots, in order, are the whole tree of the header's checkpoint.
    """

    line: Line
    proof: Sequence[Node] = ()


def for_all_readers(lines: bytes) -> bytes:
    """Return lines of JSON so that nobody takes one for two."""
    if not lines.isascii():
        for end, escaped in _LINE_ENDS.items():
            lines = lines.replace(end, escaped)
    return lines


class Exports:
    """Hands out what is on record at one moment, to those who may read the log."""

    def __init__(
        self,
        *,
        records: RecordReader,
        tree: ProvableLog,
        outside: OutsideCheckpoints,
        audit: AuditLog,
        operators: Operators,
        clock: Clock,
    ) -> None:
        self._records = records
        self._tree = tree
        self._outside = outside
        self._audit = audit
        self._operators = operators
        self._clock = clock
        self._under_way = 0

    async def pages(
        self,
        operator: Operator,
        wanted: RecordFilter,
        format_: str,
        origin: ClientAddress,
        *,
        proven: bool,
        checkpoint_size: int | None = None,
    ) -> AsyncGenerator[Sequence[Proven], None]:
        """Yield the records that meet `wanted`, oldest first, once the export is on record.

        Those are the ones in the log up to the export's own record; if that gets no place within
        3 s, those recorded before it, of which some may have none. With `proven` a header comes
        before them, and before those of each other log, and each line has its proof. All of it can
        be compared with the checkpoints that are kept outside now, and with one of that size.

        Raise Forbidden without `audit:read`, TooMany while others are under way, and the errors of
        a store away: the export is incomplete then. To be closed by whoever stops half-way.
        """
        operator.require(AdminScope.AUDIT_READ)
        if self._under_way >= MAX_EXPORTS:
            raise TooMany(f"{MAX_EXPORTS} exports are under way here. Try again after one of them.")
        self._under_way += 1
        try:
            own = await self._put_on_record(operator, wanted, format_, origin)
            # What comes while it runs is not its business: else it might never end.
            now = datetime.fromtimestamp(self._clock(), UTC)
            wanted = replace(wanted, until=min(now, wanted.until or now))
            heads = await self._placed(own)
            cuts = partial(self._cuts, checkpoint_size)
            prover = _Prover(self._tree, cuts, heads) if proven else None
            async for page in self._read(wanted, [head.reaches for head in heads.values()]):
                if prover is None:
                    yield [Proven(line=record) for record in page]
                else:
                    yield await prover.lines(page)
            if prover is not None:
                yield await prover.last()
        finally:
            self._under_way -= 1

    async def _read(
        self, wanted: RecordFilter, reaches: Sequence[Place]
    ) -> AsyncGenerator[Sequence[StoredRecord], None]:
        """Yield pages up to those places, the last of them shorter than the others."""
        cursor: str | None = None
        while True:
            found = await self._records.read(wanted, cursor=cursor, newest_first=False, limit=PAGE)
            page = [
                record
                for record in found
                if all(_place(record) <= (end.commit_order, end.last_id) for end in reaches)
            ]
            yield page
            if len(page) < PAGE:
                return
            cursor = page[-1].cursor

    async def _cuts(self, checkpoint_size: int | None, log_number: int) -> Sequence[int]:
        """Return the sizes of a log that no root of a proof may reach across."""
        try:
            kept = await self._outside.sizes(log_number)
        except OSError as error:
            log.warning("checkpoints_out_of_reach", error=str(error) or "no answer in time")
            kept = ()
        return sorted({*kept, *([] if checkpoint_size is None else [checkpoint_size])})

    async def _placed(self, own: UUID) -> dict[int, Head]:
        """Return the head that the export's own record is under, by the number of its log."""
        attempts = int(PLACE_PATIENCE / _LOOK_EVERY)
        for _ in range(attempts):
            if (place := await self._tree.place_of(own)) is not None:
                head = await self._tree.head(place.log_number)
                return {} if head is None else {place.log_number: head}
            # Another process may be the one that gives it its place, and tells nobody.
            await asyncio.sleep(_LOOK_EVERY)
        return {}

    async def _put_on_record(
        self, operator: Operator, wanted: RecordFilter, format_: str, origin: ClientAddress
    ) -> UUID:
        async def act(operator: Operator) -> UUID | None:
            operator.require(AdminScope.AUDIT_READ)
            record = AuditRecord(
                id=new_record_id(self._clock()),
                action=Action.AUDIT_EXPORT,
                outcome=Outcome.SUCCESS,
                details={"format": format_, "filters": wanted.for_record()},
                **operator.as_actor(),
                **personal(origin),
            )
            return record.id if await self._audit.append(record) else None

        return await self._operators.decided_on_current(operator, act)


class _Waiting(Struct, kw_only=True):
    """A line that may still get roots over leaves behind it: their levels and indexes."""

    line: Line
    number: int = 0
    roots: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])


class _Prover:
    """Says of each line what is between it and the next one; holds no more than the last line."""

    def __init__(
        self,
        tree: ProvableLog,
        cuts_of: Callable[[int], Awaitable[Sequence[int]]],
        heads: Mapping[int, Head],
    ) -> None:
        self._tree = tree
        self._cuts_of = cuts_of
        self._heads = dict(heads)
        self._waiting: list[_Waiting] = []
        self._origin: str | None = None
        self._number = self._at = self._size = 0
        self._cuts: Sequence[int] = ()

    async def lines(self, records: Sequence[StoredRecord]) -> list[Proven]:
        """Take the next records; return all lines but the last one, which may not be complete."""
        for record in records:
            index = record.leaf_index
            if index is not None and record.log_origin != self._origin:
                self._reach(self._size)
                if (place := await self._tree.place_of(record.id)) is not None:
                    await self._open(place.log_number, place.log_origin)
            if self._origin is None:
                await self._open_newest()
            if index is not None and record.log_origin == self._origin and index < self._size:
                self._reach(index)
                self._at = index + 1
            # What has no place is handed out all the same, and nothing proves it.
            self._waiting.append(_Waiting(line=record, number=self._number))
        ready, self._waiting = self._waiting[:-1], self._waiting[-1:]
        return await self._proven(ready)

    async def last(self) -> list[Proven]:
        """Return the last line, once there are no more records; without any, the newest log."""
        if self._origin is None:
            await self._open_newest()
        self._reach(self._size)
        return await self._proven(self._waiting)

    async def _open_newest(self) -> None:
        if (current := await self._tree.current()) is not None:
            await self._open(current.number, current.origin)

    async def _open(self, number: int, origin: str) -> None:
        """Go on with another log, if it has a head."""
        if (head := self._heads.get(number) or await self._tree.head(number)) is None:
            return
        self._heads[number] = head
        self._origin, self._number, self._at, self._size = origin, number, 0, head.size
        self._cuts = await self._cuts_of(number)
        header = LogHeader(log_origin=origin, checkpoint=head.note.decode())
        self._waiting.append(_Waiting(line=header, number=number))

    def _reach(self, stop: int) -> None:
        """Add to the last line the roots up to a leaf."""
        if self._waiting and self._at < stop:
            self._waiting[-1].roots += _roots(self._at, stop, self._cuts)
        self._at = max(self._at, stop)

    async def _proven(self, lines: Sequence[_Waiting]) -> list[Proven]:
        proven: list[Proven] = []
        for waiting in lines:
            hashes = self._tree.hashes(waiting.number)
            nodes = await _read_roots(waiting.roots, hashes) if waiting.roots else ()
            proven.append(Proven(line=waiting.line, proof=nodes))
        return proven


def _place(record: StoredRecord) -> tuple[int, UUID]:
    return int(record.cursor.partition(".")[0]), record.id


def _roots(start: int, stop: int, cuts: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Cut leaves into complete subtrees, none of which crosses one of `cuts`."""
    for end in (*(cut for cut in cuts if start < cut < stop), stop):
        for level in aligned_levels(start, end):
            yield level, start >> level
            start += 1 << level


async def _read_roots(roots: Sequence[tuple[int, int]], stored: StoredHashes) -> list[Node]:
    """Return the nodes of these levels and indexes; only those before a hash that is missing."""
    nodes: list[Node] = []
    at = 0
    while at < len(roots):
        spans: list[Span] = []
        count = 0
        for level, index in roots[at:]:
            depth = level % STORED_EVERY
            count += 1 << depth
            if spans and count > _MAX_HASHES:
                break
            spans.append(Span(level=level - depth, start=index << depth, stop=(index + 1) << depth))
        for span, hashes in zip(spans, await stored.read(spans), strict=True):
            level, index = roots[at]
            if len(hashes) != span.stop - span.start:
                log.error("export_not_proven", missing_hashes=[level, index])
                return nodes
            nodes.append(Node(level=level, index=index, hash=complete_root(hashes)))
            at += 1
    return nodes
