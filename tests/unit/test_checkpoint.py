"""A checkpoint is a signed note that others can read, and only the pinned key makes one."""

import hashlib
from base64 import b64decode, b64encode
from collections.abc import Callable

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from keys.checkpoint import (
    MAX_NOTE_BYTES,
    MAX_SIZE,
    Checkpoint,
    NoteRefused,
    NoteSigner,
    NoteVerifier,
)

# Published with the format: the example of C2SP signed-note and the key of Go's sumdb/note.
C2SP_VKEY = "example.com/foo+530d903a+AekyeRrm56hApGFkyQR4ZCbV54Id2LKaANYcrnKv3U2k"
C2SP_NOTE = (
    "This is an example message.\n"
    "\n"
    "— example.com/foo Uw2QOkn8srV1yJGh2VYRlL1Tnagv1YEq6TfXppzi2ONncAlTgK7Ztg1ERYNZXsYj"
    "OBH3mFXmRKuwHjG1Yu72IneyaQM=\n"
).encode()
GO_PRIVATE = b64decode("AYEKFALVFGyNhPJEMzD1QIDr+Y7hfZx09iUvxdXHKDFz")[1:]
GO_VKEY = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"
GO_TEXT = (
    "If you think cryptography is the answer to your problem,\n"
    "then you don't know what your problem is.\n"
)
GO_NOTE = (
    f"{GO_TEXT}\n"
    "— PeterNeumann x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqf"
    "qdngotpRZb6KE6RyyBwJnAM=\n"
).encode()

ORIGIN = "tokens.example.com/audit/1"
SIGNER = NoteSigner(ORIGIN, Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
OTHER = NoteSigner(ORIGIN, Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33))))
WITNESS = NoteSigner("witness.example.com", Ed25519PrivateKey.from_private_bytes(bytes(32)))
HEAD = Checkpoint(origin=ORIGIN, size=81_950, root=hashlib.sha256(b"root").digest())
ROOT = b64encode(HEAD.root).decode()

MANGLED: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda note: b"",
    "no last newline": lambda note: note[:-1],
    "an empty line at the end": lambda note: note + b"\n",
    "a line at the end": lambda note: note + b"trailing\n",
    "no text": lambda note: b"\n" + note.split(b"\n\n")[1],
    "no empty line": lambda note: note.replace(b"\n\n", b"\n"),
    "CRLF": lambda note: note.replace(b"\n", b"\r\n"),
    "a hyphen": lambda note: note.replace("—".encode(), b"-"),
    "another space": lambda note: note.replace("— ".encode(), "—\u00a0".encode()),
    "no dash": lambda note: note.replace("— ".encode(), b""),
    "set bits that mean nothing": lambda note: note[:-3] + bytes([note[-3] + 1]) + b"=\n",
    "no padding": lambda note: note.removesuffix(b"=\n") + b"\n",
    "NUL": lambda note: note.replace(b"81950", b"81950\x00"),
    "not UTF-8": lambda note: note.replace(b"81950", b"81950\xff"),
    "an escape sequence": lambda note: note + "— na\x1bme AAAAAAAAAAAAAAAA\n".encode(),
    "a name with a plus": lambda note: note + "— name+plus aaaaaaaaaaaa\n".encode(),
    "no signature": lambda note: note + "— name aaaa\n".encode(),
    "no name": lambda note: note + "— aaaaaaaaaaaa\n".encode(),
    "too long": lambda note: note + "— other AAAAAAAAAAAAAAAA\n".encode() * MAX_NOTE_BYTES,
}

checkpoints = st.builds(
    Checkpoint,
    origin=st.just(ORIGIN),
    size=st.integers(0, MAX_SIZE),
    root=st.binary(min_size=32, max_size=32),
)


def opened(text: str) -> Checkpoint:
    return Checkpoint.open(SIGNER.sign(text), SIGNER.verifier)


def test_the_example_of_the_specification_verifies() -> None:
    verifier = NoteVerifier.parse(C2SP_VKEY)
    assert verifier.vkey == C2SP_VKEY
    assert verifier.open(C2SP_NOTE) == "This is an example message.\n"


