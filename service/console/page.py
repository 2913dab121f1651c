"""What every answer of the console is made with: templates, headers, and the session's cookie.

Decides nothing about who sees what.
"""

import hashlib
import hmac
from base64 import urlsafe_b64encode
from collections.abc import Mapping
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined, pass_context
from jinja2.runtime import Context
from litestar import Response
from litestar.types import ASGIApp, Message, Receive, Scope, Send
from markupsafe import Markup

from service.authority.model import AccessToken, AdminScope
from service.authority.sessions import Session
from service.http.context import AnyRequest, note, noted, origin_of

HOME: Final = "/console"
_PAGES: Final = (
    ("/console/service-users", "API keys", AdminScope.SERVICE_USERS_READ),
    ("/console/token", "Token", AdminScope.TOKENS_MINT),
    ("/console/upload", "Upload", AdminScope.TOKENS_MINT),
    ("/console/signing-keys", "Signing keys", AdminScope.SIGNING_KEYS_READ),
    ("/console/audit", "Audit", AdminScope.AUDIT_READ),
)
_OWN: Final = (
    ("/console/me", "My credentials"),
    ("/console/token", "Token"),
    ("/console/upload", "Upload"),
    ("/console/audit", "Audit"),
)
_BY_HAND: Final = {"/console/token", "/console/upload"}

