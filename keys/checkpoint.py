"""Checkpoints of a log (C2SP tlog-checkpoint) as signed notes (C2SP signed-note) with Ed25519.

Knows nothing of what the log holds, and fetches no key: a verifier key is pinned by its reader.
"""

import hashlib
import re
from base64 import b64decode, b64encode
from typing import Final, Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from msgspec import Struct

# Room for the sixteen signatures that a reader must accept, even of five kilobytes each.
MAX_NOTE_BYTES: Final = 128 * 1024
MAX_SIZE: Final = 2**63 - 1
_HASH_BYTES = 32
_ED25519 = b"\x01"
_DASH = "\N{EM DASH} "
_SIZE = re.compile(r"0|[1-9][0-9]{0,18}")
_KEY_ID = re.compile(r"[0-9a-f]{8}")
_FORBIDDEN = re.compile(r"[\x00-\x09\x0b-\x1f]")


class NoteRefused(Exception):
    """The note is malformed, or is not signed by the key that it must be signed by."""


class NoteVerifier:
    """The public key of a log and its name."""

    def __init__(self, name: str, public_key: Ed25519PublicKey) -> None:
        if not _is_key_name(name):
            raise ValueError("a key name is not empty and has neither spaces nor plus signs")
        encoded = _ED25519 + public_key.public_bytes_raw()
        self.public_key: Final = public_key
        self.name: Final = name
        # C2SP signed-note: SHA-256(name ‖ 0x0A ‖ type ‖ public key), the first four bytes.
        self.key_id: Final = hashlib.sha256(name.encode() + b"\n" + encoded).digest()[:4]
        self.vkey: Final = f"{name}+{self.key_id.hex()}+{_base64(encoded)}"
        """The key as its readers write it down: `name+key id+base64 of type and public key`."""

    @classmethod
    def parse(cls, vkey: str) -> Self:
        """Return the verifier of a verifier key; raise NoteRefused."""
        name, _, rest = vkey.partition("+")
        key_id, _, encoded = rest.partition("+")
        key = _unbase64(encoded)
        if not _is_key_name(name) or not _KEY_ID.fullmatch(key_id):
            raise NoteRefused("a verifier key is name, plus, eight hex digits, plus, base64")
        if key[:1] != _ED25519 or len(key) != 1 + _HASH_BYTES:
            raise NoteRefused("the verifier key is not one of Ed25519")
        verifier = cls(name, Ed25519PublicKey.from_public_bytes(key[1:]))
        if verifier.key_id.hex() != key_id:
            raise NoteRefused("the key id of the verifier key is not that of its key")
        return verifier

    def open(self, note: bytes) -> str:
        """Return the text of a note that this key signed; raise NoteRefused.

        Signatures of other keys, such as witnesses, are ignored.
        """
        text, unverified_signatures = _split(note)
        ours = [
            signature[4:]
            for name, signature in unverified_signatures
            if (name, signature[:4]) == (self.name, self.key_id)
        ]
        if not ours:
            raise NoteRefused(f"the note is not signed by {self.name}+{self.key_id.hex()}")
        try:
            for signature in ours:
                self.public_key.verify(signature, text.encode())
        except InvalidSignature:
            raise NoteRefused(f"the signature of {self.name} is wrong") from None
        return text

    def note(self, text: str, signature: bytes) -> bytes:
        """Return the note of `text` with this key's signature, which is not verified here."""
        encoded = _base64(self.key_id + signature)
        return f"{text}\n{_DASH}{self.name} {encoded}\n".encode()


class NoteSigner:
    """The private key of a log, in the memory of this process."""

    def __init__(self, name: str, private_key: Ed25519PrivateKey) -> None:
        self._private_key = private_key
        self.verifier: Final = NoteVerifier(name, private_key.public_key())

    def sign(self, text: str) -> bytes:
        """Return the signed note of `text`; raise ValueError if a note cannot hold it."""
        if len(text) < 2 or not text.endswith("\n") or _FORBIDDEN.search(text):
            raise ValueError("the text of a note ends in a newline and has no control characters")
        return self.verifier.note(text, self._private_key.sign(text.encode()))


