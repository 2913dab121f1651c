"""`/api/v1/audit-records`: reading the audit log.

Writes nothing into it, but for the refusals that every admin route leaves.
"""

from datetime import UTC, datetime
from enum import StrEnum
from http import HTTPStatus
from typing import Annotated
from uuid import UUID

from litestar import Controller, get
from litestar.di import NamedDependency, Provide
from litestar.params import FromQuery, QueryParameter, SkipValidation
from msgspec import Struct

from service.authority.audit import Action, Outcome, RecordFilter, RecordReader, StoredRecord
from service.authority.audit.export import Exports
from service.authority.model import (
    ACTION,
    CREDENTIAL_ID,
    KID,
    PRINTABLE,
    SERVICE_USER,
    SOURCE_SYSTEM,
    AdminScope,
)
from service.authority.operators import Operator
from service.http.context import MAX_USER_AGENT, AnyRequest, origin_of
from service.http.errors import Refused
from service.http.export import ExportStream, Format

# An id or a name, which never look alike.
ServiceUserQuery = Annotated[str | None, QueryParameter(pattern=SERVICE_USER)]
SourceSystemQuery = Annotated[str | None, QueryParameter(pattern=SOURCE_SYSTEM)]
CredentialQuery = Annotated[str | None, QueryParameter(pattern=CREDENTIAL_ID)]
ActionQuery = Annotated[str | None, QueryParameter(pattern=ACTION)]
RequestIdQuery = Annotated[
    str | None, QueryParameter(min_length=1, max_length=128, pattern=PRINTABLE["pattern"])
]
ReasonQuery = Annotated[
    str | None, QueryParameter(min_length=1, max_length=200, pattern=PRINTABLE["pattern"])
]
KidQuery = Annotated[str | None, QueryParameter(pattern=KID)]
AddressQuery = Annotated[
    str | None, QueryParameter(min_length=1, max_length=64, pattern=PRINTABLE["pattern"])
]
UserAgentQuery = Annotated[
    str | None,
    QueryParameter(
        min_length=1,
        max_length=MAX_USER_AGENT,
        pattern=PRINTABLE["pattern"],
        description="The beginning of a user agent.",
    ),
]
DepartmentQuery = Annotated[
    str | None, QueryParameter(min_length=1, max_length=128, pattern=PRINTABLE["pattern"])
]
ResourceQuery = Annotated[
    str | None,
    QueryParameter(
        min_length=1,
        max_length=300,
        pattern=PRINTABLE["pattern"],
        description="The beginning of a resource.",
    ),
]
CheckpointSize = Annotated[
    int | None,
    QueryParameter(
        ge=1,
        le=2**53 - 1,
        description="Of a checkpoint that you hold: NDJSON can then be compared with that one.",
    ),
]
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


def record_filter(
    request: AnyRequest,
    service_user: ServiceUserQuery = None,
    source_system: SourceSystemQuery = None,
    credential: CredentialQuery = None,
    actor: ServiceUserQuery = None,
    actor_credential: CredentialQuery = None,
    action: ActionQuery = None,
    outcome: FromQuery[Outcome | None] = None,
    reason: ReasonQuery = None,
    request_id: RequestIdQuery = None,
    jti: FromQuery[UUID | None] = None,
    kid: KidQuery = None,
    client_address: AddressQuery = None,
    user_agent: UserAgentQuery = None,
    department: DepartmentQuery = None,
    resource: ResourceQuery = None,
    since: FromQuery[datetime | None] = None,
    until: FromQuery[datetime | None] = None,
) -> RecordFilter:
    """Return what the query asks for: every filter that is given must hold."""
    return RecordFilter(
        service_user=service_user,
        source_system=source_system,
        credential_id=credential,
        actor=actor,
        actor_credential_id=actor_credential,
        action=action,
        outcome=outcome,
        reason=reason,
        request_id=request_id,
        jti=jti,
        kid=kid,
        client_address=client_address,
        user_agent=user_agent,
        department=department,
        resource=resource,
        since=_in_utc(request, "since", since),
        until=_in_utc(request, "until", until),
    )


class AuditRecordController(Controller):
    """The audit log."""

    path = "/audit-records"
    tags = ("Audit",)
    dependencies = {"wanted": Provide(record_filter, sync_to_thread=False)}  # noqa: RUF012

    @get("/", opt={"action": Action.AUDIT_QUERY})
    async def query(
        self,
        operator: NamedDependency[Operator],
        records: NamedDependency[SkipValidation[RecordReader]],
        wanted: NamedDependency[RecordFilter],
        order: FromQuery[Order] = Order.ASC,
        limit: PageSize = 100,
        cursor: Cursor = None,
    ) -> RecordPage:
        """Query the log; every filter that is given must hold. Times need their offset."""
        operator.require(AdminScope.AUDIT_READ)
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

    @get("/export", opt={"action": Action.AUDIT_EXPORT}, media_type="application/x-ndjson")
    async def export(
        self,
        request: AnyRequest,
        operator: NamedDependency[Operator],
        exports: NamedDependency[Exports],
        wanted: NamedDependency[RecordFilter],
        format: FromQuery[Format] = Format.NDJSON,
        checkpoint_size: CheckpointSize = None,
    ) -> ExportStream:
        """Stream every record that meets the filters, the oldest first; on record itself.

        NDJSON can be verified offline. Its first line has the log's origin and a checkpoint, and so
        has one before the records of each other log; then comes a record a line, as a query shows
        it. `proof` holds the roots of the subtrees over what lies between it and the next one. In
        CSV a text that a spreadsheet would take for a formula begins with an apostrophe. An answer
        that breaks off is incomplete.
        """
        pages = exports.pages(
            operator,
            wanted,
            format,
            origin_of(request.scope),
            proven=format is Format.NDJSON,
            checkpoint_size=checkpoint_size,
        )
        return ExportStream(pages, format)


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
