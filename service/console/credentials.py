"""`/console/service-users/…/credentials`: made, confirmed and revoked; a secret is shown once.

Holds no rule: each act is the API's own. What a revocation breaks is asked before it.
"""

import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from typing import Any, Final

from litestar import Controller, Response, get, post
from litestar.di import NamedDependency

from service.authority.administration import Administration, NewCredential
from service.authority.audit import Action
from service.authority.confirmation import Confirmations
from service.authority.errors import Conflict, Invalid, NotFound
from service.authority.model import (
    CREDENTIAL_ID,
    AdminScope,
    Clock,
    ReasonText,
    ServiceUser,
    new_id,
)
from service.authority.operators import Operator
from service.authority.usage import CredentialUse, ServiceUserUse, Usage, UseStanding
from service.console.forms import Form
from service.console.gate import form_of
from service.console.page import page, redirect
from service.console.samples import Installation
from service.console.service_user_form import checked, fits, one_line
from service.console.service_users import PATH, beside
from service.http.context import (
    AnyRequest,
    CredentialIdInPath,
    ServiceUserIdInPath,
    note,
    origin_of,
)
from service.http.errors import Refused

LIFETIMES: Final[Mapping[str, str]] = {
    "30": "30 days",
    "90": "90 days",
    "365": "a year",
}
"""How long a credential lives, in days: what a form offers."""
NO_EXPIRY: Final = "Expected one of these, or a day as 2027-01-31."


class CredentialController(Controller):
    """The credentials of one service user."""

    path = "/service-users/{service_user_id:str}/credentials"

    @get("/new", opt={"action": Action.CREDENTIAL_LIST})
    async def ask(
        self,
        request: AnyRequest,
        service_user_id: ServiceUserIdInPath,
        operator: NamedDependency[Operator],
        administration: NamedDependency[Administration],
        clock: NamedDependency[Clock],
    ) -> Response[Any]:
        """Ask what the new credential is for, and how long it lives."""
        operator.require(AdminScope.SERVICE_USERS_WRITE)
        return page(
            request,
            "service_users/new_credential.html",
            user=await administration.read(operator, service_user_id),
            typed={"label": "", "lifetime": "365", "until": ""},
            wrong={},
            problem="",
            **await choices(operator, administration, service_user_id, clock()),
        )

    @post("/new", opt={"action": Action.CREDENTIAL_CREATE}, status_code=HTTPStatus.OK)
    async def create(
        self,
        request: AnyRequest,
        service_user_id: ServiceUserIdInPath,
        operator: NamedDependency[Operator],
        administration: NamedDependency[Administration],
        installation: NamedDependency[Installation],
        clock: NamedDependency[Clock],
    ) -> Response[Any]:
        """Create a credential; this answer is the only one that ever shows its secret."""
        form = form_of(request)
        typed = {
            "label": one_line(form, "label"),
            "lifetime": form.text("lifetime"),
            "until": form.text("until"),
        }
        user = await administration.read(operator, service_user_id)
        expires_at = expiry(form, clock())
        asked = checked(NewCredential, {"label": typed["label"]})
        wrong = dict(asked) if isinstance(asked, dict) else {}
        if expires_at is None:
            wrong["expires_at"] = NO_EXPIRY
        problem, status = "", HTTPStatus.UNPROCESSABLE_ENTITY
        if wrong:
            note(request.scope, refused=Invalid.reason)
        else:
            new = NewCredential(label=typed["label"], expires_at=expires_at)
            try:
                credential, secret = await administration.create_credential(
                    operator,
                    service_user_id,
                    new,
                    origin_of(request.scope),
                    credential_id=id_of(form),
                )
            except (Invalid, Conflict) as error:
                if error.pointer == "/id":
                    return made_already(request, user)
                wrong, problem, status = beside(request, error)
            else:
                return page(
                    request,
                    "service_users/credential_made.html",
                    status=HTTPStatus.CREATED,
                    user=user,
                    credential=credential,
                    client_secret=secret.reveal(),
                    token_url=installation.token_url,
                )
        return page(
            request,
            "service_users/new_credential.html",
            status=status,
            user=user,
            typed=typed,
            wrong=wrong,
            problem=problem,
            **await choices(operator, administration, service_user_id, clock()),
        )

    @get("/{credential_id:str}/revoke", opt={"action": Action.CREDENTIAL_LIST})
    async def ask_revoke(
        self,
        request: AnyRequest,
        service_user_id: ServiceUserIdInPath,
        credential_id: CredentialIdInPath,
        operator: NamedDependency[Operator],
        usage: NamedDependency[Usage],
    ) -> Response[Any]:
        """Say what it breaks to revoke a credential, and ask again."""
        operator.require(AdminScope.SERVICE_USERS_WRITE)
        of = await usage.of(operator, service_user_id)
        return _revoking(request, operator, of, _one(of, credential_id))

    @post(
        "/{credential_id:str}/revoke",
        opt={"action": Action.CREDENTIAL_REVOKE},
        status_code=HTTPStatus.OK,
    )
    async def revoke(
        self,
        request: AnyRequest,
        service_user_id: ServiceUserIdInPath,
        credential_id: CredentialIdInPath,
        operator: NamedDependency[Operator],
        administration: NamedDependency[Administration],
        usage: NamedDependency[Usage],
    ) -> Response[Any]:
        """Revoke a credential; one that is in use, only for who typed what tells it from others."""
        of = await usage.of(operator, service_user_id)
        one = _one(of, credential_id)
        typed = one_line(form_of(request), "label")
        if one.used_recently and typed != _distinction(of, one):
            note(request.scope, refused=Invalid.reason)
            return _revoking(
                request,
                operator,
                of,
                one,
                typed=typed,
                wrong="This is something else. Nothing was revoked.",
                status=HTTPStatus.UNPROCESSABLE_ENTITY,
            )
        try:
            await administration.revoke_credential(
                operator, service_user_id, credential_id, origin_of(request.scope)
            )
        except Conflict as error:
            _, problem, status = beside(request, error)
            return _revoking(request, operator, of, one, problem=problem, status=status)
        return redirect(request, f"{PATH}/{service_user_id}?done=revoked")

    @get("/{credential_id:str}/confirm", opt={"action": Action.CREDENTIAL_LIST})
    async def ask_confirm(
        self,
        request: AnyRequest,
        service_user_id: ServiceUserIdInPath,
        credential_id: CredentialIdInPath,
        operator: NamedDependency[Operator],
        usage: NamedDependency[Usage],
    ) -> Response[Any]:
        """Say why a credential is held, and ask whether it is known to be good."""
        operator.require(AdminScope.SERVICE_USERS_WRITE)
        of = await usage.of(operator, service_user_id)
        return _confirming(request, of, _one(of, credential_id))

    @post(
        "/{credential_id:str}/confirm",
        opt={"action": Action.CREDENTIAL_CONFIRM},
        status_code=HTTPStatus.OK,
    )
    async def confirm(
        self,
        request: AnyRequest,
        service_user_id: ServiceUserIdInPath,
        credential_id: CredentialIdInPath,
        operator: NamedDependency[Operator],
        usage: NamedDependency[Usage],
        confirmations: NamedDependency[Confirmations],
    ) -> Response[Any]:
        """Confirm a credential that is held after a restore: from now on it gets tokens again."""
        reason = one_line(form_of(request), "reason")
        if not fits(reason, ReasonText):
            note(request.scope, refused=Invalid.reason)
            of = await usage.of(operator, service_user_id)
            return _confirming(
                request,
                of,
                _one(of, credential_id),
                typed=reason,
                wrong="Expected 3 to 200 characters: they go on record.",
                status=HTTPStatus.UNPROCESSABLE_ENTITY,
            )
        await confirmations.confirm(
            operator, service_user_id, credential_id, reason, origin_of(request.scope)
        )
        return redirect(request, f"{PATH}/{service_user_id}?done=confirmed")


