"""Keys in the store when operators act on them: rotated early, revoked, revoked all, rewrapped."""

import asyncio
import io
import re
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import TypeAlias

import asyncpg
import msgspec
import pytest

from keys.attestation import attest, require_attested
from keys.envelope import EnvelopeError, KekReader, KeyEncryptionKeys, new_kek_line
from keys.keyring import KeyRing, KeyState, RotationPolicy, SigningKey, Wait
from keys.signer import KeptKey, LocalCustody, generate, unseal
from service.app import kek_reader
from service.authority.audit import Action, AuditLog, AuditRecord
from service.authority.key_rotation import KeyRotator, LiveKeyRing
from service.authority.model import ServiceUser, Subject
from service.store.audit_events import AuditEvents
from service.store.embedded import Running
from service.store.service_users import as_json
from service.store.signing_keys import SigningKeys

pytestmark = pytest.mark.anyio

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"
MakeAct = Callable[..., AuditRecord]
MakeRotator = Callable[..., KeyRotator]
HOUR = 3600.0


@pytest.fixture
def rotator(
    signing_keys: SigningKeys,
    evidence: AuditEvents,
    keks: KeyEncryptionKeys,
    policy: RotationPolicy,
) -> Generator[MakeRotator, None, None]:
    """Make a process's rotator; its clock and its key-encryption keys as given."""
    with ThreadPoolExecutor(1) as executor:

        def made(
            clock: Callable[[], float] = time.time, read_keks: KekReader = lambda: keks
        ) -> KeyRotator:
            keys = LiveKeyRing(
                store=signing_keys,
                custody=LocalCustody(read_keks, executor),
                read_keks=read_keks,
                clock=clock,
            )
            return KeyRotator(
                keys=keys,
                store=signing_keys,
                evidence=evidence,
                custody=LocalCustody(read_keks, executor),
                policy=policy,
                key_bits=1024,  # nothing signs here, and many are made
                clock=clock,
            )

        yield made


@pytest.fixture
async def next_kid(
    signing_keys: SigningKeys, new_keys: list[KeptKey], act: MakeAct, active_kid: str
) -> str:
    """The kid of a key that was published just now, beside the one that signs."""
    assert new_keys[0].kid == active_kid
    assert await signing_keys.prepare(new_keys[1], act(Action.SIGNING_KEY_PREPARE))
    return new_keys[1].kid


@pytest.fixture
async def retiring_kid(
    signing_keys: SigningKeys,
    new_keys: list[KeptKey],
    policy: RotationPolicy,
    act: MakeAct,
    next_kid: str,
    active_kid: str,
) -> str:
    """The kid of a key that signed until now; one signs and one stands ready beside it."""
    at_once = msgspec.structs.replace(policy, publish_lead=0)
    record = act(Action.SIGNING_KEY_ACTIVATE)
    assert await signing_keys.activate(next_kid, active_kid, at_once, record)
    assert await signing_keys.prepare(new_keys[2], act(Action.SIGNING_KEY_PREPARE))
    return active_kid


async def ring_of(signing_keys: SigningKeys) -> KeyRing:
    return KeyRing([stored.key for stored in await signing_keys.published_keys()])


async def key_in(signing_keys: SigningKeys, state: KeyState) -> SigningKey:
    (key,) = (key for key in (await ring_of(signing_keys)).keys if key.state is state)
    return key


async def states(superuser: Connection) -> dict[str, str]:
    rows = await superuser.fetch("SELECT kid, state FROM signing_keys")
    return {row["kid"]: row["state"] for row in rows}


async def count(superuser: Connection, action: Action) -> int:
    return await superuser.fetchval(
        "SELECT count(*) FROM audit_records WHERE action = $1", action.value
    )


def everything(superuser: Connection) -> Awaitable[list[asyncpg.Record]]:
    return superuser.fetch("SELECT * FROM signing_keys ORDER BY kid")


# Rotate early


