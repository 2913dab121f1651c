"""Keys, genuine tokens, a local key server and a local authority for the tests of the verifier.

It must not check anything itself.
"""

import contextlib
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs

import pytest
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from jwt.algorithms import RSAAlgorithm

from keys.verifier import SignedClaims, decode, encode_jwks, thumbprint
from keys.verifier.strict import base64url_encode

NOW = 1_800_000_000
ISSUER = "https://tokens.example.com"
AUDIENCE = "https://ingest.example.com"


@pytest.fixture(scope="session")
def rsa_key(rsa_keys: list[RSAPrivateKey]) -> RSAPrivateKey:
    """The genuine key."""
    return rsa_keys[0]


@pytest.fixture(scope="session")
def other_key(rsa_keys: list[RSAPrivateKey]) -> RSAPrivateKey:
    """Another authority's key, the next one, or an attacker's."""
    return rsa_keys[1]


@pytest.fixture
def claims() -> dict[str, object]:
    """What a genuine token says; tests change it as they like."""
    return {
        "iss": ISSUER,
        "sub": "su_abcdefghijklmnopqrstuvwx",
        "client_id": "su_abcdefghijklmnopqrstuvwx",
        "aud": AUDIENCE,
        "exp": NOW + 900,
        "iat": NOW,
        "jti": "0199f0a0-1111-7222-8333-444444444444",
        "scope": "ingest:write search:read",
        "service_user": "vkyc-prod",
        "source_system": "vkyc",
    }


@pytest.fixture(scope="session")
def sign(rsa_key: RSAPrivateKey) -> Callable[..., str]:
    """Sign any claims and header, as objects or as raw JSON, with the genuine key or another.

    A header given as an object is added to the genuine one; a member that is `...` is left out.
    """

    def signed(
        claims: Mapping[str, object] | bytes,
        header: Mapping[str, object] | bytes | None = None,
        key: RSAPrivateKey = rsa_key,
    ) -> str:
        genuine = {"alg": "RS256", "typ": "at+jwt", "kid": thumbprint(key.public_key())}
        if not isinstance(header, bytes):
            merged = {**genuine, **(header or {})}
            header = json.dumps({n: v for n, v in merged.items() if v is not ...}).encode()
        if not isinstance(claims, bytes):
            claims = json.dumps({n: v for n, v in claims.items() if v is not ...}).encode()
        signing_input = f"{base64url_encode(header)}.{base64url_encode(claims)}"
        signature = RSAAlgorithm(RSAAlgorithm.SHA256).sign(signing_input.encode(), key)
        return f"{signing_input}.{base64url_encode(signature)}"

    return signed


@pytest.fixture(scope="session")
def check(rsa_key: RSAPrivateKey) -> Callable[..., SignedClaims]:
    """Decode a token as a service that trusts only the genuine key."""

    def checked(token: str, *, now: float = NOW, skew: float = 60) -> SignedClaims:
        public = rsa_key.public_key()
        return decode(
            token,
            {thumbprint(public): public},
            issuer=ISSUER,
            audience=AUDIENCE,
            now=now,
            skew=skew,
        )

    return checked


