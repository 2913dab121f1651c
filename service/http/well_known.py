"""What verifiers read and what watches over us read: keys, metadata, health, metrics.

Served from memory: nothing here waits for Postgres.
"""

import hashlib
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, Final

import msgspec
from litestar import asgi
from litestar.handlers import ASGIRouteHandler
from litestar.types import Receive, Scope, Send
from msgspec import Struct
from prometheus_client import CONTENT_TYPE_LATEST

from keys.keyring import Concern, KeyRing

JWKS_PATH: Final = "/.well-known/jwks.json"
METADATA_PATH: Final = "/.well-known/oauth-authorization-server"
OPENID_PATH: Final = "/.well-known/openid-configuration"

Headers = list[tuple[bytes, bytes]]


class Health(Struct, frozen=True, kw_only=True):
    """What `/readyz` says: ready, and what stands behind it."""

    ready: bool
    key_ring: bool
    schema: bool
    draining: bool
    postgres: bool
    ring_age_seconds: float | None
    can_sign: bool
    signing_kid: str | None
    concerns: tuple[Concern, ...]
    """What a person has to look at; none of it takes the process out of rotation."""
    audit_log: str | None
    """Why nothing is issued: the audit log does not go on from what was signed. None if it does."""
    sequencer: str | None
    """Why this process gives no record its place in the audit log: the event in its log. None if
    it can. It issues all the same."""


def metadata(issuer: str) -> dict[str, Any]:
    """Return the authorization server metadata (RFC 8414 §2)."""
    methods = ["client_secret_basic", "client_secret_post"]
    return {
        "issuer": issuer,
        "token_endpoint": f"{issuer}/oauth/token",
        "jwks_uri": f"{issuer}{JWKS_PATH}",
        "response_types_supported": [],
        "grant_types_supported": ["client_credentials"],
        "token_endpoint_auth_methods_supported": methods,
        "service_documentation": f"{issuer}/schema/openapi.json",
    }


def jwks_endpoint(ring: Callable[[], KeyRing], max_age: int) -> ASGIRouteHandler:
    """Return the JWKS route (RFC 7517 §5)."""
    cache_control = f"public, max-age={max_age}".encode()

    @asgi(JWKS_PATH, copy_scope=False)
    async def jwks(scope: Scope, receive: Receive, send: Send) -> None:
        body = ring().jwks
        await send_public(scope, send, body, b"application/jwk-set+json", cache_control)

    return jwks


def metadata_endpoints(document: dict[str, Any], max_age: int) -> list[ASGIRouteHandler]:
    """Return the metadata route, under both of its names."""
    body = msgspec.json.encode(document)
    cache_control = f"public, max-age={max_age}".encode()

    def endpoint(path: str) -> ASGIRouteHandler:
        @asgi(path, copy_scope=False)
        async def server_metadata(scope: Scope, receive: Receive, send: Send) -> None:
            await send_public(scope, send, body, b"application/json", cache_control)

        return server_metadata

    return [endpoint(METADATA_PATH), endpoint(OPENID_PATH)]


def health_endpoints(
    health: Callable[[], Health], metrics_text: Callable[[], bytes]
) -> list[ASGIRouteHandler]:
    """Return `/healthz` (the process lives), `/readyz` and `/metrics`."""

    @asgi("/healthz", copy_scope=False)
    async def healthz(scope: Scope, receive: Receive, send: Send) -> None:
        await _answer(scope, send, HTTPStatus.OK, b'{"alive":true}', [_JSON, _NO_STORE])

    @asgi("/readyz", copy_scope=False)
    async def readyz(scope: Scope, receive: Receive, send: Send) -> None:
        state = health()
        status = HTTPStatus.OK if state.ready else HTTPStatus.SERVICE_UNAVAILABLE
        await _answer(scope, send, status, msgspec.json.encode(state), [_JSON, _NO_STORE])

    @asgi("/metrics", copy_scope=False)
    async def prometheus(scope: Scope, receive: Receive, send: Send) -> None:
        content_type = (b"content-type", CONTENT_TYPE_LATEST.encode())
        await _answer(scope, send, HTTPStatus.OK, metrics_text(), [content_type, _NO_STORE])

    return [healthz, readyz, prometheus]


_JSON: Final = (b"content-type", b"application/json")
_NO_STORE: Final = (b"cache-control", b"no-store")
_ALLOW: Final = (b"allow", b"GET, HEAD, OPTIONS")


async def send_public(
    scope: Scope, send: Send, body: bytes, content_type: bytes, cache_control: bytes
) -> None:
    """Send what any page on any site may read, with an ETag (RFC 9110 §8.8.3)."""
    etag = b'"%b"' % hashlib.sha256(body).hexdigest()[:32].encode()
    headers = [
        (b"etag", etag),
        (b"cache-control", cache_control),
        (b"access-control-allow-origin", b"*"),
    ]
    if etag in dict(scope["headers"]).get(b"if-none-match", b""):
        await _answer(scope, send, HTTPStatus.NOT_MODIFIED, b"", headers)
    else:
        headers.append((b"content-type", content_type))
        await _answer(scope, send, HTTPStatus.OK, body, headers)


async def send_missing(scope: Scope, send: Send) -> None:
    """Send that there is no such thing yet."""
    await _answer(scope, send, HTTPStatus.NOT_FOUND, b"", [_NO_STORE])


async def _answer(
    scope: Scope, send: Send, status: HTTPStatus, body: bytes, headers: Headers
) -> None:
    method: str = scope["method"]  # type: ignore[typeddict-item]
    if method == "OPTIONS":
        status, body, headers = HTTPStatus.NO_CONTENT, b"", [_ALLOW]
    elif method not in ("GET", "HEAD"):
        status, body, headers = HTTPStatus.METHOD_NOT_ALLOWED, b"", [_ALLOW]
    elif status != HTTPStatus.NOT_MODIFIED:
        headers = [*headers, (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send(
        {
            "type": "http.response.body",
            "body": b"" if method == "HEAD" else body,
            "more_body": False,
        }
    )
