"""Whatever happens when, a ring has one key that signs, and verifiers know it in time."""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from keys.keyring import (
    Activate,
    Concern,
    KeyRing,
    KeyState,
    Prepare,
    Retire,
    RotationPolicy,
    SigningKey,
    Wait,
    concerns,
    next_step,
)
from keys.signer import LocalSigner

MakeKey = Callable[..., SigningKey]

HOUR = 3600.0
DAY = 24 * HOUR
POLICY = RotationPolicy(
    publish_lead=DAY, rotation_period=30 * DAY, lifetime_cap=3600, clock_skew=60
)


@pytest.mark.parametrize("state", [KeyState.PENDING, KeyState.ACTIVE])
def test_a_ring_refuses_two_keys_that_stand_ready_or_sign(
    state: KeyState, signing_key: MakeKey
) -> None:
    with pytest.raises(ValueError, match=state.value):
        KeyRing([signing_key("a", state), signing_key("b", state)])


def test_a_ring_refuses_one_kid_twice(signing_key: MakeKey) -> None:
    with pytest.raises(ValueError, match="each kid once"):
        KeyRing([signing_key("a", KeyState.PENDING), signing_key("a", KeyState.ACTIVE)])


def test_a_ring_publishes_pending_active_and_retiring_keys_in_the_order_they_appeared(
    signing_key: MakeKey,
) -> None:
    appeared = [
        KeyState.RETIRED,
        KeyState.REVOKED,
        KeyState.RETIRING,
        KeyState.RETIRING,
        KeyState.ACTIVE,
        KeyState.PENDING,
    ]
    keys = [
        signing_key(f"key-{number}", state, published_at=number)
        for number, state in enumerate(appeared)
    ]
    ring = KeyRing(reversed(keys))
    assert list(ring.published) == ["key-2", "key-3", "key-4", "key-5"]
    assert [key.kid for key in ring.retiring] == ["key-2", "key-3"]
    assert (ring.active, ring.pending) == (keys[4], keys[5])


def test_an_empty_ring_publishes_an_empty_set_and_wants_a_key(now: float) -> None:
    assert msgspec.json.decode(KeyRing().jwks) == {"keys": []}
    assert next_step(KeyRing(), POLICY, now) == Prepare()


def test_the_jwks_holds_each_published_key(signing_key: MakeKey) -> None:
    ring = KeyRing([signing_key("a", KeyState.ACTIVE), signing_key("b", KeyState.RETIRED)])
    (jwk,) = msgspec.json.decode(ring.jwks)["keys"]
    assert set(jwk) == {"kty", "use", "alg", "kid", "n", "e"}


def test_without_an_active_key_the_pending_one_signs_at_once(
    signing_key: MakeKey, now: float
) -> None:
    ring = KeyRing([signing_key("next", KeyState.PENDING, published_at=now)])
    assert next_step(ring, POLICY, now) == Activate(kid="next")


def test_whoever_lacks_the_next_key_is_awaited_for_a_tenth_of_the_period_and_no_longer(
    signing_key: MakeKey, now: float
) -> None:
    ring = KeyRing(
        [
            signing_key("old", KeyState.ACTIVE, rotate_at=now),
            signing_key("next", KeyState.PENDING, published_at=now - 2 * DAY),
        ]
    )
    waiting = frozenset({"https://ingest.example"})
    until = now + POLICY.rotation_period / 10
    assert next_step(ring, POLICY, now) == Activate(kid="next")
    assert next_step(ring, POLICY, now, waiting) == Wait(until=until, awaited=waiting)
    assert next_step(ring, POLICY, until, waiting) == Activate(kid="next")


@given(back=st.floats(min_value=0, max_value=1e9))
def test_a_clock_that_runs_backwards_only_waits(
    back: float, signing_key: MakeKey, now: float
) -> None:
    ring = KeyRing(
        [
            signing_key("oldest", KeyState.RETIRING, publish_until=now + HOUR),
            signing_key("old", KeyState.ACTIVE, rotate_at=now + HOUR),
            signing_key("next", KeyState.PENDING, published_at=now),
        ]
    )
    step = next_step(ring, POLICY, now - back)
    assert isinstance(step, Wait)
    assert step.until == now + HOUR


def test_whom_an_operator_does_not_want_to_wait_for_delays_nothing(
    signing_key: MakeKey, now: float
) -> None:
    strict = msgspec.structs.replace(POLICY, strict_gate=True)
    waiting = frozenset({"https://ingest.example"})
    active = signing_key("old", KeyState.ACTIVE, rotate_at=now)
    pending = signing_key("next", KeyState.PENDING, published_at=now - 2 * DAY)
    held = next_step(KeyRing([active, pending]), strict, now + 300 * DAY, waiting)
    assert held == Wait(until=math.inf, awaited=waiting)
    released = msgspec.structs.replace(active, released_at=now)
    for policy in (strict, POLICY):
        step = next_step(KeyRing([released, pending]), policy, now, waiting)
        assert step == Activate(kid="next")
    unripe = msgspec.structs.replace(pending, published_at=now)
    assert next_step(KeyRing([released, unripe]), strict, now, waiting) == Wait(until=now + DAY)


