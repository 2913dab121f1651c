"""Private halves of signing keys, behind one interface, found by URI.

Never shows a private key: it signs, and it seals a new key for the store.
"""

import asyncio
from concurrent.futures import Executor
from typing import Protocol

from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.rsa import (
    RSAPrivateKey,
    RSAPublicKey,
    generate_private_key,
)
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_der_private_key,
)
from msgspec import Struct

from keys.envelope import EnvelopeError, KeyEncryptionKeys
from keys.verifier import thumbprint

LOCAL = "local:"
_PURPOSE = "signing-key"
_PADDING = PKCS1v15()
_HASH = SHA256()


class Signer(Protocol):
    """Signs with one private key, wherever that is."""

    async def sign(self, data: bytes) -> bytes:
        """Return the RSASSA-PKCS1-v1_5 signature with SHA-256 (RFC 7518 §3.3) of `data`."""
        ...


class LocalSigner:
    """A private key in the memory of this process; OpenSSL signs without the interpreter lock."""

    def __init__(self, private_key: RSAPrivateKey, executor: Executor) -> None:
        self._private_key = private_key
        self._executor = executor

    async def sign(self, data: bytes) -> bytes:
        """Sign in the executor, so that the event loop goes on."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._executor, self._private_key.sign, data, _PADDING, _HASH
        )


class NewKey(Struct, frozen=True, kw_only=True):
    """A key that was just made: what the store keeps of it."""

    kid: str
    signer: str
    public_key: RSAPublicKey
    sealed_private: bytes


def generate(bits: int, keks: KeyEncryptionKeys) -> NewKey:
    """Make an RSA key of `bits` with e = 65537 and seal its private half. Takes up to seconds."""
    private_key = generate_private_key(public_exponent=65537, key_size=bits)
    kid = thumbprint(private_key.public_key())
    der = private_key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    return NewKey(
        kid=kid,
        signer=LOCAL,
        public_key=private_key.public_key(),
        sealed_private=keks.seal(der, purpose=_PURPOSE, kid=kid),
    )


def reseal(kid: str, sealed_private: bytes, keks: KeyEncryptionKeys) -> bytes:
    """Return the private half sealed under the first KEK; raise EnvelopeError."""
    der = keks.unseal(sealed_private, purpose=_PURPOSE, kid=kid)
    return keks.seal(der, purpose=_PURPOSE, kid=kid)


def open_private_key(
    uri: str, kid: str, sealed_private: bytes, public_key: RSAPublicKey, keks: KeyEncryptionKeys
) -> RSAPrivateKey:
    """Return the private half that is kept under `uri`; raise EnvelopeError.

    It is compared with the public half: a key that would sign what no verifier accepts must fail
    here and not in front of a client.
    """
    if uri != LOCAL:
        raise EnvelopeError(f"key {kid} has the signer {uri}, which this release does not know")
    der = keks.unseal(sealed_private, purpose=_PURPOSE, kid=kid)
    private_key = load_der_private_key(der, password=None)
    if not isinstance(private_key, RSAPrivateKey) or (
        private_key.public_key().public_numbers() != public_key.public_numbers()
    ):
        raise EnvelopeError(f"key {kid}: its private half does not belong to its public half")
    return private_key


def signer_for(
    uri: str,
    *,
    kid: str,
    sealed_private: bytes,
    public_key: RSAPublicKey,
    keks: KeyEncryptionKeys,
    executor: Executor,
) -> Signer:
    """Open the signer that `uri` names; raise EnvelopeError if that cannot be done."""
    return LocalSigner(open_private_key(uri, kid, sealed_private, public_key, keks), executor)
