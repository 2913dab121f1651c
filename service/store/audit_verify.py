"""What the offline check reads from a database, with any role that may SELECT.

Judges nothing and changes nothing: `authority.audit.verify` says what is wrong.
"""

import asyncio
import multiprocessing
import signal
from base64 import b64decode
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection as Pipe
from typing import Any, Final
from uuid import UUID

import asyncpg
import msgspec
import uvloop
from msgspec import Struct

from keys.secret import Secret
from service.authority.audit.merkle import STORED_EVERY, Node
from service.authority.audit.record import Action
from service.authority.audit.verify import (
    Claim,
    Examination,
    Part,
    Placed,
    collector_at_rest,
    may_be_archived,
    month_bounds,
)
from service.authority.errors import StoreUnavailable
from service.store.audit_tree import LEAF_COLUMNS
from service.store.database import Connection, Deadlines, connect, loss_as_unavailable

PART: Final = 16_384
"""Leaves of a part: what one process examines before it reports."""
PAGE: Final = 1_024
"""Leaves of one query: what is in memory at a time."""
CLOSING: Final = 5.0
"""Seconds that a farewell may take."""
SMALL: Final = 4 * PART
"""Leaves up to which it does not pay to start more processes."""

VERIFYING: Final = Deadlines(statement=600.0, lock=10.0, command=660.0, connect=10.0)

# 7709, 4: archives and checks keep out of each other's way. What is archived is missing first.
LOCK_SHARED: Final = "SELECT pg_try_advisory_lock_shared(7709, 4)"

SELECT_PAGE: Final = """
SELECT leaf_index, id::text AS id, leaf_hash FROM audit_leaves
 WHERE log = $1 AND leaf_index >= $2 AND leaf_index < $3 ORDER BY leaf_index
"""

# Ids as text, by Postgres: a codec of Python's would be called once an id.
_COLUMNS: Final = (
    LEAF_COLUMNS.replace("r.id,", "r.id::text AS id,")
    .replace("r.jti,", "r.jti::text AS jti,")
    .replace("r.version", "1 AS v, r.version")
)
_RECORDS: Final = f"SELECT {_COLUMNS} FROM audit_records r"  # noqa: S608
_PERSONAL: Final = """
SELECT p.id::text AS id, p.salt, p.client_address, p.user_agent, p.resource, p.department
  FROM audit_personal p
"""

# The ids of neighbours in the log are neighbours, mostly, and such a run is read in one go. Where
# events were reported late there would be more between them: then each is looked up.
SELECT_RECORDS_BETWEEN: Final = f"{_RECORDS} WHERE r.id BETWEEN $1 AND $2 ORDER BY r.id LIMIT $3"
SELECT_RECORDS_AMONG: Final = f"{_RECORDS} WHERE r.id = ANY ($1)"
SELECT_PERSONAL_BETWEEN: Final = f"{_PERSONAL} WHERE p.id BETWEEN $1 AND $2 ORDER BY p.id LIMIT $3"
SELECT_PERSONAL_AMONG: Final = f"{_PERSONAL} WHERE p.id = ANY ($1)"

# Planned for the very ids, so that other months are not even opened; and never as a scan.
SET_PLANNING: Final = """
SET plan_cache_mode = force_custom_plan; SET jit = off; SET enable_seqscan = off;
SET max_parallel_workers_per_gather = 0
"""
SET_READ_ONLY: Final = "SET default_transaction_read_only = on"

SELECT_NODES: Final = """
SELECT n.level, n.node_index, n.node_hash
  FROM unnest($2::smallint[], $3::bigint[], $4::bigint[]) AS span (level, start, stop)
  JOIN audit_nodes n ON n.log = $1 AND n.level = span.level
   AND n.node_index >= span.start AND n.node_index < span.stop
"""

SELECT_CLAIMS: Final = """
SELECT size, note FROM audit_checkpoints WHERE log = $1 AND size > $2 AND size <= $3 ORDER BY size
"""

