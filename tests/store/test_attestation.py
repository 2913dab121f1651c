"""A published key was made here: the service's password alone publishes none, and ours stay."""

import shutil
import time
from collections.abc import Awaitable, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TypeAlias

import asyncpg
import pytest
import structlog
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from msgspec.structs import replace

from keys.attestation import attest
from keys.envelope import EnvelopeError, KekReader, KeyEncryptionKeys, new_kek_line
from keys.keyring import Concern, KeyState, RotationPolicy
from keys.signer import KeptKey, LocalCustody, generate
from service.authority.audit import Action, AuditRecord
from service.authority.key_rotation import KeyRotator, LiveKeyRing
from service.store.audit_events import AuditEvents
from service.store.database import MIGRATING, Connection, connect
from service.store.embedded import Running
from service.store.migrate import MIGRATIONS, migrate
from service.store.service_users import as_json
from service.store.signing_keys import SigningKeys, attest_all, key_as_json

pytestmark = pytest.mark.anyio

ConnectAs: TypeAlias = Callable[[str], Awaitable[Connection]]
MakeAct: TypeAlias = Callable[..., AuditRecord]
Process: TypeAlias = tuple[LiveKeyRing, KeyRotator]
NewProcess: TypeAlias = Callable[..., Process]

DUE = (
    "UPDATE signing_keys SET published_at = published_at - interval '40 days',"
    " rotate_at = rotate_at - interval '40 days'"
)


@pytest.fixture(scope="module")
def foreign() -> KeyEncryptionKeys:
    """A thief's own key-encryption key."""
    return KeyEncryptionKeys.parse(new_kek_line())


@pytest.fixture(scope="module")
def thiefs_key(foreign: KeyEncryptionKeys) -> KeptKey:
    """A thief's own signing key."""
    return generate(2048, foreign)


@pytest.fixture
def process(
    signing_keys: SigningKeys,
    evidence: AuditEvents,
    keks: KeyEncryptionKeys,
    policy: RotationPolicy,
) -> Generator[NewProcess, None, None]:
    """Make what a server process has to do with keys; its key-encryption keys as given."""
    with ThreadPoolExecutor(1) as executor:

        def made(read_keks: KekReader = lambda: keks) -> Process:
            custody = LocalCustody(read_keks, executor)
            keys = LiveKeyRing(
                store=signing_keys, custody=custody, read_keks=read_keks, clock=time.time
            )
            rotator = KeyRotator(
                keys=keys,
                store=signing_keys,
                evidence=evidence,
                custody=custody,
                policy=policy,
                key_bits=1024,
                clock=time.time,
            )
            return keys, rotator

        yield made


@pytest.mark.parametrize(
    "forgery", ["empty", "under another KEK", "of another key", "for a secret"]
)
async def test_a_key_that_nobody_attests_is_not_published_never_signs_and_goes_by_hand(
    process: NewProcess,
    connect_as: ConnectAs,
    superuser: Connection,
    act: MakeAct,
    keks: KeyEncryptionKeys,
    new_keys: list[KeptKey],
    thiefs_key: KeptKey,
    active_kid: str,
    forgery: str,
) -> None:
    thief = await connect_as("service")
    attestation = {
        "empty": b"",
        "under another KEK": thiefs_key.attestation,
        "of another key": new_keys[0].attestation,
        # As whoever could have something else sealed would have it.
        "for a secret": keks.seal(b"", purpose="signing-key", kid=thiefs_key.kid),
    }[forgery]
    forged = replace(thiefs_key, attestation=attestation)
    record = as_json(act(Action.AUDIT_QUERY))
    assert await thief.fetchval("SELECT prepare_key_1($1, $2, 60)", key_as_json(forged), record)
    await superuser.execute(DUE)

    keys, rotator = process()
    with structlog.testing.capture_logs() as logs:
        for _ in range(2):
            await rotator.tick()
    assert list(keys.ring.published) == [active_kid]
    assert forged.kid.encode() not in keys.ring.jwks
    assert keys.ring.active is not None
    assert (keys.ring.active.kid, keys.ring.active.signer is None) == (active_kid, False)
    assert Concern.KEY_NOT_ATTESTED in rotator.standing_concerns()
    assert rotator.figures().concerns["key_not_attested"]
    assert {log["kid"] for log in logs if log["event"] == "signing_key_not_attested"} == {
        forged.kid
    }
    assert await thief.fetchval(
        "SELECT revoke_key_1($1, 'pending', 3600, '1 day', $2, 60)",
        forged.kid,
        as_json(act(Action.SIGNING_KEY_REVOKE)),
    )
    await rotator.tick()
    assert rotator.concerns() == ()
    assert len(keys.ring.published) == 2


async def test_a_server_of_the_release_before_makes_no_key_that_the_others_do_not_publish(
    signing_keys: SigningKeys, connect_as: ConnectAs, act: MakeAct, new_keys: list[KeptKey]
) -> None:
    old = await connect_as("service")
    record = as_json(act(Action.SIGNING_KEY_PREPARE))
    unattested, other = (replace(key, attestation=None) for key in new_keys[:2])
    before = await signing_keys.published_keys()
    for call, *arguments in (
        ("prepare_key_1($1, $2, 60)", key_as_json(unattested), record),
        (
            "revoke_all_keys_1($1, $2, $3, 3600, '1 day', $4, 60)",
            [each.key.kid for each in before],
            key_as_json(unattested),
            key_as_json(other),
            record,
        ),
    ):
        with pytest.raises(asyncpg.PostgresError, match="is attested"):
            await old.fetchval(f"SELECT {call}", *arguments)
    assert await signing_keys.published_keys() == before


