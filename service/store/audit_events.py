"""Reported events in Postgres, and what they say about verifiers and keys.

Decides neither which events are taken nor what a rotation makes of them.
"""

from collections.abc import Sequence
from typing import Final, cast

import asyncpg

from service.authority.audit import AuditRecord
from service.authority.audit.events import Verdict
from service.authority.errors import StoreUnavailable
from service.authority.evidence import VerifierInstance
from service.store.database import Database, fetch_durable
from service.store.service_users import as_json

REPORT = "SELECT report_events_1($1, $2)"

MAX_INSTANCES: Final = 1000
# Far more than so many instances have to say in two hours: no flood may hold a rotation up.
MAX_REPORTS: Final = 20_000

SELECT_INSTANCES = f"""
WITH heard AS (
    SELECT id, recorded_at, actor_id, actor, details ->> 'instance' AS instance,
           details -> 'kids' ? $1 AS has_loaded
      FROM audit_records
     WHERE action = 'jwks.loaded' AND outcome = 'success'
       -- The clock of the statement, because one that moves could serve no index.
       AND recorded_at >= statement_timestamp() - interval '2 hours'
       -- By the reporter's clock, too: what lay in a spool for long is no sign of life.
       AND id >= uuidv7_floor_1(statement_timestamp() - interval '2 hours')
     ORDER BY recorded_at DESC LIMIT {MAX_REPORTS}
), newest AS (
    -- Newest by id: of two reports, the one that was drawn up first may arrive last.
    SELECT DISTINCT ON (actor_id, instance) actor_id, instance, actor, has_loaded
      FROM heard ORDER BY actor_id, instance, id DESC
)
SELECT n.actor AS service_user, instance, max(h.recorded_at) AS last_heard_at, n.has_loaded,
       min(h.recorded_at) FILTER (WHERE NOT n.has_loaded AND NOT h.has_loaded
           AND h.recorded_at >= (SELECT published_at FROM signing_keys WHERE kid = $1)
       ) AS missing_since
  FROM newest n JOIN heard h USING (actor_id, instance)
 GROUP BY actor_id, instance, n.actor, n.has_loaded
 ORDER BY n.has_loaded, n.actor, instance LIMIT {MAX_INSTANCES}
"""  # noqa: S608


class AuditEvents:
    """Implements `authority.audit.events.EventStore` and `authority.evidence.Evidence`."""

    def __init__(self, database: Database, *, clock_skew: int) -> None:
        self._database = database
        self._clock_skew = clock_skew

    async def report(self, records: Sequence[AuditRecord]) -> Sequence[Verdict]:
        """Put on record what is new; raise StoreUnavailable."""
        for _ in range(2):
            try:
                return await self._report(records)
            except (asyncpg.UniqueViolationError, asyncpg.DeadlockDetectedError):
                # Someone reported the same ids at the same time: once they are on record, and
                # they are now, the next call finds them.
                continue
        raise StoreUnavailable("the same ids were reported twice at the same time")

    async def _report(self, records: Sequence[AuditRecord]) -> Sequence[Verdict]:
        async with self._database.connection() as connection:
            verdicts = await fetch_durable(connection, REPORT, as_json(records), self._clock_skew)
        return [Verdict(verdict) for verdict in cast("list[str]", verdicts)]

    async def instances(self, kid: str) -> Sequence[VerifierInstance]:
        """Return the verifiers of the last 2 h, those that lack the key first."""
        async with self._database.connection() as connection:
            rows = await connection.fetch(SELECT_INSTANCES, kid)
        return [VerifierInstance(**row) for row in rows]
