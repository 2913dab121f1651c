"""A private half is made in a token, signs there, never leaves it, and is gone when destroyed.

On a real SoftHSM; what an HSM cannot be asked to do, such as to hang, is done to SoftHSM's files.
"""

import asyncio
import base64
import ctypes
import math
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

import pkcs11
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.rsa import (
    RSAPrivateKey,
    RSAPublicKey,
    RSAPublicNumbers,
)
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from msgspec.structs import replace
from pkcs11 import Attribute, KeyType, MechanismFlag, ObjectClass, PKCS11Error

from keys.checkpoint import Checkpoint, NoteVerifier
from keys.log_key import KeptLogKey
from keys.pkcs11 import LABEL, KeyAddress, Pkcs11Custody, TokenAddress
from keys.signer import CustodyError, KeptKey
from keys.verifier import thumbprint
from tests import softhsm

pytestmark = pytest.mark.anyio

DATA = b"signing input"
ORIGIN = "tokens.example/audit/1"
CHECKPOINT = Checkpoint(origin=ORIGIN, size=3, root=bytes(32))
UNREADABLE = {
    *(Attribute.ALLOWED_MECHANISMS, Attribute.UNWRAP_TEMPLATE),
    *(Attribute.START_DATE, Attribute.END_DATE),
}
"""Lists that the binding has no form for, and dates that it cannot read where there are none."""
ELSEWHERE = "?module-path=/m.so&pin-source=/pin"


@pytest.fixture
def token(skip_or_fail: Callable[[str], NoReturn]) -> Generator[softhsm.Token, None, None]:
    """A fresh token, which this process sees."""
    if (reason := softhsm.missing()) is not None:
        skip_or_fail(reason)
    with softhsm.token() as token, softhsm.visible_here(token):
        yield token


async def test_a_signature_verifies_and_the_kid_is_the_thumbprint(token: softhsm.Token) -> None:
    custody = Pkcs11Custody(token.uri)
    kept = await custody.new_key(2048)
    _verify(kept.public_key, await (await custody.open(kept)).sign(DATA))
    assert kept.kid == thumbprint(kept.public_key)
    assert kept.public_key.key_size == 2048
    assert kept.public_key.public_numbers().e == 65_537
    assert kept.sealed_private is None


async def test_the_size_of_a_key_is_as_asked_or_refused_in_words(token: softhsm.Token) -> None:
    custody = Pkcs11Custody(token.uri)
    assert (await custody.new_key(3072)).public_key.key_size == 3072
    with pytest.raises(CustodyError, match="no key of 256 bits was made: the token failed with"):
        await custody.new_key(256)
    assert len(await custody.listed()) == 1


async def test_signing_goes_on_while_a_key_is_made(token: softhsm.Token) -> None:
    custody = Pkcs11Custody(token.uri)
    signer = await custody.open(await custody.new_key(2048))
    making = asyncio.create_task(custody.new_key(3072))
    signatures = 0
    while not making.done():
        await signer.sign(DATA)
        signatures += 1
    await making
    assert signatures > 20


async def test_the_stored_uri_says_neither_module_nor_pin(token: softhsm.Token) -> None:
    kept = await Pkcs11Custody(token.uri).new_key(2048)
    address = KeyAddress.parse(kept.uri)
    assert kept.uri == str(address)
    assert kept.uri.startswith("pkcs11:token=privyseal%20test;id=%")
    assert len(address.id) == 16
    assert "?" not in kept.uri


async def test_a_token_that_does_not_hash_signs_the_same(
    skip_or_fail: Callable[[str], NoReturn],
) -> None:
    if (reason := softhsm.missing()) is not None:
        skip_or_fail(reason)
    with (
        softhsm.token(mechanisms="CKM_RSA_PKCS,CKM_RSA_PKCS_KEY_PAIR_GEN") as token,
        softhsm.visible_here(token),
    ):
        custody = Pkcs11Custody(token.uri)
        kept = await custody.new_key(2048)
        _verify(kept.public_key, await (await custody.open(kept)).sign(DATA))


