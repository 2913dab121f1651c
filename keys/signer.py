"""Private halves of signing keys, and of the audit log's key, behind one interface: custody is
found by URI.

Never shows a private key: it makes, opens and destroys them, and signs.
"""

import asyncio
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from typing import Protocol

from cryptography.exceptions import InvalidSignature
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
from msgspec.structs import replace

from keys.attestation import attest, require_attested
from keys.envelope import EnvelopeError, KekReader, KeyEncryptionKeys
from keys.log_key import KeptLogKey, LocalLogSigner, LogSigner, new_log_key, open_log_key
from keys.verifier import thumbprint

LOCAL = "local:"
_PURPOSE = "signing-key"
_PADDING = PKCS1v15()
_HASH = SHA256()


class CustodyError(Exception):
    """A private half cannot be made, opened, used or destroyed; the text says why."""


class KeptKey(Struct, frozen=True, kw_only=True):
    """A key as the store keeps it; its private half is where `uri` says.

    `sealed_private` is that half itself, under the key-encryption key, for `local:` only; it is
    gone once the key may no longer sign. `attestation` says that it was made here: without one it
    is not published.
    """

    kid: str
    uri: str
    public_key: RSAPublicKey
    sealed_private: bytes | None = None
    attestation: bytes | None = None


class Signer(Protocol):
    """Signs with one private key, wherever that is."""

    async def sign(self, data: bytes) -> bytes:
        """Return the RSASSA-PKCS1-v1_5 signature with SHA-256 (RFC 7518 §3.3) of `data`.

        Raise CustodyError.
        """
        ...


class Custody(Protocol):
    """Where private halves live; one for each URI scheme. Each method may raise CustodyError."""

    async def new_key(self, bits: int) -> KeptKey:
        """Make an RSA key of `bits` with e = 65537. Takes up to seconds."""
        ...

    async def open(self, kept: KeptKey) -> Signer:
        """Return the signer of a key that was made here, having compared both halves.

        A key that would sign what no verifier accepts fails here and not in front of a client.
        """
        ...

    async def new_log_key(self, origin: str) -> KeptLogKey:
        """Make the Ed25519 key of the audit log `origin`."""
        ...

    async def open_log_key(self, kept: KeptLogKey) -> LogSigner:
        """Return the signer of a log's key that was made here for that log, under that public half.

        So a database alone can name no other key.
        """
        ...

    async def destroy(self, uri: str) -> None:
        """Destroy what this custody itself holds of a key; one that is gone is no error."""
        ...

    async def listed(self) -> Sequence[str]:
        """Return the URIs of the keys that this custody itself holds."""
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


class LocalCustody:
    """`local:`: private halves are kept by the store, sealed under a key-encryption key."""

    def __init__(self, read_keks: KekReader, executor: Executor) -> None:
        self._read_keks = read_keks
        self._executor = executor

    async def new_key(self, bits: int) -> KeptKey:
        """Make a key and seal its private half under the first key-encryption key."""
        # Prime numbers take up to seconds: not on the event loop.
        return await asyncio.to_thread(generate, bits, self._keks())

    async def open(self, kept: KeptKey) -> Signer:
        """Unseal a private half."""
        private_key = await asyncio.to_thread(unseal, kept, self._keks())
        return await proven(kept, LocalSigner(private_key, self._executor))

    async def new_log_key(self, origin: str) -> KeptLogKey:
        """Make a key and seal its private half under the first key-encryption key."""
        signer, sealed = new_log_key(origin, self._keks())
        return KeptLogKey(
            origin=origin,
            uri=LOCAL,
            public_key=signer.verifier.public_key,
            sealed_private=sealed,
        )

    async def open_log_key(self, kept: KeptLogKey) -> LogSigner:
        """Unseal a private half: it was sealed by who holds a key-encryption key."""
        if kept.sealed_private is None:
            raise CustodyError("its private half is not in the store")
        try:
            signer = open_log_key(kept.origin, kept.sealed_private, self._keks())
        except EnvelopeError as error:
            raise CustodyError(str(error)) from None
        if signer.verifier.vkey != kept.verifier.vkey:
            raise CustodyError("its private half does not belong to its public half")
        return LocalLogSigner(signer)

    async def destroy(self, uri: str) -> None:
        """Nothing is held here: the store forgets the sealed half with the change of state."""

    async def listed(self) -> Sequence[str]:
        """Nothing is held here."""
        return ()

    def _keks(self) -> KeyEncryptionKeys:
        return _read(self._read_keks)


def _read(read_keks: KekReader) -> KeyEncryptionKeys:
    try:
        return read_keks()
    except EnvelopeError as error:
        raise CustodyError(str(error)) from None


