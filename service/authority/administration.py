"""Administrative acts: service users and their credentials, and who may do what to whom.

Every act is decided on versions and committed together with its record, under the fence: when it
returns, no process issues anything that it forbids.
"""

from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Protocol

import msgspec
import structlog
from msgspec import UNSET, Struct, UnsetType

from keys.secret import Secret
from service.authority.audit import Action, AuditRecord, Outcome, new_record_id, personal
from service.authority.client_auth import new_code, new_secret, secret_sha256
from service.authority.errors import (
    Conflict,
    Invalid,
    NotFound,
    PreconditionFailed,
    StoreUnavailable,
)
from service.authority.model import (
    MAX_LIVE_CREDENTIALS,
    PEOPLE,
    AdminScope,
    Audiences,
    ClientAddress,
    Clock,
    Credential,
    Instant,
    Label,
    Line,
    LiveTokens,
    Name,
    Scopes,
    ServiceUser,
    ServiceUserFilter,
    SourceSystem,
    Status,
    Subject,
    Text,
    TokenLifetime,
    new_id,
)
from service.authority.operators import Operator, Operators

DEFAULT_CREDENTIAL_LIFETIME: Final = timedelta(days=365)
MAX_CREDENTIAL_LIFETIME: Final = timedelta(days=5 * 366)
CODE_LIFETIME: Final = timedelta(hours=24)


log = structlog.stdlib.get_logger()


class ServiceUserStore(Protocol):
    """Service users and credentials in Postgres.

    Every write commits the record of the act with it, and returns False, having done nothing,
    when the versions in the record are no longer those in force. It raises Conflict for what the
    tables forbid, and StoreUnavailable.
    """

    async def fresh(self, client_id: str) -> Subject: ...

    async def page(
        self, wanted: ServiceUserFilter, *, after: str, limit: int
    ) -> Sequence[ServiceUser]: ...

    async def credentials(self, service_user_id: str) -> Sequence[Credential]: ...

    async def live_tokens(
        self, service_user_id: str, credential_id: str | None = None
    ) -> LiveTokens: ...

    async def create(self, user: ServiceUser, record: AuditRecord) -> bool: ...

    async def change(self, user: ServiceUser, record: AuditRecord) -> bool: ...

    async def create_credential(self, credential: Credential, record: AuditRecord) -> bool: ...

    async def hand_over(
        self, credential: Credential, code_sha256: bytes, record: AuditRecord
    ) -> bool: ...

    async def revoke_credential(self, credential_id: str, record: AuditRecord) -> bool: ...


