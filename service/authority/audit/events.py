"""Events: what other services report to the log, and which of it is taken.

Writes nothing itself and answers nobody: the store does, and `http/audit_events.py`.
"""

from collections import Counter
from collections.abc import Sequence
from enum import StrEnum
from typing import Final, Protocol
from uuid import UUID

import structlog
from msgspec import Struct

from service import metrics
from service.authority.audit.attribution import (
    Attributed,
    TokenRecords,
    TokenStanding,
    digest,
    find,
)
from service.authority.audit.record import Action, AuditRecord, Outcome, personal
from service.authority.audit.reported import ApiCall, Event, EventResult, EventStatus, JwksLoaded
from service.authority.audit.unproven import UnprovenReports
from service.authority.model import AdminScope, ClientAddress, Clock
from service.authority.operators import Operator, Operators

MAX_AGE: Final = 7 * 86_400
"""Seconds for which a reporter may keep an event while the authority is away."""

MAX_LOADED_A_MINUTE: Final = 120
"""Reports of loaded keys that one reporter has taken in one process: each instance needs a few an
hour, and whoever floods must not fill the log."""

OWN_ACTIONS: Final = frozenset(action.partition(".")[0] for action in Action)
"""First words of actions that only this authority records: no report can look like its acts."""

_ACTIONS: Final = {
    TokenStanding.FORGED: Action.TOKEN_FORGED,
    TokenStanding.UNKNOWN: Action.TOKEN_UNKNOWN,
    TokenStanding.UNVERIFIABLE: Action.TOKEN_UNVERIFIABLE,
}

log = structlog.stdlib.get_logger()


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


class Call(Struct, frozen=True, kw_only=True):
    """A reported call with what was found about its token."""

    event: ApiCall
    finding: Attributed


