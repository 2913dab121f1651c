"""What is on record: the form of a record, what it may be about, and how it is looked for.

Writes nothing: `log.py` does.
"""

import hashlib
import os
from collections.abc import Sequence
from datetime import datetime
from enum import StrEnum
from typing import Any, Final, Protocol
from uuid import UUID

import msgspec
import uuid_utils
from msgspec import Struct

from service.authority.audit.leaf import require_encodable
from service.authority.model import ClientAddress


class Action(StrEnum):
    """What was done or tried here: every record has exactly one action.

    What other services report to have done has a name of theirs, whose first word is none of these.
    """

    TOKEN_ISSUE = "token.issue"  # noqa: S105
    TOKEN_MINT = "token.mint"  # noqa: S105
    TOKEN_END_SESSION = "token.end_session"  # noqa: S105
    SERVICE_USER_CREATE = "service_user.create"
    SERVICE_USER_LIST = "service_user.list"
    SERVICE_USER_READ = "service_user.read"
    SERVICE_USER_CHANGE = "service_user.change"
    SERVICE_USER_DISABLE = "service_user.disable"
    SERVICE_USER_ENABLE = "service_user.enable"
    CREDENTIAL_CREATE = "credential.create"
    CREDENTIAL_HAND_OVER = "credential.hand_over"
    CREDENTIAL_OPEN = "credential.open"
    CREDENTIAL_ROTATE = "credential.rotate"
    CREDENTIAL_LIST = "credential.list"
    CREDENTIAL_REVOKE = "credential.revoke"
    CREDENTIAL_CONFIRM = "credential.confirm"
    CREDENTIAL_CONFIRM_ALL = "credential.confirm_all"
    CREDENTIAL_LEAKED = "credential.leaked"
    SIGNING_KEY_LIST = "signing_key.list"
    SIGNING_KEY_PREPARE = "signing_key.prepare"
    SIGNING_KEY_ACTIVATE = "signing_key.activate"
    SIGNING_KEY_RETIRE = "signing_key.retire"
    SIGNING_KEY_DESTROY = "signing_key.destroy"
    SIGNING_KEY_REWRAP = "signing_key.rewrap"
    SIGNING_KEY_ROTATE = "signing_key.rotate"
    SIGNING_KEY_REVOKE = "signing_key.revoke"
    SIGNING_KEY_REVOKE_ALL = "signing_key.revoke_all"
    AUDIT_QUERY = "audit.query"
    AUDIT_EXPORT = "audit.export"
    AUDIT_INCLUSION = "audit.inclusion"
    AUDIT_CONSISTENCY = "audit.consistency"
    AUDIT_REPORT = "audit.report"
    AUDIT_RESTORE_ACCEPTED = "audit.restore_accepted"
    AUDIT_ARCHIVE = "audit.archive"
    AUDIT_ERASE = "audit.erase"
    AUDIT_LOG_REWRAP = "audit_log.rewrap"
    JWKS_LOADED = "jwks.loaded"
    OPERATOR_BOOTSTRAP = "operator.bootstrap"
    TOKEN_FORGED = "token.forged"  # noqa: S105
    TOKEN_UNKNOWN = "token.unknown"  # noqa: S105
    TOKEN_UNVERIFIABLE = "token.unverifiable"  # noqa: S105


class Outcome(StrEnum):
    """Whether it was done."""

    SUCCESS = "success"
    REFUSED = "refused"
    FAILED = "failed"


class AuditRecord(Struct, frozen=True, kw_only=True):
    """One line of the log. Whom it was done to: `service_user_id`; who did it: `actor_id`.

    `version` and `actor_version` are those on which it was decided: the record is written only
    while they are in force. For an issuance `id` is the `jti`, `iat` and `exp` are NumericDates,
    and `signing_input_sha256` is the digest that a reported token is compared with. For a call
    that another service reported, `action` is what that calls it, `jti` and the digest are of the
    token that it was made with, and `occurred_at` is when.
    What is personal goes to a table beside the log; the log holds its salted SHA-256.

    None can be made whose `details` have no canonical form (NotEncodable): once on record, it would
    stop the log.
    """

    id: UUID
    action: str
    outcome: Outcome
    reason: str | None = None
    service_user_id: str | None = None
    service_user: str | None = None
    source_system: str | None = None
    version: int | None = None
    credential_id: str | None = None
    actor_id: str | None = None
    actor: str | None = None
    actor_version: int | None = None
    actor_credential_id: str | None = None
    kid: str | None = None
    iat: int | None = None
    exp: int | None = None
    aud: str | None = None
    scope: str | None = None
    signing_input_sha256: bytes | None = None
    jti: UUID | None = None
    occurred_at: datetime | None = None
    request_id: str = ""
    repeats: int = 1
    details: dict[str, Any] = {}
    client_address: str = ""
    user_agent: str = ""
    resource: str = ""
    department: str = ""
    salt: bytes | None = None
    personal_sha256: bytes | None = None

    def __post_init__(self) -> None:
        if self.details:
            # As the store gets it: times, ids and enumerations are texts there.
            require_encodable(msgspec.to_builtins(self.details))


