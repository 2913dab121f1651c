"""Tokens on no record, of which there may be any number: a minute of each reporter holds so many
reports, and a count; so does one of each forger's key.

Judges no report. It must not let one reporter, or one forger, fill the log.
"""

import asyncio
from typing import Final

import msgspec
from msgspec import Struct

from service.authority.audit.log import AuditLog
from service.authority.audit.record import Action, AuditRecord, new_record_id
from service.authority.model import Clock

MAX_UNPROVEN: Final = 60
WINDOW: Final = 60.0
"""Seconds."""


_Source = tuple[str | None, str | None]
"""Who reports; and the key that signed what came to the authority itself."""


class _Minute(Struct):
    taken: int = 0
    counted: int = 0
    last: AuditRecord | None = None


class UnprovenReports:
    """Says of each report whether it may have a record of its own.

    The others of the same minute and source are counted, in this process, into one record when
    the minute ends.
    """

    def __init__(self, *, audit: AuditLog, clock: Clock, window: float = WINDOW) -> None:
        self._audit = audit
        self._clock = clock
        self._window = window
        self._minutes: dict[_Source, _Minute] = {}
        self._writing: set[asyncio.Task[None]] = set()

    def has_room(self, report: AuditRecord) -> bool:
        """Return whether this report may be recorded; if not, it has been counted."""
        source = (report.actor_id, report.kid if report.action == Action.TOKEN_FORGED else None)
        if (minute := self._minutes.get(source)) is None:
            minute = self._minutes[source] = _Minute()
            asyncio.get_running_loop().call_later(self._window, self._end, source)
        if minute.taken < MAX_UNPROVEN:
            minute.taken += 1
            return True
        minute.counted += 1
        minute.last = report
        return False

    async def drain(self) -> None:
        """Return when all that was counted is on record; for an orderly stop."""
        for source in tuple(self._minutes):
            self._end(source)
        await asyncio.gather(*self._writing)

    def _end(self, source: _Source) -> None:
        minute = self._minutes.pop(source, None)
        if minute is None or minute.last is None:
            return
        # One of many, and without what only that one said.
        record = msgspec.structs.replace(
            minute.last,
            id=new_record_id(self._clock()),
            service_user_id=None,
            service_user=None,
            source_system=None,
            credential_id=None,
            actor_version=None,
            kid=source[1],
            jti=None,
            occurred_at=None,
            signing_input_sha256=None,
            repeats=minute.counted,
        )
        task = asyncio.create_task(self._audit.append_or_count(record))
        self._writing.add(task)
        task.add_done_callback(self._writing.discard)
