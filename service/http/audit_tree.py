"""The audit log as a Merkle tree: its newest checkpoint for everybody, proofs for operators.

Verifies nothing and offers no key: a verifier key is pinned by its reader, never fetched beside
what it verifies.
"""

from base64 import b64encode
from collections.abc import Callable, Sequence
from typing import Annotated, Final
from uuid import UUID

from litestar import Controller, asgi, get
from litestar.di import NamedDependency
from litestar.handlers import ASGIRouteHandler
from litestar.params import FromPath, QueryParameter, SkipValidation
from litestar.types import Receive, Scope, Send
from msgspec import Struct

from service.authority.audit import Action
from service.authority.audit.proofs import ProvableLog, prove_consistency, prove_inclusion
from service.authority.model import AdminScope
from service.authority.operators import Operator
from service.http.well_known import send_missing, send_public

CHECKPOINT_PATH: Final = "/api/v1/audit/checkpoint"

OldSize = Annotated[int, QueryParameter(name="from", ge=0, le=2**53 - 1)]
Size = Annotated[
    int,
    QueryParameter(name="to", ge=0, le=2**53 - 1, description="0: that of the newest checkpoint."),
]


class InclusionProof(Struct, frozen=True, kw_only=True):
    """That a record is leaf `leaf_index` of the tree that `checkpoint` was signed over (RFC 6962
    §2.1.1).

    That is the tree of the log `log_origin`, which need not be the newest one. Hashes are in
    base64; the leaf hash is SHA-256(0x00 ‖ `leaf`).

    `leaf` is null once the record was archived: its file has it.
    """

    id: UUID
    log_origin: str
    leaf_index: int
    leaf: str | None
    leaf_hash: str
    tree_size: int
    hashes: list[str]
    checkpoint: str


class ConsistencyProof(Struct, frozen=True, kw_only=True):
    """That the log of `tree_size` records begins with that of `old_tree_size` (RFC 6962 §2.1.2).

    It is the newest log, `log_origin`. Hashes are in base64.
    """

    log_origin: str
    old_tree_size: int
    tree_size: int
    hashes: list[str]


class AuditTreeController(Controller):
    """Proofs that nothing in the audit log was changed."""

    path = "/"
    tags = ("Audit",)

    @get("/audit-records/{record_id:uuid}/proof", opt={"action": Action.AUDIT_INCLUSION})
    async def inclusion(
        self,
        record_id: FromPath[UUID],
        operator: NamedDependency[Operator],
        tree: NamedDependency[SkipValidation[ProvableLog]],
    ) -> InclusionProof:
        """Prove that a record is in the log, as its newest checkpoint has it."""
        operator.require(AdminScope.AUDIT_READ)
        proof = await prove_inclusion(tree, record_id)
        return InclusionProof(
            id=record_id,
            log_origin=proof.place.log_origin,
            leaf_index=proof.place.leaf_index,
            leaf=proof.leaf.encode().decode() if proof.leaf else None,
            leaf_hash=_base64(proof.place.leaf_hash),
            tree_size=proof.head.size,
            hashes=_all_base64(proof.hashes),
            checkpoint=proof.head.note.decode(),
        )

    @get("/audit/consistency", opt={"action": Action.AUDIT_CONSISTENCY})
    async def consistency(
        self,
        operator: NamedDependency[Operator],
        tree: NamedDependency[SkipValidation[ProvableLog]],
        old_size: OldSize = 0,
        size: Size = 0,
    ) -> ConsistencyProof:
        """Prove that the log only grew between two sizes that checkpoints name."""
        operator.require(AdminScope.AUDIT_READ)
        proof = await prove_consistency(tree, old_size, size or None)
        return ConsistencyProof(
            log_origin=proof.log_origin,
            old_tree_size=proof.old_size,
            tree_size=proof.size,
            hashes=_all_base64(proof.hashes),
        )


def checkpoint_endpoint(latest: Callable[[], bytes | None]) -> ASGIRouteHandler:
    """Return the route of the newest checkpoint, a signed note (C2SP tlog-checkpoint)."""

    @asgi(CHECKPOINT_PATH, copy_scope=False)
    async def checkpoint(scope: Scope, receive: Receive, send: Send) -> None:
        note = latest()
        if note is None:
            await send_missing(scope, send)
        else:
            await send_public(scope, send, note, b"text/plain; charset=utf-8", b"no-cache")

    return checkpoint


def _base64(data: bytes) -> str:
    return b64encode(data).decode("ascii")


def _all_base64(hashes: Sequence[bytes]) -> list[str]:
    return [_base64(each) for each in hashes]
