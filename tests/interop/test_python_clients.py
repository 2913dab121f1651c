"""PyJWT, joserfc and Authlib, unmodified: they get tokens and verify them with published keys.

It must not use anything of our own to verify.
"""

import time
from collections.abc import Callable
from typing import Any, cast

import httpx
import jwt
import pytest
from authlib.integrations.httpx_client import OAuth2Client
from authlib.integrations.requests_client import OAuth2Session
from authlib.oauth2.rfc6750.errors import InsufficientScopeError, InvalidTokenError
from authlib.oauth2.rfc8414 import AuthorizationServerMetadata, get_well_known_url
from authlib.oauth2.rfc9068 import JWTBearerTokenValidator
from joserfc import jwt as joserfc_jwt
from joserfc.errors import InvalidClaimError
from joserfc.jwk import KeySet

from tests.interop.conftest import Authority, Exchange, Integrator

AUDIENCE = "http://127.0.0.1:8081"


@pytest.fixture(scope="module")
def metadata(authority: Authority) -> dict[str, Any]:
    """What the authority says of itself, found and judged by Authlib (RFC 8414)."""
    url = get_well_known_url(authority.issuer, external=True)
    document: dict[str, Any] = httpx.get(url, timeout=10).raise_for_status().json()
    judge = AuthorizationServerMetadata(document)
    judge.validate_issuer()
    judge.validate_token_endpoint()
    judge.validate_jwks_uri()
    judge.validate_grant_types_supported()
    judge.validate_token_endpoint_auth_methods_supported()
    # Not validate(), which wants a response type: RFC 8414 §2 asks only for the list, and an
    # authority without an authorization endpoint has none.
    assert document["response_types_supported"] == []
    return document


@pytest.fixture(scope="module")
def access_token(exchange: Exchange, vkyc: Integrator) -> str:
    return exchange(vkyc)


def test_pyjwt_finds_the_key_and_verifies(
    metadata: dict[str, Any], access_token: str, vkyc: Integrator
) -> None:
    key = jwt.PyJWKClient(metadata["jwks_uri"]).get_signing_key_from_jwt(access_token)
    options = {"require": ["iss", "sub", "client_id", "aud", "exp", "iat", "jti", "scope"]}
    claims = jwt.decode(
        access_token,
        key,
        algorithms=["RS256"],
        issuer=metadata["issuer"],
        audience=AUDIENCE,
        options=cast(Any, options),
    )
    assert claims["sub"] == claims["client_id"] == vkyc.id
    assert (claims["service_user"], claims["source_system"]) == ("vkyc-prod", "vkyc")


def test_pyjwt_refuses_the_token_at_another_audience(
    metadata: dict[str, Any], access_token: str
) -> None:
    key = jwt.PyJWKClient(metadata["jwks_uri"]).get_signing_key_from_jwt(access_token)
    with pytest.raises(jwt.InvalidAudienceError):
        jwt.decode(access_token, key, algorithms=["RS256"], audience="https://search.example")


def test_joserfc_imports_the_key_set_and_verifies(
    metadata: dict[str, Any], access_token: str, vkyc: Integrator
) -> None:
    keys = KeySet.import_key_set(httpx.get(metadata["jwks_uri"], timeout=10).json())
    token = joserfc_jwt.decode(access_token, keys, algorithms=["RS256"])
    assert token.header["typ"] == "at+jwt"
    _registry(metadata["issuer"], AUDIENCE).validate(token.claims)
    assert token.claims["sub"] == vkyc.id


def test_joserfc_refuses_the_token_at_another_audience(
    metadata: dict[str, Any], access_token: str
) -> None:
    keys = KeySet.import_key_set(httpx.get(metadata["jwks_uri"], timeout=10).json())
    token = joserfc_jwt.decode(access_token, keys, algorithms=["RS256"])
    with pytest.raises(InvalidClaimError):
        _registry(metadata["issuer"], "https://search.example").validate(token.claims)


@pytest.mark.parametrize("client_type", [OAuth2Client, OAuth2Session], ids=["httpx", "requests"])
@pytest.mark.parametrize("method", ["client_secret_basic", "client_secret_post"])
def test_authlib_gets_a_token(
    client_type: Callable[..., Any], method: str, metadata: dict[str, Any], vkyc: Integrator
) -> None:
    assert method in metadata["token_endpoint_auth_methods_supported"]
    with client_type(
        vkyc.client_id, vkyc.client_secret, token_endpoint_auth_method=method, scope="ingest:write"
    ) as client:
        token = client.fetch_token(metadata["token_endpoint"], grant_type="client_credentials")
    assert token["token_type"] == "Bearer"
    assert token["scope"] == "ingest:write"
    assert time.time() < token["expires_at"] <= time.time() + 900


def test_authlib_validates_the_token_as_an_rfc_9068_resource_server(
    metadata: dict[str, Any], access_token: str
) -> None:
    validator = _validator(metadata, AUDIENCE)
    token = validator.authenticate_token(access_token)
    validator.validate_token(token, ["ingest:write"], None)
    assert token["service_user"] == "vkyc-prod"
    with pytest.raises(InsufficientScopeError):
        validator.validate_token(token, ["ingest:delete"], None)


def test_authlib_refuses_the_token_at_another_audience(
    metadata: dict[str, Any], access_token: str
) -> None:
    validator = _validator(metadata, "https://search.example")
    token = validator.authenticate_token(access_token)
    with pytest.raises(InvalidTokenError):
        validator.validate_token(token, ["ingest:write"], None)


def _registry(issuer: str, audience: str) -> joserfc_jwt.JWTClaimsRegistry:
    return joserfc_jwt.JWTClaimsRegistry(
        iss={"essential": True, "value": issuer},
        aud={"essential": True, "value": audience},
        exp={"essential": True},
        iat={"essential": True},
        jti={"essential": True},
    )


def _validator(metadata: dict[str, Any], audience: str) -> Any:
    class Validator(JWTBearerTokenValidator):
        # All that Authlib leaves to its users.
        def get_jwks(self) -> KeySet:
            return KeySet.import_key_set(httpx.get(metadata["jwks_uri"], timeout=10).json())

    return Validator(metadata["issuer"], audience)
