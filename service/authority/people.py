"""People: who signs in through the human portal is a service user like any other, but without a
credential. What the portal says of them is what they may do; whether they may come in is ours.

Speaks no OpenID Connect, and decides no sign-in: `sessions.py` does.
"""

import hashlib
import re
import unicodedata
from base64 import b32encode
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, Final, Protocol

import msgspec
import structlog
from msgspec import Struct

from service.authority.administration import difference, rights
from service.authority.audit import Action, AuditRecord, Outcome, new_record_id, personal
from service.authority.errors import Conflict, TemporarilyUnavailable
from service.authority.model import (
    ADMIN_SCOPES,
    PEOPLE,
    AdminScope,
    ClientAddress,
    Clock,
    ServiceUser,
    Status,
    Subject,
)

MAX_NAME: Final = 63
MAX_LINE: Final = 200
TOKEN_LIFETIME: Final = 900
ACTOR: Final = "privyseal console"
_BEYOND_A_NAME: Final = re.compile(r"[^a-z0-9.]+")
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")

log = structlog.stdlib.get_logger()


class Identity(Struct, frozen=True, kw_only=True):
    """Who somebody is, as the portal says: verified, but in the portal's own words."""

    issuer: str
    subject: str
    """What the portal never gives to anybody else: OpenID Connect's `sub`."""
    username: str = ""
    name: str = ""
    email: str = ""
    scopes: tuple[str, ...] = ()

    @property
    def service_user_id(self) -> str:
        """The id of this person here: 120 bits of the SHA-256 of issuer and subject."""
        digest = hashlib.sha256(msgspec.json.encode([self.issuer, self.subject])).digest()
        return f"su_{b32encode(digest[:15]).decode('ascii').lower()}"


class PeopleStore(Protocol):
    """What of `administration.ServiceUserStore` it takes to keep people."""

    async def fresh(self, client_id: str) -> Subject: ...

    async def create(self, user: ServiceUser, record: AuditRecord) -> bool: ...

    async def change(self, user: ServiceUser, record: AuditRecord) -> bool: ...


class People:
    """Keeps the service user of each person as the portal described it at the last sign-in."""

    def __init__(self, *, store: PeopleStore, api_audience: str, clock: Clock) -> None:
        self._store = store
        self._api_audience = api_audience
        self._clock = clock

    async def arrived(self, identity: Identity, origin: ClientAddress) -> str:
        """Return the id of the person's service user, who may from now on do what the portal says.

        It is created or changed only if that differs, on record. Who was disabled stays as it is.
        Raise TemporarilyUnavailable if it was changed twice meanwhile, and StoreUnavailable.
        """
        if unknown := sorted({*identity.scopes} - ADMIN_SCOPES):
            log.warning(
                "unknown_scopes_ignored",
                service_user_id=identity.service_user_id,
                scopes=[scope[:64] for scope in unknown[:10]],
            )
        for _ in range(2):
            before = (await self._store.fresh(identity.service_user_id)).service_user
            if before is None:
                done = await self._create(identity, origin)
            else:
                after = described(before, identity, self._api_audience)
                done = (
                    after == before
                    or not before.is_active
                    or await self._store.change(
                        after,
                        self._record(
                            Action.SERVICE_USER_CHANGE,
                            before,
                            before.version,
                            difference(before, after),
                            origin,
                        ),
                    )
                )
            if done:
                return identity.service_user_id
        raise TemporarilyUnavailable("this person was changed twice while they signed in")

    async def _create(self, identity: Identity, origin: ClientAddress) -> bool:
        created_at = datetime.fromtimestamp(self._clock(), UTC)
        for name in names(identity):
            person = newcomer(identity, name, self._api_audience, created_at)
            record = self._record(Action.SERVICE_USER_CREATE, person, 0, rights(person), origin)
            try:
                return await self._store.create(person, record)
            except Conflict:
                continue  # the name is somebody else's
        raise TemporarilyUnavailable("every name for this person is taken")

    def _record(
        self,
        action: Action,
        person: ServiceUser,
        version: int,
        details: dict[str, Any],
        origin: ClientAddress,
    ) -> AuditRecord:
        return AuditRecord(
            id=new_record_id(self._clock()),
            action=action,
            outcome=Outcome.SUCCESS,
            service_user_id=person.id,
            service_user=person.name,
            source_system=person.source_system,
            version=version,
            actor=ACTOR,
            details=details,
            **personal(origin),
        )


def newcomer(identity: Identity, name: str, api_audience: str, created_at: datetime) -> ServiceUser:
    """Return the service user of a person who was never here."""
    person = ServiceUser(
        id=identity.service_user_id,
        name=name,
        source_system=PEOPLE,
        owner="",
        contact="",
        description="",
        scopes=(),
        audiences=(api_audience,),
        token_lifetime=TOKEN_LIFETIME,
        status=Status.ACTIVE,
        version=1,
        created_at=created_at,
    )
    return described(person, identity, api_audience)


def described(person: ServiceUser, identity: Identity, api_audience: str) -> ServiceUser:
    """Return a person as the portal describes them now.

    The name stays: records are found by it, and nobody shall take another's by renaming themselves
    elsewhere. Of what the portal grants, only what opens something here counts: no person gets a
    token for another service.
    """
    return msgspec.structs.replace(
        person,
        owner=_line(identity.name),
        contact=_line(identity.email),
        description=f"Signs in through {identity.issuer} as {_line(identity.subject)}",
        scopes=tuple(scope for scope in AdminScope if scope in identity.scopes),
        audiences=(api_audience,),
    )


def names(identity: Identity) -> Iterator[str]:
    """Return names for a new person in the form of ours, the nicest first, the last one free."""
    wanted = identity.username or identity.email or identity.name
    plain = unicodedata.normalize("NFKD", wanted.partition("@")[0]).encode("ascii", "ignore")
    name = _BEYOND_A_NAME.sub("-", plain.decode("ascii").lower()).strip("-.") or "person"
    own = identity.service_user_id.removeprefix("su_")
    yield name[:MAX_NAME]
    for ending in (own[:6], own):
        yield f"{name[: MAX_NAME - 1 - len(ending)]}-{ending}"


def _line(text: str) -> str:
    return _CONTROL.sub("", text)[:MAX_LINE]
