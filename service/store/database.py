"""Opens connections to Postgres with deadlines, and gives every loss of one the same name.

Holds no query of the domain, and repeats nothing that failed: that is for the caller to decide.
"""

import asyncio
import secrets
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from typing import TypeAlias

import asyncpg
import msgspec
import structlog
from asyncpg.connect_utils import SessionAttribute
from asyncpg.pool import Pool, PoolConnectionProxy

from keys.secret import Secret
from service.authority.errors import StartRefused, StoreUnavailable

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record] | PoolConnectionProxy[asyncpg.Record]"

NOTIFY_DEADLINE = 2.0
"""Seconds within which a NOTIFY must reach a listener when the server starts."""

AUDIT_TABLES = (
    "audit_records",
    "audit_personal",
    "audit_logs",
    "audit_leaves",
    "audit_nodes",
    "audit_checkpoints",
)

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class Deadlines(msgspec.Struct, frozen=True, kw_only=True):
    """How long Postgres may take, in seconds. The first three are kept by the server.

    `command` is kept here, for the case that the server says nothing at all; so it must be the
    longest of those that can pass during a command.
    """

    statement: float = 5.0
    lock: float = 2.0
    idle_in_transaction: float = 10.0
    command: float = 6.0
    connect: float = 3.0
    acquire: float = 2.0

    def __post_init__(self) -> None:
        if not 0 < self.lock <= self.statement < self.command:
            raise ValueError("expected 0 < lock <= statement < command")


SERVING = Deadlines()

MIGRATING = Deadlines(
    statement=600.0, lock=10.0, idle_in_transaction=600.0, command=660.0, connect=10.0
)


class ConnectionRefused(StoreUnavailable):
    """Postgres answers and lets nobody in: a password was changed, or a restore is under way.

    `sqlstate` says which (PostgreSQL, appendix A).
    """

    def __init__(self, error: asyncpg.PostgresError) -> None:
        super().__init__(f"{type(error).__name__} {error.sqlstate}")
        self.sqlstate = error.sqlstate


def sqlstate(error: BaseException) -> str | None:
    """Return the SQLSTATE of an error that Postgres reported, `None` for any other error."""
    return error.sqlstate if isinstance(error, asyncpg.PostgresError | ConnectionRefused) else None


def is_unavailability(error: BaseException) -> bool:
    """Tell whether `error` says that Postgres cannot answer now, not that the question was wrong.

    SQLSTATE classes 08 connection, 53 resources, 57 operator intervention (with our own
    `statement_timeout`, 57014); 25006 read-only: a demoted primary; 55P03: our own `lock_timeout`.
    """
    if (state := sqlstate(error)) is not None:
        return state[:2] in ("08", "53", "57") or state in ("25006", "55P03")
    if isinstance(error, OSError):  # TimeoutError is one
        return True
    # An InterfaceError that is a ValueError means a DSN that cannot be used.
    return isinstance(
        error, asyncpg.InterfaceError | asyncpg.InternalClientError
    ) and not isinstance(error, ValueError)


@contextmanager
def loss_as_unavailable() -> Generator[None, None, None]:
    """Raise `StoreUnavailable` for whatever means that Postgres cannot answer now.

    For the owner of a single connection, who closes it then and opens another. The log and the
    new error name class and SQLSTATE only: asyncpg's text may quote arguments.
    """
    try:
        yield
    except Exception as error:
        if not is_unavailability(error):
            raise
        kind, state = type(error).__name__, sqlstate(error)
        # Whoever keeps trying says once that it is lost, and once that it is back.
        _log.debug("store_unavailable", error=kind, sqlstate=state)
        raise StoreUnavailable(f"{kind} {state}" if state else kind) from None


@contextmanager
def _refusal_as_unavailable() -> Generator[None, None, None]:
    """The same, for an attempt to connect: there is no question yet that could be wrong."""
    with loss_as_unavailable():
        try:
            yield
        except asyncpg.PostgresError as error:
            if is_unavailability(error):
                raise
            raise ConnectionRefused(error) from None


