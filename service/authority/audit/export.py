"""Exports: the log, or a part of it, page by page.

Writes no format and holds nothing while nobody asks for the next page.
"""

from collections.abc import AsyncGenerator, Sequence
from datetime import UTC, datetime
from typing import Final

from msgspec.structs import replace

from service.authority.audit.log import AuditLog
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
from service.authority.errors import TooMany
from service.authority.model import AdminScope, ClientAddress, Clock
from service.authority.operators import Operator, Operators

PAGE: Final = 200
"""Records at a time, so that the requests of this process never wait long for the event loop."""

MAX_EXPORTS: Final = 2
"""At a time and process: half of its connections, and no exchange waits for those."""


class Exports:
    """Hands out what is on record at one moment, to those who may read the log."""

    def __init__(
        self, *, records: RecordReader, audit: AuditLog, operators: Operators, clock: Clock
    ) -> None:
        self._records = records
        self._audit = audit
        self._operators = operators
        self._clock = clock
        self._under_way = 0

    async def pages(
        self, operator: Operator, wanted: RecordFilter, format_: str, origin: ClientAddress
    ) -> AsyncGenerator[Sequence[StoredRecord], None]:
        """Yield the records that meet `wanted`, oldest first, once the export is on record.

        Raise Forbidden without `audit:read`, TooMany while others are under way, and the errors of
        a store away: the export is incomplete then. To be closed by whoever stops half-way.
        """
        operator.require(AdminScope.AUDIT_READ)
        if self._under_way >= MAX_EXPORTS:
            raise TooMany(f"{MAX_EXPORTS} exports are under way here. Try again after one of them.")
        self._under_way += 1
        try:
            await self._put_on_record(operator, wanted, format_, origin)
            # What comes while it runs is not its business: else it might never end.
            now = datetime.fromtimestamp(self._clock(), UTC)
            wanted = replace(wanted, until=min(now, wanted.until or now))
            cursor: str | None = None
            while True:
                page = await self._records.read(
                    wanted, cursor=cursor, newest_first=False, limit=PAGE
                )
                yield page
                if len(page) < PAGE:
                    return
                cursor = page[-1].cursor
        finally:
            self._under_way -= 1

    async def _put_on_record(
        self, operator: Operator, wanted: RecordFilter, format_: str, origin: ClientAddress
    ) -> None:
        async def act(operator: Operator) -> bool | None:
            operator.require(AdminScope.AUDIT_READ)
            record = AuditRecord(
                id=new_record_id(self._clock()),
                action=Action.AUDIT_EXPORT,
                outcome=Outcome.SUCCESS,
                details={"format": format_, "filters": wanted.for_record()},
                **operator.as_actor(),
                **personal(origin),
            )
            return await self._audit.append(record) or None

        await self._operators.decided_on_current(operator, act)
