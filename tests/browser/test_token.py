"""The Token page in a browser: choose, mint, copy, and leave nothing behind."""

import re
from pathlib import Path

import pytest
from playwright.sync_api import Error, Page, expect

from tests.browser.conftest import Console, NewContext, SignIn


def mint(page: Page, console: Console, name: str) -> str:
    """Choose a service user by its name, mint, and return the token as it is shown."""
    page.goto(f"{console.url}/token")
    page.get_by_label("Service user").fill(name)
    page.get_by_role("button", name="Choose").click()
    page.get_by_role("button", name="Make a token").click()
    expect(page.get_by_role("heading", name="Access token")).to_be_visible()
    return page.locator("#token").inner_text()


@pytest.mark.parametrize("scripts", [True, False])
def test_a_token_is_chosen_minted_and_read(
    console: Console, new_context: NewContext, sign_in: SignIn, scripts: bool
) -> None:
    name = f"read-{scripts}".lower()
    client_id, _ = console.new_service_user(name, "ingest:write", "search:read")
    page = new_context(java_script_enabled=scripts).new_page()
    sign_in(page)
    token = mint(page, console, name)
    assert token.count(".") == 2
    assert f'"sub": "{client_id}"' in page.locator("#claims").inner_text()
    assert '"typ": "at+jwt"' in page.locator("#header").inner_text()
    expect(page.locator("main")).to_contain_text(re.compile(r"It ends at \d\d:\d\d UTC"))
    expect(page.get_by_role("link", name=f"credentials of {name}")).to_be_visible()
    expect(page.get_by_role("button", name="Copy access token")).to_have_count(int(scripts))


def test_the_copy_button_copies_the_token_and_the_time_counts_down(
    console: Console, new_context: NewContext, sign_in: SignIn
) -> None:
    console.new_service_user("token-copied", "ingest:write")
    context = new_context(permissions=["clipboard-read", "clipboard-write"])
    page = context.new_page()
    sign_in(page)
    token = mint(page, console, "token-copied")
    page.get_by_role("button", name="Copy access token").click()
    expect(page.get_by_role("button", name="Copied access token")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == token
    left = page.locator("main time[data-countdown]")
    expect(left).to_have_text(re.compile(r"14:\d\d min"))
    shown = left.inner_text()
    expect(left).not_to_have_text(shown)


def test_names_are_offered_while_they_are_typed(console: Console, operator_page: Page) -> None:
    for number in range(3):
        console.new_service_user(f"offered-{number}")
    console.new_service_user("not-offered")
    operator_page.goto(f"{console.url}/token")
    operator_page.get_by_label("Service user").press_sequentially("offered")
    options = operator_page.locator("#names option")
    expect(options).to_have_count(3)
    assert [option.get_attribute("value") for option in options.all()] == [
        "offered-0",
        "offered-1",
        "offered-2",
    ]


def test_a_token_is_in_no_address_no_storage_no_log_and_no_page_that_was_left(
    console: Console, operator_page: Page
) -> None:
    page, addresses = operator_page, list[str]()
    page.on("request", lambda request: addresses.append(request.url))
    console.new_service_user("left", "ingest:write")
    token = mint(page, console, "left")
    assert all(token not in address for address in addresses)
    assert token not in page.url
    stored = "JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie])"
    assert page.evaluate(stored) == '[{},{},""]'
    log = Path(console.authority.environ["PRIVYSEAL_DATA_DIR"]) / "serve.log"
    assert token.rpartition(".")[2] not in log.read_text()
    page.goto(console.url)
    # The browser has nothing to show, and does not send the form once more by itself.
    with pytest.raises(Error, match="ERR_CACHE_MISS"):
        page.go_back()
    expect(page.locator("body")).not_to_contain_text(token)


def test_an_integrator_sees_only_itself(
    console: Console, new_context: NewContext, sign_in: SignIn
) -> None:
    credential = console.new_service_user("itself", "ingest:write")
    page = new_context().new_page()
    sign_in(page, credential)
    page.get_by_role("link", name="Token", exact=True).click()
    expect(page.get_by_role("heading", name="Token for itself")).to_be_visible()
    expect(page.get_by_label("Service user")).to_have_count(0)
    page.get_by_role("button", name="Make a token").click()
    assert f'"sub": "{credential[0]}"' in page.locator("#claims").inner_text()
    link = page.get_by_role("link", name="credentials of itself")
    assert link.get_attribute("href") == "/console/me"
