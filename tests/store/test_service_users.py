"""Acts on service users and credentials: decided on a version, on record, and final (P2)."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final, TypeAlias

import asyncpg
import msgspec
import pytest

from keys.keyring import RotationPolicy
from service.authority.administration import first_operator
from service.authority.audit import Action, AuditRecord
from service.authority.clock import DatabaseClock
from service.authority.errors import Conflict
from service.authority.model import (
    MAX_SEARCH,
    AdminScope,
    Credential,
    ServiceUser,
    ServiceUserFilter,
    Status,
    Subject,
)
from service.store import service_users
from service.store.audit_log import PostgresRecordWriter
from service.store.database import Database
from service.store.embedded import Running
from service.store.service_users import CachedDirectory, ServiceUsers
from service.store.signing_keys import SigningKeys
from service.store.usage import RecordedUses
from tests.store.conftest import not_compared

pytestmark = pytest.mark.anyio

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"
Issuance = Callable[..., AuditRecord]
MakeAct = Callable[..., AuditRecord]
MakeUser = Callable[..., ServiceUser]
MakeCredential = Callable[..., Credential]
Put = Callable[..., Awaitable[Subject]]

OPERATOR_SCOPES = (AdminScope.SERVICE_USERS_WRITE.value,)


def user_of(subject: Subject) -> ServiceUser:
    assert subject.service_user is not None
    return subject.service_user


@pytest.fixture
def change(users: ServiceUsers, act: MakeAct) -> Callable[..., Awaitable[bool]]:
    """Change a service user as it was read."""

    async def changed(subject: Subject, **fields: Any) -> bool:
        user = user_of(subject)
        record = act(Action.SERVICE_USER_CHANGE, service_user_id=user.id, version=subject.version)
        return await users.change(msgspec.structs.replace(user, **fields), record)

    return changed


@pytest.fixture
def revoke(users: ServiceUsers, act: MakeAct) -> Callable[[Subject], Awaitable[bool]]:
    """Revoke the only credential of a service user as it was read."""

    async def revoked(subject: Subject) -> bool:
        record = act(
            Action.CREDENTIAL_REVOKE, service_user_id=user_of(subject).id, version=subject.version
        )
        return await users.revoke_credential(subject.credentials[0].id, record)

    return revoked


Change = Callable[..., Awaitable[bool]]
Revoke = Callable[[Subject], Awaitable[bool]]


async def count(superuser: Connection, action: Action) -> int:
    return await superuser.fetchval("SELECT count(*) FROM audit_records WHERE action = $1", action)


# Creating and reading


async def test_what_was_created_is_read_back_as_it_was(
    users: ServiceUsers, new_user: MakeUser, new_credential: MakeCredential, act: MakeAct
) -> None:
    text = "' OR 1=1; DROP TABLE service_users; -- {} % \\ \" 🔒 ü"
    user = new_user("vkyc-prod", owner=text, contact=text, description=text, scopes=())
    assert await users.create(user, act(Action.SERVICE_USER_CREATE))
    assert await users.fresh(user.id) == Subject(service_user=user)

    credential = new_credential(user.id, label=text)
    assert await users.create_credential(credential, act(Action.CREDENTIAL_CREATE))
    subject = await users.fresh(user.id)
    assert subject.credentials == (credential,)
    assert subject.version == 2


async def test_nobody_is_found_under_an_unknown_id(users: ServiceUsers) -> None:
    for client_id in ("su_" + "n" * 24, "", "' OR true --"):
        assert await users.fresh(client_id) == Subject()


async def test_a_name_is_taken_once_and_the_loser_leaves_no_record(
    users: ServiceUsers, new_user: MakeUser, act: MakeAct, superuser: Connection
) -> None:
    results = await asyncio.gather(
        *(users.create(new_user("vkyc-prod"), act(Action.SERVICE_USER_CREATE)) for _ in range(8)),
        return_exceptions=True,
    )
    assert results.count(True) == 1
    assert [type(each) for each in results if each is not True] == [Conflict] * 7
    assert await count(superuser, Action.SERVICE_USER_CREATE) == 1


async def test_a_change_to_a_taken_name_is_a_conflict(
    put: Put, new_user: MakeUser, change: Change, users: ServiceUsers
) -> None:
    await put(new_user("taken"))
    other = await put(new_user("other"))
    with pytest.raises(Conflict, match="taken"):
        await change(other, name="taken")
    assert await users.fresh(user_of(other).id) == other


async def test_the_tables_refuse_what_no_code_should_ever_write(
    users: ServiceUsers, new_user: MakeUser, act: MakeAct, superuser: Connection
) -> None:
    for fields in (
        {"id": "su_short"},
        {"name": "Upper"},
        {"name": "new\nline"},
        {"source_system": "a-b"},
        {"owner": "x" * 201},
        {"scopes": ("UPPER",)},
        {"audiences": ()},
        {"audiences": ("https://ü.example",)},
        {"token_lifetime": 3601},
        {"token_lifetime": 59},
        {"status": "asleep"},
        {"version": 0},
    ):
        user = new_user("vkyc-prod", **fields) if "name" not in fields else new_user(**fields)
        with pytest.raises(asyncpg.CheckViolationError):
            await users.create(user, act(Action.SERVICE_USER_CREATE))
    assert await count(superuser, Action.SERVICE_USER_CREATE) == 0


async def test_pages_follow_the_names_and_filters_narrow_them(
    users: ServiceUsers, put: Put, new_user: MakeUser, change: Change
) -> None:
    for name in ("b", "a", "d", "c"):
        subject = await put(new_user(name, source_system="vkyc" if name < "c" else "scan"))
        if name == "d":
            await change(subject, status=Status.DISABLED)

    async def names(after: str = "", limit: int = 10, **wanted: Any) -> list[str]:
        page = await users.page(ServiceUserFilter(**wanted), after=after, limit=limit)
        return [user.name for user in page]

    assert await names() == ["a", "b", "c", "d"]
    assert await names(limit=2) == ["a", "b"]
    assert await names(after="b") == ["c", "d"]
    assert await names(name="c") == ["c"]
    assert await names(source_system="scan") == ["c", "d"]
    assert await names(status=Status.DISABLED) == ["d"]
    assert await names(source_system="vkyc", status=Status.DISABLED) == []
    assert await names(source_system="' OR true --") == []


SOUGHT: Final[Sequence[tuple[str, list[str]]]] = (
    ("prod", ["docs.prod", "vkyc-prod"]),
    ("VKYC", ["vkyc-prod", "vkyc-test"]),
    ("vkyc prod", ["vkyc-prod"]),
    ("prod vkyc", ["vkyc-prod"]),
    ("rod", []),
    ("vkyc-prod", ["vkyc-prod"]),
    ("ident müll", ["vkyc-prod"]),
    ("MÜLLER", ["vkyc-prod"]),
    ("12e5a", ["vkyc-prod"]),  # a parser of text takes 12e5 for a number
    ("document", ["docs.prod"]),
    ("bank.example", ["docs.prod", "vkyc-prod"]),
    ("docs@bank.example", ["docs.prod"]),
    ("example document prod", ["docs.prod"]),
    ("not there", []),
    ("description", []),
    ("nobody's", ["vkyc-test"]),
    ("s", ["docs.prod", "vkyc-test"]),
    ("東", ["vkyc-test"]),
    ("京", []),
    *((signs, []) for signs in ("-", "***", "' OR true --", ":* & | ! <-> ( ) \\", "\0", "\x1f")),
    ("vkyc\0test':*", ["vkyc-test"]),
    ("!vkyc | nothing", []),
    ("vkyc " * 60, ["vkyc-prod", "vkyc-test"]),
    ("é" * MAX_SEARCH, []),
    (" ".join("abcdefghijklmnopqrstuvwxyz0123456789" * 4), []),
)


@pytest.mark.parametrize("few", [0, 1, service_users.FEW])
async def test_a_search_finds_the_beginning_of_any_word_of_name_owner_and_contact(
    users: ServiceUsers,
    put: Put,
    new_user: MakeUser,
    pool: Database,
    monkeypatch: pytest.MonkeyPatch,
    few: int,
) -> None:
    monkeypatch.setattr(service_users, "FEW", few)
    made = [
        new_user("vkyc-prod", owner="Identity (Müller)", contact="12e5abc@bank.example"),
        new_user("vkyc-test", owner="Nobody's 東京", contact="", description="description"),
        new_user("docs.prod", owner="Document Service", contact="docs@bank.example"),
    ]
    for user in made:
        await put(user)
    listed = RecordedUses(pool)

    async def names(search: str, **wanted: Any) -> list[str]:
        sought = ServiceUserFilter(search=search, **wanted)
        found = await users.page(sought, after="", limit=10)
        rows = await listed.page(sought, after="", limit=10, ending_within=timedelta(1))
        assert [row.service_user for row in rows] == found, search
        return [user.name for user in found]

    for search, expected in SOUGHT:
        assert await names(search) == expected, search
    assert await names(made[0].id) == ["vkyc-prod"]
    assert await names(f" {made[0].id.upper()} ") == ["vkyc-prod"]
    assert await names(made[0].id[:-1]) == []
    assert await names("prod", source_system="vkyc", status=Status.DISABLED) == []


async def test_a_search_follows_a_change(
    users: ServiceUsers, put: Put, new_user: MakeUser, change: Change
) -> None:
    subject = await put(new_user("vkyc-prod", owner="Before"))
    await change(subject, owner="After")
    for search, count in (("before", 0), ("after", 1)):
        found = await users.page(ServiceUserFilter(search=search), after="", limit=10)
        assert len(found) == count


async def test_the_last_use_of_a_credential_is_its_newest_token(
    users: ServiceUsers, holder: Subject, issuance: Issuance, writer: PostgresRecordWriter
) -> None:
    user_id = user_of(holder).id
    (unused,) = await users.credentials(user_id)
    assert unused.last_used_at is None
    before = datetime.now(UTC)
    assert await writer.commit([issuance(), issuance(version=1)]) == [True, False]
    (used,) = await users.credentials(user_id)
    assert used.last_used_at is not None
    assert before - timedelta(seconds=5) < used.last_used_at < datetime.now(UTC)


async def test_live_tokens_are_counted_until_the_last_of_them_ends(
    users: ServiceUsers, holder: Subject, issuance: Issuance, writer: PostgresRecordWriter
) -> None:
    user_id, credential_id = user_of(holder).id, holder.credentials[0].id
    none = await users.live_tokens(user_id)
    assert (none.count, none.last_ends_at) == (0, None)
    now = int(time.time())
    ended = issuance(iat=now - 50, exp=now - 1)
    last = issuance(exp=now + 1800)
    by_another_way = issuance(credential_id=None)
    assert all(await writer.commit([ended, issuance(), last, by_another_way]))
    live = await users.live_tokens(user_id)
    assert live.count == 3
    assert live.last_ends_at == datetime.fromtimestamp(now + 1800, UTC)
    assert (await users.live_tokens(user_id, credential_id)).count == 2
    assert (await users.live_tokens("su_" + "n" * 24)).count == 0


async def test_tokens_of_a_revoked_key_are_no_live_tokens(
    users: ServiceUsers,
    pool: Database,
    holder: Subject,
    issuance: Issuance,
    writer: PostgresRecordWriter,
    signing_keys: SigningKeys,
    policy: RotationPolicy,
    act: MakeAct,
) -> None:
    user_id, credential_id = user_of(holder).id, holder.credentials[0].id
    assert all(await writer.commit([issuance(), issuance()]))
    (active,) = [stored.key for stored in await signing_keys.published_keys()]
    counts = (
        lambda: users.live_tokens(user_id),
        lambda: users.live_tokens(user_id, credential_id),
        lambda: RecordedUses(pool).live_tokens(user_id, 1000),
    )
    assert [(await counted()).count for counted in counts] == [2, 2, 2]
    assert await signing_keys.revoke(active, policy, act(Action.SIGNING_KEY_REVOKE))
    for counted in counts:
        live = await counted()
        assert (live.count, live.last_ends_at) == (0, None)


# Versions


async def test_each_change_raises_the_version_and_an_old_one_changes_nothing(
    users: ServiceUsers,
    holder: Subject,
    change: Change,
    revoke: Revoke,
    superuser: Connection,
) -> None:
    assert holder.version == 2
    assert await change(holder, scopes=("search:read",))
    for late in (change(holder, scopes=("ingest:write",)), revoke(holder)):
        assert not await late
    changed = await users.fresh(user_of(holder).id)
    assert (changed.version, user_of(changed).scopes) == (3, ("search:read",))
    assert await revoke(changed)
    revoked = await users.fresh(user_of(holder).id)
    assert revoked.version == 4
    assert revoked.credentials[0].revoked_at is not None
    assert await count(superuser, Action.SERVICE_USER_CHANGE) == 1
    assert await count(superuser, Action.CREDENTIAL_REVOKE) == 1


async def test_of_many_changes_decided_on_one_version_exactly_one_happens(
    users: ServiceUsers, holder: Subject, change: Change, superuser: Connection
) -> None:
    results = await asyncio.gather(
        *(change(holder, description=f"change {number}") for number in range(10))
    )
    assert results.count(True) == 1
    after = await users.fresh(user_of(holder).id)
    assert after.version == 3
    assert user_of(after).description == f"change {results.index(True)}"
    assert await count(superuser, Action.SERVICE_USER_CHANGE) == 1


async def test_once_a_revocation_has_returned_nobody_commits_a_token_on_what_was_before(
    database: Running,
    users: ServiceUsers,
    holder: Subject,
    change: Change,
    issuance: Issuance,
) -> None:
    writers = [
        PostgresRecordWriter(
            database.service_dsn,
            clock=DatabaseClock(time.time),
            clock_skew=60,
            compare=not_compared,
        )
        for _ in range(4)
    ]
    for writer in writers:
        await writer.open(lambda: None)
    subject, returned = holder, 0.0
    wrong: list[tuple[float, float]] = []
    kept = 0

    async def keep_committing(writer: PostgresRecordWriter) -> None:
        nonlocal kept
        while True:
            began, version = time.monotonic(), subject.version
            (recorded,) = await writer.commit([issuance(version=version)])
            kept += recorded
            if recorded and version == subject.version and 0 < returned < began:
                wrong.append((began, returned))
            await asyncio.sleep(0)

    async with asyncio.TaskGroup() as tasks:
        committing = [tasks.create_task(keep_committing(writer)) for writer in writers]
        for _ in range(15):
            await asyncio.sleep(0.02)
            assert await change(subject, status=Status.ACTIVE)
            returned = time.monotonic()
            await asyncio.sleep(0.02)
            subject, returned = await users.fresh(user_of(holder).id), 0.0
        for task in committing:
            task.cancel()
    for writer in writers:
        await writer.close()
    assert kept > 15
    assert wrong == []


# The last one who can administer


@pytest.fixture
async def operator(put: Put, new_user: MakeUser) -> Subject:
    return await put(new_user("operator", scopes=OPERATOR_SCOPES))


async def test_the_last_operator_can_be_neither_disabled_nor_stripped_nor_locked_out(
    users: ServiceUsers,
    operator: Subject,
    change: Change,
    revoke: Revoke,
    superuser: Connection,
) -> None:
    records = await superuser.fetchval("SELECT count(*) FROM audit_records")
    for attempt in (
        change(operator, status=Status.DISABLED),
        change(operator, scopes=(AdminScope.SERVICE_USERS_READ.value,)),
        revoke(operator),
    ):
        with pytest.raises(Conflict, match="the last live holder of service-users:write"):
            await attempt
    assert await users.fresh(user_of(operator).id) == operator
    assert await superuser.fetchval("SELECT count(*) FROM audit_records") == records


async def test_an_operator_whose_credential_has_ended_does_not_count(
    operator: Subject, put: Put, new_user: MakeUser, change: Change
) -> None:
    ended = datetime.now(UTC) - timedelta(seconds=1)
    await put(new_user("gone", scopes=OPERATOR_SCOPES), expires_at=ended)
    with pytest.raises(Conflict):
        await change(operator, status=Status.DISABLED)
    await put(new_user("live", scopes=OPERATOR_SCOPES))
    assert await change(operator, status=Status.DISABLED)


async def test_of_two_operators_who_disable_each_other_one_is_left(
    operator: Subject, put: Put, new_user: MakeUser, change: Change, users: ServiceUsers
) -> None:
    other = await put(new_user("other", scopes=OPERATOR_SCOPES))
    results = await asyncio.gather(
        *(change(subject, status=Status.DISABLED) for subject in (operator, other)),
        return_exceptions=True,
    )
    assert {type(result) for result in results} == {bool, Conflict}
    states = [user_of(await users.fresh(user_of(each).id)).status for each in (operator, other)]
    assert sorted(states) == [Status.ACTIVE, Status.DISABLED]


async def test_where_nobody_could_administer_anyone_may_be_changed(
    holder: Subject, change: Change
) -> None:
    assert await change(holder, status=Status.DISABLED)


async def test_of_many_bootstraps_one_makes_the_first_operator_and_force_makes_another(
    users: ServiceUsers, superuser: Connection
) -> None:
    async def bootstrap(name: str, *, force: bool = False) -> bool:
        user, credential, _, record = first_operator(
            name, "https://tokens.example/api/v1", time.time(), "lost"
        )
        return await users.bootstrap(user, credential, record, force=force)

    results = await asyncio.gather(*(bootstrap(f"operator-{number}") for number in range(8)))
    assert results.count(True) == 1
    assert await bootstrap("recovered", force=True)
    with pytest.raises(Conflict):
        await bootstrap("recovered", force=True)
    assert await superuser.fetchval("SELECT count(*) FROM service_users") == 2
    assert await count(superuser, Action.OPERATOR_BOOTSTRAP) == 2


# The directory


async def test_the_directory_answers_from_memory_until_it_is_told_to_forget(
    users: ServiceUsers, holder: Subject, change: Change
) -> None:
    directory, client_id = CachedDirectory(users), user_of(holder).id
    assert await directory.cached(client_id) == holder
    assert await change(holder, description="changed")
    assert (await directory.cached(client_id)).version == 2
    for forget in (lambda: directory.forget(client_id), directory.forget_all):
        forget()
        assert (await directory.cached(client_id)).version == 3
    assert (await directory.fresh(client_id)).version == 3


async def test_what_cannot_be_an_id_is_nobody_without_a_read(users: ServiceUsers) -> None:
    directory = CachedDirectory(users)
    for client_id in ("", "operator", "su_", "su_" + "n" * 25, "su_" + "ü" * 24, "\0" * 27):
        assert await directory.fresh(client_id) == Subject()
