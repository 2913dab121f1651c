"""`privyseal service-users`: who may get tokens, and for what.

Speaks only HTTP, as every operator does: the rights and the records are the authority's.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import click

from service.cli.arguments import (
    authority,
    confirm,
    given,
    json_option,
    service_user_argument,
    words,
    yes_option,
)
from service.cli.render import (
    Json,
    live_tokens,
    print_fields,
    print_json,
    print_table,
    printable,
)

_LIFETIME: Final = click.IntRange(60, 3600)


@click.group()
def service_users() -> None:
    """Who may get tokens, and for what. SU is an id (su_...) or a name."""


@service_users.command()
@click.option("--name", required=True, help="Unique: lower case, digits, dot, dash.")
@click.option(
    "--source-system",
    required=True,
    help="The system that it belongs to, as in vkyc: lower case, digits, underscore.",
)
@click.option("--owner", help="Who answers for it.")
@click.option("--contact", help="Whom to call when it misbehaves or its credential ends.")
@click.option("--description", help="What it is for.")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    callback=words,
    help="What it may do; repeat it for more, or give a list in quotes.",
)
@click.option(
    "--audience",
    "audiences",
    multiple=True,
    help="Whom its tokens are for; repeat it for more. The first is the default.",
)
@click.option("--token-lifetime", type=_LIFETIME, help="Seconds that its tokens live.")
@json_option
def create(as_json: bool, **fields: Any) -> None:
    """Create a service user. It gets tokens once it has a credential.

    \b
    Example:
      privyseal service-users create --name vkyc-prod --source-system vkyc \\
        --owner "Video KYC" --contact vkyc@bank.example \\
        --scope "ingest:write search:read" --audience https://ingest.example
    """
    with authority() as api, _saying_whose(fields["name"]):
        user = api.post("/service-users", given(fields))
    if as_json:
        print_json(user)
        return
    print_fields(user)
    click.echo(f"\nNext: privyseal credentials create {user['name']} --label LABEL", err=True)


@service_users.command("list")
@click.option(
    "--search",
    metavar="WORDS",
    help="Only those in whose name, owner or contact each of these words begins one.",
)
@click.option("--source-system", help="Only those of this system.")
@click.option("--status", type=click.Choice(["active", "disabled"]), help="Only those that are.")
@json_option
def list_(search: str | None, source_system: str | None, status: str | None, as_json: bool) -> None:
    """List service users by name."""
    with authority() as api:
        users = list(
            api.pages(
                "/service-users",
                "service_users",
                page_size=200,
                search=search,
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
        wide=("scopes",),
        nothing="There is no such service user.",
    )


@service_users.command()
@service_user_argument
@json_option
def show(service_user: str, as_json: bool) -> None:
    """Show a service user."""
    with authority() as api:
        user = api.get(f"/service-users/{api.service_user_id(service_user)}")
    if as_json:
        print_json(user)
    else:
        print_fields(user)


@service_users.command()
@service_user_argument
@click.option("--name", help="The new name; the id stays.")
@click.option("--source-system", help="The system that it belongs to.")
@click.option("--owner", help="Who answers for it.")
@click.option("--contact", help="Whom to call.")
@click.option("--description", help="What it is for.")
@click.option("--scope", "scopes", multiple=True, callback=words, help="In place of all it has.")
@click.option("--add-scope", multiple=True, callback=words, help="Besides those that it has.")
@click.option("--remove-scope", multiple=True, callback=words, help="One that it has.")
@click.option("--audience", "audiences", multiple=True, help="In place of all it has.")
@click.option("--token-lifetime", type=_LIFETIME, help="Seconds that its tokens live.")
@json_option
def change(
    service_user: str, add_scope: list[str], remove_scope: list[str], as_json: bool, **fields: Any
) -> None:
    """Change a service user; give only what changes.

    It holds from the next token on. Tokens issued before keep their rights until they end; the
    answer says when. A change that somebody else makes meanwhile is not overwritten.

    \b
    Examples:
      privyseal service-users change vkyc-prod --add-scope search:read
      privyseal service-users change vkyc-prod --token-lifetime 300 --contact oncall@bank.example
    """
    changes = given(fields)
    if not (changes or add_scope or remove_scope):
        raise click.UsageError("There is nothing to change: give at least one option.")
    if "scopes" in changes and (add_scope or remove_scope):
        raise click.UsageError("--scope replaces all: --add-scope and --remove-scope do not fit.")
    with authority() as api:
        path = f"/service-users/{api.service_user_id(service_user)}"
        before = api.get(path)
        if add_scope or remove_scope:
            changes["scopes"] = _scopes(before, add_scope, remove_scope)
        with _saying_whose(changes.get("name")):
            changed = api.patch(path, changes, version=before["version"])
        _print_changed(changed, as_json)


@service_users.command()
@service_user_argument
@yes_option
@json_option
def disable(service_user: str, yes: bool, as_json: bool) -> None:
    """Stop a service user. Asks first.

    From the answer on, no process issues it a token. Tokens that it has already are accepted until
    they end; the answer says when.
    """
    with authority() as api:
        path = f"/service-users/{api.service_user_id(service_user)}"
        if not yes:
            user, credentials = api.get(path), api.get_list(f"{path}/credentials", "credentials")
            confirm(*_what_breaks(user, credentials, is_caller=user["id"] == api.client_id))
        _print_changed(api.post(f"{path}/disable", repeatable=True), as_json)


@service_users.command()
@service_user_argument
@json_option
def enable(service_user: str, as_json: bool) -> None:
    """Let a disabled service user get tokens again.

    It gets them with those of its credentials that still live.
    """
    with authority() as api:
        path = f"/service-users/{api.service_user_id(service_user)}"
        user = api.post(f"{path}/enable", repeatable=True)
    if as_json:
        print_json(user)
    else:
        print_fields(_without_tokens(user))


@contextmanager
def _saying_whose(name: str | None) -> Generator[None, None, None]:
    # Here for the reason that `authority` gives.
    from service.cli.api import Taken

    try:
        yield
    except Taken as taken:
        raise Taken(
            f"{taken.message} `privyseal service-users show {name}` shows whose it is."
        ) from None


def _scopes(user: Json, added: Sequence[str], removed: Sequence[str]) -> list[str]:
    """Return the scopes of a user after a change, in the order in which they were granted."""
    has: list[str] = user["scopes"]
    # Misspelt, it would leave a right in place that somebody meant to take away.
    if absent := sorted(set(removed) - set(has)):
        raise click.ClickException(
            f"{user['name']} does not have the scope {printable(absent[0])}; it has: "
            f"{' '.join(has) or 'none'}."
        )
    return [scope for scope in dict.fromkeys([*has, *added]) if scope not in removed]


def _what_breaks(user: Json, credentials: Sequence[Json], *, is_caller: bool) -> list[str]:
    live = sum(credential["state"] == "live" for credential in credentials)
    consequences = [
        f"{user['name']} ({user['id']}, source system {user['source_system']}) will get no token "
        f"any more. Live credentials that stop working: {live}.",
        "Tokens that it has stay accepted to their end (token_lifetime: "
        f"{user['token_lifetime']} s), and up to CLOCK_SKEW (60 s) longer where a verifier's clock "
        "allows it; what runs as it stands still after that.",
        f"Owner: {printable(user['owner']) or 'not named'}. "
        f"Contact: {printable(user['contact']) or 'not named'}.",
    ]
    if is_caller:
        consequences.append("This is the service user that you act as: you shut yourself out.")
    return consequences


def _print_changed(user: Json, as_json: bool) -> None:
    if as_json:
        print_json(user)
        return
    print_fields(_without_tokens(user))
    click.echo(f"\n{live_tokens(user)}", err=True)


def _without_tokens(user: Json) -> Json:
    return {name: value for name, value in user.items() if name != "live_tokens"}
