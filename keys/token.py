"""The one kind of token, written: an RFC 9068 access token as a compact JWS (RFC 7515 §7.1).

Decides nothing: what the claims say is the issuer's business, and reading is `keys.verifier`'s.
"""

import hashlib
from base64 import urlsafe_b64encode

import msgspec
from msgspec import UNSET, Struct, UnsetType


class Actor(Struct, frozen=True, kw_only=True):
    """Who minted the token by hand (RFC 8693 §4.1)."""

    sub: str


class Claims(Struct, frozen=True, kw_only=True):
    """The claims of RFC 9068 §2.2, and ours: `service_user` (its name) and `source_system`.

    A session of the console also has `sid` and `auth_time`: which sign-in it goes back to, and when
    that was (OpenID Connect Core §2, Front-Channel Logout §3).

    `iat` and `exp` are whole seconds since the epoch. Claims may be added, never changed.
    """

    iss: str
    sub: str
    client_id: str
    aud: str
    exp: int
    iat: int
    jti: str
    scope: str
    service_user: str
    source_system: str
    sid: str | UnsetType = UNSET
    auth_time: int | UnsetType = UNSET
    act: Actor | UnsetType = UNSET


class UnsignedToken(Struct, frozen=True, kw_only=True):
    """Header and claims, encoded; a signature makes it a token."""

    signing_input: bytes

    @property
    def sha256(self) -> bytes:
        """The digest that the audit record holds: 32 bytes, and no way back to the token."""
        return hashlib.sha256(self.signing_input).digest()

    def signed(self, signature: bytes) -> str:
        """Return the compact serialization."""
        return (self.signing_input + b"." + _base64url(signature)).decode("ascii")


def unsigned_token(kid: str, claims: Claims) -> UnsignedToken:
    """Encode the header, exactly alg, typ and kid, and the claims (RFC 7515 §5.1)."""
    header = b'{"alg":"RS256","typ":"at+jwt","kid":"%b"}' % kid.encode("ascii")
    payload = msgspec.json.encode(claims)
    return UnsignedToken(signing_input=_base64url(header) + b"." + _base64url(payload))


def _base64url(data: bytes) -> bytes:
    # RFC 7515 §2: without padding.
    return urlsafe_b64encode(data).rstrip(b"=")
