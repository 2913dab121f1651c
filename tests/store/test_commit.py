"""One commit decides: a record is written while what it was decided on is in force, or not at all.

And no answer that depends on it leaves before that.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, TypeAlias
from uuid import UUID

import asyncpg
import msgspec
import pytest

from keys.keyring import RotationPolicy
from keys.signer import KeptKey
from service.authority.audit import (
    Action,
    AuditLog,
    AuditRecord,
    Outcome,
    RecordsRejected,
    personal,
)
from service.authority.clock import DatabaseClock
from service.authority.errors import AuditUnavailable, StoreUnavailable, TemporarilyUnavailable
from service.authority.issuer import TokenIssuer
from service.authority.model import Credential, ServiceUser, Status, Subject, TokenRequest
from service.store.audit_log import PostgresRecordWriter
from service.store.embedded import Running
from service.store.service_users import ServiceUsers, as_json
from service.store.signing_keys import SigningKeys
from tests.store.conftest import not_compared

pytestmark = pytest.mark.anyio

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"
Issuance = Callable[..., AuditRecord]
ConnectAs = Callable[[str], Awaitable[Connection]]
OpenLog = Callable[[int], Awaitable[AuditLog]]

COMMIT = "SELECT recorded FROM commit_records_1($1, 60)"
NOBODY = "su_" + "n" * 24
SOON = 0.4
PATIENCE = 8.0
"""Seconds in which whatever is not held up is done."""


async def on_record(superuser: Connection) -> set[UUID]:
    """The ids of the issuances that are committed."""
    rows = await superuser.fetch("SELECT id FROM audit_records WHERE action = 'token.issue'")
    return {UUID(int=row["id"].int) for row in rows}


async def assert_judged(
    writer: PostgresRecordWriter,
    superuser: Connection,
    issuance: Issuance,
    cases: Sequence[tuple[dict[str, Any], bool]],
) -> None:
    """Commit each case between two records that hold: it is recorded or not, they always are."""
    for fields, recorded in cases:
        batch = [issuance(), issuance(**fields), issuance()]
        before = await on_record(superuser)
        assert await writer.commit(batch) == [True, recorded, True], fields
        kept = {batch[0].id, batch[2].id} | ({batch[1].id} if recorded else set[UUID]())
        assert await on_record(superuser) - before == kept, fields


# What is compared


async def test_a_record_is_kept_only_if_all_that_it_was_decided_on_is_in_force(
    writer: PostgresRecordWriter, superuser: Connection, issuance: Issuance
) -> None:
    await assert_judged(
        writer,
        superuser,
        issuance,
        [
            ({"version": 1}, False),
            ({"version": 2}, True),
            ({"version": 3}, False),
            ({"version": 0}, False),
            ({"version": None}, True),
            ({"service_user_id": NOBODY}, False),
            ({"service_user_id": NOBODY, "version": 0}, True),
            ({"kid": "x" * 43}, False),
            ({"kid": None}, False),
            ({"credential_id": "cr_" + "n" * 24}, False),
            ({"credential_id": None}, True),
            ({"actor_id": NOBODY, "actor_version": 1}, False),
            ({"exp": None}, False),
        ],
    )


async def test_a_refusal_of_somebody_who_was_created_meanwhile_is_stale(
    writer: PostgresRecordWriter, superuser: Connection, issuance: Issuance
) -> None:
    refused: dict[str, Any] = {
        "outcome": Outcome.REFUSED,
        "reason": "unknown_client",
        "version": 0,
        **dict.fromkeys(("credential_id", "kid", "iat", "exp", "signing_input_sha256")),
    }
    cases = [(refused, False), ({**refused, "service_user_id": NOBODY}, True)]
    await assert_judged(writer, superuser, issuance, cases)


async def test_a_lifetime_over_the_cap_of_the_key_is_stale(
    writer: PostgresRecordWriter,
    superuser: Connection,
    issuance: Issuance,
    policy: RotationPolicy,
) -> None:
    iat = int(time.time())
    lifetimes = ((policy.lifetime_cap, True), (policy.lifetime_cap + 1, False), (86_400, False))
    cases = [({"iat": iat, "exp": iat + lifetime}, kept) for lifetime, kept in lifetimes]
    await assert_judged(writer, superuser, issuance, cases)


async def test_an_iat_beyond_the_skew_is_stale_either_way(
    writer: PostgresRecordWriter, superuser: Connection, issuance: Issuance
) -> None:
    offs = ((-3600, False), (-63, False), (-57, True), (57, True), (63, False), (3600, False))
    cases = [({"iat": int(time.time()) + off}, kept) for off, kept in offs]
    await assert_judged(writer, superuser, issuance, cases)


async def test_a_credential_that_has_ended_issues_nothing(
    writer: PostgresRecordWriter,
    superuser: Connection,
    issuance: Issuance,
    put: Callable[..., Awaitable[Subject]],
    new_user: Callable[..., ServiceUser],
) -> None:
    cases: list[tuple[dict[str, Any], bool]] = []
    for name, left, recorded in (("live", 60, True), ("ended", -1, False)):
        expires_at = datetime.now(UTC) + timedelta(seconds=left)
        (credential,) = (await put(new_user(name), expires_at=expires_at)).credentials
        fields = {"service_user_id": credential.service_user_id, "credential_id": credential.id}
        cases.append((fields, recorded))
    await assert_judged(writer, superuser, issuance, cases)


async def test_whoever_acts_must_be_live_in_the_version_that_was_judged(
    writer: PostgresRecordWriter,
    superuser: Connection,
    issuance: Issuance,
    put: Callable[..., Awaitable[Subject]],
    new_user: Callable[..., ServiceUser],
) -> None:
    cases: list[tuple[dict[str, Any], bool]] = []
    for name, left, version, recorded in (
        ("live", 60, 2, True),
        ("ended", -1, 2, False),
        ("changed", 60, 1, False),
        ("ahead", 60, 3, False),
    ):
        expires_at = datetime.now(UTC) + timedelta(seconds=left)
        (credential,) = (await put(new_user(name), expires_at=expires_at)).credentials
        fields = {
            "actor_id": credential.service_user_id,
            "actor_version": version,
            "actor_credential_id": credential.id,
        }
        cases.append((fields, recorded))
    await assert_judged(writer, superuser, issuance, cases)


async def test_a_key_that_does_not_sign_yet_or_any_more_issues_nothing(
    writer: PostgresRecordWriter,
    superuser: Connection,
    issuance: Issuance,
    signing_keys: SigningKeys,
    new_keys: list[KeptKey],
    policy: RotationPolicy,
    act: Callable[..., AuditRecord],
) -> None:
    old, new = new_keys[:2]
    assert await signing_keys.prepare(new, act(Action.SIGNING_KEY_PREPARE, kid=new.kid))
    pending, active = issuance(kid=new.kid), issuance(kid=old.kid)
    assert await writer.commit([pending, active]) == [False, True]

    record = act(Action.SIGNING_KEY_ACTIVATE, kid=new.kid)
    assert await signing_keys.activate(
        new.kid, old.kid, msgspec.structs.replace(policy, publish_lead=0), record
    )
    retiring, promoted = issuance(kid=old.kid), issuance(kid=new.kid)
    assert await writer.commit([retiring, promoted]) == [False, True]
    assert await on_record(superuser) == {active.id, promoted.id}


async def test_what_is_personal_stands_beside_the_record_under_its_digest(
    writer: PostgresRecordWriter, superuser: Connection, issuance: Issuance, exchange: TokenRequest
) -> None:
    record = issuance(**personal(exchange.origin, resource="https://ingest.example"))
    stale = issuance(**personal(exchange.origin), version=1)
    assert await writer.commit([record, stale]) == [True, False]
    (row,) = await superuser.fetch(
        "SELECT r.id, r.personal_sha256 = sha256(p.salt || convert_to("
        "  '[\"' || concat_ws('\",\"', client_address, user_agent, resource, department) || '\"]',"
        "  'UTF8')) AS matches FROM audit_records r JOIN audit_personal p USING (id)"
    )
    assert (row["id"], row["matches"]) == (record.id, True)


# P2: a change that has returned is final


@pytest.mark.parametrize(("end", "recorded"), [("COMMIT", False), ("ROLLBACK", True)])
async def test_a_batch_waits_for_a_change_under_way_and_is_judged_by_its_outcome(
    end: str,
    recorded: bool,
    writer: PostgresRecordWriter,
    connect_as: ConnectAs,
    issuance: Issuance,
    holder: Subject,
    act: Callable[..., AuditRecord],
) -> None:
    changer = await connect_as("service")
    user = holder.service_user
    assert user is not None
    record = act(Action.SERVICE_USER_DISABLE, service_user_id=user.id, version=holder.version)
    await changer.execute("BEGIN")
    disabled = msgspec.structs.replace(user, status=Status.DISABLED)
    disable = "SELECT change_service_user_1($1, $2, 60)"
    assert await changer.fetchval(disable, as_json(disabled), as_json(record))

    committed = asyncio.create_task(writer.commit([issuance()]))
    await asyncio.sleep(SOON)
    assert not committed.done()
    await changer.execute(end)
    async with asyncio.timeout(PATIENCE):
        assert await committed == [recorded]


async def test_a_change_waits_for_a_batch_under_way(
    connect_as: ConnectAs,
    issuance: Issuance,
    users: ServiceUsers,
    holder: Subject,
    act: Callable[..., AuditRecord],
    superuser: Connection,
) -> None:
    flusher, record = await connect_as("service"), issuance()
    await flusher.execute("BEGIN")
    assert await flusher.fetchval(COMMIT, as_json([record])) == [True]

    revoked = asyncio.create_task(
        users.revoke_credential(
            holder.credentials[0].id,
            act(
                Action.CREDENTIAL_REVOKE,
                service_user_id=record.service_user_id,
                version=holder.version,
            ),
        )
    )
    await asyncio.sleep(SOON)
    assert not revoked.done()
    await flusher.execute("COMMIT")
    async with asyncio.timeout(PATIENCE):
        assert await revoked
    assert await on_record(superuser) == {record.id}


async def test_batches_do_not_wait_for_each_other(
    connect_as: ConnectAs, writer: PostgresRecordWriter, issuance: Issuance
) -> None:
    flusher = await connect_as("service")
    await flusher.execute("BEGIN")
    assert await flusher.fetchval(COMMIT, as_json([issuance()])) == [True]
    async with asyncio.timeout(PATIENCE):
        assert await writer.commit([issuance()]) == [True]


async def test_no_token_is_issued_on_what_another_process_has_just_revoked(
    issuer: TokenIssuer,
    exchange: TokenRequest,
    users: ServiceUsers,
    holder: Subject,
    act: Callable[..., AuditRecord],
    superuser: Connection,
) -> None:
    await issuer.exchange(exchange)  # and so it is in memory, which nobody tells to forget
    record = act(
        Action.CREDENTIAL_REVOKE, service_user_id=exchange.client_id, version=holder.version
    )
    assert await users.revoke_credential(holder.credentials[0].id, record)
    with pytest.raises(Exception, match="client secret that is not one of its own"):
        await issuer.exchange(exchange)
    outcomes = await superuser.fetch(
        "SELECT outcome, reason, version FROM audit_records WHERE action = 'token.issue'"
        " ORDER BY commit_order"
    )
    assert [tuple(row) for row in outcomes] == [
        ("success", None, 2),
        ("refused", "revoked_credential", 3),
    ]


# One bad record


async def test_one_record_that_postgres_refuses_does_not_take_its_neighbours(
    open_log: OpenLog, superuser: Connection, issuance: Issuance
) -> None:
    log = await open_log(1)
    for bad in (
        {"details": {"text": "\0"}},  # 22P05
        {"reason": "a\0b"},
        {"iat": 2**70, "exp": 2**70},  # 22003
        {"signing_input_sha256": b"short"},  # 23514
        {"id": UUID(int=1)},  # 23514: no partition
        {"action": "no action"},
    ):
        before = await on_record(superuser)
        records = [issuance(), issuance(**bad), issuance()]
        results = await asyncio.gather(
            *(log.append(record) for record in records), return_exceptions=True
        )
        assert [results[0], results[2]] == [True, True], bad
        assert isinstance(results[1], AuditUnavailable), bad
        assert await on_record(superuser) - before == {records[0].id, records[2].id}, bad


async def test_a_record_that_is_offered_twice_is_written_once(
    writer: PostgresRecordWriter, superuser: Connection, issuance: Issuance
) -> None:
    record = issuance()
    assert await writer.commit([record]) == [True]
    with pytest.raises(RecordsRejected):
        await writer.commit([issuance(), record])
    assert await on_record(superuser) == {record.id}


# Durable, or not at all


async def trigger(
    superuser: Connection, table: str, body: str, timing: str = "BEFORE INSERT ON {}"
) -> None:
    await superuser.execute(
        "CREATE FUNCTION interfere() RETURNS trigger LANGUAGE plpgsql AS "
        f"$$ BEGIN {body}; RETURN NEW; END $$"
    )
    await superuser.execute(
        f"CREATE {'CONSTRAINT' if 'DEFERR' in timing else ''} TRIGGER interfere "
        f"{timing.format(table)} FOR EACH ROW EXECUTE FUNCTION interfere()"
    )


async def test_a_commit_that_comes_with_a_warning_counts_as_failure(
    issuer: TokenIssuer, exchange: TokenRequest, superuser: Connection
) -> None:
    # As a standby that does not confirm does.
    await trigger(superuser, "audit_records", "RAISE WARNING 'not confirmed'")
    with pytest.raises(TemporarilyUnavailable):
        await issuer.exchange(exchange)


async def test_a_notice_is_no_warning(
    issuer: TokenIssuer, exchange: TokenRequest, superuser: Connection
) -> None:
    await trigger(superuser, "audit_records", "RAISE NOTICE 'by the way'")
    assert await issuer.exchange(exchange)


async def test_nothing_is_committed_where_it_would_not_be_durable_or_not_compared_in_time(
    database: Running,
    superuser: Connection,
    issuance: Issuance,
    connect_as: ConnectAs,
    holder: Subject,
    act: Callable[..., AuditRecord],
    new_keys: list[KeptKey],
) -> None:
    name = await superuser.fetchval("SELECT current_database()")
    user, record = holder.service_user, as_json(act(Action.SERVICE_USER_CHANGE))
    assert user is not None
    for setting, values in (
        ("synchronous_commit", ("off", "local", "remote_write")),
        ("default_transaction_isolation", ("'repeatable read'", "serializable")),
    ):
        for value in values:
            await superuser.execute(f"ALTER DATABASE {name} SET {setting} = {value}")
            clock = DatabaseClock(time.time)
            writer = PostgresRecordWriter(
                database.service_dsn, clock=clock, clock_skew=60, compare=not_compared
            )
            await writer.open(lambda: None)
            with pytest.raises(StoreUnavailable, match="PV500"):
                await writer.commit([issuance()])
            await writer.close()

            service = await connect_as("service")
            before = await superuser.fetchval("SELECT count(*) FROM audit_records")
            for call, arguments in acts(user, holder.credentials[0], new_keys[1].kid, record):
                with pytest.raises(asyncpg.PostgresError) as refusal:
                    await service.fetchval(call, *arguments)
                assert refusal.value.sqlstate == "PV500", (value, call)
            assert await superuser.fetchval("SELECT count(*) FROM audit_records") == before
        await superuser.execute(f"ALTER DATABASE {name} RESET {setting}")


def acts(
    user: ServiceUser, credential: Credential, kid: str, record: str
) -> Sequence[tuple[str, Sequence[object]]]:
    """Every other way for the service to change what decisions are made on."""
    su, cr = as_json(user), as_json({"id": credential.id})
    return [
        ("SELECT create_service_user_1($1, $2, 60)", (su, record)),
        ("SELECT change_service_user_1($1, $2, 60)", (su, record)),
        ("SELECT create_credential_1($1, $2, 60)", (cr, record)),
        ("SELECT revoke_credential_1($1, $2, 60)", (credential.id, record)),
        ("SELECT bootstrap_1($1, $2, $3, true, 60)", (su, cr, f"[{record}]")),
        ("SELECT prepare_key_1($1, $2, 60)", (as_json({"kid": kid}), record)),
        (
            "SELECT activate_key_1($1, NULL, interval '0', 3600, interval '1 day', $2, 60)",
            (kid, record),
        ),
        ("SELECT retire_key_1($1, $2, 60)", (kid, record)),
    ]


async def test_whichever_insert_fails_and_however_no_token_comes_back(
    issuer: TokenIssuer, exchange: TokenRequest, superuser: Connection
) -> None:
    for table in ("audit_records", "audit_personal"):
        for state in ("P0001", "22000", "23505", "40001", "40P01", "53100", "57014"):
            before = await on_record(superuser)
            await trigger(superuser, table, f"RAISE EXCEPTION 'no' USING ERRCODE = '{state}'")
            with pytest.raises(TemporarilyUnavailable):
                await issuer.exchange(exchange)
            assert await on_record(superuser) == before, (table, state)
            await superuser.execute("DROP FUNCTION interfere() CASCADE")
            await until_issued(issuer, exchange)


async def until_issued(issuer: TokenIssuer, exchange: TokenRequest) -> None:
    """The same parts recover by themselves."""
    async with asyncio.timeout(3):
        while True:
            try:
                await issuer.exchange(exchange)
            except TemporarilyUnavailable:
                await asyncio.sleep(0.02)
            else:
                return


async def test_a_failure_at_the_commit_itself_lets_no_token_out(
    issuer: TokenIssuer, exchange: TokenRequest, superuser: Connection
) -> None:
    at_commit = "AFTER INSERT ON {} DEFERRABLE INITIALLY DEFERRED"
    for table in ("audit_records", "audit_personal"):
        before = await on_record(superuser)
        await trigger(superuser, table, "RAISE EXCEPTION 'at the very end'", at_commit)
        with pytest.raises(TemporarilyUnavailable):
            await issuer.exchange(exchange)
        assert await on_record(superuser) == before
        await superuser.execute("DROP FUNCTION interfere() CASCADE")
        await until_issued(issuer, exchange)


async def test_an_act_and_its_record_are_both_there_or_neither_is(
    users: ServiceUsers,
    signing_keys: SigningKeys,
    new_keys: list[KeptKey],
    new_user: Callable[..., ServiceUser],
    new_credential: Callable[..., Credential],
    holder: Subject,
    act: Callable[..., AuditRecord],
    superuser: Connection,
) -> None:
    user, record = holder.service_user, act(Action.SERVICE_USER_CHANGE)
    assert user is not None
    acts: list[Callable[[], Awaitable[bool]]] = [
        lambda: users.create(new_user("other"), record),
        lambda: users.change(user, record),
        lambda: users.create_credential(new_credential(user.id), record),
        lambda: users.revoke_credential(holder.credentials[0].id, record),
        lambda: signing_keys.prepare(new_keys[0], record),
    ]
    everything = (
        "SELECT (SELECT count(*) FROM audit_records), (SELECT sum(version) FROM service_users),"
        " (SELECT count(*) FROM credentials WHERE revoked_at IS NULL),"
        " (SELECT count(*) FROM signing_keys)"
    )
    before = await superuser.fetchrow(everything)
    for table, touching in (
        ("service_users", acts[:4]),
        ("credentials", acts[2:4]),
        ("signing_keys", acts[4:]),
        ("audit_records", acts),
    ):
        await trigger(superuser, table, "RAISE EXCEPTION 'no'", "BEFORE INSERT OR UPDATE ON {}")
        for attempt in touching:
            with pytest.raises(asyncpg.RaiseError):
                await attempt()
            assert await superuser.fetchrow(everything) == before, table
        await superuser.execute("DROP FUNCTION interfere() CASCADE")


async def test_a_locked_audit_table_refuses_in_bounded_time_and_then_recovers(
    issuer: TokenIssuer,
    exchange: TokenRequest,
    users: ServiceUsers,
    new_user: Callable[..., ServiceUser],
    act: Callable[..., AuditRecord],
    superuser: Connection,
) -> None:
    await issuer.exchange(exchange)
    await superuser.execute("BEGIN; LOCK TABLE audit_records IN ACCESS EXCLUSIVE MODE")
    started = time.monotonic()
    results = await asyncio.gather(
        *(issuer.exchange(exchange) for _ in range(20)),
        users.create(new_user("other"), act(Action.SERVICE_USER_CREATE)),
        return_exceptions=True,
    )
    assert time.monotonic() - started < 4.5
    assert [type(result) for result in results] == [TemporarilyUnavailable] * 20 + [
        StoreUnavailable
    ]
    await superuser.execute("COMMIT")
    await until_issued(issuer, exchange)


# Partitions


async def partitions(superuser: Connection) -> list[str]:
    rows = await superuser.fetch(
        "SELECT inhrelid::regclass::text AS name FROM pg_inherits"
        " WHERE inhparent IN ('audit_records'::regclass, 'audit_personal'::regclass)"
        " ORDER BY 1"
    )
    return [row["name"] for row in rows]


async def test_without_a_partition_for_the_month_no_token_leaves(
    issuer: TokenIssuer, exchange: TokenRequest, superuser: Connection, connect_as: ConnectAs
) -> None:
    for name in await partitions(superuser):
        await superuser.execute(f"DROP TABLE {name}")
    with pytest.raises(TemporarilyUnavailable):
        await issuer.exchange(exchange)
    service = await connect_as("service")
    await service.execute("SELECT extend_audit_partitions_1(3)")
    assert await issuer.exchange(exchange)


async def test_partitions_reach_from_last_month_to_three_ahead_and_are_made_once(
    superuser: Connection, connect_as: ConnectAs
) -> None:
    made = await partitions(superuser)
    first = await superuser.fetchval(
        "SELECT to_char(now() AT TIME ZONE 'UTC' - interval '1 month', 'YYYY_MM')"
    )
    assert len(made) == 10
    assert made[0] == f"audit_personal_{first}"
    assert made[5] == f"audit_records_{first}"
    for name in made[3:5] + made[8:]:
        await superuser.execute(f"DROP TABLE {name}")
    services = [await connect_as("service") for _ in range(4)]
    await asyncio.gather(
        *(service.execute("SELECT extend_audit_partitions_1(3)") for service in services)
    )
    assert await partitions(superuser) == made


async def test_partitions_leave_no_gap_and_never_more_than_two_years_ahead(
    superuser: Connection, connect_as: ConnectAs
) -> None:
    service = await connect_as("service")
    await service.execute("SELECT extend_audit_partitions_1(1000)")
    assert len(await partitions(superuser)) == 2 * 26
    bounds = await superuser.fetch(
        r"SELECT (regexp_match(b, 'FROM \(''(.*)''\) TO'))[1] AS lower,"
        r"       (regexp_match(b, 'TO \(''(.*)''\)'))[1] AS upper FROM ("
        "  SELECT pg_get_expr(relpartbound, oid) AS b FROM pg_class WHERE relispartition"
        "   AND relname LIKE 'audit_records_2%' AND relkind = 'r') AS bounds ORDER BY lower"
    )
    assert [row["upper"] for row in bounds[:-1]] == [row["lower"] for row in bounds[1:]]
