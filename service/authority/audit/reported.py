"""The forms of what other services report, and of what they are told about it.

Judges nothing: `attribution.py` and `events.py` do.
"""

from datetime import datetime
from enum import StrEnum
from typing import Annotated, TypeAlias
from uuid import UUID

from msgspec import Meta, Struct

from service.authority.audit.record import Outcome
from service.authority.model import ACTION, KID, PRINTABLE

# RFC 9562 §5.7, in its one canonical spelling.
EventId = Annotated[
    str,
    Meta(
        pattern="^[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$",
        examples=["019ab7a4-5c00-7000-8000-000000000001"],
    ),
]
Time = Annotated[datetime, Meta(tz=True)]
Instance = Annotated[str, Meta(pattern="^[A-Za-z0-9_-]{8,64}$", examples=["hVx3q0Zr9T1c"])]
Kid = Annotated[str, Meta(pattern=KID)]
Kids = Annotated[list[Kid], Meta(max_length=64)]
# SHA-256 in base64url without padding: the last letter holds four bits, and has one spelling.
Digest = Annotated[
    str,
    Meta(
        pattern="^[A-Za-z0-9_-]{42}[AEIMQUYcgkosw048]$",
        examples=["47DEQpj8HBSa-_TImW-5JCeuQeRkm5NMpJWZG3hSuFU"],
    ),
]
# RSA keys of up to 8192 bits.
Signature = Annotated[str, Meta(pattern="^[A-Za-z0-9_-]{1,1366}$")]
ReportedAction = Annotated[str, Meta(pattern=ACTION, examples=["document.ingest"])]
Resource = Annotated[str, Meta(max_length=300, extra_json_schema=PRINTABLE)]
RequestId = Annotated[str, Meta(max_length=128, extra_json_schema=PRINTABLE)]
Address = Annotated[str, Meta(max_length=64, extra_json_schema=PRINTABLE)]
UserAgent = Annotated[str, Meta(max_length=200, extra_json_schema=PRINTABLE)]
Department = Annotated[str, Meta(max_length=128, extra_json_schema=PRINTABLE)]


class JwksLoaded(
    Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag_field="type",
    tag="jwks.loaded",
):
    """A verifier, named by a random `instance` of its own, holds these keys and no others."""

    id: EventId
    occurred_at: Time
    instance: Instance
    kids: Kids


class ApiCall(
    Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="api.call"
):
    """A call that was made with a verified token, and what became of it.

    `signing_input_sha256` is the SHA-256 of the token's first two segments with the dot between
    them. `signature` is its third segment: send it when it is wanted, and no sooner.
    """

    id: EventId
    occurred_at: Time
    jti: UUID
    kid: Kid
    signing_input_sha256: Digest
    action: ReportedAction
    resource: Resource
    outcome: Outcome
    request_id: RequestId
    client_address: Address = ""
    user_agent: UserAgent = ""
    department: Department = ""
    signature: Signature | None = None


Event: TypeAlias = JwksLoaded | ApiCall


class EventStatus(StrEnum):
    """What became of an event."""

    RECORDED = "recorded"
    KNOWN = "known"
    REFUSED = "refused"
    SIGNATURE_WANTED = "signature_wanted"


class EventResult(Struct, frozen=True, kw_only=True):
    """`recorded` now, `known` from an earlier report of yours, `refused` for good (`detail` says
    why), or `signature_wanted`: report the same event again, with the token's signature."""

    id: EventId
    status: EventStatus
    detail: str = ""
