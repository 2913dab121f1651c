"""What happened to the signing keys, as the database has it: their table, and the audit log.

Reads with the service's own rights; judges by the database's clock alone.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

import asyncpg
import msgspec
from msgspec import Struct

from keys.keyring import KeyState
from keys.secret import Secret

SELECT_KEYS = """
SELECT kid, state, extract(epoch FROM published_at)::float8 AS published_at,
       extract(epoch FROM activated_at)::float8 AS activated_at,
       extract(epoch FROM publish_until)::float8 AS publish_until,
       extract(epoch FROM ended_at)::float8 AS ended_at
  FROM signing_keys ORDER BY published_at, kid
"""

SELECT_STEPS = """
SELECT kid, action FROM audit_records
 WHERE action IN ('signing_key.prepare', 'signing_key.activate', 'signing_key.retire')
   AND outcome = 'success'
 ORDER BY kid, action
"""

SELECT_ACTIVATIONS = """
SELECT kid, details FROM audit_records
 WHERE action = 'signing_key.activate' AND outcome = 'success'
"""

COUNT_EARLY_TOKENS = """
SELECT count(*) FROM audit_records r JOIN signing_keys k USING (kid)
 WHERE r.action = 'token.issue' AND r.outcome = 'success' AND r.kid <> ALL ($2::text[])
   AND extract(epoch FROM r.recorded_at - k.published_at) < $1
"""

STEPS: Final[Mapping[KeyState, Sequence[str]]] = {
    KeyState.PENDING: ("signing_key.prepare",),
    KeyState.ACTIVE: ("signing_key.activate", "signing_key.prepare"),
    KeyState.RETIRING: ("signing_key.activate", "signing_key.prepare"),
    KeyState.RETIRED: ("signing_key.activate", "signing_key.prepare", "signing_key.retire"),
}
"""The steps that have to be on record, once each, for a key that came so far by itself."""


class KeyLife(Struct, frozen=True, kw_only=True):
    """One key, with the times that the database stamped on it: seconds since the epoch."""

    kid: str
    state: KeyState
    published_at: float
    activated_at: float | None
    publish_until: float | None
    ended_at: float | None

    @property
    def lead(self) -> float:
        """How long it had been published when it began to sign."""
        assert self.activated_at is not None
        return self.activated_at - self.published_at


class KeyHistory:
    """The keys of one database, in the order of their publication. The first signs at once: nobody
    had a token then."""

    def __init__(self, connection: "asyncpg.Connection[asyncpg.Record]") -> None:
        self._connection = connection

    @classmethod
    async def open(cls, dsn: Secret) -> "KeyHistory":
        return cls(await asyncpg.connect(dsn.reveal(), timeout=10, command_timeout=30))

    async def close(self) -> None:
        await self._connection.close(timeout=5)

    async def keys(self) -> list[KeyLife]:
        """Return every key that there ever was."""
        rows = await self._connection.fetch(SELECT_KEYS)
        return [msgspec.convert(dict(row), KeyLife) for row in rows]

    async def rotations(self, *, but: Collection[str] = ()) -> list[KeyLife]:
        """Return the keys that took the place of another one, `but` those of emergencies."""
        keys = await self.keys()
        return [key for key in keys[1:] if key.activated_at is not None and key.kid not in but]

    async def early_tokens(self, lead: float, *, but: Collection[str] = ()) -> int:
        """Count the tokens on record that a key signed before it was published for `lead`."""
        first = [key.kid for key in (await self.keys())[:1]]
        return await self._connection.fetchval(COUNT_EARLY_TOKENS, lead, [*first, *but])

    async def activations(self) -> dict[str, dict[str, Any]]:
        """Return what the audit log says of each activation, by kid."""
        rows = await self._connection.fetch(SELECT_ACTIVATIONS)
        return {row["kid"]: msgspec.json.decode(row["details"]) for row in rows}

    async def off_the_record(self) -> dict[str, list[str]]:
        """Return the keys whose steps on record are not those that led to their state, with the
        steps; also whatever is on record and in no table."""
        async with self._connection.transaction(isolation="repeatable_read", readonly=True):
            keys = await self.keys()
            rows = await self._connection.fetch(SELECT_STEPS)
        steps: dict[str, list[str]] = {key.kid: [] for key in keys}
        for row in rows:
            steps.setdefault(row["kid"], []).append(row["action"])
        led_to = {key.kid: list(STEPS[key.state]) for key in keys}
        return {kid: taken for kid, taken in steps.items() if taken != led_to.get(kid)}
