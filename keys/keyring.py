"""The life of signing keys as values and one pure decision: what is the next step?

Does nothing: it opens no key, reads no clock and stores no state.

    pending  -> active, revoked      published, not signing
    active   -> retiring, revoked    published, signing: exactly one
    retiring -> retired, revoked     published; private half destroyed
    retired, revoked                 not published; private half destroyed
"""

import math
from collections.abc import Iterable, Mapping
from enum import StrEnum
from functools import cached_property

from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from msgspec import Struct

from keys.signer import Signer
from keys.verifier import encode_jwks


class KeyState(StrEnum):
    """Where a signing key stands in its life."""

    PENDING = "pending"
    ACTIVE = "active"
    RETIRING = "retiring"
    RETIRED = "retired"
    REVOKED = "revoked"


PUBLISHED = frozenset({KeyState.PENDING, KeyState.ACTIVE, KeyState.RETIRING})
MAY_SIGN = frozenset({KeyState.PENDING, KeyState.ACTIVE})
"""The states in which a private half exists."""


class SigningKey(Struct, frozen=True, kw_only=True):
    """One key: its public half, and the signer of its private half where this process has it.

    Times are seconds since the epoch. `lifetime_cap` is the longest lifetime, in seconds, of a
    token that the key may have signed: stamped when it becomes active, enforced at each commit.
    `is_attested` is whether it is known to be made here: a key that is not is not published, and
    never becomes the one that signs.
    `released_at` is when an operator asked for the rotation away from this key: then it waits for
    no verifier.
    """

    kid: str
    state: KeyState
    public_key: RSAPublicKey
    published_at: float
    signer: Signer | None = None
    is_attested: bool = False
    activated_at: float | None = None
    rotate_at: float | None = None
    released_at: float | None = None
    lifetime_cap: int | None = None
    publish_until: float | None = None


class KeyRing:
    """The keys that count, in the order in which they were published. Immutable."""

    def __init__(self, keys: Iterable[SigningKey] = ()) -> None:
        """Raise ValueError for two pending or two active keys, or one kid twice."""
        self.keys = tuple(sorted(keys, key=lambda key: (key.published_at, key.kid)))
        for state in (KeyState.PENDING, KeyState.ACTIVE):
            if sum(key.state is state for key in self.keys) > 1:
                raise ValueError(f"a ring has at most one {state} key")
        if len({key.kid for key in self.keys}) != len(self.keys):
            raise ValueError("a ring has each kid once")

    def __eq__(self, other: object) -> bool:
        """Whether the same keys are in the same states."""
        return isinstance(other, KeyRing) and self._states() == other._states()

    def __hash__(self) -> int:
        return hash(self._states())

    def _states(self) -> tuple[tuple[str, KeyState], ...]:
        return tuple((key.kid, key.state) for key in self.keys)

    @cached_property
    def pending(self) -> SigningKey | None:
        """The standing next key: published, not signing."""
        return next((key for key in self.keys if key.state is KeyState.PENDING), None)

    @cached_property
    def active(self) -> SigningKey | None:
        """The one key that signs."""
        return next((key for key in self.keys if key.state is KeyState.ACTIVE), None)

    @cached_property
    def retiring(self) -> tuple[SigningKey, ...]:
        """The keys that signed tokens which may still be live."""
        return tuple(key for key in self.keys if key.state is KeyState.RETIRING)

    @cached_property
    def published(self) -> Mapping[str, RSAPublicKey]:
        """What verifiers may trust, by kid."""
        return {
            key.kid: key.public_key
            for key in self.keys
            if key.state in PUBLISHED and key.is_attested
        }

    @cached_property
    def jwks(self) -> bytes:
        """The JWK Set of the published keys (RFC 7517 §5), encoded once."""
        return encode_jwks(self.published.values()) if self.published else b'{"keys":[]}'


class RotationPolicy(Struct, frozen=True, kw_only=True):
    """When a key may sign and how long it does; all in seconds.

    A strict gate waits for every verifier that lacks the next key, until an operator releases it.
    """

    publish_lead: float
    rotation_period: float
    lifetime_cap: int
    clock_skew: float
    strict_gate: bool = False

    @property
    def gate_window(self) -> float:
        """How long, past the lead, activation waits for verifiers that lack the next key."""
        return math.inf if self.strict_gate else self.rotation_period / 10

    def may_sign_from(self, pending: SigningKey) -> float:
        """Return when the next key was published long enough to sign."""
        return pending.published_at + self.publish_lead