async def test_no_attribute_of_a_private_half_tells_it(token: softhsm.Token) -> None:
    kept = await Pkcs11Custody(token.uri).new_key(2048)
    with _session(token) as session:
        half = _private_half(session, kept)
        told, withheld = _told_and_withheld(half)
        assert withheld == {
            Attribute.PRIVATE_EXPONENT,
            *(Attribute.PRIME_1, Attribute.PRIME_2),
            *(Attribute.EXPONENT_1, Attribute.EXPONENT_2, Attribute.COEFFICIENT),
        }
        assert int.from_bytes(told[Attribute.MODULUS]) == kept.public_key.public_numbers().n
        for value in told.values():
            _assert_tells_nothing_of(kept.public_key, int.from_bytes(value))


async def test_a_private_half_is_not_wrapped_nor_made_extractable(token: softhsm.Token) -> None:
    kept = await Pkcs11Custody(token.uri).new_key(2048)
    with _session(token) as session:
        half = _private_half(session, kept)
        wrapping = session.generate_key(KeyType.AES, 256, capabilities=MechanismFlag.WRAP)
        assert isinstance(wrapping, pkcs11.WrapMixin)
        assert isinstance(half, pkcs11.PrivateKey)
        with pytest.raises((pkcs11.KeyUnextractable, pkcs11.KeyNotWrappable)):
            wrapping.wrap_key(half, mechanism=pkcs11.Mechanism.AES_KEY_WRAP_PAD)
        with pytest.raises(PKCS11Error):
            half[Attribute.EXTRACTABLE] = True
        with pytest.raises(PKCS11Error):
            half[Attribute.SENSITIVE] = False
        with pytest.raises(PKCS11Error):
            half.copy({Attribute.EXTRACTABLE: True, Attribute.SENSITIVE: False})
        assert not isinstance(half, pkcs11.DecryptMixin | pkcs11.UnwrapMixin)


async def test_an_extractable_private_half_is_refused(token: softhsm.Token) -> None:
    custody = Pkcs11Custody(token.uri)
    with _session(token) as session:
        public_half, _ = session.generate_keypair(
            KeyType.RSA,
            2048,
            id=bytes(16),
            label=LABEL,
            store=True,
            private_template={Attribute.EXTRACTABLE: True, Attribute.SENSITIVE: False},
        )
        modulus = int.from_bytes(public_half[Attribute.MODULUS])
    kept = _kept(modulus, KeyAddress(token=softhsm.LABEL, id=bytes(16)))
    with pytest.raises(CustodyError, match=r"not safe in its token: .*CKA_EXTRACTABLE is True"):
        await custody.open(kept)


async def test_a_private_half_of_another_key_is_refused(
    token: softhsm.Token, rsa_keys: list[RSAPrivateKey]
) -> None:
    custody = Pkcs11Custody(token.uri)
    kept = await custody.new_key(2048)
    other = KeptKey(kid="other", uri=kept.uri, public_key=rsa_keys[0].public_key())
    with pytest.raises(CustodyError, match="does not belong to its public half"):
        await custody.open(other)


async def test_a_destroyed_key_is_gone_and_destroying_it_again_is_no_error(
    token: softhsm.Token,
) -> None:
    custody = Pkcs11Custody(token.uri)
    kept, other = await custody.new_key(2048), await custody.new_key(2048)
    signer = await custody.open(kept)
    await custody.destroy(kept.uri)
    await custody.destroy(kept.uri)
    with pytest.raises(CustodyError, match="does not hold its private half"):
        await signer.sign(DATA)
    with pytest.raises(CustodyError, match="does not hold its private half"):
        await custody.open(kept)
    assert await custody.listed() == [other.uri]
    with _session(token) as session:
        assert len(list(session.get_objects())) == 2  # the halves of the other key


