"""Bearer tokens (RFC 6750) at the door of an ASGI application.

It must not let a request through whose token claims a trusted issuer and was not verified.
"""

import json
import math
from collections.abc import Awaitable, Callable, Collection, Iterable, MutableMapping
from typing import Any, TypeAlias

from .jwks_client import KeysUnavailable
from .jwt import InvalidToken, SignedClaims, claimed_issuers, describable
from .verifier import Verifier

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
ASGIApp: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

SCOPE_KEY = "privyseal"

_POLICY_VIOLATION = 1008  # RFC 6455 §7.4.1


class Refusal(Exception):
    """An answer that lets nobody through: raised, or called as the ASGI application it also is.

    `error` None means that no credentials came: the challenge is then bare (RFC 6750 §3.1), and
    the body names the error `missing_token`. `scope` is what the caller would need.
    """

    def __init__(
        self,
        status: int,
        error: str | None,
        description: str,
        *,
        scope: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(description)
        self.status = status
        self.error = error
        self.description = describable(description)
        self.scope = scope
        self.retry_after = retry_after

    @property
    def challenge(self) -> str:
        """The value of `WWW-Authenticate` (RFC 6750 §3)."""
        if self.error is None:
            return "Bearer"
        challenge = f'Bearer error="{self.error}", error_description="{self.description}"'
        return challenge if self.scope is None else f'{challenge}, scope="{self.scope}"'

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the request; refuse the handshake of a WebSocket."""
        if scope["type"] == "websocket":
            await receive()
            await send(
                {"type": "websocket.close", "code": _POLICY_VIOLATION, "reason": self.error or ""}
            )
            return
        answer = {"error": self.error or "missing_token", "error_description": self.description}
        body = json.dumps(answer).encode("ascii")
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode("ascii")),
            (b"cache-control", b"no-store"),
        ]
        if self.status < 500:
            headers.append((b"www-authenticate", self.challenge.encode("ascii")))
        if self.retry_after is not None:
            headers.append((b"retry-after", str(math.ceil(self.retry_after)).encode("ascii")))
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


class BearerMiddleware:
    """Puts the SignedClaims of the request's token into `scope["privyseal"]`, or answers itself.

    - no token: 401 with a bare challenge; one that is not accepted: 401 `invalid_token`;
    - two Authorization headers, or one without a token: 400 `invalid_request`;
    - keys that cannot be had: 503 with `Retry-After`;
    - a WebSocket is refused before it opens: 1008, which servers send as status 403.

    `exempt_paths` are exact paths that need no token and get no identity. With
    `pass_other_issuers`, tokens that claim no issuer of the verifier's go through as they are, to
    be verified elsewhere. In both cases `scope["privyseal"]` is None. A Refusal that the
    application raises before it has begun to answer becomes the answer.
    """

    def __init__(
        self,
        app: ASGIApp,
        verifier: Verifier,
        *,
        pass_other_issuers: bool = False,
        exempt_paths: Collection[str] = (),
    ) -> None:
        self._app = app
        self._verifier = verifier
        self._pass_other_issuers = pass_other_issuers
        self._exempt_paths = frozenset(exempt_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] not in ("http", "websocket"):
            raise ValueError(f"expected an http or websocket scope, found {scope['type']}")
        try:
            scope[SCOPE_KEY] = await self._identity(scope)
        except Refusal as refusal:
            await refusal(scope, receive, send)
            return
        await self._answer(scope, receive, send)

    async def _identity(self, scope: Scope) -> SignedClaims | None:
        if scope["path"] in self._exempt_paths:
            return None
        token = _bearer_token(scope["headers"])
        try:
            if self._pass_other_issuers and not claimed_issuers(token) & self._verifier.issuers:
                return None
            return await self._verifier.verify_async(token)
        except InvalidToken as error:
            raise Refusal(401, "invalid_token", str(error)) from None
        except KeysUnavailable as error:
            raise Refusal(
                503,
                "temporarily_unavailable",
                "expected the issuer's published keys, found none that are fresh enough",
                retry_after=error.retry_after,
            ) from None

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def send_on(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, send_on)
        except Refusal as refusal:
            if begun:
                raise
            await refusal(scope, receive, send)


def require_scope(scope: Scope, *needed: str) -> SignedClaims:
    """Return the verified identity of an ASGI scope if it was granted each scope in `needed`.

    Raise a Refusal otherwise: 403 `insufficient_scope` (RFC 6750 §3.1), or 401 if the request
    came in without a verified identity.
    """
    identity = scope.get(SCOPE_KEY)
    if not isinstance(identity, SignedClaims):
        raise Refusal(401, None, "expected a token of a trusted issuer, found none")
    if not identity.scope.issuperset(needed):
        wanted = " ".join(needed)
        found = " ".join(sorted(identity.scope)) or "none"
        raise Refusal(
            403, "insufficient_scope", f"scope: expected {wanted}, found {found}", scope=wanted
        )
    return identity


def _bearer_token(headers: Iterable[tuple[bytes, bytes]]) -> str:
    found = [value for name, value in headers if name.lower() == b"authorization"]
    if len(found) > 1:
        raise Refusal(400, "invalid_request", "expected one Authorization header, found several")
    scheme, _, token = (found[0] if found else b"").partition(b" ")
    # RFC 9110 §11.1: the scheme's case does not matter.
    if scheme.lower() != b"bearer":
        raise Refusal(401, None, "expected an Authorization header with a Bearer token, found none")
    token = token.strip(b" ")
    if not token:
        raise Refusal(400, "invalid_request", "expected a token after Bearer, found none")
    return token.decode("latin-1")
