"""Custody of signing keys, and of the audit log's key, in an HSM, which a PKCS #11 URI (RFC 7512)
names.

Never sees a private half: the token makes it, keeps it and signs with it.

The module is loaded by python-pkcs11 without locking, so one thread at a time may be inside it, and
a call of it cannot be interrupted. So each custody has one thread, which owns its session; new keys
are made by `python -m keys.pkcs11` in a process of their own, because looking for prime numbers
takes seconds, for which signing would stand still.
"""

import asyncio
import base64
import hashlib
import os
import re
import sys
import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final, Protocol, TypeVar
from urllib.parse import quote, unquote_to_bytes, urlsplit

import pkcs11
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey, RSAPublicNumbers
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_der_public_key,
)
from msgspec import Struct
from pkcs11 import Attribute, KeyType, Mechanism, MechanismFlag, ObjectClass, PKCS11Error

from keys.checkpoint import Checkpoint, NoteRefused
from keys.log_key import KeptLogKey, LogSigner
from keys.one_thread import OneThread, StillHanging
from keys.secret import Secret
from keys.signer import CustodyError, KeptKey, Signer, proven
from keys.verifier import thumbprint

PKCS11 = "pkcs11:"
LABEL = "privyseal"
"""CKA_LABEL of every key made here."""

_E = 65_537
_ID_BYTES = 16
_LOG_ID_BYTES = 16
"""As many more has the CKA_ID of a log's key: the digest of that log's name."""
_DEADLINE = 10.0  # seconds, as the next one
_MAKING_DEADLINE = 120.0
# DER of DigestInfo for SHA-256 up to the digest itself (RFC 8017 §9.2, note 1).
_DIGEST_INFO = bytes.fromhex("3031300d060960864801650304020105000420")
# DER of the object identifier id-Ed25519 (RFC 8410 §3).
_ED25519 = bytes.fromhex("06032b6570")
_ED25519_BYTES = 32

_AS_MADE: Mapping[Attribute, bool] = {
    Attribute.TOKEN: True,
    Attribute.PRIVATE: True,
    Attribute.SENSITIVE: True,
    Attribute.EXTRACTABLE: False,
    Attribute.SIGN: True,
    Attribute.DECRYPT: False,
    Attribute.UNWRAP: False,
}
"""What a private half is made with, and without which none is used."""
_AS_KEPT: Mapping[Attribute, bool] = {
    **_AS_MADE,
    Attribute.ALWAYS_SENSITIVE: True,
    Attribute.NEVER_EXTRACTABLE: True,
}

# RFC 7512 §2.3: what a value may hold beside percent-encoded bytes.
_PATH_VALUE = re.compile(r"(?:[A-Za-z0-9\-._~:\[\]@!$'()*+,=&]|%[0-9A-Fa-f]{2})*")
_QUERY_VALUE = re.compile(r"(?:[A-Za-z0-9\-._~:\[\]@!$'()*+,=/?|]|%[0-9A-Fa-f]{2})*")
_PATH_UNESCAPED = ":[]@!$'()*+,=&"
_EXAMPLE = "pkcs11:token=privyseal?module-path=/path/of/the/module.so&pin-source=/path/of/the/pin"

_T = TypeVar("_T")


