"""Service users, credentials, tokens by hand and signing keys, from a shell.

Speaks only HTTP, as every operator does: the rights and the records are the authority's.
"""

from typing import Any, Final

import click
from service.cli.arguments import (
    Moment,
    authority,
    confirm,
    credential_argument,
    json_option,
    service_user_argument,
    words,
    yes_option,
)
from service.cli.render import Json, moment, plural, print_fields, print_json, print_table

_SCOPE: Final = "What it may do; repeat it for more, or give a list in quotes."
_LIFETIME: Final = click.IntRange(60, 3600)


@click.group()
def service_users() -> None:
    """Who may get tokens, and for what.

    SU is an id (su_...) or a name.
    """


@service_users.command("create")
@click.option("--name", required=True, help="Unique; lower case, digits, dot, dash, underscore.")
@click.option("--source-system", required=True, help="Which system it is, such as vkyc.")
@click.option("--owner", help="Who answers for it.")
@click.option("--contact", help="Whom to call when it misbehaves or its credential ends.")
@click.option("--description", help="What it is for.")
@click.option("--scope", "scopes", multiple=True, callback=words, help=_SCOPE)
@click.option(
    "--audience",
    "audiences",
    multiple=True,
    help="Where its tokens are for; repeat it for more. The first is the default.",
)
@click.option("--token-lifetime", type=_LIFETIME, help="Seconds that its tokens live.")
@json_option
def create_service_user(as_json: bool, **fields: Any) -> None:
    """Create a service user. It gets tokens once it has a credential.

    \b
    Example:
      privyseal service-users create --name vkyc-prod --source-system vkyc \\
        --owner "Video KYC" --contact vkyc@bank.example \\
        --scope "ingest:write search:read" --audience https://ingest.example
    """
    with authority() as api:
        user = api.post("/service-users", _given(fields))
    if as_json:
        print_json(user)
        return
    print_fields(user)
    click.echo(f"\nNext: privyseal credentials create {user['name']} --label LABEL", err=True)


@service_users.command("list")
@click.option("--source-system", help="Only those of this source system.")
@click.option("--status", type=click.Choice(["active", "disabled"]), help="Only those like this.")
@json_option
def list_service_users(source_system: str | None, status: str | None, as_json: bool) -> None:
    """List service users by name."""
    with authority() as api:
        users = list(
            api.pages(
                "/service-users",
                "service_users",
                page_size=200,
                source_system=source_system,
                status=status,
            )
        )
    if as_json:
        print_json(users)
        return
    print_table(
        users,
        ("name", "source_system", "status", "id"),
        wide=("scopes", "token_lifetime", "owner"),
        nothing="There is no such service user.",
    )


@service_users.command("show")
@service_user_argument
@json_option
def show_service_user(service_user: str, as_json: bool) -> None:
    """Show a service user."""
    with authority() as api:
        user = api.get(f"/service-users/{api.service_user_id(service_user)}")
    print_json(user) if as_json else print_fields(user)


@service_users.command("change")
@service_user_argument
@click.option("--name")
@click.option("--source-system")
@click.option("--owner")
@click.option("--contact")
@click.option("--description")
@click.option("--scope", "scopes", multiple=True, callback=words, help="Instead of all it has.")
@click.option("--add-scope", multiple=True, callback=words, help="Besides those that it has.")
@click.option("--remove-scope", multiple=True, callback=words, help="One that it has.")
@click.option("--audience", "audiences", multiple=True, help="Instead of all it has.")
@click.option("--token-lifetime", type=_LIFETIME, help="Seconds.")
@json_option
def change_service_user(
    service_user: str,
    add_scope: list[str],
    remove_scope: list[str],
    as_json: bool,
    **fields: Any,
) -> None:
    """Change a service user; give only what changes.

    It holds from the next token on. Tokens that were issued before keep their rights until they
    end; the answer says when that is. Who else changed it meanwhile is not overwritten.

    \b
    Examples:
      privyseal service-users change vkyc-prod --add-scope search:read
      privyseal service-users change vkyc-prod --token-lifetime 300 --contact oncall@bank.example
    """
    change = _given(fields)
    if not (change or add_scope or remove_scope):
        raise click.UsageError("There is nothing to change: give at least one option.")
    if "scopes" in change and (add_scope or remove_scope):
        raise click.UsageError(
            "--scope replaces all scopes: --add-scope and --remove-scope cannot go with it."
        )
    with authority() as api:
        path = f"/service-users/{api.service_user_id(service_user)}"
        before = api.get(path)
        if add_scope or remove_scope:
            change["scopes"] = _scopes(before, add_scope, remove_scope)
        _print_changed(api.patch(path, change, version=before["version"]), as_json)


