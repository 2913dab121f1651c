"""What a service tells the authority: which keys it has loaded, and what was done with tokens.

It must not slow or fail a request, nor show its credential to anyone but the authority.
"""

import os
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from .audit_events import MAX_EVENTS, AuditEvents
from .courier import Courier
from .events import Outcome, api_call
from .fetch import checked_issuer
from .fork import in_forked_child
from .jwks_client import Clock, JWKSClient
from .jwt import SignedClaims

if TYPE_CHECKING:
    from .spool import Spool

SPOOL_BYTES = 64 * 1024 * 1024


class Reporter:
    """Reports to `issuer` with the credential of a service user that has `audit:report`.

    Hand it to a `Verifier`, which starts it. It then tells which keys are loaded, when they change
    and `every` so many seconds, and sends the calls that it hears of, in batches `interval`
    seconds apart, again and again until the authority has settled each: every event has an id of
    its own, so that none is recorded twice.

    Events wait in a queue of `queue_size`. With a `spool`, a directory that the processes of one
    service share, they are moved to disk before they are sent, up to `spool_bytes` a process, and
    outlive the process; what a kill can lose is what came since the last `interval`. Without one
    they wait in memory. What finds no room is lost, counted and logged.

    A forked child begins anew, with a queue and an instance of its own, at its first event,
    verified token or call of `start`.
    """

    def __init__(
        self,
        issuer: str,
        client_id: str,
        client_secret: str,
        *,
        spool: Path | None = None,
        spool_bytes: int = SPOOL_BYTES,
        queue_size: int = 10_000,
        interval: float = 1.0,
        every: float = 3600.0,
        timeout: float = 10.0,
        clock: Clock = time.time,
    ) -> None:
        self.issuer = checked_issuer(issuer)
        if not client_id or not client_secret:
            raise ValueError("expected client_id and client_secret")
        if queue_size < MAX_EVENTS:
            raise ValueError(f"queue_size: expected {MAX_EVENTS} or more, found {queue_size}")
        if not 0 < interval <= 60:
            raise ValueError(f"interval: expected up to 60 seconds, found {interval}")
        if not 0 < every <= 3600:
            raise ValueError(f"every: expected up to 3600 seconds, found {every}")
        if not 0 < timeout <= 60:
            raise ValueError(f"timeout: expected up to 60 seconds, found {timeout}")
        self._credential = (client_id, client_secret)
        self._open_spool = spool and _spool_opener(spool, spool_bytes, clock)
        self._queue_size = queue_size
        self._interval = interval
        self._every = every
        self._timeout = timeout
        self._clock = clock
        self._jwks: JWKSClient | None = None
        self._courier = self._new_courier()
        in_forked_child(self._begin_anew)

    def watch(self, jwks: JWKSClient) -> None:
        """Report what `jwks` has loaded, keep it fresh, and start. For one client only."""
        if self._jwks is not None:
            raise ValueError("reporter: expected one for each verifier, found one in use")
        self._jwks = jwks
        self._courier.watch(jwks)
        jwks.when_loaded(self._keys_loaded)
        self.start()

    def start(self) -> None:
        """See that it is running in this process; once closed, it stays so."""
        if not self._courier.started:
            self._courier.start()

    def api_call(
        self,
        caller: SignedClaims,
        signature: str,
        *,
        action: str = "api.call",
        resource: str,
        outcome: Outcome,
        request_id: str,
        client_address: str = "",
        user_agent: str = "",
        department: str = "",
    ) -> None:
        """Report a call that `caller` made, with a token whose third segment is `signature`.

        `BearerMiddleware` does this by itself. Never wait. Raise ValueError for an action that is
        not two lower-case words with a dot between.
        """
        self.start()
        self._courier.put(
            api_call(
                caller,
                signature,
                action=action,
                resource=resource,
                outcome=outcome,
                request_id=request_id,
                client_address=client_address,
                user_agent=user_agent,
                department=department,
                now=self._clock(),
            )
        )

    def stats(self) -> Mapping[str, float]:
        """Return the figures to watch, counted since the start of this process.

        Events that are now `events_queued` in memory or `events_spooled` on disk; `events_sent`
        and recorded; `events_known`, recorded before their answer was lost; `events_refused` for
        good; `events_lost`. `report_retries`, and `report_age_seconds` since the authority took
        something last, infinite before.
        """
        return self._courier.stats()

    def close(self, timeout: float = 5.0) -> None:
        """Send what can be sent within `timeout` seconds, and stop for good in this process.

        What is in the spool then waits there for the next process; what is only in memory is lost.
        """
        self._courier.close(timeout)

    def _keys_loaded(self) -> None:
        self._courier.keys_loaded()

    def _begin_anew(self) -> None:
        self._courier = self._new_courier()

    def _new_courier(self) -> Courier:
        return Courier(
            AuditEvents(self.issuer, *self._credential, timeout=self._timeout),
            self._jwks,
            self._open_spool,
            queue_size=self._queue_size,
            interval=self._interval,
            every=self._every,
            clock=self._clock,
        )


def _spool_opener(directory: Path, max_bytes: int, clock: Clock) -> "Callable[[], Spool]":
    # It needs fcntl, which Windows lacks. Not later: a fork in the middle of an import by a
    # thread would leave the child with half a module.
    from .spool import Spool

    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"spool: {error}") from None
    if not os.access(directory, os.W_OK | os.X_OK):
        raise ValueError(f"spool: expected a directory to write to, found {directory}")
    return partial(Spool, directory, clock=clock, max_bytes=max_bytes)
