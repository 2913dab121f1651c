"""The API keys page: what it shows, what it asks before it acts, and to whom."""

import html
import re
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias
from urllib.parse import urlencode

import asyncpg
import httpx
import pytest

from service.app import Authority
from service.authority.model import AdminScope
from service.console.service_users import PAGE_SIZE
from service.settings import Settings
from tests.http.console_client import ConsoleClient

pytestmark = pytest.mark.anyio

Credential: TypeAlias = tuple[str, str]
Enrol: TypeAlias = Callable[..., Awaitable[Credential]]
Records: TypeAlias = Callable[..., Awaitable[list[dict[str, Any]]]]
SQL: TypeAlias = Callable[..., Awaitable[list[asyncpg.Record]]]
AtConsole: TypeAlias = Callable[..., Awaitable[ConsoleClient]]

NEW = {
    "name": "vkyc-test",
    "source_system": "vkyc",
    "owner": "KYC team",
    "contact": "kyc-team@example.com",
    "description": "Video identification",
    "scope": ["ingest:write", "search:read"],
    "other_scopes": "reports:read",
    "audiences": "https://ingest.example\r\nhttps://search.example",
    "token_lifetime": "600",
}
SECRET = re.compile(r'<pre id="client-secret"[^>]*data-secret[^>]*>(pvs_[0-9A-Za-z]{49})</pre>')
BASE = re.compile(r'name="base" value="([^"]+)"')
REVOKE = re.compile(r'href="/console(/service-users/su_\w+/credentials/(cr_\w+)/revoke)"')


async def exchange(client: httpx.AsyncClient, credential: Credential) -> int:
    """Exchange a credential; return the status."""
    form = {"grant_type": "client_credentials"}
    return (await client.post("/oauth/token", auth=credential, data=form)).status_code


def text(page: httpx.Response) -> str:
    """What a person reads, in one line."""
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", page.text)).split())


def value(page: httpx.Response, name: str) -> str:
    """What a field of the page holds."""
    found = re.search(rf'<input id="{name}"[^>]* value="([^"]*)"', page.text)
    assert found, name
    return html.unescape(found[1])


def made_with(page: httpx.Response) -> dict[str, str]:
    """The id that a form for a credential was made with."""
    return dict(re.findall(r'name="(credential_id)" value="([^"]*)"', page.text))


async def new_credential(
    operator_at_console: ConsoleClient, service_user_id: str, label: str
) -> Credential:
    """Make a credential as a person does."""
    form = {"label": label, "lifetime": "365", "until": ""}
    made = await operator_at_console.post(f"/service-users/{service_user_id}/credentials/new", form)
    assert made.status_code == 201, text(made)
    found = SECRET.search(made.text)
    assert found
    return service_user_id, found[1]


# The list


async def test_the_first_page_says_what_to_do_when_a_search_finds_nothing(
    operator_at_console: ConsoleClient,
) -> None:
    answer = await operator_at_console.get("/service-users?search=zz")
    assert answer.status_code == 200
    assert "No service user matches" in text(answer)


async def test_the_list_is_searched_by_words_of_name_owner_and_contact(
    operator_at_console: ConsoleClient, enrol: Enrol
) -> None:
    await enrol("vkyc-prod", owner="Identity", contact="vkyc@bank.example")
    await enrol("vkyc-test", owner="Test desk", contact="")
    await enrol("a.vkyc", owner="", contact="")
    for search, expected in (
        ("VKYC", ["a.vkyc", "vkyc-prod", "vkyc-test"]),
        ("prod", ["vkyc-prod"]),
        ("  bank ident ", ["vkyc-prod"]),
        ("desk VK", ["vkyc-test"]),
        ("kyc", []),
        ("<q>'\\:*&|!(\x00\x1f\udcff", []),
    ):
        query = urlencode({"search": search}, errors="surrogateescape")
        answer = await operator_at_console.get(f"/service-users?{query}")
        assert answer.status_code == 200
        assert re.findall(r">([a-z.-]+)</a></th>", answer.text) == expected, search
        if "\x00" not in search:
            assert f'value="{html.escape(search.strip())}"' in answer.text


async def test_the_list_is_filtered_by_source_system_and_status(
    operator_at_console: ConsoleClient, operator: httpx.AsyncClient, enrol: Enrol
) -> None:
    await enrol("one", source_system="scanning")
    disabled, _ = await enrol("two", source_system="scanning")
    await enrol("three", source_system="archive")
    await operator.post(f"/api/v1/service-users/{disabled}/disable")

    async def names(query: str) -> list[str]:
        page = await operator_at_console.get(f"/service-users?{query}")
        return re.findall(r">([a-z.-]+)</a></th>", page.text)

    assert await names("source_system=scanning") == ["one", "two"]
    assert await names("source_system=scanning&status=active&search=") == ["one"]
    assert await names("status=disabled") == ["two"]
    assert await names("source_system=scanning&status=disabled&search=o") == []


