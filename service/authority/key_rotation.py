"""Drives signing keys through their life: asks `next_step`, carries the answer out, records it.

Decides nothing itself: `keys/keyring.py` does, and the database's guards have the last word.
"""

import asyncio
import random
from collections.abc import Sequence
from concurrent.futures import Executor
from datetime import datetime
from typing import Protocol

import msgspec
import structlog
from msgspec import Struct

from keys.envelope import EnvelopeError, KekReader
from keys.keyring import (
    Activate,
    KeyRing,
    KeyState,
    Prepare,
    Retire,
    RotationPolicy,
    SigningKey,
    Step,
    Wait,
    next_step,
)
from keys.signer import NewKey, Signer, generate, signer_for
from service import metrics
from service.authority.audit import Action, AuditRecord, Outcome, new_record_id
from service.authority.errors import StoreUnavailable
from service.authority.model import Clock

log = structlog.stdlib.get_logger()


class StoredKey(Struct, frozen=True, kw_only=True):
    """A key as the store has it: its private half sealed, or gone."""

    key: SigningKey
    signer: str
    sealed_private: bytes | None


class TokenHolder(Struct, frozen=True, kw_only=True):
    """A service user that holds live tokens of a key, and when the last of them ends."""

    service_user_id: str
    service_user: str
    count: int
    last_ends_at: datetime


class SigningKeyStore(Protocol):
    """Signing keys in Postgres. A step is guarded by the state that it was decided on, and
    returns whether this call took it."""

    async def published_keys(self) -> Sequence[StoredKey]:
        """Return the pending, active and retiring keys; raise StoreUnavailable."""
        ...

    async def prepare(self, key: NewKey, record: AuditRecord) -> bool: ...

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
        signing: NewKey,
        following: NewKey,
        policy: RotationPolicy,
        record: AuditRecord,
    ) -> bool: ...

    async def holders(self, kids: Sequence[str]) -> Sequence[TokenHolder]: ...


class LiveKeyRing:
    """The ring of this process: read from the store, with the signers opened."""

    def __init__(
        self,
        *,
        store: SigningKeyStore,
        read_keks: KekReader,
        executor: Executor,
        clock: Clock,
    ) -> None:
        self._store = store
        self._read_keks = read_keks
        self._executor = executor
        self._clock = clock
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
        self._ring = KeyRing([self._opened(each) for each in stored])
        self._signers = {kid: s for kid, s in self._signers.items() if kid in self._kids()}
        self._read, self._read_at = read, read_at
        self.loaded = True
        metrics.ring_read_at_seconds.set(read_at)
        for state in KeyState:
            count = sum(key.state is state for key in self._ring.keys)
            metrics.signing_keys.labels(state).set(count)

    def _kids(self) -> frozenset[str]:
        return frozenset(key.kid for key in self._ring.keys if key.signer is not None)

    def _opened(self, stored: StoredKey) -> SigningKey:
        key = stored.key
        if stored.sealed_private is None:
            return key
        if (signer := self._signers.get(key.kid)) is None:
            try:
                signer = signer_for(
                    stored.signer,
                    kid=key.kid,
                    sealed_private=stored.sealed_private,
                    public_key=key.public_key,
                    keks=self._read_keks(),
                    executor=self._executor,
                )
            except EnvelopeError as error:
                log.error("signing_key_unusable", kid=key.kid, state=key.state, error=str(error))
                return key
            self._signers[key.kid] = signer
        return msgspec.structs.replace(key, signer=signer)


class KeyRotator:
    """Takes the steps that are due. Every process has one; for each step one of them acts."""

    def __init__(
        self,
        *,
        keys: LiveKeyRing,
        store: SigningKeyStore,
        read_keks: KekReader,
        policy: RotationPolicy,
        key_bits: int,
        clock: Clock,
    ) -> None:
        self._keys = keys
        self._store = store
        self._read_keks = read_keks
        self._policy = policy
        self._key_bits = key_bits
        self._clock = clock

    async def run(self, poll: float) -> None:
        """Re-read the ring every `poll` seconds and take what is due, until cancelled."""
        while True:
            try:
                await self.tick()
            except StoreUnavailable as error:
                log.warning("ring_not_read", error=str(error), age_s=round(self._keys.age))
            # Processes that started together must not ask together for ever.
            await asyncio.sleep(poll * random.uniform(0.8, 1.0))  # noqa: S311

    async def tick(self) -> Step:
        """Read the ring and take what is due; return the step that remains: as a rule a Wait."""
        ring = await self._keys.fresh()
        refused: tuple[Step, KeyRing] | None = None
        while True:
            step = next_step(ring, self._policy, self._clock())
            # Refused twice on the same ring: the database's clock says not yet. If the ring has
            # changed, another process was only faster.
            if isinstance(step, Wait) or (step, ring) == refused:
                return step
            refused = None if await self._take(step, ring) else (step, ring)
            ring = await self._keys.fresh()

    async def _take(self, step: Prepare | Activate | Retire, ring: KeyRing) -> bool:
        match step:
            case Prepare():
                # Prime numbers take up to seconds: not on the event loop.
                try:
                    key = await asyncio.to_thread(generate, self._key_bits, self._read_keks())
                except EnvelopeError as error:
                    # None can be sealed; those that are there go on.
                    log.error("signing_key_not_made", error=str(error))
                    return False
                kid = key.kid
                record = self._record(Action.SIGNING_KEY_PREPARE, kid, "no next key")
                taken = await self._store.prepare(key, record)
            case Activate(kid=kid):
                active = ring.active.kid if ring.active else None
                cause = "due" if active else "no key signs"
                record = self._record(Action.SIGNING_KEY_ACTIVATE, kid, cause)
                taken = await self._store.activate(kid, active, self._policy, record)
            case Retire(kid=kid):
                record = self._record(Action.SIGNING_KEY_RETIRE, kid, "its last token ended")
                taken = await self._store.retire(kid, record)
        if taken:
            log.info("signing_key_step", step=type(step).__name__.lower(), kid=kid)
        return taken

    def _record(self, action: Action, kid: str, cause: str) -> AuditRecord:
        return AuditRecord(
            id=new_record_id(self._clock()),
            action=action,
            outcome=Outcome.SUCCESS,
            actor="privyseal",
            kid=kid,
            details={"cause": cause},
        )
