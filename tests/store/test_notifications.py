"""What another process changed is forgotten when it is heard of, and all when nothing was heard."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from typing import TypeAlias

import asyncpg
import pytest
import structlog
from msgspec import Struct

from keys.secret import Secret
from keys.signer import KeptKey
from service.authority.audit import Action, AuditRecord
from service.authority.model import ServiceUser, Subject
from service.store.embedded import Running
from service.store.notifications import ChangeListener
from service.store.service_users import CachedDirectory, ServiceUsers
from service.store.signing_keys import SigningKeys

pytestmark = pytest.mark.anyio

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"
MakeAct = Callable[..., AuditRecord]
HEARD_WITHIN = 8.0


class Heard(Struct):
    """How often the listener connected, and how often it heard of signing keys."""

    connects: int = 0
    signing_keys: int = 0


@pytest.fixture
def directory(users: ServiceUsers) -> CachedDirectory:
    return CachedDirectory(users)


@pytest.fixture
async def heard(database: Running, directory: CachedDirectory) -> AsyncGenerator[Heard, None]:
    """A listener that runs, and empties `directory` as the server's does."""
    heard = Heard()

    async def on_connect() -> None:
        directory.forget_all()
        heard.connects += 1

    async def on_signing_keys() -> None:
        heard.signing_keys += 1

    listener = ChangeListener(
        database.service_dsn,
        on_connect=on_connect,
        on_service_user=directory.forget,
        on_signing_keys=on_signing_keys,
    )
    running = asyncio.create_task(listener.run())
    await until(lambda: heard.connects == 1)
    yield heard
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(HEARD_WITHIN):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def until_version(directory: CachedDirectory, client_id: str, version: int) -> None:
    async with asyncio.timeout(HEARD_WITHIN):
        while (await directory.cached(client_id)).version != version:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def describe(users: ServiceUsers, subject: Subject, act: MakeAct) -> ServiceUser:
    user = subject.service_user
    assert user is not None
    record = act(Action.SERVICE_USER_CHANGE, service_user_id=user.id, version=subject.version)
    assert await users.change(user, record)
    return user


async def test_a_change_drops_the_service_user_from_memory_and_nobody_else(
    heard: Heard,
    directory: CachedDirectory,
    users: ServiceUsers,
    holder: Subject,
    put: Callable[..., Awaitable[Subject]],
    new_user: Callable[..., ServiceUser],
    act: MakeAct,
) -> None:
    other = (await put(new_user("other"))).service_user
    assert other is not None
    user = holder.service_user
    assert user is not None
    # Heard in the order of the commits: of their making, too, then.
    await describe(users, holder, act)
    await until_version(directory, user.id, 3)
    kept = await directory.cached(other.id)
    await describe(users, await users.fresh(user.id), act)
    await until_version(directory, user.id, 4)
    assert await directory.cached(other.id) is kept
    assert heard.connects == 1


async def test_all_is_dropped_on_each_new_connection_since_anything_may_have_changed(
    heard: Heard,
    directory: CachedDirectory,
    users: ServiceUsers,
    holder: Subject,
    act: MakeAct,
    superuser: Connection,
) -> None:
    user = holder.service_user
    assert user is not None
    await directory.cached(user.id)
    await describe(users, holder, act)
    await until_version(directory, user.id, 3)
    # Nobody listens while it is changed.
    name = await superuser.fetchval("SELECT current_database()")
    await superuser.execute(f"ALTER DATABASE {name} CONNECTION LIMIT 0")
    assert await superuser.fetchval(
        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
        " WHERE datname = current_database() AND application_name = 'privyseal listener'"
    )
    async with asyncio.timeout(HEARD_WITHIN):
        while await superuser.fetch(  # noqa: ASYNC110
            "SELECT FROM pg_stat_activity"
            " WHERE datname = current_database() AND application_name = 'privyseal listener'"
        ):
            await asyncio.sleep(0.01)
    await describe(users, await users.fresh(user.id), act)
    assert (await directory.cached(user.id)).version == 3
    await superuser.execute(f"ALTER DATABASE {name} CONNECTION LIMIT -1")
    await until(lambda: heard.connects == 2)
    assert (await directory.cached(user.id)).version == 4
    # And it listens again.
    await describe(users, await users.fresh(user.id), act)
    await until_version(directory, user.id, 5)


async def test_a_step_of_a_key_is_heard_of(
    heard: Heard, signing_keys: SigningKeys, new_keys: list[KeptKey], act: MakeAct
) -> None:
    assert await signing_keys.prepare(new_keys[0], act(Action.SIGNING_KEY_PREPARE))
    await until(lambda: heard.signing_keys >= 1)


async def test_a_lost_postgres_is_logged_once() -> None:
    async def nothing() -> None:
        pass

    listener = ChangeListener(
        Secret("postgresql://privyseal_service@127.0.0.1:1/privyseal"),
        on_connect=nothing,
        on_service_user=lambda _: None,
        on_signing_keys=nothing,
    )
    with structlog.testing.capture_logs() as logs, suppress(TimeoutError):
        async with asyncio.timeout(1.8):  # time for four tries
            await listener.run()
    told = [entry["event"] for entry in logs if entry["log_level"] != "debug"]
    assert told == ["listener_disconnected"]
