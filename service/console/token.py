"""`/console/token`: one token by hand, to try with; shown once, and kept nowhere."""

import json
from base64 import urlsafe_b64decode
from http import HTTPStatus
from typing import Any, Final

from litestar import Controller, Response, get, post
from litestar.di import NamedDependency
from litestar.params import FromQuery
from msgspec import Struct

from keys.secret import Secret
from service.authority.audit import Action
from service.authority.by_hand import TokensByHand
from service.authority.errors import Forbidden, NotFound, OAuthError
from service.authority.model import ServiceUser
from service.console.forms import Form
from service.console.gate import form_of, session_of
from service.console.page import page, redirect
from service.http.context import AnyRequest, ServiceUserIdInPath, note, origin_of
from service.http.errors import status_of

_PATH: Final = "/console/token"


class Wanted(Struct, frozen=True, kw_only=True):
    """What a form asks for; all that is granted for the first audience, to begin with."""

    audience: str
    scopes: tuple[str, ...]
    granted: tuple[str, ...]

    @classmethod
    def everything(cls, user: ServiceUser) -> "Wanted":
        """Return what an exchange without parameters asks for."""
        return cls(audience=user.audiences[0], scopes=user.scopes, granted=user.scopes)

    @classmethod
    def of_form(cls, user: ServiceUser, form: Form) -> "Wanted":
        """Return what was ticked."""
        audience = form.text("audience") or user.audiences[0]
        return cls(audience=audience, scopes=tuple(form.all("scope")), granted=user.scopes)

    @property
    def scope(self) -> str | None:
        """The scope to ask for; None for all that there are."""
        return None if {*self.scopes} == {*self.granted} else " ".join(self.scopes)


class TokenController(Controller):
    """Choose a service user, mint, copy."""

    path = "/token"

    @get("/", opt={"action": Action.TOKEN_MINT})
    async def ask(
        self,
        request: AnyRequest,
        by_hand: NamedDependency[TokensByHand],
        service_user: FromQuery[str] = "",
    ) -> Response[Any]:
        """Ask for whom, and then for which token."""
        user = await chosen(request, by_hand, service_user.strip(), "token/ask.html")
        if isinstance(user, Response):
            return user
        return page(request, "token/ask.html", user=user, wanted=Wanted.everything(user), error="")

    @get("/names", opt={"action": Action.SERVICE_USER_LIST})
    async def names(
        self,
        request: AnyRequest,
        by_hand: NamedDependency[TokensByHand],
        beginning: FromQuery[str] = "",
    ) -> Response[Any]:
        """Answer with the names that begin like what was typed, one a line."""
        names = await by_hand.names(session_of(request), beginning)
        return page(request, "token/names.txt", names=names)

    @get("/{service_user_id:str}", opt={"action": Action.TOKEN_MINT})
    async def reopened(
        self, request: AnyRequest, service_user_id: ServiceUserIdInPath
    ) -> Response[Any]:
        """Lead whoever opens the address of a minted token once more to the form: it is gone."""
        return redirect(request, f"{_PATH}?service_user={service_user_id}")

    @post("/{service_user_id:str}", status_code=HTTPStatus.OK, opt={"action": Action.TOKEN_MINT})
    async def mint(
        self,
        request: AnyRequest,
        service_user_id: ServiceUserIdInPath,
        by_hand: NamedDependency[TokensByHand],
    ) -> Response[Any]:
        """Mint a token and show it this once."""
        user = await chosen(request, by_hand, service_user_id, "token/ask.html")
        if isinstance(user, Response):
            return user
        wanted = Wanted.of_form(user, form_of(request))
        try:
            token = await by_hand.mint(
                session_of(request),
                service_user_id,
                scope=wanted.scope,
                resource=wanted.audience,
                origin=origin_of(request.scope),
            )
        except OAuthError as error:
            return page(
                request,
                "token/ask.html",
                status=told(request, error),
                user=user,
                wanted=wanted,
                error=error.description,
            )
        header, claims = decoded(token.token)
        return page(
            request, "token/minted.html", user=user, token=token, header=header, claims=claims
        )


async def chosen(
    request: AnyRequest, by_hand: TokensByHand, wanted: str, template: str, **context: Any
) -> ServiceUser | Response[Any]:
    """Return for whom to mint, or the page that asks for it and says why it was not that one."""
    session = session_of(request)
    error, status = "", int(HTTPStatus.OK)
    if wanted or not session.is_operator:
        try:
            return await by_hand.service_user(session, wanted)
        except (Forbidden, NotFound) as refusal:
            error, status = refusal.detail, told(request, refusal)
    return page(
        request,
        template,
        status=status,
        user=None,
        typed=wanted,
        error=error,
        names=await by_hand.names(session, ""),
        **context,
    )


def told(request: AnyRequest, error: Forbidden | NotFound | OAuthError) -> HTTPStatus:
    """Return the status of a refusal that is shown beside its form; it goes on record like any."""
    note(request.scope, refused=error.reason)
    if isinstance(error, OAuthError):
        return HTTPStatus.UNPROCESSABLE_ENTITY
    return status_of(error)


def decoded(token: Secret) -> tuple[str, str]:
    """Return header and claims of a token of our own, laid out for people."""
    header, claims, _ = token.reveal().split(".")
    return _laid_out(header), _laid_out(claims)


def _laid_out(segment: str) -> str:
    content = urlsafe_b64decode(segment + "=" * (-len(segment) % 4))
    return json.dumps(json.loads(content), indent=2)
