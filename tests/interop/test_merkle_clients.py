"""A checkpoint and a proof of ours, checked by the verifier that npm itself uses for its packages.

It must not verify with anything of ours: what the program gets is what anybody could fetch.
"""

import asyncio
import json
from base64 import b64encode
from collections.abc import Sequence
from typing import Any
from uuid import UUID

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from keys.checkpoint import Checkpoint, NoteSigner
from service.authority.audit.leaf import Leaf
from service.authority.audit.merkle import Frontier, Span, inclusion_proof, leaf_hash
from tests.interop.conftest import Node

ORIGIN = "tokens.example.com/audit/1"
SIZE = 300
INDEX = 268


def a_leaf(number: int) -> bytes:
    return Leaf(
        action="token.issue",
        actor=None,
        actor_credential_id=None,
        actor_id=None,
        aud="http://127.0.0.1:8081",
        commit_order=str(2**48 + number),
        credential_id="cr_example",
        details={"note": "é\u0007"},
        exp=1_800_000_900,
        iat=1_800_000_000,
        id=UUID(int=number),
        jti=None,
        kid="example",
        occurred_at=None,
        outcome="success",
        personal_sha256=bytes(32),
        reason=None,
        recorded_at=1_800_000_000_000_000 + number,
        repeats=1,
        request_id="r-1",
        scope="ingest:write",
        service_user="vkyc-prod",
        service_user_id="su_example",
        signing_input_sha256=bytes(32),
        source_system="vkyc",
        version=3,
    ).encode()


class InMemory:
    """What a store would hold of the tree."""

    def __init__(self, leaves: Sequence[bytes]) -> None:
        self.frontier = Frontier()
        self._hashes: dict[tuple[int, int], bytes] = {}
        for index, leaf in enumerate(leaves):
            self._hashes[0, index] = leaf_hash(leaf)
            for added in self.frontier.append(leaf_hash(leaf)):
                self._hashes[added.level, added.index] = added.hash

    async def read(self, spans: Sequence[Span]) -> list[list[bytes]]:
        return [
            [self._hashes[span.level, index] for index in range(span.start, span.stop)]
            for span in spans
        ]


@pytest.fixture(scope="module")
def served() -> dict[str, Any]:
    """What a log of 300 records serves: its checkpoint, one of its leaves and the proof of it."""
    leaves = [a_leaf(number) for number in range(SIZE)]
    tree = InMemory(leaves)
    signer = NoteSigner(ORIGIN, Ed25519PrivateKey.generate())
    checkpoint = Checkpoint(origin=ORIGIN, size=SIZE, root=tree.frontier.root())
    proof = asyncio.run(inclusion_proof(INDEX, SIZE, tree))
    return {
        "vkey": signer.verifier.vkey,
        "note": checkpoint.signed(signer).decode(),
        "leaf": _base64(leaves[INDEX]),
        "index": str(INDEX),
        "proof": [_base64(one) for one in proof],
        "root": _base64(checkpoint.root),
    }


def test_sigstore_opens_the_checkpoint_and_finds_the_leaf(
    node: Node, served: dict[str, Any]
) -> None:
    done = node("sigstore.mjs", **served)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"origin": ORIGIN, "size": SIZE, "root": served["root"]}


@pytest.mark.parametrize(
    ("member", "other", "complaint"),
    [
        ("leaf", b64encode(a_leaf(INDEX + 1)).decode(), "root hash"),
        ("index", str(INDEX - 1), "root hash"),
        ("index", str(SIZE), "invalid index"),
        ("proof", [], "hash count"),
    ],
)
def test_sigstore_refuses_another_leaf_index_or_proof(
    member: str, other: Any, complaint: str, node: Node, served: dict[str, Any]
) -> None:
    refused = node("sigstore.mjs", **{**served, member: other})
    assert refused.returncode != 0
    assert complaint in refused.stderr


def test_sigstore_refuses_a_checkpoint_that_was_changed_or_is_of_another_key(
    node: Node, served: dict[str, Any]
) -> None:
    other = NoteSigner(ORIGIN, Ed25519PrivateKey.generate()).verifier
    changed = served["note"].replace(f"\n{SIZE}\n", f"\n{SIZE - 1}\n")
    for refused in (
        node("sigstore.mjs", **{**served, "note": changed}),
        node("sigstore.mjs", **{**served, "vkey": other.vkey}),
    ):
        assert refused.returncode != 0
        assert "invalid checkpoint signature" in refused.stderr


def _base64(data: bytes) -> str:
    return b64encode(data).decode("ascii")