@pytest.mark.parametrize(
    ("query", "says"),
    [
        (f"search={'x' * 301}", "Expected up to 300 characters"),
        ("source_system=A%00", "No source system is called that"),
        ("status=asleep", "There is no such status"),
    ],
)
async def test_a_filter_that_can_match_nothing_is_told_beside_its_field(
    operator_at_console: ConsoleClient, query: str, says: str
) -> None:
    answer = await operator_at_console.get(f"/service-users?{query}")
    assert answer.status_code == 422
    assert says in text(answer)


async def test_pages_lead_through_all_service_users_without_a_miss_or_a_repeat(
    operator_at_console: ConsoleClient, operator: httpx.AsyncClient
) -> None:
    for number in range(2 * PAGE_SIZE + 3):
        body = {"name": f"branch-{number:03}", "source_system": "branch"}
        assert (await operator.post("/api/v1/service-users", json=body)).status_code == 201
    seen: list[str] = []
    path: str | None = "/service-users?search=branch&source_system=branch"
    while path:
        page = await operator_at_console.get(path)
        rows = re.findall(r">(branch-\d+)</a></th>", page.text)
        assert 0 < len(rows) <= PAGE_SIZE
        assert len(page.content) < 60_000
        seen += rows
        following = re.search(r'href="/console([^"]+)" rel="next"', page.text)
        path = html.unescape(following[1]) if following else None
    assert seen == [f"branch-{number:03}" for number in range(2 * PAGE_SIZE + 3)]


async def test_the_list_shows_the_last_use_and_what_ends(
    operator_at_console: ConsoleClient, client: httpx.AsyncClient, enrol: Enrol, sql: SQL
) -> None:
    used = await enrol("used")
    await enrol("unused")
    assert await exchange(client, used) == 200
    await sql(
        "UPDATE credentials SET expires_at = now() + interval '12.5 days'"
        " WHERE service_user_id = $1",
        used[0],
    )
    shown = await operator_at_console.get("/service-users?search=us")
    assert re.search(r"1 live\s+<span", shown.text), "a screen reader says two words"
    page = text(shown)
    assert re.search(r"used vkyc active \d+ s ago 1 live ends in 12 days", page), page
    page = text(await operator_at_console.get("/service-users?search=un"))
    assert "unused vkyc active never 1 live" in page
    assert "ends in" not in page


async def test_an_id_in_the_search_leads_to_its_page(
    operator_at_console: ConsoleClient, enrol: Enrol
) -> None:
    service_user_id, _ = await enrol("vkyc")
    answer = await operator_at_console.get(f"/service-users?search={service_user_id}")
    assert (answer.status_code, answer.headers["location"]) == (
        303,
        f"/console/service-users/{service_user_id}",
    )


# Create


async def test_what_is_created_here_is_what_the_api_shows(
    operator_at_console: ConsoleClient, operator: httpx.AsyncClient, records: Records
) -> None:
    answer = await operator_at_console.post("/service-users/new", NEW)
    assert answer.status_code == 303
    service_user_id = answer.headers["location"].split("/")[-1].split("?")[0]
    created = (await operator.get(f"/api/v1/service-users/{service_user_id}")).json()
    assert {name: created[name] for name in ("name", "source_system", "owner", "contact")} == {
        name: NEW[name] for name in ("name", "source_system", "owner", "contact")
    }
    assert created["description"] == NEW["description"]
    assert created["scopes"] == ["ingest:write", "search:read", "reports:read"]
    assert created["audiences"] == ["https://ingest.example", "https://search.example"]
    assert created["token_lifetime"] == 600
    (record,) = await records(action="service_user.create", service_user=service_user_id)
    assert (record["actor"], record["outcome"]) == ("operator", "success")
    page = await operator_at_console.get(f"/service-users/{service_user_id}?done=created")
    assert "make a credential for it" in text(page)


async def test_every_wrong_field_is_told_at_once_and_nothing_typed_is_lost(
    operator_at_console: ConsoleClient, records: Records
) -> None:
    wrong = {
        **NEW,
        "name": "Vkyc Prod",
        "source_system": "v-kyc",
        "owner": "x" * 201,
        "other_scopes": "reports:read BAD",
        "audiences": "nonsense",
        "token_lifetime": "5",
    }
    answer = await operator_at_console.post("/service-users/new", wrong)
    assert answer.status_code == 422
    assert answer.text.count('aria-invalid="true"') == 5
    assert "“BAD” is no scope" in text(answer)
    assert "“nonsense” is no audience" in text(answer)
    for name in ("name", "source_system", "owner", "contact", "token_lifetime", "other_scopes"):
        assert value(answer, name) == wrong[name]
    assert '<input type="checkbox" name="scope" value="search:read" checked>' in answer.text
    assert ">Video identification</textarea>" in answer.text
    (record,) = await records(action="service_user.create", outcome="refused")
    assert record["reason"] == "invalid"


