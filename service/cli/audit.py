"""`privyseal audit`: who did what, when, from where.

Changes no record: months can only be moved into archives, and personal values erased, by the owner.
"""

import re
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from service.cli.arguments import Moment, authority, json_option, reason_option, yes_option
from service.cli.export import export
from service.cli.record_filters import record_filters
from service.cli.render import Json, print_json, print_table
from service.cli.tail import tail

if TYPE_CHECKING:
    from service.cli.api import Authority


_MONTH: Final = re.compile(r"[0-9]{4}-(0[1-9]|1[0-2])")
_MATCHES: Final = ("client_address", "user_agent", "resource", "department", "service_user")


def _month(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    if value is not None and not _MONTH.fullmatch(value):
        raise click.BadParameter(f"{value!r} is no month: expected one such as 2026-10.")
    return value


def _match(_: click.Context, __: click.Parameter, value: str) -> tuple[str, str]:
    kind, _equals, wanted = value.partition("=")
    if kind not in _MATCHES or not wanted:
        raise click.BadParameter(f"expected {', '.join(_MATCHES)}, then = and a value.")
    return kind, wanted


@click.group()
def audit() -> None:
    """Who did what, when, from where. Every token and every administrative act is on record."""


audit.add_command(export)
audit.add_command(tail)


@audit.command("list")
@click.option(
    "--limit", type=click.IntRange(1), default=100, show_default=True, help="At most so many."
)
@click.option("--oldest-first", is_flag=True, help="The first records instead of the last ones.")
@record_filters
@json_option
def list_(
    limit: int,
    oldest_first: bool,
    as_json: bool,
    service_user: str | None,
    **filters: str | None,
) -> None:
    """List the last records that meet every filter.

    The newest is at the bottom. --json has more of each record, such as its id (the jti of a token)
    and the request id.

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


# What follows works where the database is, and by name: nothing of the server is imported for the
# commands above.


@audit.command()
@click.argument("files", nargs=-1, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--database", metavar="URL", help="Instead of PRIVYSEAL_DATABASE_URL.")
@click.option(
    "--checkpoint",
    "checkpoints",
    multiple=True,
    type=click.Path(exists=True, path_type=Path),
    help="Kept outside the database: a file, or a directory such as PRIVYSEAL_CHECKPOINT_DIR.",
)
@click.option(
    "--key",
    "keys",
    multiple=True,
    envvar="PRIVYSEAL_AUDIT_KEY",
    metavar="VKEY",
    help="The log's verifier key, or a file with it, such as what `privyseal migrate` prints.",
)
@json_option
def verify(
    files: tuple[Path, ...],
    database: str | None,
    checkpoints: tuple[Path, ...],
    keys: tuple[str, ...],
    as_json: bool,
) -> None:
    """Check the log for tampering.

    The log is that of a database, or of archives and exports (FILES). Reads every record,
    recomputes every hash, and compares with every checkpoint. Any role that may read the tables
    will do, files need no database, and no key of the service is needed.

    Of an archive, give any file; of `audit export`, the NDJSON. They can be compared with their own
    checkpoint, with what CHECKPOINT_DIR kept when they were made, and with one that an export was
    made for (audit export --checkpoint); a whole log, with any that is not newer.

    Cut, restored from an older backup, forked, rewritten by who holds the log's key: these four are
    found only with a checkpoint that was kept outside the database. A file is checked as it was
    written: JSON that was written anew, in another way, does not verify.

    \b
    Examples:
      privyseal audit verify --key "$(cat vkey)" --checkpoint /mnt/checkpoints
      privyseal audit verify --key vkey archive/*.json
      privyseal audit verify --key vkey --checkpoint kept.txt november.ndjson

    The first bad record is named; records are counted from 0.

    \b
    Exit status:
      0  nothing was changed
      1  something was, or a file cannot be read
      2  wrong usage
      3  nothing was found, and a file could not be compared with a checkpoint that was given
    """
    if files and database:
        raise click.UsageError("Give FILES or --database.")
    import_module("service.cli.audit_offline").verify(
        database=database, files=files, checkpoints=checkpoints, keys=keys, as_json=as_json
    )


@audit.command()
@click.option("--month", metavar="YYYY-MM", callback=_month, help="This month only.")
@click.option(
    "--older-than-months",
    "older_than",
    type=click.IntRange(1),
    help="Each month older than that; PRIVYSEAL_AUDIT_RETENTION_MONTHS unless given.",
)
@click.option(
    "--to",
    "directory",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="The directory that the files go to.",
)
@json_option
def archive(month: str | None, older_than: int | None, directory: Path, as_json: bool) -> None:
    """Move months that have ended out of the database, into files.

    As the owner (privyseal_owner). A month is written, made durable, read again and verified; only
    then it leaves the database, which is itself on record. Its hashes stay, so that the log still
    verifies. A month can be archived seven days after its end, not earlier, and not while a key
    that signed in it is published: the records tell which of its tokens are forged.

    Personal values go into a file of their own, which can be erased on its own.
    """
    if month and older_than:
        raise click.UsageError("Give --month or --older-than-months.")
    import_module("service.cli.audit_offline").archive(
        month=month, older_than=older_than, directory=directory, as_json=as_json
    )


@audit.command()
@click.option(
    "--match",
    required=True,
    callback=_match,
    metavar="KIND=VALUE",
    help="KIND is client_address, user_agent, resource or department, VALUE all of it; or "
    "service_user (an id or a name).",
)
@click.option(
    "--before",
    type=Moment(ahead=False, end_of_day=False),
    help="Only records from before: a date (UTC), a time with offset, or a duration back from now.",
)
@reason_option
@click.option("--dry-run", is_flag=True, help="Only count.")
@yes_option
def erase(
    match: tuple[str, str], before: str | None, reason: str, dry_run: bool, yes: bool
) -> None:
    """Erase personal values of records for good. Asks first.

    Those are address, user agent, resource and department. As the owner (privyseal_owner). The
    records stay, and every proof with them. On record is how many were erased and why, not what was
    matched. Archives and backups keep theirs.
    """
    kind, wanted = match
    import_module("service.cli.audit_offline").erase_matching(
        kind=kind, wanted=wanted, before=before, reason=reason, dry_run=dry_run, yes=yes
    )
