"""A database that is not the one that was signed over: how it goes on, and what is held then."""

import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import asyncpg
import msgspec
import pytest

from keys.checkpoint import Checkpoint, NoteVerifier
from keys.envelope import KeyEncryptionKeys, new_kek_line
from keys.keyring import RotationPolicy
from keys.secret import Secret
from keys.signer import LocalCustody
from service.authority.administration import first_operator
from service.authority.audit import Action, AuditLog, AuditRecord
from service.authority.audit.continuity import Continuity
from service.authority.audit.merkle import Frontier
from service.authority.audit.sequencer import Sequencer
from service.authority.errors import OAuthError, StartRefused
from service.authority.issuer import TokenIssuer
from service.authority.model import PEOPLE, ServiceUser, Status, Subject, TokenRequest
from service.authority.restore import Difference, Restorer, Toll, difference
from service.store.audit_tree import AuditTree, PostgresLog, postgres_log
from service.store.checkpoint_files import CheckpointFiles
from service.store.database import Database
from service.store.embedded import Running
from service.store.restored import RestoredDatabase
from service.store.service_users import ServiceUsers
from service.store.signing_keys import SigningKeys
from tests.conftest import open_audit_log
from tests.store.conftest import SKEW

pytestmark = pytest.mark.anyio

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"

ORIGIN = "tokens.example/audit/1"


class Restored:
    """A database, its checkpoints outside, and what looks at them, as in a server and a command."""

    def __init__(
        self,
        database: Running,
        owner: Database,
        checkpoints: Path,
        keks: KeyEncryptionKeys,
        policy: RotationPolicy,
        executor: ThreadPoolExecutor,
    ) -> None:
        self._dsn = database.service_dsn
        self._owner = owner
        self._executor = executor
        self._policy = policy
        self._custody = LocalCustody(lambda: keks, executor)
        self.checkpoints = checkpoints
        self.outside = CheckpointFiles(checkpoints)

    async def sequence(self) -> Continuity:
        """Let a sequencer look until it has nothing to do; return what it found."""
        continuity = Continuity(outside=self.outside, log_keys=self._custody)
        sequencer = Sequencer(
            connect=lambda: postgres_log(self._dsn),
            continuity=continuity,
            outside=self.outside,
            clock=time.time,
        )
        async with postgres_log(self._dsn) as log:
            deadline = time.monotonic() + 10
            while await sequencer.tick(log) or (continuity.broken is None and await _waiting(log)):
                assert time.monotonic() < deadline
        return continuity

    async def difference(self, keks: KeyEncryptionKeys | None = None) -> Difference | None:
        tree = AuditTree(self._owner.connection)
        custody = LocalCustody(lambda: keks, self._executor) if keks else self._custody
        return await difference(tree, self.outside, custody)

    async def toll(self) -> Toll:
        return await RestoredDatabase(self._owner, clock_skew=SKEW).toll()

    async def accept(self, reason: str = "the primary burnt down") -> NoteVerifier:
        found = await self.difference()
        assert found is not None
        restorer = Restorer(
            store=RestoredDatabase(self._owner, clock_skew=SKEW),
            custody=self._custody,
            policy=self._policy,
            key_bits=2048,
        )
        return await restorer.accept(found, reason)

    def newest(self) -> bytes:
        return max(self.checkpoints.iterdir()).read_bytes()


async def _waiting(log: PostgresLog) -> bool:
    # What was committed stands below the horizon once no older transaction is under way.
    current = await log.current()
    assert current is not None
    head = await log.head(current.number)
    return await log.waiting(head.reaches if head else current.begins_after, 1) > 0


@pytest.fixture
async def restored(
    database: Running,
    keks: KeyEncryptionKeys,
    policy: RotationPolicy,
    tmp_path: Path,
) -> AsyncGenerator[Restored, None]:
    """A database with an audit log; nothing was cut from it yet."""
    await open_audit_log(database, ORIGIN, keks)
    async with Database(database.owner_dsn, application_name="test owner") as owner:
        with ThreadPoolExecutor(1) as executor:
            yield Restored(database, owner, tmp_path / "checkpoints", keks, policy, executor)


async def cut(superuser: Connection, size: int) -> None:
    """Take the newest leaves out of the database, with their heads and their records, as a restored
    backup lacks them."""
    async with superuser.transaction():
        await superuser.execute("DELETE FROM audit_checkpoints WHERE size > $1", size)
        await superuser.execute(
            "WITH gone AS (DELETE FROM audit_leaves WHERE leaf_index >= $1 RETURNING id)"
            " DELETE FROM audit_records WHERE id IN (SELECT id FROM gone)",
            size,
        )


