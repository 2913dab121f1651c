"""Reported events are on record once each, and tell which verifiers hold which keys and which
tokens were never issued."""

import asyncio
import hashlib
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
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.hashes import SHA256

from keys.keyring import RotationPolicy
from keys.signer import KeptKey
from keys.verifier.strict import base64url_encode
from service.authority.audit import Action, AuditLog, AuditRecord, Outcome, new_record_id
from service.authority.audit.attribution import Attributed, TokenStanding, find
from service.authority.audit.events import Verdict
from service.authority.audit.reported import ApiCall
from service.authority.audit.unproven import MAX_UNPROVEN, UnprovenReports
from service.authority.evidence import VerifierInstance
from service.authority.model import Subject
from service.store.audit_events import (
    COUNT_FORGED,
    MAX_INSTANCES,
    SELECT_INSTANCES,
    SELECT_ISSUED,
    SELECT_ISSUED_DIGESTS,
    AuditEvents,
)
from service.store.database import Database
from service.store.service_users import ServiceUsers, as_json
from service.store.signing_keys import SigningKeys

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
    other_act = loaded(ingest, KID, id=own.id, action=Action.TOKEN_UNKNOWN)
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


# Calls, and the tokens that they were made with


Reported = Callable[..., ApiCall]


@pytest.fixture
def reported(rsa_keys: list[RSAPrivateKey], new_keys: list[KeptKey]) -> Reported:
    """Make the report of a call with a token of that `jti` and signing input; `signed_by` is the
    place of the key in `new_keys` whose signature goes along."""

    def made(
        jti: UUID, signing_input: bytes, *, signed_by: int | None = None, **members: Any
    ) -> ApiCall:
        defaults: dict[str, Any] = {
            "id": str(new_record_id(time.time())),
            "occurred_at": datetime.now(UTC),
            "jti": jti,
            "kid": new_keys[signed_by or 0].kid,
            "signing_input_sha256": base64url_encode(hashlib.sha256(signing_input).digest()),
            "action": "document.ingest",
            "resource": "documents/1",
            "outcome": Outcome.SUCCESS,
            "request_id": "request-1",
        }
        if signed_by is not None:
            signature = rsa_keys[signed_by].sign(signing_input, PKCS1v15(), SHA256())
            defaults["signature"] = base64url_encode(signature)
        return ApiCall(**{**defaults, **members})

    return made


@pytest.fixture
async def token(issuance: Callable[..., AuditRecord], connect_as: ConnectAs) -> AuditRecord:
    """The record of a token whose signing input is `token`."""
    service = await connect_as("service")
    record = issuance(signing_input_sha256=hashlib.sha256(b"token").digest())
    assert await service.fetchval(COMMIT, as_json([record])) == [True]
    return record


def judged(findings: Sequence[Attributed]) -> list[tuple[TokenStanding, str | None]]:
    return [(finding.standing, finding.reason) for finding in findings]


async def test_a_call_is_attributed_to_whom_its_token_was_issued_by_hand_or_not(
    events: AuditEvents,
    token: AuditRecord,
    issuance: Callable[..., AuditRecord],
    connect_as: ConnectAs,
    reported: Reported,
) -> None:
    service = await connect_as("service")
    minted = issuance(
        action=Action.TOKEN_MINT,
        credential_id=None,
        signing_input_sha256=hashlib.sha256(b"minted").digest(),
    )
    assert await service.fetchval(COMMIT, as_json([minted])) == [True]
    findings = await find([reported(token.id, b"token"), reported(minted.id, b"minted")], events)
    assert judged(findings) == [(TokenStanding.ISSUED, None)] * 2
    for finding, record in zip(findings, (token, minted), strict=True):
        assert finding.issued is not None
        assert finding.issued.service_user_id == record.service_user_id
        assert finding.issued.service_user == "vkyc-prod"
        assert finding.issued.source_system == "vkyc"
        assert finding.issued.credential_id == record.credential_id


