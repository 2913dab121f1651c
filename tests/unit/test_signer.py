"""A private key comes back from the store as the one that belongs to its public half."""

from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, RSAPrivateNumbers
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from keys.envelope import EnvelopeError, KeyEncryptionKeys, new_kek_line
from keys.signer import (
    LOCAL,
    CustodyBySchemes,
    CustodyError,
    KeptKey,
    LocalCustody,
    generate,
    unseal,
)
from keys.verifier import thumbprint


@pytest.fixture(scope="module")
def keks() -> KeyEncryptionKeys:
    return KeyEncryptionKeys.parse(new_kek_line())


@pytest.fixture(scope="module")
def new_key(keks: KeyEncryptionKeys) -> KeptKey:
    return generate(2048, keks)


def test_a_new_key_has_the_thumbprint_as_kid_and_the_exponent_that_all_accept(
    new_key: KeptKey,
) -> None:
    assert new_key.kid == thumbprint(new_key.public_key)
    assert new_key.public_key.public_numbers().e == 65_537
    assert new_key.public_key.key_size == 2048
    assert new_key.uri == LOCAL


@pytest.mark.anyio
@pytest.mark.parametrize("bits", [2048, 3072])
async def test_a_signature_verifies_under_the_public_half(
    bits: int, keks: KeyEncryptionKeys
) -> None:
    with ThreadPoolExecutor(1) as executor:
        custody = LocalCustody(lambda: keks, executor)
        made = await custody.new_key(bits)
        signature = await (await custody.open(made)).sign(b"signing input")
    assert len(signature) == bits / 8
    made.public_key.verify(signature, b"signing input", PKCS1v15(), SHA256())


def test_a_private_half_of_another_key_is_refused(
    new_key: KeptKey, keks: KeyEncryptionKeys, rsa_keys: list[RSAPrivateKey]
) -> None:
    other = msgspec.structs.replace(new_key, public_key=rsa_keys[0].public_key())
    with pytest.raises(CustodyError, match="does not belong to its public half"):
        unseal(other, keks)


def test_a_private_half_that_is_no_rsa_key_is_refused(
    new_key: KeptKey, keks: KeyEncryptionKeys
) -> None:
    der = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        Encoding.DER, PrivateFormat.PKCS8, NoEncryption()
    )
    sealed = keks.seal(der, purpose="signing-key", kid=new_key.kid)
    with pytest.raises(CustodyError, match="does not belong to its public half"):
        unseal(msgspec.structs.replace(new_key, sealed_private=sealed), keks)


@pytest.mark.anyio
async def test_a_damaged_private_half_is_found_before_it_signs_for_anybody(
    new_key: KeptKey, keks: KeyEncryptionKeys
) -> None:
    private = unseal(new_key, keks).private_numbers()
    wrong = RSAPrivateNumbers(
        p=private.p,
        q=private.q,
        d=private.d ^ 2,
        dmp1=private.dmp1 ^ 2,
        dmq1=private.dmq1,
        iqmp=private.iqmp,
        public_numbers=private.public_numbers,
    ).private_key(unsafe_skip_rsa_key_validation=True)
    der = wrong.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    sealed = keks.seal(der, purpose="signing-key", kid=new_key.kid)
    with ThreadPoolExecutor(1) as executor:
        custody = LocalCustody(lambda: keks, executor)
        with pytest.raises(CustodyError, match="does not verify under its public half"):
            await custody.open(msgspec.structs.replace(new_key, sealed_private=sealed))


def test_another_kek_opens_nothing(new_key: KeptKey) -> None:
    with pytest.raises(CustodyError, match=new_key.kid):
        unseal(new_key, KeyEncryptionKeys.parse(new_kek_line()))


def test_a_key_without_its_private_half_signs_nothing(
    new_key: KeptKey, keks: KeyEncryptionKeys
) -> None:
    with pytest.raises(CustodyError, match="no private half"):
        unseal(msgspec.structs.replace(new_key, sealed_private=None), keks)


@pytest.mark.anyio
async def test_a_custody_that_this_process_does_not_have_is_named(
    new_key: KeptKey, keks: KeyEncryptionKeys
) -> None:
    with ThreadPoolExecutor(1) as executor:
        custody = CustodyBySchemes(
            LOCAL, {LOCAL: LocalCustody(lambda: keks, executor)}, lambda: keks
        )
        assert await custody.open(new_key)
        elsewhere = msgspec.structs.replace(new_key, uri="pkcs11:token=hsm;id=%01")
        with pytest.raises(CustodyError, match="kept under pkcs11:, which this process"):
            await custody.open(elsewhere)


@pytest.mark.anyio
async def test_keks_that_cannot_be_read_are_a_custody_error_in_the_same_words() -> None:
    def unreadable() -> KeyEncryptionKeys:
        raise EnvelopeError("the file is gone")

    with ThreadPoolExecutor(1) as executor, pytest.raises(CustodyError, match="file is gone"):
        await LocalCustody(unreadable, executor).new_key(2048)
