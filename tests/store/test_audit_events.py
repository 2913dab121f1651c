"""Reported events are on record once each, and tell which verifiers hold which keys."""

import asyncio
import json
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, TypeAlias
from uuid import UUID

import asyncpg
import msgspec
import pytest

from service.authority.audit import Action, AuditRecord, Outcome, new_record_id
from service.authority.audit.events import Verdict
from service.authority.evidence import VerifierInstance
from service.authority.model import Subject
from service.store.audit_events import MAX_INSTANCES, SELECT_INSTANCES, AuditEvents
from service.store.database import Database
from service.store.service_users import ServiceUsers, as_json

pytestmark = pytest.mark.anyio

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"
ConnectAs = Callable[[str], Awaitable[Connection]]
Put = Callable[..., Awaitable[Subject]]
MakeAct = Callable[..., AuditRecord]
Loaded = Callable[..., AuditRecord]

COMMIT = "SELECT recorded FROM commit_records_1($1, 60)"
KID, OTHER_KID = "k" * 43, "o" * 43
RECORDED, KNOWN, TAKEN, STALE = Verdict
MINUTE = 60.0
HOUR = 3600.0


@pytest.fixture
def events(pool: Database) -> AuditEvents:
    return AuditEvents(pool, clock_skew=60)


@pytest.fixture
async def ingest(put: Put, new_user: Callable[..., Any]) -> Subject:
    """A service user that reports."""
    return await put(new_user("ingest", scopes=("audit:report",)))


@pytest.fixture
async def search(put: Put, new_user: Callable[..., Any]) -> Subject:
    """Another one."""
    return await put(new_user("search", scopes=("audit:report",)))


@pytest.fixture
def loaded() -> Loaded:
    """Make the record of a report of `reporter`, drawn up `ago` seconds before now."""

    def made(
        reporter: Subject,
        *kids: str,
        instance: str = "instance-1",
        ago: float = 0,
        **fields: Any,
    ) -> AuditRecord:
        assert reporter.service_user is not None
        defaults: dict[str, Any] = {
            "id": new_record_id(time.time() - ago),
            "action": Action.JWKS_LOADED,
            "outcome": Outcome.SUCCESS,
            "actor_id": reporter.service_user.id,
            "actor": reporter.service_user.name,
            "actor_version": reporter.version,
            "actor_credential_id": reporter.credentials[0].id,
            "details": {"instance": instance, "kids": kids},
        }
        return AuditRecord(**{**defaults, **fields})

    return made


async def on_record(superuser: Connection) -> list[UUID]:
    rows = await superuser.fetch(
        "SELECT id FROM audit_records WHERE action = 'jwks.loaded' ORDER BY id"
    )
    return [row["id"] for row in rows]


async def waiting_for_a_lock(superuser: Connection) -> None:
    """Return once somebody in this database waits for somebody else."""
    async with asyncio.timeout(5):
        while not await superuser.fetchval(  # noqa: ASYNC110
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE datname = current_database() AND wait_event_type = 'Lock'"
        ):
            await asyncio.sleep(0.01)


# On record once


async def test_a_report_is_recorded_once_however_often_it_is_made(
    events: AuditEvents, ingest: Subject, loaded: Loaded, superuser: Connection
) -> None:
    first, second, third = (loaded(ingest, KID) for _ in range(3))
    assert await events.report([first, second]) == [RECORDED, RECORDED]
    assert await events.report([second, third, first]) == [KNOWN, RECORDED, KNOWN]
    again = msgspec.structs.replace(first, details={"instance": "another-one", "kids": []})
    assert await events.report([again]) == [KNOWN]
    assert await on_record(superuser) == sorted([first.id, second.id, third.id])
    kept = await superuser.fetchval("SELECT details FROM audit_records WHERE id = $1", first.id)
    assert json.loads(kept) == {"instance": "instance-1", "kids": [KID]}


async def test_an_id_twice_in_one_report_is_recorded_at_its_first_place(
    events: AuditEvents, ingest: Subject, loaded: Loaded, superuser: Connection
) -> None:
    newer, older = loaded(ingest, KID), loaded(ingest, KID, ago=MINUTE)
    twice = msgspec.structs.replace(newer, details={"instance": "another-one", "kids": []})
    assert await events.report([newer, older, twice]) == [RECORDED, RECORDED, KNOWN]
    kept = await superuser.fetchval("SELECT details FROM audit_records WHERE id = $1", newer.id)
    assert json.loads(kept)["instance"] == "instance-1"
    assert len(await on_record(superuser)) == 2


