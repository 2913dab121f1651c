"""What an exchange is given: never more than was granted, and each time something to record."""

from typing import Any
from uuid import UUID

import joserfc.jwk
import joserfc.jwt
import jwt as pyjwt
import msgspec
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given, settings
from hypothesis import strategies as st

from keys.keyring import SigningKey
from keys.secret import Secret
from service.authority.audit import Action, Outcome
from service.authority.by_hand import of_itself
from service.authority.client_auth import new_secret
from service.authority.errors import Forbidden, NotFound, OAuthError, OAuthErrorCode
from service.authority.issuer import (
    Decision,
    Grant,
    Terms,
    decide_exchange,
    grant,
    mintable,
    narrow,
    refusal,
)
from service.authority.model import (
    ADMIN_SCOPES,
    ENDS_SOON,
    AdminScope,
    ClientAddress,
    Credential,
    ServiceUser,
    Status,
    Subject,
    TokenRequest,
)
from service.authority.operators import Operator

API = "https://tokens.example/api/v1"
TERMS = Terms(issuer="https://tokens.example", api_audience=API)
INGEST, SEARCH = "https://ingest.example", "https://search.example"


def replaced(user: ServiceUser, **fields: Any) -> ServiceUser:
    return msgspec.structs.replace(user, **fields)


def granted(decision: Decision) -> Grant:
    assert isinstance(decision.answer, Grant)
    return decision.answer


@pytest.fixture(scope="module")
def request_of(user: ServiceUser, secret: Secret, origin: ClientAddress) -> TokenRequest:
    return TokenRequest(client_id=user.id, client_secret=secret, origin=origin)


@pytest.fixture(scope="module")
def subject(user: ServiceUser, credential: Credential) -> Subject:
    return Subject(service_user=user, credentials=(credential,))


# narrow


def test_who_asks_for_nothing_gets_all_scopes_for_the_first_audience(user: ServiceUser) -> None:
    assert narrow(user, None, None, API) == (INGEST, "ingest:write search:read")


def test_a_request_narrows_scope_and_audience_and_the_order_is_that_of_the_grant(
    user: ServiceUser,
) -> None:
    assert narrow(user, "search:read", SEARCH, API) == (SEARCH, "search:read")
    assert narrow(user, "search:read ingest:write search:read", None, API) == (
        INGEST,
        "ingest:write search:read",
    )


@pytest.mark.parametrize(
    "resource", [f"{INGEST}/", INGEST.upper(), "https://other.example", f"{INGEST} {SEARCH}", ""]
)
def test_an_audience_that_was_not_granted_is_an_invalid_target(
    resource: str, user: ServiceUser
) -> None:
    with pytest.raises(OAuthError) as refused:
        narrow(user, None, resource, API)
    assert refused.value.code is OAuthErrorCode.INVALID_TARGET
    assert f"{INGEST}, {SEARCH}" in refused.value.description


@pytest.mark.parametrize(
    "scope", ["", "ingest:delete", "ingest:write ingest:delete", "INGEST:WRITE", "ingest:write "]
)
def test_a_scope_that_was_not_granted_is_an_invalid_scope(scope: str, user: ServiceUser) -> None:
    with pytest.raises(OAuthError) as refused:
        narrow(user, scope, None, API)
    assert refused.value.code is OAuthErrorCode.INVALID_SCOPE
    assert "Granted: ingest:write search:read." in refused.value.description


def test_a_scope_that_belongs_to_another_audience_is_an_invalid_scope(user: ServiceUser) -> None:
    holder = replaced(
        user, scopes=("ingest:write", AdminScope.AUDIT_READ.value), audiences=(INGEST, API)
    )
    assert narrow(holder, None, API, API) == (API, "audit:read")
    for scope, resource in (("audit:read", INGEST), ("ingest:write audit:read", API)):
        with pytest.raises(OAuthError) as refused:
            narrow(holder, scope, resource, API)
        assert refused.value.code is OAuthErrorCode.INVALID_SCOPE


@given(
    held=st.lists(
        st.sampled_from(["ingest:write", "search:read", *ADMIN_SCOPES]), unique=True, max_size=10
    ),
    audiences=st.lists(st.sampled_from([INGEST, SEARCH, API]), unique=True, min_size=1),
    asked=st.none()
    | st.lists(st.sampled_from(["ingest:write", "search:read", "x:y", *ADMIN_SCOPES]), min_size=1),
    resource=st.none() | st.sampled_from([INGEST, SEARCH, API]),
)
def test_no_token_says_more_than_was_granted_and_admin_scopes_go_only_to_the_admin_api(
    held: list[str],
    audiences: list[str],
    asked: list[str] | None,
    resource: str | None,
    user: ServiceUser,
) -> None:
    holder = replaced(user, scopes=tuple(held), audiences=tuple(audiences))
    try:
        audience, scope = narrow(holder, None if asked is None else " ".join(asked), resource, API)
    except OAuthError:
        return
    scopes = scope.split()
    assert audience in audiences
    assert resource in (None, audience)
    assert set(scopes) <= set(held)
    assert asked is None or set(scopes) == set(asked)
    assert all((each in ADMIN_SCOPES) == (audience == API) for each in scopes)
    assert len(set(scopes)) == len(scopes)


