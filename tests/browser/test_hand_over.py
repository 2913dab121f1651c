"""Hand-over from end to end: a link that one person makes and another opens, in two browsers."""

import json
import re
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Error, Page, expect

from tests.browser.conftest import Console, NewContext, SignIn


def make_link(console: Console, operator_page: Page, client_id: str) -> str:
    """Make a link as an operator does."""
    operator_page.goto(f"{console.url}/service-users/{client_id}")
    operator_page.get_by_role("link", name="Hand over by link").click()
    operator_page.get_by_label("Label").fill("branch 7")
    operator_page.get_by_label("30 days").check()
    operator_page.get_by_role("button", name="Make the link").click()
    return operator_page.get_by_role("region", name="Link").inner_text()


def serve_log(console: Console) -> str:
    """What the authority wrote so far."""
    data_dir = Path(console.authority.environ["PRIVYSEAL_DATA_DIR"])
    return (data_dir / "serve.log").read_text("utf-8")


@pytest.mark.parametrize("scripts", [True, False])
def test_a_handed_over_secret_works_and_a_second_opening_is_seen_in_red(
    console: Console, new_context: NewContext, sign_in: SignIn, scripts: bool
) -> None:
    client_id, _ = console.new_service_user(f"handed-over-{scripts}".lower(), "ingest:write")
    operator_page = new_context(java_script_enabled=scripts).new_page()
    sign_in(operator_page)
    link = make_link(console, operator_page, client_id)
    code = link.partition("#")[2]
    assert re.fullmatch("[0-9A-Za-z]{43}", code)

    page = new_context(java_script_enabled=scripts).new_page()
    page.goto(link)
    if scripts:
        expect(page.get_by_text("The code was taken from your link.")).to_be_visible()
        expect(page.get_by_label("Link or code")).to_be_hidden()
        assert page.url == f"{console.url}/hand-over"
    else:
        page.get_by_label("Link or code").fill(link)
    page.get_by_role("button", name="Show me the secret").click()
    expect(page.get_by_role("heading", name="Your credential for handed-over")).to_be_visible()
    assert page.get_by_role("region", name="client ID").inner_text() == client_id
    secret = page.get_by_role("region", name="client secret").inner_text()
    exchanged = httpx.post(
        f"{console.authority.issuer}/oauth/token",
        data={"grant_type": "client_credentials"},
        auth=(client_id, secret),
        timeout=10,
    )
    assert exchanged.status_code == 200

    if scripts:
        # Who loads the page again asks for a code: the old one is not sent once more.
        page.reload()
        expect(page.get_by_label("Link or code")).to_have_value("")
    thief = new_context(java_script_enabled=scripts).new_page()
    thief.set_extra_http_headers({"User-Agent": "somebody else's"})
    thief.goto(link)
    if not scripts:
        thief.get_by_label("Link or code").fill(code)
    thief.get_by_role("button", name="Show me the secret").click()
    expect(thief.get_by_role("alert")).to_contain_text("and opens once")
    assert "pvs_" not in thief.content()

    operator_page.goto(f"{console.url}/service-users/{client_id}")
    alert = operator_page.get_by_role("alert").filter(has_text="A link was opened twice")
    expect(alert).to_contain_text("branch 7")
    expect(alert).not_to_contain_text("times")
    assert "bad" in (alert.get_attribute("class") or "")
    operator_page.goto(console.url)
    expect(operator_page.get_by_text("A hand-over was opened a second time")).to_be_visible()

    log = serve_log(console)
    assert code not in log
    assert secret not in log


def test_a_code_leaves_no_address_history_or_storage_behind(
    console: Console, new_context: NewContext, operator_page: Page
) -> None:
    client_id, _ = console.new_service_user("no-traces", "ingest:write")
    link = make_link(console, operator_page, client_id)
    code = link.partition("#")[2]
    # The link goes with the page that shows it: nothing kept that.
    operator_page.goto(f"{console.url}/service-users")
    with pytest.raises(Error, match="ERR_CACHE_MISS"):
        operator_page.go_back()

    context = new_context()
    page = context.new_page()
    asked: list[str] = []
    context.on("request", lambda request: asked.append(request.url))
    page.goto(f"{console.url}/sign-in")
    page.goto(link)
    expect(page.get_by_text("The code was taken from your link.")).to_be_visible()
    page.goto(f"{console.url}/sign-in")
    page.go_back()
    assert page.url == f"{console.url}/hand-over"
    expect(page.get_by_label("Link or code")).to_be_visible()
    expect(page.get_by_label("Link or code")).to_have_value("")
    # Who comes back follows the link once more, in the page that is open.
    page.evaluate("link => { location.href = link; }", link)
    expect(page.get_by_text("The code was taken from your link.")).to_be_visible()
    page.get_by_role("button", name="Show me the secret").click()
    secret = page.get_by_role("region", name="client secret").inner_text()
    page.goto(f"{console.url}/sign-in")
    stored = json.dumps(context.storage_state(indexed_db=True))
    for trace in (code, secret):
        assert not any(trace in url for url in asked)
        assert trace not in stored


def test_looking_at_a_link_opens_nothing(
    console: Console, new_context: NewContext, operator_page: Page
) -> None:
    client_id, _ = console.new_service_user("only-looked-at", "ingest:write")
    link = make_link(console, operator_page, client_id)
    assert httpx.get(link, timeout=10).status_code == 200
    new_context().new_page().goto(link)
    held = console.api.get(f"/service-users/{client_id}/credentials").json()["credentials"]
    assert held[0]["state"] == "offered"
    operator_page.goto(f"{console.url}/service-users/{client_id}")
    row = operator_page.get_by_role("row").filter(has_text="branch 7")
    expect(row).to_contain_text("offered")
    row.get_by_role("link", name="Revoke").click()
    operator_page.get_by_role("button", name="Revoke").click()
    late = new_context().new_page()
    late.goto(link)
    late.get_by_role("button", name="Show me the secret").click()
    expect(late.get_by_role("alert")).to_contain_text("This link was withdrawn.")
