"""Reading the log as people do: who may see what of it, what became of a token, and whether a
record is where the newest checkpoint says that it is.

Writes nothing. What is checked here is checked by the very server that keeps the log: whoever does
not trust that one checks elsewhere, with a key that was pinned before.
"""

import hashlib
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from enum import StrEnum
from typing import Final, Protocol
from uuid import UUID

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from keys.checkpoint import Checkpoint, NoteRefused, NoteVerifier
from service.authority.audit.leaf import NotEncodable
from service.authority.audit.merkle import HashesMissing, InvalidProof, leaf_hash, verify_inclusion
from service.authority.audit.proofs import Inclusion, ProvableLog, prove_inclusion
from service.authority.audit.record import Action, RecordFilter, RecordReader, StoredRecord
from service.authority.errors import NotFound
from service.authority.model import SHOWN_DAYS, AdminScope, Clock
from service.authority.operators import Operator

MAX_ALARMS: Final = 5
"""So many of each kind are told of."""
PLACED_WITHIN: Final = 60.0
"""Seconds after which something is wrong with a record that has no place in the log, under a signed
checkpoint; one is usual."""

# Places in the log begin behind it.
_BEFORE_ALL: Final = f"0.{UUID(int=0)}"


class CheckedLog(ProvableLog, Protocol):
    """The log with its public keys; every method may raise StoreUnavailable."""

    async def verifier(self, log_number: int) -> NoteVerifier:
        """Return the verifier of a log's checkpoints."""
        ...


class Alarms(Struct, frozen=True, kw_only=True):
    """Tokens that were reported lately and are on no record, the newest first."""

    forged: Sequence[StoredRecord] = ()
    unverifiable: Sequence[StoredRecord] = ()
    unknown: Sequence[StoredRecord] = ()


class PlaceStanding(StrEnum):
    """What can be said of a record's place in the log."""

    VERIFIED = "verified"
    WAITING = "waiting"
    """It was recorded a moment ago: the next checkpoint will have it."""
    FAILED = "failed"


class Examined(Struct, frozen=True, kw_only=True):
    """A record's place in the log; `flaw` says in words what is wrong with it."""

    standing: PlaceStanding
    flaw: str = ""
    inclusion: Inclusion | None = None
    checkpoint: Checkpoint | None = None


def readable(operator: Operator, wanted: RecordFilter) -> RecordFilter:
    """Return what of `wanted` this one may read; raise Forbidden.

    With `audit:read` that is all of it. Whoever may administer nothing reads what is on record of
    itself, whatever it asks for, and finds nothing by what `_shown` may hide.
    """
    if operator.scopes:
        operator.require(AdminScope.AUDIT_READ)
        return wanted
    return replace(
        wanted, service_user=operator.service_user.id, client_address=None, user_agent=None
    )


def may_export(operator: Operator) -> bool:
    """Whether this one may take records out as a file."""
    return AdminScope.AUDIT_READ in operator.scopes


def _shown(operator: Operator, record: StoredRecord) -> StoredRecord:
    """Return what this one may see of a record: who is no operator learns who acted on it, and not
    from where. Calls with its own tokens were made by its own, whoever reported them."""
    is_act_of_another = record.actor_id not in (None, operator.service_user.id)
    if operator.scopes or not is_act_of_another or record.occurred_at is not None:
        return record
    return replace(record, client_address=None, user_agent=None)


