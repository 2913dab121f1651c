"""`/console/sign-in`: a credential for a session, and back to what was wanted.

Keeps no secret: it is exchanged, and gone.
"""

from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from litestar import Controller, Response, get, post
from litestar.di import NamedDependency
from litestar.params import FromQuery

from keys.secret import Secret
from service.authority.audit import Action
from service.authority.errors import OAuthError, Unauthenticated
from service.authority.model import TokenRequest
from service.authority.sessions import Sessions
from service.console.forms import NOT_TYPED
from service.console.gate import (
    ANYBODY,
    PUBLIC,
    SIGN_IN,
    form_of,
    own_path,
    recognized,
    renew,
    session_of,
)
from service.console.page import COOKIE, HOME, page, redirect, set_session
from service.http.context import AnyRequest, note, origin_of


class SignInController(Controller):
    """Sign in, stay signed in, sign out."""

    @get("/sign-in", opt={PUBLIC: True})
    async def ask(
        self,
        request: AnyRequest,
        sessions: NamedDependency[Sessions],
        next: FromQuery[str] = HOME,
        ended: FromQuery[bool] = False,
        signed_out: FromQuery[bool] = False,
    ) -> Response[Any]:
        """Ask for a credential, unless there is a session already."""
        try:
            await recognized(request, sessions)
        except Unauthenticated as error:
            why = error.detail if ended and COOKIE in request.cookies else ""
            return page(
                request,
                "sign_in.html",
                error=why,
                signed_out=signed_out,
                following=own_path(next),
                kept=[],
            )
        return redirect(request, own_path(next))

    @post("/sign-in", opt={PUBLIC: True, "action": Action.TOKEN_ISSUE}, status_code=HTTPStatus.OK)
    async def sign_in(
        self, request: AnyRequest, sessions: NamedDependency[Sessions]
    ) -> Response[Any]:
        """Exchange a credential for a session, and go on with what waited for it."""
        form = form_of(request)
        following, kept = own_path(form.text("next")), form.kept()
        try:
            token = await sessions.sign_in(
                TokenRequest(
                    client_id=form.text("client_id"),
                    client_secret=Secret(form.text("client_secret")),
                    origin=origin_of(request.scope),
                )
            )
        except OAuthError as error:
            return page(
                request,
                "sign_in.html",
                status=HTTPStatus.UNAUTHORIZED,
                error=error.description,
                following=following,
                kept=kept,
            )
        set_session(request, token)
        if not kept:
            return redirect(request, following)
        session = await sessions.authenticate(token.token.reveal())
        note(request.scope, session=session, operator=session.operator)
        return _go_on(request, following, kept)

    @post(
        "/sign-in/resume",
        opt={PUBLIC: True, "action": Action.TOKEN_ISSUE},
        status_code=HTTPStatus.OK,
    )
    async def resume(
        self, request: AnyRequest, sessions: NamedDependency[Sessions]
    ) -> Response[Any]:
        """Go on with what waited for a sign-in that was made in another tab."""
        form = form_of(request)
        following, kept = own_path(form.text("next")), form.kept()
        try:
            session = await recognized(request, sessions)
        except Unauthenticated as error:
            return page(
                request,
                "sign_in.html",
                status=HTTPStatus.UNAUTHORIZED,
                error=error.detail,
                following=following,
                kept=kept,
            )
        note(request.scope, session=session, operator=session.operator)
        return _go_on(request, following, kept)

    @post("/session", opt={ANYBODY: True, "action": Action.TOKEN_ISSUE}, status_code=HTTPStatus.OK)
    async def stay(self, request: AnyRequest, sessions: NamedDependency[Sessions]) -> Response[Any]:
        """Renew the session of a page that stays open; the answer is its new end."""
        if not sessions.is_due(session_of(request)):
            return page(request, "session.txt")
        await renew(request, sessions)
        return page(request, "session.txt")

    @post(
        "/sign-out",
        opt={ANYBODY: True, "action": Action.TOKEN_END_SESSION},
        status_code=HTTPStatus.OK,
    )
    async def sign_out(
        self, request: AnyRequest, sessions: NamedDependency[Sessions]
    ) -> Response[Any]:
        """End the session, here and wherever a copy of its cookie is."""
        set_session(request, None)
        await sessions.end(session_of(request), origin_of(request.scope))
        return redirect(request, f"{SIGN_IN}?signed_out=1")


def _go_on(request: AnyRequest, following: str, kept: Sequence[tuple[str, str]]) -> Response[Any]:
    return page(request, "resume.html", following=following, kept=kept, not_typed=NOT_TYPED)
