"""`privyseal credentials`: the secrets of a service user.

A secret is printed once, as the result of what made it; nothing here keeps or repeats it.
"""

from collections.abc import Sequence

import click

from service.cli.arguments import (
    Moment,
    authority,
    confirm,
    credential_argument,
    credential_id,
    given,
    json_option,
    reason_option,
    service_user_argument,
    yes_option,
)
from service.cli.leaked import leaked
from service.cli.render import (
    Json,
    live_tokens,
    moment,
    print_fields,
    print_json,
    print_table,
    printable,
)


@click.group()
def credentials() -> None:
    """The secrets with which a service user gets its tokens. SU is an id (su_...) or a name.

    Up to ten live side by side, so that one is replaced without downtime: create the next one,
    roll it out, see in `list` that the old one is used no more, revoke the old one.
    """


credentials.add_command(leaked)

expires_option = click.option(
    "--expires",
    "expires_at",
    type=Moment(ahead=True, end_of_day=True),
    help="A date (through its end, UTC), a time with offset, or a duration; else a year.",
)


@credentials.command()
@service_user_argument
@click.option(
    "--label", required=True, help="Who holds it, or since when: no other live one has it."
)
@expires_option
@json_option
def create(service_user: str, label: str, expires_at: str | None, as_json: bool) -> None:
    """Create a credential and print its secret, this once.

    \b
    Examples:
      privyseal credentials create vkyc-prod --label "2026 autumn" --expires 2027-01-31
      privyseal credentials create vkyc-prod --label ci --expires 90d --json
    """
    with authority() as api:
        path = f"/service-users/{api.service_user_id(service_user)}/credentials"
        created = api.post(path, given({"label": label, "expires_at": expires_at}))
    if as_json:
        print_json(created)
        return
    names = ("id", "label", "expires_at", "client_id", "client_secret")
    print_fields({name: created.get(name) for name in names})
    click.echo("\nThe secret is shown this once: store it now.", err=True)


@credentials.command()
@click.option("--label", required=True, help="What to call the new one: to tell it by.")
@json_option
def rotate(label: str, as_json: bool) -> None:
    """Replace your own credential and print the new secret.

    It is shown this once. The old one is that in PRIVYSEAL_CLIENT_SECRET: it ends seven days later,
    or sooner if it would have anyway, which cannot be taken back. The new one lives as long as the
    old one was made for. This takes no scope, but a token for ISSUER/api/v1, an audience that an
    operator adds.

    \b
    Example:
      privyseal credentials rotate --label "2027 spring" --json
    """
    with authority() as api:
        made = api.post("/service-users/me/credentials/rotate", {"label": label})
    if as_json:
        print_json(made)
        return
    names = ("id", "label", "expires_at", "client_id", "client_secret")
    print_fields({name: made.get(name) for name in names})
    old = made["old"]
    click.echo(
        f"\nThe secret is shown this once: store it now. {old['id']} ({printable(old['label'])}) "
        f"gets tokens until {moment(old['expires_at'])}.",
        err=True,
    )


@credentials.command("hand-over")
@service_user_argument
@click.option("--label", required=True, help="Who will hold it: no other live one has it.")
@expires_option
@json_option
def hand_over(service_user: str, label: str, expires_at: str | None, as_json: bool) -> None:
    """Create a credential and print a link to its secret.

    The secret is made when whoever shall hold it opens the link, once and within 24 hours: nobody
    else ever sees it.
    """
    with authority() as api:
        path = f"/service-users/{api.service_user_id(service_user)}/hand-overs"
        offered = api.post(path, given({"label": label, "expires_at": expires_at}))
    if as_json:
        print_json(offered)
        return
    names = ("id", "label", "expires_at", "code_ends_at", "link")
    print_fields({name: offered.get(name) for name in names})
    click.echo("\nThe link is shown this once: send it now, to one person.", err=True)


