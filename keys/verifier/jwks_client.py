"""The published keys of one issuer, kept at hand and kept fresh.

It must not trust a key that its issuer has not published, nor forget keys because a fetch failed.
"""

import asyncio
import concurrent.futures
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeAlias

from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

from .fetch import FetchFailed, checked_url, get
from .fork import in_forked_child
from .jwk import InvalidJWKS, parse_jwks
from .strict import json_object

Clock: TypeAlias = Callable[[], float]
Keys: TypeAlias = Mapping[str, RSAPublicKey]

FETCH_TIMEOUT = 5.0
MAX_STALE = 7200.0

_FETCH_INTERVAL = 1.0
_MAX_BACKOFF = 10.0
_REFRESH_AT = 0.8  # of max-age
# A fetch that has not ended by then never will: the resolver hangs. Another may start, and the
# answer of the lost one counts no more.
_LOST_AFTER = 60.0

_logger = logging.getLogger(__name__)


class KeysUnavailable(Exception):
    """No token can be checked now, whoever signed it; try again in `retry_after` seconds."""

    def __init__(self, reason: str, *, retry_after: float) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


@dataclass(frozen=True, slots=True, kw_only=True)
class _Held:
    """A set of keys, and until when it is good for what, in seconds of the client's clock."""

    keys: Keys
    fetched_at: float
    refresh_at: float
    fresh_until: float
    usable_until: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fetch:
    done: concurrent.futures.Future[None]
    started_at: float


