"""The offline check: every record against its hash, every hash against the tree, the tree against
checkpoints.

Reads nothing itself and needs no key of the service: rows come in, findings go out. The work is cut
into parts, each a run of leaves that a process of its own can examine; `LogCheck` joins them.
"""

import gc
import hashlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, Final, TypeAlias
from uuid import UUID

import msgspec
from msgspec import Struct

from keys.checkpoint import Checkpoint, NoteVerifier
from service.authority.audit.leaf import Leaf, require_encodable
from service.authority.audit.merkle import EMPTY_ROOT, HASH_BYTES, STORED_EVERY, Node, node_hash

MAX_FINDINGS: Final = 20
"""Findings of one part that are told in words; the others are only counted."""
MAX_LEVEL: Final = 62
"""Of a subtree: a log has at most 2^63 - 1 leaves."""
KEPT_DAYS: Final = 7
"""Days after its end that a month stays: until then, calls of that month may be reported."""

_sha256 = hashlib.sha256
# RFC 6962 §2.1: before every leaf. A copy of what has taken it already costs less than a new one.
_LEAF_BEGUN: Final = _sha256(b"\x00")
_encoder: Final = msgspec.json.Encoder(order="deterministic")
_encode, _encode_into = _encoder.encode, _encoder.encode_into
# A leaf made by position is encoded like one made by name, in a fifth of the time.
_LeafByPosition: Any = msgspec.defstruct(
    "_LeafByPosition", list(Leaf.__struct_fields__), frozen=True, gc=False
)
_DETAILS: Final = Leaf.__struct_fields__.index("details")
_PERSONAL_SHA256: Final = Leaf.__struct_fields__.index("personal_sha256")
_COMMIT_ORDER: Final = Leaf.__struct_fields__.index("commit_order")


class Flaw(StrEnum):
    """What can be wrong with a log."""

    EDITED = "edited"
    MISSING = "missing"
    INSERTED = "inserted"
    REORDERED = "reordered"
    CUT = "cut"
    REWRITTEN = "rewritten"
    PERSONAL = "personal"
    CHECKPOINT = "checkpoint"
    UNCOMPARED = "uncompared"
    """Nothing was found wrong, and a checkpoint could not be compared with."""


class Finding(Struct, frozen=True, kw_only=True):
    """Something wrong: with the record at `index`, or with the first bad one, which is no earlier.

    `index` is None for what has no place in the log.
    """

    flaw: Flaw
    words: str
    index: int | None = None
    id: UUID | None = None


class Claim(Struct, frozen=True, kw_only=True):
    """What a checkpoint says: the first `size` leaves have this root."""

    size: int
    root: bytes
    place: str
    """Where it was found, in words."""
    outside: bool


class Subtree(Struct, frozen=True, gc=False):
    """A complete subtree of 2^`level` leaves, without its place."""

    level: int
    hash: bytes


Placed: TypeAlias = tuple[Any, Any, Any]
"""A leaf: index, id, hash. What there is of its record, or None: the members of `Leaf`, in their
order. What there is of its personal values, or None: the id, the salt, and the four values. All ids
are text in lower case."""


class Part(Struct, frozen=True, kw_only=True):
    """What was found in the leaves `start` ≤ index < `stop`."""

    start: int
    stop: int
    records: int
    erased: int
    archived: Mapping[str, int]
    """How many records of which month are in archives."""
    subtrees: Sequence[Subtree]
    whole: bool
    """Whether every leaf of it is there: if not, no head over them can be computed."""
    first: tuple[int, str] | None
    last: tuple[int, str] | None
    """Places of its records in the order of commits."""
    findings: Sequence[Finding]
    flaws: int
    nodes: Sequence[Node] = ()
    claims: Sequence[Claim] = ()


