"""`privyseal audit tail`: the log as it grows, for people and for log shippers.

Prints every record once, and a second time only if it was killed between printing and noting it.
"""

import json
import re
import signal
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Final

import click

from service.cli.arguments import authority
from service.cli.files import replacing
from service.cli.record_filters import record_filters
from service.cli.render import Json, moment, printable

if TYPE_CHECKING:
    from service.cli.api import Authority

PAGE: Final = 250
"""Records that are printed, flushed and noted together: so many may come twice after a kill."""
POLL: Final = 1.0
"""Seconds between two looks."""

_CURSOR: Final = re.compile(r"[0-9]{1,18}\.[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@click.command()
@click.option("-f", "--follow", is_flag=True, help="Go on with new records as they come.")
@click.option("--json", "as_json", is_flag=True, help="Print NDJSON: a JSON object a line.")
@click.option(
    "--cursor-file",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Resume where FILE says, and keep it up to date.",
)
@click.option("--from-start", is_flag=True, help="Without a cursor begin with the oldest record.")
@record_filters
def tail(
    follow: bool,
    as_json: bool,
    cursor_file: Path | None,
    from_start: bool,
    **filters: str | None,
) -> None:
    """Print audit records as they come on record, each once.

    They come in the order of their commits. Begins where the cursor file says, else now
    (--from-start: with the oldest record). Without -f it ends when all that is on record was
    printed. While the authority is away -f waits for it.

    A record is noted in the cursor file after it was printed and flushed. So SIGTERM and SIGINT
    lose nothing and repeat nothing; after SIGKILL, or if the reader of a pipe dies, nothing is
    lost and up to 250 records come twice, the last line before perhaps being torn. Every record
    has an `id` by which a second one is told.

    \b
    Examples:
      privyseal audit tail -f --outcome refused
      privyseal audit tail -f --json --cursor-file /var/lib/shipper/privyseal --from-start
    """
    cursor = _kept_cursor(cursor_file)
    if not (follow or cursor or from_start):
        raise click.UsageError(
            "Nothing comes after now without -f. Give -f, --from-start or the cursor file of an "
            "earlier run; `privyseal audit list` shows the last records."
        )
    ending = _Ending()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ending)
    with authority() as api:
        look = _patient(api) if follow else api.get
        if cursor is None and not from_start:
            newest = look("/audit-records", order="desc", limit=1)["records"]
            cursor = newest[0]["cursor"] if newest else None
            # Whoever is killed before the first record comes resumes here, too.
            _keep(cursor, cursor_file)
        while True:
            records: list[Json] = look("/audit-records", cursor=cursor, limit=PAGE, **filters)[
                "records"
            ]
            if records:
                with ending.held():
                    _print(records, as_json=as_json)
                    cursor = str(records[-1]["cursor"])
                    _keep(cursor, cursor_file)
            if len(records) < PAGE:
                if not follow:
                    return
                time.sleep(POLL)


class _Ending:
    """Ends the command on a signal: at once, or after the records that are being printed."""

    def __init__(self) -> None:
        self._printing = False
        self._asked = False

    def __call__(self, _: int, __: FrameType | None) -> None:
        # Who asks twice does not want to wait for a reader that takes nothing.
        if self._asked or not self._printing:
            raise SystemExit(0)
        self._asked = True

    @contextmanager
    def held(self) -> Generator[None, None, None]:
        """Hold the end back until the block has ended."""
        self._printing = True
        yield
        self._printing = False
        if self._asked:
            raise SystemExit(0)


def _patient(api: "Authority") -> Callable[..., Json]:
    """Return `api.get` as one that waits for an authority that is away; it raises Refused if a
    fresh token is refused, too."""
    # Here for the reason that `authority` gives.
    from service.cli.api import Refused, Unavailable

    def get(path: str, **query: str | int | None) -> Json:
        away = refused = False
        while True:
            try:
                answer = api.get(path, **query)
            except Unavailable as error:
                if not away:
                    click.echo(f"{error.message} Waiting for it.", err=True)
                away = True
                time.sleep(POLL)
            except Refused:
                if refused:
                    raise
                refused = True
                api.forget_token()
            else:
                if away:
                    click.echo(f"{api.url} is back.", err=True)
                return answer

    return get


def _print(records: Sequence[Json], *, as_json: bool) -> None:
    lines = map(json.dumps if as_json else _line, records)
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()


def _line(record: Mapping[str, str | None]) -> str:
    outcome = f"{record['outcome']}: {record['reason']}" if record["reason"] else record["outcome"]
    whom = record["service_user"] or record["service_user_id"]
    facts = (record["action"], outcome, whom, record["actor"], record["client_address"])
    texts = (printable(fact) if fact else "-" for fact in facts)
    return "  ".join((moment(str(record["recorded_at"])), *texts))


def _kept_cursor(file: Path | None) -> str | None:
    if file is None or not file.exists():
        return None
    text = file.read_text("ascii", errors="replace").strip()
    if not _CURSOR.fullmatch(text):
        raise click.ClickException(
            f"{file} holds no cursor. Nothing was printed and it was not changed: name another "
            "file, or remove it to begin anew."
        )
    return text


def _keep(cursor: str | None, file: Path | None) -> None:
    if cursor is None or file is None:
        return
    try:
        with replacing(file) as kept:
            kept.write(f"{cursor}\n".encode("ascii"))
    except OSError as error:
        raise click.ClickException(f"{file} cannot be written: {error.strerror}.") from None
