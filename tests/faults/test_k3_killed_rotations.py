"""K3: a process that is killed between any two steps of a rotation leaves keys that go on.

Kills at named places, not after a while; judges by the database and by tokens received before.
"""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import asyncpg
import httpx
import jwt
import pytest

from keys.keyring import KeyState
from keys.verifier import decode, parse_jwks
from service.settings import LOCAL_AUDIENCE
from service.store.embedded import Running
from tests.faults.admin_api import AdminAPI, IssuedCredential
from tests.faults.failpoints import FILE_VARIABLE, Failpoint
from tests.faults.key_history import KeyHistory, KeyLife
from tests.faults.live_authority import LiveAuthority, live_instances
from tests.faults.pace import Pace

pytestmark = pytest.mark.anyio

PACE: Final = Pace(publish_lead=1.0, rotation_period=1.2, ring_poll=0.2)
DEATH_DEADLINE: Final = 10.0
GOES_ON_DEADLINE: Final = 10.0
AGE: Final = tuple(KeyState)
"""The states in the order in which a key comes to them."""

# Retiring takes longer than this test: the key's time is made to be over.
END_RETIRING = """
UPDATE signing_keys SET publish_until = clock_timestamp()
 WHERE kid = (SELECT kid FROM signing_keys WHERE state = 'retiring'
               ORDER BY published_at LIMIT 1)
RETURNING kid
"""


@dataclass(slots=True, kw_only=True)
class Rehearsal:
    """One authority that dies again and again, and who watches it."""

    authority: LiveAuthority
    history: KeyHistory
    superuser: "asyncpg.Connection[asyncpg.Record]"
    credential: IssuedCredential
    failpoint_file: Path
    tokens: list[str] = field(default_factory=list[str])
    ended: set[str] = field(default_factory=set[str])
    """The kids whose time was made to be over: their tokens have ended."""

    def arm(self, failpoint: Failpoint | None) -> None:
        self.failpoint_file.write_text(failpoint or "", "utf-8")

    async def exchange(self) -> str:
        """Return a token; raise httpx.TransportError where nobody answers."""
        async with httpx.AsyncClient(timeout=10) as client:
            answer = await client.post(
                f"{self.authority.url}/oauth/token",
                data={"grant_type": "client_credentials"},
                auth=(self.credential.client_id, self.credential.client_secret),
            )
        assert answer.status_code == 200, answer.text
        token: str = answer.json()["access_token"]
        return token

    async def exchange_until_it_dies(self) -> None:
        with suppress(httpx.TransportError):
            while True:
                self.tokens.append(await self.exchange())
                await asyncio.sleep(0.05)

    async def end_retiring(self) -> None:
        """Let a key be due to retire."""
        async with asyncio.timeout(GOES_ON_DEADLINE):
            while (kid := await self.superuser.fetchval(END_RETIRING)) is None:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        self.ended.add(kid)

    async def goes_on(self) -> list[KeyLife]:
        """Return the keys once one signs and one stands ready, with no step due."""
        async with asyncio.timeout(GOES_ON_DEADLINE):
            while True:
                keys = await self.history.keys()
                found = [key.state for key in keys]
                if (found.count(KeyState.ACTIVE), found.count(KeyState.PENDING)) == (1, 1) and all(
                    key.state is KeyState.RETIRED for key in keys if key.kid in self.ended
                ):
                    return keys
                await asyncio.sleep(0.05)

    async def unverified(self) -> list[str]:
        """Return why tokens received so far do not verify with the keys that are published now."""
        async with httpx.AsyncClient(timeout=10) as client:
            jwks = (await client.get(f"{self.authority.url}/.well-known/jwks.json")).content
        keys = parse_jwks(jwks)
        complaints: list[str] = []
        for token in self.tokens:
            if jwt.get_unverified_header(token)["kid"] in self.ended:
                continue
            try:
                decode(
                    token,
                    keys,
                    issuer=self.authority.issuer,
                    audience=LOCAL_AUDIENCE,
                    now=time.time(),
                )
            except Exception as error:
                complaints.append(str(error))
        return complaints