class Examination:
    """Examines the leaves of one part, which come in order, in as many pieces as one likes."""

    def __init__(self, start: int, stop: int, *, archived: frozenset[str] = frozenset()) -> None:
        """`archived` are the months, such as 2026-10, whose records need not be there."""
        self._start, self._stop = start, stop
        self._archived_months = archived
        self._next = start
        self._hashes: list[bytes] = []
        self._places: list[tuple[int, str]] = []
        self._indexes: list[int] = []
        self._records = self._erased = self._flaws = 0
        self._archived: Counter[str] = Counter()
        self._findings: list[Finding] = []
        self._whole = True
        self._ordered = True
        self._buffer = bytearray()

    def add(self, page: Iterable[Placed]) -> None:
        """Take the next leaves."""
        hashes, places, indexes = self._hashes, self._places, self._indexes
        for (index, leaf_id, leaf_hash), members, personal in page:
            if index != self._next:
                self._gap(index)
            self._next = index + 1
            hashes.append(leaf_hash)
            if members is None:
                self._without_record(index, leaf_id)
                continue
            try:
                digest = self._digest(members)
            # NotEncodable, a number that no leaf holds, objects within objects without end.
            except (ValueError, OverflowError, RecursionError) as error:
                self._found(Flaw.EDITED, index, leaf_id, f"was edited: {error}")
                continue
            if digest != leaf_hash:
                self._found(Flaw.EDITED, index, leaf_id, "was edited: it has another hash")
            personal_sha256 = members[_PERSONAL_SHA256]
            if personal is None:
                self._erased += personal_sha256 is not None
            elif _sha256(personal[1] + _encode(personal[2:])).digest() != personal_sha256:
                self._found(
                    Flaw.PERSONAL,
                    index,
                    leaf_id,
                    "has other personal values than it was written with",
                )
            place = (int(members[_COMMIT_ORDER]), leaf_id)
            if self._ordered and places and place < places[-1]:
                self._disorder(place)
            places.append(place)
            indexes.append(index)
        self._records = len(places)

    def part(
        self,
        *,
        nodes: Sequence[Node] = (),
        claims: Sequence[Claim] = (),
        cuts: Sequence[int] = (),
    ) -> Part:
        """Return what was found. No subtree crosses one of the sizes in `cuts`."""
        if self._next != self._stop:
            self._gap(self._stop)
        return Part(
            start=self._start,
            stop=self._stop,
            records=self._records,
            erased=self._erased,
            archived=self._archived,
            subtrees=subtrees(self._hashes, self._start, cuts) if self._whole else (),
            whole=self._whole,
            first=self._places[0] if self._places else None,
            last=self._places[-1] if self._places else None,
            findings=self._findings,
            flaws=self._flaws,
            nodes=nodes,
            claims=claims,
        )

    def _digest(self, members: Sequence[Any]) -> bytes:
        """Return the hash of the leaf of its members; raise what `encoded` raises."""
        # Into the same memory each time: half of what encoding costs is to find some for the bytes.
        _encode_into(_by_position(members), self._buffer)
        return leaf_digest(self._buffer)

    def _found(self, flaw: Flaw, index: int, record_id: str | None, what: str) -> None:
        self._flaws += 1
        if len(self._findings) < MAX_FINDINGS:
            named = f"Record {index:,} ({record_id})" if record_id else f"Record {index:,}"
            self._findings.append(
                Finding(
                    flaw=flaw,
                    words=f"{named} {what}.",
                    index=index,
                    id=UUID(record_id) if record_id else None,
                )
            )

    def _gap(self, index: int) -> None:
        self._whole = False
        if index < self._next:
            self._found(Flaw.INSERTED, index, None, "is there twice")
            return
        up_to = f", and so are those up to {index - 1:,}" if index - self._next > 1 else ""
        self._found(Flaw.MISSING, self._next, None, f"is missing with its hash{up_to}")

    def _without_record(self, index: int, leaf_id: str) -> None:
        month = month_of(leaf_id)
        if month in self._archived_months:
            self._archived[month] += 1
        else:
            self._found(Flaw.MISSING, index, leaf_id, "is missing: only its hash is there")

    def _disorder(self, place: tuple[int, str]) -> None:
        # The first that stands too early, not the first that is seen to stand too late.
        self._ordered = False
        at = bisect_right(self._places, place)
        self._found(
            Flaw.REORDERED,
            self._indexes[at],
            self._places[at][1],
            "stands before one that was committed earlier",
        )


class LogReport(Struct, frozen=True, kw_only=True):
    """What the check of one log found."""

    origin: str
    size: int
    records: int
    archived: Mapping[str, int]
    erased: int
    findings: Sequence[Finding]
    flaws: int
    compared_outside: int
    compared_inside: int
    agreed_outside: int
    """The size up to which it agrees with checkpoints from outside."""

    @property
    def first_bad(self) -> Finding | None:
        """The finding with the lowest index, else any."""
        return min(
            self.findings,
            key=lambda finding: self.size if finding.index is None else finding.index,
            default=None,
        )


