"""P2 and rotation raced by exchanging clients: what an act forbids, nobody gets once it returned.

Judges from outside: requests, answers, and the one clock of the process that sends them.
"""

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Generator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Final

import jwt
import msgspec
import pytest

from keys.envelope import KeyEncryptionKeys
from keys.keyring import KeyState, RotationPolicy
from keys.signer import generate
from service.authority.audit import Action, AuditRecord, Outcome, new_record_id
from service.store.database import Database
from service.store.signing_keys import SigningKeys
from tests.faults.admin_api import AdminAPI, IssuedCredential
from tests.faults.history import Act, Exchange, History, State, Verdict
from tests.faults.live_authority import LiveAuthority, live_authority
from tests.faults.wire import Connection, exchange_request, get_request, unverified_claims

pytestmark = pytest.mark.anyio

WORKERS: Final = 2
SERVICE_USERS: Final = 4
CLIENTS_EACH: Final = 4
ACTS: Final = 200
TRIES: Final = 3
TRIED_DEADLINE: Final = 15.0
PUBLISHED_DEADLINE: Final = 15.0
ROTATIONS: Final = 5
KEPT: Final = frozenset({"ingest:write"})
ALL: Final = KEPT | {"search:read"}
FORBIDDING: Final = ("disable", "revoke", "reduce")


@dataclass(slots=True, kw_only=True)
class Target:
    """One service user under test; clients try its two newest credentials, live or not."""

    history: History
    service_user_id: str
    credentials: list[IssuedCredential] = field(default_factory=list[IssuedCredential])
    unavailable: int = 0


@pytest.fixture(scope="module")
def authority() -> Generator[LiveAuthority, None, None]:
    """The product itself, two worker processes."""
    with live_authority(workers=WORKERS) as authority:
        yield authority


async def test_after_an_act_returned_no_process_issues_what_it_forbids(
    authority: LiveAuthority, capsys: pytest.CaptureFixture[str]
) -> None:
    targets = await _raced(authority, acts=ACTS)
    with capsys.disabled():
        print(f"\nP2 with LISTEN: {_summary(targets)}")
    _assert_kept(targets)


async def test_without_listen_the_versions_alone_keep_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with live_authority(workers=WORKERS, factory="tests.faults.variants:deaf") as deaf:
        targets = await _raced(deaf, acts=ACTS)
    with capsys.disabled():
        print(f"\nP2 without LISTEN: {_summary(targets)}")
    _assert_kept(targets)


async def test_the_same_check_finds_tokens_from_a_trusted_cache(
    capsys: pytest.CaptureFixture[str],
) -> None:
    factory = "tests.faults.variants:trusting_its_cache"
    with live_authority(workers=WORKERS, factory=factory) as gullible:
        targets = await _raced(gullible, acts=24)
    verdict = _verdict(targets)
    with capsys.disabled():
        print(f"\nP2 switched off: {_summary(targets)}")
    assert verdict.forbidden_tokens > 0
    assert verdict.wrong_refusals > 0


async def test_a_rotation_under_load_fails_no_request(
    authority: LiveAuthority, capsys: pytest.CaptureFixture[str]
) -> None:
    answers, key_sets = await _rotated(authority, times=ROTATIONS)
    statuses = Counter(status for _, status, _ in answers)
    kids = _kids_after_verification(answers, key_sets)
    with capsys.disabled():
        print(f"\nRotation: {ROTATIONS} rotations, answers {dict(statuses)}, kids {len(kids)}")
    assert set(statuses) == {200}
    assert len(kids) == ROTATIONS + 1


async def test_the_same_load_finds_processes_that_do_not_read_the_ring_again(
    capsys: pytest.CaptureFixture[str],
) -> None:
    factory = "tests.faults.variants:keeping_its_first_ring"
    with live_authority(workers=WORKERS, factory=factory) as stubborn:
        answers, _ = await _rotated(stubborn, times=1)
    statuses = Counter(status for _, status, _ in answers)
    with capsys.disabled():
        print(f"\nRotation, switched off: 1 rotation, answers {dict(statuses)}")
    assert statuses[503] > 0


