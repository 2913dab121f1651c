"""K3: a process that is killed between any two steps of a rotation leaves keys that go on.

Kills at named places, not after a while; judges by the database and by tokens received before.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NoReturn

import asyncpg
import httpx
import jwt
import psutil
import pytest

from keys.keyring import KeyState
from keys.pkcs11 import Pkcs11Custody
from keys.verifier import decode, parse_jwks
from service.settings import LOCAL_AUDIENCE
from service.store.embedded import Running
from tests import softhsm
from tests.faults.admin_api import AdminAPI, IssuedCredential
from tests.faults.failpoints import FILE_VARIABLE, Failpoint
from tests.faults.key_history import KeyHistory, KeyLife
from tests.faults.live_authority import NOTHING, LiveAuthority, live_instances
from tests.faults.pace import Pace

pytestmark = pytest.mark.anyio

PACE: Final = Pace(publish_lead=1.0, rotation_period=1.2, ring_poll=0.2)
DEATH_DEADLINE: Final = 30.0
GOES_ON_DEADLINE: Final = 30.0
AGE: Final = tuple(KeyState)
"""The states in the order in which a key comes to them."""

WITH_AN_HSM: Final = (
    Failpoint.BEFORE_PREPARE,
    Failpoint.BEFORE_DESTROY,
    Failpoint.DESTROYED,
)
"""Where something is left in a token, or gone from it, that the store does not know of."""
DESTROYING: Final = frozenset(WITH_AN_HSM) - {Failpoint.BEFORE_PREPARE}
"""Reached only where a private half is kept outside of the store."""

# Retiring takes longer than this test: the key's time is made to be over.
END_RETIRING = """
UPDATE signing_keys SET publish_until = clock_timestamp()
 WHERE kid = (SELECT kid FROM signing_keys WHERE state = 'retiring'
               ORDER BY published_at LIMIT 1)
RETURNING kid
"""

SELECT_KEPT = """
SELECT signer, kid, destroyed_at IS NOT NULL AS destroyed,
       state NOT IN ('pending', 'active') AS doomed
  FROM signing_keys
"""

COUNT_DESTRUCTIONS = """
SELECT kid, count(*) FROM audit_records
 WHERE action = 'signing_key.destroy' AND outcome = 'success' GROUP BY kid
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
        try:
            async with httpx.AsyncClient(timeout=10) as client:
                answer = await client.post(
                    f"{self.authority.url}/oauth/token",
                    data={"grant_type": "client_credentials"},
                    auth=(self.credential.client_id, self.credential.client_secret),
                )
        except AttributeError as error:
            # anyio asks a socket for its peer that was closed as soon as it was connected.
            raise httpx.ConnectError(str(error)) from error
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

    async def die(self, failpoint: Failpoint) -> list[KeyLife]:
        """Let the authority kill itself; return the keys that it leaves behind."""
        self.arm(failpoint)
        await asyncio.gather(
            self.exchange_until_it_dies(),
            asyncio.to_thread(self.authority.wait_until_it_dies, DEATH_DEADLINE),
        )
        return await self.history.keys()

    async def rise(self) -> list[KeyLife]:
        """Start it again; return the keys once it goes on."""
        self.arm(None)
        self.authority.start()
        self.tokens.append(await self.exchange())
        return await self.goes_on()


@pytest.fixture(scope="module")
async def rehearsal(
    module_database: Running, tmp_path_factory: pytest.TempPathFactory
) -> AsyncGenerator[Rehearsal]:
    """An authority whose first key signs, with an integrator."""
    async with _rehearsal(module_database, tmp_path_factory.mktemp("failpoint")) as begun:
        yield begun


@asynccontextmanager
async def _rehearsal(
    database: Running, directory: Path, environ: Mapping[str, str] = NOTHING
) -> AsyncGenerator[Rehearsal]:
    failpoint_file = directory / "armed"
    failpoint_file.write_text("", "utf-8")
    environ = {**PACE.environ(), FILE_VARIABLE: str(failpoint_file), **environ}
    async with live_instances(
        database, [environ], factory="tests.faults.variants:dying"
    ) as instances:
        admin = await AdminAPI.enter(instances[0])
        service_user_id = await admin.create_service_user("vkyc-rotations", ["ingest:write"])
        credential = await admin.create_credential(service_user_id)
        await admin.leave()
        history = await KeyHistory.open(database.service_dsn)
        superuser = await asyncpg.connect(database.superuser_dsn.reveal(), timeout=10)
        yield Rehearsal(
            authority=instances[0],
            history=history,
            superuser=superuser,
            credential=credential,
            failpoint_file=failpoint_file,
        )
        await history.close()
        await superuser.close(timeout=5)


