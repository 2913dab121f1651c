"""curl as integrators use it: the exchange, and what the audit log says of it.

It must not use any other client for what curl can do.
"""

import uuid
from collections.abc import Callable

import httpx
import pytest

from tests.interop.conftest import Authority, Curl, CurlAnswer, Integrator


def _as_basic(curl: Curl, issuer: str, vkyc: Integrator, *more: str) -> CurlAnswer:
    credential = f"{vkyc.client_id}:{vkyc.client_secret}"
    form = ("-d", "grant_type=client_credentials")
    return curl(f"{issuer}/oauth/token", "-u", credential, *form, *more)


def _as_post(curl: Curl, issuer: str, vkyc: Integrator, *more: str) -> CurlAnswer:
    form = (
        *("-d", "grant_type=client_credentials"),
        *("-d", f"client_id={vkyc.client_id}"),
        *("--data-urlencode", f"client_secret={vkyc.client_secret}"),
    )
    return curl(f"{issuer}/oauth/token", *form, *more)


Post = Callable[..., CurlAnswer]
either_way = pytest.mark.parametrize("post", [_as_basic, _as_post], ids=["basic", "post"])


@either_way
def test_an_exchange_answers_as_the_standard_says(
    post: Post, curl: Curl, authority: Authority, vkyc: Integrator
) -> None:
    answer = post(curl, authority.issuer, vkyc)
    assert answer.status == 200
    # RFC 6749 §5.1.
    assert answer.headers["Content-Type"].startswith("application/json")
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.headers["Pragma"] == "no-cache"
    assert answer.json["token_type"] == "Bearer"
    assert answer.json["expires_in"] == 900
    assert set(answer.json["scope"].split()) == {"ingest:write", "search:read"}
    assert answer.json["access_token"].count(".") == 2


@either_way
def test_scope_and_resource_narrow_a_token(
    post: Post, curl: Curl, authority: Authority, vkyc: Integrator
) -> None:
    narrowed = ("-d", "scope=search:read", "-d", "resource=http://127.0.0.1:8081")
    assert post(curl, authority.issuer, vkyc, *narrowed).json["scope"] == "search:read"
    beyond = post(curl, authority.issuer, vkyc, "-d", "scope=ingest:delete")
    assert (beyond.status, beyond.json["error"]) == (400, "invalid_scope")
    elsewhere = post(curl, authority.issuer, vkyc, "-d", "resource=https://elsewhere.example")
    assert (elsewhere.status, elsewhere.json["error"]) == (400, "invalid_target")


def test_a_wrong_secret_is_a_challenge_to_authenticate(
    curl: Curl, authority: Authority, vkyc: Integrator
) -> None:
    answer = curl(
        f"{authority.issuer}/oauth/token",
        *("-u", f"{vkyc.client_id}:wrong", "-d", "grant_type=client_credentials"),
    )
    assert (answer.status, answer.json["error"]) == (401, "invalid_client")
    assert answer.headers["WWW-Authenticate"].startswith("Basic")


@either_way
def test_the_audit_log_has_an_exchange_under_its_request_id(
    post: Post, curl: Curl, authority: Authority, vkyc: Integrator, operator: httpx.Client
) -> None:
    request_id = f"interop-{uuid.uuid4()}"
    answer = post(curl, authority.issuer, vkyc, "-H", f"X-Request-Id: {request_id}")
    assert answer.headers["X-Request-Id"] == request_id
    found = operator.get("/audit-records", params={"request_id": request_id})
    assert found.status_code == 200, found.text
    (record,) = found.json()["records"]
    assert (record["action"], record["outcome"]) == ("token.issue", "success")
    assert record["service_user"] == "vkyc-prod"
    assert record["source_system"] == "vkyc"
    assert record["client_address"] == "127.0.0.1"
    assert record["user_agent"].startswith("curl/")


def test_the_audit_log_has_a_refusal_under_the_request_id_that_the_client_was_given(
    curl: Curl,
    authority: Authority,
    new_integrator: Callable[..., Integrator],
    operator: httpx.Client,
) -> None:
    # Nobody else's refusals: equal ones of one client share a record.
    reader = new_integrator("reader", "doc_service", "search:read")
    answer = _as_basic(curl, authority.issuer, reader, "-d", "scope=ingest:write")
    assert (answer.status, answer.json["error"]) == (400, "invalid_scope")
    request_id = answer.headers["X-Request-Id"]
    found = operator.get("/audit-records", params={"request_id": request_id})
    (record,) = found.json()["records"]
    assert (record["action"], record["outcome"]) == ("token.issue", "refused")
    assert (record["service_user"], record["source_system"]) == ("reader", "doc_service")
