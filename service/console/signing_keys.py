"""`/console/signing-keys`: the ring as a picture and a table, and what operators do with it.

Shows no private half; decides nothing about a key.
"""

from contextlib import suppress
from http import HTTPStatus
from typing import Any, Final

import msgspec
from litestar import Controller, Response, get, post
from litestar.di import NamedDependency

from keys.keyring import KeyState, SigningKey
from service.authority.attention import NAMED, Watch
from service.authority.audit import Action
from service.authority.errors import (
    AdminRefusal,
    Conflict,
    Invalid,
    PreconditionFailed,
    StoreUnavailable,
    TemporarilyUnavailable,
    Unauthenticated,
)
from service.authority.key_administration import KeyAdministration, Outlook, Revocation
from service.authority.key_rotation import EndedKey
from service.authority.model import AdminScope, ReasonText
from service.authority.operators import Operator
from service.authority.sessions import Sessions
from service.console.gate import form_of, renew
from service.console.page import page, redirect
from service.console.timeline import Life, timeline
from service.http.context import AnyRequest, KidInPath, note, noted, origin_of
from service.http.errors import status_of

HERE: Final = "/console/signing-keys"
ALL: Final = "revoke all"
"""What is typed to revoke all keys; to revoke one, the beginning of its kid is."""
SHORT: Final = 8
MAX_VERIFIERS: Final = 50
JUST_NOW: Final = 600.0
"""Seconds for which a key that began to sign is pointed out."""


class SigningKeysController(Controller):
    """Signing keys."""

    path = "/signing-keys"

    @get("/", opt={"action": Action.SIGNING_KEY_LIST})
    async def list_(
        self,
        request: AnyRequest,
        operator: NamedDependency[Operator],
        key_administration: NamedDependency[KeyAdministration],
        watch: NamedDependency[Watch],
    ) -> Response[Any]:
        """Show the ring: what signs, what will, and what did."""
        outlook = await key_administration.outlook(operator)
        return _ring(request, operator, outlook, watch)

    @post("/rotate", status_code=HTTPStatus.OK, opt={"action": Action.SIGNING_KEY_ROTATE})
    async def rotate(
        self,
        request: AnyRequest,
        operator: NamedDependency[Operator],
        key_administration: NamedDependency[KeyAdministration],
        watch: NamedDependency[Watch],
    ) -> Response[Any]:
        """Rotate as soon as the next key was published long enough; the page then says when."""
        operator.require(AdminScope.SIGNING_KEYS_ROTATE)
        try:
            reason = _reason(request)
            await key_administration.rotate(operator, reason, origin_of(request.scope))
        except (Invalid, Conflict) as error:
            if AdminScope.SIGNING_KEYS_READ not in operator.scopes:
                raise
            outlook = await key_administration.outlook(operator)
            return _ring(request, operator, outlook, watch, refusal=error)
        return redirect(request, HERE)

    @get("/revoke-all", opt={"action": Action.SIGNING_KEY_REVOKE_ALL})
    async def ask_to_revoke_all(
        self,
        request: AnyRequest,
        operator: NamedDependency[Operator],
        key_administration: NamedDependency[KeyAdministration],
    ) -> Response[Any]:
        """Say what it costs to revoke all keys, and ask again."""
        return await _ask(request, operator, key_administration, None)

    @post("/revoke-all", status_code=HTTPStatus.OK, opt={"action": Action.SIGNING_KEY_REVOKE_ALL})
    async def revoke_all(
        self,
        request: AnyRequest,
        operator: NamedDependency[Operator],
        key_administration: NamedDependency[KeyAdministration],
        sessions: NamedDependency[Sessions],
    ) -> Response[Any]:
        """Revoke every published key; two new ones are put in, of which one signs at once."""
        try:
            _require_typed(request, ALL)
            revocation = await key_administration.revoke_all(
                operator,
                _reason(request),
                origin_of(request.scope),
                if_signing=form_of(request).text("signing"),
            )
        except (Invalid, Conflict, PreconditionFailed) as error:
            return await _ask(request, operator, key_administration, None, refusal=error)
        return await _revoked(request, sessions, revocation)

    @get("/{kid:str}/revoke", opt={"action": Action.SIGNING_KEY_REVOKE})
    async def ask_to_revoke(
        self,
        request: AnyRequest,
        kid: KidInPath,
        operator: NamedDependency[Operator],
        key_administration: NamedDependency[KeyAdministration],
    ) -> Response[Any]:
        """Say what it costs to revoke a key, and ask again."""
        return await _ask(request, operator, key_administration, kid)

    @post("/{kid:str}/revoke", status_code=HTTPStatus.OK, opt={"action": Action.SIGNING_KEY_REVOKE})
    async def revoke(
        self,
        request: AnyRequest,
        kid: KidInPath,
        operator: NamedDependency[Operator],
        key_administration: NamedDependency[KeyAdministration],
        sessions: NamedDependency[Sessions],
    ) -> Response[Any]:
        """Revoke a key. From this answer on no process signs with it."""
        try:
            _require_typed(request, kid[:SHORT])
            revocation = await key_administration.revoke(
                operator, kid, _reason(request), origin_of(request.scope)
            )
        except (Invalid, Conflict) as error:
            return await _ask(request, operator, key_administration, kid, refusal=error)
        return await _revoked(request, sessions, revocation)