async def test_copies_are_destroyed_with_a_key(token: softhsm.Token) -> None:
    custody = Pkcs11Custody(token.uri)
    kept = await custody.new_key(2048)
    with _session(token) as session:
        _private_half(session, kept).copy({Attribute.LABEL: "a copy"})
    await custody.destroy(kept.uri)
    with _session(token) as session:
        assert list(session.get_objects()) == []


async def test_a_key_of_another_token_does_not_count_as_destroyed(token: softhsm.Token) -> None:
    elsewhere = str(KeyAddress(token="another", id=os.urandom(16)))
    with pytest.raises(CustodyError, match="kept in the token 'another'"):
        await Pkcs11Custody(token.uri).destroy(elsewhere)


async def test_a_key_does_not_count_as_destroyed_because_someone_logged_out(
    token: softhsm.Token,
) -> None:
    custody = Pkcs11Custody(token.uri)
    kept = await custody.new_key(2048)
    _log_out(token)  # the custody's session lives on: it merely sees no private keys any more
    await custody.destroy(kept.uri)
    assert await Pkcs11Custody(token.uri).listed() == []


async def test_keys_that_others_made_in_the_token_are_not_listed(token: softhsm.Token) -> None:
    custody = Pkcs11Custody(token.uri)
    kept = await custody.new_key(2048)
    with _session(token) as session:
        session.generate_keypair(KeyType.RSA, 2048, id=b"theirs", label="theirs", store=True)
    assert await custody.listed() == [kept.uri]


# python-pkcs11 complains of a search that it can no longer end in a lost session.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_lost_sessions_heal(token: softhsm.Token) -> None:
    custody = Pkcs11Custody(token.uri)
    kept = await custody.new_key(2048)
    signer = await custody.open(kept)
    for _ in range(3):
        _close_all_sessions(token)
        _verify(kept.public_key, await signer.sign(DATA))
    _close_all_sessions(token)
    assert await custody.listed() == [kept.uri]
    _log_out(token)
    _verify(kept.public_key, await signer.sign(DATA))


async def test_a_restarted_module_heals(token: softhsm.Token) -> None:
    custody = Pkcs11Custody(token.uri)
    kept = await custody.new_key(2048)
    signer = await custody.open(kept)
    pkcs11.lib(str(token.module_path)).reinitialize()
    _verify(kept.public_key, await signer.sign(DATA))


async def test_a_token_that_was_away_serves_again(token: softhsm.Token) -> None:
    custody = Pkcs11Custody(token.uri)
    kept = await custody.new_key(2048)
    signer = await custody.open(kept)
    away = token.token_dir.with_name("away")
    _close_all_sessions(token)
    token.token_dir.rename(away)
    with pytest.raises(CustodyError, match="the token failed with"):
        await signer.sign(DATA)
    token.token_dir.mkdir()  # the module is up again, but there is no token yet
    with pytest.raises(CustodyError, match="is it plugged in"):
        await signer.sign(DATA)
    token.token_dir.rmdir()
    away.rename(token.token_dir)
    _verify(kept.public_key, await signer.sign(DATA))


# The key of the audit log


async def test_the_key_of_a_log_signs_its_checkpoints_in_the_token(token: softhsm.Token) -> None:
    custody = Pkcs11Custody(token.uri)
    kept = await custody.new_log_key(ORIGIN)
    note = await (await custody.open_log_key(kept)).signed(CHECKPOINT)
    assert Checkpoint.open(note, NoteVerifier.parse(kept.verifier.vkey)) == CHECKPOINT
    assert await custody.listed() == [kept.uri]
    assert kept.sealed_private is None
    assert "?" not in kept.uri, "neither module nor PIN"


async def test_no_attribute_of_the_key_of_a_log_tells_it(token: softhsm.Token) -> None:
    kept = await Pkcs11Custody(token.uri).new_log_key(ORIGIN)
    with _session(token) as session:
        half = _private_half(session, kept)
        told, withheld = _told_and_withheld(half)
        assert withheld == {Attribute.VALUE}
        assert told[Attribute.ID] == KeyAddress.parse(kept.uri).id
        for value in told.values():
            if len(value) >= 32:
                public = Ed25519PrivateKey.from_private_bytes(value[-32:]).public_key()
                assert public != kept.public_key
        with pytest.raises(PKCS11Error):
            half[Attribute.EXTRACTABLE] = True


