"""A token says in its header and claims exactly what the contract lists, and any reader agrees."""

import base64
import hashlib
from typing import Any
from uuid import UUID

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from hypothesis import given, settings
from hypothesis import strategies as st

from keys.token import Actor, Claims, UnsignedToken, unsigned_token
from keys.verifier import decode, thumbprint

NOW = 1_800_000_000
ISSUER = "https://tokens.example.com"

claim_sets = st.fixed_dictionaries(
    {
        "sub": st.from_regex("su_[a-z2-7]{24}", fullmatch=True),
        "aud": st.from_regex("[a-z]{1,9}:[A-Za-z0-9._~:/?-]{1,50}", fullmatch=True),
        "jti": st.uuids(version=4).map(str),
        "scope": st.lists(
            st.from_regex("[a-z][a-z0-9:._-]{0,20}", fullmatch=True), max_size=5, unique=True
        ).map(" ".join),
        "service_user": st.from_regex("[a-z0-9][a-z0-9._-]{0,62}", fullmatch=True),
        "source_system": st.from_regex("[a-z][a-z0-9_]{0,62}", fullmatch=True),
        "lifetime": st.integers(min_value=60, max_value=3600),
        "minted_by": st.none() | st.from_regex("su_[a-z2-7]{24}", fullmatch=True),
    }
)


def claims_of(drawn: dict[str, Any]) -> Claims:
    minted_by = drawn["minted_by"]
    return Claims(
        iss=ISSUER,
        sub=drawn["sub"],
        client_id=drawn["sub"],
        aud=drawn["aud"],
        exp=NOW + drawn["lifetime"],
        iat=NOW,
        jti=drawn["jti"],
        scope=drawn["scope"],
        service_user=drawn["service_user"],
        source_system=drawn["source_system"],
        act=msgspec.UNSET if minted_by is None else Actor(sub=minted_by),
    )


def signed(unsigned: UnsignedToken, key: RSAPrivateKey) -> str:
    return unsigned.signed(key.sign(unsigned.signing_input, PKCS1v15(), SHA256()))


@settings(max_examples=50, deadline=None)
@given(drawn=claim_sets)
def test_what_was_written_is_what_the_verifier_reads(
    drawn: dict[str, Any], rsa_keys: list[RSAPrivateKey]
) -> None:
    claims = claims_of(drawn)
    public_key = rsa_keys[0].public_key()
    kid = thumbprint(public_key)
    token = signed(unsigned_token(kid, claims), rsa_keys[0])

    read = decode(token, {kid: public_key}, issuer=ISSUER, audience=drawn["aud"], now=NOW)
    assert read.kid == kid
    assert (read.iss, read.sub, read.client_id) == (ISSUER, drawn["sub"], drawn["sub"])
    assert (read.aud, read.jti) == (drawn["aud"], drawn["jti"])
    assert (read.iat, read.exp) == (NOW, NOW + drawn["lifetime"])
    assert read.scope == frozenset(drawn["scope"].split())
    assert (read.service_user, read.source_system) == (
        drawn["service_user"],
        drawn["source_system"],
    )
    assert read.act_sub == drawn["minted_by"]


@pytest.mark.parametrize("minted_by", [None, "su_234567abcdefghijklmnopqr"])
def test_header_and_claims_hold_exactly_what_the_contract_lists(
    minted_by: str | None, rsa_keys: list[RSAPrivateKey]
) -> None:
    drawn = {
        "sub": "su_abcdefghijklmnopqrstuvwx",
        "aud": "https://ingest.example",
        "jti": str(UUID(int=7)),
        "scope": "ingest:write",
        "service_user": "vkyc-prod",
        "source_system": "vkyc",
        "lifetime": 900,
        "minted_by": minted_by,
    }
    unsigned = unsigned_token("k" * 43, claims_of(drawn))
    token = signed(unsigned, rsa_keys[0])
    header, payload, _ = token.split(".")

    assert "=" not in token
    assert base64.urlsafe_b64decode(header + "==") == (
        b'{"alg":"RS256","typ":"at+jwt","kid":"' + b"k" * 43 + b'"}'
    )
    members = msgspec.json.decode(base64.urlsafe_b64decode(payload + "=="))
    expected = {
        "iss": ISSUER,
        "sub": drawn["sub"],
        "client_id": drawn["sub"],
        "aud": drawn["aud"],
        "exp": NOW + 900,
        "iat": NOW,
        "jti": drawn["jti"],
        "scope": "ingest:write",
        "service_user": "vkyc-prod",
        "source_system": "vkyc",
    }
    assert members == expected | ({} if minted_by is None else {"act": {"sub": minted_by}})
    assert unsigned.sha256 == hashlib.sha256(f"{header}.{payload}".encode()).digest()
