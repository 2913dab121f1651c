"""What every request brings along: its id, its origin, the ids in its path, and later who calls and
what was refused.

Judges nothing and answers nothing; it sees every answer leave.
"""

import re
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from ipaddress import IPv4Network, IPv6Network, ip_address
from typing import Annotated, Any, Final

import structlog
from litestar import Request
from litestar.params import PathParameter
from litestar.types import ASGIApp, Message, Receive, Scope, Send

from service import metrics
from service.authority.model import CREDENTIAL_ID, KID, SERVICE_USER_ID, ClientAddress

REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
MAX_USER_AGENT: Final = 200
_NOT_PRINTABLE: Final = re.compile(r"[^\x20-\x7e]")

AnyRequest = Request[Any, Any, Any]

# Litestar reads the constraints of a parameter from its own marker only.
ServiceUserIdInPath = Annotated[str, PathParameter(pattern=SERVICE_USER_ID)]
CredentialIdInPath = Annotated[str, PathParameter(pattern=CREDENTIAL_ID)]
KidInPath = Annotated[str, PathParameter(pattern=KID)]

Networks = Sequence[IPv4Network | IPv6Network]
RecordRefusal = Callable[[Scope], Awaitable[None]]

log = structlog.stdlib.get_logger()


class RequestContext:
    """The outermost ASGI layer: names the request, and holds a refusal back until it is on record.

    A caller's own `X-Request-Id` is taken if it has 1 to 64 characters of A-Z a-z 0-9 . _ -, so
    that one id can be followed through several services.
    """

    def __init__(
        self, app: ASGIApp, *, trusted_proxies: Networks, record_refusal: RecordRefusal
    ) -> None:
        self._app = app
        self._trusted_proxies = tuple(trusted_proxies)
        self._record_refusal = record_refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        origin = self._origin(scope)
        context: dict[str, Any] = {"origin": origin}
        scope["privyseal"] = context  # type: ignore[typeddict-unknown-key]
        request_id = (b"x-request-id", origin.request_id.encode("ascii"))

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                if "refused" in context:
                    await self._record_refusal(scope)
                message["headers"] = [*message["headers"], request_id]
                status = message["status"]
                metrics.http_responses.labels(f"{status // 100}xx").inc()
                log.debug(
                    "answered",
                    method=scope["method"],
                    path=scope["path"],
                    status=status,
                    request_id=origin.request_id,
                    ms=round((time.perf_counter() - started) * 1000, 1),
                )
            await send(message)

        await self._app(scope, receive, send_with_id)

    def _origin(self, scope: Scope) -> ClientAddress:
        request_id = user_agent = ""
        forwarded: list[str] = []
        for name, value in scope["headers"]:
            if name == b"x-request-id":
                request_id = value.decode("latin-1")
            elif name == b"user-agent":
                user_agent = value[:MAX_USER_AGENT].decode("latin-1")
            elif name == b"x-forwarded-for":
                forwarded.extend(value.decode("latin-1").split(","))
        client = scope["client"]
        return ClientAddress(
            address=client_address(client[0] if client else "", forwarded, self._trusted_proxies),
            # One line of plain ASCII, whatever was sent: it is shown to operators.
            user_agent=_NOT_PRINTABLE.sub("?", user_agent),
            request_id=request_id
            if REQUEST_ID.fullmatch(request_id)
            else secrets.token_urlsafe(12),
        )


def client_address(peer: str, forwarded: Sequence[str], trusted: Networks) -> str:
    """Return the last address that no trusted proxy vouches for.

    X-Forwarded-For is read from the right, and only as far as the one who appended is trusted:
    what stands further left was written by the client itself.
    """
    address = peer
    for hop in reversed(forwarded):
        # A zone (RFC 4007 §11) means nothing outside of its host, and may be any text.
        if "%" in hop or not _is_in(address, trusted):
            break
        try:
            address = str(ip_address(hop.strip()))
        except ValueError:
            break
    return address


def origin_of(scope: Scope) -> ClientAddress:
    """Return from where the request came."""
    return scope["privyseal"]["origin"]  # type: ignore[typeddict-item]


def note(scope: Scope, **facts: Any) -> None:
    """Leave facts about the request for its audit record: `operator`, `refused`,
    `unrecorded_token`."""
    scope["privyseal"].update(facts)  # type: ignore[typeddict-item]


def noted(scope: Scope, name: str) -> Any:
    """Return a fact that was left, or None."""
    return scope["privyseal"].get(name)  # type: ignore[typeddict-item]


def _is_in(address: str, networks: Networks) -> bool:
    try:
        parsed = ip_address(address)
    except ValueError:
        return False
    return any(parsed in network for network in networks)
