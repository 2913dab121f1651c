"""`POST /oauth/token`: a strict reading of the form, and the answers of RFC 6749 §5.

Decides nothing about who gets what; keeps no credential and logs none.
"""

import asyncio
import base64
import binascii
import re
from collections.abc import Mapping
from datetime import UTC
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import unquote_to_bytes

import msgspec
import structlog
from litestar import asgi
from litestar.handlers import ASGIRouteHandler
from litestar.types import Receive, Scope, Send

from keys.secret import Secret
from service import metrics
from service.authority.errors import OAuthError, OAuthErrorCode, TemporarilyUnavailable
from service.authority.issuer import TokenIssuer
from service.authority.model import AccessToken, ClientAddress, TokenRequest
from service.http.context import origin_of
from service.http.errors import oauth_error, unavailable

PATH: Final = "/oauth/token"
MAX_BODY: Final = 8192
MAX_PARAMETERS: Final = 20
BODY_DEADLINE: Final = 10.0
_ALLOW: Final = [(b"allow", b"POST, OPTIONS")]
_FORM: Final = re.compile(
    rb"application/x-www-form-urlencoded\s*(;\s*charset=\"?utf-8\"?\s*)?", re.IGNORECASE
)
_BAD_ESCAPE: Final = re.compile(rb"%(?![0-9A-Fa-f]{2})")
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")
# RFC 6749 §3.3, and RFC 8707 §2 with RFC 3986 §4.3: an absolute URI has no fragment.
_SCOPE: Final = re.compile(r"[\x21\x23-\x5b\x5d-\x7e]+( [\x21\x23-\x5b\x5d-\x7e]+)*")
_ABSOLUTE_URI: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:[!$&-;=?-Z_a-z~%\[\]]+")


log = structlog.stdlib.get_logger()


class Malformed(OAuthError):
    """A request that cannot be read as RFC 6749 §4.4.2 has it."""

    def __init__(
        self,
        description: str,
        code: OAuthErrorCode = OAuthErrorCode.INVALID_REQUEST,
        status: HTTPStatus | None = None,
    ) -> None:
        super().__init__(code, description)
        self.status = status


def token_endpoint(issuer: TokenIssuer) -> ASGIRouteHandler:
    """Return the route: a raw ASGI one, since it is the one that has to be fast."""

    @asgi(PATH, copy_scope=False)
    async def token(scope: Scope, receive: Receive, send: Send) -> None:
        method: str = scope["method"]  # type: ignore[typeddict-item]
        if method == "OPTIONS":
            await _send(send, HTTPStatus.NO_CONTENT, _ALLOW, b"")
        elif method != "POST":
            await _send(send, HTTPStatus.METHOD_NOT_ALLOWED, _ALLOW, b"")
        else:
            with metrics.token_seconds.time():
                await _answer(issuer, scope, receive, send)

    return token


async def _answer(issuer: TokenIssuer, scope: Scope, receive: Receive, send: Send) -> None:
    origin = origin_of(scope)
    try:
        request = await _read_or_refuse(issuer, scope, receive, origin)
        answer = await issuer.exchange(request)
    except OAuthError as error:
        status, headers, body = oauth_error(error)
        outcome = error.code.value
        if isinstance(error, Malformed) and error.status is not None:
            status = error.status
    except TemporarilyUnavailable as error:
        log.info("token_unavailable", reason=str(error), request_id=origin.request_id)
        status, headers, body = unavailable()
        outcome = "unavailable"
    else:
        status, headers, body = HTTPStatus.OK, _SUCCESS, _success(answer)
        outcome = "issued"
    metrics.token_requests.labels(outcome).inc()
    raw_headers = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await _send(send, status, raw_headers, body)


async def _read_or_refuse(
    issuer: TokenIssuer, scope: Scope, receive: Receive, origin: ClientAddress
) -> TokenRequest:
    try:
        return await read_request(scope, receive, origin)
    except OAuthError as error:
        await issuer.refuse(error, origin)
        raise


# RFC 6749 §5.1.
_SUCCESS: Final = {"Cache-Control": "no-store", "Pragma": "no-cache"}


def _success(answer: AccessToken) -> bytes:
    body: dict[str, Any] = {
        "access_token": answer.token.reveal(),
        "token_type": "Bearer",
        "expires_in": answer.expires_in,
        "scope": answer.scope,
    }
    if answer.credential_expires_at is not None:
        body["credential_expires_at"] = answer.credential_expires_at.astimezone(UTC)
    return msgspec.json.encode(body)


