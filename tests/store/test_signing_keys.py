"""Keys in the store: each step is taken once, and what may sign no more is gone."""

import asyncio
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import TypeAlias

import asyncpg
import msgspec
import pytest
import structlog.testing

from keys.envelope import KeyEncryptionKeys, new_kek_line
from keys.keyring import KeyRing, KeyState, Prepare, RotationPolicy, Wait
from keys.signer import KeptKey, LocalCustody
from service.authority.audit import Action, AuditRecord
from service.authority.key_rotation import KeyRotator, LiveKeyRing
from service.store.audit_events import AuditEvents
from service.store.database import Database
from service.store.embedded import Running
from service.store.signing_keys import SigningKeys

pytestmark = pytest.mark.anyio

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"
MakeAct = Callable[..., AuditRecord]
OpenRing = Callable[[KeyEncryptionKeys], LiveKeyRing]


@pytest.fixture
def executor() -> Generator[Executor, None, None]:
    with ThreadPoolExecutor(1) as executor:
        yield executor


@pytest.fixture
def open_ring(signing_keys: SigningKeys, executor: Executor) -> OpenRing:
    """Make a process's ring, with its key-encryption keys."""

    def opened(keks: KeyEncryptionKeys) -> LiveKeyRing:
        return LiveKeyRing(
            store=signing_keys,
            custody=LocalCustody(lambda: keks, executor),
            read_keks=lambda: keks,
            clock=time.time,
        )

    return opened


async def states(superuser: Connection) -> dict[str, str]:
    rows = await superuser.fetch("SELECT kid, state FROM signing_keys")
    return {row["kid"]: row["state"] for row in rows}


async def steps(superuser: Connection) -> dict[str, int]:
    rows = await superuser.fetch(
        "SELECT action, count(*) AS times FROM audit_records WHERE action LIKE 'signing_key.%'"
        " GROUP BY action"
    )
    return {row["action"].removeprefix("signing_key."): row["times"] for row in rows}


# The steps, and their guards


async def test_a_key_is_published_then_signs_then_is_published_still_and_then_is_gone(
    signing_keys: SigningKeys,
    new_keys: list[KeptKey],
    policy: RotationPolicy,
    act: MakeAct,
    superuser: Connection,
    active_kid: str,
) -> None:
    old, new = new_keys[:2]
    assert active_kid == old.kid
    before = time.time()
    assert await signing_keys.prepare(new, act(Action.SIGNING_KEY_PREPARE, kid=new.kid))
    pending = KeyRing([each.key for each in await signing_keys.published_keys()]).pending
    assert pending is not None
    assert (pending.kid, pending.activated_at, pending.lifetime_cap) == (new.kid, None, None)
    assert pending.public_key == new.public_key
    assert abs(pending.published_at - before) < 5

    record = act(Action.SIGNING_KEY_ACTIVATE, kid=new.kid)
    assert not await signing_keys.activate(new.kid, old.kid, policy, record), "it is not ripe"
    at_once = msgspec.structs.replace(policy, publish_lead=0)
    assert await signing_keys.activate(new.kid, old.kid, at_once, record)
    ring = KeyRing([each.key for each in await signing_keys.published_keys()])
    assert ring.active is not None
    assert (ring.active.kid, ring.active.lifetime_cap) == (new.kid, policy.lifetime_cap)
    assert ring.active.activated_at is not None
    assert ring.active.rotate_at == pytest.approx(  # type: ignore[reportUnknownMemberType]
        ring.active.activated_at + policy.rotation_period, abs=0.01
    )
    (retiring,) = ring.retiring
    assert retiring.publish_until == pytest.approx(  # type: ignore[reportUnknownMemberType]
        ring.active.activated_at + policy.lifetime_cap + 2 * policy.clock_skew, abs=1
    )

    retire = act(Action.SIGNING_KEY_RETIRE, kid=old.kid)
    assert not await signing_keys.retire(old.kid, retire), "its last token still lives"
    await superuser.execute(
        "UPDATE signing_keys SET publish_until = now() WHERE state = 'retiring'"
    )
    assert await signing_keys.retire(old.kid, retire)
    assert not await signing_keys.retire(old.kid, retire), "it is gone already"
    assert [each.key.kid for each in await signing_keys.published_keys()] == [new.kid]
    assert await states(superuser) == {old.kid: "retired", new.kid: "active"}
    assert await steps(superuser) == {"prepare": 2, "activate": 2, "retire": 1}


