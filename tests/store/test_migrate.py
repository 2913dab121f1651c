"""Migrations run in order, once, and whole; what contradicts the database is refused."""

import asyncio
from pathlib import Path

import asyncpg
import pytest

from service.authority.errors import StartRefused
from service.store.database import MIGRATING, connect
from service.store.embedded import Running
from service.store.migrate import (
    MigrationRefused,
    migrate,
    pending,
    read_migrations,
    require_schema,
)

pytestmark = pytest.mark.anyio


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "0001_first.sql").write_text("CREATE TABLE first (id integer);\n")
    (tmp_path / "0002_second.sql").write_text(
        "INSERT INTO first VALUES (1);\nCREATE TABLE second (id integer);\n"
    )
    return tmp_path


async def test_migrations_are_applied_in_order_and_once(
    owner: "asyncpg.Connection[asyncpg.Record]", files: Path
) -> None:
    assert [m.name for m in await pending(owner, files)] == ["0001_first", "0002_second"]
    assert await migrate(owner, files) == ["0001_first", "0002_second"]
    assert await pending(owner, files) == []
    assert await migrate(owner, files) == []
    assert await owner.fetchval("SELECT count(*) FROM first") == 1


async def test_two_runners_at_once_apply_each_migration_once(
    owner: "asyncpg.Connection[asyncpg.Record]", database: Running, files: Path
) -> None:
    (files / "0001_first.sql").write_text(
        "SELECT pg_sleep(0.2); CREATE TABLE first (id integer);\n"
    )
    other = await connect(database.owner_dsn, application_name="test", deadlines=MIGRATING)
    try:
        done = await asyncio.gather(migrate(owner, files), migrate(other, files))
    finally:
        other.terminate()
    assert sorted(done[0] + done[1]) == ["0001_first", "0002_second"]
    assert await owner.fetchval("SELECT count(*) FROM first") == 1


async def test_a_migration_that_fails_leaves_nothing_and_keeps_those_before(
    owner: "asyncpg.Connection[asyncpg.Record]", files: Path
) -> None:
    (files / "0003_third.sql").write_text("CREATE TABLE third ();\nSELECT 1 / 0;\n")
    with pytest.raises(MigrationRefused, match="0003_third failed: 22012 division by zero"):
        await migrate(owner, files)
    assert await owner.fetchval("SELECT to_regclass('third')") is None
    assert [m.name for m in await pending(owner, files)] == ["0003_third"]


async def test_a_changed_migration_is_refused(
    owner: "asyncpg.Connection[asyncpg.Record]", files: Path
) -> None:
    await migrate(owner, files)
    (files / "0001_first.sql").write_text("CREATE TABLE first (id bigint);\n")
    with pytest.raises(MigrationRefused, match="0001_first is not the file that was applied"):
        await migrate(owner, files)
    with pytest.raises(MigrationRefused, match="0001_first"):
        await pending(owner, files)


async def test_a_gap_among_the_applied_is_refused(
    owner: "asyncpg.Connection[asyncpg.Record]", files: Path
) -> None:
    await migrate(owner, files)
    await owner.execute("DELETE FROM schema_migrations WHERE version = 1")
    with pytest.raises(MigrationRefused, match="has a gap"):
        await migrate(owner, files)


@pytest.mark.parametrize("name", ["0004_later.sql", "0002_again.sql", "3_x.sql", "0003-x.sql"])
def test_a_gap_a_repetition_or_a_bad_name_among_the_files_is_refused(
    files: Path, name: str
) -> None:
    (files / name).write_text("SELECT 1;\n")
    with pytest.raises(MigrationRefused, match="Numbers have no gaps"):
        read_migrations(files)


async def test_code_is_compatible_with_newer_databases_but_not_with_older(
    owner: "asyncpg.Connection[asyncpg.Record]", files: Path
) -> None:
    assert await pending(owner, files)
    await migrate(owner, files)
    (files / "0002_second.sql").rename(files / "newer")
    assert not await pending(owner, files)
    assert await migrate(owner, files) == []
    (files / "newer").rename(files / "0002_second.sql")
    (files / "0003_third.sql").write_text("SELECT 1;\n")
    assert await pending(owner, files)
    with pytest.raises(StartRefused, match="lacks 0003_third"):
        await require_schema(owner, files)


async def test_the_service_role_can_read_what_is_applied_and_cannot_change_it(
    owner: "asyncpg.Connection[asyncpg.Record]", database: Running, files: Path
) -> None:
    await migrate(owner, files)
    service = await connect(database.service_dsn, application_name="test")
    try:
        assert not await pending(service, files)
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await service.execute("DELETE FROM schema_migrations")
    finally:
        service.terminate()