# decide_exchange and grant


def test_a_grant_is_decided_on_a_version_and_its_record_says_all_that_the_token_does(
    request_of: TokenRequest,
    subject: Subject,
    active_key: SigningKey,
    user: ServiceUser,
    credential: Credential,
    now: float,
) -> None:
    decision = decide_exchange(request_of, subject, active_key, TERMS, now + 0.9)
    claims, record = granted(decision).claims, decision.record
    assert (claims.iss, claims.sub, claims.client_id) == (TERMS.issuer, user.id, user.id)
    assert (claims.iat, claims.exp) == (int(now), int(now) + 900)
    assert (record.action, record.outcome) == (Action.TOKEN_ISSUE, Outcome.SUCCESS)
    assert (record.version, record.credential_id, record.kid) == (
        user.version,
        credential.id,
        active_key.kid,
    )
    assert (str(record.id), record.iat, record.exp, record.aud, record.scope) == (
        claims.jti,
        claims.iat,
        claims.exp,
        claims.aud,
        claims.scope,
    )
    assert (record.service_user_id, record.service_user, record.source_system) == (
        claims.sub,
        claims.service_user,
        claims.source_system,
    )
    assert record.signing_input_sha256 == granted(decision).unsigned.sha256
    assert (record.client_address, record.user_agent, record.request_id) == (
        "192.0.2.7",
        "curl/8",
        "request-1",
    )
    assert request_of.client_secret.reveal() not in repr(decision)


def test_a_jti_is_a_uuid_of_version_7_of_the_moment(
    request_of: TokenRequest, subject: Subject, active_key: SigningKey, now: float
) -> None:
    decision = decide_exchange(request_of, subject, active_key, TERMS, now)
    jti = UUID(granted(decision).claims.jti)
    assert jti.version == 7
    assert jti.int >> 80 == int(now * 1000)


@settings(max_examples=60, deadline=None)
@given(
    lifetime=st.integers(min_value=60, max_value=3600),
    cap=st.integers(min_value=60, max_value=3600),
    scopes=st.lists(st.from_regex("[a-z][a-z0-9:._-]{0,9}", fullmatch=True), unique=True),
    name=st.from_regex("[a-z0-9][a-z0-9._-]{0,62}", fullmatch=True),
)
@pytest.mark.anyio
async def test_every_issued_token_verifies_elsewhere_and_lives_no_longer_than_it_may(
    lifetime: int,
    cap: int,
    scopes: list[str],
    name: str,
    request_of: TokenRequest,
    subject: Subject,
    active_key: SigningKey,
    user: ServiceUser,
    now: float,
) -> None:
    holder = msgspec.structs.replace(
        subject,
        service_user=replaced(user, token_lifetime=lifetime, scopes=tuple(scopes), name=name),
    )
    key = msgspec.structs.replace(active_key, lifetime_cap=cap)
    token = await granted(decide_exchange(request_of, holder, key, TERMS, now)).sign()
    public_key = key.public_key

    options: Any = {"verify_exp": False, "verify_iat": False}
    by_pyjwt = pyjwt.decode(
        token.token.reveal(), public_key, algorithms=["RS256"], audience=INGEST, options=options
    )
    pem = public_key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    by_joserfc = joserfc.jwt.decode(
        token.token.reveal(), joserfc.jwk.RSAKey.import_key(pem), algorithms=["RS256"]
    )
    assert by_pyjwt == by_joserfc.claims
    assert by_joserfc.header == {"alg": "RS256", "typ": "at+jwt", "kid": key.kid}
    assert by_pyjwt["exp"] - by_pyjwt["iat"] == token.expires_in == min(lifetime, cap)
    assert by_pyjwt["jti"] == token.jti
    assert by_pyjwt["service_user"] == name
    assert token.token.reveal() not in repr(token)


def test_no_two_tokens_share_a_jti(
    request_of: TokenRequest, subject: Subject, active_key: SigningKey, now: float
) -> None:
    decided = [decide_exchange(request_of, subject, active_key, TERMS, now) for _ in range(500)]
    assert len({decision.record.id for decision in decided}) == 500


def test_a_key_that_has_no_cap_signs_nothing(
    request_of: TokenRequest, subject: Subject, active_key: SigningKey, now: float
) -> None:
    uncapped = msgspec.structs.replace(active_key, lifetime_cap=None)
    with pytest.raises(ValueError, match="no lifetime cap"):
        decide_exchange(request_of, subject, uncapped, TERMS, now)


def test_the_end_of_the_credential_is_told_from_thirty_days_before(
    request_of: TokenRequest, subject: Subject, active_key: SigningKey, credential: Credential
) -> None:
    ends = credential.expires_at
    for before, told in ((ENDS_SOON, None), (ENDS_SOON - 1, ends)):
        at = ends.timestamp() - before
        decision = decide_exchange(request_of, subject, active_key, TERMS, at)
        assert granted(decision).credential_expires_at == told