async def test_a_private_half_is_destroyed_as_soon_as_its_key_signs_no_more(
    signing_keys: SigningKeys,
    new_keys: list[KeptKey],
    policy: RotationPolicy,
    act: MakeAct,
    superuser: Connection,
    active_kid: str,
) -> None:
    new = new_keys[1]
    assert await signing_keys.prepare(new, act(Action.SIGNING_KEY_PREPARE, kid=new.kid))
    at_once = msgspec.structs.replace(policy, publish_lead=0)
    assert await signing_keys.activate(
        new.kid, active_kid, at_once, act(Action.SIGNING_KEY_ACTIVATE, kid=new.kid)
    )
    sealed = {
        each.key.kid: each.kept.sealed_private for each in await signing_keys.published_keys()
    }
    assert sealed == {active_kid: None, new.kid: new.sealed_private}
    # The table itself forbids to keep one.
    with pytest.raises(asyncpg.CheckViolationError):
        await superuser.execute(
            "UPDATE signing_keys SET sealed_private = '' WHERE kid = $1", active_kid
        )


async def test_a_step_that_was_decided_on_another_state_is_not_taken(
    signing_keys: SigningKeys,
    new_keys: list[KeptKey],
    policy: RotationPolicy,
    act: MakeAct,
    superuser: Connection,
    active_kid: str,
) -> None:
    new, another = new_keys[1:3]
    record = act(Action.SIGNING_KEY_PREPARE)
    assert await signing_keys.prepare(new, record)
    before = await superuser.fetch("SELECT * FROM signing_keys ORDER BY kid")
    taken = await steps(superuser)
    assert not await signing_keys.prepare(another, act(Action.SIGNING_KEY_PREPARE))
    for kid, active in (
        (new.kid, None),
        (new.kid, another.kid),
        (another.kid, active_kid),
        (active_kid, active_kid),
    ):
        assert not await signing_keys.activate(
            kid,
            active,
            msgspec.structs.replace(policy, publish_lead=0),
            act(Action.SIGNING_KEY_ACTIVATE),
        )
    for kid in (new.kid, active_kid, another.kid):
        assert not await signing_keys.retire(kid, act(Action.SIGNING_KEY_RETIRE))
    assert await superuser.fetch("SELECT * FROM signing_keys ORDER BY kid") == before
    assert await steps(superuser) == taken


async def test_of_twenty_rotators_one_takes_each_step(
    signing_keys: SigningKeys,
    keks: KeyEncryptionKeys,
    policy: RotationPolicy,
    evidence: AuditEvents,
    executor: Executor,
    open_ring: OpenRing,
    superuser: Connection,
) -> None:
    rotators = [
        KeyRotator(
            keys=open_ring(keks),
            store=signing_keys,
            evidence=evidence,
            custody=LocalCustody(lambda: keks, executor),
            policy=policy,
            key_bits=1024,  # nothing signs here, and twenty make keys at once
            clock=time.time,
        )
        for _ in range(20)
    ]

    async def all_tick() -> list[str]:
        rests = await asyncio.gather(*(rotator.tick() for rotator in rotators))
        assert all(isinstance(rest, Wait | Prepare) for rest in rests)
        return sorted((await states(superuser)).values())

    assert await all_tick() == ["active", "pending"]
    assert await steps(superuser) == {"prepare": 2, "activate": 1}
    assert await all_tick() == ["active", "pending"], "and nothing is due again"

    await superuser.execute(
        "UPDATE signing_keys SET rotate_at = now(), published_at = now() - interval '25 hours'"
    )
    assert await all_tick() == ["active", "pending", "retiring"]
    assert await steps(superuser) == {"prepare": 3, "activate": 2}

    await superuser.execute(
        "UPDATE signing_keys SET publish_until = now() WHERE state = 'retiring'"
    )
    assert await all_tick() == ["active", "pending", "retired"]
    assert await steps(superuser) == {"prepare": 3, "activate": 2, "retire": 1}


# K1: keys that do not open


