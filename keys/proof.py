"""Whether a key signed a token of which only the digest is known.

Reads no token and decides nothing about one.
"""

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from cryptography.hazmat.primitives.hashes import SHA256

_PADDING = PKCS1v15()
_HASH = Prehashed(SHA256())


def is_signed(signing_input_sha256: bytes, signature: bytes, public_key: RSAPublicKey) -> bool:
    """Return whether `signature` is RS256 (RFC 7518 §3.3) over the input of that SHA-256."""
    try:
        public_key.verify(signature, signing_input_sha256, _PADDING, _HASH)
    except InvalidSignature:
        return False
    return True
