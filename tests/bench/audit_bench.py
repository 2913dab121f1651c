"""`make bench`: what a large audit log costs those who read it, and those who exchange.

Two authorities side by side, one with few records and one with many, measured in turns, because a
machine is not as fast in every minute. The large log is loaded as its owner, beside the service.
"""

import asyncio
import statistics
import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from typing import Final

import asyncpg
import click
from msgspec import Struct
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from keys.secret import Secret
from service.authority.audit import Outcome, RecordFilter
from service.store.audit_log import AuditRecords
from service.store.database import Database
from service.store.embedded import find_running
from tests.bench.bench import FULL, Pace, exchange_load, new_credential
from tests.faults.live_authority import LiveAuthority, live_authority

FEW: Final = 10_000
MANY: Final = 10_000_000
QUERY_BAR: Final = 2.0
EXCHANGE_BAR: Final = 0.95
CONNECTIONS: Final = 64
BATCH: Final = 100_000

SERVICE_USERS: Final = 100
ONE_OF_THEM: Final = f"su_{'a' * 23}h"
# Committed before anything else: the sequencer, which is past that, has nothing to do with them.
LOAD: Final = """
WITH made AS (
    SELECT n, 'su_' || translate(lpad((n % 100)::text, 24, '0'), '0123456789', 'abcdefghij') AS su,
           at, n % 3 = 0 AS issued,
           (lpad(to_hex(floor(extract(epoch FROM at) * 1000)::bigint), 12, '0') || '7000a'
            || lpad(to_hex(n), 15, '0'))::uuid AS id
      FROM (SELECT n, $3::timestamptz + n * ($4::timestamptz - $3) / $5 AS at
              FROM generate_series($1::bigint, $2::bigint) AS n) AS numbers
), leaves AS (
    INSERT INTO audit_leaves (log, leaf_index, id, leaf_hash)
    SELECT 0, n, id, sha256(n::text::bytea) FROM made
), personal AS (
    INSERT INTO audit_personal (
        id, salt, client_address, user_agent, resource, department, commit_order)
    SELECT id, decode(md5(n::text), 'hex'), '192.0.2.' || n % 250, 'bench/1',
           CASE WHEN issued THEN '' ELSE 'document/' || n END,
           CASE WHEN issued THEN '' ELSE 'department ' || n % 20 END, n / 8
      FROM made
)
INSERT INTO audit_records (
    id, commit_order, recorded_at, occurred_at, action, outcome, reason, service_user_id,
    service_user, source_system, version, credential_id, actor_id, actor, actor_credential_id,
    jti, kid, iat, exp, aud, scope, signing_input_sha256, request_id, repeats, details,
    personal_sha256)
SELECT id, n / 8, at, CASE WHEN issued THEN NULL ELSE at END,
       CASE WHEN issued THEN 'token.issue' ELSE 'document.ingest' END,
       CASE WHEN n % 100 = 99 THEN 'refused' ELSE 'success' END,
       CASE WHEN n % 100 = 99 THEN 'wrong_secret' END,
       su, 'bench-' || n % 100, 'bench', 2, translate(su, 'u', 'r'),
       CASE WHEN NOT issued THEN 'su_' || repeat('r', 24) END,
       CASE WHEN NOT issued THEN 'reporter' END,
       CASE WHEN NOT issued THEN 'cr_' || repeat('r', 24) END,
       CASE WHEN NOT issued THEN md5((n - n % 3)::text)::uuid END,
       repeat('k', 43),
       CASE WHEN issued THEN extract(epoch FROM at)::bigint END,
       CASE WHEN issued THEN extract(epoch FROM at)::bigint + 900 END,
       'https://ingest.example', 'ingest:write', sha256(n::text::bytea), md5(n::text), 1, '{}',
       sha256(n::text::bytea)
  FROM made
"""

QUERIES: Final = {
    "one service user's last 50": RecordFilter(service_user=ONE_OF_THEM),
    "one reporter's last 50": RecordFilter(actor=f"su_{'r' * 24}"),
    "one credential's last 50": RecordFilter(credential_id=ONE_OF_THEM.replace("u", "r")),
    "the last 50 refusals": RecordFilter(outcome=Outcome.REFUSED),
    "one address, the last 50": RecordFilter(client_address="192.0.2.7"),
    "one address of today": RecordFilter(
        client_address="192.0.2.7", since=datetime.now(UTC) - timedelta(days=1)
    ),
    "documents that begin so": RecordFilter(resource="document/77"),
    "documents": RecordFilter(resource="document/"),
    "an address of nobody": RecordFilter(client_address="198.51.100.1"),
    "an action of nobody": RecordFilter(action="document.search"),
    "the last 50": RecordFilter(),
}
BARRED: Final = next(iter(QUERIES))


class Figures(Struct, frozen=True, kw_only=True):
    """Of the small log and of the large one, in turns."""

    few: Sequence[float]
    many: Sequence[float]

    @property
    def ratio(self) -> float:
        """The large one's part of the small one: the median of all turns."""
        return statistics.median(many / few for few, many in zip(self.few, self.many, strict=True))


