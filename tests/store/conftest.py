"""What the tests of the store share: servers, connections, and what stands in a database at first.

Migrates nothing and checks nothing.
"""

import asyncio
import hashlib
import shutil
import tempfile
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeAlias

import asyncpg
import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)

from keys.attestation import attest
from keys.envelope import KeyEncryptionKeys, new_kek_line
from keys.keyring import RotationPolicy
from keys.secret import Secret
from keys.signer import LOCAL, KeptKey, LocalCustody
from keys.verifier import thumbprint
from service.authority.audit import Action, AuditLog, AuditRecord, Outcome, new_record_id
from service.authority.client_auth import new_secret, secret_sha256
from service.authority.clock import DatabaseClock
from service.authority.issuer import TokenIssuer
from service.authority.key_rotation import LiveKeyRing
from service.authority.model import (
    ClientAddress,
    Credential,
    ServiceUser,
    Status,
    Subject,
    TokenRequest,
    new_id,
)
from service.authority.operators import Operators
from service.store.audit_events import AuditEvents
from service.store.audit_log import AuditRecords, PostgresRecordWriter
from service.store.database import MIGRATING, Database, connect
from service.store.embedded import Running
from service.store.service_users import CachedDirectory, ServiceUsers
from service.store.signing_keys import SigningKeys

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"

SKEW = 60
API_AUDIENCE = "https://tokens.example/api/v1"


