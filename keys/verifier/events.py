"""What a verifier reports: which keys it has loaded, and each call made with a verified token.

It must not send anything, nor let through what the authority would refuse for its form.
"""

import json
import re
import secrets
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Literal, TypeAlias

from .jwt import SignedClaims
from .strict import JSON, base64url_encode

Event: TypeAlias = dict[str, JSON]
Outcome: TypeAlias = Literal["success", "refused", "failed"]

MAX_KIDS = 64

_ACTION = re.compile(r"[a-z_]{1,32}\.[a-z_]{1,32}")
_NOT_PRINTABLE = re.compile(r"[^\x20-\x7e]")


def uuid7(now: float) -> str:
    """Return a UUIDv7 (RFC 9562 §5.7) of `now`, in seconds since the epoch."""
    milliseconds = int(now * 1000) & (1 << 48) - 1
    random = secrets.randbits(74)
    value = milliseconds << 80 | 7 << 76 | (random >> 62) << 64 | 2 << 62 | random & (1 << 62) - 1
    text = f"{value:032x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def jwks_loaded(instance: str, kids: Iterable[str], *, now: float) -> Event:
    """Return the event that `instance` holds these keys, and no others, at `now`."""
    return {
        "type": "jwks.loaded",
        "id": uuid7(now),
        "occurred_at": _rfc3339(now),
        "instance": instance,
        "kids": [*sorted(kids)[:MAX_KIDS]],
    }


def api_call(
    caller: SignedClaims,
    signature: str,
    *,
    action: str,
    resource: str,
    outcome: Outcome,
    request_id: str,
    client_address: str,
    user_agent: str,
    department: str,
    now: float,
) -> Event:
    """Return the event of one call. Texts are cut to length; what is not printable becomes `?`.

    `signature` is the token's third segment. With the digest of the other two it can be verified,
    but they cannot be turned back into a token. It stays here until the authority wants it.
    """
    return {
        "type": "api.call",
        "id": uuid7(now),
        "occurred_at": _rfc3339(now),
        "jti": caller.jti,
        "kid": caller.kid,
        "signing_input_sha256": base64url_encode(caller.signing_input_sha256),
        "action": checked_action(action),
        "resource": _printable(resource, 300),
        "outcome": outcome,
        "request_id": _printable(request_id, 128),
        "client_address": _printable(client_address, 64),
        "user_agent": _NOT_PRINTABLE.sub("?", user_agent[:200]),
        "department": _printable(department, 128),
        "signature": signature,
    }


def checked_action(action: str) -> str:
    """Return `action` if it is two lower-case words with a dot between; raise ValueError."""
    if not _ACTION.fullmatch(action):
        raise ValueError(f"action: expected two lower-case words, as document.read, found {action}")
    return action


def encode(event: Event) -> bytes:
    """Return the event as one line of JSON in UTF-8."""
    return json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode()


def _printable(text: str, characters: int) -> str:
    text = text[:characters]
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else "?" for character in text)


def _rfc3339(now: float) -> str:
    return datetime.fromtimestamp(now, UTC).isoformat(timespec="milliseconds")[:-6] + "Z"
