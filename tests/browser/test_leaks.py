"""Where secrets and tokens are after a day at the console: nowhere but where they were shown.

Watched is what a browser sends and keeps, and what the authority and the ingest service log, at
their lowest level.
"""

import base64
import json
import re
import time
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import quote, quote_plus

import pytest
from playwright.sync_api import BrowserContext, Error, Page, Request, expect

from service.console.page import COOKIE
from tests.browser.conftest import Console, NewContext, SignIn

KEPT: Final = """async () => {
  const databases = await indexedDB.databases();
  const caches_ = await caches.keys().catch(() => []);
  return JSON.stringify([
    {...localStorage}, {...sessionStorage}, document.cookie, databases, caches_,
    window.name, history.state, location.href, document.referrer,
    performance.getEntries().map((each) => each.name),
  ]);
}"""


class Sent(NamedTuple):
    """What a request said where others may read it: in its address and its Referer."""

    url: str
    referer: str


class Watch:
    """Notes the addresses that a browser asks for."""

    def __init__(self, context: BrowserContext) -> None:
        self.context = context
        self.sent: list[Sent] = []
        context.on("request", self._note)

    def _note(self, request: Request) -> None:
        self.sent.append(Sent(request.url, request.headers.get("referer", "")))


def spellings(secret: str) -> set[str]:
    """A secret as it may stand somewhere: also the signature of a token alone."""
    raw = secret.encode()
    return {
        *(secret, quote(secret), quote_plus(secret), raw.hex(), secret.rpartition(".")[2]),
        base64.b64encode(raw).decode().rstrip("="),
        base64.urlsafe_b64encode(raw).decode().rstrip("="),
    }


def left_and_looked_for(page: Page, elsewhere: str, secrets: list[str]) -> None:
    """Leave a page, go back to it and forward again: none of the secrets may be there."""
    page.goto(elsewhere)
    for step in (page.go_back, page.go_forward, page.go_back):
        try:
            # A page that comes out of memory does not load.
            step(wait_until="commit")
        except Error as error:
            # Nothing was kept, and no form is sent once more without being asked.
            assert "ERR_CACHE_MISS" in error.message  # noqa: PT017
        content = content_of(page)
        assert not any(secret in content for secret in secrets)
    page.goto(elsewhere)


def content_of(page: Page) -> str:
    """What is on a page, which may just be asking for itself anew."""
    deadline = time.monotonic() + 10
    while True:
        try:
            return page.content()
        except Error:
            assert time.monotonic() < deadline


