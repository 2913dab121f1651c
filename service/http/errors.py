"""Errors as answers: RFC 6749 §5.2 at the token endpoint, RFC 9457 everywhere else.

The only place that knows statuses. The client sees the code, the log sees the detail.
"""

import random
import re
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any, Final, cast

import msgspec
import structlog
from litestar import Response
from litestar.exceptions import HTTPException, ValidationException

from keys.envelope import EnvelopeError
from keys.verifier.jwt import describable
from service.authority.errors import (
    AdminRefusal,
    AuditUnavailable,
    Conflict,
    Forbidden,
    Invalid,
    NotFound,
    OAuthError,
    OAuthErrorCode,
    PreconditionFailed,
    StoreUnavailable,
    TemporarilyUnavailable,
    TooMany,
    Unauthenticated,
)
from service.authority.model import EXPECTED
from service.http.context import AnyRequest, note, origin_of

PROBLEM: Final = "application/problem+json"
NO_STORE: Final = {"Cache-Control": "no-store"}

_STATUS: Final[Mapping[type[AdminRefusal], HTTPStatus]] = {
    Invalid: HTTPStatus.UNPROCESSABLE_ENTITY,
    Unauthenticated: HTTPStatus.UNAUTHORIZED,
    Forbidden: HTTPStatus.FORBIDDEN,
    NotFound: HTTPStatus.NOT_FOUND,
    Conflict: HTTPStatus.CONFLICT,
    PreconditionFailed: HTTPStatus.PRECONDITION_FAILED,
    TooMany: HTTPStatus.TOO_MANY_REQUESTS,
}

log = structlog.stdlib.get_logger()

# As msgspec says it.
_IN_WORDS: Final[Mapping[str, str]] = {
    f"Expected `str` matching regex {pattern!r}": words for pattern, words in EXPECTED.items()
}


class Refused(AdminRefusal):
    """A request that HTTP itself is enough to refuse: 400, 415, 428."""

    reason = "invalid_request"

    def __init__(self, status: HTTPStatus, detail: str) -> None:
        super().__init__(detail)
        self.status = status


def oauth_error(error: OAuthError) -> tuple[HTTPStatus, dict[str, str], bytes]:
    """Return status, headers and body of a refusal at the token endpoint (RFC 6749 §5.2)."""
    headers = dict(NO_STORE, Pragma="no-cache")
    status = HTTPStatus.BAD_REQUEST
    if error.code is OAuthErrorCode.INVALID_CLIENT:
        status = HTTPStatus.UNAUTHORIZED
        headers["WWW-Authenticate"] = 'Basic realm="privyseal", charset="UTF-8"'
    body = {"error": error.code.value, "error_description": describable(error.description)}
    return status, headers, msgspec.json.encode(body)


def retry_after() -> str:
    """Return seconds for `Retry-After`, jittered: who failed together must not return together."""
    return str(random.randint(1, 5))  # noqa: S311


def unavailable() -> tuple[HTTPStatus, dict[str, str], bytes]:
    """Return the token endpoint's answer while nothing can be proven."""
    body = {
        "error": "temporarily_unavailable",
        "error_description": "No token can be put on record just now. Try again later.",
    }
    headers = dict(NO_STORE, **{"Retry-After": retry_after()})
    return HTTPStatus.SERVICE_UNAVAILABLE, headers, msgspec.json.encode(body)


def problem(
    request: AnyRequest,
    status: int,
    detail: str,
    *,
    headers: Mapping[str, str] | None = None,
    **members: Any,
) -> Response[bytes]:
    """Return problem details (RFC 9457 §3); the status says it all, so `type` is about:blank."""
    body = {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": int(status),
        "detail": detail,
        "request_id": origin_of(request.scope).request_id,
        **members,
    }
    return Response(
        content=msgspec.json.encode(body),
        status_code=status,
        media_type=PROBLEM,
        headers=dict(NO_STORE, **(headers or {})),
    )


def status_of(error: AdminRefusal) -> HTTPStatus:
    """Return the status of a refusal, also where a page shows it beside the form."""
    return error.status if isinstance(error, Refused) else _STATUS[type(error)]


def note_refusal(request: AnyRequest, error: AdminRefusal) -> None:
    """Leave a refusal for its audit record, and with it a token that may be a forged one."""
    note(request.scope, refused=error.reason)
    if isinstance(error, Unauthenticated):
        note(request.scope, unrecorded_token=error.unrecorded)


