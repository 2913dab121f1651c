"""What others chose is text on every page, in every log, and no page is framed (TRIALS A3-A5).

The fixtures fail a test whose page reports a broken policy or an error of a script.
"""

import hashlib
import json
import threading
import time
from collections.abc import Callable, Generator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import httpx
import jwt
import pytest
from playwright.sync_api import Browser, Page, Request, expect

from keys.verifier.strict import base64url_encode
from service.authority.audit import new_record_id
from tests.browser.conftest import Console, NewContext, SignIn
from tests.browser.pages import INTEGRATOR, OPERATOR

PAYLOAD: Final = (
    "\"'><script>run(1)</script><img src=//evil.example/x onerror=run(2)><svg onload=run(3)>"
)
SEEN: Final = "<script>run(1)"
"""What of the payload a person sees, if it is text."""
SHOWS: Final = {
    *("home", "service users", "service user", "change service user", "disable service user"),
    *("revoke credential", "confirm credential", "credentials that end"),
    *("audit", "audit tail", "audit record", "rotation"),
    *("own home", "own credentials", "own rotation", "own audit"),
}
"""The pages that must show it: else this test would look at nothing."""


@pytest.fixture
def hostile(console: Console) -> tuple[str, str]:
    """The credential of a service user whose every text is the payload, in use and about to end."""
    new = {
        "name": "hostile-everywhere",
        "source_system": "hostile",
        "scopes": ["ingest:write"],
        "owner": PAYLOAD,
        "contact": PAYLOAD,
        "description": PAYLOAD,
    }
    made = console.api.post("/service-users", json=new).json()
    ends = (datetime.now(UTC) + timedelta(days=3)).isoformat()
    credential = console.api.post(
        f"/service-users/{made['id']}/credentials", json={"label": PAYLOAD, "expires_at": ends}
    ).json()
    return credential["client_id"], credential["client_secret"]


def exchanged(console: Console, credential: tuple[str, str], **form: str) -> str:
    """Exchange a credential, as a program that says it is the payload."""
    answer = httpx.post(
        f"{console.authority.issuer}/oauth/token",
        data={"grant_type": "client_credentials", **form},
        auth=credential,
        headers={"User-Agent": PAYLOAD},
        timeout=10,
    )
    assert answer.status_code == 200, answer.text
    return answer.json()["access_token"]


def reported(console: Console, token: str) -> str:
    """Report a call with a token whose every text is the payload; return the id of its record."""
    api = f"{console.authority.issuer}/api/v1"
    audiences = [api, console.ingest.audience]
    reporter = console.new_service_user("hostile-reporter", "audit:report", audiences=audiences)
    event = {
        "type": "api.call",
        "id": str(new_record_id(time.time())),
        "occurred_at": datetime.now(UTC).isoformat(),
        "jti": jwt.decode(token, options={"verify_signature": False})["jti"],
        "kid": jwt.get_unverified_header(token)["kid"],
        "signing_input_sha256": base64url_encode(
            hashlib.sha256(token.rpartition(".")[0].encode()).digest()
        ),
        "action": "document.ingest",
        "resource": PAYLOAD,
        "department": PAYLOAD,
        "user_agent": PAYLOAD,
        "outcome": "success",
        "request_id": "hostile",
        "client_address": "192.0.2.7",
    }
    bearer = {"Authorization": f"Bearer {exchanged(console, reporter, resource=api)}"}
    answer = httpx.post(f"{api}/audit-events", json={"events": [event]}, headers=bearer, timeout=10)
    assert [each["status"] for each in answer.json()["results"]] == ["recorded"], answer.text
    return event["id"]


def recorded(console: Console, **wanted: str) -> dict[str, Any]:
    """Return the newest record that meets the filters, once it is shown."""
    deadline = time.monotonic() + 10
    while True:
        found = console.api.get("/audit-records", params={**wanted, "order": "desc"}).json()
        if found["records"]:
            return found["records"][0]
        assert time.monotonic() < deadline, wanted


def test_a3_what_others_chose_runs_on_no_page(
    console: Console, new_context: NewContext, sign_in: SignIn, hostile: tuple[str, str]
) -> None:
    token = exchanged(console, hostile)
    called = reported(console, token)
    rotated = console.api.post("/signing-keys/rotate", json={"reason": PAYLOAD})
    assert rotated.status_code < 300, rotated.text
    rotation = recorded(console, action="signing_key.rotate")
    recorded(console, request_id="hostile")
    places = {**console.places(hostile[0]), "record_id": called}
    operator, own = new_context().new_page(), new_context(user_agent=PAYLOAD).new_page()
    sign_in(operator)
    sign_in(own, hostile)
    looked_at = [
        *((operator, name, path) for name, path in OPERATOR.items()),
        (operator, "rotation", f"/audit/records/{rotation['id']}"),
        *((own, name, path) for name, path in INTEGRATOR.items()),
    ]
    elsewhere = [_watched(page, console) for page in (operator, own)]
    shown: set[str] = set()
    for page, name, path in looked_at:
        page.goto(console.url + path.format(**places))
        assert page.evaluate("ran") == [], name
        assert page.locator("img, svg[onload], main script, [onerror]").count() == 0, name
        if SEEN in page.locator("main").inner_text() or SEEN in _typed(page):
            shown.add(name)
    assert elsewhere == [[], []]
    assert SHOWS - shown == set()


