"""The log as a tree in Postgres: records as leaves in the order of their commits, stored hashes,
signed heads.

Decides nothing: what is hashed and signed is for `authority.audit.sequencer`.
"""

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import datetime
from typing import Any, Final
from uuid import UUID

import asyncpg
import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from keys.checkpoint import NoteVerifier
from keys.log_key import KeptLogKey
from keys.secret import Secret
from service.authority.audit import AuditRecord
from service.authority.audit.continuity import AuditLogRow, Head, Place
from service.authority.audit.leaf import Leaf
from service.authority.audit.merkle import Span
from service.authority.audit.proofs import PlaceInLog
from service.authority.audit.sequencer import Growth
from service.store.database import Connection, connect, fetch_durable, loss_as_unavailable
from service.store.service_users import as_json

# What a leaf is made of, from `audit_records r`. Two columns change their form on the way, so an
# ORDER BY must say `r.commit_order`: a bare name would mean the text.
LEAF_COLUMNS: Final = """
r.action, r.actor, r.actor_credential_id, r.actor_id, r.aud, r.commit_order::text AS commit_order,
r.credential_id, r.details, r.exp, r.iat, r.id, r.jti, r.kid,
(extract(epoch FROM r.occurred_at) * 1000000)::bigint AS occurred_at, r.outcome, r.personal_sha256,
r.reason, (extract(epoch FROM r.recorded_at) * 1000000)::bigint AS recorded_at, r.repeats,
r.request_id, r.scope, r.service_user, r.service_user_id, r.signing_input_sha256, r.source_system,
r.version
"""

# The order of the log, beyond a place in it. No later commit can come before what this returns.
SELECT_LEAVES: Final = f"""
SELECT {LEAF_COLUMNS}
  FROM audit_records r
 WHERE (r.commit_order, r.id) > ($1::bigint, $2::uuid) AND r.commit_order < audit_horizon_1()
 ORDER BY r.commit_order, r.id LIMIT $3::bigint
"""  # noqa: S608

SELECT_LEAF: Final = f"SELECT {LEAF_COLUMNS} FROM audit_records r WHERE r.id = $1"  # noqa: S608

COUNT_WAITING: Final = """
SELECT count(*) FROM (
    SELECT FROM audit_records r
     WHERE (r.commit_order, r.id) > ($1::bigint, $2::uuid) LIMIT $3::bigint) AS waiting
"""

# A copy has another number, or else is on another server; its name may be any.
SELECT_DATABASE: Final = """
SELECT pg_postmaster_start_time() AS started_at, oid
  FROM pg_database WHERE datname = current_database()
"""

SELECT_LOG: Final = """
SELECT log, origin, public_key, signer, sealed_private, begins_after, begins_after_id
  FROM audit_logs ORDER BY log DESC LIMIT 1
"""

SELECT_PUBLIC_KEY: Final = "SELECT origin, public_key FROM audit_logs WHERE log = $1"

SELECT_HEAD: Final = """
SELECT size, commit_order, last_id, note, signed_at
  FROM audit_checkpoints WHERE log = $1 ORDER BY size DESC LIMIT 1
"""

SELECT_PLACE_IN_LOG: Final = """
SELECT l.log, g.origin, l.leaf_index, l.leaf_hash
  FROM audit_leaves l JOIN audit_logs g ON g.log = l.log WHERE l.id = $1
"""

SELECT_HASHES: Final = """
SELECT span.place, found.hash
  FROM unnest($2::smallint[], $3::bigint[], $4::bigint[])
       WITH ORDINALITY AS span (level, start, stop, place)
 CROSS JOIN LATERAL (
    SELECT leaf_index AS index, leaf_hash AS hash FROM audit_leaves
     WHERE span.level = 0 AND log = $1 AND leaf_index >= span.start AND leaf_index < span.stop
     UNION ALL
    SELECT node_index, node_hash FROM audit_nodes
     WHERE log = $1 AND level = span.level
       AND node_index >= span.start AND node_index < span.stop) AS found
 ORDER BY span.place, found.index
"""

APPEND: Final = "SELECT append_leaves_1($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)"
RESEAL: Final = "SELECT reseal_audit_log_1($1, $2, $3, $4)"
ELECT: Final = "SELECT pg_try_advisory_lock(7709, 3)"

# A process that hangs must not stay elected: it would hold its session, and with it the lock.
SET_IDLE_TIMEOUT: Final = "SET idle_session_timeout = '10s'"

# Behind every record of a transaction, whatever its id.
_LAST_ID: Final = UUID(int=2**128 - 1)

Lend = Callable[[], AbstractAsyncContextManager[Connection]]
"""Lends a connection, from a pool or always the same one."""


def always(connection: Connection) -> Lend:
    """Lend this one connection, which is the caller's; its loss is StoreUnavailable."""

    @asynccontextmanager
    async def lend() -> AsyncGenerator[Connection, None]:
        with loss_as_unavailable():
            yield connection

    return lend


def leaf_of(row: asyncpg.Record | Mapping[str, Any]) -> Leaf:
    """Return the leaf of a row of LEAF_COLUMNS; encoding it may still raise NotEncodable."""
    fields = dict(row)
    fields["details"] = msgspec.json.decode(fields["details"])
    return Leaf(**fields)


