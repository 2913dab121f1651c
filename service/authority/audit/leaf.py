"""The canonical bytes of an audit record: what the Merkle tree hashes. Version 1.

Decides nothing about a record, and holds nothing personal: that enters as its salted digest.

The encoding is a JSON object by the rules of RFC 8785 (JCS), in UTF-8: members sorted by name, no
white space, the shortest escapes, every member always present. `deploy/decisions/
audit-log-encoding.md` lists the members and is enough to write another implementation.
"""

from collections.abc import Sequence
from typing import Any, Final, Literal, cast
from uuid import UUID

import msgspec
from msgspec import Struct

# RFC 8785 §3.2.2.3: a JSON number is a double, and integers are exact only up to here.
MAX_INTEGER: Final = 2**53 - 1

# Sorts what is in `details` by code point: for ASCII names the order of RFC 8785 §3.2.3, which
# compares UTF-16 code units. The members of `Leaf` itself it takes as they are declared.
_encode = msgspec.json.Encoder(order="deterministic").encode


class NotEncodable(ValueError):
    """`details` holds what has no canonical form: a float, a huge integer, a non-ASCII name."""


class Leaf(Struct, frozen=True, kw_only=True):
    """A row of `audit_records`, all of it.

    `recorded_at` and `occurred_at` are microseconds since the epoch, `iat` and `exp` seconds.
    `commit_order` is in decimal digits: it passes 2^53. Digests are 32 bytes, in base64 when
    encoded. `details` is the object as it is read back from the store, not as it was written.
    """

    # In the order of RFC 8785: declaring them sorted is twice as fast as having them sorted.

    action: str
    actor: str | None
    actor_credential_id: str | None
    actor_id: str | None
    aud: str | None
    commit_order: str
    credential_id: str | None
    details: dict[str, Any]
    exp: int | None
    iat: int | None
    id: UUID
    jti: UUID | None
    kid: str | None
    occurred_at: int | None
    outcome: str
    personal_sha256: bytes | None
    reason: str | None
    recorded_at: int
    repeats: int
    request_id: str
    scope: str | None
    service_user: str | None
    service_user_id: str | None
    signing_input_sha256: bytes | None
    source_system: str | None
    v: Literal[1] = 1
    version: int | None

    def encode(self) -> bytes:
        """Return the canonical bytes; raise NotEncodable."""
        if self.details:
            require_encodable(self.details)
        return _encode(self)


def require_encodable(value: object) -> None:
    """Return if `value` has one canonical form; raise NotEncodable otherwise.

    It may hold objects with ASCII names, arrays, strings, integers up to ±(2^53 − 1), booleans and
    null. Whoever writes `details` asks before it is committed: a record that cannot be encoded
    would stop the log.
    """
    if isinstance(value, str) or value is None or value is True or value is False:
        return
    if isinstance(value, int):
        if abs(value) > MAX_INTEGER:
            raise NotEncodable("an integer beyond 2^53 - 1 must be written as a string")
    elif isinstance(value, dict):
        for name, member in cast("dict[object, object]", value).items():
            if not isinstance(name, str) or not name.isascii():
                raise NotEncodable("a name must be an ASCII string")
            require_encodable(member)
    elif isinstance(value, list | tuple):
        for item in cast("Sequence[object]", value):
            require_encodable(item)
    else:
        raise NotEncodable(f"{type(value).__name__} has no canonical form")
