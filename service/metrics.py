"""Every metric of the service, by name; any floor of `service/` may count here.

Holds no logic, and no label whose values a caller could choose.
"""

import os
import re
from pathlib import Path

from prometheus_client import (
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
    multiprocess,
)

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
    "When the key ring was read, in the process where that is longest ago; seconds since 1970.",
    multiprocess_mode="livemin",
)
signing_keys = Gauge(
    "privyseal_signing_keys", "Signing keys by state.", ["state"], multiprocess_mode="livemax"
)


def exposition() -> bytes:
    """Return the metrics of all workers in the Prometheus text format."""
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