def admin_refusal(request: AnyRequest, error: AdminRefusal) -> Response[bytes]:
    """Answer a refusal of the admin API, with the challenge of RFC 6750 §3 where it has one."""
    note_refusal(request, error)
    status = status_of(error)
    members: dict[str, Any] = {}
    headers: dict[str, str] = {}
    if isinstance(error, Unauthenticated):
        headers["WWW-Authenticate"] = _challenge(request, error)
    if isinstance(error, Forbidden) and error.scope:
        headers["WWW-Authenticate"] = f'Bearer error="insufficient_scope", scope="{error.scope}"'
    if isinstance(error, Invalid | Conflict) and error.pointer:
        members["errors"] = [{"pointer": error.pointer, "detail": error.detail}]
    return problem(request, status, error.detail, headers=headers, **members)


def mint_refusal(request: AnyRequest, error: OAuthError) -> Response[bytes]:
    """Answer a mint that asks for more than was granted."""
    note(request.scope, refused=error.reason)
    return problem(request, HTTPStatus.UNPROCESSABLE_ENTITY, error.description, error=error.code)


def store_unavailable(request: AnyRequest, _: Exception) -> Response[bytes]:
    """Answer while Postgres is away."""
    return problem(
        request,
        HTTPStatus.SERVICE_UNAVAILABLE,
        "Nothing can be put on record just now. Try again later.",
        headers={"Retry-After": retry_after()},
    )


def invalid_body(error: msgspec.ValidationError) -> Invalid:
    """Return the refusal of a JSON body, with a JSON pointer (RFC 6901) to where it is wrong."""
    detail, _, path = str(error).partition(" - at `$")
    detail = _IN_WORDS.get(detail, detail)
    parts: list[str] = re.findall(r"[^.\[\]`]+", path)
    # It may repeat the name of a member, as long as the body was.
    sentence = f"{'.'.join(parts)}: {detail[:200]}" if parts else detail[:200]
    return Invalid(sentence, "".join(f"/{part}" for part in parts))


def invalid_input(request: AnyRequest, error: ValidationException) -> Response[bytes]:
    """Answer parameters of the path and the query that do not have their stated form."""
    note(request.scope, refused="invalid")
    faults = [
        {**fault, "message": _IN_WORDS.get(fault["message"], fault["message"])}
        for fault in cast("list[dict[str, str]]", error.extra or [])
    ]
    return problem(
        request,
        HTTPStatus.UNPROCESSABLE_ENTITY,
        "; ".join(f"{fault['key']}: {fault['message']}" for fault in faults)
        or "The request does not have the stated form.",
        errors=[{"parameter": fault["key"], "detail": fault["message"]} for fault in faults],
    )


def http_error(request: AnyRequest, error: HTTPException) -> Response[bytes]:
    """Answer what the framework refuses: no such route, wrong method, a body too large."""
    if error.status_code >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return unexpected(request, error)
    if error.status_code not in (HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED):
        note(request.scope, refused="invalid_request")
    phrases: dict[int, str] = {
        HTTPStatus.NOT_FOUND: "There is no such resource.",
        HTTPStatus.METHOD_NOT_ALLOWED: "This resource does not have that method.",
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "The body is larger than this resource takes.",
    }
    detail = phrases.get(error.status_code, "The request could not be read.")
    return problem(request, error.status_code, detail, headers=error.headers)


def unexpected(request: AnyRequest, error: Exception) -> Response[bytes]:
    """Answer a defect of ours: the log has the class and the place, the client has the id."""
    log.error(
        "unexpected_error",
        request_id=origin_of(request.scope).request_id,
        error=type(error).__name__,
        place=_place(error),
    )
    return problem(
        request,
        HTTPStatus.INTERNAL_SERVER_ERROR,
        "Something went wrong here. The request id leads to the log.",
    )


def keks_unreadable(request: AnyRequest, error: EnvelopeError) -> Response[bytes]:
    """Answer an act that needs the key-encryption keys while they cannot be read."""
    log.error("keks_unreadable", error=str(error), request_id=origin_of(request.scope).request_id)
    return problem(
        request,
        HTTPStatus.SERVICE_UNAVAILABLE,
        "The key-encryption keys cannot be read on the server: nothing was changed. Its log says "
        "what to do.",
    )


EXCEPTION_HANDLERS: Final[dict[type[Exception], Callable[[AnyRequest, Any], Response[bytes]]]] = {
    AdminRefusal: admin_refusal,
    OAuthError: mint_refusal,
    EnvelopeError: keks_unreadable,
    StoreUnavailable: store_unavailable,
    AuditUnavailable: store_unavailable,
    TemporarilyUnavailable: store_unavailable,
    ValidationException: invalid_input,
    HTTPException: http_error,
    Exception: unexpected,
}


def _challenge(request: AnyRequest, error: Unauthenticated) -> str:
    # RFC 6750 §3.1: no error code when the request lacks any authentication information.
    if "authorization" not in request.headers:
        return "Bearer"
    return f'Bearer error="invalid_token", error_description="{describable(error.detail)}"'


def _place(error: Exception) -> str:
    # File and line only: the text of an exception may quote what must not be logged.
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace else ""