class LogCheck:
    """Joins the parts of a log, in order, and compares its heads with every checkpoint."""

    def __init__(
        self, origin: str, size: int, *, outside: Sequence[Claim] = (), own: Claim | None = None
    ) -> None:
        """`own` is the checkpoint that a file came with, of the same size. Then there are no stored
        hashes to compare with, and leaves that the file lacks come as subtrees, which a checkpoint
        from outside may fall into."""
        self._origin, self._size = origin, size
        self._own = own
        self._outside = sorted(outside, key=lambda claim: claim.size)
        given = self._outside if own is None else [*outside, own]
        self._given = sorted(given, key=lambda claim: claim.size)
        self._sizes = [claim.size for claim in self._given]
        self._tree = JoinedTree()
        # Up to where it agrees with checkpoints from outside; with those in the database, which
        # are worth as much as the rest of it.
        self._agreed = {True: 0, False: 0}
        self._whole = True
        self._last: tuple[int, str] | None = None
        self._records = self._erased = self._flaws = 0
        self._archived: Counter[str] = Counter()
        self._findings: list[Finding] = []
        self._refuted: set[str] = set()
        self._compared: dict[bool, list[Claim]] = {True: [], False: []}
        for claim in self._within(-1, 0):
            self._compare(claim, EMPTY_ROOT)

    def cuts(self, start: int, stop: int) -> list[int]:
        """Return the sizes within a part at which the tree is compared with checkpoints."""
        return sorted({claim.size for claim in self._within(start, stop)})

    def _within(self, start: int, stop: int) -> Sequence[Claim]:
        return self._given[bisect_right(self._sizes, start) : bisect_right(self._sizes, stop)]

    def add(self, part: Part) -> None:
        """Take the next part."""
        self._records += part.records
        self._erased += part.erased
        self._archived.update(part.archived)
        self._findings += part.findings[: max(MAX_FINDINGS - len(self._findings), 0)]
        self._flaws += part.flaws
        if self._last and part.first and part.first < self._last:
            self._found(Flaw.REORDERED, part.start, "Records before {} belong behind it.")
        self._last = part.last or self._last
        self._whole = self._whole and part.whole
        if not self._whole:
            return
        stored = {(node.level, node.index): node.hash for node in part.nodes}
        claims: dict[int, list[Claim]] = {}
        for claim in (*self._within(part.start, part.stop), *part.claims):
            claims.setdefault(claim.size, []).append(claim)
        for subtree in part.subtrees:
            for node in self._tree.append(subtree):
                self._compare_stored(node, stored.get((node.level, node.index)))
            for claim in claims.get(self._tree.size, ()):
                self._compare(claim, self._tree.root())

    def give_up(self) -> None:
        """Compute no more heads: leaves are missing."""
        self._whole = False

    def finish(self, *, newest_inside: int | None = None) -> LogReport:
        """Return the report; `newest_inside` is the size that the database's last head has."""
        if self._own is None or self._is_under(self._own):
            self._require_compared()
        if newest_inside is not None and newest_inside > self._size:
            self._found(
                Flaw.CUT,
                self._size,
                f"Cut: the log ends before record {{}}, and its last checkpoint in the database "
                f"was signed over {newest_inside:,}.",
            )
        if newest_inside is not None and newest_inside < self._size:
            self._found(
                Flaw.INSERTED,
                newest_inside,
                "Record {} and those behind it are under no checkpoint.",
            )
        return LogReport(
            origin=self._origin,
            size=self._size,
            records=self._records,
            archived=self._archived,
            erased=self._erased,
            findings=self._findings,
            flaws=self._flaws,
            compared_outside=len(self._compared[True]),
            compared_inside=len(self._compared[False]),
            agreed_outside=self._agreed[True],
        )

    def _is_under(self, own: Claim) -> bool:
        """Say whether the whole file was compared with its own checkpoint: nothing else says that
        any of it was signed."""
        if not self._whole and self._flaws:
            return False
        if self._tree.size < own.size:
            words = "Record {} is missing from the file, or from its proof."
            self._found(Flaw.MISSING, self._tree.size, words)
            return False
        if self._tree.size > own.size or not self._compared[False]:
            self._found(
                Flaw.REWRITTEN,
                self._agreed[True],
                f"Its records and its proof are not the tree of its own checkpoint, of {own.size:,}"
                "; the first bad record is {} or one behind it.",
            )
            return False
        return True

    def _require_compared(self) -> None:
        compared = {claim.size for claim in self._compared[True]}
        for claim in self._outside:
            if self._own and claim.size > self._size and compared:
                # Who gives all that are kept gives some that were signed since.
                break
            if self._whole and claim.size not in compared:
                self._not_compared(claim)
                break

    def _not_compared(self, claim: Claim) -> None:
        if self._own:
            self.report(
                Finding(
                    flaw=Flaw.UNCOMPARED,
                    words=f"This file alone cannot be compared with {claim.place}, of "
                    f"{claim.size:,}: it goes with the one of {self._size:,}, with those that were "
                    "kept of each day before that, and with any that was signed over the last of "
                    "its own records. An export can be made again, for this one: `privyseal audit "
                    f"export --checkpoint {claim.place}` and the same filters.",
                )
            )
        else:
            self._found(
                Flaw.CUT,
                self._size,
                f"Cut or restored: the log ends before record {{}}, and {claim.place} was signed "
                f"over {claim.size:,}.",
            )

    def report(self, finding: Finding) -> None:
        """Add what was found beside the parts."""
        self._flaws += 1
        if len(self._findings) < 2 * MAX_FINDINGS:
            self._findings.append(finding)

    def _found(self, flaw: Flaw, index: int, words: str) -> None:
        self.report(Finding(flaw=flaw, words=words.format(f"{index:,}"), index=index))

    def _compare_stored(self, node: Node, stored: bytes | None) -> None:
        if self._own or stored == node.hash or "stored" in self._refuted:
            return
        self._refuted.add("stored")
        start, stop = node.index << node.level, (node.index + 1) << node.level
        missing = "is missing" if stored is None else "is another"
        self._found(
            Flaw.REWRITTEN,
            max(start, *self._agreed.values()),
            f"Rewritten: the hash over the records {start:,} to {stop - 1:,} that the database "
            f"keeps {missing}; the first bad record is {{}} or one behind it.",
        )

    def _compare(self, claim: Claim, root: bytes) -> None:
        kind = "outside" if claim.outside else "inside"
        self._compared[claim.outside].append(claim)
        if claim.root == root:
            if kind not in self._refuted:
                self._agreed[claim.outside] = claim.size
            return
        # All that follow the first one differ, too.
        if kind in self._refuted:
            return
        self._refuted.add(kind)
        first = self._agreed[True] if claim.outside else max(self._agreed.values())
        last = claim.size - 1
        which = "{}" if last <= first else f"among {{}} to {last:,}"
        self._found(
            Flaw.REWRITTEN,
            first,
            f"Rewritten or forked: the first {claim.size:,} records are not those that "
            f"{claim.place} was signed over; the first bad record is {which}.",
        )


