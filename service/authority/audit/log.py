"""The group commit: takes records one by one and puts them on record in batches.

Decides nothing about a request. No answer that depends on a record leaves before `append` returns.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, Protocol
from uuid import UUID

import msgspec
import structlog
from msgspec import Struct

from service import metrics
from service.authority.audit.record import AuditRecord, Outcome, new_record_id
from service.authority.errors import AuditUnavailable, StoreUnavailable

APPEND_DEADLINE: Final = 2.0
MAX_BATCH: Final = 64
MAX_QUEUED: Final = 4096
MAX_QUEUED_REFUSALS: Final = 1024
REPEAT_WINDOW: Final = 1.0
_RECONNECT_DELAYS: Final = (0.05, 0.1, 0.2, 0.5, 1.0)

_Equal = tuple[str | UUID | None, ...]
"""What refusals have in common that are counted together."""

log = structlog.stdlib.get_logger()


class RecordsRejected(Exception):
    """Postgres refused the data of a batch (SQLSTATE class 22 or 23); nothing was written."""


class RecordWriter(Protocol):
    """One connection that commits batches of records."""

    @property
    def is_open(self) -> bool:
        """Whether the connection stands, as far as can be known without asking."""
        ...

    async def open(self, on_lost: Callable[[], None]) -> None:
        """Connect, or raise StoreUnavailable; `on_lost` is called when the connection ends."""
        ...

    async def commit(self, records: Sequence[AuditRecord]) -> Sequence[bool]:
        """Commit a batch durably; say of each record whether it was current and is recorded.

        Raise RecordsRejected, having written nothing; raise StoreUnavailable when nobody can say
        whether it was written. It is never repeated then: a record without a token is harmless.
        """
        ...

    async def close(self) -> None:
        """Give the connection up."""
        ...


class _Waiting(Struct, eq=False):
    record: AuditRecord
    recorded: asyncio.Future[bool]


class _Repeat(Struct):
    record: AuditRecord
    count: int = 0


class AuditLog:
    """Takes records one by one, commits them in batches, two batches at a time."""

    def __init__(self, writers: Sequence[RecordWriter]) -> None:
        self._writers = tuple(writers)
        self._connected = 0
        self._grants: deque[_Waiting] = deque()
        self._refusals: deque[_Waiting] = deque()
        self._under_way = 0
        self._arrived = asyncio.Event()
        self._repeats: dict[_Equal, _Repeat] = {}

    @property
    def available(self) -> bool:
        """Whether a writer is connected, so that a record has a chance."""
        return self._connected > 0

    async def append(self, record: AuditRecord) -> bool:
        """Return once the record is durable: True, or False if it was decided on an old version.

        Of equal refusals within a second the first is written at once and the others are counted
        into a second record when it ends; each that names a version is compared all the same.
        Raise AuditUnavailable after 2 s, or at once when Postgres is away or the queue is full.
        """
        if record.outcome is Outcome.REFUSED:
            return await self._append_refusal(record)
        return await self._append(record, self._grants, MAX_QUEUED)

    async def append_or_count(self, record: AuditRecord) -> None:
        """Put a refusal on record that is right whatever the store says; never fail.

        While the store is away it is counted and logged instead: the refusal itself must not
        wait for Postgres.
        """
        try:
            await self.append(record)
        except AuditUnavailable:
            _count_unrecorded(record, 1)

    async def _append(self, record: AuditRecord, lane: deque[_Waiting], limit: int) -> bool:
        if not self.available:
            raise AuditUnavailable("no connection to Postgres")
        if len(lane) >= limit:
            raise AuditUnavailable("the queue of records is full")
        waiting = _Waiting(record, asyncio.get_running_loop().create_future())
        lane.append(waiting)
        self._arrived.set()
        try:
            async with asyncio.timeout(APPEND_DEADLINE):
                return await waiting.recorded
        except TimeoutError:
            raise AuditUnavailable("no commit within the deadline") from None

    async def _append_refusal(self, record: AuditRecord) -> bool:
        """Equal refusals of one second share a record; each is compared with what is in force."""
        key: _Equal = (
            record.client_address,
            # Ids that nobody has are as good as one: else each would be a record of its own.
            None if record.version == 0 else record.service_user_id,
            record.credential_id,
            record.kid,
            record.jti,
            record.actor_id,
            record.action,
            record.reason,
        )
        if (repeat := self._repeats.get(key)) is None:
            if len(self._repeats) < MAX_QUEUED_REFUSALS:
                self._repeats[key] = _Repeat(record)
                asyncio.get_running_loop().call_later(REPEAT_WINDOW, self._end_repeats, key)
            return await self._append(record, self._refusals, MAX_QUEUED_REFUSALS)
        current = record.version is None or await self._append(
            msgspec.structs.replace(record, repeats=0), self._refusals, MAX_QUEUED_REFUSALS
        )
        repeat.count += current
        return current

    def _end_repeats(self, key: _Equal) -> None:
        repeat = self._repeats.pop(key, None)
        if repeat is None or repeat.count == 0:
            return
        if not self.available or len(self._refusals) >= MAX_QUEUED_REFUSALS:
            _count_unrecorded(repeat.record, repeat.count)
            return
        # Each was compared when it was refused: what is written now only says how many they were.
        record = msgspec.structs.replace(
            repeat.record,
            # Its time is that of the first: the 48 bits before the random ones (RFC 9562 §5.7).
            id=new_record_id((repeat.record.id.int >> 80) / 1000),
            version=None,
            actor_version=None,
            repeats=repeat.count,
        )
        recorded = asyncio.get_running_loop().create_future()
        recorded.add_done_callback(partial(_count_if_unrecorded, record))
        self._refusals.append(_Waiting(record, recorded))
        self._arrived.set()

    async def run(self) -> None:
        """Commit what is appended until cancelled; each writer connects again by itself."""
        async with asyncio.TaskGroup() as tasks:
            for writer in self._writers:
                tasks.create_task(self._keep_writing_whatever_happens(writer))

    async def drain(self) -> None:
        """Return when all that was appended is settled; for an orderly stop, after the requests."""
        for key in tuple(self._repeats):
            self._end_repeats(key)
        while self.available and (self._grants or self._refusals or self._under_way):  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    async def _keep_writing_whatever_happens(self, writer: RecordWriter) -> None:
        """A defect that shows in one writer must not stop the other."""
        while True:
            try:
                await self._keep_writing(writer)
            except Exception as error:
                log.error("audit_writer_failed", error=type(error).__name__)
                await asyncio.sleep(_RECONNECT_DELAYS[-1])

    async def _keep_writing(self, writer: RecordWriter) -> None:
        failures = 0
        while True:
            try:
                await writer.open(on_lost=self._arrived.set)
            except StoreUnavailable as error:
                if failures == 0:
                    log.warning("audit_writer_disconnected", error=str(error))
                await asyncio.sleep(_RECONNECT_DELAYS[min(failures, len(_RECONNECT_DELAYS) - 1)])
                failures += 1
                continue
            failures = 0
            self._count_connected(+1)
            try:
                while await self._write_batch(writer):
                    pass
            finally:
                self._count_connected(-1)
                await writer.close()
                if not self.available:
                    self._fail_all()

    def _count_connected(self, change: int) -> None:
        self._connected += change
        metrics.store_connected.set(self.available)

    async def _write_batch(self, writer: RecordWriter) -> bool:
        """Settle one batch; return False when the writer has lost its connection."""
        while writer.is_open and not self._grants and not self._refusals:
            self._arrived.clear()
            await self._arrived.wait()
        if not writer.is_open:
            return False
        if not (batch := self._take()):
            return True
        self._under_way += 1
        try:
            return await self._commit(writer, batch)
        except BaseException:
            _fail(batch)
            raise
        finally:
            self._under_way -= 1

    async def _commit(self, writer: RecordWriter, batch: list[_Waiting]) -> bool:
        try:
            verdicts = await writer.commit([waiting.record for waiting in batch])
        except RecordsRejected:
            return await self._write_singly(writer, batch)
        except StoreUnavailable:
            _fail(batch)
            return False
        metrics.audit_batch_records.observe(len(batch))
        for waiting, recorded in zip(batch, verdicts, strict=True):
            _settle(waiting, recorded)
        return True

    async def _write_singly(self, writer: RecordWriter, batch: list[_Waiting]) -> bool:
        """One record that Postgres refuses must not take its neighbours with it."""
        for index, waiting in enumerate(batch):
            try:
                (recorded,) = await writer.commit([waiting.record])
            except RecordsRejected as error:
                metrics.audit_records_rejected.inc()
                log.error("audit_record_rejected", action=waiting.record.action, error=str(error))
                _fail([waiting])
            except StoreUnavailable:
                _fail(batch[index:])
                return False
            else:
                _settle(waiting, recorded)
        return True

    def _take(self) -> list[_Waiting]:
        """Grants first: a flood of refusals delays nobody who is entitled."""
        batch: list[_Waiting] = []
        for lane in (self._grants, self._refusals):
            while lane and len(batch) < MAX_BATCH:
                waiting = lane.popleft()
                # Whoever waited too long has given up: a record for nobody would only mislead.
                if not waiting.recorded.done():
                    batch.append(waiting)
        return batch

    def _fail_all(self) -> None:
        while batch := self._take():
            _fail(batch)


def _count_unrecorded(record: AuditRecord, count: int) -> None:
    metrics.audit_refusals_unrecorded.inc(count)
    log.warning(
        "refusal_unrecorded",
        action=record.action,
        reason=record.reason,
        service_user_id=record.service_user_id,
        request_id=record.request_id,
        count=count,
    )


def _count_if_unrecorded(record: AuditRecord, recorded: asyncio.Future[bool]) -> None:
    if recorded.cancelled() or recorded.exception() is not None:
        _count_unrecorded(record, record.repeats)


def _settle(waiting: _Waiting, recorded: bool) -> None:
    if not waiting.recorded.done():
        waiting.recorded.set_result(recorded)
    metrics.audit_records.labels(waiting.record.outcome if recorded else "stale").inc()


def _fail(batch: list[_Waiting]) -> None:
    metrics.audit_records.labels("failed").inc(len(batch))
    for waiting in batch:
        if not waiting.recorded.done():
            waiting.recorded.set_exception(AuditUnavailable("the commit failed"))