class TokenAddress(Struct, frozen=True, kw_only=True):
    """A token, the module that reaches it, and the file with its PIN."""

    module_path: Path
    pin_source: Path
    token: str | None = None
    serial: str | None = None
    manufacturer: str | None = None
    model: str | None = None
    slot_id: int | None = None

    @classmethod
    def parse(cls, uri: str) -> "TokenAddress":
        """Read a PKCS #11 URI (RFC 7512 §2.3); raise CustodyError in words.

        Attributes of vendors (`x-…`) are skipped; whatever else is not understood is refused.
        """
        path, query = _components(uri)
        if "pin-value" in query:
            raise CustodyError(
                "pin-value would put the PIN in the clear into the environment: write it into a "
                "file and name that by pin-source"
            )
        path = _understood(path, {"token", "serial", "manufacturer", "model", "slot-id"})
        query = _understood(query, {"module-path", "pin-source"})
        named = {name: _text(name, value) for name, value in path.items()}
        if not named:
            raise CustodyError(f"the PKCS #11 URI names no token: write {_EXAMPLE}")
        if (slot_id := named.pop("slot-id", None)) is not None and not re.fullmatch(
            r"[0-9]{1,20}", slot_id
        ):
            raise CustodyError("slot-id in the PKCS #11 URI must be a decimal number")
        return cls(
            **named,
            slot_id=None if slot_id is None else int(slot_id),
            module_path=_absolute_path("module-path", query),
            pin_source=_absolute_path("pin-source", query),
        )

    def matches(self, token: pkcs11.Token) -> bool:
        """Whether the token is the one that is meant."""
        return all(
            wanted is None or wanted == found
            for wanted, found in (
                (self.token, token.label),
                (self.serial, token.serial.decode("utf-8", "replace").rstrip()),
                (self.manufacturer, token.manufacturer_id),
                (self.model, token.model),
                (self.slot_id, token.slot.slot_id),
            )
        )


class KeyAddress(Struct, frozen=True, kw_only=True):
    """Where one key is: what the store keeps of it.

    The label of its token and no serial number, so that a restored or cloned token serves on; and
    neither module nor PIN, which each process knows for itself.
    """

    token: str
    id: bytes

    @classmethod
    def parse(cls, uri: str) -> "KeyAddress":
        """Read what `str()` wrote; raise CustodyError for anything else."""
        path, query = _components(uri)
        lengths = (_ID_BYTES, _ID_BYTES + _LOG_ID_BYTES)
        if path.keys() != {"token", "id"} or query or len(path["id"]) not in lengths:
            raise CustodyError(f"{uri} does not name a key that was made here")
        return cls(token=_text("token", path["token"]), id=path["id"])

    def __str__(self) -> str:
        token = quote(self.token, safe=_PATH_UNESCAPED)
        return f"{PKCS11}token={token};id=" + "".join(f"%{byte:02x}" for byte in self.id)


class Pkcs11Custody:
    """`pkcs11:`: private halves are made in a token, never leave it, and sign there.

    Lost sessions heal: what fails in a session that has worked before is tried once more in a new
    one. A token that does not answer makes every later call fail at once, until it answers.

    A refused PIN is never repeated, since tokens lock after a few: it is tried again once its file
    was written or touched. And the last try is left to people: while the token says that one more
    wrong PIN locks it, nobody logs in from here.
    """

    def __init__(self, uri: str, *, deadline: float = _DEADLINE) -> None:
        """Take the URI of a token; touch nothing yet. Raise CustodyError if it cannot be read.

        `deadline` is how long a call of the module may take, in seconds.
        """
        self._uri = uri
        self._token = _Token(TokenAddress.parse(uri))
        self._thread = _ModuleThread("pkcs11", deadline)

    async def new_key(self, bits: int) -> KeptKey:
        """Make a pair in the token, with e = 65537; takes up to two minutes."""
        # The other process must not try a PIN that is known here to be wrong.
        label = await self._thread.run(self._token.label)
        key_id, public_key = await self._made_elsewhere(bits)
        return KeptKey(
            kid=thumbprint(public_key),
            uri=str(KeyAddress(token=label, id=key_id)),
            public_key=public_key,
        )

    async def open(self, kept: KeptKey) -> Signer:
        """Return a signer whose first signature verified under the public half."""
        address = KeyAddress.parse(kept.uri)
        return await proven(kept, Pkcs11Signer(self._token, self._thread, address, kept))

    async def new_log_key(self, origin: str) -> KeptLogKey:
        """Make a pair in the token; its CKA_ID says for which log."""
        label, key_id, public_key = await self._thread.run(lambda: self._token.make_log_key(origin))
        kept = KeptLogKey(
            origin=origin, uri=str(KeyAddress(token=label, id=key_id)), public_key=public_key
        )
        try:
            await self.open_log_key(kept)
        except CustodyError:
            await self.destroy(kept.uri)
            raise
        return kept

    async def open_log_key(self, kept: KeptLogKey) -> LogSigner:
        """Return a signer whose first signature verified under the public half."""
        address = KeyAddress.parse(kept.uri)
        if address.id[_ID_BYTES:] != _log_id(kept.origin):
            raise CustodyError(f"{address} was not made for this log")
        signer = Pkcs11LogSigner(self._token, self._thread, address, kept)
        await signer.sign(os.urandom(32))
        return signer

    async def destroy(self, uri: str) -> None:
        """Destroy both halves and every copy; return once the token has none left."""
        address = KeyAddress.parse(uri)
        await self._thread.run(lambda: self._token.destroy(address))

    async def listed(self) -> list[str]:
        """Return the URIs of the private keys in the token that were made here."""
        addresses = await self._thread.run(self._token.listed)
        return sorted(str(address) for address in addresses)

    async def _made_elsewhere(self, bits: int) -> tuple[bytes, RSAPublicKey]:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", __name__, self._uri, str(bits)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(_MAKING_DEADLINE):
                answer, complaint = await process.communicate()
        except TimeoutError:
            raise CustodyError(
                f"the token did not make a key within {_MAKING_DEADLINE:.0f} s"
            ) from None
        finally:
            if process.returncode is None:
                process.kill()
        if process.returncode != 0:
            reason = complaint.decode("utf-8", "replace").strip().rpartition("\n")[2]
            raise CustodyError(
                f"no key of {bits} bits was made: {reason or f'it ended with {process.returncode}'}"
            )
        key_id, _, der = answer.decode("ascii").partition(" ")
        public_key = load_der_public_key(base64.b64decode(der))
        assert isinstance(public_key, RSAPublicKey)
        return bytes.fromhex(key_id), public_key


