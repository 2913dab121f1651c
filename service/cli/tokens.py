"""`privyseal token` and `privyseal tokens`: an access token for a shell, a file, or a trial.

Prints a token where it is the result, and nowhere else.
"""

from datetime import UTC, datetime
from pathlib import Path

import click

from service.cli.arguments import authority, given, json_option, service_user_argument, words
from service.cli.render import moment, print_json, warn_of_end

scope_option = click.option(
    "--scope",
    "scopes",
    multiple=True,
    callback=words,
    help="Only this; repeat it for more. Else all that is granted for the resource.",
)
resource_option = click.option(
    "--resource", help="Whom the token is for (its aud). Else the first audience."
)


@click.group()
def tokens() -> None:
    """Mint a token by hand, for trying. SU is an id (su_...) or a name."""


@tokens.command()
@service_user_argument
@scope_option
@resource_option
@json_option
def mint(service_user: str, scopes: list[str], resource: str | None, as_json: bool) -> None:
    """Mint and print a token of a service user, without its credential.

    It is on record with your name, and the token itself carries your id (act.sub).

    \b
    Example:
      curl -H "Authorization: Bearer $(privyseal tokens mint vkyc-prod)" https://ingest.example/
    """
    with authority() as api:
        path = f"/service-users/{api.service_user_id(service_user)}/tokens"
        minted = api.post(path, given({"scope": " ".join(scopes) or None, "resource": resource}))
    if as_json:
        print_json(minted)
        return
    click.echo(minted["access_token"])
    ends = moment(datetime.fromtimestamp(minted["expires_at"], UTC).isoformat())
    click.echo(f"jti {minted['jti']}, scope {minted['scope'] or '-'}, ends at {ends}", err=True)


@click.command()
@scope_option
@resource_option
@click.option(
    "--keep",
    "file",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Stay and keep a fresh token in FILE (mode 0600).",
)
@json_option
def token(scopes: list[str], resource: str | None, file: Path | None, as_json: bool) -> None:
    """Print an access token for PRIVYSEAL_CLIENT_ID.

    With --keep it stays, for programs that cannot exchange a credential themselves: FILE holds
    nothing but a token, is replaced in one step, and is renewed at two thirds of the token's
    lifetime. When the authority is away it says so and goes on trying. SIGTERM ends it; FILE
    stays.

    \b
    Examples:
      curl -H "Authorization: Bearer $(privyseal token)" https://ingest.example/api/v1/ingest
      privyseal token --scope search:read --json
      privyseal token --keep /run/vkyc/token
    """
    if file and as_json:
        raise click.UsageError("--keep prints nothing: --json does not fit.")
    scope = " ".join(scopes) or None
    with authority() as api:
        if file:
            # Here for the reason that `authority` gives: it brings the HTTP client along.
            from service.cli.keep import keep

            keep(lambda: api.exchange(scope=scope, resource=resource), file)
        answer = api.exchange(scope=scope, resource=resource)
    if as_json:
        print_json(answer)
    else:
        click.echo(answer["access_token"])
    warn_of_end(answer)
