"""Whether the log goes on from what was signed, by checkpoints kept outside of the database.

Signs nothing and mends nothing: while the answer is no, nothing is issued and nothing is signed.
"""

import time
from collections.abc import Callable, Hashable, Sequence
from datetime import datetime
from typing import Final, Protocol
from uuid import UUID
from weakref import WeakSet

import structlog
from msgspec import Struct

from keys.checkpoint import Checkpoint, NoteRefused, NoteVerifier
from keys.log_key import KeptLogKey, LogSigner
from keys.signer import LOCAL, CustodyError
from service import metrics
from service.authority.audit.merkle import Frontier, HashesMissing, StoredHashes, frontier_at
from service.authority.errors import AuditUnavailable, StoreUnavailable

log = structlog.stdlib.get_logger()

COMPLAIN_EVERY: Final = 60.0
"""Seconds between two lines in the log about the same trouble."""

NO_LOG: Final = "The database has no audit log yet. Run `privyseal migrate` as its owner."
_NOT_COMPARED: Final = "The audit log was not compared with its checkpoints yet."
_ACCEPT: Final = (
    "Nothing is issued until the database is the right one again, or an operator accepts this one: "
    "privyseal restore accept --reason"
)
_LOOK: Final = "`privyseal audit verify` names the first record that does not fit"


class Place(Struct, frozen=True, kw_only=True):
    """A place in the order of commits: right behind this record."""

    commit_order: int
    last_id: UUID


class AuditLogRow(Struct, frozen=True, kw_only=True):
    """A log as it is stored; `begins_after` is the place right before its first record."""

    number: int
    key: KeptLogKey
    begins_after: Place

    @property
    def origin(self) -> str:
        """Its name in its checkpoints."""
        return self.key.origin


class Head(Struct, frozen=True, kw_only=True):
    """The newest signed head of a log, and how far in the order of commits it reaches."""

    size: int
    reaches: Place
    note: bytes
    signed_at: datetime


class LogReader(Protocol):
    """The log in the database; every method may raise StoreUnavailable."""

    async def database(self) -> Hashable:
        """Return which database this leads to: never that of another one, or of another server."""
        ...

    async def current(self) -> AuditLogRow | None:
        """Return the newest log."""
        ...

    async def head(self, log_number: int) -> Head | None:
        """Return its newest signed head, if there is one."""
        ...

    def hashes(self, log_number: int) -> StoredHashes:
        """Return what reads its hashes."""
        ...


class LogKeys(Protocol):
    """Where the keys of logs are."""

    async def open_log_key(self, kept: KeptLogKey) -> LogSigner:
        """Return the signer of a log's key, having proven that it is; raise CustodyError."""
        ...


class OutsideNote(Struct, frozen=True, kw_only=True):
    """A checkpoint that is kept outside the database, not verified yet, and where it is."""

    log_number: int
    unverified_note: bytes
    place: str


class OutsideCheckpoints(Protocol):
    """Checkpoints outside the database; every method may raise OSError."""

    async def newest(self) -> OutsideNote | None:
        """Return the one of the newest log that has the largest size."""
        ...

    async def keep(self, log_number: int, size: int, note: bytes, signed_at: datetime) -> None:
        """Keep a checkpoint durably; one that is there already is no error."""
        ...

    async def sizes(self, log_number: int) -> Sequence[int]:
        """Return the sizes of those that are kept of a log, in order."""
        ...


class SoundLog(Struct, frozen=True, kw_only=True):
    """The log as it was found whole: its key, its newest head, and the tree under that."""

    log: AuditLogRow
    signer: LogSigner
    head: Head | None
    frontier: Frontier
    outside_size: int
    """Of the newest checkpoint outside; 0 while there is none of this log."""


class Broken(Exception):
    """The log does not go on from what was signed; the text says how, for people."""


