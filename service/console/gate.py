"""What stands before every page: who is signed in, and whether a form is one of ours.

A bearer token opens nothing here, and the cookie opens nothing anywhere else.
"""

import re
from collections.abc import Awaitable, Callable
from contextlib import suppress
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import quote

import structlog
from litestar import HttpMethod, Response
from litestar.exceptions import NotFoundException

from keys.verifier import InvalidToken
from service.authority.errors import StoreUnavailable, TemporarilyUnavailable, Unauthenticated
from service.authority.model import Clock
from service.authority.operators import Operator
from service.authority.sessions import Session, Sessions
from service.console.forms import CSRF, Form, read_form
from service.console.page import COOKIE, HOME, is_csrf_token, page, redirect, set_session
from service.http.context import AnyRequest, note, noted, origin_of
from service.http.errors import Refused, note_refusal

log = structlog.stdlib.get_logger()

PUBLIC: Final = "public"
"""In the `opt` of a route that needs no session."""
ANYBODY: Final = "anybody"
"""In the `opt` of a route for whoever is signed in, even a person to whom nothing was granted."""
SIGN_IN: Final = "/console/sign-in"
ENDED: Final = (
    "Your session has ended: nothing was clicked for 15 minutes, or the signing key of its token "
    "was revoked. Sign in again."
)
_OWN_PATH: Final = re.compile(
    r"/console(/[A-Za-z0-9_-][A-Za-z0-9._~-]*)*(\?[A-Za-z0-9._~&=%+:-]*)?"
)


def gate(
    sessions: Sessions,
    *,
    issuer: str,
    clock: Clock,
    count_forged: Callable[[], Awaitable[int]],
    portal: str | None,
) -> Callable[[AnyRequest], Awaitable[Response[Any] | None]]:
    """Return what lets requests in, renews sessions, and says what every operator must see."""

    async def let_in(request: AnyRequest) -> Response[Any] | None:
        note(request.scope, now=clock(), portal=portal)
        # The `$` in the form of an id lets a line end pass, and no header may hold one.
        if not request.scope["path"].isprintable():
            raise NotFoundException
        is_form = request.method == HttpMethod.POST
        # A browser sends it with every form, and no other site can choose it (Fetch §3.1).
        if is_form and request.headers.get("origin") != issuer:
            raise Refused(HTTPStatus.FORBIDDEN, f"Forms are taken from pages of {issuer} only.")
        form = await read_form(request) if is_form else Form(())
        note(request.scope, form=form)
        if PUBLIC in request.route_handler.opt:
            return None
        try:
            session = await recognized(request, sessions)
        except Unauthenticated as error:
            return sign_in_first(request, error.detail if COOKIE in request.cookies else "")
        note(request.scope, session=session, operator=session.operator)
        if is_form and not is_csrf_token(session, form.text(CSRF)):
            raise Refused(HTTPStatus.FORBIDDEN, "This form was not made for your session.")
        if session.has_nothing and ANYBODY not in request.route_handler.opt:
            note(request.scope, refused="nothing_granted")
            return page(request, "nothing_granted.html", status=HTTPStatus.FORBIDDEN)
        if session.is_operator:
            note(request.scope, forged=await count_forged())
        if sessions.is_due(session):
            # Still good for minutes: the next request tries again.
            with suppress(TemporarilyUnavailable, StoreUnavailable):
                await renew(request, sessions)
        return None

    return let_in


async def recognized(request: AnyRequest, sessions: Sessions) -> Session:
    """Return whose session the cookie brings; raise Unauthenticated, on record unless there is no
    cookie or the session merely ended."""
    try:
        return await sessions.authenticate(request.cookies.get(COOKIE, ""))
    except Unauthenticated as error:
        if COOKIE in request.cookies and not error.has_ended:
            note_refusal(request, error)
        if isinstance(error.__cause__, InvalidToken):
            # What is wrong with a token helps a developer, and nobody who signs in.
            log.info("session_refused", error=error.detail)
            raise Unauthenticated(ENDED, has_ended=error.has_ended) from error
        raise


async def renew(request: AnyRequest, sessions: Sessions) -> Session:
    """Renew the session of a request with its answer, and return it as it is from now on."""
    session = session_of(request)
    token = await sessions.renewed(session, origin_of(request.scope))
    set_session(request, token)
    session = Session(
        operator=session.operator, signed_in=session.signed_in, expires_at=token.expires_at
    )
    note(request.scope, session=session)
    return session


def sign_in_first(request: AnyRequest, why: str) -> Response[Any]:
    """Return the way to the sign-in, and from there back to what was wanted: nothing is lost."""
    form = form_of(request)
    path = request.scope["path"]
    query: bytes = request.scope["query_string"]
    note(request.scope, session=None)
    if request.method == HttpMethod.POST:
        return page(
            request,
            "sign_in.html",
            status=HTTPStatus.UNAUTHORIZED,
            error=why,
            following=path,
            kept=form.shown_again(),
        )
    wanted = f"{path}?{query.decode('latin-1')}" if query else path
    following = "" if wanted == HOME else f"?next={quote(wanted, safe='/')}"
    if why:
        following += f"{'&' if following else '?'}ended=1"
    return redirect(request, f"{SIGN_IN}{following}")


def own_path(path: str) -> str:
    """Return a path that leads nowhere but to the console."""
    return path if _OWN_PATH.fullmatch(path) else HOME


def session_of(request: AnyRequest) -> Session:
    """Return whose session this is, as the gate found it."""
    session: Session | None = noted(request.scope, "session")
    assert session is not None, "a route that needs no session asked for one"
    return session


async def operator_of(request: AnyRequest) -> Operator:
    """Return who acts, as the gate found it."""
    return session_of(request).operator


def form_of(request: AnyRequest) -> Form:
    """Return the form that was sent."""
    return noted(request.scope, "form") or Form(())
