"""What hostile text does that comes in through the console: nothing (TRIALS A5, A6).

Exports are read as a collector and a spreadsheet read them: line by line, cell by cell. The log of
the process itself is read in tests/browser/test_hostile.py.
"""

import csv
import io
import json
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias
from urllib.parse import quote

import httpx
import pytest

from service.settings import Settings
from tests.http.console_client import ConsoleClient

pytestmark = pytest.mark.anyio

Credential: TypeAlias = tuple[str, str]
Records: TypeAlias = Callable[..., Awaitable[list[dict[str, Any]]]]

FORGED = '{"id":"forged"}'
BREAKS = ("\n", "\r\n", "\r", "\x0b", "\x0c", "\x1b[2K", "\x85", "\u2028", "\u2029", "\u202e")
FORMULAS = ("=1+1", "+1", "-1", "@SUM(A1)")
NEW = {"source_system": "vkyc", "audiences": "https://ingest.example", "token_lifetime": "600"}


@pytest.fixture
async def person(
    client: httpx.AsyncClient, settings: Settings, operator_credential: Credential
) -> ConsoleClient:
    """The first operator, signed in."""
    signed_in = ConsoleClient(client, settings.issuer)
    assert (await signed_in.sign_in(operator_credential)).status_code == 303
    return signed_in


async def test_a5_one_record_stays_one_line_of_an_export(
    person: ConsoleClient, records: Records
) -> None:
    taken = 0
    for number, line_break in enumerate(BREAKS):
        hostile = f"x{line_break}{FORGED}"
        new = {**NEW, "name": f"hostile-{number}", "owner": hostile, "description": hostile}
        answers = [
            await person.post("/sign-in", {"client_id": hostile, "client_secret": hostile}),
            await person.post("/service-users/new", {**new, "name": hostile}),
            await person.post("/signing-keys/rotate", {"reason": hostile}),
            await person.get(f"/audit?resource={quote(hostile)}"),
        ]
        assert all(answer.status_code < 500 for answer in answers)
        made = await person.post("/service-users/new", new)
        if made.status_code == 303:
            taken += 1
            path = made.headers["location"].removeprefix("/console").partition("?")[0]
            credential = {"label": hostile, "lifetime": "30"}
            assert (await person.post(f"{path}/credentials/new", credential)).status_code == 201
        else:
            assert made.status_code == 400
    assert taken > len(BREAKS) / 2
    await records(taken, action="credential.create", outcome="success", source_system="vkyc")
    exported = (await person.get("/audit/export?format=ndjson")).text.splitlines()
    _, *found = [json.loads(line) for line in exported]
    assert "forged" not in {record["id"] for record in found}
    assert sum("forged" in json.dumps(record["details"]) for record in found) >= taken


async def test_a6_no_cell_of_an_export_begins_a_formula(
    person: ConsoleClient, records: Records
) -> None:
    for number, formula in enumerate(FORMULAS):
        agent = {"User_Agent": formula}
        made = await person.post("/service-users/new", {**NEW, "name": f"cells-{number}"}, **agent)
        path = made.headers["location"].removeprefix("/console").partition("?")[0]
        credential = {"label": formula, "lifetime": "30"}
        assert (await person.post(f"{path}/credentials/new", credential)).status_code == 201
        handed_over = {**credential, "label": f"{formula} by link"}
        assert (await person.post(f"{path}/hand-over", handed_over)).status_code == 200
        await person.post("/sign-in", {"client_id": formula, "client_secret": formula}, **agent)
    created = {"action": "service_user.create", "outcome": "success", "source_system": "vkyc"}
    await records(len(FORMULAS), **created)
    table = await person.get("/audit/export?format=csv")
    rows = list(csv.reader(io.StringIO(table.text, newline=""), strict=True))
    cells = {cell for row in rows for cell in row}
    assert {f"'{formula}" for formula in FORMULAS} <= cells
    assert [cell for cell in cells if cell.startswith(("=", "+", "-", "@", "\t", "\r"))] == []
