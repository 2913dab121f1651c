"""`/console/audit`: the log for people: a list, one record, the log as it grows, and files of it.

Holds no rule about who may read what, and computes no proof: `authority.audit.reading` does.
"""

import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any, Final, Literal, TypeAlias
from uuid import UUID

from litestar import Controller, Response, get
from litestar.di import NamedDependency
from litestar.params import FromPath, FromQuery, SkipValidation
from litestar.types import ASGIApp

from service.authority.audit import Action, RecordFilter, StoredRecord
from service.authority.audit.export import Exports, Proven
from service.authority.audit.reading import Alarms, AuditReading, Examined, may_export, readable
from service.authority.model import AdminScope, Clock
from service.authority.operators import Operator
from service.console.audit_filters import COMMON, FURTHER, Filter, Query, read_query
from service.console.page import Download, page
from service.http.context import AnyRequest, origin_of
from service.http.errors import Refused

ExportStream: TypeAlias = Callable[[AsyncGenerator[Sequence[Proven], None], str], ASGIApp]

LIST: Final = "/console/audit"
TAIL: Final = "/console/audit/tail"
NEXT: Final = "/console/audit/tail/next"
EXPORT: Final = "/console/audit/export"

PAGE: Final = 50
STORY: Final = 20
"""Records of one token beside one of them; all of them have a list of their own."""
TAIL_BEGINS: Final = 20
TAIL_PAGE: Final = 100


class AuditController(Controller):
    """The audit log."""

    path = "/audit"

    @get("/", opt={"action": Action.AUDIT_QUERY})
    async def list_(
        self,
        request: AnyRequest,
        operator: NamedDependency[Operator],
        reading: NamedDependency[AuditReading],
        clock: NamedDependency[Clock],
    ) -> Response[Any]:
        """Show the newest records that meet the filters, or those before a cursor."""
        query = _query(request, operator, clock)
        if query.errors:
            return _list(request, operator, query, status=HTTPStatus.UNPROCESSABLE_ENTITY)
        # One more than is shown tells whether there are more.
        found = await _read(
            reading.page(operator, query.wanted, cursor=query.cursor, limit=PAGE + 1)
        )
        older = found[PAGE - 1].cursor if len(found) > PAGE else None
        return _list(
            request,
            operator,
            query,
            records=found[:PAGE],
            older=older and query.address(LIST, cursor=older),
            alarms=await reading.alarms(operator),
        )

    @get("/records/{record_id:uuid}", opt={"action": Action.AUDIT_INCLUSION})
    async def record(
        self,
        request: AnyRequest,
        record_id: FromPath[UUID],
        operator: NamedDependency[Operator],
        reading: NamedDependency[AuditReading],
    ) -> Response[Any]:
        """Show one record, the story of its token, and whether it is where the log says."""
        record = await reading.record(operator, record_id)
        story = await reading.story(operator, record, limit=STORY + 1)
        examined = await reading.examined(record)
        leaf, hashes = _proof(examined)
        return page(
            request,
            "audit/record.html",
            record=record,
            details=_pretty(record.details),
            erased=record.personal_salt is None and record.personal_sha256 is not None,
            story=story[:STORY],
            more=len(story) > STORY,
            examined=examined,
            leaf=leaf,
            hashes=hashes,
            reads_all=may_export(operator),
            reads_users=AdminScope.SERVICE_USERS_READ in operator.scopes,
        )

    @get("/tail", opt={"action": Action.AUDIT_QUERY})
    async def tail(
        self,
        request: AnyRequest,
        operator: NamedDependency[Operator],
        reading: NamedDependency[AuditReading],
        clock: NamedDependency[Clock],
    ) -> Response[Any]:
        """Show the log as it grows: the newest records, or what came beyond a cursor."""
        query = _query(request, operator, clock)
        if query.errors:
            return _tail(request, operator, query, status=HTTPStatus.UNPROCESSABLE_ENTITY)
        if query.cursor is None:
            found, cursor = await reading.latest(operator, query.wanted, limit=TAIL_BEGINS)
            return _tail(request, operator, query, records=found, cursor=cursor)
        found, cursor = await _after(reading, operator, query, query.cursor)
        return _tail(request, operator, query, records=found, cursor=cursor)

    @get("/tail/next", opt={"action": Action.AUDIT_QUERY})
    async def next_(
        self,
        request: AnyRequest,
        operator: NamedDependency[Operator],
        reading: NamedDependency[AuditReading],
        clock: NamedDependency[Clock],
    ) -> Response[Any]:
        """Return the rows beyond a cursor, for a page that stays open."""
        query = _query(request, operator, clock)
        if query.errors or query.cursor is None:
            raise Refused(HTTPStatus.BAD_REQUEST, "This address leads to no place in the log.")
        found, cursor = await _after(reading, operator, query, query.cursor)
        return page(
            request,
            "audit/next.html",
            query=query,
            records=found,
            again=query.address(TAIL, cursor=cursor),
            then=query.address(NEXT, cursor=cursor),
            full=len(found) == TAIL_PAGE,
        )

    @get("/export", opt={"action": Action.AUDIT_EXPORT})
    async def export(
        self,
        request: AnyRequest,
        operator: NamedDependency[Operator],
        exports: NamedDependency[Exports],
        export_stream: NamedDependency[SkipValidation[ExportStream]],
        clock: NamedDependency[Clock],
        format: FromQuery[Literal["ndjson", "csv"]],
    ) -> Download:
        """Stream what meets the filters as a file; that it was taken out is on record."""
        query = _query(request, operator, clock)
        if query.errors:
            raise Refused(HTTPStatus.BAD_REQUEST, " ".join(query.errors.values()))
        pages = exports.pages(
            operator, query.wanted, format, origin_of(request.scope), proven=format == "ndjson"
        )
        moment = datetime.fromtimestamp(clock(), UTC).strftime("%Y-%m-%dT%H%M%SZ")
        return Download(request, export_stream(pages, format), f"audit-records-{moment}.{format}")


