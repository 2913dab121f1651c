"""The commands that run where the database is: serve, migrate, bootstrap, restore, doctor.

Everything that an operator does from elsewhere goes through the API: `api.py`.
"""

# Nothing here may import prometheus_client before `serve` has set its directory: what does is
# imported where it is used.
import asyncio
import errno
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Final, NoReturn, TypeVar
from urllib.parse import parse_qs, urlsplit

import asyncpg
import click
import structlog

from keys.attestation import require_attested
from keys.envelope import EnvelopeError, KeyEncryptionKeys, new_kek_line
from keys.keyring import MAY_SIGN
from keys.secret import Secret
from keys.signer import LOCAL, CustodyBySchemes, CustodyError, scheme_of
from service.authority.errors import AdminRefusal, Conflict, StartRefused, StoreUnavailable
from service.cli.arguments import confirm
from service.logging import configure_logging
from service.settings import Settings, SettingsError, warnings
from service.store.audit_logs import log_keys_kept_elsewhere, newest_vkey, open_log
from service.store.database import (
    MIGRATING,
    ConnectionRefused,
    check_server,
    connect,
    sqlstate,
    time_of,
)
from service.store.embedded import EmbeddedPostgres, require_running
from service.store.migrate import MigrationRefused, migrate, require_schema

# PostgreSQL, appendix A.
_POSTGRES_REFUSALS: Final = {
    "28P01": "Postgres refuses role or password. Correct those in PRIVYSEAL_DATABASE_URL.",
    "28000": "Postgres refuses this role from here (pg_hba.conf). Correct PRIVYSEAL_DATABASE_URL.",
    "3D000": "Postgres has no such database. Correct PRIVYSEAL_DATABASE_URL, or make it: "
    "deploy/postgres/roles.sql",
    "55000": "The database takes no connections just now (ALLOW_CONNECTIONS false), as during a "
    "restore. Try again when that is over.",
    "42501": "Postgres does not let this role do that: migrate, audit archive, audit erase and "
    "restore accept are for the owner of the schema (privyseal_owner), everything else for "
    "privyseal_service.",
}
_FAILURES: Final = (
    AdminRefusal,
    StartRefused,
    MigrationRefused,
    EnvelopeError,
    CustodyError,
    StoreUnavailable,
    asyncpg.PostgresError,
)
_POSTGRES_PORT: Final = 5432

GRACEFUL_SHUTDOWN: Final = 30
KEEP_ALIVE: Final = 65

T = TypeVar("T")
log = structlog.stdlib.get_logger()


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8080, show_default=True, type=click.IntRange(1, 65535))
@click.option(
    "--workers", default=1, show_default=True, type=click.IntRange(1, 64), help="Processes."
)
def serve(host: str, port: int, workers: int) -> None:
    """Serve tokens, keys and the admin API.

    Without PRIVYSEAL_DATABASE_URL an embedded PostgreSQL under PRIVYSEAL_DATA_DIR is started,
    migrated and stopped along with the server: for development and tests.

    \b
    Examples:
      privyseal serve
      PRIVYSEAL_ISSUER=https://tokens.example PRIVYSEAL_DATABASE_URL=... \\
        privyseal serve --host 0.0.0.0 --workers 2
    """
    settings = _settings()
    configure_logging(settings.log_level)
    _require_free(host, port)
    for warning in warnings(settings):
        log.warning("weak_setting", detail=warning)
    embedded = running = None
    if settings.database_url is None:
        embedded = EmbeddedPostgres(settings.data_dir, bin_dir=settings.pg_bin)
        running = refusing(embedded.start)
    # Not earlier: a second server on this DATA_DIR was refused above. Not later: what follows
    # imports the metrics.
    _prepare_metrics(settings.data_dir)
    if running is not None:
        if settings.kek_file is None:
            _make_kek(settings.kek_path)
        _run(_migrated(settings, running.owner_dsn))
    _run(_preflight(settings))
    # uvicorn raises the signal that stopped it once more: it must end this command, not kill it.
    signal.signal(signal.SIGTERM, _end)
    log.info("serving", url=f"http://{host}:{port}", issuer=settings.issuer, workers=workers)
    try:
        _serve(host, port, workers)
    finally:
        # A courtesy: the embedded server ends by itself, less gently, when this process is gone.
        if embedded is not None:
            embedded.stop()


