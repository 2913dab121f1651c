"""Service users and credentials in Postgres, and the directory that keeps them in memory.

Judges nothing: an act that was decided on an old version is refused by the database.
"""

import re
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any, Final, cast

import asyncpg
import msgspec

from service import metrics
from service.authority.audit import AuditRecord
from service.authority.errors import Conflict
from service.authority.hand_over import RefusedOpening
from service.authority.model import (
    SERVICE_USER_ID,
    Credential,
    LiveTokens,
    OwnedCredential,
    ServiceUser,
    ServiceUserFilter,
    Status,
    Subject,
)
from service.store.database import Connection, Database, fetch_durable, sqlstate

SERVICE_USER_COLUMNS = """su.id, su.name, su.source_system, su.owner, su.contact, su.description,
    su.scopes, su.audiences, su.token_lifetime, su.status, su.version, su.created_at"""

_CREDENTIAL_COLUMNS = """c.id AS credential_id, c.label, c.secret_sha256,
    c.created_at AS credential_created_at, c.expires_at, c.revoked_at, c.held_at, c.code_ends_at,
    c.opened_at, c.succeeds"""

NOT_ENDED: Final = """{c}.revoked_at IS NULL AND {c}.expires_at > statement_timestamp()
    AND ({c}.code_ends_at IS NULL OR {c}.opened_at IS NOT NULL
         OR {c}.code_ends_at > statement_timestamp())"""
"""`authority.model.Credential.has_ended`, denied: nobody can open a link that lapsed, either."""

SELECT_SUBJECT = f"""
SELECT {SERVICE_USER_COLUMNS}, {_CREDENTIAL_COLUMNS}
  FROM service_users su LEFT JOIN credentials c ON c.service_user_id = su.id
   -- What ended long ago is a wrong secret like any other: it must not fill the memory.
   AND least(coalesce(c.revoked_at, c.expires_at),
             CASE WHEN c.opened_at IS NULL THEN c.code_ends_at END)
       > statement_timestamp() - interval '90 days'
 WHERE su.id = $1
"""  # noqa: S608

SELECT_PAGE = f"""
SELECT {SERVICE_USER_COLUMNS} FROM service_users su
 WHERE su.name > $1 {{conditions}}
 ORDER BY su.name LIMIT $2
"""  # noqa: S608

SELECT_CREDENTIALS = """
SELECT c.id, c.service_user_id, c.label, c.secret_sha256, c.created_at, c.expires_at, c.revoked_at,
       c.held_at, c.code_ends_at, c.opened_at, c.succeeds,
       coalesce((SELECT r.recorded_at FROM audit_records r
                  WHERE r.credential_id = c.id AND r.action = 'token.issue'
                    AND r.outcome = 'success'
                  ORDER BY r.commit_order DESC, r.id DESC LIMIT 1),
                c.archived_use_at) AS last_used_at
  FROM credentials c WHERE c.service_user_id = $1
 ORDER BY c.created_at DESC, c.id
"""

SELECT_OF_SECRETS = f"""
SELECT {SERVICE_USER_COLUMNS}, {_CREDENTIAL_COLUMNS},
       coalesce((SELECT r.recorded_at FROM audit_records r
                  WHERE r.credential_id = c.id AND r.action = 'token.issue'
                    AND r.outcome = 'success'
                  ORDER BY r.commit_order DESC, r.id DESC LIMIT 1),
                c.archived_use_at) AS last_used_at
  FROM credentials c JOIN service_users su ON su.id = c.service_user_id
 WHERE c.secret_sha256 = ANY ($1)
 ORDER BY su.name, c.created_at, c.id
"""  # noqa: S608

SELECT_HELD_AFTER_RESTORE = f"""
SELECT {SERVICE_USER_COLUMNS}, {_CREDENTIAL_COLUMNS}
  FROM credentials c JOIN service_users su ON su.id = c.service_user_id
 WHERE c.held_at IS NOT NULL AND c.id > $1 AND ($3::text IS NULL OR su.id = $3)
   AND {NOT_ENDED.format(c="c")}
 ORDER BY c.id LIMIT $2
"""  # noqa: S608