@service_users.command("disable")
@service_user_argument
@yes_option
@json_option
def disable_service_user(service_user: str, yes: bool, as_json: bool) -> None:
    """Stop a service user: from the answer on it gets no token, from any process.

    Tokens that it has already are accepted until they end; the answer says when that is.
    """
    with authority() as api:

        def consequence() -> str:
            path = f"/service-users/{api.service_user_id(service_user)}"
            user, held = api.get(path), api.get_list(f"{path}/credentials", "credentials")
            return _what_disabling_breaks(user, held, is_caller=user["id"] == api.client_id)

        confirm(consequence, yes=yes)
        path = f"/service-users/{api.service_user_id(service_user)}/disable"
        _print_changed(api.post(path, repeatable=True), as_json)


@service_users.command("enable")
@service_user_argument
@json_option
def enable_service_user(service_user: str, as_json: bool) -> None:
    """Let a disabled service user get tokens again, with the credentials that have not ended."""
    with authority() as api:
        path = f"/service-users/{api.service_user_id(service_user)}/enable"
        _print_changed(api.post(path, repeatable=True), as_json)


@click.group()
def credentials() -> None:
    """The secrets with which a service user gets its tokens.

    Up to ten may live side by side, so that one can be replaced without downtime: create the next
    one, roll it out, see in `list` that the old one is used no more, revoke it.

    SU is an id (su_...) or a name.
    """


@credentials.command("create")
@service_user_argument
@click.option(
    "--label", required=True, help="How to tell it from others: who holds it, since when."
)
@click.option(
    "--expires",
    "expires_at",
    type=Moment(ahead=True, end_of_day=True),
    help="A date (through its end, UTC), a time with offset, or a duration. A year unless given.",
)
@json_option
def create_credential(service_user: str, label: str, expires_at: str | None, as_json: bool) -> None:
    """Create a credential and print its secret, which is shown this once.

    \b
    Examples:
      privyseal credentials create vkyc-prod --label "2026 autumn" --expires 2027-01-31
      privyseal credentials create vkyc-prod --label ci --expires 90d --json
    """
    with authority() as api:
        path = f"/service-users/{api.service_user_id(service_user)}/credentials"
        credential = api.post(path, _given({"label": label, "expires_at": expires_at}))
    if as_json:
        print_json(credential)
        return
    names = ("id", "label", "expires_at", "client_id", "client_secret")
    print_fields({name: credential.get(name) for name in names})
    click.echo("\nThe secret is shown this once: store it now.", err=True)


@credentials.command("list")
@service_user_argument
@json_option
def list_credentials(service_user: str, as_json: bool) -> None:
    """List the credentials of a service user, newest first, those that ended included."""
    with authority() as api:
        path = f"/service-users/{api.service_user_id(service_user)}/credentials"
        held = api.get_list(path, "credentials")
    if as_json:
        print_json(held)
        return
    print_table(
        held,
        ("id", "label", "state", "last_used_at"),
        wide=("created_at", "expires_at"),
        nothing=f"{service_user} has no credential: privyseal credentials create {service_user}",
    )


@credentials.command("revoke")
@service_user_argument
@credential_argument
@yes_option
@json_option
def revoke_credential(service_user: str, credential_id: str, yes: bool, as_json: bool) -> None:
    """End a credential: from the answer on it gets no token, from any process.

    Tokens that it got already are accepted until they end; the answer says when that is.
    """
    with authority() as api:
        path = f"/service-users/{api.service_user_id(service_user)}/credentials"

        def consequence() -> str:
            return _what_revoking_breaks(api.get_list(path, "credentials"), credential_id)

        confirm(consequence, yes=yes)
        revoked = api.post(f"{path}/{credential_id}/revoke", repeatable=True)
    if as_json:
        print_json(revoked)
        return
    click.echo(f"{revoked['id']} ({revoked['label']}) is revoked. {_live_tokens(revoked)}")
