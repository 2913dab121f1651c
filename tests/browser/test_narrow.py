"""What there is to do with a row is in sight on a small screen: rows are cards there."""

from typing import Final

import pytest
from playwright.sync_api import Page

from tests.browser.conftest import Console, NewContext, SignIn

WIDTHS: Final = (320, 390, 600, 768)
ACTIONS: Final = {
    "/service-users": "long-name",
    "/service-users/{service_user_id}": "Revoke browser",
    "/signing-keys": "Revoke",
    "/audit": "token.issue",
}


@pytest.fixture(scope="module")
def long_words(console: Console) -> dict[str, str]:
    """A service user whose columns are full."""
    client_id, _ = console.new_service_user(
        "long-name-" + "n" * 50,
        "ingest:write",
        owner="The department of identity",
        contact="identity@bank.example",
    )
    path = f"/service-users/{client_id}/credentials"
    for label in ("w" * 100, "kept in the vault of the branch offices, since the autumn of 2026"):
        made = console.api.post(path, json={"label": label})
        assert made.status_code == 201, made.text
    return console.places(client_id)


def hidden_parts(page: Page) -> list[str]:
    """The tables that scroll sideways, and the words in them that stand outside of them."""
    return page.evaluate(
        """() => [...document.querySelectorAll('.table:has(.cards)')].flatMap((table) => {
          const edge = table.getBoundingClientRect().right;
          const beyond = [...table.querySelectorAll('tbody a, tbody td, tbody th')]
            .filter((each) => each.checkVisibility() && each.getBoundingClientRect().right > edge);
          return [...(table.scrollWidth > table.clientWidth ? [table.ariaLabel] : []),
            ...beyond.map((each) => each.innerText)];
        })"""
    )


@pytest.mark.parametrize("width", WIDTHS)
def test_no_row_of_a_list_is_cut_off_on_a_small_screen(
    console: Console,
    new_context: NewContext,
    sign_in: SignIn,
    long_words: dict[str, str],
    width: int,
) -> None:
    page = new_context(viewport={"width": width, "height": 800}).new_page()
    sign_in(page)
    for path, action in ACTIONS.items():
        page.goto(console.url + path.format(**long_words))
        link = page.locator(".table").get_by_role("link", name=action).first
        box = link.bounding_box()
        assert box is not None, path
        assert 0 <= box["x"] < box["x"] + box["width"] <= width, path
        assert hidden_parts(page) == [], path
