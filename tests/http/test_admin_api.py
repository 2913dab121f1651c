"""The admin API, endpoint by endpoint: what it does, and what it makes of bad input.

It must not try rights: `test_admin_rights.py` does.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from typing import Any, TypeAlias

import asyncpg
import httpx
import jwt
import pytest

from service.authority.model import (
    ACTION,
    AUDIENCE,
    CREDENTIAL_ID,
    EXPECTED,
    KID,
    NAME,
    SCOPE,
    SERVICE_USER,
    SERVICE_USER_ID,
    SOURCE_SYSTEM,
)
from service.settings import Settings

pytestmark = pytest.mark.anyio

Credential: TypeAlias = tuple[str, str]
Enrol: TypeAlias = Callable[..., Awaitable[Credential]]
SignIn: TypeAlias = Callable[..., Awaitable[httpx.AsyncClient]]
Records: TypeAlias = Callable[..., Awaitable[list[dict[str, Any]]]]
SQL: TypeAlias = Callable[..., Awaitable[list[asyncpg.Record]]]

USERS = "/api/v1/service-users"
LOG = "/api/v1/audit-records"
NOBODY = "su_aaaaaaaaaaaaaaaaaaaaaaaa"
INGEST = "http://127.0.0.1:8081"
JSON = {"Content-Type": "application/json"}


def problem(answer: httpx.Response) -> dict[str, Any]:
    """The members of a refusal that has the form of RFC 9457."""
    body = answer.json()
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["cache-control"] == "no-store"
    assert body["type"] == "about:blank"
    assert body["status"] == answer.status_code
    assert body["title"] == HTTPStatus(answer.status_code).phrase
    assert body["request_id"] == answer.headers["x-request-id"]
    assert body["detail"]
    assert body.keys() <= {"type", "title", "status", "detail", "request_id", "errors", "error"}
    return body


def at(text: str) -> datetime:
    """A time as the API writes it: RFC 3339 in UTC."""
    assert text.endswith("Z")
    return datetime.fromisoformat(text)


async def test_a_service_user_is_created_with_the_defaults_of_the_installation(
    operator: httpx.AsyncClient,
) -> None:
    answer = await operator.post(USERS, json={"name": "vkyc-prod", "source_system": "vkyc"})
    assert answer.status_code == 201
    user = answer.json()
    assert user == {
        "id": user["id"],
        "name": "vkyc-prod",
        "source_system": "vkyc",
        "owner": "",
        "contact": "",
        "description": "",
        "scopes": [],
        "audiences": [INGEST],
        "token_lifetime": 900,
        "status": "active",
        "version": 1,
        "created_at": user["created_at"],
    }
    assert abs(at(user["created_at"]) - datetime.now(UTC)) < timedelta(seconds=5)
    assert answer.headers["location"] == f"{USERS}/{user['id']}"
    assert answer.headers["etag"] == '"1"'
    assert answer.headers["cache-control"] == "no-store"
    read = await operator.get(answer.headers["location"])
    assert (read.status_code, read.json(), read.headers["etag"]) == (200, user, '"1"')


async def test_a_service_user_keeps_every_field_that_it_was_created_with(
    operator: httpx.AsyncClient,
) -> None:
    fields = {
        "name": "doc.service-2-b",
        "source_system": "doc_service",
        "owner": "Dokumente \N{LATIN SMALL LETTER U WITH DIAERESIS}ber 'alles'; --",
        "contact": "<script>alert(1)</script>",
        "description": "\N{SNOWMAN}" * 1000,
        "scopes": ["search:read", "ingest:write"],
        "audiences": ["https://search.example/a?b=c", "urn:example:ingest"],
        "token_lifetime": 60,
    }
    created = await operator.post(USERS, json=fields)
    assert created.status_code == 201
    read = (await operator.get(created.headers["location"])).json()
    assert {name: read[name] for name in fields} == fields


INVALID_USERS: dict[str, dict[str, object]] = {
    "no name": {"name": ...},
    "no source system": {"source_system": ...},
    "empty name": {"name": ""},
    "upper case": {"name": "Vkyc"},
    "space": {"name": "vkyc prod"},
    "underscore": {"name": "su_aaaaaaaaaaaaaaaaaaaaaaaa"},
    "long name": {"name": "v" * 64},
    "homoglyph": {"name": "vk\N{CYRILLIC SMALL LETTER U}c"},
    "number": {"name": 7},
    "null": {"name": None},
    "source system with a dash": {"source_system": "doc-service"},
    "source system that starts with a digit": {"source_system": "1vkyc"},
    "long source system": {"source_system": "v" * 64},
    "long owner": {"owner": "x" * 201},
    "long contact": {"contact": "x" * 201},
    "long description": {"description": "x" * 1001},
    "scope with a space": {"scopes": ["a b"]},
    "empty scope": {"scopes": [""]},
    "long scope": {"scopes": ["s" * 65]},
    "scope twice": {"scopes": ["a", "a"]},
    "33 scopes": {"scopes": [f"s{number}" for number in range(33)]},
    "scopes as text": {"scopes": "ingest:write"},
    "null scope": {"scopes": [None]},
    "no audience": {"audiences": []},
    "relative audience": {"audiences": ["/x"]},
    "audience with a fragment": {"audiences": ["https://a.example#x"]},
    "audience with a space": {"audiences": ["https://a.example/ x"]},
    "audience twice": {"audiences": [INGEST, INGEST]},
    "9 audiences": {"audiences": [f"https://a{number}.example" for number in range(9)]},
    "lifetime of 59": {"token_lifetime": 59},
    "lifetime of 3601": {"token_lifetime": 3601},
    "negative lifetime": {"token_lifetime": -900},
    "end of a list": {"scopes": ["a", "B"]},
    "lifetime as text": {"token_lifetime": "900"},
    "lifetime as a fraction": {"token_lifetime": 900.5},
    "lifetime as a bool": {"token_lifetime": True},
}


async def test_a_field_that_does_not_have_its_form_is_named(operator: httpx.AsyncClient) -> None:
    good = {"name": "vkyc-prod", "source_system": "vkyc"}
    created = await operator.post(USERS, json={**good, "name": "there"})
    for name, change in INVALID_USERS.items():
        body = {k: v for k, v in {**good, **change}.items() if v is not ...}
        answer = await operator.post(USERS, json=body)
        assert answer.status_code == 422, name
        (field,) = change
        found = problem(answer)
        if change[field] is ...:
            assert field in found["detail"], name
            continue
        pointers = [error["pointer"] for error in found["errors"]]
        assert [pointer.split("/")[1] for pointer in pointers] == [field], (name, found)
        patched = await operator.patch(
            created.headers["location"], json=change, headers={"If-Match": '"1"'}
        )
        assert patched.status_code == 422, name
    listed = (await operator.get(USERS)).json()["service_users"]
    assert [user["name"] for user in listed] == ["operator", "there"]
    assert listed[1]["version"] == 1


BAD_BODIES: dict[str, tuple[bytes, dict[str, str], int]] = {
    "text/plain": (b'{"name":"a","source_system":"b"}', {"Content-Type": "text/plain"}, 415),
    "a form": (
        b"name=a&source_system=b",
        {"Content-Type": "application/x-www-form-urlencoded"},
        415,
    ),
    "no type": (b'{"name":"a","source_system":"b"}', {}, 415),
    "json-like": (b'{"name":"a","source_system":"b"}', {"Content-Type": "application/jsonp"}, 415),
    "msgpack": (b"\x80", {"Content-Type": "application/x-msgpack"}, 415),
    "empty": (b"", JSON, 400),
    "no JSON": (b"{", JSON, 400),
    "a list": (b"[]", JSON, 400),
    "null": (b"null", JSON, 400),
    "duplicate": (b'{"name":"a","source_system":"b","name":"c"}', JSON, 400),
    "duplicate by escape": (b'{"name":"a","source_system":"b","n\\u0061me":"c"}', JSON, 400),
    "NUL": (b'{"name":"a","source_system":"b","owner":"x\\u0000"}', JSON, 400),
    "CRLF": (b'{"name":"a","source_system":"b","owner":"x\\r\\ny"}', JSON, 400),
    "ESC": (b'{"name":"a","source_system":"b","owner":"\\u001b[31m"}', JSON, 400),
    "DEL in a list": (b'{"name":"a","source_system":"b","scopes":["x\\u007f"]}', JSON, 400),
    "control character in a name": (b'{"name":"a","source_system":"b","x\\n":1}', JSON, 400),
    "lone surrogate": (b'{"name":"a","source_system":"b","owner":"\\ud800"}', JSON, 400),
    "invalid UTF-8": (b'{"name":"a","source_system":"b","owner":"\xff"}', JSON, 400),
    "UTF-16": ('{"name":"a","source_system":"b"}'.encode("utf-16"), JSON, 400),
    "NaN": (b'{"name":"a","source_system":"b","token_lifetime":NaN}', JSON, 400),
    "5,000 digits": (b'{"token_lifetime":' + b"9" * 5000 + b"}", JSON, 400),
    "100,000 deep": (b'{"scopes":' + b"[" * 20_000 + b"]" * 20_000 + b"}", JSON, 400),
    "over 64 KiB": (b'{"description":"' + b"x" * 70_000 + b'"}', JSON, 413),
}


async def test_a_body_that_is_not_one_clear_json_object_is_refused(
    operator: httpx.AsyncClient, records: Records
) -> None:
    for name, (body, headers, status) in BAD_BODIES.items():
        answer = await operator.post(USERS, content=body, headers=headers)
        assert answer.status_code == status, (name, answer.text)
        problem(answer)
    assert len((await operator.get(USERS)).json()["service_users"]) == 1
    await records(len(BAD_BODIES), action="service_user.create", reason="invalid_request")
    for content_type in ("application/json; charset=utf-8", "Application/JSON"):
        answer = await operator.post(
            USERS,
            content=json.dumps({"name": f"n{len(content_type)}", "source_system": "x"}),
            headers={"Content-Type": content_type},
        )
        assert answer.status_code == 201


@pytest.mark.parametrize(
    ("field", "value", "pattern"),
    [
        ("name", "Big", NAME),
        ("source_system", "Big", SOURCE_SYSTEM),
        ("scopes", ["BAD"], f"^{SCOPE}$"),
        ("audiences", ["nonsense"], AUDIENCE),
    ],
)
async def test_what_has_not_the_form_of_a_field_is_told_in_words_and_no_pattern(
    operator: httpx.AsyncClient, field: str, value: object, pattern: str
) -> None:
    answer = await operator.post(USERS, json={"name": "a", "source_system": "a", field: value})
    assert answer.status_code == 422
    assert problem(answer)["errors"][0]["detail"].endswith(f": {EXPECTED[pattern]}")


async def test_what_has_not_the_form_of_a_parameter_is_told_in_words(
    operator: httpx.AsyncClient,
) -> None:
    for path, pattern in (
        (f"{USERS}?name=Big", NAME),
        (f"{USERS}/su_1", SERVICE_USER_ID),
        ("/api/v1/audit-records?service_user=VKYC", SERVICE_USER),
        ("/api/v1/audit-records?action=issue", ACTION),
        ("/api/v1/audit-records?credential=cr_1", CREDENTIAL_ID),
        ("/api/v1/audit-records?kid=short", KID),
    ):
        answer = await operator.get(path)
        assert answer.status_code == 422
        assert problem(answer)["detail"].endswith(f": {EXPECTED[pattern]}")


async def test_a_name_that_is_taken_is_a_conflict(
    operator: httpx.AsyncClient, vkyc: Credential, records: Records
) -> None:
    answer = await operator.post(USERS, json={"name": "vkyc-prod", "source_system": "other"})
    assert answer.status_code == 409
    assert problem(answer)["errors"] == [{"pointer": "/name", "detail": "This name is taken."}]
    other = await operator.post(USERS, json={"name": "other", "source_system": "other"})
    answer = await operator.patch(
        other.headers["location"], json={"name": "vkyc-prod"}, headers={"If-Match": '"1"'}
    )
    assert answer.status_code == 409
    assert (await operator.get(other.headers["location"])).json() == other.json()
    await records(2, outcome="refused", reason="conflict")


async def test_a_change_needs_the_current_version(
    operator: httpx.AsyncClient, vkyc: Credential, records: Records
) -> None:
    user = f"{USERS}/{vkyc[0]}"
    before = await operator.get(user)
    assert before.headers["etag"] == '"2"'
    for etag, status in {
        None: 428,
        '"1"': 412,
        '"3"': 412,
        '"999999999999999999999999"': 412,
        '"-1"': 400,
        "2": 400,
        "*": 400,
        'W/"2"': 400,
        '"2", "3"': 400,
        '""': 400,
        '"\xb2"': 400,
    }.items():
        headers = [] if etag is None else [(b"If-Match", etag.encode("latin-1"))]
        answer = await operator.patch(user, json={"owner": "x"}, headers=headers)
        assert answer.status_code == status, etag
        problem(answer)
    assert (await operator.get(user)).json() == before.json()
    await records(3, reason="precondition_failed")
    changed = await operator.patch(user, json={"owner": "KYC"}, headers={"If-Match": '"2"'})
    assert changed.status_code == 200
    assert changed.headers["etag"] == '"3"'
    assert changed.json() == {
        **before.json(),
        "owner": "KYC",
        "version": 3,
        "live_tokens": {"count": 0, "last_ends_at": None},
    }
    again = await operator.patch(user, json={"owner": "KYC"}, headers={"If-Match": '"2"'})
    assert again.status_code == 412


async def test_a_change_touches_what_it_names_and_is_on_record(
    operator: httpx.AsyncClient, vkyc: Credential, records: Records
) -> None:
    user = f"{USERS}/{vkyc[0]}"
    before = (await operator.get(user)).json()
    change = {
        "name": "vkyc-2",
        "source_system": "vkyc2",
        "owner": "Erika Example",
        "scopes": ["ingest:write"],
        "audiences": ["https://a.example"],
        "token_lifetime": 3600,
    }
    answer = await operator.patch(user, json=change, headers={"If-Match": '"2"'})
    after = (await operator.get(user)).json()
    assert after == {**before, **change, "version": 3}
    assert answer.json() == {**after, "live_tokens": answer.json()["live_tokens"]}
    (record,) = await records(action="service_user.change")
    assert record["details"] == {
        "name": {"from": "vkyc-prod", "to": "vkyc-2"},
        "source_system": {"from": "vkyc", "to": "vkyc2"},
        "scopes": {"from": ["ingest:write", "search:read"], "to": ["ingest:write"]},
        "audiences": {"from": [INGEST], "to": ["https://a.example"]},
        "token_lifetime": {"from": 900, "to": 3600},
        "owner": "changed",
    }
    assert (record["actor"], record["service_user_id"]) == ("operator", vkyc[0])


async def test_a_change_says_how_many_tokens_are_still_live(
    operator: httpx.AsyncClient, client: httpx.AsyncClient, vkyc: Credential
) -> None:
    user = f"{USERS}/{vkyc[0]}"
    ends = [
        jwt.decode(
            (
                await client.post(
                    "/oauth/token", auth=vkyc, data={"grant_type": "client_credentials"}
                )
            ).json()["access_token"],
            options={"verify_signature": False},
        )["exp"]
        for _ in range(3)
    ]
    live = {"count": 3, "last_ends_at": f"{datetime.fromtimestamp(max(ends), UTC):%FT%TZ}"}
    disabled = await operator.post(f"{user}/disable")
    assert disabled.json()["live_tokens"] == live
    held = (await operator.get(f"{user}/credentials")).json()["credentials"][0]["id"]
    revoked = await operator.post(f"{user}/credentials/{held}/revoke")
    assert revoked.json()["live_tokens"] == live


async def test_disable_and_enable_take_effect_at_once_and_may_be_repeated(
    operator: httpx.AsyncClient, client: httpx.AsyncClient, vkyc: Credential
) -> None:
    user = f"{USERS}/{vkyc[0]}"
    grant = {"grant_type": "client_credentials"}
    for act, status, exchange in (
        ("disable", "disabled", 401),
        ("disable", "disabled", 401),
        ("enable", "active", 200),
        ("enable", "active", 200),
    ):
        answer = await operator.post(f"{user}/{act}")
        assert (answer.status_code, answer.json()["status"]) == (200, status)
        assert answer.headers["etag"] == f'"{answer.json()["version"]}"'
        exchanged = await client.post("/oauth/token", auth=vkyc, data=grant)
        assert exchanged.status_code == exchange


async def test_what_does_not_exist_is_not_found(
    operator: httpx.AsyncClient, vkyc: Credential, records: Records
) -> None:
    other = "cr_" + "a" * 24
    etag = {"If-Match": '"1"'}
    answers = [
        await operator.get(f"{USERS}/{NOBODY}"),
        await operator.patch(f"{USERS}/{NOBODY}", json={"owner": "x"}, headers=etag),
        await operator.post(f"{USERS}/{NOBODY}/disable"),
        await operator.post(f"{USERS}/{NOBODY}/enable"),
        await operator.get(f"{USERS}/{NOBODY}/credentials"),
        await operator.post(f"{USERS}/{NOBODY}/credentials", json={"label": "x"}),
        await operator.post(f"{USERS}/{NOBODY}/credentials/{other}/revoke"),
        await operator.post(f"{USERS}/{vkyc[0]}/credentials/{other}/revoke"),
        await operator.post(f"{USERS}/{NOBODY}/tokens", json={}),
    ]
    assert [answer.status_code for answer in answers] == [404] * len(answers)
    for answer in answers:
        problem(answer)
    logged = await records(len(answers), outcome="refused", reason="not_found")
    assert {record["service_user_id"] for record in logged} == {NOBODY, vkyc[0]}
    assert {record["actor"] for record in logged} == {"operator"}


async def test_an_id_of_another_form_is_refused_and_kept_out_of_the_log(
    operator: httpx.AsyncClient, records: Records
) -> None:
    for wrong in ("abc", "su_" + "A" * 24, "su_" + "a" * 25, "me2", "%2e%2e", "su_%00", "%0a"):
        answer = await operator.get(f"{USERS}/{wrong}")
        assert answer.status_code in (404, 422), wrong
        problem(answer)
    assert (await operator.get(f"{USERS}/abc")).status_code == 422
    for record in await records(8, outcome="refused"):
        assert record["service_user_id"] is None


async def test_what_is_no_route_or_has_another_method_is_told_so(
    operator: httpx.AsyncClient, client: httpx.AsyncClient, vkyc: Credential
) -> None:
    for caller in (operator, client):
        for path in (
            "/api/v1/nothing",
            "/api/v1",
            "/api",
            "/",
            f"{USERS}/{vkyc[0]}/x",
        ):
            answer = await caller.get(path)
            assert answer.status_code == 404, path
            problem(answer)
        for method, path in (
            ("DELETE", f"{USERS}/{vkyc[0]}"),
            ("PUT", f"{USERS}/{vkyc[0]}"),
            ("GET", f"{USERS}/{vkyc[0]}/disable"),
            ("POST", LOG),
            ("DELETE", LOG),
        ):
            answer = await caller.request(method, path)
            assert answer.status_code == 405, (method, path)
            assert answer.headers["allow"]
            problem(answer)


async def test_a_credential_is_shown_with_its_secret_once(
    operator: httpx.AsyncClient, client: httpx.AsyncClient, vkyc: Credential
) -> None:
    url = f"{USERS}/{vkyc[0]}/credentials"
    answer = await operator.post(url, json={"label": "2026 autumn"})
    assert answer.status_code == 201
    assert answer.headers["cache-control"] == "no-store"
    made = answer.json()
    assert made == {
        "id": made["id"],
        "service_user_id": vkyc[0],
        "label": "2026 autumn",
        "state": "live",
        "created_at": made["created_at"],
        "expires_at": made["expires_at"],
        "revoked_at": None,
        "held_at": None,
        "code_ends_at": None,
        "opened_at": None,
        "succeeds": None,
        "last_used_at": None,
        "client_id": vkyc[0],
        "client_secret": made["client_secret"],
    }
    assert at(made["expires_at"]) - at(made["created_at"]) == timedelta(days=365)
    listed = (await operator.get(url)).json()["credentials"]
    assert [each["label"] for each in listed] == ["2026 autumn", "first"]
    assert "client_secret" not in listed[0]
    assert listed[0] == {name: made[name] for name in listed[0]}
    token = await client.post(
        "/oauth/token",
        auth=(vkyc[0], made["client_secret"]),
        data={"grant_type": "client_credentials"},
    )
    assert token.status_code == 200
    used, unused = (await operator.get(url)).json()["credentials"]
    assert abs(at(used["last_used_at"]) - datetime.now(UTC)) < timedelta(seconds=10)
    assert unused["last_used_at"] is None


async def test_the_end_of_a_credential_lies_between_now_and_five_years(
    operator: httpx.AsyncClient, vkyc: Credential
) -> None:
    url = f"{USERS}/{vkyc[0]}/credentials"
    now = datetime.now(UTC)
    good = [now + timedelta(seconds=30), now + timedelta(days=5 * 366)]
    bad: list[object] = [
        now - timedelta(seconds=1),
        now + timedelta(days=5 * 366, minutes=1),
        datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC),
        datetime(1, 1, 1, tzinfo=UTC),
        "2027-01-31T12:00:00",
        "2027-01-31",
        "tomorrow",
        1_900_000_000,
        True,
        "",
    ]
    for ends in good:
        new = {"label": str(ends), "expires_at": ends.isoformat()}
        answer = await operator.post(url, json=new)
        assert answer.status_code == 201, ends
        assert at(answer.json()["expires_at"]) == ends
    for ends in bad:
        text = ends.isoformat() if isinstance(ends, datetime) else ends
        answer = await operator.post(url, json={"label": "l", "expires_at": text})
        assert answer.status_code == 422, ends
        assert problem(answer)["errors"][0]["pointer"] == "/expires_at"
    for label in ("", "l" * 101, None, 7):
        answer = await operator.post(url, json={"label": label})
        assert (answer.status_code, problem(answer)["errors"][0]["pointer"]) == (422, "/label")
    with_offset = (datetime.now(UTC) + timedelta(hours=1)).isoformat().replace("+00:00", "-05:00")
    answer = await operator.post(url, json={"label": "l", "expires_at": with_offset})
    assert at(answer.json()["expires_at"]) == datetime.fromisoformat(with_offset)


async def test_there_are_at_most_ten_live_credentials(
    operator: httpx.AsyncClient, vkyc: Credential
) -> None:
    url = f"{USERS}/{vkyc[0]}/credentials"
    made = [await operator.post(url, json={"label": str(number)}) for number in range(9)]
    assert [answer.status_code for answer in made] == [201] * 9
    eleventh = await operator.post(url, json={"label": "11"})
    assert eleventh.status_code == 409
    assert "10 live credentials" in problem(eleventh)["detail"]
    revoked = await operator.post(f"{url}/{made[0].json()['id']}/revoke")
    assert revoked.json()["state"] == "revoked"
    assert (await operator.post(url, json={"label": "11"})).status_code == 201
    raced = await asyncio.gather(
        operator.post(f"{url}/{made[1].json()['id']}/revoke"),
        *(operator.post(url, json={"label": f"raced {number}"}) for number in range(4)),
    )
    assert sum(answer.status_code == 201 for answer in raced) <= 1
    states = [each["state"] for each in (await operator.get(url)).json()["credentials"]]
    assert states.count("live") <= 10


async def test_two_live_credentials_of_one_service_user_have_two_labels(
    operator: httpx.AsyncClient, vkyc: Credential, records: Records
) -> None:
    user = f"{USERS}/{vkyc[0]}"
    (held,) = (await operator.get(f"{user}/credentials")).json()["credentials"]
    label = f" {held['label']}  "
    for path in ("credentials", "hand-overs"):
        answer = await operator.post(f"{user}/{path}", json={"label": label})
        assert answer.status_code == 409
        assert "has a live credential with the label" in problem(answer)["detail"]
    refused = await records(2, outcome="refused", reason="conflict")
    assert {each["action"] for each in refused} == {"credential.create", "credential.hand_over"}
    assert (await operator.post(f"{user}/credentials/{held['id']}/revoke")).status_code == 200
    first, second = await asyncio.gather(
        *(operator.post(f"{user}/credentials", json={"label": held["label"]}) for _ in range(2))
    )
    assert sorted((first.status_code, second.status_code)) == [201, 409]


async def test_a_revoked_credential_gets_no_token_and_may_be_revoked_again(
    operator: httpx.AsyncClient, client: httpx.AsyncClient, vkyc: Credential, records: Records
) -> None:
    url = f"{USERS}/{vkyc[0]}/credentials"
    (held,) = (await operator.get(url)).json()["credentials"]
    revoked = await operator.post(f"{url}/{held['id']}/revoke")
    assert revoked.status_code == 200
    assert revoked.json() == {
        **held,
        "state": "revoked",
        "revoked_at": revoked.json()["revoked_at"],
        "live_tokens": {"count": 0, "last_ends_at": None},
    }
    grant = {"grant_type": "client_credentials"}
    assert (await client.post("/oauth/token", auth=vkyc, data=grant)).status_code == 401
    again = await operator.post(f"{url}/{held['id']}/revoke")
    assert (again.status_code, again.json()) == (200, revoked.json())
    (record, *_) = await records(2, action="credential.revoke")
    assert record["credential_id"] == held["id"]
    assert record["details"] == {"label": "first"}


async def test_a_credential_of_another_service_user_is_not_found_here(
    operator: httpx.AsyncClient, vkyc: Credential, enrol: Enrol
) -> None:
    other, _ = await enrol("other")
    (held,) = (await operator.get(f"{USERS}/{other}/credentials")).json()["credentials"]
    answer = await operator.post(f"{USERS}/{vkyc[0]}/credentials/{held['id']}/revoke")
    assert answer.status_code == 404
    (held,) = (await operator.get(f"{USERS}/{other}/credentials")).json()["credentials"]
    assert held["state"] == "live"


async def test_a_minted_token_names_its_minter_in_the_token_and_on_record(
    operator: httpx.AsyncClient,
    operator_credential: Credential,
    vkyc: Credential,
    records: Records,
) -> None:
    answer = await operator.post(f"{USERS}/{vkyc[0]}/tokens", json={"scope": "search:read"})
    assert answer.status_code == 201
    assert answer.headers["cache-control"] == "no-store"
    minted = answer.json()
    claims = jwt.decode(minted["access_token"], options={"verify_signature": False})
    assert claims["act"] == {"sub": operator_credential[0]}
    assert minted == {
        "access_token": minted["access_token"],
        "token_type": "Bearer",
        "expires_in": 900,
        "scope": "search:read",
        "jti": claims["jti"],
        "expires_at": claims["exp"],
    }
    (record,) = await records(jti=claims["jti"])
    assert record["action"] == "token.mint"
    assert record["actor_id"] == operator_credential[0]
    assert record["service_user_id"] == vkyc[0]
    assert record["credential_id"] is None


async def test_a_mint_beyond_the_grant_or_for_the_disabled_is_refused(
    operator: httpx.AsyncClient, vkyc: Credential, records: Records
) -> None:
    url = f"{USERS}/{vkyc[0]}/tokens"
    for body, error in (
        ({"scope": "admin"}, "invalid_scope"),
        ({"resource": "https://other.example"}, "invalid_target"),
    ):
        answer = await operator.post(url, json=body)
        assert (answer.status_code, problem(answer)["error"]) == (422, error), body
    malformed = [{"scope": "a  b"}, {"scope": ""}, {"scope": 7}, {"resource": "x"}]
    for body in malformed:
        answer = await operator.post(url, json=body)
        assert answer.status_code == 422, body
    await operator.post(f"{USERS}/{vkyc[0]}/disable")
    answer = await operator.post(url, json={})
    assert answer.status_code == 403
    assert "disabled" in problem(answer)["detail"]
    logged = await records(7, action="token.mint", outcome="refused")
    assert {record["actor"] for record in logged} == {"operator"}


async def test_service_users_are_listed_by_name_page_by_page_and_filtered(
    operator: httpx.AsyncClient,
) -> None:
    for number in range(7):
        system = "even" if number % 2 == 0 else "odd"
        body = {"name": f"user-{number}", "source_system": system, "owner": f"Team {system}"}
        created = await operator.post(USERS, json=body)
        if number >= 5:
            await operator.post(f"{created.headers['location']}/disable")

    async def pages(limit: int, **filters: str) -> list[list[str]]:
        found: list[list[str]] = []
        cursor: str | None = ""
        while cursor is not None:
            after = {"cursor": cursor} if cursor else {}
            answer = await operator.get(USERS, params={"limit": limit, **filters, **after})
            assert answer.status_code == 200
            found.append([user["name"] for user in answer.json()["service_users"]])
            cursor = answer.json()["next_cursor"]
        return found

    names = ["operator", *(f"user-{number}" for number in range(7))]
    assert await pages(3) == [names[:3], names[3:6], names[6:]]
    assert await pages(4) == [names[:4], names[4:]]
    assert await pages(200) == [names]
    assert await pages(2, source_system="odd") == [["user-1", "user-3"], ["user-5"]]
    assert await pages(50, status="disabled") == [["user-5", "user-6"]]
    assert await pages(50, status="active", source_system="even") == [
        ["user-0", "user-2", "user-4"]
    ]
    assert await pages(50, source_system="none") == [[]]
    assert await pages(2, search="user") == [names[1:3], names[3:5], names[5:7], names[7:]]
    assert await pages(2, search="TE od") == [["user-1", "user-3"], ["user-5"]]
    assert await pages(50, search="team 5", status="disabled") == [["user-5"]]
    for nothing in ("ser", "-", "' OR true --", ":*&|!()", " "):
        assert await pages(50, search=nothing) == [[]]


BAD_QUERIES: dict[str, int] = {
    f"{USERS}?limit=0": 422,
    f"{USERS}?limit=201": 422,
    f"{USERS}?limit=x": 422,
    f"{USERS}?limit=+1": 422,
    f"{USERS}?limit=": 422,
    f"{USERS}?limit=1&limit=2": 400,
    f"{USERS}?cursor=A": 422,
    f"{USERS}?cursor=%00": 400,
    f"{USERS}?search=": 422,
    f"{USERS}?search={'x' * 301}": 422,
    f"{USERS}?status=ACTIVE": 422,
    f"{USERS}?source_system='--": 422,
    f"{USERS}?sort=name": 400,
    f"{USERS}?Limit=1": 400,
    f"{USERS}/me?x=1": 400,
    "/api/v1/signing-keys?state=active": 400,
    f"{LOG}?limit=1001": 422,
    f"{LOG}?colour=x": 400,
    f"{LOG}?service_user=%27%20OR%201=1--": 422,
    f"{LOG}?credential=su_aaaaaaaaaaaaaaaaaaaaaaaa": 422,
    f"{LOG}?action=nothing": 422,
    f"{LOG}?outcome=failure": 422,
    f"{LOG}?action=null": 422,
    f"{LOG}?jti=NULL": 400,
    f"{LOG}?since=null": 400,
    f"{USERS}?status=null": 400,
    f"{LOG}?request_id=a%0ab": 400,
    f"{LOG}?jti=7": 422,
    f"{LOG}?since=2026-01-01T00:00:00": 400,
    f"{LOG}?since=yesterday": 422,
    f"{LOG}?until=2026-13-01T00:00:00Z": 422,
    f"{LOG}?order=newest": 422,
    f"{LOG}?cursor=x": 422,
    f"{LOG}?cursor=1.00000000-0000-0000-0000-00000000000": 422,
    f"{LOG}?cursor=1.------------------------------------": 422,
    f"{LOG}?since=1800000000": 400,
    f"{LOG}?until=0.5": 400,
}


async def test_a_query_that_is_not_understood_is_refused(operator: httpx.AsyncClient) -> None:
    found: dict[str, int] = {}
    for url in BAD_QUERIES:
        answer = await operator.get(url)
        found[url] = int(answer.status_code)
        if not answer.is_success:
            problem(answer)
    assert found == BAD_QUERIES
    for named_null in (f"{USERS}?cursor=null", f"{LOG}?service_user=null", f"{LOG}?actor=null"):
        assert (await operator.get(named_null)).status_code == 200


async def test_signing_keys_are_listed_in_the_order_of_their_publication(
    operator: httpx.AsyncClient, client: httpx.AsyncClient
) -> None:
    listed = (await operator.get("/api/v1/signing-keys")).json()["signing_keys"]
    published = (await client.get("/.well-known/jwks.json")).json()["keys"]
    assert [key["kid"] for key in listed] == [key["kid"] for key in published]
    assert [(key["state"], key["bits"]) for key in listed] == [("active", 2048), ("pending", 2048)]
    active, pending = listed
    assert active.keys() == {
        *("kid", "state", "bits", "published_at", "may_sign_from"),
        *("activated_at", "rotate_at", "rotation_asked_at", "publish_until", "verifiers"),
    }
    # Postgres read its clock for each.
    beyond = at(active["rotate_at"]) - at(active["activated_at"]) - timedelta(days=30)
    assert abs(beyond) < timedelta(seconds=1)
    assert (pending["activated_at"], pending["rotate_at"]) == (None, None)
    lead = at(pending["may_sign_from"]) - at(pending["published_at"])
    assert (active["may_sign_from"], lead) == (None, timedelta(days=1))


async def test_each_filter_of_the_log_holds_and_all_hold_together(
    operator: httpx.AsyncClient,
    operator_credential: Credential,
    client: httpx.AsyncClient,
    vkyc: Credential,
    enrol: Enrol,
    records: Records,
) -> None:
    doc = await enrol("doc", source_system="doc_service")
    grant = {"grant_type": "client_credentials"}
    headers = {"X-Request-Id": "this-one"}
    issued = await client.post("/oauth/token", auth=vkyc, data=grant, headers=headers)
    jti = jwt.decode(issued.json()["access_token"], options={"verify_signature": False})["jti"]
    await client.post("/oauth/token", auth=doc, data=grant)
    await client.post("/oauth/token", auth=(vkyc[0], "wrong"), data=grant)
    (held,) = (await operator.get(f"{USERS}/{vkyc[0]}/credentials")).json()["credentials"]

    async def actions(count: int, **filters: str) -> list[str]:
        return [record["action"] for record in await records(count, **filters)]

    of_vkyc = ["service_user.create", "credential.create", "token.issue", "token.issue"]
    assert await actions(4, service_user=vkyc[0]) == of_vkyc
    assert await actions(4, service_user="vkyc-prod") == of_vkyc
    assert await actions(4, source_system="vkyc") == of_vkyc
    assert await actions(2, credential=held["id"]) == ["credential.create", "token.issue"]
    assert await actions(4, actor="operator") == of_vkyc[:2] * 2
    assert await actions(4, actor=operator_credential[0]) == of_vkyc[:2] * 2
    assert await actions(2, action="credential.create") == ["credential.create"] * 2
    assert await actions(1, outcome="refused") == ["token.issue"]
    assert await actions(1, request_id="this-one") == ["token.issue"]
    assert await actions(1, jti=jti) == ["token.issue"]
    assert await actions(1, jti=jti.upper()) == ["token.issue"]
    together = {"service_user": "vkyc-prod", "action": "token.issue", "outcome": "success"}
    assert [record["id"] for record in await records(1, **together)] == [jti]
    assert await actions(0, service_user="vkyc-prod", source_system="doc_service") == []
    (record,) = await records(1, jti=jti)
    later = f"{at(record['recorded_at']) + timedelta(microseconds=1):%FT%T.%fZ}"
    assert await actions(3, service_user=vkyc[0], until=later) == of_vkyc[:3]
    assert await actions(2, service_user=vkyc[0], until=record["recorded_at"]) == of_vkyc[:2]
    assert await actions(2, service_user=vkyc[0], since=record["recorded_at"]) == of_vkyc[2:]
    assert await actions(1, service_user=vkyc[0], since=later) == of_vkyc[3:]
    for far in ("0001-01-01T00:00:00Z", "1969-12-31T23:59:59Z", "1970-01-01T00:30:00Z"):
        assert len(await actions(4, service_user=vkyc[0], since=far)) == 4
        assert await actions(0, service_user=vkyc[0], until=far) == []
    for far in ("9999-12-31T23:59:59Z", "5000-01-01T00:00:00+14:00"):
        assert len(await actions(4, service_user=vkyc[0], until=far)) == 4
        assert await actions(0, service_user=vkyc[0], since=far) == []


async def test_the_log_is_read_in_both_directions_and_resumed(
    operator: httpx.AsyncClient, client: httpx.AsyncClient, vkyc: Credential, records: Records
) -> None:
    grant = {"grant_type": "client_credentials"}
    for _ in range(5):
        await client.post("/oauth/token", auth=vkyc, data=grant)
    of_vkyc = {"service_user": vkyc[0]}
    whole = [record["id"] for record in await records(7, **of_vkyc)]

    async def read(order: str, cursor: str | None) -> tuple[list[str], str | None]:
        after = {"cursor": cursor} if cursor else {}
        answer = await operator.get(LOG, params={**of_vkyc, "order": order, "limit": 3, **after})
        assert answer.status_code == 200
        body = answer.json()
        return [record["id"] for record in body["records"]], body["next_cursor"]

    forward: list[str] = []
    cursor: str | None = None
    for size in (3, 3, 1, 0, 0):
        page, cursor = await read("asc", cursor)
        assert len(page) == size
        assert cursor is not None
        forward += page
    assert forward == whole
    backward: list[str] = []
    before: str | None = None
    for size in (3, 3, 1):
        page, before = await read("desc", before)
        assert len(page) == size
        backward += page
    assert before is None
    assert backward == whole[::-1]
    await client.post("/oauth/token", auth=vkyc, data=grant)
    await records(8, **of_vkyc)
    page, _ = await read("asc", cursor)
    assert len(page) == 1
    assert page[0] not in whole


async def test_every_act_is_on_record_with_who_did_it_and_from_where(
    operator: httpx.AsyncClient, operator_credential: Credential, records: Records
) -> None:
    headers = {"User-Agent": "tester/1"}
    body = {"name": "n", "source_system": "s", "scopes": ["a"], "contact": "erika@example.com"}
    created = await operator.post(USERS, json=body, headers=headers)
    user = created.headers["location"]
    made = await operator.post(f"{user}/credentials", json={"label": "l"}, headers=headers)
    revoke = f"{user}/credentials/{made.json()['id']}/revoke"
    answers = [
        created,
        made,
        await operator.post(f"{user}/tokens", json={}, headers=headers),
        await operator.patch(user, json={"scopes": []}, headers={**headers, "If-Match": '"2"'}),
        await operator.post(f"{user}/disable", headers=headers),
        await operator.post(f"{user}/enable", headers=headers),
        await operator.post(revoke, headers=headers),
    ]
    (held,) = (await operator.get(f"{USERS}/{operator_credential[0]}/credentials")).json()[
        "credentials"
    ]
    logged = await records(7, service_user="n")
    assert [record["action"] for record in logged] == [
        "service_user.create",
        "credential.create",
        "token.mint",
        "service_user.change",
        "service_user.disable",
        "service_user.enable",
        "credential.revoke",
    ]
    for answer, record in zip(answers, logged, strict=True):
        assert record["request_id"] == answer.headers["x-request-id"]
        assert record["outcome"] == "success"
        assert record["actor_id"] == operator_credential[0]
        assert record["actor"] == "operator"
        assert record["actor_credential_id"] == held["id"]
        assert record["client_address"] == "127.0.0.1"
        assert record["user_agent"] == "tester/1"
        assert record["service_user_id"] == created.json()["id"]
        assert record["source_system"] == "s"
        assert "erika" not in json.dumps(record)


async def test_a_refusal_is_on_record_before_it_is_answered_and_reads_are_not(
    operator: httpx.AsyncClient, sql: SQL, vkyc: Credential
) -> None:
    for _ in range(2):
        assert (await operator.get(f"{USERS}/{vkyc[0]}")).status_code == 200
        assert (await operator.get(LOG)).status_code == 200
    (reads,) = await sql("SELECT count(*) FROM audit_records WHERE action ~ 'read|query|list'")
    assert reads["count"] == 0
    answer = await operator.post(USERS, json={"name": "X", "source_system": "x"})
    assert answer.status_code == 422
    (row,) = await sql(
        "SELECT action, outcome, reason, actor FROM audit_records WHERE request_id = $1",
        answer.headers["x-request-id"],
    )
    assert tuple(row) == ("service_user.create", "refused", "invalid", "operator")


async def test_what_is_asked_for_by_head_or_options_changes_nothing(
    operator: httpx.AsyncClient, client: httpx.AsyncClient, vkyc: Credential
) -> None:
    allowed = {
        USERS: "GET, OPTIONS, POST",
        f"{USERS}/{vkyc[0]}": "GET, OPTIONS, PATCH",
        f"{USERS}/{vkyc[0]}/credentials": "GET, OPTIONS, POST",
        f"{USERS}/{vkyc[0]}/disable": "OPTIONS, POST",
        LOG: "GET, OPTIONS",
    }
    for path, methods in allowed.items():
        for caller in (operator, client):
            assert (await caller.head(path)).status_code == 405
        answer = await operator.options(path)
        assert (answer.status_code, answer.headers["allow"]) == (204, methods)
        assert (await client.options(path)).status_code == 401
    assert (await operator.get(f"{USERS}/{vkyc[0]}")).json()["status"] == "active"


async def test_the_bearer_token_is_taken_from_one_authorization_header_only(
    operator: httpx.AsyncClient, client: httpx.AsyncClient, settings: Settings
) -> None:
    token = operator.headers["authorization"].removeprefix("Bearer ")
    me = f"{USERS}/me"
    good = [f"Bearer {token}", f"bearer {token}", f"BEARER {token}"]
    for value in good:
        assert (await client.get(me, headers={"Authorization": value})).status_code == 200, value
    bad = ["", "Bearer", "Bearer ", token, f"Basic {token}", f"Bearer  {token}", f"Bearer {token},"]
    for value in bad:
        answer = await client.get(me, headers={"Authorization": value})
        assert answer.status_code == 401, value
        assert problem(answer)
    twice = [("Authorization", f"Bearer {token}")] * 2
    assert (await client.get(me, headers=twice)).status_code == 401
    assert (await client.get(me, params={"access_token": token})).status_code == 401
    assert (await client.get(me, headers={"Cookie": f"access_token={token}"})).status_code == 401
