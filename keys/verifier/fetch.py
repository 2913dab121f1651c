"""One bounded GET over HTTP, for key sets and discovery documents.

It must not follow a redirect, use a proxy, or speak plain HTTP to anything but this machine.
"""

import contextlib
import ipaddress
import re
import socket
import threading
from collections.abc import Generator
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from urllib.parse import SplitResult, urlsplit

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
_MAX_AGE = re.compile(r"max-age=\"?(\d{1,10})\"?", re.IGNORECASE)


class FetchFailed(Exception):
    """The document could not be had; the text says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """A document and for how many more seconds its sender calls it fresh (RFC 9111 §4.2)."""

    body: bytes = field(repr=False)
    max_age: float


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


def get(url: str, *, timeout: float) -> Fetched:
    """Fetch `url`, or raise FetchFailed when `timeout` seconds after connecting are over.

    Connecting itself may take as long again for each address of the host. Only status 200 counts,
    with a body of at most 1 MiB.
    """
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
                connection.request("GET", path, headers=_HEADERS)
                return _read(connection.getresponse())
        except (OSError, HTTPException) as error:
            detail = str(error) or "closed early or too slow"
            raise FetchFailed(f"{url}: {type(error).__name__}: {detail}") from None
        except FetchFailed as error:
            raise FetchFailed(f"{url}: {error}") from None


def _read(response: HTTPResponse) -> Fetched:
    if response.status != 200:
        raise FetchFailed(f"expected status 200, found {response.status}")
    body = response.read(MAX_BODY_BYTES + 1)
    if len(body) > MAX_BODY_BYTES:
        raise FetchFailed(f"expected at most {MAX_BODY_BYTES} bytes, found more")
    # http.client says nothing when a body that is read in part ends before its Content-Length.
    if response.length:
        raise FetchFailed(f"expected {response.length} more bytes, found the end")
    return Fetched(body=body, max_age=_max_age(response))


def _max_age(response: HTTPResponse) -> float:
    directives = [part.strip() for part in (response.getheader("Cache-Control") or "").split(",")]
    found = [match for part in directives if (match := _MAX_AGE.fullmatch(part))]
    if {"no-store", "no-cache"} & {part.lower() for part in directives}:
        return MIN_MAX_AGE
    if not found:
        return DEFAULT_MAX_AGE
    # RFC 9111 §4.2.3: a shared cache on the way has used up a part of it.
    age = response.getheader("Age") or ""
    spent = int(age) if age.isdecimal() and age.isascii() and len(age) <= 10 else 0
    return min(max(float(int(found[0][1]) - spent), MIN_MAX_AGE), MAX_MAX_AGE)


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
