"""Public keys as JWK Sets (TRIALS J11).

It must not reach the network.
"""

import base64
import json
from collections.abc import Callable

import pytest
from cryptography.hazmat.primitives.asymmetric.rsa import (
    RSAPrivateKey,
    RSAPublicNumbers,
    generate_private_key,
)

from keys.verifier import InvalidJWKS, encode_jwks, parse_jwks, public_jwk, thumbprint
from keys.verifier.strict import base64url_encode

# RFC 7638 §3.1, the example and its thumbprint.
RFC7638_N = (
    "0vx7agoebGcQSuuPiLJXZptN9nndrQmbXEps2aiAFbWhM78LhWx4cbbfAAtVT86zwu1RK7aPFFxuhDR1L6tSoc_BJECP"
    "ebWKRXjBZCiFV4n3oknjhMstn64tZ_2W-5JsGY4Hc5n9yBXArwl93lqt7_RN5w6Cf0h4QyQ5v-65YGjQR0_FDW2QvzqY"
    "368QQMicAtaSqzs8KJZgnYb9c7d0zgdAZHzu6qMQvRL5hajrn1n91CbOpbISD08qNLyrdkt-bFTWhAI4vMQFh6WeZu0f"
    "M4lFd2NcRwr3XPksINHaQ-G_xBniIqbw0Ls1jF44-csFCur-kEgU8awapJzKnqDKgw"
)
RFC7638_KID = "NzbLsXh8uDCcd-6MNwXF4W_7noWXFZAfHkxZsRGC9Xs"


def _number(text: str) -> int:
    return int.from_bytes(base64.urlsafe_b64decode(text + "=="), "big")


