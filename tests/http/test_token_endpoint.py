"""`POST /oauth/token` as a client sees it (TRIALS T1-T7, T12) and as the audit log remembers it.

It must not look at how the form is parsed: only at what comes back and what is on record.
"""

import asyncio
import base64
import hashlib
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any, TypeAlias
from urllib.parse import quote, urlencode

import asyncpg
import httpx
import jwt
import pytest

pytestmark = pytest.mark.anyio

Credential: TypeAlias = tuple[str, str]
Enrol: TypeAlias = Callable[..., Awaitable[Credential]]
Records: TypeAlias = Callable[..., Awaitable[list[dict[str, Any]]]]
SQL: TypeAlias = Callable[..., Awaitable[list[asyncpg.Record]]]

URL = "/oauth/token"
FORM = "application/x-www-form-urlencoded"
GRANT = {"grant_type": "client_credentials"}
INGEST = "http://127.0.0.1:8081"
UNKNOWN = "su_aaaaaaaaaaaaaaaaaaaaaaaa"


def basic(client_id: str | bytes, client_secret: str | bytes) -> str:
    """HTTP Basic of these very bytes, form-encoded or not."""
    pair = [p.encode() if isinstance(p, str) else p for p in (client_id, client_secret)]
    return "Basic " + base64.b64encode(b":".join(pair)).decode()


async def post(
    client: httpx.AsyncClient,
    body: str | bytes,
    authorization: str | None = None,
    content_type: str | None = FORM,
    **headers: str,
) -> httpx.Response:
    """Post these very bytes."""
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    if authorization is not None:
        sent["authorization"] = authorization
    if content_type is not None:
        sent["content-type"] = content_type
    return await client.post(URL, content=body, headers=sent)


def refused(answer: httpx.Response) -> tuple[int, str]:
    """Status and code of a refusal that has the form of RFC 6749 §5.2 and gives nothing away."""
    body = answer.json()
    assert body.keys() == {"error", "error_description"}
    assert all(" " <= each <= "~" and each not in '"\\' for each in body["error_description"])
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["pragma"] == "no-cache"
    assert answer.headers["x-request-id"]
    assert ("www-authenticate" in answer.headers) == (answer.status_code == 401)
    return answer.status_code, body["error"]


async def test_t6_success_is_exactly_what_rfc_6749_has(
    client: httpx.AsyncClient, vkyc: Credential
) -> None:
    answer = await client.post(URL, auth=vkyc, data=GRANT)
    assert answer.status_code == 200
    assert answer.json() == {
        "access_token": answer.json()["access_token"],
        "token_type": "Bearer",
        "expires_in": 900,
        "scope": "ingest:write search:read",
    }
    assert {name for name, _ in answer.headers.multi_items()} == {
        "content-type",
        "content-length",
        "cache-control",
        "pragma",
        "x-request-id",
    }
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["pragma"] == "no-cache"


async def test_t6_failed_client_authentication_is_401_with_a_challenge(
    client: httpx.AsyncClient, vkyc: Credential
) -> None:
    answer = await client.post(URL, auth=(vkyc[0], "wrong"), data=GRANT)
    assert refused(answer) == (401, "invalid_client")
    assert answer.headers["www-authenticate"] == 'Basic realm="privyseal", charset="UTF-8"'


async def test_the_token_says_what_was_granted(client: httpx.AsyncClient, vkyc: Credential) -> None:
    before = int(time.time())
    answer = await client.post(URL, auth=vkyc, data=GRANT)
    token = answer.json()["access_token"]
    keys = {key["kid"] for key in (await client.get("/.well-known/jwks.json")).json()["keys"]}
    header = jwt.get_unverified_header(token)
    assert header == {"alg": "RS256", "typ": "at+jwt", "kid": header["kid"]}
    assert header["kid"] in keys
    claims = jwt.decode(token, options={"verify_signature": False})
    assert claims == {
        "iss": "http://127.0.0.1:8080",
        "sub": vkyc[0],
        "client_id": vkyc[0],
        "aud": INGEST,
        "iat": claims["iat"],
        "exp": claims["iat"] + 900,
        "jti": claims["jti"],
        "scope": "ingest:write search:read",
        "service_user": "vkyc-prod",
        "source_system": "vkyc",
    }
    assert before - 1 <= claims["iat"] <= time.time() + 1