async def test_a_hastened_rotation_happens_when_the_next_key_is_ripe_and_not_before(
    signing_keys: SigningKeys,
    policy: RotationPolicy,
    rotator: MakeRotator,
    act: MakeAct,
    superuser: Connection,
    active_kid: str,
    next_kid: str,
) -> None:
    process = rotator()
    assert await signing_keys.hasten_rotation(active_kid, act(Action.SIGNING_KEY_ROTATE))
    pending = await key_in(signing_keys, KeyState.PENDING)
    ripe_at = pending.published_at + policy.publish_lead
    assert await process.tick() == Wait(until=ripe_at)
    assert await states(superuser) == {active_kid: "active", next_kid: "pending"}

    await superuser.execute(
        "UPDATE signing_keys SET published_at = clock_timestamp() - $1::interval"
        " WHERE state = 'pending'",
        timedelta(seconds=policy.publish_lead - 1),
    )
    rest = await process.tick()
    assert await states(superuser) == {active_kid: "active", next_kid: "pending"}
    assert isinstance(rest, Wait)
    await asyncio.sleep(rest.until - time.time() + 0.01)
    await process.tick()
    found = await states(superuser)
    assert (found[active_kid], found[next_kid]) == ("retiring", "active")
    active = await key_in(signing_keys, KeyState.ACTIVE)
    assert active.activated_at is not None
    assert policy.publish_lead <= active.activated_at - active.published_at
    assert active.activated_at - active.published_at < policy.publish_lead + 1


async def test_to_hasten_a_rotation_twice_is_to_hasten_it_once(
    signing_keys: SigningKeys, act: MakeAct, superuser: Connection, active_kid: str, next_kid: str
) -> None:
    assert await signing_keys.hasten_rotation(active_kid, act(Action.SIGNING_KEY_ROTATE))
    once = await everything(superuser)
    assert await signing_keys.hasten_rotation(active_kid, act(Action.SIGNING_KEY_ROTATE))
    assert await everything(superuser) == once
    assert await count(superuser, Action.SIGNING_KEY_ROTATE) == 2
    assert (await key_in(signing_keys, KeyState.PENDING)).kid == next_kid


async def test_only_the_rotation_away_from_the_key_that_signs_can_be_hastened(
    signing_keys: SigningKeys, act: MakeAct, superuser: Connection, retiring_kid: str
) -> None:
    before = await everything(superuser)
    pending = await key_in(signing_keys, KeyState.PENDING)
    for kid in (retiring_kid, pending.kid, "k" * 43):
        assert not await signing_keys.hasten_rotation(kid, act(Action.SIGNING_KEY_ROTATE))
    assert await everything(superuser) == before
    assert await count(superuser, Action.SIGNING_KEY_ROTATE) == 0


async def test_k5_a_process_whose_clock_is_an_hour_ahead_lets_no_key_sign_early(
    signing_keys: SigningKeys,
    policy: RotationPolicy,
    rotator: MakeRotator,
    act: MakeAct,
    superuser: Connection,
    active_kid: str,
    next_kid: str,
) -> None:
    assert await signing_keys.hasten_rotation(active_kid, act(Action.SIGNING_KEY_ROTATE))
    half_an_hour_left = timedelta(seconds=policy.publish_lead - HOUR / 2)
    await superuser.execute(
        "UPDATE signing_keys SET published_at = clock_timestamp() - $1::interval"
        " WHERE state = 'pending'",
        half_an_hour_left,
    )
    for off_by in (HOUR, -HOUR):
        await rotator(lambda off_by=off_by: time.time() + off_by).tick()
        assert await states(superuser) == {active_kid: "active", next_kid: "pending"}


async def test_a_clock_that_is_set_back_does_not_hide_what_the_store_holds(
    signing_keys: SigningKeys, keks: KeyEncryptionKeys, act: MakeAct, active_kid: str
) -> None:
    ahead = iter([HOUR, 0.0])
    with ThreadPoolExecutor(1) as executor:
        keys = LiveKeyRing(
            store=signing_keys,
            custody=LocalCustody(lambda: keks, executor),
            read_keks=lambda: keks,
            clock=lambda: time.time() + next(ahead),
        )
        assert list((await keys.fresh()).published) == [active_kid]
        following = generate(1024, keks)
        assert await signing_keys.prepare(following, act(Action.SIGNING_KEY_PREPARE))
        assert set((await keys.fresh()).published) == {active_kid, following.kid}


# Revoke one