@pytest.fixture(scope="module")
async def rehearsal(
    module_database: Running, tmp_path_factory: pytest.TempPathFactory
) -> AsyncGenerator[Rehearsal]:
    """An authority whose first key signs, with an integrator."""
    failpoint_file = tmp_path_factory.mktemp("failpoint") / "armed"
    failpoint_file.write_text("", "utf-8")
    environ = {**PACE.environ(), FILE_VARIABLE: str(failpoint_file)}
    async with live_instances(
        module_database, [environ], factory="tests.faults.variants:dying"
    ) as instances:
        admin = await AdminAPI.enter(instances[0])
        service_user_id = await admin.create_service_user("vkyc-rotations", ["ingest:write"])
        credential = await admin.create_credential(service_user_id)
        await admin.leave()
        history = await KeyHistory.open(module_database.service_dsn)
        superuser = await asyncpg.connect(module_database.superuser_dsn.reveal(), timeout=10)
        yield Rehearsal(
            authority=instances[0],
            history=history,
            superuser=superuser,
            credential=credential,
            failpoint_file=failpoint_file,
        )
        await history.close()
        await superuser.close(timeout=5)


@pytest.mark.parametrize("failpoint", Failpoint)
async def test_a_rotation_that_is_killed_here_goes_on_after_a_restart(
    failpoint: Failpoint, rehearsal: Rehearsal, capsys: pytest.CaptureFixture[str]
) -> None:
    if failpoint in (Failpoint.BEFORE_RETIRE, Failpoint.AFTER_RETIRE):
        await rehearsal.end_retiring()
    rehearsal.arm(failpoint)
    await asyncio.gather(
        rehearsal.exchange_until_it_dies(),
        asyncio.to_thread(rehearsal.authority.wait_until_it_dies, DEATH_DEADLINE),
    )
    left_behind = await rehearsal.history.keys()
    _assert_died_there(failpoint, left_behind, rehearsal.ended)

    rehearsal.arm(None)
    rehearsal.authority.start()
    rehearsal.tokens.append(await rehearsal.exchange())
    keys = await rehearsal.goes_on()

    rotations = await rehearsal.history.rotations()
    margins = [rotation.lead - PACE.publish_lead for rotation in rotations]
    unverified = await rehearsal.unverified()
    with capsys.disabled():
        print(
            f"\nK3 {failpoint}: keys {len(keys)}, rotations so far {len(rotations)}, "
            f"smallest margin {min(margins, default=0.0):.3f} s, "
            f"tokens received {len(rehearsal.tokens)}, of which do not verify {len(unverified)}"
        )
    assert unverified == []
    assert min(margins, default=0.0) >= 0
    assert await rehearsal.history.early_tokens(PACE.publish_lead) == 0
    assert await rehearsal.history.off_the_record() == {}
    _assert_none_is_lost(left_behind, keys)


def _assert_died_there(failpoint: Failpoint, keys: list[KeyLife], ended: set[str]) -> None:
    """Hold what is in the store against what this failpoint says was, and was not, committed."""
    pending = [key for key in keys if key.state is KeyState.PENDING]
    assert [key.state for key in keys].count(KeyState.ACTIVE) == 1
    match failpoint:
        case Failpoint.ELECTED | Failpoint.BEFORE_PREPARE | Failpoint.AFTER_ACTIVATE:
            assert pending == []
        case Failpoint.AFTER_PREPARE | Failpoint.BEFORE_ACTIVATE:
            assert len(pending) == 1
        case Failpoint.BEFORE_RETIRE:
            assert KeyState.RETIRING in {key.state for key in keys if key.kid in ended}
        case Failpoint.AFTER_RETIRE:
            assert {key.state for key in keys if key.kid in ended} == {KeyState.RETIRED}


def _assert_none_is_lost(before: list[KeyLife], after: list[KeyLife]) -> None:
    """Each key is where it was, or further on in its life; none was revoked."""
    now = {key.kid: key for key in after}
    for key in before:
        assert now[key.kid].published_at == key.published_at
        assert AGE.index(key.state) <= AGE.index(now[key.kid].state)
    assert KeyState.REVOKED not in {key.state for key in after}