async def test_client_secret_post_and_an_empty_parameter_work_alike(
    client: httpx.AsyncClient, vkyc: Credential
) -> None:
    body = {**GRANT, "client_id": vkyc[0], "client_secret": vkyc[1]}
    empty = {"scope": "", "resource": ""}
    for form in (body, {**body, **empty}, {**body, "unknown": "1", "audience": "x"}):
        answer = await client.post(URL, data=form)
        assert answer.status_code == 200
        assert answer.json()["scope"] == "ingest:write search:read"


async def test_scope_is_narrowed_to_what_was_asked_for_in_the_order_of_the_grant(
    client: httpx.AsyncClient, vkyc: Credential
) -> None:
    for asked, got in {
        "search:read": "search:read",
        "search:read ingest:write": "ingest:write search:read",
        "search:read search:read": "search:read",
    }.items():
        answer = await client.post(URL, auth=vkyc, data={**GRANT, "scope": asked})
        assert answer.json()["scope"] == got
        claims = jwt.decode(answer.json()["access_token"], options={"verify_signature": False})
        assert claims["scope"] == got


async def test_resource_chooses_the_audience_and_with_it_the_scopes(
    client: httpx.AsyncClient, enrol: Enrol, settings: Any
) -> None:
    both = await enrol(
        "both",
        scopes=["ingest:write", "service-users:read", "search:read"],
        audiences=["https://search.example", settings.api_audience],
    )
    default = await client.post(URL, auth=both, data=GRANT)
    named = await client.post(URL, auth=both, data={**GRANT, "resource": "https://search.example"})
    admin = await client.post(URL, auth=both, data={**GRANT, "resource": settings.api_audience})
    found = [
        (
            answer.json()["scope"],
            jwt.decode(answer.json()["access_token"], options={"verify_signature": False})["aud"],
        )
        for answer in (default, named, admin)
    ]
    assert found == [
        ("ingest:write search:read", "https://search.example"),
        ("ingest:write search:read", "https://search.example"),
        ("service-users:read", settings.api_audience),
    ]
    for scope, resource in (
        ("service-users:read", "https://search.example"),
        ("ingest:write", settings.api_audience),
    ):
        answer = await client.post(
            URL, auth=both, data={**GRANT, "scope": scope, "resource": resource}
        )
        assert refused(answer) == (400, "invalid_scope")


BEYOND = {
    "ungranted scope": ({"scope": "admin"}, "invalid_scope"),
    "one of two ungranted": ({"scope": "ingest:write admin"}, "invalid_scope"),
    "admin scope": ({"scope": "service-users:write"}, "invalid_scope"),
    "two spaces": ({"scope": "ingest:write  search:read"}, "invalid_scope"),
    "leading space": ({"scope": " ingest:write"}, "invalid_scope"),
    "only a space": ({"scope": " "}, "invalid_scope"),
    "quote": ({"scope": 'ingest:"write"'}, "invalid_scope"),
    "non-ASCII scope": ({"scope": "ingest:wr\xefte"}, "invalid_scope"),
    "overlong scope": ({"scope": "s" * 4000}, "invalid_scope"),
    "other case": ({"scope": "Ingest:write"}, "invalid_scope"),
    "ungranted resource": ({"resource": "https://other.example"}, "invalid_target"),
    "admin API": ({"resource": "http://127.0.0.1:8080/api/v1"}, "invalid_target"),
    "trailing slash": ({"resource": INGEST + "/"}, "invalid_target"),
    "prefix": ({"resource": INGEST[:-1]}, "invalid_target"),
    "fragment": ({"resource": INGEST + "#x"}, "invalid_target"),
    "relative": ({"resource": "/api"}, "invalid_target"),
    "two in one": ({"resource": f"{INGEST} {INGEST}"}, "invalid_target"),
    "overlong resource": ({"resource": INGEST + "/" + "r" * 4000}, "invalid_target"),
}


