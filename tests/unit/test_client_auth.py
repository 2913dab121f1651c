"""A secret proves its client; whoever lacks it learns nothing, whoever holds it learns why not."""

import re
from datetime import UTC, datetime, timedelta
from zlib import crc32

import msgspec
import pytest

from keys.client_secret import SECRET_FORM
from keys.secret import Secret
from service.authority.client_auth import authenticate, new_secret, secret_sha256
from service.authority.errors import OAuthError, OAuthErrorCode
from service.authority.model import Credential, ServiceUser, Status, Subject

BASE62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def base62_number(digits: str) -> int:
    number = 0
    for digit in digits:
        number = number * 62 + BASE62.index(digit)
    return number


def test_secrets_have_one_form_with_a_checksum_that_scanners_can_test() -> None:
    for _ in range(200):
        match = SECRET_FORM.fullmatch(new_secret().reveal())
        assert match is not None
        assert base62_number(match[1]) < 2**256
        assert base62_number(match[2]) == crc32(match[1].encode("ascii"))


def test_one_regular_expression_finds_a_leaked_secret_and_no_character_needs_escaping() -> None:
    secret = new_secret().reveal()
    leaked = f'client_secret = "{secret}",  # for now'
    assert re.findall("pvs_[0-9A-Za-z]{49}", leaked) == [secret]
    assert re.fullmatch("[A-Za-z0-9_]+", secret)


def test_no_two_secrets_are_alike() -> None:
    assert len({new_secret().reveal() for _ in range(1000)}) == 1000


def refused(subject: Subject, secret: Secret, now: float) -> OAuthError:
    with pytest.raises(OAuthError) as refusal:
        authenticate(subject, secret, now)
    assert refusal.value.code is OAuthErrorCode.INVALID_CLIENT
    assert not secret.reveal() or secret.reveal() not in refusal.value.description
    return refusal.value


def test_the_right_secret_proves_its_own_credential_among_several(
    user: ServiceUser, credential: Credential, secret: Secret, now: float
) -> None:
    others = tuple(
        msgspec.structs.replace(
            credential, id=f"cr_{letter * 24}", secret_sha256=secret_sha256(new_secret())
        )
        for letter in "abc"
    )
    for place in range(4):
        credentials = (*others[:place], credential, *others[place:])
        principal = authenticate(Subject(service_user=user, credentials=credentials), secret, now)
        assert principal.service_user == user
        assert principal.credential == credential


def test_unknown_clients_wrong_secrets_and_revoked_credentials_get_the_same_words(
    user: ServiceUser, credential: Credential, secret: Secret, now: float
) -> None:
    revoked = msgspec.structs.replace(credential, revoked_at=datetime.fromtimestamp(now - 1, UTC))
    known = Subject(service_user=user, credentials=(credential,))
    disabled = msgspec.structs.replace(user, status=Status.DISABLED)
    refusals = [
        refused(Subject(), secret, now),
        refused(known, new_secret(), now),
        refused(known, Secret(""), now),
        refused(known, Secret("\ud800 and ü"), now),
        refused(Subject(service_user=user), secret, now),
        refused(Subject(service_user=disabled, credentials=(credential,)), new_secret(), now),
        refused(Subject(service_user=user, credentials=(revoked,)), secret, now),
        refused(Subject(service_user=disabled, credentials=(revoked,)), secret, now),
    ]
    assert len({refusal.description for refusal in refusals}) == 1
    # Only the audit log tells them apart.
    assert [refusal.reason for refusal in refusals] == [
        "unknown_client",
        *["wrong_secret"] * 5,
        *["revoked_credential"] * 2,
    ]


def test_who_holds_the_right_secret_of_an_ended_credential_is_told_when_and_whom_to_ask(
    user: ServiceUser, credential: Credential, secret: Secret, now: float
) -> None:
    ended = msgspec.structs.replace(
        credential,
        expires_at=datetime(2026, 3, 1, 14, 30, tzinfo=UTC).astimezone(),
    )
    refusal = refused(Subject(service_user=user, credentials=(ended,)), secret, now)
    assert refusal.reason == "credential_expired"
    assert "2026-03-01 14:30 UTC" in refusal.description
    assert user.contact in refusal.description


def test_who_holds_the_right_secret_of_a_held_credential_is_told_so_and_whom_to_ask(
    user: ServiceUser, credential: Credential, secret: Secret, now: float
) -> None:
    held = msgspec.structs.replace(credential, held_at=datetime.fromtimestamp(now, UTC))
    subject = Subject(service_user=user, credentials=(held,))
    refusal = refused(subject, secret, now)
    assert refusal.reason == "credential_held"
    assert "until an operator confirms it" in refusal.description
    assert user.contact in refusal.description
    assert refused(subject, new_secret(), now).reason == "wrong_secret"
    # To wait for an operator would help no more.
    ended = held.expires_at.timestamp()
    assert refused(subject, secret, ended).reason == "credential_expired"


def test_a_credential_ends_at_its_instant_and_not_before(
    user: ServiceUser, credential: Credential, secret: Secret, now: float
) -> None:
    ending = msgspec.structs.replace(credential, expires_at=datetime.fromtimestamp(now, UTC))
    subject = Subject(service_user=user, credentials=(ending,))
    assert authenticate(subject, secret, now - 0.001).credential == ending
    assert refused(subject, secret, now).reason == "credential_expired"


def test_who_holds_the_right_secret_of_a_disabled_service_user_is_told_so_and_whom_to_ask(
    user: ServiceUser, credential: Credential, secret: Secret, now: float
) -> None:
    disabled = msgspec.structs.replace(user, status=Status.DISABLED, contact="")
    ended = msgspec.structs.replace(
        credential, expires_at=datetime.fromtimestamp(now, UTC) - timedelta(days=1)
    )
    for held in (credential, ended):
        refusal = refused(Subject(service_user=disabled, credentials=(held,)), secret, now)
        assert refusal.reason == "service_user_disabled"
        assert "vkyc-prod is disabled" in refusal.description
        assert user.owner in refusal.description
