"""The one kind of access token that Privyseal issues (RFC 9068), read and checked.

It must not reach for the network, a clock or a file: keys and time are handed in.
"""

import base64
import contextlib
import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from jwt.algorithms import RSAAlgorithm

from .jwk import ALGORITHM
from .strict import JSON, base64url_decode, json_object

MAX_TOKEN_BYTES = 8192
MAX_FOREIGN_TOKEN_BYTES = 65_536
TOKEN_TYPE = "at+jwt"  # RFC 9068 §2.1  # noqa: S105
DEFAULT_SKEW = 60.0
MAX_LIFETIME = 3600

_HEADER_MEMBERS = frozenset({"alg", "typ", "kid"})
_MAX_KID_CHARACTERS = 64
_SHOWN_CHARACTERS = 64
_RS256 = RSAAlgorithm(RSAAlgorithm.SHA256)
ABSENT: Final = object()

# RFC 6750 §3: what an error_description may hold.
_NOT_DESCRIPTION = re.compile(r"[^\x20-\x21\x23-\x5b\x5d-\x7e]")
# RFC 6749 §3.3: scope-tokens separated by single spaces.
_SCOPE = re.compile(r"(?:[\x21\x23-\x5b\x5d-\x7e]+(?: [\x21\x23-\x5b\x5d-\x7e]+)*)?")
_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")


class InvalidToken(Exception):
    """A token that is not accepted; the text names what was expected and what was found.

    The text never holds the token, and only characters that an `error_description` may hold
    (RFC 6750 §3).
    """

    def __init__(self, reason: str) -> None:
        super().__init__(describable(reason))


class UnknownKey(InvalidToken):
    """The token names a key that is not among the keys at hand; they may have changed since."""


class ExpiredToken(InvalidToken):
    """The token has ended. Its signature, issuer and audience are those that were expected."""


def describable(text: str) -> str:
    """Return `text` with `?` for each character that RFC 6750 §3 keeps out of a description."""
    return _NOT_DESCRIPTION.sub("?", text)


def shown(value: object) -> str:
    """Return how a refusal names what it found: short, and `nothing` for ABSENT."""
    match value:
        case str() if len(value) > _SHOWN_CHARACTERS:
            return f"'{value[:_SHOWN_CHARACTERS]}' and more"
        case str():
            return f"'{value}'"
        case bool():
            return "true" if value else "false"
        case int() | float():
            return str(value)
        case list():
            return "a list"
        case dict():
            return "an object"
        case None:
            return "null"
        case _:
            return "nothing"


@dataclass(frozen=True, slots=True, kw_only=True)
class UnverifiedJWT:
    """A well-formed token whose signature nobody has checked: trust nothing in it."""

    kid: str
    unverified_claims: Mapping[str, JSON]
    signing_input: bytes = field(repr=False)
    signature: bytes = field(repr=False)

    @property
    def unverified_iss(self) -> str | None:
        """The claimed issuer, only good for choosing whose keys to check with."""
        iss = self.unverified_claims.get("iss")
        return iss if isinstance(iss, str) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class SignedClaims:
    """What a checked token says; times in seconds since the epoch.

    `sub` (equal to `client_id`) is the service user's id and `service_user` its name; `act_sub`
    is who minted the token by hand, if somebody did. `claims` holds every claim as it came.
    """

    iss: str
    sub: str
    client_id: str
    aud: str
    exp: int
    iat: int
    jti: str
    scope: frozenset[str]
    service_user: str
    source_system: str
    act_sub: str | None
    kid: str
    signing_input_sha256: bytes
    claims: Mapping[str, JSON]


