"""The audit log at the console: found, proven, watched, and taken out as a file."""

import hashlib
import json
import re
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeAlias

import httpx
import jwt
import pytest
from playwright.sync_api import Locator, Page, expect

from keys.verifier.strict import base64url_encode
from service.authority.audit import new_record_id
from service.console.page import COOKIE
from tests.browser.conftest import Console, NewContext, SignIn

Credential: TypeAlias = tuple[str, str]
Report: TypeAlias = Callable[..., list[str]]

WITHIN = 10_000
WIDTHS = (320, 640, 1024, 1280, 1920)
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)>\N{RIGHT-TO-LEFT OVERRIDE}gpj.exe"


def exchanged(console: Console, credential: Credential, **form: str) -> str:
    answer = httpx.post(
        f"{console.authority.issuer}/oauth/token",
        data={"grant_type": "client_credentials", **form},
        auth=credential,
        timeout=10,
    )
    assert answer.status_code == 200, answer.text
    return answer.json()["access_token"]


@pytest.fixture(scope="module")
def integrator(console: Console) -> Credential:
    """The credential of branch-scans, whose calls are looked at here."""
    return console.new_service_user("branch-scans", "ingest:write")


@pytest.fixture(scope="module")
def report(console: Console, integrator: Credential) -> Report:
    """Report calls with a token of branch-scans: `count` of them, members as given; their ids."""
    api = f"{console.authority.issuer}/api/v1"
    reporter = console.new_service_user(
        "scans-ingest", "audit:report", audiences=[api, console.ingest.audience]
    )
    token = exchanged(console, integrator)
    bearer = {"Authorization": f"Bearer {exchanged(console, reporter, resource=api)}"}

    def reported(count: int = 1, **members: Any) -> list[str]:
        events = [_call(token, **members) for _ in range(count)]
        answer = httpx.post(
            f"{api}/audit-events", json={"events": events}, headers=bearer, timeout=10
        )
        assert {result["status"] for result in answer.json()["results"]} == {"recorded"}
        return [event["id"] for event in events]

    return reported


def _call(token: str, **members: Any) -> dict[str, Any]:
    signing_input = token.rpartition(".")[0].encode()
    return {
        "type": "api.call",
        "id": str(new_record_id(time.time())),
        "occurred_at": datetime.now(UTC).isoformat(),
        "jti": jwt.decode(token, options={"verify_signature": False})["jti"],
        "kid": jwt.get_unverified_header(token)["kid"],
        "signing_input_sha256": base64url_encode(hashlib.sha256(signing_input).digest()),
        "action": "document.ingest",
        "resource": "documents/0c1f",
        "outcome": "success",
        "request_id": "scan-1",
        "client_address": "192.0.2.7",
        **members,
    }


def row(page: Page, record_id: str) -> Locator:
    return page.locator(f"#r-{record_id}")


def open_until(page: Page, address: str, wanted: Locator) -> None:
    """Open a page until it shows what was recorded a moment ago."""
    deadline = time.monotonic() + WITHIN / 1000
    page.goto(address)
    while wanted.count() == 0:
        assert time.monotonic() < deadline, page.locator("main").inner_text()
        page.reload()


@pytest.mark.parametrize("scripts", [True, False])
def test_an_operator_finds_a_call_and_sees_that_the_log_proves_it(
    console: Console, new_context: NewContext, sign_in: SignIn, report: Report, scripts: bool
) -> None:
    page = new_context(java_script_enabled=scripts).new_page()
    sign_in(page)
    (called,) = report(department="retail")
    open_until(page, f"{console.url}/audit", row(page, called))
    page.get_by_label("Service user", exact=True).fill("branch-scans")
    page.get_by_label("Action").fill("document.ingest")
    page.get_by_label("Since").fill("1h")
    page.get_by_text("More filters").click()
    page.get_by_label("Department").fill("retail")
    page.get_by_role("button", name="Show").click()
    page.wait_for_url(re.compile(r"/console/audit\?service_user=branch-scans&action=document"))
    expect(page.get_by_label("Department")).to_have_value("retail")
    row(page, called).get_by_role("link", name="document.ingest").click()
    proven = page.get_by_role("heading", name="In the log: verified")
    open_until(page, page.url, proven)
    expect(page.get_by_role("region", name="Records of this token")).to_contain_text("token.issue")
    commands = page.locator("#commands")
    expect(commands).to_contain_text(f"privyseal audit export --jti {called}")
    expect(page.locator("button[data-copy=commands]")).to_be_visible(visible=scripts)


