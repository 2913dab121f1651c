"""The composition root: builds every part of one server process and puts them together.

Decides nothing else.
"""

import asyncio
import ctypes
import gc
import multiprocessing
import os
import signal
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Final, cast

import structlog
from litestar import Litestar, Router
from litestar.di import Provide
from litestar.types import ASGIApp, ControllerRouterHandler, Scope

from keys.envelope import EnvelopeError, KekReader, KeyEncryptionKeys
from keys.keyring import RotationPolicy
from keys.secret import Secret
from keys.signer import LOCAL, Custody, CustodyBySchemes, LocalCustody, scheme_of
from keys.verifier.jwks_client import MAX_STALE
from service import metrics
from service.authority.administration import Administration
from service.authority.attention import Watch
from service.authority.audit import AuditLog
from service.authority.audit.continuity import NO_LOG, Continuity
from service.authority.audit.events import EventReports
from service.authority.audit.export import Exports, Proven
from service.authority.audit.forged import ForgedTokens
from service.authority.audit.presented import PresentedTokens
from service.authority.audit.reading import AuditReading
from service.authority.audit.sequencer import Sequencer
from service.authority.audit.unproven import UnprovenReports
from service.authority.by_hand import TokensByHand
from service.authority.clock import DatabaseClock
from service.authority.confirmation import Confirmations
from service.authority.errors import StartRefused, StoreUnavailable
from service.authority.hand_over import HandOvers
from service.authority.issuer import TokenIssuer
from service.authority.key_administration import KeyAdministration
from service.authority.key_rotation import KeyRotator, LiveKeyRing
from service.authority.leaked import Leaks
from service.authority.model import Clock
from service.authority.operators import Operators
from service.authority.own_credentials import OwnCredentials
from service.authority.people import People
from service.authority.sessions import Sessions
from service.authority.usage import Usage
from service.console.gate import gate
from service.console.ingest_client import IngestClient
from service.console.provider import Provider
from service.console.routes import console, front_door
from service.console.samples import Installation
from service.http import openapi
from service.http.admin import ServiceUserController
from service.http.alerts import alerting
from service.http.audit import AuditRecordController
from service.http.audit_events import AuditEventController
from service.http.audit_tree import AuditTreeController, checkpoint_endpoint
from service.http.context import RequestContext, noted, origin_of
from service.http.errors import EXCEPTION_HANDLERS
from service.http.export import ExportStream, Format
from service.http.gate import MAX_BODY, gatekeeper, operator_of, refusal_record
from service.http.held import HeldCredentialController
from service.http.leaked import LeakedCredentialController
from service.http.own_credentials import OwnCredentialController
from service.http.signing_keys import SigningKeyController
from service.http.token import token_endpoint
from service.http.well_known import (
    Health,
    health_endpoints,
    jwks_endpoint,
    metadata,
    metadata_endpoints,
)
from service.logging import configure_logging
from service.settings import MAX_TOKEN_LIFETIME, RING_POLL, Settings
from service.store.attention import AttentionRecords
from service.store.audit_events import AuditEvents
from service.store.audit_log import AuditRecords, PostgresRecordWriter
from service.store.audit_logs import prepare_log
from service.store.audit_tree import AuditTree, always, postgres_log
from service.store.checkpoint_files import CheckpointFiles
from service.store.database import Connection, Database, check_server
from service.store.embedded import require_running
from service.store.migrate import require_schema
from service.store.names import ServiceUserNames
from service.store.notifications import ChangeListener
from service.store.service_users import CachedDirectory, ServiceUsers
from service.store.signing_keys import SigningKeys
from service.store.usage import RecordedUses

AUDIT_WRITERS: Final = 2
SIGNING_THREADS: Final = 2
START_PATIENCE: Final = 5.0
_RETRY: Final = 1.0
_UPKEEP: Final = 3600.0
_PR_SET_PDEATHSIG: Final = 1

log = structlog.stdlib.get_logger()


def create_app() -> ASGIApp:
    """Build the server process that the environment describes; each worker calls this."""
    _end_with_parent()
    settings = Settings.from_environ(os.environ)
    configure_logging(settings.log_level)
    read_keks = kek_reader(settings.kek_path)
    asgi = Authority(settings, dsn=service_dsn(settings), read_keks=read_keks).asgi
    # What is there now stays: to look through all of it for cycles would hold every request up for
    # some 50 ms, each time that much has come and gone.
    gc.collect()
    gc.freeze()
    return asgi


