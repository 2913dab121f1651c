"""A browser without a screen: keeps the console's cookie, and sends forms as its pages make them.

Runs no script and follows no redirect.
"""

import html
import re
from http.cookies import SimpleCookie
from typing import Any

import httpx

from service.console.page import COOKIE

CSRF = re.compile(r'name="csrf" value="([^"]+)"')


class ConsoleClient:
    """One person at the console; `cookie` is what the browser would send."""

    def __init__(self, client: httpx.AsyncClient, issuer: str) -> None:
        self._client = client
        self._issuer = issuer
        self.cookie: str | None = None
        self.csrf = ""

    async def sign_in(self, credential: tuple[str, str], **fields: str) -> httpx.Response:
        """Sign in, and learn the CSRF token of the session from its first page."""
        form = {"client_id": credential[0], "client_secret": credential[1], **fields}
        answer = await self.post("/sign-in", form)
        if self.cookie:
            await self.get("/")
        return answer

    async def get(self, path: str, **headers: str) -> httpx.Response:
        """Open a page; `path` begins after `/console`."""
        answer = await self._client.get(f"/console{path}", headers=self._headers(headers))
        return self._kept(answer)

    async def post(
        self, path: str, fields: dict[str, Any] | None = None, **headers: str
    ) -> httpx.Response:
        """Send a form of one of the console's own pages."""
        answer = await self._client.post(
            f"/console{path}",
            data={"csrf": self.csrf, **(fields or {})},
            headers=self._headers({"Origin": self._issuer, **headers}),
        )
        return self._kept(answer)

    def _headers(self, further: dict[str, str]) -> dict[str, str]:
        cookie = {"Cookie": f"{COOKIE}={self.cookie}"} if self.cookie else {}
        return {**cookie, **{name.replace("_", "-"): value for name, value in further.items()}}

    def _kept(self, answer: httpx.Response) -> httpx.Response:
        for header in answer.headers.get_list("set-cookie"):
            if (morsel := SimpleCookie(header).get(COOKIE)) is not None:
                self.cookie = morsel.value or None
        if found := CSRF.search(answer.text):
            self.csrf = html.unescape(found[1])
        return answer
