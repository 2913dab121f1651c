"""What the authority refuses and why, in the words of the RFCs.

Knows no HTTP status, no header and no log: `http/errors.py` turns these into answers.
"""

from enum import StrEnum

from service.authority.model import UnrecordedToken


class OAuthErrorCode(StrEnum):
    """Error codes of the token endpoint: RFC 6749 §5.2, and RFC 8707 §2 for `invalid_target`."""

    INVALID_REQUEST = "invalid_request"
    INVALID_CLIENT = "invalid_client"
    UNSUPPORTED_GRANT_TYPE = "unsupported_grant_type"
    INVALID_SCOPE = "invalid_scope"
    INVALID_TARGET = "invalid_target"


class OAuthError(Exception):
    """A refusal of the token endpoint: a code for programs, a sentence for people.

    The sentence says what was expected. It never holds a secret, and what it repeats of the
    request is limited to the characters of RFC 6749 §5.2 by whoever renders it.
    """

    def __init__(self, code: OAuthErrorCode, description: str, *, reason: str = "") -> None:
        """`reason` is what the audit log says where the answer must not tell as much."""
        super().__init__(description)
        self.code = code
        self.description = description
        self.reason = reason or code.value


class StoreUnavailable(Exception):
    """Postgres did not answer, or the connection to it was lost: try again later."""


class AuditUnavailable(Exception):
    """A record could not be made durable in time: nothing that depends on it may leave."""


class TemporarilyUnavailable(Exception):
    """The authority can prove neither a grant nor a refusal just now: try again later."""


class StartRefused(Exception):
    """The server must not start like this; the text says what to change."""


class AdminRefusal(Exception):
    """An administrative request was refused; `reason` is a stable word for programs."""

    reason = "refused"

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail


class Invalid(AdminRefusal):
    """A field does not have its stated form; `pointer` is its JSON pointer (RFC 6901)."""

    reason = "invalid"

    def __init__(self, detail: str, pointer: str = "") -> None:
        super().__init__(detail)
        self.pointer = pointer


class Unauthenticated(AdminRefusal):
    """The bearer token is missing, not ours, or not live now (RFC 6750 §3.1 `invalid_token`).

    `has_ended` says that nothing else is wrong with it; `unrecorded` is a token that a key of ours
    may have signed in other hands.
    """

    reason = "invalid_token"

    def __init__(
        self, detail: str, *, has_ended: bool = False, unrecorded: UnrecordedToken | None = None
    ) -> None:
        super().__init__(detail)
        self.has_ended = has_ended
        self.unrecorded = unrecorded


class Forbidden(AdminRefusal):
    """The operator's rights do not cover this act; `scope` names what it takes, if a scope does."""

    reason = "insufficient_scope"

    def __init__(self, detail: str, scope: str | None = None) -> None:
        super().__init__(detail)
        self.scope = scope


class NotFound(AdminRefusal):
    """No such thing is on record."""

    reason = "not_found"


class Conflict(AdminRefusal):
    """The act contradicts what is on record: a name that is taken, a limit that is reached.

    `pointer` is the JSON pointer of the field that does, if it is one.
    """

    reason = "conflict"

    def __init__(self, detail: str, pointer: str = "") -> None:
        super().__init__(detail)
        self.pointer = pointer


class TooMany(AdminRefusal):
    """So many of these are under way, or were asked for, that this one has to wait."""

    reason = "too_many"


class PreconditionFailed(AdminRefusal):
    """The thing was changed since the caller read it (RFC 9110 §13.1.1 `If-Match`)."""

    reason = "precondition_failed"