@pytest.fixture(autouse=True)
def keep_logging(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that runs inside of a test must not configure the logging of those after it."""

    def leave_it(_: str) -> None:
        pass

    monkeypatch.setattr("service.cli.server.configure_logging", leave_it)


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


# One connection each


@pytest.fixture
async def connect_as(
    database: Running,
) -> AsyncGenerator[Callable[[str], Awaitable[Connection]], None]:
    """Connect to the migrated database as `service`, `owner` or `superuser`."""
    dsns = {
        "service": database.service_dsn,
        "owner": database.owner_dsn,
        "superuser": database.superuser_dsn,
    }
    opened: list[Connection] = []

    async def connected(role: str) -> Connection:
        connection = await connect(dsns[role], application_name=f"test {role}")
        opened.append(connection)
        return connection

    yield connected
    for connection in opened:
        connection.terminate()


@pytest.fixture
async def superuser(connect_as: Callable[[str], Awaitable[Connection]]) -> Connection:
    """Who looks into the tables, and arranges what the service could not."""
    return await connect_as("superuser")


# The parts of the store, on the migrated database


@pytest.fixture
async def pool(database: Running) -> AsyncGenerator[Database, None]:
    async with Database(database.service_dsn, application_name="test", max_size=24) as pool:
        yield pool


@pytest.fixture
def users(pool: Database) -> ServiceUsers:
    return ServiceUsers(pool, clock_skew=SKEW)


@pytest.fixture
def signing_keys(pool: Database) -> SigningKeys:
    return SigningKeys(pool, clock_skew=SKEW)


@pytest.fixture
def audit_records(pool: Database) -> AuditRecords:
    return AuditRecords(pool)


@pytest.fixture
def evidence(pool: Database) -> AuditEvents:
    return AuditEvents(pool, clock_skew=SKEW)


@pytest.fixture
async def writer(database: Running) -> AsyncGenerator[PostgresRecordWriter, None]:
    """A writer that is connected."""
    clock = DatabaseClock(time.time)
    writer = PostgresRecordWriter(
        database.service_dsn, clock=clock, clock_skew=SKEW, compare=not_compared
    )
    await writer.open(lambda: None)
    yield writer
    await writer.close()


@pytest.fixture
async def open_log(database: Running) -> AsyncGenerator[Callable[[int], Awaitable[AuditLog]], None]:
    """Start an audit log with so many writers, and wait until all of them are connected."""
    async with AsyncExitStack() as logs:

        async def opened(writers: int) -> AuditLog:
            clock = DatabaseClock(time.time)
            log = AuditLog(
                [
                    PostgresRecordWriter(
                        database.service_dsn, clock=clock, clock_skew=SKEW, compare=not_compared
                    )
                    for _ in range(writers)
                ]
            )
            running = asyncio.create_task(log.run())
            logs.push_async_callback(stop, running)
            async with asyncio.timeout(5):
                while not log.available:  # noqa: ASYNC110
                    await asyncio.sleep(0.005)
            return log

        yield opened


async def not_compared(_: object) -> None:
    """The database of these tests has no audit log that could be whole or broken."""


class WholeLog:
    """Implements `authority.issuer.WholeLog` for the same reason."""

    def require(self) -> None:
        """Nothing to say."""


async def stop(task: "asyncio.Task[None]") -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


@pytest.fixture
async def log(open_log: Callable[[int], Awaitable[AuditLog]]) -> AuditLog:
    """An audit log that writes, as the server's does, with two writers."""
    return await open_log(2)


# What stands in the database


@pytest.fixture(scope="session")
def policy() -> RotationPolicy:
    return RotationPolicy(
        publish_lead=86_400, rotation_period=30 * 86_400, lifetime_cap=3600, clock_skew=SKEW
    )


@pytest.fixture(scope="session")
def keks() -> KeyEncryptionKeys:
    return KeyEncryptionKeys.parse(new_kek_line())


@pytest.fixture(scope="session")
def new_keys(rsa_keys: list[RSAPrivateKey], keks: KeyEncryptionKeys) -> list[KeptKey]:
    """Keys as the rotator makes them, without the time that this takes."""
    made: list[KeptKey] = []
    for key in rsa_keys:
        kid = thumbprint(key.public_key())
        der = key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
        sealed = keks.seal(der, purpose="signing-key", kid=kid)
        made.append(
            KeptKey(
                kid=kid,
                uri=LOCAL,
                public_key=key.public_key(),
                sealed_private=sealed,
                attestation=attest(kid, keks),
            )
        )
    return made


@pytest.fixture(scope="session")
def act() -> Callable[..., AuditRecord]:
    """Make the record of an administrative act; fields as given."""

    def made(action: Action, **fields: Any) -> AuditRecord:
        fields.setdefault("id", new_record_id(time.time()))
        return AuditRecord(action=action, outcome=Outcome.SUCCESS, **fields)

    return made


@pytest.fixture(scope="session")
def new_user() -> Callable[..., ServiceUser]:
    """Make a service user of a name; fields as given."""

    def made(name: str, **fields: Any) -> ServiceUser:
        defaults: dict[str, Any] = {
            "id": new_id("su"),
            "source_system": "vkyc",
            "owner": "Video identification",
            "contact": "vkyc@bank.example",
            "description": "",
            "scopes": ("ingest:write", "search:read"),
            "audiences": ("https://ingest.example",),
            "token_lifetime": 900,
            "status": Status.ACTIVE,
            "version": 1,
            "created_at": datetime.now(UTC),
        }
        return ServiceUser(name=name, **{**defaults, **fields})

    return made


@pytest.fixture(scope="session")
def new_credential() -> Callable[..., Credential]:
    """Make a credential of a service user; fields as given."""

    def made(service_user_id: str, **fields: Any) -> Credential:
        now = datetime.now(UTC)
        defaults: dict[str, Any] = {
            "id": new_id("cr"),
            "label": "first",
            "secret_sha256": secret_sha256(new_secret()),
            "created_at": now,
            "expires_at": now + timedelta(days=365),
        }
        return Credential(service_user_id=service_user_id, **{**defaults, **fields})

    return made


@pytest.fixture
def put(
    users: ServiceUsers, act: Callable[..., AuditRecord], new_credential: Callable[..., Credential]
) -> Callable[..., Awaitable[Subject]]:
    """Put a service user on record, with one credential; its fields as given."""

    async def stored(user: ServiceUser, **fields: Any) -> Subject:
        assert await users.create(
            user, act(Action.SERVICE_USER_CREATE, service_user_id=user.id, version=0)
        )
        assert await users.create_credential(
            new_credential(user.id, **fields),
            act(Action.CREDENTIAL_CREATE, service_user_id=user.id, version=1),
        )
        return await users.fresh(user.id)

    return stored


@pytest.fixture(scope="session")
def holder_secret() -> Secret:
    return new_secret()


@pytest.fixture
async def holder(
    put: Callable[..., Awaitable[Subject]],
    new_user: Callable[..., ServiceUser],
    holder_secret: Secret,
) -> Subject:
    """The service user `vkyc-prod` with its one credential, whose secret is `holder_secret`."""
    return await put(new_user("vkyc-prod"), secret_sha256=secret_sha256(holder_secret))


@pytest.fixture
async def active_kid(
    signing_keys: SigningKeys,
    new_keys: list[KeptKey],
    policy: RotationPolicy,
    act: Callable[..., AuditRecord],
) -> str:
    """The kid of a key that signs; no other key stands in the database."""
    kid = new_keys[0].kid
    assert await signing_keys.prepare(new_keys[0], act(Action.SIGNING_KEY_PREPARE, kid=kid))
    assert await signing_keys.activate(kid, None, policy, act(Action.SIGNING_KEY_ACTIVATE, kid=kid))
    return kid


@pytest.fixture
def issuance(holder: Subject, active_kid: str) -> Callable[..., AuditRecord]:
    """Make the record of a token for `holder`, decided on what is in force; fields as given."""
    assert holder.service_user is not None
    decided_on = AuditRecord(
        id=new_record_id(0),
        action=Action.TOKEN_ISSUE,
        outcome=Outcome.SUCCESS,
        service_user_id=holder.service_user.id,
        service_user=holder.service_user.name,
        source_system=holder.service_user.source_system,
        version=holder.version,
        credential_id=holder.credentials[0].id,
        kid=active_kid,
        aud="https://ingest.example",
        scope="ingest:write",
        signing_input_sha256=hashlib.sha256(b"signing input").digest(),
    )

    def made(**fields: Any) -> AuditRecord:
        now = time.time()
        iat = fields.get("iat", int(now))
        exp = None if iat is None else iat + 900
        defaults: dict[str, Any] = {"id": new_record_id(now), "iat": iat, "exp": exp}
        return msgspec.structs.replace(decided_on, **{**defaults, **fields})

    return made


@pytest.fixture
async def issuer(
    pool: Database,
    users: ServiceUsers,
    signing_keys: SigningKeys,
    audit_records: AuditRecords,
    keks: KeyEncryptionKeys,
    log: AuditLog,
    active_kid: str,
) -> AsyncGenerator[TokenIssuer, None]:
    """What exchanges credentials for tokens, on the parts above."""
    with ThreadPoolExecutor(1) as executor:
        keys = LiveKeyRing(
            store=signing_keys,
            custody=LocalCustody(lambda: keks, executor),
            read_keks=lambda: keks,
            clock=time.time,
        )
        ring = await keys.fresh()
        assert ring.active is not None
        assert ring.active.kid == active_kid
        yield TokenIssuer(
            issuer="https://tokens.example",
            api_audience=API_AUDIENCE,
            directory=CachedDirectory(users),
            keys=keys,
            audit=log,
            continuity=WholeLog(),
            operators=Operators(
                issuer="https://tokens.example",
                api_audience=API_AUDIENCE,
                keys=keys,
                issuances=audit_records,
                clock=time.time,
                clock_skew=SKEW,
            ),
            clock=time.time,
        )


@pytest.fixture
def exchange(holder: Subject, holder_secret: Secret) -> TokenRequest:
    """A request of `holder` with the right secret."""
    assert holder.service_user is not None
    return TokenRequest(
        client_id=holder.service_user.id,
        client_secret=holder_secret,
        origin=ClientAddress(address="192.0.2.7", user_agent="curl/8", request_id="request-1"),
    )
