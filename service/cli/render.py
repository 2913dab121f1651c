"""How answers of the API look on a screen, in a pipe and as JSON.

Names every field as the API does, and asks the API nothing.
"""

import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final

import click

Json = dict[str, Any]

WIDE: Final = 120
"""Columns of a terminal from which on a table shows everything it has."""

# These may take several lines in a narrow table; ids, times and states stay in one piece.
_FOLDED: Final = frozenset({"name", "scopes", "label", "outcome", "service_user", "actor"})

_COLOURS: Final = {
    "live": "green",
    "active": "green",
    "expired": "yellow",
    "disabled": "red",
    "revoked": "red",
    "refused": "red",
}


def print_json(value: Any) -> None:
    """Print JSON, in ASCII: no text in it can steer a terminal."""
    click.echo(json.dumps(value, indent=2))


def print_table(
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[str],
    *,
    wide: Sequence[str] = (),
    nothing: str,
) -> None:
    """Print a table; `wide` are the columns that a narrow terminal has no room for.

    Without a terminal: plain text, every column, nothing folded or cut off.
    """
    if not rows:
        click.echo(nothing, err=True)
    elif sys.stdout.isatty():
        screen = shutil.get_terminal_size()
        roomy = screen.columns >= WIDE
        _print_rich(rows, [*columns, *wide] if roomy else columns, screen)
        if wide and not roomy:
            left_out = f"Not shown for want of width: {', '.join(wide)}; widen, pipe, or --json."
            click.echo(f"\n{click.wrap_text(left_out, screen.columns)}", err=True)
    else:
        _print_plain(rows, [*columns, *wide])


def print_fields(item: Mapping[str, Any]) -> None:
    """Print one thing, a field a line, in the order of the API."""
    width = max(map(len, item))
    for name, value in item.items():
        label = click.style(name.ljust(width), dim=True)
        # https://no-color.org; a pipe gets no colour either way.
        colour = False if os.environ.get("NO_COLOR") else None
        click.echo(f"{label}  {_coloured(cell(name, value))}", color=colour)


def cell(name: str, value: Any) -> str:
    """Return a value as people read it."""
    match value:
        case None | "" | []:
            return "-"
        case [*items]:
            return " ".join(printable(str(item)) for item in items)
        case str() if name.endswith(("_at", "_from", "_until")):
            return moment(value)
        case str():
            return printable(value)
        case _:
            return str(value)


def moment(rfc3339: str) -> str:
    """Return a time of the API to the second; `--since` and its like take it as it is."""
    return printable(f"{rfc3339[:19].replace('T', ' ')}Z")


def printable(text: str) -> str:
    """Return text that cannot steer a terminal: control and bidi characters are spelled out."""
    return "".join(
        character if character.isprintable() else ascii(character)[1:-1] for character in text
    )


def live_tokens(changed: Mapping[str, Any]) -> str:
    """Say what a change could not take back, and until when."""
    live: Json | None = changed["live_tokens"]
    if live is None:
        return "It is done; the tokens issued before that are still accepted could not be counted."
    if not live["count"]:
        return "No token issued before is still accepted."
    return (
        f"Tokens issued before that are still accepted: {live['count']}. The last one ends at "
        f"{moment(live['last_ends_at'])}; it lives up to CLOCK_SKEW (60 s) longer where a "
        "verifier's clock allows it."
    )


def warn_of_end(answer: Json) -> None:
    """Say on stderr when the credential behind a token is about to end."""
    if ends := answer.get("credential_expires_at"):
        click.echo(
            f"The credential in PRIVYSEAL_CLIENT_SECRET ends at {moment(ends)}: ask for the next.",
            err=True,
        )


def _coloured(text: str) -> str:
    colour = _COLOURS.get(text.partition(":")[0])
    return click.style(text, fg=colour) if colour else text


def _print_plain(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    lines = [list(columns), *([cell(name, row.get(name)) for name in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        padded = (text.ljust(width) for text, width in zip(line, widths, strict=True))
        click.echo("  ".join(padded).rstrip())


def _print_rich(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[str], screen: os.terminal_size
) -> None:
    # Here, because most commands print no table.
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for name in columns:
        table.add_column(name, overflow="fold", no_wrap=name not in _FOLDED)
    for row in rows:
        cells = [cell(name, row.get(name)) for name in columns]
        table.add_row(*(Text(text, _COLOURS.get(text.partition(":")[0], "")) for text in cells))
    Console(highlight=False, width=screen.columns, height=screen.lines).print(table)