async def _raced(authority: LiveAuthority, *, acts: int) -> list[Target]:
    """Carry out `acts` forbidding acts on four service users, raced by sixteen clients."""
    admin = await AdminAPI.enter(authority)
    targets: list[Target] = []
    for number in range(SERVICE_USERS):
        service_user_id = await admin.create_service_user(f"vkyc-{number}", sorted(ALL))
        target = Target(history=History(initial=State(scopes=ALL)), service_user_id=service_user_id)
        await _create_credential(admin, target)
        targets.append(target)
    clients = [
        _try_for_ever(authority.port, target) for target in targets for _ in range(CLIENTS_EACH)
    ]
    async with _running(*clients):
        await asyncio.gather(
            *(_administer(admin, target, acts // SERVICE_USERS) for target in targets)
        )
    await admin.leave()
    return targets


async def _administer(admin: AdminAPI, target: Target, acts: int) -> None:
    """Forbid something and, once enough exchanges have tried it, allow it again."""
    for number in range(acts):
        kind = FORBIDDING[number % len(FORBIDDING)]
        await asyncio.sleep(random.uniform(0.0, 0.05))
        if kind == "disable":
            await _act(target, kind, admin.disable(target.service_user_id), active=False)
            await _tried(target)
            await _act(target, "enable", admin.enable(target.service_user_id), active=True)
        elif kind == "reduce":
            await _set_scopes(admin, target, kind, KEPT)
            await _tried(target)
            await _set_scopes(admin, target, "restore", ALL)
        else:
            old = target.credentials[-1]
            await _create_credential(admin, target)
            await asyncio.sleep(random.uniform(0.0, 0.05))
            live = target.history.now.live - {old.id}
            await _act(target, kind, admin.revoke(old), live=live)
            await _tried(target)


async def _tried(target: Target) -> None:
    """Return once a few exchanges that began after the last act have ended."""
    answered, seen = target.history.acts[-1].answered, len(target.history.exchanges)
    async with asyncio.timeout(TRIED_DEADLINE):
        while _begun_after(answered, target.history.exchanges[seen:]) < TRIES:  # noqa: ASYNC110
            await asyncio.sleep(0.005)


def _begun_after(answered: float, exchanges: Sequence[Exchange]) -> int:
    return sum(exchange.begun > answered for exchange in exchanges)


async def _set_scopes(admin: AdminAPI, target: Target, kind: str, scopes: frozenset[str]) -> None:
    version = await admin.version(target.service_user_id)
    change = admin.set_scopes(target.service_user_id, version, sorted(scopes))
    await _act(target, kind, change, scopes=scopes)


async def _create_credential(admin: AdminAPI, target: Target) -> None:
    begun = time.monotonic()
    made = await admin.create_credential(target.service_user_id)
    now = target.history.now
    target.history.acts.append(
        Act(
            kind="create",
            begun=begun,
            answered=time.monotonic(),
            after=replace(now, live=now.live | {made.id}),
        )
    )
    target.credentials.append(made)


async def _act(target: Target, kind: str, call: Awaitable[None], **change: Any) -> None:
    begun = time.monotonic()
    await call
    after = replace(target.history.now, **change)
    target.history.acts.append(Act(kind=kind, begun=begun, answered=time.monotonic(), after=after))


async def _try_for_ever(port: int, target: Target) -> None:
    connection = await Connection.open(port)
    while True:
        # Leaves the cores some room: the acts, too, have to come through.
        await asyncio.sleep(random.uniform(0.0, 0.02))
        credential = random.choice(target.credentials[-2:])
        request = exchange_request(credential.client_id, credential.client_secret)
        begun = time.monotonic()
        status, body = await connection.request(request)
        ended = time.monotonic()
        if status == 503:
            target.unavailable += 1
            continue
        assert status in (200, 401), body
        token = msgspec.json.decode(body)["access_token"] if status == 200 else None
        scopes = None if token is None else frozenset(unverified_claims(token)["scope"].split(" "))
        target.history.exchanges.append(
            Exchange(credential_id=credential.id, begun=begun, ended=ended, scopes=scopes)
        )


async def _exchange_for_ever(
    port: int, request: bytes, answers: list[tuple[float, int, bytes]]
) -> None:
    connection = await Connection.open(port)
    while True:
        status, body = await connection.request(request)
        answers.append((time.monotonic(), status, body))


async def _rotated(
    authority: LiveAuthority, *, times: int
) -> tuple[list[tuple[float, int, bytes]], list[tuple[float, bytes]]]:
    """Rotate under the load of sixteen clients; return their answers and the key sets meanwhile."""
    admin = await AdminAPI.enter(authority)
    service_user_id = await admin.create_service_user("vkyc-rotation", sorted(ALL))
    credential = await admin.create_credential(service_user_id)
    await admin.leave()
    request = exchange_request(credential.client_id, credential.client_secret)
    answers: list[tuple[float, int, bytes]] = []
    key_sets: list[tuple[float, bytes]] = []
    async with _running(
        *(
            _exchange_for_ever(authority.port, request, answers)
            for _ in range(SERVICE_USERS * CLIENTS_EACH)
        ),
        _fetch_keys_for_ever(authority.port, key_sets),
    ):
        await asyncio.sleep(0.3)
        await _rotate(authority, key_sets, times=times)
        await asyncio.sleep(0.3)
    return answers, key_sets


async def _fetch_keys_for_ever(port: int, key_sets: list[tuple[float, bytes]]) -> None:
    connection = await Connection.open(port)
    while True:
        begun = time.monotonic()
        status, body = await connection.request(get_request("/.well-known/jwks.json"))
        assert status == 200, body
        key_sets.append((begun, body))
        await asyncio.sleep(0.02)


async def _rotate(
    authority: LiveAuthority, key_sets: list[tuple[float, bytes]], *, times: int
) -> None:
    """Let pending keys sign long before their time, but once they are in the last of `key_sets`."""
    keks = KeyEncryptionKeys.parse((authority.data_dir / "kek").read_text("utf-8"))
    policy = RotationPolicy(
        publish_lead=0, rotation_period=30 * 86_400, lifetime_cap=3600, clock_skew=60
    )
    async with Database(authority.service_dsn, application_name="tests rotation") as database:
        store = SigningKeys(database, clock_skew=60)
        for _ in range(times):
            kids = {each.key.state: each.key.kid for each in await store.published_keys()}
            pending, active = kids[KeyState.PENDING], kids[KeyState.ACTIVE]
            async with asyncio.timeout(PUBLISHED_DEADLINE):
                while not key_sets or pending.encode() not in key_sets[-1][1]:  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
            record = _record(Action.SIGNING_KEY_ACTIVATE, pending)
            assert await store.activate(pending, active, policy, record)
            await asyncio.sleep(random.uniform(0.2, 0.4))
            key = await asyncio.to_thread(generate, 2048, keks)
            # A rotator of the authority may have been faster: a key stands ready all the same.
            await store.prepare(key, _record(Action.SIGNING_KEY_PREPARE, key.kid))
            await asyncio.sleep(random.uniform(0.2, 0.4))


def _record(action: Action, kid: str) -> AuditRecord:
    return AuditRecord(
        id=new_record_id(time.time()),
        action=action,
        outcome=Outcome.SUCCESS,
        actor="privyseal",
        kid=kid,
    )


def _kids_after_verification(
    answers: list[tuple[float, int, bytes]], key_sets: list[tuple[float, bytes]]
) -> set[str]:
    """Verify each token with the first key set that was fetched after it; return its keys."""
    kids: set[str] = set()
    sets = iter(key_sets)
    fetched, keys = float("-inf"), jwt.PyJWKSet.from_json(key_sets[0][1].decode())
    for received, status, body in answers:
        if status != 200 or received > key_sets[-1][0]:
            continue
        while fetched < received:
            fetched, jwks = next(sets)
            keys = jwt.PyJWKSet.from_json(jwks.decode())
        token: str = msgspec.json.decode(body)["access_token"]
        kid: str = jwt.get_unverified_header(token)["kid"]
        jwt.decode(token, keys[kid].key, ["RS256"], options={"verify_aud": False})
        kids.add(kid)
    return kids


@asynccontextmanager
async def _running(*work: Any) -> AsyncGenerator[None, None]:
    """Run what goes on for ever until the block ends; fail if any of it ended before."""
    tasks = [asyncio.create_task(each) for each in work]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(end, asyncio.CancelledError) for end in ends), ends


def _verdict(targets: list[Target]) -> Verdict:
    return sum((target.history.judge() for target in targets), Verdict())


def _assert_kept(targets: list[Target]) -> None:
    verdict = _verdict(targets)
    assert sum(_forbidding_acts(targets).values()) == ACTS
    assert verdict.decided >= TRIES * ACTS, "hardly any race: this run proves nothing"
    assert verdict.forbidden_tokens == 0
    assert verdict.wrong_refusals == 0


def _forbidding_acts(targets: list[Target]) -> Counter[str]:
    return Counter(
        act.kind for target in targets for act in target.history.acts if act.kind in FORBIDDING
    )


def _summary(targets: list[Target]) -> str:
    verdict = _verdict(targets)
    return (
        f"{len(targets)} histories, {dict(_forbidding_acts(targets))}, "
        f"{verdict.exchanges} exchanges ({verdict.refused} refused, "
        f"{verdict.decided} with one right outcome, "
        f"{sum(target.unavailable for target in targets)} answered 503 beside), "
        f"forbidden tokens {verdict.forbidden_tokens}, wrong refusals {verdict.wrong_refusals}"
    )