class Pkcs11Signer:
    """A private key in a token."""

    def __init__(
        self, token: "_Token", thread: "_ModuleThread", address: KeyAddress, kept: KeptKey
    ) -> None:
        self._token = token
        self._thread = thread
        self._address = address
        self._kept = kept

    async def sign(self, data: bytes) -> bytes:
        """Sign in the token."""
        return await self._thread.run(lambda: self._token.sign(self._address, self._kept, data))


class Pkcs11LogSigner:
    """A log's private key in a token."""

    def __init__(
        self, token: "_Token", thread: "_ModuleThread", address: KeyAddress, kept: KeptLogKey
    ) -> None:
        self._token = token
        self._thread = thread
        self._address = address
        self.verifier: Final = kept.verifier

    async def signed(self, checkpoint: Checkpoint) -> bytes:
        """Sign in the token."""
        note = self.verifier.note(checkpoint.text, await self.sign(checkpoint.text.encode()))
        try:
            Checkpoint.open(note, self.verifier)
        except NoteRefused as refused:
            raise CustodyError(f"it signs no checkpoint of another log: {refused}") from None
        return note

    async def sign(self, data: bytes) -> bytes:
        """Return the Ed25519 signature of `data` once it has verified.

        A checkpoint with another one would be kept for ever, and stop everything.
        """
        signature = await self._thread.run(lambda: self._token.sign_for_log(self._address, data))
        try:
            self.verifier.public_key.verify(signature, data)
        except InvalidSignature:
            raise CustodyError(
                "what its token signs does not verify under its public half"
            ) from None
        return signature


class _ModuleThread(OneThread):
    """The one thread of a custody: calls of the module queue here, not behind one that hangs."""

    async def run(self, call: Callable[[], _T]) -> _T:
        """Return what the call returns; raise CustodyError at the deadline."""
        try:
            return await super().run(call)
        except StillHanging as hanging:
            raise CustodyError(
                f"the token has not answered for {hanging.seconds:.0f} s: look after it, and "
                "restart this process if that does not help"
            ) from None
        except TimeoutError:
            raise CustodyError(f"the token did not answer within {self._deadline:g} s") from None


class _Process:
    """What is one for the whole process, whatever the number of custodies: the loaded module."""

    inside_the_module = threading.Lock()
    restarts = 0
    """After each, a handle from before may be that of another object."""