async def test_an_address_of_no_service_user_leads_back_to_the_api_keys(
    operator_at_console: ConsoleClient, vkyc: Credential
) -> None:
    for path in ("su_xxxx", f"su_{'a' * 24}"):
        answer = await operator_at_console.get(f"/service-users/{path}")
        assert answer.status_code == 404
        assert "There is no such service user." in text(answer)
        assert '<a href="/console/service-users">API keys</a> ·' in answer.text
    answer = await operator_at_console.get(f"/service-users/{vkyc[0]}/credentials/cr_1/revoke")
    assert answer.status_code == 404
    assert "There is no such credential." in text(answer)


async def test_a_name_that_is_taken_is_told_beside_the_name(
    operator_at_console: ConsoleClient, enrol: Enrol
) -> None:
    await enrol("vkyc-test")
    answer = await operator_at_console.post("/service-users/new", NEW)
    assert answer.status_code == 409
    assert re.search(r'id="name-says" class="hint"><strong>This name is taken', answer.text)
    whose = re.search(r'<a href="/console([^"]+)"[^>]*>Show whose it is', answer.text)
    assert whose is not None
    assert ">vkyc-test</a>" in (await operator_at_console.get(whose[1])).text
    assert value(answer, "contact") == NEW["contact"]


async def test_admin_scopes_without_their_audience_are_told_beside_the_audiences(
    operator_at_console: ConsoleClient, settings: Settings
) -> None:
    form = {**NEW, "scope": ["audit:read"]}
    answer = await operator_at_console.post("/service-users/new", form)
    assert answer.status_code == 422
    assert f"audit:read needs the audience {settings.api_audience}" in text(answer)
    form["audiences"] = settings.api_audience
    assert (await operator_at_console.post("/service-users/new", form)).status_code == 303


# Change


async def test_only_what_was_typed_over_is_changed(
    operator_at_console: ConsoleClient,
    operator: httpx.AsyncClient,
    records: Records,
    vkyc: Credential,
) -> None:
    path = f"/service-users/{vkyc[0]}/change"
    form = _form_of(await operator_at_console.get(path))
    answer = await operator_at_console.post(path, {**form, "owner": "Identity"})
    assert answer.status_code == 303
    (record,) = await records(action="service_user.change", service_user=vkyc[0])
    assert record["details"] == {"owner": "changed"}
    user = (await operator.get(f"/api/v1/service-users/{vkyc[0]}")).json()
    assert (user["owner"], user["scopes"]) == ("Identity", ["ingest:write", "search:read"])


async def test_whoever_was_overtaken_is_told_what_changed_and_loses_nothing(
    operator_at_console: ConsoleClient,
    operator: httpx.AsyncClient,
    records: Records,
    vkyc: Credential,
) -> None:
    path = f"/service-users/{vkyc[0]}/change"
    form = _form_of(await operator_at_console.get(path))
    user = (await operator.get(f"/api/v1/service-users/{vkyc[0]}")).json()
    theirs = {"owner": "Theirs", "description": "Their words", "scopes": ["ingest:write"]}
    changed = await operator.patch(
        f"/api/v1/service-users/{vkyc[0]}",
        json=theirs,
        headers={"If-Match": f'"{user["version"]}"'},
    )
    assert changed.status_code == 200

    answer = await operator_at_console.post(
        path, {**form, "owner": "Mine", "contact": "me@example.com"}
    )
    assert answer.status_code == 412
    shown = text(answer)
    assert "Owner (empty) Theirs Mine" in shown
    assert "Description (empty) Their words (not touched)" in shown
    assert "Scopes ingest:write search:read ingest:write (not touched)" in shown
    (record,) = await records(action="service_user.change", outcome="refused")
    assert (record["reason"], record["actor"]) == ("precondition_failed", "operator")
    assert (await operator.get(f"/api/v1/service-users/{vkyc[0]}")).json()["owner"] == "Theirs"

    again = _form_of(answer)
    assert (again["owner"], again["contact"]) == ("Mine", "me@example.com")
    assert (again["description"], again["scope"]) == ("Their words", ["ingest:write"])
    assert (await operator_at_console.post(path, again)).status_code == 303
    user = (await operator.get(f"/api/v1/service-users/{vkyc[0]}")).json()
    assert (user["owner"], user["contact"], user["description"], user["scopes"]) == (
        "Mine",
        "me@example.com",
        "Their words",
        ["ingest:write"],
    )


async def test_a_change_that_leaves_the_fields_alone_is_told_too(
    operator_at_console: ConsoleClient, operator: httpx.AsyncClient, vkyc: Credential
) -> None:
    path = f"/service-users/{vkyc[0]}/change"
    form = _form_of(await operator_at_console.get(path))
    await operator.post(f"/api/v1/service-users/{vkyc[0]}/disable")
    answer = await operator_at_console.post(path, {**form, "owner": "Mine"})
    assert answer.status_code == 412
    assert "None of these fields: its status or its credentials. It is disabled now" in text(answer)
    assert (await operator_at_console.post(path, _form_of(answer))).status_code == 303


