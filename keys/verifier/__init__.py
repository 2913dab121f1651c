"""Verify Privyseal's access tokens offline, and report what was done with them.

It must not import anything but the standard library, PyJWT and cryptography: services install
this package alone, as `privyseal_verifier`.
"""

from .jwk import InvalidJWKS, encode_jwks, parse_jwks, public_jwk, thumbprint
from .jwks_client import JWKSClient, KeysUnavailable, discover
from .jwt import InvalidToken, SignedClaims, UnknownKey, UnverifiedJWT, decode
from .middleware import BearerMiddleware, Refusal, describe, require_scope
from .reporter import Reporter
from .verifier import Verifier

__all__ = [
    "BearerMiddleware",
    "InvalidJWKS",
    "InvalidToken",
    "JWKSClient",
    "KeysUnavailable",
    "Refusal",
    "Reporter",
    "SignedClaims",
    "UnknownKey",
    "UnverifiedJWT",
    "Verifier",
    "decode",
    "describe",
    "discover",
    "encode_jwks",
    "parse_jwks",
    "public_jwk",
    "require_scope",
    "thumbprint",
]