async def test_whoever_revokes_all_with_the_services_password_publishes_nothing_instead(
    process: NewProcess,
    connect_as: ConnectAs,
    act: MakeAct,
    foreign: KeyEncryptionKeys,
    thiefs_key: KeptKey,
    active_kid: str,
) -> None:
    thief = await connect_as("service")
    assert await thief.fetchval(
        "SELECT revoke_all_keys_1($1, $2, $3, 3600, $4, $5, 60)",
        [active_kid],
        key_as_json(thiefs_key),
        key_as_json(generate(1024, foreign)),
        timedelta(days=1),
        as_json(act(Action.SIGNING_KEY_REVOKE_ALL)),
    )
    keys, rotator = process()
    await rotator.tick()
    assert keys.ring.jwks == b'{"keys":[]}'
    assert keys.ring.active is not None
    assert keys.ring.active.signer is None
    assert Concern.KEY_NOT_ATTESTED in rotator.concerns()


async def test_an_attested_kid_publishes_no_other_public_half(
    process: NewProcess, superuser: Connection, new_keys: list[KeptKey], active_kid: str
) -> None:
    """Not even by whoever may write into the table, nor where the process has seen the key."""
    (before, _), (fresh, _) = process(), process()
    assert list((await before.fresh()).published) == [active_kid]
    await superuser.execute(
        "UPDATE signing_keys SET public_der = $1",
        new_keys[1].public_key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
    )
    for keys in (before, fresh):
        assert list((await keys.fresh()).published) == []


async def test_an_attestation_lasts_as_long_as_its_key_is_published(
    process: NewProcess,
    signing_keys: SigningKeys,
    superuser: Connection,
    act: MakeAct,
    new_keys: list[KeptKey],
    active_kid: str,
) -> None:
    assert await signing_keys.prepare(new_keys[1], act(Action.SIGNING_KEY_PREPARE))
    await superuser.execute(DUE)
    _, rotator = process()
    await rotator.tick()
    keys, _ = process()
    ring = await keys.fresh()
    states = {key.kid: key.state for key in ring.keys}
    assert states[active_kid] is KeyState.RETIRING
    assert sorted(states.values()) == sorted((KeyState.RETIRING, KeyState.ACTIVE, KeyState.PENDING))
    assert set(ring.published) == states.keys()


async def test_what_was_found_attested_stays_published_without_its_kek_and_a_new_file_counts(
    process: NewProcess, signing_keys: SigningKeys, act: MakeAct, keks: KeyEncryptionKeys
) -> None:
    held = [keks]

    def read_keks() -> KeyEncryptionKeys:
        if not held:
            raise EnvelopeError("the file is gone")
        return held[0]

    new = KeyEncryptionKeys.parse(new_kek_line())
    first = generate(1024, keks)
    assert await signing_keys.prepare(first, act(Action.SIGNING_KEY_PREPARE))
    keys, _ = process(read_keks)
    assert list((await keys.fresh()).published) == [first.kid]
    held.clear()
    assert list((await keys.fresh()).published) == [first.kid]
    # As `keys rewrap` leaves it, and whoever puts the new file there comes later.
    resealed = replace(first, attestation=attest(first.kid, new))
    assert await signing_keys.reseal(first, resealed, act(Action.SIGNING_KEY_REWRAP))
    assert list((await keys.fresh()).published) == [first.kid]
    late, _ = process(read_keks)
    assert list((await late.fresh()).published) == []
    assert not late.loaded, "nobody should be sent to a process that has no key"
    held.append(new)
    assert list((await late.fresh()).published) == [first.kid]
    assert late.loaded


async def test_a_migration_attests_the_keys_that_were_there_once_and_no_other_one_does(
    database: Running,
    owner: Connection,
    tmp_path: Path,
    act: MakeAct,
    keks: KeyEncryptionKeys,
    new_keys: list[KeptKey],
) -> None:
    for path in sorted(MIGRATIONS.glob("*.sql"))[:12]:
        shutil.copy(path, tmp_path)
    await migrate(owner, tmp_path)
    record = as_json(act(Action.SIGNING_KEY_PREPARE))
    service = await connect(database.service_dsn, application_name="test", deadlines=MIGRATING)
    assert await service.fetchval(
        "SELECT prepare_key_1($1, $2, 60)", key_as_json(new_keys[0]), record
    )

    def unreadable() -> KeyEncryptionKeys:
        raise EnvelopeError("no file")

    along = {"0013_attestations": partial(attest_all, read_keks=unreadable)}
    with pytest.raises(EnvelopeError):
        await migrate(owner, along=along)
    assert await owner.fetchval("SELECT max(version) FROM schema_migrations") == 12
    along = {"0013_attestations": partial(attest_all, read_keks=lambda: keks)}
    assert (await migrate(owner, along=along))[0] == "0013_attestations"
    attestations = "SELECT kid, attestation IS NOT NULL FROM signing_keys"
    assert [tuple(row) for row in await owner.fetch(attestations)] == [(new_keys[0].kid, True)]

    await owner.execute("UPDATE signing_keys SET attestation = NULL")
    assert await migrate(owner, along=along) == []
    assert [tuple(row) for row in await owner.fetch(attestations)] == [(new_keys[0].kid, False)]
    await service.close()
