"""Bearer tokens (RFC 6750) at the door of an ASGI application.

It must not let a request through whose token claims a trusted issuer and was not verified.
"""

import json
import math
import re
import uuid
from collections.abc import Awaitable, Callable, Collection, Iterable, MutableMapping
from typing import Any, TypeAlias

from .events import checked_action
from .jwks_client import KeysUnavailable
from .jwt import InvalidToken, SignedClaims, claimed_issuers, describable
from .reporter import Reporter
from .verifier import Verifier

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
ASGIApp: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

SCOPE_KEY = "privyseal"

_FAILED = 500  # also when there was no answer
_DESCRIPTION_KEY = "privyseal.call"
_POLICY_VIOLATION = 1008  # RFC 6455 §7.4.1
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")  # as the authority takes it


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

    If the verifier has a reporter, each request with a verified identity is reported once it is
    answered, and a WebSocket when it is accepted or refused. `describe` says what it was about.
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
            self._verifier.start()
            await self._app(scope, receive, send)
            return
        if scope["type"] not in ("http", "websocket"):
            raise ValueError(f"expected an http or websocket scope, found {scope['type']}")
        try:
            caller = scope[SCOPE_KEY] = await self._identity(scope)
        except Refusal as refusal:
            await refusal(scope, receive, send)
            return
        reporter = None if caller is None else self._verifier.reporter_to(caller.iss)
        if caller is None or reporter is None:
            await self._answer(scope, receive, send)
            return
        call = _Call(scope, caller, reporter)
        try:
            await self._answer(scope, receive, call.watched(send))
        except BaseException:
            call.status = _FAILED
            raise
        finally:
            call.report()

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


class _Call:
    """One request with a verified identity, until it is reported: once."""

    def __init__(self, scope: Scope, caller: SignedClaims, reporter: Reporter) -> None:
        self.status = _FAILED
        self._scope = scope
        self._caller = caller
        self._reporter = reporter
        self._signature = _bearer_token(scope["headers"]).rpartition(".")[2]
        self._described: dict[str, str] = {}
        self._reported = False
        scope[_DESCRIPTION_KEY] = self._described

    def watched(self, send: Send) -> Send:
        async def send_on(message: Message) -> None:
            match message["type"]:
                case "http.response.start" | "websocket.http.response.start":
                    self.status = message["status"]
                case "websocket.accept":
                    self.status = 101
                case "websocket.close" if not self._reported:
                    self.status = 403
                case _:
                    pass
            if self._scope["type"] == "websocket":
                # It may stay open for days; what it is used for is known now.
                self.report()
            await send(message)

        return send_on

    def report(self) -> None:
        if self._reported:
            return
        self._reported = True
        scope = self._scope
        request_id = _header(scope, b"x-request-id")
        if not _REQUEST_ID.fullmatch(request_id):
            request_id = str(uuid.uuid4())
        address, _ = scope.get("client") or ("", 0)
        failed = self.status >= 500
        self._reporter.api_call(
            self._caller,
            self._signature,
            action=self._described.get("action", "api.call"),
            resource=self._described.get(
                "resource", f"{scope.get('method', 'WEBSOCKET')} {scope['path']}"
            ),
            outcome="failed" if failed else "refused" if self.status >= 400 else "success",
            request_id=request_id,
            client_address=address,
            user_agent=_header(scope, b"user-agent"),
            department=self._described.get("department", ""),
        )


def describe(
    scope: Scope,
    *,
    action: str | None = None,
    resource: str | None = None,
    department: str | None = None,
) -> None:
    """Say for the report what this request is about; what is left out stays as it was.

    Unless told, the action is `api.call` and the resource the method and path, without the query.
    Raise ValueError for an action that is not two lower-case words with a dot between. Without a
    reporter nothing comes of it.
    """
    described: dict[str, str] = scope.get(_DESCRIPTION_KEY, {})
    if action is not None:
        described["action"] = checked_action(action)
    if resource is not None:
        described["resource"] = str(resource)
    if department is not None:
        described["department"] = str(department)


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


def _header(scope: Scope, wanted: bytes) -> str:
    for name, value in scope["headers"]:
        if name.lower() == wanted:
            return value.decode("latin-1")
    return ""


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
