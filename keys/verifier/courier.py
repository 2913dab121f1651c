"""What carries events from the requests of one process to the authority, in threads of its own.

It must not make a request wait or fail: what it cannot take it counts as lost, visibly.
"""

import logging
import math
import random
import secrets
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from .audit_events import MAX_BYTES, MAX_EVENTS, MAX_PAUSE, AuditEvents, AuthorityAway
from .delivery import Delivery, read
from .events import Event, encode, jwks_loaded
from .jwks_client import Clock, JWKSClient

if TYPE_CHECKING:
    from .spool import Spool

_FIRST_PAUSE = 0.5  # seconds, doubled with each failure in a row up to MAX_PAUSE
_TELL_AGAIN = 60.0
_DISK_PAUSE = 1.0
_NEVER = math.inf

_logger = logging.getLogger(__name__)


class Courier:
    """A bounded queue, the thread that sends, and with a spool the thread that writes to disk.

    The sender does one thing after another: it keeps the keys fresh, tells which are loaded, and
    sends batches, oldest first. While the authority is away it pauses ever longer, and the
    events stay where they are: on disk, or in memory if there is no spool or it cannot be used.
    """

    def __init__(
        self,
        authority: AuditEvents,
        jwks: JWKSClient | None,
        open_spool: "Callable[[], Spool] | None",
        *,
        queue_size: int,
        interval: float,
        every: float,
        clock: Clock,
    ) -> None:
        self._authority = authority
        self._jwks = jwks
        self._open_spool = open_spool
        self._queue_size = queue_size
        self._interval = interval
        self._every = every
        self._clock = clock
        self._instance = secrets.token_urlsafe(16)

        # Guarded by the condition, which is notified whenever a thread might have more to do.
        self._changed = threading.Condition()
        self._queue: deque[bytes] = deque()
        self._lost = self._lost_told = 0
        self._spooling = open_spool is not None
        self._keys_loaded = False
        self._closing = self._last_call = False
        self.started = False

        self._spooler = threading.Thread(target=self._write_on, name="privyseal-spool", daemon=True)
        self._sender = threading.Thread(target=self._send_on, name="privyseal-report", daemon=True)
        self._spool: Spool | None = None
        self._delivery: Delivery | None = None
        self._delivery_paths: list[Path] = []
        self._report: Event | None = None
        self._reported: frozenset[str] = frozenset()
        self._counts: Counter[str] = Counter()
        self._failures = 0
        self._reason: str = ""
        self._last_success = -_NEVER

        # Times of the monotonic clock at which something is due.
        self._collect_at = self._retry_at = self._tell_failure_at = self._tell_losses_at = 0.0
        self._refresh_at = 0.0 if jwks else _NEVER
        self._report_at = _NEVER

    def start(self) -> None:
        """Start the threads, once."""
        with self._changed:
            if self.started or self._closing:
                return
            try:
                self._sender.start()
                if self._open_spool is not None:
                    self._spooler.start()
            except RuntimeError:  # Out of threads, or the interpreter is shutting down.
                _logger.exception("nothing will be reported")
            self.started = True

    def watch(self, jwks: JWKSClient) -> None:
        """Keep these keys fresh from now on, and report which they are."""
        with self._changed:
            self._jwks, self._refresh_at = jwks, 0.0
            self._changed.notify_all()

    def put(self, event: Event) -> None:
        """Take an event, or count it as lost; never wait."""
        line = encode(event)
        with self._changed:
            if self._closing or len(self._queue) >= self._queue_size:
                self._lost += 1
                if self._lost == self._lost_told + 1:
                    self._changed.notify_all()
                return
            self._queue.append(line)
            if len(self._queue) in (1, MAX_EVENTS):
                self._changed.notify_all()

    def keys_loaded(self) -> None:
        """Hear that a set of keys has been loaded."""
        with self._changed:
            self._keys_loaded = True
            self._changed.notify_all()

    def close(self, timeout: float) -> None:
        """Take nothing more, send what can be sent within `timeout` seconds, and stop."""
        deadline = time.monotonic() + timeout
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        _join(self._spooler, deadline)
        with self._changed:
            self._last_call = True
            self._changed.notify_all()
        _join(self._sender, deadline)
        with self._changed:
            self._lost += self._in_memory()
            self._queue.clear()
        self._tell_losses()
        if self._spool is not None:
            self._spool.close()

    def stats(self) -> Mapping[str, float]:
        """Return the figures that `Reporter.stats` promises."""
        with self._changed:
            queued, lost = self._in_memory(), self._lost
        return {
            "events_queued": queued,
            "events_spooled": self._spool.events if self._spool else 0,
            "events_sent": self._counts["sent"],
            "events_known": self._counts["known"],
            "events_refused": self._counts["refused"],
            "events_lost": lost,
            "report_retries": self._counts["retries"],
            "report_age_seconds": time.monotonic() - self._last_success,
        }

    def _in_memory(self) -> int:
        delivery = self._delivery
        unspooled = delivery.left if delivery and not self._delivery_paths else 0
        return len(self._queue) + unspooled

    # The thread that writes

    def _write_on(self) -> None:
        self._write([])  # Before the first event: others' batches are adopted by that.
        while lines := self._collect():
            if not self._write(lines):
                with self._changed:
                    self._queue.extendleft(reversed(lines))
                    self._changed.notify_all()
                    if self._changed.wait_for(lambda: self._closing, _DISK_PAUSE):
                        return

    def _collect(self) -> list[bytes]:
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closing)
            self._changed.wait_for(
                lambda: len(self._queue) >= MAX_EVENTS or self._closing,
                self._collect_at - time.monotonic(),
            )
            return self._take()

    def _take(self) -> list[bytes]:
        lines: list[bytes] = []
        size = 0
        while self._queue and len(lines) < MAX_EVENTS:
            size += len(self._queue[0]) + 1
            if size > MAX_BYTES:
                break
            lines.append(self._queue.popleft())
        self._collect_at = time.monotonic() + self._interval
        return lines

    def _write(self, lines: list[bytes]) -> bool:
        assert self._open_spool is not None
        try:
            if self._spool is None:
                self._spool = self._open_spool()
            if lines:
                self._spool.write(lines)
        except Exception as error:
            # Whatever is wrong with the disk, events can still be sent.
            if self._spooling:
                _logger.warning("events stay in memory: %s: %s", type(error).__name__, error)
            written = False
        else:
            written = True
        with self._changed:
            self._spooling = written
            self._changed.notify_all()
        return written

    # The thread that sends

    def _send_on(self) -> None:
        while self._wait_until_due():
            self._keep_keys_fresh()
            self._note_keys()
            self._tell_losses()
            due = self._last_call or time.monotonic() >= self._retry_at
            if due and not self._send() and self._last_call:
                return

    def _wait_until_due(self) -> bool:
        with self._changed:
            while (pause := self._due_at() - time.monotonic()) > 0:
                if self._last_call:
                    return False
                # wait() refuses infinity.
                self._changed.wait(min(pause, 3600.0))
            return True

    def _due_at(self) -> float:
        due = [_NEVER if self._last_call else min(self._refresh_at, self._report_at)]
        if self._keys_loaded:
            due.append(0.0)
        if self._lost > self._lost_told:
            due.append(self._tell_losses_at)
        if self._delivery or self._report or (self._spool and self._spool.events):
            due.append(0.0 if self._last_call else self._retry_at)
        elif self._queue and not self._spooling:
            due.append(0.0 if self._last_call else max(self._retry_at, self._batch_at()))
        return min(due)

    def _batch_at(self) -> float:
        return 0.0 if len(self._queue) >= MAX_EVENTS or self._last_call else self._collect_at

    def _keep_keys_fresh(self) -> None:
        if self._jwks is None or self._last_call or time.monotonic() < self._refresh_at:
            return
        # An idle service, too, has to hold the next key before it signs.
        pause = self._every if self._jwks.refresh() else _FIRST_PAUSE
        self._refresh_at = time.monotonic() + pause

    def _note_keys(self) -> None:
        self._keys_loaded = False
        kids = self._jwks.kids if self._jwks else frozenset[str]()
        if time.monotonic() < self._report_at and kids == self._reported:
            return
        self._report_at = time.monotonic() + self._every
        if kids:
            # It takes the place of an older one that could not be sent: only the truth of now
            # is worth telling.
            self._report = jwks_loaded(self._instance, kids, now=self._clock())
            self._reported = kids

    def _send(self) -> bool:
        """Send what there is, in turn; return whether the authority settled it."""
        try:
            if self._report is not None:
                self._settle(Delivery([self._report]))
                self._report = None
            if self._delivery is None:
                self._delivery = self._next_delivery()
            if self._delivery is not None:
                self._settle(self._delivery)
                if self._spool is not None:
                    self._spool.remove(self._delivery_paths)
                self._delivery = None
        except AuthorityAway as error:
            self._pause(str(error), error.retry_after)
            return False
        except Exception as error:
            # Whatever went wrong, what is not settled stays and is tried again.
            self._pause(f"{type(error).__name__} while reporting", MAX_PAUSE)
            return False
        return True

    def _next_delivery(self) -> Delivery | None:
        if self._spool is not None and self._spool.events:
            self._delivery_paths, lines = self._spool.oldest(MAX_EVENTS, MAX_BYTES)
        else:
            with self._changed:
                if self._spooling or not self._queue or time.monotonic() < self._batch_at():
                    return None
                self._delivery_paths, lines = [], self._take()
        events = read(lines)
        with self._changed:
            self._lost += len(lines) - len(events)
        return Delivery(events)

    def _settle(self, delivery: Delivery) -> None:
        while delivery.left:
            self._counts.update(delivery.advance(self._authority))
            self._last_success = time.monotonic()
            if self._failures:
                _logger.warning("the authority takes reports again")
            self._failures = 0
            self._retry_at = self._tell_failure_at = 0.0

    def _pause(self, reason: str, retry_after: float) -> None:
        pause = min(_FIRST_PAUSE * 2**self._failures, MAX_PAUSE)
        pause *= random.uniform(0.5, 1.0)  # noqa: S311
        now = time.monotonic()
        self._retry_at = now + max(pause, retry_after)
        self._failures = min(self._failures + 1, 16)
        self._counts["retries"] += 1
        if now >= self._tell_failure_at or reason != self._reason:
            _logger.warning("reports wait: %s", reason)
            self._tell_failure_at, self._reason = now + _TELL_AGAIN, reason

    def _tell_losses(self) -> None:
        with self._changed:
            now, lost = time.monotonic(), self._lost - self._lost_told
            if not lost or (now < self._tell_losses_at and not self._closing):
                return
            self._lost_told, self._tell_losses_at = self._lost, now + _TELL_AGAIN
        _logger.error("%d events were lost: they will not be in the audit log", lost)


def _join(thread: threading.Thread, deadline: float) -> None:
    if thread.is_alive():
        thread.join(max(deadline - time.monotonic(), 0.0))