async def _send(
    send: Send, status: HTTPStatus, headers: list[tuple[bytes, bytes]], body: bytes
) -> None:
    headers = [*headers, (b"content-length", str(len(body)).encode())]
    if body:
        headers.append((b"content-type", b"application/json"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


async def read_request(scope: Scope, receive: Receive, origin: ClientAddress) -> TokenRequest:
    """Return the request in its one accepted form; raise Malformed or OAuthError."""
    if scope["query_string"]:
        raise Malformed("Parameters belong into the body; the query must be empty.")
    authorization = _authorization(scope)
    form = parse_form(await _body(receive))

    match form.get("grant_type"):
        case "client_credentials":
            pass
        case None:
            raise Malformed("grant_type is missing; expected client_credentials.")
        case _:
            raise Malformed(
                "The only grant_type here is client_credentials.",
                OAuthErrorCode.UNSUPPORTED_GRANT_TYPE,
            )
    scope_parameter, resource = form.get("scope"), form.get("resource")
    if scope_parameter is not None and not _SCOPE.fullmatch(scope_parameter):
        raise Malformed(
            "scope is a list of names, separated by single spaces.", OAuthErrorCode.INVALID_SCOPE
        )
    if resource is not None and not _ABSOLUTE_URI.fullmatch(resource):
        raise Malformed(
            "resource is one absolute URI without a fragment.", OAuthErrorCode.INVALID_TARGET
        )
    client_id, client_secret = _credential(authorization, form)
    return TokenRequest(
        client_id=client_id,
        client_secret=client_secret,
        scope=scope_parameter,
        resource=resource,
        origin=origin,
    )


def _authorization(scope: Scope) -> bytes | None:
    """Check the headers and return Authorization, if there is one."""
    found: dict[bytes, bytes] = {}
    for name, value in scope["headers"]:
        if name in (b"authorization", b"content-type", b"content-encoding"):
            if name in found:
                raise Malformed(f"There must be one {name.decode()} header.")
            found[name] = value
    if not _FORM.fullmatch(found.get(b"content-type", b"")):
        raise Malformed(
            "Expected the content type application/x-www-form-urlencoded, in UTF-8.",
            status=HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
        )
    if b"content-encoding" in found:
        raise Malformed(
            "The body must not be compressed.", status=HTTPStatus.UNSUPPORTED_MEDIA_TYPE
        )
    return found.get(b"authorization")


async def _body(receive: Receive) -> bytes:
    body = b""
    try:
        async with asyncio.timeout(BODY_DEADLINE):
            while True:
                message = await receive()
                if message["type"] != "http.request":
                    raise Malformed("The body ended early.")
                body += message["body"]
                if len(body) > MAX_BODY:
                    raise Malformed(
                        "The body is larger than 8 KiB.",
                        status=HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                    )
                if not message.get("more_body"):
                    return body
    except TimeoutError:
        raise Malformed(
            f"The body did not arrive within {BODY_DEADLINE:.0f} s.",
            status=HTTPStatus.REQUEST_TIMEOUT,
        ) from None


def parse_form(body: bytes) -> Mapping[str, str]:
    """Return the parameters (RFC 6749 appendix B); an empty one counts as absent.

    Raise Malformed for a second parameter of one name, a bad escape, bytes that are no UTF-8,
    control characters, and more than 20 parameters.
    """
    form: dict[str, str] = {}
    pairs = body.split(b"&") if body else []
    if len(pairs) > MAX_PARAMETERS:
        raise Malformed(f"There are more than {MAX_PARAMETERS} parameters.")
    for pair in pairs:
        raw_name, _, raw_value = pair.partition(b"=")
        name, value = form_decode(raw_name), form_decode(raw_value)
        if name in form:
            if name == "resource":
                # RFC 8707 §2 allows several; a token here has one audience.
                raise Malformed("There may be one resource.", OAuthErrorCode.INVALID_TARGET)
            raise Malformed("A parameter must not be given twice.")
        form[name] = value
    return {name: value for name, value in form.items() if value}


def form_decode(raw: bytes) -> str:
    """Decode one name or value of a form; raise Malformed."""
    if _BAD_ESCAPE.search(raw):
        raise Malformed("A percent sign must be followed by two hexadecimal digits.")
    try:
        text = unquote_to_bytes(raw.replace(b"+", b" ")).decode("utf-8")
    except UnicodeDecodeError:
        raise Malformed("Parameters must be UTF-8.") from None
    if _CONTROL.search(text):
        raise Malformed("Parameters must not hold control characters.")
    return text


def _credential(authorization: bytes | None, form: Mapping[str, str]) -> tuple[str, Secret]:
    """Return id and secret from the one mechanism that was used (RFC 6749 §2.3)."""
    client_id, client_secret = form.get("client_id"), form.get("client_secret")
    if authorization is None:
        if client_id is None or client_secret is None:
            raise OAuthError(
                OAuthErrorCode.INVALID_CLIENT,
                "Expected client_id and client_secret, as HTTP Basic or in the body.",
                reason="no_client_authentication",
            )
        return client_id, Secret(client_secret)
    if client_secret is not None:
        raise Malformed("Use one way of client authentication: HTTP Basic, or the body.")
    basic_id, basic_secret = _basic(authorization)
    if client_id not in (None, basic_id):
        raise Malformed("client_id in the body differs from the one in HTTP Basic.")
    return basic_id, basic_secret


def _basic(authorization: bytes) -> tuple[str, Secret]:
    """Read RFC 7617 Basic; id and secret are form-encoded within (RFC 6749 §2.3.1)."""
    scheme, _, encoded = authorization.partition(b" ")
    if scheme.lower() != b"basic":
        raise OAuthError(
            OAuthErrorCode.INVALID_CLIENT,
            "The only scheme here is Basic.",
            reason="unsupported_client_authentication",
        )
    try:
        decoded = base64.b64decode(encoded.strip(b" "), validate=True)
    except binascii.Error:
        raise Malformed("The HTTP Basic credentials are no base64.") from None
    raw_id, colon, raw_secret = decoded.partition(b":")
    if not colon:
        raise Malformed("The HTTP Basic credentials have no colon.")
    return form_decode(raw_id), Secret(form_decode(raw_secret))
