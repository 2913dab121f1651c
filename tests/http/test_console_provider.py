"""What a sign-in through the human portal refuses, whatever the portal or the browser sends.

The provider here is hostile: a real HTTP server that says what a test tells it to say.
"""

import asyncio
import base64
import hashlib
import hmac
import json
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Generator
from http.cookies import SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, parse_qsl, urlsplit

import httpx
import pytest
from joserfc.jwk import ECKey, KeySet, RSAKey
from joserfc.jws import JWSRegistry

from keys.secret import Secret
from service.console import page as pages
from service.console.provider import DEADLINE, PATIENCE, REREAD, Provider, SignInFailed, Transaction
from service.console.provider_sign_in import COOKIE
from service.settings import Settings
from tests.http.conftest import Credential, Records
from tests.http.console_client import ConsoleClient

pytestmark = pytest.mark.anyio

CLIENT_ID = "privyseal"
ANNA: dict[str, Any] = {
    "sub": "4711",
    "preferred_username": "anna",
    "privyseal_scopes": ["audit:read"],
}
KEY = RSAKey.generate_key(2048, {"kid": "one", "use": "sig"})
OTHER = RSAKey.generate_key(2048, {"kid": "one", "use": "sig"})
CURVE = ECKey.generate_key("P-256", {"kid": "curve"})


class Hostile:
    """A provider that a test bends; `says` maps a path, or one with `?code=…` of the form, to
    status, headers and body."""

    def __init__(self, port: int) -> None:
        self.issuer = f"http://127.0.0.1:{port}"
        self.asked: list[tuple[str, dict[str, str], dict[str, str]]] = []
        self.let_go = threading.Event()
        """Ends what `hang` and `never_end` hold."""
        self.hang: set[str] = set()
        self.never_end: set[str] = set()
        self.says: dict[str, tuple[int, dict[str, str], bytes]] = {}
        self.describes()
        self.publishes(KEY, CURVE)

    def describes(self, **changed: Any) -> None:
        """Publish a discovery document."""
        metadata = {
            "issuer": self.issuer,
            "authorization_endpoint": f"{self.issuer}/authorize?tenant=1",
            "token_endpoint": f"{self.issuer}/token",
            "jwks_uri": f"{self.issuer}/jwks",
            **changed,
        }
        self.answers("/.well-known/openid-configuration", metadata)

    def publishes(self, *keys: RSAKey | ECKey) -> None:
        """Publish the public halves of these keys."""
        self.answers("/jwks", KeySet([*keys]).as_dict(private=False))

    def answers(self, path: str, body: Any, status: int = 200, **headers: str) -> None:
        """Answer a path with JSON, or with these bytes."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.says[path] = (status, headers, raw)

    def times_asked(self, path: str) -> int:
        return sum(asked == path for asked, _, _ in self.asked)


@pytest.fixture
def hostile() -> Generator[Hostile, None, None]:
    """A provider on a port of its own."""

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            length = int(self.headers.get("content-length", "0"))
            form = dict(parse_qsl(self.rfile.read(length).decode()))
            provider.asked.append((path, form, {k.lower(): v for k, v in self.headers.items()}))
            if path in provider.hang:
                provider.let_go.wait(30)
                return
            said = provider.says.get(f"{path}?code={form.get('code')}") or provider.says.get(path)
            status, headers, body = said or (404, {}, b"")
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            if path in provider.never_end:
                self.end_headers()
                try:
                    while not provider.let_go.is_set():
                        self.wfile.write(b" " * 65_536)
                except OSError:
                    return
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            self.do_GET()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    provider = Hostile(server.server_address[1])
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield provider
    provider.let_go.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def settings(tmp_path: Path, hostile: Hostile) -> Settings:
    """An installation that trusts this provider."""
    return Settings(
        checkpoint_dir=tmp_path / "checkpoints",
        oidc_issuer=hostile.issuer,
        oidc_client_id=CLIENT_ID,
        oidc_name="Bank Portal",
    )


class Browser:
    """What of a browser a sign-in needs: its cookies."""

    def __init__(self, client: httpx.AsyncClient, hostile: Hostile) -> None:
        self._client = client
        self._hostile = hostile
        self.cookies: dict[str, str] = {}

    async def get(self, path: str, **params: Any) -> httpx.Response:
        return self._kept(await self._client.get(path, params=params, headers=self._headers()))

    async def post(self, path: str, **form: str) -> httpx.Response:
        origin = str(self._client.base_url).rstrip("/")
        headers = {**self._headers(), "Origin": origin}
        return self._kept(await self._client.post(path, data=form, headers=headers))

    async def begin(self, **params: str) -> dict[str, str]:
        """Go to the provider and return the parameters that arrive there."""
        answer = await self.get("/console/sign-in/provider", **params)
        assert answer.status_code == 303, answer.text
        address = urlsplit(answer.headers["location"])
        assert f"{address.scheme}://{address.netloc}" == self._hostile.issuer
        return {name: value for name, (value,) in parse_qs(address.query).items()}

    async def sign_in(self, **claims: Any) -> httpx.Response:
        """Sign in as the provider's Anna, with claims of hers changed."""
        asked = await self.begin()
        whole: dict[str, Any] = {**ANNA, "nonce": asked["nonce"], **claims}
        token = signed(self._hostile, **whole)
        self._hostile.answers("/token", {"id_token": token, "token_type": "Bearer"})
        return await self.come_back(asked)

    async def come_back(self, asked: dict[str, str], **changed: Any) -> httpx.Response:
        """Come back as the provider sends people back."""
        sent = {"code": "c0de", "state": asked["state"], **changed}
        return await self.get("/console/sign-in/callback", **sent)

    def _headers(self) -> dict[str, str]:
        if not self.cookies:
            return {}
        return {"Cookie": "; ".join(f"{k}={v}" for k, v in self.cookies.items())}

    def _kept(self, answer: httpx.Response) -> httpx.Response:
        for line in answer.headers.get_list("set-cookie"):
            ((name, cookie),) = SimpleCookie(line).items()
            assert cookie["path"] == "/"
            assert cookie["secure"]
            assert cookie["httponly"]
            self.cookies[name] = cookie.value
            if cookie["max-age"] == "0":
                del self.cookies[name]
        return answer