async def test_the_key_of_a_log_signs_for_no_other_log(token: softhsm.Token) -> None:
    custody = Pkcs11Custody(token.uri)
    kept, other = await custody.new_log_key(ORIGIN), await custody.new_log_key(ORIGIN)
    for wrong, words in (
        (replace(kept, origin="tokens.example/audit/2"), "was not made for this log"),
        (replace(kept, uri=other.uri), "does not verify under its public half"),
        (replace(kept, public_key=other.public_key), "does not verify under its public half"),
        (replace(kept, uri=(await custody.new_key(2048)).uri), "was not made for this log"),
    ):
        with pytest.raises(CustodyError, match=words):
            await custody.open_log_key(wrong)
    signer = await custody.open_log_key(kept)
    with pytest.raises(CustodyError, match="another log"):
        await signer.signed(replace(CHECKPOINT, origin="tokens.example/audit/2"))


async def test_the_key_of_a_log_signs_no_token(token: softhsm.Token) -> None:
    custody = Pkcs11Custody(token.uri)
    kept = await custody.new_key(2048)
    log_key = await custody.new_log_key(ORIGIN)
    with pytest.raises(CustodyError, match="does not hold its private half"):
        await custody.open(replace(kept, uri=log_key.uri))


async def test_a_key_of_a_log_that_is_not_safe_in_its_token_is_not_used(
    token: softhsm.Token,
) -> None:
    custody = Pkcs11Custody(token.uri)
    kept = await custody.new_log_key(ORIGIN)
    private_key = Ed25519PrivateKey.generate()
    await custody.destroy(kept.uri)
    with _session(token) as session:
        session.create_object(
            {
                Attribute.CLASS: ObjectClass.PRIVATE_KEY,
                Attribute.KEY_TYPE: KeyType.EC_EDWARDS,
                Attribute.TOKEN: True,
                Attribute.SIGN: True,
                Attribute.LABEL: LABEL,
                Attribute.ID: KeyAddress.parse(kept.uri).id,
                Attribute.EC_PARAMS: bytes.fromhex("06032b6570"),
                Attribute.VALUE: private_key.private_bytes_raw(),
            }
        )
    with pytest.raises(CustodyError, match="not safe in its token: CKA_"):
        await custody.open_log_key(replace(kept, public_key=private_key.public_key()))


async def test_the_key_of_a_log_serves_again_when_its_token_was_away(token: softhsm.Token) -> None:
    custody = Pkcs11Custody(token.uri)
    signer = await custody.open_log_key(await custody.new_log_key(ORIGIN))
    away = token.token_dir.with_name("away")
    _close_all_sessions(token)
    token.token_dir.rename(away)
    with pytest.raises(CustodyError, match="the token failed with"):
        await signer.signed(CHECKPOINT)
    away.rename(token.token_dir)
    assert Checkpoint.open(await signer.signed(CHECKPOINT), signer.verifier) == CHECKPOINT


async def test_a_token_without_ed25519_is_said_with_what_to_do(
    skip_or_fail: Callable[[str], NoReturn],
) -> None:
    if (reason := softhsm.missing()) is not None:
        skip_or_fail(reason)
    with (
        softhsm.token(mechanisms="CKM_RSA_PKCS,CKM_RSA_PKCS_KEY_PAIR_GEN") as token,
        softhsm.visible_here(token),
    ):
        custody = Pkcs11Custody(token.uri)
        with pytest.raises(CustodyError, match=r"no Ed25519 .* PRIVYSEAL_KEY_CUSTODY=local:"):
            await custody.new_log_key(ORIGIN)
        assert await custody.listed() == []