async def test_a_revoked_active_key_is_followed_by_the_next_one_in_the_same_transaction(
    signing_keys: SigningKeys,
    policy: RotationPolicy,
    act: MakeAct,
    superuser: Connection,
    active_kid: str,
    next_kid: str,
) -> None:
    active = await key_in(signing_keys, KeyState.ACTIVE)
    assert await signing_keys.revoke(active, policy, act(Action.SIGNING_KEY_REVOKE))
    assert await states(superuser) == {active_kid: "revoked", next_kid: "active"}
    assert await superuser.fetchval("SELECT count(DISTINCT xmin::text) FROM signing_keys") == 1
    promoted = await key_in(signing_keys, KeyState.ACTIVE)
    assert promoted.activated_at is not None
    assert promoted.activated_at - promoted.published_at < 60, "it was not ripe"
    assert promoted.lifetime_cap == policy.lifetime_cap
    assert promoted.rotate_at == pytest.approx(  # type: ignore[reportUnknownMemberType]
        promoted.activated_at + policy.rotation_period, abs=0.01
    )
    (gone,) = await superuser.fetch("SELECT * FROM signing_keys WHERE state = 'revoked'")
    assert gone["sealed_private"] is None
    assert gone["ended_at"] is not None
    assert [key.kid for key in (await ring_of(signing_keys)).keys] == [next_kid]


async def test_a_key_revoked_while_none_stood_ready_is_replaced_at_the_next_tick(
    signing_keys: SigningKeys,
    policy: RotationPolicy,
    rotator: MakeRotator,
    act: MakeAct,
    superuser: Connection,
    active_kid: str,
) -> None:
    active = await key_in(signing_keys, KeyState.ACTIVE)
    assert await signing_keys.revoke(active, policy, act(Action.SIGNING_KEY_REVOKE))
    assert await states(superuser) == {active_kid: "revoked"}
    await rotator().tick()
    assert sorted((await states(superuser)).values()) == ["active", "pending", "revoked"]


@pytest.mark.parametrize("state", [KeyState.PENDING, KeyState.RETIRING])
async def test_revoking_a_key_that_does_not_sign_leaves_the_others_alone(
    signing_keys: SigningKeys,
    policy: RotationPolicy,
    act: MakeAct,
    superuser: Connection,
    retiring_kid: str,
    state: KeyState,
) -> None:
    key = await key_in(signing_keys, state)
    others = "SELECT * FROM signing_keys WHERE kid <> $1 ORDER BY kid"
    before, kids = await superuser.fetch(others, key.kid), await states(superuser)
    assert await signing_keys.revoke(key, policy, act(Action.SIGNING_KEY_REVOKE))
    assert await superuser.fetch(others, key.kid) == before
    assert await states(superuser) == {**kids, key.kid: "revoked"}
    assert key.kid not in (await ring_of(signing_keys)).published
    assert retiring_kid in kids


async def test_a_revocation_that_was_decided_on_another_state_does_nothing(
    signing_keys: SigningKeys,
    policy: RotationPolicy,
    act: MakeAct,
    superuser: Connection,
    retiring_kid: str,
) -> None:
    before = await everything(superuser)
    for key in (await ring_of(signing_keys)).keys:
        for state in set(KeyState) - {key.state}:
            wrongly = msgspec.structs.replace(key, state=state)
            assert not await signing_keys.revoke(wrongly, policy, act(Action.SIGNING_KEY_REVOKE))
    assert await everything(superuser) == before
    assert await count(superuser, Action.SIGNING_KEY_REVOKE) == 0
    retiring = await key_in(signing_keys, KeyState.RETIRING)
    assert retiring.kid == retiring_kid
    assert await signing_keys.revoke(retiring, policy, act(Action.SIGNING_KEY_REVOKE))
    assert not await signing_keys.revoke(retiring, policy, act(Action.SIGNING_KEY_REVOKE))


async def test_p2_no_token_of_a_revoked_key_is_recorded_once_the_revocation_returned(
    signing_keys: SigningKeys,
    policy: RotationPolicy,
    act: MakeAct,
    superuser: Connection,
    log: AuditLog,
    issuance: Callable[..., AuditRecord],
    active_kid: str,
    next_kid: str,
) -> None:
    returned = False
    recorded_after = 0
    under_way = asyncio.Event()

    async def issue_until_refused() -> int:
        nonlocal recorded_after
        issued = 0
        while True:
            begun_after = returned
            if not await log.append(issuance(kid=active_kid)):
                return issued
            recorded_after += begun_after
            issued += 1
            under_way.set()

    clients = [asyncio.create_task(issue_until_refused()) for _ in range(8)]
    await asyncio.wait_for(under_way.wait(), 10)
    await asyncio.sleep(0.2)
    active = await key_in(signing_keys, KeyState.ACTIVE)
    assert await signing_keys.revoke(active, policy, act(Action.SIGNING_KEY_REVOKE))
    returned = True
    assert sum(await asyncio.wait_for(asyncio.gather(*clients), 10)) > 0
    assert recorded_after == 0
    assert not await log.append(issuance(kid=active_kid))
    assert await log.append(issuance(kid=next_kid))
    late = (
        "SELECT count(*) FROM audit_records JOIN signing_keys USING (kid)"
        " WHERE action = 'token.issue' AND recorded_at > ended_at"
    )
    assert await superuser.fetchval(late) == 0


