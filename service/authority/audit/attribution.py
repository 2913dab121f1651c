"""Whose token a reported call was made with, and what a token that is on no record proves.

Believes a reporter nothing that would accuse a key: for that it takes a signature of that key.
"""

import asyncio
from collections.abc import Collection, Mapping, Sequence
from enum import Enum, auto
from typing import Protocol
from uuid import UUID

from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from msgspec import Struct

from keys.proof import is_signed
from keys.verifier.strict import base64url_decode
from service.authority.audit.reported import ApiCall


class IssuedToken(Struct, frozen=True, kw_only=True):
    """A token on record, and to whom it was issued."""

    jti: UUID
    service_user_id: str
    service_user: str
    source_system: str
    credential_id: str | None
    kid: str
    aud: str
    signing_input_sha256: bytes


class KnownKey(Struct, frozen=True, kw_only=True):
    """The public half of a key in whatever state, and when it began to sign (None: it never did);
    seconds since the epoch."""

    public_key: RSAPublicKey
    activated_at: float | None


class TokenRecords(Protocol):
    """What is on record of tokens and keys. Each method raises StoreUnavailable."""

    async def issued(self, jtis: Collection[UUID]) -> Mapping[UUID, IssuedToken]:
        """Return those of these tokens that are on record, minted ones too."""
        ...

    async def issued_digests(self, digests: Collection[bytes]) -> frozenset[bytes]:
        """Return those of these digests that are of a token on record."""
        ...

    async def known_keys(self, kids: Collection[str]) -> Mapping[str, KnownKey]:
        """Return those of these keys that are or were ours."""
        ...

    async def kept_since(self) -> float:
        """Return the time (seconds since the epoch) from which on no record was archived, or lost
        with a database that was restored."""
        ...


class TokenStanding(Enum):
    """What the log says of the token behind a reported call."""

    ISSUED = auto()
    SIGNATURE_WANTED = auto()
    """Not the token of that record, or no record: only its signature can tell more."""
    UNKNOWN = auto()
    """A claim: no key of ours signed this, or the reporter misnames a token that was issued."""
    FORGED = auto()
    """Signed by a key of ours, and never issued: the key is in other hands."""
    UNVERIFIABLE = auto()
    """The same, but the record of its issuance may have been archived, or lost with a restore."""


class Attributed(Struct, frozen=True, kw_only=True):
    """The standing of a token, the issuance that has its `jti`, and why it stands so."""

    standing: TokenStanding
    issued: IssuedToken | None = None
    reason: str | None = None


async def find(
    calls: Sequence[ApiCall], tokens: TokenRecords, *, issued_since: float = 0.0
) -> list[Attributed]:
    """Return what is to be said of each call, in order; raise StoreUnavailable.

    `issued_since` (seconds since the epoch): none of these tokens can be older, whatever is
    reported of it, because what it says itself was verified.
    """
    if not calls:
        return []
    issued = await tokens.issued({call.jti for call in calls})
    findings = [_compared(call, issued.get(call.jti)) for call in calls]
    suspects = [
        place
        for place, (call, finding) in enumerate(zip(calls, findings, strict=True))
        if finding.standing is TokenStanding.SIGNATURE_WANTED and call.signature is not None
    ]
    if suspects:
        examined = await _examined(
            [calls[place] for place in suspects], issued, tokens, issued_since
        )
        for place, finding in zip(suspects, examined, strict=True):
            findings[place] = finding
    return findings


def digest(call: ApiCall) -> bytes:
    """Return the reported SHA-256 of the token's signing input: 32 bytes."""
    return base64url_decode(call.signing_input_sha256)


def _compared(call: ApiCall, issued: IssuedToken | None) -> Attributed:
    if issued is not None and issued.signing_input_sha256 == digest(call):
        return Attributed(standing=TokenStanding.ISSUED, issued=issued)
    return Attributed(standing=TokenStanding.SIGNATURE_WANTED, issued=issued)


async def _examined(
    calls: Sequence[ApiCall],
    issued: Mapping[UUID, IssuedToken],
    tokens: TokenRecords,
    issued_since: float,
) -> list[Attributed]:
    keys = await tokens.known_keys({call.kid for call in calls})
    # Each takes the time of an RSA verification, and there may be a thousand.
    signed = await asyncio.to_thread(lambda: [_is_signed(call, keys) for call in calls])
    digests = {digest(call) for call, ours in zip(calls, signed, strict=True) if ours}
    issued_digests = await tokens.issued_digests(digests) if digests else frozenset[bytes]()
    kept_since = await tokens.kept_since() if digests else 0.0
    return [
        _judged(
            issued.get(call.jti),
            key=keys[call.kid] if ours else None,
            was_issued=digest(call) in issued_digests,
            issued_since=issued_since,
            kept_since=kept_since,
        )
        for call, ours in zip(calls, signed, strict=True)
    ]


def _is_signed(call: ApiCall, keys: Mapping[str, KnownKey]) -> bool:
    if (key := keys.get(call.kid)) is None or call.signature is None:
        return False
    try:
        signature = base64url_decode(call.signature)
    except ValueError:
        return False
    return is_signed(digest(call), signature, key.public_key)


def _judged(
    issued: IssuedToken | None,
    *,
    key: KnownKey | None,
    was_issued: bool,
    issued_since: float,
    kept_since: float,
) -> Attributed:
    """Judge a token that is not the one on record under its `jti`; `key` is whose signature
    verified, None if none did."""
    if key is None:
        return Attributed(standing=TokenStanding.UNKNOWN, reason="not_signed_here")
    if was_issued:
        # Whoever has a real token could call it by another jti, to have its key revoked.
        return Attributed(standing=TokenStanding.UNKNOWN, reason="digest_of_another_token")
    if key.activated_at is not None and max(key.activated_at, issued_since) < kept_since:
        return Attributed(standing=TokenStanding.UNVERIFIABLE, reason="records_gone")
    reason = "never_issued" if issued is None else "differs_from_its_record"
    return Attributed(standing=TokenStanding.FORGED, issued=issued, reason=reason)