class _Token:
    """A token and a session with it. Blocks; for one thread alone; raises CustodyError."""

    def __init__(self, address: TokenAddress) -> None:
        self._address = address
        self._session: pkcs11.Session | None = None
        self._private_keys: dict[KeyAddress, pkcs11.SignMixin] = {}
        self._hashes = True
        self._refused_pin: tuple[int, int] | None = None
        self._restarts = 0

    def label(self) -> str:
        """Log in, and return the token's label."""
        return self._healing(lambda session: session.token.label)

    def make(self, bits: int) -> tuple[bytes, RSAPublicKey]:
        """Make a pair; return its CKA_ID and its public half."""
        return self._healing(lambda session: _made(session, bits))

    def sign(self, address: KeyAddress, kept: KeptKey, data: bytes) -> bytes:
        """Return the signature of `data` by the private half of `kept`."""
        return self._healing(
            lambda session: self._signed(session, address, kept, data),
            searches=address not in self._private_keys,
        )

    def make_log_key(self, origin: str) -> tuple[str, bytes, Ed25519PublicKey]:
        """Make a log's pair; return the token's label, its CKA_ID and its public half."""
        return self._healing(lambda session: _made_log_key(session, origin))

    def sign_for_log(self, address: KeyAddress, data: bytes) -> bytes:
        """Return the Ed25519 signature of `data`."""
        return self._healing(
            lambda session: self._signed_for_log(session, address, data),
            searches=address not in self._private_keys,
        )

    def destroy(self, address: KeyAddress) -> None:
        """Destroy all that has the CKA_ID of `address`."""
        self._healing(lambda session: self._destroyed(session, address))

    def listed(self) -> list[KeyAddress]:
        """Return the addresses of the private keys with our label."""
        return self._healing(_listed)

    def _healing(self, work: Callable[[pkcs11.Session], _T], *, searches: bool = True) -> _T:
        with _Process.inside_the_module:
            if self._restarts != _Process.restarts:
                self._forget()
            if self._session is not None:
                try:
                    if searches:
                        _prove_logged_in(self._session)
                    return work(self._session)
                except pkcs11.UserNotLoggedIn:
                    self._forget()
                    self._restart()
                except PKCS11Error:
                    # It may be lost, and modules disagree on how they say so. It is not closed:
                    # python-pkcs11 would log out every session of this process with it.
                    self._forget()
            try:
                self._session = self._opened()
                return work(self._session)
            except PKCS11Error as error:
                self._forget()
                self._restart()
                raise CustodyError(f"the token failed with {_named(error)}") from None

    def _forget(self) -> None:
        self._session = None
        self._private_keys.clear()

    def _restart(self) -> None:
        # Closes every session; and some modules come back from a lost HSM only by C_Finalize and
        # C_Initialize, which `_loaded` calls.
        _Process.restarts += 1
        with suppress(PKCS11Error):
            _loaded(self._address.module_path).finalize()

    def _opened(self) -> pkcs11.Session:
        self._restarts = _Process.restarts
        token = self._found()
        self._hashes = Mechanism.SHA256_RSA_PKCS in token.slot.get_mechanisms()
        return self._logged_in(token)

    def _found(self) -> pkcs11.Token:
        tokens = list(_tokens(_loaded(self._address.module_path)))
        match [token for token in tokens if self._address.matches(token)]:
            case [token]:
                return token
            case []:
                self._restart()  # some modules look for tokens only when they are initialized
                known = ", ".join(repr(token.label) for token in tokens) or "none"
                raise CustodyError(
                    "no token is the one that PRIVYSEAL_KEY_CUSTODY names (the module knows: "
                    f"{known}): is it plugged in, reachable and initialized?"
                )
            case _:
                raise CustodyError(
                    "several tokens are as PRIVYSEAL_KEY_CUSTODY says: add a serial to the URI"
                )

    def _logged_in(self, token: pkcs11.Token) -> pkcs11.Session:
        source = self._address.pin_source
        pin, version = _read_pin(source)
        if version == self._refused_pin:
            raise CustodyError(
                f"the token refused the PIN in {source}; it is tried again once that file was "
                "written or touched"
            )
        if token.flags & pkcs11.TokenFlag.USER_PIN_FINAL_TRY:
            raise CustodyError(
                "the token will lock at the next wrong PIN: log in once by hand with the right one"
            )
        try:
            return token.open(rw=True, user_pin=pin.reveal())
        except pkcs11.UserAlreadyLoggedIn:
            # A login holds for all sessions of a process (PKCS #11, C_Login).
            return token.open(rw=True)
        except (pkcs11.PinIncorrect, pkcs11.PinInvalid, pkcs11.PinLenRange):
            self._refused_pin = version
            raise CustodyError(
                f"the token refuses the PIN in {source}: put the right one there"
            ) from None
        except (pkcs11.PinLocked, pkcs11.PinExpired, pkcs11.UserPinNotInitialized) as error:
            self._refused_pin = version
            raise CustodyError(
                f"the token lets nobody in ({_named(error)}): its security officer has to set a "
                f"new PIN; then write that into {source}"
            ) from None

    def _signed(
        self, session: pkcs11.Session, address: KeyAddress, kept: KeptKey, data: bytes
    ) -> bytes:
        if (key := self._private_keys.get(address)) is None:
            key = self._private_keys[address] = _private_key(session, address, kept)
        if self._hashes:
            return key.sign(data, mechanism=Mechanism.SHA256_RSA_PKCS)
        digest_info = _DIGEST_INFO + hashlib.sha256(data).digest()
        return key.sign(digest_info, mechanism=Mechanism.RSA_PKCS)

    def _signed_for_log(self, session: pkcs11.Session, address: KeyAddress, data: bytes) -> bytes:
        if (key := self._private_keys.get(address)) is None:
            key = self._private_keys[address] = _log_private_key(session, address)
        return key.sign(data, mechanism=Mechanism.EDDSA)

    def _destroyed(self, session: pkcs11.Session, address: KeyAddress) -> None:
        _refuse_other_token(session, address)
        self._private_keys.pop(address, None)
        for half in _halves(session, address.id):
            half.destroy()
        if any(_halves(session, address.id)):
            raise CustodyError(f"the token still holds {address}, although it was destroyed")


