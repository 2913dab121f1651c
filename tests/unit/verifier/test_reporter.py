"""The reporter against a local authority that is away, forgetful or particular (issues 3 and 4).

It must not reach beyond loopback.
"""

import base64
import itertools
import json
import logging
import re
import subprocess
import sys
import threading
import time
import tracemalloc
import uuid
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

from keys.verifier import JWKSClient, Reporter, SignedClaims, Verifier, encode_jwks, thumbprint
from keys.verifier.events import uuid7
from tests.unit.verifier.conftest import NOW, AuthorityServer

AUDIENCE = "https://ingest.example.com"
SIGNATURE = "c2lnbmF0dXJl"
REPOSITORY = Path(__file__).parents[3]

Eventually = Callable[..., None]
NewReporter = Callable[..., Reporter]


@pytest.fixture
def new_reporter(authority: AuthorityServer) -> Generator[NewReporter]:
    """A reporter to the local authority, in a hurry; it is closed at the end."""
    made: list[Reporter] = []

    def make(**settings: Any) -> Reporter:
        settings = {"interval": 0.05, "timeout": 1.0, **settings}
        made.append(Reporter(authority.issuer, "cr_1", "pvs_secret", **settings))
        return made[-1]

    yield make
    for reporter in made:
        reporter.close(0.1)


@pytest.fixture
def caller(check: Callable[..., SignedClaims], sign: Callable[..., str], claims: Any) -> Any:
    return check(sign(claims))


def call(reporter: Reporter, caller: SignedClaims, number: int = 0) -> None:
    reporter.api_call(
        caller,
        SIGNATURE,
        action="document.ingest",
        resource=f"documents/{number}",
        outcome="success",
        request_id=f"request-{number}",
        client_address="192.0.2.7",
        user_agent="curl/8",
        department="retail",
    )


def resources(authority: AuthorityServer) -> list[str]:
    return [event["resource"] for event in authority.calls()]


# Keys