@pytest.mark.parametrize("failpoint", [each for each in Failpoint if each not in DESTROYING])
async def test_a_rotation_that_is_killed_here_goes_on_after_a_restart(
    failpoint: Failpoint, rehearsal: Rehearsal, capsys: pytest.CaptureFixture[str]
) -> None:
    if failpoint in (Failpoint.BEFORE_RETIRE, Failpoint.AFTER_RETIRE):
        await rehearsal.end_retiring()
    left_behind = await rehearsal.die(failpoint)
    _assert_died_there(failpoint, left_behind, rehearsal.ended)
    keys = await rehearsal.rise()

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


async def test_no_kill_leaves_a_private_half_in_an_hsm_that_may_sign_no_more(
    database: Running,
    tmp_path: Path,
    skip_or_fail: Callable[[str], NoReturn],
    capsys: pytest.CaptureFixture[str],
) -> None:
    if missing := softhsm.missing():
        skip_or_fail(missing)
    with softhsm.token() as token, softhsm.visible_here(token):
        hsm = Pkcs11Custody(token.uri)
        environ = {**token.environ, "PRIVYSEAL_KEY_CUSTODY": token.uri}
        async with _rehearsal(database, tmp_path, environ) as rehearsal:
            strays: set[str] = set()
            for failpoint in WITH_AN_HSM:
                left_behind = await rehearsal.die(failpoint)
                _assert_died_there(failpoint, left_behind, rehearsal.ended)
                kept = await rehearsal.superuser.fetch(SELECT_KEPT)
                _wait_for_makers(token)
                held = set(await hsm.listed())
                doomed = [key for key in kept if key["doomed"] and not key["destroyed"]]
                found = [key["signer"] in held for key in doomed]
                new_strays = held - strays - {key["signer"] for key in kept}
                match failpoint:
                    case Failpoint.BEFORE_PREPARE:
                        assert len(new_strays) == 1, "a pair was made and not stored"
                    case Failpoint.BEFORE_DESTROY:
                        assert found == [True]
                    case _:
                        assert found == [False], "the token knows what the store does not"
                # Nobody can tell them from the pairs of another installation: `doctor` names them.
                strays |= new_strays
                keys = await rehearsal.rise()
                _assert_none_is_lost(left_behind, keys)
                await _until_the_token_holds_what_may_sign(rehearsal, hsm, strays)
                assert await rehearsal.unverified() == []
                assert await rehearsal.history.off_the_record() == {}
            recorded = await rehearsal.superuser.fetch(COUNT_DESTRUCTIONS)
            kept = await rehearsal.superuser.fetch(SELECT_KEPT)
            destroyed = {key["kid"]: 1 for key in kept if key["destroyed"]}
            assert {row["kid"]: row["count"] for row in recorded} == destroyed
    with capsys.disabled():
        print(f"\nK3 with an HSM: private halves destroyed {len(recorded)}, strays {len(strays)}")


def _wait_for_makers(token: softhsm.Token) -> None:
    """A key is made in a process of its own, which ends by itself, after the one that died."""
    makers = [
        process
        for process in psutil.process_iter(["cmdline"])
        if token.uri in (process.info["cmdline"] or ())
    ]
    assert psutil.wait_procs(makers, timeout=GOES_ON_DEADLINE)[1] == []


async def _until_the_token_holds_what_may_sign(
    rehearsal: Rehearsal, hsm: Pkcs11Custody, strays: set[str]
) -> None:
    """Return once it holds that and `strays`, and the store knows that all else is destroyed."""
    deadline = time.monotonic() + GOES_ON_DEADLINE
    while True:
        held = set(await hsm.listed())
        kept = await rehearsal.superuser.fetch(SELECT_KEPT)
        may_sign = {key["signer"] for key in kept if not key["doomed"]}
        unknown = [key["kid"] for key in kept if key["destroyed"] != key["doomed"]]
        if (held, unknown) == (may_sign | strays, []):
            return
        assert time.monotonic() < deadline, (held - may_sign - strays, may_sign - held, unknown)
        await asyncio.sleep(0.05)


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
        case Failpoint.BEFORE_DESTROY | Failpoint.DESTROYED:
            assert KeyState.RETIRING in {key.state for key in keys}


def _assert_none_is_lost(before: list[KeyLife], after: list[KeyLife]) -> None:
    """Each key is where it was, or further on in its life; none was revoked."""
    now = {key.kid: key for key in after}
    for key in before:
        assert now[key.kid].published_at == key.published_at
        assert AGE.index(key.state) <= AGE.index(now[key.kid].state)
    assert KeyState.REVOKED not in {key.state for key in after}
