"""`openapi.yaml` against the code, and the running authority against `openapi.yaml`.

It must not restate the description.
"""

# Parts of schemathesis are generic without saying in what.
# pyright: reportUnknownMemberType=false, reportUntypedFunctionDecorator=false
import contextlib
import subprocess
import sys
import time
from base64 import b64encode
from collections.abc import Callable, Generator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeAlias

import httpx
import pytest
import schemathesis
import yaml
from hypothesis import HealthCheck, settings
from schemathesis import Case
from schemathesis.config import SchemathesisConfig

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "openapi.yaml"

Credential: TypeAlias = tuple[str, str]

QUIET = (HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much)
bounded = settings(max_examples=15, derandomize=True, deadline=None, suppress_health_check=QUIET)
# RFC 6585 §3 has a status of its own for a missing If-Match: 428.
CONFIG = SchemathesisConfig.from_dict(
    {
        "checks": {
            "missing_required_header": {"expected-statuses": [400, 401, 403, 406, 415, 422, 428]}
        }
    }
)
schema = schemathesis.openapi.from_path(DOCUMENT, config=CONFIG)


def test_openapi_yaml_is_what_the_code_has() -> None:
    generated = subprocess.run(
        [sys.executable, "deploy/openapi.py"], cwd=ROOT, capture_output=True, check=True, timeout=60
    )
    assert generated.stdout.decode() == DOCUMENT.read_text("utf-8"), "run: make openapi"


@pytest.mark.anyio
async def test_the_served_description_is_that_of_openapi_yaml(client: httpx.AsyncClient) -> None:
    served = await client.get("/schema/openapi.json")
    assert served.json() == yaml.safe_load(DOCUMENT.read_text("utf-8"))


@pytest.fixture
def api(live_server: tuple[str, Credential]) -> Generator[httpx.Client, None, None]:
    """A client with a token of the operator."""
    url, operator = live_server
    grant = {"grant_type": "client_credentials"}
    token = httpx.post(f"{url}/oauth/token", auth=operator, data=grant).json()["access_token"]
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {token}"}) as client:
        yield client


@pytest.fixture
def call(live_server: tuple[str, Credential], api: httpx.Client) -> Callable[[Case[Any]], None]:
    """Send a case with what its operation takes, and run every check on the answer."""
    url, (client_id, client_secret) = live_server
    basic = b64encode(f"{client_id}:{client_secret}".encode()).decode()

    def checked(case: Case[Any]) -> None:
        if isinstance(case.body, dict):
            say_what_a_schema_cannot(case.body)
        authorization = f"Basic {basic}"
        if case.path.startswith("/api/"):
            authorization = api.headers["Authorization"]
        case.call_and_validate(base_url=url, headers={"Authorization": authorization})

    return checked


def say_what_a_schema_cannot(body: dict[str, Any]) -> None:
    """A time lies ahead, and 900.0 is no integer, whatever JSON Schema says of it."""
    with contextlib.suppress(LookupError, TypeError, ValueError):
        datetime.fromisoformat(body["expires_at"])
        body["expires_at"] = f"{datetime.now(UTC) + timedelta(days=1):%FT%TZ}"
    if isinstance(lifetime := body.get("token_lifetime"), float) and lifetime.is_integer():
        body["token_lifetime"] = int(lifetime)


@schema.parametrize()
@bounded
def test_the_authority_does_what_openapi_yaml_says(
    case: Case[Any], call: Callable[[Case[Any]], None]
) -> None:
    call(case)


@schema.include(path_regex="service_user_id").exclude(path_regex="tokens").parametrize()
@bounded
def test_it_does_so_for_a_service_user_that_exists(
    case: Case[Any], call: Callable[[Case[Any]], None], api: httpx.Client
) -> None:
    if case.meta is None or case.meta.generation.mode.is_positive:
        body = {"name": f"user-{time.time_ns()}", "source_system": "vkyc"}
        user = api.post("/api/v1/service-users", json=body)
        case.path_parameters["service_user_id"] = user.json()["id"]
        if "If-Match" in case.headers:
            case.headers["If-Match"] = user.headers["ETag"]
    call(case)
