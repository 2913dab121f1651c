"""Every metric of the service, by name; any floor of `service/` may count here.

Holds no logic, and no label whose values a caller could choose.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from msgspec import Struct
from prometheus_client import (
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
    multiprocess,
)
from prometheus_client.metrics_core import GaugeMetricFamily

token_requests = Counter(
    "privyseal_token_requests",
    "Answers of POST /oauth/token, by outcome: issued, unavailable, or the OAuth error code.",
    ["outcome"],
)
token_seconds = Histogram(
    "privyseal_token_seconds",
    "Seconds from the request to the answer of POST /oauth/token.",
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5),
)
http_responses = Counter(
    "privyseal_http_responses", "Answers by status class: 2xx, 3xx, 4xx, 5xx.", ["status"]
)
audit_records = Counter(
    "privyseal_audit_records",
    "Audit records by result: success, refused, stale (decided on an old version) or failed.",
    ["result"],
)
audit_batch_records = Histogram(
    "privyseal_audit_batch_records",
    "Records in one commit.",
    buckets=(1, 2, 4, 8, 16, 32, 64),
)
audit_records_rejected = Counter(
    "privyseal_audit_records_rejected", "Records whose data Postgres refused; each is a defect."
)
audit_refusals_unrecorded = Counter(
    "privyseal_audit_refusals_unrecorded",
    "Refusals answered while the audit log was away: counted and logged instead.",
)
reported_events = Counter(
    "privyseal_reported_events",
    "Events that other services reported, by what they were told: recorded, known, refused or "
    "signature_wanted.",
    ["status"],
)
for _status in ("recorded", "known", "refused", "signature_wanted"):
    # A series that begins with its first event shows no increase for it.
    reported_events.labels(_status)
forged_tokens = Counter(
    "privyseal_forged_tokens",
    "Tokens, reported or presented here, that a key of ours signed and that were never issued: "
    "that key leaked.",
)
unverifiable_tokens = Counter(
    "privyseal_unverifiable_tokens",
    "Reported tokens that a key of ours signed and whose record may have been archived.",
)
unknown_tokens = Counter(
    "privyseal_unknown_tokens",
    "Reports of tokens that are on no record, with no proof of where they come from.",
)
directory_reads = Counter(
    "privyseal_directory_reads", "Service users read for an exchange.", ["source"]
)
store_connected = Gauge(
    "privyseal_store_connected",
    "Processes that hold a connection to Postgres for audit records.",
    multiprocess_mode="livesum",
)
clock_offset_seconds = Gauge(
    "privyseal_clock_offset_seconds",
    "How far Postgres' clock is ahead of the process that is furthest off.",
    multiprocess_mode="livemax",
)
ring_read_at_seconds = Gauge(
    "privyseal_ring_read_at_seconds",
    "When each process read the key ring; seconds since 1970.",
    multiprocess_mode="liveall",
)
audit_tree_size = Gauge(
    "privyseal_audit_tree_size",
    "Records that have their place in the audit log's Merkle tree.",
    multiprocess_mode="livemax",
)
audit_records_waiting = Gauge(
    "privyseal_audit_records_waiting",
    "Committed records without a place in the tree at the last look; 10000 means that or more.",
    multiprocess_mode="livemax",
)
audit_checkpoint_at_seconds = Gauge(
    "privyseal_audit_checkpoint_at_seconds",
    "When the newest checkpoint was signed; seconds since 1970.",
    multiprocess_mode="livemax",
)
audit_log_broken = Gauge(
    "privyseal_audit_log_broken",
    "1 while the audit log does not go on from its newest checkpoint: nothing is issued.",
    multiprocess_mode="livemax",
)
CREDENTIALS_ENDING_DAYS = (30, 7, 1)
credentials_ending = Gauge(
    "privyseal_credentials_ending",
    "Live credentials that end within this time and that nothing has replaced, at the last look.",
    ["within"],
    multiprocess_mode="livemostrecent",
)
signatures = Counter("privyseal_signatures", "Tokens signed, by key.", ["kid"])


class KeyFigures(Struct, frozen=True, kw_only=True):
    """A published key as a person watches it; its age is in seconds since it was published."""

    kid: str
    state: str
    age: float


class RingFigures(Struct, frozen=True, kw_only=True):
    """The key ring as the answering process sees it now."""

    keys: Sequence[KeyFigures]
    can_sign: bool
    next_activation_in: float | None
    """Seconds; None while nobody can say."""
    concerns: Mapping[str, bool]
    """Every concern by name, and whether it stands."""

    def families(self) -> Iterator[GaugeMetricFamily]:
        """Return them as Prometheus gauges."""
        age = GaugeMetricFamily(
            "privyseal_signing_key_age_seconds",
            "Age of each published key since its publication.",
            labels=["kid", "state"],
        )
        for key in self.keys:
            age.add_metric([key.kid, key.state], key.age)
        yield age
        yield GaugeMetricFamily(
            "privyseal_can_sign",
            "Whether the answering process has a key that may sign.",
            value=self.can_sign,
        )
        if self.next_activation_in is not None:
            yield GaugeMetricFamily(
                "privyseal_next_activation_seconds",
                "Seconds until the next key may sign.",
                value=self.next_activation_in,
            )
        concern = GaugeMetricFamily(
            "privyseal_signing_key_concern",
            "1 for what will stop a rotation, or has stopped signing, unless somebody looks.",
            labels=["concern"],
        )
        for name, stands in self.concerns.items():
            concern.add_metric([name], stands)
        yield concern


def exposition(ring: RingFigures) -> bytes:
    """Return the metrics of all workers in the Prometheus text format."""
    return _of_all_workers() + generate_latest(_Collected(ring))


class _Collected(CollectorRegistry):
    """The ring is known to every process, and its keys change: so it is no gauge of a worker,
    whose labels would stay for ever."""

    def __init__(self, ring: RingFigures) -> None:
        super().__init__()
        self._ring = ring

    def collect(self) -> Iterator[GaugeMetricFamily]:
        return self._ring.families()


def _of_all_workers() -> bytes:
    directory = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    if directory is None:
        return generate_latest(REGISTRY)
    for path in Path(directory).glob("gauge_live*.db"):
        # A worker that was killed could not say good-bye: its gauges would stand for ever.
        match = re.search(r"_(\d+)\.db$", path.name)
        if match is not None and not Path(f"/proc/{match[1]}").exists():
            path.unlink(missing_ok=True)
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return generate_latest(registry)
