"""`/console/me`: what whoever is signed in sees of itself, and the rotation of its credential.

Holds no rule, and shows nothing of anybody else.
"""

from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from litestar import Controller, Response, get, post
from litestar.di import NamedDependency

from service.authority.audit import Action
from service.authority.errors import Conflict
from service.authority.model import Clock, Credential, Label
from service.authority.operators import Operator
from service.authority.own_credentials import OVERLAP, OwnCredentials, successor_of
from service.authority.sessions import Session
from service.console.gate import form_of
from service.console.page import page
from service.console.samples import Installation
from service.console.service_user_form import fits, one_line
from service.http.context import AnyRequest, note, origin_of


class OwnController(Controller):
    """One's own facts and credentials."""

    path = "/me"

    @get("/", opt={"action": Action.SERVICE_USER_READ})
    async def me(
        self,
        request: AnyRequest,
        operator: NamedDependency[Operator],
        own_credentials: NamedDependency[OwnCredentials],
        clock: NamedDependency[Clock],
    ) -> Response[Any]:
        """Show who is signed in, and its credentials with their last use."""
        credentials = await own_credentials.credentials(operator)
        own = _own(operator, credentials)
        return page(
            request,
            "own/me.html",
            user=operator.service_user,
            credentials=[
                (each, each.state(clock()), each.ends_soon(clock())) for each in credentials
            ],
            own=own,
            successor=own and successor_of(own, credentials),
            labels={each.id: each.label for each in credentials},
        )

    @get("/rotate", opt={"action": Action.CREDENTIAL_ROTATE})
    async def ask_rotate(
        self,
        request: AnyRequest,
        operator: NamedDependency[Operator],
        own_credentials: NamedDependency[OwnCredentials],
    ) -> Response[Any]:
        """Say what a rotation ends, and when."""
        return await _asked(request, operator, own_credentials)

    @post("/rotate", status_code=HTTPStatus.OK, opt={"action": Action.CREDENTIAL_ROTATE})
    async def rotate(
        self,
        request: AnyRequest,
        operator: NamedDependency[Operator],
        own_credentials: NamedDependency[OwnCredentials],
        installation: NamedDependency[Installation],
    ) -> Response[Any]:
        """Make the successor; this answer is the only one that ever shows its secret."""
        label = one_line(form_of(request), "label")
        if not fits(label, Label):
            note(request.scope, refused="invalid")
            return await _asked(
                request,
                operator,
                own_credentials,
                status=HTTPStatus.UNPROCESSABLE_ENTITY,
                wrong="Expected 1 to 100 characters.",
            )
        try:
            rotated = await own_credentials.rotate(operator, label, origin_of(request.scope))
        except Conflict as error:
            note(request.scope, refused=error.reason)
            of_label = error.pointer == "/label"
            return await _asked(
                request,
                operator,
                own_credentials,
                status=HTTPStatus.CONFLICT,
                wrong=error.detail if of_label else "",
                error="" if of_label else error.detail,
            )
        return page(
            request,
            "own/rotated.html",
            user=operator.service_user,
            successor=rotated.successor,
            old=rotated.old,
            secret=rotated.secret.reveal(),
            token_url=installation.token_url,
        )


async def own_home(
    request: AnyRequest,
    session: Session,
    own_credentials: OwnCredentials,
    installation: Installation,
    now: float,
) -> Response[Any]:
    """Show an integrator what it can do here, and whether its credential ends soon."""
    operator = session.operator
    own = _own(operator, await own_credentials.credentials(operator))
    return page(
        request,
        "own/home.html",
        user=session.service_user,
        own=own,
        token_url=installation.token_url,
        ends_soon=own is not None and own.ends_soon(now),
    )


def _own(operator: Operator, credentials: Sequence[Credential]) -> Credential | None:
    return next((each for each in credentials if each.id == operator.credential_id), None)


async def _asked(
    request: AnyRequest,
    operator: Operator,
    own_credentials: OwnCredentials,
    *,
    status: HTTPStatus = HTTPStatus.OK,
    wrong: str = "",
    error: str = "",
) -> Response[Any]:
    own = _own(operator, await own_credentials.credentials(operator))
    return page(
        request,
        "own/rotate.html",
        status=status,
        user=operator.service_user,
        own=own,
        overlap_days=OVERLAP.days,
        label=one_line(form_of(request), "label"),
        wrong=wrong,
        error=error,
    )