def _require_free(host: str, port: int) -> None:
    """Refuse in words what uvicorn would find out only after everything else has started."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as attempt:
        attempt.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            attempt.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                _refuse(f"Port {port} on {host} is taken. Choose another: --port")
            _refuse(f"Cannot listen on port {port} of {host}: {error.strerror}.")


def _end(_: int, __: FrameType | None) -> NoReturn:
    sys.exit(0)


def _serve(host: str, port: int, workers: int) -> None:
    import uvicorn

    uvicorn.run(
        "service.app:create_app",
        factory=True,
        host=host,
        port=port,
        workers=workers,
        loop="uvloop",
        http="service.http.protocol:BoundedProtocol",
        lifespan="on",
        access_log=False,  # it prints queries
        log_config=None,
        server_header=False,
        proxy_headers=False,  # PRIVYSEAL_TRUSTED_PROXIES decides, in http/context.py
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=GRACEFUL_SHUTDOWN,
    )


@click.command(name="migrate")
def migrate_command() -> None:
    """Bring the database to the schema of this release, and open its audit log.

    PRIVYSEAL_DATABASE_URL names the owner of the schema (privyseal_owner). Servers of the
    release before go on working. The first time the audit log's key is made, which takes
    PRIVYSEAL_ISSUER, PRIVYSEAL_KEK_FILE and PRIVYSEAL_KEY_CUSTODY, with the HSM's PIN, as the
    servers have them; so it does once more where signing keys stand that no release has attested
    yet. The log's verifier key is printed each time: pin it wherever checkpoints are read.
    """
    settings = command_settings()
    names, vkey = _run(_migrated(settings, owner_dsn(settings)))
    click.echo("\n".join(names) if names else "Nothing to do: the schema is that of this release.")
    click.echo(f"Verifier key of the audit log: {vkey}")


@click.command()
@click.option("--name", default="operator", show_default=True, help="Name of the operator.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--recover", is_flag=True, help="Make one although an operator lives; on record.")
@click.option("--reason", default="", help="Why; needed with --recover.")
def bootstrap(name: str, as_json: bool, recover: bool, reason: str) -> None:
    """Make the first operator and print its credential, once.

    Refuses while an operator lives. --recover --reason makes another one all the same, and says
    so in the audit log.
    """
    if recover and not reason.strip():
        raise click.UsageError("--recover needs --reason: it goes on record.")
    settings = command_settings()
    client_id, secret = _run(_bootstrapped(settings, name, recover, reason.strip()))
    if as_json:
        click.echo(json.dumps({"client_id": client_id, "client_secret": secret.reveal()}))
        return
    click.echo(f"export PRIVYSEAL_URL={settings.issuer}")
    click.echo(f"export PRIVYSEAL_CLIENT_ID={client_id}")
    click.echo(f"export PRIVYSEAL_CLIENT_SECRET={secret.reveal()}")
    click.echo("The secret is shown this once. Try: privyseal service-users list", err=True)


@click.group()
def restore() -> None:
    """When the database was restored from a backup, or cut: nothing is issued then."""


@restore.command()
@click.option("--reason", required=True, help="Why: 3 to 200 characters; it goes on record.")
@click.option("--yes", is_flag=True, help="Do not ask first.")
def accept(reason: str, yes: bool) -> None:
    """Go on with this database, although records are missing.

    Its audit log does not extend what was signed, or the HSM with the log's key is lost. For when
    the right one cannot be had any more: what was decided after the backup is lost with it,
    revocations too. So every signing key is revoked, every credential is held until an operator
    confirms it, every person who signs in through the portal is disabled until an operator enables
    them, and the audit log goes on under another name. Asks first.

    PRIVYSEAL_DATABASE_URL names the owner of the schema (privyseal_owner); PRIVYSEAL_KEK_FILE,
    PRIVYSEAL_CHECKPOINT_DIR and PRIVYSEAL_KEY_CUSTODY are as the servers have them.
    """
    if not 3 <= len(reason.strip()) <= 200:
        raise click.BadParameter("expected 3 to 200 characters.", param_hint="--reason")
    settings = command_settings()
    _run(_accepted(settings, owner_dsn(settings), reason.strip(), yes))


def rewrap() -> None:
    """Seal every signing key under the first key of KEK_FILE: `privyseal keys rewrap`."""
    _run(_rewrapped(command_settings()))


@click.command()
def doctor() -> None:
    """Check settings, database, clock and keys, and say what to change.

    Exits with 0 if everything is well and with 1 if anything is not.
    """
    settings = command_settings()
    failed = False
    for name, check in _CHECKS.items():
        if failed:
            _show_row("skip", "yellow", name, "needs what failed above")
            continue
        try:
            _show_row("ok", "green", name, asyncio.run(check(settings)))
        except _FAILURES as error:
            failed = True
            _show_row("FAIL", "red", name, _in_words(error))
    for warning in warnings(settings):
        _show_row("weak", "yellow", "settings", warning)
    if not failed and (origin := refusing(lambda: asyncio.run(_foreign_log(settings)))):
        _show_row(
            "weak",
            "yellow",
            "audit log",
            f"it is {origin}, which is not of the issuer {settings.issuer}. Has PRIVYSEAL_ISSUER "
            "here the value that the servers have?",
        )
    if not failed and (overdue := refusing(lambda: asyncio.run(_overdue(settings)))):
        _show_row(
            "weak",
            "yellow",
            "records",
            f"{', '.join(overdue)}: older than PRIVYSEAL_AUDIT_RETENTION_MONTHS. Run "
            "`privyseal audit archive --to DIR` as the owner.",
        )
    if not failed and refusing(lambda: asyncio.run(_log_key_outside_hsm(settings))):
        _show_row(
            "weak",
            "yellow",
            "audit log",
            "its key is sealed in the database and not in the HSM, until a new log is opened: who "
            "has the database and PRIVYSEAL_KEK_FILE can sign checkpoints. Keep some outside.",
        )
    sys.exit(failed)


def _show_row(mark: str, colour: str, name: str, found: str) -> None:
    indented = found.replace("\n", "\n" + " " * 18)
    click.echo(f"{click.style(f'{mark:<4}', fg=colour)}  {name:<11} {indented}")


def command_settings() -> Settings:
    """Return the settings of a command that ends; what goes wrong is its last word, not a log."""
    settings = _settings()
    configure_logging("error")
    return settings


def _settings() -> Settings:
    try:
        return Settings.from_environ(os.environ)
    except SettingsError as error:
        _refuse(str(error))


def _prepare_metrics(data_dir: Path) -> None:
    """Give the workers a fresh directory to share their metrics in."""
    data_dir.mkdir(parents=True, exist_ok=True)
    directory = data_dir / "metrics"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(directory.resolve())


def _make_kek(path: Path) -> None:
    """Make the key-encryption key of an embedded set-up; never replace one."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # Complete or not at all: a half-written KEK would be worse than none.
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".kek-", delete=False) as file:
        file.write(new_kek_line() + "\n")
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(file.name, path)
    except FileExistsError:
        pass
    else:
        log.info("kek_made", path=str(path))
    finally:
        os.unlink(file.name)