async def test_t12_scope_and_audience_beyond_the_grant_are_refused_and_say_what_is_granted(
    client: httpx.AsyncClient, vkyc: Credential, records: Records
) -> None:
    for name, (form, error) in BEYOND.items():
        answer = await client.post(URL, auth=vkyc, data={**GRANT, **form})
        assert refused(answer) == (400, error), name
        assert len(answer.content) < 500, name
    answer = await client.post(URL, auth=vkyc, data={**GRANT, "scope": "admin"})
    assert "Granted: ingest:write search:read." in answer.json()["error_description"]
    await records(len(BEYOND) + 1, outcome="refused")


async def test_t12_line_breaks_are_refused_and_never_reflected(
    client: httpx.AsyncClient, vkyc: Credential, records: Records
) -> None:
    for name in ("grant_type", "scope", "resource", "client_id", "client_secret", "x\r\nSet-X"):
        form = {**GRANT, name: "a\r\nX-Evil: 1"}
        answer = await client.post(URL, data=form)
        assert refused(answer) == (400, "invalid_request"), name
        assert "evil" not in str(answer.headers).lower() + answer.text.lower()
    answer = await client.post(
        URL,
        auth=vkyc,
        data={**GRANT, "scope": "x"},
        headers={
            b"X-Request-Id": b"a\r\nX-Evil: 1",
            b"User-Agent": b"a\r\nb\x1b[31m\xff" + b"c" * 500,
        },
    )
    assert "evil" not in str(answer.headers).lower()
    (record,) = await records(reason="invalid_scope")
    assert record["user_agent"] == ("a??b?[31m?" + "c" * 500)[:200]


async def test_t1_two_ways_of_client_authentication_are_refused(
    client: httpx.AsyncClient, vkyc: Credential, records: Records
) -> None:
    in_body = {"client_id": vkyc[0], "client_secret": vkyc[1]}
    other_id = {"client_id": UNKNOWN}
    other_secret = {"client_secret": vkyc[1]}
    for extra in (in_body, other_id, other_secret, {"client_id": vkyc[0].upper()}):
        answer = await client.post(URL, auth=vkyc, data={**GRANT, **extra})
        assert refused(answer) == (400, "invalid_request"), extra
    twice = [("Authorization", basic(*vkyc))] * 2
    answer = await client.post(URL, data=GRANT, headers=twice)
    assert refused(answer) == (400, "invalid_request")
    different = [("Authorization", basic(*vkyc)), ("authorization", basic(UNKNOWN, "x"))]
    answer = await client.post(URL, data=GRANT, headers=different)
    assert refused(answer) == (400, "invalid_request")
    await records(6, reason="invalid_request")
    same_id = await client.post(URL, auth=vkyc, data={**GRANT, "client_id": vkyc[0]})
    assert same_id.status_code == 200


async def test_t1_no_client_authentication_is_invalid_client(
    client: httpx.AsyncClient, vkyc: Credential
) -> None:
    for form, authorization in (
        ({}, None),
        ({"client_id": vkyc[0]}, None),
        ({"client_secret": vkyc[1]}, None),
        ({"client_id": "", "client_secret": ""}, None),
        ({}, "Bearer abc"),
        ({}, "Digest username=x"),
        ({}, ""),
    ):
        answer = await post(client, urlencode({**GRANT, **form}), authorization)
        assert refused(answer) == (401, "invalid_client"), (form, authorization)


async def test_t2_a_parameter_given_twice_is_refused(
    client: httpx.AsyncClient, vkyc: Credential
) -> None:
    values = {
        "grant_type": "client_credentials",
        "scope": "search:read",
        "client_id": vkyc[0],
        "client_secret": vkyc[1],
        "unknown": "1",
    }
    body = urlencode(values)
    assert (await post(client, body)).status_code == 200
    for name, value in values.items():
        for second in (value, "", "other"):
            answer = await post(client, f"{body}&{name}={quote(second)}")
            assert refused(answer) == (400, "invalid_request"), (name, second)
    for second in (INGEST, "", "https://other.example"):
        answer = await post(client, f"{body}&resource={quote(INGEST)}&resource={quote(second)}")
        assert refused(answer) == (400, "invalid_target"), second
    assert refused(await post(client, f"{body}&%73cope=x")) == (400, "invalid_request")


