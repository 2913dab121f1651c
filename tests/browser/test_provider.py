"""Signing in through a human portal: `oidc-provider` on Node, unmodified, behind a real browser."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import httpx
import pytest
from playwright.sync_api import BrowserContext, Page, Request, expect

from service.console import page as pages
from service.console.provider_sign_in import COOKIE as TRANSACTION
from tests.browser.conftest import NewContext
from tests.browser.examine import too_heavy, too_wide, violations
from tests.interop.running import Authority, free_port, running_authority

ANNA = {
    "name": "Anna Kowalska",
    "preferred_username": "Anna.Kowalska@bank.example",
    "email": "anna.kowalska@bank.example",
}
READER = ["service-users:read", "audit:read"]


class Portal:
    """A running provider, whose accounts and their claims a test sets."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self._accounts: dict[str, Any] = {}

    def knows(self, login: str, **claims: Any) -> None:
        """Set the claims of one account; any password opens it."""
        self._accounts[login] = claims
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(self._accounts) + "\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline() == "set\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Installation:
    """An authority whose people sign in through a portal."""

    authority: Authority
    portal: Portal
    api: httpx.Client

    @property
    def url(self) -> str:
        return f"{self.authority.issuer}/console"

    def person(self, name: str) -> dict[str, Any]:
        """Return the service user of a person, by its name."""
        (found,) = self.api.get("/service-users", params={"name": name}).json()["service_users"]
        return found

    def records(self, person: dict[str, Any], action: str) -> list[dict[str, Any]]:
        """Return what is on record of a person, the newest first."""
        wanted = {"service_user": person["id"], "action": action, "order": "desc"}
        return self.api.get("/audit-records", params=wanted).json()["records"]


@pytest.fixture(scope="module")
def installation(
    node_packages: Path,
    skip_or_fail: Callable[[str], NoReturn],
    tmp_path_factory: pytest.TempPathFactory,
) -> Generator[Installation, None, None]:
    """One installation for all tests here, a client with a secret."""
    node = shutil.which("node")
    if node is None:
        skip_or_fail("there is no node")
    port = free_port()
    secret = "a secret: with/odd+characters%"
    settings = {
        "PRIVYSEAL_OIDC_ISSUER": f"http://localhost:{port}",
        "PRIVYSEAL_OIDC_CLIENT_ID": "privyseal",
        "PRIVYSEAL_OIDC_CLIENT_SECRET": secret,
        "PRIVYSEAL_OIDC_NAME": "Bank Portal",
    }
    log = tmp_path_factory.mktemp("portal") / "portal.log"
    with running_authority(**settings) as authority:
        callback = f"{authority.issuer}/console/sign-in/callback"
        command = (node, "oidc_provider.mjs", str(port), callback, secret)
        with _portal(command, node_packages, log) as portal:
            api = f"{authority.issuer}/api/v1"
            token = httpx.post(
                f"{authority.issuer}/oauth/token",
                data={"grant_type": "client_credentials", "resource": api},
                auth=(authority.client_id, authority.client_secret),
                timeout=10,
            ).json()["access_token"]
            bearer = {"Authorization": f"Bearer {token}"}
            with httpx.Client(base_url=api, headers=bearer, timeout=10) as client:
                yield Installation(authority=authority, portal=portal, api=client)


@pytest.fixture
def context(new_context: NewContext) -> BrowserContext:
    """A browser that nobody has signed in with, at the portal or here."""
    return without_fonts(new_context())


def test_a_person_signs_in_through_the_portal_and_may_do_what_it_says(
    installation: Installation, context: BrowserContext
) -> None:
    installation.portal.knows("anna", **ANNA, privyseal_scopes=[*READER, "coffee:brew"])
    page = context.new_page()
    page.goto(f"{installation.url}?from=bookmark")
    sign_in(page, "anna")
    page.wait_for_url(f"{installation.url}?from=bookmark")
    expect(page.locator(".who-name")).to_have_text("anna.kowalska")
    side = page.get_by_role("navigation", name="Console")
    expect(side.get_by_role("link", name="API keys")).to_be_visible()
    expect(side.get_by_role("link", name="Signing keys")).to_have_count(0)
    (session,) = [cookie for cookie in context.cookies() if "privyseal" in cookie.get("name", "")]
    assert session.get("name") == pages.COOKIE
    assert session.get("sameSite") == "Strict"

    person = installation.person("anna.kowalska")
    assert person["scopes"] == READER
    assert person["audiences"] == [f"{installation.authority.issuer}/api/v1"]
    assert (person["source_system"], person["status"]) == ("console", "active")
    assert (person["owner"], person["contact"]) == (ANNA["name"], ANNA["email"])
    assert person["description"].endswith(" as anna")
    (created,) = installation.records(person, "service_user.create")
    assert created["details"]["scopes"] == READER
    (issued,) = installation.records(person, "token.issue")
    assert (issued["credential_id"], issued["aud"]) == (None, installation.url)


