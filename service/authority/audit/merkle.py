"""The Merkle tree over the log: heads, proofs, verification (RFC 6962 §2.1, RFC 9162 §2.1).

Knows no record and no database: leaves come in as hashes, older hashes through `StoredHashes`.

What is stored: the hash of every leaf (level 0), and of every complete subtree of 2^8, 2^16, 2^24…
leaves. The nodes between are computed. Storing every node would double the rows; storing only
leaves would make a proof read all of them. With every eighth level there is one row more for 255
leaves, and a proof in a tree of ten million reads at most 2,000 hashes in one query. Nodes on the
right edge, which change with every leaf, are never stored, so that rows are only ever added.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Final, Protocol

from msgspec import Struct

HASH_BYTES: Final = 32
STORED_EVERY: Final = 8
"""Complete subtrees are stored whose level is a multiple of this."""

# RFC 6962 §2.1: the head of an empty tree.
EMPTY_ROOT: Final = hashlib.sha256(b"").digest()


class InvalidProof(Exception):
    """The proof does not show what it was offered for."""


class HashesMissing(Exception):
    """The store does not hold every hash that a tree of that size has."""


class Node(Struct, frozen=True, kw_only=True):
    """A complete subtree: the 2^`level` leaves from `index` · 2^`level` on."""

    level: int
    index: int
    hash: bytes


class Span(Struct, frozen=True, kw_only=True):
    """The stored hashes `start` ≤ index < `stop` of one level."""

    level: int
    start: int
    stop: int


class StoredHashes(Protocol):
    """The hashes that are kept, found by level and index."""

    async def read(self, spans: Sequence[Span]) -> Sequence[Sequence[bytes]]:
        """Return for each span its hashes in order of index; raise StoreUnavailable.

        A span comes back shorter where hashes are missing.
        """
        ...


def leaf_hash(leaf: bytes) -> bytes:
    """Return the hash of a leaf (RFC 6962 §2.1: MTH of one entry)."""
    return hashlib.sha256(b"\x00" + leaf).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """Return the hash of a node from those of its children (RFC 6962 §2.1)."""
    return hashlib.sha256(b"\x01" + left + right).digest()


class Frontier:
    """A growing tree, of which only the right edge is kept: at most one hash for each level.

    `hashes` are those of the complete subtrees that a tree of `size` leaves falls into, the largest
    first: one for each bit set in `size`.
    """

    __slots__ = ("_hashes", "_size")

    def __init__(self, size: int = 0, hashes: Sequence[bytes] = ()) -> None:
        if size < 0 or len(hashes) != size.bit_count():
            raise ValueError(f"a tree of {size} leaves does not have {len(hashes)} subtrees")
        _require_hashes(hashes, ValueError)
        self._size = size
        self._hashes = list(hashes)

    @property
    def size(self) -> int:
        """The number of leaves."""
        return self._size

    def append(self, leaf_hash: bytes) -> Sequence[Node]:
        """Add a leaf; return the nodes above the leaves that it completed and that are stored."""
        completed: list[Node] = []
        node, level, index = leaf_hash, 0, self._size
        while index & 1:
            node, level, index = node_hash(self._hashes.pop(), node), level + 1, index >> 1
            if level % STORED_EVERY == 0:
                completed.append(Node(level=level, index=index, hash=node))
        self._hashes.append(node)
        self._size += 1
        return completed

    def root(self) -> bytes:
        """Return the tree head (RFC 6962 §2.1: MTH), 32 bytes."""
        return _joined(self._hashes) if self._hashes else EMPTY_ROOT


async def frontier_at(size: int, stored: StoredHashes) -> Frontier:
    """Return the tree as it was with `size` leaves; raise HashesMissing, StoreUnavailable."""
    subtrees = list(_complete_subtrees(range(size)))
    return Frontier(size, await _hashes_of(subtrees, stored))


async def inclusion_proof(index: int, size: int, stored: StoredHashes) -> list[bytes]:
    """Prove that leaf `index` is in the tree of `size` leaves (RFC 6962 §2.1.1: PATH).

    Raise ValueError unless 0 ≤ index < size; raise HashesMissing, StoreUnavailable.
    """
    if not 0 <= index < size:
        raise ValueError(f"there is no leaf {index} in a tree of {size}")
    return await _roots_of(_inclusion_path(index, size), stored)


async def consistency_proof(old_size: int, size: int, stored: StoredHashes) -> list[bytes]:
    """Prove that the tree of `size` leaves begins with that of `old_size` (RFC 6962 §2.1.2: PROOF).

    The proof is empty where there is nothing to prove: from the empty tree, and to the same size.
    Raise ValueError unless 0 ≤ old_size ≤ size; raise HashesMissing, StoreUnavailable.
    """
    if not 0 <= old_size <= size:
        raise ValueError(f"a tree of {size} leaves cannot extend one of {old_size}")
    if old_size == 0:
        return []
    return await _roots_of(_consistency_path(old_size, size), stored)


def verify_inclusion(
    proof: Sequence[bytes], *, leaf_hash: bytes, index: int, size: int, root: bytes
) -> None:
    """Return if `leaf_hash` is leaf `index` of the tree of `size` leaves under `root`.

    Raise InvalidProof otherwise (RFC 9162 §2.1.3.2). `size` and `root` must come from one signed
    checkpoint: a proof fits several sizes, and it is the checkpoint that says which is meant.
    """
    _require_hashes((leaf_hash, root, *proof), InvalidProof)
    if not 0 <= index < size:
        raise InvalidProof(f"there is no leaf {index} in a tree of {size}")
    node, fn, sn = leaf_hash, index, size - 1
    for sibling in proof:
        if sn == 0:
            raise InvalidProof("the proof is too long")
        if fn & 1 or fn == sn:
            node = node_hash(sibling, node)
            while fn and not fn & 1:
                fn, sn = fn >> 1, sn >> 1
        else:
            node = node_hash(node, sibling)
        fn, sn = fn >> 1, sn >> 1
    if sn != 0:
        raise InvalidProof("the proof is too short")
    if node != root:
        raise InvalidProof("the proof leads to another root")


def verify_consistency(
    proof: Sequence[bytes], *, old_size: int, old_root: bytes, size: int, root: bytes
) -> None:
    """Return if the tree of `size` leaves under `root` begins with that of `old_size`.

    Raise InvalidProof otherwise (RFC 9162 §2.1.4.2). Each size must come from the checkpoint of its
    root. Nothing of the service asks this: it is what whoever keeps two checkpoints asks, and what
    the tests hold the proofs to.
    """
    _require_hashes((old_root, root, *proof), InvalidProof)
    if not 0 <= old_size <= size:
        raise InvalidProof(f"a tree of {size} leaves cannot extend one of {old_size}")
    if old_size in (0, size):
        if proof:
            raise InvalidProof("the proof is too long")
        if old_root != (root if old_size == size else EMPTY_ROOT):
            raise InvalidProof("the old root is another")
        return
    # A tree of 2^n leaves is a node of the larger one: its root starts the path and is left out.
    path = list(proof) if old_size & (old_size - 1) else [old_root, *proof]
    if not path:
        raise InvalidProof("the proof is too short")
    fn, sn = old_size - 1, size - 1
    while fn & 1:
        fn, sn = fn >> 1, sn >> 1
    old_node = node = path[0]
    for sibling in path[1:]:
        if sn == 0:
            raise InvalidProof("the proof is too long")
        if fn & 1 or fn == sn:
            old_node, node = node_hash(sibling, old_node), node_hash(sibling, node)
            while fn and not fn & 1:
                fn, sn = fn >> 1, sn >> 1
        else:
            node = node_hash(node, sibling)
        fn, sn = fn >> 1, sn >> 1
    if sn != 0:
        raise InvalidProof("the proof is too short")
    if old_node != old_root:
        raise InvalidProof("the proof leads to another old root")
    if node != root:
        raise InvalidProof("the proof leads to another root")


class _Subtree(Struct, frozen=True):
    """A complete subtree whose hash is wanted: the 2^`level` leaves from `index` · 2^`level` on."""

    level: int
    index: int

    @property
    def span(self) -> Span:
        """The stored hashes that it is computed from."""
        depth = self.level % STORED_EVERY
        start, stop = self.index << depth, (self.index + 1) << depth
        return Span(level=self.level - depth, start=start, stop=stop)


def _inclusion_path(index: int, size: int) -> list[range]:
    """Return the leaves under each hash of PATH(index, D[size]), in the order of the proof."""
    path: list[range] = []
    start, stop = 0, size
    while stop - start > 1:
        middle = start + _left_size(stop - start)
        if index < middle:
            path.append(range(middle, stop))
            stop = middle
        else:
            path.append(range(start, middle))
            start = middle
    return path[::-1]


def _consistency_path(old_size: int, size: int) -> list[range]:
    """Return the leaves under each hash of PROOF(old_size, D[size]), in the order of the proof."""
    path: list[range] = []
    start, stop = 0, size
    while stop != old_size:
        middle = start + _left_size(stop - start)
        if old_size <= middle:
            path.append(range(middle, stop))
            stop = middle
        else:
            path.append(range(start, middle))
            start = middle
    # SUBPROOF with b = true: whoever verifies has the old root already.
    if start > 0:
        path.append(range(start, stop))
    return path[::-1]


def _left_size(size: int) -> int:
    # RFC 6962 §2.1: the largest power of two smaller than n.
    return 1 << ((size - 1).bit_length() - 1)


def _complete_subtrees(leaves: range) -> Iterator[_Subtree]:
    """Cut leaves into complete subtrees, largest first; they begin where one of all would."""
    start = leaves.start
    while start < leaves.stop:
        level = (leaves.stop - start).bit_length() - 1
        yield _Subtree(level, start >> level)
        start += 1 << level


async def _roots_of(path: Sequence[range], stored: StoredHashes) -> list[bytes]:
    """Return the hash over each range of leaves, with one read for all."""
    subtrees = [list(_complete_subtrees(leaves)) for leaves in path]
    hashes = iter(await _hashes_of([one for some in subtrees for one in some], stored))
    return [_joined([next(hashes) for _ in some]) for some in subtrees]


async def _hashes_of(subtrees: Sequence[_Subtree], stored: StoredHashes) -> list[bytes]:
    spans = [subtree.span for subtree in subtrees]
    found = await stored.read(spans)
    for span, hashes in zip(spans, found, strict=True):
        if len(hashes) != span.stop - span.start:
            raise HashesMissing(
                f"level {span.level}: of {span.start} to {span.stop - 1}, {len(hashes)} are there"
            )
        _require_hashes(hashes, HashesMissing)
    return [_complete_root(hashes) for hashes in found]


def _complete_root(hashes: Sequence[bytes]) -> bytes:
    """Return the hash over 2^n neighbours."""
    while len(hashes) > 1:
        pairs = iter(hashes)
        hashes = [node_hash(left, right) for left, right in zip(pairs, pairs, strict=True)]
    return hashes[0]


def _joined(subtrees: Sequence[bytes]) -> bytes:
    """Return the hash over subtrees of falling size."""
    root = subtrees[-1]
    for left in subtrees[-2::-1]:
        root = node_hash(left, root)
    return root


def _require_hashes(hashes: Sequence[bytes], error: type[Exception]) -> None:
    if any(len(one) != HASH_BYTES for one in hashes):
        raise error(f"a hash has {HASH_BYTES} bytes")
