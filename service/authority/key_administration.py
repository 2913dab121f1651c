"""What operators do with signing keys: look, rotate early, revoke one, revoke all.

The scheduled life of a key is `key_rotation.py`'s; its states are `keys/keyring.py`'s.
"""

import asyncio
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final, Protocol

import structlog
from msgspec import Struct

from keys.envelope import EnvelopeError, KekReader, KeyEncryptionKeys
from keys.keyring import KeyState, RotationPolicy, SigningKey, rotation_due
from keys.log_key import reseal_log_key
from keys.signer import Custody, CustodyError, KeptKey
from service.authority.audit import Action, AuditRecord, Outcome, new_record_id, personal
from service.authority.audit.continuity import AuditLogRow
from service.authority.errors import (
    AdminRefusal,
    Conflict,
    NotFound,
    PreconditionFailed,
    StoreUnavailable,
    TemporarilyUnavailable,
)
from service.authority.evidence import Evidence, VerifierInstance
from service.authority.key_rotation import EndedKey, LiveKeyRing, SigningKeyStore, TokenHolder
from service.authority.model import AdminScope, ClientAddress, Clock
from service.authority.operators import Operator, Operators

log = structlog.stdlib.get_logger()

MAX_ENDED: Final = 5
"""Keys of the past that are shown."""
MAX_TOKENS_COUNTED: Final = 5000
"""Live tokens that are counted before a revocation; its answer counts all."""
_NOT_PUBLISHED: Final = "No key with this kid is published: nothing is left to revoke."


class Rotation(Struct, frozen=True, kw_only=True):
    """A rotation that was asked for: which key signs, which one will, and from when it may.

    It will not wait for `missing`: verifiers heard from lately that had not loaded the next key. If
    it had been asked for already, at `asked_before_at`, nothing more was needed.
    """

    signing_kid: str
    next_kid: str
    may_sign_from: datetime
    asked_before_at: datetime | None
    missing: list[VerifierInstance]


class Revocation(Struct, frozen=True, kw_only=True):
    """What a revocation did, and what it cannot do: verifiers hold keys that they fetched.

    No process signs with a revoked key from now on. Until `old_accepted_until` a verifier that
    heeds the max-age of the JWKS may still accept its tokens, and refuse those of a key that it
    has not seen; ours, if it cannot fetch, until `old_accepted_offline_until`. (An instance that
    is cut off from Postgres goes on publishing what it last read: its `/readyz` shows the age.)
    `holders` have to exchange again; it is null if they could not be read.
    """

    revoked_kids: list[str]
    signing_kid: str | None
    old_accepted_until: datetime
    old_accepted_offline_until: datetime
    holders: list[TokenHolder] | None
    advice: str


class Outlook(Struct, frozen=True, kw_only=True):
    """The ring as a person looks at it; times are seconds since the epoch.

    The next key was published long enough at `next_ripe_at`, and takes over at `next_signs_from`;
    verifiers that lack it can delay that until `next_signs_by`, which is None if they can for ever.
    """

    keys: Sequence[SigningKey]
    ended: Sequence[EndedKey]
    verifiers: Sequence[VerifierInstance]
    next_ripe_at: float | None
    next_signs_from: float | None
    next_signs_by: float | None


class Stakes(Struct, frozen=True, kw_only=True):
    """What a revocation of `keys` would cost now; times are seconds since the epoch.

    `next_kid` is the key that would sign then, and verifiers may lack it until `next_ripe_at`; both
    are None if nothing would change. `holders` have to exchange again, and are null if they could
    not be read; with `more_holders` they are those of the newest tokens.
    """

    keys: Sequence[SigningKey]
    next_kid: str | None
    next_ripe_at: float | None
    holders: Sequence[TokenHolder] | None
    more_holders: bool


class LogKeyStore(Protocol):
    """Where the key of the audit log is; every method may raise StoreUnavailable."""

    async def current(self) -> AuditLogRow | None:
        """Return the newest log."""
        ...

    async def reseal(self, log: AuditLogRow, after: bytes, record: AuditRecord) -> bool:
        """Put `after` in the place of its sealed private half, if that still is what it was."""
        ...