async def record_of_acceptance(superuser: Connection) -> dict[str, Any]:
    row = await superuser.fetchrow(
        "SELECT r.*, l.log, l.leaf_index FROM audit_records r LEFT JOIN audit_leaves l USING (id)"
        " WHERE action = 'audit.restore_accepted'"
    )
    assert row is not None
    return {**row, "details": msgspec.json.decode(row["details"])}


@pytest.fixture
async def lost(
    restored: Restored,
    superuser: Connection,
    users: ServiceUsers,
    holder: Subject,
    active_kid: str,
    act: Callable[..., AuditRecord],
) -> Restored:
    """The same, restored to before the revocation of `vkyc-prod`'s credential."""
    await restored.sequence()
    credential = holder.credentials[0]
    kept = await superuser.fetchval("SELECT max(size) FROM audit_checkpoints")
    revocation = act(Action.CREDENTIAL_REVOKE, service_user_id=credential.service_user_id)
    assert await users.revoke_credential(credential.id, revocation)
    await restored.sequence()
    await cut(superuser, kept)
    await superuser.execute("UPDATE credentials SET revoked_at = NULL")
    await superuser.execute("UPDATE service_users SET version = $1", holder.version)
    return restored


async def test_a_whole_log_is_nothing_to_accept(
    restored: Restored, holder: Subject, superuser: Connection
) -> None:
    assert (await restored.sequence()).broken is None
    assert await restored.difference() is None
    # Neither is one whose newest head got lost outside.
    max(restored.checkpoints.iterdir()).unlink()
    assert await restored.difference() is None


async def test_what_is_missing_is_said_before_it_is_accepted(lost: Restored) -> None:
    found = await lost.difference()
    assert found is not None
    # Created, its credential, the key twice; then the revocation.
    assert "records 4-4 are missing" in found.found
    assert found.next_origin == "tokens.example/audit/2"


@pytest.mark.parametrize(
    ("number", "note", "is_ours"),
    [
        (3, b"tokens.example/audit/3\n9\n", True),
        (3, b"tokens.example/audit/2\n9\n", False),
        (3, b"", True),  # none at all
        (3, b"anything", False),
        (9998, b"tokens.example/audit/9998\n9\n", True),
        (9999, b"tokens.example/audit/9999\n9\n", False),
    ],
)
async def test_no_log_is_opened_behind_one_that_is_none_of_ours_or_could_have_no_successor(
    lost: Restored, number: int, note: bytes, is_ours: bool
) -> None:
    stray = lost.checkpoints / f"{number:04}-{1:020}-2026-11-28.txt"
    stray.write_bytes(note)
    if is_ours:
        found = await lost.difference()
        assert found is not None
        assert found.next_number == (number + 1 if note else 2)
        return
    with pytest.raises(StartRefused, match="Remove that file"):
        await lost.difference()
    stray.unlink()
    found = await lost.difference()
    assert found is not None
    assert found.next_number == 2


async def test_with_the_wrong_key_encryption_key_nothing_can_be_said_of_the_database(
    lost: Restored,
) -> None:
    with pytest.raises(Exception, match="key"):
        await lost.difference(KeyEncryptionKeys.parse(new_kek_line()))


async def test_the_log_goes_on_under_another_name_and_begins_with_the_last_checkpoint_outside(
    lost: Restored, superuser: Connection, act: Callable[..., AuditRecord], log: AuditLog
) -> None:
    assert (await lost.sequence()).broken is not None
    last_outside = lost.newest()
    verifier = await lost.accept()
    assert verifier.name == "tokens.example/audit/2"
    assert (await lost.sequence()).broken is None
    accepted = await record_of_acceptance(superuser)
    assert (accepted["log"], accepted["leaf_index"]) == (2, 0)
    assert accepted["reason"] == "the primary burnt down"
    assert accepted["details"]["outside_checkpoint"] == last_outside.decode()
    assert accepted["details"]["opened_log_key"] == verifier.vkey
    checkpoint = Checkpoint.open(lost.newest(), verifier)
    hashes = await superuser.fetch(
        "SELECT leaf_hash FROM audit_leaves WHERE log = 2 ORDER BY leaf_index"
    )
    tree = Frontier()
    for row in hashes:
        tree.append(row["leaf_hash"])
    assert (checkpoint.size, checkpoint.root) == (tree.size, tree.root())
    # The old log stays as it was, and its last checkpoint stays where it is.
    assert await superuser.fetchval("SELECT count(*) FROM audit_leaves WHERE log = 1") == 4
    assert last_outside in [path.read_bytes() for path in lost.checkpoints.iterdir()]
    assert await log.append(act(Action.AUDIT_QUERY))
    assert (await lost.sequence()).broken is None
    assert Checkpoint.open(lost.newest(), verifier).size == checkpoint.size + 1