def test_what_the_portal_says_counts_from_the_next_sign_in(
    installation: Installation, new_context: NewContext
) -> None:
    for scopes in (READER, READER, ["signing-keys:read"]):
        installation.portal.knows("bela", preferred_username="bela", privyseal_scopes=scopes)
        page = without_fonts(new_context()).new_page()
        page.goto(installation.url)
        sign_in(page, "bela")
        page.wait_for_url(installation.url)
    side = page.get_by_role("navigation", name="Console")
    expect(side.get_by_role("link", name="Signing keys")).to_be_visible()
    expect(side.get_by_role("link", name="API keys")).to_have_count(0)
    person = installation.person("bela")
    assert (person["scopes"], person["version"]) == (["signing-keys:read"], 2)
    (changed,) = installation.records(person, "service_user.change")
    assert changed["details"] == {"scopes": {"from": READER, "to": ["signing-keys:read"]}}
    assert changed["actor"] == "privyseal console"


def test_who_is_disabled_is_out_at_the_next_click_and_does_not_come_in_again(
    installation: Installation, context: BrowserContext
) -> None:
    installation.portal.knows("carl", preferred_username="carl", privyseal_scopes=READER)
    page = context.new_page()
    page.goto(installation.url)
    sign_in(page, "carl")
    page.wait_for_url(installation.url)
    person = installation.person("carl")
    assert installation.api.post(f"/service-users/{person['id']}/disable").status_code == 200

    page.get_by_role("link", name="Home").click()
    expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
    expect(page.get_by_role("alert")).to_contain_text("carl is disabled")
    page.get_by_role("link", name="Sign in with Bank Portal").click()
    expect(page.get_by_role("heading", name="You are not signed in")).to_be_visible()
    expect(page.get_by_role("alert")).to_contain_text("carl is disabled here")
    page.goto(installation.url)
    expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
    assert [r["outcome"] for r in installation.records(person, "token.issue")] == [
        "refused",
        "success",
    ]


def test_who_is_granted_nothing_is_told_whom_to_ask_and_sees_nothing_else(
    installation: Installation, context: BrowserContext
) -> None:
    installation.portal.knows("dora", preferred_username="dora")
    page = context.new_page()
    page.goto(installation.url)
    sign_in(page, "dora")
    page.wait_for_url(installation.url)
    for path in ("", "/token", "/upload", "/me", "/audit", "/service-users"):
        answer = page.goto(f"{installation.url}{path}")
        assert answer is not None
        assert answer.status == 403
        expect(page.get_by_role("heading", name="Nothing is granted to you yet")).to_be_visible()
    expect(page.get_by_role("main")).to_contain_text("as dora")
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_role("heading", name="Sign in")).to_be_visible()


def test_no_script_is_needed(installation: Installation, new_context: NewContext) -> None:
    installation.portal.knows("emil", preferred_username="emil", privyseal_scopes=READER)
    page = without_fonts(new_context(java_script_enabled=False)).new_page()
    page.goto(installation.url)
    sign_in(page, "emil")
    page.wait_for_url(installation.url)
    expect(page.locator(".who-name")).to_have_text("emil")


def test_who_says_no_at_the_portal_is_told_so(
    installation: Installation, context: BrowserContext
) -> None:
    page = context.new_page()
    page.goto(installation.url)
    page.get_by_role("link", name="Sign in with Bank Portal").click()
    page.get_by_role("link", name="Cancel").click()
    expect(page.get_by_role("alert")).to_contain_text("Bank Portal did not let you in")
    page.get_by_role("link", name="Begin again").click()
    expect(page.get_by_role("heading", name="Sign in", exact=True)).to_be_visible()


