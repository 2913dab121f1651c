"""Signing keys in Postgres: public halves, sealed private halves, and where each stands.

Opens no private key and decides no step.
"""

from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from datetime import datetime, timedelta

import asyncpg
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_der_public_key,
)

from keys.attestation import attest
from keys.envelope import KekReader
from keys.keyring import KeyState, RotationPolicy, SigningKey
from keys.signer import KeptKey
from service.authority.audit import AuditRecord
from service.authority.key_rotation import EndedKey, StoredKey, TokenHolder
from service.store.database import Connection, Database, fetch_durable
from service.store.service_users import as_json

SELECT_PUBLISHED = """
SELECT kid, state, signer, public_der, sealed_private, attestation, published_at, activated_at,
       rotate_at, released_at, lifetime_cap, publish_until
  FROM signing_keys WHERE state IN ('pending', 'active', 'retiring')
"""

PREPARE = "SELECT prepare_key_1($1, $2, $3)"
ACTIVATE = "SELECT activate_key_1($1, $2, $3, $4, $5, $6, $7)"
RETIRE = "SELECT retire_key_1($1, $2, $3)"
HASTEN_ROTATION = "SELECT hasten_rotation_1($1, $2, $3)"
REVOKE = "SELECT revoke_key_1($1, $2, $3, $4, $5, $6)"
REVOKE_ALL = "SELECT revoke_all_keys_1($1, $2, $3, $4, $5, $6, $7)"
RESEAL = "SELECT reseal_key_3($1, $2, $3, $4, $5, $6, $7)"
DESTROYED = "SELECT key_destroyed_1($1, $2, $3)"
ELECT = "SELECT pg_try_advisory_lock(7709, 5)"
LIMIT_ELECTION = "SET idle_session_timeout = '180s'"
UNLIMIT_ELECTION = "RESET idle_session_timeout"
RESIGN = "SELECT pg_advisory_unlock(7709, 5)"

SELECT_DOOMED = """
SELECT kid, signer FROM signing_keys
 WHERE state IN ('retiring', 'retired', 'revoked') AND signer <> 'local:' AND destroyed_at IS NULL
"""

SELECT_KEPT_ELSEWHERE = """
SELECT signer FROM signing_keys WHERE signer <> 'local:' AND destroyed_at IS NULL
"""

SELECT_HOLDERS = """
SELECT service_user_id, max(service_user) AS service_user, count(*) AS count,
       to_timestamp(max(exp)) AS last_ends_at
  FROM (SELECT service_user_id, service_user, exp FROM audit_records
         WHERE kid = ANY ($1::text[]) AND exp > extract(epoch FROM statement_timestamp())::bigint
           -- No token lives longer than an hour: the newest ids are enough. The clock of the
           -- statement, because one that moves could serve no index.
           AND id >= uuidv7_floor_1(statement_timestamp() - interval '75 minutes')
         ORDER BY id DESC LIMIT $2::bigint) AS live
 GROUP BY service_user_id ORDER BY service_user
"""

SELECT_ENDED = """
SELECT kid, state, public_der, published_at, activated_at, ended_at FROM signing_keys
 WHERE state IN ('retired', 'revoked')
   AND ended_at > statement_timestamp() - interval '90 days'
 ORDER BY ended_at DESC, kid LIMIT $1
"""


SELECT_UNATTESTED = """
SELECT kid FROM signing_keys
 WHERE state IN ('pending', 'active', 'retiring') AND attestation IS NULL
"""
ATTEST = "UPDATE signing_keys SET attestation = $2 WHERE kid = $1"


async def attest_all(connection: Connection, read_keks: KekReader) -> None:
    """Say of every published key that it was made here; raise EnvelopeError.

    For who owns the schema, and once: in the transaction that makes room for attestations.
    """
    if rows := await connection.fetch(SELECT_UNATTESTED):
        keks = read_keks()
        for row in rows:
            await connection.execute(ATTEST, row["kid"], attest(row["kid"], keks))