@pytest.mark.parametrize("base", ["", "{}", "[1]", '{"version":"1","was":{}}'])
async def test_a_change_without_what_it_was_made_of_is_refused(
    operator_at_console: ConsoleClient, vkyc: Credential, base: str
) -> None:
    path = f"/service-users/{vkyc[0]}/change"
    form = {**_form_of(await operator_at_console.get(path)), "base": base}
    assert (await operator_at_console.post(path, form)).status_code == 400


# Disable and enable


async def test_disabling_says_what_it_breaks_and_asks(
    operator_at_console: ConsoleClient, client: httpx.AsyncClient, vkyc: Credential
) -> None:
    path = f"/service-users/{vkyc[0]}"
    for _ in range(3):
        assert await exchange(client, vkyc) == 200
    asked = text(await operator_at_console.get(f"{path}/disable"))
    assert re.search(r"Last exchange \d+ s ago from 127\.0\.0\.1 Live tokens 3, the last", asked)
    assert await exchange(client, vkyc) == 200

    assert (await operator_at_console.post(f"{path}/disable")).status_code == 303
    assert await exchange(client, vkyc) == 401
    done = text(await operator_at_console.get(f"{path}?done=disabled"))
    assert (
        "From now on no process issues a token to it. Tokens that were issued before live on: 4"
        in done
    )
    assert (await operator_at_console.post(f"{path}/enable")).status_code == 303
    assert await exchange(client, vkyc) == 200


async def test_the_last_operator_cannot_be_disabled_and_is_told_why(
    operator_at_console: ConsoleClient, operator_credential: Credential
) -> None:
    answer = await operator_at_console.post(f"/service-users/{operator_credential[0]}/disable")
    assert answer.status_code == 409
    assert "nobody who can administer" in text(answer)


# Credentials


async def test_a_secret_is_shown_once_and_works(
    operator_at_console: ConsoleClient,
    client: httpx.AsyncClient,
    vkyc: Credential,
    records: Records,
) -> None:
    path = f"/service-users/{vkyc[0]}/credentials/new"
    form = {"label": "  vault,  2026 ", "lifetime": "90", "until": ""}
    made = await operator_at_console.post(path, form)
    assert made.status_code == 201
    assert made.headers["cache-control"] == "no-store"
    found = SECRET.search(made.text)
    assert found
    secret = found[1]
    assert f"curl -sS -u '{vkyc[0]}:{secret}'" in html.unescape(made.text)
    assert await exchange(client, (vkyc[0], secret)) == 200
    page = await operator_at_console.get(f"/service-users/{vkyc[0]}")
    assert secret not in page.text
    assert "vault, 2026" in text(page)
    assert re.search(
        r"vault, 2026 Audit of cr_[a-z2-7]{24} live \d+ s ago in (89|90) days \d+ s ago from "
        r"127\.0\.0\.1",
        text(page),
    )
    assert secret not in str(await records(2, action="credential.create", service_user=vkyc[0]))


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        ({"label": "", "lifetime": "30"}, "Expected 1 to 100 characters"),
        ({"label": "x" * 101, "lifetime": "30"}, "Expected 1 to 100 characters"),
        ({"label": "kept", "lifetime": "31"}, "Expected one of these, or a day"),
        (
            {"label": "kept", "lifetime": "30", "until": "tomorrow"},
            "Expected one of these, or a day",
        ),
        ({"label": "kept", "lifetime": "30", "until": "2020-01-01"}, "Expected a time between"),
        ({"label": "kept", "lifetime": "30", "until": "2999-12-31"}, "Expected a time between"),
    ],
)
async def test_a_credential_that_was_asked_for_wrongly_is_told_in_the_form(
    operator_at_console: ConsoleClient, vkyc: Credential, typed: dict[str, str], says: str
) -> None:
    answer = await operator_at_console.post(f"/service-users/{vkyc[0]}/credentials/new", typed)
    assert answer.status_code == 422
    assert says in text(answer)
    assert value(answer, "label") == typed["label"]


async def test_a_day_goes_before_a_span_and_counts_to_its_end(
    operator_at_console: ConsoleClient, operator: httpx.AsyncClient, vkyc: Credential, sql: SQL
) -> None:
    (row,) = await sql("SELECT to_char(now() + interval '40 days', 'YYYY-MM-DD') AS day")
    form = {"label": "dated", "lifetime": "365", "until": row["day"]}
    assert (
        await operator_at_console.post(f"/service-users/{vkyc[0]}/credentials/new", form)
    ).status_code == 201
    listed = await operator.get(f"/api/v1/service-users/{vkyc[0]}/credentials")
    assert listed.json()["credentials"][0]["expires_at"] == f"{row['day']}T23:59:59Z"


