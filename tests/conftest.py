"""What every test may use: a migrated database of its own, RSA keys, an event loop.

Starts no part of the service itself.
"""

import asyncio
import os
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

import asyncpg
import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from keys.envelope import KeyEncryptionKeys
from keys.secret import Secret
from keys.signer import LocalCustody
from service.store.audit_logs import open_log
from service.store.database import MIGRATING, connect
from service.store.embedded import DATABASE, OWNER, SUPERUSER, EmbeddedPostgres, Running
from service.store.migrate import migrate

_SERVER = pytest.StashKey[EmbeddedPostgres]()
_RUNNING = pytest.StashKey[Running]()
_DATA_DIR = pytest.StashKey[Path]()

ROOM = 4 << 30
"""Bytes: a database takes 10 MB, and some tests make large ones."""


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell a worker of pytest-xdist where the server of the whole run is."""
    running = _server_of_this_run(node.config)
    node.workerinput["postgres"] = {
        "pid": running.pid,
        "port": running.port,
        "service_dsn": running.service_dsn.reveal(),
        "owner_dsn": running.owner_dsn.reveal(),
        "superuser_dsn": running.superuser_dsn.reveal(),
    }


def pytest_unconfigure(config: pytest.Config) -> None:
    if _SERVER in config.stash:
        config.stash[_SERVER].stop()
        data_dir = config.stash[_DATA_DIR]
        shutil.rmtree((data_dir / "postgres").resolve(), ignore_errors=True)  # may be a link
        shutil.rmtree(data_dir)


@pytest.fixture(scope="session")
def anyio_backend() -> tuple[str, dict[str, bool]]:
    return "asyncio", {"use_uvloop": True}


@pytest.fixture(scope="session")
def postgres(pytestconfig: pytest.Config) -> Running:
    """The server that all tests share; its database `privyseal` is the template: leave it alone."""
    workerinput: dict[str, Any] | None = getattr(pytestconfig, "workerinput", None)
    if workerinput is None:
        return _server_of_this_run(pytestconfig)
    found = workerinput["postgres"]
    return Running(
        pid=found["pid"],
        port=found["port"],
        service_dsn=Secret(found["service_dsn"]),
        owner_dsn=Secret(found["owner_dsn"]),
        superuser_dsn=Secret(found["superuser_dsn"]),
    )


@pytest.fixture
def database(postgres: Running) -> Generator[Running, None, None]:
    """An empty, migrated database for this test alone, with a DSN for each role."""
    yield from _fresh_database(postgres)


@pytest.fixture(scope="module")
def module_database(postgres: Running) -> Generator[Running, None, None]:
    """The same for the tests of a module together."""
    yield from _fresh_database(postgres)


@pytest.fixture(scope="session")
def rsa_keys() -> list[rsa.RSAPrivateKey]:
    """Four RSA-2048 private keys: making one takes long enough to share them."""
    return [rsa.generate_private_key(public_exponent=65_537, key_size=2048) for _ in range(4)]


@pytest.fixture(scope="session")
def skip_or_fail() -> Callable[[str], NoReturn]:
    """Call it with what this machine lacks: skips, or fails under PRIVYSEAL_REQUIRE_ALL=1."""

    def decide(reason: str) -> NoReturn:
        if os.environ.get("PRIVYSEAL_REQUIRE_ALL") == "1":
            pytest.fail(f"PRIVYSEAL_REQUIRE_ALL=1, but {reason}", pytrace=False)
        pytest.skip(reason)

    return decide


def _server_of_this_run(config: pytest.Config) -> Running:
    if _RUNNING not in config.stash:
        data_dir = Path(tempfile.mkdtemp(prefix="privyseal-tests-", dir=_quick_disk()))
        data_dir.chmod(0o711)  # the server may run as another user
        bin_dir = os.environ.get("PRIVYSEAL_PG_BIN")
        server = EmbeddedPostgres(data_dir, bin_dir=Path(bin_dir) if bin_dir else None)
        config.stash[_DATA_DIR] = data_dir
        config.stash[_SERVER] = server
        running = server.start()
        asyncio.run(_migrate(running))
        config.stash[_RUNNING] = running
    return config.stash[_RUNNING]


def _quick_disk() -> str | None:
    """Where making a database takes a tenth of the time, if there is room for those of a run."""
    memory = "/dev/shm"
    try:
        free = shutil.disk_usage(memory).free
    except OSError:
        return None
    return memory if free > ROOM and os.access(memory, os.W_OK) else None


async def _migrate(running: Running) -> None:
    connection = await connect(
        running.owner_dsn, application_name="tests migrate", deadlines=MIGRATING
    )
    try:
        await migrate(connection)
    finally:
        await connection.close(timeout=5)


async def open_audit_log(running: Running, origin: str, keks: KeyEncryptionKeys) -> None:
    """Open the audit log of a fresh database, as `privyseal migrate` does."""
    connection = await connect(running.owner_dsn, application_name="tests open log")
    try:
        with ThreadPoolExecutor(1) as executor:
            key = await LocalCustody(lambda: keks, executor).new_log_key(origin)
        assert await open_log(connection, key)
    finally:
        await connection.close(timeout=5)


def in_database(running: Running, name: str) -> Running:
    """Return how the same roles enter the database `name`."""

    def renamed(dsn: Secret) -> Secret:
        return Secret(urlsplit(dsn.reveal())._replace(path=f"/{name}").geturl())

    return msgspec.structs.replace(
        running,
        service_dsn=renamed(running.service_dsn),
        owner_dsn=renamed(running.owner_dsn),
        superuser_dsn=renamed(running.superuser_dsn),
    )


def _fresh_database(postgres: Running) -> Generator[Running, None, None]:
    name = f"test_{uuid.uuid4().hex[:16]}"
    asyncio.run(_administer(postgres, f"CREATE DATABASE {name} TEMPLATE {DATABASE} OWNER {OWNER}"))
    yield in_database(postgres, name)
    asyncio.run(_administer(postgres, f"DROP DATABASE {name} WITH (FORCE)"))


async def _administer(running: Running, statement: str) -> None:
    dsn = in_database(running, SUPERUSER).superuser_dsn
    connection = await asyncpg.connect(dsn.reveal(), timeout=10, command_timeout=30)
    try:
        await connection.execute(statement)
    finally:
        await connection.close(timeout=5)


@pytest.fixture(scope="session")
def node_packages(skip_or_fail: Callable[[str], NoReturn]) -> Path:
    """The folder of the Node programs, with the packages that its lock names installed."""
    folder = Path(__file__).parent / "interop" / "node"
    npm = shutil.which("npm")
    if shutil.which("node") is None or npm is None:
        skip_or_fail("there is no node with npm")
    # Written by npm at the end of an installation.
    installed, lock = folder / "node_modules" / ".package-lock.json", folder / "package-lock.json"
    if not installed.exists() or installed.stat().st_mtime < lock.stat().st_mtime:
        install = (npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--prefer-offline")
        done = subprocess.run(install, cwd=folder, capture_output=True, text=True, timeout=120)
        if done.returncode != 0:
            skip_or_fail(f"npm ci failed in {folder.name}/: {done.stderr}")
    return folder