async def test_a_ring_signs_with_what_its_kek_opens(
    open_ring: OpenRing, keks: KeyEncryptionKeys, active_kid: str
) -> None:
    keys = open_ring(keks)
    assert not keys.loaded
    ring = await keys.fresh()
    assert ring.active is not None
    assert ring.active.signer is not None
    assert len(await ring.active.signer.sign(b"data")) == 256
    assert keys.loaded
    assert await keys.cached() is ring
    again = await keys.fresh()
    assert again.active is not None
    assert again.active.signer is ring.active.signer, "a key is opened once"
    assert active_kid in again.published


async def test_a_wrong_kek_publishes_nothing_signs_nothing_and_alarms(
    open_ring: OpenRing, active_kid: str
) -> None:
    keys = open_ring(KeyEncryptionKeys.parse(new_kek_line()))
    with structlog.testing.capture_logs() as logs:
        ring = await keys.fresh()
    assert ring.active is not None
    assert ring.active.signer is None
    assert list(ring.published) == []
    (alarm,) = logs
    assert (alarm["event"], alarm["log_level"]) == ("signing_key_not_attested", "error")
    assert (alarm["kid"], alarm["state"]) == (active_kid, KeyState.ACTIVE)
    assert "sealed under the key-encryption key" in alarm["error"]


async def test_sealed_halves_that_were_swapped_or_changed_in_the_table_open_nothing(
    open_ring: OpenRing,
    keks: KeyEncryptionKeys,
    signing_keys: SigningKeys,
    new_keys: list[KeptKey],
    act: MakeAct,
    active_kid: str,
    superuser: Connection,
) -> None:
    assert await signing_keys.prepare(new_keys[1], act(Action.SIGNING_KEY_PREPARE))
    for change in (
        "UPDATE signing_keys k SET sealed_private ="
        " (SELECT sealed_private FROM signing_keys o WHERE o.kid <> k.kid)",
        "UPDATE signing_keys SET sealed_private = set_bit(sealed_private, 200,"
        " 1 - get_bit(sealed_private, 200))",
    ):
        await superuser.execute(change)
        ring = await open_ring(keks).fresh()
        assert ring.active is not None
        assert ring.pending is not None
        assert (ring.active.signer, ring.pending.signer) == (None, None)
        await superuser.execute(change)  # each undoes itself
        restored = (await open_ring(keks).fresh()).active
        assert restored is not None
        assert restored.signer is not None
        assert restored.kid == active_kid


def run_command(command: str, database: Running, kek_file: Path, tmp_path: Path) -> tuple[int, str]:
    finished = subprocess.run(
        [sys.executable, "-c", "from service.cli import main; main()", *command.split()],
        env={
            "PATH": "/usr/bin:/bin",
            "PYTHONPATH": ":".join(sys.path),
            "PRIVYSEAL_DATA_DIR": str(tmp_path),
            "PRIVYSEAL_DATABASE_URL": database.service_dsn.reveal(),
            "PRIVYSEAL_KEK_FILE": str(kek_file),
            "PRIVYSEAL_CHECKPOINT_DIR": str(tmp_path / "checkpoints"),
        },
        capture_output=True,
        text=True,
        timeout=30,
    )
    return finished.returncode, finished.stdout + finished.stderr


def test_serve_refuses_a_wrong_kek_in_words(
    database: Running, tmp_path: Path, new_keys: list[KeptKey], act: MakeAct
) -> None:
    asyncio.run(publish(database, new_keys[0], act(Action.SIGNING_KEY_PREPARE)))
    kek_file, line = tmp_path / "kek", new_kek_line()
    kek_file.write_text(line + "\n")
    status, said = run_command("serve --port 1", database, kek_file, tmp_path)
    assert status == 1
    sealed = new_keys[0].sealed_private
    assert sealed is not None
    assert "The pending signing key is not published" in said
    assert (
        f"key {new_keys[0].kid} is sealed under the key-encryption key {sealed[:8].hex()}" in said
    )
    assert line not in said
    assert "Traceback" not in said


async def publish(database: Running, key: KeptKey, record: AuditRecord) -> None:
    async with Database(database.service_dsn, application_name="test") as pool:
        assert await SigningKeys(pool, clock_skew=60).prepare(key, record)
