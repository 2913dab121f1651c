"""Each request with a verified identity reaches the authority's log (issue 4, Build 4).

It must not reach beyond loopback.
"""

import json
from collections.abc import Callable, Generator
from typing import Any, TypeAlias

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

from keys.verifier import BearerMiddleware, Reporter, Verifier, describe, require_scope
from keys.verifier.middleware import Message, Receive, Scope, Send
from tests.unit.verifier.conftest import NOW, AuthorityServer

Claims: TypeAlias = dict[str, object]
Sign: TypeAlias = Callable[..., str]
Eventually: TypeAlias = Callable[..., None]

AUDIENCE = "https://ingest.example.com"

pytestmark = pytest.mark.anyio


async def application(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with the status that the path names; the rest of the path says how."""
    if scope["type"] == "websocket":
        await receive()
        describe(scope, action="stream.open")
        await send({"type": "websocket.accept"})
        raise ConnectionError("it broke off later")
    match scope["path"].split("/")[1:]:
        case ["described", *_]:
            require_scope(scope, "ingest:write")
            describe(scope, action="document.ingest", department="retail")
            describe(scope, resource="documents/17")
        case ["forbidden"]:
            require_scope(scope, "ingest:admin")
        case ["broken"]:
            raise RuntimeError("before the answer began")
        case _:
            pass
    status = int(scope["path"].rpartition("/")[2])
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": b""})


@pytest.fixture
def token(authority: AuthorityServer, claims: Claims, sign: Sign) -> str:
    return sign({**claims, "iss": authority.issuer})


@pytest.fixture
def reporter(authority: AuthorityServer) -> Generator[Reporter]:
    reporter = Reporter(authority.issuer, "cr_1", "pvs_secret", interval=0.05, timeout=1)
    yield reporter
    reporter.close(0.1)


@pytest.fixture
def door(authority: AuthorityServer, reporter: Reporter) -> BearerMiddleware:
    jwks = f"{authority.issuer}/keys"
    verifier = Verifier(authority.issuer, AUDIENCE, jwks, clock=lambda: NOW, reporter=reporter)
    return BearerMiddleware(
        application, verifier, exempt_paths={"/healthz/200"}, pass_other_issuers=True
    )


async def ask(door: Any, path: str, token: str, **headers: str) -> httpx.Response:
    sent = {"Authorization": f"Bearer {token}", **headers}
    transport = httpx.ASGITransport(app=door, client=("192.0.2.7", 5000))
    async with httpx.AsyncClient(transport=transport, base_url="http://ingest") as client:
        return await client.post(path, headers=sent)


async def test_a_call_is_reported_with_what_the_request_says(
    door: BearerMiddleware,
    authority: AuthorityServer,
    token: str,
    claims: Claims,
    eventually: Eventually,
) -> None:
    headers = {"X-Request-Id": "abc-1.2_3", "User-Agent": "curl/8"}
    await ask(door, "/api/v1/things/200?name=secret", token, **headers)
    eventually(lambda: len(authority.calls()) == 1)
    (event,) = authority.calls()
    assert event["jti"] == claims["jti"]
    assert (event["action"], event["outcome"]) == ("api.call", "success")
    assert event["resource"] == "POST /api/v1/things/200"
    assert (event["request_id"], event["user_agent"]) == ("abc-1.2_3", "curl/8")
    assert (event["client_address"], event["department"]) == ("192.0.2.7", "")


async def test_the_application_says_what_a_call_was_about(
    door: BearerMiddleware, authority: AuthorityServer, token: str, eventually: Eventually
) -> None:
    assert (await ask(door, "/described/201", token)).status_code == 201
    eventually(lambda: len(authority.calls()) == 1)
    (event,) = authority.calls()
    said = (event["action"], event["resource"], event["department"], event["outcome"])
    assert said == ("document.ingest", "documents/17", "retail", "success")


async def test_a_call_without_a_usable_request_id_is_given_one(
    door: BearerMiddleware, authority: AuthorityServer, token: str, eventually: Eventually
) -> None:
    for number, given in enumerate(("", "a b", "x" * 65)):
        await ask(door, f"/{number}/200", token, **{"X-Request-Id": given})
    eventually(lambda: len(authority.calls()) == 3)
    made = {event["request_id"] for event in authority.calls()}
    assert len(made) == 3
    assert all(len(each) == 36 for each in made)


async def test_the_outcome_follows_from_the_answer(
    door: BearerMiddleware, authority: AuthorityServer, token: str, eventually: Eventually
) -> None:
    for path in ("/200", "/302", "/404", "/503"):
        await ask(door, path, token)
    assert (await ask(door, "/forbidden", token)).status_code == 403
    with pytest.raises(RuntimeError):
        await ask(door, "/broken", token)
    eventually(lambda: len(authority.calls()) == 6)
    found = {event["resource"]: event["outcome"] for event in authority.calls()}
    assert found == {
        "POST /200": "success",
        "POST /302": "success",
        "POST /404": "refused",
        "POST /503": "failed",
        "POST /forbidden": "refused",
        "POST /broken": "failed",
    }


async def test_only_verified_identities_are_reported(
    door: BearerMiddleware,
    authority: AuthorityServer,
    token: str,
    claims: Claims,
    sign: Sign,
    other_key: RSAPrivateKey,
    eventually: Eventually,
) -> None:
    forged = sign({**claims, "iss": authority.issuer}, key=other_key)
    assert (await ask(door, "/200", forged)).status_code == 401
    assert (await ask(door, "/healthz/200", token)).status_code == 200
    assert (await ask(door, "/of-others/200", sign({"iss": "https://people"}))).status_code == 200
    await ask(door, "/last/200", token)
    eventually(lambda: len(authority.calls()) == 1)
    assert authority.calls()[0]["resource"] == "POST /last/200"


async def test_a_websocket_is_reported_once_when_it_opens(
    door: BearerMiddleware, authority: AuthorityServer, token: str, eventually: Eventually
) -> None:
    async def receive() -> Message:
        return {"type": "websocket.connect"}

    async def send(message: Message) -> None:
        pass

    headers = [(b"authorization", f"Bearer {token}".encode())]
    with pytest.raises(ConnectionError):
        await door({"type": "websocket", "path": "/ws", "headers": headers}, receive, send)
    eventually(lambda: len(authority.calls()) == 1)
    (event,) = authority.calls()
    said = (event["action"], event["resource"], event["outcome"], event["client_address"])
    assert said == ("stream.open", "WEBSOCKET /ws", "success", "")


async def test_the_signature_is_that_of_the_token_and_the_digest_that_of_the_rest(
    door: BearerMiddleware, authority: AuthorityServer, token: str, eventually: Eventually
) -> None:
    authority.wants_signature = lambda event: event["type"] == "api.call"
    await ask(door, "/200", token)
    eventually(lambda: len(authority.calls()) == 1)
    assert authority.calls()[0]["signature"] == token.rpartition(".")[2]
    sent = json.dumps(authority.reports)
    assert token.rpartition(".")[0] not in sent
    assert token.split(".")[1] not in sent


async def test_without_a_reporter_describing_does_nothing(
    authority: AuthorityServer, token: str
) -> None:
    verifier = Verifier(authority.issuer, AUDIENCE, f"{authority.issuer}/keys", clock=lambda: NOW)
    answer = await ask(BearerMiddleware(application, verifier), "/described/201", token)
    assert answer.status_code == 201
    assert not authority.reports


async def test_figures_of_the_reporter_stand_beside_those_of_the_keys(
    door: BearerMiddleware,
    authority: AuthorityServer,
    reporter: Reporter,
    token: str,
    eventually: Eventually,
) -> None:
    await ask(door, "/200", token)
    eventually(lambda: reporter.stats()["events_sent"] == 2)
    assert set(reporter.stats()) == {
        *("events_queued", "events_spooled", "events_sent", "events_known"),
        *("events_refused", "events_lost", "report_retries", "report_age_seconds"),
    }
    assert reporter.stats()["report_age_seconds"] < 5