async def test_an_id_that_is_on_record_for_another_reporter_or_another_act_is_taken(
    events: AuditEvents,
    ingest: Subject,
    search: Subject,
    loaded: Loaded,
    issuance: Callable[..., AuditRecord],
    connect_as: ConnectAs,
    superuser: Connection,
) -> None:
    service = await connect_as("service")
    token = issuance()
    assert await service.fetchval(COMMIT, as_json([token])) == [True]
    own = loaded(ingest, KID)
    assert await events.report([own]) == [RECORDED]
    offered = [
        loaded(search, KID, id=own.id),
        loaded(search, KID, id=token.id),
        loaded(search, KID),
    ]
    assert await events.report(offered) == [TAKEN, TAKEN, RECORDED]
    other_act = loaded(ingest, KID, id=own.id, action=Action.AUDIT_QUERY)
    assert await events.report([other_act]) == [TAKEN]
    assert await on_record(superuser) == sorted([own.id, offered[2].id])


async def test_a_report_decided_on_an_old_version_of_its_reporter_is_stale_and_not_recorded(
    events: AuditEvents,
    ingest: Subject,
    loaded: Loaded,
    users: ServiceUsers,
    act: MakeAct,
    superuser: Connection,
) -> None:
    before, after, twice = (loaded(ingest, KID) for _ in range(3))
    assert await events.report([before]) == [RECORDED]
    assert await users.revoke_credential(ingest.credentials[0].id, act(Action.CREDENTIAL_REVOKE))
    assert await events.report([before, after, twice, twice]) == [KNOWN, STALE, STALE, STALE]
    assert await on_record(superuser) == [before.id]


async def test_a_report_of_an_id_that_is_being_recorded_waits_and_finds_it_known(
    events: AuditEvents,
    ingest: Subject,
    search: Subject,
    loaded: Loaded,
    connect_as: ConnectAs,
    superuser: Connection,
) -> None:
    first = await connect_as("service")
    offered = [loaded(ingest, KID) for _ in range(3)]
    await first.execute("BEGIN")
    call = "SELECT report_events_1($1, 60)"
    assert await first.fetchval(call, as_json(offered[:2])) == [RECORDED, RECORDED]
    second = asyncio.create_task(events.report(offered))
    other = asyncio.create_task(events.report([loaded(search, KID, id=offered[0].id)]))
    await waiting_for_a_lock(superuser)
    assert not second.done()
    await first.execute("COMMIT")
    assert await second == [KNOWN, KNOWN, RECORDED]
    assert await other == [TAKEN]
    assert len(await on_record(superuser)) == 3


async def test_reports_of_the_same_ids_in_any_order_at_the_same_time_record_each_once(
    events: AuditEvents, ingest: Subject, loaded: Loaded, superuser: Connection
) -> None:
    dice = random.Random(11)
    offered = [loaded(ingest, KID) for _ in range(400)]
    for chunk in (offered[start : start + 100] for start in range(0, 400, 100)):
        orders = [dice.sample(chunk, len(chunk)) for _ in range(2)]
        reports = await asyncio.gather(*(events.report(order) for order in orders))
        assert {verdict for report in reports for verdict in report} <= {RECORDED, KNOWN}
        recorded = [
            record.id
            for order, report in zip(orders, reports, strict=True)
            for record, verdict in zip(order, report, strict=True)
            if verdict is RECORDED
        ]
        assert sorted(recorded) == sorted(record.id for record in chunk)
    assert len(await on_record(superuser)) == len(offered)


# Which verifiers hold a key


@pytest.fixture
async def report(
    events: AuditEvents, loaded: Loaded, superuser: Connection
) -> Callable[..., Awaitable[None]]:
    """Report as `loaded` has it; it arrived `heard` seconds ago (as it was drawn up, if left
    out)."""

    async def made(
        reporter: Subject, *kids: str, ago: float, heard: float | None = None, **fields: Any
    ) -> None:
        record = loaded(reporter, *kids, ago=ago, **fields)
        assert await events.report([record]) == [RECORDED]
        await superuser.execute(
            "UPDATE audit_records SET recorded_at = clock_timestamp() - $2::interval WHERE id = $1",
            record.id,
            timedelta(seconds=ago if heard is None else heard),
        )

    return made