@credentials.command("list")
@service_user_argument
@json_option
def list_(service_user: str, as_json: bool) -> None:
    """List the credentials of a service user, the newest first.

    Those that ended are among them. Where one has it: held_at is when a restore of the database
    held it, until `credentials confirm`; a hand-over can be opened until code_ends_at, and was at
    opened_at.
    """
    with authority() as api:
        path = f"/service-users/{api.service_user_id(service_user)}/credentials"
        held = api.get_list(path, "credentials")
    if as_json:
        print_json(held)
        return
    rare = [
        name
        for name in ("held_at", "code_ends_at", "opened_at")
        if any(each.get(name) for each in held)
    ]
    print_table(
        held,
        ("id", "label", "state", "last_used_at"),
        wide=("created_at", "expires_at", *rare),
        nothing=f"{printable(service_user)} has no credential.",
    )


@credentials.command()
@service_user_argument
@credential_argument
@yes_option
@json_option
def revoke(service_user: str, credential_id: str, yes: bool, as_json: bool) -> None:
    """End a credential for good. Asks first.

    From the answer on, no process issues a token for it. Tokens that it got already are accepted
    until they end; the answer says when.
    """
    with authority() as api:
        path = f"/service-users/{api.service_user_id(service_user)}/credentials"
        if not yes:
            confirm(*_what_breaks(api.get_list(path, "credentials"), credential_id))
        revoked = api.post(f"{path}/{credential_id}/revoke", repeatable=True)
    if as_json:
        print_json(revoked)
        return
    click.echo(f"{revoked['id']} ({printable(revoked['label'])}) is revoked.")
    click.echo(live_tokens(revoked), err=True)


@credentials.command("confirm")
@click.argument("service_user", metavar="[SU]", required=False)
@click.argument("credential_id", metavar="[CREDENTIAL]", required=False, callback=credential_id)
@click.option("--all", "every", is_flag=True, help="Those of every service user.")
@reason_option
@yes_option
@json_option
def confirm_(
    service_user: str | None,
    credential_id: str | None,
    every: bool,
    reason: str,
    yes: bool,
    as_json: bool,
) -> None:
    """Confirm held credentials. Asks first.

    Those of a service user, one of them, or with --all those of every service user. After a restore
    of the database every credential is held: it gets no token until somebody confirms it. Nobody
    can tell which were revoked after the backup: confirm only what you know to be good, and revoke
    what you do not.

    \b
    Examples:
      privyseal credentials confirm vkyc-prod --reason "in use at branch 7, asked by phone"
      privyseal credentials confirm --all --reason "nothing was revoked since the backup"
    """
    if (service_user is None) != every:
        raise click.UsageError("Give one SU, or --all.")
    with authority() as api:
        su = None if service_user is None else api.service_user_id(service_user)
        if not yes:
            confirm(
                f"{printable(credential_id or service_user or 'Every service user')}: what is held "
                "gets tokens again, and with it whatever was revoked after the backup."
            )
        if credential_id is None:
            what = given({"reason": reason, "service_user_id": su})
            done = api.post("/credentials/confirm", what, repeatable=True)
        else:
            path = f"/service-users/{su}/credentials/{credential_id}/confirm"
            done = api.post(path, {"reason": reason}, repeatable=True)
    if as_json:
        print_json(done)
    elif credential_id is not None:
        click.echo(f"{done['id']} ({printable(done['label'])}) is confirmed.")
    else:
        click.echo(f"Confirmed: {done['confirmed']}.")
        _print_left(done["left"])


def _print_left(left: Sequence[Json]) -> None:
    if left:
        click.echo(
            "\nStill held, because you lack admin scopes that their service users have:", err=True
        )
        print_table(left, ("service_user", "id", "label"), nothing="")


def _what_breaks(held: Sequence[Json], credential_id: str) -> list[str]:
    credential = next((each for each in held if each["id"] == credential_id), None)
    if credential is None:
        raise click.ClickException(
            f"This service user has no credential {credential_id}. `privyseal credentials list` "
            "shows those that it has."
        )
    used = credential["last_used_at"]
    others = sum(each["state"] == "live" for each in held if each is not credential)
    return [
        f"{credential_id} ({printable(credential['label'])}) is {credential['state']}; last used: "
        f"{moment(used) if used else 'never'}.",
        "Whatever still holds its secret will get no token any more, and a revoked credential "
        "never comes back.",
        f"Other live credentials of its service user: {others}.",
    ]