def _read_keks(settings: Settings) -> KeyEncryptionKeys:
    from service.app import kek_reader

    return kek_reader(settings.kek_path)()


async def _preflight(settings: Settings) -> None:
    """Raise StartRefused for what would break a promise; Postgres away is no reason."""
    _read_keks(settings)
    _check_checkpoint_dir(settings)
    try:
        await check_server(_dsn(settings))
        await _check_schema(settings)
        for uri, trouble in await _unusable_keys(settings):
            if uri is None:
                # Whoever has the database's password could keep every server from starting.
                log.warning("starting_without_a_key", error=trouble)
                continue
            # An HSM that is away comes back, and until then the keys are published.
            if uri == LOCAL or scheme_of(uri) not in map(scheme_of, settings.key_custody):
                raise StartRefused(trouble)
            log.warning("starting_without_hsm", error=trouble)
        try:
            await _check_log_key(settings)
        except CustodyError as error:
            log.warning("starting_without_hsm", error=str(error))
    except ConnectionRefused:
        raise  # nothing that waiting alone would mend
    except StoreUnavailable as error:
        log.warning("starting_without_postgres", error=str(error))


@asynccontextmanager
async def _custody(settings: Settings) -> AsyncGenerator[CustodyBySchemes, None]:
    from service.app import custody, kek_reader

    with ThreadPoolExecutor(1) as executor:
        yield custody(settings, kek_reader(settings.kek_path), executor)


