"""`make screenshots`: a picture of every page under `var/screenshots/`, to be looked at.

Not among the tests: it judges nothing.
"""

from pathlib import Path

import pytest

from tests.browser.conftest import Console, NewContext, SignIn
from tests.browser.pages import INTEGRATOR, OPERATOR, PUBLIC
from tests.browser.walks import Walker

FOLDER = Path(__file__).parents[2] / "var" / "screenshots"
LOOKS = (("light", 1280), ("dark", 1280), ("light", 320))


@pytest.mark.parametrize(("scheme", "width"), LOOKS)
def test_take_a_picture_of_every_page(
    console: Console, new_context: NewContext, sign_in: SignIn, scheme: str, width: int
) -> None:
    name = f"picture-{scheme}-{width}"
    integrator = console.new_service_user(
        name, "ingest:write", "search:read", owner="Video KYC", contact="vkyc@bank.example"
    )
    places = console.places(integrator[0])
    folder = FOLDER / f"{scheme}-{width}"
    folder.mkdir(parents=True, exist_ok=True)
    for pages, credential in (
        (PUBLIC, None),
        (OPERATOR, console.operator),
        (INTEGRATOR, integrator),
    ):
        context = new_context(color_scheme=scheme, viewport={"width": width, "height": 800})
        page = context.new_page()
        if credential:
            sign_in(page, credential)
        for title, path in pages.items():
            page.goto(console.url + path.format(**places), wait_until="networkidle")
            page.screenshot(path=folder / f"{title.replace(' ', '-')}.png", full_page=True)
    walker = Walker(
        console,
        lambda: new_context(color_scheme=scheme, viewport={"width": width, "height": 800}),
        sign_in,
        f"walk-{scheme}-{width}",
    )
    for title, page in walker.walk():
        page.screenshot(path=folder / f"{title.replace(' ', '-')}.png", full_page=True)
