"""Tree heads and proofs are those of RFC 6962, and a proof shows that one thing and no other."""

import asyncio
import hashlib
from collections.abc import Sequence
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scitt_cose import merkle as scitt_merkle  # pyright: ignore[reportMissingTypeStubs]

from service.authority.audit.merkle import (
    EMPTY_ROOT,
    STORED_EVERY,
    Frontier,
    HashesMissing,
    InvalidProof,
    Span,
    consistency_proof,
    frontier_at,
    inclusion_proof,
    leaf_hash,
    node_hash,
    verify_consistency,
    verify_inclusion,
)

# The vectors of the Certificate Transparency project for RFC 6962.
LEAVES = [
    bytes.fromhex(leaf)
    for leaf in (
        *("", "00", "10", "2021", "3031", "40414243", "5051525354555657"),
        "606162636465666768696a6b6c6d6e6f",
    )
]
ROOTS = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]
INCLUSION: list[tuple[int, int, list[str]]] = [
    (0, 1, []),
    (
        0,
        8,
        [
            "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
            "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
            "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
        ],
    ),
    (
        5,
        8,
        [
            "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
            "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
            "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
        ],
    ),
    (2, 3, ["fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125"]),
    (
        1,
        5,
        [
            "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
            "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
            "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
        ],
    ),
]
CONSISTENCY: list[tuple[int, int, list[str]]] = [
    (1, 1, []),
    (1, 8, INCLUSION[1][2]),
    (
        6,
        8,
        [
            "0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a",
            "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
            "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
        ],
    ),
    (
        2,
        5,
        [
            "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
            "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
        ],
    ),
    (
        6,
        7,
        [
            "0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a",
            "b08693ec2e721597130641e8211e7eedccb4c26413963eee6c1e2ed16ffb1a5f",
            "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
        ],
    ),
]


class Tree:
    """A tree with what the sequencer would have stored of it, and every head that it had."""

    def __init__(self, leaves: Sequence[bytes]) -> None:
        self.leaves = [leaf_hash(leaf) for leaf in leaves]
        self.stored = {(0, index): one for index, one in enumerate(self.leaves)}
        self.read_hashes = 0
        frontier = Frontier()
        self.roots = [frontier.root()]
        for one in self.leaves:
            for node in frontier.append(one):
                self.stored[node.level, node.index] = node.hash
            self.roots.append(frontier.root())

    async def read(self, spans: Sequence[Span]) -> list[list[bytes]]:
        self.read_hashes += sum(span.stop - span.start for span in spans)
        return [
            [
                self.stored[span.level, index]
                for index in range(span.start, span.stop)
                if (span.level, index) in self.stored
            ]
            for span in spans
        ]

    def inclusion(self, index: int, size: int) -> list[bytes]:
        return asyncio.run(inclusion_proof(index, size, self))

    def consistency(self, old_size: int, size: int) -> list[bytes]:
        return asyncio.run(consistency_proof(old_size, size, self))

    def frontier(self, size: int) -> Frontier:
        return asyncio.run(frontier_at(size, self))


# Larger than two stored subtrees, so that a proof crosses all kinds of borders.
TREE = Tree([index.to_bytes(2) for index in range(600)])
sizes = st.integers(0, len(TREE.leaves))
filled = st.integers(1, len(TREE.leaves))
two_sizes = st.tuples(sizes, sizes).map(sorted)
proper_growth = st.tuples(filled, filled).filter(lambda two: two[0] != two[1]).map(sorted)


@st.composite
def leaf_in_tree(draw: st.DrawFn) -> tuple[int, int]:
    size = draw(filled)
    return draw(st.integers(0, size - 1)), size


def unhex(hashes: Sequence[str]) -> list[bytes]:
    return [bytes.fromhex(one) for one in hashes]


