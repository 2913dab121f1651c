"""Claims of reporters that nothing proves: a minute of each reporter holds so many, and a count.

Judges no claim. It must not let one reporter fill the log.
"""

import asyncio
from typing import Final

import msgspec
from msgspec import Struct

from service import metrics
from service.authority.audit.log import AuditLog
from service.authority.audit.record import AuditRecord, new_record_id
from service.authority.model import Clock

MAX_CLAIMS: Final = 60
WINDOW: Final = 60.0
"""Seconds."""


class _Minute(Struct):
    taken: int = 0
    counted: int = 0
    last: AuditRecord | None = None


class Claims:
    """Says of each claim whether it may have a record of its own.

    The others of the same minute and reporter are counted, in this process, into one record when
    the minute ends.
    """

    def __init__(self, *, audit: AuditLog, clock: Clock, window: float = WINDOW) -> None:
        self._audit = audit
        self._clock = clock
        self._window = window
        self._minutes: dict[str | None, _Minute] = {}
        self._writing: set[asyncio.Task[None]] = set()

    def has_room(self, claim: AuditRecord) -> bool:
        """Return whether this claim may be recorded; if not, it has been counted."""
        metrics.unknown_tokens.inc()
        reporter = claim.actor_id
        if (minute := self._minutes.get(reporter)) is None:
            minute = self._minutes[reporter] = _Minute()
            asyncio.get_running_loop().call_later(self._window, self._end, reporter)
        if minute.taken < MAX_CLAIMS:
            minute.taken += 1
            return True
        minute.counted += 1
        minute.last = claim
        return False

    async def drain(self) -> None:
        """Return when all that was counted is on record; for an orderly stop."""
        for reporter in tuple(self._minutes):
            self._end(reporter)
        await asyncio.gather(*self._writing)

    def _end(self, reporter: str | None) -> None:
        minute = self._minutes.pop(reporter, None)
        if minute is None or minute.last is None:
            return
        # One of many, and without what only that one claimed.
        record = msgspec.structs.replace(
            minute.last,
            id=new_record_id(self._clock()),
            actor_version=None,
            kid=None,
            jti=None,
            occurred_at=None,
            signing_input_sha256=None,
            repeats=minute.counted,
        )
        task = asyncio.create_task(self._audit.append_or_count(record))
        self._writing.add(task)
        task.add_done_callback(self._writing.discard)
