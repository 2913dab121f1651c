"""An export proves itself: `audit verify` checks it offline, and names whatever was changed in it.

It must not know how a proof is made, only what is in the file.
"""

import hashlib
import json
import time
from base64 import b64decode
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeAlias

import asyncpg
import httpx
import jwt
import pytest
from click.testing import CliRunner

from keys.checkpoint import Checkpoint, NoteVerifier
from keys.envelope import KeyEncryptionKeys
from keys.log_key import new_log_key, open_log_key
from keys.verifier.strict import base64url_encode
from service.authority.audit import new_record_id
from service.authority.audit.export import PAGE
from service.authority.audit.exported import Pinning
from service.authority.audit.merkle import Frontier
from service.cli import main
from service.settings import LOCAL_AUDIENCE, Settings
from service.store.audit_logs import newest_vkey
from service.store.checkpoint_files import CheckpointFiles
from service.store.embedded import Running
from service.store.export_files import verify_export

pytestmark = pytest.mark.anyio

Credential: TypeAlias = tuple[str, str]
Enrol: TypeAlias = Callable[..., Awaitable[Credential]]
SignIn: TypeAlias = Callable[..., Awaitable[httpx.AsyncClient]]
SQL: TypeAlias = Callable[..., Awaitable[list[asyncpg.Record]]]
Lines: TypeAlias = list[dict[str, Any]]

EXPORT = "/api/v1/audit-records/export"
CHECKPOINT = "/api/v1/audit/checkpoint"
CALLS = 1000
RARE = 97
"""Of so many calls one failed."""


@pytest.fixture
async def vkeys(database: Running, operator_credential: Credential) -> list[str]:
    """What a reader has pinned: the verifier key of the log, to which a test may add others."""
    assert operator_credential[0], "the log is open"
    connection = await asyncpg.connect(database.owner_dsn.reveal(), timeout=10)
    try:
        vkey = await newest_vkey(connection)
    finally:
        await connection.close(timeout=5)
    assert vkey is not None
    return [vkey]


class Verify:
    """Runs `privyseal audit verify` on lines, with nothing of the service but verifier keys."""

    def __init__(self, directory: Path, vkeys: list[str]) -> None:
        self._file = directory / "export.ndjson"
        self._checkpoint = directory / "kept.txt"
        self._vkeys = vkeys

    def __call__(
        self, content: bytes | Lines, checkpoint: bytes | None = None, *, exits: int = 0
    ) -> dict[str, Any]:
        done = self.printed(content, checkpoint, "--json")
        assert done.exit_code == exits, done.output
        return json.loads(done.stdout)

    def printed(
        self, content: bytes | Lines, checkpoint: bytes | None = None, *options: str
    ) -> Any:
        self._file.write_bytes(content if isinstance(content, bytes) else written(content))
        arguments = [part for vkey in self._vkeys for part in ("--key", vkey)]
        if checkpoint is not None:
            self._checkpoint.write_bytes(checkpoint)
            arguments += ["--checkpoint", str(self._checkpoint)]
        return CliRunner(env={"PRIVYSEAL_DATABASE_URL": None}).invoke(
            main, ["audit", "verify", str(self._file), *arguments, *options]
        )


@pytest.fixture
def verify(tmp_path: Path, vkeys: list[str]) -> Verify:
    return Verify(tmp_path, vkeys)