class EventReports:
    """Takes what services with the scope `audit:report` report."""

    def __init__(
        self,
        *,
        store: EventStore,
        tokens: TokenRecords,
        unproven: UnprovenReports,
        operators: Operators,
        clock: Clock,
        clock_skew: float,
    ) -> None:
        self._store = store
        self._tokens = tokens
        self._unproven = unproven
        self._operators = operators
        self._clock = clock
        self._clock_skew = clock_skew
        self._loaded: Counter[str] = Counter()
        self._loaded_minute = 0

    async def report(
        self, operator: Operator, events: Sequence[Event], origin: ClientAddress
    ) -> list[EventResult]:
        """Return what became of each event, in order, once those that are taken are durable.

        Raise Forbidden without `audit:report`, and the errors of a store away: then the same
        events, with the same ids, may be reported again.
        """
        operator.require(AdminScope.AUDIT_REPORT)
        looked_at = await self._look_at(operator, events)

        async def act(operator: Operator) -> list[EventResult] | None:
            operator.require(AdminScope.AUDIT_REPORT)
            offered = [
                each if isinstance(each, EventResult) else _record(each, operator, origin)
                for each in looked_at
            ]
            records = [each for each in offered if isinstance(each, AuditRecord)]
            verdicts: Sequence[Verdict] = await self._store.report(records) if records else ()
            if Verdict.STALE in verdicts:
                return None
            _tell_what_is_new(records, verdicts)
            verdict = iter(verdicts)
            return [
                each if isinstance(each, EventResult) else _result(each, next(verdict))
                for each in offered
            ]

        results = await self._operators.decided_on_current(operator, act)
        for status in EventStatus:
            count = sum(result.status is status for result in results)
            metrics.reported_events.labels(status).inc(count)
            if count and status is EventStatus.REFUSED:
                log.warning(
                    "events_refused",
                    reporter=operator.service_user.name,
                    count=count,
                    request_id=origin.request_id,
                )
        return results

    async def _look_at(
        self, operator: Operator, events: Sequence[Event]
    ) -> list[EventResult | JwksLoaded | Call]:
        """Settle what needs no record; say of each other event what is known about its token."""
        now = self._clock()
        refusals = [self._why_not(event, now, operator.service_user.id) for event in events]
        calls = [
            event
            for event, why_not in zip(events, refusals, strict=True)
            if isinstance(event, ApiCall) and not why_not
        ]
        finding = iter(await find(calls, self._tokens))
        looked_at: list[EventResult | JwksLoaded | Call] = []
        for event, why_not in zip(events, refusals, strict=True):
            if why_not:
                looked_at.append(_refused(event.id, why_not))
            elif isinstance(event, JwksLoaded):
                looked_at.append(event)
            else:
                looked_at.append(self._settled(Call(event=event, finding=next(finding)), operator))
        return looked_at

    def _settled(self, call: Call, operator: Operator) -> EventResult | Call:
        """Return the result of a call that gets no record of its own, or else the call."""
        standing = call.finding.standing
        if standing is TokenStanding.SIGNATURE_WANTED:
            return EventResult(id=call.event.id, status=EventStatus.SIGNATURE_WANTED)
        if standing is TokenStanding.UNKNOWN:
            metrics.unknown_tokens.inc()
            if not self._unproven.has_room(call_record(call, operator)):
                return EventResult(id=call.event.id, status=EventStatus.RECORDED)
        return call

    def _why_not(self, event: Event, now: float, reporter: str) -> str:
        """Say why an event is never taken; nothing if it is."""
        # The 48 bits before the random ones (RFC 9562 §5.7).
        if why_not := self._untimely("id", (UUID(event.id).int >> 80) / 1000, now):
            return why_not
        if isinstance(event, JwksLoaded):
            if not self._has_room(reporter, now):
                return f"More than {MAX_LOADED_A_MINUTE} reports of loaded keys within a minute."
            return ""
        if (own := event.action.partition(".")[0]) in OWN_ACTIONS:
            return f"Actions that begin with {own} are the authority's own: choose another name."
        return self._untimely("occurred_at", event.occurred_at.timestamp(), now)

    def _has_room(self, reporter: str, now: float) -> bool:
        if (minute := int(now // 60)) != self._loaded_minute:
            self._loaded.clear()
            self._loaded_minute = minute
        self._loaded[reporter] += 1
        return self._loaded[reporter] <= MAX_LOADED_A_MINUTE

    def _untimely(self, what: str, at: float, now: float) -> str:
        if at < now - MAX_AGE:
            return f"The {what} is older than {MAX_AGE // 86_400} days."
        if at > now + self._clock_skew:
            return f"The {what} lies more than {self._clock_skew:.0f} s ahead: check your clock."
        return ""


def _record(
    each: JwksLoaded | Call, operator: Operator, origin: ClientAddress
) -> AuditRecord | EventResult:
    if isinstance(each, JwksLoaded):
        return AuditRecord(
            id=UUID(each.id),
            action=Action.JWKS_LOADED,
            outcome=Outcome.SUCCESS,
            details={
                "occurred_at": each.occurred_at,
                "instance": each.instance,
                "kids": each.kids,
            },
            **operator.as_actor(),
            **personal(origin),
        )
    issued = each.finding.issued
    if (
        each.finding.standing is TokenStanding.ISSUED
        and issued is not None
        and issued.aud not in operator.service_user.audiences
    ):
        return _refused(each.event.id, "The token is for an audience that is none of yours.")
    return call_record(each, operator)


def call_record(call: Call, operator: Operator | None) -> AuditRecord:
    """Return the record of a call: what was done, or if its token was not issued, that.

    Without an operator it is the authority that noticed.
    """
    event, finding = call.event, call.finding
    action = _ACTIONS.get(finding.standing)
    whose: dict[str, str | None] = {}
    if (issued := finding.issued) is not None:
        whose = {
            "service_user_id": issued.service_user_id,
            "service_user": issued.service_user,
            "source_system": issued.source_system,
            "credential_id": issued.credential_id,
        }
    origin = ClientAddress(
        address=event.client_address, user_agent=event.user_agent, request_id=event.request_id
    )
    return AuditRecord(
        id=UUID(event.id),
        action=event.action if action is None else action,
        outcome=event.outcome,
        reason=finding.reason,
        kid=event.kid if issued is None or action is not None else issued.kid,
        jti=event.jti,
        occurred_at=event.occurred_at,
        signing_input_sha256=digest(event),
        details={"action": event.action} if action and event.action else {},
        **whose,
        **(operator.as_actor() if operator else {}),
        **personal(origin, resource=event.resource, department=event.department),
    )


def _tell_what_is_new(records: Sequence[AuditRecord], verdicts: Sequence[Verdict]) -> None:
    for record, verdict in zip(records, verdicts, strict=True):
        if verdict is not Verdict.RECORDED:
            continue
        match record.action:
            case Action.TOKEN_FORGED:
                metrics.forged_tokens.inc()
                tell_of_forged(record)
            case Action.TOKEN_UNVERIFIABLE:
                metrics.unverifiable_tokens.inc()
                log.error("token_unverifiable", **_named(record))
            case Action.TOKEN_UNKNOWN:
                log.warning("token_unknown", **_named(record))
            case _:
                pass


def tell_of_forged(record: AuditRecord) -> None:
    """Say in the log what no operator may miss."""
    log.critical("token_forged", **_named(record))


def _named(record: AuditRecord) -> dict[str, str | None]:
    return {
        "kid": record.kid,
        "jti": str(record.jti),
        "service_user": record.service_user,
        "reporter": record.actor,
        "record": str(record.id),
        "request_id": record.request_id,
    }


def _result(record: AuditRecord, verdict: Verdict) -> EventResult:
    if verdict is Verdict.TAKEN:
        return _refused(str(record.id), "The id is that of another record: draw a new one.")
    return EventResult(id=str(record.id), status=EventStatus(verdict))


def _refused(event_id: str, why: str) -> EventResult:
    return EventResult(id=event_id, status=EventStatus.REFUSED, detail=why)
