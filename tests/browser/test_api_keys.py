"""API keys in a real browser: made, changed, used and let go, with scripts and without."""

import re

import httpx
import pytest
from playwright.sync_api import Error as PlaywrightError
from playwright.sync_api import Locator, Page, ViewportSize, expect

from tests.browser.conftest import Console, NewContext, SignIn

PHONE: ViewportSize = {"width": 320, "height": 640}


def exchange(console: Console, credential: tuple[str, str]) -> httpx.Response:
    return httpx.post(
        f"{console.authority.issuer}/oauth/token",
        auth=credential,
        data={"grant_type": "client_credentials"},
        timeout=10,
    )


def open_service_user(page: Page, console: Console, name: str) -> None:
    """Find a service user as a person does."""
    page.goto(console.url)
    page.get_by_role("link", name="API keys").click()
    page.get_by_label("Name, owner or contact").fill(name)
    page.get_by_role("button", name="Search").click()
    page.get_by_role("link", name=name, exact=True).click()
    expect(page.get_by_role("heading", level=1)).to_contain_text(name)


def credential_row(page: Page, label: str) -> Locator:
    return page.get_by_role("row").filter(has=page.get_by_role("rowheader", name=label))


@pytest.mark.parametrize("scripts", [True, False])
def test_a_newcomer_makes_a_service_user_and_a_credential_that_works(
    console: Console, new_context: NewContext, sign_in: SignIn, scripts: bool
) -> None:
    page = new_context(java_script_enabled=scripts).new_page()
    sign_in(page)
    name = f"newcomer-{'scripts' if scripts else 'plain'}"
    page.get_by_role("link", name="API keys").click()
    page.get_by_role("link", name="New service user").click()
    page.get_by_label("Name", exact=True).fill(name)
    page.get_by_label("Source system").fill("vkyc")
    page.get_by_label("Owner").fill("KYC team")
    page.get_by_label("ingest:write").check()
    page.get_by_role("button", name="Create").click()
    expect(page.get_by_role("status")).to_contain_text("make a credential for it")

    page.get_by_role("link", name="New credential").click()
    page.get_by_label("Label").fill("vault")
    page.get_by_label("90 days").check()
    page.get_by_role("button", name="Create").click()
    expect(page.get_by_text("The secret is shown this once.")).to_be_visible()
    client_id = page.get_by_role("region", name="client ID").inner_text()
    client_secret = page.get_by_role("region", name="client secret").inner_text()
    answer = exchange(console, (client_id, client_secret))
    assert answer.json()["scope"] == "ingest:write"
    assert client_secret not in page.url

    page.get_by_role("link", name="I have copied it").click()
    expect(credential_row(page, "vault")).to_contain_text("from 127.0.0.1")
    assert client_secret not in page.content()
    # The answer is in no cache: the browser would have to send the form once more, and asks first.
    with pytest.raises(PlaywrightError, match="ERR_CACHE_MISS"):
        page.go_back()
    expect(page.locator("body")).not_to_contain_text(client_secret)


def test_the_copied_secret_is_the_secret(
    console: Console, new_context: NewContext, sign_in: SignIn
) -> None:
    client_id, _ = console.new_service_user("copied", "ingest:write")
    context = new_context()
    context.grant_permissions(
        ["clipboard-read", "clipboard-write"], origin=console.authority.issuer
    )
    page = context.new_page()
    sign_in(page)
    open_service_user(page, console, "copied")
    page.get_by_role("link", name="New credential").click()
    page.get_by_label("Label").fill("second")
    page.get_by_role("button", name="Create").click()
    page.get_by_role("button", name="Copy client secret").click()
    expect(page.get_by_role("button", name="Copied client secret")).to_be_visible()
    client_secret: str = page.evaluate("navigator.clipboard.readText()")
    assert exchange(console, (client_id, client_secret)).status_code == 200
    stored: str = page.evaluate(
        "JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie])"
    )
    assert client_secret not in stored


def test_faults_stand_beside_their_fields_and_what_was_typed_stays(
    console: Console, operator_page: Page
) -> None:
    page = operator_page
    page.goto(f"{console.url}/service-users/new")
    page.get_by_label("Name", exact=True).fill("Not A Name")
    page.get_by_label("Source system").fill("vkyc")
    page.get_by_label("Contact").fill("me@example.com")
    page.get_by_label("search:all").check()
    page.get_by_role("button", name="Create").click()
    expect(page.get_by_role("alert")).to_contain_text("Nothing was created")
    name = page.get_by_label("Name", exact=True)
    expect(name).to_have_value("Not A Name")
    expect(name).to_have_accessible_description(re.compile("Expected 1 to 63 of"))
    expect(page.get_by_label("Contact")).to_have_value("me@example.com")
    expect(page.get_by_label("search:all")).to_be_checked()


def test_two_operators_change_one_service_user_and_the_second_is_told(
    console: Console, new_context: NewContext, sign_in: SignIn
) -> None:
    console.new_service_user("contested", "ingest:write")
    first, second = new_context().new_page(), new_context().new_page()
    for page in (first, second):
        sign_in(page)
        open_service_user(page, console, "contested")
        page.get_by_role("link", name="Change").click()
    first.get_by_label("Owner").fill("First")
    first.get_by_label("search:read").check()
    first.get_by_role("button", name="Save").click()
    expect(first.get_by_role("status")).to_contain_text("It is changed")

    second.get_by_label("Owner").fill("Second")
    second.get_by_label("Contact").fill("second@example.com")
    second.get_by_role("button", name="Save").click()
    expect(second.get_by_role("alert")).to_contain_text("Somebody changed contested meanwhile")
    row = second.get_by_role("row").filter(has_text="Owner")
    expect(row).to_contain_text("First")
    expect(row).to_contain_text("Second")
    expect(second.get_by_label("Owner")).to_have_value("Second")
    expect(second.get_by_label("search:read")).to_be_checked()
    second.get_by_role("button", name="Send it again").click()
    expect(second.get_by_role("status")).to_contain_text("It is changed")
    for fact in ("Second", "second@example.com", "search:read"):
        expect(second.get_by_role("region", name="What it is")).to_contain_text(fact)


