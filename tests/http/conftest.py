"""The whole authority in this process, on a real database of its own, and those who call it.

Checks nothing itself: it only hands out clients, credentials, and ways to look behind the API.
"""

import asyncio
import socket
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, TypeAlias, cast

import asyncpg
import httpx
import pytest
import uvicorn
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from litestar.types import ASGIApp

from keys.attestation import attest
from keys.envelope import KeyEncryptionKeys, new_kek_line
from keys.signer import LOCAL, KeptKey
from keys.verifier import thumbprint
from service.app import Authority, rotation_policy
from service.authority.administration import first_operator
from service.authority.audit import Action, AuditRecord, Outcome, new_record_id, sequencer
from service.settings import Settings
from service.store.database import Database
from service.store.embedded import Running
from service.store.service_users import ServiceUsers
from service.store.signing_keys import SigningKeys
from tests.conftest import open_audit_log
from tests.http.console_client import ConsoleClient

Credential: TypeAlias = tuple[str, str]
"""client_id and client_secret, as httpx takes them for HTTP Basic."""

Records: TypeAlias = list[dict[str, Any]]

TICK = 0.1
"""Seconds between two looks of the sequencer, so that no test waits long for a record's place."""

VISIBLE_WITHIN = 8.0
"""Seconds: a record is shown once no older transaction of the whole server is under way."""


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """The defaults, issuer http://127.0.0.1:8080, with checkpoints of this test alone."""
    return Settings(checkpoint_dir=tmp_path / "checkpoints")


@pytest.fixture(scope="session")
def keks() -> KeyEncryptionKeys:
    """The key-encryption keys: whoever has them and the database is a thief of signing keys."""
    return KeyEncryptionKeys.parse(new_kek_line())


@pytest.fixture
async def operator_credential(
    database: Running, settings: Settings, keks: KeyEncryptionKeys, rsa_keys: list[RSAPrivateKey]
) -> Credential:
    """The first operator, in a database that has an active and a pending key already."""
    return await _set_up(database, settings, keks, rsa_keys)