async def test_t2_credentials_in_the_query_are_refused_and_kept_nowhere(
    client: httpx.AsyncClient,
    vkyc: Credential,
    sql: SQL,
    records: Records,
    capfd: pytest.CaptureFixture[str],
) -> None:
    query = urlencode({**GRANT, "client_id": vkyc[0], "client_secret": vkyc[1]})
    answers = [
        await client.post(f"{URL}?{query}"),
        await client.post(f"{URL}?{query}", data=GRANT),
        await client.post(f"{URL}?x=1", auth=vkyc, data=GRANT),
    ]
    assert [refused(answer) for answer in answers] == [(400, "invalid_request")] * 3
    await records(3, reason="invalid_request")
    assert not any(vkyc[1] in answer.text + str(answer.headers) for answer in answers)
    assert vkyc[1] not in "".join(capfd.readouterr())
    assert not await _rows_with(sql, vkyc[1])


@pytest.mark.parametrize(
    "grant_type",
    ["password", "authorization_code", "refresh_token", "Client_credentials", "x" * 99],
)
async def test_another_grant_type_is_unsupported(
    grant_type: str, client: httpx.AsyncClient, operator_credential: Credential
) -> None:
    answer = await client.post(URL, auth=operator_credential, data={"grant_type": grant_type})
    assert refused(answer) == (400, "unsupported_grant_type")


async def test_a_missing_grant_type_is_an_invalid_request(
    client: httpx.AsyncClient, operator_credential: Credential
) -> None:
    for body in ("", "grant_type=", "grant_type", "=client_credentials", "&&"):
        answer = await post(client, body, basic(*operator_credential))
        assert refused(answer) == (400, "invalid_request"), body


async def test_t3_only_a_form_in_utf_8_is_read(
    client: httpx.AsyncClient, operator_credential: Credential, records: Records
) -> None:
    authorization = basic(*operator_credential)
    others = [
        "application/json",
        "multipart/form-data; boundary=x",
        "text/plain",
        "application/x-www-form-urlencoded; charset=iso-8859-1",
        "application/x-www-form-urlencoded; charset=utf-16",
        "application/x-www-form-urlencoded; charset=utf-8; x=y",
        "application/x-www-form-urlencodedx",
        "",
        None,
    ]
    for content_type in others:
        answer = await post(client, urlencode(GRANT), authorization, content_type)
        assert refused(answer) == (415, "invalid_request"), content_type
    await records(len(others), outcome="refused")
    for content_type in (
        FORM,
        FORM.upper(),
        f"{FORM};charset=UTF-8",
        f'{FORM} ; charset="utf-8" ',
    ):
        answer = await post(client, urlencode(GRANT), authorization, content_type)
        assert answer.status_code == 200, content_type


async def test_t3_other_methods_get_405_with_allow(client: httpx.AsyncClient) -> None:
    for method in ("GET", "HEAD", "PUT", "PATCH", "DELETE", "TRACE", "PURGE"):
        answer = await client.request(method, URL)
        assert (answer.status_code, answer.headers["allow"]) == (405, "POST, OPTIONS"), method
        assert answer.headers["x-request-id"]
    answer = await client.options(URL)
    assert (answer.status_code, answer.headers["allow"]) == (204, "POST, OPTIONS")


async def test_t4_basic_is_form_decoded(client: httpx.AsyncClient, vkyc: Credential) -> None:
    client_id, client_secret = vkyc
    everything_escaped = "".join(f"%{byte:02x}" for byte in client_secret.encode())
    for presented in (
        basic(client_id, client_secret),
        basic(quote(client_id), quote(client_secret)),
        basic(client_id.replace("_", "%5F"), everything_escaped),
        basic(client_id, client_secret).replace("Basic", "bAsIc"),
        basic(client_id, client_secret).replace("Basic ", "Basic   "),
    ):
        assert (await post(client, urlencode(GRANT), presented)).status_code == 200, presented


