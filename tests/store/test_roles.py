"""The database role of the service adds to the audit log and can do nothing else to it."""

from collections.abc import Awaitable, Callable
from typing import TypeAlias

import asyncpg
import pytest

from service.authority.audit import Action, AuditLog, AuditRecord
from service.authority.errors import StartRefused
from service.store.database import check_server
from service.store.embedded import OWNER, SERVICE, SUPERUSER, Running

pytestmark = pytest.mark.anyio

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"
ConnectAs = Callable[[str], Awaitable[Connection]]


@pytest.fixture
async def service(connect_as: ConnectAs) -> Connection:
    return await connect_as("service")


@pytest.fixture
async def recorded(log: AuditLog, act: Callable[..., AuditRecord]) -> AuditRecord:
    record = act(Action.AUDIT_QUERY, client_address="192.0.2.7", salt=bytes(16))
    assert await log.append(record)
    return record


async def audit_tables(superuser: Connection) -> list[str]:
    """The two tables and every partition of theirs."""
    rows = await superuser.fetch(
        "SELECT oid::regclass::text AS name FROM pg_class"
        " WHERE relname ~ '^audit_(records|personal)(_2|$)' AND relkind IN ('r', 'p')"
    )
    assert len(rows) == 12
    return [row["name"] for row in rows]


async def content(superuser: Connection) -> list[asyncpg.Record]:
    return await superuser.fetch(
        "SELECT * FROM audit_records JOIN audit_personal USING (id) ORDER BY id"
    )


async def assert_denied(connection: Connection, statement: str) -> None:
    try:
        await connection.execute(statement)
    except asyncpg.InsufficientPrivilegeError:
        return
    except asyncpg.PostgresError as error:
        pytest.fail(f"{statement}: {type(error).__name__}, and no refusal")
    pytest.fail(f"{statement}: done")


async def test_no_record_and_no_partition_can_be_updated_deleted_or_truncated(
    service: Connection, superuser: Connection, recorded: AuditRecord
) -> None:
    before = await content(superuser)
    assert [row["id"] for row in before] == [recorded.id]
    for table in await audit_tables(superuser):
        column = "user_agent" if "personal" in table else "request_id"
        for statement in (
            f"UPDATE {table} SET {column} = 'changed'",
            f"UPDATE ONLY {table} SET {column} = 'changed' WHERE false",
            f"DELETE FROM {table}",
            f"DELETE FROM ONLY {table} WHERE false",
            f"TRUNCATE {table} CASCADE",
            f"SELECT id FROM {table} FOR UPDATE",
            f"MERGE INTO {table} t USING (SELECT 1) s ON true WHEN MATCHED THEN DELETE",
            f"DO $$ BEGIN LOCK TABLE {table} IN SHARE MODE; END $$",
        ):
            await assert_denied(service, statement)
    await assert_denied(
        service,
        f"INSERT INTO audit_personal VALUES ('{recorded.id}', '', '', '', '', '')"
        " ON CONFLICT (id) DO UPDATE SET user_agent = 'changed'",
    )
    assert await content(superuser) == before


async def test_no_audit_table_can_be_altered_dropped_replaced_or_booby_trapped(
    service: Connection, superuser: Connection, recorded: AuditRecord
) -> None:
    for table in [*await audit_tables(superuser), "audit_eras"]:
        for statement in (
            f"DROP TABLE {table}",
            f"ALTER TABLE {table} RENAME TO elsewhere",
            f"ALTER TABLE {table} ADD COLUMN more text",
            f"ALTER TABLE {table} DISABLE TRIGGER ALL",
            f"ALTER TABLE {table} OWNER TO {SERVICE}",
            f"GRANT DELETE ON {table} TO {SERVICE}",
            f"CREATE RULE gone AS ON INSERT TO {table} DO INSTEAD NOTHING",
            f"CREATE TRIGGER gone BEFORE INSERT ON {table} FOR EACH ROW"
            " EXECUTE FUNCTION suppress_redundant_updates_trigger()",
            f"CREATE INDEX ON {table} ((1 / 0))",
            f"COMMENT ON TABLE {table} IS 'mine'",
        ):
            # Rights that are missing entirely show as a warning only.
            if statement.startswith("GRANT"):
                await assert_grants_nothing(service, statement)
            else:
                await assert_denied(service, statement)
    partition = (await audit_tables(superuser))[-1]
    parent = "audit_personal" if "personal" in partition else "audit_records"
    await assert_denied(service, f"ALTER TABLE {parent} DETACH PARTITION {partition}")
    assert [row["id"] for row in await content(superuser)] == [recorded.id]


