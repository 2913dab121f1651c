"""The nouns of the authority: who may get tokens, with what, and what they get.

Holds no rule that decides a request. What a rule needs of the store is a Protocol beside it.
"""

import re
import secrets
from base64 import b32encode
from collections.abc import Callable, Mapping
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Final
from uuid import UUID

from msgspec import Meta, Struct

from keys.secret import Secret

Clock = Callable[[], float]
"""Seconds since the epoch, UTC, corrected by the offset to Postgres."""

# The forms of every field, as JSON Schema patterns; migrations/0001 states them once more for
# the tables. Control characters never get this far: no string of a request may hold one.
SERVICE_USER_ID: Final = "^su_[a-z2-7]{24}$"
CREDENTIAL_ID: Final = "^cr_[a-z2-7]{24}$"
# No underscore: so no name can be taken for an id.
NAME: Final = "^[a-z0-9][a-z0-9.-]{0,62}$"
MAX_SEARCH: Final = 300
"""Characters: what a search for words may hold, whatever they are."""
SERVICE_USER: Final = f"{SERVICE_USER_ID}|{NAME}"
KID: Final = "^[A-Za-z0-9_-]{43}$"
SOURCE_SYSTEM: Final = "^[a-z][a-z0-9_]{0,62}$"
# One of ours, or what another service calls its own.
ACTION: Final = r"^[a-z_]{1,32}\.[a-z_]{1,32}$"
SCOPE: Final = "[a-z][a-z0-9:._-]{0,63}"
Name = Annotated[str, Meta(pattern=NAME, examples=["vkyc-prod"])]
SourceSystem = Annotated[str, Meta(pattern=SOURCE_SYSTEM, examples=["vkyc"])]
PRINTABLE: Final = {"pattern": "^[^\\x00-\\x1f\\x7f]*$"}
Line = Annotated[str, Meta(max_length=200, extra_json_schema=PRINTABLE)]
Label = Annotated[
    str, Meta(min_length=1, max_length=100, examples=["2026 autumn"], extra_json_schema=PRINTABLE)
]
Text = Annotated[str, Meta(max_length=1000, extra_json_schema=PRINTABLE)]
ReasonText = Annotated[
    str,
    Meta(
        min_length=3,
        max_length=200,
        examples=["key seen in a backup"],
        extra_json_schema=PRINTABLE,
    ),
]
Scope = Annotated[str, Meta(pattern=f"^{SCOPE}$", examples=["ingest:write"])]
# RFC 8707 §2: an absolute URI without fragment.
AUDIENCE: Final = r"^[a-z][a-z0-9+.-]{0,31}:[A-Za-z0-9._~:/?@!$&'()*+,;=%-]{1,200}$"
Audience = Annotated[
    str,
    Meta(
        pattern=AUDIENCE,
        examples=["https://ingest.example"],
    ),
]
EXPECTED: Final[Mapping[str, str]] = {
    NAME: "Expected 1 to 63 of a–z, 0–9, hyphen and dot, a letter or digit first.",
    SOURCE_SYSTEM: "Expected 1 to 63 of a–z, 0–9 and underscore, a letter first.",
    f"^{SCOPE}$": "Expected up to 64 of a–z, 0–9 and : . _ -, a letter first.",
    AUDIENCE: "Expected an absolute address without a fragment.",
    SERVICE_USER: "Expected the name of a service user, or its id: su_ and 24 more.",
    SERVICE_USER_ID: "Expected the id of a service user: su_ and 24 more.",
    CREDENTIAL_ID: "Expected the id of a credential: cr_ and 24 more.",
    KID: "Expected a kid: 43 letters, digits, - and _.",
    ACTION: "Expected two words with a dot: token.issue.",
}
"""What each form is in words: a pattern is shown to nobody who typed something else."""
_DISTINCT: Final = {"uniqueItems": True}
Scopes = Annotated[list[Scope], Meta(max_length=32, extra_json_schema=_DISTINCT)]
Audiences = Annotated[list[Audience], Meta(min_length=1, max_length=8, extra_json_schema=_DISTINCT)]
Instant = Annotated[datetime, Meta(extra_json_schema={"format": "date-time"})]
TokenLifetime = Annotated[int, Meta(ge=60, le=3600, examples=[900])]

CLIENT_ID: Final = re.compile("su_[a-z2-7]{24}")
PEOPLE: Final = "console"
"""The source system of people who sign in through the human portal, and of nobody else."""
MAX_LIVE_CREDENTIALS: Final = 10
ENDS_SOON: Final = 30 * 86_400
"""Seconds before its end from which everybody is told that a credential ends."""
SHOWN_DAYS: Final = 7
"""For so long what was reported or refused once is shown to operators, wherever it is shown."""


class AdminScope(StrEnum):
    """What an operator may do; granted only with the admin API's audience."""

    SERVICE_USERS_READ = "service-users:read"
    SERVICE_USERS_WRITE = "service-users:write"
    TOKENS_MINT = "tokens:mint"
    SIGNING_KEYS_READ = "signing-keys:read"
    SIGNING_KEYS_ROTATE = "signing-keys:rotate"
    SIGNING_KEYS_REVOKE = "signing-keys:revoke"
    AUDIT_READ = "audit:read"
    AUDIT_REPORT = "audit:report"


ADMIN_SCOPES: Final = frozenset(AdminScope)


class Status(StrEnum):
    """Whether a service user may get tokens."""

    ACTIVE = "active"
    DISABLED = "disabled"


