"""A private key comes back from the store as the one that belongs to its public half."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from keys.envelope import EnvelopeError, KeyEncryptionKeys, new_kek_line
from keys.signer import LOCAL, NewKey, generate, open_private_key, signer_for
from keys.verifier import thumbprint


@pytest.fixture(scope="module")
def keks() -> KeyEncryptionKeys:
    return KeyEncryptionKeys.parse(new_kek_line())


@pytest.fixture(scope="module")
def new_key(keks: KeyEncryptionKeys) -> NewKey:
    return generate(2048, keks)


def test_a_new_key_has_the_thumbprint_as_kid_and_the_exponent_that_all_accept(
    new_key: NewKey,
) -> None:
    assert new_key.kid == thumbprint(new_key.public_key)
    assert new_key.public_key.public_numbers().e == 65_537
    assert new_key.public_key.key_size == 2048
    assert new_key.signer == LOCAL


@pytest.mark.anyio
async def test_a_signature_verifies_under_the_public_half(
    new_key: NewKey, keks: KeyEncryptionKeys
) -> None:
    with ThreadPoolExecutor(1) as executor:
        signer = signer_for(
            new_key.signer,
            kid=new_key.kid,
            sealed_private=new_key.sealed_private,
            public_key=new_key.public_key,
            keks=keks,
            executor=executor,
        )
        signature = await signer.sign(b"signing input")
    new_key.public_key.verify(signature, b"signing input", PKCS1v15(), SHA256())


def test_a_private_half_of_another_key_is_refused(
    new_key: NewKey, keks: KeyEncryptionKeys, rsa_keys: list[RSAPrivateKey]
) -> None:
    with pytest.raises(EnvelopeError, match="does not belong to its public half"):
        open_private_key(LOCAL, new_key.kid, new_key.sealed_private, rsa_keys[0].public_key(), keks)


def test_a_private_half_that_is_no_rsa_key_is_refused(
    new_key: NewKey, keks: KeyEncryptionKeys
) -> None:
    der = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        Encoding.DER, PrivateFormat.PKCS8, NoEncryption()
    )
    sealed = keks.seal(der, purpose="signing-key", kid=new_key.kid)
    with pytest.raises(EnvelopeError, match="does not belong to its public half"):
        open_private_key(LOCAL, new_key.kid, sealed, new_key.public_key, keks)


def test_another_kek_opens_nothing(new_key: NewKey) -> None:
    with pytest.raises(EnvelopeError, match=new_key.kid):
        open_private_key(
            LOCAL,
            new_key.kid,
            new_key.sealed_private,
            new_key.public_key,
            KeyEncryptionKeys.parse(new_kek_line()),
        )


def test_a_signer_that_this_release_does_not_know_is_named(
    new_key: NewKey, keks: KeyEncryptionKeys
) -> None:
    with pytest.raises(EnvelopeError, match="has the signer vault:transit, which this release"):
        open_private_key(
            "vault:transit", new_key.kid, new_key.sealed_private, new_key.public_key, keks
        )