@pytest.fixture
async def publish(superuser: Connection) -> Callable[[str, float], Awaitable[None]]:
    """Put a pending key in that was published so many seconds ago."""

    async def published(kid: str, ago: float) -> None:
        await superuser.execute(
            "INSERT INTO signing_keys (kid, state, signer, public_der, published_at)"
            " VALUES ($1, 'pending', 'local:', '', clock_timestamp() - $2::interval)",
            kid,
            timedelta(seconds=ago),
        )

    return published


Report = Callable[..., Awaitable[None]]
Publish = Callable[[str, float], Awaitable[None]]


def heard(instances: Sequence[VerifierInstance]) -> list[tuple[str, str, bool]]:
    return [(each.service_user, each.instance, each.has_loaded) for each in instances]


def minutes_ago(at: datetime | None) -> int | None:
    return None if at is None else round((datetime.now(UTC) - at).total_seconds() / MINUTE)


async def test_the_newest_report_of_each_instance_says_whether_it_has_loaded_the_key(
    events: AuditEvents, ingest: Subject, search: Subject, report: Report, publish: Publish
) -> None:
    await publish(KID, 24 * HOUR)
    await report(ingest, OTHER_KID, instance="caught-up", ago=50 * MINUTE)
    await report(ingest, OTHER_KID, KID, instance="caught-up", ago=10 * MINUTE)
    await report(ingest, OTHER_KID, KID, instance="lost-it", ago=50 * MINUTE)
    await report(ingest, OTHER_KID, instance="lost-it", ago=10 * MINUTE)
    await report(search, instance="caught-up", ago=20 * MINUTE)
    instances = await events.instances(KID)
    assert heard(instances) == [
        ("ingest", "lost-it", False),
        ("search", "caught-up", False),
        ("ingest", "caught-up", True),
    ]
    assert [minutes_ago(each.last_heard_at) for each in instances] == [10, 20, 10]
    assert [minutes_ago(each.missing_since) for each in instances] == [10, 20, None]


async def test_a_key_is_missing_since_the_first_report_without_it_after_its_publication(
    events: AuditEvents, ingest: Subject, report: Report, publish: Publish
) -> None:
    await publish(KID, 60 * MINUTE)
    for ago in (100, 50, 20):
        await report(ingest, OTHER_KID, instance="instance-1", ago=ago * MINUTE)
    await report(ingest, OTHER_KID, instance="not-since", ago=70 * MINUTE)
    since = {each.instance: each.missing_since for each in await events.instances(KID)}
    assert minutes_ago(since["instance-1"]) == 50
    assert since["not-since"] is None
    assert not any(each.has_loaded for each in await events.instances(KID))


async def test_an_instance_that_was_silent_for_two_hours_is_not_waited_for(
    events: AuditEvents, ingest: Subject, report: Report, publish: Publish
) -> None:
    await publish(KID, 24 * HOUR)
    await report(ingest, instance="silent-now", ago=2 * HOUR + MINUTE)
    await report(ingest, instance="just-alive", ago=2 * HOUR - MINUTE)
    assert heard(await events.instances(KID)) == [("ingest", "just-alive", False)]


async def test_a_report_that_lay_in_a_spool_is_no_sign_of_life(
    events: AuditEvents, ingest: Subject, report: Report, publish: Publish
) -> None:
    await publish(KID, 24 * HOUR)
    await report(ingest, instance="dead-since", ago=3 * HOUR, heard=MINUTE)
    assert await events.instances(KID) == []


async def test_of_two_reports_the_one_drawn_up_last_counts_in_whatever_order_they_arrive(
    events: AuditEvents, ingest: Subject, report: Report, publish: Publish
) -> None:
    await publish(KID, 24 * HOUR)
    await report(ingest, KID, instance="instance-1", ago=10 * MINUTE)
    await report(ingest, instance="instance-1", ago=30 * MINUTE, heard=MINUTE)
    (instance,) = await events.instances(KID)
    assert instance.has_loaded
    assert instance.missing_since is None
    assert minutes_ago(instance.last_heard_at) == 1