@pytest.fixture
def browser(client: httpx.AsyncClient, hostile: Hostile) -> Browser:
    """A browser without cookies."""
    return Browser(client, hostile)


def signed(
    hostile: Hostile,
    nonce: str | None,
    *,
    header: dict[str, Any] | None = None,
    key: RSAKey | ECKey | bytes = KEY,
    **claims: Any,
) -> str:
    """Return an ID token as it should be but for what is given; None takes a claim out.

    A key of bytes is that of an HMAC.
    """
    now = int(time.time())
    whole = {
        "iss": hostile.issuer,
        "aud": CLIENT_ID,
        "iat": now,
        "exp": now + 300,
        "nonce": nonce,
        **claims,
    }
    kid = None if isinstance(key, bytes) else key.kid
    named: dict[str, Any] = {"alg": "RS256", "kid": kid, **(header or {})}
    signing_input = ".".join(map(_encoded, (named, whole))).encode()
    if isinstance(key, bytes):
        signature = hmac.digest(key, signing_input, "sha256")
    else:
        signature = JWSRegistry.algorithms[named["alg"]].sign(signing_input, key)
    return f"{signing_input.decode()}.{_base64url(signature)}"


def _encoded(members: dict[str, Any]) -> str:
    given = {name: value for name, value in members.items() if value is not None}
    return _base64url(json.dumps(given).encode())


