"""Signing keys in a browser: the picture on any screen, a rotation, and an emergency."""

from collections.abc import Generator

import httpx
import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import NewContext
from tests.interop.running import Authority, running_authority


@pytest.fixture(scope="module")
def installation() -> Generator[Authority, None, None]:
    """An installation of its own: whoever revokes keys ends the sessions of others."""
    with running_authority() as authority:
        yield authority


def signed_in(page: Page, installation: Authority) -> Page:
    """The home page of the operator."""
    page.goto(f"{installation.issuer}/console")
    page.get_by_label("Client ID").fill(installation.client_id)
    page.get_by_label("Client secret").fill(installation.client_secret)
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("heading", name="Home")).to_be_visible()
    return page


def published(installation: Authority) -> list[str]:
    answer = httpx.get(f"{installation.issuer}/.well-known/jwks.json", timeout=10)
    return [key["kid"] for key in answer.json()["keys"]]


@pytest.mark.parametrize("width", [320, 1280, 1920])
def test_the_picture_fits_the_screen_and_all_its_words_are_in_it(
    installation: Authority, new_context: NewContext, width: int
) -> None:
    page = new_context(viewport={"width": width, "height": 800}).new_page()
    signed_in(page, installation)
    page.get_by_role("link", name="Signing keys", exact=True).click()
    expect(page.get_by_role("img", name="The life of the signing keys")).to_be_visible()
    outside = page.evaluate(
        """() => {
          const frame = document.querySelector('.timeline svg').getBoundingClientRect();
          return [...document.querySelectorAll('.timeline svg[role=img] text')].filter((word) => {
            const box = word.getBoundingClientRect();
            return box.left < frame.left - 1 || box.right > frame.right + 1
              || box.top < frame.top - 1 || box.bottom > frame.bottom + 1;
          }).map((word) => word.textContent);
        }"""
    )
    assert outside == []
    assert page.evaluate("document.documentElement.scrollWidth") == width


def test_a_kid_is_opened_and_copied_whole(installation: Authority, new_context: NewContext) -> None:
    context = new_context(permissions=["clipboard-read", "clipboard-write"])
    page = signed_in(context.new_page(), installation)
    page.get_by_role("link", name="Signing keys", exact=True).click()
    page.locator("summary").first.click()
    page.get_by_role("button", name="Copy").first.click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") in published(installation)


@pytest.mark.parametrize("scripts", [True, False])
def test_an_operator_revokes_the_key_that_signs_and_stays_signed_in_while_another_does_not(
    installation: Authority, new_context: NewContext, scripts: bool
) -> None:
    page = signed_in(new_context(java_script_enabled=scripts).new_page(), installation)
    other = signed_in(new_context().new_page(), installation)
    page.get_by_role("link", name="Signing keys", exact=True).click()
    row = page.get_by_role("row").filter(has=page.get_by_text("active", exact=True))
    short = row.locator("code").inner_text().removesuffix("…")
    row.get_by_role("link", name="Revoke").click()
    expect(page.get_by_role("heading", name=f"Revoke {short}")).to_be_visible()
    expect(page.get_by_role("row", name="operator")).to_be_visible()

    page.get_by_label("Reason").fill("seen in a backup")
    page.get_by_label(f"Type “{short}” to confirm").fill("not this")
    page.get_by_role("button", name="Revoke this key").click()
    expect(page.get_by_label("to confirm")).to_have_value("not this")
    expect(page.get_by_label("Reason")).to_have_value("seen in a backup")
    assert any(kid.startswith(short) for kid in published(installation))

    page.get_by_label("to confirm").fill(short)
    page.get_by_role("button", name="Revoke this key").click()
    expect(page.get_by_role("heading", name="The key is revoked")).to_be_visible()
    assert not any(kid.startswith(short) for kid in published(installation))
    page.get_by_role("link", name="Look at the keys").click()
    revoked = page.get_by_role("row").filter(has=page.get_by_text("revoked", exact=True))
    expect(revoked.filter(has_text=short)).to_be_visible()
    other.reload()
    expect(other.get_by_role("heading", name="Sign in")).to_be_visible()


def test_all_keys_are_revoked_by_who_types_so_and_a_rotation_is_asked_for_after_that(
    installation: Authority, new_context: NewContext
) -> None:
    page = signed_in(new_context().new_page(), installation)
    before = published(installation)
    page.get_by_role("link", name="Signing keys", exact=True).click()
    page.get_by_role("link", name="Revoke all keys").click()
    page.get_by_label("Reason").fill("the host was stolen")
    page.get_by_label("Type “revoke all” to confirm").fill("revoke all")
    page.get_by_role("button", name="Revoke all keys").click()
    expect(page.get_by_role("heading", name="All keys are revoked")).to_be_visible()
    assert not {*before} & {*published(installation)}

    page.get_by_role("link", name="Look at the keys").click()
    page.get_by_label("Reason").fill("a fresh start")
    page.get_by_role("button", name="Rotate").click()
    expect(page.get_by_role("heading", name="A rotation was asked for")).to_be_visible()
    expect(page.get_by_role("button", name="Rotate")).to_have_count(0)
    page.get_by_role("link", name="Home").click()
    expect(page.get_by_role("heading", name="All is well")).to_be_visible()