async def test_two_custodies_in_one_process_do_not_disturb_each_other(
    token: softhsm.Token,
) -> None:
    one, two = Pkcs11Custody(token.uri), Pkcs11Custody(token.uri)
    kept = await one.new_key(2048)
    other = await two.new_key(2048)
    signers = [
        (await custody.open(key), key) for custody in (one, two, one) for key in (kept, other)
    ]
    for round_number in range(5):
        if round_number == 3:
            pkcs11.lib(str(token.module_path)).reinitialize()
        signatures = await asyncio.gather(*(signer.sign(DATA) for signer, _ in signers))
        for (_, key), signature in zip(signers, signatures, strict=True):
            _verify(key.public_key, signature)


async def test_no_custody_signs_with_the_key_of_another_when_the_module_was_restarted(
    token: softhsm.Token,
) -> None:
    maker, one, two = (Pkcs11Custody(token.uri) for _ in range(3))
    kept, other = await maker.new_key(2048), await maker.new_key(2048)
    pkcs11.lib(str(token.module_path)).reinitialize()
    signer = await one.open(kept)
    await two.listed()
    _log_out(token)
    # This restarts the module, and gives the other key the handle that the first one had.
    await two.open(other)
    _verify(kept.public_key, await signer.sign(DATA))


async def test_another_process_signs_with_the_same_key_until_it_is_destroyed(
    token: softhsm.Token,
) -> None:
    custody = Pkcs11Custody(token.uri)
    kept = await custody.new_key(2048)
    signer = await custody.open(kept)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _SIGNING_UNTIL_REFUSED, token.uri, kept.uri, _der(kept)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    async with asyncio.timeout(20):
        assert await process.stdout.readline() == b"signs\n"
        for _ in range(50):
            _verify(kept.public_key, await signer.sign(DATA))
        await custody.destroy(kept.uri)
        process.stdin.write(b"destroyed\n")
        assert b"does not hold its private half" in await process.stdout.readline()
        assert await process.wait() == 0


_SIGNING_UNTIL_REFUSED = textwrap.dedent(
    """
    import asyncio, base64, sys
    from cryptography.hazmat.primitives.serialization import load_der_public_key
    from keys.pkcs11 import Pkcs11Custody
    from keys.signer import CustodyError, KeptKey

    async def main(uri, key_uri, der):
        public_key = load_der_public_key(base64.b64decode(der))
        kept = KeptKey(kid="kid", uri=key_uri, public_key=public_key)
        signer = await Pkcs11Custody(uri).open(kept)
        for _ in range(50):
            await signer.sign(b"signing input")
        print("signs", flush=True)
        sys.stdin.readline()
        try:
            await signer.sign(b"signing input")
        except CustodyError as error:
            print(error)

    asyncio.run(main(*sys.argv[1:]))
    """
)


async def test_a_wrong_pin_is_not_tried_again_until_its_file_changes(token: softhsm.Token) -> None:
    custody = Pkcs11Custody(token.uri)
    token.pin_file.write_text("000000\n")
    with pytest.raises(CustodyError, match=f"refuses the PIN in {token.pin_file}: put the right"):
        await custody.listed()
    with _session(token) as session:
        session.set_pin(softhsm.PIN, "000000")
    _close_all_sessions(token)
    # Now it would be the right one: whoever is refused does not ask.
    for attempt in (custody.listed, lambda: custody.new_key(2048)):
        with pytest.raises(
            CustodyError, match=r"refused the PIN .* tried again once that file was"
        ):
            await attempt()
    token.pin_file.touch()
    assert await custody.listed() == []


@pytest.mark.parametrize("content", ["", "\n", "1234\n5678\n"])
async def test_a_pin_file_that_holds_no_pin_is_refused(token: softhsm.Token, content: str) -> None:
    token.pin_file.write_text(content)
    with pytest.raises(CustodyError, match="must hold the PIN and nothing else"):
        await Pkcs11Custody(token.uri).listed()