def _made(session: pkcs11.Session, bits: int) -> tuple[bytes, RSAPublicKey]:
    key_id = os.urandom(_ID_BYTES)
    public_half, private_half = session.generate_keypair(
        KeyType.RSA,
        bits,
        id=key_id,
        label=LABEL,
        store=True,
        capabilities=MechanismFlag.SIGN | MechanismFlag.VERIFY,
        mechanism=Mechanism.RSA_PKCS_KEY_PAIR_GEN,
        private_template=_AS_MADE,
    )
    public_key = RSAPublicNumbers(
        e=int.from_bytes(public_half[Attribute.PUBLIC_EXPONENT]),
        n=int.from_bytes(public_half[Attribute.MODULUS]),
    ).public_key()
    wrong = _disobedience(private_half)
    if public_key.key_size != bits or public_key.public_numbers().e != _E:
        wrong.append(f"it is no key of {bits} bits with the exponent {_E}")
    if wrong:
        for half in _halves(session, key_id):
            half.destroy()
        raise CustodyError(f"the token did not make the key as told: {'; '.join(wrong)}")
    return key_id, public_key


def _made_log_key(session: pkcs11.Session, origin: str) -> tuple[str, bytes, Ed25519PublicKey]:
    needed = {Mechanism.EC_EDWARDS_KEY_PAIR_GEN, Mechanism.EDDSA}
    if not needed <= set(session.token.slot.get_mechanisms()):
        raise CustodyError(
            "the token has no Ed25519 (CKM_EC_EDWARDS_KEY_PAIR_GEN and CKM_EDDSA), which the audit "
            "log's key needs: let that one be made in the database, with "
            "PRIVYSEAL_KEY_CUSTODY=local: for this once"
        )
    key_id = os.urandom(_ID_BYTES) + _log_id(origin)
    curve = session.create_domain_parameters(
        KeyType.EC_EDWARDS, {Attribute.EC_PARAMS: _ED25519}, local=True
    )
    public_half, private_half = curve.generate_keypair(
        id=key_id,
        label=LABEL,
        store=True,
        capabilities=MechanismFlag.SIGN | MechanismFlag.VERIFY,
        mechanism=Mechanism.EC_EDWARDS_KEY_PAIR_GEN,
        private_template=dict(_AS_MADE),
    )
    # Modules disagree on what is around the point: an OCTET STRING, a BIT STRING or nothing.
    point: bytes = public_half[Attribute.EC_POINT][-_ED25519_BYTES:]
    if wrong := _disobedience(private_half):
        for half in _halves(session, key_id):
            half.destroy()
        raise CustodyError(f"the token did not make the key as told: {'; '.join(wrong)}")
    return session.token.label, key_id, Ed25519PublicKey.from_public_bytes(point)