def _dsn(settings: Settings) -> Secret:
    from service.app import service_dsn

    return service_dsn(settings)


@asynccontextmanager
async def _connection(settings: Settings) -> AsyncGenerator[Any, None]:
    connection = await connect(_dsn(settings), application_name="privyseal command")
    try:
        yield connection
    finally:
        connection.terminate()


async def _check_settings(settings: Settings) -> str:
    return f"issuer {settings.issuer}"


async def _check_server(settings: Settings) -> str:
    dsn = _dsn(settings)
    try:
        await check_server(dsn)
    except ConnectionRefused:
        raise
    except StoreUnavailable as error:
        raise StartRefused(
            f"No answer at {_hosts(dsn)} ({error}). Start Postgres, or correct "
            "PRIVYSEAL_DATABASE_URL."
        ) from None
    return "durable, NOTIFY arrives, the role cannot change the audit log"


def _hosts(dsn: Secret) -> str:
    """Return host and port of each server, and nothing else of the URL."""
    url = urlsplit(dsn.reveal())
    hosts = url.netloc.rpartition("@")[2] or ",".join(parse_qs(url.query).get("host", ()))
    return ", ".join(
        host if host.rpartition(":")[2].isdigit() else f"{host}:{_POSTGRES_PORT}"
        for host in hosts.split(",")
    )


async def _check_schema(settings: Settings) -> str:
    async with _connection(settings) as connection:
        await require_schema(connection)
    return "that of this release"


def _check_checkpoint_dir(settings: Settings) -> None:
    """Raise StartRefused unless checkpoints can be kept, where no restore reaches them."""
    if settings.checkpoint_dir is None and settings.database_url is not None:
        raise StartRefused(
            "Set PRIVYSEAL_CHECKPOINT_DIR to a directory that is restored with no backup of the "
            "database: by what it holds, a database that was restored or cut is noticed."
        )
    path = settings.checkpoint_path
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise StartRefused(
            f"Checkpoints cannot be kept in {path} (PRIVYSEAL_CHECKPOINT_DIR): {error.strerror}."
        ) from None


async def _check_log_key(settings: Settings) -> None:
    """Open the key of the audit log: a wrong KEK must show now."""
    from service.authority.audit.continuity import NO_LOG, log_key_trouble
    from service.store.audit_tree import AuditTree, always

    async with _connection(settings) as connection:
        current = await AuditTree(always(connection)).current()
    if current is None:
        raise StartRefused(NO_LOG)
    async with _custody(settings) as custody:
        try:
            await custody.open_log_key(current.key)
        except CustodyError as error:
            trouble = log_key_trouble(current.key, error)
            scheme = scheme_of(current.key.uri)
            # An HSM that is away comes back.
            if scheme != LOCAL and scheme in map(scheme_of, settings.key_custody):
                raise CustodyError(trouble) from None
            raise StartRefused(trouble) from None


async def _check_audit_log(settings: Settings) -> str:
    """Compare the audit log with its newest checkpoint outside, as a server does."""
    from service.authority.audit.continuity import Continuity
    from service.store.audit_tree import AuditTree, always
    from service.store.checkpoint_files import CheckpointFiles

    _check_checkpoint_dir(settings)
    await _check_log_key(settings)
    async with _custody(settings) as custody, _connection(settings) as connection:
        continuity = Continuity(outside=CheckpointFiles(settings.checkpoint_path), log_keys=custody)
        await continuity.compare(AuditTree(always(connection)))
    if continuity.broken is not None:
        raise StartRefused(continuity.broken)
    return f"extends the newest checkpoint in {settings.checkpoint_path}"


async def _foreign_log(settings: Settings) -> str | None:
    """Return the name of the audit log if it is not one that this issuer would give."""
    from service.store.audit_tree import AuditTree, always

    async with _connection(settings) as connection:
        current = await AuditTree(always(connection)).current()
    if current is None:
        return None
    mine, found = (each.rpartition("/")[0] for each in (settings.log_origin, current.origin))
    return None if found == mine else current.origin


