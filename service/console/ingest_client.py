"""One upload to the ingest service of this installation, to see whether it works.

Goes nowhere but to the configured address, follows no redirect, and never waits long.
"""

import asyncio
import json
import ssl
from functools import cached_property
from http import HTTPStatus
from typing import Final

import httpx
from msgspec import Struct

from keys.secret import Secret
from service.console.page import visible
from service.console.samples import DEPARTMENT_HEADER, Upload

DEADLINE: Final = 15.0
"""Seconds for everything."""
CONNECT_DEADLINE: Final = 5.0
MAX_ANSWER: Final = 65_536
"""Bytes of an answer that are read."""
MAX_TRIES: Final = 8
"""At a time and process: each holds a connection for as long as the service takes."""
# The smallest that a reader opens: one page with nothing on it.
DOCUMENT: Final = b"""%PDF-1.4
1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj
2 0 obj<</Type/Pages/Count 1/Kids[3 0 R]>>endobj
3 0 obj<</Type/Page/Parent 2 0 R/MediaBox[0 0 300 300]>>endobj
trailer<</Root 1 0 R>>
%%EOF
"""


class Unreachable(Exception):
    """The ingest service gave no answer; the text says what to look at."""


class Answer(Struct, frozen=True, kw_only=True):
    """What the ingest service said: JSON is laid out, anything else as it came."""

    status: int
    body: str
    cut: bool

    @property
    def phrase(self) -> str:
        """The status in words."""
        known = self.status in HTTPStatus.__members__.values()
        return HTTPStatus(self.status).phrase if known else ""

    @property
    def is_success(self) -> bool:
        """Whether the document was taken."""
        return 200 <= self.status < 300

    @property
    def is_redirect(self) -> bool:
        """Whether it sends its callers elsewhere."""
        return 300 <= self.status < 400


class IngestClient:
    """Sends a document as an integrator would."""

    def __init__(self, url: str | None) -> None:
        self._url = url
        self._under_way = 0

    async def upload(self, upload: Upload, token: Secret) -> Answer:
        """Return what the service answered; raise Unreachable when there is none in time."""
        if self._url is None:
            raise Unreachable("No address of an ingest service is set.")
        if self._under_way >= MAX_TRIES:
            raise Unreachable(f"{MAX_TRIES} tries are under way here. Try again after one of them.")
        self._under_way += 1
        try:
            return await self._sent(self._url, upload, token)
        finally:
            self._under_way -= 1

    async def _sent(self, url: str, upload: Upload, token: Secret) -> Answer:
        try:
            async with asyncio.timeout(DEADLINE), self._client() as client:
                request = client.build_request(
                    "POST",
                    url,
                    headers={
                        "Authorization": f"Bearer {token.reveal()}",
                        DEPARTMENT_HEADER: upload.department,
                    },
                    files={"file": ("document.pdf", DOCUMENT, "application/pdf")},
                    data={"metadata": upload.metadata},
                )
                answer = await client.send(request, stream=True)
                try:
                    return _read(answer.status_code, await _at_most(MAX_ANSWER + 1, answer))
                finally:
                    await answer.aclose()
        except httpx.ConnectError as error:
            raise Unreachable(
                f"Nothing could be reached at {url} ({_cause(error)}). Does the ingest "
                "service run, and is the address right?"
            ) from None
        except (TimeoutError, httpx.TimeoutException):
            raise Unreachable(
                f"{url} gave no answer within {DEADLINE:.0f} s. Look at the ingest service."
            ) from None
        except httpx.HTTPError as error:
            raise Unreachable(
                f"The connection to {url} broke ({type(error).__name__}). Look at the "
                "ingest service."
            ) from None

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        # Takes 20 ms, once. The machine's authorities, or SSL_CERT_FILE.
        return ssl.create_default_context()

    def _client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            follow_redirects=False,
            timeout=httpx.Timeout(DEADLINE, connect=CONNECT_DEADLINE),
            # Unpacked by nobody here, so that it cannot grow.
            headers={"Accept-Encoding": "identity"},
            # The token goes to that address alone: no proxy of the environment stands in between.
            trust_env=False,
            verify=self._tls,
        )


async def _at_most(size: int, answer: httpx.Response) -> bytes:
    received = b""
    async for piece in answer.aiter_raw():
        received += piece
        if len(received) >= size:
            break
    return received[:size]


def _read(status: int, content: bytes) -> Answer:
    cut = len(content) > MAX_ANSWER
    text = content[:MAX_ANSWER].decode("utf-8", "replace")
    try:
        body = json.dumps(json.loads(text), indent=2, ensure_ascii=False)
    except (ValueError, RecursionError):
        body = text
    return Answer(status=status, body=visible(body, kept="\n\t"), cut=cut)


def _cause(error: BaseException) -> str:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"its certificate is not trusted here: {cause.verify_message}"
        cause = cause.__cause__ or cause.__context__
    return "no connection"