def decode(
    token: str,
    keys: Mapping[str, RSAPublicKey],
    *,
    issuer: str,
    audience: str,
    now: float,
    skew: float = DEFAULT_SKEW,
    max_lifetime: int = MAX_LIFETIME,
) -> SignedClaims:
    """Return what `token` says, or raise InvalidToken.

    `keys` are the issuer's, by `kid`; `now` is in seconds since the epoch; `skew`, in seconds,
    forgives clocks that differ; a lifetime above `max_lifetime` seconds is refused.
    """
    return verify(
        parse(token),
        keys,
        issuer=issuer,
        audience=audience,
        now=now,
        skew=skew,
        max_lifetime=max_lifetime,
    )


def parse(token: str) -> UnverifiedJWT:
    """Read a compact JWS (RFC 7515 §7.1) in its one spelling; raise InvalidToken for any other.

    The header has exactly `alg`, `typ` and `kid`, so that nothing in a token can name a key of
    its own (`jwk`, `jku`, `x5c`, `x5u`) or change how it is read (`crit`, `b64`, `zip`).
    """
    if len(token) > MAX_TOKEN_BYTES:
        raise InvalidToken(f"expected at most {MAX_TOKEN_BYTES} characters, found {len(token)}")
    segments = token.split(".")
    if len(segments) != 3:
        raise InvalidToken(f"expected three segments, found {len(segments)}")
    encoded_header, encoded_claims, encoded_signature = segments
    kid = _kid(_object("header", encoded_header))
    return UnverifiedJWT(
        kid=kid,
        unverified_claims=MappingProxyType(_object("claims", encoded_claims)),
        signing_input=f"{encoded_header}.{encoded_claims}".encode("ascii"),
        signature=_segment("signature", encoded_signature),
    )


def claimed_issuers(token: str) -> frozenset[str]:
    """Return every `iss` that somebody might read out of `token`, well-formed or not.

    For a token that another issuer made in its own way and that is verified elsewhere. Raise
    InvalidToken above 64 KiB.
    """
    if len(token) > MAX_FOREIGN_TOKEN_BYTES:
        raise InvalidToken(
            f"expected at most {MAX_FOREIGN_TOKEN_BYTES} characters, found {len(token)}"
        )
    issuers: set[str] = set()

    def collect(pairs: list[tuple[str, object]]) -> None:
        issuers.update(value for name, value in pairs if name == "iss" and isinstance(value, str))

    for segment in token.split(".")[1:2]:
        with contextlib.suppress(ValueError, RecursionError):
            data = base64.urlsafe_b64decode(segment + "==")
            json.loads(data, object_pairs_hook=collect)
    return frozenset(issuers)


def verify(
    unverified_jwt: UnverifiedJWT,
    keys: Mapping[str, RSAPublicKey],
    *,
    issuer: str,
    audience: str,
    now: float,
    skew: float = DEFAULT_SKEW,
    max_lifetime: int = MAX_LIFETIME,
) -> SignedClaims:
    """Check the signature, then every claim, as `decode` does for a token not yet parsed."""
    _check_signature(unverified_jwt, keys)
    claims = unverified_jwt.unverified_claims
    _check_equal(claims, "iss", issuer)
    _check_equal(claims, "aud", audience)
    iat, exp = _check_times(claims, now=now, skew=skew, max_lifetime=max_lifetime)
    sub = _text(claims, "sub")
    _check_equal(claims, "client_id", sub)
    return SignedClaims(
        iss=issuer,
        sub=sub,
        client_id=sub,
        aud=audience,
        exp=exp,
        iat=iat,
        jti=_matching(claims, "jti", _UUID, "a lower-case UUID"),
        scope=_scope(claims),
        service_user=_text(claims, "service_user"),
        source_system=_text(claims, "source_system"),
        act_sub=_act_sub(claims),
        kid=unverified_jwt.kid,
        signing_input_sha256=hashlib.sha256(unverified_jwt.signing_input).digest(),
        claims=claims,
    )


def _segment(name: str, text: str) -> bytes:
    try:
        return base64url_decode(text)
    except ValueError as error:
        raise InvalidToken(f"{name}: {error}") from None