async def test_t4_basic_that_cannot_be_read_is_an_invalid_request(
    client: httpx.AsyncClient, vkyc: Credential
) -> None:
    client_id, client_secret = vkyc
    genuine = basic(client_id, client_secret)
    encoded = genuine.removeprefix("Basic ")
    unreadable = {
        "bad base64": f"Basic {encoded[:-1]}!",
        "cut base64": f"Basic {encoded[:-1]}" if encoded.endswith("=") else f"Basic {encoded}A",
        "nothing": "Basic ",
        "two": f"Basic {encoded} {encoded}",
        "no colon": "Basic " + base64.b64encode(client_id.encode()).decode(),
        "NUL": basic(client_id, client_secret + "\0"),
        "escaped NUL": basic(client_id, client_secret + "%00"),
        "NUL in the id": basic(client_id + "%00", client_secret),
        "%zz": basic(client_id, "%zz" + client_secret),
        "cut escape": basic(client_id, client_secret + "%4"),
        "%ff": basic(client_id, client_secret + "%ff"),
        "raw \\xff": basic(client_id, client_secret.encode() + b"\xff"),
        "overlong UTF-8": basic(client_id, client_secret + "%c1%81"),
        "surrogate": basic(client_id, client_secret + "%ed%a0%80"),
    }
    for name, authorization in unreadable.items():
        answer = await post(client, urlencode(GRANT), authorization)
        assert refused(answer) == (400, "invalid_request"), name
    decoded_otherwise = {
        "colon in the secret": basic(client_id, client_secret + ":"),
        "plus is a space": basic(client_id, client_secret + "+"),
        "space": basic(client_id, " " + client_secret),
        "non-ASCII": basic(client_id, client_secret + "é"),
        "escaped twice": basic(client_id.replace("_", "%255F"), client_secret),
        "no secret": basic(client_id, ""),
        "no id": basic("", client_secret),
    }
    for name, authorization in decoded_otherwise.items():
        answer = await post(client, urlencode(GRANT), authorization)
        assert refused(answer) == (401, "invalid_client"), name


async def test_t5_no_twin_reaches_another_service_user(
    client: httpx.AsyncClient, vkyc: Credential, records: Records
) -> None:
    client_id, client_secret = vkyc
    twins = [
        client_id.upper(),
        client_id.title(),
        client_id.replace("s", "\N{CYRILLIC SMALL LETTER DZE}", 1),
        client_id.replace("_", "\N{FULLWIDTH LOW LINE}"),
        client_id + "\N{ZERO WIDTH SPACE}",
        "\N{ZERO WIDTH NO-BREAK SPACE}" + client_id,
        client_id[:-1] + "\N{COMBINING ACUTE ACCENT}",
        client_id[:-1] + "\N{LATIN SMALL LETTER E WITH ACUTE}",
        client_id + " ",
        " " + client_id,
        client_id[:-1],
        client_id + client_id[-1],
        "vkyc-prod",
        client_id.replace("su_", "cr_"),
        "%",
        client_id[:-1] + "_",
        client_id[:-1] + "%",
    ]
    for twin in twins:
        if twin == client_id:
            continue
        form = {**GRANT, "client_id": twin, "client_secret": client_secret}
        assert refused(await client.post(URL, data=form)) == (401, "invalid_client"), twin
        again = await client.post(URL, auth=(quote(twin), client_secret), data=GRANT)
        assert refused(again) == (401, "invalid_client"), twin
    assert (await client.post(URL, auth=vkyc, data=GRANT)).status_code == 200
    by_vkyc = await records(1, service_user=client_id, action="token.issue")
    assert [record["outcome"] for record in by_vkyc] == ["success"]
    logged = await records(2 * len(twins), outcome="refused")
    assert {record["reason"] for record in logged} == {"unknown_client"}


async def test_t5_nul_and_surrogates_are_invalid_requests(
    client: httpx.AsyncClient, operator_credential: Credential
) -> None:
    for value in ("%00", "x%00y", "%ed%a0%80", "%ed%bf%bf", "%ff", "%c0%80", "%0a", "%7f"):
        for name in ("client_id", "client_secret", "scope", "resource", "unknown", "grant_type"):
            body = f"{name}={value}"
            answer = await post(client, body, basic(*operator_credential))
            assert refused(answer) == (400, "invalid_request"), body


