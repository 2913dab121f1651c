"""Private keys at rest: AES-256-GCM under a key-encryption key (KEK) that is no part of the store.

Knows neither what it seals nor where the sealed bytes are kept.
"""

import base64
import hashlib
import os
import re
from collections.abc import Callable, Sequence

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

_NONCE_BYTES = 12
_FINGERPRINT_BYTES = 8
_KEK_LINE = re.compile(r"[A-Za-z0-9_-]{43}")


class EnvelopeError(Exception):
    """Something sealed cannot be opened, or a KEK cannot be read; the text says why."""


class KeyEncryptionKey:
    """One 256-bit KEK. It names itself by a fingerprint, which gives nothing of it away."""

    def __init__(self, key: bytes) -> None:
        if len(key) != 32:
            raise EnvelopeError(f"a key-encryption key has 32 bytes, this one has {len(key)}")
        self._aead = AESGCM(key)
        self.fingerprint = hashlib.sha256(b"privyseal kek\0" + key).digest()[:_FINGERPRINT_BYTES]

    def __repr__(self) -> str:
        return f"KeyEncryptionKey({self.fingerprint.hex()})"

    def seal(self, plaintext: bytes, *, purpose: str, kid: str) -> bytes:
        """Return fingerprint ‖ nonce ‖ ciphertext ‖ tag, bound to its purpose and `kid`."""
        nonce = os.urandom(_NONCE_BYTES)
        return self.fingerprint + nonce + self._aead.encrypt(nonce, plaintext, _aad(purpose, kid))

    def unseal(self, sealed: bytes, *, purpose: str, kid: str) -> bytes:
        """Return the plaintext; raise EnvelopeError if a single bit, or the binding, differs."""
        nonce, ciphertext = (
            sealed[_FINGERPRINT_BYTES:][:_NONCE_BYTES],
            sealed[_FINGERPRINT_BYTES + _NONCE_BYTES :],
        )
        try:
            return self._aead.decrypt(nonce, ciphertext, _aad(purpose, kid))
        except (InvalidTag, ValueError):
            raise EnvelopeError(
                f"key {kid} does not open: its sealed bytes were changed, or belong to another key"
            ) from None


class KeyEncryptionKeys:
    """The KEKs of one installation: the first seals, all unseal."""

    def __init__(self, keys: Sequence[KeyEncryptionKey]) -> None:
        if not keys:
            raise EnvelopeError("at least one key-encryption key is needed")
        self._first = keys[0]
        self._by_fingerprint = {key.fingerprint: key for key in keys}

    @classmethod
    def parse(cls, text: str) -> "KeyEncryptionKeys":
        """Read one KEK a line, 43 characters of base64url each; `#` starts a comment."""
        lines = [line.split("#")[0].strip() for line in text.splitlines()]
        keys: list[KeyEncryptionKey] = []
        for number, line in enumerate(lines, start=1):
            if not line:
                continue
            if not _KEK_LINE.fullmatch(line):
                # The line is a secret, however misspelt: name it by its number only.
                raise EnvelopeError(
                    f"line {number} is no key-encryption key: expected 43 characters of base64url "
                    "(make one with: openssl rand -base64 32 | tr '+/' '-_' | tr -d =)"
                )
            keys.append(KeyEncryptionKey(base64.urlsafe_b64decode(line + "=")))
        return cls(keys)

    def seal(self, plaintext: bytes, *, purpose: str, kid: str) -> bytes:
        """Seal under the first KEK."""
        return self._first.seal(plaintext, purpose=purpose, kid=kid)

    def seals(self, sealed: bytes) -> bool:
        """Whether the sealed bytes are under the first KEK, the one that seals."""
        return sealed.startswith(self._first.fingerprint)

    def unseal(self, sealed: bytes, *, purpose: str, kid: str) -> bytes:
        """Unseal under the KEK that the sealed bytes name; raise EnvelopeError without it."""
        fingerprint = sealed[:_FINGERPRINT_BYTES]
        if (key := self._by_fingerprint.get(fingerprint)) is None:
            known = ", ".join(known.hex() for known in self._by_fingerprint)
            raise EnvelopeError(
                f"key {kid} is sealed under the key-encryption key {fingerprint.hex()}, "
                f"which KEK_FILE does not hold (it holds {known}); add that one to the file"
            )
        return key.unseal(sealed, purpose=purpose, kid=kid)


KekReader = Callable[[], KeyEncryptionKeys]
"""Reads the KEKs anew at each use, which is rare: so a changed file counts at once.

Raises EnvelopeError.
"""


def new_kek_line() -> str:
    """Return a fresh KEK as the line that `KeyEncryptionKeys.parse` reads."""
    return base64.urlsafe_b64encode(os.urandom(32)).rstrip(b"=").decode("ascii")


def _aad(purpose: str, kid: str) -> bytes:
    return f"{purpose}\0{kid}".encode("ascii")
