"""F10 and K8: three instances rotate their keys, and ten verifiers of three kinds notice nothing.

Every verifier caches for the full max-age and asks whichever instance the balancer picks. The short
form makes three rotations; FAULTS_LONG=1 makes fifty and more.
"""

import asyncio
import os
import random
import time
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import jwt
import msgspec
import pytest

from keys.keyring import KeyState
from service.settings import LOCAL_AUDIENCE
from service.store.embedded import Running
from tests.faults.admin_api import AdminAPI, IssuedCredential
from tests.faults.balancer import balancer
from tests.faults.key_history import KeyHistory, KeyLife
from tests.faults.live_authority import LiveAuthority, free_port, live_instances
from tests.faults.pace import Pace
from tests.faults.verifiers import (
    Answer,
    Kind,
    Purpose,
    RunningVerifier,
    Shown,
    running_verifiers,
)
from tests.faults.wire import Connection, exchange_request

pytestmark = pytest.mark.anyio

LONG: Final = os.environ.get("FAULTS_LONG") == "1"
ROTATIONS: Final = 50 if LONG else 3
VERIFICATIONS: Final = 100_000 if LONG else 2_000
LIMIT: Final = 1200.0 if LONG else 90.0
"""Seconds within which the rotations have to be made."""

PACE: Final = Pace(publish_lead=12, rotation_period=12, ring_poll=0.3)
NO_LEAD: Final = Pace(publish_lead=0, rotation_period=2, ring_poll=0.3)
"""P3 off: what has just been published may sign."""

INSTANCES: Final = 3
KINDS: Final = (*[Kind.OURS] * 4, *[Kind.PYJWT] * 3, *[Kind.JOSE] * 3)
REPORTING: Final = 3
"""So many of ours, the first ones, report which keys they have loaded."""

CLIENTS: Final = 4
EXCHANGES_A_SECOND: Final = 20
SHOWN_AGAIN_AFTER: Final = 45.0 if LONG else 20.0
"""Seconds: the token lives for 60, and its key signs no more."""

SLOWNESS: Final = 3.0
"""Seconds that a busy machine may take for what is due at once."""

CACHED: Final = PACE.jwks_max_age + PACE.ring_poll + SLOWNESS
"""Seconds after which no honest client can use what it fetched before."""

NODE: Final = Path(__file__).parents[1] / "interop" / "node"


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """Three rotations: none lacks the next key; one is paused; one is dead. In seconds after each
    was due, and with the verifiers that the record says were not awaited any more."""

    missing_before: list[str]
    """What the API showed just before the second: who lacked the next key."""
    lateness: list[float]
    not_awaited: list[list[str]]

    def __str__(self) -> str:
        free, paused, dead = self.lateness
        return (
            f"rotation later than due: none missing {free:.2f} s, one paused {paused:.2f} s, "
            f"one killed {dead:.2f} s; window {PACE.policy.gate_window:.1f} s"
        )


@dataclass(slots=True, kw_only=True)
class Emergency:
    """One revocation of the key that signed."""

    kid: str
    promoted: str
    begun: float
    answered: float = float("inf")
    signed_after: int = 0
    """Tokens of the revoked key that were asked for after the revocation was answered."""


