"""Proofs from the log: that a record is in it, and that it only ever grew.

Verifies nothing: whoever asks does, with `merkle` or any other implementation of RFC 6962.
"""

from typing import Protocol
from uuid import UUID

from msgspec import Struct

from service.authority.audit.continuity import Head, LogReader
from service.authority.audit.leaf import Leaf
from service.authority.audit.merkle import consistency_proof, inclusion_proof
from service.authority.errors import NotFound


class PlaceInLog(Struct, frozen=True, kw_only=True):
    """Where a record is in the tree."""

    log_number: int
    log_origin: str
    leaf_index: int
    leaf_hash: bytes


class ProvableLog(LogReader, Protocol):
    """The log, searched by record; every method may raise StoreUnavailable."""

    async def place_of(self, record_id: UUID) -> PlaceInLog | None:
        """Return where a record is; None while it has no place."""
        ...

    async def leaf(self, record_id: UUID) -> Leaf | None:
        """Return a record as its leaf; None if it was archived, or never was."""
        ...


class Inclusion(Struct, frozen=True, kw_only=True):
    """That a record is in the tree of a head."""

    place: PlaceInLog
    leaf: Leaf | None
    hashes: list[bytes]
    head: Head


class Consistency(Struct, frozen=True, kw_only=True):
    """That the tree of `size` leaves begins with that of `old_size`."""

    log_origin: str
    old_size: int
    size: int
    hashes: list[bytes]


async def prove_inclusion(log: ProvableLog, record_id: UUID) -> Inclusion:
    """Return the proof for the newest head; raise NotFound, StoreUnavailable, HashesMissing."""
    place = await log.place_of(record_id)
    head = await log.head(place.log_number) if place else None
    if place is None or head is None:
        raise NotFound(
            "No record of that id has its place in the log. It gets one within about a second."
        )
    hashes = await inclusion_proof(place.leaf_index, head.size, log.hashes(place.log_number))
    return Inclusion(place=place, leaf=await log.leaf(record_id), hashes=hashes, head=head)


async def prove_consistency(log: ProvableLog, old_size: int, size: int | None) -> Consistency:
    """Return the proof between two sizes of the newest log; None is its newest.

    Raise NotFound before there is a head and for sizes that it never had, StoreUnavailable,
    HashesMissing.
    """
    current = await log.current()
    head = await log.head(current.number) if current else None
    if current is None or head is None:
        raise NotFound("The log has no checkpoint yet.")
    size = head.size if size is None else size
    if not old_size <= size <= head.size:
        raise NotFound(
            f"No such proof: expected from <= to <= {head.size}, the size of the newest checkpoint."
        )
    hashes = await consistency_proof(old_size, size, log.hashes(current.number))
    return Consistency(log_origin=current.origin, old_size=old_size, size=size, hashes=hashes)
