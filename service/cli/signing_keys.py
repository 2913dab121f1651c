"""`privyseal keys`: the published signing keys, rotated and revoked by hand.

The private halves never leave the authority.
"""

import re
import shutil
from importlib import import_module
from typing import TYPE_CHECKING, Final
from urllib.parse import quote as quoted

import click

from service.cli.arguments import authority, confirm, json_option, reason_option, yes_option
from service.cli.render import Json, moment, print_fields, print_json, print_table, printable

if TYPE_CHECKING:
    from service.cli.api import Authority

# RFC 7638: SHA-256 in base64url. So one kid in 64 begins with a dash: a command without one-letter
# options can take it for an argument all the same, and `_kid` refuses what was meant as an option.
_KID: Final = re.compile("[A-Za-z0-9_-]{43}")
# What pages and pictures show of one is enough where no other published key begins like it.
_BEGINNING: Final = re.compile("(?!--)[A-Za-z0-9_-]{8,42}")
_SILENT: Final = "no report since it was published"
MAKING_KEYS: Final = 300.0
"""Seconds: `revoke --all` makes two keys first, which in an HSM may take minutes."""
_MAY_THE_NEXT_BE_KNOWN: Final = (
    "If it is the key that signs, the next one takes its place. Could that one have leaked with "
    "it? Then revoke all keys: --all."
)
_KID_MAY_BEGIN_WITH_A_DASH: Final = {
    "ignore_unknown_options": True,
    "help_option_names": ["--help"],
}


def _kid(ctx: click.Context, _: click.Parameter, value: str | None) -> str | None:
    if value is None or _KID.fullmatch(value) or _BEGINNING.fullmatch(value):
        return value
    if value == "-h":
        click.echo(ctx.get_help())
        ctx.exit()
    if value.startswith("-"):
        raise click.NoSuchOption(value, ctx=ctx)
    raise click.BadParameter(
        f"{value!r} is no kid: expected 43 letters, digits, _ or -, as `privyseal keys list` "
        "shows it, or the first 8 of them or more."
    )


def _published(api: "Authority", beginning: str) -> Json:
    """Return the one published key whose kid begins so."""
    found = api.get_list("/signing-keys", "signing_keys")
    keys = [each for each in found if each["kid"].startswith(beginning)]
    if not keys:
        raise click.ClickException(
            f"No published signing key has the kid {printable(beginning)}. `privyseal keys list` "
            "shows those that are published."
        )
    if len(keys) > 1:
        raise click.ClickException(
            f"The kids of {len(keys)} published signing keys begin with {printable(beginning)}. "
            "Give more of it."
        )
    return keys[0]


@click.group()
def keys() -> None:
    """Look at the signing keys, rotate and revoke them.

    Verifiers accept the next one, the one that signs, and those that did until their last token
    has ended.
    """


@keys.command("list")
@json_option
def list_(as_json: bool) -> None:
    """List the published signing keys, the oldest first."""
    with authority() as api:
        found = api.get_list("/signing-keys", "signing_keys")
    if as_json:
        print_json(found)
        return
    print_table(
        found,
        ("kid", "state", "rotate_at"),
        wide=("may_sign_from", "publish_until"),
        nothing="No signing key is published yet.",
    )
    by_state = {key["state"]: key for key in found}
    signing, following = by_state.get("active"), by_state.get("pending")
    if signing and following and signing["rotation_asked_at"]:
        asked_at, ripe_at = moment(signing["rotation_asked_at"]), moment(following["may_sign_from"])
        _explain(
            f"A rotation was asked for at {asked_at}: the next key signs within seconds of "
            f"{max(asked_at, ripe_at)}, by itself."
        )
    if following and following["verifiers"]:
        _print_missing(following["verifiers"])


@keys.command(context_settings=_KID_MAY_BEGIN_WITH_A_DASH)
@click.argument("kid", callback=_kid)
@json_option
def show(kid: str, as_json: bool) -> None:
    """Show one published signing key.

    KID, or how it begins, with 8 characters at least.
    """
    with authority() as api:
        key = _published(api, kid)
    if as_json:
        print_json(key)
        return
    verifiers = key.pop("verifiers")
    print_fields(key)
    if verifiers:
        _print_missing(verifiers)


@keys.command()
@reason_option
@json_option
def rotate(reason: str, as_json: bool) -> None:
    """Let the next key sign before it is due.

    It does so by itself as soon as it was published long enough, so that no verifier notices; the
    answer says when that is.
    """
    with authority() as api:
        rotation = api.post("/signing-keys/rotate", {"reason": reason})
    if as_json:
        print_json(rotation)
        return
    missing, asked_before_at = rotation.pop("missing"), rotation.pop("asked_before_at")
    print_fields(rotation)
    if asked_before_at:
        _explain(f"It was asked for already, at {moment(asked_before_at)}: that was enough.")
    if missing:
        _explain(
            "These verifiers had not loaded the next key. They have until "
            f"{moment(rotation['may_sign_from'])} to fetch it; the rotation does not wait for them:"
        )
        click.echo()
        _print_verifiers(missing)
    click.echo("\nThe next key takes over within seconds of that time, by itself.", err=True)


