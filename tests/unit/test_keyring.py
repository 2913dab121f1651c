"""Whatever happens when, a ring has one key that signs, and verifiers know it in time."""

from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keys.keyring import (
    Activate,
    KeyRing,
    KeyState,
    Prepare,
    Retire,
    RotationPolicy,
    SigningKey,
    Wait,
    next_step,
)

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


@dataclass
class Life:
    """The store and the rotator of an installation, in memory: guards and all."""

    make: MakeKey
    policy: RotationPolicy
    keys: dict[str, SigningKey] = field(default_factory=dict[str, SigningKey])
    tokens: list[tuple[str, float]] = field(default_factory=list[tuple[str, float]])
    made: int = 0

    @property
    def ring(self) -> KeyRing:
        return KeyRing(self.keys.values())

    def change(self, kid: str, state: KeyState, **fields: float | int | None) -> None:
        self.keys[kid] = msgspec.structs.replace(self.keys[kid], state=state, **fields)  # type: ignore[arg-type]

    def come_to_rest(self, now: float, awaited: frozenset[str]) -> None:
        for _ in range(16):
            ring = self.ring
            step = next_step(ring, self.policy, now, awaited)
            match step:
                case Wait():
                    assert step.until > now
                    return
                case Prepare():
                    assert ring.pending is None
                    self.made += 1
                    kid = f"key-{self.made}"
                    self.keys[kid] = self.make(kid, KeyState.PENDING, published_at=now)
                case Activate(kid=kid):
                    if ring.active is not None:
                        assert now - self.keys[kid].published_at >= self.policy.publish_lead
                        until = now + self.policy.lifetime_cap + self.policy.clock_skew
                        self.change(ring.active.kid, KeyState.RETIRING, publish_until=until)
                    self.change(
                        kid,
                        KeyState.ACTIVE,
                        activated_at=now,
                        rotate_at=now + self.policy.rotation_period,
                        lifetime_cap=self.policy.lifetime_cap,
                    )
                case Retire(kid=kid):
                    self.change(kid, KeyState.RETIRED)
        raise AssertionError("it never comes to rest")

    def revoke_active(self) -> None:
        if (active := self.ring.active) is not None:
            self.change(active.kid, KeyState.REVOKED)
            self.tokens = [token for token in self.tokens if token[0] != active.kid]

    def issue(self, now: float) -> None:
        active = self.ring.active
        assert active is not None
        self.tokens.append((active.kid, now + self.policy.lifetime_cap))


policies = st.builds(
    RotationPolicy,
    publish_lead=st.sampled_from([400.0, HOUR, DAY]),
    rotation_period=st.sampled_from([HOUR / 2, 2 * HOUR, 30 * DAY]),
    lifetime_cap=st.sampled_from([60, 900, 3600]),
    clock_skew=st.just(60.0),
)
# How long until somebody looks again, how far their clock is off, and what happens before.
moments = st.tuples(
    st.one_of(
        st.floats(min_value=0, max_value=2 * HOUR), st.floats(min_value=0, max_value=90 * DAY)
    ),
    st.floats(min_value=-15, max_value=15),
    st.booleans(),
    st.sampled_from(["", "", "", "", "revoke"]),
)


@settings(max_examples=200, deadline=None)
@given(policy=policies, times=st.lists(moments, min_size=1, max_size=40))
def test_through_all_rotations_one_key_signs_the_next_is_ready_and_every_live_token_verifies(
    policy: RotationPolicy,
    times: list[tuple[float, float, bool, str]],
    signing_key: MakeKey,
    now: float,
) -> None:
    life = Life(make=signing_key, policy=policy)
    for passed, clock_error, somebody_lags, event in times:
        now += passed
        if event == "revoke":
            life.revoke_active()
        # Clocks wobble, so time as it is read also runs backwards: by up to half of the skew.
        life.come_to_rest(now + clock_error, frozenset({"ingest"} if somebody_lags else ()))
        ring = life.ring
        assert ring.active is not None
        assert ring.pending is not None
        life.issue(now + clock_error)
        life.tokens = [(kid, exp) for kid, exp in life.tokens if exp > now]
        assert {kid for kid, _ in life.tokens} <= set(ring.published)
        # A key that signs no more is not kept for ever.
        assert all((key.publish_until or 0) > now - policy.clock_skew for key in ring.retiring)
