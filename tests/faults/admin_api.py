"""The operator of these tests: the admin API as a client sees it, and whom it made.

Takes no short cut: every act is a request with a token of the authority itself.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from secrets import token_hex
from typing import Any, Final

import httpx

from tests.faults.live_authority import LiveAuthority

ENTER_DEADLINE: Final = 30.0
"""Seconds. Of several workers one may serve before it can put anything on record."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IssuedCredential:
    """One credential with its secret."""

    id: str
    client_id: str
    client_secret: str = field(repr=False)


class AdminAPI:
    """Acts of an operator. Each returns when it was answered, and fails unless it was done."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client

    @classmethod
    async def enter(cls, authority: LiveAuthority) -> "AdminAPI":
        """Exchange the credential of the first operator; try again while that is unavailable."""
        client = httpx.AsyncClient(base_url=authority.url, timeout=15)
        operator = authority.operator
        deadline = time.monotonic() + ENTER_DEADLINE
        while True:
            answer = await client.post(
                "/oauth/token",
                data={"grant_type": "client_credentials", "resource": f"{authority.issuer}/api/v1"},
                auth=operator,
            )
            if answer.status_code == 200:
                break
            assert time.monotonic() < deadline, answer.text
            await asyncio.sleep(0.05)
        client.headers["Authorization"] = f"Bearer {answer.json()['access_token']}"
        # With P1 switched off its record comes late.
        while (answer := await client.get("/api/v1/service-users/me")).status_code != 200:
            assert time.monotonic() < deadline, answer.text
            await asyncio.sleep(0.05)
        return cls(client)

    async def leave(self) -> None:
        await self._client.aclose()

    async def create_service_user(self, name: str, scopes: Sequence[str], **further: Any) -> str:
        """Return its id."""
        new = {"name": name, "source_system": "vkyc", "scopes": scopes, **further}
        made = await self._done("POST", "/service-users", json=new)
        return made["id"]

    async def create_credential(self, service_user_id: str) -> IssuedCredential:
        path = f"/service-users/{service_user_id}/credentials"
        made = await self._done("POST", path, json={"label": f"faults {token_hex(4)}"})
        return IssuedCredential(
            id=made["id"], client_id=made["client_id"], client_secret=made["client_secret"]
        )

    async def revoke(self, credential: IssuedCredential) -> None:
        path = f"/service-users/{credential.client_id}/credentials/{credential.id}/revoke"
        await self._done("POST", path)

    async def disable(self, service_user_id: str) -> None:
        await self._done("POST", f"/service-users/{service_user_id}/disable")

    async def enable(self, service_user_id: str) -> None:
        await self._done("POST", f"/service-users/{service_user_id}/enable")

    async def version(self, service_user_id: str) -> int:
        return (await self._done("GET", f"/service-users/{service_user_id}"))["version"]

    async def set_scopes(self, service_user_id: str, version: int, scopes: Sequence[str]) -> None:
        await self._done(
            "PATCH",
            f"/service-users/{service_user_id}",
            json={"scopes": scopes},
            headers={"If-Match": f'"{version}"'},
        )

    async def signing_keys(self) -> list[dict[str, Any]]:
        """Return the published keys, in the order of their publication."""
        return (await self._done("GET", "/signing-keys"))["signing_keys"]

    async def revoke_signing_key(self, kid: str) -> dict[str, Any]:
        """Return what the authority says that this means."""
        reason = {"reason": "rehearsal of a leak"}
        return await self._done("POST", f"/signing-keys/{kid}/revoke", json=reason)

    async def _done(self, method: str, path: str, **request: Any) -> dict[str, Any]:
        answer = await self._client.request(method, f"/api/v1{path}", **request)
        assert answer.is_success, f"{method} {path}: {answer.status_code} {answer.text}"
        body: dict[str, Any] = answer.json()
        return body
