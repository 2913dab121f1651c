"""F9 and K5: instances whose clocks are wrong sign no key early, and no verifier notices them.

Leaves Postgres and the verifier at the true time, and every monotonic clock alone.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Final, NoReturn

import httpx
import pytest

from keys.verifier import InvalidToken, decode, parse_jwks
from service.settings import LOCAL_AUDIENCE
from service.store.embedded import Running
from tests.faults.admin_api import AdminAPI, IssuedCredential
from tests.faults.key_history import KeyHistory
from tests.faults.live_authority import LiveAuthority, live_instances
from tests.faults.pace import Pace

pytestmark = pytest.mark.anyio

STATED_SKEW: Final = 60
"""Seconds: CLOCK_SKEW of the authority and of its verifiers, unless they are told otherwise."""

PACE: Final = Pace(publish_lead=2.0, rotation_period=3.0, ring_poll=0.2, clock_skew=STATED_SKEW)
ROTATIONS: Final = 2
ROTATED_DEADLINE: Final = 20.0
MINUTES: Final = (-90, 0, 90)
HOURS: Final = (-3600, 0, 3600)
CLOCK_TOLERANCE: Final = 30
"""Seconds: the server reads its own clock once a second, or less often under load."""

Faked = Callable[[int], Mapping[str, str]]


@pytest.fixture(scope="module")
def faked(skip_or_fail: Callable[[str], NoReturn]) -> Faked:
    """`faked(seconds)` is the environment of a process whose clock is that much ahead."""
    libraries = sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))
    if not libraries:
        skip_or_fail("there is no libfaketime")

    def environ(seconds: int) -> Mapping[str, str]:
        if seconds == 0:
            return {}
        return {
            "LD_PRELOAD": str(libraries[0]),
            "FAKETIME": f"{seconds:+d}s",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }

    return environ


@dataclass(slots=True, kw_only=True)
class Findings:
    """What the clients of all instances saw, and what the database says about it."""

    statuses: Counter[int] = field(default_factory=Counter[int])
    verifications: int = 0
    refusals: list[str] = field(default_factory=list[str])
    rotations: int = 0
    smallest_margin: float = float("inf")
    early_tokens: int = 0
    retired_early: int = 0

    def __str__(self) -> str:
        return (
            f"answers {dict(self.statuses)}, verifications {self.verifications}, "
            f"refused {len(self.refusals)}, rotations {self.rotations}, "
            f"smallest margin {self.smallest_margin:.3f} s, early tokens {self.early_tokens}"
        )


@pytest.mark.parametrize("offsets", [MINUTES, HOURS], ids=["F9-90s", "K5-1h"])
async def test_instances_with_wrong_clocks_sign_no_key_early_and_no_token_is_refused(
    offsets: Sequence[int],
    faked: Faked,
    database: Running,
    capsys: pytest.CaptureFixture[str],
) -> None:
    environs = [{**PACE.environ(), **faked(offset)} for offset in offsets]
    async with live_instances(
        database, environs, factory="tests.faults.variants:hurrying"
    ) as instances:
        await _assert_clocks(instances, offsets)
        findings = await _rotated(instances, database, rotations=ROTATIONS)
    with capsys.disabled():
        print(f"\nClocks {offsets}: {findings}")
    assert set(findings.statuses) == {200}
    assert findings.rotations >= ROTATIONS
    assert findings.refusals == []
    assert findings.smallest_margin >= 0
    assert findings.early_tokens == 0
    assert findings.retired_early == 0


async def test_the_same_check_finds_instances_that_trust_their_clocks_yet_none_signs_early(
    faked: Faked, database: Running, capsys: pytest.CaptureFixture[str]
) -> None:
    environs = [{**PACE.environ(), **faked(offset)} for offset in MINUTES]
    async with live_instances(
        database, environs, factory="tests.faults.variants:trusting_its_clock"
    ) as instances:
        findings = await _rotated(instances[1:2] + instances[::2], database, rotations=1)
    with capsys.disabled():
        print(f"\nClocks {MINUTES}, corrected by nobody: {findings}")
    assert findings.statuses[503] > 0
    # The database's clock alone has the last word.
    assert findings.rotations > 0
    assert findings.smallest_margin >= 0
    assert findings.early_tokens == 0


async def _assert_clocks(instances: Sequence[LiveAuthority], offsets: Sequence[int]) -> None:
    """See from outside that each clock is as wrong as it is meant to be."""
    async with httpx.AsyncClient(timeout=10) as client:
        for instance, offset in zip(instances, offsets, strict=True):
            answer = await client.get(f"{instance.url}/healthz")
            shown = parsedate_to_datetime(answer.headers["date"]).timestamp()
            assert abs(shown - time.time() - offset) < CLOCK_TOLERANCE


async def _rotated(
    instances: Sequence[LiveAuthority], database: Running, *, rotations: int
) -> Findings:
    """Exchange at every instance, and verify with the keys of every instance, meanwhile."""
    admin = await AdminAPI.enter(instances[0])
    service_user_id = await admin.create_service_user("vkyc-clocks", ["ingest:write"])
    credential = await admin.create_credential(service_user_id)
    await admin.leave()
    history = await KeyHistory.open(database.service_dsn)
    findings = Findings()
    before = len(await history.rotations())
    deadline = time.monotonic() + ROTATED_DEADLINE
    async with httpx.AsyncClient(timeout=10) as client:
        while len(await history.rotations()) < before + rotations and time.monotonic() < deadline:
            for instance in instances:
                token = await _exchanged(client, instance, credential, findings)
                if token is not None:
                    await _verify(client, token, instances, findings)
            await asyncio.sleep(0.05)
    rotated = await history.rotations()
    findings.rotations = len(rotated) - before
    findings.smallest_margin = min(
        (key.lead - PACE.publish_lead for key in rotated), default=float("inf")
    )
    findings.early_tokens = await history.early_tokens(PACE.publish_lead)
    findings.retired_early = sum(key.ended_at is not None for key in await history.keys())
    await history.close()
    return findings


async def _exchanged(
    client: httpx.AsyncClient,
    instance: LiveAuthority,
    credential: IssuedCredential,
    findings: Findings,
) -> str | None:
    answer = await client.post(
        f"{instance.url}/oauth/token",
        data={"grant_type": "client_credentials"},
        auth=(credential.client_id, credential.client_secret),
    )
    findings.statuses[answer.status_code] += 1
    return answer.json()["access_token"] if answer.status_code == 200 else None


async def _verify(
    client: httpx.AsyncClient,
    token: str,
    instances: Sequence[LiveAuthority],
    findings: Findings,
) -> None:
    """Verify with what each instance publishes: at the true time, and at the ends of the skew."""
    for instance in instances:
        jwks = (await client.get(f"{instance.url}/.well-known/jwks.json")).content
        for skew in (-STATED_SKEW + 1, 0, STATED_SKEW - 1):
            findings.verifications += 1
            try:
                decode(
                    token,
                    parse_jwks(jwks),
                    issuer=instances[0].issuer,
                    audience=LOCAL_AUDIENCE,
                    now=time.time() + skew,
                    skew=STATED_SKEW,
                )
            except InvalidToken as error:
                findings.refusals.append(f"{instance.url}, clock {skew:+d} s: {error}")