async def test_neither_a_refusal_nor_a_reported_call_counts_as_an_issuance(
    events: AuditEvents,
    token: AuditRecord,
    ingest: Subject,
    loaded: Loaded,
    issuance: Callable[..., AuditRecord],
    connect_as: ConnectAs,
    reported: Reported,
) -> None:
    digest = hashlib.sha256(b"made up").digest()
    refused = issuance(outcome=Outcome.REFUSED, iat=None, signing_input_sha256=digest)
    service = await connect_as("service")
    assert await service.fetchval(COMMIT, as_json([refused])) == [True]
    call = loaded(ingest, action="document.ingest", jti=token.id, signing_input_sha256=digest)
    assert await events.report([call]) == [RECORDED]
    assert await events.issued([refused.id, call.id]) == {}
    assert await events.issued_digests([digest]) == frozenset()
    made_up = reported(refused.id, b"made up", signed_by=0)
    assert judged(await find([made_up], events)) == [(TokenStanding.FORGED, "never_issued")]


async def test_a_token_that_is_not_the_one_on_record_is_judged_by_its_signature(
    events: AuditEvents, token: AuditRecord, reported: Reported
) -> None:
    nobody = new_record_id(time.time())
    calls = [
        reported(token.id, b"token, more scope"),
        reported(nobody, b"invented"),
        reported(token.id, b"token, more scope", signed_by=0),
        reported(nobody, b"invented", signed_by=0),
        reported(nobody, b"invented", signed_by=2),
        reported(nobody, b"invented", signature="A" * 342),
        reported(nobody, b"invented", signature="B"),
        reported(token.id, b"token", signed_by=0),
    ]
    assert judged(await find(calls, events)) == [
        (TokenStanding.SIGNATURE_WANTED, None),
        (TokenStanding.SIGNATURE_WANTED, None),
        (TokenStanding.FORGED, "differs_from_its_record"),
        (TokenStanding.FORGED, "never_issued"),
        (TokenStanding.UNKNOWN, "not_signed_here"),
        (TokenStanding.UNKNOWN, "not_signed_here"),
        (TokenStanding.UNKNOWN, "not_signed_here"),
        (TokenStanding.ISSUED, None),
    ]


async def test_a_real_token_under_another_jti_accuses_no_key(
    events: AuditEvents, token: AuditRecord, reported: Reported
) -> None:
    lie = reported(new_record_id(time.time()), b"token", signed_by=0)
    assert judged(await find([lie], events)) == [(TokenStanding.UNKNOWN, "digest_of_another_token")]


async def test_a_signature_proves_whatever_became_of_its_key(
    events: AuditEvents,
    reported: Reported,
    signing_keys: SigningKeys,
    new_keys: list[KeptKey],
    policy: RotationPolicy,
    active_kid: str,
    act: MakeAct,
    superuser: Connection,
) -> None:
    assert await signing_keys.prepare(new_keys[1], act(Action.SIGNING_KEY_PREPARE))
    forged = [reported(new_record_id(time.time()), b"forged", signed_by=place) for place in (0, 1)]
    for state in ("active", "retired", "revoked"):
        await superuser.execute(
            "UPDATE signing_keys SET state = $2, sealed_private = NULL WHERE kid = $1",
            active_kid,
            state,
        )
        # The pending key signed nothing yet, so that whatever it signed was forged.
        assert judged(await find(forged, events)) == [(TokenStanding.FORGED, "never_issued")] * 2


