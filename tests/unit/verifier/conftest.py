"""Keys, genuine tokens and a local key server for the tests of the verifier.

It must not check anything itself.
"""

import json
import threading
from collections.abc import Callable, Generator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from jwt.algorithms import RSAAlgorithm

from keys.verifier import SignedClaims, decode, thumbprint
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
