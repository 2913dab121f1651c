"""`privyseal credentials leaked`: from found secrets to whose they are, what was done, and an end.

A secret leaves this process as its SHA-256 only, and is printed nowhere but for its beginning.
"""

import hashlib
import re
import shutil
import sys
from base64 import b64decode, urlsafe_b64encode
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, BinaryIO, Final

import click

from keys.client_secret import SECRET_FORM, checksum
from service.cli.arguments import Moment, authority, confirm, json_option, yes_option
from service.cli.render import Json, live_tokens, moment, print_json, printable

if TYPE_CHECKING:
    from service.cli.api import Authority

MAX_CALLS: Final = 1000
"""Calls that are shown of one credential, the last ones; an export has all."""

_SHOWN: Final = 8
_CHUNK: Final = 1 << 20
_LOOK_BATCH: Final = 1000
# Each is a commit of its own.
_REVOKE_BATCH: Final = 50
_REVOKE_DEADLINE: Final = 60.0
_SECRET: Final = re.compile(rb"pvs_(?=([0-9A-Za-z]{49}))")
# "su_" and ":pvs_", in the base64 of a header `Authorization: Basic`; id, colon and secret are 81
# bytes.
_BASIC: Final = re.compile(rb"c3Vf(?=([0-9A-Za-z+/]{32}OnB2c1[89][0-9A-Za-z+/]{65}))")
_LONGEST: Final = 108


@click.command()
@click.option(
    "--since",
    type=Moment(ahead=False, end_of_day=False),
    default="30d",
    show_default=True,
    help="Since when to show what was done: a date (UTC), a time with offset, or a duration back.",
)
@click.option("--dry-run", is_flag=True, help="Only look: nothing is revoked.")
@yes_option
@json_option
def leaked(since: str, dry_run: bool, yes: bool, as_json: bool) -> None:
    """Revoke the credentials whose secrets stand in a text.

    Shows what was done with them. Reads standard input: secrets, a log, a diff, a chat, of any size
    and in any shape. Whatever has the form and the checksum of a secret is looked up by its digest;
    the secret itself is sent to nobody, and only its first characters are shown. Headers with HTTP
    Basic are read, too.

    Shows of each credential whose it is, whom to call, the live tokens, and every address and call
    since --since; for these it takes audit:read. Asks before it revokes, and never revokes the
    credential in PRIVYSEAL_CLIENT_SECRET.

    \b
    Examples:
      git log -p | privyseal credentials leaked --dry-run
      privyseal credentials leaked --yes --json < chat-export.json

    Exits with 1 if a live credential was found and is not revoked.
    """
    if sys.stdin.isatty():
        click.echo("Paste secrets or text; end with Ctrl-D on a line of its own.", err=True)
    found = secrets_in(sys.stdin.buffer)
    if not found:
        click.echo("Nothing here has the form and the checksum of a secret.", err=True)
        if as_json:
            print_json({"credentials": [], "unknown": []})
        return
    with authority() as api:
        report = _look(api, found) if dry_run or not yes else _revoke(api, found)
        if not (dry_run or yes) and (live := _not_revoked(report)):
            _confirm(live)
            report = _revoke(api, found)
        credentials = [{**each, **_uses(api, each, since)} for each in report["credentials"]]
    unknown = [found[digest] for digest in report["unknown"]]
    if as_json:
        print_json({"credentials": credentials, "unknown": unknown})
    else:
        for each in credentials:
            _print(each, found[each["secret_sha256"]], since)
        for beginning in unknown:
            click.echo(f"{beginning}  a secret of another installation, or never issued.")
    if not dry_run and _not_revoked(report):
        raise click.exceptions.Exit(1)


def secrets_in(source: BinaryIO) -> dict[str, str]:
    """Return what has the form and the checksum of a secret: digest -> how it begins.

    Memory is that of a chunk, however long the text and its lines are.
    """
    found: dict[str, str] = {}
    end_of_last = b""
    while chunk := source.read(_CHUNK):
        # What is left of UTF-16 without its zeros.
        text = end_of_last + chunk.replace(b"\0", b"")
        for secret in _secrets(text):
            sha256 = hashlib.sha256(secret.encode("ascii")).digest()
            found[urlsafe_b64encode(sha256).decode().rstrip("=")] = f"{secret[:_SHOWN]}..."
        end_of_last = text[-_LONGEST:]
    return found


def _secrets(text: bytes) -> Iterator[str]:
    for basic in _BASIC.finditer(text):
        yield from _secrets(b64decode(b"c3Vf" + basic[1]))
    for found in _SECRET.finditer(text):
        secret = f"pvs_{found[1].decode('ascii')}"
        match = SECRET_FORM.fullmatch(secret)
        if match is not None and checksum(match[1]) == match[2]:
            yield secret


def _look(api: "Authority", found: Mapping[str, str]) -> Json:
    return _report(
        api.post("/credentials/leaked", {"secrets_sha256": batch, "dry_run": True}, repeatable=True)
        for batch in _batches(list(found), _LOOK_BATCH)
    )


def _revoke(api: "Authority", found: Mapping[str, str]) -> Json:
    return _report(
        api.post(
            "/credentials/leaked",
            {"secrets_sha256": batch},
            repeatable=True,
            deadline=_REVOKE_DEADLINE,
        )
        for batch in _batches(list(found), _REVOKE_BATCH)
    )