def test_a3_a_payload_would_be_found(console: Console, operator_page: Page) -> None:
    """The same look at a page without a policy, that takes the payload for what it says."""
    page = operator_page
    elsewhere = _watched(page, console)
    page.route("**/unsafe", lambda route: route.fulfill(body=PAYLOAD, content_type="text/html"))
    page.goto(f"{console.authority.issuer}/unsafe")
    expect(page.locator("img")).to_have_count(1)
    assert 1 in page.evaluate("ran")
    assert any("evil.example" in address for address in elsewhere)


@pytest.fixture
def neighbour() -> Generator[Callable[[str], str], None, None]:
    """Serve a page from another port of this host, and return its address: it is the same site,
    so the cookie comes along."""
    page = ""

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-type", "text/html")
            self.end_headers()
            self.wfile.write(page.encode())

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()

    def serve(html: str) -> str:
        nonlocal page
        page = html
        return f"http://127.0.0.1:{server.server_address[1]}/"

    yield serve
    server.shutdown()
    thread.join()
    server.server_close()


def test_a4_no_page_is_framed_not_even_by_a_neighbour(
    console: Console, chromium: Browser, sign_in: SignIn, neighbour: Callable[[str], str]
) -> None:
    # Not of `new_context`: here a policy is broken on purpose.
    with closing(chromium.new_context()) as context:
        page = context.new_page()
        sign_in(page)
        # What may be framed is: else none of these would say anything.
        paths = ("/console", "/console/sign-in", "/.well-known/jwks.json")
        frames = [f'<iframe src="{console.authority.issuer}{path}"></iframe>' for path in paths]
        page.goto(neighbour("".join(frames)), wait_until="networkidle")
        _, home, asking, keys = page.frames
        assert "kid" in keys.content()
        for frame in (home, asking):
            assert frame.url.startswith("chrome-error:")
            assert "Privyseal" not in frame.content()


FORGED: Final = '{"event":"answered","status":200,"forged":true}'
BREAKS: Final = ("\n", "\r\n", "\r", "\x0b", "\x1b[2K", "\x85", "\u2028", "\u2029", "\u202e")


def test_a5_one_event_stays_one_line_of_the_log(console: Console, operator_page: Page) -> None:
    log = Path(console.authority.environ["PRIVYSEAL_DATA_DIR"]) / "serve.log"
    written = log.stat().st_size
    page = operator_page
    csrf = page.locator("input[name=csrf]").first.get_attribute("value") or ""
    ask = page.request
    for line_break in BREAKS:
        hostile = f"x{line_break}{FORGED}"
        headers = {"Origin": console.authority.issuer, "User-Agent": f"x{FORGED}"}
        forms: dict[str, dict[str, str | float | bool]] = {
            "/sign-in": {"client_id": hostile, "client_secret": hostile},
            "/service-users/new": {"csrf": csrf, "name": hostile, "owner": hostile},
            "/signing-keys/rotate": {"csrf": csrf, "reason": hostile},
        }
        for path, form in forms.items():
            answer = ask.post(console.url + path, form=form, headers=headers, max_redirects=0)
            assert answer.status < 500, answer.text()
        named = {"X-Request-Id": f"x{FORGED}"}
        for path in ("/service-users?search=", "/nothing/", "/audit?resource=", "/token/names?q="):
            answer = ask.get(console.url + path + quote(hostile), headers=named)
            assert answer.status < 500, answer.text()
    lines = log.read_bytes()[written:].decode("utf-8").splitlines()
    events = [json.loads(line) for line in lines]
    assert len(events) >= 7 * len(BREAKS)
    assert all(isinstance(event, dict) and "level" in event for event in events)
    assert not any("forged" in event for event in events)
    assert any("forged" in event.get("path", "") for event in events)


def _watched(page: Page, console: Console) -> list[str]:
    """Let `ran` on every page from now on be what a payload ran there, and return where to its
    requests go that go elsewhere."""
    page.add_init_script("window.ran = []; window.run = (what) => ran.push(what);")
    elsewhere: list[str] = []

    def noted(request: Request) -> None:
        if not request.url.startswith(console.authority.issuer):
            elsewhere.append(request.url)

    page.on("request", noted)
    return elsewhere


def _typed(page: Page) -> str:
    """What the fields of a page hold."""
    return page.evaluate(
        "[...document.querySelectorAll('input, textarea')].map((each) => each.value).join('\\n')"
    )