def test_a_refusal_is_decided_on_a_version_too_and_names_whom_it_concerns(
    request_of: TokenRequest, subject: Subject, active_key: SigningKey, now: float
) -> None:
    request = msgspec.structs.replace(request_of, client_secret=new_secret())
    decision = decide_exchange(request, subject, active_key, TERMS, now)
    record = decision.record
    assert isinstance(decision.answer, OAuthError)
    assert (record.outcome, record.reason) == (Outcome.REFUSED, "wrong_secret")
    assert (record.service_user_id, record.service_user, record.version) == (
        request.client_id,
        "vkyc-prod",
        3,
    )
    assert (record.kid, record.iat, record.signing_input_sha256) == (None, None, None)


def test_an_unknown_client_is_refused_on_version_zero(
    request_of: TokenRequest, active_key: SigningKey, now: float
) -> None:
    record = decide_exchange(request_of, Subject(), active_key, TERMS, now).record
    assert (record.service_user_id, record.service_user, record.version) == (
        request_of.client_id,
        None,
        0,
    )


def test_a_secret_in_the_place_of_the_client_id_is_not_recorded(
    request_of: TokenRequest, active_key: SigningKey, secret: Secret, now: float
) -> None:
    request = msgspec.structs.replace(request_of, client_id=secret.reveal())
    record = decide_exchange(request, Subject(), active_key, TERMS, now).record
    assert secret.reveal() not in repr(record)
    assert (record.service_user_id, record.version) == (None, None)


def test_a_malformed_request_is_recorded_with_its_origin_alone(
    origin: ClientAddress, now: float
) -> None:
    error = OAuthError(OAuthErrorCode.INVALID_REQUEST, "grant_type is missing.")
    record = refusal(error, origin, now)
    assert (record.outcome, record.reason) == (Outcome.REFUSED, "invalid_request")
    assert (record.client_address, record.version) == ("192.0.2.7", None)


# mintable, and grant by hand


@pytest.fixture(scope="module")
def minter(user: ServiceUser) -> Operator:
    return Operator(
        service_user=replaced(user, id="su_" + "o" * 24, name="operator", version=7),
        credential_id="cr_" + "o" * 24,
        jti=UUID(int=1),
        scopes=frozenset({AdminScope.TOKENS_MINT}),
    )


def test_a_token_minted_by_hand_names_the_minter_and_the_version_of_both(
    user: ServiceUser, active_key: SigningKey, minter: Operator, origin: ClientAddress, now: float
) -> None:
    decision = grant(user, active_key, TERMS, now, INGEST, "ingest:write", origin, minter=minter)
    claims, record = granted(decision).claims, decision.record
    assert msgspec.to_builtins(claims)["act"] == {"sub": minter.service_user.id}
    assert claims.sub == user.id
    assert record.action is Action.TOKEN_MINT
    assert (record.version, record.actor_version) == (3, 7)
    assert (record.actor_id, record.actor, record.actor_credential_id) == (
        minter.service_user.id,
        "operator",
        minter.credential_id,
    )
    assert record.credential_id is None


def test_minting_takes_its_own_scope(user: ServiceUser, minter: Operator) -> None:
    without = msgspec.structs.replace(
        minter, scopes=frozenset(ADMIN_SCOPES - {AdminScope.TOKENS_MINT})
    )
    with pytest.raises(Forbidden) as refused:
        mintable(without, Subject(service_user=user))
    assert refused.value.scope == AdminScope.TOKENS_MINT
    assert mintable(minter, Subject(service_user=user)) == user


@pytest.mark.parametrize("scope", sorted(ADMIN_SCOPES))
def test_nobody_mints_for_an_operator(scope: str, user: ServiceUser, minter: Operator) -> None:
    operator = replaced(user, scopes=("ingest:write", scope))
    with pytest.raises(Forbidden, match="not made by hand"):
        mintable(minter, Subject(service_user=operator))


def test_nobody_mints_for_who_is_disabled_or_unknown(user: ServiceUser, minter: Operator) -> None:
    with pytest.raises(Forbidden, match="is disabled"):
        mintable(minter, Subject(service_user=replaced(user, status=Status.DISABLED)))
    with pytest.raises(NotFound):
        mintable(minter, Subject())


def test_who_signed_in_with_a_credential_mints_for_itself_alone(
    user: ServiceUser, minter: Operator, subject: Subject
) -> None:
    credential = subject.credentials[0]
    own = msgspec.structs.replace(
        minter, service_user=user, credential_id=credential.id, scopes=frozenset()
    )
    assert of_itself(own, subject) == (user, credential)
    another = replaced(user, id="su_" + "x" * 24)
    for beyond in (Subject(), Subject(service_user=another, credentials=subject.credentials)):
        with pytest.raises(Forbidden, match="Tokens of others"):
            of_itself(own, beyond)
    for changed in ({"status": Status.DISABLED}, {"scopes": ("audit:read",)}):
        with pytest.raises(Forbidden):
            of_itself(own, msgspec.structs.replace(subject, service_user=replaced(user, **changed)))
    for credential_id in (None, "cr_" + "x" * 24):
        with pytest.raises(Forbidden, match="without a credential"):
            of_itself(msgspec.structs.replace(own, credential_id=credential_id), subject)
