"""`make bench`: tokens a second with a durable audit record, beside what the signatures allow.

Everything in one run, interleaved, because a machine is not as fast in every minute; and nothing
is pinned: clients, server and Postgres share the cores that there are.
"""

import asyncio
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Final

import asyncpg
import click
import msgspec
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from msgspec import Struct
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from tests.bench.load import Load
from tests.faults.admin_api import AdminAPI, IssuedCredential
from tests.faults.live_authority import REPOSITORY, LiveAuthority, live_authority

BAR: Final = 0.55
BAR_WORKERS: Final = 1
BAR_CONNECTIONS: Final = 64
WORKERS: Final = (1, 2)
CONNECTIONS: Final = (1, 16, 64)


class Pace(Struct, frozen=True, kw_only=True):
    """How long to measure; seconds."""

    rounds: int
    warm: float
    load: float
    sign: float


FULL: Final = Pace(rounds=3, warm=0.5, load=4.0, sign=1.0)
QUICK: Final = Pace(rounds=1, warm=0.3, load=1.0, sign=0.5)


class Sample(Struct, frozen=True, kw_only=True):
    """One round of one configuration, and the sign rate of the moment before and after."""

    load: Load
    sign_rate: float

    @property
    def ratio(self) -> float:
        return self.load.rate / self.sign_rate


Samples = dict[tuple[int, int], list[Sample]]


@click.command()
@click.option("--quick", is_flag=True, help="A few seconds only: shows that it runs.")
def main(quick: bool) -> None:
    """Measure, print, and exit with 1 if the bar is missed."""
    console = Console()
    pace = QUICK if quick else FULL
    with ExitStack() as running:
        authorities = {
            workers: running.enter_context(live_authority(workers=workers)) for workers in WORKERS
        }
        credentials = {
            workers: asyncio.run(new_credential(authority))
            for workers, authority in authorities.items()
        }
        postgres = asyncio.run(_postgres_version(authorities[1]))
        samples = _measure(console, pace, authorities, credentials)
    console.print(_table(samples))
    console.print(_environment(samples, postgres))
    ratio = statistics.median(sample.ratio for sample in samples[BAR_WORKERS, BAR_CONNECTIONS])
    met = ratio >= BAR
    console.print(
        f"[bold {'green' if met else 'red'}]{ratio:.2f} of the sign rate with {BAR_WORKERS} worker "
        f"at {BAR_CONNECTIONS} connections; the bar is {BAR}: {'met' if met else 'MISSED'}."
    )
    sys.exit(not met)


def _measure(
    console: Console,
    pace: Pace,
    authorities: dict[int, LiveAuthority],
    credentials: dict[int, IssuedCredential],
) -> Samples:
    samples: Samples = {(workers, each): [] for workers in WORKERS for each in CONNECTIONS}
    key = rsa.generate_private_key(public_exponent=65_537, key_size=2048)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    ) as progress:
        task = progress.add_task("", total=pace.rounds * len(samples))
        for _ in range(pace.rounds):
            for (workers, connections), taken in samples.items():
                progress.update(task, description=f"{workers} workers, {connections} connections")
                before = _sign_rate(key, pace.sign)
                load = exchange_load(authorities[workers], credentials[workers], connections, pace)
                after = _sign_rate(key, pace.sign)
                taken.append(Sample(load=load, sign_rate=(before + after) / 2))
                progress.advance(task)
    return samples


def _sign_rate(key: rsa.RSAPrivateKey, seconds: float) -> float:
    """Return RS256 signatures a second of one thread, with the library that the server uses."""
    message, pkcs1v15, sha256 = b"x" * 600, padding.PKCS1v15(), SHA256()
    signatures, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds:
        key.sign(message, pkcs1v15, sha256)
        signatures += 1
    return signatures / elapsed


def exchange_load(
    authority: LiveAuthority, credential: IssuedCredential, connections: int, pace: Pace
) -> Load:
    """Return what so many clients got, in a process of their own."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.bench.load",
            f"--port={authority.port}",
            f"--connections={connections}",
            f"--warm={pace.warm}",
            f"--seconds={pace.load}",
        ],
        input=f"{credential.client_id} {credential.client_secret}".encode(),
        stdout=subprocess.PIPE,
        check=True,
        cwd=REPOSITORY,
        timeout=60,
    )
    return msgspec.json.decode(done.stdout, type=Load)


async def new_credential(authority: LiveAuthority) -> IssuedCredential:
    """Return a credential of a fresh service user."""
    admin = await AdminAPI.enter(authority)
    service_user_id = await admin.create_service_user("bench", ["ingest:write", "search:read"])
    credential = await admin.create_credential(service_user_id)
    await admin.leave()
    return credential


async def _postgres_version(authority: LiveAuthority) -> str:
    connection = await asyncpg.connect(authority.service_dsn.reveal(), timeout=10)
    try:
        version = await connection.fetchval("SELECT current_setting('server_version')")
        fsync = await connection.fetchval("SELECT current_setting('fsync')")
    finally:
        await connection.close(timeout=5)
    return f"PostgreSQL {version} (embedded, fsync {fsync})"


def _table(samples: Samples) -> Table:
    table = Table(title="POST /oauth/token with a durable audit record; medians of the rounds")
    for heading in ("workers", "connections", "tokens/s", "p50 ms", "p99 ms", "sign/s", "ratio"):
        table.add_column(heading, justify="right")
    table.add_column("failed", justify="right")
    for (workers, connections), taken in samples.items():
        loads = [sample.load for sample in taken]
        table.add_row(
            str(workers),
            str(connections),
            f"{_median(load.rate for load in loads):.0f}",
            f"{_median(load.p50 for load in loads):.1f}",
            f"{_median(load.p99 for load in loads):.1f}",
            f"{_median(sample.sign_rate for sample in taken):.0f}",
            f"{_median(sample.ratio for sample in taken):.2f}",
            str(sum(load.failures for load in loads)),
        )
    return table


def _environment(samples: Samples, postgres: str) -> str:
    rates = [sample.sign_rate for taken in samples.values() for sample in taken]
    return (
        f"{os.cpu_count()} cores shared by clients, server and Postgres; load average "
        f"{os.getloadavg()[0]:.1f} at the end; Python {platform.python_version()}; {postgres}; "
        f"one-core RSA-2048 sign rate {min(rates):.0f} to {max(rates):.0f} a second."
    )


def _median(values: Iterable[float]) -> float:
    return statistics.median(values)


if __name__ == "__main__":
    main()
