"""`privyseal keys`: the published signing keys, rotated and revoked by hand.

The private halves never leave the authority.
"""

from importlib import import_module
from urllib.parse import quote as quoted

import click

from service.cli.arguments import authority, confirm, json_option, yes_option
from service.cli.render import print_fields, print_json, print_table, printable

reason_option = click.option(
    "--reason", required=True, help="Why: 3 to 200 characters; it goes on record."
)


@click.group()
def keys() -> None:
    """The signing keys that verifiers accept: the next one, the one that signs, those that did."""


@keys.command("list")
@json_option
def list_(as_json: bool) -> None:
    """List the published signing keys, in the order of their publication."""
    with authority() as api:
        found = api.get_list("/signing-keys", "signing_keys")
    if as_json:
        print_json(found)
        return
    print_table(
        found,
        ("kid", "state", "activated_at"),
        wide=("may_sign_from", "rotate_at", "publish_until"),
        nothing="No signing key is published yet.",
    )


@keys.command()
@click.argument("kid")
@json_option
def show(kid: str, as_json: bool) -> None:
    """Show one published signing key."""
    with authority() as api:
        found = api.get_list("/signing-keys", "signing_keys")
    key = next((each for each in found if each["kid"] == kid), None)
    if key is None:
        raise click.ClickException(
            f"No published signing key has the kid {printable(kid)}. `privyseal keys list` shows "
            "those that are published."
        )
    if as_json:
        print_json(key)
    else:
        print_fields(key)


@keys.command()
@reason_option
@json_option
def rotate(reason: str, as_json: bool) -> None:
    """Let the next key sign now, or as soon as it was published long enough.

    No verifier notices: the next key is published already. The answer says when it may sign, and
    it does so then by itself.
    """
    with authority() as api:
        rotation = api.post("/signing-keys/rotate", {"reason": reason}, repeatable=True)
    if as_json:
        print_json(rotation)
    else:
        print_fields(rotation)


@keys.command()
@click.argument("kid", required=False)
@click.option("--all", "every", is_flag=True, help="Every published key; two new ones take over.")
@reason_option
@yes_option
@json_option
def revoke(kid: str | None, every: bool, reason: str, yes: bool, as_json: bool) -> None:
    """Revoke the key KID at once: for a key that leaked. Asks first.

    From the answer on, no process signs with it. If it is the key that signs, the next one takes
    its place at once, which verifiers that have not seen it may refuse for a while: the answer
    says how long, and who holds tokens that are worth nothing now.

    \b
    A leaked key-encryption key, database or host needs more, in this order:
      1. put a new key-encryption key first in KEK_FILE, and restart
      2. privyseal keys revoke --all --reason "..."
      3. privyseal keys rewrap
      4. take the old key-encryption key out, and restart
    """
    if (kid is None) != every:
        raise click.UsageError("Give one KID, or --all.")
    with authority() as api:
        if not yes:
            confirm(
                f"{'Every published key' if every else printable(str(kid))} is revoked for good: "
                "tokens that it signed are worth nothing once verifiers read the keys again."
            )
        path = "/signing-keys/revoke-all" if every else f"/signing-keys/{quoted(str(kid))}/revoke"
        revocation = api.post(path, {"reason": reason})
    if as_json:
        print_json(revocation)
        return
    holders = revocation.pop("holders")
    advice = revocation.pop("advice")
    print_fields(revocation)
    click.echo()
    print_table(
        holders,
        ("service_user", "count", "last_ends_at"),
        nothing="Nobody holds a live token of it.",
    )
    if advice:
        click.echo(f"\n{advice}", err=True)


@keys.command()
def rewrap() -> None:
    """Seal every signing key under the first key of KEK_FILE. Works where the database is.

    Put a new key-encryption key into the first line of KEK_FILE, run this, then take the old one
    out. It can be stopped and run again at any point; servers go on, and read the file by
    themselves. Backups from before still open with the old key-encryption key.
    """
    # By name, so that nothing of the server is imported for the other commands.
    import_module("service.cli.server").rewrap()
