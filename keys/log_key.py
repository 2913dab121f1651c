"""The key of an audit log: Ed25519, kept where its URI says, here or in an HSM.

Is no signing key: it signs checkpoints and no token.
"""

from typing import Final, Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from msgspec import Struct

from keys.checkpoint import Checkpoint, NoteSigner, NoteVerifier
from keys.envelope import EnvelopeError, KeyEncryptionKeys

_PURPOSE: Final = "audit-log"


class KeptLogKey(Struct, frozen=True, kw_only=True):
    """The key of the log `origin` as the store keeps it; its private half is where `uri` says.

    `sealed_private` is that half itself, under the key-encryption keys, for `local:` only.
    """

    origin: str
    uri: str
    public_key: Ed25519PublicKey
    sealed_private: bytes | None = None

    @property
    def verifier(self) -> NoteVerifier:
        """What verifies its checkpoints, if the store named its public half truly."""
        return NoteVerifier(self.origin, self.public_key)


class LogSigner(Protocol):
    """Signs the checkpoints of one log, wherever its private key is."""

    @property
    def verifier(self) -> NoteVerifier:
        """What verifies them."""
        ...

    async def signed(self, checkpoint: Checkpoint) -> bytes:
        """Return the checkpoint as a note that `verifier` opens; raise CustodyError."""
        ...


class LocalLogSigner:
    """A log's private key in the memory of this process."""

    def __init__(self, signer: NoteSigner) -> None:
        self._signer = signer
        self.verifier: Final = signer.verifier

    async def signed(self, checkpoint: Checkpoint) -> bytes:
        """Sign at once: with Ed25519 that is quicker than to hand it to a thread."""
        return checkpoint.signed(self._signer)


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