class ServiceUser(Struct, frozen=True, kw_only=True):
    """A machine that may get tokens, or an operator; `version` rises with any change to it."""

    id: str
    name: str
    source_system: str
    owner: str
    contact: str
    description: str
    scopes: tuple[str, ...]
    audiences: tuple[str, ...]
    token_lifetime: int
    status: Status
    version: int
    created_at: datetime

    @property
    def is_active(self) -> bool:
        """Whether it may get tokens at all."""
        return self.status is Status.ACTIVE

    @property
    def is_person(self) -> bool:
        """Whether it signs in through the human portal, and so never has a credential."""
        return self.source_system == PEOPLE

    @property
    def admin_scopes(self) -> frozenset[str]:
        """The scopes that open something in the admin API."""
        return ADMIN_SCOPES.intersection(self.scopes)

    def scopes_for(self, audience: str, api_audience: str) -> tuple[str, ...]:
        """The scopes that a token for `audience` may carry, in the order of the grant."""
        admin = audience == api_audience
        return tuple(scope for scope in self.scopes if (scope in ADMIN_SCOPES) == admin)


class ServiceUserFilter(Struct, frozen=True, kw_only=True):
    """Which service users to list; what is empty does not count.

    `search` is an id, or words: each of them begins a word of name, owner or contact.
    """

    name: str = ""
    search: str = ""
    source_system: str = ""
    status: Status | None = None


class Credential(Struct, frozen=True, kw_only=True):
    """One secret of a service user, as its SHA-256 (32 bytes)."""

    id: str
    service_user_id: str
    label: str
    secret_sha256: bytes
    created_at: datetime
    expires_at: datetime
    revoked_at: datetime | None = None
    held_at: datetime | None = None
    """Since when, after a restore, it waits for an operator to confirm it."""
    code_ends_at: datetime | None = None
    """Of one that is handed over: until when it may be opened. Its secret is made only then."""
    opened_at: datetime | None = None
    succeeds: str | None = None
    """The credential that its holder made it to replace."""
    last_used_at: datetime | None = None

    @property
    def is_unopened(self) -> bool:
        """Whether it is handed over and nobody has its secret yet."""
        return self.code_ends_at is not None and self.opened_at is None

    def is_live(self, now: float) -> bool:
        """Whether it may be exchanged at `now` (seconds since the epoch)."""
        return self.held_at is None and not self.is_unopened and not self.has_ended(now)

    def has_ended(self, now: float) -> bool:
        """Whether it never can be exchanged again, whatever an operator does."""
        expired = now >= self.expires_at.timestamp()
        return self.revoked_at is not None or expired or self._lapsed(now)

    def ends_soon(self, now: float) -> bool:
        """Whether it ends, or ended, within 30 days from `now`, unless it is revoked before."""
        return self.expires_at.timestamp() - now < ENDS_SOON

    def state(self, now: float) -> str:
        """Return live, offered, held, lapsed, expired or revoked, as of `now`."""
        if self.has_ended(now):
            if self.revoked_at:
                return "revoked"
            return "lapsed" if self._lapsed(now) else "expired"
        if self.held_at:
            return "held"
        return "offered" if self.is_unopened else "live"

    def _lapsed(self, now: float) -> bool:
        ends_at = self.code_ends_at if self.opened_at is None else None
        return ends_at is not None and now >= ends_at.timestamp()


class OwnedCredential(Struct, frozen=True, kw_only=True):
    """A credential, and whose it is."""

    service_user: ServiceUser
    credential: Credential


class Subject(Struct, frozen=True, kw_only=True):
    """What the store knows of a `client_id`: version 0 and nobody when it knows nothing."""

    service_user: ServiceUser | None = None
    credentials: tuple[Credential, ...] = ()

    @property
    def version(self) -> int:
        """The version on which a decision about this subject is made."""
        return 0 if self.service_user is None else self.service_user.version


class Principal(Struct, frozen=True, kw_only=True):
    """A service user that proved one of its credentials."""

    service_user: ServiceUser
    credential: Credential


class ClientAddress(Struct, frozen=True, kw_only=True):
    """From where a request came: its address behind the trusted proxies, its software, its id."""

    address: str
    user_agent: str
    request_id: str


class TokenRequest(Struct, frozen=True, kw_only=True):
    """A parsed `client_credentials` request (RFC 6749 §4.4.2, RFC 8707 §2)."""

    client_id: str
    client_secret: Secret
    scope: str | None = None
    resource: str | None = None
    origin: ClientAddress


class AccessToken(Struct, frozen=True, kw_only=True):
    """A token that is on record and may leave; `token` is the compact JWS itself.

    `credential_expires_at` is set when the credential behind it ends within 30 days.
    """

    token: Secret
    jti: str
    expires_in: int
    expires_at: int
    scope: str
    credential_expires_at: datetime | None = None


class UnrecordedToken(Struct, frozen=True, kw_only=True):
    """A live token that a key of ours signed and that does not go back to an exchange on record.

    `issued_at` is what the token says (seconds since the epoch), `signature` its third segment.
    """

    jti: UUID
    kid: str
    issued_at: int
    signing_input_sha256: bytes
    signature: str


class LiveTokens(Struct, frozen=True, kw_only=True):
    """How many tokens are still accepted offline, and when the last of them ends.

    Those of a revoked signing key are none: verifiers refuse them once they read the keys again.
    """

    count: int
    last_ends_at: datetime | None


def new_id(prefix: str) -> str:
    """Return `prefix`, `_` and 24 characters of lowercase base32: 120 random bits."""
    return f"{prefix}_{b32encode(secrets.token_bytes(15)).decode('ascii').lower()}"