def test_the_note_of_the_reference_implementation_comes_out_byte_for_byte() -> None:
    signer = NoteSigner("PeterNeumann", Ed25519PrivateKey.from_private_bytes(GO_PRIVATE))
    assert signer.verifier.vkey == GO_VKEY
    assert signer.sign(GO_TEXT) == GO_NOTE
    assert NoteVerifier.parse(GO_VKEY).open(GO_NOTE) == GO_TEXT


def test_a_text_may_have_empty_lines_and_the_last_one_ends_it() -> None:
    text = "one\n\n— two three\n\n"
    assert SIGNER.verifier.open(SIGNER.sign(text)) == text


def test_a_checkpoint_is_origin_size_and_root_each_on_a_line() -> None:
    text, signature = HEAD.signed(SIGNER).decode().split("\n\n")
    assert text == f"{ORIGIN}\n81950\n{ROOT}"
    assert signature.startswith(f"— {ORIGIN} ")
    encoded = b64decode(signature.split(" ")[2])
    assert encoded[:4] == SIGNER.verifier.key_id
    assert len(encoded) == 4 + 64


@given(checkpoints)
def test_a_signed_checkpoint_opens_to_itself(checkpoint: Checkpoint) -> None:
    assert Checkpoint.open(checkpoint.signed(SIGNER), SIGNER.verifier) == checkpoint