class JWKSClient:
    """A cached JWK Set that many threads and event loops may ask at once.

    - A set is fresh for the `max-age` it came with (10 s to 24 h, 300 s if it names none). In the
      last fifth of that it is fetched anew in the background, whenever somebody asks.
    - A fetch that fails leaves the set in place. While fetches fail it is used without waiting,
      for at most `max_stale` seconds beyond its freshness; then every look-up is refused. Failed
      fetches are repeated when somebody asks, after a pause of 1 s that doubles up to 10 s.
    - A `kid` that is not in the set causes at most one fetch a second, whoever asks.
    - At most one fetch is under way, and nobody waits for it longer than `timeout` seconds.

    `jwks_uri` is https, or http to a loopback address; or a function that finds it out, called in
    the fetch's own thread. `clock` counts seconds from any start and should be monotonic.
    """

    def __init__(
        self,
        jwks_uri: str | Callable[[], str],
        *,
        clock: Clock = time.monotonic,
        max_stale: float = MAX_STALE,
        timeout: float = FETCH_TIMEOUT,
    ) -> None:
        if isinstance(jwks_uri, str):
            checked_url(jwks_uri)
        if not 0 <= max_stale <= 86_400:
            raise ValueError(f"max_stale: expected 0 to 86400 seconds, found {max_stale}")
        if not 0 < timeout <= 30:
            raise ValueError(f"timeout: expected up to 30 seconds, found {timeout}")
        self._jwks_uri = jwks_uri
        self._clock = clock
        self._max_stale = max_stale
        self._timeout = timeout
        self._lock = threading.Lock()
        self._held: _Held | None = None
        self._fetch: _Fetch | None = None
        self._next_fetch_at = clock()
        self._failures_in_a_row = 0
        self._last_failure = "no fetch has ended"
        self._counts = {"fetches": 0, "fetch_failures": 0, "unknown_kid": 0, "refused_stale": 0}
        self._when_loaded: list[Callable[[], None]] = []
        in_forked_child(self._forget_fetch)

    def keys_for(self, kid: str) -> Keys:
        """Return the keys, once it is certain or cannot be had now whether `kid` is among them.

        Block, for `timeout` seconds at most, only when no usable key of that name is at hand.
        Raise KeysUnavailable when there is no usable set at all.
        """
        if (fetch := self._fetch_worth_waiting_for(kid)) is not None:
            concurrent.futures.wait([fetch.done], timeout=self._timeout)
        return self._usable_keys(kid)

    async def keys_for_async(self, kid: str) -> Keys:
        """Do as `keys_for` does, without ever blocking the event loop."""
        if (fetch := self._fetch_worth_waiting_for(kid)) is not None:
            # Unlike wait_for, it does not cancel the fetch for the others when one gives up.
            await asyncio.wait([asyncio.wrap_future(fetch.done)], timeout=self._timeout)
        return self._usable_keys(kid)

    @property
    def kids(self) -> frozenset[str]:
        """The names of the keys that tokens are checked with now; none once they are too old."""
        held = self._held
        return frozenset(held.keys if held and self._clock() < held.usable_until else ())

    def when_loaded(self, listener: Callable[[], None]) -> None:
        """Call `listener` after each fetch that succeeds, in the thread of the fetch."""
        self._when_loaded.append(listener)

    def refresh(self) -> bool:
        """Fetch the set although nobody asks for a key; return whether it was fetched.

        Block for `timeout` seconds at most. False too while a failed fetch is not to be repeated.
        """
        with self._lock:
            before = self._held
            fetch = self._fetch_under_way(self._clock())
        if fetch is None:
            return False
        concurrent.futures.wait([fetch.done], timeout=self._timeout)
        return self._held is not before

    def stats(self) -> Mapping[str, float]:
        """Return the figures to watch, counted since the start.

        `fetches`, `fetch_failures`, `unknown_kid` (look-ups of a name not in the set) and
        `refused_stale` (look-ups refused for want of a usable set); `keys` in the set now;
        `age_seconds` of the set, infinite before the first.
        """
        held, now = self._held, self._clock()
        with self._lock:
            counts = dict(self._counts)
        return {
            **counts,
            "keys": len(held.keys) if held else 0,
            "age_seconds": now - held.fetched_at if held else float("inf"),
        }

    def _fetch_worth_waiting_for(self, kid: str) -> _Fetch | None:
        now = self._clock()
        held = self._held
        if held is None or kid not in held.keys:
            with self._lock:
                return self._fetch_under_way(now)
        if now < held.refresh_at:
            return None
        with self._lock:
            fetch = self._fetch_under_way(now)
            # Past its freshness a set is used unasked only while its issuer cannot be asked:
            # otherwise an idle service would accept a key long after it was withdrawn.
            enough_until = held.usable_until if self._failures_in_a_row else held.fresh_until
        return None if now < enough_until else fetch

    def _fetch_under_way(self, now: float) -> _Fetch | None:
        fetch = self._fetch
        if fetch is not None and now < fetch.started_at + _LOST_AFTER:
            return fetch
        if now < self._next_fetch_at:
            return None
        fetch = _Fetch(done=concurrent.futures.Future(), started_at=now)
        thread = threading.Thread(
            target=self._run, args=(fetch,), name="privyseal-jwks", daemon=True
        )
        self._counts["fetches"] += 1
        try:
            thread.start()
        except RuntimeError:  # Out of threads, or the interpreter is shutting down.
            self._settle("no thread could be started", now)
            return None
        self._fetch = fetch
        return fetch

    def _run(self, fetch: _Fetch) -> None:
        try:
            outcome = self._load()
        except (FetchFailed, InvalidJWKS) as error:
            outcome = str(error)
        except Exception as error:
            # Whatever else went wrong, those who wait must be told.
            outcome = f"{type(error).__name__} while fetching keys"
        if isinstance(outcome, str):
            _logger.warning("fetching keys failed: %s", outcome)
        now = self._clock()
        with self._lock:
            counts = self._fetch is fetch
            if counts:
                self._fetch = None
                self._settle(outcome, now)
        fetch.done.set_result(None)
        if counts and not isinstance(outcome, str):
            for listener in self._when_loaded:
                listener()

    def _forget_fetch(self) -> None:
        # The thread stayed behind with the parent, and perhaps the lock with it.
        self._lock = threading.Lock()
        self._fetch = None

    def _load(self) -> tuple[Keys, float]:
        uri = self._jwks_uri if isinstance(self._jwks_uri, str) else self._jwks_uri()
        fetched = get(uri, timeout=self._timeout)
        return MappingProxyType(dict(parse_jwks(fetched.body))), fetched.max_age

    def _settle(self, outcome: tuple[Keys, float] | str, now: float) -> None:
        if isinstance(outcome, str):
            pause = min(_FETCH_INTERVAL * 2**self._failures_in_a_row, _MAX_BACKOFF)
            self._next_fetch_at = now + pause
            self._failures_in_a_row = min(self._failures_in_a_row + 1, 16)
            self._counts["fetch_failures"] += 1
            self._last_failure = outcome
            return
        keys, max_age = outcome
        self._held = _Held(
            keys=keys,
            fetched_at=now,
            refresh_at=now + max_age * _REFRESH_AT,
            fresh_until=now + max_age,
            usable_until=now + max_age + self._max_stale,
        )
        self._next_fetch_at = now + _FETCH_INTERVAL
        self._failures_in_a_row = 0

    def _usable_keys(self, kid: str) -> Keys:
        now = self._clock()
        held = self._held
        # A set that should have been fetched anew cannot tell that a key does not exist.
        good_until = 0.0
        if held is not None:
            cannot_tell = kid not in held.keys and self._failures_in_a_row > 0
            good_until = held.fresh_until if cannot_tell else held.usable_until
        if held is None or now >= good_until:
            with self._lock:
                self._counts["refused_stale"] += 1
                retry_after = max(self._next_fetch_at - now, _FETCH_INTERVAL)
            raise KeysUnavailable(
                f"expected the issuer's published keys, found none that are fresh enough: "
                f"{self._last_failure}",
                retry_after=retry_after,
            )
        if kid not in held.keys:
            with self._lock:
                self._counts["unknown_kid"] += 1
        return held.keys


def discover(issuer: str, *, timeout: float = FETCH_TIMEOUT) -> str:
    """Return the `jwks_uri` that `issuer` names in its metadata (RFC 8414 §3).

    Raise FetchFailed unless the document is the issuer's own, letter for letter.
    """
    url = f"{issuer}/.well-known/oauth-authorization-server"
    try:
        metadata = json_object(get(url, timeout=timeout).body)
    except ValueError as error:
        raise FetchFailed(f"{url}: {error}") from None
    # RFC 8414 §3.3.
    if metadata.get("issuer") != issuer:
        raise FetchFailed(f"{url}: expected the issuer {issuer}, found another")
    jwks_uri = metadata.get("jwks_uri")
    if not isinstance(jwks_uri, str):
        raise FetchFailed(f"{url}: expected jwks_uri, a string")
    try:
        checked_url(jwks_uri)
    except ValueError as error:
        raise FetchFailed(f"{url}: jwks_uri: {error}") from None
    return jwks_uri