class AuditTree:
    """Reads the tree; implements `authority.audit.reading.CheckedLog` and
    `authority.key_administration.LogKeyStore`."""

    def __init__(self, lend: Lend) -> None:
        self._lend = lend

    async def database(self) -> tuple[datetime, int]:
        """Return which database this leads to: when its server started, and its number there."""
        async with self._lend() as connection:
            row = await connection.fetchrow(SELECT_DATABASE)
        assert row is not None
        return row["started_at"], row["oid"]

    async def current(self) -> AuditLogRow | None:
        """Return the newest log; None before `privyseal migrate` has made one."""
        async with self._lend() as connection:
            try:
                row = await connection.fetchrow(SELECT_LOG)
            except asyncpg.UndefinedTableError:
                return None
        if row is None:
            return None
        return AuditLogRow(
            number=row["log"],
            key=KeptLogKey(
                origin=row["origin"],
                uri=row["signer"],
                public_key=Ed25519PublicKey.from_public_bytes(row["public_key"]),
                sealed_private=row["sealed_private"],
            ),
            begins_after=Place(
                commit_order=row["begins_after"], last_id=row["begins_after_id"] or _LAST_ID
            ),
        )

    async def head(self, log_number: int) -> Head | None:
        """Return the newest signed head of a log."""
        async with self._lend() as connection:
            row = await connection.fetchrow(SELECT_HEAD, log_number)
        if row is None:
            return None
        return Head(
            size=row["size"],
            reaches=Place(commit_order=row["commit_order"], last_id=row["last_id"] or _LAST_ID),
            note=row["note"],
            signed_at=row["signed_at"],
        )

    def hashes(self, log_number: int) -> "LogHashes":
        """Return what reads the hashes of a log."""
        return LogHashes(self._lend, log_number)

    async def place_of(self, record_id: UUID) -> PlaceInLog | None:
        """Return where a record is; None while it is not in the log."""
        async with self._lend() as connection:
            row = await connection.fetchrow(SELECT_PLACE_IN_LOG, record_id)
        if row is None:
            return None
        return PlaceInLog(
            log_number=row["log"],
            log_origin=row["origin"],
            leaf_index=row["leaf_index"],
            leaf_hash=row["leaf_hash"],
        )

    async def leaf(self, record_id: UUID) -> Leaf | None:
        """Return a record as its leaf; None if it was archived, or never was."""
        async with self._lend() as connection:
            row = await connection.fetchrow(SELECT_LEAF, record_id)
        return None if row is None else leaf_of(row)

    async def verifier(self, log_number: int) -> NoteVerifier:
        """Return the verifier of a log's checkpoints, as the log names its key itself."""
        async with self._lend() as connection:
            row = await connection.fetchrow(SELECT_PUBLIC_KEY, log_number)
        assert row is not None, "leaves are of a log that there is"
        return NoteVerifier(row["origin"], Ed25519PublicKey.from_public_bytes(row["public_key"]))

    async def reseal(self, log: AuditLogRow, after: bytes, record: AuditRecord) -> bool:
        """Put `after` in the place of the log's sealed private half, if that is still there."""
        before = log.key.sealed_private
        async with self._lend() as connection:
            done = await fetch_durable(
                connection, RESEAL, log.number, before, after, as_json(record)
            )
        return done is True


class LogHashes:
    """Implements `authority.audit.merkle.StoredHashes` for one log."""

    def __init__(self, lend: Lend, log_number: int) -> None:
        self._lend = lend
        self._log_number = log_number

    async def read(self, spans: Sequence[Span]) -> Sequence[Sequence[bytes]]:
        """Return for each span its hashes in order of index, with one query for all."""
        found: list[list[bytes]] = [[] for _ in spans]
        async with self._lend() as connection:
            rows = await connection.fetch(
                SELECT_HASHES,
                self._log_number,
                [span.level for span in spans],
                [span.start for span in spans],
                [span.stop for span in spans],
            )
        for row in rows:
            place: int = row["place"]
            found[place - 1].append(row["hash"])
        return found


class PostgresLog(AuditTree):
    """Implements `authority.audit.sequencer.LogStore` on a connection of its own."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(always(connection))
        self.connection: Final = connection
        self._elected = False

    async def elect(self) -> bool:
        """Take the lock of the elected sequencer, which the session keeps."""
        if not self._elected:
            with loss_as_unavailable():
                self._elected = await self.connection.fetchval(ELECT) is True
        return self._elected

    async def leaves(self, after: Place, limit: int) -> Sequence[Leaf]:
        """Return the next records in the order of their commits."""
        with loss_as_unavailable():
            rows = await self.connection.fetch(
                SELECT_LEAVES, after.commit_order, after.last_id, limit
            )
        return [leaf_of(row) for row in rows]

    async def waiting(self, after: Place, limit: int) -> int:
        """Return how many committed records come next, counted up to `limit`."""
        with loss_as_unavailable():
            return await self.connection.fetchval(
                COUNT_WAITING, after.commit_order, after.last_id, limit
            )

    async def append(self, growth: Growth) -> bool:
        """Commit in one autocommit statement, guarded by the expected size."""
        head = growth.head
        with loss_as_unavailable():
            done = await fetch_durable(
                self.connection,
                APPEND,
                growth.log_number,
                growth.expected_size,
                growth.ids,
                growth.leaf_hashes,
                [node.level for node in growth.nodes],
                [node.index for node in growth.nodes],
                [node.hash for node in growth.nodes],
                head.reaches.commit_order,
                head.reaches.last_id,
                head.note,
                head.signed_at,
            )
        return done is True


@asynccontextmanager
async def postgres_log(dsn: Secret) -> AsyncGenerator[PostgresLog, None]:
    """Open a connection for a sequencer; raise StoreUnavailable."""
    connection = await connect(dsn, application_name="privyseal sequencer")
    try:
        with loss_as_unavailable():
            await connection.execute(SET_IDLE_TIMEOUT)
        yield PostgresLog(connection)
    finally:
        connection.terminate()