def test_older_records_are_a_link_away_without_scripts(
    console: Console, new_context: NewContext, sign_in: SignIn, report: Report
) -> None:
    page = new_context(java_script_enabled=False).new_page()
    sign_in(page)
    called = report(60, request_id="paged")
    open_until(page, f"{console.url}/audit?request_id=paged", row(page, called[-1]))
    rows = page.locator("tbody tr")
    expect(rows).to_have_count(50)
    page.get_by_role("link", name="Older").click()
    expect(rows).to_have_count(10)
    expect(page.locator("caption")).to_contain_text("Older records")
    page.get_by_role("link", name="Newest").click()
    expect(rows).to_have_count(50)


def test_new_records_appear_by_themselves_each_once_and_none_while_it_is_paused(
    console: Console, operator_page: Page, report: Report
) -> None:
    page = operator_page
    page.goto(f"{console.url}/audit/tail?request_id=live")
    says = page.get_by_role("status")
    expect(says).to_have_text("New records appear by themselves.")
    first = report(3, request_id="live")
    rows = page.locator("[data-tail-rows] tr")
    expect(rows).to_have_count(3, timeout=WITHIN)

    page.get_by_role("button", name="Pause").click()
    expect(says).to_contain_text("Paused")
    # What was asked for before the click may still arrive: wait for what would bring the next.
    page.wait_for_load_state("networkidle")
    paused = report(2, request_id="live")
    with pytest.raises(AssertionError):
        expect(rows).to_have_count(5, timeout=4_000)
    page.get_by_role("button", name="Pause").click()
    expect(rows).to_have_count(5, timeout=WITHIN)
    last = report(1, request_id="live")
    expect(rows).to_have_count(6, timeout=WITHIN)
    shown = [str(each.get_attribute("id")) for each in rows.all()]
    assert sorted(shown) == sorted(f"r-{each}" for each in (*first, *paused, *last))
    assert shown[0] == f"r-{last[0]}"


def test_a_page_that_watches_a_busy_log_stays_bounded(
    console: Console, operator_page: Page, report: Report
) -> None:
    page = operator_page
    page.goto(f"{console.url}/audit/tail?request_id=busy")
    report(230, request_id="busy")
    last = report(1, request_id="busy")
    rows = page.locator("[data-tail-rows] tr")
    expect(row(page, last[0])).to_be_visible(timeout=WITHIN)
    expect(rows).to_have_count(200)
    expect(rows.first).to_have_id(f"r-{last[0]}")


def test_who_watched_until_the_session_ended_goes_on_after_a_new_sign_in_and_misses_nothing(
    console: Console, operator_page: Page, report: Report
) -> None:
    page = operator_page
    page.goto(f"{console.url}/audit/tail?request_id=ended")
    expect(page.get_by_role("status")).to_have_text("New records appear by themselves.")
    seen = report(1, request_id="ended")
    expect(row(page, seen[0])).to_be_visible(timeout=WITHIN)
    page.context.clear_cookies(name=COOKIE)
    expect(page.get_by_role("status")).to_contain_text("Your session ended", timeout=WITHIN)
    missed = report(1, request_id="ended")
    page.get_by_role("link", name="Look again").click()
    page.get_by_label("Client ID").fill(console.operator[0])
    page.get_by_label("Client secret").fill(console.operator[1])
    page.get_by_role("button", name="Sign in").click()
    page.wait_for_url("**/console/audit/tail?*")
    expect(row(page, missed[0])).to_be_visible(timeout=WITHIN)
    expect(row(page, seen[0])).to_have_count(0)


