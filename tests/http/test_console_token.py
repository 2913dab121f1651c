"""The Token and the Upload page: who may mint for whom, and what of it is on record."""

import asyncio
import contextlib
import gzip
import html
import re
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from typing import Any, TypeAlias

import asyncpg
import httpx
import jwt
import pytest

from service.authority.model import AdminScope
from service.console import ingest_client, upload
from service.settings import Settings
from tests.http.console_client import ConsoleClient

pytestmark = pytest.mark.anyio

Credential: TypeAlias = tuple[str, str]
Enrol: TypeAlias = Callable[..., Awaitable[Credential]]
Records: TypeAlias = Callable[..., Awaitable[list[dict[str, Any]]]]
SQL: TypeAlias = Callable[..., Awaitable[list[asyncpg.Record]]]
AtConsole: TypeAlias = Callable[..., Awaitable[ConsoleClient]]

INGEST = "http://127.0.0.1:8081"
TOKEN = re.compile(r'<pre id="token"[^>]*>([A-Za-z0-9_.-]+)</pre>')
SAMPLES = re.compile(r'<pre id="(?:python|node)".*?</pre>', re.DOTALL)
PAGES = pytest.mark.parametrize("where", ["/token", "/upload"])


@pytest.fixture
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    """The defaults, changed as the test says."""
    changed: dict[str, Any] = getattr(request, "param", {})
    return Settings(checkpoint_dir=tmp_path / "checkpoints", **changed)


def token_of(answer: httpx.Response) -> str:
    """The token that a page shows."""
    assert answer.status_code == 200, words(answer)
    found = TOKEN.search(answer.text)
    assert found, answer.text
    return found[1]


def claims_of(token: str) -> dict[str, Any]:
    return jwt.decode(token, options={"verify_signature": False})


def words(answer: httpx.Response) -> str:
    """The text of a page."""
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", answer.text)).split())


def form(**fields: Any) -> dict[str, Any]:
    """The Upload page's form, changed as given."""
    return {
        "department": "retail",
        "category": "kyc_vkyc",
        "external_id": "session-123",
        "file_name": "document.pdf",
        **fields,
    }


async def test_a_minted_token_is_shown_once_and_on_record(
    operator_at_console: ConsoleClient,
    vkyc: Credential,
    operator_credential: Credential,
    records: Records,
) -> None:
    asked = await operator_at_console.get("/token?service_user=vkyc-prod")
    assert asked.status_code == 200
    answer = await operator_at_console.post(
        f"/token/{vkyc[0]}", {"scope": ["ingest:write", "search:read"]}
    )
    token = token_of(answer)
    claims = claims_of(token)
    assert (claims["sub"], claims["aud"]) == (vkyc[0], INGEST)
    assert claims["scope"] == "ingest:write search:read"
    assert claims["act"] == {"sub": operator_credential[0]}
    assert answer.headers["cache-control"] == "no-store"
    assert "data-secret" in answer.text
    assert f'"jti": "{claims["jti"]}"' in html.unescape(answer.text)
    assert '"alg": "RS256"' in html.unescape(answer.text)
    assert f"/console/service-users/{vkyc[0]}#credentials" in answer.text
    (record,) = await records(jti=claims["jti"])
    assert (record["action"], record["actor_id"]) == ("token.mint", operator_credential[0])

    again = await operator_at_console.get(f"/token/{vkyc[0]}")
    assert again.headers["location"] == f"/console/token?service_user={vkyc[0]}"


async def test_a_token_is_narrowed_to_what_was_ticked(
    operator_at_console: ConsoleClient, enrol: Enrol
) -> None:
    audiences = [INGEST, "https://search.example"]
    wide = await enrol("wide", scopes=["ingest:write", "search:read"], audiences=audiences)
    asked = await operator_at_console.get(f"/token?service_user={wide[0]}")
    assert asked.text.count("checked") == 3  # both scopes, and the first audience
    answer = await operator_at_console.post(
        f"/token/{wide[0]}", {"scope": "search:read", "audience": audiences[1]}
    )
    claims = claims_of(token_of(answer))
    assert (claims["scope"], claims["aud"]) == ("search:read", audiences[1])


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"scope": ["ingest:write", "audit:read"]}, "Not granted for"),
        ({}, "Granted: ingest:write search:read."),
        ({"scope": "ingest:write", "audience": "https://elsewhere.example"}, "may ask for tokens"),
    ],
)
async def test_a_scope_or_an_audience_beyond_the_grant_is_refused_beside_the_form(
    fields: dict[str, Any],
    told: str,
    operator_at_console: ConsoleClient,
    vkyc: Credential,
    records: Records,
) -> None:
    answer = await operator_at_console.post(f"/token/{vkyc[0]}", fields)
    assert answer.status_code == 422
    assert told in words(answer)
    assert "Make a token" in words(answer)
    assert TOKEN.search(answer.text) is None
    (record,) = await records(service_user=vkyc[0], action="token.mint")
    assert record["outcome"] == "refused"