SELECT_HANDED_OVER = f"""
SELECT {SERVICE_USER_COLUMNS}, {_CREDENTIAL_COLUMNS}
  FROM credentials c JOIN service_users su ON su.id = c.service_user_id
 WHERE c.code_sha256 = $1
"""  # noqa: S608

# The newest of each credential, with how many there were, among so many as a person looks at; from
# where it was opened when that was not refused, and whether all came from there.
_REFUSED_OPENINGS = """
WITH newest AS (
    SELECT r.id, r.credential_id, r.recorded_at, r.reason, r.repeats, r.version
      FROM audit_records r
     WHERE r.action = 'credential.open' AND r.outcome = 'refused' AND r.credential_id IS NOT NULL
       AND r.recorded_at > statement_timestamp() - make_interval(days => $1) {of}
       -- Whoever revoked it has done what there is to do.
       AND EXISTS (SELECT FROM credentials c WHERE c.id = r.credential_id AND c.revoked_at IS NULL)
     ORDER BY r.recorded_at DESC LIMIT 10 * $2
), latest AS (
    SELECT DISTINCT ON (n.credential_id) n.credential_id, n.recorded_at, n.reason,
           sum(n.repeats) OVER (PARTITION BY n.credential_id)::bigint AS count,
           -- One that counts repeats has no version, and the browser of what they repeat.
           bool_and(n.version IS NOT NULL AND coalesce((p.client_address, p.user_agent)
                    = (opening.client_address, opening.user_agent), false))
               OVER (PARTITION BY n.credential_id) AS is_reload,
           p.client_address AS address, opening.client_address AS opened_from
      FROM newest n
      LEFT JOIN audit_personal p ON p.id = n.id
      LEFT JOIN LATERAL (
        SELECT first.client_address, first.user_agent
          FROM (SELECT o.id FROM audit_records o
                 WHERE o.credential_id = n.credential_id AND o.action = 'credential.open'
                   AND o.outcome = 'success'
                 ORDER BY o.commit_order, o.id LIMIT 1) AS opened
          JOIN audit_personal first ON first.id = opened.id) opening ON true
     ORDER BY n.credential_id, n.recorded_at DESC
)
SELECT su.id AS service_user_id, su.name AS service_user, c.id AS credential_id, c.label,
       r.recorded_at AS at, r.reason, r.count, r.address, c.opened_at, r.opened_from, r.is_reload
  FROM latest r JOIN credentials c ON c.id = r.credential_id
  JOIN service_users su ON su.id = c.service_user_id
 ORDER BY r.recorded_at DESC LIMIT $2
"""
SELECT_REFUSED_OPENINGS = _REFUSED_OPENINGS.format(of="")
SELECT_REFUSED_OPENINGS_OF = _REFUSED_OPENINGS.format(of="AND r.service_user_id = $3")

FEW: Final = 200
SELECT_BY_WORDS = "SELECT id FROM service_users WHERE words @@ words_begin_1($1) LIMIT $2"

SELECT_LIVE_TOKENS = """
SELECT count(*) AS count, to_timestamp(max(exp)) AS last_ends_at
  FROM (SELECT r.exp FROM audit_records r
         WHERE r.service_user_id = $1 AND r.exp > extract(epoch FROM statement_timestamp())::bigint
           AND ($2::text IS NULL OR r.credential_id = $2)
           -- Nobody accepts them once the keys are read again; the revocation counts them itself.
           AND NOT EXISTS (SELECT FROM signing_keys k WHERE k.kid = r.kid AND k.state = 'revoked')
         ORDER BY r.exp DESC LIMIT $3) live
"""

CREATE_SERVICE_USER = "SELECT create_service_user_1($1, $2, $3)"
CHANGE_SERVICE_USER = "SELECT change_service_user_1($1, $2, $3)"
CREATE_CREDENTIAL = "SELECT create_credential_1($1, $2, $3)"
HAND_OVER_CREDENTIAL = "SELECT hand_over_credential_1($1, $2, $3)"
OPEN_HAND_OVER = "SELECT open_hand_over_1($1, $2, $3, $4)"
ROTATE_CREDENTIAL = "SELECT rotate_credential_1($1, $2, $3, $4, $5)"
REVOKE_CREDENTIAL = "SELECT revoke_credential_1($1, $2, $3)"
CONFIRM_CREDENTIALS = "SELECT confirm_credentials_1($1, $2)"
BOOTSTRAP = "SELECT bootstrap_1($1, $2, $3, $4, $5)"

