"""When service users and credentials were used last, out of the audit log; reads only.

Every query goes through an index and ends after one page, whatever the size of the log.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Final

from service.authority.model import ServiceUserFilter
from service.authority.usage import (
    EndingCredential,
    ListedServiceUser,
    LiveTokenCount,
    Use,
)
from service.store.database import Database
from service.store.service_users import (
    NOT_ENDED,
    SELECT_LIVE_TOKENS,
    SERVICE_USER_COLUMNS,
    fetch_page,
    service_user,
)

_LAST_EXCHANGE: Final = """
    SELECT r.id, r.recorded_at FROM audit_records r
     WHERE r.service_user_id = {user} AND r.exp IS NOT NULL AND r.action = 'token.issue'
     ORDER BY r.exp DESC LIMIT 1
"""
"""By its end, which is what an index has: wrong by an hour at most, after the lifetime changed."""

_LAST_USE: Final = """
    SELECT r.id, r.recorded_at FROM audit_records r
     WHERE r.credential_id = c.id AND r.action = 'token.issue' AND r.outcome = 'success'
     ORDER BY r.commit_order DESC, r.id DESC LIMIT 1
"""

_IS_LIVE: Final = f"""{NOT_ENDED} AND {{c}}.held_at IS NULL
    AND ({{c}}.code_ends_at IS NULL OR {{c}}.opened_at IS NOT NULL)"""

SELECT_CREDENTIAL_USES = f"""
SELECT c.id AS credential_id, used.recorded_at AS at, p.client_address
  FROM credentials c
  CROSS JOIN LATERAL ({_LAST_USE}) used
  LEFT JOIN audit_personal p ON p.id = used.id
 WHERE c.service_user_id = $1
"""  # noqa: S608

SELECT_SERVICE_USER_USE = f"""
SELECT used.recorded_at AS at, p.client_address
  FROM ({_LAST_EXCHANGE.format(user="$1")}) used LEFT JOIN audit_personal p ON p.id = used.id
"""  # noqa: S608

SELECT_PAGE = f"""
SELECT {SERVICE_USER_COLUMNS},
       coalesce(used.recorded_at, own.archived_use_at) AS last_used_at,
       own.live_credentials, own.first_end
  FROM (SELECT {SERVICE_USER_COLUMNS} FROM service_users su
         WHERE su.name COLLATE "C" > $1 {{conditions}}
         ORDER BY su.name COLLATE "C" LIMIT $2) su
  LEFT JOIN LATERAL ({_LAST_EXCHANGE.format(user="su.id")}) used ON true
  CROSS JOIN LATERAL (
    SELECT max(c.archived_use_at) AS archived_use_at,
           count(*) FILTER (WHERE {_IS_LIVE.format(c="c")}) AS live_credentials,
           min(c.expires_at) FILTER (WHERE {_IS_LIVE.format(c="c")}
               AND c.expires_at < statement_timestamp() + $3::interval) AS first_end
      FROM credentials c WHERE c.service_user_id = su.id) own
 ORDER BY su.name COLLATE "C"
"""  # noqa: S608

# One look into the index for each system, instead of one for each service user.
SELECT_SOURCE_SYSTEMS = """
WITH RECURSIVE systems (name, place) AS (
    (SELECT source_system, 1 FROM service_users ORDER BY source_system LIMIT 1)
    UNION ALL
    SELECT (SELECT su.source_system FROM service_users su WHERE su.source_system > systems.name
             ORDER BY su.source_system LIMIT 1), place + 1
      FROM systems WHERE systems.name IS NOT NULL AND place < $1
)
SELECT name FROM systems WHERE name IS NOT NULL
"""

# The last use, and what its service user has instead, are looked up for the few of a page.
SELECT_ENDING = f"""
WITH ending AS (
    SELECT c.id, c.service_user_id, c.label, c.created_at, c.expires_at, c.archived_use_at,
           su.name, su.owner, su.contact
      FROM credentials c JOIN service_users su ON su.id = c.service_user_id
     WHERE {_IS_LIVE.format(c="c")} AND su.status = 'active'
       AND c.expires_at < statement_timestamp() + $1::interval AND (c.expires_at, c.id) > ($2, $3)
     ORDER BY c.expires_at, c.id LIMIT $4
)
SELECT c.service_user_id, c.name AS service_user, c.owner, c.contact, c.id AS credential_id,
       c.label, c.expires_at, coalesce(used.recorded_at, c.archived_use_at) AS last_used_at,
       (SELECT min(coalesce(n.opened_at, n.created_at)) FROM credentials n
         WHERE n.service_user_id = c.service_user_id AND n.created_at > c.created_at
           AND n.expires_at > c.expires_at AND {_IS_LIVE.format(c="n")}) AS replaced_at
  FROM ending c LEFT JOIN LATERAL ({_LAST_USE}) used ON true
 ORDER BY c.expires_at, c.id
"""  # noqa: S608

_START: Final = (datetime(1970, 1, 1, tzinfo=UTC), "")


class RecordedUses:
    """Implements `authority.usage.Uses`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def of_credentials(self, service_user_id: str) -> Mapping[str, Use]:
        """Return the last use of each credential that has one in the log, by its id."""
        async with self._database.connection() as connection:
            rows = await connection.fetch(SELECT_CREDENTIAL_USES, service_user_id)
        return {
            row["credential_id"]: Use(at=row["at"], client_address=row["client_address"])
            for row in rows
        }

    async def of_service_user(self, service_user_id: str) -> Use | None:
        """Return its last exchange that is in the log."""
        async with self._database.connection() as connection:
            row = await connection.fetchrow(SELECT_SERVICE_USER_USE, service_user_id)
        if row is None:
            return None
        return Use(at=row["at"], client_address=row["client_address"])

    async def live_tokens(self, service_user_id: str, at_most: int) -> LiveTokenCount:
        """Count its tokens that have not expired and whose key was not revoked, up to `at_most`."""
        async with self._database.connection() as connection:
            row = await connection.fetchrow(SELECT_LIVE_TOKENS, service_user_id, None, at_most)
        assert row is not None
        return LiveTokenCount(**row)

    async def page(
        self, wanted: ServiceUserFilter, *, after: str, limit: int, ending_within: timedelta
    ) -> Sequence[ListedServiceUser]:
        """Return service users by name, starting after the name `after`."""
        async with self._database.connection() as connection:
            arguments = [after, limit, ending_within]
            rows = await fetch_page(connection, SELECT_PAGE, arguments, wanted)
        return [
            ListedServiceUser(
                service_user=service_user(row),
                last_used_at=row["last_used_at"],
                live_credentials=row["live_credentials"],
                first_end=row["first_end"],
            )
            for row in rows
        ]

    async def source_systems(self, limit: int) -> Sequence[str]:
        """Return the first source systems that service users have."""
        async with self._database.connection() as connection:
            rows = await connection.fetch(SELECT_SOURCE_SYSTEMS, limit)
        return [row["name"] for row in rows]

    async def ending(
        self, within: timedelta, *, after: tuple[datetime, str] | None, limit: int
    ) -> Sequence[EndingCredential]:
        """Return live credentials that end, by their end, then their id."""
        async with self._database.connection() as connection:
            rows = await connection.fetch(SELECT_ENDING, within, *(after or _START), limit)
        return [EndingCredential(**row) for row in rows]