@PAGES
async def test_nobody_mints_for_operators_the_disabled_or_the_unknown(
    where: str,
    operator_at_console: ConsoleClient,
    operator: httpx.AsyncClient,
    operator_credential: Credential,
    vkyc: Credential,
    records: Records,
) -> None:
    own = await operator_at_console.post(f"{where}/{operator_credential[0]}", form())
    assert own.status_code == 403
    assert "are not made by hand" in words(own)
    assert (await operator.post(f"/api/v1/service-users/{vkyc[0]}/disable")).status_code == 200
    for answer in (
        await operator_at_console.get(f"{where}?service_user=vkyc-prod"),
        await operator_at_console.post(f"{where}/{vkyc[0]}", form()),
    ):
        assert answer.status_code == 403
        assert "vkyc-prod is disabled. Enable it first." in words(answer)
    unknown = await operator_at_console.get(f"{where}?service_user=nobody-here")
    assert (unknown.status_code, 'value="nobody-here"' in unknown.text) == (404, True)
    nobody = await operator_at_console.post(f"{where}/su_{'a' * 24}", form())
    assert nobody.status_code == 404
    (record,) = await records(service_user=vkyc[0], action="token.mint")
    assert (record["outcome"], record["reason"]) == ("refused", "insufficient_scope")


@PAGES
@pytest.mark.parametrize(
    "typed", ["%00", "%E2%80%AE", "VKYC", "' OR 1=1", "a" * 3000, "vkyc-prod~"]
)
async def test_what_can_be_no_name_is_nobodys(
    where: str, typed: str, operator_at_console: ConsoleClient, vkyc: Credential
) -> None:
    answer = await operator_at_console.get(f"{where}?service_user={typed}")
    assert answer.status_code == 404
    assert "No service user has this name." in words(answer)


@PAGES
async def test_an_operator_needs_the_right_to_mint(
    where: str, enrol_operator: Enrol, at_console: AtConsole, vkyc: Credential
) -> None:
    reader = await at_console(
        await enrol_operator("reader", *{*AdminScope} - {AdminScope.TOKENS_MINT})
    )
    for answer in (
        await reader.get(where),
        await reader.get(f"{where}?service_user=vkyc-prod"),
        await reader.post(f"{where}/{vkyc[0]}", form()),
        await reader.get("/token/names"),
    ):
        assert answer.status_code == 403
        assert "This takes a token with the scope tokens:mint." in words(answer)


@PAGES
async def test_who_mints_without_reading_the_list_needs_to_know_the_id(
    where: str, enrol_operator: Enrol, at_console: AtConsole, vkyc: Credential
) -> None:
    minter = await at_console(await enrol_operator("minter", AdminScope.TOKENS_MINT))
    by_name = await minter.get(f"{where}?service_user=vkyc-prod")
    assert by_name.status_code == 403
    assert "service-users:read" in words(by_name)
    assert "<option" not in by_name.text
    assert (await minter.get("/token/names?beginning=vkyc")).text == ""
    assert (await minter.get(f"{where}?service_user={vkyc[0]}")).status_code == 200


