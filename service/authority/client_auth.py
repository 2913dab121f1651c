"""Client authentication (RFC 6749 §2.3): from a presented credential to a `Principal`.

Reads nothing and records nothing: it judges what the store said of one `client_id`.
"""

import hashlib
import hmac
import secrets
from datetime import UTC, datetime
from typing import Final

from keys.client_secret import base62, checksum
from keys.secret import Secret
from service.authority.errors import OAuthError, OAuthErrorCode
from service.authority.model import Principal, Status, Subject

_NO_SECRET: Final = bytes(32)


def new_secret() -> Secret:
    """Return `pvs_`, 256 random bits and their CRC-32, in base62."""
    random = base62(secrets.randbits(256), 43)
    return Secret(f"pvs_{random}{checksum(random)}")


def new_code() -> Secret:
    """Return 256 random bits in base62: what opens a hand-over, once, and nothing else."""
    return Secret(base62(secrets.randbits(256), 43))


def secret_sha256(secret: Secret) -> bytes:
    """Return what is stored of a secret. 256 random bits need no slow hash."""
    return hashlib.sha256(secret.reveal().encode("utf-8", "surrogatepass")).digest()


def authenticate(subject: Subject, client_secret: Secret, now: float) -> Principal:
    """Return who this is; raise OAuthError(invalid_client).

    An unknown client, a wrong secret and a revoked credential get the same words in the same
    time. Whoever holds the right secret may know why it does not help: it ended or is held, or its
    service user is disabled, and whom to ask.
    """
    presented = secret_sha256(client_secret)
    found = None
    # No early end: the time must not tell which credential it was, or whether there is one.
    for credential in subject.credentials:
        if hmac.compare_digest(presented, credential.secret_sha256):
            found = credential
    if not subject.credentials:
        hmac.compare_digest(presented, _NO_SECRET)

    user = subject.service_user
    if user is None:
        raise _unknown("unknown_client")
    if found is None:
        raise _unknown("wrong_secret")
    if found.revoked_at is not None:
        raise _unknown("revoked_credential")
    if user.status is not Status.ACTIVE:
        raise OAuthError(
            OAuthErrorCode.INVALID_CLIENT,
            f"The service user {user.name} is disabled. Ask {user.contact or user.owner}.",
            reason="service_user_disabled",
        )
    if found.has_ended(now):
        ended = found.expires_at.astimezone(UTC)
        raise OAuthError(
            OAuthErrorCode.INVALID_CLIENT,
            f"This credential ended on {_date(ended)}. Ask {user.contact or user.owner} for a "
            "new one.",
            reason="credential_expired",
        )
    if not found.is_live(now):
        raise OAuthError(
            OAuthErrorCode.INVALID_CLIENT,
            "This credential is held after a restore until an operator confirms it. Ask "
            f"{user.contact or user.owner}.",
            reason="credential_held",
        )
    return Principal(service_user=user, credential=found)


def _unknown(reason: str) -> OAuthError:
    return OAuthError(
        OAuthErrorCode.INVALID_CLIENT,
        "Unknown client, or a client secret that is not one of its own.",
        reason=reason,
    )


def _date(at: datetime) -> str:
    return at.strftime("%Y-%m-%d %H:%M UTC")
