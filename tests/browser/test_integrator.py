"""An integrator at the console: it sees itself, rotates its credential, and finds no other door."""

import re

import httpx
import pytest
from playwright.sync_api import expect

from tests.browser.conftest import Console, NewContext, SignIn
from tests.browser.pages import INTEGRATOR, OPERATOR


@pytest.mark.parametrize("scripts", [True, False])
def test_an_integrator_rotates_its_credential(
    console: Console, new_context: NewContext, sign_in: SignIn, scripts: bool
) -> None:
    credential = console.new_service_user(f"rotates-{scripts}".lower(), "ingest:write")
    page = new_context(java_script_enabled=scripts).new_page()
    sign_in(page, credential)
    expect(page.get_by_role("heading", name="rotates-")).to_be_visible()
    page.get_by_role("navigation").get_by_role("link", name="My credentials").click()
    expect(page.get_by_role("row").filter(has_text="you signed in with it")).to_contain_text(
        "browser"
    )
    page.get_by_role("link", name="Rotate").click()
    expect(page.get_by_text("That cannot be taken back")).to_be_visible()
    page.get_by_label("Label of the new one").fill("autumn")
    page.get_by_role("button", name="Make the new secret").click()
    secret = page.get_by_role("region", name="client secret").inner_text()
    for each in (credential[1], secret):
        exchanged = httpx.post(
            f"{console.authority.issuer}/oauth/token",
            data={"grant_type": "client_credentials"},
            auth=(credential[0], each),
            timeout=10,
        )
        assert exchanged.status_code == 200
    page.get_by_role("link", name="My credentials").first.click()
    expect(page.get_by_role("row").filter(has_text="autumn")).to_contain_text("live")
    expect(page.get_by_role("row", name=re.compile("^browser"))).to_contain_text("in 7 days")

    expect(page.get_by_text("Rotated: sign in with autumn")).to_be_visible()
    expect(page.get_by_role("link", name="Rotate")).to_have_count(0)
    page.goto(f"{console.url}/me/rotate")
    page.get_by_label("Label of the new one").fill("winter")
    page.get_by_role("button", name="Make the new secret").click()
    expect(page.get_by_role("alert")).to_contain_text("its successor is “autumn”")
    expect(page.get_by_label("Label of the new one")).to_have_value("winter")

    again = new_context(java_script_enabled=scripts).new_page()
    sign_in(again, (credential[0], secret))
    again.goto(f"{console.url}/me")
    expect(again.get_by_role("row").filter(has_text="you signed in with it")).to_contain_text(
        "autumn"
    )


def test_an_integrator_who_tries_every_page_of_operators_is_refused_each(
    console: Console, new_context: NewContext, sign_in: SignIn
) -> None:
    other, _ = console.new_service_user("other-than-me", "ingest:write")
    places = console.places(other)
    page = new_context().new_page()
    sign_in(page, console.new_service_user("tries-every-page", "ingest:write"))
    for name, path in OPERATOR.items():
        if path in INTEGRATOR.values():
            continue
        answer = page.goto(console.url + path.format(**places))
        assert answer is not None
        if path.startswith(("/audit", "/token?", "/upload?")):
            # Its own, whatever it asks for.
            expect(page.locator("main"), name).not_to_contain_text("other-than-me")
        else:
            assert answer.status in (403, 404), name
        expect(page.locator("body"), name).not_to_contain_text("other-than-me")
    for name, path in INTEGRATOR.items():
        answer = page.goto(console.url + path)
        assert answer is not None
        assert answer.status == 200, name
        expect(page.locator("body"), name).not_to_contain_text("other-than-me")
