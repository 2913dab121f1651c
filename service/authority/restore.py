"""A database that was restored or cut: what is wrong with it, and what it takes to go on with it.

Decides nothing by itself: an operator accepts, on record, or brings the right database back.
"""

from collections.abc import Sequence
from typing import Any, Final, Protocol

import structlog
from msgspec import Struct
from msgspec.structs import replace

from keys.checkpoint import MAX_NOTE_BYTES, NoteVerifier
from keys.keyring import RotationPolicy
from keys.log_key import KeptLogKey
from keys.signer import LOCAL, Custody, CustodyError, KeptKey
from service.authority.audit import Action, AuditRecord, Outcome, new_record_id
from service.authority.audit.continuity import (
    NO_LOG,
    AuditLogRow,
    Continuity,
    Head,
    LogKeys,
    LogReader,
    OutsideCheckpoints,
    OutsideNote,
)
from service.authority.errors import Conflict, StartRefused

ATTEMPTS: Final = 3
MAX_LOG_NUMBER: Final = 9999
"""Checkpoints outside are sorted by the four digits of their log."""

log = structlog.stdlib.get_logger()


class Difference(Struct, frozen=True, kw_only=True):
    """How the database differs from what was signed.

    `found` says it in words. `outside` is the newest checkpoint that is kept outside the database;
    it need not be one of `log`, the newest log that the database knows, nor verify.
    """

    found: str
    log: AuditLogRow
    head: Head | None
    outside: OutsideNote | None

    @property
    def next_number(self) -> int:
        """The number of the log that goes on: neither here nor outside is there one like it."""
        return 1 + max(self.log.number, self.outside.log_number if self.outside else 0)

    @property
    def next_origin(self) -> str:
        """The name of that log."""
        return f"{self.log.origin.rpartition('/')[0]}/{self.next_number}"


class Toll(Struct, frozen=True, kw_only=True):
    """What it costs to go on: the keys that are revoked, how many credentials are held, and how
    many people are disabled."""

    published_kids: Sequence[str]
    live_credentials: int
    active_people: int


class Successor(Struct, frozen=True, kw_only=True):
    """The log that goes on, the keys that sign from then on, and what that was decided on."""

    closed: Difference
    log_key: KeptLogKey
    revoked_kids: Sequence[str]
    signing: KeptKey
    following: KeptKey


class RestoreStore(Protocol):
    """The database as its owner sees it; every method may raise StoreUnavailable."""

    async def now(self) -> float:
        """Return its time, in seconds since the epoch."""
        ...

    async def toll(self) -> Toll:
        """Return what would have to go."""
        ...

    async def accept(
        self,
        successor: Successor,
        policy: RotationPolicy,
        record: AuditRecord,
        revocation: AuditRecord,
    ) -> bool:
        """Commit all of it, or return False if what it was decided on has changed."""
        ...


async def difference(
    reader: LogReader, outside: OutsideCheckpoints, log_keys: LogKeys
) -> Difference | None:
    """Return how the database differs from what was signed; None if it does not.

    Raise CustodyError if the log's key is sealed and does not open: then the key-encryption keys
    are wrong, and nothing can be said of the database. That an HSM no longer has the log's key is a
    difference: it may be lost, and only people know. Raise StartRefused before there is a log, or
    if no log can have a number behind that of what is kept outside; StoreUnavailable, and OSError.
    """
    current = await reader.current()
    if current is None:
        raise StartRefused(NO_LOG)
    if current.key.uri == LOCAL:
        await log_keys.open_log_key(current.key)
    continuity = Continuity(outside=outside, log_keys=log_keys)
    if await continuity.compare(reader) is not None or continuity.broken is None:
        return None
    found = Difference(
        found=continuity.broken,
        log=current,
        head=await reader.head(current.number),
        outside=await outside.newest(),
    )
    if found.outside is not None:
        _require_log_of_ours(found.outside, current)
    return found


def _require_log_of_ours(outside: OutsideNote, current: AuditLogRow) -> None:
    """Raise StartRefused for a later log than `current` whose name is none of this authority's, or
    that could have no successor. Its key is not here: no more can be said of it."""
    name = f"{current.origin.rpartition('/')[0]}/{outside.log_number}"
    if outside.log_number > current.number and (
        outside.unverified_note.partition(b"\n")[0] != name.encode()
        or outside.log_number >= MAX_LOG_NUMBER
    ):
        raise StartRefused(
            f"{outside.place} is no checkpoint of this authority's audit logs, and would hide "
            "every one that is kept from now on. Remove that file, and run this again."
        )


class Restorer:
    """Goes on with a database that was restored or cut, for who owns it."""

    def __init__(
        self,
        *,
        store: RestoreStore,
        custody: Custody,
        policy: RotationPolicy,
        key_bits: int,
    ) -> None:
        self._store = store
        self._custody = custody
        self._policy = policy
        self._key_bits = key_bits

    async def accept(self, difference: Difference, reason: str) -> NoteVerifier:
        """Return the verifier key of the log that goes on, once all of this is durable at once:

        every published signing key is revoked, and two new ones are in; every credential is held
        until an operator confirms it, and every person disabled until an operator enables them; the
        log that goes on is open, and its first record says what was accepted, with the newest
        checkpoint outside. (Records to which the closed log gave no place come before that one.)
        Raise Conflict if the database keeps changing, CustodyError, StoreUnavailable.
        """
        log_key = await self._custody.new_log_key(difference.next_origin)
        signing, following = [await self._custody.new_key(self._key_bits) for _ in range(2)]
        for _ in range(ATTEMPTS):
            successor = Successor(
                closed=difference,
                log_key=log_key,
                revoked_kids=(await self._store.toll()).published_kids,
                signing=signing,
                following=following,
            )
            records = _records(successor, reason, await self._store.now())
            if await self._store.accept(successor, self._policy, *records):
                return log_key.verifier
        # Certainly not in use; after any other failure nobody can say that.
        await self._discard(signing.uri, following.uri, log_key.uri)
        raise Conflict("The database kept changing while this was decided. Run it again.")

    async def _discard(self, *uris: str) -> None:
        for uri in uris:
            try:
                await self._custody.destroy(uri)
            except CustodyError as error:
                log.error("private_half_not_destroyed", uri=uri, error=str(error))


def _records(successor: Successor, reason: str, now: float) -> tuple[AuditRecord, AuditRecord]:
    closed = successor.closed
    details: dict[str, Any] = {
        "closed_log": closed.log.origin,
        # As it was found: whoever pinned the key of its log can verify it.
        "outside_checkpoint": closed.outside and _text(closed.outside.unverified_note),
        "database_checkpoint": closed.head and _text(closed.head.note),
        "opened_log": successor.log_key.origin,
        "opened_log_key": successor.log_key.verifier.vkey,
    }
    record = AuditRecord(
        id=new_record_id(now),
        action=Action.AUDIT_RESTORE_ACCEPTED,
        outcome=Outcome.SUCCESS,
        reason=reason,
        actor="privyseal restore accept",
        details=details,
    )
    revocation = replace(
        record,
        # Of two records of one commit the smaller id is the first: a millisecond later is larger.
        id=new_record_id(now + 0.001),
        action=Action.SIGNING_KEY_REVOKE_ALL,
        kid=successor.signing.kid,
        details={"revoked": list(successor.revoked_kids)},
    )
    return record, revocation


def _text(unverified_note: bytes) -> str:
    # What was found may be anything; Postgres keeps no NUL in its JSON.
    text = unverified_note[:MAX_NOTE_BYTES].decode("utf-8", "replace")
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}")
