"""Hand-over: whoever has the code of a credential opens it, once, and only then is its secret made.

Offers none: `administration.py` does. It asks nobody who they are: the code is all that there is.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final, Protocol

from msgspec import Struct
from msgspec.structs import replace

from keys.secret import Secret
from service.authority.audit import (
    Action,
    AuditLog,
    AuditRecord,
    Outcome,
    new_record_id,
    personal,
)
from service.authority.client_auth import new_secret, secret_sha256
from service.authority.errors import AdminRefusal, Conflict, NotFound, TemporarilyUnavailable
from service.authority.model import (
    SHOWN_DAYS,
    AdminScope,
    ClientAddress,
    Clock,
    Credential,
    OwnedCredential,
    ServiceUser,
)
from service.authority.operators import Operator

SHOWN: Final = 20


class RefusedOpening(Struct, frozen=True, kw_only=True):
    """Somebody had the code of a hand-over and got nothing: from where, and who got it before.

    The newest of its credential, of `count`. `address` and `opened_from` are null once they were
    erased. `is_reload` says that all of them came from the address and the browser that opened it,
    as when a page is loaded again.
    """

    service_user_id: str
    service_user: str
    credential_id: str
    label: str
    at: datetime
    reason: str
    count: int
    address: str | None
    opened_at: datetime | None
    opened_from: str | None
    is_reload: bool


class HandedOver(Protocol):
    """Hand-overs in Postgres; every method may raise StoreUnavailable."""

    async def handed_over(self, code_sha256: bytes) -> OwnedCredential | None:
        """Return the credential with this code, in whatever state, and whose it is."""
        ...

    async def open_hand_over(
        self, code_sha256: bytes, secret_sha256: bytes, record: AuditRecord
    ) -> bool:
        """Put the secret in, with the record; return False, having done nothing, if somebody did
        already, or anything that it was decided on changed."""
        ...

    async def refused_openings(
        self, days: int, limit: int, service_user_id: str | None
    ) -> Sequence[RefusedOpening]:
        """Return those of so many days, one for each credential that is not revoked, the newest
        first."""
        ...


class Opened(Struct, frozen=True, kw_only=True):
    """A credential that was handed over, with its secret, which cannot be had a second time."""

    service_user: ServiceUser
    credential: Credential
    secret: Secret


class HandOvers:
    """Opens what was handed over, and tells operators where that was refused."""

    def __init__(self, *, store: HandedOver, audit: AuditLog, clock: Clock) -> None:
        self._store = store
        self._audit = audit
        self._clock = clock

    async def open(self, code: Secret, origin: ClientAddress) -> Opened:
        """Make the secret of the credential with this code.

        Raise NotFound for a code that nobody handed over, and Conflict, in words, for one that
        opens nothing any more. The refusal is on record then, under its credential and address.
        """
        code_sha256, secret = secret_sha256(code), new_secret()
        for _ in range(2):
            offered = await self._store.handed_over(code_sha256)
            if offered is None:
                await self._audit.append_or_count(self._refusal("unknown_code", None, origin))
                raise NotFound("This link is not known here. Copy all of it, or ask for a new one.")
            if (refused := why_not(offered, self._clock())) is not None:
                reason, refusal = refused
                if await self._audit.append(self._refusal(reason, offered, origin)):
                    raise refusal
                continue
            opened = replace(offered.credential, opened_at=self._now())
            record = self._record(Outcome.SUCCESS, None, offered, origin)
            if await self._store.open_hand_over(code_sha256, secret_sha256(secret), record):
                return Opened(service_user=offered.service_user, credential=opened, secret=secret)
        raise TemporarilyUnavailable("what was decided on changed twice while it was decided")

    async def refused(
        self, operator: Operator, service_user_id: str | None = None
    ) -> Sequence[RefusedOpening]:
        """Return the refused openings of late, of one service user if it is given. None of a
        credential that was revoked since."""
        operator.require(AdminScope.SERVICE_USERS_READ)
        return await self._store.refused_openings(SHOWN_DAYS, SHOWN, service_user_id)

    def _refusal(
        self, reason: str, offered: OwnedCredential | None, origin: ClientAddress
    ) -> AuditRecord:
        return self._record(Outcome.REFUSED, reason, offered, origin)

    def _record(
        self,
        outcome: Outcome,
        reason: str | None,
        offered: OwnedCredential | None,
        origin: ClientAddress,
    ) -> AuditRecord:
        user = offered.service_user if offered else None
        return AuditRecord(
            id=new_record_id(self._clock()),
            action=Action.CREDENTIAL_OPEN,
            outcome=outcome,
            reason=reason,
            service_user_id=user.id if user else None,
            service_user=user.name if user else None,
            source_system=user.source_system if user else None,
            version=user.version if user else None,
            credential_id=offered.credential.id if offered else None,
            details={"label": offered.credential.label} if offered else {},
            **personal(origin),
        )

    def _now(self) -> datetime:
        return datetime.fromtimestamp(self._clock(), UTC)


def why_not(offered: OwnedCredential, now: float) -> tuple[str, AdminRefusal] | None:
    """Return why this hand-over cannot be opened, for the record and in words, or None if it can.

    Whoever has the code may know: it was made for them.
    """
    user, credential = offered.service_user, offered.credential
    if credential.opened_at is not None:
        opened_at = credential.opened_at.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")
        return "hand_over_opened", Conflict(
            f"This link was opened on {opened_at}, and opens once. If that was not you, somebody "
            "else has the secret: tell whoever sent the link, so that they revoke it at once."
        )
    match credential.state(now):
        case "offered":
            if user.is_active:
                return None
            reason, what = "service_user_disabled", f"The service user {user.name} is disabled."
        case "held":
            reason = "credential_held"
            what = "This link is held after a restore until an operator confirms it."
        case "revoked":
            reason, what = "revoked_credential", "This link was withdrawn."
        case _:
            reason, what = "hand_over_lapsed", "This link was not opened in time."
    return reason, Conflict(f"{what} Ask whoever sent it.")
