"""What a service user may do about its own credentials: see them, and replace the one that it has.

No scope is asked for here, and nobody's but the caller's are touched.
"""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Final, Protocol

from msgspec import Struct
from msgspec.structs import replace

from keys.secret import Secret
from service.authority.administration import require_own_label, require_room
from service.authority.audit import Action, AuditRecord, Outcome, new_record_id, personal
from service.authority.client_auth import new_secret, secret_sha256
from service.authority.errors import Conflict
from service.authority.model import ClientAddress, Clock, Credential, Subject, new_id
from service.authority.operators import Operator, Operators

OVERLAP: Final = timedelta(days=7)
"""For so long an old credential still gets tokens beside its successor."""


class CredentialsOfOne(Protocol):
    """Credentials in Postgres; every method may raise StoreUnavailable."""

    async def fresh(self, client_id: str) -> Subject:
        """Return a service user and its credentials as they are now."""
        ...

    async def credentials(self, service_user_id: str) -> Sequence[Credential]:
        """Return all credentials, the newest first, with their last use."""
        ...

    async def rotate_credential(
        self, old_id: str, successor: Credential, overlap: timedelta, record: AuditRecord
    ) -> bool:
        """Add the successor, let the old one end after `overlap` at the latest, and put it on
        record; return False, having done nothing, if what it was decided on changed."""
        ...


class Rotated(Struct, frozen=True, kw_only=True):
    """A successor with its secret, which is shown once, and the old one with its new end."""

    successor: Credential
    secret: Secret
    old: Credential


class OwnCredentials:
    """What whoever is signed in, or calls, does about itself."""

    def __init__(self, *, store: CredentialsOfOne, operators: Operators, clock: Clock) -> None:
        self._store = store
        self._operators = operators
        self._clock = clock

    async def credentials(self, operator: Operator) -> Sequence[Credential]:
        """Return the caller's own credentials, the newest first, those that ended too."""
        return await self._store.credentials(operator.service_user.id)

    async def rotate(self, operator: Operator, label: str, origin: ClientAddress) -> Rotated:
        """Make the successor of the credential behind this call; that one ends in 7 days.

        The successor lives as long as the old one was made for: nobody prolongs what an operator
        meant to be short. Raise Conflict if there is a successor already, no credential to
        replace, no room for one more, or another live credential with that label.
        """
        secret = new_secret()

        async def act(operator: Operator) -> Rotated | None:
            user = operator.service_user
            operator.require_all(user.admin_scopes)
            subject = await self._store.fresh(user.id)
            old = replaceable(subject, operator.credential_id, self._clock())
            now = datetime.fromtimestamp(self._clock(), UTC)
            successor = Credential(
                id=new_id("cr"),
                service_user_id=user.id,
                label=label,
                secret_sha256=secret_sha256(secret),
                created_at=now,
                expires_at=now + _lifetime(subject, old),
                succeeds=old.id,
            )
            require_own_label(subject, successor, self._clock())
            ends_at = min(old.expires_at, now + OVERLAP)
            record = AuditRecord(
                id=new_record_id(self._clock()),
                action=Action.CREDENTIAL_ROTATE,
                outcome=Outcome.SUCCESS,
                service_user_id=user.id,
                service_user=user.name,
                source_system=user.source_system,
                version=user.version,
                credential_id=successor.id,
                details={
                    "label": label,
                    "expires_at": successor.expires_at,
                    "replaces": old.id,
                    "which_ends_at": ends_at,
                },
                **operator.as_actor(),
                **personal(origin),
            )
            if not await self._store.rotate_credential(old.id, successor, OVERLAP, record):
                return None
            return Rotated(successor=successor, secret=secret, old=replace(old, expires_at=ends_at))

        return await self._operators.decided_on_current(operator, act)


def replaceable(subject: Subject, credential_id: str | None, now: float) -> Credential:
    """Return the credential that may be replaced; raise Conflict, in words, if none may."""
    old = next((each for each in subject.credentials if each.id == credential_id), None)
    if old is None:
        # A token that was minted by hand has none either: its minter must not get a secret by it.
        raise Conflict("There is no credential behind this sign-in or token that could be rotated.")
    if successor := successor_of(old, subject.credentials):
        raise Conflict(
            f"“{old.label}” was rotated: its successor is “{successor.label}”. Sign in with that "
            "one. If its secret is lost, ask an operator to revoke it; then you can rotate again."
        )
    require_room(subject, now)
    return old


def successor_of(old: Credential, credentials: Sequence[Credential]) -> Credential | None:
    """Return what a credential was rotated to, unless that is revoked."""
    return next((each for each in _successors(old, credentials) if not each.revoked_at), None)


def _successors(old: Credential, credentials: Sequence[Credential]) -> list[Credential]:
    return [each for each in credentials if each.succeeds == old.id]


def _lifetime(subject: Subject, old: Credential) -> timedelta:
    # One that was rotated before, to a successor that is revoked, does not tell any more.
    made = next(iter(_successors(old, subject.credentials)), old)
    return made.expires_at - made.created_at
