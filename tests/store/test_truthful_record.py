"""Whatever the caller of a function writes into the record of an act, what is on record is what was
done: the service's password alone changes nothing unseen."""

import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import timedelta
from typing import Any, Final, TypeAlias

import asyncpg
import pytest
from msgspec import Struct
from msgspec.structs import replace

from keys.signer import KeptKey
from service.authority.audit import Action, AuditRecord, Outcome, new_record_id
from service.authority.audit.events import OWN_ACTIONS
from service.authority.client_auth import new_secret, secret_sha256
from service.authority.model import Credential, ServiceUser, Status, Subject
from service.store.embedded import SERVICE
from service.store.service_users import as_json, credential_as_json
from service.store.signing_keys import key_as_json
from tests.store.conftest import SKEW

pytestmark = pytest.mark.anyio

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"
MakeUser = Callable[..., ServiceUser]
MakeCredential = Callable[..., Credential]

WITHOUT_ACT: Final = {
    "append_leaves_1": "records get their places: they are on record",
    "commit_records_1": "records of what is no act",
    "report_events_1": "records of what others did",
    "extend_audit_partitions_1": "empty tables",
    "open_audit_era_1": "where the log lives",
}
"""What the service may call that changes something and is no act, and what that is."""

WRITERS: Final = """
SELECT proname FROM pg_proc
 WHERE pronamespace = 'public'::regnamespace AND provolatile = 'v'
   AND has_function_privilege($1, oid, 'EXECUTE')
"""

STATE: Final = """
SELECT (SELECT array_agg(su ORDER BY id)::text FROM service_users su),
       (SELECT array_agg(c ORDER BY id)::text FROM credentials c),
       (SELECT array_agg(k ORDER BY kid)::text FROM signing_keys k),
       (SELECT array_agg(l ORDER BY log)::text FROM audit_logs l)
"""

RECORDS: Final = """
SELECT id, action, outcome, service_user_id, service_user, source_system, version, credential_id,
       kid, iat, exp, jti, signing_input_sha256
  FROM audit_records ORDER BY commit_order, id
"""

KEY: Final = timedelta(days=1)


class Act(Struct, frozen=True, kw_only=True):
    """A call whose argument `RECORD` is the record; what has to be
    on record then, and what has to be arranged before."""

    function: str
    arguments: Sequence[Any]
    on_record: dict[str, Any]
    arranged: str | None = None


RECORD: Final = object()


@pytest.fixture
def lie(holder: Subject, new_keys: list[KeptKey]) -> Callable[[int | None], AuditRecord]:
    """Make a record that tells of something else, and of somebody else."""
    other = holder.service_user
    assert other is not None

    def made(version: int | None) -> AuditRecord:
        now = int(time.time())
        return AuditRecord(
            id=new_record_id(now),
            action=Action.AUDIT_QUERY,
            outcome=Outcome.SUCCESS,
            service_user_id=other.id,
            service_user=other.name,
            source_system="elsewhere",
            version=version,
            credential_id=holder.credentials[0].id,
            kid=new_keys[-1].kid,
            exp=now + 900,
            jti=new_record_id(now),
            signing_input_sha256=bytes(32),
        )

    return made