def test_a_gate_that_waits_does_not_keep_a_key_published_that_has_ended(
    signing_key: MakeKey, now: float
) -> None:
    ring = KeyRing(
        [
            signing_key("oldest", KeyState.RETIRING, publish_until=now + HOUR),
            signing_key("old", KeyState.ACTIVE, rotate_at=now),
            signing_key("next", KeyState.PENDING, published_at=now - 2 * DAY),
        ]
    )
    waiting = frozenset({"https://ingest.example"})
    assert next_step(ring, POLICY, now, waiting) == Wait(until=now + HOUR, awaited=waiting)
    assert next_step(ring, POLICY, now + HOUR, waiting) == Retire(kid="oldest")


def test_a_person_hears_weeks_before_that_a_rotation_will_fail(
    signing_key: MakeKey, now: float, rsa_keys: list[rsa.RSAPrivateKey]
) -> None:
    with ThreadPoolExecutor(1) as executor:
        signer = LocalSigner(rsa_keys[0], executor)
    active = signing_key("old", KeyState.ACTIVE, rotate_at=now + 20 * DAY, signer=signer)
    pending = signing_key("next", KeyState.PENDING, published_at=now - DAY, signer=signer)
    waiting = frozenset({"https://ingest.example"})

    def found(
        *keys: SigningKey, after: float = 0, awaited: frozenset[str] = frozenset()
    ) -> list[Concern]:
        return list(concerns(KeyRing(keys), POLICY, now + after, awaited))

    assert found(active, pending, awaited=waiting) == []
    assert found(active) == [Concern.NO_NEXT_KEY]
    unusable = msgspec.structs.replace(pending, signer=None)
    assert found(active, unusable) == [Concern.NEXT_KEY_UNUSABLE]
    assert found(msgspec.structs.replace(active, signer=None), pending) == [
        Concern.SIGNING_KEY_UNUSABLE
    ]
    assert found(pending) == [Concern.NO_KEY_SIGNS]
    assert found() == [Concern.NO_KEY_SIGNS, Concern.NO_NEXT_KEY]
    assert found(active, pending, after=20 * DAY + 59) == []
    assert found(active, pending, after=20 * DAY, awaited=waiting) == [Concern.VERIFIERS_AWAITED]
    assert found(active, pending, after=20 * DAY + 60) == [Concern.ROTATION_OVERDUE]
    foreign = msgspec.structs.replace(pending, is_attested=False, signer=None)
    for after in (0, 40 * DAY):
        assert found(active, foreign, after=after) == [
            Concern.NEXT_KEY_UNUSABLE,
            Concern.KEY_NOT_ATTESTED,
        ]
    assert found(foreign) == [
        Concern.NO_KEY_SIGNS,
        Concern.NEXT_KEY_UNUSABLE,
        Concern.KEY_NOT_ATTESTED,
    ]


def test_a_key_that_is_not_attested_is_not_published_and_never_gets_its_turn(
    signing_key: MakeKey, now: float
) -> None:
    active = signing_key("old", KeyState.ACTIVE, rotate_at=now - DAY)
    foreign = signing_key("next", KeyState.PENDING, published_at=now - 9 * DAY, is_attested=False)
    old = signing_key("older", KeyState.RETIRING, publish_until=now + 60)
    for keys in ((active, foreign), (foreign,), (active, foreign, old)):
        ring = KeyRing(keys)
        step = next_step(ring, POLICY, now)
        assert isinstance(step, Wait)
        assert step.until == (now + 60 if old in keys else math.inf)
        assert "next" not in ring.published
    assert next_step(ring, POLICY, now + 60) == Retire(kid="older")