def _base64url(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


async def test_the_way_there_is_the_code_flow_with_pkce(browser: Browser, hostile: Hostile) -> None:
    asked = await browser.begin(next="/console/audit?action=token.issue")
    assert {name: asked[name] for name in ("tenant", "response_type", "client_id", "scope")} == {
        "tenant": "1",
        "response_type": "code",
        "client_id": CLIENT_ID,
        "scope": "openid profile email",
    }
    assert asked["redirect_uri"] == "http://127.0.0.1:8080/console/sign-in/callback"
    assert asked["code_challenge_method"] == "S256"
    token = signed(hostile, asked["nonce"], **ANNA)
    hostile.answers("/token", {"id_token": token})
    answer = await browser.come_back(asked)
    assert answer.status_code == 200
    assert 'content="0; url=/console/audit?action=token.issue"' in answer.text
    (path, form, headers) = hostile.asked[-1]
    assert path == "/token"
    assert (form["grant_type"], form["code"]) == ("authorization_code", "c0de")
    assert (form["client_id"], "authorization" in headers) == (CLIENT_ID, False)
    digest = hashlib.sha256(form["code_verifier"].encode()).digest()
    assert base64.urlsafe_b64encode(digest).rstrip(b"=").decode() == asked["code_challenge"]
    assert {*browser.cookies} == {pages.COOKIE}


async def test_what_belongs_to_a_sign_in_lasts_ten_minutes_and_leads_nowhere_else(
    browser: Browser, hostile: Hostile
) -> None:
    answer = await browser.get("/console/sign-in/provider", next="https://evil.example/")
    (line,) = answer.headers.get_list("set-cookie")
    assert "max-age=600" in line.lower()
    assert "samesite=lax" in line.lower()
    kept = Transaction.decode(browser.cookies[COOKIE])
    assert kept is not None
    assert kept.following == "/console"
    # And if the browser's holder writes something else into it, neither.
    forged = Transaction(
        state=kept.state, nonce=kept.nonce, code_verifier=kept.code_verifier, following="//evil"
    )
    browser.cookies[COOKIE] = forged.encode()
    hostile.answers("/token", {"id_token": signed(hostile, kept.nonce, **ANNA)})
    answer = await browser.come_back({"state": kept.state})
    assert 'content="0; url=/console"' in answer.text


async def test_other_algorithms_and_forms_of_an_audience_are_taken(
    browser: Browser, hostile: Hostile
) -> None:
    for fits in (
        {"header": {"alg": "ES256"}, "key": CURVE},
        {"aud": [CLIENT_ID]},
        {"aud": [CLIENT_ID, "portal"], "azp": CLIENT_ID},
        {"privyseal_scopes": "audit:read signing-keys:read"},
        {"header": {"x5t": "AAAA", "own": "ignored"}},
    ):
        assert (await browser.sign_in(**fits)).status_code == 200, fits


WRONG: dict[str, dict[str, Any]] = {
    "another issuer's": {"iss": "http://127.0.0.1:1"},
    "for another client": {"aud": "somebody-else"},
    "for another client, which had us ask": {"aud": "somebody-else", "azp": CLIENT_ID},
    "for two clients": {"aud": [CLIENT_ID, "somebody-else"]},
    "of another party": {"azp": "somebody-else"},
    "for nobody": {"aud": None},
    "with another nonce": {"nonce": "replayed"},
    "without a nonce": {"nonce": None},
    "expired": {"exp": int(time.time()) - 120},
    "without an end": {"exp": None},
    "with an end in words": {"exp": "tomorrow"},
    "from the future": {"iat": int(time.time()) + 3600},
    "about nobody": {"sub": None},
    "about an empty name": {"sub": ""},
    "about a list": {"sub": ["4711"]},
    "about too long a name": {"sub": "x" * 256},
    "signed by another key": {"key": OTHER},
    "of an unknown key": {"header": {"kid": "two"}},
    "of no named key among two": {"header": {"kid": None}},
    "not signed": {"header": {"alg": "none", "kid": None}},
    "signed with the public key as a secret": {
        "header": {"alg": "HS256", "kid": "one"},
        "key": KEY.as_pem(private=False),
    },
    "signed with a key for another algorithm": {
        "header": {"alg": "HS256", "kid": "curve"},
        "key": b"guessed",
    },
    "with a header that must be understood": {"header": {"crit": ["exp"], "exp": 1}},
}


async def test_an_id_token_that_does_not_hold_lets_nobody_in(
    browser: Browser,
    records: Callable[..., Awaitable[Records]],
    operator: httpx.AsyncClient,
) -> None:
    for wrong, changed in WRONG.items():
        answer = await browser.sign_in(**changed)
        assert (answer.status_code, wrong) == (403, wrong)
        assert "You are not signed in" in answer.text
        assert "Bank Portal said of you cannot be verified" in answer.text
        assert browser.cookies == {}
    await records(len(WRONG), action="token.issue", reason="provider_not_believed")
    people = await operator.get("/api/v1/service-users", params={"source_system": "console"})
    assert people.json()["service_users"] == []


async def test_a_secret_that_the_provider_publishes_as_a_key_signs_nothing(
    browser: Browser, hostile: Hostile
) -> None:
    secret = b"for everybody to see, 32 bytes.."
    published = {"kty": "oct", "kid": "shared", "k": _base64url(secret)}
    hostile.answers("/jwks", {"keys": [KEY.as_dict(private=False), published]})
    forged = {"header": {"alg": "HS256", "kid": "shared"}, "key": secret}
    assert (await browser.sign_in(**forged)).status_code == 403
    assert (await browser.sign_in()).status_code == 200


async def test_an_answer_without_an_id_token_lets_nobody_in(
    browser: Browser, hostile: Hostile
) -> None:
    answers: list[tuple[Any, int]] = [
        ({"id_token": "a.b.c"}, 403),
        ({"id_token": "…"}, 403),
        ({"id_token": "e30.e30."}, 403),
        ({"id_token": f"{_base64url(b'[1]')}.e30.e30"}, 403),
        ({"access_token": "only"}, 503),
        ([], 503),
        (b"<html>", 503),
    ]
    for body, status in answers:
        asked = await browser.begin()
        hostile.answers("/token", body)
        answer = await browser.come_back(asked)
        assert (answer.status_code, body) == (status, body)
        assert browser.cookies == {}


async def test_the_access_token_beside_it_must_be_the_one_it_names(
    browser: Browser, hostile: Hostile
) -> None:
    asked = await browser.begin()
    token = signed(hostile, asked["nonce"], **ANNA, at_hash="AAAAAAAAAAAAAAAAAAAAAA")
    hostile.answers("/token", {"id_token": token, "access_token": "swapped"})
    assert (await browser.come_back(asked)).status_code == 403


async def test_a_way_back_that_is_not_the_providers_answer_is_refused_in_words(
    browser: Browser, hostile: Hostile, records: Callable[..., Awaitable[Records]]
) -> None:
    refused: Counter[str] = Counter()
    sent: dict[str, Any]
    for sent, reason in (
        ({"state": "guessed"}, "wrong_state"),
        ({"state": ""}, "wrong_state"),
        ({"code": ""}, "provider_error"),
        ({"code": ["c0de", "c1de"]}, "provider_error"),
        ({"error": "access_denied"}, "provider_denied"),
        ({"error": "server_error", "error_description": "call 555-0100"}, "provider_error"),
        ({"iss": "http://127.0.0.1:1"}, "provider_not_believed"),
    ):
        asked = await browser.begin()
        hostile.answers("/token", {"id_token": signed(hostile, asked["nonce"], **ANNA)})
        answer = await browser.come_back(asked, **sent)
        assert (answer.status_code, sent) == (403, sent)
        assert 'href="/console/sign-in"' in answer.text
        assert "555-0100" not in answer.text
        assert browser.cookies == {}
        refused[reason] += 1
    assert hostile.times_asked("/token") == 0
    for reason, times in refused.items():
        await records(times, action="token.issue", outcome="refused", reason=reason)


async def test_an_issuer_that_promises_to_name_itself_must_do_so(
    browser: Browser, hostile: Hostile
) -> None:
    hostile.describes(authorization_response_iss_parameter_supported=True)
    for sent, status in (({}, 403), ({"iss": hostile.issuer}, 200)):
        asked = await browser.begin()
        hostile.answers("/token", {"id_token": signed(hostile, asked["nonce"], **ANNA)})
        assert (await browser.come_back(asked, **sent)).status_code == status


async def test_without_what_the_browser_kept_nobody_comes_in(
    browser: Browser, hostile: Hostile
) -> None:
    for cookie in ("", "e30", "nonsense", "eyJzdGF0ZSI6IiJ9", "%00"):
        asked = await browser.begin()
        hostile.answers("/token", {"id_token": signed(hostile, asked["nonce"], **ANNA)})
        for state in (asked["state"], ""):
            browser.cookies = {COOKIE: cookie} if cookie else {}
            answer = await browser.come_back({"state": state})
            assert (answer.status_code, cookie) == (403, cookie)
    assert hostile.times_asked("/token") == 0


async def test_a_code_that_the_provider_does_not_know_lets_nobody_in(
    browser: Browser, hostile: Hostile
) -> None:
    asked = await browser.begin()
    hostile.answers("/token", {"error": "invalid_grant"}, status=400)
    answer = await browser.come_back(asked)
    assert answer.status_code == 403
    assert "Bank Portal did not say who you are" in answer.text


async def test_a_description_that_cannot_be_this_issuers_is_no_description(
    browser: Browser, hostile: Hostile
) -> None:
    change: dict[str, Any]
    for change in (
        {"issuer": "http://127.0.0.1:1"},
        {"token_endpoint": "ftp://127.0.0.1/token"},
        {"token_endpoint": "http://[::1/token"},
        {"jwks_uri": None},
    ):
        hostile.describes(**change)
        answer = await browser.get("/console/sign-in/provider")
        assert (answer.status_code, change) == (503, change)
        assert "Bank Portal does not answer as it should" in answer.text
        assert browser.cookies == {}


@pytest.mark.parametrize("path", ["/.well-known/openid-configuration", "/jwks", "/token"])
async def test_a_provider_that_does_not_answer_as_one_is_told_in_words(
    path: str, browser: Browser, hostile: Hostile, records: Callable[..., Awaitable[Records]]
) -> None:
    good = hostile.says.get(path, (200, {}, b"{}"))
    hostile.says["/elsewhere"] = good
    faults: dict[str, tuple[int, dict[str, str], bytes]] = {
        "redirects": (302, {"location": f"{hostile.issuer}/elsewhere"}, b""),
        "fails": (500, {}, b""),
        "is empty": (200, {}, b""),
        "never ends": good,
    }
    for fault, said in faults.items():
        hostile.says[path] = said
        if fault == "never ends":
            hostile.never_end.add(path)
        if path == "/token":
            answer = await browser.come_back(await browser.begin())
        else:
            answer = await browser.get("/console/sign-in/provider")
        assert (answer.status_code, fault) == (503, fault)
        assert "Bank Portal does not answer as it should" in answer.text
        assert browser.cookies == {}
    assert hostile.times_asked("/elsewhere") == 0
    await records(len(faults), action="token.issue", reason="provider_unavailable")


async def test_a_provider_that_hangs_holds_nobody_for_long_and_not_one_after_the_other(
    browser: Browser, hostile: Hostile
) -> None:
    hostile.hang.add("/.well-known/openid-configuration")
    began = time.monotonic()
    answers = await asyncio.gather(*(browser.get("/console/sign-in/provider") for _ in range(8)))
    # No timing of this machine, but the deadlines: eight in a row would take forty seconds.
    assert time.monotonic() - began < 2 * PATIENCE
    assert {answer.status_code for answer in answers} == {503}
    assert DEADLINE < PATIENCE


async def test_a_provider_that_is_away_is_told_in_words_and_credentials_still_do(
    browser: Browser, hostile: Hostile, operator_credential: Credential
) -> None:
    hostile.describes(jwks_uri="http://127.0.0.1:1/jwks")
    assert (await browser.get("/console/sign-in/provider")).status_code == 503
    client_id, client_secret = operator_credential
    answer = await browser.post(
        "/console/sign-in", client_id=client_id, client_secret=client_secret
    )
    assert answer.status_code == 303
    assert {*browser.cookies} == {pages.COOKIE}


async def test_keys_are_read_again_for_an_unknown_one_but_once_a_minute(hostile: Hostile) -> None:
    now = time.time()
    provider = Provider(
        issuer=hostile.issuer,
        client_id=CLIENT_ID,
        client_secret=None,
        name="Bank Portal",
        scopes_claim="privyseal_scopes",
        callback="http://127.0.0.1:8080/console/sign-in/callback",
        clock=lambda: now,
        clock_skew=60,
    )

    async def come_back(key: RSAKey) -> str:
        kept = Transaction.begin("/console")
        await provider.way_there(kept)
        hostile.answers("/token", {"id_token": signed(hostile, kept.nonce, key=key, **ANNA)})
        found = await provider.who_came_back({"state": kept.state, "code": "c0de"}, kept)
        return found.subject

    assert await come_back(KEY) == "4711"
    successor = RSAKey.generate_key(2048, {"kid": "two"})
    hostile.publishes(successor)
    for _ in range(2):
        with pytest.raises(SignInFailed):
            await come_back(successor)
    assert hostile.times_asked("/jwks") == 1
    now += REREAD + 1
    assert await come_back(successor) == "4711"
    # What the provider has taken back is gone, too.
    with pytest.raises(SignInFailed):
        await come_back(KEY)
    assert hostile.times_asked("/jwks") == 2


@pytest.mark.parametrize("method", ["client_secret_basic", "client_secret_post"])
async def test_a_confidential_client_proves_itself_as_the_provider_wants_it(
    method: str, hostile: Hostile
) -> None:
    hostile.describes(token_endpoint_auth_methods_supported=[method])
    provider = Provider(
        issuer=hostile.issuer,
        client_id="privy seal",
        client_secret=Secret("s:+%"),
        name="Bank Portal",
        scopes_claim="privyseal_scopes",
        callback="http://127.0.0.1:8080/console/sign-in/callback",
        clock=time.time,
        clock_skew=60,
    )
    kept = Transaction.begin("/console")
    await provider.way_there(kept)
    claims: dict[str, Any] = {**ANNA, "aud": "privy seal"}
    token = signed(hostile, kept.nonce, **claims)
    hostile.answers("/token", {"id_token": token})
    await provider.who_came_back({"state": kept.state, "code": "c0de"}, kept)
    _, form, headers = hostile.asked[-1]
    if method == "client_secret_basic":
        basic = base64.b64decode(headers["authorization"].removeprefix("Basic "))
        assert basic == b"privy+seal:s%3A%2B%25"
        assert "client_secret" not in form
    else:
        assert (form["client_id"], form["client_secret"]) == ("privy seal", "s:+%")


async def test_two_sign_ins_of_a_newcomer_at_once_make_one_service_user(
    client: httpx.AsyncClient, hostile: Hostile, records: Callable[..., Awaitable[Records]]
) -> None:
    answers = await asyncio.gather(
        *(_arrive(Browser(client, hostile), hostile, f"code-{n}") for n in range(4))
    )
    assert [answer.status_code for answer in answers] == [200] * 4
    (created,) = await records(action="service_user.create", service_user="anna")
    assert (created["actor"], created["actor_id"]) == ("privyseal console", None)
    assert created["details"]["scopes"] == ["audit:read"]


async def _arrive(browser: Browser, hostile: Hostile, code: str) -> httpx.Response:
    asked = await browser.begin()
    token = signed(hostile, asked["nonce"], **ANNA)
    hostile.answers(f"/token?code={code}", {"id_token": token})
    return await browser.come_back(asked, code=code)


async def test_people_with_one_name_are_two_and_neither_takes_the_name_of_a_machine(
    browser: Browser, vkyc: Credential, operator: httpx.AsyncClient
) -> None:
    for subject in ("1", "2", "1"):
        answer = await browser.sign_in(sub=subject, preferred_username="VKYC Prod")
        assert answer.status_code == 200
    found = await operator.get("/api/v1/service-users", params={"source_system": "console"})
    people = found.json()["service_users"]
    assert len({person["id"] for person in people}) == len(people) == 2
    assert all(person["name"].startswith("vkyc-prod-") for person in people)
    # Who comes again as before is not changed.
    assert [person["version"] for person in people] == [1, 1]


async def test_a_person_is_what_the_portal_says_and_no_operator_changes_that(
    browser: Browser, operator: httpx.AsyncClient, records: Callable[..., Awaitable[Records]]
) -> None:
    await browser.sign_in(privyseal_scopes=[], name="Anna", email="anna@bank.example")
    found = await operator.get("/api/v1/service-users", params={"name": "anna"})
    (person,) = found.json()["service_users"]
    assert (person["owner"], person["contact"]) == ("Anna", "anna@bank.example")
    path = f"/api/v1/service-users/{person['id']}"

    credential = await operator.post(f"{path}/credentials", json={"label": "back door"})
    assert credential.status_code == 409
    change = {"scopes": ["ingest:write"], "audiences": ["http://127.0.0.1:8081"]}
    changed = await operator.patch(path, json=change, headers={"If-Match": '"1"'})
    assert changed.status_code == 409
    assert (await operator.post(f"{path}/tokens", json={})).status_code == 403
    new = {"name": "posing", "source_system": "console"}
    assert (await operator.post("/api/v1/service-users", json=new)).status_code == 422
    machine = await operator.post(
        "/api/v1/service-users", json={"name": "machine", "source_system": "vkyc"}
    )
    turned = await operator.patch(
        f"/api/v1/service-users/{machine.json()['id']}",
        json={"source_system": "console"},
        headers={"If-Match": '"1"'},
    )
    assert turned.status_code == 422

    assert (await operator.post(f"{path}/disable")).status_code == 200
    answer = await browser.sign_in(name="Anna B", email="anna@bank.example")
    assert answer.status_code == 403
    assert "anna is disabled here" in answer.text
    assert (await operator.get(path)).json()["owner"] == "Anna"
    await records(action="token.issue", service_user=person["id"], reason="service_user_disabled")
    assert (await operator.post(f"{path}/enable")).status_code == 200
    answer = await browser.sign_in(name="Anna B", email="anna@bank.example")
    assert answer.status_code == 200
    assert (await operator.get(path)).json()["owner"] == "Anna B"
    (last,) = await records(
        action="service_user.change", service_user=person["id"], outcome="success"
    )
    assert last["details"] == {"owner": "changed", "scopes": {"from": [], "to": ["audit:read"]}}


async def test_half_a_character_in_a_claim_locks_nobody_out(
    browser: Browser, operator: httpx.AsyncClient
) -> None:
    # JSON can hold it, UTF-8 cannot: neither a log nor a database takes it.
    claims = {"name": "An\ud83dna", "email": "\udc00", "privyseal_scopes": ["audit:read", "\ud83d"]}
    assert (await browser.sign_in(**claims)).status_code == 200
    found = await operator.get("/api/v1/service-users", params={"name": "anna"})
    (person,) = found.json()["service_users"]
    assert (person["owner"], person["contact"]) == ("Anna", "")


async def test_the_page_of_a_person_offers_nothing_that_a_person_cannot_have(
    browser: Browser,
    client: httpx.AsyncClient,
    settings: Settings,
    operator: httpx.AsyncClient,
    operator_credential: Credential,
) -> None:
    await browser.sign_in(privyseal_scopes=[])
    found = await operator.get("/api/v1/service-users", params={"name": "anna"})
    path = f"/service-users/{found.json()['service_users'][0]['id']}"
    at_console = ConsoleClient(client, settings.issuer)
    await at_console.sign_in(operator_credential)
    page = (await at_console.get(path)).text
    assert "they sign in through the portal, and have no credential" in page
    assert f'href="/console{path}/disable"' in page
    for way in ("/change", "/credentials/new", "/hand-over"):
        assert f"{path}{way}" not in page
    for way in ("/console/token?", "/console/upload?"):
        assert way not in page
    assert (
        "signs in through the portal" in (await at_console.get("/service-users?search=anna")).text
    )
    # Whoever comes there all the same is told why not.
    form = {"label": "back door", "lifetime": "30"}
    for way in ("/credentials/new", "/hand-over"):
        answer = await at_console.post(f"{path}{way}", form)
        assert answer.status_code == 409
        assert "anna is a person" in answer.text


async def test_who_is_granted_nothing_is_shown_nothing_and_may_send_nothing(
    browser: Browser, records: Callable[..., Awaitable[Records]]
) -> None:
    await browser.sign_in(privyseal_scopes=["coffee:brew"])
    for path in ("", "/token", "/upload", "/me", "/audit", "/signing-keys", "/service-users"):
        answer = await browser.get(f"/console{path}")
        assert (path, answer.status_code) == (path, 403)
        assert "Nothing is granted to you yet" in answer.text
    csrf = answer.text.split('name="csrf" value="')[1].split('"')[0]
    for path in ("/token", "/upload", "/me/rotate"):
        assert (await browser.post(f"/console{path}", csrf=csrf)).status_code in (403, 405)
    await records(action="token.issue", outcome="success", service_user="anna")
    assert (await browser.post("/console/sign-out", csrf=csrf)).status_code == 303
    assert browser.cookies == {}


async def test_what_was_typed_waits_for_a_sign_in_through_the_portal(browser: Browser) -> None:
    ended = await browser.post("/console/session", name="typed", csrf="old")
    assert ended.status_code == 401
    assert 'href="/console/sign-in/provider" target="_blank"' in ended.text
    kept = {"kept:name": "typed", "next": "/console/session"}
    still = await browser.post("/console/sign-in/resume", **kept)
    assert still.status_code == 401
    assert 'name="kept:name" value="typed"' in still.text
    await browser.sign_in()
    resumed = await browser.post("/console/sign-in/resume", **kept)
    assert resumed.status_code == 200
    assert 'action="/console/session"' in resumed.text
    assert 'name="name" value="typed"' in resumed.text


async def test_the_session_of_a_person_opens_nothing_but_the_console(
    browser: Browser, client: httpx.AsyncClient
) -> None:
    await browser.sign_in()
    token = browser.cookies[pages.COOKIE]
    answer = await client.get("/api/v1/audit-records", headers={"Authorization": f"Bearer {token}"})
    assert answer.status_code == 401