def service_dsn(settings: Settings) -> Secret:
    """Return where the store is: as set, or the embedded server that runs under DATA_DIR."""
    if settings.database_url is not None:
        return settings.database_url
    return Secret(require_running(settings.data_dir).service_dsn)


def kek_reader(path: Path) -> KekReader:
    """Return what reads the key-encryption keys at `path`; it raises EnvelopeError in words."""

    def read() -> KeyEncryptionKeys:
        try:
            text = path.read_text("utf-8")
        except OSError as error:
            raise EnvelopeError(
                f"The key-encryption keys at {path} cannot be read ({error.strerror}). Set "
                "PRIVYSEAL_KEK_FILE to the file that this database was made with; a fresh one "
                "holds one line of: openssl rand -base64 32 | tr '+/' '-_' | tr -d ="
            ) from None
        except UnicodeDecodeError:
            raise EnvelopeError(f"{path} is no text file of base64url lines.") from None
        try:
            return KeyEncryptionKeys.parse(text)
        except EnvelopeError as error:
            raise EnvelopeError(f"{path} (PRIVYSEAL_KEK_FILE): {error}.") from None

    return read


def rotation_policy(settings: Settings) -> RotationPolicy:
    """Return the policy that the settings describe."""
    return RotationPolicy(
        publish_lead=settings.key_publish_lead,
        rotation_period=settings.key_rotation_days * 86_400,
        lifetime_cap=MAX_TOKEN_LIFETIME,
        clock_skew=settings.clock_skew,
        strict_gate=settings.rotation_gate == "strict",
    )


def custody(settings: Settings, read_keks: KekReader, executor: Executor) -> CustodyBySchemes:
    """Return every custody that the settings name: the first makes new keys, all are used.

    Keys that were sealed in the database are always used: a move away from there needs no setting.
    """
    custodies: dict[str, Custody] = {LOCAL: LocalCustody(read_keks, executor)}
    for uri in settings.key_custody:
        if uri != LOCAL:
            try:
                # An extra: only who has an HSM needs what speaks to it.
                from keys.pkcs11 import PKCS11, Pkcs11Custody
            except ModuleNotFoundError:
                raise StartRefused(
                    "PRIVYSEAL_KEY_CUSTODY names an HSM, and what speaks to one is not installed: "
                    "pip install 'privyseal[hsm]'"
                ) from None
            custodies[PKCS11] = Pkcs11Custody(uri)
    return CustodyBySchemes(scheme_of(settings.key_custody[0]), custodies, read_keks)


def provider_of(settings: Settings, clock: Clock) -> Provider | None:
    """Return the human portal that the settings name, if they name one."""
    if settings.oidc_issuer is None or settings.oidc_client_id is None:
        return None
    return Provider(
        issuer=settings.oidc_issuer,
        client_id=settings.oidc_client_id,
        client_secret=settings.oidc_client_secret,
        name=settings.provider_name or "",
        scopes_claim=settings.oidc_scopes_claim,
        callback=settings.provider_callback,
        clock=clock,
        clock_skew=settings.clock_skew,
    )


class Stores:
    """What several parts find in Postgres; nothing is connected yet."""

    def __init__(self, database: Database, *, clock_skew: int) -> None:
        self.users = ServiceUsers(database, clock_skew=clock_skew)
        self.signing_keys = SigningKeys(database, clock_skew=clock_skew)
        self.records = AuditRecords(database)
        self.events = AuditEvents(database, clock_skew=clock_skew)
        self.tree = AuditTree(database.connection)
        self.uses = RecordedUses(database)