class KeyAdministration:
    """The acts. Each raises an AdminRefusal, or the errors of a store away."""

    def __init__(
        self,
        *,
        keys: LiveKeyRing,
        store: SigningKeyStore,
        evidence: Evidence,
        custody: Custody,
        log_keys: LogKeyStore,
        read_keks: KekReader,
        operators: Operators,
        policy: RotationPolicy,
        key_bits: int,
        jwks_max_age: float,
        ring_poll: float,
        max_stale: float,
        clock: Clock,
    ) -> None:
        self._keys = keys
        self._store = store
        self._evidence = evidence
        self._custody = custody
        self._log_keys = log_keys
        self._read_keks = read_keks
        self._operators = operators
        self._policy = policy
        self._key_bits = key_bits
        self._jwks_max_age = jwks_max_age
        self._ring_poll = ring_poll
        self._max_stale = max_stale
        self._clock = clock

    async def published(self, operator: Operator) -> Sequence[SigningKey]:
        """Return the published keys, as they are now, in the order of their publication."""
        operator.require(AdminScope.SIGNING_KEYS_READ)
        return (await self._keys.fresh()).keys

    def may_sign_from(self, key: SigningKey) -> datetime | None:
        """Return from when a pending key may sign: the lead is over then."""
        if key.state is not KeyState.PENDING:
            return None
        return _datetime(self._policy.may_sign_from(key))

    async def verifiers(self, operator: Operator) -> Sequence[VerifierInstance]:
        """Return the verifiers heard from lately, and whether they have loaded the next key."""
        operator.require(AdminScope.SIGNING_KEYS_READ)
        pending = self._keys.ring.pending
        return [] if pending is None else await self._evidence.instances(pending.kid)

    @property
    def accepted_for(self) -> tuple[float, float]:
        """Seconds for which verifiers may still accept the tokens of a key that is revoked: those
        that heed the max-age of the JWKS, and ours while they cannot fetch it."""
        # A process that missed the notification publishes the old set until it reads the ring.
        online = self._ring_poll + self._jwks_max_age
        return online, online + self._max_stale

    async def outlook(self, operator: Operator) -> Outlook:
        """Return the published keys, those that ended lately, and when the next one signs."""
        operator.require(AdminScope.SIGNING_KEYS_READ)
        ring = await self._keys.fresh()
        due = latest = None
        if ring.active and ring.pending:
            due = rotation_due(ring.active, ring.pending, self._policy)
            waits = ring.active.released_at is None
            latest = due + (self._policy.gate_window if waits else 0)
        return Outlook(
            keys=ring.keys,
            ended=await self._store.ended(MAX_ENDED),
            verifiers=await self._evidence.instances(ring.pending.kid) if ring.pending else (),
            next_ripe_at=self._policy.may_sign_from(ring.pending) if ring.pending else None,
            next_signs_from=due,
            next_signs_by=None if latest is None or math.isinf(latest) else latest,
        )

    async def stakes(self, operator: Operator, kid: str | None) -> Stakes:
        """Return what it would cost to revoke a key, or all of them."""
        operator.require(AdminScope.SIGNING_KEYS_REVOKE)
        ring = await self._keys.fresh()
        keys = [key for key in ring.keys if kid in (None, key.kid)]
        if not keys:
            raise NotFound(_NOT_PUBLISHED)
        following = None
        if kid is not None and keys[0].state is KeyState.ACTIVE:
            following = ring.pending
        holders = None
        try:
            kids = [key.kid for key in keys]
            holders = await self._store.holders(kids, MAX_TOKENS_COUNTED)
        except StoreUnavailable as error:
            log.warning("stakes_without_holders", error=str(error))
        return Stakes(
            keys=keys,
            next_kid=following.kid if following else None,
            next_ripe_at=self._policy.may_sign_from(following) if following else None,
            holders=holders,
            more_holders=sum(holder.count for holder in holders or ()) >= MAX_TOKENS_COUNTED,
        )

    async def rotate(self, operator: Operator, reason: str, origin: ClientAddress) -> Rotation:
        """Let the next key sign as soon as it was published long enough, schedule or not."""

        async def act(operator: Operator) -> Rotation | None:
            operator.require(AdminScope.SIGNING_KEYS_ROTATE)
            ring = await self._keys.fresh()
            if ring.active is None or ring.pending is None:
                raise Conflict("There is no next key yet. It is made within seconds: try again.")
            _require_attested(ring.pending)
            asked_before = ring.active.released_at
            record = self._record(
                Action.SIGNING_KEY_ROTATE, operator, ring.active.kid, reason, origin, {}
            )
            if not await self._store.hasten_rotation(ring.active.kid, record):
                return None
            heard = await self._evidence.instances(ring.pending.kid)
            return Rotation(
                signing_kid=ring.active.kid,
                next_kid=ring.pending.kid,
                may_sign_from=_datetime(self._policy.may_sign_from(ring.pending)),
                asked_before_at=None if asked_before is None else _datetime(asked_before),
                missing=[each for each in heard if not each.has_loaded],
            )

        return await self._operators.decided_on_current(operator, act)

    async def revoke(
        self, operator: Operator, kid: str, reason: str, origin: ClientAddress
    ) -> Revocation:
        """Revoke one key; from when this returns no process signs with it, and none publishes it
        once it has read the ring again. The next key takes the active one's place at once."""

        async def act(operator: Operator) -> SigningKey | None:
            operator.require(AdminScope.SIGNING_KEYS_REVOKE)
            ring = await self._keys.fresh()
            key = next((key for key in ring.keys if key.kid == kid), None)
            if key is None:
                raise NotFound(_NOT_PUBLISHED)
            if key.state is KeyState.ACTIVE and ring.pending is not None:
                _require_attested(ring.pending)
            details = {"state": key.state.value}
            record = self._record(Action.SIGNING_KEY_REVOKE, operator, kid, reason, origin, details)
            return key if await self._store.revoke(key, self._policy, record) else None

        revoked = await self._operators.decided_on_current(operator, act)
        advice = (
            "Could the key that signs now have leaked with it? Then revoke all keys."
            if revoked.state is KeyState.ACTIVE
            else ""
        )
        return await self._revocation([kid], advice)

    async def revoke_all(
        self,
        operator: Operator,
        reason: str,
        origin: ClientAddress,
        *,
        if_signing: str | None = None,
    ) -> Revocation:
        """Revoke every published key and put two new ones in: for a leaked key-encryption key,
        database or host. The new ones are sealed under the first key of KEK_FILE.

        With `if_signing`, only while that key signs, or none if it is empty: what was decided on a
        page is done once.
        """
        operator.require(AdminScope.SIGNING_KEYS_REVOKE)
        try:
            signing, following = await asyncio.gather(
                *(self._custody.new_key(self._key_bits) for _ in range(2))
            )
        except CustodyError as error:
            raise Conflict(str(error)) from error

        async def act(operator: Operator) -> list[str] | None:
            operator.require(AdminScope.SIGNING_KEYS_REVOKE)
            ring = await self._keys.fresh()
            if if_signing not in (None, ring.active.kid if ring.active else ""):
                raise PreconditionFailed(
                    "Another key signs since you looked: see what is published now, and decide "
                    "again."
                )
            kids = [key.kid for key in ring.keys]
            record = self._record(
                Action.SIGNING_KEY_REVOKE_ALL,
                operator,
                signing.kid,
                reason,
                origin,
                {"revoked": kids},
            )
            done = await self._store.revoke_all(kids, signing, following, self._policy, record)
            return kids if done else None

        try:
            revoked = await self._operators.decided_on_current(operator, act)
        except (AdminRefusal, TemporarilyUnavailable):
            # Certainly not in use; after any other failure nobody can say that.
            await self._discard(signing, following)
            raise
        await self._rewrap_log_key()
        advice = (
            "The new keys are sealed under the first key of KEK_FILE. If that one could have "
            "leaked, put a new one first and revoke all again."
        )
        return await self._revocation(revoked, advice)

    async def _rewrap_log_key(self) -> None:
        """The audit log goes on without the old key-encryption key, too."""
        try:
            done = await rewrap_log_key(self._log_keys, self._read_keks(), self._clock())
        except (EnvelopeError, StoreUnavailable) as error:
            log.error("audit_log_key_not_rewrapped", error=str(error))
        else:
            if not done:
                log.error("audit_log_key_not_rewrapped", error="it changed twice meanwhile")

    async def _discard(self, *made: KeptKey) -> None:
        for key in made:
            try:
                await self._custody.destroy(key.uri)
            except CustodyError as error:
                log.error("private_half_not_destroyed", kid=key.kid, error=str(error))

    async def _revocation(self, kids: list[str], advice: str) -> Revocation:
        """Say what follows. The act is committed: what cannot be read now must not hide that."""
        holders = None
        try:
            # What this process publishes must not lag behind its own answer.
            await self._keys.fresh()
            holders = list(await self._store.holders(kids))
        except StoreUnavailable as error:
            log.warning("revocation_without_details", error=str(error))
        active = self._keys.ring.active
        now = self._clock()
        online, offline = self.accepted_for
        return Revocation(
            revoked_kids=kids,
            signing_kid=active.kid if active else None,
            old_accepted_until=_datetime(now + online),
            old_accepted_offline_until=_datetime(now + offline),
            holders=holders,
            advice=advice,
        )

    def _record(
        self,
        action: Action,
        operator: Operator,
        kid: str,
        reason: str,
        origin: ClientAddress,
        details: dict[str, Any],
    ) -> AuditRecord:
        return AuditRecord(
            id=new_record_id(self._clock()),
            action=action,
            outcome=Outcome.SUCCESS,
            reason=reason,
            kid=kid,
            details=details,
            **operator.as_actor(),
            **personal(origin),
        )