@contextmanager
def _nonsense_as_refusal() -> Generator[None, None, None]:
    try:
        yield
    except ValueError:
        # Its text may quote a part of the password.
        raise StartRefused(
            "The URL of the database makes no sense: postgresql://user:password@host:port/name, "
            "with whatever is no letter or digit in user and password percent-encoded."
        ) from None


async def connect(
    dsn: Secret, *, application_name: str, deadlines: Deadlines = SERVING
) -> "asyncpg.Connection[asyncpg.Record]":
    """Open one connection to the primary among the hosts of `dsn`.

    Raises `StoreUnavailable` within `deadlines.connect`, for a refused password and the like
    `ConnectionRefused`, `StartRefused` for a `dsn` that makes no sense. The caller owns the
    connection: `terminate()` never waits, `close(timeout=)` says good-bye first.
    """
    with _refusal_as_unavailable(), _nonsense_as_refusal():
        return await asyncpg.connect(
            dsn.reveal(),
            timeout=deadlines.connect,
            command_timeout=deadlines.command,
            server_settings=_server_settings(application_name, deadlines),
            target_session_attrs=SessionAttribute.primary,
        )


class Database:
    """A pool of connections to the primary, for everything that needs no connection of its own."""

    def __init__(
        self,
        dsn: Secret,
        *,
        application_name: str,
        max_size: int = 4,
        deadlines: Deadlines = SERVING,
    ) -> None:
        self._deadlines = deadlines
        self._pool: Pool[asyncpg.Record] = asyncpg.create_pool(
            dsn.reveal(),
            min_size=0,  # opening the pool connects to nothing, so it works while Postgres is away
            max_size=max_size,
            timeout=deadlines.connect,
            command_timeout=deadlines.command,
            server_settings=_server_settings(application_name, deadlines),
            target_session_attrs=SessionAttribute.primary,
        )

    async def __aenter__(self) -> "Database":
        await self._pool
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        try:
            async with asyncio.timeout(self._deadlines.command):
                await self._pool.close()
        except TimeoutError:
            self._pool.terminate()

    @asynccontextmanager
    async def connection(self) -> AsyncGenerator[Connection, None]:
        """Lend a connection; raise `StoreUnavailable` if there is none in time or it is lost.

        A lost connection does not return to the pool; after 25006 none does: the whole pool still
        talks to a primary that was demoted.
        """
        with _refusal_as_unavailable():
            connection = await self._pool.acquire(timeout=self._deadlines.acquire)
        with loss_as_unavailable():
            try:
                yield connection
            except Exception as error:
                if sqlstate(error) == "25006":
                    await self._pool.expire_connections()
                elif is_unavailability(error) and sqlstate(error) is None:
                    connection.terminate()
                raise
            finally:
                await self._take_back(connection)

    async def _take_back(self, connection: "PoolConnectionProxy[asyncpg.Record]") -> None:
        try:
            await self._pool.release(connection, timeout=self._deadlines.command)
        except Exception as error:
            if not is_unavailability(error):
                raise
            # What was asked is answered; asyncpg has dropped the connection already.
            _log.warning("connection_dropped", error=type(error).__name__)


async def fetch_durable(connection: Connection, call: str, *arguments: object) -> object:
    """Return what a function that commits returned; raise `StoreUnavailable` for a WARNING with it.

    A synchronous standby that did not confirm shows as no more than that.
    """
    warned = False

    def on_notice(_: object, notice: object) -> None:
        nonlocal warned
        warned = warned or getattr(notice, "severity_en", None) == "WARNING"

    connection.add_log_listener(on_notice)
    try:
        value = await connection.fetchval(call, *arguments)
    finally:
        connection.remove_log_listener(on_notice)
    if warned:
        raise StoreUnavailable("the commit came with a warning: it may not be durable")
    return value


async def time_of(connection: Connection) -> float:
    """Return the time of the database, in seconds since the epoch."""
    return await connection.fetchval("SELECT extract(epoch FROM clock_timestamp())::float8")


