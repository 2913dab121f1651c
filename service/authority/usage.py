"""When service users and their credentials were used last, and what that says about letting go.

Changes nothing. It knows what is on record here; whether an application still holds a secret that
it has not used, nobody can know.
"""

from collections.abc import AsyncGenerator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Final, Protocol

from msgspec import Struct
from msgspec.structs import replace

from service.authority.errors import NotFound
from service.authority.model import (
    ENDS_SOON,
    AdminScope,
    Clock,
    Credential,
    ServiceUser,
    ServiceUserFilter,
    Subject,
)
from service.authority.operators import Operator

RECENTLY: Final = timedelta(days=7)
"""Whatever used a credential within this time is taken to use it still."""
MANY_TOKENS: Final = 1000
"""Live tokens are counted up to this: a page must not take longer for who has more."""
ENDING_AT_A_TIME: Final = 200
"""Credentials that end are read so many at a time, needed or not."""

_SOON: Final = timedelta(seconds=ENDS_SOON)


class Use(Struct, frozen=True, kw_only=True):
    """One exchange: when, and from where unless that was erased or archived."""

    at: datetime
    client_address: str | None = None


class UseStanding(StrEnum):
    """What revoking a credential would do to whoever uses it."""

    ENDED = "ended"
    """Nothing any more."""
    UNREPLACED = "unreplaced"
    """No live credential was made after it."""
    USED = "used"
    """It was used since a newer one was made: something did not move over."""
    TOO_EARLY = "too_early"
    """It was not used since, but was used, or made, so lately that something may come yet."""
    SAFE = "safe"
    """Nothing used it since a newer one was made, nor lately, and it is not new itself."""


class CredentialUse(Struct, frozen=True, kw_only=True):
    """A credential, its last use, and how it stands beside the next one that was made."""

    credential: Credential
    last_use: Use | None
    successor: Credential | None
    """The first live credential that was made after it."""
    standing: UseStanding
    used_recently: bool
    ends_soon: bool


class LiveTokenCount(Struct, frozen=True, kw_only=True):
    """How many tokens are accepted offline now, counted up to MANY_TOKENS, and until when."""

    count: int
    last_ends_at: datetime | None


class ServiceUserUse(Struct, frozen=True, kw_only=True):
    """A service user with all that its page tells about use."""

    service_user: ServiceUser
    credentials: Sequence[CredentialUse]
    last_use: Use | None
    live_tokens: LiveTokenCount


class ListedServiceUser(Struct, frozen=True, kw_only=True):
    """A service user as one row: its last use, its live credentials, the first end among them
    that is near."""

    service_user: ServiceUser
    last_used_at: datetime | None
    live_credentials: int
    first_end: datetime | None


class EndingCredential(Struct, frozen=True, kw_only=True):
    """A live credential that ends. `replaced_at` is since when its service user has another one:
    live, made after it, and good for longer."""

    service_user_id: str
    service_user: str
    owner: str
    contact: str
    credential_id: str
    label: str
    expires_at: datetime
    last_used_at: datetime | None
    replaced_at: datetime | None

    @property
    def is_needed(self) -> bool:
        """Whether anything stops when it ends, as far as is known: nothing has replaced it, or it
        was used since."""
        return self.replaced_at is None or (
            self.last_used_at is not None and self.last_used_at >= self.replaced_at
        )


class UseStore(Protocol):
    """Service users and their uses in Postgres; every method may raise StoreUnavailable."""

    async def fresh(self, client_id: str) -> Subject: ...

    async def credentials(self, service_user_id: str) -> Sequence[Credential]: ...


class Uses(Protocol):
    """The last uses on record; every method may raise StoreUnavailable."""

    async def of_credentials(self, service_user_id: str) -> Mapping[str, Use]:
        """Return the last use of each credential that has one in the log, by its id."""
        ...

    async def of_service_user(self, service_user_id: str) -> Use | None:
        """Return its last exchange that is in the log."""
        ...

    async def live_tokens(self, service_user_id: str, at_most: int) -> LiveTokenCount:
        """Count its tokens that have not expired and whose key was not revoked, up to `at_most`."""
        ...

    async def page(
        self, wanted: ServiceUserFilter, *, after: str, limit: int, ending_within: timedelta
    ) -> Sequence[ListedServiceUser]:
        """Return service users by name, starting after the name `after`."""
        ...

    async def source_systems(self, limit: int) -> Sequence[str]:
        """Return the first source systems that service users have."""
        ...

    async def ending(
        self, within: timedelta, *, after: tuple[datetime, str] | None, limit: int
    ) -> Sequence[EndingCredential]:
        """Return live credentials of active service users that end, by their end, then their id,
        starting after such a place."""
        ...