async def test_names_are_offered_by_their_beginning(
    operator_at_console: ConsoleClient, sql: SQL, vkyc: Credential
) -> None:
    await sql(
        """INSERT INTO service_users SELECT 'su_' || lpad(translate(i::text, '0189', 'wxyz'), 24,
               'a'), 'scan-' || lpad(i::text, 3, '0'), 'scan', '', '', '', '{}', '{urn:x}', 900,
               'active', 1, now() FROM generate_series(1, 200) i"""
    )
    offered = await operator_at_console.get("/token/names?beginning=scan-1")
    assert offered.text.split() == [f"scan-{number}" for number in range(100, 150)]
    assert (await operator_at_console.get("/token/names?beginning=vk")).text == "vkyc-prod"
    for none in ("x", "VK", "%25", "'"):
        assert (await operator_at_console.get(f"/token/names?beginning={none}")).text == ""
    page = await operator_at_console.get("/token")
    assert page.text.count("<option") == 50


# An integrator, for itself


async def test_an_integrator_mints_for_itself_alone(
    at_console: AtConsole, vkyc: Credential, enrol: Enrol, records: Records
) -> None:
    other = await enrol("other", scopes=["ingest:write"])
    integrator = await at_console(vkyc)
    for asked in ("/token", "/token?service_user=other", f"/upload?service_user={other[0]}"):
        answer = await integrator.get(asked)
        assert answer.status_code == 200
        assert "vkyc-prod" in words(answer)
        assert other[0] not in answer.text
    scopes = {"scope": ["ingest:write", "search:read"]}
    claims = claims_of(token_of(await integrator.post(f"/token/{vkyc[0]}", scopes)))
    assert (claims["sub"], claims["act"]) == (vkyc[0], {"sub": vkyc[0]})
    (record,) = await records(jti=claims["jti"])
    assert record["action"] == "token.mint"
    assert record["credential_id"] == record["actor_credential_id"] is not None

    for where in ("token", "upload"):
        beyond = await integrator.post(f"/{where}/{other[0]}", form(scope="ingest:write"))
        assert beyond.status_code == 403
        assert "Tokens of others take the scope tokens:mint." in words(beyond)
        assert "Bearer" not in beyond.text
    assert (await integrator.get("/token/names?beginning=o")).text == ""


async def test_no_token_begets_another_for_itself(
    enrol: Enrol, client: httpx.AsyncClient, at_console: AtConsole, settings: Settings
) -> None:
    curious = await enrol("curious", audiences=[settings.api_audience])
    exchanged = await client.post(
        "/oauth/token", auth=curious, data={"grant_type": "client_credentials"}
    )
    integrator = await at_console(curious)
    minted = token_of(await integrator.post(f"/token/{curious[0]}"))
    mint = f"/api/v1/service-users/{curious[0]}/tokens"
    for token, status in ((exchanged.json()["access_token"], 403), (minted, 401)):
        bearer = {"Authorization": f"Bearer {token}"}
        assert (await client.post(mint, json={}, headers=bearer)).status_code == status


async def test_an_integrator_mints_no_longer_than_its_credential_lives(
    operator: httpx.AsyncClient, vkyc: Credential, at_console: AtConsole
) -> None:
    integrator = await at_console(vkyc)
    assert (await integrator.post(f"/token/{vkyc[0]}", {"scope": "search:read"})).status_code == 200
    credentials = f"/api/v1/service-users/{vkyc[0]}/credentials"
    (held,) = (await operator.get(credentials)).json()["credentials"]
    revoked = await operator.post(f"{credentials}/{held['id']}/revoke")
    assert revoked.json()["live_tokens"]["count"] == 2  # the session, and what was minted in it
    refused = await integrator.post(f"/token/{vkyc[0]}", {"scope": "search:read"})
    assert refused.status_code == 401
    assert TOKEN.search(refused.text) is None


async def test_a_form_that_waited_for_a_sign_in_still_mints(
    at_console: AtConsole, operator_credential: Credential, vkyc: Credential
) -> None:
    operator = await at_console(operator_credential)
    operator.cookie = None
    waiting = await operator.post(f"/upload/{vkyc[0]}", form(department="wholesale"))
    assert waiting.status_code == 401
    kept = {
        html.unescape(name): html.unescape(value)
        for name, value in re.findall(r'name="(kept:[^"]+)" value="([^"]*)"', waiting.text)
    }
    resumed = await operator.sign_in(operator_credential, next=f"/console/upload/{vkyc[0]}", **kept)
    assert "wholesale" in words(resumed)


# The Upload page


