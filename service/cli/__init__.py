"""The command `privyseal`: which commands there are, and where each one lives.

Loads a command's module only when that command is used, so that the client half starts fast and
never touches the server's parts.
"""

from importlib import import_module
from typing import Final

import click

# By section of the help: command -> (where it lives, its help in one line).
_SECTIONS: Final = {
    "Commands that work through the API": {
        "service-users": (
            "service.cli.service_users:service_users",
            "Who may get tokens, and for what.",
        ),
        "credentials": ("service.cli.credentials:credentials", "The secrets of a service user."),
        "tokens": ("service.cli.tokens:tokens", "Mint a token by hand, for trying."),
        "keys": (
            "service.cli.signing_keys:keys",
            "Look at the signing keys, rotate and revoke them.",
        ),
        "audit": ("service.cli.audit:audit", "Who did what, when, from where."),
        "token": ("service.cli.tokens:token", "Print an access token, or keep one in a file."),
    },
    "Commands that work where the database is": {
        "serve": ("service.cli.server:serve", "Serve tokens, keys and the admin API."),
        "migrate": ("service.cli.server:migrate_command", "Bring the database to this release."),
        "bootstrap": ("service.cli.server:bootstrap", "Make the first operator."),
        "restore": ("service.cli.server:restore", "Go on after a restore of the database."),
        "doctor": ("service.cli.server:doctor", "Check settings, database, keys and clock."),
    },
}
_COMMANDS: Final = {
    name: place for section in _SECTIONS.values() for name, (place, _) in section.items()
}


class _Commands(click.Group):
    """Knows every command by name and imports the one that is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if (place := _COMMANDS.get(cmd_name)) is None:
            return None
        module, _, attribute = place.partition(":")
        command: click.Command = getattr(import_module(module), attribute)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.exceptions.NoSuchCommand as unknown:
            # Click looks for what was meant among commands that are loaded: none is.
            raise click.exceptions.NoSuchCommand(
                unknown.command_name, possibilities=_COMMANDS, ctx=ctx
            ) from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(map(len, _COMMANDS))
        for title, section in _SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl(
                    [(name.ljust(width), text) for name, (_, text) in section.items()]
                )


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="privyseal")
def main() -> None:
    """Privyseal: short-lived signed tokens for machines, every one on record.

    The commands on the API act as the service user in PRIVYSEAL_CLIENT_ID and
    PRIVYSEAL_CLIENT_SECRET, at the authority in PRIVYSEAL_URL (http://127.0.0.1:8080 unless set).
    `privyseal bootstrap` makes the first operator.

    \b
    Examples:
      privyseal service-users create --name vkyc-prod --source-system vkyc \\
        --scope ingest:write --audience https://ingest.example
      privyseal credentials create vkyc-prod --label "2026 autumn"
      curl -H "Authorization: Bearer $(privyseal token)" https://ingest.example/api/v1/ingest
      privyseal audit list --service-user vkyc-prod --since 2h

    \b
    Exit status: 0 done, 1 refused or out of reach, 2 wrong usage.
    """
