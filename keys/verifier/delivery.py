"""One batch on its way to the authority, until each of its events is settled.

It must not wait: what cannot be settled now stays, for whoever holds the batch to try again.
"""

import logging
from collections import Counter
from collections.abc import Sequence

from .audit_events import AuditEvents, BatchRefused
from .events import Event
from .strict import json_object

_logger = logging.getLogger(__name__)


def read(lines: Sequence[bytes]) -> list[Event]:
    """Return the events of these lines, leaving out what a crash or a bad disk made unreadable."""
    events: list[Event] = []
    for line in lines:
        try:
            event = json_object(line)
        except ValueError:
            continue
        if isinstance(event.get("id"), str):
            events.append(event)
    return events


class Delivery:
    """Events that are sent until each was recorded, was known, or is refused for good.

    A signature is held back until it is wanted. A batch that is refused as a whole is halved until
    the event that is to blame stands alone, and only that one is given up.
    """

    def __init__(self, events: Sequence[Event]) -> None:
        # Without their signatures, which go along only when they are wanted.
        bare = [{n: v for n, v in event.items() if n != "signature"} for event in events]
        self._signatures = {
            event["id"]: event["signature"] for event in events if "signature" in event
        }
        self._parts = [bare] if bare else []

    @property
    def left(self) -> int:
        """How many events are not settled."""
        return sum(len(part) for part in self._parts)

    def advance(self, authority: AuditEvents) -> Counter[str]:
        """Send one part; return how many events are `sent`, `known` and `refused` by that.

        Raise AuthorityAway, with all that is not settled still at hand.
        """
        part = self._parts[0]
        try:
            results = authority.report(part)
        except BatchRefused as error:
            if len(part) > 1:
                half = len(part) // 2
                self._parts[:1] = [part[:half], part[half:]]
                return Counter()
            self._parts.pop(0)
            _tell_refused([f"{part[0]['id']}: {error}"])
            return Counter(refused=1)
        self._parts.pop(0)
        settled: Counter[str] = Counter()
        wanted: list[Event] = []
        refused: list[str] = []
        for event, result in zip(part, results, strict=True):
            if result.status == "signature_wanted" and result.id in self._signatures:
                wanted.append({**event, "signature": self._signatures.pop(result.id)})
            elif result.status in ("recorded", "known"):
                settled["sent" if result.status == "recorded" else "known"] += 1
            else:
                settled["refused"] += 1
                refused.append(f"{result.id}: {result.detail or result.status}")
        _tell_refused(refused)
        if wanted:
            self._parts.insert(0, wanted)
        return settled


def _tell_refused(refused: Sequence[str]) -> None:
    if refused:
        _logger.warning("%d events were refused, the first is %s", len(refused), refused[0])