async def test_a_missing_pin_file_is_named(token: softhsm.Token) -> None:
    token.pin_file.unlink()
    with pytest.raises(CustodyError, match=f"cannot be read from {token.pin_file}: No such file"):
        await Pkcs11Custody(token.uri).listed()


async def test_a_missing_token_is_named_in_words(token: softhsm.Token) -> None:
    custody = Pkcs11Custody(token.uri.replace("privyseal%20test", "elsewhere"))
    with pytest.raises(CustodyError, match="the module knows: 'privyseal test'"):
        await custody.new_key(2048)


async def test_two_tokens_that_match_are_refused(token: softhsm.Token) -> None:
    softhsm.add_token_of_the_same_label(token)
    with pytest.raises(CustodyError, match="add a serial"):
        await Pkcs11Custody(token.uri).listed()


async def test_a_module_that_does_not_load_is_named(tmp_path: Path) -> None:
    custody = Pkcs11Custody(f"pkcs11:token=x?module-path={tmp_path}/none.so&pin-source=/pin")
    with pytest.raises(CustodyError, match=r"none\.so does not load .* correct module-path"):
        await custody.listed()


async def test_a_token_that_hangs_is_found_out_and_then_refused_at_once(
    token: softhsm.Token,
) -> None:
    custody = Pkcs11Custody(token.uri, deadline=0.5)
    kept = await custody.new_key(2048)
    signer = await custody.open(kept)
    loop = asyncio.get_running_loop()
    with _hanging(token):
        with pytest.raises(CustodyError, match=r"did not answer within 0\.5 s"):
            await custody.listed()
        await asyncio.sleep(0.1)
        began = loop.time()
        for _ in range(10):
            with pytest.raises(CustodyError, match="has not answered for"):
                await signer.sign(DATA)
        assert loop.time() - began < 2  # each would take half a second
    async with asyncio.timeout(5):
        while True:
            with suppress(CustodyError):
                _verify(kept.public_key, await signer.sign(DATA))
                return
            await asyncio.sleep(0.01)


async def test_a_process_ends_although_its_token_hangs(token: softhsm.Token) -> None:
    kept = await Pkcs11Custody(token.uri).new_key(2048)
    with _hanging(token):
        ended = await asyncio.to_thread(
            subprocess.run,
            (sys.executable, "-c", _GIVING_UP, token.uri, kept.uri),
            capture_output=True,
            text=True,
            timeout=10,
        )
    assert ended.stdout == "the token did not answer within 0.5 s\n"


_GIVING_UP = textwrap.dedent(
    """
    import asyncio, sys
    from keys.pkcs11 import Pkcs11Custody
    from keys.signer import CustodyError

    try:
        asyncio.run(Pkcs11Custody(sys.argv[1], deadline=0.5).destroy(sys.argv[2]))
    except CustodyError as error:
        print(error)
    """
)


def test_a_uri_is_read_as_the_rfc_says() -> None:
    address = TokenAddress.parse(
        "pkcs11:token=The%20Software%20PKCS%2311%20Softtoken;serial=a:1;manufacturer=S%C3%A9;"
        "model=1.0;slot-id=327;x-vendor=anything"
        "?module-path=/opt/a%20module.so&pin-source=file:///etc/a%2520pin&x-other=1"
    )
    assert address == TokenAddress(
        token="The Software PKCS#11 Softtoken",
        serial="a:1",
        manufacturer="Sé",
        model="1.0",
        slot_id=327,
        module_path=Path("/opt/a module.so"),
        pin_source=Path("/etc/a pin"),
    )


