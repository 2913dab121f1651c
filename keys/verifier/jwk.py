"""Public RSA keys as JWK and JWK Set (RFC 7517), named by their thumbprints (RFC 7638).

It must not touch private keys: it cannot write one, and refuses a set that holds one.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping

from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey, RSAPublicNumbers

from .strict import JSON, base64url_decode, base64url_encode, json_object

ALGORITHM = "RS256"
MIN_KEY_BITS = 2048
PUBLIC_EXPONENT = 65537

# RFC 7518 §6.3.2 and §6.4.1.
_PRIVATE_MEMBERS = frozenset({"d", "p", "q", "dp", "dq", "qi", "oth", "k"})


class InvalidJWKS(ValueError):
    """A key or a set of keys that must not be trusted or published; the text says why."""


def thumbprint(key: RSAPublicKey) -> str:
    """Return the key's `kid`: its SHA-256 JWK thumbprint in base64url (RFC 7638 §3)."""
    # RFC 7638 §3.2: required members only, in lexicographic order, without white space.
    required = json.dumps(_numbers(key), separators=(",", ":"), sort_keys=True)
    return base64url_encode(hashlib.sha256(required.encode("ascii")).digest())


def public_jwk(key: RSAPublicKey) -> dict[str, str]:
    """Return the JWK that is published: kty, use, alg, kid, n, e and nothing else.

    Raise InvalidJWKS for a key under 2048 bits or with an exponent other than 65537.
    """
    _check_strength(key)
    numbers = _numbers(key)
    return {
        "kty": numbers["kty"],
        "use": "sig",
        "alg": ALGORITHM,
        "kid": thumbprint(key),
        "n": numbers["n"],
        "e": numbers["e"],
    }


def encode_jwks(keys: Iterable[RSAPublicKey]) -> bytes:
    """Return the JWK Set (RFC 7517 §5) of these keys, in their order.

    Raise InvalidJWKS for what `parse_jwks` would refuse: no key, a weak key, one key twice.
    """
    published = [public_jwk(key) for key in keys]
    if not published:
        raise InvalidJWKS("expected at least one key, found none")
    if len({jwk["kid"] for jwk in published}) != len(published):
        raise InvalidJWKS("expected each key once, found a duplicate kid")
    return json.dumps({"keys": published}, separators=(",", ":")).encode("ascii")


def parse_jwks(body: bytes) -> Mapping[str, RSAPublicKey]:
    """Return the keys of a JWK Set by `kid`; raise InvalidJWKS if any single one is not fit.

    One bad key refuses the whole set: a Privyseal authority publishes only RSA keys of at least
    2048 bits for RS256 signatures, each under its RFC 7638 thumbprint. Unknown members of a key
    or of the set are ignored (RFC 7517 §4, §5).
    """
    try:
        listed = json_object(body).get("keys")
    except ValueError as error:
        raise InvalidJWKS(f"JWKS: {error}") from None
    if not isinstance(listed, list) or not listed:
        raise InvalidJWKS("JWKS: expected keys, a list of at least one key")
    keys: dict[str, RSAPublicKey] = {}
    for index, jwk in enumerate(listed):
        kid, key = _parse_jwk(jwk, f"JWKS: key {index}")
        if kid in keys:
            raise InvalidJWKS(f"JWKS: key {index}: expected each kid once, found a duplicate")
        keys[kid] = key
    return keys


def _parse_jwk(jwk: JSON, where: str) -> tuple[str, RSAPublicKey]:
    if not isinstance(jwk, dict):
        raise InvalidJWKS(f"{where}: expected an object")
    if private := _PRIVATE_MEMBERS & jwk.keys():
        raise InvalidJWKS(f"{where}: expected a public key, found {', '.join(sorted(private))}")
    if jwk.get("kty") != "RSA":
        raise InvalidJWKS(f"{where}: expected kty RSA")
    if jwk.get("use") != "sig":
        raise InvalidJWKS(f"{where}: expected use sig")
    if jwk.get("alg", ALGORITHM) != ALGORITHM:
        raise InvalidJWKS(f"{where}: expected alg {ALGORITHM}")
    modulus, exponent = _integer(jwk, "n", where), _integer(jwk, "e", where)
    try:
        key = RSAPublicNumbers(exponent, modulus).public_key()
        _check_strength(key)
    except ValueError as error:
        raise InvalidJWKS(f"{where}: {error}") from None
    kid = thumbprint(key)
    if jwk.get("kid") != kid:
        raise InvalidJWKS(f"{where}: expected kid {kid}, its RFC 7638 thumbprint")
    return kid, key


def _integer(jwk: dict[str, JSON], name: str, where: str) -> int:
    text = jwk.get(name)
    if not isinstance(text, str):
        raise InvalidJWKS(f"{where}: expected {name}, a string")
    try:
        data = base64url_decode(text)
    except ValueError as error:
        raise InvalidJWKS(f"{where}: {name}: {error}") from None
    # RFC 7518 §2: the minimum number of octets.
    if data[:1] in (b"", b"\0"):
        raise InvalidJWKS(f"{where}: {name}: expected a number without leading zero octets")
    return int.from_bytes(data, "big")


def _check_strength(key: RSAPublicKey) -> None:
    if key.key_size < MIN_KEY_BITS:
        raise InvalidJWKS(f"expected an RSA key of {MIN_KEY_BITS} bits, found {key.key_size}")
    if key.public_numbers().e != PUBLIC_EXPONENT:
        raise InvalidJWKS(f"expected the public exponent {PUBLIC_EXPONENT}, found another")


def _numbers(key: RSAPublicKey) -> dict[str, str]:
    numbers = key.public_numbers()
    return {"e": _base64url_uint(numbers.e), "kty": "RSA", "n": _base64url_uint(numbers.n)}


def _base64url_uint(value: int) -> str:
    return base64url_encode(value.to_bytes((value.bit_length() + 7) // 8, "big"))