def acts(
    new_user: MakeUser, new_credential: MakeCredential, new_keys: list[KeptKey]
) -> Sequence[Act]:
    """Everything that the service can do, in an order in which it can be done."""
    user = new_user("doc-service", source_system="documents", version=1)
    about = {"service_user_id": user.id, "service_user": user.name, "source_system": "documents"}
    made, offered, successor, first = (new_credential(user.id) for _ in range(4))
    operator = new_user("operator", source_system="operators")
    code = secret_sha256(new_secret())
    changed = replace(user, scopes=("service-users:write",), owner="Somebody")
    # Nobody looks at their halves here.
    keys = [replace(new_keys[0], kid=letter * 43) for letter in "abcde"]
    k = [key.kid for key in keys]

    def of_user(function: str, what: object, action: str, version: int, **more: Any) -> Act:
        on_record = {"action": action, "version": version, **about, **more}
        return Act(function=function, arguments=[what, RECORD, SKEW], on_record=on_record)

    def of_key(function: str, action: str, kid: str | None, *arguments: object) -> Act:
        return Act(
            function=function,
            arguments=[*arguments, RECORD, SKEW],
            on_record={"action": action, "kid": kid},
        )

    def prepare(place: int) -> Act:
        key = key_as_json(keys[place])
        return of_key("prepare_key_1", "signing_key.prepare", k[place], key)

    def activate(place: int, active: str | None) -> Act:
        at_once = (k[place], active, timedelta(), 3600, KEY)
        return of_key("activate_key_1", "signing_key.activate", k[place], *at_once)

    return [
        of_user("create_service_user_1", as_json(user), "service_user.create", 0),
        of_user("change_service_user_1", as_json(changed), "service_user.change", 1),
        of_user(
            "change_service_user_1",
            as_json(replace(changed, status=Status.DISABLED)),
            "service_user.disable",
            2,
        ),
        of_user("change_service_user_1", as_json(changed), "service_user.enable", 3),
        of_user(
            "create_credential_1",
            credential_as_json(made),
            "credential.create",
            4,
            credential_id=made.id,
        ),
        of_user(
            "hand_over_credential_1",
            credential_as_json(
                replace(offered, code_ends_at=offered.created_at + timedelta(days=1)), code
            ),
            "credential.hand_over",
            5,
            credential_id=offered.id,
        ),
        Act(
            function="open_hand_over_1",
            arguments=[code, secret_sha256(new_secret()), RECORD, SKEW],
            on_record={
                "action": "credential.open",
                "version": 6,
                "credential_id": offered.id,
                **about,
            },
        ),
        Act(
            function="rotate_credential_1",
            arguments=[made.id, credential_as_json(successor), KEY, RECORD, SKEW],
            on_record={
                "action": "credential.rotate",
                "version": 7,
                "credential_id": successor.id,
                **about,
            },
        ),
        of_user("revoke_credential_1", made.id, "credential.revoke", 8, credential_id=made.id),
        Act(
            function="bootstrap_1",
            arguments=[as_json(operator), credential_as_json(first), RECORD, True, SKEW],
            on_record={
                "action": "operator.bootstrap",
                "version": 0,
                "service_user_id": operator.id,
                "service_user": "operator",
                "source_system": "operators",
                "credential_id": first.id,
            },
        ),
        prepare(0),
        activate(0, None),
        prepare(1),
        of_key("hasten_rotation_1", "signing_key.rotate", k[0], k[0]),
        activate(1, k[0]),
        replace(
            of_key("retire_key_1", "signing_key.retire", k[0], k[0]),
            arranged="UPDATE signing_keys SET publish_until = now() WHERE state = 'retiring'",
        ),
        of_key("key_destroyed_1", "signing_key.destroy", k[0], k[0]),
        of_key(
            "reseal_key_3",
            "signing_key.rewrap",
            k[1],
            *(k[1], keys[1].sealed_private, b"anew", keys[1].attestation, b"anew"),
        ),
        prepare(2),
        of_key("revoke_key_1", "signing_key.revoke", k[1], k[1], "active", 3600, KEY),
        of_key(
            "revoke_all_keys_1",
            "signing_key.revoke_all",
            k[3],
            [k[2]],
            key_as_json(keys[3]),
            key_as_json(keys[4]),
            3600,
            KEY,
        ),
        Act(
            function="reseal_audit_log_1",
            arguments=[1, b"before", b"after", RECORD],
            on_record={"action": "audit_log.rewrap"},
            arranged="INSERT INTO audit_logs (log, origin, public_key, sealed_private,"
            " begins_after, opened_at)"
            " VALUES (1, 'tokens.example/audit/1', repeat('k', 32)::bytea, 'before', 0, now())",
        ),
    ]


async def test_whatever_the_caller_writes_what_is_on_record_is_what_was_done(
    connect_as: Callable[[str], Awaitable[Connection]],
    superuser: Connection,
    lie: Callable[[int | None], AuditRecord],
    new_user: MakeUser,
    new_credential: MakeCredential,
    new_keys: list[KeptKey],
) -> None:
    service = await connect_as("service")
    done = [*acts(new_user, new_credential, new_keys)]
    for act in done:
        if act.arranged:
            await superuser.execute(act.arranged)
        # Decided on a version that never was, and then on none: an act without a record is none.
        if not await did(act, lie(99), service, superuser):
            assert await did(act, lie(None), service, superuser), act
    assert await did_confirm(lie, service, superuser)
    covered = {act.function for act in done} | {"confirm_credentials_1"} | WITHOUT_ACT.keys()
    assert {row["proname"] for row in await superuser.fetch(WRITERS, SERVICE)} == covered


async def did(act: Act, record: AuditRecord, service: Connection, superuser: Connection) -> bool:
    """Return whether it was done; if so, and only then, exactly that is on record."""
    state, before = await superuser.fetchrow(STATE), await superuser.fetch(RECORDS)
    arguments = [as_json(record) if each is RECORD else each for each in act.arguments]
    places = ", ".join(f"${place}" for place, _ in enumerate(arguments, start=1))
    try:
        done = await service.fetchval(f"SELECT {act.function}({places})", *arguments)
    except asyncpg.PostgresError as error:
        if error.sqlstate != "PV403":
            raise
        done = False
    new = (await superuser.fetch(RECORDS))[len(before) :]
    if not done:
        assert (new, await superuser.fetchrow(STATE)) == ([], state), act
        return False
    (on_record,) = new
    nothing = dict.fromkeys(on_record.keys())
    expected = {**nothing, "id": record.id, "outcome": "success", **act.on_record}
    assert dict(on_record) == expected
    return True