async def assert_grants_nothing(service: Connection, statement: str) -> None:
    try:
        await service.execute(statement)
    except asyncpg.InsufficientPrivilegeError:
        return
    table = statement.split()[3]
    held = "SELECT has_table_privilege(current_user, $1, 'DELETE')"
    assert not await service.fetchval(held, table), statement


async def test_eras_migrations_and_what_stands_on_record_cannot_be_rewritten(
    service: Connection,
) -> None:
    for statement in (
        "INSERT INTO audit_eras VALUES (9, 1, now())",
        "UPDATE audit_eras SET system_identifier = 1",
        "DELETE FROM audit_eras",
        "UPDATE schema_migrations SET name = 'other'",
        "DELETE FROM schema_migrations",
        "DELETE FROM service_users",
        "DELETE FROM credentials",
        "DELETE FROM signing_keys",
        "TRUNCATE service_users, credentials, signing_keys",
    ):
        await assert_denied(service, statement)


async def test_the_role_cannot_become_one_that_can(service: Connection) -> None:
    for statement in (
        f"SET ROLE {OWNER}",
        f"SET ROLE {SUPERUSER}",
        f"SET SESSION AUTHORIZATION {OWNER}",
        f"GRANT {OWNER} TO {SERVICE}",
        "GRANT pg_write_all_data TO privyseal_service",
        f"ALTER ROLE {SERVICE} SUPERUSER",
        f"ALTER ROLE {SERVICE} CREATEROLE",
        f"ALTER ROLE {OWNER} PASSWORD 'known'",
        "CREATE ROLE helper SUPERUSER",
        "ALTER SYSTEM SET fsync = off",
        "SET session_replication_role = replica",
        "COPY audit_eras TO PROGRAM 'cat'",
        "SELECT pg_read_file('pg_hba.conf')",
        "CREATE SCHEMA own",
        "CREATE TABLE public.own (id integer)",
        "CREATE FUNCTION public.own() RETURNS integer LANGUAGE sql AS 'SELECT 1'",
        "CREATE OR REPLACE FUNCTION public.audit_horizon_1() RETURNS bigint LANGUAGE sql"
        " STABLE AS 'SELECT 0::bigint'",
        "ALTER FUNCTION public.extend_audit_partitions_1 OWNER TO privyseal_service",
        "DROP FUNCTION public.commit_records_1",
    ):
        await assert_denied(service, statement)


async def test_what_runs_with_the_rights_of_the_owner_cannot_be_led_astray(
    service: Connection, superuser: Connection
) -> None:
    await service.execute(
        "CREATE TEMP TABLE audit_eras (era smallint, system_identifier bigint, opened_at text);"
        "SET search_path = pg_temp, public"
    )
    assert await service.fetchval("SELECT public.open_audit_era_1()") == 1
    assert await service.fetchval("SELECT count(*) FROM pg_temp.audit_eras") == 0
    assert await superuser.fetchval("SELECT count(*) FROM audit_eras") == 1
    unpinned = await superuser.fetch(
        "SELECT proname FROM pg_proc WHERE prosecdef AND pronamespace = 'public'::regnamespace"
        " AND NOT coalesce(proconfig @> ARRAY['search_path=public, pg_temp'], false)"
    )
    assert unpinned == []


async def test_the_service_writes_through_functions_that_put_it_on_record_and_in_no_other_way(
    service: Connection, superuser: Connection
) -> None:
    written = await service.fetch(
        "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace"
        " AND relkind IN ('r', 'p')"
        " AND has_table_privilege(oid, 'INSERT, UPDATE, DELETE, TRUNCATE, REFERENCES, TRIGGER')"
    )
    assert written == []
    for inner in ("append_records_1", "begin_act_1", "end_act_1"):
        (may,) = await service.fetch(
            "SELECT has_function_privilege(oid, 'EXECUTE') AS may FROM pg_proc WHERE proname = $1",
            inner,
        )
        assert not may["may"], inner
    assert not await superuser.fetchval(
        "SELECT bool_or(has_function_privilege('public', oid, 'EXECUTE')) FROM pg_proc"
        " WHERE pronamespace = 'public'::regnamespace"
    )


async def test_a_server_is_served_as_the_service_and_as_nobody_stronger(
    database: Running, superuser: Connection
) -> None:
    await check_server(database.service_dsn)
    for dsn, role in ((database.owner_dsn, OWNER), (database.superuser_dsn, SUPERUSER)):
        with pytest.raises(StartRefused, match=f"Role {role} .* audit_records"):
            await check_server(dsn)
    partition = next(each for each in await audit_tables(superuser) if "audit_records_2" in each)
    await superuser.execute(f"GRANT DELETE ON {partition} TO {SERVICE}")
    with pytest.raises(StartRefused, match="TRUNCATE audit_records, or a partition of it"):
        await check_server(database.service_dsn)
