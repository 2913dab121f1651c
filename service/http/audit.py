"""`/api/v1/audit-records`: reading the audit log.

Writes nothing into it, but for the refusals that every admin route leaves.
"""

from datetime import UTC, datetime
from enum import StrEnum
from http import HTTPStatus
from typing import Annotated
from uuid import UUID

from litestar import Controller, get
from litestar.di import NamedDependency
from litestar.params import FromQuery, QueryParameter, SkipValidation
from msgspec import Struct

from service.authority.audit import Action, Outcome, RecordFilter, RecordReader, StoredRecord
from service.authority.model import CREDENTIAL_ID, NAME, SERVICE_USER_ID, SOURCE_SYSTEM, AdminScope
from service.authority.operators import Operator
from service.http.errors import AnyRequest, Refused

# An id or a name, which never look alike.
ServiceUserQuery = Annotated[str | None, QueryParameter(pattern=f"{SERVICE_USER_ID}|{NAME}")]
SourceSystemQuery = Annotated[str | None, QueryParameter(pattern=SOURCE_SYSTEM)]
CredentialQuery = Annotated[str | None, QueryParameter(pattern=CREDENTIAL_ID)]
RequestIdQuery = Annotated[str | None, QueryParameter(pattern="^[A-Za-z0-9._-]{1,64}$")]
PageSize = Annotated[int, QueryParameter(ge=1, le=1000)]
Cursor = Annotated[
    str | None,
    QueryParameter(pattern=r"^[0-9]{1,18}\.[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$"),
]


class Order(StrEnum):
    """The order of commits, or against it."""

    ASC = "asc"
    DESC = "desc"


class RecordPage(Struct, frozen=True, kw_only=True):
    """Records in the order of their commits.

    With `order=asc`, `next_cursor` is where to resume, now or later: nothing is missed and
    nothing comes twice. With `order=desc` it is null at the end.
    """

    records: list[StoredRecord]
    next_cursor: str | None


class AuditRecordController(Controller):
    """The audit log."""

    path = "/audit-records"
    tags = ("Audit",)

    @get("/", opt={"action": Action.AUDIT_QUERY})
    async def query(
        self,
        request: AnyRequest,
        operator: NamedDependency[Operator],
        records: NamedDependency[SkipValidation[RecordReader]],
        service_user: ServiceUserQuery = None,
        source_system: SourceSystemQuery = None,
        credential: CredentialQuery = None,
        actor: ServiceUserQuery = None,
        action: FromQuery[Action | None] = None,
        outcome: FromQuery[Outcome | None] = None,
        request_id: RequestIdQuery = None,
        jti: FromQuery[UUID | None] = None,
        since: FromQuery[datetime | None] = None,
        until: FromQuery[datetime | None] = None,
        order: FromQuery[Order] = Order.ASC,
        limit: PageSize = 100,
        cursor: Cursor = None,
    ) -> RecordPage:
        """Query the log; every filter that is given must hold. Times need their offset."""
        operator.require(AdminScope.AUDIT_READ)
        since, until = _in_utc(request, "since", since), _in_utc(request, "until", until)
        wanted = RecordFilter(
            service_user=service_user,
            source_system=source_system,
            credential_id=credential,
            actor=actor,
            action=action,
            outcome=outcome,
            request_id=request_id,
            jti=jti,
            since=since,
            until=until,
        )
        try:
            found = await records.read(
                wanted, cursor=cursor, newest_first=order is Order.DESC, limit=limit
            )
        except ValueError:
            raise Refused(HTTPStatus.BAD_REQUEST, "cursor is none that this log gave.") from None
        at_end = order is Order.DESC and len(found) < limit
        return RecordPage(
            records=list(found),
            next_cursor=None if at_end else found[-1].cursor if found else cursor,
        )


def _in_utc(request: AnyRequest, name: str, at: datetime | None) -> datetime | None:
    if at is None:
        return None
    try:
        # The framework takes a number for a time, too.
        if at.tzinfo is None or ":" not in request.query_params[name]:
            raise ValueError
        return at.astimezone(UTC)
    except (ValueError, OverflowError):
        raise Refused(
            HTTPStatus.BAD_REQUEST,
            f"Expected {name} as a time with its offset, such as 2027-01-31T12:00:00Z.",
        ) from None