@pytest.mark.parametrize("scripts", [True, False])
def test_secrets_and_tokens_are_left_nowhere(
    console: Console, new_context: NewContext, sign_in: SignIn, scripts: bool
) -> None:
    name = f"leaks-{scripts}".lower()
    console.new_service_user(name, "ingest:write")
    operators, integrators = (Watch(new_context(java_script_enabled=scripts)) for _ in range(2))
    page = operators.context.new_page()
    sign_in(page)
    secrets = {"operator's secret": console.operator[1]}

    # A credential.
    page.get_by_role("link", name="API keys").click()
    page.get_by_role("link", name=name, exact=True).click()
    of_it = page.url
    page.get_by_role("link", name="New credential").click()
    page.get_by_label("Label").fill("made by hand")
    page.get_by_role("button", name="Create").click()
    secrets["client secret"] = page.locator("#client-secret").inner_text()
    left_and_looked_for(page, of_it, [*secrets.values()])

    # A token, and a command that holds one.
    page.get_by_role("link", name="Token", exact=True).last.click()
    page.get_by_role("button", name="Make a token").click()
    secrets["token"] = page.locator("#token").inner_text()
    left_and_looked_for(page, of_it, [*secrets.values()])
    page.get_by_role("link", name="Upload", exact=True).last.click()
    page.get_by_role("button", name="Make the command").click()
    (secrets["token of a command"],) = re.findall(
        r"Bearer ([\w-]+\.[\w-]+\.[\w-]+)", page.locator("#curl").inner_text()
    )
    left_and_looked_for(page, of_it, [*secrets.values()])
    page.get_by_role("link", name="Upload", exact=True).last.click()
    page.get_by_role("button", name="Try it").click()
    expect(page.get_by_role("status")).to_contain_text("201 Created")

    # A hand-over, opened by somebody else.
    page.goto(of_it)
    page.get_by_role("link", name="Hand over by link").click()
    page.get_by_label("Label").fill("handed over")
    page.get_by_role("button", name="Make the link").click()
    link = page.get_by_role("region", name="Link").inner_text()
    secrets["code"] = link.partition("#")[2]
    left_and_looked_for(page, of_it, [*secrets.values()])
    theirs = integrators.context.new_page()
    theirs.goto(link)
    if not scripts:
        theirs.get_by_label("Link or code").fill(link)
    theirs.get_by_role("button", name="Show me the secret").click()
    secrets["secret that was handed over"] = theirs.get_by_role(
        "region", name="client secret"
    ).inner_text()
    left_and_looked_for(theirs, f"{console.url}/sign-in", [*secrets.values()])

    # Their own successor of it.
    sign_in(theirs, (of_it.rpartition("/")[2], secrets["secret that was handed over"]))
    theirs.goto(f"{console.url}/me/rotate")
    theirs.get_by_label("Label of the new one").fill("successor")
    theirs.get_by_role("button", name="Make the new secret").click()
    secrets["successor"] = theirs.get_by_role("region", name="client secret").inner_text()
    left_and_looked_for(theirs, f"{console.url}/me", [*secrets.values()])
    for watch in (operators, integrators):
        secrets[f"session {len(secrets)}"] = session_of(watch.context)

    found = [
        f"{what} in {where}"
        for where, text in everything_kept(console, operators, integrators, scripts).items()
        for what, secret in secrets.items()
        for spelling in spellings(secret)
        if spelling in text
    ]
    assert found == []
    assert len(secrets) == 9


def session_of(context: BrowserContext) -> str:
    """The token in the cookie."""
    (cookie,) = (each for each in context.cookies() if each.get("name") == COOKIE)
    return cookie.get("value", "")


def everything_kept(
    console: Console, operators: Watch, integrators: Watch, scripts: bool
) -> dict[str, str]:
    """What was sent, kept and logged, by where that is."""
    logs = {
        "the authority's log": Path(console.authority.environ["PRIVYSEAL_DATA_DIR"]) / "serve.log",
        "the ingest service's log": console.ingest.data_dir.parent / "uvicorn.log",
    }
    kept = {name: log.read_text("utf-8") for name, log in logs.items()}
    assert '"event":"answered"' in kept["the authority's log"]
    for whose, watch in (("operator", operators), ("integrator", integrators)):
        assert len(watch.sent) > 10
        # A fragment is sent to nobody (RFC 9110 §4.2.5).
        kept[f"{whose}'s addresses"] = "\n".join(sent.url.partition("#")[0] for sent in watch.sent)
        kept[f"{whose}'s referers"] = "\n".join(sent.referer for sent in watch.sent)
        state: dict[str, Any] = dict(watch.context.storage_state(indexed_db=True))
        kept[f"{whose}'s storage"] = json.dumps(state["origins"])
        if scripts:
            (page,) = watch.context.pages
            kept[f"{whose}'s page"] = page.evaluate(KEPT)
    return kept


def test_a_page_that_is_left_shows_no_secret_any_more(
    console: Console, operator_page: Page
) -> None:
    """Whatever a browser keeps of it, in memory or as a picture."""
    page = operator_page
    client_id, _ = console.new_service_user("wiped", "ingest:write")
    page.goto(f"{console.url}/service-users/{client_id}/credentials/new")
    page.get_by_label("Label").fill("wiped")
    page.get_by_role("button", name="Create").click()
    secret = page.locator("#client-secret").inner_text()
    assert secret.startswith("pvs_")
    assert page.content().count(secret) == 2
    page.evaluate("dispatchEvent(new PageTransitionEvent('pagehide'))")
    assert secret not in page.content()
