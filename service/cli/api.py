"""The authority as its clients see it: one exchange, then the admin API, each call within 10 s.

Imports nothing of the server and prints no result. The client secret leaves it in the exchange
and nowhere else.
"""

import asyncio
import re
import time
from base64 import b64encode
from collections.abc import Awaitable, Iterator, Mapping
from functools import cached_property
from http import HTTPStatus
from importlib.metadata import version
from ipaddress import ip_address
from ssl import SSLCertVerificationError
from types import TracebackType
from typing import Any, Final, Self, TypeVar, cast
from urllib.parse import urlsplit

import click
import httpx

from keys.secret import Secret
from service.cli.render import Json, printable

T = TypeVar("T")

DEFAULT_URL: Final = "http://127.0.0.1:8080"
DEADLINE: Final = 10.0
"""Seconds for one call, from connecting to the last byte of the answer."""
TRIES: Final = 3
RETRY_WINDOW: Final = 15.0
"""Seconds within which an authority that is not available is tried again."""
RENEW_AT: Final = 2 / 3
"""The part of a token's lifetime after which a command that still runs gets another."""

_ORIGIN: Final = re.compile(r"https?://([A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?/?")
_CLIENT_ID: Final = re.compile("su_[a-z2-7]{24}")
_CLIENT_SECRET: Final = re.compile("pvs_[0-9A-Za-z]{49}")
# RFC 6750 §3: the scope that would have been enough.
_SCOPE: Final = re.compile('scope="([^"]+)"')
_METADATA: Final = "/.well-known/oauth-authorization-server"
_FORGED: Final = re.compile("token[.]forged ([0-9]{1,9})")
_UNSURE: Final = " It may have been done: look before you repeat it."
_CREDENTIAL: Final = "The credential is that in PRIVYSEAL_CLIENT_ID and PRIVYSEAL_CLIENT_SECRET."


class Misconfigured(click.ClickException):
    """A variable of the environment is missing or cannot be right: wrong usage."""

    exit_code = 2


class Refused(click.ClickException):
    """The authority said no: the same request will not do better."""


class Forbidden(Refused):
    """The caller lacks the scope for this; others of its requests may do."""


class Taken(Refused):
    """The name is that of another."""


class Unavailable(click.ClickException):
    """The authority could not be reached, or could not answer: later it may."""


