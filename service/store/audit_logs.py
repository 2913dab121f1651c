"""Opens the audit log of a database, for who owns it, and keeps room ahead for its records.

Reads and writes no record.
"""

from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from keys.checkpoint import NoteVerifier
from keys.log_key import KeptLogKey
from service.store.database import Connection, loss_as_unavailable

OPEN_ERA: Final = "SELECT open_audit_era_1()"
EXTEND_PARTITIONS: Final = "SELECT extend_audit_partitions_1(3)"

OPEN_LOG: Final = "SELECT open_audit_log_2($1, $2, $3, $4)"

SELECT_PUBLIC_KEY: Final = "SELECT origin, public_key FROM audit_logs ORDER BY log DESC LIMIT 1"

SELECT_KEPT_ELSEWHERE: Final = "SELECT signer FROM audit_logs WHERE signer <> 'local:'"


async def prepare_log(connection: Connection) -> None:
    """Make the partitions of the coming three months; in a cluster that the log does not know yet,
    open an era of it first."""
    await connection.execute(OPEN_ERA)
    await connection.execute(EXTEND_PARTITIONS)


async def open_log(connection: Connection, key: KeptLogKey) -> bool:
    """Make the first audit log, as the owner, with a fresh key; False if there is one already."""
    with loss_as_unavailable():
        return await connection.fetchval(
            OPEN_LOG, key.origin, key.public_key.public_bytes_raw(), key.uri, key.sealed_private
        )


async def log_keys_kept_elsewhere(connection: Connection) -> frozenset[str]:
    """Return the URIs of the keys of logs that an HSM holds, closed logs' too."""
    with loss_as_unavailable():
        return frozenset(row["signer"] for row in await connection.fetch(SELECT_KEPT_ELSEWHERE))


async def newest_vkey(connection: Connection) -> str | None:
    """Return the verifier key of the newest log, as whoever reads its checkpoints pins it."""
    with loss_as_unavailable():
        row = await connection.fetchrow(SELECT_PUBLIC_KEY)
    if row is None:
        return None
    public_key = Ed25519PublicKey.from_public_bytes(row["public_key"])
    return NoteVerifier(row["origin"], public_key).vkey
