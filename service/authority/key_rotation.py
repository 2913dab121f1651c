"""Drives signing keys through their life: asks `next_step`, carries the answer out, records it.

Decides nothing itself: `keys/keyring.py` does, and the database's guards have the last word.
"""

import asyncio
import random
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from datetime import datetime
from typing import Any, Final, Protocol

import msgspec
import structlog
from msgspec import Struct

from keys.attestation import require_attested
from keys.envelope import EnvelopeError, KekReader
from keys.keyring import (
    MAY_SIGN,
    Activate,
    Concern,
    KeyRing,
    KeyState,
    Prepare,
    Retire,
    RotationPolicy,
    SigningKey,
    Step,
    Wait,
    concerns,
    next_step,
    rotation_due,
)
from keys.signer import Custody, CustodyError, KeptKey, Signer
from service import metrics
from service.authority.audit import Action, AuditRecord, Outcome, new_record_id
from service.authority.errors import StoreUnavailable
from service.authority.evidence import Evidence
from service.authority.model import Clock

log = structlog.stdlib.get_logger()

_RETRY: Final = 1.0
"""Seconds between two looks while the store is away."""

MAX_NAMED: Final = 50
"""Of the verifiers that a rotation did not wait for, so many are named on record."""


class StoredKey(Struct, frozen=True, kw_only=True):
    """A key as the store has it: where it stands in its life, and where its private half is."""

    key: SigningKey
    kept: KeptKey


class TokenHolder(Struct, frozen=True, kw_only=True):
    """A service user that holds live tokens of a key, and when the last of them ends."""

    service_user_id: str
    service_user: str
    count: int
    last_ends_at: datetime


class EndedKey(Struct, frozen=True, kw_only=True):
    """A key that is published no more; times are seconds since the epoch."""

    kid: str
    state: KeyState
    bits: int
    published_at: float
    activated_at: float | None
    ended_at: float


class SigningKeyStore(Protocol):
    """Signing keys in Postgres. A step is guarded by the state that it was decided on, and
    returns whether this call took it."""

    async def published_keys(self) -> Sequence[StoredKey]:
        """Return the pending, active and retiring keys; raise StoreUnavailable."""
        ...

    def elected(self) -> AbstractAsyncContextManager[bool]:
        """Enter with True if no other process is inside: so that one alone makes a key."""
        ...

    async def prepare(self, key: KeptKey, record: AuditRecord) -> bool: ...

    async def activate(
        self, kid: str, active_kid: str | None, policy: RotationPolicy, record: AuditRecord
    ) -> bool: ...

    async def retire(self, kid: str, record: AuditRecord) -> bool: ...

    async def hasten_rotation(self, active_kid: str, record: AuditRecord) -> bool: ...

    async def revoke(
        self, key: SigningKey, policy: RotationPolicy, record: AuditRecord
    ) -> bool: ...

    async def revoke_all(
        self,
        kids: Sequence[str],
        signing: KeptKey,
        following: KeptKey,
        policy: RotationPolicy,
        record: AuditRecord,
    ) -> bool: ...

    async def doomed(self) -> Sequence[tuple[str, str]]:
        """Return kid and URI of the keys that may sign no more and are not known to be destroyed
        where they were made."""
        ...

    async def destroyed(self, kid: str, record: AuditRecord) -> bool: ...

    async def holders(self, kids: Sequence[str], limit: int | None = None) -> Sequence[TokenHolder]:
        """Return who holds live tokens of these keys; with a limit, of so many newest tokens."""
        ...

    async def ended(self, limit: int) -> Sequence[EndedKey]:
        """Return the keys that were retired or revoked within 90 days, the last one first."""
        ...