async def test_a_fresh_token_stands_in_the_command(
    operator_at_console: ConsoleClient, vkyc: Credential
) -> None:
    answer = await operator_at_console.post(f"/upload/{vkyc[0]}", form(department="wholesale"))
    assert answer.status_code == 200
    found = re.search(r'<pre id="curl"[^>]*data-secret>(.*?)</pre>', answer.text, re.DOTALL)
    assert found
    command = html.unescape(found[1])
    token = re.search(r"Bearer ([A-Za-z0-9_.-]+)'", command)
    assert token
    assert claims_of(token[1])["aud"] == INGEST
    assert command.replace(token[1], "TOKEN").splitlines() == [
        "curl -sS -X POST 'http://127.0.0.1:8081/api/v1/ingest' \\",
        "  -H 'Authorization: Bearer TOKEN' \\",
        "  -H 'X-Approver-Department: wholesale' \\",
        "  -F 'file=@./document.pdf' \\",
        """  -F 'metadata={"source_tag":"vkyc","external_id":"session-123","""
        """"document_category":"kyc_vkyc","department":"wholesale"}'""",
    ]
    # Nowhere else: what an application shall hold is a credential.
    assert answer.text.count(token[1]) == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("department", ""),
        ("department", "a'; rm -rf ~ #"),
        ("category", "x" * 129),
        ("external_id", '"><script>alert(1)</script>'),
        ("external_id", "-x"),
        ("file_name", ""),
        ("file_name", "x" * 201),
    ],
)
async def test_what_the_ingest_service_would_not_take_is_told_beside_the_field(
    field: str, value: str, operator_at_console: ConsoleClient, vkyc: Credential
) -> None:
    answer = await operator_at_console.post(f"/upload/{vkyc[0]}", form(**{field: value}))
    assert answer.status_code == 422
    assert (
        f'value="{html.escape(value).replace("&#x27;", "&#39;").replace("&quot;", "&#34;")}"'
        in (answer.text)
    )
    assert answer.text.count('aria-invalid="true"') == 1
    # What is there to be copied is fit to be run.
    right = await operator_at_console.get(f"/upload?service_user={vkyc[0]}")
    assert SAMPLES.findall(answer.text) == SAMPLES.findall(right.text) != []
    assert "Bearer ey" not in answer.text
    assert "<script>alert" not in answer.text


async def test_who_lacks_the_audience_of_the_ingest_service_is_told_so(
    operator_at_console: ConsoleClient, enrol: Enrol
) -> None:
    searcher = await enrol("searcher", audiences=["https://search.example"])
    asked = await operator_at_console.get("/upload?service_user=searcher")
    assert "searcher cannot upload." in words(asked)
    assert "Make the command" not in words(asked)
    sent = await operator_at_console.post(f"/upload/{searcher[0]}", form())
    assert sent.status_code == 422
    assert "Bearer ey" not in sent.text


@pytest.mark.parametrize(
    "settings",
    [{"audience": "urn:bank:ingest"}, {"audience": "http://ingest.example"}],
    indirect=True,
)
async def test_an_audience_that_is_no_address_for_tokens_names_the_setting(
    operator_at_console: ConsoleClient, vkyc: Credential
) -> None:
    asked = await operator_at_console.get("/upload?service_user=vkyc-prod")
    assert "Set PRIVYSEAL_INGEST_URL" in words(asked)
    sent = await operator_at_console.post(f"/upload/{vkyc[0]}", form())
    assert sent.status_code == 422


# A try

STRANGE = socket.create_server(("127.0.0.1", 0))
STRANGE_URL = f"http://127.0.0.1:{STRANGE.getsockname()[1]}/api/v1/ingest"
at_a_strange_service = pytest.mark.parametrize(
    "settings", [{"ingest_url": STRANGE_URL}], indirect=True
)


@pytest.fixture
async def strange(monkeypatch: pytest.MonkeyPatch) -> AsyncGenerator[list[bytes], None]:
    """A service that answers every connection with the last of these, and puts what it got
    before it. It reports nothing: there is no record to wait for."""
    monkeypatch.setattr(upload, "RECORD_PATIENCE", 0.3)
    said: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        received = await reader.readuntil(b"%%EOF\n\r\n--")
        said.insert(0, received)
        with contextlib.suppress(ConnectionError):
            writer.write(said[-1])
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, sock=STRANGE.dup())
    yield said
    server.close()
    await server.wait_closed()