SELECT_LOGS: Final = """
SELECT l.log, l.origin, l.public_key, newest.size AS newest_size, newest.note,
       newest.commit_order, newest.last_id,
       (SELECT max(leaf_index) + 1 FROM audit_leaves WHERE log = l.log) AS size
  FROM audit_logs l
  LEFT JOIN LATERAL (SELECT size, note, commit_order, last_id FROM audit_checkpoints
                      WHERE log = l.log ORDER BY size DESC LIMIT 1) AS newest ON true
 ORDER BY l.log
"""

# The newest record names every month that was archived until then: it is there when older ones are
# archived themselves.
SELECT_ARCHIVED: Final = """
SELECT details -> 'archived' FROM audit_records WHERE action = $1
 ORDER BY commit_order DESC, id DESC LIMIT 1
"""

# Which months any of them names, since when, and how many records the newest says they had.
SELECT_NAMED: Final = """
SELECT named.month, min(r.recorded_at) AS named_at,
       (array_agg(named.archive -> 'records' ORDER BY r.commit_order DESC, r.id DESC))[1] AS records
  FROM audit_records r
 CROSS JOIN LATERAL jsonb_each(
     CASE jsonb_typeof(r.details -> 'archived') WHEN 'object' THEN r.details -> 'archived'
          ELSE '{}' END) AS named (month, archive)
 WHERE r.action = $1 GROUP BY named.month ORDER BY named.month
"""

HAS_RECORDS: Final = """
SELECT EXISTS (SELECT FROM audit_records
                WHERE id >= uuidv7_floor_1($1) AND id < uuidv7_floor_1($1 + interval '1 month'))
"""

SELECT_ERASED: Final = """
SELECT coalesce(sum((details ->> 'erased')::bigint), 0)::bigint
  FROM audit_records WHERE action = $1
"""

COUNT_RECORDS: Final = """
SELECT count(*) FROM audit_records WHERE (commit_order, id) <= ($1::bigint, $2::uuid)
"""

COUNT_WAITING: Final = """
SELECT count(*) FROM audit_records WHERE (commit_order, id) > ($1::bigint, $2::uuid)
"""

SELECT_INSERTED: Final = """
SELECT r.id FROM audit_records r
 WHERE (r.commit_order, r.id) <= ($1::bigint, $2::uuid)
   AND NOT EXISTS (SELECT FROM audit_leaves l WHERE l.id = r.id)
 ORDER BY r.commit_order, r.id LIMIT 20
"""


class StoredLog(Struct, frozen=True, kw_only=True):
    """A log as it is stored: how many leaves it has, and its newest head."""

    number: int
    origin: str
    public_key: bytes
    size: int
    newest_size: int | None
    newest_note: bytes | None
    reached: tuple[int, str]
    """How far the newest head reaches in the order of commits."""


class Survey(Struct, frozen=True, kw_only=True):
    """What there is to check, all seen at one moment."""

    logs: Sequence[StoredLog]
    archived: Mapping[str, int]
    """By the log's own word, where that can be true: month -> records."""
    not_archived: Sequence[str]
    """Months of which the log says so, and it cannot be true."""
    erased: int
    """Personal values, by the log's own word."""


class Job(Struct, frozen=True, kw_only=True):
    """One log to be examined, in parts."""

    log: int
    size: int
    archived: Mapping[str, int]
    cuts: Sequence[int]
    """Sizes at which it is compared with checkpoints from outside."""


async def open_reader(dsn: Secret) -> "asyncpg.Connection[asyncpg.Record]":
    """Open a connection that only reads; raise StoreUnavailable, also during an archive.

    Until it is closed nothing can be archived: `close` it, which `terminate` does some time later.
    """
    connection = await connect(dsn, application_name="privyseal audit", deadlines=VERIFYING)
    try:
        with loss_as_unavailable():
            if not await connection.fetchval(LOCK_SHARED):
                raise StoreUnavailable("records are being archived just now")
            await connection.execute(SET_READ_ONLY)
            await prepare(connection)
    except BaseException:
        connection.terminate()
        raise
    return connection