class LiveKeyRing:
    """The ring of this process: read from the store, with the signers opened."""

    def __init__(
        self,
        *,
        store: SigningKeyStore,
        custody: Custody,
        read_keks: KekReader,
        clock: Clock,
    ) -> None:
        self._store = store
        self._custody = custody
        self._read_keks = read_keks
        self._clock = clock
        self._attested: dict[str, KeptKey] = {}
        self._signers: dict[str, Signer] = {}
        self._ring = KeyRing()
        self._read_at = 0.0
        # One read at a time; they are numbered, and `_read` is the last that succeeded.
        self._reading = asyncio.Lock()
        self._reads_begun = 0
        self._read = 0
        self.loaded = False

    @property
    def ring(self) -> KeyRing:
        """The ring as it was last read."""
        return self._ring

    @property
    def age(self) -> float:
        """Seconds since it was read."""
        return self._clock() - self._read_at

    async def cached(self) -> KeyRing:
        """Return the ring as it was last read."""
        return self._ring

    async def fresh(self) -> KeyRing:
        """Read the ring and open the keys that are new; raise StoreUnavailable.

        The pending key is opened as soon as it appears: if that fails it is an alarm, weeks
        before the key must sign. Calls that wait for a read share the next one.
        """
        begun_before = self._reads_begun
        async with self._reading:
            if self._read <= begun_before:
                self._reads_begun += 1
                await self._load(self._reads_begun)
            # Else somebody's read began after this call, and saw all that this one would.
            return self._ring

    async def _load(self, read: int) -> None:
        read_at = self._clock()
        stored = await self._store.published_keys()
        opened = [await self._opened(each) for each in stored]
        self._ring = KeyRing(opened)
        self._signers = {kid: s for kid, s in self._signers.items() if kid in self._kids()}
        self._attested = {
            key.kid: each.kept for each, key in zip(stored, opened, strict=True) if key.is_attested
        }
        self._read, self._read_at = read, read_at
        # Without the right key-encryption keys there is nothing to publish: others can.
        self.loaded = self.loaded or not stored or bool(self._attested)
        metrics.ring_read_at_seconds.set(read_at)

    def _kids(self) -> frozenset[str]:
        return frozenset(key.kid for key in self._ring.keys if key.signer is not None)

    async def _opened(self, stored: StoredKey) -> SigningKey:
        key = msgspec.structs.replace(stored.key, is_attested=self._is_attested(stored))
        if key.state not in MAY_SIGN or not key.is_attested:
            return key
        if (signer := self._signers.get(key.kid)) is None:
            try:
                signer = await self._custody.open(stored.kept)
            except CustodyError as error:
                log.error("signing_key_unusable", kid=key.kid, state=key.state, error=str(error))
                return key
            self._signers[key.kid] = signer
        return msgspec.structs.replace(key, signer=signer)

    def _is_attested(self, stored: StoredKey) -> bool:
        """Whether it was made here. What was found so stays so, with or without its KEK."""
        key, kept = stored.key, stored.kept
        # Another process may have sealed it under a key-encryption key that is not here yet.
        found = self._attested.get(key.kid)
        if found is not None and found.public_key == kept.public_key:
            return True
        try:
            require_attested(key.kid, key.public_key, kept.attestation, self._read_keks())
        except EnvelopeError as error:
            log.error("signing_key_not_attested", kid=key.kid, state=key.state, error=str(error))
            return False
        return True