async def test_k4_of_twenty_revocations_that_race_with_rotators_one_wins(
    signing_keys: SigningKeys,
    policy: RotationPolicy,
    rotator: MakeRotator,
    act: MakeAct,
    superuser: Connection,
    active_kid: str,
    next_kid: str,
) -> None:
    active = await key_in(signing_keys, KeyState.ACTIVE)

    async def revoke() -> bool:
        return await signing_keys.revoke(active, policy, act(Action.SIGNING_KEY_REVOKE))

    async def tick() -> bool:
        await rotator().tick()
        return False

    acts = [*(revoke() for _ in range(20)), *(tick() for _ in range(10))]
    assert sum(await asyncio.gather(*acts)) == 1
    await tick()
    found = await states(superuser)
    assert (found[active_kid], found[next_kid]) == ("revoked", "active")
    assert sorted(found.values()) == ["active", "pending", "revoked"]
    assert await count(superuser, Action.SIGNING_KEY_REVOKE) == 1


async def test_k4_a_revocation_and_a_rotation_of_the_same_key_do_not_both_happen(
    signing_keys: SigningKeys,
    policy: RotationPolicy,
    act: MakeAct,
    superuser: Connection,
    active_kid: str,
    next_kid: str,
) -> None:
    active = await key_in(signing_keys, KeyState.ACTIVE)
    at_once = msgspec.structs.replace(policy, publish_lead=0)
    racing = [
        signing_keys.revoke(active, policy, act(Action.SIGNING_KEY_REVOKE)),
        signing_keys.activate(next_kid, active_kid, at_once, act(Action.SIGNING_KEY_ACTIVATE)),
    ]
    revoked, activated = await asyncio.gather(*racing)
    assert revoked is not activated
    found = await states(superuser)
    assert found == {active_kid: "revoked" if revoked else "retiring", next_kid: "active"}


# Revoke all


async def test_k9_revoke_all_leaves_two_new_keys_and_nothing_that_the_old_kek_opens(
    signing_keys: SigningKeys,
    keks: KeyEncryptionKeys,
    policy: RotationPolicy,
    act: MakeAct,
    superuser: Connection,
    retiring_kid: str,
) -> None:
    old = {key.kid for key in (await ring_of(signing_keys)).keys}
    assert retiring_kid in old
    assert len(old) == 3
    new_keks = KeyEncryptionKeys.parse(new_kek_line())
    signing, following = generate(2048, new_keks), generate(2048, new_keks)
    record = act(Action.SIGNING_KEY_REVOKE_ALL)
    for too_few in (set[str](), old - {retiring_kid}):
        assert not await signing_keys.revoke_all(
            sorted(too_few), signing, following, policy, record
        ), "another key is published than it was decided on"
    assert {key.kid for key in (await ring_of(signing_keys)).keys} == old
    assert await count(superuser, Action.SIGNING_KEY_REVOKE_ALL) == 0
    assert await signing_keys.revoke_all(sorted(old), signing, following, policy, record)
    ring = await ring_of(signing_keys)
    assert [(key.kid, key.state) for key in sorted(ring.keys, key=lambda key: key.state)] == [
        (signing.kid, KeyState.ACTIVE),
        (following.kid, KeyState.PENDING),
    ]
    found = await states(superuser)
    assert {kid for kid, state in found.items() if state == "revoked"} == old
    assert set(await opened(superuser, new_keks)) == {signing.kid, following.kid}
    assert await opened(superuser, keks) == []


async def test_k4_of_revoke_alls_that_race_each_leaves_one_key_that_signs_and_one_that_follows(
    signing_keys: SigningKeys,
    keks: KeyEncryptionKeys,
    policy: RotationPolicy,
    act: MakeAct,
    superuser: Connection,
    rotator: MakeRotator,
    next_kid: str,
) -> None:
    pairs = [(generate(1024, keks), generate(1024, keks)) for _ in range(6)]

    async def revoke_all(signing: KeptKey, following: KeptKey) -> frozenset[str] | None:
        kids = [key.kid for key in (await ring_of(signing_keys)).keys]
        record = act(Action.SIGNING_KEY_REVOKE_ALL)
        done = await signing_keys.revoke_all(kids, signing, following, policy, record)
        return frozenset({signing.kid, following.kid}) if done else None

    async def tick() -> None:
        await rotator().tick()

    done, _ = await asyncio.gather(
        asyncio.gather(*(revoke_all(*pair) for pair in pairs)),
        asyncio.gather(*(tick() for _ in range(6))),
    )
    won = set(filter(None, done))
    assert won
    assert await count(superuser, Action.SIGNING_KEY_REVOKE_ALL) == len(won)
    left = {kid: state for kid, state in (await states(superuser)).items() if state != "revoked"}
    assert frozenset(left) in won
    assert sorted(left.values()) == ["active", "pending"]
    assert next_kid not in left