async def test_nobody_who_is_heard_lacks_a_key_unnoticed_and_nobody_else_is_named(
    events: AuditEvents, ingest: Subject, report: Report, loaded: Loaded, connect_as: ConnectAs
) -> None:
    """For a key that is not (or no longer) there the answer is the same, without a since."""
    assert await events.instances(KID) == []
    refused = loaded(ingest, KID, outcome=Outcome.REFUSED, instance="refused-one")
    service = await connect_as("service")
    assert await service.fetchval(COMMIT, as_json([refused])) == [True]
    await report(ingest, OTHER_KID, instance="instance-1", ago=MINUTE)
    (instance,) = await events.instances(KID)
    assert (instance.instance, instance.has_loaded) == ("instance-1", False)
    assert instance.missing_since is None


async def test_of_very_many_instances_those_that_lack_the_key_are_named(
    events: AuditEvents, ingest: Subject, loaded: Loaded
) -> None:
    has_it = [loaded(ingest, KID, instance=f"has-it-{n:05}") for n in range(MAX_INSTANCES)]
    lacks_it = [loaded(ingest, instance=f"lacks-it-{n}") for n in range(3)]
    for batch in (lacks_it, has_it):
        assert set(await events.report(batch)) == {RECORDED}
    instances = await events.instances(KID)
    assert len(instances) == MAX_INSTANCES
    assert [each.has_loaded for each in instances] == [False] * 3 + [True] * (MAX_INSTANCES - 3)


async def test_asking_for_the_instances_reads_their_reports_and_nothing_else_of_the_log(
    events: AuditEvents,
    ingest: Subject,
    loaded: Loaded,
    connect_as: ConnectAs,
    superuser: Connection,
) -> None:
    old = [loaded(ingest, KID, instance="instance-1", ago=3 * HOUR) for _ in range(300)]
    assert set(await events.report(old)) == {RECORDED}
    await superuser.execute("UPDATE audit_records SET recorded_at = recorded_at - interval '3 h'")
    reports = [loaded(ingest, KID, instance=f"instance-{n % 50}") for n in range(200)]
    assert set(await events.report(reports)) == {RECORDED}
    await superuser.execute(
        "INSERT INTO audit_records (id, commit_order, recorded_at, action, outcome, request_id,"
        " repeats, details) SELECT overlay(uuidv7_floor_1(clock_timestamp())::text"
        " PLACING lpad(to_hex(n), 12, '0') FROM 25)::uuid,"
        " n, clock_timestamp(), 'token.issue', 'success', '', 1, '{}'"
        " FROM generate_series(1, 40000) AS n"
    )
    await superuser.execute("ANALYZE audit_records")
    service = await connect_as("service")
    explained = await service.fetchval(
        f"EXPLAIN (ANALYZE, TIMING OFF, FORMAT JSON) {SELECT_INSTANCES}", KID
    )
    scans = [node for node in plan_nodes(json.loads(explained)[0]["Plan"]) if on_the_log(node)]
    read = sum(
        (node["Actual Rows"] + node.get("Rows Removed by Filter", 0)) * node["Actual Loops"]
        for node in scans
    )
    assert read == len(reports), scans


async def test_partitions_that_are_made_later_have_the_index_too(
    connect_as: ConnectAs, superuser: Connection
) -> None:
    await (await connect_as("service")).execute("SELECT extend_audit_partitions_1(6)")
    without = await superuser.fetch(
        "SELECT inhrelid::regclass::text FROM pg_inherits"
        " WHERE inhparent = 'audit_records'::regclass AND NOT EXISTS ("
        "   SELECT FROM pg_index JOIN pg_inherits up ON up.inhrelid = indexrelid"
        "    WHERE indrelid = pg_inherits.inhrelid"
        "      AND up.inhparent = 'audit_records_jwks_loaded'::regclass)"
    )
    assert without == []


def plan_nodes(plan: dict[str, Any]) -> list[dict[str, Any]]:
    return [plan, *(node for inner in plan.get("Plans", []) for node in plan_nodes(inner))]


def on_the_log(node: dict[str, Any]) -> bool:
    return node.get("Relation Name", "").startswith("audit_records")