def test_an_answer_of_the_portal_is_good_once_and_in_one_browser(
    installation: Installation, context: BrowserContext, new_context: NewContext
) -> None:
    installation.portal.knows("fred", preferred_username="fred", privyseal_scopes=READER)
    answers: list[str] = []
    callback = f"{installation.url}/sign-in/callback?"

    def note(sent: Request) -> None:
        if sent.url.startswith(callback):
            answers.append(sent.url)

    context.on("request", note)
    page = context.new_page()
    page.goto(installation.url)
    page.get_by_role("link", name="Sign in with Bank Portal").click()
    expect(page.get_by_role("button", name="Sign-in")).to_be_visible()
    (kept,) = (c.get("value") for c in context.cookies() if c.get("name") == TRANSACTION)
    sign_in_there(page, "fred")
    page.wait_for_url(installation.url)
    page.get_by_role("button", name="Sign out").click()
    (answer,) = answers
    for again in (page, new_context().new_page()):
        again.goto(answer)
        expect(again.get_by_role("alert")).to_contain_text("not begun in this browser")
        assert pages.COOKIE not in {c.get("name") for c in again.context.cookies()}

    # Nor with what the browser had kept for it: a code is good once (RFC 6749 §4.1.2).
    secure = installation.url.replace("http:", "https:")
    context.add_cookies([{"name": TRANSACTION, "value": kept or "", "url": secure, "secure": True}])
    page.goto(answer)
    expect(page.get_by_role("alert")).to_contain_text("did not say who you are")


def test_another_state_is_refused(installation: Installation, context: BrowserContext) -> None:
    page = context.new_page()
    page.goto(installation.url)
    page.get_by_role("link", name="Sign in with Bank Portal").click()
    expect(page.get_by_role("button", name="Sign-in")).to_be_visible()
    page.goto(f"{installation.url}/sign-in/callback?code=stolen&state=guessed")
    expect(page.get_by_role("alert")).to_contain_text("not begun in this browser")


def test_what_was_typed_survives_a_session_that_ended(
    installation: Installation, context: BrowserContext
) -> None:
    writer = ["service-users:read", "service-users:write"]
    installation.portal.knows("gina", preferred_username="gina", privyseal_scopes=writer)
    page = context.new_page()
    page.goto(f"{installation.url}/service-users/new")
    sign_in(page, "gina")
    page.get_by_label("Name", exact=True).fill("typed")
    page.get_by_label("Source system").fill("vkyc")
    context.clear_cookies(name=pages.COOKIE)
    page.get_by_role("button", name="Create").click()

    with context.expect_page() as opened:
        page.get_by_role("link", name="Sign in with Bank Portal").click()
    opened.value.wait_for_url(installation.url)
    page.get_by_role("button", name="I have signed in: go on").click()
    expect(page.get_by_role("heading", name="You are signed in again")).to_be_visible()
    page.get_by_role("button", name="Send it now").click()
    page.wait_for_url(re.compile("/console/service-users/su_"))
    assert installation.person("typed")["source_system"] == "vkyc"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_pages_on_the_way_are_for_everybody(
    scheme: str, installation: Installation, new_context: NewContext, node_packages: Path
) -> None:
    axe = (node_packages / "node_modules" / "axe-core" / "axe.min.js").read_text("utf-8")
    installation.portal.knows("hans", preferred_username="hans")
    page = without_fonts(new_context(color_scheme=scheme)).new_page()

    def complaints() -> list[str]:
        return violations(page, axe) + too_wide(page) + too_heavy(page)

    page.goto(installation.url)
    assert complaints() == []
    page.goto(f"{installation.url}/sign-in/callback")
    assert complaints() == []
    # It moves on by itself: kept here, so that it can be looked at.
    page.route(installation.url, lambda route: route.fulfill(status=204))
    page.get_by_role("link", name="Begin again").click()
    sign_in(page, "hans")
    expect(page.get_by_role("heading", name="You are signed in")).to_be_visible()
    assert complaints() == []
    page.unroute(installation.url)
    page.get_by_role("link", name="Go on").click()
    expect(page.get_by_role("heading", name="Nothing is granted to you yet")).to_be_visible()
    assert complaints() == []


def without_fonts(context: BrowserContext) -> BrowserContext:
    """Keep the portal's own pages from looking for fonts elsewhere."""
    context.route(re.compile("^https:"), lambda route: route.abort())
    return context


def sign_in(page: Page, login: str) -> None:
    """Sign in through the portal, as somebody who was never there."""
    page.get_by_role("link", name="Sign in with Bank Portal").click()
    sign_in_there(page, login)


def sign_in_there(page: Page, login: str) -> None:
    """Fill the portal's own pages."""
    page.get_by_placeholder("Enter any login").fill(login)
    page.get_by_placeholder("and password").fill("any")
    page.get_by_role("button", name="Sign-in").click()
    page.get_by_role("button", name="Continue").click()


@contextmanager
def _portal(command: tuple[str, ...], folder: Path, log: Path) -> Generator[Portal, None, None]:
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
            text=True,
        )
    try:
        portal = Portal(process)
        portal.knows("nobody")
        yield portal
    finally:
        assert process.stdin is not None
        process.stdin.close()  # it ends then
        process.wait(10)