# Who holds tokens


async def test_holders_are_counted_with_the_end_of_their_last_token(
    signing_keys: SigningKeys,
    log: AuditLog,
    issuance: Callable[..., AuditRecord],
    holder: Subject,
    put: Callable[..., Awaitable[Subject]],
    new_user: Callable[..., ServiceUser],
    active_kid: str,
    next_kid: str,
) -> None:
    other = (await put(new_user("branch-scan"))).service_user
    assert other is not None
    assert holder.service_user is not None
    assert await signing_keys.holders([active_kid]) == []
    now = int(time.time())
    of_other = {
        "service_user_id": other.id,
        "service_user": other.name,
        "version": 2,
        "credential_id": None,
    }
    for fields in (
        {"exp": now + 600},
        {"exp": now + 1200},
        {"iat": now - 50, "exp": now - 10},  # it has ended
        {"exp": now + 300, **of_other},
    ):
        assert await log.append(issuance(**{"iat": now, **fields}))
    found = await signing_keys.holders([active_kid, next_kid])
    assert [
        (each.service_user_id, each.service_user, each.count, each.last_ends_at.timestamp() - now)
        for each in found
    ] == [
        (other.id, "branch-scan", 1, 300),
        (holder.service_user.id, "vkyc-prod", 2, 1200),
    ]
    assert await signing_keys.holders([next_kid]) == []


# What a dump yields


async def dump(superuser: Connection) -> str:
    """Every table of ours as COPY writes it."""
    text = io.BytesIO()
    tables = "SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY 1"
    for row in await superuser.fetch(tables):
        await superuser.copy_from_query(f'SELECT * FROM "{row["tablename"]}"', output=text)
    return text.getvalue().decode()


async def opened(superuser: Connection, keks: KeyEncryptionKeys) -> Sequence[str]:
    """The kids whose private half a thief of a dump and of the key-encryption keys gets."""
    found: list[str] = []
    text = await dump(superuser)
    for kid in await states(superuser):
        for sealed in map(bytes.fromhex, re.findall(r"\\\\x([0-9a-f]+)", text)):
            try:
                keks.unseal(sealed, purpose="signing-key", kid=kid)
            except EnvelopeError:
                continue
            found.append(kid)
    return found


async def test_a_dump_and_the_kek_yield_no_key_that_signs_no_more(
    signing_keys: SigningKeys,
    keks: KeyEncryptionKeys,
    policy: RotationPolicy,
    act: MakeAct,
    superuser: Connection,
    new_keys: list[KeptKey],
    active_kid: str,
    next_kid: str,
) -> None:
    assert set(await opened(superuser, keks)) == {active_kid, next_kid}
    at_once = msgspec.structs.replace(policy, publish_lead=0)
    record = act(Action.SIGNING_KEY_ACTIVATE)
    assert await signing_keys.activate(next_kid, active_kid, at_once, record)
    assert await opened(superuser, keks) == [next_kid], "retiring"
    await superuser.execute("UPDATE signing_keys SET publish_until = now() WHERE state='retiring'")
    assert await signing_keys.retire(active_kid, act(Action.SIGNING_KEY_RETIRE))
    assert await opened(superuser, keks) == [next_kid], "retired"
    for number in (2, 3):
        assert await signing_keys.prepare(new_keys[number], act(Action.SIGNING_KEY_PREPARE))
        active = await key_in(signing_keys, KeyState.ACTIVE)
        assert await signing_keys.revoke(active, policy, act(Action.SIGNING_KEY_REVOKE))
        assert await opened(superuser, keks) == [new_keys[number].kid], "revoked"


# Key-encryption keys