async def _check_keys(settings: Settings) -> str:
    """Open every key: a wrong KEK must show now, not when the key has to sign."""
    _read_keks(settings)
    unusable = await _unusable_keys(settings)
    if unusable:
        raise StartRefused("\n".join(trouble for _, trouble in unusable))
    return f"all open, with {settings.kek_path}"


async def _check_custody(settings: Settings) -> str:
    """Name what an HSM holds and no key here needs: a pair that was made as a process died."""
    from service.store.database import Database
    from service.store.signing_keys import SigningKeys

    async with _custody(settings) as custody:
        held = await custody.listed()
    async with Database(_dsn(settings), application_name="privyseal command") as database:
        known = await SigningKeys(database, clock_skew=settings.clock_skew).kept_elsewhere()
        async with database.connection() as connection:
            known |= await log_keys_kept_elsewhere(connection)
    where = ", ".join(uri.partition("?")[0] for uri in settings.key_custody)
    if unknown := sorted(frozenset(held) - known):
        return (
            f"{where}. It also holds keys that this database does not name: destroy them there, "
            "unless another installation uses them:\n" + "\n".join(unknown)
        )
    return where


async def _unusable_keys(settings: Settings) -> list[tuple[str | None, str]]:
    """Return where each key is kept that should sign, now or next, and cannot be used, and why;
    None for one that is not attested, whatever it is for, unless none is."""
    from service.store.database import Database
    from service.store.signing_keys import SigningKeys

    unusable: list[tuple[str | None, str]] = []
    foreign: list[str] = []
    keks = _read_keks(settings)
    async with _custody(settings) as custody:
        async with Database(_dsn(settings), application_name="privyseal command") as database:
            stored = await SigningKeys(database, clock_skew=settings.clock_skew).published_keys()
        for each in stored:
            try:
                require_attested(each.key.kid, each.key.public_key, each.kept.attestation, keks)
            except EnvelopeError as error:
                trouble = (
                    f"The {each.key.state} signing key is not published: {error}. If KEK_FILE is "
                    f"the right one, it was not made here: privyseal keys revoke {each.key.kid}"
                )
                foreign.append(trouble)
                continue
            if each.key.state not in MAY_SIGN:
                continue
            try:
                await custody.open(each.kept)
            except CustodyError as error:
                trouble = (
                    f"The {each.key.state} signing key cannot be used: {error}. If it is lost for "
                    "good: privyseal keys recover"
                )
                unusable.append((each.kept.uri, trouble))
    # Where none opens, the key-encryption keys are the wrong ones.
    where = LOCAL if len(foreign) == len(stored) else None
    return unusable + [(where, trouble) for trouble in foreign]


async def _check_clock(settings: Settings) -> str:
    async with _connection(settings) as connection:
        sent = time.time()
        at = await time_of(connection)
        offset = at - (sent + time.time()) / 2
    if abs(offset) > settings.clock_skew:
        raise StartRefused(f"This clock is {offset:+.1f} s off that of Postgres. Run NTP on both.")
    return f"{offset:+.3f} s off that of Postgres"


async def _check_forged(settings: Settings) -> str:
    from service.authority.model import SHOWN_DAYS
    from service.store.audit_events import AuditEvents
    from service.store.database import Database

    async with Database(_dsn(settings), application_name="privyseal command") as database:
        count = await AuditEvents(database, clock_skew=settings.clock_skew).count_forged(SHOWN_DAYS)
    if count:
        raise StartRefused(
            f"{count} forged tokens were noticed in the last {SHOWN_DAYS} days: a signing key is "
            "in other hands. See: privyseal audit list --action token.forged"
        )
    return f"no forged token was noticed in the last {SHOWN_DAYS} days"


_CHECKS: Final[dict[str, Callable[[Settings], Coroutine[Any, Any, str]]]] = {
    "settings": _check_settings,
    "postgres": _check_server,
    "clock": _check_clock,
    "schema": _check_schema,
    "keys": _check_keys,
    "audit log": _check_audit_log,
    "custody": _check_custody,
    "reports": _check_forged,
}
"""In this order each relies on those before it."""


