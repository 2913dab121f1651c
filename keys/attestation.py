"""That a published key was made here: said by who holds the key-encryption keys, so by no database.

Says nothing of who may sign with it.
"""

from typing import Final

from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

from keys.envelope import EnvelopeError, KeyEncryptionKeys
from keys.verifier import thumbprint

_PURPOSE: Final = "published-key"


def attest(kid: str, keks: KeyEncryptionKeys) -> bytes:
    """Return the attestation of a key that was made here, under the first key-encryption key."""
    # Nothing is secret of a public half: what is sealed is its name, which is its RFC 7638
    # thumbprint, together with what this is for. So no other sealed bytes can stand here.
    return keks.seal(b"", purpose=_PURPOSE, kid=kid)


def require_attested(
    kid: str, public_key: RSAPublicKey, attestation: bytes | None, keks: KeyEncryptionKeys
) -> None:
    """Raise EnvelopeError unless this public half was made here, under this kid."""
    if attestation is None:
        raise EnvelopeError(f"key {kid} has no attestation")
    if thumbprint(public_key) != kid:
        raise EnvelopeError(f"key {kid}: its public half is that of another key")
    keks.unseal(attestation, purpose=_PURPOSE, kid=kid)