def _batches(digests: Sequence[str], size: int) -> Iterator[list[str]]:
    for start in range(0, len(digests), size):
        yield list(digests[start : start + size])


def _report(answers: Iterator[Json]) -> Json:
    report: Json = {"credentials": [], "unknown": []}
    for answer in answers:
        for name, of_all in report.items():
            of_all.extend(answer[name])
    return report


def _not_revoked(report: Json) -> list[Json]:
    return [each for each in report["credentials"] if each["outcome"] == "kept"]


def _confirm(live: Sequence[Json]) -> None:
    if not sys.stdin.isatty():
        # What was piped in is read; who answers sits at the terminal.
        with suppress(OSError):
            sys.stdin = open("/dev/tty", encoding="utf-8")  # noqa: SIM115
    if not sys.stdin.isatty():
        raise click.UsageError(
            "Nobody can be asked without a terminal: --dry-run only looks, --yes revokes."
        )
    names = ", ".join(sorted({printable(each["service_user"]) for each in live}))
    confirm(
        f"Credentials to revoke: {len(live)}, of {names}.",
        "Whatever still holds one of these secrets will get no token any more, and a revoked "
        "credential never comes back.",
    )


def _uses(api: "Authority", credential: Json, since: str) -> Json:
    """Return from where and for what it was used; None each if the caller may not read the log."""
    # Here for the reason that `authority` gives.
    from service.cli.api import Forbidden

    addresses: dict[str, Json] = {}
    calls: list[Json] = []
    left_out = 0
    try:
        for record in _records_of(api, credential["id"], since):
            if address := record["client_address"]:
                used = addresses.setdefault(
                    address,
                    {"client_address": address, "uses": 0, "last_at": record["recorded_at"]},
                )
                used["uses"] += record["repeats"]
                used["first_at"] = record["recorded_at"]
            if record["action"] != "token.issue":
                if len(calls) < MAX_CALLS:
                    calls.append(record)
                else:
                    left_out += 1
    except Forbidden:
        return {"addresses": None, "calls": None, "calls_left_out": None}
    return {
        "addresses": list(addresses.values()),
        "calls": calls[::-1],
        "calls_left_out": left_out,
    }


def _records_of(api: "Authority", credential_id: str, since: str) -> Iterator[Json]:
    """Yield exchanges, calls with the tokens of these, and acts of an operator; newest first."""
    pages: dict[str, Any] = {"page_size": 1000, "order": "desc", "since": since}
    for record in api.pages("/audit-records", "records", credential=credential_id, **pages):
        # What else names a credential was done to it, by somebody else.
        if record["action"] == "token.issue" or record["occurred_at"] is not None:
            yield record
    for record in api.pages("/audit-records", "records", actor_credential=credential_id, **pages):
        # What it reported was done by others.
        if record["occurred_at"] is None:
            yield record


def _print(leak: Json, beginning: str, since: str) -> None:
    outcome = {
        "revoked": "is revoked",
        "revoked_before": f"was revoked at {moment(leak['revoked_at'] or '')}",
        "kept": f"is {leak['state']}",
    }[leak["outcome"]]
    name, label = printable(leak["service_user"]), printable(leak["label"])
    click.echo(f"{beginning}  {leak['id']} ({label}) of {name} {outcome}.")
    if leak["detail"]:
        click.echo(click.wrap_text(leak["detail"], _columns(), "  ", "  "))
    used = leak["last_used_at"]
    for title, text in (
        ("service user", f"{name}, {leak['service_user_id']}"),
        ("source system", leak["source_system"]),
        ("owner", leak["owner"]),
        ("contact", leak["contact"]),
        ("created", moment(leak["created_at"])),
        ("last used", moment(used) if used else "never"),
    ):
        click.echo(f"  {title:13}  {printable(text) or '-'}")
    click.echo(click.wrap_text(live_tokens(leak), _columns(), "  ", "  "))
    _print_uses(leak, since)
    click.echo()


def _print_uses(leak: Json, since: str) -> None:
    if leak["addresses"] is None:
        click.echo("  What was done with it: that takes audit:read.")
        return
    click.echo(f"  Addresses since {moment(since)}: {len(leak['addresses']) or 'none'}")
    for used in leak["addresses"]:
        click.echo(
            f"    {printable(used['client_address'])}  {used['uses']} times, "
            f"{moment(used['first_at'])} to {moment(used['last_at'])}"
        )
    calls, left_out = leak["calls"], leak["calls_left_out"]
    click.echo(f"  Calls since {moment(since)}: {len(calls) + left_out or 'none'}")
    if left_out:
        click.echo(
            f"    The last {len(calls)}; all: privyseal audit export --credential {leak['id']} "
            f"--since {since}"
        )
    for call in calls:
        facts = (
            call["action"],
            call["outcome"],
            call["resource"] or call["service_user"],
            call["department"],
            call["client_address"],
        )
        at = moment(call["occurred_at"] or call["recorded_at"])
        click.echo("  ".join(["   ", at, *(printable(fact) for fact in facts if fact)]))


def _columns() -> int:
    return shutil.get_terminal_size().columns
