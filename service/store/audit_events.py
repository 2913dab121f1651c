"""Reported events in Postgres, what they are compared with, and what they say about verifiers.

Decides neither which events are taken nor what a rotation makes of them.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Final, cast
from uuid import UUID

import asyncpg
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_der_public_key

from service.authority.audit import AuditRecord
from service.authority.audit.attribution import IssuedToken, KnownKey
from service.authority.audit.events import Verdict
from service.authority.errors import StoreUnavailable
from service.authority.evidence import VerifierInstance
from service.store.database import Database, fetch_durable
from service.store.service_users import as_json

REPORT = "SELECT report_events_1($1, $2)"

SELECT_ISSUED = """
SELECT id AS jti, service_user_id, service_user, source_system, credential_id, kid, aud,
       signing_input_sha256
  FROM audit_records
 WHERE id = ANY ($1::uuid[]) AND action IN ('token.issue', 'token.mint') AND outcome = 'success'
"""

# The first condition is what the index holds.
SELECT_ISSUED_DIGESTS = """
SELECT signing_input_sha256 FROM audit_records
 WHERE substring(signing_input_sha256 FROM 1 FOR 8)
       = ANY (ARRAY(SELECT substring(given FROM 1 FOR 8) FROM unnest($1::bytea[]) AS given))
   AND signing_input_sha256 = ANY ($1::bytea[])
   AND jti IS NULL AND action IN ('token.issue', 'token.mint') AND outcome = 'success'
"""

SELECT_KNOWN_KEYS = """
SELECT kid, public_der, activated_at FROM signing_keys WHERE kid = ANY ($1::text[])
"""

# Restored data lacks what came after the backup: but for the key that signs since that was accepted
# and a new log was opened, nobody knows all that a key has signed.
KEPT_SINCE = """
SELECT greatest(audit_kept_since_1(), max(k.activated_at))
  FROM signing_keys k
 WHERE k.activated_at <= (SELECT max(opened_at) FROM audit_logs WHERE log > 1)
"""

COUNT_FORGED = """
SELECT count(*) FROM audit_records
 WHERE action = 'token.forged'
   AND recorded_at >= statement_timestamp() - make_interval(days => $1)
   -- It has the id of an event, which may have lain in a spool for a week.
   AND id >= uuidv7_floor_1(statement_timestamp() - make_interval(days => $1 + 8))
"""

MAX_INSTANCES: Final = 1000
# Of each reporter: far more than its instances have to say in two hours. A flood crowds out nobody
# but the reporter that it came from.
MAX_REPORTS: Final = 20_000

SELECT_INSTANCES = f"""
WITH heard AS (
    SELECT id, recorded_at, actor_id, actor, details ->> 'instance' AS instance,
           details -> 'kids' ? $1 AS has_loaded,
           row_number() OVER (PARTITION BY actor_id ORDER BY recorded_at DESC) AS place
      FROM audit_records
     WHERE action = 'jwks.loaded' AND outcome = 'success'
       -- The clock of the statement, because one that moves could serve no index.
       AND recorded_at >= statement_timestamp() - interval '2 hours'
       -- By the reporter's clock, too: what lay in a spool for long is no sign of life.
       AND id >= uuidv7_floor_1(statement_timestamp() - interval '2 hours')
), newest AS (
    -- Newest by id: of two reports, the one that was drawn up first may arrive last.
    SELECT DISTINCT ON (actor_id, instance) actor_id, instance, actor, has_loaded
      FROM heard WHERE place <= {MAX_REPORTS} ORDER BY actor_id, instance, id DESC
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
    """Implements `authority.audit.events.EventStore`, `authority.audit.attribution.TokenRecords`,
    `authority.audit.forged.ForgedTokenRecords` and `authority.evidence.Evidence`."""

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

    async def issued(self, jtis: Collection[UUID]) -> Mapping[UUID, IssuedToken]:
        """Return those of these tokens that are on record, minted ones too."""
        async with self._database.connection() as connection:
            rows = await connection.fetch(SELECT_ISSUED, list(jtis))
        return {row["jti"]: IssuedToken(**row) for row in rows}

    async def issued_digests(self, digests: Collection[bytes]) -> frozenset[bytes]:
        """Return those of these digests that are of a token on record."""
        async with self._database.connection() as connection:
            rows = await connection.fetch(SELECT_ISSUED_DIGESTS, list(digests))
        return frozenset(row["signing_input_sha256"] for row in rows)

    async def known_keys(self, kids: Collection[str]) -> Mapping[str, KnownKey]:
        """Return those of these keys that are or were ours, whatever became of them."""
        async with self._database.connection() as connection:
            rows = await connection.fetch(SELECT_KNOWN_KEYS, list(kids))
        return {row["kid"]: _known_key(row) for row in rows}

    async def kept_since(self) -> float:
        """Return the time from which on no record was archived or lost with a restore."""
        async with self._database.connection() as connection:
            return (await connection.fetchval(KEPT_SINCE)).timestamp()

    async def count_forged(self, days: int) -> int:
        """Return how many forged tokens were recorded in so many days."""
        async with self._database.connection() as connection:
            return await connection.fetchval(COUNT_FORGED, days)


def _known_key(row: asyncpg.Record) -> KnownKey:
    public_key = load_der_public_key(row["public_der"])
    assert isinstance(public_key, RSAPublicKey)
    activated_at = row["activated_at"]
    return KnownKey(
        public_key=public_key,
        activated_at=None if activated_at is None else activated_at.timestamp(),
    )