def _object(name: str, text: str) -> dict[str, JSON]:
    data = _segment(name, text)
    try:
        return json_object(data)
    except ValueError as error:
        raise InvalidToken(f"{name}: {error}") from None


def _kid(header: dict[str, JSON]) -> str:
    if header.keys() != _HEADER_MEMBERS:
        found = shown(", ".join(sorted(header)))
        raise InvalidToken(f"header: expected exactly alg, kid, typ, found {found}")
    _check_equal(header, "alg", ALGORITHM)
    _check_equal(header, "typ", TOKEN_TYPE)
    kid = _text(header, "kid")
    if len(kid) > _MAX_KID_CHARACTERS:
        raise InvalidToken(f"kid: expected at most {_MAX_KID_CHARACTERS} characters")
    return kid


def _check_signature(unverified_jwt: UnverifiedJWT, keys: Mapping[str, RSAPublicKey]) -> None:
    key = keys.get(unverified_jwt.kid)
    if key is None:
        found = shown(unverified_jwt.kid)
        raise UnknownKey(f"kid: expected one of the issuer's published keys, found {found}")
    # RFC 8017 §8.2.2: a signature of another length, or not below the modulus, does not verify.
    if not _RS256.verify(unverified_jwt.signing_input, key, unverified_jwt.signature):
        raise InvalidToken(f"signature: expected one by key {unverified_jwt.kid}, found another")


def _check_times(
    claims: Mapping[str, JSON], *, now: float, skew: float, max_lifetime: int
) -> tuple[int, int]:
    iat, exp = _time(claims, "iat"), _time(claims, "exp")
    if exp <= iat:
        raise InvalidToken(f"exp: expected a time after iat {iat}, found {exp}")
    if exp - iat > max_lifetime:
        raise InvalidToken(
            f"exp: expected a lifetime of at most {max_lifetime} s, found {exp - iat} s"
        )
    if iat > now + skew:
        raise InvalidToken(f"iat: expected a time until {math.floor(now + skew)}, found {iat}")
    if exp <= now - skew:
        raise ExpiredToken(f"exp: expected a time after {math.floor(now - skew)}, found {exp}")
    # RFC 7519 §4.1.5: whoever finds an nbf must heed it.
    if "nbf" in claims and (nbf := _time(claims, "nbf")) > now + skew:
        raise InvalidToken(f"nbf: expected a time until {math.floor(now + skew)}, found {nbf}")
    return iat, exp


def _time(claims: Mapping[str, JSON], name: str) -> int:
    value = claims.get(name, ABSENT)
    # bool is an int in Python, and no time.
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidToken(f"{name}: expected whole seconds since 1970, found {shown(value)}")
    return value


def _check_equal(members: Mapping[str, JSON], name: str, expected: str) -> None:
    value = members.get(name, ABSENT)
    if value != expected:
        raise InvalidToken(f"{name}: expected {shown(expected)}, found {shown(value)}")


def _text(members: Mapping[str, JSON], name: str, *, named: str = "") -> str:
    value = members.get(name, ABSENT)
    if not isinstance(value, str) or not value or not value.isprintable():
        raise InvalidToken(f"{named or name}: expected printable text, found {shown(value)}")
    return value


def _matching(
    claims: Mapping[str, JSON], name: str, pattern: re.Pattern[str], expected: str
) -> str:
    value = claims.get(name, ABSENT)
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise InvalidToken(f"{name}: expected {expected}, found {shown(value)}")
    return value


def _scope(claims: Mapping[str, JSON]) -> frozenset[str]:
    return frozenset(_matching(claims, "scope", _SCOPE, "scopes between single spaces").split())


def _act_sub(claims: Mapping[str, JSON]) -> str | None:
    if "act" not in claims:
        return None
    act = claims["act"]
    # RFC 8693 §4.1.
    if not isinstance(act, dict):
        raise InvalidToken(f"act: expected an object with sub, found {shown(act)}")
    return _text(act, "sub", named="act: sub")