async def test_records_without_a_place_get_one_in_the_log_that_goes_on(
    lost: Restored, superuser: Connection, act: Callable[..., AuditRecord], log: AuditLog
) -> None:
    for _ in range(3):
        assert await log.append(act(Action.AUDIT_QUERY))
    await lost.accept()
    assert (await lost.sequence()).broken is None
    assert (await record_of_acceptance(superuser))["leaf_index"] == 3
    assert not await superuser.fetchval(
        "SELECT count(*) FROM audit_records WHERE id NOT IN (SELECT id FROM audit_leaves)"
    )


async def test_leaves_that_a_cut_left_behind_do_not_stop_the_log_that_goes_on(
    restored: Restored, superuser: Connection, holder: Subject
) -> None:
    await restored.sequence()
    await superuser.execute("DELETE FROM audit_checkpoints")
    await restored.accept()
    assert (await restored.sequence()).broken is None
    assert (await record_of_acceptance(superuser))["leaf_index"] == 0


async def test_every_published_key_is_revoked_and_two_new_ones_are_in(
    lost: Restored, signing_keys: SigningKeys, active_kid: str, superuser: Connection
) -> None:
    await lost.accept()
    states = {each.key.kid: each.key.state for each in await signing_keys.published_keys()}
    assert sorted(states.values()) == ["active", "pending"]
    assert active_kid not in states
    revoked = await superuser.fetch(
        "SELECT state, sealed_private FROM signing_keys WHERE kid = $1", active_kid
    )
    assert [tuple(row) for row in revoked] == [("revoked", None)]
    revocation = await superuser.fetchrow(
        "SELECT kid, details FROM audit_records WHERE action = 'signing_key.revoke_all'"
    )
    assert revocation is not None
    assert msgspec.json.decode(revocation["details"]) == {"revoked": [active_kid]}
    assert states[revocation["kid"]] == "active"


async def test_a_held_credential_gets_no_token_and_who_has_its_secret_is_told(
    lost: Restored, issuer: TokenIssuer, exchange: TokenRequest, holder: Subject
) -> None:
    await lost.accept()
    with pytest.raises(OAuthError, match="held after a restore") as refusal:
        await issuer.exchange(exchange)
    assert refusal.value.reason == "credential_held"
    assert holder.service_user is not None
    assert holder.service_user.contact in refusal.value.description
    with pytest.raises(OAuthError) as other:
        await issuer.exchange(
            msgspec.structs.replace(exchange, client_secret=Secret("pvs_guessed"))
        )
    assert other.value.reason == "wrong_secret"


async def test_people_are_disabled_for_they_have_no_credential_that_could_be_held(
    lost: Restored,
    users: ServiceUsers,
    new_user: Callable[..., ServiceUser],
    act: Callable[..., AuditRecord],
    holder: Subject,
) -> None:
    person = new_user("anna", source_system=PEOPLE, scopes=("audit:read",))
    gone = new_user("bert", source_system=PEOPLE, status=Status.DISABLED)
    for each in (person, gone):
        record = act(Action.SERVICE_USER_CREATE, service_user_id=each.id, version=0)
        assert await users.create(each, record)
    toll = await lost.toll()
    assert (toll.live_credentials, toll.active_people) == (1, 1)
    await lost.accept()
    for each in (person, gone):
        after = (await users.fresh(each.id)).service_user
        assert after is not None
        assert after.status is Status.DISABLED
        assert after.version > each.version
    assert (await lost.toll()).active_people == 0
    # A machine is held by its credentials.
    assert holder.service_user is not None
    machine = (await users.fresh(holder.service_user.id)).service_user
    assert machine is not None
    assert machine.is_active


async def test_a_token_that_was_decided_on_before_is_not_recorded_after(
    lost: Restored, log: AuditLog, issuance: Callable[..., AuditRecord], superuser: Connection
) -> None:
    await lost.accept()
    kid = await superuser.fetchval("SELECT kid FROM signing_keys WHERE state = 'active'")
    # Not even under the version that was lost, which the next change would have had.
    for version in (2, 3):
        assert not await log.append(issuance(kid=kid, version=version))
    held = await superuser.fetchval("SELECT version FROM service_users")
    assert held > 1000 * (time.time() - 60)


async def test_who_is_held_does_not_administer_so_a_first_operator_is_made_again(
    restored: Restored, users: ServiceUsers, superuser: Connection
) -> None:
    async def bootstrapped(name: str) -> bool:
        user, credential, _, record = first_operator(name, "urn:api", time.time(), "")
        return await users.bootstrap(user, credential, record, force=False)

    assert await bootstrapped("operator")
    assert not await bootstrapped("second")
    await restored.sequence()
    await superuser.execute("DELETE FROM audit_checkpoints")
    await restored.accept()
    assert await bootstrapped("second")
    assert not await bootstrapped("third")