async def choices(
    operator: Operator, administration: Administration, service_user_id: str, now: float
) -> dict[str, Any]:
    """Return what each form for a new credential is made with: how long it may live, the labels
    that are taken, and the id that it will have."""
    credentials = await administration.credentials(operator, service_user_id)
    tomorrow = datetime.fromtimestamp(now, UTC) + timedelta(days=1)
    return {
        "lifetimes": LIFETIMES,
        "first_day": tomorrow.date().isoformat(),
        "taken": sorted({each.label for each in credentials if not each.has_ended(now)}),
        "credential_id": new_id("cr"),
    }


def id_of(form: Form) -> str | None:
    """Return the id that a form brings along: it makes one credential, however often it is sent.

    None, and a new id each time, for a form without one.
    """
    offered = form.text("credential_id")
    if offered and not re.fullmatch(CREDENTIAL_ID, offered):
        raise Refused(HTTPStatus.BAD_REQUEST, "This form was not made here. Open it again.")
    return offered or None


def made_already(request: AnyRequest, user: ServiceUser) -> Response[Any]:
    """Say that this form was sent before, as a page does that is loaded again."""
    note(request.scope, refused=Conflict.reason)
    return page(
        request,
        "service_users/made_already.html",
        status=HTTPStatus.CONFLICT,
        user=user,
        credential_id=id_of(form_of(request)),
    )


def expiry(form: Form, now: float) -> datetime | None:
    """Return when a credential shall end: with a day in UTC, or else so many days from now."""
    if until := form.text("until"):
        try:
            return datetime.fromisoformat(f"{until}T23:59:59+00:00")
        except ValueError:
            return None
    if (days := form.text("lifetime")) not in LIFETIMES:
        return None
    return datetime.fromtimestamp(int(now), UTC) + timedelta(days=int(days))


def _one(of: ServiceUserUse, credential_id: str) -> CredentialUse:
    for each in of.credentials:
        if each.credential.id == credential_id:
            return each
    raise NotFound(f"{of.service_user.name} has no such credential.")


def _distinction(of: ServiceUserUse, one: CredentialUse) -> str:
    """Return what tells a credential from the others that live: its label, or else the end of its
    id."""
    label = one.credential.label.split()
    others = (each for each in of.credentials if each is not one)
    if any(
        each.credential.label.split() == label and each.standing is not UseStanding.ENDED
        for each in others
    ):
        return one.credential.id[-6:]
    return " ".join(label)


def _revoking(
    request: AnyRequest,
    operator: Operator,
    of: ServiceUserUse,
    one: CredentialUse,
    *,
    typed: str = "",
    wrong: str = "",
    problem: str = "",
    status: HTTPStatus = HTTPStatus.OK,
) -> Response[Any]:
    return page(
        request,
        "service_users/revoke.html",
        status=status,
        of=of,
        one=one,
        to_type=_distinction(of, one),
        is_own=one.credential.id == operator.credential_id,
        typed=typed,
        wrong=wrong,
        problem=problem,
    )


def _confirming(
    request: AnyRequest,
    of: ServiceUserUse,
    one: CredentialUse,
    *,
    typed: str = "",
    wrong: str = "",
    status: HTTPStatus = HTTPStatus.OK,
) -> Response[Any]:
    return page(
        request,
        "service_users/confirm.html",
        status=status,
        of=of,
        one=one,
        typed=typed,
        wrong=wrong,
    )