async def test_a_ring_opens_what_a_changed_kek_file_opens_without_a_restart(
    signing_keys: SigningKeys, act: MakeAct, tmp_path: Path, rotator: MakeRotator
) -> None:
    kek_file, old, new = tmp_path / "kek", new_kek_line(), new_kek_line()
    kek_file.write_text(old)
    process = rotator(read_keks=kek_reader(kek_file))
    elsewhere = generate(1024, KeyEncryptionKeys.parse(new))
    assert await signing_keys.prepare(elsewhere, act(Action.SIGNING_KEY_PREPARE))

    with ThreadPoolExecutor(1) as executor:
        keys = LiveKeyRing(
            store=signing_keys,
            custody=LocalCustody(kek_reader(kek_file), executor),
            read_keks=kek_reader(kek_file),
            clock=time.time,
        )
        pending = (await keys.fresh()).pending
        assert pending is not None
        assert pending.signer is None
        kek_file.write_text(f"{new}\n{old}\n")
        pending = (await keys.fresh()).pending
        assert pending is not None
        assert pending.signer is not None

    await process.tick()
    made = await key_in(signing_keys, KeyState.PENDING)
    (sealed,) = (
        stored.kept.sealed_private
        for stored in await signing_keys.published_keys()
        if stored.key.kid == made.kid
    )
    assert sealed is not None
    assert KeyEncryptionKeys.parse(new).seals(sealed), "the first key of the file seals"


class Rewrap:
    """`privyseal keys rewrap` with a KEK_FILE of its own."""

    def __init__(self, database: Running, kek_file: Path) -> None:
        self.kek_file = kek_file
        self.environ = {
            "PATH": "/usr/bin:/bin",
            "PYTHONPATH": ":".join(sys.path),
            "PRIVYSEAL_DATA_DIR": str(kek_file.parent),
            "PRIVYSEAL_DATABASE_URL": database.service_dsn.reveal(),
            "PRIVYSEAL_KEK_FILE": str(kek_file),
        }

    def start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            (sys.executable, "-c", "from service.cli import main; main()", "keys", "rewrap"),
            env=self.environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    async def run(self) -> tuple[int, str, str]:
        process = self.start()
        said, complained = await asyncio.to_thread(process.communicate, timeout=30)
        return process.returncode, said, complained


@pytest.fixture
def rewrap(database: Running, tmp_path: Path) -> Rewrap:
    return Rewrap(database, tmp_path / "kek")


async def test_k2_rewrap_killed_at_any_row_leaves_every_key_open_and_resumes(
    signing_keys: SigningKeys,
    act: MakeAct,
    superuser: Connection,
    policy: RotationPolicy,
    rewrap: Rewrap,
) -> None:
    old, new = new_kek_line(), new_kek_line()
    before, after = KeyEncryptionKeys.parse(old), KeyEncryptionKeys.parse(new)
    both = KeyEncryptionKeys.parse(f"{new}\n{old}")
    rewrap.kek_file.write_text(f"{new}\n{old}\n")
    active, pending = generate(2048, before), generate(2048, before)
    assert await signing_keys.prepare(active, act(Action.SIGNING_KEY_PREPARE))
    record = act(Action.SIGNING_KEY_ACTIVATE)
    assert await signing_keys.activate(active.kid, None, policy, record)
    assert await signing_keys.prepare(pending, act(Action.SIGNING_KEY_PREPARE))

    # As the owner of the table might find it: the row after the nth hangs, and there it is killed.
    await superuser.execute(f"""
        CREATE FUNCTION hang() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            IF TG_ARGV[0]::integer <= (SELECT count(*) FROM signing_keys WHERE
                substr(sealed_private, 1, 8) <> '\\x{before_fingerprint(active)}') THEN
                PERFORM pg_sleep(4);
                RAISE EXCEPTION 'never done';
            END IF;
            RETURN NEW;
        END $$""")
    for done in range(2):
        await superuser.execute(
            "CREATE OR REPLACE TRIGGER hang BEFORE UPDATE ON signing_keys"
            f" FOR EACH ROW EXECUTE FUNCTION hang({done})"
        )
        process = rewrap.start()
        try:
            await until_hanging(superuser)
        finally:
            process.kill()
            said, _ = process.communicate()
        await superuser.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE application_name = 'privyseal rewrap'"
        )
        assert len(said.splitlines()) == done
        await every_key_opens(signing_keys, both)
        assert len(await opened(superuser, after)) == done
        assert len(await opened(superuser, before)) == 2 - done
    await superuser.execute("DROP TRIGGER hang ON signing_keys")

    status, said, _ = await rewrap.run()
    assert status == 0
    assert sorted(line.split("  ", 2)[2] for line in said.splitlines()) == [
        "is under the first key already",
        "rewrapped",
    ]
    assert [line[:6] for line in said.splitlines()] == ["1 of 2", "2 of 2"]
    await every_key_opens(signing_keys, after)
    assert await opened(superuser, before) == []