async def test_a_form_that_is_sent_again_makes_no_second_credential(
    operator_at_console: ConsoleClient,
    operator: httpx.AsyncClient,
    client: httpx.AsyncClient,
    vkyc: Credential,
    records: Records,
) -> None:
    path = f"/service-users/{vkyc[0]}/credentials/new"
    form = {
        "label": "vault",
        "lifetime": "90",
        "until": "",
        **made_with(await operator_at_console.get(path)),
    }
    made = await operator_at_console.post(path, form)
    assert made.status_code == 201
    found = SECRET.search(made.text)
    assert found
    again = await operator_at_console.post(path, form)
    assert again.status_code == 409
    assert "This credential was made already" in text(again)
    assert f"{path.removesuffix('new')}{form['credential_id']}/revoke" in again.text
    assert not SECRET.search(again.text)
    assert await exchange(client, (vkyc[0], found[1])) == 200
    listed = (await operator.get(f"/api/v1/service-users/{vkyc[0]}/credentials")).json()
    assert [each["label"] for each in listed["credentials"]] == ["vault", "first"]
    (refusal,) = await records(action="credential.create", outcome="refused")
    assert refusal["reason"] == "conflict"


@pytest.mark.parametrize("offered", ["cr_1", "su_" + "a" * 24, "cr_" + "A" * 24])
async def test_a_credential_gets_no_id_but_one_that_a_form_was_made_with(
    operator_at_console: ConsoleClient, vkyc: Credential, offered: str
) -> None:
    form = {"label": "vault", "lifetime": "90", "credential_id": offered}
    for page in ("credentials/new", "hand-over"):
        answer = await operator_at_console.post(f"/service-users/{vkyc[0]}/{page}", form)
        assert answer.status_code == 400
        assert "This form was not made here" in text(answer)


async def test_no_form_takes_the_id_of_a_credential_that_somebody_else_has(
    operator_at_console: ConsoleClient,
    client: httpx.AsyncClient,
    operator_credential: Credential,
    vkyc: Credential,
    sql: SQL,
) -> None:
    (row,) = await sql("SELECT id FROM credentials WHERE label = 'bootstrap'")
    form = {"label": "vault", "lifetime": "90", "credential_id": row["id"]}
    for page in ("credentials/new", "hand-over"):
        assert (
            await operator_at_console.post(f"/service-users/{vkyc[0]}/{page}", form)
        ).status_code == 409
    assert await exchange(client, operator_credential) == 200


async def test_a_label_is_taken_by_one_live_credential_and_those_that_ended_are_told_apart(
    operator_at_console: ConsoleClient, operator: httpx.AsyncClient, vkyc: Credential
) -> None:
    for page in ("credentials/new", "hand-over"):
        form = {"label": "first", "lifetime": "30"}
        answer = await operator_at_console.post(f"/service-users/{vkyc[0]}/{page}", form)
        assert answer.status_code == 409
        assert re.search(
            '<p id="label-says" class="hint"><strong>vkyc-prod has a live credential', answer.text
        )
    api = f"/api/v1/service-users/{vkyc[0]}/credentials"
    (held,) = (await operator.get(api)).json()["credentials"]
    assert (await operator.post(f"{api}/{held['id']}/revoke")).status_code == 200
    await new_credential(operator_at_console, vkyc[0], "first")
    listed = (await operator.get(api)).json()["credentials"]
    assert len(listed) == 2
    shown = await operator_at_console.get(f"/service-users/{vkyc[0]}")
    for held in listed:
        assert f'href="/console/audit?credential={held["id"]}"' in shown.text
        asked = text(
            await operator_at_console.get(
                f"/service-users/{vkyc[0]}/credentials/{held['id']}/revoke"
            )
        )
        if held["state"] == "live":
            assert re.search(f"Credential {held['id']} .*Made 2.*Ends 2", asked)
    for page in ("credentials/new", "hand-over"):
        assert "In use: “first”." in text(
            await operator_at_console.get(f"/service-users/{vkyc[0]}/{page}")
        )


async def test_each_credential_says_whether_it_is_safe_to_delete(
    operator_at_console: ConsoleClient, client: httpx.AsyncClient, vkyc: Credential, sql: SQL
) -> None:
    page = f"/service-users/{vkyc[0]}"
    assert "The newest one, not used yet." in text(await operator_at_console.get(page))
    assert await exchange(client, vkyc) == 200
    assert "The newest one: nothing replaces it." in text(await operator_at_console.get(page))

    second = await new_credential(operator_at_console, vkyc[0], "second")
    assert "Too early to delete. Not used since second was made" in text(
        await operator_at_console.get(page)
    )
    assert await exchange(client, vkyc) == 200
    assert "Still in use. It was used after second was made" in text(
        await operator_at_console.get(page)
    )

    await sql(
        "UPDATE audit_records SET recorded_at = now() - interval '9 days'"
        " WHERE action = 'token.issue'"
    )
    await sql(
        "UPDATE credentials SET created_at = now() - interval '20 days' WHERE label = 'first'"
    )
    await sql(
        "UPDATE credentials SET created_at = now() - interval '8 days' WHERE label = 'second'"
    )
    assert await exchange(client, second) == 200
    shown = text(await operator_at_console.get(page))
    assert "Safe to delete. Not used since second was made 8 days ago" in shown
    assert "9 days ago from 127.0.0.1" in shown