COOKIE: Final = "__Host-privyseal"
_ATTRIBUTES: Final = "Path=/; Secure; HttpOnly; SameSite=Strict"
_HERE: Final = Path(__file__).parent
_MEDIA_TYPES: Final = {
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

HEADERS: Final[Mapping[str, str]] = {
    # An answer may hold a secret or a token: no cache keeps it, on disk or in memory.
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    # Not no-referrer: a browser then sends `Origin: null` with a form (Fetch §3.1).
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class Asset:
    """A file that the pages load; its address changes with its content, so it is kept for ever."""

    def __init__(self, path: Path) -> None:
        self.content = path.read_bytes()
        self.media_type = _MEDIA_TYPES[path.suffix]
        digest = hashlib.sha256(self.content).hexdigest()[:16]
        self.address = f"/console/static/{path.name}?v={digest}"


ASSETS: Final = {path.name: Asset(path) for path in sorted((_HERE / "static").iterdir())}


def page(
    request: AnyRequest,
    template: str,
    *,
    status: int = HTTPStatus.OK,
    headers: Mapping[str, str] | None = None,
    **context: Any,
) -> Response[str]:
    """Return a page; templates see the session, its CSRF token, and what is given."""
    session: Session | None = noted(request.scope, "session")
    html = _TEMPLATES.get_template(template).render(
        session=session,
        csrf=csrf_token(session) if session else "",
        now=noted(request.scope, "now"),
        forged=noted(request.scope, "forged") or 0,
        portal=noted(request.scope, "portal"),
        path=request.scope["path"],
        request_id=origin_of(request.scope).request_id,
        **context,
    )
    return Response(
        html,
        status_code=status,
        media_type="text/html; charset=utf-8",
        headers=_headers(request, headers),
    )


class Download:
    """A file instead of a page, under the headers of the console where it has none of its own."""

    def __init__(self, request: AnyRequest, answer: ASGIApp, file_name: str) -> None:
        named = {"Content-Disposition": f'attachment; filename="{file_name}"'}
        self._headers = {
            name.lower().encode(): value.encode()
            for name, value in _headers(request, named).items()
        }
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [each for each in message["headers"] if each[0] != b"content-disposition"]
                names = {name for name, _ in own}
                further = [header for header in self._headers.items() if header[0] not in names]
                message["headers"] = [*own, *further]
            await send(message)

        await self._answer(scope, receive, send_with_headers)


def redirect(request: AnyRequest, path: str) -> Response[None]:
    """Return the answer to a form that was carried out: the browser reads `path` (RFC 9110
    §15.4.4), which must be one of the console's own, or the way to the human portal."""
    return Response(
        None, status_code=HTTPStatus.SEE_OTHER, headers=_headers(request, {"Location": path})
    )


def set_session(request: AnyRequest, token: AccessToken | None) -> None:
    """Let the answer to this request bring the token of a session; None ends the session."""
    note(request.scope, cookie=token.token.reveal() if token else "")


def csrf_token(session: Session) -> str:
    """Return what every form of this session must bring: nobody without its cookie can know it."""
    digest = hashlib.sha256(b"privyseal console form " + session.signed_in.id.encode()).digest()
    return urlsafe_b64encode(digest).rstrip(b"=").decode("ascii")


def is_csrf_token(session: Session, offered: str) -> bool:
    """Whether a form was made for this session."""
    return hmac.compare_digest(csrf_token(session).encode(), offered.encode())


def _headers(request: AnyRequest, further: Mapping[str, str] | None) -> dict[str, str]:
    headers = {**HEADERS, **(further or {})}
    cookie: str | None = noted(request.scope, "cookie")
    if cookie is not None:
        ended = "" if cookie else "; Max-Age=0"
        headers["Set-Cookie"] = f"{COOKIE}={cookie}; {_ATTRIBUTES}{ended}"
    return headers


def _time(at: datetime | float | None, otherwise: str = "never") -> str:
    """Return a time for people and for programs; scripts may add how long ago it is."""
    if at is None:
        return otherwise
    moment = (at if isinstance(at, datetime) else datetime.fromtimestamp(at, UTC)).astimezone(UTC)
    return Markup('<time datetime="{}">{}</time>').format(
        moment.isoformat(timespec="seconds"), moment.strftime("%Y-%m-%d %H:%M UTC")
    )


@pass_context
def _span(context: Context, at: datetime | float | None, otherwise: str = "never") -> str:
    """Return a time as its distance from now: `3 h ago`, `in 12 days`."""
    if at is None:
        return otherwise
    seconds = (at.timestamp() if isinstance(at, datetime) else at) - context["now"]
    for size, unit in ((86_400, "days"), (3600, "h"), (60, "min"), (1, "s")):
        if abs(seconds) >= 2 * size or size == 1:
            # What was just given a year ends in 365 days, and not in 364.
            amount = f"{-seconds // size if seconds < 0 else seconds / size:.0f} {unit}"
            break
    else:
        raise AssertionError("some unit always fits")
    words = f"{amount} ago" if seconds < 0 else f"in {amount}"
    moment = datetime.fromtimestamp(seconds + context["now"], UTC)
    return Markup('<time datetime="{}" title="{}">{}</time>').format(
        moment.isoformat(timespec="seconds"), moment.strftime("%Y-%m-%d %H:%M:%S UTC"), words
    )


def visible(text: str, kept: str = "") -> str:
    """Spell out what would steer a page instead of being seen on it: control and bidi characters,
    and all that nobody sees; but for those that are `kept`."""
    return "".join(
        character if character.isprintable() or character in kept else ascii(character)[1:-1]
        for character in text
    )


def _address(name: str) -> str:
    return ASSETS[name].address


def _iso(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")


def _clock(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%H:%M UTC")


@pass_context
def _left(context: Context, at: float) -> str:
    return f"{max(0, at - context['now']) / 60:.0f} min"


def _navigation(session: Session) -> list[tuple[str, str]]:
    """Return the pages that this session may open, each with its name."""
    if session.has_nothing:
        return [(HOME, "Home")]
    if not session.is_operator:
        # Tokens of whoever holds a scope of the admin API are not made by hand.
        closed = _BY_HAND if session.service_user.admin_scopes else ()
        return [(HOME, "Home"), *(each for each in _OWN if each[0] not in closed)]
    scopes = session.operator.scopes
    return [
        (HOME, "Home"),
        *((address, label) for address, label, scope in _PAGES if scope in scopes),
    ]


def _templates() -> Environment:
    templates = Environment(
        loader=FileSystemLoader(_HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Any] = templates.filters
    filters |= {
        "time": _time,
        "span": _span,
        "iso": _iso,
        "clock": _clock,
        "left": _left,
        "static": _address,
        "navigation": _navigation,
        "visible": visible,
    }
    return templates


_TEMPLATES: Final = _templates()