async def test_a_database_restored_once_more_to_before_the_act_is_noticed_and_gets_another_name(
    lost: Restored, superuser: Connection
) -> None:
    await lost.accept()
    await lost.sequence()
    await superuser.execute(
        "DELETE FROM audit_checkpoints WHERE log = 2; DELETE FROM audit_leaves WHERE log = 2;"
        "DELETE FROM audit_logs WHERE log = 2"
    )
    broken = (await lost.sequence()).broken
    assert broken is not None
    assert "Restored or cut" in broken
    assert (await lost.accept("once more")).name == "tokens.example/audit/3"
    assert (await lost.sequence()).broken is None


async def test_whatever_lies_in_the_place_of_the_checkpoint_can_be_put_on_record(
    restored: Restored, superuser: Connection, holder: Subject
) -> None:
    await restored.sequence()
    max(restored.checkpoints.iterdir()).write_bytes(b"\0\xff not a note")
    await restored.accept()
    assert (await restored.sequence()).broken is None
    accepted = await record_of_acceptance(superuser)
    assert (
        accepted["details"]["outside_checkpoint"] == "\N{REPLACEMENT CHARACTER}" * 2 + " not a note"
    )


async def test_only_the_owner_accepts(connect_as: Callable[[str], Awaitable[Connection]]) -> None:
    service = await connect_as("service")
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await service.fetchval(
            "SELECT accept_restored_1('{}', 1::smallint, '{}', '{}', '{}', 60, '1 d', '{}', '{}',"
            " 60)"
        )


async def test_confirmed_is_what_was_decided_on_the_version_in_force_each_with_its_record(
    lost: Restored,
    users: ServiceUsers,
    put: Callable[..., Awaitable[Subject]],
    new_user: Callable[..., ServiceUser],
    act: Callable[..., AuditRecord],
    holder: Subject,
    superuser: Connection,
) -> None:
    await put(new_user("branch-7"))
    await lost.accept()
    held = await users.held_after_restore("", 10, None)
    assert {each.service_user.name for each in held} == {"vkyc-prod", "branch-7"}
    assert holder.service_user is not None
    of_one = await users.held_after_restore("", 10, holder.service_user.id)
    assert [each.credential.id for each in of_one] == [holder.credentials[0].id]

    def confirmation(each: Any, version: int) -> AuditRecord:
        return act(
            Action.CREDENTIAL_CONFIRM,
            service_user_id=each.service_user.id,
            version=version,
            credential_id=each.credential.id,
        )

    first, second = held
    verdict = await users.confirm(
        [confirmation(first, first.service_user.version), confirmation(second, 1)]
    )
    assert verdict == [True, False]
    assert [each.credential.id for each in await users.held_after_restore("", 10, None)] == [
        second.credential.id
    ]
    fresh = await users.fresh(first.service_user.id)
    assert fresh.credentials[0].is_live(time.time())
    assert fresh.version == first.service_user.version + 1
    recorded = await superuser.fetch(
        "SELECT credential_id FROM audit_records WHERE action = 'credential.confirm'"
    )
    assert [row["credential_id"] for row in recorded] == [first.credential.id]


async def test_nothing_is_confirmed_without_a_record_that_says_so(
    lost: Restored, users: ServiceUsers, act: Callable[..., AuditRecord], superuser: Connection
) -> None:
    await lost.accept()
    (held,) = await users.held_after_restore("", 10, None)
    mine = {"service_user_id": held.service_user.id, "credential_id": held.credential.id}
    assert await users.confirm([act(Action.AUDIT_QUERY, repeats=0, **mine)]) == [True]
    assert (
        await superuser.fetchval(
            "SELECT credential_id FROM audit_records WHERE action = 'credential.confirm'"
        )
        == held.credential.id
    )


async def test_a_confirmed_credential_gets_tokens_as_before(
    lost: Restored,
    users: ServiceUsers,
    issuer: TokenIssuer,
    exchange: TokenRequest,
    act: Callable[..., AuditRecord],
    superuser: Connection,
) -> None:
    await lost.accept()
    (held,) = await users.held_after_restore("", 10, None)
    with pytest.raises(OAuthError):
        await issuer.exchange(exchange)
    record = act(
        Action.CREDENTIAL_CONFIRM,
        service_user_id=held.service_user.id,
        version=held.service_user.version,
        credential_id=held.credential.id,
    )
    assert await users.confirm([record]) == [True]
    token = await issuer.exchange(exchange)
    assert (
        await superuser.fetchval(
            "SELECT k.state FROM audit_records r JOIN signing_keys k USING (kid) WHERE r.id = $1",
            token.jti,
        )
        == "active"
    )
