"""How many forged tokens were noticed lately, for every operator to see.

Proves nothing: `attribution.py` does.
"""

import asyncio
from typing import Final, Protocol

import structlog

from service.authority.errors import StoreUnavailable
from service.authority.model import SHOWN_DAYS, Clock

GOOD_FOR: Final = 2.0
"""Seconds for which a count is not asked for again."""
DEADLINE: Final = 1.0

log = structlog.stdlib.get_logger()


class ForgedTokenRecords(Protocol):
    """Counts records."""

    async def count_forged(self, days: int) -> int:
        """Return how many `token.forged` were recorded in so many days; raise StoreUnavailable."""
        ...


class ForgedTokens:
    """The count of the last SHOWN_DAYS days."""

    def __init__(self, *, records: ForgedTokenRecords, clock: Clock) -> None:
        self._records = records
        self._clock = clock
        self._count = 0
        self._counted_at: float | None = None

    async def count(self) -> int:
        """Return the count of at most 2 s ago, or the last one known while the next is counted."""
        now = self._clock()
        # A clock that was set back must not keep an old count.
        if self._counted_at is None or not 0 <= now - self._counted_at < GOOD_FOR:
            self._counted_at = now  # first: whoever asks meanwhile need not count too
            try:
                async with asyncio.timeout(DEADLINE):
                    self._count = await self._records.count_forged(SHOWN_DAYS)
            except (StoreUnavailable, TimeoutError) as error:
                log.warning("forged_tokens_not_counted", error=type(error).__name__)
        return self._count