async def _log_key_outside_hsm(settings: Settings) -> bool:
    """Return whether new keys are made in an HSM, and the audit log's is not in one."""
    from service.store.audit_tree import AuditTree, always

    if settings.key_custody[0] == LOCAL:
        return False
    async with _connection(settings) as connection:
        current = await AuditTree(always(connection)).current()
    return current is not None and current.key.uri == LOCAL


async def _overdue(settings: Settings) -> list[str]:
    """Return the months that should be in an archive by now."""
    from service.store.audit_archive import closed_months, months_with_records

    if settings.audit_retention_months is None:
        return []
    async with _connection(settings) as connection:
        months = await months_with_records(connection)
    return closed_months(
        months, datetime.fromtimestamp(time.time(), UTC), settings.audit_retention_months
    )


async def _migrated(settings: Settings, owner_dsn: Secret) -> tuple[list[str], str]:
    """Return what was applied, and the verifier key of the audit log."""
    from service.store.signing_keys import attest_all

    connection = await connect(owner_dsn, application_name="privyseal migrate", deadlines=MIGRATING)
    try:
        attest = partial(attest_all, read_keks=lambda: _read_keks(settings))
        names = await migrate(connection, along={"0013_attestations": attest})
        if (vkey := await newest_vkey(connection)) is None:
            async with _custody(settings) as custody:
                key = await custody.new_log_key(settings.log_origin)
                if not await open_log(connection, key):
                    await custody.destroy(key.uri)  # another process was faster
            vkey = await newest_vkey(connection)
            assert vkey is not None
        return names, vkey
    finally:
        connection.terminate()


def owner_dsn(settings: Settings) -> Secret:
    """Return how the owner of the schema enters the database, or exit with 1."""
    if settings.database_url is not None:
        return settings.database_url
    return Secret(refusing(lambda: require_running(settings.data_dir)).owner_dsn)


async def _accepted(settings: Settings, owner_dsn: Secret, reason: str, yes: bool) -> None:
    from service.app import custody, kek_reader, rotation_policy
    from service.authority.restore import Restorer, difference
    from service.store.audit_tree import AuditTree
    from service.store.checkpoint_files import CheckpointFiles
    from service.store.database import Database
    from service.store.restored import RestoredDatabase

    _check_checkpoint_dir(settings)
    outside = CheckpointFiles(settings.checkpoint_path)
    with ThreadPoolExecutor(1) as executor:
        keys = custody(settings, kek_reader(settings.kek_path), executor)
        async with Database(
            owner_dsn, application_name="privyseal restore", deadlines=MIGRATING
        ) as database:
            async with database.connection() as connection:
                await require_schema(connection)
            found = await difference(AuditTree(database.connection), outside, keys)
            if found is None:
                raise StartRefused("There is nothing to accept: the audit log is whole.")
            store = RestoredDatabase(database, clock_skew=settings.clock_skew)
            toll = await store.toll()
            consequences = (
                found.found,
                f"To accept it revokes all {len(toll.published_kids)} published signing keys and "
                "puts two new ones in, of which one signs at once.",
                f"It holds all {toll.live_credentials} live credentials, those of operators too: "
                "none gets a token until an operator confirms it.",
                f"It disables all {toll.active_people} people who sign in through the portal: none "
                "gets in until an operator enables them.",
                f"It opens the audit log {found.next_origin} with a key of its own. Its first "
                "record, but for those that had no place in the old one yet, is this act, with the "
                "newest checkpoint outside.",
            )
            if yes:
                click.echo("\n".join(consequences), err=True)
            else:
                confirm(*consequences)
            restorer = Restorer(
                store=store,
                custody=keys,
                policy=rotation_policy(settings),
                key_bits=settings.key_bits,
            )
            verifier = await restorer.accept(found, reason)
    click.echo(f"Verifier key of the audit log: {verifier.vkey}")
    click.echo(
        "Accepted, on record. Pin that key wherever checkpoints are read, and keep the one of "
        "before: with it what is older is verified. Then make an operator "
        "(`privyseal bootstrap --name ...`), look at what is held (`privyseal credentials list`), "
        "and confirm what you know to be good (`privyseal credentials confirm`): what was revoked "
        "after the backup is held like the rest. Of the people (`privyseal service-users list "
        "--source-system console`) enable whom you know (`privyseal service-users enable NAME`).",
        err=True,
    )