def scheme_of(uri: str) -> str:
    """Return the scheme of a custody's URI, with its colon."""
    return uri.partition(":")[0] + ":"


class CustodyBySchemes:
    """Every custody of an installation: new keys go into one, and each URI finds its own.

    So an installation moves from one custody to another by a rotation.
    """

    def __init__(
        self, new_keys_in: str, custodies: Mapping[str, Custody], read_keks: KekReader
    ) -> None:
        """Schemes come with their colon: `local:`."""
        self._for_new_keys = custodies[new_keys_in]
        self._custodies = dict(custodies)
        self._read_keks = read_keks

    async def new_key(self, bits: int) -> KeptKey:
        """Make a key in the custody that is for new keys, and attest it."""
        # Read first: afterwards there would be a key that nobody attests.
        keks = _read(self._read_keks)
        key = await self._for_new_keys.new_key(bits)
        return replace(key, attestation=key.attestation or attest(key.kid, keks))

    async def open(self, kept: KeptKey) -> Signer:
        """Open a key where it was made."""
        return await self._custody_of(kept.uri).open(kept)

    async def new_log_key(self, origin: str) -> KeptLogKey:
        """Make a log's key in the custody that is for new keys."""
        return await self._for_new_keys.new_log_key(origin)

    async def open_log_key(self, kept: KeptLogKey) -> LogSigner:
        """Open a log's key where it was made."""
        return await self._custody_of(kept.uri).open_log_key(kept)

    async def destroy(self, uri: str) -> None:
        """Destroy a private half where it was made."""
        await self._custody_of(uri).destroy(uri)

    async def listed(self) -> Sequence[str]:
        """Return the URIs of the keys that any of the custodies holds."""
        return [uri for custody in self._custodies.values() for uri in await custody.listed()]

    def _custody_of(self, uri: str) -> Custody:
        if (custody := self._custodies.get(scheme_of(uri))) is None:
            raise CustodyError(
                f"its private half is kept under {scheme_of(uri)}, which this process does not "
                "have: add that to PRIVYSEAL_KEY_CUSTODY until the key has been rotated away"
            )
        return custody


async def proven(kept: KeptKey, signer: Signer) -> Signer:
    """Return `signer`, whose first signature verified under the public half; raise CustodyError."""
    challenge = os.urandom(32)
    try:
        kept.public_key.verify(await signer.sign(challenge), challenge, _PADDING, _HASH)
    except InvalidSignature:
        raise CustodyError(
            f"key {kept.kid}: what is signed with its private half does not verify under its "
            "public half"
        ) from None
    return signer


def reseal(kept: KeptKey, keks: KeyEncryptionKeys) -> KeptKey:
    """Return the key with all that is sealed of it under the first KEK, itself if it is so already;
    raise EnvelopeError, also for one that was not made here."""
    require_attested(kept.kid, kept.public_key, kept.attestation, keks)
    sealed = [each for each in (kept.sealed_private, kept.attestation) if each is not None]
    if all(map(keks.seals, sealed)):
        return kept
    private = kept.sealed_private
    if private is not None:
        der = keks.unseal(private, purpose=_PURPOSE, kid=kept.kid)
        private = keks.seal(der, purpose=_PURPOSE, kid=kept.kid)
    return replace(kept, sealed_private=private, attestation=attest(kept.kid, keks))


def generate(bits: int, keks: KeyEncryptionKeys) -> KeptKey:
    """Make an RSA key of `bits` with e = 65537, seal its private half and attest it. Takes up to
    seconds."""
    private_key = generate_private_key(public_exponent=65537, key_size=bits)
    kid = thumbprint(private_key.public_key())
    der = private_key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    return KeptKey(
        kid=kid,
        uri=LOCAL,
        public_key=private_key.public_key(),
        sealed_private=keks.seal(der, purpose=_PURPOSE, kid=kid),
        attestation=attest(kid, keks),
    )


def unseal(kept: KeptKey, keks: KeyEncryptionKeys) -> RSAPrivateKey:
    """Return the private half of a `local:` key; whether it is sound its first signature shows."""
    if kept.sealed_private is None:
        raise CustodyError(f"key {kept.kid} has no private half in the store")
    try:
        der = keks.unseal(kept.sealed_private, purpose=_PURPOSE, kid=kept.kid)
    except EnvelopeError as error:
        raise CustodyError(str(error)) from None
    # The check of the primes takes a hundred times as long as the signature that shows the same.
    private_key = load_der_private_key(der, password=None, unsafe_skip_rsa_key_validation=True)
    if not isinstance(private_key, RSAPrivateKey) or (
        private_key.public_key().public_numbers() != kept.public_key.public_numbers()
    ):
        raise CustodyError(f"key {kept.kid}: its private half does not belong to its public half")
    return private_key