async def test_one_that_was_never_used_is_not_safe_to_delete_while_it_may_be_rolled_out(
    operator_at_console: ConsoleClient, vkyc: Credential, sql: SQL
) -> None:
    page = f"/service-users/{vkyc[0]}"
    await new_credential(operator_at_console, vkyc[0], "second")
    shown = text(await operator_at_console.get(page))
    assert re.search(r"Too early to delete. Not used yet, made \d+ s ago ?: it may still", shown)
    assert "Safe to delete." not in shown
    await sql("UPDATE credentials SET created_at = now() - interval '8 days'")
    await sql("UPDATE credentials SET created_at = now() WHERE label = 'second'")
    assert "Safe to delete. Never used, and second was made" in text(
        await operator_at_console.get(page)
    )


async def test_one_that_was_used_lately_is_revoked_only_by_who_types_its_label(
    operator_at_console: ConsoleClient,
    client: httpx.AsyncClient,
    vkyc: Credential,
    records: Records,
) -> None:
    assert await exchange(client, vkyc) == 200
    detail = await operator_at_console.get(f"/service-users/{vkyc[0]}")
    ((path, credential_id),) = REVOKE.findall(detail.text)
    assert "It was used in the last 7 days" in text(await operator_at_console.get(path))
    for typed in ("", "First", "second"):
        answer = await operator_at_console.post(path, {"label": typed})
        assert answer.status_code == 422
        assert "This is something else. Nothing was revoked." in text(answer)
    assert await exchange(client, vkyc) == 200
    answer = await operator_at_console.post(path, {"label": "first"})
    assert (answer.status_code, answer.headers["location"]) == (
        303,
        f"/console/service-users/{vkyc[0]}?done=revoked",
    )
    assert await exchange(client, vkyc) == 401
    (record,) = await records(action="credential.revoke", outcome="success")
    assert (record["credential_id"], record["actor"]) == (credential_id, "operator")
    done = text(await operator_at_console.get(f"/service-users/{vkyc[0]}?done=revoked"))
    assert "live on: of all its credentials 2, the last one ends in" in done
    assert not REVOKE.search((await operator_at_console.get(f"/service-users/{vkyc[0]}")).text)
    assert "It has ended already: it is revoked." in text(await operator_at_console.get(path))


async def test_one_that_was_not_used_is_revoked_after_one_question(
    operator_at_console: ConsoleClient, client: httpx.AsyncClient, vkyc: Credential
) -> None:
    ((path, _),) = REVOKE.findall((await operator_at_console.get(f"/service-users/{vkyc[0]}")).text)
    assert "Type its label" not in text(await operator_at_console.get(path))
    assert await exchange(client, vkyc) == 200
    # Used since the question was asked: it is asked again.
    assert (await operator_at_console.post(path)).status_code == 422
    ((path, _),) = REVOKE.findall((await operator_at_console.get(f"/service-users/{vkyc[0]}")).text)
    assert (await operator_at_console.post(path, {"label": "first"})).status_code == 303


async def test_whoever_would_sign_itself_out_is_told_so(
    operator_at_console: ConsoleClient, operator_credential: Credential
) -> None:
    page = await operator_at_console.get(f"/service-users/{operator_credential[0]}")
    ((path, _),) = REVOKE.findall(page.text)
    assert "You are signed in with this credential" in text(await operator_at_console.get(path))
    answer = await operator_at_console.post(path, {"label": "bootstrap"})
    assert answer.status_code == 409
    assert "nobody who can administer" in text(answer)


async def test_a_held_credential_is_confirmed_with_a_reason(
    operator_at_console: ConsoleClient,
    client: httpx.AsyncClient,
    vkyc: Credential,
    sql: SQL,
    records: Records,
) -> None:
    await sql("UPDATE credentials SET held_at = now() WHERE service_user_id = $1", vkyc[0])
    await sql("UPDATE service_users SET version = version + 1 WHERE id = $1", vkyc[0])
    page = await operator_at_console.get(f"/service-users/{vkyc[0]}")
    assert "Held since the database was restored" in text(page)
    found = re.search(r'href="/console(/service-users/\w+/credentials/\w+/confirm)"', page.text)
    assert found
    assert "may have been revoked after the backup" in text(await operator_at_console.get(found[1]))
    answer = await operator_at_console.post(found[1], {"reason": "ok"})
    assert answer.status_code == 422
    assert value(answer, "reason") == "ok"
    assert (
        await operator_at_console.post(found[1], {"reason": "known to be good"})
    ).status_code == 303
    assert await exchange(client, vkyc) == 200
    (record,) = await records(action="credential.confirm", outcome="success")
    assert record["reason"] == "known to be good"
    assert "There is nothing to do" in text(await operator_at_console.get(found[1]))


