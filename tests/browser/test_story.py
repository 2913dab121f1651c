"""A person's day: by keys alone, and when the session ends in the middle of a form.

What a newcomer does, from the sign-in to the first upload, is in test_upload.py.
"""

import re
from collections.abc import Callable

import httpx
import pytest
from playwright.sync_api import Locator, Page, expect

from tests.browser.conftest import Console, NewContext

MOST_STOPS = 80


def go_to(page: Page, wanted: Locator) -> None:
    """Press Tab until something is focused, as who has no mouse does."""
    expect(wanted).to_have_count(1)
    for _ in range(MOST_STOPS):
        if wanted.evaluate("each => each === document.activeElement"):
            return
        page.keyboard.press("Tab")
    raise AssertionError(f"{wanted} is not reached")


def press(page: Page, role: str, name: str) -> None:
    """Follow a link or press a button by the Enter key."""
    go_to(page, page.get_by_role(role, name=name, exact=True))  # type: ignore[arg-type]
    with page.expect_navigation():
        page.keyboard.press("Enter")


def type_into(page: Page, label: str, text: str) -> None:
    go_to(page, page.get_by_label(label, exact=True))
    page.keyboard.type(text)


@pytest.mark.parametrize("scripts", [True, False])
def test_keys_alone_suffice_from_the_sign_in_to_a_secret_and_back(
    console: Console, new_context: NewContext, scripts: bool
) -> None:
    page = new_context(java_script_enabled=scripts).new_page()
    name = f"by-keys-{scripts}".lower()
    page.goto(console.url)
    # Where one types is where one is.
    expect(page.get_by_label("Client ID")).to_be_focused()
    page.keyboard.type(console.operator[0])
    type_into(page, "Client secret", console.operator[1])
    with page.expect_navigation(url=console.url):
        page.keyboard.press("Enter")

    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    press(page, "link", "API keys")
    press(page, "link", "New service user")
    type_into(page, "Name", name)
    type_into(page, "Source system", "vkyc")
    go_to(page, page.get_by_role("checkbox", name=re.compile("ingest:write")))
    page.keyboard.press("Space")
    press(page, "button", "Create")
    expect(page.get_by_role("heading", level=1)).to_contain_text(name)

    press(page, "link", "New credential")
    type_into(page, "Label", "by keys")
    # Radio buttons are one stop, and arrows go through them.
    go_to(page, page.get_by_role("radio", checked=True))
    page.keyboard.press("ArrowUp")
    expect(page.get_by_role("radio", name="90 days")).to_be_checked()
    press(page, "button", "Create")
    secret = page.get_by_role("region", name="client secret")
    go_to(page, secret)
    found = page.get_by_role("region", name="client ID").inner_text(), secret.inner_text()
    exchanged = httpx.post(
        f"{console.authority.issuer}/oauth/token",
        data={"grant_type": "client_credentials"},
        auth=found,
        timeout=10,
    )
    assert exchanged.json()["scope"] == "ingest:write"

    # And what cannot be undone: asked again, and left.
    press(page, "link", "I have copied it")
    press(page, "link", "Revoke by keys")
    type_into(page, "Type its label to revoke it all the same", "by keys")
    press(page, "button", "Revoke it")
    expect(page.get_by_role("status")).to_contain_text("The credential is revoked")
    press(page, "button", "Sign out")
    expect(page.get_by_role("heading", name="Sign in")).to_be_visible()


@pytest.fixture
def clerk(console: Console) -> tuple[tuple[str, str], tuple[str, str], Callable[[], None]]:
    """Two credentials of one operator, and what revokes the first."""
    scopes = ("service-users:read", "service-users:write")
    audiences = [f"{console.authority.issuer}/api/v1"]
    first = console.new_service_user("clerk", *scopes, audiences=audiences)
    held = f"/service-users/{first[0]}/credentials"
    second = console.api.post(held, json={"label": "second"}).json()["client_secret"]

    def revoke() -> None:
        listed = console.api.get(held).json()["credentials"]
        (credential,) = (each["id"] for each in listed if each["label"] == "browser")
        assert console.api.post(f"{held}/{credential}/revoke").status_code == 200

    return first, (first[0], second), revoke


def test_nothing_typed_is_lost_when_the_session_ends_in_the_middle_of_a_form(
    console: Console,
    new_context: NewContext,
    clerk: tuple[tuple[str, str], tuple[str, str], Callable[[], None]],
) -> None:
    first, second, revoke = clerk
    client_id, _ = console.new_service_user("half-typed", "ingest:write", "search:read")
    page = new_context().new_page()

    def sign_in(credential: tuple[str, str]) -> None:
        page.get_by_label("Client ID").fill(credential[0])
        page.get_by_label("Client secret").fill(credential[1])
        page.get_by_role("button", name="Sign in").click()

    page.goto(f"{console.url}/service-users/{client_id}/change")
    sign_in(first)
    page.get_by_label("Owner").fill('KYC "team" <1> & Söhne')
    page.get_by_label("Description").fill("one line\nand another")
    page.get_by_label("Audiences").fill("https://one.example\nhttps://two.example")
    page.get_by_label("search:read").uncheck()
    page.get_by_label("search:all").check()
    revoke()
    page.get_by_role("button", name="Save").click()

    # Even a wrong secret loses nothing, and nothing was done.
    expect(page.get_by_text("What you typed is kept")).to_be_visible()
    sign_in(first)
    expect(page.get_by_role("alert")).to_contain_text("Unknown client")
    expect(page.get_by_text("What you typed is kept")).to_be_visible()
    sign_in(second)
    expect(page.get_by_role("heading", name="You are signed in again")).to_be_visible()
    shown = page.get_by_role("main").inner_text()
    assert 'KYC "team" <1> & Söhne' in shown
    # What the form holds for itself is none of a person's concern.
    assert "base" not in shown
    assert '"version"' not in shown
    before = console.api.get(f"/service-users/{client_id}").json()
    assert (before["owner"], before["version"]) == ("", 2)

    page.get_by_role("button", name="Send it now").click()
    expect(page.get_by_role("status")).to_contain_text("It is changed")
    after = console.api.get(f"/service-users/{client_id}").json()
    assert after["owner"] == 'KYC "team" <1> & Söhne'
    assert after["description"] == "one line and another"
    assert after["audiences"] == ["https://one.example", "https://two.example"]
    assert sorted(after["scopes"]) == ["ingest:write", "search:all"]
