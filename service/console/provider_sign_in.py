"""`/console/sign-in/provider`: a sign-in through the human portal, there and back.

Holds no secret of the portal, and decides nothing: the provider says who it is, `people.py` what
that one may do, `sessions.py` whether they come in.
"""

from http import HTTPStatus
from typing import Any, Final

from litestar import Controller, Response, get
from litestar.datastructures import Cookie
from litestar.di import NamedDependency
from litestar.exceptions import NotFoundException
from litestar.params import FromQuery

from service.authority.audit import Action
from service.authority.errors import (
    AuditUnavailable,
    OAuthError,
    StoreUnavailable,
    TemporarilyUnavailable,
)
from service.authority.people import People
from service.authority.sessions import Sessions
from service.console.gate import PUBLIC, own_path
from service.console.page import HOME, page, redirect, set_session
from service.console.provider import TRANSACTION, Provider, SignInFailed, Transaction
from service.http.context import AnyRequest, note, origin_of

COOKIE: Final = "__Host-privyseal-sign-in"


class ProviderController(Controller):
    """Through the human portal, if there is one."""

    opt = {PUBLIC: True, "action": Action.TOKEN_ISSUE}  # noqa: RUF012

    @get("/sign-in/provider")
    async def go(
        self,
        request: AnyRequest,
        provider: NamedDependency[Provider | None],
        next: FromQuery[str] = HOME,
    ) -> Response[Any]:
        """Send the browser to the portal, with what it has to bring back."""
        if provider is None:
            raise NotFoundException
        transaction = Transaction.begin(own_path(next))
        try:
            address = await provider.way_there(transaction)
        except SignInFailed as error:
            return _failed(request, error)
        answer = redirect(request, address)
        _set_transaction(answer, transaction)
        return answer

    @get("/sign-in/callback")
    async def come_back(
        self,
        request: AnyRequest,
        provider: NamedDependency[Provider | None],
        people: NamedDependency[People],
        sessions: NamedDependency[Sessions],
    ) -> Response[Any]:
        """Let in who the portal says it is, and go on to what was wanted."""
        if provider is None:
            raise NotFoundException
        origin = origin_of(request.scope)
        transaction = Transaction.decode(request.cookies.get(COOKIE, ""))
        try:
            identity = await provider.who_came_back(_answer(request), transaction)
            service_user_id = await people.arrived(identity, origin)
            token = await sessions.sign_in_without_credential(service_user_id, origin)
        except SignInFailed as error:
            answer = _failed(request, error)
        except OAuthError as error:
            # On record already.
            answer = _page_of(request, HTTPStatus.FORBIDDEN, error.description)
        except (TemporarilyUnavailable, StoreUnavailable, AuditUnavailable):
            # The portal's answer is used up: sending it again cannot help.
            detail = "Nothing can be put on record just now. Begin again in a minute."
            answer = _page_of(request, HTTPStatus.SERVICE_UNAVAILABLE, detail)
        else:
            assert transaction is not None
            set_session(request, token)
            # No redirect: the browser would follow it as part of one that another site began, and
            # so without the session's cookie, which is SameSite=Strict.
            following = own_path(transaction.following)
            answer = page(request, "provider_welcome.html", following=following)
        _set_transaction(answer, None)
        return answer


def _answer(request: AnyRequest) -> dict[str, str]:
    """Return the parameters of the redirect back; of one that came twice, none (RFC 6749 §3.1)."""
    sent = list(request.query_params.multi_items())
    names = [name for name, _ in sent]
    return {name: value for name, value in sent if names.count(name) == 1}


def _failed(request: AnyRequest, error: SignInFailed) -> Response[Any]:
    note(request.scope, refused=error.reason)
    return _page_of(request, error.status, error.detail)


def _page_of(request: AnyRequest, status: HTTPStatus, detail: str) -> Response[Any]:
    return page(request, "provider_failed.html", status=status, detail=detail)


def _set_transaction(answer: Response[Any], transaction: Transaction | None) -> None:
    # Lax, not Strict: it must come back with the redirect from the portal.
    answer.set_cookie(
        Cookie(
            key=COOKIE,
            value=transaction.encode() if transaction else "",
            max_age=TRANSACTION if transaction else 0,
            path="/",
            secure=True,
            httponly=True,
            samesite="lax",
        )
    )