async def prepare(connection: "asyncpg.Connection[asyncpg.Record]") -> None:
    """Make a connection read pages fast: ids as text, `details` as the object that it is."""
    await connection.execute(SET_PLANNING)
    await connection.set_type_codec(
        "uuid", schema="pg_catalog", encoder=str, decoder=str, format="text"
    )
    await connection.set_type_codec(
        "jsonb", schema="pg_catalog", encoder=str, decoder=msgspec.json.decode
    )


async def survey(connection: Connection) -> Survey:
    """Look at what there is; raise StoreUnavailable."""
    with loss_as_unavailable():
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            rows = await connection.fetch(SELECT_LOGS)
            archived, not_archived = await _archived(connection)
            erased = await connection.fetchval(SELECT_ERASED, Action.AUDIT_ERASE)
    return Survey(
        logs=[
            StoredLog(
                number=row["log"],
                origin=row["origin"],
                public_key=row["public_key"],
                size=row["size"] or 0,
                newest_size=row["newest_size"],
                newest_note=row["note"],
                reached=(row["commit_order"] or 0, row["last_id"] or str(UUID(int=0))),
            )
            for row in rows
        ],
        archived=archived,
        not_archived=not_archived,
        erased=erased,
    )


async def _archived(connection: Connection) -> tuple[Mapping[str, int], Sequence[str]]:
    """Return the months that are archived, with their records, and those that are said to be."""
    archived: dict[str, int] = {}
    not_archived: list[str] = []
    for row in await connection.fetch(SELECT_NAMED, Action.AUDIT_ARCHIVE):
        month, records = row["month"], row["records"]
        named_at, remains = row["named_at"], await _remains(connection, month)
        if type(records) is int and may_be_archived(month, named_at=named_at, remains=remains):
            archived[month] = records
        else:
            not_archived.append(month)
    return archived, not_archived


async def _remains(connection: Connection, month: str) -> bool:
    try:
        start, _ = month_bounds(month)
    except ValueError:
        return False
    return await connection.fetchval(HAS_RECORDS, start)


async def page(connection: Connection, log: int, start: int, stop: int) -> Sequence[Placed]:
    """Return leaves with what there is of their records."""
    leaves = await connection.fetch(SELECT_PAGE, log, start, stop)
    ids = [leaf["id"] for leaf in leaves]
    records = await _by_id(connection, SELECT_RECORDS_BETWEEN, SELECT_RECORDS_AMONG, ids)
    personal = await _by_id(connection, SELECT_PERSONAL_BETWEEN, SELECT_PERSONAL_AMONG, ids)
    return list(zip(leaves, map(records.get, ids), map(personal.get, ids), strict=True))


async def _by_id(
    connection: Connection, between: str, among: str, ids: Sequence[str]
) -> Mapping[str, Any]:
    if not ids:
        return {}
    limit = 2 * len(ids)
    rows = await connection.fetch(between, min(ids), max(ids), limit)
    if len(rows) >= limit:
        rows = await connection.fetch(among, ids)
    return {row["id"]: row for row in rows}


async def inserted(
    connection: Connection, reached: tuple[int, str], records: int
) -> Sequence[UUID]:
    """Return records that stand among the `records` of the log and are in none of its leaves."""
    with loss_as_unavailable():
        if await connection.fetchval(COUNT_RECORDS, *reached) == records:
            return ()
        return [UUID(row["id"]) for row in await connection.fetch(SELECT_INSERTED, *reached)]


async def waiting(connection: Connection, reached: tuple[int, str]) -> int:
    """Count the records that have no place in the log yet."""
    with loss_as_unavailable():
        return await connection.fetchval(COUNT_WAITING, *reached)