MAX_CACHED: Final = 10_000


class ServiceUsers:
    """Implements `authority.administration.ServiceUserStore`, `authority.leaked.Holders`,
    `authority.confirmation.HeldCredentials`, `authority.hand_over.HandedOver` and
    `authority.own_credentials.CredentialsOfOne`."""

    def __init__(self, database: Database, *, clock_skew: int) -> None:
        self._database = database
        self._clock_skew = clock_skew

    async def fresh(self, client_id: str) -> Subject:
        """Return the service user and its credentials, also those that ended, but for what ended
        90 days ago."""
        async with self._database.connection() as connection:
            return subject(await connection.fetch(SELECT_SUBJECT, client_id))

    async def page(
        self, wanted: ServiceUserFilter, *, after: str, limit: int
    ) -> Sequence[ServiceUser]:
        """Return service users in the order of their names."""
        async with self._database.connection() as connection:
            rows = await fetch_page(connection, SELECT_PAGE, [after, limit], wanted)
        return [service_user(row) for row in rows]

    async def credentials(self, service_user_id: str) -> Sequence[Credential]:
        """Return all credentials, the newest first, with their last use."""
        async with self._database.connection() as connection:
            rows = await connection.fetch(SELECT_CREDENTIALS, service_user_id)
        return [Credential(**row) for row in rows]

    async def of_secrets(self, secrets_sha256: Sequence[bytes]) -> Sequence[OwnedCredential]:
        """Return the credentials with these secrets, in whatever state, and whose they are."""
        async with self._database.connection() as connection:
            rows = await connection.fetch(SELECT_OF_SECRETS, secrets_sha256)
        return [
            OwnedCredential(
                service_user=service_user(row),
                credential=_credential(row, last_used_at=row["last_used_at"]),
            )
            for row in rows
        ]

    async def held_after_restore(
        self, after: str, limit: int, service_user_id: str | None
    ) -> Sequence[OwnedCredential]:
        """Return the credentials that are held and have not ended, in the order of their ids."""
        async with self._database.connection() as connection:
            rows = await connection.fetch(SELECT_HELD_AFTER_RESTORE, after, limit, service_user_id)
        return [
            OwnedCredential(service_user=service_user(row), credential=_credential(row))
            for row in rows
        ]

    async def live_tokens(
        self, service_user_id: str, credential_id: str | None = None
    ) -> LiveTokens:
        """Count the tokens that have not expired and whose key was not revoked, of one credential
        if it is given."""
        async with self._database.connection() as connection:
            row = await connection.fetchrow(
                SELECT_LIVE_TOKENS, service_user_id, credential_id, None
            )
        assert row is not None
        return LiveTokens(**row)

    async def create(self, user: ServiceUser, record: AuditRecord) -> bool:
        """Create a service user; raise Conflict if the name is taken."""
        return await self._act(CREATE_SERVICE_USER, as_json(user), record)

    async def change(self, user: ServiceUser, record: AuditRecord) -> bool:
        """Make the service user what `user` says; raise Conflict if the name is taken."""
        return await self._act(CHANGE_SERVICE_USER, as_json(user), record)

    async def create_credential(self, credential: Credential, record: AuditRecord) -> bool:
        """Add a credential to its service user; raise Conflict if there is one with its id."""
        return await self._act(CREATE_CREDENTIAL, credential_as_json(credential), record)

    async def revoke_credential(self, credential_id: str, record: AuditRecord) -> bool:
        """Revoke a credential; raise Conflict for the last one that can administer."""
        return await self._act(REVOKE_CREDENTIAL, credential_id, record)

    async def hand_over(
        self, credential: Credential, code_sha256: bytes, record: AuditRecord
    ) -> bool:
        """Add a credential that only whoever has the code can open; raise Conflict if there is one
        with its id."""
        return await self._act(
            HAND_OVER_CREDENTIAL, credential_as_json(credential, code_sha256), record
        )

    async def handed_over(self, code_sha256: bytes) -> OwnedCredential | None:
        """Return the credential with this code, in whatever state, and whose it is."""
        async with self._database.connection() as connection:
            row = await connection.fetchrow(SELECT_HANDED_OVER, code_sha256)
        if row is None:
            return None
        return OwnedCredential(service_user=service_user(row), credential=_credential(row))

    async def open_hand_over(
        self, code_sha256: bytes, secret_sha256: bytes, record: AuditRecord
    ) -> bool:
        """Put the secret in, if nobody has yet and the code is good now."""
        async with self._database.connection() as connection:
            arguments = (code_sha256, secret_sha256, as_json(record), self._clock_skew)
            return await fetch_durable(connection, OPEN_HAND_OVER, *arguments) is True

    async def refused_openings(
        self, days: int, limit: int, service_user_id: str | None
    ) -> Sequence[RefusedOpening]:
        """Return the refused openings of credentials that are not revoked, one of each."""
        async with self._database.connection() as connection:
            if service_user_id is None:
                rows = await connection.fetch(SELECT_REFUSED_OPENINGS, days, limit)
            else:
                rows = await connection.fetch(
                    SELECT_REFUSED_OPENINGS_OF, days, limit, service_user_id
                )
        return [RefusedOpening(**row) for row in rows]

    async def rotate_credential(
        self, old_id: str, successor: Credential, overlap: timedelta, record: AuditRecord
    ) -> bool:
        """Add the successor of a credential, which ends after `overlap` at the latest."""
        async with self._database.connection() as connection:
            arguments = (
                old_id,
                credential_as_json(successor),
                overlap,
                as_json(record),
                self._clock_skew,
            )
            return await fetch_durable(connection, ROTATE_CREDENTIAL, *arguments) is True

    async def confirm(self, records: Sequence[AuditRecord]) -> Sequence[bool]:
        """Confirm the credentials of these records; say of each whether it was."""
        async with self._database.connection() as connection:
            verdict = await fetch_durable(
                connection, CONFIRM_CREDENTIALS, as_json(records), self._clock_skew
            )
        return cast("list[bool]", verdict)

    async def bootstrap(
        self,
        user: ServiceUser,
        credential: Credential,
        record: AuditRecord,
        *,
        force: bool,
    ) -> bool:
        """Create the first operator; return False if one lives and `force` is not set."""
        try:
            async with self._database.connection() as connection:
                return await connection.fetchval(
                    BOOTSTRAP,
                    as_json(user),
                    credential_as_json(credential),
                    as_json(record),
                    force,
                    self._clock_skew,
                )
        except asyncpg.UniqueViolationError:
            raise Conflict("This name is taken.", "/name") from None

    async def _act(self, call: str, what: str, record: AuditRecord) -> bool:
        """Run one fenced function: one statement, so that its COMMIT is Postgres' business."""
        try:
            async with self._database.connection() as connection:
                arguments = (what, as_json(record), self._clock_skew)
                return await fetch_durable(connection, call, *arguments) is True
        except asyncpg.UniqueViolationError as error:
            if error.constraint_name == "credentials_pkey":
                raise Conflict("This credential was made already.", "/id") from None
            raise Conflict("This name is taken.", "/name") from None
        except asyncpg.PostgresError as error:
            if sqlstate(error) != "PV409":
                raise
            raise Conflict(
                "This would leave nobody who can administer: the last live holder of "
                "service-users:write keeps it. Give it to somebody else first."
            ) from None