@keys.command(context_settings=_KID_MAY_BEGIN_WITH_A_DASH)
@click.argument("kid", required=False, callback=_kid)
@click.option("--all", "every", is_flag=True, help="Every published key; two new ones take over.")
@reason_option
@yes_option
@json_option
def revoke(kid: str | None, every: bool, reason: str, yes: bool, as_json: bool) -> None:
    """Revoke the key KID at once: for a key that leaked. Asks first.

    The first 8 characters of KID are enough, or more, where only one published key begins so.

    From the answer on, no process signs with it. If it is the key that signs, the next one takes
    its place at once, which verifiers that have not seen it may refuse for a while: the answer
    says how long, and who holds tokens that are worth nothing now.

    \b
    A leaked key-encryption key, database or host needs more, in this order:
      1. put a new key-encryption key first in KEK_FILE, wherever the authority runs
      2. privyseal keys revoke --all --reason "..."
      3. privyseal keys rewrap
      4. take the old key-encryption key out
    Servers read the file anew by themselves.
    """
    if (kid is None) != every:
        raise click.UsageError("Give one KID, or --all.")
    with authority() as api:
        if kid is not None and not _KID.fullmatch(kid):
            kid = str(_published(api, kid)["kid"])
        if not yes:
            confirm(
                f"{'Every published key' if every else printable(str(kid))} is revoked for good: "
                "tokens that it signed are worth nothing once verifiers read the keys again.",
                *(() if every else (_MAY_THE_NEXT_BE_KNOWN,)),
            )
        path = (
            "/signing-keys/revoke-all"
            if every
            else f"/signing-keys/{quoted(str(kid), safe='')}/revoke"
        )
        revocation = api.post(path, {"reason": reason}, deadline=MAKING_KEYS)
    if as_json:
        print_json(revocation)
        return
    for revoked in revocation["revoked_kids"]:
        click.echo(f"{revoked} is revoked.")
    signing = revocation["signing_kid"]
    click.echo(f"{signing} signs." if signing else "No key signs: look at `privyseal doctor`.")
    fetching, offline = (
        moment(revocation[name]) for name in ("old_accepted_until", "old_accepted_offline_until")
    )
    _explain(
        "Verifiers may accept tokens of a revoked key, and refuse those of a key that is new to "
        f"them, until they read the keys again: by {fetching}; those that cannot reach the "
        f"authority, by {offline}."
    )
    _print_holders(revocation["holders"])
    if revocation["advice"]:
        _explain(revocation["advice"])


def _print_missing(verifiers: list[Json]) -> None:
    missing = [each for each in verifiers if not each["has_loaded"]]
    heard = f"Verifiers heard from in the last two hours: {len(verifiers)}."
    if not missing:
        _explain(f"{heard} Each has loaded the next key.")
        return
    silent = sum(not each["missing_since"] for each in missing)
    _explain(
        f"{heard} Not loaded the next key yet: {len(missing)}; of these have not reported since it "
        f"was published: {silent}."
    )
    click.echo()
    _print_verifiers(missing)


def _print_verifiers(missing: list[Json]) -> None:
    rows = [
        {**each, "missing_since": moment(since) if (since := each["missing_since"]) else _SILENT}
        for each in missing
    ]
    print_table(
        rows, ("service_user", "instance", "last_heard_at"), wide=("missing_since",), nothing=""
    )


def _print_holders(holders: list[Json] | None) -> None:
    if holders is None:
        _explain("Who holds live tokens of it could not be read just now; the revocation is done.")
    elif not holders:
        _explain("Nobody holds a live token of a revoked key.")
    else:
        _explain("These hold live tokens of a revoked key, and have to exchange again:")
        click.echo()
        print_table(holders, ("service_user", "count", "last_ends_at"), nothing="")


def _explain(text: str) -> None:
    columns = shutil.get_terminal_size().columns
    click.echo(f"\n{click.wrap_text(printable(text), columns)}", err=True)


@keys.command()
def rewrap() -> None:
    """Seal every signing key under the first key of KEK_FILE. Works where the database is.

    Put a new key-encryption key into the first line of KEK_FILE, run this, then take the old one
    out. It can be stopped and run again at any point; servers go on, and read the file by
    themselves. Backups from before still open with the old key-encryption key.
    """
    # By name, so that nothing of the server is imported for the other commands.
    import_module("service.cli.server").rewrap()


@keys.command()
@reason_option
@yes_option
def recover(reason: str, yes: bool) -> None:
    """Revoke every signing key and put two new ones in. Works where the database is.

    For when no key can be used any more, so that nobody gets a token for `keys revoke --all`: the
    HSM or the key-encryption key is lost, or is not what it was. One of the new keys signs at once.
    """
    if not yes:
        confirm(
            "Every published key is revoked for good: tokens that they signed are worth nothing "
            "once verifiers read the keys again."
        )
    import_module("service.cli.server").recover(reason)
