"""`/api/v1/audit-events`: where other services report to the audit log.

Judges no event; a refused event is a result, a malformed one refuses the whole request.
"""

from typing import Annotated, Final

from litestar import Controller, post
from litestar.di import NamedDependency
from litestar.params import JSONBody
from msgspec import Meta, Struct

from service.authority.audit import Action
from service.authority.audit.events import EventReports
from service.authority.audit.reported import Event, EventResult
from service.authority.operators import Operator
from service.http.context import AnyRequest, origin_of

MAX_REPORT: Final = 1_048_576
MAX_EVENTS: Final = 1000


class EventReport(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a service has to report. To send it again, with the same ids, is harmless."""

    events: Annotated[list[Event], Meta(min_length=1, max_length=MAX_EVENTS)]


class EventResults(Struct, frozen=True, kw_only=True):
    """What became of each event, in the order of the report."""

    results: list[EventResult]


class AuditEventController(Controller):
    """Events of other services."""

    path = "/audit-events"
    tags = ("Audit",)
    request_max_body_size = MAX_REPORT

    @post("/", status_code=200, opt={"action": Action.AUDIT_REPORT})
    async def report(
        self,
        data: JSONBody[EventReport],
        request: AnyRequest,
        operator: NamedDependency[Operator],
        event_reports: NamedDependency[EventReports],
    ) -> EventResults:
        """Report events. What is answered `recorded` or `known` is on record durably."""
        origin = origin_of(request.scope)
        return EventResults(results=await event_reports.report(operator, data.events, origin))