@pytest.fixture
def serve() -> Generator[Callable[[Mapping[str, bytes]], str]]:
    """Serve these documents by path on a loopback port; return the origin."""
    servers: list[ThreadingHTTPServer] = []

    def started(documents: Mapping[str, bytes]) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = documents.get(self.path)
                self.send_response(404 if body is None else 200)
                self.send_header("Content-Length", str(len(body or b"")))
                self.end_headers()
                self.wfile.write(body or b"")

            def log_message(self, format: str, *args: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield started
    for server in servers:
        server.shutdown()
        server.server_close()


Answer = tuple[int, bytes, Mapping[str, str]]


class AuthorityServer:
    """Plays the authority on a loopback port: keys, tokens, and a log of the events it took.

    `answers` are given to the next reports in the log's place; None takes the events and hangs up
    without an answer. While `released` is not set, nobody is answered anything.
    """

    def __init__(self, jwks: bytes) -> None:
        self.jwks = jwks
        self.jwks_status = 200
        self.answers: deque[Answer | None] = deque()
        self.released = threading.Event()
        self.released.set()
        self.refuses: Callable[[dict[str, Any]], bool] = lambda event: False
        self.malformed: Callable[[dict[str, Any]], bool] = lambda event: False
        self.malformed_status = 422
        self.wants_signature: Callable[[dict[str, Any]], bool] = lambda event: False
        self.before_answering: Callable[[], None] = lambda: None
        self.tokens: list[str] = []
        self.token_requests: list[tuple[str, dict[str, list[str]]]] = []
        self.token_status = 200
        self.reports: list[list[dict[str, Any]]] = []
        self.reported_at: list[float] = []
        self.largest_body = 0
        self.recorded: dict[str, dict[str, Any]] = {}
        authority = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                authority.released.wait(10)
                self._say(authority.jwks_status, authority.jwks, {})

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                authority.released.wait(10)
                said = self.headers["Authorization"]
                if self.path == "/oauth/token":
                    self._say(*authority.exchange(said, body))
                elif (answer := authority.report(said, body)) is not None:
                    self._say(*answer)

            def _say(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
                # Who has waited long enough hangs up.
                with contextlib.suppress(ConnectionError):
                    self.send_response(status)
                    for name, value in {"Content-Length": str(len(body)), **headers}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.issuer = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def exchange(self, authorization: str, body: bytes) -> Answer:
        self.token_requests.append((authorization, parse_qs(body.decode())))
        if self.token_status != 200:
            return self.token_status, b'{"error":"invalid_client"}', {}
        self.tokens.append(f"token-{len(self.tokens)}")
        granted = {"access_token": self.tokens[-1], "expires_in": 900}
        return 200, json.dumps(granted).encode(), {}

    def report(self, authorization: str, body: bytes) -> Answer | None:
        self.largest_body = max(self.largest_body, len(body))
        events = json.loads(body)["events"]
        self.reports.append(events)
        self.reported_at.append(time.monotonic())
        answer = self.answers.popleft() if self.answers else ()
        if answer:
            return answer
        if not self.tokens or authorization != f"Bearer {self.tokens[-1]}":
            return 401, b"{}", {}
        if len(events) > 1000 or any(self.malformed(event) for event in events):
            return self.malformed_status, b'{"detail":"events[0]: expected another"}', {}
        results = [self._take(event) for event in events]
        self.before_answering()
        if answer is None:
            return None
        return 200, json.dumps({"results": results}).encode(), {}

    def _take(self, event: dict[str, Any]) -> dict[str, str]:
        def result(status: str) -> dict[str, str]:
            return {"id": event["id"], "status": status, "detail": ""}

        if self.refuses(event):
            return result("refused")
        if event["id"] in self.recorded:
            return result("known")
        if self.wants_signature(event) and "signature" not in event:
            return result("signature_wanted")
        self.recorded[event["id"]] = event
        return result("recorded")

    def calls(self) -> list[dict[str, Any]]:
        """The API calls on record, in the order in which they were taken."""
        return self._recorded_of("api.call")

    def loaded(self) -> list[dict[str, Any]]:
        """The reports of loaded keys on record."""
        return self._recorded_of("jwks.loaded")

    def _recorded_of(self, type_: str) -> list[dict[str, Any]]:
        # Copied at once, by one call: meanwhile the server's threads add to it.
        return [event for event in tuple(self.recorded.values()) if event["type"] == type_]

    def close(self) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def authority(rsa_key: RSAPrivateKey) -> Generator[AuthorityServer]:
    server = AuthorityServer(encode_jwks([rsa_key.public_key()]))
    yield server
    server.close()


@pytest.fixture
def eventually() -> Callable[..., None]:
    """`eventually(condition)` waits for it, for 5 s at most."""

    def wait(condition: Callable[[], bool], seconds: float = 5) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"it did not happen within {seconds} s"
            time.sleep(0.005)

    return wait