class CachedDirectory:
    """Implements `authority.issuer.Directory`: what it holds is for speed, never for truth."""

    def __init__(self, users: ServiceUsers) -> None:
        self._users = users
        self._subjects: dict[str, Subject] = {}

    async def cached(self, client_id: str) -> Subject:
        """Return the subject from memory, or else read it."""
        if (subject := self._subjects.get(client_id)) is None:
            return await self.fresh(client_id)
        return subject

    async def fresh(self, client_id: str) -> Subject:
        """Read the subject and keep it. What cannot be an id is nobody, without a read."""
        if not client_id.startswith("su_") or len(client_id) != 27 or not client_id.isascii():
            return Subject()
        metrics.directory_reads.labels("store").inc()
        subject = await self._users.fresh(client_id)
        if subject.service_user is not None:  # random ids must not drive out those that are
            while len(self._subjects) >= MAX_CACHED:
                del self._subjects[next(iter(self._subjects))]
            self._subjects[client_id] = subject
        return subject

    def forget(self, client_id: str) -> None:
        """Drop one subject: it was changed somewhere."""
        self._subjects.pop(client_id, None)

    def forget_all(self) -> None:
        """Drop everything: while nobody listened, anything may have changed."""
        self._subjects.clear()


def subject(rows: Sequence[asyncpg.Record]) -> Subject:
    """Return the subject of `SELECT_SUBJECT`'s rows."""
    if not rows:
        return Subject()
    user = service_user(rows[0])
    return Subject(
        service_user=user,
        credentials=tuple(_credential(row) for row in rows if row["credential_id"] is not None),
    )