class Installation(RuleBasedStateMachine):
    """A store with its guards, and processes that ask `next_step` by clocks of their own.

    The store judges by its own clock, as the database does; what a process believes may be wrong.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 1_800_000_000.0
        self.keys: dict[str, SigningKey] = {}
        self.tokens: list[tuple[str, float]] = []
        self.without_lead: set[str] = set()
        self.public_key = rsa.generate_private_key(65537, 2048).public_key()

    @initialize(
        publish_lead=st.sampled_from([400.0, HOUR, DAY]),
        rotation_period=st.sampled_from([HOUR / 2, 2 * HOUR, 30 * DAY]),
        lifetime_cap=st.sampled_from([60, 900, 3600]),
        strict_gate=st.booleans(),
    )
    def install(
        self, publish_lead: float, rotation_period: float, lifetime_cap: int, strict_gate: bool
    ) -> None:
        self.policy = RotationPolicy(
            publish_lead=publish_lead,
            rotation_period=rotation_period,
            lifetime_cap=lifetime_cap,
            clock_skew=60.0,
            strict_gate=strict_gate,
        )

    @property
    def ring(self) -> KeyRing:
        return KeyRing(self.keys.values())

    @rule(passed=st.one_of(st.floats(0, 2 * HOUR), st.floats(0, 90 * DAY)))
    def time_passes(self, passed: float) -> None:
        self.now += passed

    # Each look has an error of its own, so a clock also runs backwards, by as much as years.
    @rule(
        error=st.one_of(st.sampled_from([-HOUR, -60.0, 0.0, 60.0, HOUR]), st.floats(-1e9, 1e9)),
        lagging=st.booleans(),
    )
    def a_process_looks(self, error: float, lagging: bool) -> None:
        awaited = frozenset({"ingest/1"} if lagging else ())
        for _ in range(99):
            step = next_step(self.ring, self.policy, self.now + error, awaited)
            if isinstance(step, Wait):
                assert step.until > self.now + error
                assert step.awaited <= awaited
                return
            if not self.store_takes(step):
                assert error != 0, "with the right clock, what it wants is right"
                return
        raise AssertionError("it never comes to rest")

    @rule()
    def an_operator_hastens_the_rotation(self) -> None:
        if (active := self.ring.active) is not None:
            rotate_at = min(active.rotate_at or 0, self.now)
            self.change(active.kid, KeyState.ACTIVE, rotate_at=rotate_at, released_at=self.now)

    @rule(state=st.sampled_from([KeyState.PENDING, KeyState.ACTIVE, KeyState.RETIRING]))
    def an_operator_revokes_a_key(self, state: KeyState) -> None:
        key = next((key for key in self.ring.keys if key.state is state), None)
        if key is None:
            return
        self.change(key.kid, KeyState.REVOKED)
        self.tokens = [token for token in self.tokens if token[0] != key.kid]
        if state is KeyState.ACTIVE and (pending := self.ring.pending) is not None:
            self.without_lead.add(pending.kid)
            self.promote(pending.kid)

    @rule()
    def a_token_is_issued(self) -> None:
        if (active := self.ring.active) is not None:
            assert active.lifetime_cap is not None
            self.tokens.append((active.kid, self.now + active.lifetime_cap))

    def store_takes(self, step: Prepare | Activate | Retire) -> bool:
        ring = self.ring
        match step:
            case Prepare():
                if ring.pending is not None:
                    return False
                kid = f"key-{len(self.keys)}"
                self.keys[kid] = SigningKey(
                    kid=kid,
                    state=KeyState.PENDING,
                    public_key=self.public_key,
                    published_at=self.now,
                    is_attested=True,
                )
            case Activate(kid=kid):
                lead_is_over = self.now >= self.policy.may_sign_from(self.keys[kid])
                if ring.active is None:
                    self.without_lead.add(kid)
                elif not lead_is_over:
                    return False
                else:
                    until = self.now + (ring.active.lifetime_cap or 0) + 2 * self.policy.clock_skew
                    self.change(ring.active.kid, KeyState.RETIRING, publish_until=until)
                self.promote(kid)
            case Retire(kid=kid):
                if self.now < (self.keys[kid].publish_until or 0):
                    return False
                self.change(kid, KeyState.RETIRED)
        return True

    def promote(self, kid: str) -> None:
        self.change(
            kid,
            KeyState.ACTIVE,
            activated_at=self.now,
            rotate_at=self.now + self.policy.rotation_period,
            lifetime_cap=self.policy.lifetime_cap,
        )

    def change(self, kid: str, state: KeyState, **fields: float | int | None) -> None:
        self.keys[kid] = msgspec.structs.replace(self.keys[kid], state=state, **fields)  # type: ignore[arg-type]

    @invariant()
    def at_most_one_key_signs_and_at_most_one_stands_ready(self) -> None:
        states = [key.state for key in self.keys.values()]
        assert states.count(KeyState.ACTIVE) <= 1
        assert states.count(KeyState.PENDING) <= 1

    @invariant()
    def every_live_token_finds_its_key_published_unless_it_was_revoked(self) -> None:
        live = {kid for kid, exp in self.tokens if exp + 60 > self.now}
        assert live <= set(self.ring.published)

    @invariant()
    def no_key_signed_that_verifiers_could_not_know_but_in_an_emergency(self) -> None:
        for key in self.keys.values():
            if key.activated_at is not None and key.kid not in self.without_lead:
                assert key.activated_at >= self.policy.may_sign_from(key)

    @invariant()
    def a_look_by_the_right_clock_leaves_a_key_that_signs_and_one_that_stands_ready(self) -> None:
        kept, without_lead = dict(self.keys), set(self.without_lead)
        self.a_process_looks(0.0, False)
        ring = self.ring
        assert ring.active is not None
        assert ring.pending is not None
        assert all((key.publish_until or 0) > self.now for key in ring.retiring)
        self.keys, self.without_lead = kept, without_lead


TestInstallation = Installation.TestCase
TestInstallation.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
