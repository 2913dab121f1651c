"""Connections that send too much or too slowly, as bytes over TCP."""

import socket
import time
from urllib.parse import urlsplit

import pytest

from service.http.protocol import HEAD_DEADLINE, MAX_HEAD
from tests.interop.conftest import Authority

REQUEST = b"GET /healthz HTTP/1.1\r\nHost: authority\r\n"


@pytest.fixture
def connection(authority: Authority) -> socket.socket:
    place = urlsplit(authority.issuer)
    return socket.create_connection((place.hostname, place.port), timeout=HEAD_DEADLINE + 5)


def status(connection: socket.socket) -> bytes:
    """Return the status line of the next answer; nothing if the connection was ended."""
    with connection:
        return connection.recv(4096).split(b"\r\n")[0]


@pytest.mark.parametrize(
    "head",
    [
        REQUEST + b"X: " + b"a" * MAX_HEAD,
        b"GET /" + b"a" * MAX_HEAD,
        REQUEST + b"a: b\r\n" * (MAX_HEAD // 6),
    ],
)
def test_a_head_that_is_too_large_is_refused_before_it_ends(
    connection: socket.socket, head: bytes
) -> None:
    connection.sendall(head)
    assert status(connection) == b"HTTP/1.1 431 Request Header Fields Too Large"


def test_a_head_within_the_bound_and_many_requests_on_one_connection_are_answered(
    connection: socket.socket,
) -> None:
    with connection:
        for _ in range(8):
            connection.sendall(REQUEST + b"X: " + b"a" * (MAX_HEAD // 4) + b"\r\n\r\n")
            answer = b""
            while not answer.endswith(b'{"alive":true}'):
                received = connection.recv(4096)
                assert received, answer
                answer += received
            assert answer.startswith(b"HTTP/1.1 200 OK")


@pytest.mark.parametrize("sent", [b"", REQUEST])
def test_who_does_not_send_a_whole_head_in_time_is_dropped(
    connection: socket.socket, sent: bytes
) -> None:
    began = time.monotonic()
    connection.sendall(sent)
    assert status(connection) == b""
    assert HEAD_DEADLINE - 1 < time.monotonic() - began < HEAD_DEADLINE + 4
