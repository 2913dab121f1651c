"""`privyseal keys`: the published signing keys.

Shows them; the private halves never leave the authority.
"""

import click

from service.cli.arguments import authority, json_option
from service.cli.render import print_fields, print_json, print_table, printable


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
        wide=("rotate_at", "publish_until"),
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