class JoinedTree:
    """A tree that grows by whole subtrees, and keeps its right edge only."""

    def __init__(self) -> None:
        self._edge: list[Subtree] = []
        self.size = 0
        """The number of leaves."""

    def append(self, subtree: Subtree) -> list[Node]:
        """Add a subtree; return the nodes of stored levels that are complete now.

        Raise ValueError if it would not be a subtree there.
        """
        level, hash_ = subtree.level, subtree.hash
        if self.size & ((1 << level) - 1):
            raise ValueError(f"no subtree of level {level} begins at leaf {self.size}")
        self.size += 1 << level
        completed: list[Node] = []
        while True:
            if level and level % STORED_EVERY == 0:
                completed.append(Node(level=level, index=(self.size >> level) - 1, hash=hash_))
            if not self._edge or self._edge[-1].level != level:
                break
            hash_, level = node_hash(self._edge.pop().hash, hash_), level + 1
        self._edge.append(Subtree(level, hash_))
        return completed

    def root(self) -> bytes:
        """Return the head (RFC 6962 §2.1)."""
        if not self._edge:
            return EMPTY_ROOT
        root = self._edge[-1].hash
        for left in self._edge[-2::-1]:
            root = node_hash(left.hash, root)
        return root


def encoded(members: Sequence[Any]) -> bytes:
    """Return the leaf of its members, which are in the order of `Leaf`.

    The same as `Leaf(…).encode()`; raise NotEncodable and what msgspec raises.
    """
    return _encode(_by_position(members))


