"""Signing in with a credential, staying, leaving, and coming back to what was typed."""

import pytest
from playwright.sync_api import Page, expect

from service.console.page import COOKIE
from tests.browser.conftest import Console, NewContext, SignIn


@pytest.mark.parametrize("scripts", [True, False])
def test_an_operator_signs_in_and_out(
    console: Console, new_context: NewContext, sign_in: SignIn, scripts: bool
) -> None:
    page = new_context(java_script_enabled=scripts).new_page()
    sign_in(page)
    expect(page.get_by_role("heading", name="Home")).to_be_visible()
    (cookie,) = page.context.cookies()
    assert cookie.get("name") == COOKIE
    assert cookie.get("httpOnly")
    assert cookie.get("secure")
    assert cookie.get("sameSite") == "Strict"
    assert cookie.get("path") == "/"
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
    assert page.context.cookies() == []
    page.goto(console.url)
    expect(page.get_by_role("heading", name="Sign in")).to_be_visible()


def test_a_wrong_secret_is_refused_in_words(console: Console, page: Page) -> None:
    page.goto(console.url)
    page.get_by_label("Client ID").fill(console.operator[0])
    page.get_by_label("Client secret").fill("pvs_wrong")
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("alert")).to_contain_text("Unknown client")
    assert page.context.cookies() == []


def test_who_asked_for_a_page_comes_back_to_it(console: Console, page: Page) -> None:
    page.goto(f"{console.url}/audit?action=token.issue")
    page.get_by_label("Client ID").fill(console.operator[0])
    page.get_by_label("Client secret").fill(console.operator[1])
    page.get_by_role("button", name="Sign in").click()
    page.wait_for_url("**/console/audit?action=token.issue")
