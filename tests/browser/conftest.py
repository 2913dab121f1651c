"""The console in a real Chromium, with a live authority and a live ingest service behind it.

Knows of both only what came over HTTP. A page that breaks its own policy fails its test.
"""

import json
import shutil
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeAlias

import httpx
import pytest
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, sync_playwright

from tests.interop.running import (
    Authority,
    IngestService,
    free_port,
    running_authority,
    running_ingest,
)

NewContext: TypeAlias = Callable[..., BrowserContext]
SignIn: TypeAlias = Callable[..., None]

# Chromium finds nothing outside of this machine, and looks for nothing.
_ARGUMENTS = (
    "--no-sandbox",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Console:
    """A running installation as its people know it: addresses, and the first operator."""

    authority: Authority
    ingest: IngestService
    api: httpx.Client = field(repr=False)
    """The admin API with the first operator's token; paths begin after `/api/v1`."""

    @property
    def url(self) -> str:
        """Where the console is."""
        return f"{self.authority.issuer}/console"

    @property
    def operator(self) -> tuple[str, str]:
        """The first operator's `client_id` and `client_secret`."""
        return self.authority.client_id, self.authority.client_secret

    def new_service_user(self, name: str, *scopes: str, **further: Any) -> tuple[str, str]:
        """Create a service user and return its credential."""
        new = {"name": name, "source_system": "vkyc", "scopes": scopes, **further}
        made = self.api.post("/service-users", json=new)
        assert made.status_code == 201, made.text
        credential = self.api.post(
            f"/service-users/{made.json()['id']}/credentials", json={"label": "browser"}
        )
        assert credential.status_code == 201, credential.text
        return credential.json()["client_id"], credential.json()["client_secret"]

    def places(self, service_user_id: str) -> dict[str, str]:
        """Return what fills the braces of the pages of a service user with a credential."""
        of_it = {"service_user": service_user_id, "order": "desc", "limit": 1}
        return {
            "service_user_id": service_user_id,
            "credential_id": self._first(
                f"/service-users/{service_user_id}/credentials", "credentials"
            )["id"],
            "record_id": self._first("/audit-records", "records", **of_it)["id"],
            "kid": self._first("/signing-keys", "signing_keys")["kid"],
        }

    def _first(self, path: str, list_name: str, **params: Any) -> dict[str, Any]:
        found = self.api.get(path, params=params)
        assert found.status_code == 200, found.text
        return found.json()[list_name][0]


@pytest.fixture(scope="session")
def console() -> Generator[Console, None, None]:
    """One installation for all tests of this folder."""
    ingest_port = free_port()
    ingest_url = f"http://127.0.0.1:{ingest_port}/api/v1/ingest"
    # Logs hold nothing secret at any level, so they are looked through at the lowest.
    settings = {"PRIVYSEAL_INGEST_URL": ingest_url, "PRIVYSEAL_LOG_LEVEL": "debug"}
    with running_authority(**settings) as authority:
        api = f"{authority.issuer}/api/v1"
        with httpx.Client(base_url=api, timeout=10) as client:
            exchanged = httpx.post(
                f"{authority.issuer}/oauth/token",
                data={"grant_type": "client_credentials", "resource": api},
                auth=(authority.client_id, authority.client_secret),
                timeout=10,
            )
            client.headers["Authorization"] = f"Bearer {exchanged.json()['access_token']}"
            reporter = _reporter(client, api)
            with running_ingest(authority, port=ingest_port, **reporter) as ingest:
                yield Console(authority=authority, ingest=ingest, api=client)


@pytest.fixture(scope="session")
def chromium(skip_or_fail: Callable[[str], NoReturn]) -> Generator[Browser, None, None]:
    """A real Chromium without a screen."""
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        skip_or_fail("there is no chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=program,
            args=_ARGUMENTS,
            # What a browser of people does, too: a page may come back out of memory.
            ignore_default_args=["--disable-back-forward-cache"],
        )
        yield browser
        browser.close()


@pytest.fixture
def new_context(chromium: Browser) -> Generator[NewContext, None, None]:
    """`new_context(java_script_enabled=…, color_scheme=…)` is a browser of one person."""
    contexts: list[BrowserContext] = []
    broken: list[str] = []

    def told(message: ConsoleMessage) -> None:
        if "Content Security Policy" in message.text:
            broken.append(message.text)

    def make(**options: Any) -> BrowserContext:
        context = chromium.new_context(**options)
        context.set_default_timeout(10_000)
        context.on("console", told)
        context.on("weberror", lambda error: broken.append(str(error.error)))
        contexts.append(context)
        return context

    yield make
    for context in contexts:
        context.close()
    assert broken == []


@pytest.fixture
def page(new_context: NewContext) -> Page:
    """A page of somebody who has not signed in."""
    return new_context().new_page()


@pytest.fixture
def sign_in(console: Console) -> SignIn:
    """`sign_in(page, credential)` signs in as a person does: the first operator unless told."""

    def signed_in(page: Page, credential: tuple[str, str] | None = None) -> None:
        client_id, client_secret = credential or console.operator
        page.goto(console.url)
        page.get_by_label("Client ID").fill(client_id)
        page.get_by_label("Client secret").fill(client_secret)
        page.get_by_role("button", name="Sign in").click()
        page.wait_for_url(console.url)

    return signed_in


@pytest.fixture
def operator_page(page: Page, sign_in: SignIn) -> Page:
    """The home page of the first operator."""
    sign_in(page)
    return page


def _reporter(api: httpx.Client, audience: str) -> dict[str, str]:
    """Make the credential with which the ingest service reports its calls."""
    new = {
        "name": "ingest",
        "source_system": "ingest",
        "scopes": ["audit:report"],
        "audiences": [audience, "http://127.0.0.1:8081"],
    }
    made = api.post("/service-users", json=new)
    assert made.status_code == 201, made.text
    path = f"/service-users/{made.json()['id']}/credentials"
    credential: dict[str, Any] = json.loads(api.post(path, json={"label": "reports"}).text)
    return {
        "INGEST_CLIENT_ID": credential["client_id"],
        "INGEST_CLIENT_SECRET": credential["client_secret"],
    }