class Authority:
    """The authority at one URL, with the credential of one service user. A context manager.

    Every method raises Refused or Unavailable, in a sentence that says what to do next.
    """

    def __init__(self, *, url: str, client_id: str, client_secret: Secret) -> None:
        self.url = url
        self.client_id = client_id
        self._client_secret = client_secret
        self._admin_token: Secret | None = None
        self._renew_at = 0.0
        self._alert_shown = ""
        self._runner = asyncio.Runner()
        self._http = httpx.AsyncClient(
            base_url=url,
            timeout=DEADLINE,
            headers={"User-Agent": f"privyseal/{version('privyseal')}"},
            # Plain HTTP is for loopback, and no proxy stands in between: it could read along.
            trust_env=url.startswith("https:"),
            event_hooks={"response": [self._show_alert]},
        )

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Self:
        """Read PRIVYSEAL_URL, PRIVYSEAL_CLIENT_ID and PRIVYSEAL_CLIENT_SECRET.

        Raise Misconfigured; it never repeats a value that might be a secret.
        """
        url = environ.get("PRIVYSEAL_URL") or DEFAULT_URL
        if not _ORIGIN.fullmatch(url):
            raise Misconfigured(
                "PRIVYSEAL_URL must be scheme, host and port only, such as https://tokens.example."
            )
        if not _is_confidential(url):
            raise Misconfigured(
                "PRIVYSEAL_URL is plain http and not loopback: the client secret would travel in "
                "the clear. Use https."
            )
        client_id = environ.get("PRIVYSEAL_CLIENT_ID", "")
        client_secret = Secret(environ.get("PRIVYSEAL_CLIENT_SECRET", ""))
        for variable, value, form, expected in (
            ("PRIVYSEAL_CLIENT_ID", client_id, _CLIENT_ID, "su_ and 24 characters"),
            (
                "PRIVYSEAL_CLIENT_SECRET",
                client_secret.reveal(),
                _CLIENT_SECRET,
                "pvs_ and 49 letters and digits",
            ),
        ):
            if not value:
                raise Misconfigured(
                    f"{variable} is not set. Set it to what `privyseal credentials create` or "
                    "`privyseal bootstrap` printed."
                )
            if not form.fullmatch(value):
                raise Misconfigured(f"{variable} cannot be right: expected {expected}.")
        return cls(url=url.rstrip("/"), client_id=client_id, client_secret=client_secret)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._runner.run(self._http.aclose())
        self._runner.close()

    def exchange(self, *, scope: str | None = None, resource: str | None = None) -> Json:
        """Exchange the credential for a token: the answer of RFC 6749 §5.1."""
        form = {"grant_type": "client_credentials", "scope": scope, "resource": resource}
        request = self._http.build_request(
            "POST",
            self._metadata["token_endpoint"],
            data={name: value for name, value in form.items() if value is not None},
            headers={"Authorization": self._basic()},
        )
        response = self._send(request, repeatable=True)
        if response.status_code != HTTPStatus.OK:
            raise self._exchange_refusal(response, resource)
        return self._body(response, "access_token", "expires_in")

    def get(self, path: str, **query: str | int | None) -> Json:
        """Read one thing below /api/v1; what is None in the query is left out."""
        params = {name: value for name, value in query.items() if value is not None}
        return self._call("GET", path, repeatable=True, params=params)

    def stream(self, path: str, **query: str | None) -> Iterator[bytes]:
        """Read an answer piece by piece, however long it is; raise Unavailable if it breaks off."""
        params = {name: value for name, value in query.items() if value is not None}
        request = self._admin_request("GET", path, params=params)
        response = self._send(request, repeatable=True, stream=True)
        try:
            if not response.is_success:
                self._runner.run(response.aread())
                raise self._refusal(response, repeatable=True)
            pieces = response.aiter_bytes()
            while (
                piece := self._guarded(anext(pieces, None), request, repeatable=True)
            ) is not None:
                yield piece
        finally:
            self._runner.run(response.aclose())

    def get_list(self, path: str, member: str) -> list[Json]:
        """Read a list that has no pages."""
        return self._list(self.get(path), member)

    def pages(
        self,
        path: str,
        member: str,
        *,
        page_size: int,
        limit: int | None = None,
        **query: str | None,
    ) -> Iterator[Json]:
        """Read a list page by page: all of it, or the first `limit`."""
        cursor: str | None = None
        left = limit
        while left is None or left > 0:
            asked = page_size if left is None else min(page_size, left)
            body = self.get(path, limit=asked, cursor=cursor, **query)
            items = self._list(body, member)
            yield from items
            left = None if left is None else left - len(items)
            cursor = body.get("next_cursor")
            # A log always says where to resume: it ends with the page that is not full.
            if cursor is None or len(items) < asked:
                return

    def post(
        self,
        path: str,
        body: Json | None = None,
        *,
        repeatable: bool = False,
        deadline: float = DEADLINE,
    ) -> Json:
        """Act, within `deadline` seconds.

        `repeatable` if to do it twice is to do it once (RFC 9110 §9.2.2).
        """
        return self._call("POST", path, repeatable=repeatable, json=body, timeout=deadline)

    def patch(self, path: str, body: Json, *, version: int) -> Json:
        """Change what is still at `version`."""
        return self._call(
            "PATCH", path, repeatable=False, json=body, headers={"If-Match": f'"{version}"'}
        )

    def service_user_id(self, id_or_name: str) -> str:
        """Return the id of a service user; what has the form of an id is one."""
        if _CLIENT_ID.fullmatch(id_or_name):
            return id_or_name
        for user in self.pages("/service-users", "service_users", page_size=1, name=id_or_name):
            return user["id"]
        raise Refused(
            f"There is no service user named {printable(id_or_name)}. "
            "`privyseal service-users list` shows those that there are."
        )

    def forget_token(self) -> None:
        """Get another token for the next call: the one at hand may have died before its time."""
        self._admin_token = None

    @property
    def _api_audience(self) -> str:
        return f"{self._metadata['issuer']}/api/v1"

    @cached_property
    def _metadata(self) -> Json:
        request = self._http.build_request("GET", _METADATA)
        response = self._send(request, repeatable=True)
        if response.status_code == HTTPStatus.SERVICE_UNAVAILABLE:
            raise Unavailable(f"{self.url} is not ready (503). Try again later.")
        if response.status_code != HTTPStatus.OK:
            raise Refused(
                f"{self.url} answers {response.status_code} where an authority has its metadata. "
                "Check PRIVYSEAL_URL."
            )
        metadata = self._body(response, "issuer", "token_endpoint")
        # RFC 8414 §3.3: otherwise one authority could collect tokens that are for another.
        if metadata["issuer"] != self.url:
            issuer = printable(str(metadata["issuer"]))
            raise Refused(
                f"The authority at {self.url} calls itself {issuer}, and secrets are sent only "
                f"under that name. Set PRIVYSEAL_URL={issuer}"
            )
        if not _is_confidential(str(metadata["token_endpoint"])):
            raise Refused(
                f"{self.url} names a token endpoint that is neither https nor loopback: the "
                "client secret would travel in the clear. Correct PRIVYSEAL_ISSUER of the server."
            )
        return metadata

    def _bearer(self) -> str:
        if self._admin_token is None or time.monotonic() >= self._renew_at:
            answer = self.exchange(resource=self._api_audience)
            self._admin_token = Secret(answer["access_token"])
            self._renew_at = time.monotonic() + answer["expires_in"] * RENEW_AT
        return f"Bearer {self._admin_token.reveal()}"

    def _basic(self) -> str:
        # Neither id nor secret has a character that RFC 6749 §2.3.1 would have us encode.
        pair = f"{self.client_id}:{self._client_secret.reveal()}"
        return f"Basic {b64encode(pair.encode('ascii')).decode('ascii')}"

    async def _show_alert(self, response: httpx.Response) -> None:
        """Say that a key leaked, before anything else and once."""
        alert = response.headers.get("Privyseal-Alert", "")
        if alert == self._alert_shown or not (forged := _FORGED.fullmatch(alert)):
            return
        self._alert_shown = alert
        count = int(forged[1])
        click.secho(
            f"ALERT: {count} forged token{'s were' if count > 1 else ' was'} noticed in the last "
            "7 days: a signing key is in other hands.\n"
            "       See: privyseal audit list --action token.forged",
            fg="red",
            bold=True,
            err=True,
        )

    def _call(self, method: str, path: str, *, repeatable: bool, **content: Any) -> Json:
        response = self._send(self._admin_request(method, path, **content), repeatable=repeatable)
        if not response.is_success:
            raise self._refusal(response, repeatable=repeatable)
        return self._body(response)

    def _admin_request(self, method: str, path: str, **content: Any) -> httpx.Request:
        headers = {**content.pop("headers", {}), "Authorization": self._bearer()}
        return self._http.build_request(method, f"/api/v1{path}", headers=headers, **content)

    def _send(
        self, request: httpx.Request, *, repeatable: bool, stream: bool = False
    ) -> httpx.Response:
        give_up = time.monotonic() + RETRY_WINDOW
        tries_left = TRIES
        while True:
            sending = self._http.send(request, stream=stream)
            response = self._guarded(sending, request, repeatable=repeatable)
            tries_left -= 1
            wait = _retry_after(response)
            if (
                response.status_code != HTTPStatus.SERVICE_UNAVAILABLE
                or not repeatable
                or tries_left == 0
                or time.monotonic() + wait > give_up
            ):
                return response
            click.echo(f"{self.url} is not available; trying again in {wait} s.", err=True)
            time.sleep(wait)

    def _guarded(self, work: Awaitable[T], request: httpx.Request, *, repeatable: bool) -> T:
        unsure = "" if repeatable else _UNSURE
        try:
            return self._runner.run(_within(_deadline(request), work))
        except httpx.ConnectError as error:
            raise self._unreachable(request.url, error) from None
        except (TimeoutError, httpx.TimeoutException):
            raise Unavailable(
                f"{_origin(request.url)} did not answer within {_deadline(request):.0f} s. "
                "Try again later." + unsure
            ) from None
        except httpx.HTTPError as error:
            raise Unavailable(
                f"The connection to {_origin(request.url)} broke ({type(error).__name__}). "
                "Try again." + unsure
            ) from None

    def _unreachable(self, url: httpx.URL, error: httpx.ConnectError) -> Unavailable:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, SSLCertVerificationError):
                return Unavailable(
                    f"The certificate of {_origin(url)} is not trusted: {cause.verify_message}. "
                    "If it is of a certificate authority of your own, set SSL_CERT_FILE."
                )
            cause = cause.__cause__ or cause.__context__
        return Unavailable(
            f"Nothing answers at {_origin(url)}. Is the authority running (privyseal serve), and "
            f"is PRIVYSEAL_URL right? Where it is not set, it is {DEFAULT_URL}."
        )

    def _exchange_refusal(
        self, response: httpx.Response, resource: str | None
    ) -> click.ClickException:
        problem = _json_object(response)
        said = _said(problem.get("error_description"))
        said = said or f"the token endpoint answers {response.status_code} without saying why."
        if response.status_code >= HTTPStatus.INTERNAL_SERVER_ERROR:
            return Unavailable(f"No token: {said}{_request_id(response)}")
        if problem.get("error") == "invalid_client":
            return Refused(f"{said} {_CREDENTIAL}")
        if problem.get("error") == "invalid_target" and resource == self._api_audience:
            return Refused(
                f"No token for {resource}: {said} Use an operator's credential. To see or rotate "
                f"your own: “My credentials” in {self.url}/console, or have an operator add the "
                f"audience {resource}."
            )
        return Refused(f"No token for {resource}: {said}" if resource else f"No token: {said}")

    def _refusal(self, response: httpx.Response, *, repeatable: bool) -> click.ClickException:
        status, problem = response.status_code, _json_object(response)
        said = _said(problem.get("detail")) or f"{self.url} answers {status} without saying why."
        if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            unsure = "" if repeatable else _UNSURE
            return Unavailable(said + unsure + _request_id(response))
        if status == HTTPStatus.UNAUTHORIZED:
            return Refused(f"{said} {_CREDENTIAL}")
        if lacking := _SCOPE.search(response.headers.get("WWW-Authenticate", "")):
            scope = printable(lacking[1])
            return Forbidden(f"{said} PRIVYSEAL_CLIENT_ID names a service user without {scope}.")
        if status == HTTPStatus.PRECONDITION_FAILED:
            return Refused(f"{said} Nothing was changed: look at it and repeat the command.")
        if status == HTTPStatus.CONFLICT and "/name" in _pointers(problem):
            return Taken(said)
        return Refused(_field_errors(problem) or said)

    def _body(self, response: httpx.Response, *members: str) -> Json:
        body = _json_object(response)
        if not body or any(member not in body for member in members):
            raise Refused(
                f"{response.url.path} of {self.url} does not answer as an authority does. Check "
                "PRIVYSEAL_URL, and that this command is of the authority's release."
            )
        return body

    def _list(self, body: Json, member: str) -> list[Json]:
        if not isinstance(body.get(member), list):
            raise Refused(f"{self.url} answers without {member}: it is of another release.")
        return body[member]