def _ring(
    request: AnyRequest,
    operator: Operator,
    outlook: Outlook,
    watch: Watch,
    *,
    refusal: AdminRefusal | None = None,
) -> Response[Any]:
    now: float = noted(request.scope, "now")
    active = next((key for key in outlook.keys if key.state is KeyState.ACTIVE), None)
    lacking = [each for each in outlook.verifiers if not each.has_loaded]
    return page(
        request,
        "signing_keys/ring.html",
        status=_refused(request, refusal),
        timeline=timeline(
            [_life(key) for key in [*outlook.keys, *outlook.ended]], now, outlook.next_signs_from
        ),
        outlook=outlook,
        active=active,
        pending=next((key for key in outlook.keys if key.state is KeyState.PENDING), None),
        just_now=active is not None and now - (active.activated_at or 0) < JUST_NOW,
        lacking=lacking[:MAX_VERIFIERS],
        lacking_count=len(lacking),
        attention=watch.keys(),
        may_rotate=AdminScope.SIGNING_KEYS_ROTATE in operator.scopes,
        may_revoke=AdminScope.SIGNING_KEYS_REVOKE in operator.scopes,
        refusal=refusal,
        reason=form_of(request).text("reason"),
        short=SHORT,
    )


async def _ask(
    request: AnyRequest,
    operator: Operator,
    key_administration: KeyAdministration,
    kid: str | None,
    *,
    refusal: AdminRefusal | None = None,
) -> Response[Any]:
    stakes = await key_administration.stakes(operator, kid)
    form = form_of(request)
    active = next((key for key in stakes.keys if key.state is KeyState.ACTIVE), None)
    return page(
        request,
        "signing_keys/revoke.html",
        status=_refused(request, refusal),
        action=f"{HERE}/revoke-all" if kid is None else f"{HERE}/{kid}/revoke",
        kid=kid,
        stakes=stakes,
        state=None if kid is None else stakes.keys[0].state,
        signing=active.kid if active else "",
        to_type=ALL if kid is None else kid[:SHORT],
        accepted_for=key_administration.accepted_for,
        refusal=refusal,
        typed=form.text("confirm"),
        reason=form.text("reason"),
        short=SHORT,
        named=NAMED,
    )


async def _revoked(
    request: AnyRequest, sessions: Sessions, revocation: Revocation
) -> Response[Any]:
    """Show what was done, and go on with a session that no revoked key signed.

    It is done: whoever cannot stay signed in has to be told that all the same.
    """
    with suppress(TemporarilyUnavailable, StoreUnavailable, Unauthenticated):
        await renew(request, sessions)
    return page(
        request, "signing_keys/revoked.html", revocation=revocation, short=SHORT, named=NAMED
    )


def _refused(request: AnyRequest, refusal: AdminRefusal | None) -> HTTPStatus:
    """Return the status of a page, and have a refusal that it tells put on record."""
    if refusal is None:
        return HTTPStatus.OK
    note(request.scope, refused=refusal.reason)
    return status_of(refusal)


def _reason(request: AnyRequest) -> str:
    """Return why, in one line."""
    try:
        return msgspec.convert(" ".join(form_of(request).text("reason").split()), ReasonText)
    except msgspec.ValidationError:
        raise Invalid("Say why in 3 to 200 characters.", "/reason") from None


def _require_typed(request: AnyRequest, expected: str) -> None:
    if form_of(request).text("confirm") != expected:
        raise Invalid(f"Type {expected} to confirm.", "/confirm")


def _life(key: SigningKey | EndedKey) -> Life:
    return Life(
        kid=key.kid,
        state=key.state,
        published_at=key.published_at,
        activated_at=key.activated_at,
        ends_at=key.ended_at if isinstance(key, EndedKey) else key.publish_until,
    )