class SigningKeys:
    """Implements `authority.key_rotation.SigningKeyStore`."""

    def __init__(self, database: Database, *, clock_skew: int) -> None:
        self._database = database
        self._clock_skew = clock_skew

    async def published_keys(self) -> Sequence[StoredKey]:
        """Return the pending, active and retiring keys."""
        async with self._database.connection() as connection:
            return [_stored_key(row) for row in await connection.fetch(SELECT_PUBLISHED)]

    @asynccontextmanager
    async def elected(self) -> AsyncGenerator[bool, None]:
        """Enter with True if no other process is inside."""
        async with self._database.connection() as connection:
            elected = await connection.fetchval(ELECT) is True
            if not elected:
                yield False
                return
            # A process that is paused, not dead, must not stay elected for ever.
            await connection.execute(LIMIT_ELECTION)
            try:
                yield True
            finally:
                await connection.execute(UNLIMIT_ELECTION)
                await connection.fetchval(RESIGN)

    async def prepare(self, key: KeptKey, record: AuditRecord) -> bool:
        """Publish the next key, unless one stands ready."""
        return await self._call(PREPARE, key_as_json(key), as_json(record), self._clock_skew)

    async def activate(
        self, kid: str, active_kid: str | None, policy: RotationPolicy, record: AuditRecord
    ) -> bool:
        """Let the pending key sign instead of `active_kid`, if both still are what they were."""
        return await self._call(
            ACTIVATE,
            kid,
            active_kid,
            timedelta(seconds=policy.publish_lead),
            policy.lifetime_cap,
            timedelta(seconds=policy.rotation_period),
            as_json(record),
            self._clock_skew,
        )

    async def retire(self, kid: str, record: AuditRecord) -> bool:
        """Stop publishing a retiring key whose time is over."""
        return await self._call(RETIRE, kid, as_json(record), self._clock_skew)

    async def hasten_rotation(self, active_kid: str, record: AuditRecord) -> bool:
        """Let the rotation away from `active_kid` be due now, and wait for no verifier."""
        return await self._call(HASTEN_ROTATION, active_kid, as_json(record), self._clock_skew)

    async def revoke(self, key: SigningKey, policy: RotationPolicy, record: AuditRecord) -> bool:
        """Revoke a key that still is in the state that `key` has; the next one takes its place."""
        return await self._call(
            REVOKE,
            key.kid,
            key.state.value,
            policy.lifetime_cap,
            timedelta(seconds=policy.rotation_period),
            as_json(record),
            self._clock_skew,
        )

    async def revoke_all(
        self,
        kids: Sequence[str],
        signing: KeptKey,
        following: KeptKey,
        policy: RotationPolicy,
        record: AuditRecord,
    ) -> bool:
        """Revoke every published key, if no other than `kids` is published; `signing` signs from
        now on, `following` is the next one."""
        return await self._call(
            REVOKE_ALL,
            list(kids),
            key_as_json(signing),
            key_as_json(following),
            policy.lifetime_cap,
            timedelta(seconds=policy.rotation_period),
            as_json(record),
            self._clock_skew,
        )

    async def holders(self, kids: Sequence[str], limit: int | None = None) -> Sequence[TokenHolder]:
        """Return which service users hold live tokens of these keys."""
        async with self._database.connection() as connection:
            rows = await connection.fetch(SELECT_HOLDERS, list(kids), limit)
        return [TokenHolder(**row) for row in rows]

    async def ended(self, limit: int) -> Sequence[EndedKey]:
        """Return the keys that ended lately, the last one first."""
        async with self._database.connection() as connection:
            rows = await connection.fetch(SELECT_ENDED, limit)
        return [
            EndedKey(
                kid=row["kid"],
                state=KeyState(row["state"]),
                bits=_public_key(row["public_der"]).key_size,
                published_at=row["published_at"].timestamp(),
                activated_at=_seconds(row["activated_at"]),
                ended_at=row["ended_at"].timestamp(),
            )
            for row in rows
        ]

    async def doomed(self) -> Sequence[tuple[str, str]]:
        """Return kid and URI of the keys that may sign no more and are not known to be destroyed
        where they were made. Sealed halves are not among them: those went with the state."""
        async with self._database.connection() as connection:
            return [(row["kid"], row["signer"]) for row in await connection.fetch(SELECT_DOOMED)]

    async def kept_elsewhere(self) -> frozenset[str]:
        """Return the URIs of the private halves that this database names and does not hold."""
        async with self._database.connection() as connection:
            rows = await connection.fetch(SELECT_KEPT_ELSEWHERE)
        return frozenset(row["signer"] for row in rows)

    async def destroyed(self, kid: str, record: AuditRecord) -> bool:
        """Note that a private half is destroyed where it was made."""
        return await self._call(DESTROYED, kid, as_json(record), self._clock_skew)

    async def reseal(self, before: KeptKey, after: KeptKey, record: AuditRecord) -> bool:
        """Put what is sealed of `after` in the place of what is of `before`, if that still is
        there: the private half, and the attestation."""
        return await self._call(
            RESEAL,
            before.kid,
            before.sealed_private,
            after.sealed_private,
            before.attestation,
            after.attestation,
            as_json(record),
            self._clock_skew,
        )

    async def _call(self, function: str, *arguments: object) -> bool:
        async with self._database.connection() as connection:
            return await fetch_durable(connection, function, *arguments) is True


def key_as_json(key: KeptKey) -> str:
    """Return a key as Postgres reads it: bytea in hex."""
    der = key.public_key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return as_json(
        {
            "kid": key.kid,
            "signer": key.uri,
            "public_der": "\\x" + der.hex(),
            "sealed_private": key.sealed_private and "\\x" + key.sealed_private.hex(),
            "attestation": key.attestation and "\\x" + key.attestation.hex(),
        }
    )


def _stored_key(row: asyncpg.Record) -> StoredKey:
    public_key = _public_key(row["public_der"])
    return StoredKey(
        key=SigningKey(
            kid=row["kid"],
            state=KeyState(row["state"]),
            public_key=public_key,
            published_at=row["published_at"].timestamp(),
            activated_at=_seconds(row["activated_at"]),
            rotate_at=_seconds(row["rotate_at"]),
            released_at=_seconds(row["released_at"]),
            lifetime_cap=row["lifetime_cap"],
            publish_until=_seconds(row["publish_until"]),
        ),
        kept=KeptKey(
            kid=row["kid"],
            uri=row["signer"],
            public_key=public_key,
            sealed_private=row["sealed_private"],
            attestation=row["attestation"],
        ),
    )


def _public_key(der: bytes) -> RSAPublicKey:
    public_key = load_der_public_key(der)
    assert isinstance(public_key, RSAPublicKey)
    return public_key


def _seconds(at: datetime | None) -> float | None:
    return None if at is None else at.timestamp()
