"""The Upload page in a browser, and what it gives to paste, run as an integrator runs it."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import Console, NewContext, SignIn


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where an integrator works: with a document."""
    (tmp_path / "document.pdf").write_bytes(b"%PDF-1.7\n")
    return tmp_path


def in_bash(command: str, folder: Path) -> Any:
    """Run what was copied, and return the JSON that it printed."""
    done = subprocess.run(
        ("bash", "-c", command), cwd=folder, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def run(*command: str, credential: tuple[str, str], folder: Path) -> str:
    """Run a program with a credential in its environment, and return what it printed."""
    environ = {
        **os.environ,
        "PRIVYSEAL_CLIENT_ID": credential[0],
        "PRIVYSEAL_CLIENT_SECRET": credential[1],
    }
    done = subprocess.run(
        command, cwd=folder, env=environ, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("scripts", [True, False])
def test_a_newcomer_uploads_from_nothing(
    console: Console, new_context: NewContext, sign_in: SignIn, folder: Path, scripts: bool
) -> None:
    name = "vkyc-prod" if scripts else "vkyc-without-scripts"
    permissions = ["clipboard-read", "clipboard-write"]
    page = new_context(java_script_enabled=scripts, permissions=permissions).new_page()
    sign_in(page)

    # Create a service user and a credential.
    page.get_by_role("link", name="API keys").click()
    page.get_by_role("link", name="New service user").first.click()
    page.get_by_role("textbox", name="Name").fill(name)
    page.get_by_role("combobox", name="Source system").fill("vkyc")
    page.get_by_label("ingest:write").check()
    page.get_by_role("button", name="Create").click()
    page.get_by_role("link", name="New credential").first.click()
    page.get_by_label("Label").fill("first")
    page.get_by_role("button", name="Create").click()
    expect(page.locator("#client-secret")).to_have_text(re.compile("^pvs_[A-Za-z0-9]{49}$"))

    # A token.
    page.get_by_role("link", name="Token", exact=True).click()
    page.get_by_label("Service user").fill(name)
    page.get_by_role("button", name="Choose").click()
    page.get_by_role("button", name="Make a token").click()
    token = page.locator("#token").inner_text()
    if scripts:
        page.get_by_role("button", name="Copy access token").click()
        assert page.evaluate("navigator.clipboard.readText()") == token

    # The command, as it is.
    page.get_by_role("link", name="Upload with").click()
    page.get_by_label("External id").fill(f"session-{name}")
    page.get_by_role("button", name="Make the command").click()
    command = page.locator("#curl").inner_text()
    if scripts:
        page.get_by_role("button", name="Copy command for cURL").click()
        command = page.evaluate("navigator.clipboard.readText()")
    attribution = in_bash(command, folder)
    assert (attribution["service_user"], attribution["source_system"]) == (name, "vkyc")
    assert attribution["external_id"] == f"session-{name}"

    # What it was used for stands in the audit log.
    page.get_by_role("link", name="What this token was used for").click()
    row = page.get_by_role("row").filter(has_text="document.ingest")
    for _ in range(40):
        if row.count():
            break
        page.reload()
    expect(row).to_contain_text(name)
    expect(row).to_contain_text(attribution["document_id"])


def test_a_try_shows_the_answer_and_its_record(console: Console, operator_page: Page) -> None:
    page = operator_page
    client_id, _ = console.new_service_user("tries", "ingest:write")
    page.goto(f"{console.url}/upload?service_user=tries")
    page.get_by_label("Department").fill("wholesale")
    page.get_by_role("button", name="Try it").click()
    expect(page.get_by_role("status")).to_contain_text("201 Created")
    answer = json.loads(page.locator("#answer").inner_text())
    assert (answer["service_user_id"], answer["department"]) == (client_id, "wholesale")
    row = page.get_by_role("row").filter(has_text="document.ingest")
    expect(row).to_contain_text(f"documents/{answer['document_id']}")
    row.get_by_role("link").click()
    expect(page.locator("main")).to_contain_text(answer["document_id"])


def test_a_try_without_the_scope_shows_the_refusal(console: Console, operator_page: Page) -> None:
    page = operator_page
    console.new_service_user("searches", "search:read")
    page.goto(f"{console.url}/upload?service_user=searches")
    page.get_by_role("button", name="Try it").click()
    expect(page.get_by_role("status")).to_contain_text("403 Forbidden")
    expect(page.locator("#answer")).to_contain_text("insufficient_scope")
    expect(page.get_by_role("row").filter(has_text="document.ingest")).to_contain_text("refused")


def test_an_integrator_tries_for_itself(
    console: Console, new_context: NewContext, sign_in: SignIn
) -> None:
    credential = console.new_service_user("tries-itself", "ingest:write")
    page = new_context().new_page()
    sign_in(page, credential)
    page.get_by_role("link", name="Upload", exact=True).click()
    page.get_by_role("button", name="Try it").click()
    expect(page.get_by_role("status")).to_contain_text("201 Created")
    expect(page.get_by_role("row").filter(has_text="document.ingest")).to_be_visible()


def test_the_exchange_gives_a_token(console: Console, operator_page: Page, folder: Path) -> None:
    credential = console.new_service_user("exchanges", "ingest:write")
    operator_page.goto(f"{console.url}/upload?service_user=exchanges")
    command = operator_page.locator("#exchange-command").inner_text()
    answer = json.loads(run("bash", "-c", command, credential=credential, folder=folder))
    assert (answer["token_type"], answer["scope"]) == ("Bearer", "ingest:write")


def test_the_python_sample_uploads_and_renews_by_itself(
    console: Console, operator_page: Page, folder: Path
) -> None:
    credential = console.new_service_user("python", "ingest:write")
    operator_page.goto(f"{console.url}/upload?service_user=python")
    sample = operator_page.locator("#python").inner_text()
    (folder / "upload.py").write_text(
        f"{sample}\nprint(json.dumps(upload(session, FILE)))\n"
        "session.auth.renew_at = time.monotonic()\nprint(json.dumps(upload(session, FILE)))\n"
    )
    printed = run(sys.executable, "upload.py", credential=credential, folder=folder)
    uploads = [json.loads(line) for line in printed.splitlines()]
    assert {upload["service_user"] for upload in uploads} == {"python"}
    first, second, third = (upload["jti"] for upload in uploads)
    assert first == second != third


def test_the_node_sample_uploads_and_renews_by_itself(
    console: Console,
    operator_page: Page,
    folder: Path,
    skip_or_fail: Callable[[str], NoReturn],
) -> None:
    if (node := shutil.which("node")) is None:
        skip_or_fail("there is no node")
    credential = console.new_service_user("node", "ingest:write")
    operator_page.goto(f"{console.url}/upload?service_user=node")
    operator_page.get_by_text("JavaScript, for Node").click()
    sample = operator_page.locator("#node").inner_text()
    (folder / "upload.mjs").write_text(
        f"{sample}\nconsole.log(JSON.stringify(await upload(FILE)));\n"
        "renewAt = 0;\nconsole.log(JSON.stringify(await upload(FILE)));\n"
    )
    printed = run(node, "upload.mjs", credential=credential, folder=folder)
    uploads = [json.loads(line) for line in printed.splitlines()]
    assert {upload["service_user"] for upload in uploads} == {"node"}
    first, second, third = (upload["jti"] for upload in uploads)
    assert first == second != third


@pytest.mark.parametrize("file_name", ["a; b, c.pdf", 'it\'s "quoted".pdf', "Müller $(id).pdf"])
def test_a_file_of_any_name_is_uploaded(
    console: Console, operator_page: Page, folder: Path, file_name: str
) -> None:
    name = f"file-{sum(file_name.encode())}"
    console.new_service_user(name, "ingest:write")
    (folder / file_name).write_bytes(b"%PDF-1.7\n")
    operator_page.goto(f"{console.url}/upload?service_user={name}")
    operator_page.get_by_label("File").fill(file_name)
    operator_page.get_by_role("button", name="Make the command").click()
    assert in_bash(operator_page.locator("#curl").inner_text(), folder)["size"] == 9


def test_what_was_typed_stays_when_the_form_is_refused(
    console: Console, operator_page: Page
) -> None:
    page = operator_page
    console.new_service_user("typed", "ingest:write")
    page.goto(f"{console.url}/upload?service_user=typed")
    page.get_by_label("Department").fill("private banking")
    page.get_by_label("External id").fill("session-7")
    page.get_by_role("button", name="Make the command").click()
    field = page.get_by_label("Department")
    expect(field).to_have_value("private banking")
    expect(field).to_have_attribute("aria-invalid", "true")
    expect(field).to_have_accessible_description(re.compile("Expected 1 to 128 letters"))
    expect(page.get_by_label("External id")).to_have_value("session-7")
    assert urlsplit(page.url).path.startswith("/console/upload/su_")
    page.goto(page.url)
    expect(page.get_by_role("heading", name="Upload for typed")).to_be_visible()