def _log_id(origin: str) -> bytes:
    # By it, a database cannot make one log's key sign for another, for which any row could be made.
    return hashlib.sha256(b"privyseal audit log\n" + origin.encode()).digest()[:_LOG_ID_BYTES]


def _log_private_key(session: pkcs11.Session, address: KeyAddress) -> pkcs11.SignMixin:
    _refuse_other_token(session, address)
    template = {
        Attribute.CLASS: ObjectClass.PRIVATE_KEY,
        Attribute.KEY_TYPE: KeyType.EC_EDWARDS,
        Attribute.ID: address.id,
    }
    for key in session.get_objects(template):
        if wrong := _disobedience(key):
            raise CustodyError(f"it is not safe in its token: {'; '.join(wrong)}")
        assert isinstance(key, pkcs11.SignMixin)  # its CKA_SIGN is true
        return key
    raise CustodyError("the token does not hold its private half")


def _private_key(session: pkcs11.Session, address: KeyAddress, kept: KeptKey) -> pkcs11.SignMixin:
    _refuse_other_token(session, address)
    template = {
        Attribute.CLASS: ObjectClass.PRIVATE_KEY,
        Attribute.KEY_TYPE: KeyType.RSA,
        Attribute.ID: address.id,
    }
    found = list(session.get_objects(template))
    if not found:
        raise CustodyError(f"key {kept.kid}: the token does not hold its private half")
    modulus = kept.public_key.public_numbers().n
    for key in found:
        if int.from_bytes(key[Attribute.MODULUS]) == modulus:
            if wrong := _disobedience(key):
                raise CustodyError(f"key {kept.kid} is not safe in its token: {'; '.join(wrong)}")
            assert isinstance(key, pkcs11.SignMixin)  # its CKA_SIGN is true
            return key
    raise CustodyError(f"key {kept.kid}: its private half does not belong to its public half")


def _disobedience(private_half: pkcs11.Object) -> list[str]:
    wrong: list[str] = []
    for attribute, wanted in _AS_KEPT.items():
        try:
            found = private_half[attribute]
        except pkcs11.AttributeTypeInvalid:
            found = "unknown"
        if found is not wanted:
            wrong.append(f"CKA_{attribute.name} is {found}")
    return wrong


def _halves(session: pkcs11.Session, key_id: bytes) -> list[pkcs11.Object]:
    return [
        half
        # The private one first: should this end between the two, it is gone.
        for kind in (ObjectClass.PRIVATE_KEY, ObjectClass.PUBLIC_KEY)
        for half in session.get_objects({Attribute.CLASS: kind, Attribute.ID: key_id})
    ]


def _listed(session: pkcs11.Session) -> list[KeyAddress]:
    template = {Attribute.CLASS: ObjectClass.PRIVATE_KEY, Attribute.LABEL: LABEL}
    return [
        KeyAddress(token=session.token.label, id=key[Attribute.ID])
        for key in session.get_objects(template)
    ]


def _prove_logged_in(session: pkcs11.Session) -> None:
    # Whoever was logged out behind his back is told nothing: he only sees no private keys any
    # more, and one that is not seen would count as destroyed.
    if not _listed(session):
        raise pkcs11.UserNotLoggedIn


def _refuse_other_token(session: pkcs11.Session, address: KeyAddress) -> None:
    # Else a key would count as destroyed because another token does not hold it.
    if session.token.label != address.token:
        raise CustodyError(
            f"the key is kept in the token {address.token!r}, but PRIVYSEAL_KEY_CUSTODY names "
            f"{session.token.label!r}"
        )


class _Module(Protocol):
    def get_slots(self, token_present: bool = False) -> list[pkcs11.Slot]: ...
    def finalize(self) -> None: ...


