"""A sealed private key opens under its own KEK, for its own kid and purpose, or not at all."""

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keys.envelope import EnvelopeError, KeyEncryptionKey, KeyEncryptionKeys, new_kek_line

PLAINTEXT = b"canary-70e1 private key"
KID = "k" * 43


@pytest.fixture
def keks() -> KeyEncryptionKeys:
    return KeyEncryptionKeys.parse(new_kek_line())


def test_what_was_sealed_opens_again(keks: KeyEncryptionKeys) -> None:
    sealed = keks.seal(PLAINTEXT, purpose="signing-key", kid=KID)
    assert PLAINTEXT not in sealed
    assert keks.unseal(sealed, purpose="signing-key", kid=KID) == PLAINTEXT


def test_sealing_twice_gives_different_bytes(keks: KeyEncryptionKeys) -> None:
    once, twice = (keks.seal(PLAINTEXT, purpose="signing-key", kid=KID) for _ in range(2))
    assert once != twice


def test_one_flipped_bit_anywhere_is_refused(keks: KeyEncryptionKeys) -> None:
    sealed = keks.seal(PLAINTEXT, purpose="signing-key", kid=KID)
    for position in range(len(sealed) * 8):
        changed = bytearray(sealed)
        changed[position // 8] ^= 1 << position % 8
        with pytest.raises(EnvelopeError, match=KID):
            keks.unseal(bytes(changed), purpose="signing-key", kid=KID)


def test_what_was_cut_or_lengthened_is_refused(keks: KeyEncryptionKeys) -> None:
    sealed = keks.seal(PLAINTEXT, purpose="signing-key", kid=KID)
    for changed in (*(sealed[:length] for length in range(len(sealed))), sealed + b"\0"):
        with pytest.raises(EnvelopeError):
            keks.unseal(changed, purpose="signing-key", kid=KID)


def test_ciphertexts_swapped_between_two_kids_are_refused(keks: KeyEncryptionKeys) -> None:
    kids = ("a" * 43, "b" * 43)
    first, second = (keks.seal(PLAINTEXT, purpose="signing-key", kid=kid) for kid in kids)
    for sealed, kid in ((second, kids[0]), (first, kids[1])):
        with pytest.raises(EnvelopeError, match=kid):
            keks.unseal(sealed, purpose="signing-key", kid=kid)


def test_a_ciphertext_for_another_purpose_is_refused(keks: KeyEncryptionKeys) -> None:
    sealed = keks.seal(PLAINTEXT, purpose="signing-key", kid=KID)
    with pytest.raises(EnvelopeError):
        keks.unseal(sealed, purpose="checkpoint-key", kid=KID)


def test_purpose_and_kid_cannot_be_shifted_into_each_other(keks: KeyEncryptionKeys) -> None:
    sealed = keks.seal(PLAINTEXT, purpose="ab", kid="c")
    with pytest.raises(EnvelopeError):
        keks.unseal(sealed, purpose="a", kid="bc")


def test_a_missing_kek_is_named_by_its_fingerprint_and_so_are_those_at_hand() -> None:
    old, new = (KeyEncryptionKey(bytes([number]) * 32) for number in range(2))
    sealed = old.seal(PLAINTEXT, purpose="signing-key", kid=KID)
    with pytest.raises(EnvelopeError) as refusal:
        KeyEncryptionKeys([new]).unseal(sealed, purpose="signing-key", kid=KID)
    said = str(refusal.value)
    assert KID in said
    assert f"under the key-encryption key {old.fingerprint.hex()}" in said
    assert f"it holds {new.fingerprint.hex()}" in said


def test_the_first_kek_seals_and_each_of_them_opens() -> None:
    old_line, new_line = new_kek_line(), new_kek_line()
    before = KeyEncryptionKeys.parse(old_line)
    after = KeyEncryptionKeys.parse(f"# newest first\n{new_line} # 2026\r\n\n  {old_line}\n")
    sealed_before = before.seal(PLAINTEXT, purpose="signing-key", kid=KID)
    sealed_after = after.seal(PLAINTEXT, purpose="signing-key", kid=KID)
    assert after.unseal(sealed_before, purpose="signing-key", kid=KID) == PLAINTEXT
    only_new = KeyEncryptionKeys.parse(new_line)
    assert only_new.unseal(sealed_after, purpose="signing-key", kid=KID) == PLAINTEXT
    with pytest.raises(EnvelopeError):
        before.unseal(sealed_after, purpose="signing-key", kid=KID)


@pytest.mark.parametrize(
    "line",
    [
        "canary-0b5d",
        "canary0b5d" + "A" * 34,
        "canary0b5d" + "A" * 33 + "=",
        "canary0b5d" + "A" * 32 + "+",
        "\ufeff" + "A" * 43,
        "A" * 42 + "é",
        "A" * 20 + " " + "A" * 23,
    ],
)
def test_a_line_that_is_no_kek_is_named_by_its_number_and_never_shown(line: str) -> None:
    with pytest.raises(EnvelopeError, match="line 3 is no key-encryption key") as refusal:
        KeyEncryptionKeys.parse(f"# KEKs\n{new_kek_line()}\n{line}\n")
    assert line not in str(refusal.value)
    assert "canary" not in str(refusal.value)


@given(text=st.text(max_size=200))
def test_no_text_but_keks_is_read_as_keks(text: str) -> None:
    with pytest.raises(EnvelopeError):
        KeyEncryptionKeys.parse(text.replace("\n", " "))


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment\n"])
def test_a_file_without_any_kek_is_refused(text: str) -> None:
    with pytest.raises(EnvelopeError, match="at least one"):
        KeyEncryptionKeys.parse(text)


@pytest.mark.parametrize("length", [0, 16, 31, 33])
def test_a_kek_has_256_bits(length: int) -> None:
    with pytest.raises(EnvelopeError, match="32 bytes"):
        KeyEncryptionKey(bytes(length))


def test_no_kek_shows_itself() -> None:
    line = new_kek_line()
    key = KeyEncryptionKey(base64.urlsafe_b64decode(line + "="))
    assert repr(key) == f"KeyEncryptionKey({key.fingerprint.hex()})"
    assert line not in repr(KeyEncryptionKeys.parse(line))
    assert key.fingerprint not in base64.urlsafe_b64decode(line + "=")