async def test_t7_what_is_too_large_is_refused(
    client: httpx.AsyncClient, operator_credential: Credential
) -> None:
    authorization = basic(*operator_credential)
    body = urlencode(GRANT)
    fitting = body + "&pad=" + "x" * (8192 - len(body) - 5)
    assert (await post(client, fitting, authorization)).status_code == 200
    assert refused(await post(client, fitting + "x", authorization)) == (413, "invalid_request")
    assert refused(await post(client, "x" * 10_000_000, authorization)) == (413, "invalid_request")
    twenty = body + "".join(f"&p{number}=" for number in range(19))
    assert (await post(client, twenty, authorization)).status_code == 200
    assert refused(await post(client, twenty + "&p=", authorization)) == (400, "invalid_request")
    for encoding in ("gzip", "deflate", "br", "identity", ""):
        answer = await post(client, body, authorization, content_encoding=encoding)
        assert refused(answer) == (415, "invalid_request"), encoding


async def test_t7_what_comes_after_8_kib_is_never_read(
    client: httpx.AsyncClient, operator_credential: Credential
) -> None:
    sent = 0

    async def endless() -> AsyncGenerator[bytes, None]:
        nonlocal sent
        while True:
            sent += 1024
            yield b"x" * 1024

    answer = await client.post(
        URL, content=endless(), auth=operator_credential, headers={"Content-Type": FORM}
    )
    assert refused(answer) == (413, "invalid_request")
    assert sent <= 8192 + 2 * 1024


async def test_t7_a_content_length_that_lies_changes_nothing(
    client: httpx.AsyncClient, operator_credential: Credential
) -> None:
    for length in ("0", "5", "999999999", "-1", "x"):
        answer = await post(
            client, urlencode(GRANT), basic(*operator_credential), content_length=length
        )
        assert answer.status_code == 200, length


async def test_t7_nobody_waits_for_a_body_that_is_being_refused(
    client: httpx.AsyncClient, vkyc: Credential
) -> None:
    await client.post(URL, auth=vkyc, data=GRANT)
    alone = await _waits(client, vkyc)
    lying_in_wait = asyncio.Event()

    async def slow() -> AsyncGenerator[bytes, None]:
        yield b"pad=" + b"x" * 4096
        lying_in_wait.set()
        await asyncio.Event().wait()

    too_large = b"&".join(b"p%d=%%41" % number for number in range(100_000))

    async def flood() -> None:
        while True:
            assert (await post(client, too_large)).status_code == 413
            await asyncio.sleep(0)  # as a socket would

    others: list[asyncio.Task[Any]] = [asyncio.create_task(flood())]
    others += [
        asyncio.create_task(client.post(URL, content=slow(), headers={"Content-Type": FORM}))
        for _ in range(20)
    ]
    await lying_in_wait.wait()
    waits = await _waits(client, vkyc)
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    print(
        f"T7: {waits[5] * 1000:.1f} ms in the median, {waits[-1] * 1000:.1f} at most; alone "
        f"{alone[5] * 1000:.1f} ms"
    )
    assert waits[5] < 0.05 + 5 * alone[5]  # however busy this machine is


async def _waits(client: httpx.AsyncClient, credential: Credential) -> list[float]:
    """Return how long each of ten exchanges took, the shortest first: seconds."""
    waits: list[float] = []
    for _ in range(10):
        started = time.perf_counter()
        assert (await client.post(URL, auth=credential, data=GRANT)).status_code == 200
        waits.append(time.perf_counter() - started)
    return sorted(waits)


async def test_t10_unknown_client_wrong_secret_and_revoked_credential_look_alike(
    client: httpx.AsyncClient, vkyc: Credential, operator: httpx.AsyncClient, records: Records
) -> None:
    client_id, _ = vkyc
    url = f"/api/v1/service-users/{client_id}/credentials"
    revoked = (await operator.post(url, json={"label": "second"})).json()
    assert (await operator.post(f"{url}/{revoked['id']}/revoke")).status_code == 200
    request_id = {"X-Request-Id": "the-same"}
    answers = [
        await client.post(URL, auth=credential, data=GRANT, headers=request_id)
        for credential in (
            (UNKNOWN, vkyc[1]),
            ("nobody", "x"),
            (client_id, "wrong"),
            (client_id, "pvs_" + "0" * 49),
            (client_id, "\N{SNOWMAN}".encode().decode("latin-1")),
            (client_id, revoked["client_secret"]),
        )
    ]
    first = answers[0]
    assert refused(first) == (401, "invalid_client")
    for answer in answers[1:]:
        assert answer.status_code == first.status_code
        assert answer.headers.raw == first.headers.raw
        assert answer.content == first.content
    logged = await records(6, outcome="refused", request_id="the-same")
    reasons = {record["reason"] for record in logged}
    assert reasons == {"unknown_client", "wrong_secret", "revoked_credential"}