@pytest.fixture
async def calls(
    client: httpx.AsyncClient, vkyc: Credential, enrol: Enrol, sign_in: SignIn, settings: Settings
) -> int:
    """A thousand reported calls, of which eleven failed: more than a stored subtree, and pages."""
    audiences = [settings.api_audience, LOCAL_AUDIENCE]
    reporter = await sign_in(await enrol("ingest", scopes=["audit:report"], audiences=audiences))
    answer = await client.post("/oauth/token", auth=vkyc, data={"grant_type": "client_credentials"})
    token = answer.json()["access_token"]
    signing_input = token.rpartition(".")[0]
    event = {
        "type": "api.call",
        "occurred_at": datetime.fromtimestamp(time.time(), UTC).isoformat(),
        "jti": jwt.decode(token, options={"verify_signature": False})["jti"],
        "kid": jwt.get_unverified_header(token)["kid"],
        "signing_input_sha256": base64url_encode(hashlib.sha256(signing_input.encode()).digest()),
        "action": "document.ingest",
        "resource": "documents/0c1f",
        "request_id": "r-1",
        "department": "retail",
    }
    events = [
        {
            **event,
            "id": str(new_record_id(time.time())),
            "outcome": "success" if number % RARE else "failed",
        }
        for number in range(CALLS)
    ]
    answer = await reporter.post("/api/v1/audit-events", json={"events": events})
    assert {result["status"] for result in answer.json()["results"]} == {"recorded"}
    return len(range(0, CALLS, RARE))