async def _bootstrapped(
    settings: Settings, name: str, recover: bool, reason: str
) -> tuple[str, Secret]:
    from service.authority.administration import first_operator
    from service.store.database import Database
    from service.store.service_users import ServiceUsers

    async with _connection(settings) as connection:
        await require_schema(connection)
        now = await time_of(connection)
    user, credential, secret, record = first_operator(name, settings.api_audience, now, reason)
    async with Database(_dsn(settings), application_name="privyseal bootstrap") as database:
        users = ServiceUsers(database, clock_skew=settings.clock_skew)
        if not await users.bootstrap(user, credential, record, force=recover):
            raise StartRefused(
                "An operator with service-users:write lives already. Ask them, or use "
                "--recover --reason if none can be found."
            )
    return user.id, secret


def recover(reason: str) -> None:
    """Revoke every key and put two new ones in, without the API: `privyseal keys recover`."""
    _run(_recovered(command_settings(), reason))


async def _recovered(settings: Settings, reason: str) -> None:
    from service.app import custody, kek_reader, rotation_policy
    from service.authority.key_administration import recovery_record
    from service.store.database import Database
    from service.store.signing_keys import SigningKeys

    with ThreadPoolExecutor(1) as executor:
        kept = custody(settings, kek_reader(settings.kek_path), executor)
        async with Database(_dsn(settings), application_name="privyseal recover") as database:
            store = SigningKeys(database, clock_skew=settings.clock_skew)
            kids = [each.key.kid for each in await store.published_keys()]
            async with database.connection() as connection:
                now = await time_of(connection)
            signing, following = [await kept.new_key(settings.key_bits) for _ in range(2)]
            record = recovery_record(signing.kid, now, reason, kids)
            policy = rotation_policy(settings)
            if not await store.revoke_all(kids, signing, following, policy, record):
                raise Conflict("A key changed meanwhile: run this again.")
    click.echo(f"{len(kids)} keys are revoked. {signing.kid} signs.")


async def _rewrapped(settings: Settings) -> None:
    from keys.signer import reseal
    from service.authority.key_administration import rewrap_log_key, rewrap_record
    from service.store.audit_tree import AuditTree
    from service.store.database import Database
    from service.store.signing_keys import SigningKeys

    keks = _read_keks(settings)
    async with Database(_dsn(settings), application_name="privyseal rewrap") as database:
        store = SigningKeys(database, clock_skew=settings.clock_skew)
        published = [each.kept for each in await store.published_keys()]
        async with database.connection() as connection:
            now = await time_of(connection)
        changed = False
        foreign: list[str] = []
        for number, before in enumerate(published, start=1):
            state = "is under the first key already"
            try:
                after = reseal(before, keks)
            except EnvelopeError as error:
                # One that does not open must not keep the others under the old key.
                foreign.append(str(error))
                state, after = "does not open", before
            if after is not before:
                done = await store.reseal(before, after, rewrap_record(before.kid, now))
                state = "rewrapped" if done else "changed meanwhile"
                changed = changed or not done
            click.echo(f"{number} of {len(published)}  {before.kid}  {state}")
        if not await rewrap_log_key(AuditTree(database.connection), keks, now):
            changed = True
    if changed:
        raise Conflict("A key changed meanwhile: run this again before the old key goes.")
    if foreign:
        raise EnvelopeError("\n".join(foreign))


def _run(work: Coroutine[Any, Any, T]) -> T:
    return refusing(lambda: asyncio.run(work))


def refusing(act: Callable[[], T]) -> T:
    """Do it, or say in words why not and exit with 1."""
    try:
        return act()
    except _FAILURES as failure:
        _refuse(_in_words(failure))


def _in_words(failure: Exception) -> str:
    if isinstance(failure, AdminRefusal):
        return failure.detail
    if state := sqlstate(failure):
        unexpected = f"Postgres refused: {type(failure).__name__} (SQLSTATE {state})."
        return _POSTGRES_REFUSALS.get(state, unexpected)
    if isinstance(failure, StoreUnavailable):
        return f"Postgres does not answer ({failure}). Is it running, and is the URL right?"
    return str(failure)


def _refuse(reason: str) -> NoReturn:
    click.echo(reason, err=True)
    sys.exit(1)