async def test_t10_who_has_the_right_secret_is_told_why_it_does_not_help(
    client: httpx.AsyncClient, vkyc: Credential, operator: httpx.AsyncClient, records: Records
) -> None:
    client_id = vkyc[0]
    user = f"/api/v1/service-users/{client_id}"
    ends = datetime.now(UTC) + timedelta(seconds=2)
    short = await operator.post(
        f"{user}/credentials", json={"label": "short", "expires_at": ends.isoformat()}
    )
    credential = client_id, short.json()["client_secret"]
    assert (await client.post(URL, auth=credential, data=GRANT)).status_code == 200
    await asyncio.sleep((ends - datetime.now(UTC)).total_seconds() + 0.1)
    expired = await client.post(URL, auth=credential, data=GRANT)
    assert refused(expired) == (401, "invalid_client")
    assert expired.json()["error_description"] == (
        f"This credential ended on {ends:%Y-%m-%d %H:%M} UTC. "
        "Ask kyc-team@example.com for a new one."
    )
    assert (await operator.post(f"{user}/disable")).status_code == 200
    disabled = await client.post(URL, auth=vkyc, data=GRANT)
    assert refused(disabled) == (401, "invalid_client")
    assert "vkyc-prod is disabled" in disabled.json()["error_description"]
    assert "kyc-team@example.com" in disabled.json()["error_description"]
    guessed = await client.post(URL, auth=(client_id, "wrong"), data=GRANT)
    assert "disabled" not in guessed.text
    assert "kyc-team" not in guessed.text
    for reason in ("credential_expired", "service_user_disabled", "wrong_secret"):
        (record,) = await records(reason=reason)
        assert record["service_user"] == "vkyc-prod"
        assert record["source_system"] == "vkyc"


async def test_the_end_of_a_credential_is_announced_for_30_days(
    client: httpx.AsyncClient, vkyc: Credential, operator: httpx.AsyncClient
) -> None:
    url = f"/api/v1/service-users/{vkyc[0]}/credentials"
    announced: list[bool] = []
    for days in (30 - 0.001, 30 + 0.001):
        ends = datetime.now(UTC) + timedelta(days=days)
        body = {"label": f"for {days} days", "expires_at": ends.isoformat()}
        created = await operator.post(url, json=body)
        credential = vkyc[0], created.json()["client_secret"]
        answer = (await client.post(URL, auth=credential, data=GRANT)).json()
        announced.append("credential_expires_at" in answer)
        if announced[-1]:
            assert datetime.fromisoformat(answer["credential_expires_at"]) == ends
    assert announced == [True, False]


