"""What is asked of a page whoever looks at it: nothing that axe finds, no scrolling sideways on any
screen, and little to load.

Opens no page.
"""

from typing import Any, Final

from playwright.sync_api import Page

WIDTHS: Final = (320, 768, 1280, 1920)
MAX_WEIGHT: Final = 100_000
"""Bytes, with all that the page loads; nothing is taken off for what is in a cache."""


def violations(page: Page, axe: str, *rules: str) -> list[str]:
    """Return what axe-core, whose source `axe` is, finds in the page: by all its rules or these."""
    page.evaluate(axe)
    options = {"runOnly": rules} if rules else {}
    result: dict[str, Any] = page.evaluate("(options) => axe.run(document, options)", options)
    return [
        f"{violation['id']}: {node['html'][:120]}: {node['failureSummary']}"
        for violation in result["violations"]
        for node in violation["nodes"]
    ]


def too_wide(page: Page) -> list[str]:
    """Return where the page scrolls sideways."""
    found: list[str] = []
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 800})
        scrolled = page.evaluate("document.documentElement.scrollWidth")
        if scrolled > width:
            found.append(f"at {width} px it is {scrolled} px wide")
    return found


def too_heavy(page: Page) -> list[str]:
    """Return the weight of the page if that is too much."""
    parts: list[int] = page.evaluate(
        """['navigation', 'resource'].flatMap((kind) => performance.getEntriesByType(kind))
           .map((part) => part.decodedBodySize)"""
    )
    assert len(parts) > 1, "the page has a style sheet"
    assert all(parts), "each part has come"
    return [f"it weighs {sum(parts)} bytes"] if sum(parts) > MAX_WEIGHT else []