def parts(dsn: Secret, job: Job, *, processes: int) -> Iterator[Part]:
    """Yield the parts of a log in order, examined by so many processes; raise StoreUnavailable.

    A process that is ahead waits until its part is taken, so that memory stays flat.
    """
    count = -(-job.size // PART)
    if processes == 1 or job.size <= SMALL:
        with collector_at_rest(), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            connection = runner.run(_open_for(dsn, job))
            try:
                for number in range(count):
                    yield runner.run(_part(connection, job, number))
            finally:
                runner.run(connection.close(timeout=CLOSING))
        return
    # Not forked from here: a lock that another thread holds just now would stay locked there.
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([__name__])
    with ExitStack() as running:
        running.enter_context(collector_at_rest())
        pipes: list[Pipe] = []
        for first in range(processes):
            here, there = server.Pipe(duplex=False)
            numbers = range(first, count, processes)
            arguments = (there, dsn.reveal(), job, numbers)
            process = server.Process(target=_examine, args=arguments, daemon=True)
            process.start()
            running.callback(process.join)
            running.callback(process.terminate)
            there.close()
            pipes.append(here)
        for number in range(count):
            yield _received(pipes[number % processes])


def _received(pipe: Pipe) -> Part:
    try:
        received: Part | str = pipe.recv()
    except EOFError:
        received = "a process of the check has ended"
    if isinstance(received, str):
        raise StoreUnavailable(received)
    return received


def _examine(pipe: Pipe, revealed_dsn: str, job: Job, numbers: Sequence[int]) -> None:
    """Examine these parts and send each, or else in words why not."""
    # Ctrl-C is for the parent, which ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    async def examine() -> None:
        connection = await _open_for(Secret(revealed_dsn), job)
        try:
            for number in numbers:
                pipe.send(await _part(connection, job, number))
        finally:
            await connection.close(timeout=CLOSING)

    try:
        uvloop.run(examine())
    except StoreUnavailable as error:
        pipe.send(str(error))


async def _open_for(dsn: Secret, job: Job) -> "asyncpg.Connection[asyncpg.Record]":
    connection = await open_reader(dsn)
    try:
        with loss_as_unavailable():
            archived, _ = await _archived(connection)
            if archived != job.archived:
                raise StoreUnavailable("records were archived meanwhile")
    except BaseException:
        connection.terminate()
        raise
    return connection


async def _part(connection: Connection, job: Job, number: int) -> Part:
    start, stop = number * PART, min((number + 1) * PART, job.size)
    examination = Examination(start, stop, archived=frozenset(job.archived))
    with loss_as_unavailable():
        for at in range(start, stop, PAGE):
            examination.add(await page(connection, job.log, at, min(at + PAGE, stop)))
        heads = await connection.fetch(SELECT_CLAIMS, job.log, start, stop)
        nodes = await connection.fetch(SELECT_NODES, job.log, *_node_spans(start, stop))
    cuts = {row["size"] for row in heads} | {cut for cut in job.cuts if start < cut <= stop}
    return examination.part(
        nodes=[
            Node(level=row["level"], index=row["node_index"], hash=row["node_hash"])
            for row in nodes
        ],
        claims=[_unverified_claim(row["size"], row["note"]) for row in heads],
        cuts=sorted(cuts),
    )


def _node_spans(start: int, stop: int) -> tuple[list[int], list[int], list[int]]:
    """Return level, first and last index of the stored nodes that these leaves complete."""
    levels = list(range(STORED_EVERY, stop.bit_length(), STORED_EVERY))
    return levels, [start >> level for level in levels], [stop >> level for level in levels]


def _unverified_claim(size: int, note: bytes) -> Claim:
    # Millions of them: only the signature of the newest is checked, and by the caller.
    lines = note.split(b"\n", 3)
    try:
        root = b64decode(lines[2], validate=True)
    except (IndexError, ValueError):
        root = b""
    return Claim(
        size=size, root=root, place=f"the checkpoint of {size:,} in the database", outside=False
    )