class NewServiceUser(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What it takes to create a service user; what is left out has the installation's default."""

    name: Name
    source_system: SourceSystem
    owner: Line = ""
    contact: Line = ""
    description: Text = ""
    scopes: Scopes = []
    audiences: Audiences | UnsetType = UNSET
    token_lifetime: TokenLifetime | UnsetType = UNSET


class ServiceUserChange(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The fields of a service user to change; what is left out stays."""

    name: Name | UnsetType = UNSET
    source_system: SourceSystem | UnsetType = UNSET
    owner: Line | UnsetType = UNSET
    contact: Line | UnsetType = UNSET
    description: Text | UnsetType = UNSET
    scopes: Scopes | UnsetType = UNSET
    audiences: Audiences | UnsetType = UNSET
    token_lifetime: TokenLifetime | UnsetType = UNSET


class NewCredential(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What it takes to create a credential; it ends after a year unless said otherwise."""

    label: Label
    expires_at: Instant | None = None


class HandOver(Struct, frozen=True, kw_only=True):
    """A credential that nobody can use yet, and the link that opens it, which is shown this once.

    The code is in the fragment of the link: a browser sends that to no server.
    """

    credential: Credential
    link: Secret


class Defaults(Struct, frozen=True, kw_only=True):
    """What a new service user has unless told otherwise, and what an operator's tokens are for."""

    audience: str
    token_lifetime: int
    api_audience: str


class Administration:
    """What operators do. Each method raises an AdminRefusal, or the errors of a store away."""

    def __init__(
        self,
        *,
        store: ServiceUserStore,
        operators: Operators,
        clock: Clock,
        api_audience: str,
        console_audience: str,
        audience: str,
        token_lifetime: int,
    ) -> None:
        self._store = store
        self._operators = operators
        self._clock = clock
        self._api_audience = api_audience
        self._console_audience = console_audience
        self._audience = audience
        self._token_lifetime = token_lifetime

    @property
    def defaults(self) -> Defaults:
        """Return what a new service user has unless it is told otherwise."""
        return Defaults(
            audience=self._audience,
            token_lifetime=self._token_lifetime,
            api_audience=self._api_audience,
        )

    async def read(self, operator: Operator, service_user_id: str) -> ServiceUser:
        """Return one service user."""
        operator.require(AdminScope.SERVICE_USERS_READ)
        return _user(await self._store.fresh(service_user_id))

    async def page(
        self, operator: Operator, wanted: ServiceUserFilter, *, after: str, limit: int
    ) -> Sequence[ServiceUser]:
        """Return service users by name, starting after the name `after`."""
        operator.require(AdminScope.SERVICE_USERS_READ)
        return await self._store.page(wanted, after=after, limit=limit)

    async def credentials(self, operator: Operator, service_user_id: str) -> Sequence[Credential]:
        """Return the credentials of a service user, the newest first, those that ended too."""
        operator.require(AdminScope.SERVICE_USERS_READ)
        _user(await self._store.fresh(service_user_id))
        return await self._store.credentials(service_user_id)

    async def create(
        self, operator: Operator, new: NewServiceUser, origin: ClientAddress
    ) -> ServiceUser:
        """Create a service user; it can do nothing yet, since it has no credential."""
        created = ServiceUser(
            id=new_id("su"),
            name=new.name,
            source_system=new.source_system,
            owner=new.owner,
            contact=new.contact,
            description=new.description,
            scopes=_distinct(new.scopes, "/scopes"),
            audiences=(self._audience,)
            if new.audiences is UNSET
            else _distinct(new.audiences, "/audiences"),
            token_lifetime=self._token_lifetime
            if new.token_lifetime is UNSET
            else new.token_lifetime,
            status=Status.ACTIVE,
            version=1,
            created_at=self._now(),
        )

        async def act(operator: Operator) -> ServiceUser | None:
            operator.require(AdminScope.SERVICE_USERS_WRITE)
            operator.require_all(created.admin_scopes)
            self._require_fit_audiences(created)
            _require_no_person(created)
            record = self._record(
                Action.SERVICE_USER_CREATE, operator, created, 0, origin, rights(created)
            )
            return created if await self._store.create(created, record) else None

        return await self._operators.decided_on_current(operator, act)

    async def change(
        self,
        operator: Operator,
        service_user_id: str,
        change: ServiceUserChange,
        if_match: int,
        origin: ClientAddress,
    ) -> tuple[ServiceUser, LiveTokens | None]:
        """Change a service user that is still at version `if_match`."""
        fields = {
            name: value
            for name, value in msgspec.structs.asdict(change).items()
            if value is not UNSET
        }
        for name in ("scopes", "audiences"):
            if name in fields:
                fields[name] = _distinct(fields[name], f"/{name}")

        async def act(operator: Operator) -> ServiceUser | None:
            operator.require(AdminScope.SERVICE_USERS_WRITE)
            subject = await self._store.fresh(service_user_id)
            before = _user(subject)
            if before.version != if_match:
                raise PreconditionFailed(
                    f"{before.name} is at version {before.version} and not {if_match}: somebody "
                    "changed it. Read it again."
                )
            if before.is_person:
                raise Conflict(
                    f"{before.name} is a person, and what a person may do is set in the portal: it "
                    "counts from the next sign-in. Disable them here to keep them out."
                )
            after = msgspec.structs.replace(before, **fields)
            operator.require_all(before.admin_scopes | after.admin_scopes)
            self._require_fit_audiences(after)
            _require_no_person(after)
            if after.admin_scopes - before.admin_scopes and any(
                not each.has_ended(self._clock()) for each in subject.credentials
            ):
                # Whoever may have kept such a secret had not the rights to make one for this.
                raise Conflict(
                    f"{before.name} has live credentials, which would get "
                    f"{min(after.admin_scopes - before.admin_scopes)} too. Revoke them, change "
                    "it, and create a new one."
                )
            return await self._replace(Action.SERVICE_USER_CHANGE, operator, before, after, origin)

        return await self._with_live_tokens(await self._operators.decided_on_current(operator, act))

    async def disable(
        self, operator: Operator, service_user_id: str, origin: ClientAddress
    ) -> tuple[ServiceUser, LiveTokens | None]:
        """Disable a service user; from when this returns it gets no token from any process."""

        async def act(operator: Operator) -> ServiceUser | None:
            operator.require(AdminScope.SERVICE_USERS_WRITE)
            before = _user(await self._store.fresh(service_user_id))
            after = msgspec.structs.replace(before, status=Status.DISABLED)
            return await self._replace(Action.SERVICE_USER_DISABLE, operator, before, after, origin)

        return await self._with_live_tokens(await self._operators.decided_on_current(operator, act))

    async def enable(
        self, operator: Operator, service_user_id: str, origin: ClientAddress
    ) -> tuple[ServiceUser, LiveTokens | None]:
        """Enable a service user again, with the credentials that have not ended meanwhile."""

        async def act(operator: Operator) -> ServiceUser | None:
            operator.require(AdminScope.SERVICE_USERS_WRITE)
            before = _user(await self._store.fresh(service_user_id))
            operator.require_all(before.admin_scopes)
            after = msgspec.structs.replace(before, status=Status.ACTIVE)
            return await self._replace(Action.SERVICE_USER_ENABLE, operator, before, after, origin)

        return await self._with_live_tokens(await self._operators.decided_on_current(operator, act))

    async def create_credential(
        self,
        operator: Operator,
        service_user_id: str,
        new: NewCredential,
        origin: ClientAddress,
        *,
        credential_id: str | None = None,
    ) -> tuple[Credential, Secret]:
        """Create a credential and return its secret, which cannot be had a second time.

        Who asks under an id gets one credential, however often: the second time raises Conflict.
        """
        secret = new_secret()
        credential = self._credential(service_user_id, new, secret, credential_id)
        created = await self._add(
            Action.CREDENTIAL_CREATE, operator, credential, origin, self._store.create_credential
        )
        return created, secret

    async def hand_over(
        self,
        operator: Operator,
        service_user_id: str,
        new: NewCredential,
        origin: ClientAddress,
        *,
        credential_id: str | None = None,
    ) -> HandOver:
        """Create a credential whose secret is made when somebody opens the link, within 24 hours.

        It takes the rights to create one: whoever has the link can open it. The id is as for
        `create_credential`.
        """
        code = new_code()
        # Nobody ever sees this secret: the one that counts takes its place.
        credential = self._credential(service_user_id, new, new_secret(), credential_id)
        credential = msgspec.structs.replace(
            credential, code_ends_at=credential.created_at + CODE_LIFETIME
        )

        async def put(credential: Credential, record: AuditRecord) -> bool:
            return await self._store.hand_over(credential, secret_sha256(code), record)

        offered = await self._add(Action.CREDENTIAL_HAND_OVER, operator, credential, origin, put)
        link = f"{self._console_audience}/hand-over#{code.reveal()}"
        return HandOver(credential=offered, link=Secret(link))

    def _credential(
        self,
        service_user_id: str,
        new: NewCredential,
        secret: Secret,
        credential_id: str | None,
    ) -> Credential:
        now = self._now()
        return Credential(
            id=credential_id or new_id("cr"),
            service_user_id=service_user_id,
            label=new.label,
            secret_sha256=secret_sha256(secret),
            created_at=now,
            expires_at=_expiry(new.expires_at, now),
        )

    async def _add(
        self,
        action: Action,
        operator: Operator,
        credential: Credential,
        origin: ClientAddress,
        put: Callable[[Credential, AuditRecord], Awaitable[bool]],
    ) -> Credential:
        """Put one more credential on record, if this operator may give that service user one."""

        async def act(operator: Operator) -> Credential | None:
            operator.require(AdminScope.SERVICE_USERS_WRITE)
            subject = await self._store.fresh(credential.service_user_id)
            user = _user(subject)
            operator.require_all(user.admin_scopes)
            require_credentials_fit(user)
            require_room(subject, self._clock())
            require_own_label(subject, credential, self._clock())
            record = self._record(
                action,
                operator,
                user,
                user.version,
                origin,
                {"label": credential.label, "expires_at": credential.expires_at},
                credential_id=credential.id,
            )
            return credential if await put(credential, record) else None

        return await self._operators.decided_on_current(operator, act)

    async def revoke_credential(
        self,
        operator: Operator,
        service_user_id: str,
        credential_id: str,
        origin: ClientAddress,
        *,
        reason: str | None = None,
    ) -> tuple[Credential, LiveTokens | None]:
        """Revoke a credential; from when this returns it gets no token from any process."""

        async def act(operator: Operator) -> Credential | None:
            operator.require(AdminScope.SERVICE_USERS_WRITE)
            subject = await self._store.fresh(service_user_id)
            user = _user(subject)
            credential = next(
                (each for each in subject.credentials if each.id == credential_id), None
            )
            if credential is None:
                raise NotFound(f"{user.name} has no such credential.")
            record = self._record(
                Action.CREDENTIAL_REVOKE,
                operator,
                user,
                user.version,
                origin,
                {"label": credential.label},
                credential_id=credential_id,
                reason=reason,
            )
            done = await self._store.revoke_credential(credential_id, record)
            return credential if done else None

        credential = await self._operators.decided_on_current(operator, act)
        revoked_at = credential.revoked_at or self._now()
        revoked = msgspec.structs.replace(credential, revoked_at=revoked_at)
        with suppress(StoreUnavailable):
            subject = await self._store.fresh(service_user_id)
            revoked = next(each for each in subject.credentials if each.id == credential_id)
        return revoked, await self.live_tokens(service_user_id, credential_id)

    async def live_tokens(
        self, service_user_id: str, credential_id: str | None = None
    ) -> LiveTokens | None:
        """Return what is still accepted offline, of one credential if it is given.

        None if they cannot be counted: that must not hide that the act is done.
        """
        try:
            return await self._store.live_tokens(service_user_id, credential_id)
        except StoreUnavailable as error:
            log.warning("live_tokens_not_counted", error=str(error))
            return None

    def _require_fit_audiences(self, user: ServiceUser) -> None:
        """Raise Invalid for the console, which takes a sign-in, and for admin scopes that no token
        could carry: so the last operator would lock everybody out."""
        if self._console_audience in user.audiences:
            raise Invalid("No exchange gives a token for the console: sign in there.", "/audiences")
        if user.admin_scopes and self._api_audience not in user.audiences:
            raise Invalid(
                f"{min(user.admin_scopes)} needs the audience {self._api_audience}.", "/audiences"
            )

    async def _replace(
        self,
        action: Action,
        operator: Operator,
        before: ServiceUser,
        after: ServiceUser,
        origin: ClientAddress,
    ) -> ServiceUser | None:
        record = self._record(
            action, operator, before, before.version, origin, difference(before, after)
        )
        if not await self._store.change(after, record):
            return None
        return msgspec.structs.replace(after, version=before.version + 1)

    async def _with_live_tokens(self, user: ServiceUser) -> tuple[ServiceUser, LiveTokens | None]:
        return user, await self.live_tokens(user.id)

    def _record(
        self,
        action: Action,
        operator: Operator,
        user: ServiceUser,
        version: int,
        origin: ClientAddress,
        details: dict[str, Any],
        *,
        credential_id: str | None = None,
        reason: str | None = None,
    ) -> AuditRecord:
        return AuditRecord(
            id=new_record_id(self._clock()),
            action=action,
            outcome=Outcome.SUCCESS,
            reason=reason,
            service_user_id=user.id,
            service_user=user.name,
            source_system=user.source_system,
            version=version,
            credential_id=credential_id,
            details=details,
            **operator.as_actor(),
            **personal(origin),
        )

    def _now(self) -> datetime:
        return datetime.fromtimestamp(self._clock(), UTC)


def first_operator(
    name: str, api_audience: str, now: float, reason: str
) -> tuple[ServiceUser, Credential, Secret, AuditRecord]:
    """Return an operator with every admin scope, its credential, and the record of it."""
    created_at = datetime.fromtimestamp(now, UTC)
    secret = new_secret()
    user = ServiceUser(
        id=new_id("su"),
        name=name,
        source_system="operators",
        owner="",
        contact="",
        description="",
        scopes=tuple(AdminScope),
        audiences=(api_audience,),
        token_lifetime=900,
        status=Status.ACTIVE,
        version=1,
        created_at=created_at,
    )
    credential = Credential(
        id=new_id("cr"),
        service_user_id=user.id,
        label="bootstrap",
        secret_sha256=secret_sha256(secret),
        created_at=created_at,
        expires_at=created_at + DEFAULT_CREDENTIAL_LIFETIME,
    )
    record = AuditRecord(
        id=new_record_id(now),
        action=Action.OPERATOR_BOOTSTRAP,
        outcome=Outcome.SUCCESS,
        reason=reason,
        service_user_id=user.id,
        service_user=user.name,
        source_system=user.source_system,
        credential_id=credential.id,
        actor="privyseal bootstrap",
        details=rights(user),
    )
    return user, credential, secret, record


def require_credentials_fit(user: ServiceUser) -> None:
    """Raise Conflict for a person: their only way in is the portal, which knows when they leave."""
    if user.is_person:
        raise Conflict(f"{user.name} is a person, who signs in through the portal: no credentials.")


def require_room(subject: Subject, now: float) -> None:
    """Raise Conflict if a service user has as many credentials as it may, offered ones included."""
    live = sum(not each.has_ended(now) for each in subject.credentials)
    if live >= MAX_LIVE_CREDENTIALS:
        name = _user(subject).name
        raise Conflict(
            f"{name} has {live} live credentials, and that is the most. Revoke one first."
        )


def require_own_label(subject: Subject, new: Credential, now: float) -> None:
    """Raise Conflict for the label of another live credential: nobody could tell the two apart.

    That of one which was rotated may stay: who rotates by a job says the same each time, and the
    one before the last may live still.
    """
    label = new.label.split()
    rotated = {new.succeeds, *(each.succeeds for each in subject.credentials)}
    if any(
        each.label.split() == label
        and each.id != new.id
        and each.id not in rotated
        and not each.has_ended(now)
        for each in subject.credentials
    ):
        raise Conflict(
            f"{_user(subject).name} has a live credential with the label “{new.label}”. Choose "
            "another label.",
            "/label",
        )


def _require_no_person(user: ServiceUser) -> None:
    if user.is_person:
        raise Invalid(
            f"{PEOPLE} is the source system of people, who come by signing in.", "/source_system"
        )


def _user(subject: Subject) -> ServiceUser:
    if subject.service_user is None:
        raise NotFound("There is no such service user.")
    return subject.service_user


def _distinct(values: list[str], pointer: str) -> tuple[str, ...]:
    if len(set(values)) != len(values):
        raise Invalid("Each value may stand here once.", pointer)
    return tuple(values)


def _expiry(expires_at: datetime | None, now: datetime) -> datetime:
    if expires_at is None:
        return now + DEFAULT_CREDENTIAL_LIFETIME
    if expires_at.tzinfo is None:
        raise Invalid("A time needs its offset, as in 2027-01-31T12:00:00Z.", "/expires_at")
    if not now < expires_at <= now + MAX_CREDENTIAL_LIFETIME:
        raise Invalid(
            f"Expected a time between now and {MAX_CREDENTIAL_LIFETIME.days} days from now.",
            "/expires_at",
        )
    return expires_at.astimezone(UTC)


def rights(user: ServiceUser) -> dict[str, Any]:
    """What a record says of a new service user: what it may do, not whom to call."""
    return {
        "scopes": user.scopes,
        "audiences": user.audiences,
        "token_lifetime": user.token_lifetime,
    }


def difference(before: ServiceUser, after: ServiceUser) -> dict[str, Any]:
    """What a record says of a change. Owner and contact may be people: only that they changed."""
    changed: dict[str, Any] = {}
    for name in ("name", "source_system", "scopes", "audiences", "token_lifetime", "status"):
        old, new = getattr(before, name), getattr(after, name)
        if old != new:
            changed[name] = {"from": old, "to": new}
    for name in ("owner", "contact", "description"):
        if getattr(before, name) != getattr(after, name):
            changed[name] = "changed"
    return changed
