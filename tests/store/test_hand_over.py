"""Hand-over and rotation in Postgres: guarded by what stands there, on record, and once (P2)."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any, TypeAlias

import asyncpg
import pytest

from keys.secret import Secret
from service.authority.audit import Action, AuditRecord
from service.authority.client_auth import authenticate, new_code, new_secret, secret_sha256
from service.authority.errors import Conflict, OAuthError
from service.authority.model import AdminScope, Credential, ServiceUser, Status, Subject
from service.store.database import Database
from service.store.restored import RestoredDatabase
from service.store.service_users import ServiceUsers
from tests.store.conftest import SKEW

pytestmark = pytest.mark.anyio

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"
MakeAct = Callable[..., AuditRecord]
Put = Callable[..., Awaitable[Subject]]
Offer = Callable[..., Awaitable[Credential]]

CODE = new_code()
CODE_SHA256 = secret_sha256(CODE)
OVERLAP = timedelta(days=7)


@pytest.fixture
def offer(
    users: ServiceUsers, holder: Subject, act: MakeAct, new_credential: Callable[..., Credential]
) -> Offer:
    """Hand a credential over to `holder`, under CODE; fields as given."""

    async def offered(**fields: Any) -> Credential:
        assert holder.service_user is not None
        ends_at = datetime.now(UTC) + timedelta(hours=24)
        credential = new_credential(
            holder.service_user.id, **{"label": "offered", "code_ends_at": ends_at, **fields}
        )
        record = act(
            Action.CREDENTIAL_HAND_OVER,
            service_user_id=holder.service_user.id,
            version=holder.version,
            credential_id=credential.id,
        )
        assert await users.hand_over(credential, CODE_SHA256, record)
        return credential

    return offered


@pytest.fixture
def open_it(users: ServiceUsers, holder: Subject, act: MakeAct) -> Callable[..., Awaitable[bool]]:
    """Open what has the code, as of now."""

    async def opened(secret: Secret, code_sha256: bytes = CODE_SHA256, **fields: Any) -> bool:
        assert holder.service_user is not None
        subject = await users.fresh(holder.service_user.id)
        about = {"service_user_id": holder.service_user.id, "version": subject.version}
        record = act(fields.pop("action", Action.CREDENTIAL_OPEN), **{**about, **fields})
        return await users.open_hand_over(code_sha256, secret_sha256(secret), record)

    return opened


Open = Callable[..., Awaitable[bool]]


async def records_of(superuser: Connection, action: str) -> list[asyncpg.Record]:
    return await superuser.fetch("SELECT * FROM audit_records WHERE action = $1", action)


async def test_an_offered_credential_is_read_back_and_no_secret_is_its_own(
    users: ServiceUsers, holder: Subject, offer: Offer
) -> None:
    offered = await offer()
    assert holder.service_user is not None
    subject = await users.fresh(holder.service_user.id)
    assert offered in subject.credentials
    assert offered.state(time.time()) == "offered"
    assert not offered.is_live(time.time())
    held = await users.handed_over(CODE_SHA256)
    assert held is not None
    assert (held.service_user, held.credential) == (subject.service_user, offered)
    assert await users.handed_over(secret_sha256(new_code())) is None
    with pytest.raises(OAuthError):
        authenticate(subject, CODE, time.time())


async def test_a_hand_over_without_a_code_would_be_a_credential_and_is_refused(
    users: ServiceUsers, holder: Subject, act: MakeAct, new_credential: Callable[..., Credential]
) -> None:
    assert holder.service_user is not None
    usable = new_credential(holder.service_user.id, label="usable", code_ends_at=None)
    record = act(
        Action.CREDENTIAL_HAND_OVER,
        service_user_id=holder.service_user.id,
        version=holder.version,
        credential_id=usable.id,
    )
    with pytest.raises(asyncpg.PostgresError, match="has a code"):
        await users.hand_over(usable, CODE_SHA256, record)


async def test_opening_puts_the_secret_in_on_record_and_raises_the_version(
    users: ServiceUsers, holder: Subject, offer: Offer, open_it: Open, superuser: Connection
) -> None:
    offered = await offer()
    assert holder.service_user is not None
    before = await users.fresh(holder.service_user.id)
    secret = new_secret()
    # What it is about, the function says, whatever its caller does.
    assert await open_it(secret, action=Action.AUDIT_QUERY, credential_id="cr_" + "a" * 24)
    after = await users.fresh(holder.service_user.id)
    assert after.version == before.version + 1
    assert authenticate(after, secret, time.time()).credential.id == offered.id
    (record,) = await records_of(superuser, "credential.open")
    assert (record["credential_id"], record["outcome"]) == (offered.id, "success")
    assert record["service_user_id"] == holder.service_user.id


async def test_of_many_openings_at_once_one_wins_and_the_others_leave_no_trace(
    users: ServiceUsers, holder: Subject, offer: Offer, open_it: Open, superuser: Connection
) -> None:
    await offer()
    assert holder.service_user is not None
    secrets = [new_secret() for _ in range(8)]
    results = await asyncio.gather(*(open_it(secret) for secret in secrets))
    assert results.count(True) == 1
    subject = await users.fresh(holder.service_user.id)
    assert authenticate(subject, secrets[results.index(True)], time.time())
    for loser in (secret for secret, won in zip(secrets, results, strict=True) if not won):
        with pytest.raises(OAuthError):
            authenticate(subject, loser, time.time())
    assert len(await records_of(superuser, "credential.open")) == 1
    assert not await open_it(new_secret())


@pytest.mark.parametrize(
    "arranged",
    [
        "UPDATE credentials SET code_ends_at = clock_timestamp() WHERE label = 'offered'",
        "UPDATE credentials SET expires_at = clock_timestamp() WHERE label = 'offered'",
        "UPDATE credentials SET revoked_at = clock_timestamp() WHERE label = 'offered'",
        "UPDATE credentials SET held_at = clock_timestamp() WHERE label = 'offered'",
        "UPDATE service_users SET status = 'disabled'",
    ],
)
async def test_what_opens_nothing_now_is_not_opened(
    offer: Offer, open_it: Open, superuser: Connection, arranged: str
) -> None:
    await offer()
    await superuser.execute(arranged)
    assert not await open_it(new_secret())
    assert await superuser.fetchval("SELECT count(opened_at) FROM credentials") == 0
    assert await records_of(superuser, "credential.open") == []


async def test_an_opening_that_was_decided_on_an_old_version_is_none(
    holder: Subject, offer: Offer, open_it: Open
) -> None:
    await offer()
    assert not await open_it(new_secret(), version=holder.version)
    assert not await open_it(new_secret(), code_sha256=secret_sha256(new_code()))
    assert await open_it(new_secret())


async def test_who_was_handed_a_credential_and_has_not_opened_it_cannot_administer(
    users: ServiceUsers,
    put: Put,
    new_user: Callable[..., ServiceUser],
    act: MakeAct,
    superuser: Connection,
) -> None:
    scopes = (AdminScope.SERVICE_USERS_WRITE.value,)
    operator = await put(new_user("operator", scopes=scopes))
    other = await put(new_user("other", scopes=scopes))
    assert other.service_user is not None
    await superuser.execute(
        "UPDATE credentials SET code_sha256 = $2, code_ends_at = clock_timestamp() + '1 h'"
        " WHERE service_user_id = $1",
        other.service_user.id,
        CODE_SHA256,
    )
    assert operator.service_user is not None
    record = act(
        Action.CREDENTIAL_REVOKE,
        service_user_id=operator.service_user.id,
        version=operator.version,
    )
    with pytest.raises(Conflict, match="nobody who can administer"):
        await users.revoke_credential(operator.credentials[0].id, record)
    await superuser.execute(
        "UPDATE credentials SET opened_at = clock_timestamp() WHERE code_sha256 IS NOT NULL"
    )
    assert await users.revoke_credential(operator.credentials[0].id, record)


async def test_what_lapsed_waits_for_no_confirmation(
    users: ServiceUsers, offer: Offer, superuser: Connection
) -> None:
    offered = await offer()
    await superuser.execute("UPDATE credentials SET held_at = clock_timestamp()")
    held = [each.credential.id for each in await users.held_after_restore("", 10, None)]
    assert offered.id in held
    assert len(held) == 2
    await superuser.execute(
        "UPDATE credentials SET code_ends_at = clock_timestamp() WHERE label = 'offered'"
    )
    held = [each.credential.id for each in await users.held_after_restore("", 10, None)]
    assert offered.id not in held
    assert len(held) == 1


@pytest.mark.parametrize(
    "change",
    [
        "revoked_at = clock_timestamp()",
        "expires_at = clock_timestamp()",
        "code_ends_at = clock_timestamp()",
        "held_at = clock_timestamp()",
    ],
)
async def test_a_restore_costs_no_credential_that_ended_or_is_held_already(
    offer: Offer, pool: Database, superuser: Connection, change: str
) -> None:
    await offer()
    restored = RestoredDatabase(pool, clock_skew=SKEW)
    assert (await restored.toll()).live_credentials == 2
    await superuser.execute(f"UPDATE credentials SET {change} WHERE label = 'offered'")
    assert (await restored.toll()).live_credentials == 1


# Rotation


@pytest.fixture
def rotate(
    users: ServiceUsers, holder: Subject, act: MakeAct, new_credential: Callable[..., Credential]
) -> Callable[..., Awaitable[Credential | None]]:
    """Rotate the first credential of `holder`, as of now."""

    async def rotated(**fields: Any) -> Credential | None:
        assert holder.service_user is not None
        old = holder.credentials[0]
        successor = new_credential(holder.service_user.id, label="successor", succeeds=old.id)
        subject = await users.fresh(holder.service_user.id)
        record = act(
            Action.CREDENTIAL_ROTATE,
            **{
                "service_user_id": holder.service_user.id,
                "version": subject.version,
                "actor_version": subject.version,
                "actor_id": holder.service_user.id,
                "actor_credential_id": old.id,
                **fields,
            },
        )
        done = await users.rotate_credential(old.id, successor, OVERLAP, record)
        return successor if done else None

    return rotated


Rotate = Callable[..., Awaitable[Credential | None]]


async def test_a_rotation_makes_one_successor_and_lets_the_old_one_end(
    users: ServiceUsers, holder: Subject, rotate: Rotate, superuser: Connection
) -> None:
    assert holder.service_user is not None
    successor = await rotate()
    assert successor is not None
    subject = await users.fresh(holder.service_user.id)
    assert subject.version == holder.version + 1
    old = next(held for held in subject.credentials if held.id == holder.credentials[0].id)
    assert abs(old.expires_at - datetime.now(UTC) - OVERLAP) < timedelta(minutes=1)
    assert next(held for held in subject.credentials if held.id == successor.id) == successor
    (record,) = await records_of(superuser, "credential.rotate")
    assert (record["credential_id"], record["actor_credential_id"]) == (successor.id, old.id)


async def test_of_many_rotations_at_once_one_is_done(rotate: Rotate, superuser: Connection) -> None:
    results = await asyncio.gather(*(rotate() for _ in range(8)))
    assert sum(each is not None for each in results) == 1
    assert await superuser.fetchval("SELECT count(*) FROM credentials") == 2
    assert await rotate() is None
    await superuser.execute(
        "UPDATE credentials SET revoked_at = clock_timestamp() WHERE label = 'successor'"
    )
    assert await rotate() is not None


async def test_a_rotation_never_prolongs_the_old_one(
    users: ServiceUsers, holder: Subject, rotate: Rotate, superuser: Connection
) -> None:
    assert holder.service_user is not None
    ends_at = datetime.now(UTC) + timedelta(days=2)
    await superuser.execute("UPDATE credentials SET expires_at = $1", ends_at)
    assert await rotate() is not None
    subject = await users.fresh(holder.service_user.id)
    assert ends_at in [held.expires_at for held in subject.credentials]


@pytest.mark.parametrize("column", ["revoked_at", "held_at", "expires_at"])
async def test_what_gets_no_tokens_is_not_rotated(
    rotate: Rotate, superuser: Connection, column: str
) -> None:
    await superuser.execute(f"UPDATE credentials SET {column} = clock_timestamp()")
    assert await rotate() is None
    assert await superuser.fetchval("SELECT count(*) FROM credentials") == 1


async def test_a_rotation_that_was_decided_on_an_old_version_is_none(
    holder: Subject, rotate: Rotate, superuser: Connection
) -> None:
    assert await rotate(version=holder.version - 1) is None
    assert await rotate(actor_version=holder.version - 1) is None
    assert await superuser.fetchval("SELECT count(*) FROM credentials") == 1
    await superuser.execute("UPDATE service_users SET status = $1", Status.ACTIVE)
    assert await rotate() is not None