class Authority:
    """All parts of one server process, built but not started: `asgi` is what a server serves."""

    def __init__(
        self,
        settings: Settings,
        *,
        dsn: Secret,
        read_keks: KekReader,
        wall: Callable[[], float] = time.time,
    ) -> None:
        skew = settings.clock_skew
        self.clock = DatabaseClock(wall)
        self._dsn = dsn
        self._signing = ThreadPoolExecutor(SIGNING_THREADS, thread_name_prefix="sign")
        self._custody = custody(settings, read_keks, self._signing)
        self.database = Database(dsn, application_name="privyseal")
        self._stores = stores = Stores(self.database, clock_skew=skew)
        self.directory = CachedDirectory(stores.users)
        self.keys = LiveKeyRing(
            store=stores.signing_keys,
            custody=self._custody,
            read_keks=read_keks,
            clock=self.clock,
        )
        self.rotator = KeyRotator(
            keys=self.keys,
            store=stores.signing_keys,
            evidence=stores.events,
            custody=self._custody,
            policy=rotation_policy(settings),
            key_bits=settings.key_bits,
            clock=self.clock,
        )
        self._outside = CheckpointFiles(settings.checkpoint_path)
        self.continuity = Continuity(outside=self._outside, log_keys=self._custody)
        self.sequencer = Sequencer(
            connect=lambda: postgres_log(dsn),
            continuity=self.continuity,
            outside=self._outside,
            clock=self.clock,
        )
        self.audit = AuditLog(
            [
                PostgresRecordWriter(dsn, clock=self.clock, clock_skew=skew, compare=self._compare)
                for _ in range(AUDIT_WRITERS)
            ]
        )
        self.listener = ChangeListener(
            dsn,
            on_connect=self._on_listening,
            on_service_user=self.directory.forget,
            on_signing_keys=self._on_signing_keys,
        )
        self._operators = Operators(
            issuer=settings.issuer,
            api_audience=settings.api_audience,
            keys=self.keys,
            issuances=stores.records,
            clock=self.clock,
            clock_skew=skew,
        )
        self._issuer = TokenIssuer(
            issuer=settings.issuer,
            api_audience=settings.api_audience,
            directory=self.directory,
            keys=self.keys,
            audit=self.audit,
            continuity=self.continuity,
            operators=self._operators,
            clock=self.clock,
        )
        self._sessions = Sessions(
            issuer=settings.issuer,
            console_audience=settings.console_audience,
            token_issuer=self._issuer,
            operators=self._operators,
            audit=self.audit,
            sign_outs=stores.records,
            clock=self.clock,
        )
        self._unproven = UnprovenReports(audit=self.audit, clock=self.clock)
        self._presented = PresentedTokens(
            tokens=stores.events,
            unproven=self._unproven,
            audit=self.audit,
            broken=lambda: self.continuity.broken,
            clock=self.clock,
        )
        self.usage = Usage(store=stores.users, uses=stores.uses, clock=self.clock)
        self._schema_ready = asyncio.Event()
        self._draining = False
        self._drain_seconds = settings.drain_seconds
        self.litestar = Litestar(
            route_handlers=self._routes(settings, read_keks),
            exception_handlers={**EXCEPTION_HANDLERS},
            lifespan=[self._running],
            openapi_config=openapi.config(settings.issuer),
            logging_config=None,
        )
        openapi.complete(self.litestar)
        self.asgi = RequestContext(
            self.litestar,
            trusted_proxies=settings.trusted_proxies,
            record_refusal=self._record_refusal,
        )

    def _routes(self, settings: Settings, read_keks: KekReader) -> list[ControllerRouterHandler]:
        """Build all that answers a request."""
        forged_tokens = ForgedTokens(records=self._stores.events, clock=self.clock)
        parts = {
            name: _provide(part)
            for name, part in {
                "clock": self.clock,
                **self._administering(settings, read_keks),
                **self._auditing(settings),
                **self._at_the_console(settings),
            }.items()
        }
        admin_api = Router(
            "/api/v1",
            route_handlers=[
                ServiceUserController,
                OwnCredentialController,
                HeldCredentialController,
                LeakedCredentialController,
                SigningKeyController,
                AuditRecordController,
                AuditTreeController,
                AuditEventController,
            ],
            middleware=[alerting(forged_tokens.count)],
            before_request=gatekeeper(self._operators),
            request_max_body_size=MAX_BODY,
            dependencies={"operator": Provide(operator_of), **parts},
            security=[{"bearer": []}],
        )
        let_in = gate(
            self._sessions,
            issuer=settings.issuer,
            clock=self.clock,
            count_forged=forged_tokens.count,
            portal=settings.provider_name,
        )
        return [
            token_endpoint(self._issuer),
            jwks_endpoint(lambda: self.keys.ring, settings.jwks_max_age),
            *metadata_endpoints(metadata(settings.issuer), settings.jwks_max_age),
            *health_endpoints(self.health, lambda: metrics.exposition(self.rotator.figures())),
            checkpoint_endpoint(lambda: self.continuity.latest_note),
            admin_api,
            front_door,
            console(let_in, parts),
        ]

    def _administering(self, settings: Settings, read_keks: KekReader) -> dict[str, object]:
        """Build what acts on service users, credentials and signing keys, by the name that
        handlers ask for."""
        users, operators, clock = self._stores.users, self._operators, self.clock
        administration = Administration(
            store=users,
            operators=operators,
            clock=clock,
            api_audience=settings.api_audience,
            console_audience=settings.console_audience,
            audience=settings.audience,
            token_lifetime=settings.token_lifetime,
        )
        return {
            "administration": administration,
            "issuer": self._issuer,
            "confirmations": Confirmations(store=users, operators=operators, clock=clock),
            "own_credentials": OwnCredentials(store=users, operators=operators, clock=clock),
            "leaks": Leaks(holders=users, administration=administration),
            "key_administration": KeyAdministration(
                keys=self.keys,
                store=self._stores.signing_keys,
                evidence=self._stores.events,
                custody=self._custody,
                log_keys=self._stores.tree,
                read_keks=read_keks,
                operators=operators,
                policy=rotation_policy(settings),
                key_bits=settings.key_bits,
                jwks_max_age=settings.jwks_max_age,
                ring_poll=RING_POLL,
                max_stale=MAX_STALE,
                clock=clock,
            ),
        }

    def _auditing(self, settings: Settings) -> dict[str, object]:
        """Build what reads the audit log and what is reported to it."""
        records, tree, events = self._stores.records, self._stores.tree, self._stores.events
        return {
            "records": records,
            "tree": tree,
            "exports": Exports(
                records=records,
                tree=tree,
                outside=self._outside,
                audit=self.audit,
                operators=self._operators,
                clock=self.clock,
            ),
            "export_stream": _export_stream,
            "reading": AuditReading(
                records=records,
                log=tree,
                broken=lambda: self.continuity.broken,
                clock=self.clock,
            ),
            "event_reports": EventReports(
                store=events,
                tokens=events,
                unproven=self._unproven,
                operators=self._operators,
                clock=self.clock,
                clock_skew=settings.clock_skew,
            ),
        }

    def _at_the_console(self, settings: Settings) -> dict[str, object]:
        """Build what only the console asks for."""
        users, clock = self._stores.users, self.clock
        return {
            "sessions": self._sessions,
            "people": People(store=users, api_audience=settings.api_audience, clock=clock),
            "provider": provider_of(settings, clock),
            "watch": Watch(
                store=AttentionRecords(self.database),
                uses=self._stores.uses,
                held=users,
                keys=self.rotator,
                log=self.continuity,
                clock=clock,
            ),
            "usage": self.usage,
            "hand_overs": HandOvers(store=users, audit=self.audit, clock=clock),
            "by_hand": TokensByHand(
                issuer=settings.issuer,
                api_audience=settings.api_audience,
                token_issuer=self._issuer,
                operators=self._operators,
                directory=self.directory,
                names=ServiceUserNames(self.database),
                clock=clock,
            ),
            "installation": Installation(
                token_url=f"{settings.issuer}/oauth/token",
                ingest_url=settings.upload_url,
                ingest_audience=settings.audience,
            ),
            "ingest_client": IngestClient(settings.upload_url),
        }

    def health(self) -> Health:
        """Return whether this process should get requests. Postgres away is no reason not to."""
        ring = self.keys.ring
        schema, key_ring = self._schema_ready.is_set(), self.keys.loaded
        return Health(
            ready=schema and key_ring and self.continuity.compared and not self._draining,
            key_ring=key_ring,
            schema=schema,
            draining=self._draining,
            postgres=self.audit.available,
            ring_age_seconds=round(self.keys.age, 1) if key_ring else None,
            can_sign=ring.active is not None and ring.active.signer is not None,
            signing_kid=ring.active.kid if ring.active else None,
            concerns=self.rotator.concerns() if key_ring else (),
            audit_log=self.continuity.broken,
            sequencer=self.sequencer.trouble,
        )

    @asynccontextmanager
    async def _running(self, _: Litestar) -> AsyncGenerator[None, None]:
        """Start what runs beside the requests; never fail because Postgres is away."""
        self._drain_on_sigterm()
        async with self.database, asyncio.TaskGroup() as tasks:
            background = [
                tasks.create_task(_kept_running(work))
                for work in (
                    self.audit.run,
                    self.listener.run,
                    self._keep_prepared,
                    self._rotate_when_prepared,
                    self.sequencer.run,
                )
            ]
            await self._started()
            yield
            await self._unproven.drain()
            await self.audit.drain()
            for task in background:
                task.cancel()
        self._signing.shutdown()

    async def _started(self) -> None:
        """Wait a little for the first look at Postgres, so that a fresh start is ready at once."""
        deadline = asyncio.get_running_loop().time() + START_PATIENCE
        while not (self.health().ready and self.audit.available):
            if asyncio.get_running_loop().time() > deadline:
                log.warning("started_without_postgres")
                return
            await asyncio.sleep(0.02)

    async def _keep_prepared(self) -> None:
        """Check the schema, then keep the partitions of the audit log ahead of time."""
        while True:
            try:
                # Here and not only before the start: Postgres may have been away then.
                await check_server(self._dsn)
                async with self.database.connection() as connection:
                    await require_schema(connection)
                    if await AuditTree(always(connection)).current() is None:
                        raise StartRefused(NO_LOG)
                    await prepare_log(connection)
                self._schema_ready.set()
                await self.count_ending()
                await asyncio.sleep(_UPKEEP)
            except StartRefused as error:
                log.error("not_serving_from_this_database", error=str(error))
                await asyncio.sleep(_RETRY)
            except StoreUnavailable:
                await asyncio.sleep(_RETRY)

    async def count_ending(self) -> None:
        """Count the credentials that end soon, for whoever watches the metrics."""
        days = metrics.CREDENTIALS_ENDING_DAYS
        try:
            counts = await self.usage.count_ending([timedelta(days=each) for each in days])
        except StoreUnavailable as error:
            # Nothing waits for these figures.
            log.warning("ending_credentials_not_counted", error=str(error))
            return
        for each, count in zip(days, counts, strict=True):
            metrics.credentials_ending.labels(f"{each}d").set(count)

    async def _compare(self, connection: Connection) -> None:
        try:
            await self.continuity.compare(AuditTree(always(connection)))
        except OSError as error:
            raise StoreUnavailable(f"no outside checkpoint can be read: {error}") from None

    async def _rotate_when_prepared(self) -> None:
        await self._schema_ready.wait()
        await self.rotator.run(RING_POLL)

    async def _on_listening(self) -> None:
        self.directory.forget_all()
        if self._schema_ready.is_set():
            await self.keys.fresh()

    async def _on_signing_keys(self) -> None:
        # A step may have become due: an operator hastened a rotation, or took the next key away.
        await self.rotator.tick()

    async def _record_refusal(self, scope: Scope) -> None:
        action = scope["route_handler"].opt.get("action", "")
        if (token := noted(scope, "unrecorded_token")) is not None:
            with suppress(StoreUnavailable):
                if await self._presented.record_if_forged(token, action, origin_of(scope)):
                    return
        if action:
            await self.audit.append_or_count(refusal_record(scope, self.clock()))

    def _drain_on_sigterm(self) -> None:
        """Be not ready for `drain_seconds` before the server stops, so that no request is lost."""
        stop = signal.getsignal(signal.SIGTERM)
        if not callable(stop) or self._drain_seconds == 0:
            return
        loop = asyncio.get_running_loop()

        def drain(number: int, frame: FrameType | None) -> None:
            self._draining = True
            loop.call_soon_threadsafe(loop.call_later, self._drain_seconds, stop, number, frame)

        signal.signal(signal.SIGTERM, drain)


async def _kept_running(work: Callable[[], Awaitable[None]]) -> None:
    """Start `work` again whenever it fails: a defect there must not end the whole process."""
    while True:
        try:
            await work()
        except Exception as error:
            log.error("background_work_failed", work=work.__qualname__, error=_classes(error))
        await asyncio.sleep(_RETRY)


def _classes(error: BaseException) -> list[str]:
    # Classes only: the text of an exception may quote what must not be logged.
    if isinstance(error, BaseExceptionGroup):
        members = cast("BaseExceptionGroup[BaseException]", error).exceptions
        return [name for member in members for name in _classes(member)]
    return [type(error).__name__]


def _provide(part: object) -> Provide:
    async def built() -> object:
        return part

    return Provide(built)


def _export_stream(pages: AsyncGenerator[Sequence[Proven], None], name: str) -> ASGIApp:
    return ExportStream(pages, Format(name))


def _end_with_parent() -> None:
    """Let a worker end when its parent is killed: it would hold the port for ever."""
    if multiprocessing.parent_process() is None:
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() == 1:
        os.kill(os.getpid(), signal.SIGTERM)