class KeyRotator:
    """Takes the steps that are due. Every process has one; for each step one of them acts."""

    def __init__(
        self,
        *,
        keys: LiveKeyRing,
        store: SigningKeyStore,
        evidence: Evidence,
        custody: Custody,
        policy: RotationPolicy,
        key_bits: int,
        clock: Clock,
    ) -> None:
        self._keys = keys
        self._store = store
        self._evidence = evidence
        self._custody = custody
        self._policy = policy
        self._key_bits = key_bits
        self._clock = clock
        self._found: tuple[Concern, ...] = ()
        self._warned: list[Concern] = []
        self._unsure: KeptKey | None = None
        self.awaited: frozenset[str] = frozenset()
        """The verifiers that lacked the next key when this process last looked."""

    async def run(self, poll: float) -> None:
        """Re-read the ring every `poll` seconds and take what is due, until cancelled.

        While the store is away it looks each second: a process that has read no ring yet serves
        nothing, and one lost moment at its start must not cost it a whole `poll`.
        """
        stopped = False
        while True:
            lost: StoreUnavailable | None = None
            for work in (self.tick, self._destroy):
                try:
                    await work()
                except StoreUnavailable as error:
                    lost = error
            if lost is not None and not stopped:
                age = round(self._keys.age) if self._keys.loaded else None
                log.warning("rotator_stopped", error=str(lost), ring_s=age)
            elif lost is None and stopped:
                log.info("rotator_goes_on")
            stopped = lost is not None
            pause = min(poll, _RETRY) if stopped else poll
            # Processes that started together must not ask together for ever.
            await asyncio.sleep(pause * random.uniform(0.8, 1.0))  # noqa: S311

    async def tick(self) -> Step:
        """Read the ring and take what is due; return the step that remains: as a rule a Wait."""
        ring = await self._keys.fresh()
        refused: tuple[Step, KeyRing] | None = None
        while True:
            self.awaited = awaited = await self._lacking(ring)
            step = next_step(ring, self._policy, self._clock(), awaited)
            # Refused twice on the same ring: the database's clock says not yet. If the ring has
            # changed, another process was only faster.
            if isinstance(step, Wait) or (step, ring) == refused:
                self._warn()
                return step
            refused = None if await self._take(step, ring, awaited) else (step, ring)
            ring = await self._keys.fresh()

    def concerns(self) -> tuple[Concern, ...]:
        """Return what a person has to look at, as this process sees it now."""
        return concerns(self._keys.ring, self._policy, self._clock(), self.awaited)

    def standing_concerns(self) -> tuple[Concern, ...]:
        """Return those that stood at the last look, too: what is just being mended needs nobody."""
        return tuple(each for each in self.concerns() if each in self._found)

    def figures(self) -> metrics.RingFigures:
        """Return what `/metrics` shows of the ring, as this process sees it now."""
        ring, now = self._keys.ring, self._clock()
        found = self.concerns()
        next_activation_in = None
        if ring.active and ring.pending:
            due = rotation_due(ring.active, ring.pending, self._policy)
            next_activation_in = max(due - now, 0.0)
        return metrics.RingFigures(
            keys=[
                metrics.KeyFigures(kid=key.kid, state=key.state, age=now - key.published_at)
                for key in ring.keys
            ],
            can_sign=ring.active is not None and ring.active.signer is not None,
            next_activation_in=next_activation_in,
            concerns={each.name.lower(): each in found for each in Concern},
        )

    async def _lacking(self, ring: KeyRing) -> frozenset[str]:
        """Return which verifiers are known to lack the next key, where that could matter."""
        if ring.active is None or ring.pending is None:
            return frozenset()
        if not ring.pending.is_attested:
            return frozenset()
        if self._clock() < rotation_due(ring.active, ring.pending, self._policy):
            return frozenset()
        instances = await self._evidence.instances(ring.pending.kid)
        return frozenset(
            f"{each.service_user}/{each.instance}" for each in instances if not each.has_loaded
        )

    def _warn(self) -> None:
        """Log what stood at the last look too: what another process is just mending does not."""
        found = self.concerns()
        standing = [each for each in found if each in self._found]
        self._found = found
        if standing != self._warned:
            self._warned = standing
            if standing:
                log.warning("signing_keys_need_attention", concerns=[*map(str, standing)])

    async def _take(
        self, step: Prepare | Activate | Retire, ring: KeyRing, awaited: frozenset[str]
    ) -> bool:
        match step:
            case Prepare():
                return await self._prepare()
            case Activate(kid=kid):
                active = ring.active.kid if ring.active else None
                cause = "no key signs"
                if ring.active:
                    cause = "due" if ring.active.released_at is None else "asked for by an operator"
                record = self._record(
                    Action.SIGNING_KEY_ACTIVATE,
                    kid,
                    cause,
                    not_awaited=sorted(awaited)[:MAX_NAMED],
                    not_awaited_count=len(awaited),
                )
                taken = await self._store.activate(kid, active, self._policy, record)
            case Retire(kid=kid):
                record = self._record(Action.SIGNING_KEY_RETIRE, kid, "its last token ended")
                taken = await self._store.retire(kid, record)
        if taken:
            log.info("signing_key_step", step=type(step).__name__.lower(), kid=kid)
        return taken

    async def _prepare(self) -> bool:
        """Make and publish the next key; elected first, so that no other process makes one too."""
        async with self._store.elected() as elected:
            if not elected:
                return False
            ring = await self._keys.fresh()
            try:
                unsure = self._unsure
                if unsure is not None and all(key.kid != unsure.kid for key in ring.keys):
                    # Made, but nobody could say whether it was stored: it was not.
                    await self._custody.destroy(unsure.uri)
                self._unsure = None
                if ring.pending is not None:
                    return True
                self._unsure = key = await self._custody.new_key(self._key_bits)
                record = self._record(Action.SIGNING_KEY_PREPARE, key.kid, "no next key")
                taken = await self._store.prepare(key, record)
                if not taken:
                    await self._custody.destroy(key.uri)
                self._unsure = None
            except CustodyError as error:
                # None can be made; those that are there go on.
                log.error("signing_key_not_made", error=str(error))
                return False
            if taken:
                log.info("signing_key_step", step="prepare", kid=key.kid)
            return taken

    async def _destroy(self) -> None:
        """Destroy, where they were made, the private halves that may sign no more; again at each
        tick until that is confirmed."""
        for kid, uri in await self._store.doomed():
            try:
                await self._custody.destroy(uri)
            except CustodyError as error:
                log.error("private_half_not_destroyed", kid=kid, error=str(error))
                continue
            record = self._record(Action.SIGNING_KEY_DESTROY, kid, "it may sign no more")
            if await self._store.destroyed(kid, record):
                log.info("signing_key_step", step="destroy", kid=kid)

    def _record(self, action: Action, kid: str, cause: str, **details: Any) -> AuditRecord:
        return AuditRecord(
            id=new_record_id(self._clock()),
            action=action,
            outcome=Outcome.SUCCESS,
            actor="privyseal",
            kid=kid,
            details={"cause": cause, **{name: fact for name, fact in details.items() if fact}},
        )