def _query(request: AnyRequest, operator: Operator, clock: Clock) -> Query:
    readable(operator, RecordFilter())  # who may read nothing is not asked to correct a filter
    now = datetime.fromtimestamp(clock(), UTC)
    return read_query(request, now, [*_offered(operator, COMMON), *_offered(operator, FURTHER)])


def _offered(operator: Operator, filters: Sequence[Filter]) -> Sequence[Filter]:
    """Return the filters that change what this one sees."""
    of_all = may_export(operator)
    return [each for each in filters if of_all or not each.of_all]


async def _read(reading: Awaitable[Sequence[StoredRecord]]) -> Sequence[StoredRecord]:
    try:
        return await reading
    except ValueError:
        raise Refused(
            HTTPStatus.BAD_REQUEST, "This address leads to no place in the log."
        ) from None


async def _after(
    reading: AuditReading, operator: Operator, query: Query, cursor: str
) -> tuple[Sequence[StoredRecord], str]:
    """Return the next records, the newest first, and where it goes on."""
    found = await _read(reading.after(operator, query.wanted, cursor=cursor, limit=TAIL_PAGE))
    return found[::-1], found[-1].cursor if found else cursor


def _list(
    request: AnyRequest,
    operator: Operator,
    query: Query,
    *,
    status: int = HTTPStatus.OK,
    records: Sequence[StoredRecord] = (),
    older: str | None = None,
    alarms: Alarms | None = None,
) -> Response[Any]:
    return page(
        request,
        "audit/list.html",
        status=status,
        **_filters(operator, query, LIST),
        records=records,
        older=older,
        alarms=alarms,
        # Not among ours: only a service can have reported it.
        other_action="" if query.wanted.action in set(Action) else query.wanted.action,
        live=query.address(TAIL),
        ndjson=query.address(EXPORT, format="ndjson"),
        csv=query.address(EXPORT, format="csv"),
    )


def _tail(
    request: AnyRequest,
    operator: Operator,
    query: Query,
    *,
    status: int = HTTPStatus.OK,
    records: Sequence[StoredRecord] = (),
    cursor: str | None = None,
) -> Response[Any]:
    return page(
        request,
        "audit/tail.html",
        status=status,
        **_filters(operator, query, TAIL),
        records=records,
        began=query.cursor is None,
        full=query.cursor is not None and len(records) == TAIL_PAGE,
        again=query.address(TAIL, cursor=cursor),
        then=query.address(NEXT, cursor=cursor),
        list_address=query.address(LIST),
    )


def _filters(operator: Operator, query: Query, path: str) -> dict[str, Any]:
    """Return what the form of the filters is made with."""
    further = _offered(operator, FURTHER)
    return {
        "query": query,
        "form_path": path,
        "common": _offered(operator, COMMON),
        "further": further,
        "further_open": query.has_any(further),
        "reads_all": may_export(operator),
    }


def _proof(examined: Examined) -> tuple[str, str]:
    """Return the leaf and the hashes of a proof, to be checked elsewhere; nothing unless it
    proves."""
    if examined.inclusion is None or examined.inclusion.leaf is None or examined.flaw:
        return "", ""
    # The leaf as it is, character for character: it is hashed.
    leaf = examined.inclusion.leaf.encode().decode()
    return leaf, "\n".join(each.hex() for each in examined.inclusion.hashes)


def _pretty(details: Mapping[str, Any]) -> str:
    """Return details as JSON for people, with escapes for what nobody would see."""
    if not details:
        return ""
    return "".join(
        character if character.isprintable() or character == "\n" else json.dumps(character)[1:-1]
        for character in json.dumps(details, indent=2, ensure_ascii=False)
    )
