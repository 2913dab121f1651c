"""The pages that a form answers with, each as somebody comes to it: no address leads there.

Those that can be opened by their address are in `pages.py`.
"""

from collections.abc import Callable, Generator
from typing import TypeAlias

from playwright.sync_api import BrowserContext, Page, expect

from tests.browser.conftest import Console, SignIn

Walk: TypeAlias = Generator[tuple[str, Page], None, None]

LONG = "as-long-as-a-name-can-be-" * 3


class Walker:
    """Goes through the console and stops at each answer, so that it can be looked at.

    What it fills in is as long as it may be. `name` is of this walk alone.
    """

    def __init__(
        self,
        console: Console,
        new_context: Callable[[], BrowserContext],
        sign_in: SignIn,
        name: str,
    ) -> None:
        self._console = console
        self._new_context = new_context
        self._sign_in = sign_in
        self._name = f"{name}-{LONG}"[:63]

    def walk(self) -> Walk:
        """Return page after page with its name; the page may be looked at, and not left."""
        operator = self._new_context().new_page()
        self._sign_in(operator)
        yield from self._service_user(operator)
        of_it = operator.url.partition("?")[0]
        yield from self._credential(operator, of_it)
        yield from self._hand_over(operator, of_it)
        yield from self._change(operator, of_it)
        yield from self._token(operator)
        yield from self._upload(operator)
        yield from self._revoked(operator, of_it)
        yield from self._signing_key(operator)
        yield from self._ended_session(operator, of_it)

    def _service_user(self, page: Page) -> Walk:
        page.goto(f"{self._console.url}/service-users/new")
        page.get_by_label("Name", exact=True).fill("Not A Name")
        page.get_by_label("Source system").fill("s" * 63)
        page.get_by_label("Owner").fill("Ä" * 200)
        page.get_by_label("ingest:write").check()
        page.get_by_label("Other scopes").fill("x" * 64)
        page.get_by_role("button", name="Create").click()
        expect(page.get_by_role("alert")).to_contain_text("Nothing was created")
        yield "service user refused", page
        page.get_by_label("Name", exact=True).fill(self._name)
        page.get_by_role("button", name="Create").click()
        expect(page.get_by_role("status")).to_contain_text("make a credential for it")
        yield "service user made", page

    def _credential(self, page: Page, of_it: str) -> Walk:
        page.goto(f"{of_it}/credentials/new")
        form = page.locator("main form")
        credential_id = form.locator("[name=credential_id]").input_value()
        for state in ("credential made", "credential made already"):
            page.get_by_label("Label").fill("x" * 100)
            page.get_by_role("button", name="Create").click()
            expect(page.locator("main")).to_contain_text(
                "is shown this once" if state == "credential made" else "was made already"
            )
            yield state, page
            # As a page does that is loaded again: with the id that was sent before.
            page.goto(f"{of_it}/credentials/new")
            form.locator("[name=credential_id]").evaluate(
                "(field, id) => { field.value = id; }", credential_id
            )

    def _hand_over(self, page: Page, of_it: str) -> Walk:
        page.goto(f"{of_it}/hand-over")
        page.get_by_label("Label").fill("y" * 100)
        page.get_by_role("button", name="Make the link").click()
        link = page.get_by_role("region", name="Link").inner_text()
        yield "hand-over offered", page
        receiver = self._new_context().new_page()
        receiver.goto(link)
        receiver.get_by_role("button", name="Show me the secret").click()
        client_id = receiver.get_by_role("region", name="client ID").inner_text()
        client_secret = receiver.get_by_role("region", name="client secret").inner_text()
        yield "hand-over opened", receiver
        late = self._new_context().new_page()
        late.goto(link)
        late.get_by_role("button", name="Show me the secret").click()
        expect(late.get_by_role("alert")).to_contain_text("and opens once")
        yield "hand-over refused", late
        page.goto(of_it)
        expect(page.get_by_role("alert").first).to_contain_text("opened twice")
        yield "service user with a hand-over opened twice", page
        yield from self._rotation(receiver, (client_id, client_secret))

    def _rotation(self, page: Page, credential: tuple[str, str]) -> Walk:
        self._sign_in(page, credential)
        for state in ("own rotation made", "own rotation refused"):
            page.goto(f"{self._console.url}/me/rotate")
            page.get_by_label("Label of the new one").fill("z" * 100)
            page.get_by_role("button", name="Make the new secret").click()
            if state == "own rotation made":
                expect(page.get_by_role("region", name="client secret")).to_be_visible()
            else:
                expect(page.get_by_role("alert")).to_contain_text("its successor is")
            yield state, page

    def _change(self, page: Page, of_it: str) -> Walk:
        page.goto(f"{of_it}/change")
        page.get_by_label("Owner").fill("Ö" * 200)
        with page.context.expect_page():
            page.evaluate("window.open(location.href)")
        other = page.context.pages[-1]
        other.get_by_label("Owner").fill("Ü" * 200)
        other.get_by_role("button", name="Save").click()
        expect(other.get_by_role("status")).to_contain_text("It is changed")
        other.close()
        page.get_by_role("button", name="Save").click()
        expect(page.get_by_role("alert")).to_contain_text("Somebody changed")
        yield "change overtaken", page
        page.locator("main form [name=csrf]").first.evaluate(
            "(field) => { field.value = 'another'; }"
        )
        page.get_by_role("button", name="Send it again").click()
        expect(page.locator("main")).to_contain_text("was not made for your session")
        yield "form refused", page

    def _token(self, page: Page) -> Walk:
        page.goto(f"{self._console.url}/token?service_user=nobody")
        yield "token of nobody", page
        page.goto(f"{self._console.url}/token?service_user={self._name}")
        page.get_by_role("button", name="Make a token").click()
        expect(page.get_by_role("heading", name="Access token")).to_be_visible()
        yield "token minted", page
        page.get_by_role("link", name="Make another").click()
        page.get_by_label("ingest:write").uncheck()
        page.get_by_label("x" * 64).uncheck()
        page.get_by_role("button", name="Make a token").click()
        expect(page.get_by_role("alert")).to_contain_text("an empty scope")
        yield "token refused", page

    def _upload(self, page: Page) -> Walk:
        page.goto(f"{self._console.url}/upload?service_user={self._name}")
        page.get_by_label("External id").fill("e" * 128)
        page.get_by_role("button", name="Make the command").click()
        expect(page.locator("#curl")).to_contain_text("e" * 128)
        page.locator("details").evaluate_all("all => all.forEach((each) => { each.open = true; })")
        yield "upload command", page
        page.get_by_role("button", name="Try it").click()
        expect(page.get_by_role("heading", name="The try")).to_be_visible()
        yield "upload tried", page
        page.get_by_label("Department").fill("not one word")
        page.get_by_role("button", name="Try it").click()
        expect(page.get_by_label("Department")).to_have_attribute("aria-invalid", "true")
        yield "upload refused", page

    def _revoked(self, page: Page, of_it: str) -> Walk:
        page.goto(of_it)
        page.get_by_role("link", name=f"Revoke {'z' * 100}").click()
        page.get_by_role("button", name="Revoke it").click()
        expect(page.get_by_role("status")).to_contain_text("The credential is revoked")
        yield "credential revoked", page
        page.get_by_role("link", name="Disable").click()
        page.get_by_role("button", name=f"Disable {self._name}").click()
        expect(page.get_by_role("status")).to_contain_text("It is disabled")
        yield "service user disabled", page

    def _signing_key(self, page: Page) -> Walk:
        page.goto(f"{self._console.url}/signing-keys")
        # The next one: no token and no session goes with it.
        row = page.get_by_role("row").filter(has=page.get_by_text("pending", exact=True))
        short = row.locator("code").inner_text().removesuffix("…")
        row.get_by_role("link", name="Revoke").click()
        page.get_by_label("Reason").fill("r" * 200)
        page.get_by_label("to confirm").fill("not this")
        page.get_by_role("button", name="Revoke this key").click()
        expect(page.get_by_label("to confirm")).to_have_attribute("aria-invalid", "true")
        yield "revocation of a key refused", page
        page.get_by_label("to confirm").fill(short)
        page.get_by_role("button", name="Revoke this key").click()
        expect(page.get_by_role("heading", name="The key is revoked")).to_be_visible()
        yield "key revoked", page

    def _ended_session(self, page: Page, of_it: str) -> Walk:
        page.goto(f"{of_it}/change")
        page.get_by_label("Owner").fill("Å" * 200)
        page.context.clear_cookies()
        page.get_by_role("button", name="Save").click()
        expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
        yield "sign-in with what was typed", page
        client_id, client_secret = self._console.operator
        page.get_by_label("Client ID").fill(client_id)
        page.get_by_label("Client secret").fill("not this")
        page.get_by_role("button", name="Sign in").click()
        expect(page.get_by_role("alert")).to_be_visible()
        yield "sign-in refused", page
        page.get_by_label("Client ID").fill(client_id)
        page.get_by_label("Client secret").fill(client_secret)
        page.get_by_role("button", name="Sign in").click()
        expect(page.get_by_role("heading", name="You are signed in again")).to_be_visible()
        yield "signed in again", page