async def test_an_exchange_is_on_record_with_all_that_is_known_of_it(
    client: httpx.AsyncClient, vkyc: Credential, records: Records, operator: httpx.AsyncClient
) -> None:
    answer = await client.post(
        URL,
        auth=vkyc,
        data={**GRANT, "scope": "search:read"},
        headers={"X-Request-Id": "upload.7-a_B", "User-Agent": "vkyc/1.0"},
    )
    assert answer.headers["x-request-id"] == "upload.7-a_B"
    token = answer.json()["access_token"]
    claims = jwt.decode(token, options={"verify_signature": False})
    (credential,) = (await operator.get(f"/api/v1/service-users/{vkyc[0]}/credentials")).json()[
        "credentials"
    ]
    (record,) = await records(request_id="upload.7-a_B")
    signing_input = token.rpartition(".")[0].encode()
    assert record == {
        "id": claims["jti"],
        "cursor": record["cursor"],
        "recorded_at": record["recorded_at"],
        "action": "token.issue",
        "outcome": "success",
        "reason": None,
        "service_user_id": vkyc[0],
        "service_user": "vkyc-prod",
        "source_system": "vkyc",
        "version": 2,
        "credential_id": credential["id"],
        "actor_id": None,
        "actor": None,
        "actor_credential_id": None,
        "kid": jwt.get_unverified_header(token)["kid"],
        "iat": claims["iat"],
        "exp": claims["exp"],
        "aud": INGEST,
        "scope": "search:read",
        "signing_input_sha256": hashlib.sha256(signing_input).hexdigest(),
        "request_id": "upload.7-a_B",
        "repeats": 1,
        "details": {},
        "client_address": "127.0.0.1",
        "user_agent": "vkyc/1.0",
        "resource": "",
        "department": "",
        "jti": claims["jti"],
        "log_origin": record["log_origin"],
        "leaf_index": record["leaf_index"],
        "leaf_hash": record["leaf_hash"],
        "occurred_at": None,
        "personal_salt": record["personal_salt"],
        "personal_sha256": record["personal_sha256"],
    }


async def test_an_answer_that_brought_no_usable_request_id_is_found_by_the_one_it_got(
    client: httpx.AsyncClient, vkyc: Credential, records: Records
) -> None:
    for sent in ({}, {"X-Request-Id": ""}, {"X-Request-Id": "x" * 65}, {"X-Request-Id": "a b"}):
        answer = await client.post(URL, auth=vkyc, data=GRANT, headers=sent)
        request_id = answer.headers["x-request-id"]
        assert request_id not in sent.values()
        await records(request_id=request_id)


async def test_equal_refusals_share_a_record_that_counts_them(
    client: httpx.AsyncClient, vkyc: Credential, records: Records
) -> None:
    for _ in range(25):
        await client.post(URL, auth=(vkyc[0], "wrong"), data=GRANT)
    logged = await records(25, reason="wrong_secret")
    assert len(logged) <= 4
    assert {record["service_user_id"] for record in logged} == {vkyc[0]}


async def test_no_secret_and_no_token_is_kept_anywhere(
    client: httpx.AsyncClient, vkyc: Credential, sql: SQL, capfd: pytest.CaptureFixture[str]
) -> None:
    client_id, client_secret = vkyc
    answer = await client.post(URL, auth=vkyc, data=GRANT)
    token = answer.json()["access_token"]
    misplaced = [
        {"client_id": client_secret, "client_secret": client_id},
        {"client_id": client_secret, "client_secret": client_secret},
        {"client_id": client_id, "client_secret": client_secret, "scope": client_secret},
        {"client_id": client_id, "client_secret": client_secret, "resource": client_secret},
        {"client_id": client_id, "client_secret": client_secret, "grant_type": client_secret},
        {"client_id": client_id, "client_secret": token},
        {"client_id": token, "client_secret": client_secret},
    ]
    for form in misplaced:
        answer = await client.post(URL, data={**GRANT, **form})
        assert answer.status_code in (400, 401)
        assert client_secret not in answer.text or "scope" in form, form
        assert token not in answer.text
    await asyncio.sleep(1.1)  # until the counted repeats are written, too
    metrics = (await client.get("/metrics")).text
    logs = "".join(capfd.readouterr())
    for secret in (client_secret, token, token.rpartition(".")[2]):
        for spelling in (secret, quote(secret), base64.b64encode(secret.encode()).decode()):
            assert spelling not in metrics
            assert spelling not in logs
            assert not await _rows_with(sql, spelling)
        assert not await _rows_with(sql, secret.encode().hex())


async def test_l1_a_canary_would_be_found(vkyc: Credential, sql: SQL) -> None:
    assert await _rows_with(sql, vkyc[0])


async def _rows_with(sql: SQL, text: str) -> list[str]:
    """The tables that hold `text` anywhere in a row."""
    tables = await sql(
        "SELECT oid::regclass::text AS name FROM pg_class "
        "WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace"
    )
    return [
        table["name"]
        for table in tables
        if await sql(
            f"SELECT 1 FROM {table['name']} row WHERE strpos(row::text, $1) > 0 LIMIT 1", text
        )
    ]