def test_without_scripts_who_looks_again_sees_what_is_new(
    console: Console, new_context: NewContext, sign_in: SignIn, report: Report
) -> None:
    page = new_context(java_script_enabled=False).new_page()
    sign_in(page)
    page.goto(f"{console.url}/audit/tail?request_id=again")
    expect(page.get_by_role("button", name="Pause")).to_be_hidden()
    called = report(2, request_id="again")
    deadline = time.monotonic() + WITHIN / 1000
    while row(page, called[0]).count() == 0:
        assert time.monotonic() < deadline
        page.get_by_role("link", name="Look again").click()
    expect(page.get_by_role("status")).to_have_text("2 new since you last looked.")
    page.get_by_role("link", name="Look again").click()
    expect(page.get_by_role("status")).to_have_text("Nothing new since you last looked.")


@pytest.mark.parametrize("scripts", [True, False])
def test_what_meets_the_filters_is_taken_out_as_a_file(
    console: Console, new_context: NewContext, sign_in: SignIn, report: Report, scripts: bool
) -> None:
    page = new_context(java_script_enabled=scripts, accept_downloads=True).new_page()
    sign_in(page)
    request_id = f"export-{scripts}"
    called = report(3, request_id=request_id)
    open_until(page, f"{console.url}/audit?request_id={request_id}", row(page, called[-1]))
    with page.expect_download() as download:
        page.get_by_role("link", name="Export NDJSON").click()
    _, *lines = Path(download.value.path()).read_text().splitlines()
    # In the order of the log, which is not that of ids of the same millisecond.
    assert sorted(json.loads(line)["id"] for line in lines) == sorted(called)
    with page.expect_download() as download:
        page.get_by_role("link", name="Export CSV").click()
    name = download.value.suggested_filename
    assert re.fullmatch(r"audit-records-2\d{3}-\d\d-\d\dT\d{6}Z\.csv", name)
    assert len(Path(download.value.path()).read_text().splitlines()) == 4


def test_what_others_chose_runs_nowhere(
    console: Console, operator_page: Page, report: Report
) -> None:
    page = operator_page
    page.goto(f"{console.url}/audit/tail?request_id=hostile")
    (called,) = report(
        request_id="hostile", resource=HOSTILE, department=HOSTILE, user_agent=HOSTILE
    )
    expect(row(page, called)).to_contain_text("<script>alert(1)</script>", timeout=WITHIN)
    expect(row(page, called)).to_contain_text("\\u202egpj")
    expect(page.locator("main img, main script")).to_have_count(0)
    page.goto(f"{console.url}/audit/records/{called}")
    expect(page.locator("main")).to_contain_text("onerror=alert(1)>\\u202egpj.exe")
    expect(page.locator("main img, main script")).to_have_count(0)


def test_an_integrator_sees_its_own_records_and_no_others(
    console: Console, page: Page, sign_in: SignIn, report: Report, integrator: Credential
) -> None:
    (called,) = report(request_id="own")
    sign_in(page, integrator)
    open_until(page, f"{console.url}/audit", row(page, called))
    assert {
        each.inner_text().split()[0] for each in page.locator("tbody tr td:nth-child(3)").all()
    } == {"branch-scans"}
    expect(page.get_by_role("link", name=re.compile("Export"))).to_have_count(0)
    page.goto(f"{console.url}/audit?action=operator.bootstrap")
    expect(page.locator("main")).to_contain_text("No record meets this filter.")
    page.goto(f"{console.url}/audit/records/{called}")
    expect(page.get_by_role("heading", name="document.ingest")).to_be_visible()


@pytest.mark.parametrize("color_scheme", ["light", "dark"])
def test_no_page_is_wider_than_its_window(
    console: Console, new_context: NewContext, sign_in: SignIn, report: Report, color_scheme: str
) -> None:
    page = new_context(color_scheme=color_scheme).new_page()
    sign_in(page)
    (called,) = report(resource="x" * 300, department="y" * 128, request_id="z" * 128)
    open_until(page, f"{console.url}/audit?request_id={'z' * 128}", row(page, called))
    for path in ("", "?since=x&kid=y", "/tail", f"/records/{called}"):
        page.goto(f"{console.url}/audit{path}")
        for more in page.locator("details").all():
            more.evaluate("details => { details.open = true; }")
        for width in WIDTHS:
            page.set_viewport_size({"width": width, "height": 800})
            assert page.evaluate("document.documentElement.scrollWidth") <= width, (path, width)
