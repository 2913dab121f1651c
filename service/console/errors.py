"""Refusals and failures as pages: the same words and statuses as in the admin API.

Decides nothing: `http/errors.py` does.
"""

from collections.abc import Callable
from http import HTTPStatus
from typing import Any, Final

import msgspec
from litestar import Response

from service.authority.errors import Unauthenticated
from service.console.gate import sign_in_first
from service.console.page import AnyRequest, page
from service.http.errors import EXCEPTION_HANDLERS

Handler = Callable[[AnyRequest, Any], Response[Any]]


def _as_page(problem: Callable[[AnyRequest, Any], Response[bytes]]) -> Handler:
    def answer(request: AnyRequest, error: Exception) -> Response[Any]:
        refusal = problem(request, error)
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


EXCEPTION_HANDLERS_OF_PAGES: Final[dict[type[Exception], Handler]] = {
    kind: _as_page(handler) for kind, handler in EXCEPTION_HANDLERS.items()
}