def test_disabling_asks_first_and_stops_the_exchange(console: Console, operator_page: Page) -> None:
    credential = console.new_service_user("stopped", "ingest:write")
    assert exchange(console, credential).status_code == 200
    page = operator_page
    open_service_user(page, console, "stopped")
    page.get_by_role("link", name="Disable").click()
    expect(page.get_by_role("main")).to_contain_text("1, the last one ends in")
    expect(page.get_by_role("main")).to_contain_text("from 127.0.0.1")
    page.get_by_role("button", name="Disable stopped").click()
    expect(page.get_by_role("status")).to_contain_text("It is disabled")
    assert exchange(console, credential).status_code == 401
    page.get_by_role("button", name="Enable").click()
    expect(page.get_by_role("status")).to_contain_text("It is enabled")
    assert exchange(console, credential).status_code == 200


def test_a_credential_in_use_is_revoked_only_by_who_types_its_label(
    console: Console, operator_page: Page
) -> None:
    credential = console.new_service_user("in-use", "ingest:write")
    assert exchange(console, credential).status_code == 200
    page = operator_page
    open_service_user(page, console, "in-use")
    expect(credential_row(page, "browser")).to_contain_text("nothing replaces it")
    page.get_by_role("link", name="Revoke browser").click()
    expect(page.get_by_role("main")).to_contain_text("It was used in the last 7 days.")
    page.get_by_label("Type its label").fill("another")
    page.get_by_role("button", name="Revoke it").click()
    expect(page.get_by_role("main")).to_contain_text("Nothing was revoked.")
    assert exchange(console, credential).status_code == 200
    page.get_by_label("Type its label").fill("browser")
    page.get_by_role("button", name="Revoke it").click()
    expect(page.get_by_role("status")).to_contain_text("The credential is revoked")
    expect(credential_row(page, "browser")).to_contain_text("revoked")
    assert exchange(console, credential).status_code == 401


def test_what_was_typed_outlives_the_session(console: Console, operator_page: Page) -> None:
    page = operator_page
    page.goto(f"{console.url}/service-users/new")
    page.get_by_label("Name", exact=True).fill("patient")
    page.get_by_label("Source system").fill("vkyc")
    page.get_by_label("ingest:write").check()
    page.context.clear_cookies()
    page.get_by_role("button", name="Create").click()
    page.get_by_label("Client ID").fill(console.operator[0])
    page.get_by_label("Client secret").fill(console.operator[1])
    page.get_by_role("button", name="Sign in").click()
    page.get_by_role("button", name="Send it now").click()
    expect(page.get_by_role("heading", level=1)).to_contain_text("patient")
    expect(page.get_by_role("region", name="What it is")).to_contain_text("ingest:write")


def test_scripts_in_names_and_labels_are_only_text(console: Console, operator_page: Page) -> None:
    payload = "<img src=x onerror=alert(1)>"
    client_id, _ = console.new_service_user("hostile", owner=payload, description=payload)
    made = console.api.post(f"/service-users/{client_id}/credentials", json={"label": payload})
    assert made.status_code == 201
    page = operator_page
    asked: list[str] = []
    page.on("dialog", lambda dialog: asked.append(dialog.message))
    open_service_user(page, console, "hostile")
    expect(credential_row(page, payload)).to_be_visible()
    assert page.locator("main img").count() == 0
    page.get_by_role("link", name=f"Revoke {payload}").click()
    expect(page.get_by_role("heading", level=1)).to_contain_text(payload)
    assert asked == []


@pytest.mark.parametrize("color_scheme", ["light", "dark"])
def test_every_page_fits_a_phone_and_a_wall(
    console: Console, new_context: NewContext, sign_in: SignIn, color_scheme: str
) -> None:
    client_id, secret = console.new_service_user(f"fits-{color_scheme}", "ingest:write")
    assert exchange(console, (client_id, secret)).status_code == 200
    detail = f"{console.url}/service-users/{client_id}"
    page = new_context(color_scheme=color_scheme).new_page()
    sign_in(page)
    page.goto(detail)
    revoke = page.get_by_role("link", name="Revoke").get_attribute("href")
    for path in (
        f"{console.url}/service-users",
        f"{console.url}/service-users/ending",
        f"{console.url}/service-users/new",
        detail,
        f"{detail}/change",
        f"{detail}/disable",
        f"{detail}/credentials/new",
        f"{console.authority.issuer}{revoke}",
    ):
        page.goto(path)
        for width in (320, 768, 1920):
            page.set_viewport_size({"width": width, "height": 800})
            assert page.evaluate("document.documentElement.scrollWidth") <= width, (path, width)
    page.goto(f"{detail}/credentials/new")
    page.get_by_label("Label").fill("x" * 100)
    page.get_by_role("button", name="Create").click()
    page.set_viewport_size(PHONE)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
