"""The example ingest service: the upload that integrators send today, accepted or refused.

It must not call the service in any other way than curl does.
"""

import hashlib
import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.interop.conftest import Authority, Curl, CurlAnswer, Exchange, IngestService, Integrator

METADATA = {
    "source_tag": "vkyc",
    "external_id": "session-123",
    "document_category": "kyc_vkyc",
    "department": "retail",
}
DOCUMENT = b"%PDF-1.7\n" + bytes(range(256)) * 8192  # 2 MiB: more than is ever held in memory

Upload = Callable[..., CurlAnswer]


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("upload") / "document.pdf"
    path.write_bytes(DOCUMENT)
    return path


@pytest.fixture
def upload(curl: Curl, ingest: IngestService, document: Path) -> Upload:
    """`upload(token)` runs the command of the README; each keyword changes one part of it."""

    def run(
        token: str | None,
        *,
        department: str | None = "retail",
        file: Path | None = document,
        metadata: str | None = json.dumps(METADATA),
    ) -> CurlAnswer:
        arguments: list[str] = []
        if token is not None:
            arguments += ["-H", f"Authorization: Bearer {token}"]
        if department is not None:
            arguments += ["-H", f"X-Approver-Department: {department}"]
        if file is not None:
            arguments += ["-F", f"file=@{file}"]
        if metadata is not None:
            arguments += ["-F", f"metadata={metadata}"]
        return curl("-X", "POST", f"{ingest.url}/api/v1/ingest", *arguments)

    return run


@pytest.fixture(scope="module")
def token(exchange: Exchange, vkyc: Integrator) -> str:
    return exchange(vkyc)


def test_an_upload_is_stored_and_attributed_to_whom_the_token_names(
    upload: Upload, token: str, vkyc: Integrator, ingest: IngestService, operator: httpx.Client
) -> None:
    answer = upload(token)
    assert answer.status == 201, answer.body
    attribution = answer.json
    assert attribution["service_user"] == "vkyc-prod"
    assert attribution["service_user_id"] == vkyc.id
    assert attribution["source_system"] == "vkyc"
    assert attribution["department"] == "retail"
    assert attribution["document_category"] == "kyc_vkyc"
    assert attribution["external_id"] == "session-123"
    assert attribution["size"] == len(DOCUMENT)
    assert attribution["sha256"] == hashlib.sha256(DOCUMENT).hexdigest()
    stored = ingest.data_dir / attribution["document_id"]
    assert stored.read_bytes() == DOCUMENT
    assert json.loads(stored.with_suffix(".json").read_text()) == attribution
    # From the document back to the exchange, without the token.
    found = operator.get("/audit-records", params={"jti": attribution["jti"]})
    assert [record["service_user_id"] for record in found.json()["records"]] == [vkyc.id]


def test_an_upload_is_accepted_while_the_authority_is_stopped(
    upload: Upload, exchange: Exchange, vkyc: Integrator, authority: Authority
) -> None:
    # Never seen before by the service; only its key is known there.
    assert upload(exchange(vkyc)).status == 201
    token = exchange(vkyc)
    os.kill(authority.pid, signal.SIGSTOP)
    try:
        with pytest.raises(httpx.TimeoutException):
            httpx.get(f"{authority.issuer}/healthz", timeout=1)
        assert upload(token).status == 201
    finally:
        os.kill(authority.pid, signal.SIGCONT)


def test_an_upload_asks_the_authority_nothing(
    upload: Upload, token: str, curl: Curl, ingest: IngestService
) -> None:
    assert upload(token).status == 201
    before = _fetches(curl, ingest)
    for _ in range(3):
        assert upload(token).status == 201
    assert _fetches(curl, ingest) == before >= 1


def test_without_a_token_the_challenge_is_bare(upload: Upload) -> None:
    answer = upload(None)
    assert answer.status == 401
    assert answer.headers["WWW-Authenticate"] == "Bearer"  # RFC 6750 §3.1


def test_a_forged_token_is_an_invalid_token(upload: Upload, token: str) -> None:
    head, _, signature = token.rpartition(".")
    answer = upload(f"{head}.{'A' * len(signature)}")
    assert answer.status == 401
    assert 'error="invalid_token"' in answer.headers["WWW-Authenticate"]
    assert "signature: expected " in answer.json["error_description"]


