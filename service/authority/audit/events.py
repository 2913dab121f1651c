"""Events: what other services report to the log, and which of it is taken.

Writes nothing itself and answers nobody: the store does, and `http/audit_events.py`.
"""

from collections.abc import Sequence
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Final, Literal, Protocol, TypeAlias
from uuid import UUID

import structlog
from msgspec import Meta, Struct

from service.authority.audit.record import Action, AuditRecord, Outcome, personal
from service.authority.model import KID, AdminScope, ClientAddress, Clock
from service.authority.operators import Operator, Operators

MAX_AGE: Final = 7 * 86_400
"""Seconds for which a reporter may keep an event while the authority is away."""

# RFC 9562 §5.7, in its one canonical spelling.
EventId = Annotated[
    str,
    Meta(
        pattern="^[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$",
        examples=["019ab7a4-5c00-7000-8000-000000000001"],
    ),
]
Time = Annotated[datetime, Meta(tz=True)]
Instance = Annotated[str, Meta(pattern="^[A-Za-z0-9_-]{8,64}$", examples=["hVx3q0Zr9T1c"])]
Kid = Annotated[str, Meta(pattern=KID)]
Kids = Annotated[list[Kid], Meta(max_length=64)]

log = structlog.stdlib.get_logger()


class JwksLoaded(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A verifier, named by a random `instance` of its own, holds these keys and no others."""

    # Becomes the tag of a union beside the next type: msgspec lets a lone struct lack its tag.
    type: Literal["jwks.loaded"]
    id: EventId
    occurred_at: Time
    instance: Instance
    kids: Kids


Event: TypeAlias = JwksLoaded


class Verdict(StrEnum):
    """What the store did with a record: nothing, unless it says `recorded`."""

    RECORDED = "recorded"
    KNOWN = "known"
    """On record already, from the same reporter."""
    TAKEN = "taken"
    """The id is that of another record."""
    STALE = "stale"
    """Decided on a version of the reporter that is in force no more."""


class EventStore(Protocol):
    """Puts reported events on record."""

    async def report(self, records: Sequence[AuditRecord]) -> Sequence[Verdict]:
        """Commit those that are new durably, together; say of each what was done, in order.

        Raise StoreUnavailable when nobody can say: to report the same ids again is harmless.
        """
        ...


class EventStatus(StrEnum):
    """What became of an event."""

    RECORDED = "recorded"
    KNOWN = "known"
    REFUSED = "refused"


class EventResult(Struct, frozen=True, kw_only=True):
    """`recorded` now, `known` from an earlier report of yours, or `refused` for good: `detail`
    says why. Only a refused event was not, and will never be, put on record."""

    id: EventId
    status: EventStatus
    detail: str = ""


class EventReports:
    """Takes what services with the scope `audit:report` report."""

    def __init__(
        self, *, store: EventStore, operators: Operators, clock: Clock, clock_skew: float
    ) -> None:
        self._store = store
        self._operators = operators
        self._clock = clock
        self._clock_skew = clock_skew

    async def report(
        self, operator: Operator, events: Sequence[Event], origin: ClientAddress
    ) -> list[EventResult]:
        """Return what became of each event, in order, once those that are taken are durable.

        Raise Forbidden without `audit:report`, and the errors of a store away: then the same
        events, with the same ids, may be reported again.
        """
        now = self._clock()
        untimely = [self._untimely(event, now) for event in events]
        timely = [event for event, why in zip(events, untimely, strict=True) if not why]

        async def act(operator: Operator) -> list[Verdict] | None:
            operator.require(AdminScope.AUDIT_REPORT)
            records = [_record(event, operator, origin) for event in timely]
            verdicts = list(await self._store.report(records)) if records else []
            return None if Verdict.STALE in verdicts else verdicts

        verdicts = iter(await self._operators.decided_on_current(operator, act))
        results = [
            _refused(event, why) if why else _result(event, next(verdicts))
            for event, why in zip(events, untimely, strict=True)
        ]
        if refused := sum(result.status is EventStatus.REFUSED for result in results):
            log.warning(
                "events_refused",
                reporter=operator.service_user.name,
                count=refused,
                request_id=origin.request_id,
            )
        return results

    def _untimely(self, event: Event, now: float) -> str:
        """Say why the time in an event's id is none that is taken; nothing if it is."""
        # The 48 bits before the random ones (RFC 9562 §5.7).
        reported = (UUID(event.id).int >> 80) / 1000
        if reported < now - MAX_AGE:
            return f"The id is older than {MAX_AGE // 86_400} days."
        if reported > now + self._clock_skew:
            return f"The id lies more than {self._clock_skew:.0f} s ahead: check your clock."
        return ""


def _record(event: Event, operator: Operator, origin: ClientAddress) -> AuditRecord:
    return AuditRecord(
        id=UUID(event.id),
        action=Action.JWKS_LOADED,
        outcome=Outcome.SUCCESS,
        details={
            "occurred_at": event.occurred_at,
            "instance": event.instance,
            "kids": event.kids,
        },
        **operator.as_actor(),
        **personal(origin),
    )


def _result(event: Event, verdict: Verdict) -> EventResult:
    if verdict is Verdict.TAKEN:
        return _refused(event, "The id is that of another record: draw a new one.")
    return EventResult(id=event.id, status=EventStatus(verdict))


def _refused(event: Event, why: str) -> EventResult:
    return EventResult(id=event.id, status=EventStatus.REFUSED, detail=why)
