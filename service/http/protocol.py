"""HTTP/1.1 with bounds that uvicorn does not have: on the head of a request and its time.

Reads no request: it only ends a connection that sends a head too large or too slowly.
"""

import asyncio
from typing import Any, Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD: Final = 32_768
"""Bytes of request line and headers, with whatever was pipelined before them."""
HEAD_DEADLINE: Final = 10.0
"""Seconds from the first byte of a request to the end of its head."""

_TOO_LARGE: Final = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\n"
    b"connection: close\r\ncontent-length: 0\r\n\r\n"
)


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's protocol, with a bounded head (RFC 6585 §5) and a deadline for it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_bytes = 0
        self._in_body = False
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Begin to wait for the first head: a silent connection is ended, too."""
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no longer."""
        self._end_wait()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Pass the data on, in pieces that the bound can be held against."""
        view = memoryview(data)
        while view and not self.transport.is_closing():
            piece, view = view[:MAX_HEAD], view[MAX_HEAD:]
            if not self._in_body:
                self._head_bytes += len(piece)
                if self._head_bytes > MAX_HEAD:
                    self._refuse()
                    return
                if self._head_timer is None:
                    self._await_head()
            super().data_received(bytes(piece))

    def on_headers_complete(self) -> None:
        """The head is there: what follows is the body, which the routes bound themselves."""
        self._in_body = True
        self._end_wait()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The next request begins."""
        self._in_body = False
        self._head_bytes = 0
        super().on_message_complete()

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(HEAD_DEADLINE, self.transport.close)

    def _end_wait(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _refuse(self) -> None:
        self.transport.write(_TOO_LARGE)
        self.transport.close()