def _by_position(members: Sequence[Any]) -> object:
    if details := members[_DETAILS]:
        require_encodable(details)
    return _LeafByPosition(*members)


def leaf_digest(leaf: bytes | bytearray) -> bytes:
    """Return the hash of the canonical bytes of a leaf: `merkle.leaf_hash`, without a copy."""
    hashing = _LEAF_BEGUN.copy()
    hashing.update(leaf)
    return hashing.digest()


@contextmanager
def collector_at_rest() -> Generator[None, None, None]:
    """Let nobody look for cycles meanwhile.

    Rows come by the million and form none, but each thousand of them sets off a search among all
    that are there: a quarter of the time of a check.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def aligned_levels(start: int, stop: int) -> Iterator[int]:
    """Cut the leaves `start` ≤ index < `stop` into complete subtrees, as few as there can be."""
    while start < stop:
        level = (stop - start).bit_length() - 1
        if start:
            level = min(level, (start & -start).bit_length() - 1)
        yield level
        start += 1 << level


def subtrees(hashes: Sequence[bytes], start: int, cuts: Sequence[int] = ()) -> list[Subtree]:
    """Join the hashes of neighbours from leaf `start` on; no subtree crosses one of `cuts`."""
    joined: list[Subtree] = []
    at, end = start, start + len(hashes)
    for stop in (*cuts, end):
        for level in aligned_levels(at, min(stop, end)):
            leaves = hashes[at - start : at - start + (1 << level)]
            joined.append(Subtree(level, complete_root(leaves)))
            at += 1 << level
    return joined


def complete_root(hashes: Sequence[bytes]) -> bytes:
    """Return the hash over 2^n neighbours."""
    while len(hashes) > 1:
        pairs = iter(hashes)
        hashes = [
            _sha256(b"\x01" + left + right).digest()
            for left, right in zip(pairs, pairs, strict=True)
        ]
    return hashes[0]


def month_of(record_id: str) -> str:
    """Return the month, such as 2026-10, in whose partition a record is (RFC 9562 §5.7).

    Nothing if it is none that a calendar has.
    """
    milliseconds = int(record_id[:8] + record_id[9:13], 16)
    try:
        return datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%Y-%m")
    except ValueError:  # after the year 9999
        return ""


def month_bounds(month: str) -> tuple[datetime, datetime]:
    """Return when a month such as 2026-10 begins, and when the next one; raise ValueError."""
    start = datetime.strptime(month, "%Y-%m").replace(tzinfo=UTC)
    if start.strftime("%Y-%m") != month or not 1970 <= start.year < 9999:
        raise ValueError("it is no month such as 2026-10")
    return start, (start + timedelta(days=31)).replace(day=1)


def may_be_archived(month: str, *, named_at: datetime, remains: bool) -> bool:
    """Say whether it can be true what a record says that was written at `named_at`: that a month
    was archived. Not if it was not over for long then, or if any record of it `remains`: a month
    goes whole."""
    try:
        _, end = month_bounds(month)
    except ValueError:
        return False
    return not remains and named_at >= end + timedelta(days=KEPT_DAYS)


def placed_subtree(node: Node) -> tuple[int, Subtree]:
    """Return the first leaf of a node, and what it is over; raise ValueError if no tree has it."""
    level, index = node.level, node.index
    if not 0 <= level <= MAX_LEVEL or not 0 <= index < 1 << (MAX_LEVEL + 1 - level):
        raise ValueError("no tree has such a node")
    if len(node.hash) != HASH_BYTES:
        raise ValueError(f"a hash has {HASH_BYTES} bytes")
    return index << level, Subtree(level, node.hash)


def claim_of(note: bytes, verifier: NoteVerifier, *, place: str, outside: bool) -> Claim:
    """Return what a signed checkpoint says; raise NoteRefused."""
    checkpoint = Checkpoint.open(note, verifier)
    return Claim(size=checkpoint.size, root=checkpoint.root, place=place, outside=outside)


def unverified_origin(note: bytes) -> str:
    """Return which log a checkpoint says to be of, so that its key can be found."""
    return note.partition(b"\n")[0].decode(errors="replace")
