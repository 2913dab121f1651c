"""Connections have deadlines, losing one has one name, and unsafe servers are refused at start."""

import asyncio
import re
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import pytest
import structlog.testing

from keys.secret import Secret
from service.authority.errors import StartRefused, StoreUnavailable
from service.store.database import (
    ConnectionRefused,
    Database,
    Deadlines,
    check_server,
    connect,
    loss_as_unavailable,
)
from service.store.embedded import EmbeddedPostgres, Running

pytestmark = pytest.mark.anyio

QUICK = Deadlines(statement=0.3, lock=0.2, command=0.8, connect=0.5, acquire=0.3)
CANARY = "canary-41aa"

AUDIT_TABLES = """
CREATE TABLE audit_records (id integer) PARTITION BY RANGE (id);
CREATE TABLE audit_records_1 PARTITION OF audit_records FOR VALUES FROM (0) TO (10);
CREATE TABLE audit_personal (id integer);
GRANT SELECT, INSERT ON audit_records, audit_personal TO privyseal_service;
"""

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def listening(handler: Handler, dsn: Secret) -> AsyncGenerator[Secret, None]:
    """Let `handler` answer on a port; yield `dsn` with this port."""
    server = await asyncio.start_server(handler, "127.0.0.1", 0)
    port: int = server.sockets[0].getsockname()[1]
    parts = urlsplit(dsn.reveal())
    try:
        yield Secret(dsn.reveal().replace(f":{parts.port}/", f":{port}/"))
    finally:
        server.close()


