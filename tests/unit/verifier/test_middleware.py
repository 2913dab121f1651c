"""Bearer tokens at the door of real ASGI applications (RFC 6750).

It must not reach beyond loopback.
"""

import base64
import json
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from keys.verifier import BearerMiddleware, Refusal, Verifier, encode_jwks, require_scope
from keys.verifier.middleware import Message, Receive, Scope, Send

Claims: TypeAlias = dict[str, object]
Sign: TypeAlias = Callable[..., str]
Serve: TypeAlias = Callable[[Mapping[str, bytes]], str]

NOW = 1_800_000_000
AUDIENCE = "https://ingest.example.com"

pytestmark = pytest.mark.anyio


async def ingest(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with the identity it got; /ingest wants a scope, /late refuses too late."""
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.accept"})
        return
    if scope["path"] == "/ingest":
        require_scope(scope, "ingest:write")
    if scope["path"] == "/admin":
        require_scope(scope, "ingest:write", "ingest:admin")
    identity = scope["privyseal"]
    found = identity and [identity.sub, identity.service_user, identity.source_system]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    if scope["path"] == "/late":
        raise Refusal(403, "access_denied", "too late")
    await send({"type": "http.response.body", "body": json.dumps(found).encode()})


@pytest.fixture
def verifier(serve: Serve, rsa_key: RSAPrivateKey) -> Verifier:
    origin = serve({"/keys": encode_jwks([rsa_key.public_key()])})
    return Verifier("https://tokens.example.com", AUDIENCE, f"{origin}/keys", clock=lambda: NOW)


async def ask(
    app: Any, path: str = "/", *authorization: str | bytes, scheme: str = "Bearer "
) -> httpx.Response:
    values = [v if isinstance(v, bytes) else (scheme + v).encode() for v in authorization]
    headers = [(b"authorization", value) for value in values]
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://ingest") as client:
        return await client.get(path, headers=headers)


async def open_websocket(app: Any, *headers: tuple[bytes, bytes]) -> list[Message]:
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    async def send(message: Message) -> None:
        sent.append(message)

    await app({"type": "websocket", "path": "/", "headers": list(headers)}, receive, send)
    return sent


async def test_a_verified_identity_reaches_the_application(
    verifier: Verifier, claims: Claims, sign: Sign
) -> None:
    app = BearerMiddleware(ingest, verifier)
    for scheme in ("Bearer ", "bearer ", "BEARER  "):
        answer = await ask(app, "/ingest", sign(claims), scheme=scheme)
        assert answer.status_code == 200
        assert answer.json() == ["su_abcdefghijklmnopqrstuvwx", "vkyc-prod", "vkyc"]


async def test_no_credentials_get_a_bare_challenge(verifier: Verifier) -> None:
    app = BearerMiddleware(ingest, verifier)
    for authorization in ([], [b"Basic c3Vfeg=="], [b""], [b"Bearertoken"]):
        answer = await ask(app, "/", *authorization)
        assert answer.status_code == 401
        assert answer.headers["WWW-Authenticate"] == "Bearer"
        assert answer.headers["Cache-Control"] == "no-store"
        assert answer.json() == {
            "error": "missing_token",
            "error_description": "expected an Authorization header with a Bearer token, found none",
        }


async def test_a_bad_token_is_refused_with_what_was_expected_and_found(
    verifier: Verifier, claims: Claims, sign: Sign
) -> None:
    app = BearerMiddleware(ingest, verifier)
    answer = await ask(app, "/", sign({**claims, "aud": 'https://"other"\\\r\n'}))
    assert answer.status_code == 401
    description = "aud: expected 'https://ingest.example.com', found 'https://?other????'"
    assert answer.headers["WWW-Authenticate"] == (
        f'Bearer error="invalid_token", error_description="{description}"'
    )
    assert answer.json() == {"error": "invalid_token", "error_description": description}


@pytest.mark.parametrize(
    "token",
    [b"Bearer x", b"Bearer a b", b"Bearer \xff\xfe", b"Bearer a.b.c", b"Bearer " + b"a" * 9000],
)
async def test_what_is_no_token_is_an_invalid_token(verifier: Verifier, token: bytes) -> None:
    answer = await ask(BearerMiddleware(ingest, verifier), "/", token)
    assert answer.status_code == 401
    challenge = r'Bearer error="invalid_token", error_description="[\x20-\x21\x23-\x5b\x5d-\x7e]+"'
    assert re.fullmatch(challenge, answer.headers["WWW-Authenticate"])


async def test_two_authorization_headers_are_an_invalid_request(
    verifier: Verifier, claims: Claims, sign: Sign
) -> None:
    app = BearerMiddleware(ingest, verifier)
    token = sign(claims)
    for headers in ((token, token), (token, b"Basic c3Vfeg=="), (b"Bearer",), (b"Bearer  ",)):
        answer = await ask(app, "/", *headers)
        assert answer.status_code == 400
        assert answer.json()["error"] == "invalid_request"
        assert 'error="invalid_request"' in answer.headers["WWW-Authenticate"]


async def test_a_missing_scope_is_named(verifier: Verifier, claims: Claims, sign: Sign) -> None:
    app = BearerMiddleware(ingest, verifier)
    answer = await ask(app, "/ingest", sign({**claims, "scope": "search:read"}))
    assert answer.status_code == 403
    assert answer.headers["WWW-Authenticate"] == (
        'Bearer error="insufficient_scope", '
        'error_description="scope: expected ingest:write, found search:read", '
        'scope="ingest:write"'
    )
    for scope in ("ingest:write search:read", "ingest:admin", ""):
        answer = await ask(app, "/admin", sign({**claims, "scope": scope}))
        assert answer.status_code == 403
        assert 'scope="ingest:write ingest:admin"' in answer.headers["WWW-Authenticate"]
    assert (
        await ask(app, "/admin", sign({**claims, "scope": "ingest:admin ingest:write"}))
    ).is_success


async def test_unavailable_keys_are_a_503_with_a_time_to_come_back(
    serve: Serve, claims: Claims, sign: Sign
) -> None:
    keys = serve({}) + "/keys"
    app = BearerMiddleware(ingest, Verifier("https://tokens.example.com", AUDIENCE, keys))
    answer = await ask(app, "/", sign(claims))
    assert answer.status_code == 503
    assert int(answer.headers["Retry-After"]) >= 1
    assert "WWW-Authenticate" not in answer.headers
    assert answer.json()["error"] == "temporarily_unavailable"
    assert "127.0.0.1" not in answer.text


async def test_tokens_of_other_issuers_pass_only_where_asked_and_without_an_identity(
    verifier: Verifier, claims: Claims, sign: Sign, other_key: RSAPrivateKey
) -> None:
    strict = BearerMiddleware(ingest, verifier)
    lenient = BearerMiddleware(ingest, verifier, pass_other_issuers=True)
    person = {"iss": "https://people.example.com", "aud": ["a", "b"], "sub": "p"}
    of_people = (
        sign(person, {"typ": "JWT", "x5t": "abc"}, key=other_key),
        sign({**person, "groups": "g" * 12_000}, key=other_key),
        "opaque-token",
    )
    for token in of_people:
        assert (await ask(strict, "/", token)).status_code == 401
        assert (await ask(lenient, "/", token)).json() is None
        answer = await ask(lenient, "/ingest", token)
        assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
    assert (await ask(lenient, "/", sign(claims))).json()[1] == "vkyc-prod"
    assert (await ask(lenient, "/")).status_code == 401


async def test_a_token_that_claims_a_trusted_issuer_is_always_checked(
    verifier: Verifier, claims: Claims, sign: Sign, other_key: RSAPrivateKey
) -> None:
    lenient = BearerMiddleware(ingest, verifier, pass_other_issuers=True)
    genuine = sign(claims)
    header, payload, signature = genuine.split(".")
    ours = json.dumps(claims)
    twice = ours.replace("{", '{"iss":"https://people.example.com",', 1)
    twice_reversed = ours[:-1] + ',"iss":"https://people.example.com"}'
    for token in (
        sign(claims, key=other_key),
        sign({**claims, "exp": NOW - 900, "iat": NOW - 1800}),
        sign(claims, {"typ": "JWT"}),
        sign(claims, {"alg": "none"}),
        sign(twice.encode()),
        sign(twice_reversed.encode()),
        sign({**claims, "pad": "x" * 9000}),
        f"{header}.{payload}==.{signature}",
        f"{header}.{payload}",
        f"{header}.{payload}.",
        f"{header}.{base64.b64encode(ours.encode()).decode()}.{signature}",
        f"{header}.{base64.urlsafe_b64encode(ours.encode('utf-16')).decode()}.{signature}",
        "a" * 70_000,
    ):
        answer = await ask(lenient, "/", token)
        assert answer.status_code == 401
        assert answer.json()["error"] == "invalid_token"


async def test_an_exempt_path_needs_no_token_and_gets_no_identity(
    verifier: Verifier, claims: Claims, sign: Sign
) -> None:
    app = BearerMiddleware(ingest, verifier, exempt_paths={"/healthz"})
    assert (await ask(app, "/healthz")).json() is None
    assert (await ask(app, "/healthz", sign(claims))).json() is None
    for path in ("/healthz/", "/Healthz", "/healthz/x", "//healthz"):
        assert (await ask(app, path)).status_code == 401


async def test_an_identity_from_outside_does_not_survive(verifier: Verifier) -> None:
    app = BearerMiddleware(ingest, verifier, exempt_paths={"/healthz"})

    async def forged(scope: Scope, receive: Receive, send: Send) -> None:
        scope["privyseal"] = ["su_forged"]
        await app(scope, receive, send)

    assert (await ask(forged, "/healthz")).json() is None


async def test_a_websocket_opens_only_for_a_verified_identity(
    verifier: Verifier, claims: Claims, sign: Sign
) -> None:
    app = BearerMiddleware(ingest, verifier)
    good = (b"authorization", b"Bearer " + sign(claims).encode())
    bad = (b"authorization", b"Bearer " + sign({**claims, "aud": "x"}).encode())
    assert (await open_websocket(app, good))[0]["type"] == "websocket.accept"
    for headers in ((), (bad,), (good, good)):
        (closed,) = await open_websocket(app, *headers)
        assert (closed["type"], closed["code"]) == ("websocket.close", 1008)


async def test_lifespan_passes_and_unknown_scopes_do_not(verifier: Verifier) -> None:
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["type"])

    async def receive() -> Message:
        raise AssertionError("nothing to receive")

    async def send(message: Message) -> None:
        raise AssertionError("nothing to send")

    door = BearerMiddleware(app, verifier)
    await door({"type": "lifespan"}, receive, send)
    with pytest.raises(ValueError, match="webtransport"):
        await door({"type": "webtransport", "path": "/", "headers": []}, receive, send)
    assert seen == ["lifespan"]


async def test_a_refusal_after_the_answer_began_is_an_error(
    verifier: Verifier, claims: Claims, sign: Sign
) -> None:
    with pytest.raises(Refusal, match="too late"):
        await ask(BearerMiddleware(ingest, verifier), "/late", sign(claims))


async def test_starlette_answers_with_a_refusal(
    verifier: Verifier, claims: Claims, sign: Sign
) -> None:
    async def upload(request: Request) -> JSONResponse:
        return JSONResponse(require_scope(request.scope, "ingest:write").service_user)

    def answer_with_it(request: Request, refusal: Exception) -> Any:
        return refusal

    routes = [Route("/", upload)]
    app = Starlette(routes=routes, exception_handlers={Refusal: answer_with_it})
    door = BearerMiddleware(app, verifier)
    assert (await ask(door, "/", sign(claims))).json() == "vkyc-prod"
    answer = await ask(door, "/", sign({**claims, "scope": ""}))
    assert answer.status_code == 403
    assert 'scope="ingest:write"' in answer.headers["WWW-Authenticate"]
