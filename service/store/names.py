"""Service users by name, for whoever knows no id; reads only."""

from collections.abc import Sequence
from typing import Final

from service.store.database import Database

SELECT_ID: Final = "SELECT id FROM service_users WHERE name = $1"

# No name holds a tilde, and everything that one may hold is before it.
SELECT_NAMES: Final = """
SELECT name FROM service_users
 WHERE name COLLATE "C" >= $1 AND name COLLATE "C" < $1 || '~'
 ORDER BY name COLLATE "C" LIMIT $2
"""


class ServiceUserNames:
    """Implements `authority.by_hand.Names`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def id_of(self, name: str) -> str | None:
        """Return the id of who has this name now."""
        async with self._database.connection() as connection:
            return await connection.fetchval(SELECT_ID, name)

    async def names(self, beginning: str, limit: int) -> Sequence[str]:
        """Return the first names that begin like this, in their order."""
        async with self._database.connection() as connection:
            return [row["name"] for row in await connection.fetch(SELECT_NAMES, beginning, limit)]
