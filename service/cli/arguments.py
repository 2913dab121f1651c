"""What the commands of the client half have in common: how arguments are written and asked for.

Talks to nobody.
"""

import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

import click

if TYPE_CHECKING:
    from service.cli.api import Authority

_DURATION: Final = re.compile(r"([1-9][0-9]{0,4})([smhdw])")
_UNITS: Final = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_DATE: Final = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
# RFC 3339 §5.6, with its note that a space may stand for the T.
_TIME: Final = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt ][0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,6})?"
    r"([Zz]|[+-][0-9]{2}:[0-9]{2})"
)
_CREDENTIAL_ID: Final = re.compile("cr_[a-z2-7]{24}")


class Moment(click.ParamType[str]):
    """A point in time, as RFC 3339 in UTC: given as a time, a date, or a duration from now."""

    name = "time"

    def __init__(
        self, *, ahead: bool, end_of_day: bool, clock: Callable[[], float] = time.time
    ) -> None:
        """A duration counts into the future if `ahead`, else into the past."""
        self._sign = 1 if ahead else -1
        self._end_of_day = end_of_day
        self._clock = clock

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            return rfc3339(self._moment(value))
        except ValueError:
            self.fail(
                f"{value!r} is no time. Expected a date (2027-01-31, in UTC), a time with its "
                "offset (2027-01-31T12:00:00Z) or a duration (90d; units s, m, h, d, w).",
                param,
                ctx,
            )

    def _moment(self, text: str) -> datetime:
        if duration := _DURATION.fullmatch(text):
            amount = timedelta(**{_UNITS[duration[2]]: int(duration[1])})
            return datetime.fromtimestamp(self._clock(), UTC) + self._sign * amount
        if _DATE.fullmatch(text):
            day = datetime.fromisoformat(text).replace(tzinfo=UTC)
            return day.replace(hour=23, minute=59, second=59) if self._end_of_day else day
        if _TIME.fullmatch(text):
            return datetime.fromisoformat(text.upper())
        raise ValueError


def rfc3339(moment: datetime) -> str:
    """Write an aware time as the API does: in UTC, with Z."""
    return moment.astimezone(UTC).isoformat().replace("+00:00", "Z")


def authority() -> "Authority":
    """Return the authority that the environment names.

    Raise Misconfigured (exit status 2) naming the variable that is missing or cannot be right.
    """
    # Here, because an HTTP client takes longer to load than all the rest: --help needs none.
    from service.cli.api import Authority

    return Authority.from_environ(os.environ)


def words(_: click.Context, __: click.Parameter, values: Sequence[str]) -> list[str]:
    """Take `--scope a --scope b` and `--scope "a b"` alike."""
    return [word for value in values for word in value.split()]


def given(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that were given: what was left out is for the authority to choose."""
    return {name: value for name, value in fields.items() if value not in (None, [], ())}


def credential_id(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    """Refuse what is given and has not the form of a credential id."""
    if value is not None and not _CREDENTIAL_ID.fullmatch(value):
        raise click.BadParameter(
            f"{value!r} is no credential id: expected cr_ and 24 characters, as "
            "`privyseal credentials list` shows it."
        )
    return value


def _reason(_: click.Context, __: click.Parameter, value: str) -> str:
    if not 3 <= len(value) <= 200:
        raise click.BadParameter(f"expected 3 to 200 characters, found {len(value)}.")
    return value


def confirm(*consequences: str) -> None:
    """Say what will break and ask; return only on a yes. Wrong usage without a terminal."""
    if not sys.stdin.isatty():
        raise click.UsageError("Nobody can be asked without a terminal: add --yes if it is meant.")
    for consequence in consequences:
        click.echo(click.wrap_text(consequence, shutil.get_terminal_size().columns), err=True)
    if not click.confirm("Go on?", err=True):
        click.echo("Nothing was changed.", err=True)
        raise click.exceptions.Exit(1)


json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print JSON: an array for a list, else an object."
)
reason_option = click.option(
    "--reason",
    required=True,
    callback=_reason,
    help="Why: 3 to 200 characters; it goes on record.",
)
yes_option = click.option("--yes", is_flag=True, help="Do not ask first.")
service_user_argument = click.argument("service_user", metavar="SU")
credential_argument = click.argument("credential_id", metavar="CREDENTIAL", callback=credential_id)
