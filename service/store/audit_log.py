"""Audit records in Postgres: the writers of the group commit, and the reader.

Changes no record and deletes none; the role that it connects as could not.
"""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final
from uuid import UUID

import asyncpg
import msgspec
import structlog

from keys.secret import Secret
from service import metrics
from service.authority.audit import (
    AuditRecord,
    RecordFilter,
    RecordsRejected,
    StoredRecord,
)
from service.authority.audit.log import APPEND_DEADLINE
from service.authority.clock import DatabaseClock
from service.authority.errors import StoreUnavailable
from service.authority.operators import Issuance
from service.store.database import (
    Connection,
    Database,
    Deadlines,
    connect,
    loss_as_unavailable,
    sqlstate,
    time_of,
)
from service.store.service_users import SELECT_SUBJECT, as_json, subject

COMMIT_RECORDS = "SELECT recorded, extract(epoch FROM at)::float8 FROM commit_records_1($1, $2)"

SELECT_ISSUANCE = """
SELECT service_user_id, credential_id, signing_input_sha256
  FROM audit_records WHERE id = $1 AND action = 'token.issue' AND outcome = 'success'
"""

SELECT_SESSION_END = """
SELECT EXISTS (SELECT FROM audit_records
                WHERE action = 'token.end_session' AND details ->> 'session' = $1)
"""

# Where the records of a page stand is found first, from an index alone if there is one for that:
# what belongs to them is looked up for those few.
_SELECT_RECORDS = """
WITH page AS (
    SELECT {key}.commit_order, {key}.id FROM {source}
     WHERE {key}.commit_order < audit_horizon_1() {conditions}
     ORDER BY {key}.commit_order {direction}, {key}.id {direction} LIMIT {limit}
)
SELECT r.id, r.commit_order, r.recorded_at, r.occurred_at, r.action, r.outcome, r.reason,
       r.service_user_id, r.service_user, r.source_system, r.version, r.credential_id,
       r.actor_id, r.actor, r.actor_credential_id, r.jti, r.kid, r.iat, r.exp, r.aud, r.scope,
       r.signing_input_sha256, r.request_id, r.repeats, r.details, r.personal_sha256,
       g.origin AS log_origin, l.leaf_index, l.leaf_hash,
       p.salt, p.client_address, p.user_agent, p.resource, p.department
  FROM page
  JOIN audit_records r ON r.id = page.id
  LEFT JOIN audit_leaves l ON l.id = page.id
  LEFT JOIN audit_logs g ON g.log = l.log
  LEFT JOIN audit_personal p ON p.id = page.id
 ORDER BY page.commit_order {direction}, page.id {direction}
"""
_RECORDS: Final = "audit_records r"
_PERSONAL: Final = "audit_personal p"
_BOTH: Final = "audit_personal p JOIN audit_records r ON r.id = p.id"

BROAD: Final = 1_000_000
"""A prefix of more records than that is looked for in the order of commits: to sort all of them
would take longer than a second, and among so many the next ones are near."""

_SELECT_IS_BROAD: Final = """
SELECT count(*) > $2
  FROM (SELECT FROM audit_personal p WHERE {condition} LIMIT $2::bigint + 1) AS found
"""

_NAMED: Final = "coalesce((SELECT su.id FROM service_users su WHERE su.name = {0}), {0})"

# Field of RecordFilter -> its condition; {0} is the parameter, {key} the table whose order leads.
# Each has its index (0001, 0008, 0011).
_CONDITIONS: Final = {
    "id": "r.id = {0}",
    "service_user": f"r.service_user_id = {_NAMED}",
    "source_system": "r.source_system = {0}",
    "credential_id": "r.credential_id = {0}",
    "actor": f"r.actor IS NOT NULL AND coalesce(r.actor_id, r.actor) = {_NAMED}",
    "actor_credential_id": "r.actor_credential_id = {0}",
    "action": "r.action = {0}",
    "outcome": "r.outcome = {0}",
    "reason": "r.reason = {0}",
    "request_id": "r.request_id = {0}",
    "jti": "(r.id = {0} OR r.jti = {0})",
    "kid": "r.kid = {0}",
    "client_address": "p.client_address = {0}",
    "user_agent": """p.user_agent <> '' AND p.user_agent COLLATE "C" ^@ {0}""",
    "department": "p.department = {0}",
    "resource": """p.resource <> '' AND p.resource COLLATE "C" ^@ {0}""",
    # An id is drawn shortly before its record is committed, or up to 7 days if it was reported.
    "since": "r.recorded_at >= {0}"
    " AND {key}.id >= uuidv7_floor_1(greatest({0} - interval '8 days', to_timestamp(0)))",
    "until": "r.recorded_at < {0}"
    " AND {key}.id < uuidv7_floor_1(greatest({0} + interval '1 hour', to_timestamp(0)))",
}
_PERSONAL_FILTERS: Final = frozenset({"client_address", "user_agent", "department", "resource"})
_PREFIXES: Final = ("user_agent", "resource")
_TYPES: Final = {"id": "uuid", "jti": "uuid", "since": "timestamptz", "until": "timestamptz"}


