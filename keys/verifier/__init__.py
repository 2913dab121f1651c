"""Verify Privyseal's access tokens offline, with nothing but the issuer's published keys.

It must not import anything but the standard library, PyJWT and cryptography: services install
this package alone, as `privyseal_verifier`.
"""

from .jwk import InvalidJWKS, encode_jwks, parse_jwks, public_jwk, thumbprint
from .jwks_client import JWKSClient, KeysUnavailable, discover
from .jwt import InvalidToken, SignedClaims, UnverifiedJWT, decode
from .middleware import BearerMiddleware, Refusal, require_scope
from .verifier import Verifier

__all__ = [
    "BearerMiddleware",
    "InvalidJWKS",
    "InvalidToken",
    "JWKSClient",
    "KeysUnavailable",
    "Refusal",
    "SignedClaims",
    "UnverifiedJWT",
    "Verifier",
    "decode",
    "discover",
    "encode_jwks",
    "parse_jwks",
    "public_jwk",
    "require_scope",
    "thumbprint",
]