@pytest.fixture
async def authority(
    database: Running,
    settings: Settings,
    keks: KeyEncryptionKeys,
    operator_credential: Credential,
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncGenerator[Authority, None]:
    """A running authority, with its keys and its first operator."""
    monkeypatch.setattr(sequencer, "TICK", TICK)
    built = Authority(settings, dsn=database.service_dsn, read_keks=lambda: keks)
    async with built.litestar.lifespan():
        assert built.health().ready
        yield built


@pytest.fixture
async def connect_client(
    authority: Authority, settings: Settings
) -> AsyncGenerator[Callable[..., httpx.AsyncClient], None]:
    """Make a client of the authority; headers as given."""
    async with AsyncExitStack() as clients:

        def connected(**headers: str) -> httpx.AsyncClient:
            client = httpx.AsyncClient(
                transport=httpx.ASGITransport(app=cast("Any", authority.asgi)),
                base_url=settings.issuer,
                headers=headers,
            )
            clients.push_async_callback(client.aclose)
            return client

        yield connected


@pytest.fixture
def client(connect_client: Callable[..., httpx.AsyncClient]) -> httpx.AsyncClient:
    """A client that sends no token."""
    return connect_client()


@pytest.fixture
def sign_in(
    client: httpx.AsyncClient, connect_client: Callable[..., httpx.AsyncClient]
) -> Callable[..., Awaitable[httpx.AsyncClient]]:
    """Exchange a credential and return a client that sends the token; more form fields as given."""

    async def signed_in(credential: Credential, **form: str) -> httpx.AsyncClient:
        answer = await client.post(
            "/oauth/token", auth=credential, data={"grant_type": "client_credentials", **form}
        )
        assert answer.status_code == 200, answer.text
        return connect_client(Authorization=f"Bearer {answer.json()['access_token']}")

    return signed_in


@pytest.fixture
async def operator(
    sign_in: Callable[..., Awaitable[httpx.AsyncClient]], operator_credential: Credential
) -> httpx.AsyncClient:
    """A client that sends the first operator's token, which has every admin scope."""
    return await sign_in(operator_credential)


@pytest.fixture
def enrol(operator: httpx.AsyncClient) -> Callable[..., Awaitable[Credential]]:
    """Create a service user (fields as given) with a credential, and return that."""

    async def enrolled(name: str, **fields: Any) -> Credential:
        body = {"name": name, "source_system": "vkyc", **fields}
        created = await operator.post("/api/v1/service-users", json=body)
        assert created.status_code == 201, created.text
        credentials = f"/api/v1/service-users/{created.json()['id']}/credentials"
        credential = await operator.post(credentials, json={"label": "first"})
        assert credential.status_code == 201, credential.text
        return credential.json()["client_id"], credential.json()["client_secret"]

    return enrolled


@pytest.fixture
def enrol_operator(
    enrol: Callable[..., Awaitable[Credential]], settings: Settings
) -> Callable[..., Awaitable[Credential]]:
    """Create a service user with these admin scopes and the admin API's audience."""

    async def enrolled(name: str, *scopes: str) -> Credential:
        return await enrol(name, scopes=list(scopes), audiences=[settings.api_audience])

    return enrolled


@pytest.fixture
async def vkyc(enrol: Callable[..., Awaitable[Credential]]) -> Credential:
    """The credential of an integrator: vkyc-prod with ingest:write and search:read."""
    return await enrol(
        "vkyc-prod", scopes=["ingest:write", "search:read"], contact="kyc-team@example.com"
    )


@pytest.fixture
def new_person(client: httpx.AsyncClient, settings: Settings) -> Callable[[], ConsoleClient]:
    """Return somebody at the console who has not signed in."""
    return lambda: ConsoleClient(client, settings.issuer)


@pytest.fixture
def at_console(
    new_person: Callable[[], ConsoleClient],
) -> Callable[[Credential], Awaitable[ConsoleClient]]:
    """Sign somebody in at the console with a credential."""

    async def signed_in(credential: Credential) -> ConsoleClient:
        person = new_person()
        assert (await person.sign_in(credential)).status_code == 303
        return person

    return signed_in


@pytest.fixture
async def operator_at_console(
    at_console: Callable[[Credential], Awaitable[ConsoleClient]], operator_credential: Credential
) -> ConsoleClient:
    """The first operator, signed in at the console."""
    return await at_console(operator_credential)


@pytest.fixture
async def integrator(
    at_console: Callable[[Credential], Awaitable[ConsoleClient]], vkyc: Credential
) -> ConsoleClient:
    """vkyc-prod, signed in at the console with its own credential."""
    return await at_console(vkyc)


@pytest.fixture
def records(operator: httpx.AsyncClient) -> Callable[..., Awaitable[Records]]:
    """Query the audit log (filters as given) until `count` events are on record, repeats counted.

    Fails if there are more, or fewer after a while. `reason` is no filter of the API.
    """

    async def found(count: int = 1, *, reason: str | None = None, **filters: str) -> Records:
        deadline = time.monotonic() + VISIBLE_WITHIN
        while True:
            answer = await operator.get("/api/v1/audit-records", params={"limit": 1000, **filters})
            assert answer.status_code == 200, answer.text
            page = [r for r in answer.json()["records"] if reason in (None, r["reason"])]
            events = sum(record["repeats"] for record in page)
            if events >= count or time.monotonic() > deadline:
                assert events == count, page
                return page
            await asyncio.sleep(0.02)

    return found


@pytest.fixture(scope="module")
def live_server(
    module_database: Running,
    keks: KeyEncryptionKeys,
    rsa_keys: list[RSAPrivateKey],
    tmp_path_factory: pytest.TempPathFactory,
) -> Generator[tuple[str, Credential], None, None]:
    """An authority behind uvicorn, on a loopback port and in a thread, for the tests of a module:
    its URL and its operator."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        checkpoints = tmp_path_factory.mktemp("checkpoints")
        settings = Settings(issuer=url, checkpoint_dir=checkpoints)
        operator = asyncio.run(_set_up(module_database, settings, keks, rsa_keys))

        def create_app() -> ASGIApp:
            return Authority(settings, dsn=module_database.service_dsn, read_keks=lambda: keks).asgi

        server = uvicorn.Server(
            uvicorn.Config(create_app, factory=True, log_config=None, access_log=False)
        )
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sequencer, "TICK", TICK)
            thread.start()
            yield url, operator
        server.should_exit = True
        thread.join(timeout=10)
        assert not thread.is_alive()


@pytest.fixture
def sql(database: Running) -> Callable[..., Awaitable[list[asyncpg.Record]]]:
    """Run SQL as superuser: as a thief, or to bring about what takes days otherwise."""

    async def run(statement: str, *arguments: object) -> list[asyncpg.Record]:
        connection = await asyncpg.connect(database.superuser_dsn.reveal(), timeout=10)
        try:
            return await connection.fetch(statement, *arguments)
        finally:
            await connection.close(timeout=5)

    return run


async def _set_up(
    database: Running, settings: Settings, keks: KeyEncryptionKeys, rsa_keys: list[RSAPrivateKey]
) -> Credential:
    await open_audit_log(database, settings.log_origin, keks)
    async with Database(database.service_dsn, application_name="test set-up") as store:
        signing_keys = SigningKeys(store, clock_skew=settings.clock_skew)
        active, pending = rsa_keys[:2]
        assert await signing_keys.prepare(_sealed(active, keks), _set_up_record())
        kid, policy = thumbprint(active.public_key()), rotation_policy(settings)
        assert await signing_keys.activate(kid, None, policy, _set_up_record())
        assert await signing_keys.prepare(_sealed(pending, keks), _set_up_record())
        user, credential, secret, record = first_operator(
            "operator", settings.api_audience, time.time(), "tests"
        )
        users = ServiceUsers(store, clock_skew=settings.clock_skew)
        assert await users.bootstrap(user, credential, record, force=False)
    return user.id, secret.reveal()


def _sealed(key: RSAPrivateKey, keks: KeyEncryptionKeys) -> KeptKey:
    der = key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    kid = thumbprint(key.public_key())
    return KeptKey(
        kid=kid,
        uri=LOCAL,
        public_key=key.public_key(),
        sealed_private=keks.seal(der, purpose="signing-key", kid=kid),
        attestation=attest(kid, keks),
    )


def _set_up_record() -> AuditRecord:
    return AuditRecord(
        id=new_record_id(time.time()),
        action=Action.SIGNING_KEY_PREPARE,
        outcome=Outcome.SUCCESS,
        actor="tests",
    )