async def did_confirm(
    lie: Callable[[int | None], AuditRecord], service: Connection, superuser: Connection
) -> bool:
    """The one that takes several records, of credentials that they name."""
    held = await superuser.fetchrow(
        "UPDATE credentials c SET held_at = now() FROM service_users su"
        " WHERE su.id = c.service_user_id AND su.name = 'operator'"
        " RETURNING c.id, su.id AS service_user_id, su.version"
    )
    assert held is not None
    not_held, told = lie(None), replace(lie(None), credential_id=held["id"])
    late = replace(told, id=new_record_id(time.time()), version=99)
    before = await superuser.fetch(RECORDS)
    records = as_json([not_held, late, told])
    verdict = await service.fetchval("SELECT confirm_credentials_1($1, $2)", records, SKEW)
    assert verdict == [False, False, True]
    (on_record,) = (await superuser.fetch(RECORDS))[len(before) :]
    assert (on_record["action"], on_record["credential_id"]) == ("credential.confirm", held["id"])
    assert on_record["service_user_id"] == held["service_user_id"]
    assert (on_record["version"], on_record["exp"]) == (held["version"], None)
    return await superuser.fetchval("SELECT bool_and(held_at IS NULL) FROM credentials")


async def test_to_enable_and_to_change_are_two_acts(
    connect_as: Callable[[str], Awaitable[Connection]],
    holder: Subject,
    act: Callable[..., AuditRecord],
) -> None:
    service, user = await connect_as("service"), holder.service_user
    assert user is not None
    both = as_json(replace(user, status=Status.DISABLED, scopes=()))
    record = as_json(act(Action.SERVICE_USER_DISABLE))
    with pytest.raises(asyncpg.PostgresError, match="two acts"):
        await service.fetchval("SELECT change_service_user_1($1, $2, $3)", both, record, SKEW)


ISSUED_ENDED_READ_OR_NOTICED: Final = {
    Action.TOKEN_ISSUE,
    Action.TOKEN_MINT,
    Action.TOKEN_END_SESSION,
    Action.AUDIT_QUERY,
    Action.AUDIT_EXPORT,
    Action.TOKEN_FORGED,
    Action.TOKEN_UNKNOWN,
    Action.TOKEN_UNVERIFIABLE,
}
REPORTED: Final = {
    Action.JWKS_LOADED,
    Action.TOKEN_FORGED,
    Action.TOKEN_UNKNOWN,
    Action.TOKEN_UNVERIFIABLE,
}
OF_THE_OWNER: Final = {
    Action.AUDIT_ARCHIVE,
    Action.AUDIT_ERASE,
    Action.AUDIT_RESTORE_ACCEPTED,
    Action.AUDIT_LOG_REWRAP,
    Action.OPERATOR_BOOTSTRAP,
}


async def test_what_takes_an_act_or_the_owner_gets_on_record_in_no_other_way(
    connect_as: Callable[[str], Awaitable[Connection]],
    superuser: Connection,
    act: Callable[..., AuditRecord],
) -> None:
    service = await connect_as("service")

    async def is_taken(function: str, *records: AuditRecord) -> bool:
        before = await superuser.fetchval("SELECT count(*) FROM audit_records")
        try:
            await service.fetch(f"SELECT {function}($1, $2)::text", as_json(records), SKEW)
        except asyncpg.PostgresError as error:
            if error.sqlstate != "23514":
                raise
        count = await superuser.fetchval("SELECT count(*) FROM audit_records")
        assert count - before in (0, len(records))
        return count > before

    taken = act(Action.TOKEN_FORGED)
    for action in Action:
        alone, refused = act(action), replace(act(action), outcome=Outcome.REFUSED)
        assert await is_taken("commit_records_1", alone) == (
            action in ISSUED_ENDED_READ_OR_NOTICED
        ), action
        assert await is_taken("commit_records_1", refused) == (action not in OF_THE_OWNER), action
        assert await is_taken("report_events_1", act(action)) == (action in REPORTED), action
        # Nor among others.
        if action in OF_THE_OWNER:
            for function in ("commit_records_1", "report_events_1"):
                assert not await is_taken(function, taken, act(action))
    for word in OWN_ACTIONS:
        record = replace(taken, id=new_record_id(time.time()), action=f"{word}.anything")
        assert not await is_taken("report_events_1", record), word
    foreign = replace(taken, id=new_record_id(time.time()), action="document.upload")
    assert await is_taken("report_events_1", foreign)
    assert not await is_taken("commit_records_1", replace(foreign, id=new_record_id(time.time())))