@settings(max_examples=300)
@given(st.data())
def test_one_flipped_bit_anywhere_is_noticed(data: st.DataObject) -> None:
    note = bytearray(HEAD.signed(SIGNER))
    bit = data.draw(st.integers(0, len(note) * 8 - 1))
    note[bit // 8] ^= 1 << bit % 8
    with pytest.raises(NoteRefused):
        Checkpoint.open(bytes(note), SIGNER.verifier)


def test_the_key_that_is_pinned_decides_and_not_its_name() -> None:
    with pytest.raises(NoteRefused, match="not signed by"):
        Checkpoint.open(HEAD.signed(OTHER), SIGNER.verifier)


def test_a_stolen_key_id_does_not_help() -> None:
    text = f"{ORIGIN}\n81950\n{ROOT}\n"
    signature = b64decode(OTHER.sign(text).decode().rsplit(" ", 1)[1])[4:]
    encoded = b64encode(SIGNER.verifier.key_id + signature).decode()
    forged = f"{text}\n— {ORIGIN} {encoded}\n".encode()
    with pytest.raises(NoteRefused, match="is wrong"):
        Checkpoint.open(forged, SIGNER.verifier)


def test_signatures_of_witnesses_are_ignored_but_a_wrong_one_of_ours_is_not() -> None:
    text = f"{ORIGIN}\n81950\n{ROOT}\n"
    ours, witness, other = (
        one.sign(text).removeprefix(f"{text}\n".encode()) for one in (SIGNER, WITNESS, OTHER)
    )
    cosigned = f"{text}\n".encode() + witness + other + ours
    assert Checkpoint.open(cosigned, SIGNER.verifier) == HEAD
    wrong = SIGNER.sign("another text\n").removeprefix(b"another text\n\n")
    for lines in (ours + wrong, wrong + ours):
        with pytest.raises(NoteRefused, match="is wrong"):
            Checkpoint.open(f"{text}\n".encode() + lines, SIGNER.verifier)
    with pytest.raises(NoteRefused, match="not signed by"):
        Checkpoint.open(f"{text}\n".encode() + witness, SIGNER.verifier)


def test_a_checkpoint_of_another_log_is_refused() -> None:
    with pytest.raises(NoteRefused, match="another log"):
        opened(f"tokens.example.com/audit/2\n1\n{ROOT}\n")
    with pytest.raises(ValueError, match="name of its log"):
        HEAD.signed(WITNESS)


def test_extension_lines_are_let_pass() -> None:
    assert opened(f"{ORIGIN}\n81950\n{ROOT}\nextension one\nextension two\n") == HEAD


@pytest.mark.parametrize(
    "text",
    [
        f"{ORIGIN}\n1\n",
        f"{ORIGIN}\n\n{ROOT}\n",
        f"{ORIGIN}\n1\n{ROOT}\n\nafter an empty line\n",
        f"{ORIGIN}\n1\n{ROOT}\n\n",
        f"\n{ORIGIN}\n1\n{ROOT}\n",
        f"{ORIGIN}\n01\n{ROOT}\n",
        f"{ORIGIN}\n-1\n{ROOT}\n",
        f"{ORIGIN}\n+1\n{ROOT}\n",
        f"{ORIGIN}\n 1\n{ROOT}\n",
        f"{ORIGIN}\n1_0\n{ROOT}\n",
        f"{ORIGIN}\n١\n{ROOT}\n",
        f"{ORIGIN}\n1.0\n{ROOT}\n",
        f"{ORIGIN}\n{MAX_SIZE + 1}\n{ROOT}\n",
        f"{ORIGIN}\n{'9' * 5000}\n{ROOT}\n",
        f"{ORIGIN}\n1\n{ROOT[:-4]}\n",
        f"{ORIGIN}\n1\n{ROOT.rstrip('=')}\n",
        f"{ORIGIN}\n1\n{ROOT} \n",
        f"{ORIGIN}\n1\n{HEAD.root.hex()}\n",
    ],
)
def test_a_signed_text_that_is_no_checkpoint_is_refused(text: str) -> None:
    with pytest.raises(NoteRefused):
        opened(text)


@pytest.mark.parametrize("how", MANGLED)
def test_a_malformed_note_is_refused(how: str) -> None:
    note = HEAD.signed(SIGNER)
    mangled = MANGLED[how](note)
    assert mangled != note
    with pytest.raises(NoteRefused):
        Checkpoint.open(mangled, SIGNER.verifier)


def test_every_part_of_a_verifier_key_and_every_change_to_it_is_refused() -> None:
    for start in range(len(GO_VKEY)):
        for stop in range(start + 1, len(GO_VKEY) + 1):
            if (start, stop) != (0, len(GO_VKEY)):
                with pytest.raises(NoteRefused):
                    NoteVerifier.parse(GO_VKEY[start:stop])
    for at, character in enumerate(GO_VKEY):
        with pytest.raises(NoteRefused):
            NoteVerifier.parse(GO_VKEY[:at] + chr(ord(character) + 1) + GO_VKEY[at + 1 :])


@pytest.mark.parametrize("kind", [b"\x00", b"\x02", b"\x04"])
def test_a_verifier_key_of_another_algorithm_is_refused(kind: bytes) -> None:
    key = kind + Ed25519PrivateKey.from_private_bytes(GO_PRIVATE).public_key().public_bytes_raw()
    key_id = hashlib.sha256(b"PeterNeumann\n" + key).digest()[:4].hex()
    with pytest.raises(NoteRefused, match="Ed25519"):
        NoteVerifier.parse(f"PeterNeumann+{key_id}+{b64encode(key).decode()}")


@pytest.mark.parametrize("name", ["", "a b", "a+b", "a\u00a0b", "a\nb", "a\u2003b"])
def test_a_name_that_a_note_cannot_hold_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="key name"):
        NoteSigner(name, Ed25519PrivateKey.generate())
    with pytest.raises(ValueError, match="key name"):
        Checkpoint(origin=name, size=0, root=HEAD.root)


@pytest.mark.parametrize(("size", "root"), [(-1, HEAD.root), (2**63, HEAD.root), (1, b"short")])
def test_no_checkpoint_is_made_that_could_not_be_read(size: int, root: bytes) -> None:
    with pytest.raises(ValueError, match="a checkpoint has"):
        Checkpoint(origin=ORIGIN, size=size, root=root)


@pytest.mark.parametrize("text", ["", "\n", "no newline", "tab\there\n", "nul\0\n", "cr\r\n"])
def test_no_text_is_signed_that_could_not_be_read(text: str) -> None:
    with pytest.raises(ValueError, match="the text of a note"):
        SIGNER.sign(text)


def test_a_signer_does_not_show_its_key() -> None:
    seed = bytes(range(32))
    shown = f"{SIGNER!r} {SIGNER} {vars(SIGNER)}"
    assert seed.hex() not in shown
    assert b64encode(seed).decode() not in shown
    assert str(seed) not in shown