class Checkpoint(Struct, frozen=True, kw_only=True):
    """A tree head: the log `origin` had `size` leaves under `root` (RFC 6962, 32 bytes)."""

    origin: str
    size: int
    root: bytes

    def __post_init__(self) -> None:
        if not _is_key_name(self.origin) or _FORBIDDEN.search(self.origin):
            raise ValueError("an origin is a key name")
        if not 0 <= self.size <= MAX_SIZE or len(self.root) != _HASH_BYTES:
            raise ValueError("a checkpoint has a size and a root of 32 bytes")

    @property
    def text(self) -> str:
        """What is signed."""
        return f"{self.origin}\n{self.size}\n{_base64(self.root)}\n"

    def signed(self, signer: NoteSigner) -> bytes:
        """Return the checkpoint as a note; raise ValueError if the key is another log's."""
        if signer.verifier.name != self.origin:
            raise ValueError("a checkpoint is signed under the name of its log")
        return signer.sign(self.text)

    @classmethod
    def open(cls, note: bytes, verifier: NoteVerifier) -> Self:
        """Return the checkpoint that `verifier`'s log signed; raise NoteRefused.

        Extension lines are signed but opaque, and left out.
        """
        lines = verifier.open(note).removesuffix("\n").split("\n")
        if len(lines) < 3 or not all(lines):
            raise NoteRefused("a checkpoint is at least three lines, none of them empty")
        origin, size, root = lines[:3]
        if origin != verifier.name:
            raise NoteRefused(f"the checkpoint is of another log: {origin!r}")
        if not _SIZE.fullmatch(size) or int(size) > MAX_SIZE:
            raise NoteRefused("the tree size is not a decimal number")
        decoded = _unbase64(root)
        if len(decoded) != _HASH_BYTES:
            raise NoteRefused("the root hash has not 32 bytes")
        return cls(origin=origin, size=int(size), root=decoded)


def _split(note: bytes) -> tuple[str, list[tuple[str, bytes]]]:
    """Return the text of a note, and of each signature line the name and what it decodes to."""
    if len(note) > MAX_NOTE_BYTES:
        raise NoteRefused(f"the note is longer than {MAX_NOTE_BYTES} bytes")
    try:
        decoded = note.decode()
    except UnicodeDecodeError:
        raise NoteRefused("the note is not UTF-8") from None
    if _FORBIDDEN.search(decoded):
        raise NoteRefused("the note has control characters")
    # The text may have empty lines itself: the last one ends it.
    text, blank, signatures = decoded.rpartition("\n\n")
    if not blank or not text or not signatures.endswith("\n"):
        raise NoteRefused("a note is text, an empty line and lines of signatures")
    return text + "\n", [_signature(line) for line in signatures.removesuffix("\n").split("\n")]


def _signature(line: str) -> tuple[str, bytes]:
    name, _, encoded = line.removeprefix(_DASH).partition(" ")
    signature = _unbase64(encoded)
    if not line.startswith(_DASH) or not _is_key_name(name) or len(signature) <= 4:
        raise NoteRefused("a signature line is an em dash, a key name and base64")
    return name, signature


def _is_key_name(name: str) -> bool:
    return bool(name) and not any(character.isspace() or character == "+" for character in name)


def _base64(data: bytes) -> str:
    # RFC 4648 §4, with padding.
    return b64encode(data).decode("ascii")


def _unbase64(text: str) -> bytes:
    try:
        data = b64decode(text, validate=True)
    except ValueError:
        raise NoteRefused("that is not base64") from None
    # The decoder lets the unused bits of the last character be anything.
    if _base64(data) != text:
        raise NoteRefused("that is not canonical base64")
    return data