def before_fingerprint(key: KeptKey) -> str:
    assert key.sealed_private is not None
    return key.sealed_private[:8].hex()


async def until_hanging(superuser: Connection) -> None:
    hanging = (
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'privyseal rewrap'"
        " AND wait_event = 'PgSleep'"
    )
    async with asyncio.timeout(20):
        while not await superuser.fetchval(hanging):  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def every_key_opens(signing_keys: SigningKeys, keks: KeyEncryptionKeys) -> None:
    stored = await signing_keys.published_keys()
    assert len(stored) == 2
    for each in stored:
        assert unseal(each.kept, keks)
        require_attested(each.key.kid, each.key.public_key, each.kept.attestation, keks)


async def test_k1_rewrap_without_the_old_kek_says_so_and_changes_nothing(
    superuser: Connection, active_kid: str, next_kid: str, rewrap: Rewrap
) -> None:
    before = await everything(superuser)
    line = new_kek_line()
    rewrap.kek_file.write_text(line)
    status, said, complained = await rewrap.run()
    assert status == 1
    assert [line.split("  ")[2] for line in said.splitlines()] == ["does not open"] * 2
    assert "is sealed under the key-encryption key" in complained
    assert "add that one to the file" in complained
    assert "Traceback" not in complained
    assert line not in complained
    assert await everything(superuser) == before
    assert active_kid in complained or next_kid in complained


async def test_rewrap_that_left_a_key_as_it_was_is_no_success(
    superuser: Connection, keks: KeyEncryptionKeys, next_kid: str, rewrap: Rewrap
) -> None:
    (row,) = await superuser.fetch(
        "SELECT sealed_private FROM signing_keys WHERE kid = $1", next_kid
    )
    old, new = new_kek_line(), new_kek_line()
    rewrap.kek_file.write_text(f"{new}\n{old}\n")
    der = keks.unseal(row["sealed_private"], purpose="signing-key", kid=next_kid)
    await superuser.execute("DELETE FROM signing_keys WHERE kid <> $1", next_kid)
    await superuser.execute(
        "UPDATE signing_keys SET sealed_private = $1, attestation = $2",
        KeyEncryptionKeys.parse(old).seal(der, purpose="signing-key", kid=next_kid),
        attest(next_kid, KeyEncryptionKeys.parse(old)),
    )
    # Each row changes under its hands.
    await superuser.execute(
        "CREATE FUNCTION skip() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';"
        " CREATE TRIGGER skip BEFORE UPDATE ON signing_keys FOR EACH ROW EXECUTE FUNCTION skip()"
    )
    status, said, complained = await rewrap.run()
    assert (status, said) == (1, f"1 of 1  {next_kid}  changed meanwhile\n")
    assert "run this again" in complained


async def test_a_sealed_half_is_replaced_only_while_it_is_what_was_read(
    signing_keys: SigningKeys,
    superuser: Connection,
    policy: RotationPolicy,
    act: MakeAct,
    new_keys: list[KeptKey],
    active_kid: str,
    next_kid: str,
) -> None:
    key, following = new_keys[0], new_keys[1]
    record = act(Action.SIGNING_KEY_REWRAP)
    anew = msgspec.structs.replace(following, sealed_private=b"resealed", attestation=b"anew")
    for before in (
        msgspec.structs.replace(following, sealed_private=b"something else"),
        msgspec.structs.replace(following, sealed_private=key.sealed_private),
        msgspec.structs.replace(following, attestation=key.attestation),
        msgspec.structs.replace(following, kid=active_kid),
    ):
        assert not await signing_keys.reseal(before, anew, record)
    active = await key_in(signing_keys, KeyState.ACTIVE)
    assert await signing_keys.revoke(active, policy, act(Action.SIGNING_KEY_REVOKE))
    assert not await signing_keys.reseal(key, key, record), "back from the dead"
    assert await superuser.fetchval("SELECT count(sealed_private) FROM signing_keys") == 1
    assert await count(superuser, Action.SIGNING_KEY_REWRAP) == 0
    assert await signing_keys.reseal(following, anew, record)
    assert await count(superuser, Action.SIGNING_KEY_REWRAP) == 1


