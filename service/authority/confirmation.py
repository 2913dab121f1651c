"""Credentials that are held after a restore: an operator confirms those that are known to be good.

Holds none, and knows of none whether it was revoked after the backup: the database forgot.
"""

from collections.abc import Sequence
from typing import Final, Protocol

from msgspec import Struct
from msgspec.structs import replace

from service.authority.audit import Action, AuditRecord, Outcome, new_record_id, personal
from service.authority.errors import Conflict, NotFound
from service.authority.model import (
    AdminScope,
    ClientAddress,
    Clock,
    Credential,
    OwnedCredential,
    Subject,
)
from service.authority.operators import Operator, Operators

PAGE: Final = 200
"""Credentials in one act: others wait for the fence meanwhile."""


class HeldAfterRestore(Protocol):
    """Finds credentials that wait for an operator after a restore."""

    async def held_after_restore(
        self, after: str, limit: int, service_user_id: str | None
    ) -> Sequence[OwnedCredential]:
        """Return those that are held and have not ended, by id, starting after the id `after`;
        raise StoreUnavailable."""
        ...


class HeldCredentials(HeldAfterRestore, Protocol):
    """Held credentials in Postgres; every method may raise StoreUnavailable."""

    async def fresh(self, client_id: str) -> Subject:
        """Return a service user and its credentials as they are now."""
        ...

    async def confirm(self, records: Sequence[AuditRecord]) -> Sequence[bool]:
        """Confirm the credentials of these records; say of each, in order, whether what it was
        decided on was still in force. Those are confirmed, each with its record."""
        ...


class Confirmed(Struct, frozen=True, kw_only=True):
    """What became of held credentials; of `left` the operator lacks a scope of their holder's."""

    confirmed: list[OwnedCredential]
    left: list[OwnedCredential]


class Confirmations:
    """What operators do about held credentials. Each method raises an AdminRefusal, or the errors
    of a store away.

    Whoever confirms a credential holds every admin scope of its service user, as whoever makes one
    does.
    """

    def __init__(self, *, store: HeldCredentials, operators: Operators, clock: Clock) -> None:
        self._store = store
        self._operators = operators
        self._clock = clock

    async def confirm(
        self,
        operator: Operator,
        service_user_id: str,
        credential_id: str,
        reason: str,
        origin: ClientAddress,
    ) -> Credential:
        """Confirm one credential, and return it; one that is not held is left as it is."""

        async def act(operator: Operator) -> Credential | None:
            operator.require(AdminScope.SERVICE_USERS_WRITE)
            subject = await self._store.fresh(service_user_id)
            user = subject.service_user
            if user is None:
                raise NotFound("There is no such service user.")
            operator.require_all(user.admin_scopes)
            found = next((each for each in subject.credentials if each.id == credential_id), None)
            if found is None:
                raise NotFound(f"{user.name} has no such credential.")
            if found.has_ended(self._clock()):
                raise Conflict("This credential has ended. Create a new one.")
            if found.held_at is None:
                return found
            held = OwnedCredential(service_user=user, credential=found)
            (done,) = await self._store.confirm([self._record(held, operator, reason, origin)])
            return replace(found, held_at=None) if done else None

        return await self._operators.decided_on_current(operator, act)

    async def confirm_all(
        self, operator: Operator, service_user_id: str | None, reason: str, origin: ClientAddress
    ) -> Confirmed:
        """Confirm every held credential, of one service user if it is given.

        Page by page, each on record: when this fails half-way, to call it again does the rest.
        """
        confirmed: list[OwnedCredential] = []
        left: list[OwnedCredential] = []
        after = ""

        async def act(operator: Operator) -> Sequence[OwnedCredential] | None:
            operator.require(AdminScope.SERVICE_USERS_WRITE)
            page = await self._store.held_after_restore(after, PAGE, service_user_id)
            mine = [each for each in page if each.service_user.admin_scopes <= operator.scopes]
            records = [self._record(each, operator, reason, origin) for each in mine]
            done: Sequence[bool] = await self._store.confirm(records) if records else []
            confirmed.extend(each for each, was in zip(mine, done, strict=True) if was)
            if not all(done):
                return None
            left.extend(each for each in page if each not in mine)
            return page

        while page := await self._operators.decided_on_current(operator, act):
            after = page[-1].credential.id
        return Confirmed(confirmed=confirmed, left=left)

    def _record(
        self, held: OwnedCredential, operator: Operator, reason: str, origin: ClientAddress
    ) -> AuditRecord:
        user = held.service_user
        return AuditRecord(
            id=new_record_id(self._clock()),
            action=Action.CREDENTIAL_CONFIRM,
            outcome=Outcome.SUCCESS,
            reason=reason,
            service_user_id=user.id,
            service_user=user.name,
            source_system=user.source_system,
            version=user.version,
            credential_id=held.credential.id,
            details={"label": held.credential.label},
            **operator.as_actor(),
            **personal(origin),
        )
