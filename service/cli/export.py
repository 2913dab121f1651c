"""`privyseal audit export`: the log as a file.

Writes down what comes as it comes; says so if it was cut, and leaves no half file behind.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Final

import click

from service.cli.arguments import authority
from service.cli.files import replacing
from service.cli.record_filters import record_filters

_SHOW_EVERY: Final = 0.2
# How a line begins that is no record. In a record this stands nowhere: in its texts, quotes are
# escaped.
_HEADER: Final = b'{"log_origin":'


def _size(_: click.Context, __: click.Parameter, checkpoint: Path | None) -> str | None:
    """Return the size that a checkpoint names on its second line."""
    if checkpoint is None:
        return None
    lines = checkpoint.read_bytes().split(b"\n", 2)
    if len(lines) < 2 or not lines[1].isdigit():
        raise click.BadParameter(f"{checkpoint} is no checkpoint.")
    return lines[1].decode()


@click.command()
@click.option(
    "--format",
    "format_",
    type=click.Choice(["ndjson", "csv"]),
    default="ndjson",
    show_default=True,
    help="A JSON object a line, or a table for a spreadsheet.",
)
@click.option(
    "--output",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Written in one step when all of it is there (0600); else standard output.",
)
@click.option(
    "--checkpoint",
    "checkpoint_size",
    metavar="FILE",
    callback=_size,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="One that you kept: NDJSON can be compared with it afterwards, whatever the filters.",
)
@record_filters
def export(
    format_: str, output: Path | None, checkpoint_size: str | None, **filters: str | None
) -> None:
    """Export the records that meet every filter, the oldest first.

    All that is on record when it begins, however many they are; the export itself is on record.

    NDJSON proves itself: its first line is a checkpoint, and `privyseal audit verify FILE` checks
    it offline. In CSV, a text that begins with = + - @, tab or carriage return has an apostrophe
    before it, so that no spreadsheet takes it for a formula; NDJSON has every text as it is.

    \b
    Examples:
      privyseal audit export --since 2026-11-01 --output november.ndjson
      privyseal audit export --jti 0199a1c0-7f0e-7cc3-9f53-3a5c2f1d8e11 --checkpoint kept.txt
      privyseal audit export --format csv --service-user vkyc-prod > vkyc.csv
      privyseal audit export | zstd > log.zst

    Exits with 1 if it was cut; what standard output got until then is incomplete.
    """
    # Here for the reason that `authority` gives.
    from service.cli.api import Unavailable

    progress = _Progress(header_lines=format_ == "csv")
    with authority() as api:
        pieces = api.stream(
            "/audit-records/export", format=format_, checkpoint_size=checkpoint_size, **filters
        )
        try:
            with replacing(output) if output else nullcontext(sys.stdout.buffer) as target:
                for piece in progress.counted(pieces):
                    target.write(piece)
                target.flush()
        except Unavailable as error:
            left = f" {output} was not written." if output else ""
            raise click.ClickException(
                f"The export was cut after {progress.records} records.{left} {error.message}"
            ) from None
        except OSError as error:
            if output is None:
                raise
            raise click.ClickException(f"{output} cannot be written: {error.strerror}.") from None
    things = "record" if progress.records == 1 else "records"
    click.echo(f"{progress.records} {things} exported.", err=True)


class _Progress:
    """Shows in a terminal how many records came so far; how many there are nobody counts."""

    def __init__(self, *, header_lines: int) -> None:
        self._lines = -header_lines
        self._shown_at = 0.0
        self._end = b""

    @property
    def records(self) -> int:
        return max(self._lines, 0)

    def counted(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        try:
            for piece in pieces:
                seen = self._end + piece
                self._lines += piece.count(b"\n") - seen.count(_HEADER)
                self._end = seen[1 - len(_HEADER) :]
                self._show()
                yield piece
        finally:
            if self._shown_at:
                click.echo("\r\x1b[K", err=True, nl=False)

    def _show(self) -> None:
        now = time.monotonic()
        if sys.stderr.isatty() and now - self._shown_at > _SHOW_EVERY:
            self._shown_at = now
            click.echo(f"\r{self.records} records", err=True, nl=False)