class AuditReading:
    """Reads for one operator or integrator at a time; raises Forbidden and StoreUnavailable."""

    def __init__(
        self,
        *,
        records: RecordReader,
        log: CheckedLog,
        broken: Callable[[], str | None],
        clock: Clock,
    ) -> None:
        """`broken` says in words why the log is not what was signed, or None."""
        self._records = records
        self._log = log
        self._broken = broken
        self._clock = clock

    async def page(
        self, operator: Operator, wanted: RecordFilter, *, cursor: str | None, limit: int
    ) -> Sequence[StoredRecord]:
        """Return up to `limit` records before `cursor`, the newest first; raise ValueError for a
        cursor that is none."""
        found = await self._records.read(
            readable(operator, wanted), cursor=cursor, newest_first=True, limit=limit
        )
        return [_shown(operator, record) for record in found]

    async def after(
        self, operator: Operator, wanted: RecordFilter, *, cursor: str, limit: int
    ) -> Sequence[StoredRecord]:
        """Return the next records beyond `cursor`, the oldest first: none is missed and none comes
        twice, if the cursor of the last one is asked with next. Raise ValueError for none."""
        found = await self._records.read(
            readable(operator, wanted), cursor=cursor, newest_first=False, limit=limit
        )
        return [_shown(operator, record) for record in found]

    async def latest(
        self, operator: Operator, wanted: RecordFilter, *, limit: int
    ) -> tuple[Sequence[StoredRecord], str]:
        """Return the newest records, the newest first, and the cursor that `after` goes on with."""
        # Before the others: what comes between the two is shown by one of them.
        start = await self.page(operator, RecordFilter(), cursor=None, limit=1)
        found = await self.page(operator, wanted, cursor=None, limit=limit)
        newest = found or start
        return found, newest[0].cursor if newest else _BEFORE_ALL

    async def record(self, operator: Operator, record_id: UUID) -> StoredRecord:
        """Return one record; raise NotFound, also for one that this operator may not read."""
        found = await self.page(operator, RecordFilter(id=record_id), cursor=None, limit=1)
        if not found:
            raise NotFound(
                "No record of that id can be shown. A new one can be within about a second; one of "
                "a month that was archived is in its archive."
            )
        return found[0]

    async def story(
        self, operator: Operator, record: StoredRecord, *, limit: int
    ) -> Sequence[StoredRecord]:
        """Return the issuance of the record's token and the calls made with it, the oldest first;
        nothing for a record of no token."""
        if record.jti is None:
            return ()
        wanted = RecordFilter(jti=record.jti)
        return await self.after(operator, wanted, cursor=_BEFORE_ALL, limit=limit)

    async def alarms(self, operator: Operator) -> Alarms:
        """Return the tokens of the last 7 days that were never issued, for who reads all."""
        if not may_export(operator):
            return Alarms()
        return Alarms(
            forged=await self._lately(operator, Action.TOKEN_FORGED),
            unverifiable=await self._lately(operator, Action.TOKEN_UNVERIFIABLE),
            unknown=await self._lately(operator, Action.TOKEN_UNKNOWN),
        )

    async def _lately(self, operator: Operator, action: Action) -> Sequence[StoredRecord]:
        # Without a time in the filter: so it costs the same, however many older ones there are.
        newest = await self.page(
            operator, RecordFilter(action=action), cursor=None, limit=MAX_ALARMS
        )
        since = datetime.fromtimestamp(self._clock() - SHOWN_DAYS * 86_400, UTC)
        return [record for record in newest if record.recorded_at >= since]

    async def examined(self, record: StoredRecord) -> Examined:
        """Compute anew whether the newest checkpoint signs this record, as it is stored now."""
        if (broken := self._broken()) is not None:
            return _failed(broken)
        try:
            inclusion = await prove_inclusion(self._log, record.id)
        except NotFound:
            return self._without_place(record)
        except HashesMissing as missing:
            return _failed(f"Hashes of the log are missing: {missing}.")
        except ValueError:
            return _failed("The newest checkpoint is of fewer records than there are before this.")
        try:
            checkpoint = Checkpoint.open(
                inclusion.head.note, await self._log.verifier(inclusion.place.log_number)
            )
        except NoteRefused as refused:
            return _failed(f"The newest checkpoint is not one of this log: {refused}.", inclusion)
        # As it is stored: not all of it may have been shown.
        stored = await self._records.read(
            RecordFilter(id=record.id), cursor=None, newest_first=True, limit=1
        )
        flaw = _flaw(stored[0] if stored else record, inclusion, checkpoint)
        return Examined(
            standing=PlaceStanding.FAILED if flaw else PlaceStanding.VERIFIED,
            flaw=flaw,
            inclusion=inclusion,
            checkpoint=checkpoint,
        )

    def _without_place(self, record: StoredRecord) -> Examined:
        if self._clock() - record.recorded_at.timestamp() < PLACED_WITHIN:
            return Examined(standing=PlaceStanding.WAITING)
        return _failed(
            "It should have had its place in the log long ago. No process gives records their "
            "place, or the log was changed: /readyz says which."
        )


def _failed(flaw: str, inclusion: Inclusion | None = None) -> Examined:
    return Examined(standing=PlaceStanding.FAILED, flaw=flaw, inclusion=inclusion)


def _flaw(record: StoredRecord, inclusion: Inclusion, checkpoint: Checkpoint) -> str:
    """Say what is wrong with a record's place; nothing if all is right."""
    if inclusion.leaf is None:
        return "The record itself is missing: only its hash is there."
    try:
        own_hash = leaf_hash(inclusion.leaf.encode())
    except NotEncodable as error:
        return f"The record was edited: {error}."
    if own_hash != inclusion.place.leaf_hash:
        return "The record was edited: it has another hash than the one in the log."
    try:
        verify_inclusion(
            inclusion.hashes,
            leaf_hash=own_hash,
            index=inclusion.place.leaf_index,
            size=checkpoint.size,
            root=checkpoint.root,
        )
    except InvalidProof as error:
        return f"The log is not the one that its newest checkpoint was signed over: {error}."
    if not _personal_is_whole(record):
        return "Address, user agent, resource or department are not those that were recorded."
    return ""


def _personal_is_whole(record: StoredRecord) -> bool:
    """Whether the personal values are those that the log holds the digest of, or were erased."""
    values = [record.client_address, record.user_agent, record.resource, record.department]
    if record.personal_salt is None:
        return values == [None] * len(values)
    salted = bytes.fromhex(record.personal_salt) + msgspec.json.encode(values)
    return hashlib.sha256(salted).hexdigest() == record.personal_sha256