# Below the deadline of who waits for the record: what comes too late should not be written.
WRITING = Deadlines(lock=1.5, statement=1.5 + 0.25, command=APPEND_DEADLINE)

log = structlog.stdlib.get_logger()


class PostgresRecordWriter:
    """Implements `authority.audit.RecordWriter` on a connection of its own."""

    def __init__(
        self,
        dsn: Secret,
        *,
        clock: DatabaseClock,
        clock_skew: int,
        compare: Callable[[Connection], Awaitable[None]],
    ) -> None:
        """`compare` looks at a new connection before anything is written through it, because it may
        lead to a database that was restored; it may raise StoreUnavailable."""
        self._dsn = dsn
        self._compare = compare
        self._clock = clock
        self._clock_skew = clock_skew
        self._connection: asyncpg.Connection[asyncpg.Record] | None = None
        self._warned = False

    @property
    def is_open(self) -> bool:
        """Whether the connection stands, as far as can be known without asking."""
        return self._connection is not None and not self._connection.is_closed()

    async def open(self, on_lost: Callable[[], None]) -> None:
        """Connect, and learn what time it is there; raise StoreUnavailable."""
        connection = await connect(
            self._dsn, application_name="privyseal audit writer", deadlines=WRITING
        )
        try:
            await self._learn_time(connection)
            await self._compare(connection)
        except BaseException:
            connection.terminate()
            raise
        connection.add_termination_listener(lambda _: on_lost())
        connection.add_log_listener(self._on_notice)
        self._connection = connection

    async def _learn_time(self, connection: "Connection") -> None:
        sent = self._clock.wall()
        with loss_as_unavailable():
            at = await time_of(connection)
        self._clock.observe(at, sent=sent, received=self._clock.wall())
        if abs(self._clock.offset) > self._clock_skew:
            log.warning("clock_is_off", offset_s=round(self._clock.offset, 1))

    async def close(self) -> None:
        """Drop the connection, whatever state it is in."""
        if self._connection is not None:
            self._connection.terminate()
            self._connection = None

    async def commit(self, records: Sequence[AuditRecord]) -> Sequence[bool]:
        """Commit in one autocommit statement: no client can die holding the fence."""
        if self._connection is None:
            raise StoreUnavailable("not connected")
        self._warned = False
        sent = self._clock.wall()
        try:
            with loss_as_unavailable():
                row = await self._connection.fetchrow(
                    COMMIT_RECORDS, as_json(records), self._clock_skew
                )
        except asyncpg.PostgresError as error:
            state = sqlstate(error) or ""
            if state[:2] in ("22", "23"):
                raise RecordsRejected(f"SQLSTATE {state}") from None
            # Deadlock, serialization, anything else: nothing was committed, and nothing leaves.
            raise StoreUnavailable(f"SQLSTATE {state}") from None
        if self._warned or row is None:
            # A standby that did not confirm shows as a WARNING with a commit that succeeded.
            raise StoreUnavailable("the commit came with a warning: it may not be durable")
        recorded, at = row
        self._clock.observe(at, sent=sent, received=self._clock.wall())
        metrics.clock_offset_seconds.set(self._clock.offset)
        return recorded

    def _on_notice(self, _: object, notice: asyncpg.PostgresLogMessage) -> None:
        if getattr(notice, "severity_en", None) == "WARNING":
            self._warned = True


