"""The sequencer: gives every committed record its place in the tree, and signs what came of it.

Changes no record, and no exchange waits for it.
"""

import asyncio
import logging
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime
from typing import Final, Protocol
from uuid import UUID

import structlog
from msgspec import Struct

from keys.checkpoint import Checkpoint
from keys.signer import CustodyError
from service import metrics
from service.authority.audit.continuity import (
    COMPLAIN_EVERY,
    Continuity,
    Head,
    LogReader,
    OutsideCheckpoints,
    Place,
    SoundLog,
)
from service.authority.audit.leaf import Leaf, NotEncodable
from service.authority.audit.merkle import Frontier, Node, leaf_hash
from service.authority.errors import StoreUnavailable
from service.authority.model import Clock

TICK: Final = 0.8
"""Seconds between two looks at what was committed: with the work itself, a record has its place
within one second."""

KEY_AWAY: Final = 5.0
"""Seconds until the log's key is tried again. Another process, which may reach it, is elected
meanwhile."""

PAGE: Final = 500
"""Records at a time, so that the requests of this process never wait long for the event loop."""

MAX_GROWTH: Final = 10_000
"""Records under one new head, when there are more than that to catch up with."""

log = structlog.stdlib.get_logger()
# Whatever LOG_LEVEL is: where logs are collected, a checkpoint is evidence outside the database.
published: Final = structlog.wrap_logger(
    None, wrapper_class=structlog.make_filtering_bound_logger(logging.INFO)
)


class Growth(Struct, frozen=True, kw_only=True):
    """What is added to a log in one commit: leaves in order, nodes that they filled, a head."""

    log_number: int
    expected_size: int
    ids: Sequence[UUID]
    leaf_hashes: Sequence[bytes]
    nodes: Sequence[Node]
    head: Head


class LogStore(LogReader, Protocol):
    """One connection to the log, of the sequencer's own; every method may raise
    StoreUnavailable."""

    async def elect(self) -> bool:
        """Return whether this connection is the elected one; once it is, it stays so."""
        ...

    async def leaves(self, after: Place, limit: int) -> Sequence[Leaf]:
        """Return the next records; no later commit can come before them."""
        ...

    async def waiting(self, after: Place, limit: int) -> int:
        """Return how many committed records come next, counted up to `limit`; a transaction that
        lasts may still keep their order open."""
        ...

    async def append(self, growth: Growth) -> bool:
        """Commit it durably, if the log still has its expected size; say whether it had."""
        ...


class Sequencer:
    """Runs in every process; one of them, elected, adds to the log. The others watch it."""

    def __init__(
        self,
        *,
        connect: "Connect",
        continuity: Continuity,
        outside: OutsideCheckpoints,
        clock: Clock,
    ) -> None:
        self._connect = connect
        self._continuity = continuity
        self._outside = outside
        self._clock = clock
        self._complaint: tuple[str, float] = ("", float("-inf"))
        self.trouble: str | None = None
        """The event in the log of why this process gives no record its place now; None if it can.
        What is issued goes on record all the same."""

    async def run(self) -> None:
        """Add to the log whatever is committed, until cancelled; connect again by itself."""
        while True:
            try:
                async with self._connect() as store:
                    while True:
                        more = await self.tick(store)
                        self.trouble = None
                        if not more:
                            await asyncio.sleep(TICK)
            except StoreUnavailable as error:
                self._complain("sequencer_disconnected", str(error))
            except OSError as error:
                self._complain("checkpoints_out_of_reach", str(error) or "no answer in time")
            except NotEncodable as error:
                self._complain("record_not_encodable", str(error))
            except CustodyError as error:
                self._complain("audit_log_key_out_of_reach", str(error))
                await asyncio.sleep(KEY_AWAY)
            await asyncio.sleep(TICK)

    async def tick(self, store: LogStore) -> bool:
        """Look once; return whether there is more to do at once.

        A head is signed only if the log extends the newest outside checkpoint, and the one before
        it is outside already. Raise StoreUnavailable, OSError, NotEncodable, CustodyError.
        """
        sound = await self._continuity.compare(store)
        if sound is None:
            return False
        head, reached = sound.head, sound.log.begins_after
        if head:
            reached = head.reaches
            if head.size > sound.outside_size:
                # Another process has signed it: on this host it is to be kept, too.
                await self._keep(sound.log.number, head)
            metrics.audit_checkpoint_at_seconds.set(head.signed_at.timestamp())
        metrics.audit_tree_size.set(sound.frontier.size)
        metrics.audit_records_waiting.set(await store.waiting(reached, MAX_GROWTH))
        return await store.elect() and await self._grow(store, sound, reached)

    async def _grow(self, store: LogStore, sound: SoundLog, reached: Place) -> bool:
        ids: list[UUID] = []
        hashes: list[bytes] = []
        nodes: list[Node] = []
        frontier, size = sound.frontier, sound.frontier.size
        while len(ids) < MAX_GROWTH:
            leaves = await store.leaves(reached, PAGE)
            for leaf in leaves:
                hashes.append(_hash(leaf))
                ids.append(leaf.id)
                nodes += frontier.append(hashes[-1])
            if leaves:
                reached = Place(commit_order=int(leaves[-1].commit_order), last_id=leaves[-1].id)
            if len(leaves) < PAGE:
                break
        if not ids:
            return False
        head = await self._sign(sound, frontier, reached)
        growth = Growth(
            log_number=sound.log.number,
            expected_size=size,
            ids=ids,
            leaf_hashes=hashes,
            nodes=nodes,
            head=head,
        )
        if not await store.append(growth):
            log.warning("sequencer_was_overtaken", size=size)
            return False
        self._continuity.grown(head)
        await self._keep(sound.log.number, head)
        published.info("checkpoint", note=head.note.decode())
        return len(ids) >= MAX_GROWTH

    async def _sign(self, sound: SoundLog, frontier: Frontier, reached: Place) -> Head:
        checkpoint = Checkpoint(origin=sound.log.origin, size=frontier.size, root=frontier.root())
        return Head(
            size=frontier.size,
            reaches=reached,
            note=await sound.signer.signed(checkpoint),
            signed_at=datetime.fromtimestamp(self._clock(), UTC),
        )

    async def _keep(self, log_number: int, head: Head) -> None:
        await self._outside.keep(log_number, head.size, head.note, head.signed_at)

    def _complain(self, event: str, error: str) -> None:
        """Log what does not pass by itself, and not more often than once a minute."""
        self.trouble = event
        now = asyncio.get_running_loop().time()
        if self._complaint[0] != event or now - self._complaint[1] >= COMPLAIN_EVERY:
            self._complaint = (event, now)
            log.error(event, error=error)


class Connect(Protocol):
    """Opens a connection of the sequencer's own; leaving it ends an election that it won."""

    def __call__(self) -> AbstractAsyncContextManager[LogStore]:
        """Enter with the connection; raise StoreUnavailable."""
        ...


def _hash(leaf: Leaf) -> bytes:
    try:
        return leaf_hash(leaf.encode())
    except NotEncodable as error:
        raise NotEncodable(f"record {leaf.id}: {error}") from None
