"""The verifier as a service uses it: discovery, several issuers, both ways of calling.

It must not reach beyond loopback.
"""

import json
from collections.abc import Callable, Mapping
from typing import TypeAlias

import pytest
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

from keys.verifier import InvalidToken, KeysUnavailable, Verifier, encode_jwks

Claims: TypeAlias = dict[str, object]
Sign: TypeAlias = Callable[..., str]
Serve: TypeAlias = Callable[[Mapping[str, bytes]], str]

NOW = 1_800_000_000
AUDIENCE = "https://ingest.example.com"

pytestmark = pytest.mark.anyio


def _clock() -> float:
    return NOW


@pytest.fixture
def issuer(serve: Serve, rsa_key: RSAPrivateKey) -> str:
    """An issuer that can be discovered, with the genuine key."""
    documents: dict[str, bytes] = {"/keys": encode_jwks([rsa_key.public_key()])}
    origin = serve(documents)
    metadata = {"issuer": origin, "jwks_uri": f"{origin}/keys"}
    documents["/.well-known/oauth-authorization-server"] = json.dumps(metadata).encode()
    return origin


async def test_keys_are_discovered_from_the_issuer(issuer: str, claims: Claims, sign: Sign) -> None:
    verifier = Verifier(issuer, AUDIENCE, clock=_clock)
    token = sign({**claims, "iss": issuer})
    assert verifier.verify(token).source_system == "vkyc"
    assert (await verifier.verify_async(token)).service_user == "vkyc-prod"
    assert verifier.stats()[issuer]["fetches"] == 1


async def test_keys_may_come_from_another_host_than_the_issuers(
    issuer: str, claims: Claims, sign: Sign
) -> None:
    verifier = Verifier("https://tokens.example.com", AUDIENCE, f"{issuer}/keys", clock=_clock)
    assert verifier.verify(sign(claims)).iss == "https://tokens.example.com"


async def test_j10_each_issuer_is_believed_on_its_own_terms_alone(
    serve: Serve, issuer: str, claims: Claims, sign: Sign, other_key: RSAPrivateKey
) -> None:
    staging_keys = serve({"/keys": encode_jwks([other_key.public_key()])}) + "/keys"
    production = Verifier(issuer, AUDIENCE, f"{issuer}/keys", clock=_clock)
    staging = Verifier("https://staging.example.com", "staging", staging_keys, clock=_clock)
    both = Verifier.any_of(production, staging)
    assert both.issuers == {issuer, "https://staging.example.com"}

    ours = {**claims, "iss": issuer}
    theirs = {**claims, "iss": "https://staging.example.com", "aud": "staging"}
    assert both.verify(sign(ours)).iss == issuer
    assert both.verify(sign(theirs, key=other_key)).iss == "https://staging.example.com"
    for token, reason in (
        (sign(ours, key=other_key), "kid: .* published keys"),
        (sign(theirs), "kid: .* published keys"),
        (sign({**theirs, "aud": AUDIENCE}, key=other_key), "aud: expected 'staging'"),
        (sign({**ours, "aud": "staging"}), f"aud: expected '{AUDIENCE}'"),
        (sign({**ours, "iss": "https://tokens.example.com"}), "iss: expected 'http.* or 'https"),
        (sign({**ours, "iss": [issuer]}), "iss: expected .* found a list"),
        (sign({**ours, "iss": ...}), "iss: expected .* found nothing"),
    ):
        with pytest.raises(InvalidToken, match=reason):
            both.verify(token)
        with pytest.raises(InvalidToken, match=reason):
            await both.verify_async(token)


async def test_nothing_is_fetched_for_a_token_of_somebody_else(claims: Claims, sign: Sign) -> None:
    verifier = Verifier("https://tokens.example.com", AUDIENCE, clock=_clock)
    for iss in ("https://other.example.com", ...):
        with pytest.raises(InvalidToken, match="iss: expected"):
            verifier.verify(sign({**claims, "iss": iss}))
    assert verifier.stats()["https://tokens.example.com"]["fetches"] == 0


async def test_without_keys_nothing_is_verified(serve: Serve, claims: Claims, sign: Sign) -> None:
    verifier = Verifier("https://tokens.example.com", AUDIENCE, serve({}) + "/keys", clock=_clock)
    with pytest.raises(KeysUnavailable, match="found 404"):
        verifier.verify(sign(claims))
    with pytest.raises(KeysUnavailable):
        await verifier.verify_async(sign(claims))


@pytest.mark.parametrize(
    "issuer",
    [
        *("https://tokens.example.com/", "https://tokens.example.com/a", "https://t.example?x=1"),
        *("http://tokens.example.com", "tokens.example.com", "HTTPS://tokens.example.com", ""),
        *("https://tokens.example.com?", "https://tokens.example.com#"),
    ],
)
async def test_an_issuer_is_an_origin(issuer: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        Verifier(issuer, AUDIENCE)


async def test_settings_that_make_no_sense_are_refused() -> None:
    issuer = "https://tokens.example.com"
    with pytest.raises(ValueError, match="audience"):
        Verifier(issuer, "")
    with pytest.raises(ValueError, match="skew"):
        Verifier(issuer, AUDIENCE, skew=-1)
    with pytest.raises(ValueError, match="skew"):
        Verifier(issuer, AUDIENCE, skew=float("nan"))
    with pytest.raises(ValueError, match="max_lifetime"):
        Verifier(issuer, AUDIENCE, max_lifetime=0)
    with pytest.raises(ValueError, match="expected an https URL"):
        Verifier(issuer, AUDIENCE, "")
    with pytest.raises(ValueError, match="different issuers"):
        Verifier.any_of(Verifier(issuer, "a"), Verifier(issuer, "b"))
    with pytest.raises(ValueError, match="different issuers"):
        Verifier.any_of()