class AuditRecords:
    """Implements `authority.audit.RecordReader` and `authority.operators.Issuances`."""

    def __init__(self, database: Database, *, broad: int = BROAD) -> None:
        self._database = database
        self._broad = broad

    async def issuance(self, jti: UUID) -> Issuance | None:
        """Return the issuance of this token and how its holder stands now."""
        async with self._database.connection() as connection:
            record = await connection.fetchrow(SELECT_ISSUANCE, jti)
            if record is None:
                return None
            holder = subject(await connection.fetch(SELECT_SUBJECT, record["service_user_id"]))
        if holder.service_user is None:
            return None
        return Issuance(
            signing_input_sha256=record["signing_input_sha256"],
            service_user=holder.service_user,
            credential_id=record["credential_id"],
            credential=next(
                (held for held in holder.credentials if held.id == record["credential_id"]), None
            ),
        )

    async def is_ended(self, session: str) -> bool:
        """Whether this session of the console was signed out of; raise StoreUnavailable."""
        async with self._database.connection() as connection:
            return await connection.fetchval(SELECT_SESSION_END, session)

    async def read(
        self, wanted: RecordFilter, *, cursor: str | None, newest_first: bool, limit: int
    ) -> Sequence[StoredRecord]:
        """Return records beyond the cursor, in the order of their commits or against it."""
        place = None if cursor is None else parse_cursor(cursor)
        async with self._database.connection() as connection:
            broad = await self._is_broad(connection, wanted)
            query, arguments = _page_query(wanted, place, newest_first, limit, broad=broad)
            # Not from the cache of statements: after a few uses Postgres may take one plan for all
            # values there, and those of a filter are as rare or as common as they come.
            statement = await connection.prepare(query)
            return [_stored_record(row) for row in await statement.fetch(*arguments)]

    async def _is_broad(self, connection: Connection, wanted: RecordFilter) -> bool:
        """Return whether prefixes are given, and each of them is one of many records."""
        given = [(name, prefix) for name in _PREFIXES if (prefix := getattr(wanted, name))]
        for name, prefix in given:
            query = _SELECT_IS_BROAD.format(condition=_CONDITIONS[name].format("$1"))
            if not await connection.fetchval(query, prefix, self._broad):
                return False
        return bool(given)


def _page_query(
    wanted: RecordFilter,
    place: tuple[int, UUID] | None,
    newest_first: bool,
    limit: int,
    *,
    broad: bool,
) -> tuple[str, list[Any]]:
    """Return the query of a page beyond `place`, and its arguments."""
    given = {
        name: value for name, value in msgspec.structs.asdict(wanted).items() if value is not None
    }
    source, key = _RECORDS, "r"
    if personal := given.keys() & _PERSONAL_FILTERS:
        source = _PERSONAL if personal == given.keys() and not broad else _BOTH
        key = "r" if broad else "p"
    arguments: list[Any] = []

    def parameter(value: object, kind: str) -> str:
        arguments.append(value)
        return f"${len(arguments)}::{kind}"

    conditions = [
        _CONDITIONS[name].format(parameter(value, _TYPES.get(name, "text")), key=key)
        for name, value in given.items()
    ]
    if place is not None:
        conditions.append(
            f"({key}.commit_order, {key}.id) {'<' if newest_first else '>'} "
            f"({parameter(place[0], 'bigint')}, {parameter(place[1], 'uuid')})"
        )
    query = _SELECT_RECORDS.format(
        key=key,
        source=source,
        conditions="".join(f"AND {condition} " for condition in conditions),
        direction="DESC" if newest_first else "ASC",
        limit=parameter(limit, "integer"),
    )
    return query, arguments


def parse_cursor(cursor: str) -> tuple[int, UUID]:
    """Return commit order and id; raise ValueError for what never was a cursor of ours."""
    commit_order, _, record_id = cursor.partition(".")
    if not (commit_order.isascii() and commit_order.isdecimal() and len(commit_order) <= 18):
        raise ValueError("not a cursor of this log")
    return int(commit_order), UUID(record_id)


def _stored_record(row: asyncpg.Record) -> StoredRecord:
    fields = dict(row)
    digests = {name: fields.pop(name) for name in ("signing_input_sha256", "personal_sha256")}
    digests["personal_salt"] = fields.pop("salt")
    return StoredRecord(
        cursor=f"{fields.pop('commit_order')}.{row['id']}",
        # An issuance is found by its token's id, and says so.
        jti=row["id"] if fields.pop("jti") is None and row["exp"] is not None else row["jti"],
        details=msgspec.json.decode(fields.pop("details")),
        **{name: None if value is None else value.hex() for name, value in digests.items()},
        **fields,
    )