class StoredRecord(Struct, frozen=True, kw_only=True):
    """A record as it is read: what was asked for it to be, when it became durable, and where.

    `jti` is the token that was issued, and then the record's own id, or the one that a reported
    call was made with; `occurred_at` is when, by the reporter's clock. `leaf_index` is the place in
    the Merkle tree of the log `log_origin`, and `leaf_hash` (base64) what is hashed there; null
    until it has one. The personal fields are null once they were erased, and
    for records that never had any; with `personal_salt` they hash to `personal_sha256` (both hex).
    """

    id: UUID
    cursor: str
    log_origin: str | None
    leaf_index: int | None
    leaf_hash: bytes | None
    recorded_at: datetime
    occurred_at: datetime | None
    action: str
    outcome: Outcome
    reason: str | None
    service_user_id: str | None
    service_user: str | None
    source_system: str | None
    version: int | None
    credential_id: str | None
    actor_id: str | None
    actor: str | None
    actor_credential_id: str | None
    jti: UUID | None
    kid: str | None
    iat: int | None
    exp: int | None
    aud: str | None
    scope: str | None
    signing_input_sha256: str | None
    request_id: str
    repeats: int
    details: dict[str, Any]
    client_address: str | None
    user_agent: str | None
    resource: str | None
    department: str | None
    personal_salt: str | None
    personal_sha256: str | None


class RecordFilter(Struct, frozen=True, kw_only=True):
    """Which records to read; what is None does not count.

    `service_user` and `actor` are ids or names; `jti` finds the issuance of a token and every call
    made with it; `user_agent` and `resource` are prefixes.
    """

    id: UUID | None = None
    service_user: str | None = None
    source_system: str | None = None
    credential_id: str | None = None
    actor: str | None = None
    actor_credential_id: str | None = None
    action: str | None = None
    outcome: Outcome | None = None
    reason: str | None = None
    request_id: str | None = None
    jti: UUID | None = None
    kid: str | None = None
    client_address: str | None = None
    user_agent: str | None = None
    department: str | None = None
    resource: str | None = None
    since: datetime | None = None
    until: datetime | None = None

    def for_record(self) -> dict[str, Any]:
        """Return what a record may say of this filter for ever: of what is personal, only that
        it was asked for."""
        return {
            name: "given" if name in _PERSONAL else value
            for name, value in msgspec.structs.asdict(self).items()
            if value is not None
        }


_PERSONAL: Final = frozenset({"client_address", "user_agent", "department", "resource"})


class RecordReader(Protocol):
    """Reads the log in the order of its commits."""

    async def read(
        self, wanted: RecordFilter, *, cursor: str | None, newest_first: bool, limit: int
    ) -> Sequence[StoredRecord]:
        """Return up to `limit` records beyond `cursor`; no later commit can come before them.

        Raise ValueError for a cursor that is none, and StoreUnavailable.
        """
        ...


def new_record_id(now: float) -> UUID:
    """Return a UUIDv7 (RFC 9562 §5.7) of `now`, so that the record finds its month's partition."""
    return UUID(int=uuid_utils.uuid7(nanoseconds=int(now * 1_000_000_000)).int)


def personal(origin: ClientAddress, *, resource: str = "", department: str = "") -> dict[str, Any]:
    """Return the fields of a record that say from where it came, with their salted digest.

    The digest is SHA-256(salt ‖ JSON array of address, user agent, resource, department), the
    array in UTF-8 without white space: whoever holds salt and values can recompute it.
    """
    salt = os.urandom(16)
    values = [origin.address, origin.user_agent, resource, department]
    return {
        "request_id": origin.request_id,
        "client_address": origin.address,
        "user_agent": origin.user_agent,
        "resource": resource,
        "department": department,
        "salt": salt,
        "personal_sha256": hashlib.sha256(salt + msgspec.json.encode(values)).digest(),
    }
