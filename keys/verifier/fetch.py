"""One bounded request over HTTP: GET for key sets and metadata, POST for tokens and reports.

It must not follow a redirect, use a proxy, or speak plain HTTP to anything but this machine.
"""

import contextlib
import ipaddress
import re
import socket
import threading
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import TypeVar
from urllib.parse import SplitResult, urlsplit

# getaddrinfo imports this codec at its first use: a fork in the middle of that would leave the
# child an import that never ends.
"localhost".encode("idna")

MAX_BODY_BYTES = 1024 * 1024
MIN_MAX_AGE = 10.0
MAX_MAX_AGE = 86_400.0
DEFAULT_MAX_AGE = 300.0

_HEADERS = {
    "Accept": "application/json",
    "Accept-Encoding": "identity",
    "Connection": "close",
    "User-Agent": "privyseal-verifier",
}
_T = TypeVar("_T")
_MAX_AGE = re.compile(r"max-age=\"?(\d{1,10})\"?", re.IGNORECASE)


class FetchFailed(Exception):
    """The document could not be had; the text says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """A document and for how many more seconds its sender calls it fresh (RFC 9111 §4.2)."""

    body: bytes = field(repr=False)
    max_age: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came back for a POST, whatever its status; `retry_after` in seconds, 0 if not told."""

    status: int
    body: bytes = field(repr=False)
    retry_after: float


def checked_url(url: str) -> SplitResult:
    """Return the parts of an http(s) URL; raise ValueError unless it is https or loopback."""
    if not url.isascii() or not url.isprintable() or " " in url:
        raise ValueError("expected a URL of printable ASCII characters")
    parts = urlsplit(url)
    if parts.scheme not in ("https", "http") or not parts.hostname:
        raise ValueError(f"expected an https URL, found {url}")
    if parts.scheme == "http" and not _is_loopback(parts.hostname):
        raise ValueError(f"expected https, or http to a loopback address, found {url}")
    if parts.username is not None or parts.password is not None or parts.fragment:
        raise ValueError("expected a URL without user, password and fragment")
    try:
        _ = parts.port
    except ValueError:
        raise ValueError(f"expected a port from 0 to 65535, found {url}") from None
    return parts


def checked_issuer(issuer: str) -> str:
    """Return `issuer` if it is an origin that `checked_url` lets pass; raise ValueError if not."""
    parts = checked_url(issuer)
    if issuer != f"{parts.scheme}://{parts.netloc}":
        raise ValueError(f"issuer: expected an origin without path and query, found {issuer}")
    return issuer


def get(url: str, *, timeout: float) -> Fetched:
    """Fetch `url`, or raise FetchFailed when `timeout` seconds after connecting are over.

    Connecting itself may take as long again for each address of the host. Only status 200 counts,
    with a body of at most 1 MiB.
    """
    return _request("GET", url, None, {}, timeout, _read_fetched)


def post(url: str, body: bytes, *, content_type: str, authorization: str, timeout: float) -> Answer:
    """Send `body` and return the answer, or raise FetchFailed on the same terms as `get`.

    The text of a FetchFailed holds neither the body nor the authorization.
    """
    headers = {"Content-Type": content_type, "Authorization": authorization}
    return _request("POST", url, body, headers, timeout, _read_answer)


def _request(
    method: str,
    url: str,
    body: bytes | None,
    headers: Mapping[str, str],
    timeout: float,
    read: Callable[[HTTPResponse], _T],
) -> _T:
    parts = checked_url(url)
    secure = parts.scheme == "https"
    port = parts.port or (443 if secure else 80)
    connection_type = HTTPSConnection if secure else HTTPConnection
    connection = connection_type(parts.hostname or "", port, timeout=timeout)
    with contextlib.closing(connection):
        try:
            connection.connect()
            # The socket's own timeout begins anew with each byte: a slow sender needs another end.
            with _ended_after(timeout, connection.sock):
                path = parts._replace(scheme="", netloc="").geturl() or "/"
                # Who refuses a request may answer and hang up before its body has come whole.
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    connection.request(method, path, body, {**_HEADERS, **headers})
                return read(connection.getresponse())
        except (OSError, HTTPException) as error:
            detail = str(error) or "closed early or too slow"
            raise FetchFailed(f"{url}: {type(error).__name__}: {detail}") from None
        except FetchFailed as error:
            raise FetchFailed(f"{url}: {error}") from None


def _read_fetched(response: HTTPResponse) -> Fetched:
    if response.status != 200:
        raise FetchFailed(f"expected status 200, found {response.status}")
    return Fetched(body=_read_body(response), max_age=_max_age(response))


def _read_answer(response: HTTPResponse) -> Answer:
    # RFC 9110 §10.2.3: seconds; the other form, a date, would need a clock that agrees.
    told = response.getheader("Retry-After") or ""
    return Answer(
        status=response.status,
        body=_read_body(response),
        retry_after=float(told) if _is_number(told) else 0.0,
    )


def _read_body(response: HTTPResponse) -> bytes:
    body = response.read(MAX_BODY_BYTES + 1)
    if len(body) > MAX_BODY_BYTES:
        raise FetchFailed(f"expected at most {MAX_BODY_BYTES} bytes, found more")
    # http.client says nothing when a body that is read in part ends before its Content-Length.
    if response.length:
        raise FetchFailed(f"expected {response.length} more bytes, found the end")
    return body


def _max_age(response: HTTPResponse) -> float:
    directives = [part.strip() for part in (response.getheader("Cache-Control") or "").split(",")]
    found = [match for part in directives if (match := _MAX_AGE.fullmatch(part))]
    if {"no-store", "no-cache"} & {part.lower() for part in directives}:
        return MIN_MAX_AGE
    if not found:
        return DEFAULT_MAX_AGE
    # RFC 9111 §4.2.3: a shared cache on the way has used up a part of it.
    age = response.getheader("Age") or ""
    spent = int(age) if _is_number(age) else 0
    return min(max(float(int(found[0][1]) - spent), MIN_MAX_AGE), MAX_MAX_AGE)


def _is_number(text: str) -> bool:
    return text.isdecimal() and text.isascii() and len(text) <= 10


@contextlib.contextmanager
def _ended_after(seconds: float, open_socket: socket.socket) -> Generator[None]:
    ended = threading.Event()

    def end() -> None:
        ended.set()
        with contextlib.suppress(OSError):
            socket.socket.shutdown(open_socket, socket.SHUT_RDWR)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
    # http.client takes a connection that ends among the headers for an answer without a body.
    if ended.is_set():
        raise FetchFailed(f"expected an answer within {seconds} s, found a part of one")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