async def check_server(dsn: Secret) -> None:
    """Raise `StartRefused` with every reason not to serve from this database, a line each.

    A crash must lose nothing, NOTIFY must arrive, and the role must be unable to change the audit
    log. Raises `StoreUnavailable` if Postgres is away: then nothing is known.
    """
    listener = await connect(dsn, application_name="privyseal start check")
    try:
        sender = await connect(dsn, application_name="privyseal start check")
        try:
            with loss_as_unavailable():
                problems = [
                    *await _durability_problems(sender),
                    *await _notify_problems(listener, sender),
                    *await _role_problems(sender),
                ]
        finally:
            sender.terminate()
    finally:
        listener.terminate()
    if problems:
        raise StartRefused("\n".join(problems))


async def _durability_problems(connection: Connection) -> list[str]:
    return [
        f"Postgres runs with {name} off: a crash would lose audit records of tokens that are out. "
        "Turn it on."
        for name in ("fsync", "full_page_writes")
        if await connection.fetchval("SELECT current_setting($1)", name) != "on"
    ]


async def _notify_problems(listener: Connection, sender: Connection) -> list[str]:
    # Two connections: a pooler in transaction mode can hand one its own notification.
    channel = f"privyseal_check_{secrets.token_hex(8)}"
    heard = asyncio.Event()

    def on_notify(*_: object) -> None:
        heard.set()

    await listener.add_listener(channel, on_notify)
    await sender.execute("SELECT pg_notify($1, '')", channel)
    try:
        async with asyncio.timeout(NOTIFY_DEADLINE):
            await heard.wait()
    except TimeoutError:
        return [
            f"A NOTIFY did not come back within {NOTIFY_DEADLINE:.0f} s: a pooler in transaction "
            "mode stands between here and Postgres. Connect directly, or pool by session."
        ]
    return []


# Membership, not inheritance: a role that may SET ROLE has the right too. The owner of a table's
# schema may drop the table. Every partition counts, under the name of the table that it is of.
_SELECT_ROLE_PROBLEMS = """
WITH RECURSIVE audited AS (
    SELECT c.oid, c.relname AS named, c.relowner, n.nspowner
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE c.oid IN (SELECT to_regclass(name) FROM unnest($1::text[]) AS name)
  UNION
    SELECT c.oid, a.named, c.relowner, n.nspowner
    FROM audited a
    JOIN pg_inherits i ON i.inhparent = a.oid
    JOIN pg_class c ON c.oid = i.inhrelid
    JOIN pg_namespace n ON n.oid = c.relnamespace
)
SELECT r.rolname AS role_name, string_agg(DISTINCT a.named, ', ') AS tables
FROM audited a CROSS JOIN pg_roles r CROSS JOIN pg_roles me
WHERE me.rolname = current_user
  AND (r.oid = me.oid OR NOT me.rolsuper AND pg_has_role(me.oid, r.oid, 'MEMBER'))
  AND (a.relowner = r.oid OR a.nspowner = r.oid
       OR has_table_privilege(r.oid, a.oid, 'UPDATE, DELETE, TRUNCATE')
       OR has_any_column_privilege(r.oid, a.oid, 'UPDATE'))
GROUP BY r.rolname
ORDER BY r.rolname
"""


async def _role_problems(connection: Connection) -> list[str]:
    me = await connection.fetchval("SELECT current_user")
    rows = await connection.fetch(_SELECT_ROLE_PROBLEMS, list(AUDIT_TABLES))
    return [
        f"Role {me} "
        + (f"is a member of {row['role_name']}, which " if row["role_name"] != me else "")
        + f"owns or may UPDATE, DELETE or TRUNCATE {row['tables']}, or a partition of it: the "
        "audit log would not be safe from it. Serve as privyseal_service."
        for row in rows
    ]


def _server_settings(application_name: str, deadlines: Deadlines) -> dict[str, str]:
    def milliseconds(seconds: float) -> str:
        return str(round(seconds * 1000))

    return {
        "application_name": application_name,
        "statement_timeout": milliseconds(deadlines.statement),
        "lock_timeout": milliseconds(deadlines.lock),
        "idle_in_transaction_session_timeout": milliseconds(deadlines.idle_in_transaction),
        "timezone": "UTC",
    }
