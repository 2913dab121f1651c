"""Refusals and failures as pages: the same words and statuses as in the admin API.

Decides nothing: `http/errors.py` does.
"""

from collections.abc import Callable
from http import HTTPStatus
from typing import Any, Final, cast

import msgspec
from litestar import Response
from litestar.exceptions import ValidationException

from service.authority.errors import AdminRefusal, NotFound, Unauthenticated
from service.console.gate import sign_in_first
from service.console.page import page
from service.http.context import AnyRequest
from service.http.errors import EXCEPTION_HANDLERS

_NOTHING: Final = {
    "service_user_id": "There is no such service user.",
    "credential_id": "There is no such credential.",
    "kid": "There is no such signing key.",
}

Handler = Callable[[AnyRequest, Any], Response[Any]]


def _as_page(problem: Callable[[AnyRequest, Any], Response[bytes]]) -> Handler:
    def answer(request: AnyRequest, error: Exception) -> Response[Any]:
        if isinstance(error, ValidationException) and (missing := _nothing_there(error)):
            error, refuse = missing, EXCEPTION_HANDLERS[AdminRefusal]
        else:
            refuse = problem
        refusal = refuse(request, error)
        if isinstance(error, Unauthenticated):
            # It was live when the page came, and is no more.
            return sign_in_first(request, error.detail)
        details = msgspec.json.decode(refusal.content)
        kept = {name: refusal.headers[name] for name in ("Retry-After",) if name in refusal.headers}
        status = HTTPStatus(refusal.status_code or HTTPStatus.INTERNAL_SERVER_ERROR)
        return page(
            request,
            "error.html",
            status=status,
            headers=kept,
            title=details["title"],
            detail=details["detail"],
            again=status >= HTTPStatus.INTERNAL_SERVER_ERROR,
        )

    return answer


def _nothing_there(error: ValidationException) -> NotFound | None:
    """Return that nothing is at an address in which an id has not the form of one."""
    faulty = {fault["key"] for fault in cast("list[dict[str, str]]", error.extra or [])}
    for parameter, nothing in _NOTHING.items():
        if parameter in faulty:
            return NotFound(nothing)
    return None


EXCEPTION_HANDLERS_OF_PAGES: Final[dict[type[Exception], Handler]] = {
    kind: _as_page(handler) for kind, handler in EXCEPTION_HANDLERS.items()
}
