"""The private key of an audit log at rest: Ed25519, sealed under the key-encryption keys.

Is no signing key: it signs checkpoints and no token.
"""

from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from keys.checkpoint import NoteSigner
from keys.envelope import EnvelopeError, KeyEncryptionKeys

_PURPOSE: Final = "audit-log"


def new_log_key(origin: str, keks: KeyEncryptionKeys) -> tuple[NoteSigner, bytes]:
    """Return a fresh key for the log `origin`, and its private half as the store keeps it."""
    private_key = Ed25519PrivateKey.generate()
    sealed = keks.seal(private_key.private_bytes_raw(), purpose=_PURPOSE, kid=origin)
    return NoteSigner(origin, private_key), sealed


def open_log_key(origin: str, sealed: bytes, keks: KeyEncryptionKeys) -> NoteSigner:
    """Return the key of the log `origin`; raise EnvelopeError.

    What opens was sealed by who holds a key-encryption key, for this origin: a database alone
    cannot name another key.
    """
    raw = keks.unseal(sealed, purpose=_PURPOSE, kid=origin)
    try:
        return NoteSigner(origin, Ed25519PrivateKey.from_private_bytes(raw))
    except ValueError:
        raise EnvelopeError(f"what is sealed for {origin} is no Ed25519 key") from None


def reseal_log_key(origin: str, sealed: bytes, keks: KeyEncryptionKeys) -> bytes:
    """Return the same private half under the first key-encryption key; raise EnvelopeError."""
    raw = keks.unseal(sealed, purpose=_PURPOSE, kid=origin)
    return keks.seal(raw, purpose=_PURPOSE, kid=origin)