class Prepare(Struct, frozen=True, kw_only=True):
    """Make and publish the next key."""


class Activate(Struct, frozen=True, kw_only=True):
    """Let the pending key sign, and retire the one that did."""

    kid: str


class Retire(Struct, frozen=True, kw_only=True):
    """Stop publishing a key of which no live token is left."""

    kid: str


class Wait(Struct, frozen=True, kw_only=True):
    """Nothing to do before `until`, seconds since the epoch; `awaited` names who is waited for."""

    until: float
    awaited: frozenset[str] = frozenset()


Step = Prepare | Activate | Retire | Wait


def next_step(
    ring: KeyRing, policy: RotationPolicy, now: float, awaited: frozenset[str] = frozenset()
) -> Step:
    """Return what the ring needs at `now`; asked again after each step, it comes to a Wait.

    A key is published for at least `publish_lead` before it signs, and stays published until the
    last token that it can have signed has expired. The one exception is a ring without an active
    key: there the pending one signs at once, since until then nobody gets a token at all.

    `awaited` are verifiers that are known to lack the next key. They delay a rotation, by no more
    than the gate's window; that no token is refused rests on the lead.
    """
    ends = [(_stamped(key.publish_until), key.kid) for key in ring.retiring]
    if ends and now >= min(ends)[0]:
        return Retire(kid=min(ends)[1])
    if ring.pending is None:
        return Prepare()
    if not ring.pending.is_attested:
        # Somebody put it there: only a person can tell why, and revoke it.
        return Wait(until=min((until for until, _ in ends), default=math.inf))
    if ring.active is None:
        return Activate(kid=ring.pending.kid)
    due = rotation_due(ring.active, ring.pending, policy)
    if now >= due:
        if ring.active.released_at is not None:
            awaited = frozenset()
        due += policy.gate_window if awaited else 0
        if now >= due:
            return Activate(kid=ring.pending.kid)
    else:
        awaited = frozenset()
    return Wait(until=min([due, *(until for until, _ in ends)]), awaited=awaited)


def rotation_due(active: SigningKey, pending: SigningKey, policy: RotationPolicy) -> float:
    """Return from when the pending key may replace the active one, but for the gate."""
    return max(_stamped(active.rotate_at), policy.may_sign_from(pending))


class Concern(StrEnum):
    """What will stop a rotation, or has stopped signing, unless somebody looks."""

    NO_KEY_SIGNS = "no key signs"
    SIGNING_KEY_UNUSABLE = "the key that signs cannot be used by this process"
    NO_NEXT_KEY = "no next key is published"
    NEXT_KEY_UNUSABLE = "the next key cannot be used by this process"
    VERIFIERS_AWAITED = "verifiers that lack the next key delay the rotation"
    ROTATION_OVERDUE = "the rotation is overdue"
    KEY_NOT_ATTESTED = "a key that was not made here is in the database, and is not published"


def concerns(
    ring: KeyRing, policy: RotationPolicy, now: float, awaited: frozenset[str] = frozenset()
) -> tuple[Concern, ...]:
    """Return what a person has to look at, weeks before a rotation fails for it."""
    found: list[Concern] = []
    active, pending = ring.active, ring.pending
    if active is None:
        found.append(Concern.NO_KEY_SIGNS)
    elif active.signer is None:
        found.append(Concern.SIGNING_KEY_UNUSABLE)
    if pending is None:
        found.append(Concern.NO_NEXT_KEY)
    elif pending.signer is None:
        found.append(Concern.NEXT_KEY_UNUSABLE)
    step = next_step(ring, policy, now, awaited)
    if isinstance(step, Wait):
        if step.awaited:
            found.append(Concern.VERIFIERS_AWAITED)
    # A rotator that works needs seconds.
    elif active is not None and now >= _stamped(active.rotate_at) + policy.clock_skew:
        found.append(Concern.ROTATION_OVERDUE)
    if not all(key.is_attested for key in ring.keys if key.state in PUBLISHED):
        found.append(Concern.KEY_NOT_ATTESTED)
    return tuple(found)


def _stamped(time: float | None) -> float:
    if time is None:
        raise ValueError("a key in this state has this time stamped on it")
    return time
