"""What verifiers say of themselves: which of them have loaded the next signing key.

Decides nothing: `key_rotation.py` waits for who is missing, within its bounds.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Protocol

from msgspec import Struct


class VerifierInstance(Struct, frozen=True, kw_only=True):
    """One running verifier, by its newest report; `instance` is a name it drew at its start.

    `missing_since` is its first report without the key in question since that was published: None
    if it has the key, or has not reported since.
    """

    service_user: str
    instance: str
    last_heard_at: datetime
    has_loaded: bool
    missing_since: datetime | None


class Evidence(Protocol):
    """Reads the reports of verifiers."""

    async def instances(self, kid: str) -> Sequence[VerifierInstance]:
        """Return the verifiers heard from within the last two hours, and whether they have `kid`.

        At most 1,000, those that lack it first. What was drawn up before, and arrives only now, is
        no sign of life. Raise StoreUnavailable.
        """
        ...