async def test_another_ones_credential_is_not_found(
    operator_at_console: ConsoleClient, vkyc: Credential, enrol: Enrol
) -> None:
    other, _ = await enrol("other")
    ((path, _),) = REVOKE.findall((await operator_at_console.get(f"/service-users/{vkyc[0]}")).text)
    foreign = path.replace(vkyc[0], other)
    for answer in (await operator_at_console.get(foreign), await operator_at_console.post(foreign)):
        assert answer.status_code == 404


# What ends


async def test_what_ends_and_is_needed_is_listed_and_counted(
    operator_at_console: ConsoleClient,
    client: httpx.AsyncClient,
    authority: Authority,
    enrol: Enrol,
    operator: httpx.AsyncClient,
    sql: SQL,
) -> None:
    alone = await enrol("alone", owner="Branches", contact="branches@example.com")
    moved, stuck, off, later = [await enrol(each) for each in ("moved", "stuck", "off", "later")]
    for credential in (moved, stuck):
        assert await exchange(client, credential) == 200
        await new_credential(operator_at_console, credential[0], "second")
    assert await exchange(client, stuck) == 200
    await operator.post(f"/api/v1/service-users/{off[0]}/disable")
    await sql(
        "UPDATE credentials SET expires_at = now() + interval '3 days'"
        " WHERE label = 'first' AND service_user_id = ANY ($1)",
        [alone[0], moved[0], stuck[0], off[0]],
    )
    await sql(
        "UPDATE credentials SET expires_at = now() + interval '20 days' WHERE service_user_id = $1",
        later[0],
    )
    page = await operator_at_console.get("/service-users/ending")
    listed = re.findall(r">([a-z]+)</a></th>", page.text)
    assert (set(listed[:2]), listed[2:]) == ({"alone", "stuck"}, ["later"])
    assert "Branches branches@example.com" in text(page)
    assert "there is no newer one that lasts longer" in text(page)

    await authority.count_ending()
    exposed = (await client.get("/metrics")).text
    for within, count in (("30d", 3), ("7d", 2), ("1d", 0)):
        assert f'privyseal_credentials_ending{{within="{within}"}} {count}.0' in exposed