async def tried(person: ConsoleClient, credential: Credential) -> httpx.Response:
    answer = await person.post(f"/upload/{credential[0]}", form(**{"try": "1"}))
    assert answer.status_code == 200
    return answer


@at_a_strange_service
async def test_a_try_sends_what_the_command_sends(
    operator_at_console: ConsoleClient, vkyc: Credential, strange: list[bytes]
) -> None:
    strange.append(b'HTTP/1.1 201 Created\r\nContent-Length: 13\r\n\r\n{"size": 300}')
    answer = await tried(operator_at_console, vkyc)
    received = strange[0].decode("latin-1")
    command = html.unescape(answer.text)
    token = re.search(r"Bearer ([A-Za-z0-9_.-]+)'", command)
    assert token
    assert received.startswith("POST /api/v1/ingest HTTP/1.1")
    assert f"Authorization: Bearer {token[1]}" in received
    assert "X-Approver-Department: retail" in received
    assert '{"source_tag":"vkyc",' in received
    assert "201 Created" in words(answer)
    assert '"size": 300' in words(answer)
    assert "No call with this token is on record yet." in words(answer)


@at_a_strange_service
async def test_a_try_follows_no_redirect(
    operator_at_console: ConsoleClient, vkyc: Credential, strange: list[bytes]
) -> None:
    strange.append(
        f"HTTP/1.1 307 Temporary Redirect\r\nLocation: {STRANGE_URL}/on\r\n"
        "Content-Length: 0\r\n\r\n".encode()
    )
    answer = await tried(operator_at_console, vkyc)
    assert "307 Temporary Redirect" in words(answer)
    assert "nothing follows" in words(answer)
    assert len(strange) == 2


@at_a_strange_service
async def test_an_answer_is_bounded_and_shown_as_text(
    operator_at_console: ConsoleClient, vkyc: Credential, strange: list[bytes]
) -> None:
    hostile = "<script>alert(1)</script>\u202e\x1b[2J".encode() + b"x" * 1_000_000
    strange.append(b"HTTP/1.1 299 Odd\r\nContent-Length: 1000033\r\n\r\n" + hostile)
    answer = await tried(operator_at_console, vkyc)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;\\u202e\\x1b[2J" in answer.text
    assert "The rest of the answer was not read." in words(answer)
    assert len(answer.content) < 100_000


@at_a_strange_service
async def test_a_compressed_answer_is_not_unpacked(
    operator_at_console: ConsoleClient, vkyc: Credential, strange: list[bytes]
) -> None:
    # Packed twice, a few kilobytes fill any memory.
    packed = gzip.compress(gzip.compress(b"unpacked" * 1000))
    strange.append(
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip, gzip\r\nContent-Length: %d\r\n\r\n"
        % len(packed)
        + packed
    )
    answer = await tried(operator_at_console, vkyc)
    assert "200 OK" in words(answer)
    assert "unpacked" not in answer.text
    assert b"accept-encoding: identity" in strange[0].lower()


@at_a_strange_service
@pytest.mark.parametrize(
    "said", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nx", b"SSH-2.0\r\n"]
)
async def test_a_service_that_breaks_off_is_told_in_words(
    said: bytes, operator_at_console: ConsoleClient, vkyc: Credential, strange: list[bytes]
) -> None:
    strange.append(said)
    answer = await tried(operator_at_console, vkyc)
    assert f"The connection to {STRANGE_URL} broke" in words(answer)


@pytest.mark.parametrize(
    "settings", [{"ingest_url": "http://127.0.0.1:9/api/v1/ingest"}], indirect=True
)
async def test_an_ingest_service_that_is_away_is_told_in_words(
    operator_at_console: ConsoleClient, vkyc: Credential
) -> None:
    answer = await tried(operator_at_console, vkyc)
    assert "Nothing could be reached at http://127.0.0.1:9/api/v1/ingest" in words(answer)


@at_a_strange_service
async def test_an_ingest_service_that_hangs_is_given_up(
    operator_at_console: ConsoleClient, vkyc: Credential, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The listener takes the connection, and nobody reads from it.
    monkeypatch.setattr(ingest_client, "DEADLINE", 0.5)
    answer = await tried(operator_at_console, vkyc)
    assert "gave no answer within" in words(answer)
