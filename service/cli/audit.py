"""`privyseal audit`: who did what, when, from where.

Reads the log; there is no way to write into it.
"""

from collections.abc import Mapping
from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING, Any
from uuid import UUID

import click

from service.cli.arguments import Moment, authority, credential_id, json_option
from service.cli.render import Json, print_json, print_table

if TYPE_CHECKING:
    from service.cli.api import Authority


@click.group()
def audit() -> None:
    """Who did what, when, from where. Every token and every administrative act is on record."""


@audit.command("list")
@click.option("--service-user", metavar="SU", help="Whom it was done to: id or name.")
@click.option("--source-system", help="Of which system that one is.")
@click.option(
    "--credential",
    metavar="CREDENTIAL",
    callback=credential_id,
    help="With or on which credential.",
)
@click.option("--actor", metavar="SU", help="Which operator did it: id or name.")
@click.option("--action", help="What was done, such as token.issue or credential.revoke.")
@click.option("--outcome", type=click.Choice(["success", "refused"]), help="Whether it was done.")
@click.option("--request-id", help="The X-Request-Id of an answer.")
@click.option("--jti", type=click.UUID, help="The id of a token, which is that of its record.")
@click.option(
    "--since",
    type=Moment(ahead=False, end_of_day=False),
    help="A date (UTC), a time with offset, or a duration back from now.",
)
@click.option("--until", type=Moment(ahead=False, end_of_day=True), help="The same.")
@click.option(
    "--limit", type=click.IntRange(1), default=100, show_default=True, help="At most so many."
)
@click.option("--oldest-first", is_flag=True, help="The first records instead of the last ones.")
@json_option
def list_(
    limit: int,
    oldest_first: bool,
    as_json: bool,
    service_user: str | None,
    jti: UUID | None,
    **filters: str | None,
) -> None:
    """List audit records that meet every filter: the last ones, the newest at the bottom.

    --json has more of each record, such as its id (the jti of a token) and the request id.

    \b
    Examples:
      privyseal audit list --service-user vkyc-prod --since 2h
      privyseal audit list --outcome refused --since 2026-11-24
      privyseal audit list --jti 0199a1c0-7f0e-7cc3-9f53-3a5c2f1d8e11
    """
    with authority() as api:
        # One more than is shown tells whether there are more.
        found = api.pages(
            "/audit-records",
            "records",
            page_size=1000,
            limit=limit + 1,
            order="asc" if oldest_first else "desc",
            service_user=service_user,
            jti=str(jti) if jti else None,
            **filters,
        )
        records = list(islice(found, limit))
        more = next(found, None) is not None
        if service_user and not records:
            _require_service_user(api, service_user)
    if not oldest_first:
        records.reverse()
    if as_json:
        print_json(records)
    else:
        print_table(
            [_line(record) for record in records],
            ("recorded_at", "action", "outcome", "service_user", "actor"),
            wide=("source_system", "client_address"),
            nothing="No record meets these filters.",
        )
    if more:
        end = "first" if oldest_first else "last"
        click.echo(f"These are the {end} {limit}; more meet the filters (--limit).", err=True)


def _require_service_user(api: "Authority", id_or_name: str) -> None:
    """Raise Refused if there is none of that name: it explains an empty list better."""
    # Here for the reason that `authority` gives.
    from service.cli.api import Forbidden

    # Who may read the log need not be allowed to read service users.
    with suppress(Forbidden):
        api.service_user_id(id_or_name)


def _line(record: Json) -> Mapping[str, Any]:
    """Return a record with its outcome in full, why and how often, and whom it was done to."""
    outcome = record["outcome"]
    if record["reason"]:
        outcome += f": {record['reason']}"
    if record["repeats"] > 1:
        outcome += f" (x{record['repeats']})"
    whom = record["service_user"] or record["service_user_id"]
    return {**record, "outcome": outcome, "service_user": whom}