@click.command()
@click.option("--records", type=click.IntRange(FEW), default=MANY, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
def main(records: int, rounds: int) -> None:
    """Measure, print, and exit with 1 if a bar is missed."""
    console = Console()
    with ExitStack() as running:
        few, many = (running.enter_context(live_authority(workers=1)) for _ in range(2))
        pair = (few, many)
        credentials = [asyncio.run(new_credential(authority)) for authority in pair]
        for authority, size in ((few, FEW), (many, records)):
            load_records(console, authority, size)
        queries = asyncio.run(_query_times(few, many))
        pace = Pace(rounds=rounds, warm=FULL.warm, load=FULL.load, sign=0)
        rates: tuple[list[float], list[float]] = ([], [])
        for _ in range(rounds):
            for authority, credential, taken in zip(pair, credentials, rates, strict=True):
                taken.append(exchange_load(authority, credential, CONNECTIONS, pace).rate)
    exchanges = Figures(few=rates[0], many=rates[1])
    console.print(_table(queries, records))
    console.print(
        f"Exchanges a second at {CONNECTIONS} connections: {statistics.median(exchanges.few):.0f} "
        f"with {FEW:,} records, {statistics.median(exchanges.many):.0f} with {records:,}."
    )
    query = queries[BARRED].ratio
    met = [
        verdict(console, f"{BARRED}: {query:.2f} of the time", QUERY_BAR, query <= QUERY_BAR),
        verdict(
            console,
            f"exchange throughput: {exchanges.ratio:.2f}",
            EXCHANGE_BAR,
            exchanges.ratio >= EXCHANGE_BAR,
        ),
    ]
    sys.exit(not all(met))


def verdict(console: Console, what: str, bar: float, met: bool) -> bool:
    """Say whether a bar was met, and return it."""
    colour, word = ("green", "met") if met else ("red", "MISSED")
    console.print(f"[bold {colour}]{what}; the bar is {bar}: {word}.")
    return met


def load_records(console: Console, authority: LiveAuthority, size: int) -> None:
    """Fill the log of an authority as its owner, with records of the last four weeks."""
    running = find_running(authority.data_dir)
    assert running is not None
    started = time.monotonic()
    with _progress(console, f"{size:,} records", size) as advance:
        asyncio.run(_fill(Secret(running.owner_dsn), size, advance))
    seconds = time.monotonic() - started
    console.print(f"{size:,} records loaded in {seconds:.0f} s.")


async def _fill(dsn: Secret, size: int, advance: Callable[[int], None]) -> None:
    connection = await asyncpg.connect(dsn.reveal(), timeout=10)
    try:
        end = datetime.now(UTC) - timedelta(hours=1)
        begin = end - timedelta(days=28)
        indexes = await connection.fetch(
            "SELECT indexname, indexdef FROM pg_indexes WHERE indexname !~ 'pkey'"
            " AND tablename IN ('audit_records', 'audit_personal')"
        )
        # Built at once over what is there: the same indexes, in a fraction of the time.
        for index in indexes:
            await connection.execute(f"DROP INDEX {index['indexname']}")
        for first in range(1, size + 1, BATCH):
            last = min(first + BATCH - 1, size)
            await connection.execute(LOAD, first, last, begin, end, size, timeout=600)
            advance(last - first + 1)
        for index in indexes:
            await connection.execute(index["indexdef"].replace("ON ONLY", "ON"), timeout=600)
        for table in ("audit_records", "audit_personal", "audit_leaves"):
            await connection.execute(f"VACUUM (ANALYZE) {table}", timeout=600)
    finally:
        await connection.close(timeout=5)


async def _query_times(few: LiveAuthority, many: LiveAuthority) -> dict[str, Figures]:
    """Milliseconds of each query."""
    async with (
        Database(few.service_dsn, application_name="bench") as small,
        Database(many.service_dsn, application_name="bench") as large,
    ):
        return {
            name: Figures(
                few=[1000 * each for each in times[0]], many=[1000 * each for each in times[1]]
            )
            for name, wanted in QUERIES.items()
            if (times := await _in_turns([AuditRecords(small), AuditRecords(large)], wanted))
        }


async def _in_turns(logs: Sequence[AuditRecords], wanted: RecordFilter) -> list[list[float]]:
    times: list[list[float]] = [[] for _ in logs]
    for turn in range(110):
        for log, taken in zip(logs, times, strict=True):
            started = time.perf_counter()
            await log.read(wanted, cursor=None, newest_first=True, limit=50)
            if turn >= 10:  # the first ones fill the caches
                taken.append(time.perf_counter() - started)
    return times


def _table(queries: dict[str, Figures], records: int) -> Table:
    table = Table(title="Queries in the store, newest first; medians of 100")
    table.add_column("query")
    for heading in (f"{FEW:,}: ms", f"{records:,}: ms", "ratio"):
        table.add_column(heading, justify="right")
    for name, figures in queries.items():
        table.add_row(
            name,
            f"{statistics.median(figures.few):.2f}",
            f"{statistics.median(figures.many):.2f}",
            f"{figures.ratio:.2f}",
        )
    return table


@contextmanager
def _progress(
    console: Console, what: str, total: int
) -> Generator[Callable[[int], None], None, None]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.advance(task, done)


if __name__ == "__main__":
    main()