@dataclass(slots=True, kw_only=True)
class Trial:
    """Everything that runs, and what was seen of it."""

    pace: Pace
    instances: Sequence[LiveAuthority]
    history: KeyHistory
    verifiers: Sequence[RunningVerifier]
    credential: IssuedCredential
    tokens: int = 0
    failed: list[str] = field(default_factory=list[str])
    emergency: Emergency | None = None
    rotations: int = 0
    issued: deque[tuple[float, Shown]] = field(default_factory=deque[tuple[float, Shown]])

    def show(self, token: str, kid: str, purpose: Purpose) -> Shown:
        """Show a token to every verifier."""
        if self.emergency is not None and kid == self.emergency.kid:
            purpose = Purpose.REVOKED
        if self.emergency is not None and kid == self.emergency.promoted:
            purpose = Purpose.EMERGENCY
        shown = Shown(token=token, kid=kid, purpose=purpose)
        for verifier in self.verifiers:
            verifier.show(shown)
        return shown

    def answers(self, *purposes: Purpose, kind: Kind | None = None) -> list[Answer]:
        """Return what the verifiers said about tokens that were shown for these purposes."""
        return [
            answer
            for verifier in self.verifiers
            if kind is None or verifier.kind is kind
            for answer in verifier.answers
            if not purposes or answer.shown.purpose in purposes
        ]

    def wrong_refusals(self) -> list[str]:
        """Return why valid tokens were refused."""
        revoked, since = "", float("inf")
        if self.emergency is not None:
            revoked, since = self.emergency.kid, self.emergency.begun
        return [
            f"{verifier.name} at {answer.at:.3f}: {answer.shown.purpose} {answer.refusal}"
            for verifier in self.verifiers
            for answer in verifier.answers
            if answer.refusal
            and answer.shown.purpose in (Purpose.FRESH, Purpose.OLD)
            and not (answer.shown.kid == revoked and answer.at >= since)
        ]

    def first_use(self, keys: Sequence[KeyLife]) -> dict[Kind, float]:
        """Return, for each kind, the smallest age that one of `keys` had when first accepted."""
        ages: dict[Kind, float] = {}
        for kind in Kind:
            first: dict[str, float] = {}
            for answer in self.answers(Purpose.FRESH, kind=kind):
                if not answer.refusal:
                    known = first.get(answer.shown.kid, answer.at)
                    first[answer.shown.kid] = min(known, answer.at)
            ages[kind] = min(
                (first[key.kid] - key.published_at for key in keys if key.kid in first),
                default=float("inf"),
            )
        return ages

    def new_accepted_after(self) -> dict[Kind, float]:
        """Return for how many seconds after the emergency each kind refused the promoted key."""
        return self._last(Purpose.EMERGENCY, accepted=False)

    def old_refused_after(self) -> dict[Kind, float]:
        """Return for how many seconds after the emergency each kind accepted the revoked key."""
        return self._last(Purpose.REVOKED, accepted=True)

    def _last(self, purpose: Purpose, *, accepted: bool) -> dict[Kind, float]:
        assert self.emergency is not None
        answered = self.emergency.answered
        return {
            kind: max(
                (
                    max(answer.at - answered, 0.0)
                    for answer in self.answers(purpose, kind=kind)
                    if (answer.refusal == "") is accepted
                ),
                default=0.0,
            )
            for kind in Kind
        }

    def recovered(self) -> bool:
        """Whether each verifier has come to accept the promoted key and to refuse the revoked."""
        return all(
            verifier.newest(Purpose.EMERGENCY) == "" and verifier.newest(Purpose.REVOKED)
            for verifier in self.verifiers
            if not verifier.killed
        )

    async def exchange_for_ever(self) -> None:
        """Exchange at random instances, evenly, and show every token."""
        request = exchange_request(self.credential.client_id, self.credential.client_secret)
        connections = [await Connection.open(each.port) for each in self.instances]
        while True:
            await asyncio.sleep(random.uniform(0, 2 * CLIENTS / EXCHANGES_A_SECOND))
            begun = time.time()
            status, body = await random.choice(connections).request(request)
            if status != 200:
                self.failed.append(f"{status} {body.decode()}")
                continue
            token: str = msgspec.json.decode(body)["access_token"]
            kid: str = jwt.get_unverified_header(token)["kid"]
            self.tokens += 1
            if self.emergency and kid == self.emergency.kid and begun > self.emergency.answered:
                self.emergency.signed_after += 1
            self.issued.append((begun, self.show(token, kid, Purpose.FRESH)))

    async def show_again_for_ever(self) -> None:
        """Show each token once more when its life is nearly over."""
        while True:
            while self.issued and self.issued[0][0] < time.time() - SHOWN_AGAIN_AFTER:
                _, shown = self.issued.popleft()
                self.show(shown.token, shown.kid, Purpose.OLD)
            await asyncio.sleep(0.1)

    async def rotated(self) -> None:
        """Return once the next rotation was made; they are counted from the first call on."""
        before = len(await self.history.rotations())
        async with asyncio.timeout(self.pace.rotation_period * 2 + 5 * SLOWNESS):
            while len(await self.history.rotations()) == before:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        self.rotations += 1

    async def settled(self) -> None:
        """Return once every verifier has said what it thinks of every token."""
        async with asyncio.timeout(15):
            while any(verifier.unanswered for verifier in self.verifiers):  # noqa: ASYNC110
                await asyncio.sleep(0.05)


