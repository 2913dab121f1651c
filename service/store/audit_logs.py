"""Opens the audit log of a database, for who owns it.

Reads and writes no record.
"""

from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from keys.checkpoint import NoteVerifier
from keys.envelope import KeyEncryptionKeys
from keys.log_key import new_log_key
from service.store.database import Connection, loss_as_unavailable

OPEN_LOG: Final = "SELECT open_audit_log_1($1, $2, $3)"

SELECT_PUBLIC_KEY: Final = "SELECT origin, public_key FROM audit_logs ORDER BY log DESC LIMIT 1"


async def open_log(connection: Connection, origin: str, keks: KeyEncryptionKeys) -> bool:
    """Make the first audit log with a fresh key, as the owner; False if there is one already."""
    signer, sealed = new_log_key(origin, keks)
    with loss_as_unavailable():
        return await connection.fetchval(
            OPEN_LOG, origin, signer.verifier.public_key.public_bytes_raw(), sealed
        )


async def newest_vkey(connection: Connection) -> str | None:
    """Return the verifier key of the newest log, as whoever reads its checkpoints pins it."""
    with loss_as_unavailable():
        row = await connection.fetchrow(SELECT_PUBLIC_KEY)
    if row is None:
        return None
    public_key = Ed25519PublicKey.from_public_bytes(row["public_key"])
    return NoteVerifier(row["origin"], public_key).vkey
