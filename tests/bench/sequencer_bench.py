"""`make bench`: what the proof of the audit log costs an exchange, with the sequencer on and off.

Two authorities of the same build, in windows that take turns, because a machine is not as fast in
every minute. In every window it is counted what became of its records: with the sequencer on each
must have its place in the log, with it off none.
"""

import asyncio
import os
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any, Final
from unittest.mock import patch

import asyncpg
import click
from litestar.types import ASGIApp
from msgspec import Struct
from rich.console import Console
from rich.table import Table

from service import app
from tests.bench.bench import Pace, exchange_load, new_credential
from tests.bench.load import Load
from tests.faults.admin_api import IssuedCredential
from tests.faults.live_authority import LiveAuthority, live_authority

OFF: Final = "tests.bench.sequencer_bench:without_sequencer"
BAR: Final = 0.90
CONNECTIONS: Final = 64
FULL: Final = Pace(rounds=12, warm=0.5, load=4.0, sign=0)
QUICK: Final = Pace(rounds=2, warm=0.3, load=2.0, sign=0)
CATCHING_UP: Final = 30.0
"""Seconds after a window within which its last records must have their places."""

SELECT_PROGRESS: Final = """
SELECT (SELECT count(*) FROM audit_records) AS records,
       (SELECT count(*) FROM audit_leaves) AS leaves,
       (SELECT coalesce(max(size), 0) FROM audit_checkpoints) AS size,
       (SELECT count(*) FROM audit_checkpoints) AS checkpoints
"""


def without_sequencer() -> ASGIApp:
    """Return the product, but that nobody gives its records a place in the log."""
    with patch.object(app, "Authority", _WithoutSequencer):
        return app.create_app()


class _WithoutSequencer(app.Authority):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)

        async def give_no_places() -> None:
            await asyncio.Event().wait()

        self.sequencer.run = give_no_places


class Progress(Struct, frozen=True, kw_only=True):
    """What a database holds: records, and how many of them are under a signed checkpoint."""

    records: int
    leaves: int
    size: int
    checkpoints: int


class Window(Struct, frozen=True, kw_only=True):
    """One load, and what became of its records."""

    load: Load
    records: int
    placed: int
    """By the end of the load and a little after: those that its checkpoints grew by."""
    checkpoints: int
    """Signed while the load lasted."""


@click.command()
@click.option("--quick", is_flag=True, help="A few seconds only: shows that it runs.")
def main(quick: bool) -> None:
    """Measure, print, and exit with 1 if the bar is missed."""
    console = Console()
    pace = QUICK if quick else FULL
    on: list[Window] = []
    off: list[Window] = []
    with live_authority(workers=1) as product, live_authority(workers=1, factory=OFF) as bare:
        sides = [
            (product, asyncio.run(new_credential(product)), True, on),
            (bare, asyncio.run(new_credential(bare)), False, off),
        ]
        for number in range(pace.rounds):
            # In turns, and each first as often as the other.
            for authority, credential, sequencing, windows in sides[:: 1 - number % 2 * 2]:
                windows.append(_window(authority, credential, pace, sequencing=sequencing))
    console.print(_table(on, off))
    ratio = statistics.median(
        with_it.load.rate / without.load.rate for with_it, without in zip(on, off, strict=True)
    )
    met = ratio >= BAR
    console.print(
        f"[bold {'green' if met else 'red'}]exchange throughput with the sequencer on: {ratio:.2f} "
        f"of that with it off; the bar is {BAR:.2f}: {'met' if met else 'MISSED'}."
    )
    sys.exit(not met)


def _window(
    authority: LiveAuthority, credential: IssuedCredential, pace: Pace, *, sequencing: bool
) -> Window:
    """Load an authority whose log is at rest; raise AssertionError if it is not as it should be."""
    before = _at_rest(authority, sequencing=sequencing)
    load = exchange_load(authority, credential, CONNECTIONS, pace)
    during = asyncio.run(_progress(authority))
    after = _at_rest(authority, sequencing=sequencing)
    window = Window(
        load=load,
        records=after.records - before.records,
        placed=after.size - before.size,
        checkpoints=during.checkpoints - before.checkpoints,
    )
    assert load.failures == 0, f"{load.failures} exchanges failed"
    assert window.records >= load.tokens, f"{window.records} records of {load.tokens} tokens"
    if sequencing:
        assert window.placed == window.records, f"{window.placed} of {window.records} have places"
        assert window.checkpoints > 0, "the sequencer slept through the load"
    else:
        assert after.leaves == after.size == 0, f"{after.leaves} records have places"
    return window


def _at_rest(authority: LiveAuthority, *, sequencing: bool) -> Progress:
    """Return what there is once every record that is to have a place has one."""
    deadline = time.monotonic() + CATCHING_UP
    progress = asyncio.run(_progress(authority))
    while sequencing and not progress.records == progress.leaves == progress.size:
        assert time.monotonic() < deadline, f"the sequencer does not catch up: {progress}"
        time.sleep(0.1)
        progress = asyncio.run(_progress(authority))
    return progress


async def _progress(authority: LiveAuthority) -> Progress:
    connection = await asyncpg.connect(authority.service_dsn.reveal(), timeout=10)
    try:
        row = await connection.fetchrow(SELECT_PROGRESS, timeout=30)
    finally:
        await connection.close(timeout=5)
    assert row is not None
    return Progress(**dict(row))


def _table(on: Sequence[Window], off: Sequence[Window]) -> Table:
    table = Table(
        title=f"POST /oauth/token, {CONNECTIONS} connections, in turns",
        caption=f"{os.cpu_count()} cores; load average {os.getloadavg()[0]:.1f} at the end",
    )
    table.add_column("sequencer")
    for heading in ("tokens/s", "p99 ms", "records", "placed", "checkpoints", "ratio"):
        table.add_column(heading, justify="right")
    for with_it, without in zip(on, off, strict=True):
        table.add_row("on", *_figures(with_it), f"{with_it.load.rate / without.load.rate:.2f}")
        table.add_row("off", *_figures(without), end_section=True)
    for name, windows in (("on, median", on), ("off, median", off)):
        table.add_row(name, f"{statistics.median(each.load.rate for each in windows):.0f}")
    return table


def _figures(window: Window) -> Sequence[str]:
    return (
        f"{window.load.rate:.0f}",
        f"{window.load.p99:.1f}",
        f"{window.records:,}",
        f"{window.placed:,}",
        str(window.checkpoints),
    )


if __name__ == "__main__":
    main()