async def fetch_page(
    connection: Connection, query: str, arguments: Sequence[Any], wanted: ServiceUserFilter
) -> list[asyncpg.Record]:
    """Run a query of service users `su`, which has a place for conditions, for those wanted."""
    given = list(arguments)
    conditions = ""
    for condition, value in (
        ("su.name = {}", wanted.name),
        await _sought(connection, wanted.search),
        ("su.source_system = {}", wanted.source_system),
        ("su.status = {}", wanted.status and wanted.status.value),
    ):
        if value not in (None, ""):
            given.append(value)
            conditions += f" AND {condition.format(f'${len(given)}')}"
    # Not from the cache of statements: one plan for all values would read every name for a word, a
    # system or a status that few have.
    statement = await connection.prepare(query.format(conditions=conditions))
    return await statement.fetch(*given)


async def _sought(connection: Connection, search: str) -> tuple[str, str | list[str]]:
    if not search or re.fullmatch(SERVICE_USER_ID, search.strip().lower()):
        return "su.id = {}", search.strip().lower()
    # The one character that Postgres takes in no text; it parts words like any other sign.
    words = search.replace("\0", " ")
    # Few are found by their words, many on the way through the names. No plan knows which they are.
    few = [row["id"] for row in await connection.fetch(SELECT_BY_WORDS, words, FEW + 1)]
    if len(few) <= FEW:
        return "su.id = ANY({})", few
    return "su.words @@ words_begin_1({})", words


def _credential(row: asyncpg.Record, *, last_used_at: datetime | None = None) -> Credential:
    return Credential(
        id=row["credential_id"],
        service_user_id=row["id"],
        label=row["label"],
        secret_sha256=row["secret_sha256"],
        created_at=row["credential_created_at"],
        expires_at=row["expires_at"],
        revoked_at=row["revoked_at"],
        held_at=row["held_at"],
        code_ends_at=row["code_ends_at"],
        opened_at=row["opened_at"],
        succeeds=row["succeeds"],
        last_used_at=last_used_at,
    )


def service_user(row: asyncpg.Record) -> ServiceUser:
    """Return the service user of a row that begins with `SERVICE_USER_COLUMNS`."""
    return ServiceUser(
        id=row["id"],
        name=row["name"],
        source_system=row["source_system"],
        owner=row["owner"],
        contact=row["contact"],
        description=row["description"],
        scopes=tuple(row["scopes"]),
        audiences=tuple(row["audiences"]),
        token_lifetime=row["token_lifetime"],
        status=Status(row["status"]),
        version=row["version"],
        created_at=row["created_at"],
    )


def as_json(value: object) -> str:
    """Return what a `jsonb` parameter takes."""
    return msgspec.json.encode(value).decode()


def credential_as_json(credential: Credential, code_sha256: bytes | None = None) -> str:
    """Return a credential as Postgres reads it: bytea in hex, and no field that is computed."""
    fields: dict[str, Any] = msgspec.structs.asdict(credential)
    del fields["last_used_at"]
    fields["secret_sha256"] = "\\x" + credential.secret_sha256.hex()
    fields["code_sha256"] = None if code_sha256 is None else "\\x" + code_sha256.hex()
    return as_json(fields)