def is_included(proof: Sequence[bytes], leaf: bytes, index: int, size: int, root: bytes) -> bool:
    try:
        verify_inclusion(proof, leaf_hash=leaf, index=index, size=size, root=root)
    except InvalidProof:
        return False
    return True


def is_consistent(
    proof: Sequence[bytes], old_size: int, old_root: bytes, size: int, root: bytes
) -> bool:
    try:
        verify_consistency(proof, old_size=old_size, old_root=old_root, size=size, root=root)
    except InvalidProof:
        return False
    return True


def flipped(hashes: Sequence[bytes], bit: int) -> list[bytes]:
    """Return the hashes with one bit of all of theirs inverted."""
    joined = bytearray(b"".join(hashes))
    joined[bit // 8] ^= 1 << bit % 8
    return [bytes(joined[at : at + 32]) for at in range(0, len(joined), 32)]


def head_by_definition(leaves: Sequence[bytes]) -> bytes:
    """MTH, word for word as RFC 6962 §2.1 defines it, over hashes of leaves."""
    if not leaves:
        return hashlib.sha256(b"").digest()
    if len(leaves) == 1:
        return leaves[0]
    k = 1
    while 2 * k < len(leaves):
        k *= 2
    left, right = head_by_definition(leaves[:k]), head_by_definition(leaves[k:])
    return hashlib.sha256(b"\x01" + left + right).digest()


def test_the_heads_of_rfc_6962_come_out() -> None:
    tree = Tree(LEAVES)
    assert tree.roots == [EMPTY_ROOT, *unhex(ROOTS)]
    assert EMPTY_ROOT.hex() == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


@pytest.mark.parametrize(("index", "size", "proof"), INCLUSION)
def test_the_inclusion_proofs_of_rfc_6962_come_out_and_verify(
    index: int, size: int, proof: list[str]
) -> None:
    tree = Tree(LEAVES)
    assert tree.inclusion(index, size) == unhex(proof)
    assert is_included(unhex(proof), tree.leaves[index], index, size, tree.roots[size])


@pytest.mark.parametrize(("old_size", "size", "proof"), CONSISTENCY)
def test_the_consistency_proofs_of_rfc_6962_come_out_and_verify(
    old_size: int, size: int, proof: list[str]
) -> None:
    tree = Tree(LEAVES)
    assert tree.consistency(old_size, size) == unhex(proof)
    assert is_consistent(unhex(proof), old_size, tree.roots[old_size], size, tree.roots[size])


@given(sizes)
def test_every_head_is_the_one_that_the_definition_gives(size: int) -> None:
    assert TREE.roots[size] == head_by_definition(TREE.leaves[:size])


@given(sizes)
def test_a_tree_goes_on_growing_from_what_is_stored(size: int) -> None:
    frontier = TREE.frontier(size)
    assert (frontier.size, frontier.root()) == (size, TREE.roots[size])
    for one in TREE.leaves[size : size + 3]:
        frontier.append(one)
    assert frontier.root() == TREE.roots[frontier.size]


def test_only_complete_subtrees_of_every_eighth_level_are_stored() -> None:
    inner = {at for at in TREE.stored if at[0] > 0}
    assert inner == {(STORED_EVERY, 0), (STORED_EVERY, 1)}
    assert TREE.stored[STORED_EVERY, 1] == head_by_definition(TREE.leaves[256:512])


def test_a_proof_in_a_tree_of_ten_million_reads_few_hashes() -> None:
    class Counting(Tree):
        async def read(self, spans: Sequence[Span]) -> list[list[bytes]]:
            self.read_hashes += sum(span.stop - span.start for span in spans)
            return [[b"\0" * 32] * (span.stop - span.start) for span in spans]

    counting, random = Counting([]), Random(1)
    for _ in range(20):
        counting.read_hashes = 0
        proof = counting.inclusion(random.randrange(9_999_999), 9_999_999)
        assert len(proof) <= 24
        assert counting.read_hashes <= 2_000


@given(leaf_in_tree())
def test_the_inclusion_proof_of_every_leaf_verifies(at: tuple[int, int]) -> None:
    index, size = at
    proof = TREE.inclusion(index, size)
    assert is_included(proof, TREE.leaves[index], index, size, TREE.roots[size])


@given(two_sizes)
def test_every_tree_is_consistent_with_every_later_one(two: list[int]) -> None:
    old, new = two
    proof = TREE.consistency(old, new)
    assert is_consistent(proof, old, TREE.roots[old], new, TREE.roots[new])


@given(leaf_in_tree())
def test_another_implementation_accepts_our_inclusion_proofs(at: tuple[int, int]) -> None:
    index, size = at
    proof = [one.hex() for one in TREE.inclusion(index, size)]
    leaf, root = index.to_bytes(2).hex(), TREE.roots[size].hex()
    assert scitt_merkle.verify_inclusion(leaf, index, size, proof, root)
    assert not scitt_merkle.verify_inclusion("ffff", index, size, proof, root)


@given(st.tuples(filled, filled).map(sorted))
def test_another_implementation_accepts_our_consistency_proofs(two: list[int]) -> None:
    old, new = two
    proof = [one.hex() for one in TREE.consistency(old, new)]
    old_root, root = TREE.roots[old].hex(), TREE.roots[new].hex()
    assert scitt_merkle.verify_consistency(old_root, root, old, new, proof)
    assert not scitt_merkle.verify_consistency("00" * 32, root, old, new, proof)


@given(leaf_in_tree(), st.data())
def test_one_flipped_bit_anywhere_fails_an_inclusion_proof(
    at: tuple[int, int], data: st.DataObject
) -> None:
    index, size = at
    hashes = [TREE.leaves[index], TREE.roots[size], *TREE.inclusion(index, size)]
    leaf, root, *proof = flipped(hashes, data.draw(st.integers(0, len(hashes) * 256 - 1)))
    assert not is_included(proof, leaf, index, size, root)


@given(two_sizes, st.data())
def test_one_flipped_bit_anywhere_fails_a_consistency_proof(
    two: list[int], data: st.DataObject
) -> None:
    old, new = two
    hashes = [TREE.roots[old], *TREE.consistency(old, new)]
    # To the empty tree every other is consistent: there only the old root can be wrong.
    hashes = [*hashes, TREE.roots[new]] if old else hashes
    changed = flipped(hashes, data.draw(st.integers(0, len(hashes) * 256 - 1)))
    old_root, *proof = changed
    root = proof.pop() if old else TREE.roots[new]
    assert not is_consistent(proof, old, old_root, new, root)


@given(leaf_in_tree(), st.integers(-1, 700))
def test_an_inclusion_proof_holds_for_no_other_index(at: tuple[int, int], other: int) -> None:
    index, size = at
    proof = TREE.inclusion(index, size)
    included = is_included(proof, TREE.leaves[index], other, size, TREE.roots[size])
    assert included == (other == index)


@given(leaf_in_tree(), filled)
def test_an_inclusion_proof_holds_under_no_other_head(at: tuple[int, int], other: int) -> None:
    index, size = at
    proof = TREE.inclusion(index, size)
    included = is_included(proof, TREE.leaves[index], index, other, TREE.roots[other])
    assert included == (other == size)


@given(proper_growth, sizes)
def test_a_consistency_proof_holds_for_no_other_pair_of_heads(two: list[int], other: int) -> None:
    old, new = two
    proof = TREE.consistency(old, new)
    for old_size, size in ((old, other), (other, new)):
        if (old_size, size) == (old, new) or old_size == 0:
            continue
        consistent = is_consistent(proof, old_size, TREE.roots[old_size], size, TREE.roots[size])
        assert not consistent


@given(proper_growth, st.integers(-3, 700))
def test_a_consistency_proof_does_not_hold_for_an_invented_old_size(
    two: list[int], invented: int
) -> None:
    old, new = two
    proof = TREE.consistency(old, new)
    held = is_consistent(proof, invented, TREE.roots[old], new, TREE.roots[new])
    assert held == (invented == old)


@given(leaf_in_tree(), st.sampled_from(["longer", "shorter", "garbage in front", "short hash"]))
def test_a_proof_of_another_length_fails(at: tuple[int, int], how: str) -> None:
    index, size = at
    proof = TREE.inclusion(index, size)
    mangled = {
        "longer": [*proof, TREE.roots[size]],
        "shorter": proof[:-1] if proof else [b""],
        "garbage in front": [TREE.roots[size], *proof],
        "short hash": [*proof[:-1], proof[-1][:31]] if proof else [b"\0" * 31],
    }[how]
    assert not is_included(mangled, TREE.leaves[index], index, size, TREE.roots[size])


@given(proper_growth, st.sampled_from(["longer", "shorter", "garbage in front", "short hash"]))
def test_a_consistency_proof_of_another_length_fails(two: list[int], how: str) -> None:
    old, new = two
    proof = TREE.consistency(old, new)
    mangled = {
        "longer": [*proof, TREE.roots[new]],
        "shorter": proof[:-1],
        "garbage in front": [TREE.roots[old], *proof],
        "short hash": [*proof[:-1], proof[-1][:31]],
    }[how]
    assert not is_consistent(mangled, old, TREE.roots[old], new, TREE.roots[new])


def test_a_smaller_tree_extends_no_larger_one_and_equal_sizes_need_equal_heads() -> None:
    roots = TREE.roots
    assert not is_consistent([], 5, roots[5], 4, roots[4])
    assert not is_consistent([], 4, roots[5], 4, roots[4])
    assert not is_consistent([], 0, roots[5], 4, roots[4])
    assert not is_consistent([roots[4]], 4, roots[4], 4, roots[4])
    assert not is_consistent([], 2, roots[2], 4, roots[4])
    assert not is_consistent([], 3, roots[3], 4, roots[4])


def test_a_size_that_is_not_that_of_the_root_is_refused_where_a_proof_can_tell() -> None:
    leaf, roots, proof = TREE.leaves[0], TREE.roots, TREE.inclusion(0, 2)
    assert is_included(proof, leaf, 0, 2, roots[2])
    assert not is_included(proof, leaf, 0, 1, roots[2])
    assert not is_included(proof, leaf, 0, 3, roots[2])
    assert not is_included([], leaf, -1, 1, roots[1])


def test_nodes_cannot_be_passed_off_as_leaves() -> None:
    left, right = TREE.leaves[:2]
    assert leaf_hash(left + right) != node_hash(left, right)
    assert not is_included([], leaf_hash(left + right), 0, 1, TREE.roots[2])


@pytest.mark.parametrize(("index", "size"), [(-1, 5), (5, 5), (0, 0)])
def test_no_proof_is_made_for_a_leaf_that_is_not_there(index: int, size: int) -> None:
    with pytest.raises(ValueError, match="no leaf"):
        TREE.inclusion(index, size)


def test_a_hash_that_is_gone_from_the_store_is_noticed() -> None:
    tree = Tree(LEAVES)
    del tree.stored[0, 3]
    with pytest.raises(HashesMissing, match="level 0: of 2 to 3, 1 are there"):
        tree.inclusion(0, 8)
    with pytest.raises(HashesMissing):
        tree.frontier(8)
    with pytest.raises(HashesMissing):
        TREE.frontier(len(TREE.leaves) + 1)


def test_a_frontier_that_does_not_fit_its_size_is_refused() -> None:
    with pytest.raises(ValueError, match="a tree of 3 leaves"):
        Frontier(3, [b"\0" * 32])
    with pytest.raises(ValueError, match="32 bytes"):
        Frontier(1, [b"\0" * 31])