async def test_pages_lead_through_all_that_ends(
    operator_at_console: ConsoleClient,
    vkyc: Credential,
    sql: SQL,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("service.authority.usage.ENDING_AT_A_TIME", 7)
    await sql(
        "INSERT INTO service_users"
        " SELECT 'su_' || lpad(translate(n::text, '0189', 'abcd'), 24, 'z'),"
        " 'many-' || n, source_system, owner, contact, description, scopes, audiences,"
        " token_lifetime, status, 1, now() FROM service_users, generate_series(1, 120) n"
        " WHERE id = $1",
        vkyc[0],
    )
    await sql(
        "INSERT INTO credentials"
        " (id, service_user_id, label, secret_sha256, created_at, expires_at)"
        " SELECT 'cr_' || substr(id, 4), id, 'one', sha256(id::bytea), now(),"
        " date_trunc('second', now()) + interval '1 day' * (1 + right(name, 1)::integer)"
        " FROM service_users WHERE name LIKE 'many-%'"
    )
    seen: list[str] = []
    path: str | None = "/service-users/ending"
    while path:
        page = await operator_at_console.get(path)
        seen += re.findall(r">(many-\d+)</a></th>", page.text)
        following = re.search(r'href="/console([^"]+)" rel="next"', page.text)
        path = following[1] if following else None
    assert len(seen) == len(set(seen)) == 120
    assert [int(name[-1]) for name in seen] == sorted(int(name[-1]) for name in seen)
    assert (
        await operator_at_console.get("/service-users/ending?after=99999999999999.1.cr_x")
    ).status_code == 200
    assert (
        await operator_at_console.get(
            f"/service-users/ending?after=999999999999.000000.cr_{'a' * 24}"
        )
    ).status_code == 200


# Rights


PAGES = (
    "/service-users",
    "/service-users/ending",
    "/service-users/new",
    "/service-users/{id}",
    "/service-users/{id}/change",
    "/service-users/{id}/disable",
    "/service-users/{id}/credentials/new",
    "/service-users/{id}/credentials/{credential}/revoke",
    "/service-users/{id}/credentials/{credential}/confirm",
)
FORMS = (
    "/service-users/new",
    "/service-users/{id}/change",
    "/service-users/{id}/disable",
    "/service-users/{id}/enable",
    "/service-users/{id}/credentials/new",
    "/service-users/{id}/credentials/{credential}/revoke",
    "/service-users/{id}/credentials/{credential}/confirm",
)
READABLE = {"/service-users", "/service-users/ending", "/service-users/{id}"}


async def _paths(
    operator: httpx.AsyncClient, vkyc: Credential, templates: tuple[str, ...]
) -> dict[str, str]:
    listed = await operator.get(f"/api/v1/service-users/{vkyc[0]}/credentials")
    credential = listed.json()["credentials"][0]["id"]
    return {each: each.format(id=vkyc[0], credential=credential) for each in templates}


_FORM: dict[str, Any] = {
    **NEW,
    "base": '{"version":2,"was":{"name":"vkyc-prod"}}',
    "label": "first",
    "lifetime": "30",
    "reason": "a reason",
}


async def test_whoever_only_reads_sees_no_address_and_changes_nothing(
    at_console: AtConsole,
    client: httpx.AsyncClient,
    enrol_operator: Enrol,
    operator: httpx.AsyncClient,
    vkyc: Credential,
) -> None:
    assert await exchange(client, vkyc) == 200
    reader = await at_console(await enrol_operator("reader", AdminScope.SERVICE_USERS_READ))
    for template, path in (await _paths(operator, vkyc, PAGES)).items():
        answer = await reader.get(path)
        assert answer.status_code == (200 if template in READABLE else 403), template
        assert "127.0.0.1</code>" not in answer.text
        assert "/credentials/new" not in answer.text
        assert 'href="/console/service-users/new"' not in answer.text
    before = (await operator.get(f"/api/v1/service-users/{vkyc[0]}")).json()
    for template, path in (await _paths(operator, vkyc, FORMS)).items():
        assert (await reader.post(path, _FORM)).status_code == 403, template
    assert (await operator.get(f"/api/v1/service-users/{vkyc[0]}")).json() == before


async def test_an_integrator_opens_none_of_these_pages(
    at_console: AtConsole, operator: httpx.AsyncClient, vkyc: Credential, records: Records
) -> None:
    itself = await at_console(vkyc)
    for template, path in (await _paths(operator, vkyc, PAGES)).items():
        assert (await itself.get(path)).status_code == 403, template
    for template, path in (await _paths(operator, vkyc, FORMS)).items():
        assert (await itself.post(path, _FORM)).status_code == 403, template
    refused = await records(len(PAGES) + len(FORMS), outcome="refused", actor=vkyc[0])
    assert {record["reason"] for record in refused} == {"insufficient_scope"}


async def test_nobody_raises_its_own_rights_here(
    at_console: AtConsole,
    enrol_operator: Enrol,
    operator: httpx.AsyncClient,
    operator_credential: Credential,
    settings: Settings,
) -> None:
    scopes = (AdminScope.SERVICE_USERS_READ, AdminScope.SERVICE_USERS_WRITE)
    lesser = await at_console(await enrol_operator("lesser", *scopes))
    above = {**NEW, "scope": ["audit:read"], "audiences": settings.api_audience}
    assert (await lesser.post("/service-users/new", above)).status_code == 403
    operators_path = f"/service-users/{operator_credential[0]}"
    form = {"label": "mine", "lifetime": "30"}
    assert (await lesser.post(f"{operators_path}/credentials/new", form)).status_code == 403
    change = _form_of(await lesser.get(f"{operators_path}/change"))
    answer = await lesser.post(f"{operators_path}/change", {**change, "owner": "Mine"})
    assert answer.status_code == 403
    listed = await operator.get(f"/api/v1{operators_path}/credentials")
    assert len(listed.json()["credentials"]) == 1


async def test_what_was_typed_stands_as_text(operator_at_console: ConsoleClient) -> None:
    payload = '"><script>alert(1)</script>'
    form = {**NEW, "owner": payload, "contact": payload, "description": payload}
    created = await operator_at_console.post("/service-users/new", form)
    path = created.headers["location"].removeprefix("/console").split("?")[0]
    made = await operator_at_console.post(
        f"{path}/credentials/new", {"label": payload, "lifetime": "30"}
    )
    revoke = REVOKE.search((await operator_at_console.get(path)).text)
    assert revoke
    for page in (
        made,
        await operator_at_console.get(path),
        await operator_at_console.get(f"{path}/change"),
        await operator_at_console.get(f"{path}/disable"),
        await operator_at_console.get(revoke[1]),
        await operator_at_console.get("/service-users"),
    ):
        assert "<script>alert" not in page.text
        assert "&lt;script&gt;alert(1)" in page.text


def _form_of(page: httpx.Response) -> dict[str, Any]:
    """The fields of the form of a service user, as a browser would send them."""
    base = BASE.search(page.text)
    assert base, text(page)
    form: dict[str, Any] = {
        name: value(page, name)
        for name in ("name", "source_system", "owner", "contact", "token_lifetime", "other_scopes")
    }
    areas = dict(re.findall(r'<textarea id="(\w+)"[^>]*>([^<]*)</textarea>', page.text))
    return {
        **form,
        "base": html.unescape(base[1]),
        "description": html.unescape(areas["description"]),
        "audiences": html.unescape(areas["audiences"]),
        "scope": re.findall(r'name="scope" value="([^"]+)" checked', page.text),
    }
