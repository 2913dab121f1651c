"""`privyseal token --keep`: a file that always holds a fresh token.

Never gives up by itself, and never leaves half a token or a readable one behind.
"""

import random
import signal
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Final, NoReturn

import click

from service.cli.api import Refused, Unavailable
from service.cli.files import replacing
from service.cli.render import Json, moment, warn_of_end

FIRST_DELAY: Final = 1.0
LONGEST_DELAY: Final = 30.0
"""Seconds between two tries while the authority is away, at most."""

_RENEW_AT: Final = 2 / 3
_LONGEST_SLEEP: Final = 5.0


def keep(exchange: Callable[[], Json], file: Path) -> NoReturn:
    """Write a token into `file` and renew it at two thirds of its lifetime, until SIGTERM.

    Raise Refused or click.ClickException only before the first token is written: what is wrong
    from the start is better said at once. Later every failure is said on stderr and tried again.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end)
    failures = 0
    held = ""
    while True:
        started = time.time()
        try:
            answer = exchange()
            with replacing(file) as kept:
                # No newline: a program may put the whole content into its header.
                kept.write(answer["access_token"].encode("ascii"))
        except (Refused, Unavailable, OSError) as error:
            message = _sentence(error, file)
            if not held and not isinstance(error, Unavailable):
                raise click.ClickException(message) from None
            delay = min(FIRST_DELAY * 2 ** min(failures, 10), LONGEST_DELAY)
            # Who failed together must not return together.
            delay *= random.uniform(0.5, 1)  # noqa: S311
            failures += 1
            _say(f"{message} {held or 'There is no token yet.'} Trying again in {delay:.0f} s.")
        else:
            failures = 0
            ends_at = started + answer["expires_in"]
            delay = answer["expires_in"] * _RENEW_AT * random.uniform(0.9, 1)  # noqa: S311
            held = f"{file} holds a token until {_time(ends_at)}."
            _say(f"{held} Renewal in {delay:.0f} s.")
            warn_of_end(answer)
        _sleep(delay)


def _sleep(seconds: float) -> None:
    """Sleep, but no longer than until then by the wall clock: a paused machine wakes up late."""
    due = time.time() + seconds
    while seconds > 0 and time.time() < due:
        time.sleep(min(seconds, _LONGEST_SLEEP))
        seconds -= _LONGEST_SLEEP


def _end(_: int, __: FrameType | None) -> NoReturn:
    raise SystemExit(0)


def _sentence(error: click.ClickException | OSError, file: Path) -> str:
    if isinstance(error, OSError):
        return f"{file} cannot be written: {error.strerror}."
    return error.message


def _say(text: str) -> None:
    click.echo(f"{_time(time.time())} {text}", err=True)


def _time(seconds: float) -> str:
    return moment(datetime.fromtimestamp(seconds, UTC).isoformat())