class Usage:
    """What operators see of the use of service users. Each method raises an AdminRefusal, or the
    errors of a store away."""

    def __init__(self, *, store: UseStore, uses: Uses, clock: Clock) -> None:
        self._store = store
        self._uses = uses
        self._clock = clock

    async def of(self, operator: Operator, service_user_id: str) -> ServiceUserUse:
        """Return a service user with its credentials, the newest first, and how they are used.

        From where is for those to know who may read the audit log.
        """
        operator.require(AdminScope.SERVICE_USERS_READ)
        user = (await self._store.fresh(service_user_id)).service_user
        if user is None:
            raise NotFound("There is no such service user.")
        credentials = await self._store.credentials(service_user_id)
        uses = await self._uses.of_credentials(service_user_id)
        last_use = await self._uses.of_service_user(service_user_id)
        if AdminScope.AUDIT_READ not in operator.scopes:
            uses = {each: replace(use, client_address=None) for each, use in uses.items()}
            last_use = last_use and replace(last_use, client_address=None)
        judged = judge(credentials, uses, self._clock())
        used = [each.last_use for each in judged if each.last_use]
        return ServiceUserUse(
            service_user=user,
            credentials=judged,
            # What the log no longer has, the credentials may still tell.
            last_use=last_use or max(used, key=lambda use: use.at, default=None),
            live_tokens=await self._uses.live_tokens(service_user_id, MANY_TOKENS),
        )

    async def page(
        self, operator: Operator, wanted: ServiceUserFilter, *, after: str, limit: int
    ) -> Sequence[ListedServiceUser]:
        """Return service users by name, starting after the name `after`."""
        operator.require(AdminScope.SERVICE_USERS_READ)
        return await self._uses.page(wanted, after=after, limit=limit, ending_within=_SOON)

    async def source_systems(self, operator: Operator, limit: int) -> Sequence[str]:
        """Return the first source systems that service users have, to choose from."""
        operator.require(AdminScope.SERVICE_USERS_READ)
        return await self._uses.source_systems(limit)

    async def ending(
        self, operator: Operator, *, after: tuple[datetime, str] | None = None, limit: int
    ) -> Sequence[EndingCredential]:
        """Return the credentials that end soon and are needed, the first end first."""
        operator.require(AdminScope.SERVICE_USERS_READ)
        found: list[EndingCredential] = []
        async for needed in self._needed(_SOON, after):
            found += needed
            if len(found) >= limit:
                break
        return found[:limit]

    async def count_ending(self, within: Sequence[timedelta]) -> Sequence[int]:
        """Count the credentials that end and are needed, for each of these times from now."""
        now = datetime.fromtimestamp(self._clock(), UTC)
        ends = [
            each.expires_at async for needed in self._needed(max(within), None) for each in needed
        ]
        return [sum(end - now < time for end in ends) for time in within]

    async def _needed(
        self, within: timedelta, after: tuple[datetime, str] | None
    ) -> AsyncGenerator[Sequence[EndingCredential], None]:
        while True:
            ending = await self._uses.ending(within, after=after, limit=ENDING_AT_A_TIME)
            yield [each for each in ending if each.is_needed]
            if len(ending) < ENDING_AT_A_TIME:
                return
            after = ending[-1].expires_at, ending[-1].credential_id


def judge(
    credentials: Sequence[Credential], uses: Mapping[str, Use], now: float
) -> list[CredentialUse]:
    """Return each credential with its last use and what it would mean to revoke it."""
    moment = datetime.fromtimestamp(now, UTC)

    def judged(credential: Credential) -> CredentialUse:
        last_use = uses.get(credential.id)
        if last_use is None and credential.last_used_at is not None:
            last_use = Use(at=credential.last_used_at)
        successor = min(
            (
                other
                for other in credentials
                if other.created_at > credential.created_at and other.is_live(now)
            ),
            key=usable_since,
            default=None,
        )
        ended = credential.has_ended(now)
        # One that was never used may not have been rolled out yet.
        lately = moment - (last_use.at if last_use else usable_since(credential)) < RECENTLY
        return CredentialUse(
            credential=credential,
            last_use=last_use,
            successor=successor,
            standing=UseStanding.ENDED if ended else _standing(last_use, successor, lately=lately),
            used_recently=last_use is not None and lately,
            ends_soon=not ended and credential.ends_soon(now),
        )

    return [judged(credential) for credential in credentials]


def usable_since(credential: Credential) -> datetime:
    """Return since when somebody can have the secret: one that is handed over is made later."""
    return credential.opened_at or credential.created_at


def _standing(last_use: Use | None, successor: Credential | None, *, lately: bool) -> UseStanding:
    if successor is None:
        return UseStanding.UNREPLACED
    if last_use is not None and last_use.at >= usable_since(successor):
        return UseStanding.USED
    return UseStanding.TOO_EARLY if lately else UseStanding.SAFE
