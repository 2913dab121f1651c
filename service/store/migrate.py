"""Brings a database to the schema of this code: `migrations/NNNN_name.sql`, in order, once each.

Never goes back and never changes what was applied: a mistake is corrected by the next file.
"""

import hashlib
import re
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Final

import asyncpg
import msgspec

from service.authority.errors import StartRefused
from service.store.database import Connection, is_unavailability, loss_as_unavailable

MIGRATIONS = Path(__file__).parent / "migrations"

_FILE_NAME = re.compile(r"(?P<version>[0-9]{4})_[a-z0-9_]+\.sql")

# One number for all of Privyseal: two runners on a database take turns.
_LOCK = "SELECT pg_advisory_xact_lock(7299540188251473969)"

_CREATE_TABLE = """
CREATE TABLE IF NOT EXISTS schema_migrations (
    version    integer     PRIMARY KEY,
    name       text        NOT NULL,
    sha256     bytea       NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
GRANT SELECT ON schema_migrations TO PUBLIC;
"""

_SELECT_APPLIED = "SELECT version, name, sha256 FROM schema_migrations ORDER BY version"

_INSERT_APPLIED = "INSERT INTO schema_migrations (version, name, sha256) VALUES ($1, $2, $3)"


Along = Mapping[str, Callable[[Connection], Awaitable[None]]]
_NOTHING: Final[Along] = {}


class MigrationRefused(Exception):
    """The files and the database contradict each other; the text says what to do."""


class Migration(msgspec.Struct, frozen=True, kw_only=True):
    """One file, applied in one transaction."""

    version: int
    name: str
    sql: str
    sha256: bytes


def read_migrations(directory: Path = MIGRATIONS) -> list[Migration]:
    """Return the files in order; raise `MigrationRefused` for a bad name or a gap."""
    found: list[Migration] = []
    for path in sorted(directory.glob("*.sql")):
        match = _FILE_NAME.fullmatch(path.name)
        version = len(found) + 1
        if match is None or int(match["version"]) != version:
            raise MigrationRefused(
                f"Migration {path.name}: expected {version:04}_<name>.sql, with a name of "
                "lower-case letters, digits and underscores. Numbers have no gaps."
            )
        content = path.read_bytes()
        found.append(
            Migration(
                version=version,
                name=path.stem,
                sql=content.decode(),
                sha256=hashlib.sha256(content).digest(),
            )
        )
    return found


async def pending(connection: Connection, directory: Path = MIGRATIONS) -> list[Migration]:
    """Return what the database lacks, in order; raise `MigrationRefused` if it was tampered with.

    Migrations that only the database has are of newer code, and fine.
    """
    migrations = read_migrations(directory)
    if await connection.fetchval("SELECT to_regclass('schema_migrations')") is None:
        return migrations
    applied = await connection.fetch(_SELECT_APPLIED)
    if [row["version"] for row in applied] != list(range(1, len(applied) + 1)):
        raise MigrationRefused(
            "schema_migrations has a gap: rows were removed by hand. Restore them from a backup."
        )
    for migration, row in zip(migrations, applied, strict=False):
        if row["sha256"] != migration.sha256:
            raise MigrationRefused(
                f"Migration {migration.name} is not the file that was applied to this database "
                f"as {row['name']}. Restore the file; put the change into a new one."
            )
    return migrations[len(applied) :]


async def require_schema(connection: Connection, directory: Path = MIGRATIONS) -> None:
    """Raise `StartRefused` unless the database has every migration that this code needs."""
    if left := await pending(connection, directory):
        names = ", ".join(migration.name for migration in left)
        raise StartRefused(f"The database lacks {names}. Run `privyseal migrate` as its owner.")


async def migrate(
    connection: Connection, directory: Path = MIGRATIONS, *, along: Along = _NOTHING
) -> list[str]:
    """Apply what is pending, each in a transaction of its own, and return the names.

    `along` names what is done in the transaction of a migration, because SQL alone cannot.
    `connection` belongs to the owner of the schema and was opened with `MIGRATING` deadlines.
    Raises `MigrationRefused`, also for a file that the database rejects: that one leaves nothing
    behind, and those before it stay. Raises `StoreUnavailable` when Postgres goes away, or when
    another runner holds the lock for too long.
    """
    names: list[str] = []
    with loss_as_unavailable():
        while (name := await _apply_next(connection, directory, along)) is not None:
            names.append(name)
    return names


async def _apply_next(connection: Connection, directory: Path, along: Along) -> str | None:
    async with connection.transaction():
        await connection.execute(_LOCK)
        await connection.execute(_CREATE_TABLE)
        # Read behind the lock: another runner may have been faster.
        left = await pending(connection, directory)
        if not left:
            return None
        migration = left[0]
        try:
            await connection.execute(migration.sql)
        except asyncpg.PostgresError as error:
            if is_unavailability(error):
                raise
            # Without DETAIL, which quotes rows.
            raise MigrationRefused(
                f"Migration {migration.name} failed: {error.sqlstate} {error.args[0]}"
            ) from None
        if (act := along.get(migration.name)) is not None:
            await act(connection)
        await connection.execute(
            _INSERT_APPLIED, migration.version, migration.name, migration.sha256
        )
        return migration.name