class Continuity:
    """Compares, remembers the answer, and is asked before anything is issued.

    Each comparison stands for itself: once the database is right again, the next one finds it so.
    But only what a new connection leads to is the database: one that was opened before a restored
    one took its place may still lead to the old one, which is whole.
    """

    def __init__(
        self,
        *,
        outside: OutsideCheckpoints,
        log_keys: LogKeys,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._outside = outside
        self._log_keys = log_keys
        self._monotonic = monotonic
        self._signer: tuple[KeptLogKey, LogSigner] | None = None
        self._database: Hashable = None
        self._known: WeakSet[LogReader] = WeakSet()
        self._complained_at = float("-inf")
        self.broken: str | None = _NOT_COMPARED
        """In words, why nothing may be issued; None if the log is whole."""
        self.compared = False
        """Whether a comparison was made at all, whatever it found."""
        self.latest_note: bytes | None = None
        """The newest checkpoint that this process knows to be ours."""

    def require(self) -> None:
        """Raise AuditUnavailable unless the log was found whole when it was last compared."""
        if self.broken is not None:
            raise AuditUnavailable(self.broken)

    def grown(self, head: Head) -> None:
        """Take note of a head that this process has signed and committed itself."""
        self.latest_note = head.note

    async def compare(self, reader: LogReader) -> SoundLog | None:
        """Return the log if it is whole and extends the newest outside checkpoint.

        Otherwise return None: `broken` says why. Raise StoreUnavailable, also if `reader` leads to
        another database than one that was first asked later, and OSError while the outside
        checkpoints cannot be read: then the answer of before stands.
        """
        database = await reader.database()
        if reader not in self._known:
            self._known.add(reader)
            self._database = database
        elif database != self._database:
            raise StoreUnavailable("newer connections lead to another database")
        try:
            sound = await self._compare(reader)
        except Broken as broken:
            self._found(str(broken))
            return None
        self._found(None)
        return sound

    def _found(self, broken: str | None) -> None:
        self.compared = True
        self.broken = broken
        metrics.audit_log_broken.set(broken is not None)
        now = self._monotonic()
        if broken is None:
            self._complained_at = float("-inf")
        elif now - self._complained_at >= COMPLAIN_EVERY:
            self._complained_at = now
            log.error("nothing_is_issued", reason=broken)

    async def _compare(self, reader: LogReader) -> SoundLog:
        # Outside first: a head is committed before it is kept outside, so what is read next from
        # the database is never older, however many processes add to it meanwhile.
        unverified = await self._outside.newest()
        current = await reader.current()
        if current is None:
            raise Broken(NO_LOG)
        signer = await self._open(current.key)
        outside = _verified(unverified, current, signer.verifier)
        if unverified and outside:
            self.latest_note = unverified.unverified_note
        head = await reader.head(current.number)
        size = head.size if head else 0
        if outside and outside.size > size:
            raise Broken(
                f"Restored or cut: records {size:,}-{outside.size - 1:,} are missing from the "
                f"audit log {current.origin}, which had {outside.size:,} when its newest "
                f"checkpoint outside was signed. {_ACCEPT}."
            )
        try:
            frontier = await frontier_at(size, reader.hashes(current.number))
            if outside and outside.size < size:
                at_outside = await frontier_at(outside.size, reader.hashes(current.number))
            else:
                at_outside = frontier
        except HashesMissing as missing:
            raise Broken(
                f"Cut: the audit log {current.origin} lacks hashes of its tree ({missing}). "
                f"{_ACCEPT}."
            ) from None
        if head:
            inside = _opened(head.note, signer.verifier, "the database")
            _require_root(inside, frontier, "in the database")
            self.latest_note = head.note
        if outside:
            _require_root(outside, at_outside, "outside")
        return SoundLog(
            log=current,
            signer=signer,
            head=head,
            frontier=frontier,
            outside_size=outside.size if outside else 0,
        )

    async def _open(self, kept: KeptLogKey) -> LogSigner:
        """Open the log's key: that it opens shows that no database made it up.

        Once for each key: after that, an HSM that is away stops signatures and nothing else.
        """
        if self._signer is None or self._signer[0] != kept:
            try:
                signer = await self._log_keys.open_log_key(kept)
            except CustodyError as error:
                raise Broken(log_key_trouble(kept, error)) from None
            self._signer = (kept, signer)
        return self._signer[1]


def log_key_trouble(kept: KeptLogKey, error: CustodyError) -> str:
    """Return in words that a log's key cannot be used, and what then."""
    trouble = f"The key of the audit log {kept.origin} cannot be used ({error})."
    if kept.uri == LOCAL:
        return trouble
    return f"{trouble} If it is lost for good: privyseal restore accept --reason"


def _verified(
    outside: OutsideNote | None, current: AuditLogRow, verifier: NoteVerifier
) -> Checkpoint | None:
    """Return the newest outside checkpoint if it is one of the current log."""
    if outside is None or outside.log_number < current.number:
        # Of a log that was closed: the one after it could be opened only by who has the keys.
        return None
    if outside.log_number > current.number:
        raise Broken(
            f"Restored or cut: {outside.place} is a checkpoint of the {outside.log_number}. audit "
            f"log of this authority, and the database knows none after {current.origin}. {_ACCEPT}."
        )
    return _opened(outside.unverified_note, verifier, outside.place)


def _opened(note: bytes, verifier: NoteVerifier, place: str) -> Checkpoint:
    try:
        return Checkpoint.open(note, verifier)
    except NoteRefused as refused:
        raise Broken(
            f"Changed or forked: the newest checkpoint in {place} is none of the audit log "
            f"{verifier.name} of this database ({refused}). {_LOOK}. {_ACCEPT}."
        ) from None


def _require_root(checkpoint: Checkpoint, frontier: Frontier, place: str) -> None:
    if (checkpoint.size, checkpoint.root) != (frontier.size, frontier.root()):
        raise Broken(
            f"Changed or forked: the first {checkpoint.size:,} records of the audit log "
            f"{checkpoint.origin} are not those that its newest checkpoint {place} was signed "
            f"over. {_LOOK}. {_ACCEPT}."
        )