def _weak_jwk(bits: int, e: int) -> dict[str, str]:
    def uint(value: int) -> str:
        return base64url_encode(value.to_bytes((value.bit_length() + 7) // 8, "big"))

    key = generate_private_key(e, bits).public_key()
    n = key.public_numbers().n
    kid = thumbprint(key)
    return {"kty": "RSA", "use": "sig", "alg": "RS256", "kid": kid, "n": uint(n), "e": uint(e)}


def test_kid_is_the_thumbprint_of_rfc_7638() -> None:
    assert thumbprint(RSAPublicNumbers(65537, _number(RFC7638_N)).public_key()) == RFC7638_KID


def test_j11_a_published_key_has_exactly_six_members(
    rsa_key: RSAPrivateKey, other_key: RSAPrivateKey
) -> None:
    public = [rsa_key.public_key(), other_key.public_key()]
    published = json.loads(encode_jwks(public))
    assert list(published) == ["keys"]
    for key, jwk in zip(public, published["keys"], strict=True):
        assert jwk == public_jwk(key)
        assert list(jwk) == ["kty", "use", "alg", "kid", "n", "e"]
        assert (jwk["kty"], jwk["use"], jwk["alg"], jwk["e"]) == ("RSA", "sig", "RS256", "AQAB")
        assert jwk["kid"] == thumbprint(key)
    assert dict(parse_jwks(encode_jwks(public))) == {thumbprint(key): key for key in public}


def test_j11_what_would_be_refused_is_not_published(rsa_key: RSAPrivateKey) -> None:
    public = rsa_key.public_key()
    with pytest.raises(InvalidJWKS, match="duplicate"):
        encode_jwks([public, public])
    with pytest.raises(InvalidJWKS, match="at least one key"):
        encode_jwks([])
    with pytest.raises(InvalidJWKS, match="2048 bits, found 1024"):
        encode_jwks([generate_private_key(65537, 1024).public_key()])
    with pytest.raises(InvalidJWKS, match="65537"):
        public_jwk(generate_private_key(3, 2048).public_key())


def test_unknown_members_are_ignored(rsa_key: RSAPrivateKey) -> None:
    jwk = public_jwk(rsa_key.public_key())
    body = json.dumps({"keys": [{**jwk, "x5t": "abc"}], "issuer": "somebody"}).encode()
    assert list(parse_jwks(body)) == [jwk["kid"]]
    del jwk["alg"]
    assert list(parse_jwks(json.dumps({"keys": [jwk]}).encode())) == [jwk["kid"]]


BAD_KEYS: dict[str, tuple[Callable[[dict[str, str]], object], str]] = {
    "2047 bits": (lambda jwk: _weak_jwk(2047, 65537), "2048 bits, found 2047"),
    "1024 bits": (lambda jwk: _weak_jwk(1024, 65537), "2048 bits, found 1024"),
    "e 3": (lambda jwk: _weak_jwk(2048, 3), "65537"),
    "e even": (lambda jwk: {**jwk, "e": "AQAA"}, "key 1"),
    "e 1": (lambda jwk: {**jwk, "e": "AQ"}, "key 1"),
    "e with leading zero": (lambda jwk: {**jwk, "e": "AAEAAQ"}, "e: expected a number without"),
    "n with leading zero": (
        lambda jwk: {**jwk, "n": base64url_encode(b"\0" + _number(jwk["n"]).to_bytes(256, "big"))},
        "n: expected a number without",
    ),
    "n padded": (lambda jwk: {**jwk, "n": jwk["n"] + "=="}, "n: expected base64url"),
    "n even": (lambda jwk: {**jwk, "n": base64url_encode(b"\xff" * 255 + b"\xfe")}, "key 1"),
    "n a number": (lambda jwk: {**jwk, "n": 7}, "n, a string"),
    "n empty": (lambda jwk: {**jwk, "n": ""}, "n: expected"),
    "no n": (lambda jwk: {k: v for k, v in jwk.items() if k != "n"}, "n, a string"),
    **{
        f"private {name}": (
            lambda jwk, name=name: {**jwk, name: "AQAB"},
            f"public key, found {name}",
        )
        for name in ("d", "p", "q", "dp", "dq", "qi", "oth", "k")
    },
    "symmetric": (lambda jwk: {"kty": "oct", "kid": "a"}, "kty RSA"),
    "elliptic": (lambda jwk: {**jwk, "kty": "EC"}, "kty RSA"),
    "use enc": (lambda jwk: {**jwk, "use": "enc"}, "use sig"),
    "no use": (lambda jwk: {k: v for k, v in jwk.items() if k != "use"}, "use sig"),
    "alg PS256": (lambda jwk: {**jwk, "alg": "PS256"}, "alg RS256"),
    "alg null": (lambda jwk: {**jwk, "alg": None}, "alg RS256"),
    "kid another": (lambda jwk: {**jwk, "kid": "2026-11"}, "thumbprint"),
    "no kid": (lambda jwk: {k: v for k, v in jwk.items() if k != "kid"}, "thumbprint"),
    "a string": (lambda jwk: "key", "an object"),
}


@pytest.mark.parametrize(("spoil", "reason"), BAD_KEYS.values(), ids=BAD_KEYS.keys())
def test_j11_one_bad_key_refuses_the_set(
    spoil: Callable[[dict[str, str]], object],
    reason: str,
    rsa_key: RSAPrivateKey,
    other_key: RSAPrivateKey,
) -> None:
    good, jwk = public_jwk(rsa_key.public_key()), public_jwk(other_key.public_key())
    with pytest.raises(InvalidJWKS, match=reason):
        parse_jwks(json.dumps({"keys": [good, spoil(jwk)]}).encode())


def test_j11_a_kid_comes_once_and_so_does_a_member(rsa_key: RSAPrivateKey) -> None:
    jwk = json.dumps(public_jwk(rsa_key.public_key()))
    with pytest.raises(InvalidJWKS, match="each kid once"):
        parse_jwks(f'{{"keys":[{jwk},{jwk}]}}'.encode())
    with pytest.raises(InvalidJWKS, match="each member once"):
        parse_jwks(f'{{"keys":[{jwk[:-1]},"use":"sig"}}]}}'.encode())
    with pytest.raises(InvalidJWKS, match="each member once"):
        parse_jwks(f'{{"keys":[{jwk}],"keys":[{jwk}]}}'.encode())


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b'{"keys":[]}',
        b'{"keys":{}}',
        b'{"keys":null}',
        b"<html>",
        b"\xff",
    ],
)
def test_what_is_no_set_of_keys_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidJWKS, match="JWKS: expected"):
        parse_jwks(body)
