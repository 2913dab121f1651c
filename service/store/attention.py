"""What needs a person, as it stands in Postgres: each question looks at a bounded number of rows.

Decides nothing: `authority.attention` does.
"""

from collections.abc import Sequence
from typing import Final

from service.authority.attention import Lately, LogHead, Refusals
from service.authority.audit import Action
from service.store.database import Database

_SUMMARY: Final = """
SELECT sum(repeats)::bigint AS count, max(recorded_at) AS newest_at,
       array_agg(DISTINCT ARRAY[service_user_id, service_user])
           FILTER (WHERE service_user_id IS NOT NULL AND service_user IS NOT NULL) AS service_users
  FROM newest
 WHERE recorded_at >= statement_timestamp() - make_interval(days => $1)
"""

SELECT_TOKENS_ON_NO_RECORD: Final = f"""
WITH newest AS (
    SELECT r.repeats, r.recorded_at, r.service_user_id, r.service_user FROM audit_records r
     WHERE r.action = $3 ORDER BY r.commit_order DESC, r.id DESC LIMIT $2
)
{_SUMMARY}
"""  # noqa: S608

SELECT_REFUSED_OPENINGS: Final = f"""
WITH newest AS (
    SELECT r.repeats, r.recorded_at, r.service_user_id, r.service_user FROM audit_records r
     WHERE r.action = 'credential.open' AND r.outcome = 'refused' AND r.credential_id IS NOT NULL
       AND r.recorded_at >= statement_timestamp() - make_interval(days => $1)
       -- Whoever revoked it has done what there is to do.
       AND EXISTS (SELECT FROM credentials c WHERE c.id = r.credential_id AND c.revoked_at IS NULL)
     ORDER BY r.recorded_at DESC LIMIT $2
)
{_SUMMARY}
"""  # noqa: S608

SELECT_REFUSALS: Final = """
WITH newest AS (
    SELECT r.reason, r.repeats, r.recorded_at, coalesce(r.service_user, r.actor) AS whom
      FROM audit_records r
     WHERE r.outcome = 'refused' ORDER BY r.commit_order DESC, r.id DESC LIMIT $2
)
SELECT reason, sum(repeats)::bigint AS count, max(recorded_at) AS newest_at,
       coalesce((array_agg(DISTINCT whom) FILTER (WHERE whom IS NOT NULL))[1:10], '{}') AS whom,
       count(*) AS records
  FROM newest
 WHERE recorded_at >= statement_timestamp() - make_interval(hours => $1)
 GROUP BY reason ORDER BY count DESC, reason
"""

SELECT_LOG_HEAD: Final = """
SELECT coalesce(h.size, 0) AS size, h.signed_at,
       (SELECT r.recorded_at FROM audit_records r
         WHERE (r.commit_order, r.id) > (
                   coalesce(h.commit_order, g.begins_after),
                   coalesce(h.last_id, g.begins_after_id, 'ffffffff-ffff-ffff-ffff-ffffffffffff'))
         ORDER BY r.commit_order, r.id LIMIT 1) AS waiting_since
  FROM audit_logs g
  LEFT JOIN LATERAL (SELECT size, commit_order, last_id, signed_at FROM audit_checkpoints
                      WHERE log = g.log ORDER BY size DESC LIMIT 1) h ON true
 ORDER BY g.log DESC LIMIT 1
"""


class AttentionRecords:
    """Implements `authority.attention.AttentionStore`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def tokens_on_no_record(self, action: Action, days: int, limit: int) -> Lately | None:
        """Return what was reported of tokens that are on no record."""
        return await self._lately(SELECT_TOKENS_ON_NO_RECORD, days, limit, action)

    async def refused_openings(self, days: int, limit: int) -> Lately | None:
        """Return how often a hand-over was refused that there is."""
        return await self._lately(SELECT_REFUSED_OPENINGS, days, limit)

    async def _lately(self, query: str, *arguments: int | str) -> Lately | None:
        async with self._database.connection() as connection:
            row = await connection.fetchrow(query, *arguments)
        if row is None or row["count"] is None:
            return None
        return Lately(
            count=row["count"],
            newest_at=row["newest_at"],
            service_users=dict(row["service_users"] or ()),
        )

    async def refusals(self, hours: int, limit: int) -> tuple[Sequence[Refusals], bool]:
        """Return the newest refusals by reason."""
        async with self._database.connection() as connection:
            rows = await connection.fetch(SELECT_REFUSALS, hours, limit)
        found = [
            Refusals(
                reason=row["reason"],
                count=row["count"],
                newest_at=row["newest_at"],
                whom=row["whom"],
            )
            for row in rows
        ]
        return found, sum(row["records"] for row in rows) >= limit

    async def head(self) -> LogHead | None:
        """Return the newest checkpoint of the newest log."""
        async with self._database.connection() as connection:
            row = await connection.fetchrow(SELECT_LOG_HEAD)
        return None if row is None else LogHead(**row)
