"""`make bench`: what many service users and a large audit log cost whoever opens a page.

Two authorities side by side, a small and a large one, whose pages are opened in turns. Measured is
the time until the whole page is there, over loopback and one connection.
"""

import asyncio
import statistics
import sys
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack, ExitStack
from typing import Final

import asyncpg
import click
import httpx
from rich.console import Console
from rich.table import Table

from service.store.embedded import find_running
from tests.bench.audit_bench import load_records, verdict
from tests.bench.bench import new_credential
from tests.browser.pages import INTEGRATOR, OPERATOR, PUBLIC
from tests.faults.live_authority import LiveAuthority, live_authority
from tests.http.console_client import ConsoleClient

FEW: Final = (100, 1_000)
"""Service users, records."""
MANY: Final = (100_000, 1_000_000)
BAR: Final = 2.0

# The first hundred are those of the records.
SERVICE_USERS: Final = """
WITH made AS (
    SELECT n, 'su_' || translate(lpad(n::text, 24, '0'), '0123456789', 'abcdefghij') AS id
      FROM generate_series(0, $1::integer - 1) AS n
), users AS (
    INSERT INTO service_users (id, name, source_system, owner, contact, description, scopes,
        audiences, token_lifetime, status, version, created_at)
    SELECT id, 'bench-' || n, 'bench' || n % 10, 'owner', 'contact', '', '{ingest:write}',
        '{https://ingest.example}', 900, CASE WHEN n % 50 = 49 THEN 'disabled' ELSE 'active' END,
        1, now() FROM made
)
INSERT INTO credentials (id, service_user_id, label, secret_sha256, created_at, expires_at)
SELECT replace(id, 'su_', 'cr_'), id, 'bench', sha256(id::bytea), now(),
       now() + make_interval(days => 1 + n % 365) FROM made
"""
ONE_OF_THEM: Final = f"su_{'a' * 23}h"
PAGES: Final = {
    **OPERATOR,
    "a word that all have": "/service-users?search=bench",
    "a word that none has": "/service-users?search=nobody",
}


@click.command()
@click.option("--rounds", type=click.IntRange(3), default=40, show_default=True)
@click.option("--quick", is_flag=True, help="A tenth of the load: a look, no proof.")
def main(rounds: int, quick: bool) -> None:
    """Measure, print, and exit with 1 if a bar is missed."""
    console = Console()
    many = (MANY[0] // 10, MANY[1] // 10) if quick else MANY
    with ExitStack() as running:
        pair = [running.enter_context(live_authority(workers=1)) for _ in range(2)]
        for authority, (service_users, records) in zip(pair, (FEW, many), strict=True):
            authority.operator  # noqa: B018  made before there is a load
            asyncio.run(_fill(authority, service_users))
            load_records(console, authority, records)
        small, large = asyncio.run(_times(pair[0], pair[1], rounds))
    ratios = {
        name: statistics.median(b / a for a, b in zip(small[name], large[name], strict=True))
        for name in small
    }
    console.print(_table(small, large, ratios, many))
    worst = max(ratios, key=lambda name: ratios[name])
    met = verdict(console, f"{worst}: {ratios[worst]:.2f} of the time", BAR, ratios[worst] <= BAR)
    sys.exit(not met)


async def _fill(authority: LiveAuthority, service_users: int) -> None:
    running = find_running(authority.data_dir)
    assert running is not None
    connection = await asyncpg.connect(running.owner_dsn, timeout=10)
    try:
        await connection.execute(SERVICE_USERS, service_users, timeout=600)
        for table in ("service_users", "credentials"):
            await connection.execute(f"VACUUM (ANALYZE) {table}", timeout=600)
    finally:
        await connection.close(timeout=5)


async def _times(
    small: LiveAuthority, large: LiveAuthority, rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Milliseconds of every page at both, in turns: an operator's, an integrator's, and those of
    who has not signed in."""
    taken: tuple[dict[str, list[float]], dict[str, list[float]]] = ({}, {})
    operators = [authority.operator for authority in (small, large)]
    integrators = [
        (credential.client_id, credential.client_secret)
        for credential in [await new_credential(authority) for authority in (small, large)]
    ]
    places = [await _places(authority) for authority in (small, large)]
    for pages, credentials in (
        (PAGES, operators),
        (INTEGRATOR, integrators),
        (PUBLIC, (None, None)),
    ):
        async with AsyncExitStack() as clients:
            people: list[ConsoleClient] = []
            for authority, credential in zip((small, large), credentials, strict=True):
                client = httpx.AsyncClient(base_url=authority.url, timeout=30)
                person = ConsoleClient(await clients.enter_async_context(client), authority.issuer)
                if credential is not None:
                    answer = await person.sign_in(credential)
                    assert answer.status_code == 303, answer.text
                people.append(person)
            for name, path in pages.items():
                for turn in range(rounds + 3):
                    for person, times, known in zip(people, taken, places, strict=True):
                        started = time.perf_counter()
                        answer = await person.get(path.format(**known))
                        elapsed = 1000 * (time.perf_counter() - started)
                        assert answer.status_code in (200, 404), answer.text
                        if turn >= 3:  # the first ones fill the caches
                            times.setdefault(name, []).append(elapsed)
    return taken


async def _places(authority: LiveAuthority) -> Mapping[str, str]:
    running = find_running(authority.data_dir)
    assert running is not None
    connection = await asyncpg.connect(running.owner_dsn, timeout=10)
    try:
        record_id = await connection.fetchval(
            "SELECT id FROM audit_records WHERE service_user_id = $1 LIMIT 1", ONE_OF_THEM
        )
    finally:
        await connection.close(timeout=5)
    async with httpx.AsyncClient(base_url=authority.url, timeout=10) as client:
        published = (await client.get("/.well-known/jwks.json")).json()
    return {
        "service_user_id": ONE_OF_THEM,
        "credential_id": ONE_OF_THEM.replace("su_", "cr_"),
        "record_id": str(record_id),
        "kid": published["keys"][0]["kid"],
    }


def _table(
    small: Mapping[str, list[float]],
    large: Mapping[str, list[float]],
    ratios: Mapping[str, float],
    many: tuple[int, int],
) -> Table:
    table = Table(title="Pages of the console; medians")
    table.add_column("page")
    for service_users, records in (FEW, many):
        table.add_column(f"{service_users:,} service users, {records:,} records: ms")
    table.add_column("ratio", justify="right")
    for name, ratio in ratios.items():
        table.add_row(
            name,
            f"{statistics.median(small[name]):.1f}",
            f"{statistics.median(large[name]):.1f}",
            f"{ratio:.2f}",
        )
    return table


if __name__ == "__main__":
    main()
