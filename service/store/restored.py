"""A restored database as its owner sees it: what it costs to go on with it, and that act.

Decides nothing: `authority.restore` does, and an operator.
"""

from datetime import timedelta
from typing import Final

from keys.keyring import RotationPolicy
from service.authority.audit import AuditRecord
from service.authority.restore import Successor, Toll
from service.store.database import Database, fetch_durable, time_of
from service.store.service_users import NOT_ENDED, as_json
from service.store.signing_keys import key_as_json

SELECT_TOLL: Final = f"""
SELECT ARRAY(SELECT kid FROM signing_keys WHERE state IN ('pending', 'active', 'retiring')
              ORDER BY kid) AS published_kids,
       (SELECT count(*) FROM credentials c
         WHERE c.held_at IS NULL AND {NOT_ENDED.format(c="c")}) AS live_credentials,
       (SELECT count(*) FROM service_users
         WHERE source_system = 'console' AND status = 'active') AS active_people
"""  # noqa: S608

ACCEPT: Final = "SELECT accept_restored_1($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)"


class RestoredDatabase:
    """Implements `authority.restore.RestoreStore`; `database` is the owner's."""

    def __init__(self, database: Database, *, clock_skew: int) -> None:
        self._database = database
        self._clock_skew = clock_skew

    async def now(self) -> float:
        """Return the time of the database."""
        async with self._database.connection() as connection:
            return await time_of(connection)

    async def toll(self) -> Toll:
        """Return the published keys, how many credentials that have not ended are not held yet,
        and how many people may sign in."""
        async with self._database.connection() as connection:
            row = await connection.fetchrow(SELECT_TOLL)
        assert row is not None
        return Toll(**row)

    async def accept(
        self,
        successor: Successor,
        policy: RotationPolicy,
        record: AuditRecord,
        revocation: AuditRecord,
    ) -> bool:
        """Do all of it in one statement, under the fence."""
        closed, key = successor.closed, successor.log_key
        new_log = {
            "log": closed.next_number,
            "origin": key.origin,
            "public_key": "\\x" + key.public_key.public_bytes_raw().hex(),
            "signer": key.uri,
            "sealed_private": key.sealed_private and "\\x" + key.sealed_private.hex(),
        }
        async with self._database.connection() as connection:
            done = await fetch_durable(
                connection,
                ACCEPT,
                as_json(new_log),
                closed.log.number,
                list(successor.revoked_kids),
                key_as_json(successor.signing),
                key_as_json(successor.following),
                policy.lifetime_cap,
                timedelta(seconds=policy.rotation_period),
                as_json(record),
                as_json(revocation),
                self._clock_skew,
            )
        return done is True
