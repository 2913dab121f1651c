"""Which audit records are meant: the options that `audit list`, `export` and `tail` share.

Asks nobody whether there are any.
"""

from collections.abc import Callable
from typing import Any, Final, TypeVar
from uuid import UUID

import click

from service.cli.arguments import Moment, credential_id

Command = TypeVar("Command", bound=Callable[..., Any])


def _text(_: click.Context, __: click.Parameter, value: UUID | None) -> str | None:
    return None if value is None else str(value)


# Named as the parameters of the API.
_OPTIONS: Final = (
    click.option("--service-user", metavar="SU", help="Whom it was done to: id or name."),
    click.option("--source-system", help="Of which system that one is."),
    click.option(
        "--credential",
        metavar="CREDENTIAL",
        callback=credential_id,
        help="With or on which credential.",
    ),
    click.option("--actor", metavar="SU", help="Who did or reported it: id or name."),
    click.option(
        "--actor-credential",
        metavar="CREDENTIAL",
        callback=credential_id,
        help="With which credential that was.",
    ),
    click.option("--action", help="What was done, such as token.issue or credential.revoke."),
    click.option(
        "--outcome",
        type=click.Choice(["success", "refused", "failed"]),
        help="Whether it was done.",
    ),
    click.option("--reason", help="Why not, such as wrong_secret; or why."),
    click.option("--request-id", help="The X-Request-Id of an answer."),
    click.option(
        "--jti",
        type=click.UUID,
        callback=_text,
        help="The id of a token: its issuance, and the calls made with it; or of one record.",
    ),
    click.option("--kid", help="With which signing key, or on which."),
    click.option("--client-address", metavar="IP", help="From where."),
    click.option("--user-agent", metavar="PREFIX", help="With what program: how its name begins."),
    click.option("--department", help="For which department a call was made."),
    click.option("--resource", metavar="PREFIX", help="On what: how its name begins."),
    click.option(
        "--since",
        type=Moment(ahead=False, end_of_day=False),
        help="A date (UTC), a time with offset, or a duration back from now.",
    ),
    click.option("--until", type=Moment(ahead=False, end_of_day=True), help="The same."),
)


def record_filters(command: Command) -> Command:
    """Give a command the options; it takes them as keyword arguments, to be sent as they are."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