def test_a_token_for_another_audience_is_an_invalid_token(
    upload: Upload, exchange: Exchange, authority: Authority
) -> None:
    answer = upload(exchange(authority, resource=f"{authority.issuer}/api/v1"))
    assert answer.status == 401
    assert 'error="invalid_token"' in answer.headers["WWW-Authenticate"]
    assert "aud: expected 'http://127.0.0.1:8081', found" in answer.json["error_description"]


def test_a_token_without_the_scope_is_told_which_one(
    upload: Upload, exchange: Exchange, vkyc: Integrator
) -> None:
    answer = upload(exchange(vkyc, scope="search:read"))
    assert answer.status == 403
    challenge = answer.headers["WWW-Authenticate"]
    assert 'error="insufficient_scope"' in challenge
    assert 'scope="ingest:write"' in challenge
    assert answer.json["error_description"] == "scope: expected ingest:write, found search:read"


def test_a_document_of_another_source_system_is_refused(upload: Upload, token: str) -> None:
    answer = upload(token, metadata=json.dumps({**METADATA, "source_tag": "doc_service"}))
    assert answer.status == 403
    assert 'expected "vkyc"' in answer.json["error_description"]
    assert 'found "doc_service"' in answer.json["error_description"]


def test_the_token_of_another_source_system_does_not_help(
    upload: Upload, exchange: Exchange, new_integrator: Callable[..., Integrator]
) -> None:
    scanner = new_integrator("branch-scan-prod", "branch_scan", "ingest:write")
    answer = upload(exchange(scanner))
    assert answer.status == 403
    assert 'expected "branch_scan"' in answer.json["error_description"]


@pytest.mark.parametrize("department", ["wholesale", "Retail", None])
def test_a_header_that_is_not_the_metadatas_department_is_refused(
    department: str | None, upload: Upload, token: str
) -> None:
    answer = upload(token, department=department)
    assert (answer.status, answer.json["error"]) == (422, "department_mismatch")
    found = "found 0" if department is None else f'found "{department}"'
    assert answer.json["error_description"].endswith(found)


@pytest.mark.parametrize(
    ("metadata", "found"),
    [
        (None, "found none"),
        ("retail", "expected a JSON object, found other text"),
        ("[1]", "found [1]"),
        ("[" * 10_000, "expected a JSON object, found other text"),
        (json.dumps({**METADATA, "size": 1}), "size"),
        (json.dumps({"source_tag": "vkyc"}), 'found "source_tag"'),
        (json.dumps({**METADATA, "external_id": 123}), "external_id: "),
        (json.dumps({**METADATA, "external_id": "../../etc/passwd"}), "../../etc/passwd"),
        (json.dumps({**METADATA, "external_id": "x" * 129}), "external_id: "),
        (json.dumps(METADATA)[:-1] + ', "source_tag": "vkyc"}', "twice"),
    ],
)
def test_malformed_metadata_is_named(
    metadata: str | None, found: str, upload: Upload, token: str
) -> None:
    answer = upload(token, metadata=metadata)
    assert (answer.status, answer.json["error"]) == (422, "invalid_metadata")
    assert found in answer.json["error_description"]


def test_a_missing_file_is_named(upload: Upload, token: str) -> None:
    answer = upload(token, file=None)
    assert answer.status == 422
    assert answer.json["error_description"].startswith("file: expected ")


def test_a_body_that_is_no_form_is_named(curl: Curl, ingest: IngestService, token: str) -> None:
    answer = curl(
        f"{ingest.url}/api/v1/ingest",
        *("-H", f"Authorization: Bearer {token}", "-H", "X-Approver-Department: retail"),
        *("-H", "Content-Type: application/json", "-d", json.dumps(METADATA)),
    )
    assert answer.status == 415
    assert "expected multipart/form-data" in answer.json["error_description"]


def test_a_charset_that_nobody_can_read_is_named(
    curl: Curl, ingest: IngestService, token: str
) -> None:
    part = 'Content-Disposition: form-data; name="metadata"\r\n\r\nä\r\n'
    answer = curl(
        f"{ingest.url}/api/v1/ingest",
        *("-H", f"Authorization: Bearer {token}", "-H", "X-Approver-Department: retail"),
        *("-H", "Content-Type: multipart/form-data; boundary=cut; charset=undefined"),
        *("--data-binary", f"--cut\r\n{part}--cut--\r\n"),
    )
    assert answer.status == 400
    assert "charset=utf-8" in answer.json["error_description"]