def _require_attested(following: SigningKey) -> None:
    if not following.is_attested:
        raise Conflict(
            f"The next key, {following.kid}, was not made here and must never sign. Revoke it "
            "first, or revoke all keys."
        )


def rewrap_record(kid: str, now: float) -> AuditRecord:
    """Return the record of a private half that is sealed under another key-encryption key."""
    return AuditRecord(
        id=new_record_id(now),
        action=Action.SIGNING_KEY_REWRAP,
        outcome=Outcome.SUCCESS,
        actor="privyseal keys rewrap",
        kid=kid,
    )


async def rewrap_log_key(store: LogKeyStore, keks: KeyEncryptionKeys, now: float) -> bool:
    """Seal the audit log's key under the first key-encryption key, on record; say whether it is,
    or needs none because an HSM holds it.

    Raise EnvelopeError, StoreUnavailable.
    """
    for _ in range(2):
        current = await store.current()
        if current is None or (sealed := current.key.sealed_private) is None or keks.seals(sealed):
            return True
        record = AuditRecord(
            id=new_record_id(now),
            action=Action.AUDIT_LOG_REWRAP,
            outcome=Outcome.SUCCESS,
            actor="privyseal",
            details={"origin": current.origin},
        )
        after = reseal_log_key(current.origin, sealed, keks)
        if await store.reseal(current, after, record):
            return True
    return False


def recovery_record(kid: str, now: float, reason: str, revoked: list[str]) -> AuditRecord:
    """Return the record of a revocation of all keys that was done where the database is."""
    return AuditRecord(
        id=new_record_id(now),
        action=Action.SIGNING_KEY_REVOKE_ALL,
        outcome=Outcome.SUCCESS,
        reason=reason,
        actor="privyseal keys recover",
        kid=kid,
        details={"revoked": revoked},
    )


def _datetime(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)