async def test_where_the_record_may_have_been_archived_nothing_is_proven(
    events: AuditEvents,
    token: AuditRecord,
    reported: Reported,
    active_kid: str,
    superuser: Connection,
) -> None:
    this_month = datetime.now(UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    last_month = (this_month - timedelta(days=1)).replace(day=1)
    assert await events.kept_since() == last_month.timestamp()
    forged = reported(new_record_id(time.time()), b"forged", signed_by=0)
    await superuser.execute(
        "UPDATE signing_keys SET activated_at = $2 WHERE kid = $1",
        active_kid,
        this_month - timedelta(hours=1),
    )
    assert judged(await find([forged], events)) == [(TokenStanding.FORGED, "never_issued")]

    # That an older month is still here proves nothing.
    year_before = last_month.replace(year=last_month.year - 1)
    first, end = [
        await superuser.fetchval("SELECT uuidv7_floor_1($1)::text", at)
        for at in (year_before, year_before + timedelta(days=20))
    ]
    await superuser.execute(
        f"CREATE TABLE audit_records_{year_before:%Y_%m} PARTITION OF audit_records"
        f" FOR VALUES FROM ('{first}') TO ('{end}')"
    )
    assert await events.kept_since() == last_month.timestamp()
    month = last_month.strftime("%Y_%m")
    await superuser.execute(f"DROP TABLE audit_records_{month}, audit_personal_{month}")
    assert await events.kept_since() == this_month.timestamp()
    assert judged(await find([forged], events)) == [(TokenStanding.UNVERIFIABLE, "records_gone")]
    # What is kept still tells one token from another, and an honest report is what it was.
    lie = reported(new_record_id(time.time()), b"token", signed_by=0)
    assert judged(await find([lie, reported(token.id, b"token")], events)) == [
        (TokenStanding.UNKNOWN, "digest_of_another_token"),
        (TokenStanding.ISSUED, None),
    ]


async def test_after_a_restore_nothing_is_proven_of_keys_from_before_and_everything_of_new_ones(
    events: AuditEvents,
    token: AuditRecord,
    reported: Reported,
    active_kid: str,
    superuser: Connection,
    signing_keys: SigningKeys,
    new_keys: list[KeptKey],
    policy: RotationPolicy,
    act: MakeAct,
) -> None:
    old = reported(new_record_id(time.time()), b"lost with the backup", signed_by=0)
    assert judged(await find([old], events)) == [(TokenStanding.FORGED, "never_issued")]
    # As `restore accept` leaves it: another key signs, and then the new log is open.
    await superuser.execute(
        "UPDATE signing_keys SET state = 'revoked', sealed_private = NULL, ended_at = now()"
        " WHERE kid = $1",
        active_kid,
    )
    new = reported(new_record_id(time.time()), b"forged", signed_by=1)
    assert await signing_keys.prepare(new_keys[1], act(Action.SIGNING_KEY_PREPARE))
    assert await signing_keys.activate(
        new_keys[1].kid, None, policy, act(Action.SIGNING_KEY_ACTIVATE)
    )
    await superuser.execute(
        "INSERT INTO audit_logs (log, origin, public_key, sealed_private, begins_after, opened_at)"
        " SELECT n, 'tokens.example/audit/' || n, repeat('k', 32)::bytea, '', 0, clock_timestamp()"
        " FROM generate_series(1, 2) AS n"
    )
    assert judged(await find([old, new], events)) == [
        (TokenStanding.UNVERIFIABLE, "records_gone"),
        (TokenStanding.FORGED, "never_issued"),
    ]


async def test_a_call_keeps_its_token_and_when_it_happened(
    events: AuditEvents, token: AuditRecord, ingest: Subject, loaded: Loaded, superuser: Connection
) -> None:
    at = datetime(2026, 11, 24, 19, 0, 0, 123456, tzinfo=UTC)
    call = loaded(
        ingest,
        action="document.ingest",
        outcome=Outcome.FAILED,
        jti=token.id,
        occurred_at=at,
        service_user_id=token.service_user_id,
        credential_id=token.credential_id,
    )
    assert await events.report([call]) == [RECORDED]
    row = await superuser.fetchrow(
        "SELECT jti, occurred_at, outcome, version, exp FROM audit_records WHERE id = $1", call.id
    )
    assert row is not None
    assert tuple(row) == (token.id, at, "failed", None, None)


async def test_claims_beyond_the_limit_share_a_record_that_counts_them(
    log: AuditLog, ingest: Subject, search: Subject, loaded: Loaded, superuser: Connection
) -> None:
    unproven = UnprovenReports(audit=log, clock=time.time, window=0.5)
    made = [
        loaded(reporter, action=Action.TOKEN_UNKNOWN, jti=new_record_id(0), kid=KID)
        for reporter, count in ((ingest, MAX_UNPROVEN + 25), (search, 1))
        for _ in range(count)
    ]
    rooms = [unproven.has_room(report) for report in made]
    assert rooms == [True] * MAX_UNPROVEN + [False] * 25 + [True]
    query = (
        "SELECT actor, repeats, jti, kid FROM audit_records WHERE action = 'token.unknown'"
        " ORDER BY recorded_at"
    )
    async with asyncio.timeout(5):
        while not (rows := await superuser.fetch(query)):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    assert [tuple(row) for row in rows] == [("ingest", 25, None, None)]

    # The next minute has room again; and an orderly stop leaves nothing uncounted.
    rooms = [unproven.has_room(report) for report in made[: MAX_UNPROVEN + 2]]
    assert rooms == [True] * MAX_UNPROVEN + [False] * 2
    await unproven.drain()
    rows = await superuser.fetch(query)
    assert [row["repeats"] for row in rows] == [25, 2]


async def test_forged_tokens_of_the_last_days_are_counted(
    events: AuditEvents, ingest: Subject, loaded: Loaded, superuser: Connection
) -> None:
    assert await events.count_forged(7) == 0
    forged = [loaded(ingest, action=Action.TOKEN_FORGED, ago=n * 7 * 86_400) for n in range(2)]
    unknown = loaded(ingest, action=Action.TOKEN_UNKNOWN)
    assert set(await events.report([*forged, unknown])) == {RECORDED}
    assert await events.count_forged(7) == 2
    await superuser.execute(
        "UPDATE audit_records SET recorded_at = recorded_at - interval '8 days' WHERE id = $1",
        forged[1].id,
    )
    assert await events.count_forged(7) == 1


async def test_what_is_asked_about_tokens_is_answered_from_indexes(
    issuance: Callable[..., AuditRecord], connect_as: ConnectAs, superuser: Connection
) -> None:
    service = await connect_as("service")
    await superuser.execute(
        "INSERT INTO audit_records (id, commit_order, recorded_at, action, outcome, request_id,"
        " repeats, details, signing_input_sha256)"
        " SELECT overlay(uuidv7_floor_1(clock_timestamp())::text"
        " PLACING lpad(to_hex(n), 12, '0') FROM 25)::uuid, n, clock_timestamp(), 'token.issue',"
        " 'success', '', 1, '{}', sha256(n::text::bytea) FROM generate_series(1, 40000) AS n"
    )
    await superuser.execute("ANALYZE audit_records")
    ids = [row["id"] for row in await superuser.fetch("SELECT id FROM audit_records LIMIT 1000")]
    digests = [hashlib.sha256(str(n).encode()).digest() for n in range(1000)]
    for query, argument, rows in (
        (SELECT_ISSUED, ids, 1000),
        (SELECT_ISSUED_DIGESTS, digests, 1000),
        (COUNT_FORGED, 7, 0),
    ):
        explained = await service.fetchval(
            f"EXPLAIN (ANALYZE, TIMING OFF, FORMAT JSON) {query}", argument
        )
        scans = [node for node in plan_nodes(json.loads(explained)[0]["Plan"]) if on_the_log(node)]
        read = sum(
            (node["Actual Rows"] + node.get("Rows Removed by Filter", 0)) * node["Actual Loops"]
            for node in scans
        )
        assert read <= rows, scans


def plan_nodes(plan: dict[str, Any]) -> list[dict[str, Any]]:
    return [plan, *(node for inner in plan.get("Plans", []) for node in plan_nodes(inner))]


def on_the_log(node: dict[str, Any]) -> bool:
    return node.get("Relation Name", "").startswith("audit_records")