def test_an_upload_above_ten_mebibytes_is_refused_and_leaves_nothing(
    upload: Upload, token: str, ingest: IngestService, tmp_path: Path
) -> None:
    large = tmp_path / "large.pdf"
    with large.open("wb") as file:
        file.truncate(10 * 1024 * 1024)
    before = sorted(ingest.data_dir.iterdir())
    answer = upload(token, file=large)
    assert answer.status == 413
    assert "expected a request of at most 10485760 bytes" in answer.json["error_description"]
    assert sorted(ingest.data_dir.iterdir()) == before


@pytest.fixture
def search(curl: Curl, ingest: IngestService) -> Callable[..., CurlAnswer]:
    """`search(token, "name=value", …)` asks for documents."""

    def run(token: str, *query: str) -> CurlAnswer:
        url = f"{ingest.url}/api/v1/search?{'&'.join(query)}"
        return curl("-H", f"Authorization: Bearer {token}", url)

    return run


def test_a_search_finds_the_newest_documents_of_ones_own_source_system_alone(
    upload: Upload,
    search: Callable[..., CurlAnswer],
    token: str,
    exchange: Exchange,
    new_integrator: Callable[..., Integrator],
) -> None:
    branch = exchange(
        new_integrator("branch-search", "branch_search", "ingest:write", "search:read")
    )
    audit = exchange(new_integrator("audit-search", "audit", "search:read", "search:all"))
    uploaded: list[str] = []
    for who, source_tag, external_id in (
        (token, "vkyc", "search-1"),
        (branch, "branch_search", "search-1"),
        (token, "vkyc", "search-2"),
        (token, "vkyc", "search-1"),
    ):
        metadata = {**METADATA, "source_tag": source_tag, "external_id": external_id}
        answer = upload(who, metadata=json.dumps(metadata))
        assert answer.status == 201, answer.body
        uploaded.append(answer.json["document_id"])

    def found(who: str, *query: str) -> list[str]:
        answer = search(who, *query)
        assert answer.status == 200, answer.body
        return [document["document_id"] for document in answer.json["documents"]]

    first, foreign, second, third = uploaded
    assert found(token, "external_id=search-1") == [third, first]
    assert found(token, "external_id=search-1", "limit=1") == [third]
    assert found(token)[:3] == [third, second, first]
    assert found(branch) == [foreign]
    assert found(audit, "external_id=search-1") == [third, foreign, first]
    assert found(audit, "external_id=search-1", "department=wholesale") == []
    assert found(token, "document_category=kyc_vkyc", "department=retail")[:1] == [third]


def test_a_search_needs_its_scope(
    search: Callable[..., CurlAnswer], exchange: Exchange, vkyc: Integrator
) -> None:
    answer = search(exchange(vkyc, scope="ingest:write"))
    assert answer.status == 403
    assert 'scope="search:read"' in answer.headers["WWW-Authenticate"]


@pytest.mark.parametrize(
    "query",
    [
        *("limit=0", "limit=101", "limit=x", "limit=", "external_id=", "department=a%20b"),
        *("source_system=branch_scan", "external_id=a&external_id=b"),
    ],
)
def test_a_query_that_cannot_be_read_is_named(
    query: str, search: Callable[..., CurlAnswer], token: str
) -> None:
    answer = search(token, query)
    assert (answer.status, answer.json["error"]) == (422, "invalid_query")


def test_health_and_metrics_need_no_token(curl: Curl, ingest: IngestService) -> None:
    assert curl(f"{ingest.url}/healthz").json == {"alive": True}
    assert curl(f"{ingest.url}/metrics").headers["Content-Type"].startswith("text/plain")


def _fetches(curl: Curl, ingest: IngestService) -> int:
    metrics = curl(f"{ingest.url}/metrics").body
    found = re.search(r'^privyseal_verifier_fetches_total\{issuer="[^"]+"\} (\d+)', metrics, re.M)
    assert found is not None, metrics
    return int(found[1])
