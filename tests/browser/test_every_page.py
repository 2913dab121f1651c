"""What holds of every page: for people who see little, who use keys alone, whose screen is small.

Their list is `pages.py`, and a test holds it equal to the route table.
"""

from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any, Final

import pytest
from playwright.sync_api import Page, Response

from tests.browser.conftest import Console, NewContext, SignIn
from tests.browser.pages import INTEGRATOR, OPERATOR, PUBLIC

WIDTHS: Final = (320, 768, 1280, 1920)
MAX_WEIGHT: Final = 100_000

Open = Callable[[Page, str, str], None]


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


@pytest.fixture(params=["light", "dark"])
def people(
    request: pytest.FixtureRequest,
    new_context: NewContext,
    sign_in: SignIn,
    integrator: tuple[str, str],
) -> Mapping[str, Page]:
    """A page each of somebody unknown, an operator and an integrator, in light and in dark."""
    unknown, operator, own = (new_context(color_scheme=request.param).new_page() for _ in range(3))
    sign_in(operator)
    sign_in(own, integrator)
    return {"unknown": unknown, "operator": operator, "integrator": own}


def every_page(
    console: Console, people: Mapping[str, Page], places: Mapping[str, str]
) -> Generator[tuple[str, Page], None, None]:
    """Open page after page."""
    for who, pages in (("unknown", PUBLIC), ("operator", OPERATOR), ("integrator", INTEGRATOR)):
        for name, path in pages.items():
            page = people[who]
            page.goto(console.url + path.format(**places))
            yield name, page


def test_axe_finds_nothing(
    console: Console, people: Mapping[str, Page], places: Mapping[str, str], axe: str
) -> None:
    found: list[str] = []
    for name, page in every_page(console, people, places):
        page.evaluate(axe)
        result: dict[str, Any] = page.evaluate("axe.run(document)")
        found += [
            f"{name}: {violation['id']}: {node['html'][:120]}: {node['failureSummary']}"
            for violation in result["violations"]
            for node in violation["nodes"]
        ]
    assert found == []


def test_no_page_scrolls_sideways(
    console: Console, people: Mapping[str, Page], places: Mapping[str, str]
) -> None:
    found: list[str] = []
    for name, page in every_page(console, people, places):
        for width in WIDTHS:
            page.set_viewport_size({"width": width, "height": 800})
            scrolled = page.evaluate("document.documentElement.scrollWidth")
            if scrolled > width:
                found.append(f"{name} at {width} px is {scrolled} px wide")
    assert found == []


def test_no_page_weighs_100_kb(
    console: Console, new_context: NewContext, sign_in: SignIn, places: Mapping[str, str]
) -> None:
    page = new_context().new_page()
    sign_in(page)
    weights: dict[str, int] = {}
    answers: list[Response] = []
    for name, path in OPERATOR.items():
        # Nothing of the page before is in this browser's cache.
        fresh = new_context(storage_state=page.context.storage_state()).new_page()
        fresh.on("response", lambda answer: answers.append(answer))
        fresh.goto(console.url + path.format(**places), wait_until="networkidle")
        weights[name] = sum(len(answer.body()) for answer in answers)
        answers.clear()
        fresh.context.close()
    assert {name: weight for name, weight in weights.items() if weight > MAX_WEIGHT} == {}


def test_every_control_is_reached_by_keys_and_shows_that_it_is(
    console: Console, people: Mapping[str, Page], places: Mapping[str, str]
) -> None:
    found: list[str] = []
    for name, page in every_page(console, people, places):
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