@pytest.mark.parametrize(
    ("pin_source", "path"),
    [
        ("/etc/pin", "/etc/pin"),
        ("file:/etc/pin", "/etc/pin"),
        ("file:///etc/pin", "/etc/pin"),
        ("file://localhost/etc/pin", "/etc/pin"),
    ],
)
def test_pin_source_is_a_path_or_a_file_uri(pin_source: str, path: str) -> None:
    uri = f"pkcs11:token=x?module-path=/m.so&pin-source={pin_source}"
    assert TokenAddress.parse(uri).pin_source == Path(path)


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("", "begins with pkcs11:"),
        ("PKCS11:token=x" + ELSEWHERE, "begins with pkcs11:"),
        ("pkcs11:" + ELSEWHERE, "names no token"),
        ("pkcs11:x-vendor=1" + ELSEWHERE, "names no token"),
        ("pkcs11:token=x;token=x" + ELSEWHERE, "token stands twice"),
        ("pkcs11:token=x" + ELSEWHERE + "&pin-source=/pin", "pin-source stands twice"),
        ("pkcs11:token" + ELSEWHERE, "not name=value"),
        ("pkcs11:token=x;" + ELSEWHERE, "not name=value"),
        ("pkcs11:tok%65n=x" + ELSEWHERE, "not name=value"),
        ("pkcs11:token=a b" + ELSEWHERE, "token .* written as %xx"),
        ("pkcs11:token=a/b" + ELSEWHERE, "token .* written as %xx"),
        ("pkcs11:token=%2" + ELSEWHERE, "token .* written as %xx"),
        ("pkcs11:token=é" + ELSEWHERE, "token .* written as %xx"),
        ("pkcs11:token=%ff" + ELSEWHERE, "token .* no UTF-8"),
        ("pkcs11:token=x;slot-id=-1" + ELSEWHERE, "slot-id .* decimal number"),
        ("pkcs11:token=x;slot-id=" + ELSEWHERE, "slot-id .* decimal number"),
        ("pkcs11:token=x;colour=red" + ELSEWHERE, "colour is not understood at its place"),
        ("pkcs11:token=x;object=key" + ELSEWHERE, "object is not understood at its place"),
        ("pkcs11:token=x;id=%01" + ELSEWHERE, "id is not understood at its place"),
        ("pkcs11:token=x;pin-source=/pin?module-path=/m.so", "pin-source .* written as %xx"),
        ("pkcs11:token=x?module-name=softhsm2&pin-source=/pin", "module-name is not understood"),
        ("pkcs11:token=x?token=y&module-path=/m.so", "token is not understood at its place"),
        ("pkcs11:token=x?pin-source=/pin", "needs module-path with the absolute path"),
        ("pkcs11:token=x?module-path=m.so&pin-source=/pin", "needs module-path with the absolute"),
        ("pkcs11:token=x?module-path=/m.so", "needs pin-source with the absolute path"),
        ("pkcs11:token=x?module-path=/m.so&pin-source=pin", "needs pin-source with the absolute"),
        ("pkcs11:token=x?module-path=/m.so&pin-source=%7Ccat%20pin", "needs pin-source"),
        ("pkcs11:token=x?module-path=/m.so&pin-source=file://host/pin", "needs pin-source"),
        ("pkcs11:token=x?module-path=/m.so&pin-source=https://host/pin", "needs pin-source"),
        ("pkcs11:token=x?module-path=/m.so&pin-source=/%00", "needs pin-source"),
    ],
)
def test_a_uri_that_names_no_token_is_refused_in_words(uri: str, words: str) -> None:
    with pytest.raises(CustodyError, match=words):
        Pkcs11Custody(uri)


def test_a_pin_in_the_uri_is_refused_without_repeating_it() -> None:
    with pytest.raises(CustodyError, match=r"pin-value .* name that by pin-source") as refusal:
        Pkcs11Custody("pkcs11:token=x?module-path=/m.so&pin-value=482913")
    assert "482913" not in str(refusal.value)


@pytest.mark.parametrize(
    "uri",
    [
        "pkcs11:token=x",
        "pkcs11:id=" + "%00" * 16,
        "pkcs11:token=x;id=%00",
        "pkcs11:token=x;type=private;id=" + "%00" * 16,
        "pkcs11:token=x;id=" + "%00" * 16 + "?pin-source=/pin",
    ],
)
async def test_a_uri_of_a_key_that_was_not_made_here_destroys_nothing(uri: str) -> None:
    custody = Pkcs11Custody("pkcs11:token=x" + ELSEWHERE)
    with pytest.raises(CustodyError, match="does not name a key that was made here"):
        await custody.destroy(uri)