def dropping_notifications(target: Running) -> Handler:
    """A go-between that passes everything on but NotificationResponse, as some poolers do."""

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65_536):
            writer.write(data)
        writer.close()

    async def pass_messages(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = await reader.readexactly(5)
            body = await reader.readexactly(int.from_bytes(head[1:]) - 4)
            if head[:1] != b"A":
                writer.write(head + body)

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_connection("127.0.0.1", target.port)
        up = asyncio.create_task(pass_on(reader, server_writer))
        down = asyncio.create_task(pass_messages(server_reader, writer))
        await asyncio.wait({up, down}, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.gather(up, down, return_exceptions=True)
        writer.close()

    return handle


async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()  # the client's deadline ends this
    writer.close()


async def test_every_connection_has_deadlines_and_a_name(database: Running) -> None:
    async def settings(connection: "asyncpg.Connection[asyncpg.Record]") -> list[str]:
        names = ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout")
        return [
            await connection.fetchval("SELECT current_setting($1)", name)
            for name in (*names, "application_name", "timezone")
        ]

    expected = ["5s", "2s", "10s", "privyseal test", "UTC"]
    connection = await connect(database.service_dsn, application_name="privyseal test")
    assert await settings(connection) == expected
    connection.terminate()
    async with (
        Database(database.service_dsn, application_name="privyseal test") as pool,
        pool.connection() as pooled,
    ):
        assert [
            await pooled.fetchval("SELECT current_setting('statement_timeout')"),
            await pooled.fetchval("SELECT current_setting('application_name')"),
        ] == ["5s", "privyseal test"]


async def test_a_server_that_is_away_or_silent_is_unavailable_in_time(database: Running) -> None:
    nobody_there = Secret("postgresql://u@127.0.0.1:1/x?sslmode=disable")
    async with listening(silent, database.service_dsn) as black_hole:
        for dsn in (nobody_there, black_hole):
            started = time.monotonic()
            with pytest.raises(StoreUnavailable):
                await connect(dsn, application_name="test", deadlines=QUICK)
            async with Database(dsn, application_name="test", deadlines=QUICK) as pool:
                with pytest.raises(StoreUnavailable):
                    async with pool.connection():
                        pass
            assert time.monotonic() - started < 3


async def test_the_primary_is_found_among_several_hosts(database: Running) -> None:
    dsn = database.service_dsn.reveal().replace("@127.0.0.1", "@127.0.0.1:1,127.0.0.1")
    connection = await connect(Secret(dsn), application_name="test")
    assert await connection.fetchval("SELECT current_user") == "privyseal_service"
    connection.terminate()


async def test_a_pool_opens_while_postgres_is_away_and_recovers_by_itself(data_dir: Path) -> None:
    server = EmbeddedPostgres(data_dir)
    running = server.start()
    server.stop()
    try:
        async with Database(running.service_dsn, application_name="test") as pool:
            for _ in range(2):
                with pytest.raises(StoreUnavailable):
                    async with pool.connection() as connection:
                        await connection.fetchval("SELECT 1")
                server.start()
                async with pool.connection() as connection:
                    assert await connection.fetchval("SELECT 1") == 1
                server.stop()
    finally:
        server.stop()


async def test_a_connection_ended_by_the_server_is_unavailable_and_replaced(
    database: Running,
) -> None:
    killer = await connect(database.superuser_dsn, application_name="test")
    async with Database(database.service_dsn, application_name="test", max_size=1) as pool:
        async with pool.connection() as connection:
            before = await connection.fetchval("SELECT pg_backend_pid()")
            await killer.execute("SELECT pg_terminate_backend($1)", before)
            with pytest.raises(StoreUnavailable), loss_as_unavailable():
                await connection.fetchval("SELECT 1")
        async with pool.connection() as connection:
            assert await connection.fetchval("SELECT pg_backend_pid()") != before
    killer.terminate()


async def test_slow_statements_locks_and_an_exhausted_pool_are_unavailable(
    database: Running,
) -> None:
    holder = await connect(database.service_dsn, application_name="test")
    await holder.execute("SELECT pg_advisory_lock(7)")
    dsn = database.service_dsn
    async with Database(dsn, application_name="test", max_size=1, deadlines=QUICK) as pool:
        for slow in ("SELECT pg_sleep(5)", "SELECT pg_advisory_lock(7)"):
            with pytest.raises(StoreUnavailable):
                async with pool.connection() as connection:
                    await connection.execute(slow)
        async with pool.connection():
            with pytest.raises(StoreUnavailable):
                async with pool.connection():
                    pass
        async with pool.connection() as connection:
            assert await connection.fetchval("SELECT 1") == 1
    holder.terminate()


async def test_a_demoted_primary_expires_the_whole_pool(
    owner: "asyncpg.Connection[asyncpg.Record]", database: Running
) -> None:
    async def write_while_read_only(pool: Database) -> None:
        async with pool.connection() as connection:
            await connection.execute("SET default_transaction_read_only = on")
            await connection.execute("INSERT INTO things VALUES (1)")

    await owner.execute("CREATE TABLE things (id integer)")
    async with Database(database.owner_dsn, application_name="test", max_size=2) as pool:
        async with pool.connection() as one, pool.connection() as two:
            before = {await c.fetchval("SELECT pg_backend_pid()") for c in (one, two)}
        with pytest.raises(StoreUnavailable, match="25006"):
            await write_while_read_only(pool)
        async with pool.connection() as one, pool.connection() as two:
            after = {await c.fetchval("SELECT pg_backend_pid()") for c in (one, two)}
    assert not before & after


async def test_wrong_questions_are_not_unavailability(database: Running) -> None:
    async with Database(database.service_dsn, application_name="test") as pool:
        for error, query, argument in (
            (asyncpg.UndefinedTableError, "SELECT id FROM nothing WHERE $1::text = 'x'", "x"),
            (asyncpg.DataError, "SELECT $1::integer", CANARY),
        ):
            with pytest.raises(error):
                async with pool.connection() as connection:
                    await connection.fetchval(query, argument)


async def test_a_server_that_lets_nobody_in_is_unavailable_and_says_why(database: Running) -> None:
    dsn = database.service_dsn.reveal()
    for wrong, state in (
        (Secret(re.sub(r":[^:@]*@", ":wrong@", dsn)), "28P01"),
        (Secret(re.sub(r"/[^/]*$", "/nothing", dsn)), "3D000"),
    ):
        with pytest.raises(ConnectionRefused, match=state):
            await connect(wrong, application_name="test")
        async with Database(wrong, application_name="test") as pool:
            with pytest.raises(ConnectionRefused) as refused:
                async with pool.connection():
                    pass
        assert refused.value.sqlstate == state


async def test_neither_log_nor_error_repeats_an_argument(database: Running) -> None:
    connection = await connect(database.service_dsn, application_name="test", deadlines=QUICK)
    with (
        structlog.testing.capture_logs() as logs,
        pytest.raises(StoreUnavailable) as raised,
        loss_as_unavailable(),
    ):
        await connection.execute(f"SELECT pg_sleep(5), '{CANARY}'")
    connection.terminate()
    assert str(raised.value) == "QueryCanceledError 57014"
    assert raised.value.__suppress_context__
    assert [(log["error"], log["sqlstate"]) for log in logs] == [("QueryCanceledError", "57014")]
    assert CANARY not in str(logs)


async def test_a_sound_server_and_role_may_start(
    owner: "asyncpg.Connection[asyncpg.Record]", database: Running
) -> None:
    await check_server(database.service_dsn)
    await owner.execute(AUDIT_TABLES)
    await check_server(database.service_dsn)


@pytest.mark.parametrize(
    "grant",
    [
        "GRANT UPDATE ON audit_records TO privyseal_service",
        "GRANT UPDATE (id) ON audit_personal TO privyseal_service",
        "GRANT DELETE ON audit_records_1 TO privyseal_service",
        "GRANT TRUNCATE ON audit_personal TO PUBLIC",
    ],
)
async def test_a_role_that_may_change_the_audit_log_may_not_start(
    owner: "asyncpg.Connection[asyncpg.Record]", database: Running, grant: str
) -> None:
    await owner.execute(AUDIT_TABLES)
    await owner.execute(grant)
    with pytest.raises(StartRefused, match="Role privyseal_service owns or may UPDATE"):
        await check_server(database.service_dsn)


async def test_a_role_that_can_become_one_that_may_is_refused(data_dir: Path) -> None:
    with EmbeddedPostgres(data_dir) as running:
        superuser = await connect(running.superuser_dsn, application_name="test")
        owner = await connect(running.owner_dsn, application_name="test")
        await owner.execute(AUDIT_TABLES)
        # Without inheritance: SET ROLE is all it takes.
        await superuser.execute(
            "GRANT privyseal_owner TO privyseal_service WITH INHERIT FALSE, SET TRUE"
        )
        with pytest.raises(StartRefused, match="is a member of privyseal_owner, which"):
            await check_server(running.service_dsn)
        owner.terminate()
        superuser.terminate()


async def test_the_owner_and_a_superuser_may_not_serve(
    owner: "asyncpg.Connection[asyncpg.Record]", database: Running
) -> None:
    await owner.execute(AUDIT_TABLES)
    for dsn in (database.owner_dsn, database.superuser_dsn):
        with pytest.raises(StartRefused, match="audit_personal, audit_records, or a partition"):
            await check_server(dsn)


async def _setting(running: Running, name: str) -> str:
    """Return what a connection finds that is opened now."""
    connection = await connect(running.superuser_dsn, application_name="test")
    try:
        return await connection.fetchval("SELECT current_setting($1)", name)
    finally:
        await connection.close(timeout=5)


async def test_a_server_that_may_lose_commits_is_refused(data_dir: Path) -> None:
    with EmbeddedPostgres(data_dir) as running:
        superuser = await connect(running.superuser_dsn, application_name="test")
        await superuser.execute("ALTER SYSTEM SET fsync = off")
        await superuser.execute("ALTER SYSTEM SET full_page_writes = off")
        await superuser.execute("SELECT pg_reload_conf()")
        async with asyncio.timeout(8):
            while await _setting(running, "full_page_writes") != "off":  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        with pytest.raises(StartRefused) as refusal:
            await check_server(running.service_dsn)
        superuser.terminate()
    lines = str(refusal.value).splitlines()
    assert [line.split(" off:")[0] for line in lines] == [
        "Postgres runs with fsync",
        "Postgres runs with full_page_writes",
    ]


async def test_a_go_between_that_swallows_notifications_is_refused(database: Running) -> None:
    async with listening(dropping_notifications(database), database.service_dsn) as dsn:
        with pytest.raises(StartRefused, match="NOTIFY did not come back within 2 s"):
            await check_server(dsn)


async def test_the_check_of_a_server_that_is_away_is_unavailable_not_refused() -> None:
    with pytest.raises(StoreUnavailable):
        await check_server(Secret("postgresql://u@127.0.0.1:1/x?sslmode=disable"))
