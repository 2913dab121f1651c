"""What integrators paste: every value arrives as it was typed, whatever language reads it."""

import ast
import json
import shutil
import subprocess
from collections.abc import Callable
from typing import NoReturn

import pytest

from keys.secret import Secret
from service.authority.model import ServiceUser
from service.console.samples import (
    Installation,
    Upload,
    exchange_command,
    node_sample,
    python_sample,
    upload_command,
)

URL = "https://ingest.example/api/v1/ingest"
AT = Installation(
    token_url="https://tokens.example/oauth/token",
    ingest_url=URL,
    ingest_audience="https://ingest.example/it's",
)
FILES = [
    "document.pdf",
    "my document.pdf",
    "it's $(whoami) `id`.pdf",
    'a "quoted"; type=x,y\\z.pdf',
    "-T",
    "Ausweis Müller \N{GRINNING FACE}.pdf",
    "\u2028.pdf",
]


def upload_of(file_name: str) -> Upload:
    return Upload(
        source_system="vkyc",
        department="retail",
        category="kyc_vkyc",
        external_id="session-123",
        file_name=file_name,
    )


def arguments(command: str) -> list[str]:
    """What the program in a command is given, as bash reads it."""
    shown = subprocess.run(
        ("bash", "-c", f"curl() {{ printf '%s\\0' \"$@\"; }}\n{command}"),
        capture_output=True,
        text=True,
        timeout=10,
        env={"PRIVYSEAL_CLIENT_SECRET": "pvs_x", "PATH": ""},
        executable=shutil.which("bash"),
    )
    assert shown.stderr == ""
    return shown.stdout.split("\0")[:-1]


@pytest.mark.parametrize("file_name", FILES)
def test_a_shell_reads_the_command_as_it_was_meant(file_name: str) -> None:
    upload = upload_of(file_name)
    given = arguments(upload_command(URL, upload, Secret("e.y.J")))
    assert given[:4] == ["-sS", "-X", "POST", URL]
    assert given[4:8] == [
        "-H",
        "Authorization: Bearer e.y.J",
        "-H",
        "X-Approver-Department: retail",
    ]
    assert given[8::2] == ["-F", "-F"]
    assert given[9].startswith(("file=@./", 'file=@"./'))
    assert json.loads(given[11].removeprefix("metadata=")) == upload.members


def test_the_exchange_takes_the_secret_from_the_environment(user: ServiceUser) -> None:
    given = arguments(exchange_command(AT, user))
    assert given[:4] == ["-sS", AT.token_url, "-u", f"{user.id}:pvs_x"]
    assert given[4:] == [
        *("-d", "grant_type=client_credentials"),
        *("--data-urlencode", "resource=https://ingest.example/it's"),
    ]


@pytest.mark.parametrize("file_name", FILES)
def test_python_reads_every_value_as_it_was_typed(file_name: str) -> None:
    upload = upload_of(file_name)
    constants = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse(python_sample(AT, URL, upload)).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        if node.targets[0].id.isupper()
    }
    assert constants == {
        "TOKEN_URL": AT.token_url,
        "RESOURCE": AT.ingest_audience,
        "INGEST_URL": URL,
        "DEPARTMENT": "retail",
        "METADATA": upload.members,
        "FILE": f"./{file_name}",
    }


@pytest.mark.parametrize("file_name", FILES)
def test_node_reads_every_value_as_it_was_typed(
    file_name: str, skip_or_fail: Callable[[str], NoReturn]
) -> None:
    if (node := shutil.which("node")) is None:
        skip_or_fail("there is no node")
    upload = upload_of(file_name)
    declared = node_sample(AT, URL, upload).partition("\n\n")[2].partition("\n\n")[0]
    assert declared.startswith("const TOKEN_URL")
    shown = subprocess.run(
        (node, "-e", f"{declared}\nconsole.log(JSON.stringify([FILE, METADATA, RESOURCE]))"),
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert json.loads(shown.stdout) == [f"./{file_name}", upload.members, AT.ingest_audience]


def test_only_the_command_for_a_shell_can_hold_a_token(user: ServiceUser) -> None:
    for sample in (
        exchange_command(AT, user),
        python_sample(AT, URL, upload_of("x")),
        node_sample(AT, URL, upload_of("x")),
    ):
        assert "PRIVYSEAL_CLIENT_SECRET" in sample
        assert "CONSTANTS" not in sample