def _verify(public_key: RSAPublicKey, signature: bytes) -> None:
    public_key.verify(signature, DATA, PKCS1v15(), SHA256())


def _kept(modulus: int, address: KeyAddress) -> KeptKey:
    public_key = RSAPublicNumbers(e=65_537, n=modulus).public_key()
    return KeptKey(kid=thumbprint(public_key), uri=str(address), public_key=public_key)


def _der(kept: KeptKey) -> str:
    der = kept.public_key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return base64.b64encode(der).decode("ascii")


def _assert_tells_nothing_of(public_key: RSAPublicKey, value: int) -> None:
    numbers = public_key.public_numbers()
    assert math.gcd(value, numbers.n) in (1, numbers.n)  # no prime
    assert value < 2 or pow(2, numbers.e * value, numbers.n) != 2  # no private exponent


@contextmanager
def _session(token: softhsm.Token) -> Generator[pkcs11.Session, None, None]:
    """Look into the token beside the custody: a login holds for all sessions of a process."""
    try:
        session = _found(token).open(rw=True, user_pin=softhsm.PIN)
    except pkcs11.UserAlreadyLoggedIn:
        session = _found(token).open(rw=True)
    yield session


def _told_and_withheld(half: pkcs11.Object) -> tuple[dict[Attribute, bytes], set[Attribute]]:
    """Return every attribute that the token gives away as bytes, and those that it withholds."""
    answers: dict[Attribute, object] = {}
    for attribute in set(Attribute) - UNREADABLE:
        try:
            answers[attribute] = half[attribute]
        except (pkcs11.AttributeSensitive, pkcs11.AttributeTypeInvalid) as refusal:
            answers[attribute] = type(refusal)
    told = {name: value for name, value in answers.items() if isinstance(value, bytes)}
    withheld = {name for name, value in answers.items() if value is pkcs11.AttributeSensitive}
    return told, withheld


def _private_half(session: pkcs11.Session, kept: KeptKey | KeptLogKey) -> pkcs11.Object:
    key_id = KeyAddress.parse(kept.uri).id
    template = {Attribute.CLASS: ObjectClass.PRIVATE_KEY, Attribute.ID: key_id}
    (half,) = session.get_objects(template)
    return half


def _close_all_sessions(token: softhsm.Token) -> None:
    slot_id = ctypes.c_ulong(_found(token).slot.slot_id)
    assert ctypes.CDLL(str(token.module_path)).C_CloseAllSessions(slot_id) == 0


def _log_out(token: softhsm.Token) -> None:
    """Log this process out; its sessions stay open."""
    handle = ctypes.c_ulong(getattr(_found(token).open(), "handle"))  # noqa: B009 (no stub)
    assert ctypes.CDLL(str(token.module_path)).C_Logout(handle) == 0


def _found(token: softhsm.Token) -> pkcs11.Token:
    return pkcs11.lib(str(token.module_path)).get_token(token_label=softhsm.LABEL)


@contextmanager
def _hanging(token: softhsm.Token) -> Generator[None, None, None]:
    """Another process locks the token's files, for which SoftHSM waits without end."""
    with subprocess.Popen(
        (sys.executable, "-c", _LOCKING, str(token.token_dir)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"locked\n"
        try:
            yield
        finally:
            process.stdin.close()


_LOCKING = textwrap.dedent(
    """
    import fcntl, sys
    from pathlib import Path

    files = [path.open("r+b") for path in Path(sys.argv[1]).rglob("*") if path.is_file()]
    for file in files:
        fcntl.lockf(file, fcntl.LOCK_EX)
    print("locked", flush=True)
    sys.stdin.read()
    """
)
