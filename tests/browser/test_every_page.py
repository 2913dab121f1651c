"""What holds of every page: for people who see little, who use keys alone, whose screen is small.

Those with an address are in `pages.py`, and a test holds that equal to the route table; those that
a form answers with are in `walks.py`.
"""

from collections.abc import Callable, Generator, Mapping
from itertools import chain
from pathlib import Path
from typing import TypeAlias

import pytest
from playwright.sync_api import Page

from tests.browser.conftest import Console, NewContext, SignIn
from tests.browser.examine import too_heavy, too_wide, violations
from tests.browser.pages import INTEGRATOR, OPERATOR, PUBLIC
from tests.browser.walks import Walker

People: TypeAlias = Callable[[str], Mapping[str, Page]]


@pytest.fixture(scope="module")
def places(console: Console) -> Mapping[str, str]:
    """A service user with a credential and a record, for the pages that show one."""
    client_id, _ = console.new_service_user("every-page", "ingest:write", "search:read")
    return console.places(client_id)


@pytest.fixture(scope="module")
def integrator(console: Console) -> tuple[str, str]:
    """An integrator's credential."""
    return console.new_service_user("every-own-page", "ingest:write")


@pytest.fixture(scope="module")
def axe(node_packages: Path) -> str:
    """The source of axe-core."""
    return (node_packages / "node_modules" / "axe-core" / "axe.min.js").read_text("utf-8")


@pytest.fixture
def people(new_context: NewContext, sign_in: SignIn, integrator: tuple[str, str]) -> People:
    """Return a page each of somebody unknown, an operator and an integrator, light or dark."""

    def in_scheme(scheme: str) -> Mapping[str, Page]:
        unknown, operator, own = (new_context(color_scheme=scheme).new_page() for _ in range(3))
        sign_in(operator)
        sign_in(own, integrator)
        return {"unknown": unknown, "operator": operator, "integrator": own}

    return in_scheme


def every_page(
    console: Console, people: Mapping[str, Page], places: Mapping[str, str]
) -> Generator[tuple[str, Page], None, None]:
    """Open page after page."""
    for who, pages in (("unknown", PUBLIC), ("operator", OPERATOR), ("integrator", INTEGRATOR)):
        for name, path in pages.items():
            page = people[who]
            page.goto(console.url + path.format(**places))
            yield name, page


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_page_is_for_everybody(
    console: Console,
    people: People,
    new_context: NewContext,
    sign_in: SignIn,
    places: Mapping[str, str],
    axe: str,
    scheme: str,
) -> None:
    walker = Walker(console, lambda: new_context(color_scheme=scheme), sign_in, f"walk-{scheme}")
    found: list[str] = []
    for name, page in chain(every_page(console, people(scheme), places), walker.walk()):
        if scheme == "light":
            complaints = violations(page, axe) + too_wide(page) + too_heavy(page)
        else:  # other colours, and all else is the same
            complaints = violations(page, axe, "color-contrast")
        found += [f"{name}: {complaint}" for complaint in complaints]
    assert found == []


def test_every_control_is_reached_by_keys_and_shows_that_it_is(
    console: Console, people: People, places: Mapping[str, str]
) -> None:
    found: list[str] = []
    for name, page in every_page(console, people("light"), places):
        page.evaluate("document.activeElement.blur()")
        expected: int = page.evaluate(
            """() => [...document.querySelectorAll('a[href], button, input, select, textarea,'
            + 'summary, [tabindex="0"]')].filter((e) => e.checkVisibility()
              && !e.disabled && e.type !== 'hidden').length"""
        )
        reached: set[str] = set()
        for _ in range(expected + 5):
            page.keyboard.press("Tab")
            place, outlined = page.evaluate(
                """() => {
                  const e = document.activeElement;
                  const all = [...document.querySelectorAll('*')];
                  const style = getComputedStyle(e);
                  return [`${all.indexOf(e)}`, e === document.body
                    || style.outlineStyle !== 'none' || style.boxShadow !== 'none'];
                }"""
            )
            reached.add(place)
            if not outlined:
                found.append(f"{name}: focus is not seen at element {place}")
        # A group of radio buttons is one stop; the document itself counts as one.
        radios: int = page.evaluate("document.querySelectorAll('input[type=radio]').length")
        if len(reached) < expected - radios:
            found.append(f"{name}: {len(reached)} of {expected} controls reached")
    assert found == []
