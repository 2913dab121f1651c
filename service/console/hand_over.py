"""Hand-over: an operator makes a link, and whoever gets it opens it.

Holds no rule, and sees a code only in the form that brings it: in no address, and so in no log.
"""

from http import HTTPStatus
from typing import Any

from litestar import Controller, Response, get, post
from litestar.di import NamedDependency

from keys.secret import Secret
from service.authority.administration import Administration, NewCredential
from service.authority.audit import Action
from service.authority.errors import Conflict, Invalid, NotFound
from service.authority.hand_over import HandOvers
from service.authority.model import AdminScope, Clock
from service.authority.operators import Operator
from service.console.credentials import NO_EXPIRY, choices, expiry, id_of, made_already
from service.console.forms import Form
from service.console.gate import PUBLIC, form_of
from service.console.page import page
from service.console.samples import Installation
from service.console.service_user_form import checked, one_line
from service.http.context import AnyRequest, ServiceUserIdInPath, note, origin_of
from service.http.errors import status_of


class HandOverController(Controller):
    """Make a link, for operators."""

    path = "/service-users/{service_user_id:str}/hand-over"

    @get("/", opt={"action": Action.CREDENTIAL_HAND_OVER})
    async def ask(
        self,
        service_user_id: ServiceUserIdInPath,
        request: AnyRequest,
        operator: NamedDependency[Operator],
        administration: NamedDependency[Administration],
        clock: NamedDependency[Clock],
    ) -> Response[Any]:
        """Ask what the credential shall be called, and how long it lives."""
        operator.require(AdminScope.SERVICE_USERS_WRITE)
        return await _asked(request, operator, administration, service_user_id, clock())

    @post("/", status_code=HTTPStatus.OK, opt={"action": Action.CREDENTIAL_HAND_OVER})
    async def offer(
        self,
        service_user_id: ServiceUserIdInPath,
        request: AnyRequest,
        operator: NamedDependency[Operator],
        administration: NamedDependency[Administration],
        clock: NamedDependency[Clock],
    ) -> Response[Any]:
        """Make the link, and show it this once."""
        form = form_of(request)
        user = await administration.read(operator, service_user_id)
        try:
            new = _new_credential(form, clock())
            offered = await administration.hand_over(
                operator,
                service_user_id,
                new,
                origin_of(request.scope),
                credential_id=id_of(form),
            )
        except (Invalid, Conflict) as error:
            if error.pointer == "/id":
                return made_already(request, user)
            note(request.scope, refused=error.reason)
            return await _asked(request, operator, administration, service_user_id, clock(), error)
        return page(
            request,
            "hand_over/offered.html",
            user=user,
            credential=offered.credential,
            link=offered.link.reveal(),
        )


class OpeningController(Controller):
    """Open a link: for whoever has it, signed in or not."""

    path = "/hand-over"

    @get("/", opt={PUBLIC: True})
    async def ask(self, request: AnyRequest) -> Response[Any]:
        """Ask for the code; a script takes it out of the address, which no server ever sees.

        Nothing is opened by looking, so a preview of the link takes nothing away.
        """
        return page(request, "hand_over/open.html", error="", is_dead=False)

    # No CSRF token: there is no session that another site could misuse, and whoever could send
    # the code from elsewhere has it, and could open it here.
    @post(
        "/",
        status_code=HTTPStatus.OK,
        opt={PUBLIC: True, "action": Action.CREDENTIAL_OPEN},
    )
    async def open(
        self,
        request: AnyRequest,
        hand_overs: NamedDependency[HandOvers],
        installation: NamedDependency[Installation],
    ) -> Response[Any]:
        """Make the secret, and show it this once."""
        # Who pastes the whole link means the same.
        code = Secret(form_of(request).text("code").rpartition("#")[2])
        # A refusal is on record when it is raised, under the credential that it is about.
        try:
            opened = await hand_overs.open(code, origin_of(request.scope))
        except (NotFound, Conflict) as error:
            return page(
                request,
                "hand_over/open.html",
                status=status_of(error),
                error=error.detail,
                is_dead=isinstance(error, Conflict),
            )
        return page(
            request,
            "hand_over/opened.html",
            user=opened.service_user,
            credential=opened.credential,
            secret=opened.secret.reveal(),
            token_url=installation.token_url,
        )


def _new_credential(form: Form, now: float) -> NewCredential:
    if (expires_at := expiry(form, now)) is None:
        raise Invalid(NO_EXPIRY, "/expires_at")
    asked = checked(NewCredential, {"label": one_line(form, "label"), "expires_at": expires_at})
    if isinstance(asked, dict):
        raise Invalid(asked["label"], "/label")
    return asked


async def _asked(
    request: AnyRequest,
    operator: Operator,
    administration: Administration,
    service_user_id: str,
    now: float,
    error: Invalid | Conflict | None = None,
) -> Response[Any]:
    return page(
        request,
        "hand_over/offer.html",
        status=status_of(error) if error else HTTPStatus.OK,
        user=await administration.read(operator, service_user_id),
        form=form_of(request),
        wrong=error.pointer.removeprefix("/") if error else "",
        error=error.detail if error else "",
        **await choices(operator, administration, service_user_id, now),
    )
