"""HTTP/1.1 by hand on one keep-alive connection: cheap enough not to be what is measured.

Understands answers with a Content-Length, and nothing else.
"""

import asyncio
import base64
import json
import re
from typing import Any, Final, cast

DEADLINE: Final = 15.0
_CONTENT_LENGTH: Final = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)


def exchange_request(client_id: str, client_secret: str) -> bytes:
    """Return the bytes of one `POST /oauth/token` with HTTP Basic."""
    basic = base64.b64encode(f"{client_id}:{client_secret}".encode())
    body = b"grant_type=client_credentials"
    return (
        b"POST /oauth/token HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Basic %b\r\n"
        b"Content-Type: application/x-www-form-urlencoded\r\nContent-Length: %d\r\n\r\n%b"
    ) % (basic, len(body), body)


def get_request(path: str) -> bytes:
    """Return the bytes of one GET."""
    return b"GET %b HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" % path.encode()


def unverified_claims(token: str) -> dict[str, Any]:
    """Return what a token says of itself."""
    payload = token.split(".")[1]
    claims: dict[str, Any] = json.loads(
        base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4))
    )
    return claims


class Answer:
    """Collects one answer; `status` and `body` count once `feed` has returned True."""

    def __init__(self) -> None:
        self._received = b""
        self._body_at = 0
        self._length = 0
        self.status = 0

    @property
    def body(self) -> bytes:
        return self._received[self._body_at :]

    def feed(self, data: bytes) -> bool:
        """Take what arrived; return whether the answer is complete."""
        self._received += data
        if not self._body_at:
            head = self._received.find(b"\r\n\r\n")
            if head < 0:
                return False
            found = _CONTENT_LENGTH.search(self._received, 0, head + 2)
            assert found is not None, self._received[: head + 2]
            self.status = int(self._received[9:12])
            self._body_at = head + 4
            self._length = int(found[1])
        return len(self._received) >= self._body_at + self._length


class Connection(asyncio.Protocol):
    """One connection, one request at a time. Raises ConnectionError when the server goes."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._answer = Answer()
        self._complete: asyncio.Future[Answer] | None = None

    @classmethod
    async def open(cls, port: int) -> "Connection":
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(DEADLINE):
            _, connection = await loop.create_connection(cls, "127.0.0.1", port)
        return connection

    async def request(self, request: bytes) -> tuple[int, bytes]:
        """Return status and body."""
        if self._transport is None:
            raise ConnectionResetError
        self._answer = Answer()
        self._complete = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        async with asyncio.timeout(DEADLINE):
            answer = await self._complete
        return answer.status, answer.body

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._answer.feed(data) and self._complete is not None and not self._complete.done():
            self._complete.set_result(self._answer)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._complete is not None and not self._complete.done():
            self._complete.set_exception(ConnectionResetError())