def written(lines: Lines) -> bytes:
    """Write lines as they are exported: without white space."""
    return b"".join(
        json.dumps(line, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"
        for line in lines
    )


async def export(operator: httpx.AsyncClient, **query: Any) -> bytes:
    answer = await operator.get(EXPORT, params=query)
    assert answer.status_code == 200, answer.text
    return answer.content


def parsed(content: bytes) -> Lines:
    return [json.loads(line) for line in content.splitlines()]


async def test_a_whole_export_verifies_offline_with_any_checkpoint_that_was_kept_before(
    operator: httpx.AsyncClient, client: httpx.AsyncClient, calls: int, verify: Verify
) -> None:
    kept = (await client.get(CHECKPOINT)).content
    whole = await export(operator)
    lines = parsed(whole)
    assert len(lines) > max(CALLS, 2 * PAGE)
    assert [line["leaf_index"] for line in lines[1:]] == list(range(len(lines) - 1))
    assert not any("proof" in line for line in lines), "nothing lies between them"
    assert lines[-1]["action"] == "audit.export", "the last one is the export's own record"

    alone = verify(whole)
    assert alone["logs"][0]["size"] == alone["logs"][0]["records"] == len(lines) - 1
    assert "own checkpoint vouches" in alone["notices"][0]
    compared = verify(whole, kept)
    assert (compared["logs"][0]["checkpoints_outside"], compared["logs"][0]["flaws"]) == (1, 0)
    printed = verify.printed(whole, lines[0]["checkpoint"].encode())
    assert (printed.exit_code, printed.stderr) == (0, "")
    assert "Nothing was changed." in printed.stdout


async def test_a_filtered_export_proves_each_of_its_records_and_goes_with_a_named_checkpoint(
    operator: httpx.AsyncClient,
    calls: int,
    verify: Verify,
    sql: SQL,
    keks: KeyEncryptionKeys,
    settings: Settings,
) -> None:
    whole = parsed(await export(operator))
    some = await export(operator, outcome="failed")
    lines = parsed(some)
    assert len(lines) == calls + 1
    report = verify(some)["logs"][0]
    assert (report["records"], report["flaws"]) == (calls, 0)
    assert report["size"] > CALLS

    # A checkpoint from between two of its records, and none of those that are kept: where no proof
    # has to have a seam.
    have_seams = await CheckpointFiles(settings.checkpoint_path).sizes(1)
    middle = (lines[3]["leaf_index"] + RARE // 2) | 1
    size = next(each for each in range(middle, middle + RARE // 3, 2) if each not in have_seams)
    sealed = (await sql("SELECT sealed_private FROM audit_logs"))[0]["sealed_private"]
    frontier = Frontier()
    for line in whole[1 : size + 1]:
        frontier.append(b64decode(line["leaf_hash"]))
    kept = Checkpoint(origin=settings.log_origin, size=size, root=frontier.root()).signed(
        open_log_key(settings.log_origin, sealed, keks)
    )
    told = verify(some, kept, exits=3)["logs"][0]
    assert (told["first_bad"]["flaw"], told["flaws"]) == ("uncompared", 1)
    assert told["first_bad"]["words"].endswith("/kept.txt` and the same filters.")
    printed = verify.printed(some, kept)
    assert (printed.exit_code, "NOT COMPARED" in printed.stdout) == (3, True)
    tampered = _edited(parsed(some), 1, scope="all")
    assert verify.printed(tampered, kept).exit_code == 1, "the worse one counts"
    named = await export(operator, outcome="failed", checkpoint_size=size)
    compared = verify(named, kept)["logs"][0]
    assert (compared["records"], compared["checkpoints_outside"]) == (calls, 1)

    nothing = await export(operator, source_system="none")
    assert len(parsed(nothing)) == 1
    assert verify(nothing)["logs"][0]["records"] == 0


def _edited(lines: Lines, at: int, **members: Any) -> Lines:
    return [*lines[:at], {**lines[at], **members}, *lines[at + 1 :]]


AT = 300
"""The place of what is changed."""

Tampering: TypeAlias = tuple[Callable[[Lines], Lines], str]

UNTOUCHED: dict[str, Tampering] = {"nothing": (lambda lines: lines, "")}
TAMPERINGS: dict[str, Tampering] = {
    "outcome": (lambda lines: _edited(lines, AT + 1, outcome="refused"), "edited"),
    "recorded_at": (
        lambda lines: _edited(lines, AT + 1, recorded_at="2026-01-01T00:00:00Z"),
        "edited",
    ),
    "a time without its offset": (
        lambda lines: _edited(lines, AT + 1, recorded_at="2026-01-01T00:00:00"),
        "edited",
    ),
    "an id that is none": (lambda lines: _edited(lines, AT + 1, id="x", cursor="1.x"), "edited"),
    "a cursor of 5,000 digits": (
        lambda lines: _edited(lines, AT + 1, cursor=f"{'9' * 5000}.{lines[AT + 1]['id']}"),
        "edited",
    ),
    "details": (lambda lines: _edited(lines, AT + 1, details={"more": 1.5}), "edited"),
    "another member": (lambda lines: _edited(lines, AT + 1, note="paid"), "edited"),
    "the id it is found by": (
        lambda lines: _edited(lines, AT + 1, cursor=lines[AT]["cursor"]),
        "edited",
    ),
    "the log it is of": (
        lambda lines: _edited(lines, AT + 1, log_origin="other.example/audit/1"),
        "edited",
    ),
    "address": (lambda lines: _edited(lines, AT + 1, client_address="192.0.2.1"), "personal"),
    "a value where one was erased": (
        lambda lines: _edited(
            lines,
            AT + 1,
            client_address=None,
            user_agent=None,
            personal_salt=None,
            department="wealth",
            resource=None,
        ),
        "personal",
    ),
    "a salt that is none": (lambda lines: _edited(lines, AT + 1, personal_salt="zz"), "edited"),
    "dropped": (lambda lines: [*lines[: AT + 1], *lines[AT + 2 :]], "missing"),
    "swapped": (
        lambda lines: [*lines[: AT + 1], lines[AT + 2], lines[AT + 1], *lines[AT + 3 :]],
        "missing",
    ),
    "twice": (lambda lines: [*lines[: AT + 1], lines[AT], *lines[AT + 1 :]], "inserted"),
    "cut": (lambda lines: lines[: AT + 1], "missing"),
    "no record": (lambda lines: [*lines[: AT + 1], {"id": 1}, *lines[AT + 2 :]], "edited"),
}


async def test_what_was_done_to_an_export_is_found_and_the_first_bad_record_named(
    operator: httpx.AsyncClient, calls: int, verify: Verify
) -> None:
    lines = parsed(await export(operator))
    for what, (tampering, flaw) in TAMPERINGS.items():
        found = verify(tampering(lines), exits=1)["logs"][0]["first_bad"]
        at = AT - 1 if what == "twice" else AT
        assert (found["flaw"], found["index"]) == (flaw, at), (what, found)
    not_text = written(lines).replace(b"retail", b"ret\xffil", 1)
    assert verify(not_text, exits=1)["logs"][0]["first_bad"]["flaw"] == "edited"
    printed = verify.printed(TAMPERINGS["outcome"][0](lines))
    assert f"TAMPERED. Record {AT}" in printed.stdout


async def test_however_it_is_shared_out_between_processes_the_same_is_found(
    operator: httpx.AsyncClient, calls: int, tmp_path: Path, vkeys: list[str]
) -> None:
    lines = parsed(await export(operator))
    pinning = Pinning(verifier=NoteVerifier.parse(vkeys[0]), outside=())
    file = tmp_path / "export.ndjson"
    for what, (tampering, _) in {**UNTOUCHED, **TAMPERINGS}.items():
        file.write_bytes(written(tampering(lines)))
        found = [
            verify_export(
                file,
                pinning=lambda _: pinning,
                cuts=(),
                processes=processes,
                on_progress=lambda _: None,
                chunk=chunk,
            )
            for processes, chunk in ((1, 1 << 22), (2, 50_000), (1, 3_000))
        ]
        assert found[0] == found[1] == found[2], what
        assert bool(found[0][0].findings) == (what != "nothing")


async def test_an_edited_record_with_its_hash_made_to_fit_is_found_by_the_checkpoint(
    operator: httpx.AsyncClient, calls: int, verify: Verify
) -> None:
    """Only what was signed knows better than a file that was rewritten with care."""
    lines = parsed(await export(operator, outcome="failed"))
    # The hash of a neighbour stands in for one that was computed.
    forged = _edited(lines, 3, leaf_hash=lines[4]["leaf_hash"])
    findings = verify(forged, exits=1)["logs"][0]["findings"]
    assert "rewritten" in {finding["flaw"] for finding in findings}
    other = _edited(lines, 2, proof=lines[3]["proof"])
    assert verify(other, exits=1)["logs"][0]["first_bad"]["flaw"] == "missing"
    edited = _edited(lines, 5, outcome="success")
    found = verify(edited, exits=1)["logs"][0]["first_bad"]
    assert (found["flaw"], found["index"]) == ("edited", lines[5]["leaf_index"])


async def test_a_record_that_is_in_no_leaf_is_handed_out_and_nothing_proves_it(
    operator: httpx.AsyncClient, vkyc: Credential, verify: Verify, sql: SQL
) -> None:
    await export(operator)  # so that all that comes before it has its place
    columns = (
        "commit_order, recorded_at, action, outcome, service_user_id, service_user,"
        " source_system, version, request_id, repeats, details"
    )
    await sql(
        f"INSERT INTO audit_records (id, {columns}) SELECT $1, {columns} FROM audit_records"
        " WHERE action = 'credential.create' LIMIT 1",
        new_record_id(time.time()),
    )
    lines = parsed(await export(operator, service_user="vkyc-prod"))
    assert len(lines) == 4
    found = verify(lines, exits=1)["logs"][0]["first_bad"]
    assert (found["flaw"], found["index"]) == ("inserted", None)
    assert "nothing proves it" in found["words"]


async def test_what_was_erased_is_no_tampering_and_a_checkpoint_of_another_key_is(
    operator: httpx.AsyncClient,
    calls: int,
    verify: Verify,
    settings: Settings,
    vkeys: list[str],
    keks: KeyEncryptionKeys,
) -> None:
    lines = parsed(await export(operator))
    values = ("client_address", "user_agent", "resource", "department", "personal_salt")
    report = verify(_edited(lines, AT + 1, **dict.fromkeys(values)))["logs"][0]
    assert (report["erased"], report["flaws"]) == (1, 0)

    stranger, _ = new_log_key(settings.log_origin, keks)
    vkeys[:] = [stranger.verifier.vkey]
    found = verify(lines, exits=1)["logs"][0]["first_bad"]
    assert found["flaw"] == "checkpoint"
    vkeys.clear()
    without = verify.printed(lines)
    assert (without.exit_code, "give its verifier key" in without.stderr) == (2, True)


async def test_a_file_that_is_no_export_is_refused_in_words(
    operator: httpx.AsyncClient, vkyc: Credential, verify: Verify
) -> None:
    lines = parsed(await export(operator))
    headless = verify.printed(lines[1:])
    assert (headless.exit_code, "does not begin with a checkpoint" in headless.stderr) == (1, True)
    table = verify.printed(await export(operator, format="csv"))
    assert (table.exit_code, "Export NDJSON" in table.stderr) == (2, True)


async def test_a_key_is_found_in_what_migrate_printed_and_what_is_none_is_named(
    operator: httpx.AsyncClient, verify: Verify, vkeys: list[str], tmp_path: Path
) -> None:
    whole = await export(operator)
    (vkey,) = vkeys
    file = tmp_path / "vkey"
    file.write_text(f"Nothing to do.\nVerifier key of the audit log: {vkey}\n")
    vkeys[:] = [str(file)]
    assert verify(whole)["ok"]
    file.write_text("Nothing to do.\n")
    for given, said in (
        (str(file), f"{file} has no verifier key"),
        (f"{file}s", f"there is no file {file}s, and it is no verifier key"),
        (vkey[:-1], "that is not base64"),
    ):
        vkeys[:] = [given]
        refused = verify.printed(whole)
        assert (refused.exit_code, said in refused.stderr) == (2, True), refused.stderr


async def test_records_of_a_second_log_come_under_a_checkpoint_of_their_own(
    operator: httpx.AsyncClient,
    vkyc: Credential,
    verify: Verify,
    vkeys: list[str],
    sql: SQL,
    settings: Settings,
    keks: KeyEncryptionKeys,
) -> None:
    await export(operator)  # so that all that comes before it has its place
    origin = settings.log_origin.removesuffix("1") + "2"
    signer, sealed = new_log_key(origin, keks)
    vkeys.append(signer.verifier.vkey)
    await sql(
        "INSERT INTO audit_logs (log, origin, public_key, sealed_private, begins_after,"
        "                        begins_after_id, opened_at)"
        " SELECT 2, $1, $2, $3, commit_order, last_id, now() FROM audit_checkpoints"
        "  ORDER BY size DESC LIMIT 1",
        origin,
        signer.verifier.public_key.public_bytes_raw(),
        sealed,
    )
    whole = await export(operator)
    lines = parsed(whole)
    headers = [place for place, line in enumerate(lines) if "checkpoint" in line]
    assert [lines[place]["log_origin"] for place in headers] == [settings.log_origin, origin]
    assert [line["leaf_index"] for line in lines if "id" in line] == [
        *range(headers[1] - 1),
        *range(len(lines) - headers[1] - 1),
    ]
    reports = verify(whole)["logs"]
    assert [report["origin"] for report in reports] == [settings.log_origin, origin]
    assert sum(report["records"] for report in reports) == len(lines) - 2
    # Which log a place is in stands beside it wherever it is shown.
    first, last = lines[1], lines[-1]
    for record, log_origin in ((first, settings.log_origin), (last, origin)):
        assert record["log_origin"] == log_origin
        proof = (await operator.get(f"/api/v1/audit-records/{record['id']}/proof")).json()
        assert proof["log_origin"] == log_origin
        assert proof["checkpoint"].startswith(f"{log_origin}\n")
        assert proof["leaf_index"] == record["leaf_index"]
    consistency = (await operator.get("/api/v1/audit/consistency")).json()
    assert consistency["log_origin"] == origin
