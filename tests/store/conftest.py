"""What the tests of the store share: places for servers, and a schema that is still empty.

Migrates nothing.
"""

import shutil
import tempfile
from collections.abc import AsyncGenerator, Generator
from contextlib import contextmanager
from pathlib import Path

import asyncpg
import pytest

from service.store.database import MIGRATING, connect
from service.store.embedded import Running


@contextmanager
def fresh_data_dir() -> Generator[Path, None, None]:
    # Not tmp_path: the server may run as nobody, who cannot pass through that.
    data_dir = Path(tempfile.mkdtemp(prefix="privyseal-embedded-"))
    data_dir.chmod(0o711)
    try:
        yield data_dir
    finally:
        shutil.rmtree((data_dir / "postgres").resolve(), ignore_errors=True)
        shutil.rmtree(data_dir, ignore_errors=True)


@pytest.fixture
def data_dir() -> Generator[Path, None, None]:
    """A place for an embedded server, and for this test alone."""
    with fresh_data_dir() as path:
        yield path


@pytest.fixture(scope="module")
def shared_data_dir() -> Generator[Path, None, None]:
    """A place for the embedded server that the tests of a module look at."""
    with fresh_data_dir() as path:
        yield path


@pytest.fixture
async def owner(database: Running) -> AsyncGenerator["asyncpg.Connection[asyncpg.Record]", None]:
    """A connection of the owner to a database without any migration."""
    connection = await connect(database.owner_dsn, application_name="test", deadlines=MIGRATING)
    await connection.execute("DROP SCHEMA public CASCADE")
    await connection.execute("CREATE SCHEMA public; GRANT USAGE ON SCHEMA public TO PUBLIC")
    yield connection
    connection.terminate()