async def test_no_verifier_notices_a_rotation_and_an_emergency_only_for_as_long_as_it_caches(
    database: Running, node_packages: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    began = time.monotonic()
    async with _trial(database, PACE) as trial:
        gate = await _rotate_with_one_paused_and_one_killed(trial)
        while trial.rotations < ROTATIONS or len(trial.answers()) < VERIFICATIONS:
            assert time.monotonic() < began + LIMIT, "too slow for this many rotations"
            await trial.rotated()
        emergency = await _revoke_the_active_key(trial)
        rotated = await trial.history.rotations(but=[emergency.promoted])
        early_tokens = await trial.history.early_tokens(PACE.publish_lead, but=[emergency.promoted])
    margin = min(key.lead - PACE.publish_lead for key in rotated)
    refusals = trial.wrong_refusals()
    with capsys.disabled():
        print(
            f"\nF10: tokens {trial.tokens}, verifications {len(trial.answers())}, "
            f"rotations {len(rotated)}, valid tokens refused {len(refusals)}, "
            f"requests failed {len(trial.failed)}, smallest margin {margin:.3f} s over a lead of "
            f"{PACE.publish_lead:.0f} s, tokens signed early {early_tokens}\n     {gate}"
        )
        print(f"     smallest age of a key at first use: {_seconds(trial.first_use(rotated))}")
        print(
            f"K8:  tokens of the revoked key after the answer {emergency.signed_after}; "
            f"seconds until all accept the new key: {_seconds(trial.new_accepted_after())}; "
            f"until none accepts the old one: {_seconds(trial.old_refused_after())}"
        )
    assert refusals == []
    assert trial.failed == []
    assert margin >= 0
    assert early_tokens == 0
    _assert_it_waited_and_went_ahead(gate)
    assert emergency.signed_after == 0
    assert max(trial.new_accepted_after().values()) < CACHED
    assert max(trial.old_refused_after().values()) < CACHED


async def test_the_same_check_finds_tokens_refused_when_a_new_key_signs_at_once(
    database: Running, node_packages: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with _trial(database, NO_LEAD) as trial:
        # What was fetched at first is kept for longer than all of these take.
        for _ in range(3):
            await trial.rotated()
        await asyncio.sleep(1)
        await trial.settled()
    refusals = trial.wrong_refusals()
    with capsys.disabled():
        print(
            f"\nF10 without a lead: tokens {trial.tokens}, verifications {len(trial.answers())}, "
            f"valid tokens refused {len(refusals)}"
        )
    assert trial.failed == []
    assert refusals != []


@asynccontextmanager
async def _trial(database: Running, pace: Pace) -> AsyncGenerator[Trial]:
    """Run instances, balancer, verifiers and clients until the end of the block."""
    port = free_port()
    issuer = f"http://127.0.0.1:{port}"
    async with live_instances(
        database,
        [pace.environ()] * INSTANCES,
        factory="tests.faults.variants:hurrying",
        issuer=issuer,
    ) as instances:
        history = await KeyHistory.open(database.service_dsn)
        credential, reporting = await _credentials(instances[0])
        reporters = [(reporting.client_id, reporting.client_secret)] * REPORTING
        async with (
            balancer(port, [instance.port for instance in instances]),
            running_verifiers(
                KINDS,
                [*reporters, *[None] * (len(KINDS) - REPORTING)],
                issuer=issuer,
                audience=LOCAL_AUDIENCE,
                jwks_max_age=pace.jwks_max_age,
                skew=pace.clock_skew,
            ) as verifiers,
            asyncio.TaskGroup() as tasks,
        ):
            trial = Trial(
                pace=pace,
                instances=instances,
                history=history,
                verifiers=verifiers,
                credential=credential,
            )
            work = [
                *(tasks.create_task(trial.exchange_for_ever()) for _ in range(CLIENTS)),
                tasks.create_task(trial.show_again_for_ever()),
            ]
            yield trial
            for each in work:
                each.cancel()
        await history.close()


async def _credentials(authority: LiveAuthority) -> tuple[IssuedCredential, IssuedCredential]:
    """Return an integrator's, and the one with which all verifiers report."""
    admin = await AdminAPI.enter(authority)
    integrator = await admin.create_service_user("vkyc-rotation", ["ingest:write"])
    reporting = await admin.create_service_user(
        "verifiers", ["audit:report"], audiences=[f"{authority.issuer}/api/v1"]
    )
    credentials = [await admin.create_credential(each) for each in (integrator, reporting)]
    await admin.leave()
    return credentials[0], credentials[1]


async def _rotate_with_one_paused_and_one_killed(trial: Trial) -> Gate:
    """Make three rotations: all have the next key, one lacks it, another lacks it for ever."""
    _, paused, killed = trial.verifiers[:REPORTING]
    await _all_have_the_next_key(trial)
    paused.pause()  # it has what the first rotation needs, and will lack what the second does
    await trial.rotated()
    missing_before = await _missing_when_due(trial.instances[0])
    killed.kill()  # likewise
    await trial.rotated()
    paused.resume()
    await trial.rotated()
    keys = [key for key in await trial.history.keys() if key.activated_at is not None][-4:]
    activations = await trial.history.activations()
    return Gate(
        missing_before=missing_before,
        lateness=[_lateness(old, new) for old, new in pairwise(keys)],
        not_awaited=[activations[key.kid].get("not_awaited", []) for key in keys[1:]],
    )


async def _all_have_the_next_key(trial: Trial) -> None:
    """Return once the API shows that all who report have it, and that it may not sign yet."""
    admin = await AdminAPI.enter(trial.instances[0])
    async with asyncio.timeout(2 * PACE.rotation_period):
        while True:
            next_key = await _next_key(admin)
            loaded = [each["has_loaded"] for each in next_key["verifiers"]]
            if loaded == [True] * REPORTING and time.time() < _time(next_key["may_sign_from"]) - 1:
                break
            await asyncio.sleep(0.1)
    await admin.leave()


async def _missing_when_due(authority: LiveAuthority) -> list[str]:
    """Return who lacks the next key, as the API shows it, a second before that may sign."""
    admin = await AdminAPI.enter(authority)
    next_key = await _next_key(admin)
    await asyncio.sleep(_time(next_key["may_sign_from"]) - 1 - time.time())
    verifiers = (await _next_key(admin))["verifiers"]
    await admin.leave()
    return [each["instance"] for each in verifiers if not each["has_loaded"]]


async def _next_key(admin: AdminAPI) -> dict[str, Any]:
    """Return the pending key as the API shows it."""
    while True:
        for key in await admin.signing_keys():
            if key["state"] == KeyState.PENDING:
                return key
        await asyncio.sleep(0.05)


def _lateness(old: KeyLife, new: KeyLife) -> float:
    """Return for how many seconds a rotation was due before it was made."""
    assert old.activated_at is not None
    assert new.activated_at is not None
    due = max(old.activated_at + PACE.rotation_period, new.published_at + PACE.publish_lead)
    return new.activated_at - due


def _assert_it_waited_and_went_ahead(gate: Gate) -> None:
    free, paused, dead = gate.lateness
    window = PACE.policy.gate_window
    assert len(gate.missing_before) == 1
    assert gate.not_awaited[0] == []
    assert gate.not_awaited[1] == [f"verifiers/{gate.missing_before[0]}"]
    assert len(gate.not_awaited[2]) == 1
    assert gate.not_awaited[2] != gate.not_awaited[1]
    assert free < window + SLOWNESS
    assert window <= paused < window + PACE.ring_poll + SLOWNESS
    assert window <= dead < window + PACE.ring_poll + SLOWNESS


async def _revoke_the_active_key(trial: Trial) -> Emergency:
    """Revoke it at the worst moment: the next key has just been published, and few have it. Return
    once every verifier has recovered, or should have."""
    kids: dict[KeyState, str] = {}
    while KeyState.PENDING not in kids or trial.issued[-1][1].kid != kids[KeyState.ACTIVE]:
        kids = {key.state: key.kid for key in await trial.history.keys()}
        await asyncio.sleep(0.02)
    old = trial.issued[-1][1]
    admin = await AdminAPI.enter(trial.instances[0])
    trial.emergency = Emergency(kid=old.kid, promoted=kids[KeyState.PENDING], begun=time.time())
    said = await admin.revoke_signing_key(old.kid)
    trial.emergency.answered = time.time()
    await admin.leave()
    assert said["signing_kid"] == trial.emergency.promoted
    while not trial.recovered() and time.time() < trial.emergency.answered + CACHED:
        trial.show(old.token, old.kid, Purpose.REVOKED)
        await asyncio.sleep(0.2)
    assert trial.recovered()
    return trial.emergency


def _time(moment: str) -> float:
    return datetime.fromisoformat(moment).timestamp()


def _seconds(by_kind: dict[Kind, float]) -> str:
    return ", ".join(f"{kind} {seconds:.2f}" for kind, seconds in by_kind.items())