def test_the_keys_are_loaded_and_reported_before_the_first_token_comes(
    authority: AuthorityServer,
    new_reporter: NewReporter,
    rsa_key: RSAPrivateKey,
    eventually: Eventually,
) -> None:
    jwks = f"{authority.issuer}/keys"
    verifier = Verifier(authority.issuer, AUDIENCE, jwks, reporter=new_reporter())
    eventually(lambda: len(authority.loaded()) == 1)
    (event,) = authority.loaded()
    assert event["kids"] == [thumbprint(rsa_key.public_key())]
    assert re.fullmatch("[A-Za-z0-9_-]{8,64}", event["instance"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", event["occurred_at"])
    assert uuid.UUID(event["id"]).version == 7
    assert set(event) == {"type", "id", "occurred_at", "instance", "kids"}
    stats = verifier.stats()[authority.issuer]
    assert (stats["fetches"], stats["keys"]) == (1, 1)
    eventually(lambda: verifier.stats()[authority.issuer]["events_sent"] == 1)


def test_the_token_is_asked_for_with_form_encoded_basic_and_the_scope_and_resource_of_reports(
    authority: AuthorityServer, eventually: Eventually
) -> None:
    reporter = Reporter(authority.issuer, "cr:1", "a+b %ü")
    reporter.watch(JWKSClient(f"{authority.issuer}/keys"))
    eventually(lambda: bool(authority.loaded()))
    reporter.close()
    ((basic, form),) = authority.token_requests
    assert base64.b64decode(basic.removeprefix("Basic ")) == b"cr%3A1:a%2Bb+%25%C3%BC"
    assert form == {
        "grant_type": ["client_credentials"],
        "scope": ["audit:report"],
        "resource": [f"{authority.issuer}/api/v1"],
    }


def test_an_idle_service_loads_the_next_key_and_reports_the_changed_set_once(
    authority: AuthorityServer,
    new_reporter: NewReporter,
    rsa_key: RSAPrivateKey,
    other_key: RSAPrivateKey,
    eventually: Eventually,
) -> None:
    client = JWKSClient(f"{authority.issuer}/keys")
    new_reporter(every=1.2).watch(client)
    eventually(lambda: len(authority.loaded()) == 1)
    authority.jwks = encode_jwks([rsa_key.public_key(), other_key.public_key()])
    eventually(lambda: len(authority.loaded()) == 2)
    both = sorted(thumbprint(key.public_key()) for key in (rsa_key, other_key))
    assert authority.loaded()[1]["kids"] == both == sorted(client.kids)
    assert client.stats()["fetches"] == 2
    assert len({event["instance"] for event in authority.loaded()}) == 1


def test_an_unchanged_set_is_reported_again_only_after_every(
    authority: AuthorityServer, new_reporter: NewReporter, eventually: Eventually
) -> None:
    client = JWKSClient(f"{authority.issuer}/keys")
    new_reporter(every=1.5).watch(client)
    eventually(lambda: len(authority.loaded()) == 1)
    time.sleep(1.1)
    assert client.refresh()
    eventually(lambda: len(authority.loaded()) == 2)
    first, second = authority.reported_at
    assert second - first > 1.3


def test_keys_that_an_ordinary_token_brings_in_are_reported_at_once(
    authority: AuthorityServer,
    new_reporter: NewReporter,
    rsa_key: RSAPrivateKey,
    other_key: RSAPrivateKey,
    eventually: Eventually,
) -> None:
    client = JWKSClient(f"{authority.issuer}/keys")
    new_reporter().watch(client)
    eventually(lambda: len(authority.loaded()) == 1)
    authority.jwks = encode_jwks([rsa_key.public_key(), other_key.public_key()])
    time.sleep(1.0)  # at most one fetch a second
    assert thumbprint(other_key.public_key()) in client.keys_for(thumbprint(other_key.public_key()))
    eventually(lambda: len(authority.loaded()) == 2)
    assert len(authority.loaded()[1]["kids"]) == 2


def test_held_keys_are_reported_though_a_refresh_fails(
    authority: AuthorityServer, new_reporter: NewReporter, eventually: Eventually
) -> None:
    # Or else rotation would not wait for an instance that lives and cannot load the next key.
    new_reporter(every=0.3).watch(JWKSClient(f"{authority.issuer}/keys"))
    eventually(lambda: len(authority.loaded()) == 1)
    authority.jwks_status = 500
    eventually(lambda: len(authority.loaded()) >= 3)


def test_a_first_set_that_cannot_be_had_is_asked_for_again(
    authority: AuthorityServer, new_reporter: NewReporter, eventually: Eventually
) -> None:
    authority.jwks_status = 503
    new_reporter().watch(JWKSClient(f"{authority.issuer}/keys"))
    time.sleep(0.3)
    assert not authority.reports
    authority.jwks_status = 200
    eventually(lambda: len(authority.loaded()) == 1)


def test_of_reports_that_waited_only_the_newest_is_sent(
    authority: AuthorityServer,
    new_reporter: NewReporter,
    rsa_key: RSAPrivateKey,
    other_key: RSAPrivateKey,
    eventually: Eventually,
) -> None:
    authority.token_status = 503
    client = JWKSClient(f"{authority.issuer}/keys")
    new_reporter().watch(client)
    eventually(lambda: bool(client.kids))
    authority.jwks = encode_jwks([other_key.public_key()])
    time.sleep(1.0)
    assert client.refresh()
    authority.token_status = 200
    eventually(lambda: len(authority.loaded()) == 1)
    time.sleep(0.2)
    assert [event["kids"] for event in authority.loaded()] == [[thumbprint(other_key.public_key())]]


# Calls


def test_a_call_is_reported_as_the_contract_has_it(
    authority: AuthorityServer,
    new_reporter: NewReporter,
    caller: SignedClaims,
    eventually: Eventually,
) -> None:
    call(new_reporter(clock=lambda: NOW), caller)
    eventually(lambda: len(authority.calls()) == 1)
    (event,) = authority.calls()
    digest = base64.urlsafe_b64encode(caller.signing_input_sha256).rstrip(b"=").decode()
    assert event.pop("id")[:13] == uuid7(NOW)[:13]
    assert event == {
        "type": "api.call",
        "occurred_at": "2027-01-15T08:00:00.000Z",
        "jti": caller.jti,
        "kid": caller.kid,
        "signing_input_sha256": digest,
        "action": "document.ingest",
        "resource": "documents/0",
        "outcome": "success",
        "request_id": "request-0",
        "client_address": "192.0.2.7",
        "user_agent": "curl/8",
        "department": "retail",
    }


def test_the_signature_is_sent_only_when_it_is_wanted_and_under_the_same_id(
    authority: AuthorityServer,
    new_reporter: NewReporter,
    caller: SignedClaims,
    eventually: Eventually,
) -> None:
    authority.wants_signature = lambda event: event.get("resource") == "documents/1"
    reporter = new_reporter()
    for number in range(3):
        call(reporter, caller, number)
    eventually(lambda: reporter.stats()["events_sent"] == 3)
    (wanted,) = (event for event in authority.calls() if event["resource"] == "documents/1")
    assert wanted["signature"] == SIGNATURE
    sent = [event for report in authority.reports for event in report]
    assert [event["id"] for event in sent].count(wanted["id"]) == 2
    assert sum("signature" in event for event in sent) == 1


def test_an_authority_that_never_has_enough_of_a_signature_is_not_asked_for_ever(
    authority: AuthorityServer,
    new_reporter: NewReporter,
    caller: SignedClaims,
    eventually: Eventually,
) -> None:
    reporter = new_reporter()
    ids: list[str] = []

    def insatiable(event: dict[str, Any]) -> bool:
        ids.append(event["id"])
        event.pop("signature", None)
        return True

    authority.wants_signature = insatiable
    call(reporter, caller)
    eventually(lambda: reporter.stats()["events_refused"] == 1)
    time.sleep(0.2)
    assert len(ids) == 2


def test_a_repeat_after_a_lost_answer_records_nothing_twice(
    authority: AuthorityServer,
    new_reporter: NewReporter,
    caller: SignedClaims,
    eventually: Eventually,
) -> None:
    call(new_reporter(), caller, 0)  # so that there is a token
    eventually(lambda: len(authority.calls()) == 1)
    reporter = new_reporter()
    authority.answers.append(None)
    for number in range(1, 4):
        call(reporter, caller, number)
    eventually(lambda: reporter.stats()["events_known"] + reporter.stats()["events_sent"] == 3)
    assert reporter.stats()["events_known"] >= 1
    assert reporter.stats()["report_retries"] == 1
    assert sorted(resources(authority)) == [f"documents/{number}" for number in range(4)]


def test_older_batches_are_repeated_before_newer_ones_are_sent(
    authority: AuthorityServer,
    new_reporter: NewReporter,
    caller: SignedClaims,
    eventually: Eventually,
) -> None:
    authority.answers.extend([(503, b"", {}), (502, b"", {})])
    reporter = new_reporter()
    call(reporter, caller, 0)
    eventually(lambda: len(authority.reports) == 1)
    for number in range(1, 50):
        call(reporter, caller, number)
    eventually(lambda: len(authority.calls()) == 50)
    assert resources(authority) == [f"documents/{number}" for number in range(50)]
    assert [len(report) for report in authority.reports[:3]] == [1, 1, 1]
    assert reporter.stats()["report_retries"] == 2


def test_pauses_grow_and_a_retry_after_is_honoured(
    authority: AuthorityServer,
    new_reporter: NewReporter,
    caller: SignedClaims,
    eventually: Eventually,
) -> None:
    authority.answers.extend([(503, b"", {}), (500, b"", {}), (429, b"", {"Retry-After": "2"})])
    call(new_reporter(), caller)
    eventually(lambda: len(authority.calls()) == 1, 10)
    at = authority.reported_at
    first, second, third = (later - sooner for sooner, later in itertools.pairwise(at))
    assert first >= 0.25
    assert second >= 0.5
    assert third >= 2.0


def test_a_refused_token_is_renewed_once_and_at_once(
    authority: AuthorityServer,
    new_reporter: NewReporter,
    caller: SignedClaims,
    eventually: Eventually,
) -> None:
    reporter = new_reporter()
    call(reporter, caller, 0)
    eventually(lambda: len(authority.calls()) == 1)
    authority.tokens.append("another")  # what it has is not good any more
    call(reporter, caller, 1)
    eventually(lambda: len(authority.calls()) == 2)
    assert len(authority.token_requests) == 2
    assert reporter.stats()["report_retries"] == 0


@pytest.mark.parametrize("refused", ["reports", "exchange"])
def test_one_who_may_not_report_keeps_the_events_says_so_and_does_not_press(
    refused: str,
    authority: AuthorityServer,
    new_reporter: NewReporter,
    caller: SignedClaims,
    eventually: Eventually,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if refused == "reports":
        authority.answers.append((403, b'{"detail":"audit:report is missing"}', {}))
    else:
        authority.token_status = 401
    reporter = new_reporter()
    call(reporter, caller)
    eventually(lambda: reporter.stats()["report_retries"] == 1)
    time.sleep(1.0)
    stats = reporter.stats()
    assert (stats["events_queued"], stats["events_lost"]) == (1, 0)
    assert stats["report_retries"] == 1
    (warning,) = caplog.messages
    assert "reports wait: " in warning
    assert ("audit:report is missing" if refused == "reports" else "found 401") in warning


@pytest.mark.parametrize("status", [400, 413, 422])
def test_only_the_one_malformed_event_of_a_batch_is_given_up(
    authority: AuthorityServer,
    new_reporter: NewReporter,
    caller: SignedClaims,
    eventually: Eventually,
    caplog: pytest.LogCaptureFixture,
    status: int,
) -> None:
    authority.malformed_status = status
    authority.malformed = lambda event: event.get("resource") == "documents/77"
    reporter = new_reporter(interval=0.5)
    call(reporter, caller, 1000)  # the first goes alone
    for number in range(100):
        call(reporter, caller, number)
    eventually(lambda: reporter.stats()["events_sent"] == 100)
    assert reporter.stats()["events_refused"] == 1
    assert reporter.stats()["events_lost"] == 0
    assert "documents/77" not in resources(authority)
    assert resources(authority)[1:] == [f"documents/{n}" for n in range(100) if n != 77]
    (warning,) = caplog.messages
    assert "1 events were refused, the first is " in warning


def test_a_400_that_blames_no_event_gives_none_up(
    authority: AuthorityServer,
    new_reporter: NewReporter,
    caller: SignedClaims,
    eventually: Eventually,
) -> None:
    authority.answers.append((400, b"<html>Bad Request</html>", {}))
    reporter = new_reporter()
    call(reporter, caller)
    eventually(lambda: reporter.stats()["report_retries"] == 1)
    stats = reporter.stats()
    assert (stats["events_queued"], stats["events_refused"], stats["events_lost"]) == (1, 0, 0)


def test_events_that_are_refused_for_good_are_not_repeated_and_told_once(
    authority: AuthorityServer,
    new_reporter: NewReporter,
    caller: SignedClaims,
    eventually: Eventually,
    caplog: pytest.LogCaptureFixture,
) -> None:
    authority.refuses = lambda event: event.get("resource") != "documents/3"
    reporter = new_reporter(interval=0.5)
    for number in range(10):
        call(reporter, caller, number)
    eventually(lambda: reporter.stats()["events_refused"] == 9)
    time.sleep(0.6)
    assert reporter.stats()["report_retries"] == 0
    assert sum(len(report) for report in authority.reports) == 10
    assert resources(authority) == ["documents/3"]
    assert all("events were refused, the first is" in message for message in caplog.messages)
    assert len(caplog.messages) == len(authority.reports)


def test_every_text_is_cut_to_what_the_authority_takes(
    authority: AuthorityServer,
    new_reporter: NewReporter,
    caller: SignedClaims,
    eventually: Eventually,
) -> None:
    reporter = new_reporter()
    nasty = "ä\r\n\x00\ud800" + "x" * 500
    reporter.api_call(
        caller,
        SIGNATURE,
        resource=nasty,
        outcome="failed",
        request_id=nasty,
        client_address=nasty,
        user_agent=nasty,
        department=nasty,
    )
    eventually(lambda: len(authority.calls()) == 1)
    (event,) = authority.calls()
    assert event["action"] == "api.call"
    lengths = {"resource": 300, "request_id": 128, "client_address": 64, "department": 128}
    for name, length in lengths.items():
        assert event[name] == ("ä????" + "x" * 500)[:length]
    assert event["user_agent"] == ("?????" + "x" * 500)[:200]
    with pytest.raises(ValueError, match="two lower-case words"):
        reporter.api_call(
            caller, SIGNATURE, action="Ingest", resource="", outcome="success", request_id=""
        )


# Load and loss


def test_10000_calls_are_taken_quickly_and_reported_in_batches(
    authority: AuthorityServer,
    new_reporter: NewReporter,
    caller: SignedClaims,
    eventually: Eventually,
) -> None:
    reporter = new_reporter(interval=1.0)
    started = time.monotonic()
    for number in range(10_000):
        call(reporter, caller, number)
    taken = time.monotonic() - started
    eventually(lambda: len(authority.calls()) == 10_000, 15)
    assert taken < 5
    assert resources(authority) == [f"documents/{number}" for number in range(10_000)]
    assert max(len(report) for report in authority.reports) <= 1000
    assert authority.largest_body <= 1024 * 1024
    assert reporter.stats()["events_lost"] == 0


@pytest.mark.parametrize("spooled", [False, True])
def test_the_first_call_is_reported_at_once_and_later_ones_once_an_interval(
    spooled: bool,
    authority: AuthorityServer,
    new_reporter: NewReporter,
    caller: SignedClaims,
    eventually: Eventually,
    tmp_path: Path,
) -> None:
    reporter = new_reporter(interval=1.0, spool=tmp_path / "spool" if spooled else None)
    started = time.monotonic()
    for number in range(100):
        call(reporter, caller, number)
        time.sleep(0.01)
    eventually(lambda: len(authority.calls()) == 100)
    assert authority.reported_at[0] - started < 1.0
    assert len(authority.reports) <= 2 + (time.monotonic() - started) / 1.0


@pytest.mark.parametrize("spooled", [False, True])
def test_a_request_never_waits_for_an_authority_that_says_nothing(
    spooled: bool,
    authority: AuthorityServer,
    new_reporter: NewReporter,
    caller: SignedClaims,
    eventually: Eventually,
    tmp_path: Path,
) -> None:
    authority.released.clear()
    reporter = new_reporter(timeout=5.0, spool=tmp_path / "spool" if spooled else None)
    call(reporter, caller, 0)
    time.sleep(0.2)  # now the sender hangs
    took: list[float] = []
    for number in range(1, 2000):
        started = time.perf_counter()
        call(reporter, caller, number)
        took.append(time.perf_counter() - started)
    took.sort()
    assert took[len(took) // 2] < 0.0005
    assert took[-1] < 1  # a busy machine; waiting for the authority would take 5 s
    authority.released.set()
    eventually(lambda: len(authority.calls()) == 2000, 10)


def test_what_finds_no_room_is_lost_counted_and_told_while_memory_stays_bounded(
    authority: AuthorityServer,
    new_reporter: NewReporter,
    caller: SignedClaims,
    eventually: Eventually,
    caplog: pytest.LogCaptureFixture,
) -> None:
    authority.token_status = 503
    reporter = new_reporter(queue_size=1000)
    call(reporter, caller)
    eventually(lambda: reporter.stats()["report_retries"] >= 1)
    for number in range(1000):
        call(reporter, caller, number)
    tracemalloc.start()
    for number in range(5000):
        call(reporter, caller, number)
    grown, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert grown < 100_000
    stats = reporter.stats()
    assert (stats["events_lost"], stats["events_queued"]) == (5000, 1001)
    eventually(lambda: any("events were lost" in message for message in caplog.messages))
    # Told when it begins, and then once a minute.
    call(reporter, caller)
    time.sleep(0.2)
    assert sum("events were lost" in message for message in caplog.messages) == 1
    authority.token_status = 200
    eventually(lambda: len(authority.calls()) == 1001)


def test_an_orderly_stop_sends_what_waits(
    authority: AuthorityServer, new_reporter: NewReporter, caller: SignedClaims
) -> None:
    reporter = new_reporter(interval=60)
    for number in range(1500):
        call(reporter, caller, number)
    reporter.close()
    assert len(authority.calls()) == 1500
    call(reporter, caller)
    assert reporter.stats()["events_lost"] == 1


def test_a_stop_without_the_authority_ends_in_time_and_counts_what_is_lost(
    authority: AuthorityServer,
    new_reporter: NewReporter,
    caller: SignedClaims,
    caplog: pytest.LogCaptureFixture,
) -> None:
    authority.token_status = 503
    reporter = new_reporter(interval=60)
    for number in range(10):
        call(reporter, caller, number)
    started = time.monotonic()
    reporter.close(20)
    assert time.monotonic() - started < 10
    assert reporter.stats()["events_lost"] == 10
    assert "10 events were lost: they will not be in the audit log" in caplog.messages


# Spool


def test_with_a_spool_events_outlive_the_process_that_took_them(
    authority: AuthorityServer,
    new_reporter: NewReporter,
    caller: SignedClaims,
    eventually: Eventually,
    tmp_path: Path,
) -> None:
    authority.token_status = 503
    first = new_reporter(spool=tmp_path / "spool")
    for number in range(2500):
        call(first, caller, number)
    first.close()
    assert first.stats()["events_lost"] == 0
    assert not authority.reports
    authority.token_status = 200
    second = new_reporter(spool=tmp_path / "spool")
    second.start()
    eventually(lambda: len(authority.calls()) == 2500)
    assert resources(authority) == [f"documents/{number}" for number in range(2500)]
    eventually(lambda: second.stats()["events_spooled"] == 0)
    second.close()
    assert list((tmp_path / "spool").iterdir()) == []


def test_nobody_else_can_read_the_spool(
    authority: AuthorityServer,
    new_reporter: NewReporter,
    caller: SignedClaims,
    eventually: Eventually,
    tmp_path: Path,
) -> None:
    authority.token_status = 503
    reporter = new_reporter(spool=tmp_path / "spool")
    call(reporter, caller)
    eventually(lambda: reporter.stats()["events_spooled"] == 1)
    (folder,) = (tmp_path / "spool").iterdir()
    (batch,) = folder.iterdir()
    modes = [path.stat().st_mode & 0o777 for path in (tmp_path / "spool", folder, batch)]
    assert modes == [0o700, 0o700, 0o600]


def test_a_full_spool_leaves_the_queue_and_then_losses(
    authority: AuthorityServer,
    new_reporter: NewReporter,
    caller: SignedClaims,
    eventually: Eventually,
    tmp_path: Path,
) -> None:
    authority.token_status = 503
    reporter = new_reporter(spool=tmp_path / "spool", spool_bytes=1_000_000, queue_size=1000)
    reporter.start()
    eventually(lambda: any((tmp_path / "spool").iterdir()))
    for number in range(6000):
        call(reporter, caller, number)
        if number % 500 == 0:
            time.sleep(0.1)
    eventually(lambda: reporter.stats()["events_queued"] == 1000)
    on_disk = sum(path.stat().st_size for path in (tmp_path / "spool").rglob("*.jsonl"))
    assert 0 < on_disk <= 1_000_000
    stats = reporter.stats()
    assert stats["events_lost"] > 0
    kept = stats["events_spooled"] + stats["events_queued"]
    assert kept + stats["events_lost"] == 6000
    authority.token_status = 200
    eventually(lambda: len(authority.calls()) == kept, 10)


def test_a_spool_that_cannot_be_written_does_not_keep_events_from_the_authority(
    authority: AuthorityServer,
    new_reporter: NewReporter,
    caller: SignedClaims,
    eventually: Eventually,
    tmp_path: Path,
) -> None:
    reporter = new_reporter(spool=tmp_path / "spool")
    reporter.start()
    eventually(lambda: any((tmp_path / "spool").iterdir()))
    (folder,) = (tmp_path / "spool").iterdir()
    folder.rmdir()
    call(reporter, caller)
    eventually(lambda: len(authority.calls()) == 1)


def test_what_a_crash_tore_is_skipped_and_counted(
    authority: AuthorityServer,
    new_reporter: NewReporter,
    caller: SignedClaims,
    eventually: Eventually,
    tmp_path: Path,
) -> None:
    authority.token_status = 503
    first = new_reporter(spool=tmp_path / "spool")
    call(first, caller, 0)
    eventually(lambda: first.stats()["events_spooled"] == 1)
    first.close()
    (batch,) = (tmp_path / "spool").rglob("*.jsonl")
    whole = batch.read_bytes()
    batch.write_bytes(whole + b"\0\0\0\0\n" + whole[:100])
    authority.token_status = 200
    second = new_reporter(spool=tmp_path / "spool")
    second.start()
    eventually(lambda: second.stats()["events_lost"] == 2)
    eventually(lambda: resources(authority) == ["documents/0"])


PROGRAM = """
import json, os, sys, time
from pathlib import Path
from keys.verifier import Reporter, SignedClaims
issuer, spool, calls = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
caller = SignedClaims(
    iss=issuer, sub="su_a", client_id="su_a", aud="ingest", exp=2, iat=1,
    jti="0199f0a0-1111-7222-8333-444444444444", scope=frozenset(), service_user="vkyc-prod",
    source_system="vkyc", act_sub=None, kid="k" * 43, signing_input_sha256=b"x" * 32, claims={},
)
reporter = Reporter(issuer, "cr_1", "pvs_secret", spool=spool, interval=0.05, timeout=1)

def call(resource):
    reporter.api_call(caller, "c2ln", resource=resource, outcome="success", request_id="r")
"""


def _run(program: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM + program, *map(str, arguments)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_killed_service_leaves_a_spool_that_the_next_one_sends_exactly_once(
    authority: AuthorityServer,
    new_reporter: NewReporter,
    eventually: Eventually,
    tmp_path: Path,
) -> None:
    program = """
for number in range(calls):
    call(f"documents/{number}")
    time.sleep(0.0005)
print("done", flush=True)
time.sleep(60)
"""
    # What was reported last is on record; the service is killed before it hears of that.
    process = _run(program, authority.issuer, tmp_path / "spool", 2000)
    assert process.stdout is not None
    killed = threading.Event()

    def kill_the_reporter() -> None:
        if len(authority.recorded) >= 200 and not killed.is_set():
            process.kill()
            process.wait()
            killed.set()

    authority.before_answering = kill_the_reporter
    assert killed.wait(10)
    process.stdout.close()
    taken = len(authority.recorded)
    left = [
        json.loads(line)["resource"]
        for batch in (tmp_path / "spool").rglob("*.jsonl")
        for line in batch.read_bytes().splitlines()
    ]
    assert left, "nothing was left to adopt"
    reporter = new_reporter(spool=tmp_path / "spool")
    reporter.start()
    eventually(lambda: set(left) <= set(resources(authority)))
    eventually(lambda: reporter.stats()["events_known"] > 0)
    eventually(lambda: reporter.stats()["events_spooled"] == 0)
    found = resources(authority)
    assert len(found) == len(set(found))
    assert len(found) >= taken
    # Nothing is missing between the first and the last.
    assert sorted(found, key=lambda text: int(text[10:])) == [
        f"documents/{number}" for number in range(len(found))
    ]


def test_the_spool_of_a_living_process_is_left_alone(
    authority: AuthorityServer,
    new_reporter: NewReporter,
    eventually: Eventually,
    tmp_path: Path,
) -> None:
    authority.token_status = 503
    program = "call('documents/0'); print('called', flush=True); time.sleep(60)"
    process = _run(program, authority.issuer, tmp_path / "spool", 1)
    try:
        eventually(lambda: bool(list((tmp_path / "spool").rglob("*.jsonl"))), 10)
        living = list((tmp_path / "spool").rglob("*.jsonl"))
        reporter = new_reporter(spool=tmp_path / "spool")
        reporter.start()
        eventually(lambda: len(list((tmp_path / "spool").iterdir())) == 2)
        time.sleep(0.2)
        assert reporter.stats()["events_spooled"] == 0
        assert list((tmp_path / "spool").rglob("*.jsonl")) == living
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
    again = new_reporter(spool=tmp_path / "spool")
    again.start()
    eventually(lambda: again.stats()["events_spooled"] == 1)


def test_a_forked_child_reports_for_itself(
    authority: AuthorityServer, eventually: Eventually, tmp_path: Path
) -> None:
    program = """
from keys.verifier import Verifier
def said_all():  # the call, and which keys it has loaded
    while reporter.stats()["events_sent"] < 2:
        time.sleep(0.02)
verifier = Verifier(issuer, "ingest", issuer + "/keys", reporter=reporter)
call("documents/parent")
if os.fork() == 0:
    time.sleep(0.3)
    assert reporter.stats()["events_sent"] == reporter.stats()["events_queued"] == 0
    verifier.start()
    call("documents/child")
    said_all()
    reporter.close()
    os._exit(0)
os.wait()
said_all()
reporter.close()
"""
    process = _run(program, authority.issuer, tmp_path / "spool", 1)
    assert process.wait(20) == 0
    assert process.stdout is not None
    process.stdout.close()
    assert sorted(resources(authority)) == ["documents/child", "documents/parent"]
    assert len({event["instance"] for event in authority.loaded()}) == 2
    assert list((tmp_path / "spool").iterdir()) == []


# Settings


def test_no_secret_is_in_a_repr_or_a_log(
    authority: AuthorityServer,
    new_reporter: NewReporter,
    caller: SignedClaims,
    eventually: Eventually,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    authority.token_status = 401
    reporter = new_reporter()
    call(reporter, caller)
    eventually(lambda: reporter.stats()["report_retries"] >= 1)
    encoded = base64.b64encode(b"cr_1:pvs_secret").decode()
    assert caplog.text
    for secret in ("pvs_secret", encoded):
        assert secret not in caplog.text + repr(reporter) + repr(vars(reporter)["_courier"])


def test_settings_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    issuer = "https://tokens.example.com"
    (tmp_path / "file").touch()
    refused: list[tuple[dict[str, Any], str]] = [
        ({"queue_size": 10}, "queue_size"),
        ({"interval": 0}, "interval"),
        ({"every": 7200}, "every"),
        ({"timeout": float("nan")}, "timeout"),
        ({"spool": tmp_path / "file"}, "spool"),
    ]
    for settings, reason in refused:
        with pytest.raises(ValueError, match=reason):
            Reporter(issuer, "cr_1", "pvs_secret", **settings)
    with pytest.raises(ValueError, match="client_secret"):
        Reporter(issuer, "cr_1", "")
    with pytest.raises(ValueError, match="origin"):
        Reporter(f"{issuer}/", "cr_1", "pvs_secret")
    with pytest.raises(ValueError, match="expected one to https://other"):
        Verifier("https://other.example.com", "a", reporter=Reporter(issuer, "cr_1", "pvs_secret"))


def test_a_reporter_serves_one_verifier(
    authority: AuthorityServer, new_reporter: NewReporter
) -> None:
    reporter = new_reporter()
    Verifier(authority.issuer, "a", f"{authority.issuer}/keys", reporter=reporter)
    with pytest.raises(ValueError, match="one in use"):
        Verifier(authority.issuer, "b", f"{authority.issuer}/keys", reporter=reporter)


def test_an_event_id_is_a_uuid_7_of_its_time_and_no_two_are_alike() -> None:
    ids = {uuid7(NOW + 0.25) for _ in range(1000)}
    assert len(ids) == 1000
    for text in ids:
        parsed = uuid.UUID(text)
        assert (parsed.version, parsed.variant) == (7, uuid.RFC_4122)
        assert parsed.int >> 80 == NOW * 1000 + 250
