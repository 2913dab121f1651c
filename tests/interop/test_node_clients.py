"""`jose` and `oauth4webapi` on Node, unmodified, at the versions that `node/` locks.

It must not run where their packages cannot be had.
"""

import json
import subprocess
from typing import Any

import pytest

from tests.interop.conftest import Authority, Exchange, Integrator, Node

AUDIENCE = "http://127.0.0.1:8081"


def test_jose_fetches_the_keys_and_verifies(
    node: Node, authority: Authority, exchange: Exchange, vkyc: Integrator
) -> None:
    verified = _output(_jose(node, authority, exchange(vkyc), AUDIENCE))
    assert {*verified["header"]} == {"alg", "typ", "kid"}
    assert verified["claims"]["sub"] == verified["claims"]["client_id"] == vkyc.id
    assert verified["claims"]["source_system"] == "vkyc"


def test_jose_refuses_the_token_at_another_audience(
    node: Node, authority: Authority, exchange: Exchange, vkyc: Integrator
) -> None:
    refused = _jose(node, authority, exchange(vkyc), "https://search.example")
    assert refused.returncode != 0
    assert "ERR_JWT_CLAIM_VALIDATION_FAILED" in refused.stderr


@pytest.mark.parametrize("method", ["ClientSecretBasic", "ClientSecretPost"])
def test_oauth4webapi_discovers_exchanges_and_validates(
    method: str, node: Node, authority: Authority, vkyc: Integrator
) -> None:
    got = _output(_oauth4webapi(node, authority, method, vkyc))
    assert got["answer"]["token_type"] == "bearer"  # oauth4webapi puts it in lower case
    assert got["answer"]["scope"] == got["claims"]["scope"] == "ingest:write"
    assert got["claims"]["service_user"] == "vkyc-prod"


@pytest.mark.parametrize("method", ["ClientSecretBasic", "ClientSecretPost"])
def test_oauth4webapi_understands_that_a_scope_is_refused(
    method: str, node: Node, authority: Authority, vkyc: Integrator
) -> None:
    refused = _oauth4webapi(node, authority, method, vkyc, scope="ingest:delete")
    assert refused.returncode != 0
    assert "error: 'invalid_scope'" in refused.stderr


@pytest.mark.parametrize("method", ["ClientSecretBasic", "ClientSecretPost"])
def test_oauth4webapi_understands_that_a_secret_is_wrong(
    method: str, node: Node, authority: Authority, vkyc: Integrator
) -> None:
    refused = _oauth4webapi(node, authority, method, vkyc, clientSecret="wrong")
    assert refused.returncode != 0
    # Of a 401 it reads the challenge and not the body.
    assert "OAUTH_WWW_AUTHENTICATE_CHALLENGE" in refused.stderr
    assert "scheme: 'basic'" in refused.stderr


def _jose(
    node: Node, authority: Authority, access_token: str, audience: str
) -> "subprocess.CompletedProcess[str]":
    return node(
        "jose.mjs",
        jwksUri=f"{authority.issuer}/.well-known/jwks.json",
        issuer=authority.issuer,
        audience=audience,
        accessToken=access_token,
    )


def _oauth4webapi(
    node: Node, authority: Authority, method: str, vkyc: Integrator, **changed: str
) -> "subprocess.CompletedProcess[str]":
    given = {
        "issuer": authority.issuer,
        "audience": AUDIENCE,
        "scope": "ingest:write",
        "method": method,
        "clientId": vkyc.client_id,
        "clientSecret": vkyc.client_secret,
    }
    return node("oauth4webapi.mjs", **{**given, **changed})


def _output(done: "subprocess.CompletedProcess[str]") -> Any:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