async def _within(seconds: float, work: Awaitable[T]) -> T:
    # httpx counts its timeout anew with every read; this one is for the whole call.
    async with asyncio.timeout(seconds):
        return await work


def _is_confidential(url: str) -> bool:
    parts = urlsplit(url)
    host = parts.hostname or ""
    if parts.scheme == "https" or host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _retry_after(response: httpx.Response) -> int:
    text = response.headers.get("Retry-After", "")
    return int(text) if re.fullmatch("[0-9]{1,5}", text) else 1


def _json_object(response: httpx.Response) -> Json:
    try:
        body: Any = response.json()
    except ValueError:
        return {}
    return cast("Json", body) if isinstance(body, dict) else {}


def _pointers(problem: Json) -> list[str]:
    faults = problem.get("errors")
    return [
        _said(fault.get("pointer"))
        for fault in (cast("list[Json]", faults) if isinstance(faults, list) else ())
    ]


def _field_errors(problem: Json) -> str:
    """Return each faulty field with what was expected of it."""
    faults = problem.get("errors")
    if not isinstance(faults, list):
        return ""
    return "; ".join(map(_field_error, cast("list[Json]", faults)))


def _field_error(fault: Json) -> str:
    pointer, detail = _said(fault.get("pointer")), _said(fault.get("detail"))
    field = pointer.strip("/").replace("/", ".") or _said(fault.get("parameter"))
    # Most details name their field themselves.
    return detail if not field or detail.startswith(f"{field}: ") else f"{field}: {detail}"


def _said(text: Any) -> str:
    return printable(str(text)) if text else ""


def _deadline(request: httpx.Request) -> float:
    return request.extensions["timeout"]["read"]


def _origin(url: httpx.URL) -> str:
    return f"{url.scheme}://{url.netloc.decode('ascii')}"


def _request_id(response: httpx.Response) -> str:
    request_id = response.headers.get("X-Request-Id")
    return f" (request id {printable(request_id)})" if request_id else ""
