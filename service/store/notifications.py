"""Hears of changes that other processes made (LISTEN), so that memory is dropped early.

Nothing depends on hearing: whatever is decided on old memory is refused at its commit.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final

import structlog

from keys.secret import Secret
from service.authority.errors import StoreUnavailable
from service.store.database import connect, loss_as_unavailable

SERVICE_USERS: Final = "privyseal_service_users"
SIGNING_KEYS: Final = "privyseal_signing_keys"

_PING: Final = 5.0
_PING_DEADLINE: Final = 2.0
_RECONNECT: Final = 0.5

log = structlog.stdlib.get_logger()


class ChangeListener:
    """Calls back for each change, and with everything dropped after each new connection."""

    def __init__(
        self,
        dsn: Secret,
        *,
        on_connect: Callable[[], Awaitable[None]],
        on_service_user: Callable[[str], None],
        on_signing_keys: Callable[[], Awaitable[None]],
    ) -> None:
        self._dsn = dsn
        self._on_connect = on_connect
        self._on_service_user = on_service_user
        self._on_signing_keys = on_signing_keys
        self._lost = False

    async def run(self) -> None:
        """Listen until cancelled; connect again by itself."""
        while True:
            try:
                await self._listen()
            except StoreUnavailable as error:
                if not self._lost:
                    log.warning("listener_disconnected", error=str(error))
                self._lost = True
            await asyncio.sleep(_RECONNECT)

    async def _listen(self) -> None:
        connection = await connect(self._dsn, application_name="privyseal listener")
        rings_changed = asyncio.Event()

        def service_user_changed(_: Any, __: int, ___: str, payload: object) -> None:
            self._on_service_user(str(payload))

        def signing_keys_changed(*_: Any) -> None:
            rings_changed.set()

        try:
            with loss_as_unavailable():
                # Wakes the loop below, which then ends.
                connection.add_termination_listener(signing_keys_changed)
                await connection.add_listener(SERVICE_USERS, service_user_changed)
                await connection.add_listener(SIGNING_KEYS, signing_keys_changed)
                await self._on_connect()
                if self._lost:
                    log.info("listener_connected_again")
                self._lost = False
                while not connection.is_closed():
                    try:
                        async with asyncio.timeout(_PING):
                            await rings_changed.wait()
                    except TimeoutError:
                        # A connection that died without a word says nothing for ever.
                        await connection.fetchval("SELECT 1", timeout=_PING_DEADLINE)
                    else:
                        rings_changed.clear()
                        await self._on_signing_keys()
        finally:
            connection.terminate()
