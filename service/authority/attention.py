"""What needs a person now: of the keys, the credentials and the log, and nothing that does not.

Mends nothing, and shows nobody what their scopes do not.
"""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Final, Protocol

from msgspec import Struct

from keys.keyring import Concern
from service.authority.audit import Action
from service.authority.audit.reading import PLACED_WITHIN
from service.authority.confirmation import HeldAfterRestore
from service.authority.model import ENDS_SOON, SHOWN_DAYS, AdminScope, Clock, OwnedCredential
from service.authority.operators import Operator
from service.authority.usage import EndingCredential

REFUSALS_HOURS: Final = 24
NAMED: Final = 10
"""Things of one kind that are named; of more only that there are more."""
LOOKED_AT: Final = 1000
"""Records of one kind that are counted, the newest: what is more is so many or more."""
ENDING_LOOKED_AT: Final = 100
"""Credentials that end next, of which those that nobody needs are left out."""


class Lately(Struct, frozen=True, kw_only=True):
    """Records of one kind: how many, the newest, and of which service users, where known."""

    count: int
    newest_at: datetime
    service_users: dict[str, str]
    """Ids and names."""


class Refusals(Struct, frozen=True, kw_only=True):
    """Refusals for one reason; `whom` names those of whom it is known, up to ten."""

    reason: str | None
    count: int
    newest_at: datetime
    whom: list[str]


class LogHead(Struct, frozen=True, kw_only=True):
    """The newest checkpoint, and since when the oldest record that it does not cover is waiting."""

    size: int
    signed_at: datetime | None
    waiting_since: datetime | None


class AttentionStore(Protocol):
    """What stands in Postgres; every method may raise StoreUnavailable, and looks at no more than
    it is told to, whatever there is."""

    async def tokens_on_no_record(self, action: Action, days: int, limit: int) -> Lately | None:
        """Return what was reported of tokens that are on no record, of the newest `limit` that got
        this action."""
        ...

    async def refused_openings(self, days: int, limit: int) -> Lately | None:
        """Return how often a hand-over was refused that was opened already, or too late."""
        ...

    async def refusals(self, hours: int, limit: int) -> tuple[Sequence[Refusals], bool]:
        """Return the newest `limit` refusals by reason, the most frequent first, and whether
        there may be more of the same age."""
        ...

    async def head(self) -> LogHead | None:
        """Return the newest checkpoint of the log; None while there is no log."""
        ...


class EndingCredentials(Protocol):
    """Finds credentials that end."""

    async def ending(
        self, within: timedelta, *, after: tuple[datetime, str] | None, limit: int
    ) -> Sequence[EndingCredential]:
        """Return live credentials of active service users that end, the first end first."""
        ...


class KeyWatch(Protocol):
    """Knows what a person has to look at about the signing keys."""

    @property
    def awaited(self) -> frozenset[str]:
        """The verifiers that a rotation which is due waits for."""
        ...

    def standing_concerns(self) -> tuple[Concern, ...]:
        """Return what will stop a rotation, or has stopped signing, and not just now."""
        ...


class LogWatch(Protocol):
    """Knows whether the log goes on from what was signed."""

    @property
    def broken(self) -> str | None:
        """Why nothing is issued, in words; None if the log is whole."""
        ...


class KeysNow(Struct, frozen=True, kw_only=True):
    """What a person has to look at about the signing keys, and whom a rotation waits for."""

    concerns: Sequence[Concern]
    awaited: Sequence[str]


class CredentialsNow(Struct, frozen=True, kw_only=True):
    """Credentials that somebody has to replace or to confirm, and openings that were refused.

    `more_end` says that there are more that end, and maybe have to be replaced, than are listed.
    """

    ending: Sequence[EndingCredential]
    more_end: bool
    held: Sequence[OwnedCredential]
    refused_openings: Lately | None


class LogNow(Struct, frozen=True, kw_only=True):
    """What the log says of the last days, and how it stands itself."""

    unknown_tokens: Lately | None
    unverifiable_tokens: Lately | None
    refusals: Sequence[Refusals]
    more_refusals: bool
    head: LogHead | None
    is_behind: bool
    """Whether a record waits for its checkpoint longer than it should."""


class Attention(Struct, frozen=True, kw_only=True):
    """What needs a person; None is what the scopes of who asks do not show."""

    log_broken: str | None
    keys: KeysNow | None
    credentials: CredentialsNow | None
    log: LogNow | None

    @property
    def is_called_for(self) -> bool:
        """Whether there is anything to do. Refusals alone are none: most of them end there."""
        keys, credentials, log = self.keys, self.credentials, self.log
        return bool(
            self.log_broken
            or (keys and keys.concerns)
            or (
                credentials
                and (
                    credentials.ending
                    or credentials.more_end
                    or credentials.held
                    or credentials.refused_openings
                )
            )
            or (log and (log.unknown_tokens or log.unverifiable_tokens or log.is_behind))
        )


class Watch:
    """Gathers it, as it is now."""

    def __init__(
        self,
        *,
        store: AttentionStore,
        uses: EndingCredentials,
        held: HeldAfterRestore,
        keys: KeyWatch,
        log: LogWatch,
        clock: Clock,
    ) -> None:
        self._store = store
        self._uses = uses
        self._held = held
        self._key_watch = keys
        self._log = log
        self._clock = clock

    async def look(self, operator: Operator) -> Attention:
        """Return what needs a person; of each list one more than is named, if there are more.

        Raise StoreUnavailable.
        """
        scopes = operator.scopes
        return Attention(
            log_broken=self._log.broken,
            keys=self.keys() if AdminScope.SIGNING_KEYS_READ in scopes else None,
            credentials=await self._of_credentials()
            if AdminScope.SERVICE_USERS_READ in scopes
            else None,
            log=await self._of_the_log() if AdminScope.AUDIT_READ in scopes else None,
        )

    def keys(self) -> KeysNow:
        """Return what a person has to look at about the signing keys, as this process sees it."""
        return KeysNow(
            concerns=self._key_watch.standing_concerns(), awaited=sorted(self._key_watch.awaited)
        )

    async def _of_credentials(self) -> CredentialsNow:
        ending = await self._uses.ending(
            timedelta(seconds=ENDS_SOON), after=None, limit=ENDING_LOOKED_AT
        )
        needed = [each for each in ending if each.is_needed]
        return CredentialsNow(
            ending=needed[:NAMED],
            more_end=len(needed) > NAMED or len(ending) == ENDING_LOOKED_AT,
            held=await self._held.held_after_restore("", NAMED + 1, None),
            refused_openings=await self._store.refused_openings(SHOWN_DAYS, LOOKED_AT),
        )

    async def _of_the_log(self) -> LogNow:
        refusals, more = await self._store.refusals(REFUSALS_HOURS, LOOKED_AT)
        head = await self._store.head()
        return LogNow(
            unknown_tokens=await self._store.tokens_on_no_record(
                Action.TOKEN_UNKNOWN, SHOWN_DAYS, LOOKED_AT
            ),
            unverifiable_tokens=await self._store.tokens_on_no_record(
                Action.TOKEN_UNVERIFIABLE, SHOWN_DAYS, LOOKED_AT
            ),
            refusals=refusals,
            more_refusals=more,
            head=head,
            is_behind=head is not None and is_behind(head, self._clock()),
        )


def is_behind(head: LogHead, now: float) -> bool:
    """Whether a record waits for its checkpoint longer than it should. A log to which nothing
    comes has an old one, and a good one."""
    return head.waiting_since is not None and now - head.waiting_since.timestamp() > PLACED_WITHIN