async def test_rewrap_leaves_no_attestation_under_the_old_kek_and_none_that_is_not_ours(
    signing_keys: SigningKeys,
    superuser: Connection,
    act: MakeAct,
    retiring_kid: str,
    rewrap: Rewrap,
    keks: KeyEncryptionKeys,
) -> None:
    old, new = new_kek_line(), new_kek_line()
    before, after = KeyEncryptionKeys.parse(old), KeyEncryptionKeys.parse(new)
    rewrap.kek_file.write_text(f"{new}\n{old}\n")
    # One that signs no more, one as an HSM keeps it, and one that somebody else put there.
    await superuser.execute("UPDATE signing_keys SET sealed_private = NULL")
    stored = {each.key.kid: each.key.state for each in await signing_keys.published_keys()}
    (foreign,) = (kid for kid, state in stored.items() if state is KeyState.PENDING)
    for kid in stored.keys() - {foreign}:
        await superuser.execute(
            "UPDATE signing_keys SET attestation = $2 WHERE kid = $1", kid, attest(kid, before)
        )
    status, said, complained = await rewrap.run()
    assert (status, said.count("rewrapped"), said.count("does not open")) == (1, 2, 1)
    assert foreign in complained
    for each in await signing_keys.published_keys():
        if each.key.kid != foreign:
            require_attested(each.key.kid, each.key.public_key, each.kept.attestation, after)
    assert retiring_kid in stored
    record = act(Action.SIGNING_KEY_REVOKE)
    assert await superuser.fetchval(
        "SELECT revoke_key_1($1, 'pending', 3600, '1 day', $2, 60)", foreign, as_json(record)
    )
    status, said, complained = await rewrap.run()
    assert (status, said.count("is under the first key already"), complained) == (0, 2, "")


# What the service's password alone may not do


async def test_no_act_on_a_key_happens_without_a_record_that_names_it(
    signing_keys: SigningKeys,
    superuser: Connection,
    connect_as: Callable[[str], Awaitable[Connection]],
    policy: RotationPolicy,
    act: MakeAct,
    new_keys: list[KeptKey],
    active_kid: str,
) -> None:
    before = await everything(superuser)
    thief = await connect_as("service")
    for record in ("{}", '{"repeats": 0}', '{"repeats": 1, "outcome": "refused"}'):
        for call in (
            f"SELECT revoke_key_1('{active_kid}', 'active', 900, '1 day', $1, 60)",
            f"SELECT hasten_rotation_1('{active_kid}', $1, 60)",
            'SELECT prepare_key_1(\'{"kid": "x", "attestation": "y"}\', $1, 60)',
        ):
            with pytest.raises(asyncpg.PostgresError, match="needs a record"):
                await thief.execute(call.replace("$1", f"'{record}'"))
    assert await everything(superuser) == before
    # Whatever a caller writes into it: the record says what was done, and to which key.
    record = act(Action.AUDIT_QUERY, kid=new_keys[3].kid)
    assert await signing_keys.prepare(new_keys[1], record)
    written = await superuser.fetchrow(
        "SELECT action, kid FROM audit_records WHERE id = $1", record.id
    )
    assert written is not None
    assert tuple(written) == ("signing_key.prepare", new_keys[1].kid)


async def test_a_release_was_given_for_one_next_key_and_not_for_the_one_after_it(
    signing_keys: SigningKeys,
    policy: RotationPolicy,
    act: MakeAct,
    active_kid: str,
    next_kid: str,
) -> None:
    assert await signing_keys.hasten_rotation(active_kid, act(Action.SIGNING_KEY_ROTATE))
    assert (await key_in(signing_keys, KeyState.ACTIVE)).released_at is not None
    pending = await key_in(signing_keys, KeyState.PENDING)
    assert pending.kid == next_kid
    assert await signing_keys.revoke(pending, policy, act(Action.SIGNING_KEY_REVOKE))
    assert (await key_in(signing_keys, KeyState.ACTIVE)).released_at is None


async def test_while_one_process_makes_a_key_no_other_does_and_the_partitions_go_on(
    signing_keys: SigningKeys, connect_as: Callable[[str], Awaitable[Connection]]
) -> None:
    async with signing_keys.elected() as first, signing_keys.elected() as second:
        assert (first, second) == (True, False)
        service = await connect_as("service")
        await service.execute("SET lock_timeout = '2s'")
        await service.execute("SELECT extend_audit_partitions_1(3)")
    async with signing_keys.elected() as again:
        assert again