def _loaded(module_path: Path) -> _Module:
    try:
        return pkcs11.lib(str(module_path))
    except PKCS11Error as error:
        raise CustodyError(
            f"the PKCS #11 module {module_path} does not load ({_named(error)}): correct "
            "module-path in PRIVYSEAL_KEY_CUSTODY"
        ) from None


def _tokens(module: _Module) -> Generator[pkcs11.Token, None, None]:
    for slot in module.get_slots(token_present=True):
        with suppress(pkcs11.TokenNotPresent, pkcs11.TokenNotRecognised):
            if (token := slot.get_token()).flags & pkcs11.TokenFlag.TOKEN_INITIALIZED:
                yield token


def _named(error: PKCS11Error) -> str:
    return f"{type(error).__name__}: {error}".removesuffix(": ")


def _read_pin(source: Path) -> tuple[Secret, tuple[int, int]]:
    try:
        with source.open(encoding="utf-8") as file:
            stat = os.fstat(file.fileno())
            pin = file.read().removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8"
        raise CustodyError(f"the PIN cannot be read from {source}: {reason}") from None
    if not pin or "\n" in pin:
        raise CustodyError(f"{source} must hold the PIN and nothing else, in one line")
    return Secret(pin), (stat.st_ino, stat.st_mtime_ns)


def _components(uri: str) -> tuple[dict[str, bytes], dict[str, bytes]]:
    if not uri.startswith(PKCS11):
        raise CustodyError(f"a PKCS #11 URI begins with {PKCS11}: write {_EXAMPLE}")
    path, _, query = uri.removeprefix(PKCS11).partition("?")
    return _attributes(path, ";", _PATH_VALUE), _attributes(query, "&", _QUERY_VALUE)


def _attributes(component: str, separator: str, grammar: re.Pattern[str]) -> dict[str, bytes]:
    attributes: dict[str, bytes] = {}
    for attribute in component.split(separator) if component else ():
        name, equals, value = attribute.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise CustodyError(
                "in the PKCS #11 URI, something is not name=value; between attributes stands ; "
                "before the ? and & after it"
            )
        if name in attributes:
            raise CustodyError(f"{name} stands twice in the PKCS #11 URI")
        if not grammar.fullmatch(value):
            raise CustodyError(f"{name} in the PKCS #11 URI has a character to be written as %xx")
        attributes[name] = unquote_to_bytes(value)
    return attributes


def _understood(attributes: Mapping[str, bytes], known: set[str]) -> dict[str, bytes]:
    ours = {name: value for name, value in attributes.items() if not name.startswith("x-")}
    if unknown := ours.keys() - known:
        raise CustodyError(
            f"{min(unknown)} is not understood at its place in the PKCS #11 URI, which may hold "
            f"{', '.join(sorted(known))} there: write {_EXAMPLE}"
        )
    return ours


def _text(name: str, value: bytes) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        raise CustodyError(f"{name} in the PKCS #11 URI is no UTF-8") from None


def _absolute_path(name: str, query: Mapping[str, bytes]) -> Path:
    value = _text(name, query.get(name, b""))
    if name == "pin-source" and value.startswith("file:"):  # RFC 7512 §2.4: a URI or a path
        file = urlsplit(value)
        remote = file.netloc not in ("", "localhost") or file.query or file.fragment
        value = "" if remote else _text(name, unquote_to_bytes(file.path))
    if not value.startswith("/") or "\0" in value:
        raise CustodyError(
            f"the PKCS #11 URI needs {name} with the absolute path of a file: write {_EXAMPLE}"
        )
    return Path(value)


def main(uri: str, bits: int) -> str:
    """Make a key in the token; return its CKA_ID in hex and its SubjectPublicKeyInfo in base64."""
    key_id, public_key = _Token(TokenAddress.parse(uri)).make(bits)
    der = public_key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return f"{key_id.hex()} {base64.b64encode(der).decode('ascii')}"


if __name__ == "__main__":
    # Modules print what they like: the answer has a way of its own.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        answer.write(main(sys.argv[1], int(sys.argv[2])))
    except CustodyError as error:
        sys.exit(str(error))
    answer.close()
