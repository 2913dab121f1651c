"""Hand-over: who may offer, what a link opens and when, and what is on record of it."""

import asyncio
import html
import re
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from itertools import chain, count
from typing import Any, TypeAlias

import asyncpg
import httpx
import pytest

from service.authority.model import AdminScope
from service.settings import Settings
from tests.http.console_client import ConsoleClient

pytestmark = pytest.mark.anyio

Credential: TypeAlias = tuple[str, str]
Enrol: TypeAlias = Callable[..., Awaitable[Credential]]
SignIn: TypeAlias = Callable[..., Awaitable[httpx.AsyncClient]]
Records: TypeAlias = Callable[..., Awaitable[list[dict[str, Any]]]]
SQL: TypeAlias = Callable[..., Awaitable[list[asyncpg.Record]]]
Offer: TypeAlias = Callable[..., Awaitable[tuple[str, str]]]

USERS = "/api/v1/service-users"
SECRET = re.compile("pvs_[0-9A-Za-z]{49}")


@pytest.fixture
def stranger(client: httpx.AsyncClient, settings: Settings) -> ConsoleClient:
    """Somebody with a link and nothing else."""
    return ConsoleClient(client, settings.issuer)


@pytest.fixture
def offer(operator: httpx.AsyncClient, vkyc: Credential) -> Offer:
    """Hand a credential over to vkyc-prod: its id, and the code in its link."""

    labels = chain(("by link",), (f"by link {number}" for number in count(2)))

    async def offered(**fields: Any) -> tuple[str, str]:
        body = {"label": next(labels), **fields}
        made = await operator.post(f"{USERS}/{vkyc[0]}/hand-overs", json=body)
        assert made.status_code == 201, made.text
        return made.json()["id"], made.json()["link"].partition("#")[2]

    return offered


def text_of(answer: httpx.Response) -> str:
    """What a person reads of a page, in one line."""
    main = answer.text.partition("<main")[2]
    return " ".join(html.unescape(re.sub("<[^>]+>", "", main)).split())


async def test_the_api_hands_over_a_credential_that_nobody_can_use_yet(
    operator: httpx.AsyncClient, vkyc: Credential, settings: Settings, records: Records
) -> None:
    made = await operator.post(f"{USERS}/{vkyc[0]}/hand-overs", json={"label": "by link"})
    assert made.status_code == 201
    assert made.headers["cache-control"] == "no-store"
    body = made.json()
    assert re.fullmatch(
        re.escape(f"{settings.issuer}/console/hand-over#") + "[0-9A-Za-z]{43}", body["link"]
    )
    assert (body["state"], body["opened_at"]) == ("offered", None)
    assert "client_secret" not in body
    listed = (await operator.get(f"{USERS}/{vkyc[0]}/credentials")).json()["credentials"][0]
    assert listed == {name: body[name] for name in listed}
    (record,) = await records(action="credential.hand_over", credential=body["id"])
    assert record["details"]["label"] == "by link"
    assert body["link"].partition("#")[2] not in str(record)


async def test_whoever_opens_the_link_gets_a_secret_that_works(
    stranger: ConsoleClient,
    offer: Offer,
    client: httpx.AsyncClient,
    operator: httpx.AsyncClient,
    vkyc: Credential,
    records: Records,
) -> None:
    credential_id, code = await offer()
    looked_at = await stranger.get("/hand-over")
    assert looked_at.status_code == 200
    opened = await stranger.post("/hand-over", {"code": code}, User_Agent="an integrator")
    assert opened.status_code == 200
    assert opened.headers["cache-control"] == "no-store"
    (secret,) = set(SECRET.findall(opened.text))
    assert f"data-secret>{secret}" in opened.text
    assert vkyc[0] in opened.text
    grant = {"grant_type": "client_credentials"}
    exchanged = await client.post("/oauth/token", auth=(vkyc[0], secret), data=grant)
    assert exchanged.status_code == 200
    (record,) = await records(action="credential.open", credential=credential_id)
    assert (record["outcome"], record["service_user"]) == ("success", "vkyc-prod")
    assert record["client_address"] == "127.0.0.1"
    assert record["user_agent"] == "an integrator"
    listed = (await operator.get(f"{USERS}/{vkyc[0]}/credentials")).json()["credentials"][0]
    assert (listed["id"], listed["state"]) == (credential_id, "live")
    assert listed["opened_at"]


async def test_the_whole_link_is_as_good_as_its_code(
    stranger: ConsoleClient, offer: Offer, settings: Settings
) -> None:
    _, code = await offer()
    link = f" {settings.issuer}/console/hand-over#{code} "
    assert (await stranger.post("/hand-over", {"code": link})).status_code == 200


async def test_a_second_opening_is_refused_on_record_and_shown_to_operators(
    stranger: ConsoleClient,
    offer: Offer,
    operator_at_console: ConsoleClient,
    operator: httpx.AsyncClient,
    vkyc: Credential,
    records: Records,
    enrol: Enrol,
) -> None:
    credential_id, code = await offer(label="<b>by link</b>")
    place = f"/service-users/{vkyc[0]}"
    assert (await stranger.post("/hand-over", {"code": code})).status_code == 200
    assert "opened twice" not in text_of(await operator_at_console.get(place))
    assert "hand-over was opened a second time" not in text_of(await operator_at_console.get("/"))
    second = await stranger.post("/hand-over", {"code": code})
    assert second.status_code == 409
    assert not SECRET.search(second.text)
    assert "tell whoever sent the link" in text_of(second)
    (record,) = await records(action="credential.open", outcome="refused")
    assert (record["reason"], record["credential_id"]) == ("hand_over_opened", credential_id)
    assert record["service_user_id"] == vkyc[0]
    assert record["client_address"] == "127.0.0.1"

    shown = await operator_at_console.get(place)
    assert "A link was opened twice" in text_of(shown)
    assert "from 127.0.0.1, and again" in text_of(shown)
    assert "<b>by link</b>" not in shown.text
    assert "hand-over was opened a second time" in text_of(await operator_at_console.get("/"))
    other, _ = await enrol("other")
    assert "opened twice" not in text_of(await operator_at_console.get(f"/service-users/{other}"))
    assert (await operator.post(f"/api/v1{place}/credentials/{credential_id}/revoke")).is_success
    assert "opened twice" not in text_of(await operator_at_console.get(place))
    assert "hand-over was opened a second time" not in text_of(await operator_at_console.get("/"))


@pytest.mark.parametrize(
    ("browsers", "is_reload"), [(("one",), True), (("two",), False), (("one", "two"), False)]
)
async def test_a_page_that_was_loaded_again_is_told_from_somebody_else(
    stranger: ConsoleClient,
    offer: Offer,
    operator_at_console: ConsoleClient,
    vkyc: Credential,
    records: Records,
    browsers: tuple[str, ...],
    is_reload: bool,
) -> None:
    _, code = await offer()
    form = {"code": code}
    assert (await stranger.post("/hand-over", form, User_Agent="one")).status_code == 200
    for browser in browsers:
        again = await stranger.post("/hand-over", form, User_Agent=browser)
        assert "opens once" in text_of(again)
        assert "<form" not in again.text.partition("<main")[2]
    await records(1 + len(browsers), action="credential.open")
    shown = await operator_at_console.get(f"/service-users/{vkyc[0]}")
    # Who took a link from next door has that address, too, and perhaps that browser.
    assert 'class="notice bad" role="alert"' in shown.text
    assert ("most likely the page was loaded again" in text_of(shown)) is is_reload


async def test_of_two_who_open_a_link_at_once_one_gets_a_secret(
    stranger: ConsoleClient, offer: Offer
) -> None:
    _, code = await offer()
    answers = await asyncio.gather(*(stranger.post("/hand-over", {"code": code}) for _ in range(6)))
    assert sorted(answer.status_code for answer in answers) == [200, *[409] * 5]
    assert sum(SECRET.search(answer.text) is not None for answer in answers) == 1


@pytest.mark.parametrize("code", ["", "A" * 43, "pvs_" + "A" * 49, "x#", "ü", "0" * 2000])
async def test_a_code_that_nobody_handed_over_is_refused_alike(
    stranger: ConsoleClient, offer: Offer, records: Records, code: str
) -> None:
    await offer()
    answer = await stranger.post("/hand-over", {"code": code})
    assert answer.status_code == 404
    assert "This link is not known here" in text_of(answer)
    if len(code) > 2:
        assert code not in answer.text
    (record,) = await records(action="credential.open")
    assert (record["outcome"], record["reason"]) == ("refused", "unknown_code")
    assert record["service_user_id"] is None


@pytest.mark.parametrize(
    ("arranged", "reason", "words"),
    [
        ("UPDATE credentials SET code_ends_at = now()", "hand_over_lapsed", "not opened in time"),
        ("UPDATE credentials SET expires_at = now()", "hand_over_lapsed", "not opened in time"),
        ("UPDATE credentials SET revoked_at = now()", "revoked_credential", "was withdrawn"),
        ("UPDATE credentials SET held_at = now()", "credential_held", "held after a restore"),
        (
            "UPDATE service_users SET status = 'disabled' FROM credentials WHERE service_users.id ="
            " service_user_id AND service_users.name = 'vkyc-prod' AND label = 'by link' --",
            "service_user_disabled",
            "vkyc-prod is disabled",
        ),
    ],
)
async def test_a_link_that_opens_nothing_any_more_says_why(
    stranger: ConsoleClient,
    offer: Offer,
    records: Records,
    sql: SQL,
    arranged: str,
    reason: str,
    words: str,
) -> None:
    credential_id, code = await offer()
    await sql(f"{arranged} WHERE label = 'by link'")
    answer = await stranger.post("/hand-over", {"code": code})
    assert answer.status_code == 409
    assert words in text_of(answer)
    assert "Ask whoever sent it." in text_of(answer)
    (record,) = await records(action="credential.open")
    assert (record["outcome"], record["reason"]) == ("refused", reason)
    assert record["credential_id"] == credential_id


async def test_looking_at_the_page_opens_nothing(
    stranger: ConsoleClient, offer: Offer, client: httpx.AsyncClient
) -> None:
    _, code = await offer()
    assert (await stranger.get(f"/hand-over?code={code}")).status_code == 200
    assert (await client.head(f"/console/hand-over?code={code}")).status_code == 405
    assert (await stranger.post("/hand-over", {"code": code})).status_code == 200


async def test_a_form_from_another_site_opens_nothing(
    client: httpx.AsyncClient, stranger: ConsoleClient, offer: Offer
) -> None:
    _, code = await offer()
    for origin in ({}, {"Origin": "https://evil.example"}, {"Origin": "null"}):
        answer = await client.post("/console/hand-over", data={"code": code}, headers=origin)
        assert answer.status_code == 403
    assert (await stranger.post("/hand-over", {"code": code})).status_code == 200


async def test_a_revoked_offer_is_dead_and_an_offered_one_takes_a_place(
    operator: httpx.AsyncClient, vkyc: Credential, offer: Offer, stranger: ConsoleClient
) -> None:
    offered = [await offer() for _ in range(9)]  # with its first one, ten
    more = await operator.post(f"{USERS}/{vkyc[0]}/credentials", json={"label": "eleventh"})
    assert (more.status_code, "that is the most" in more.text) == (409, True)
    credential_id, code = offered[0]
    revoked = await operator.post(f"{USERS}/{vkyc[0]}/credentials/{credential_id}/revoke")
    assert revoked.json()["state"] == "revoked"
    assert (await stranger.post("/hand-over", {"code": code})).status_code == 409
    await offer()


async def test_whoever_may_not_make_a_credential_may_not_hand_one_over(
    enrol_operator: Enrol, sign_in: SignIn, settings: Settings, client: httpx.AsyncClient
) -> None:
    above, _ = await enrol_operator("above", AdminScope.AUDIT_READ)
    caller = await enrol_operator("caller", *(set(AdminScope) - {AdminScope.AUDIT_READ}))
    answer = await (await sign_in(caller)).post(f"{USERS}/{above}/hand-overs", json={"label": "x"})
    assert answer.status_code == 403
    person = ConsoleClient(client, settings.issuer)
    await person.sign_in(caller)
    answer = await person.post(
        f"/service-users/{above}/hand-over", {"label": "x", "lifetime": "30"}
    )
    assert (answer.status_code, "#" in text_of(answer)) == (403, False)


# The operator's pages


async def test_an_operator_makes_a_link_at_the_console(
    operator_at_console: ConsoleClient,
    vkyc: Credential,
    stranger: ConsoleClient,
    settings: Settings,
) -> None:
    place = f"/service-users/{vkyc[0]}/hand-over"
    assert "Hand over a credential of vkyc-prod" in text_of(await operator_at_console.get(place))
    made = await operator_at_console.post(place, {"label": "branch 7", "lifetime": "30"})
    assert made.status_code == 200
    (link,) = set(re.findall(re.escape(settings.issuer) + r"/console/hand-over#\w{43}", made.text))
    assert "A second opening is refused" in text_of(made)
    assert (await stranger.post("/hand-over", {"code": link})).status_code == 200


async def test_a_form_that_is_sent_again_makes_no_second_link(
    operator_at_console: ConsoleClient, operator: httpx.AsyncClient, vkyc: Credential
) -> None:
    place = f"/service-users/{vkyc[0]}/hand-over"
    found = re.search(
        'name="credential_id" value="([^"]+)"', (await operator_at_console.get(place)).text
    )
    assert found
    form = {"label": "branch 7", "lifetime": "30", "credential_id": found[1]}
    assert (await operator_at_console.post(place, form)).status_code == 200
    again = await operator_at_console.post(place, form)
    assert (again.status_code, "hand-over#" in again.text) == (409, False)
    assert "This credential was made already" in text_of(again)
    listed = (await operator.get(f"{USERS}/{vkyc[0]}/credentials")).json()["credentials"]
    assert [each["id"] for each in listed if each["label"] == "branch 7"] == [found[1]]


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        ({"label": "", "lifetime": "90"}, "Expected 1 to 100 characters."),
        ({"label": "x" * 101, "lifetime": "90"}, "Expected 1 to 100 characters."),
        ({"label": "<mine>", "lifetime": "9999"}, "Expected one of these, or a day"),
        ({"label": "mine", "lifetime": "90", "until": "never"}, "Expected one of these, or a day"),
        ({"label": "mine", "lifetime": "90", "until": "2999-12-31"}, "Expected a time between"),
    ],
)
async def test_what_was_typed_is_still_there_beside_what_is_wrong(
    operator_at_console: ConsoleClient,
    vkyc: Credential,
    records: Records,
    typed: dict[str, str],
    says: str,
) -> None:
    answer = await operator_at_console.post(f"/service-users/{vkyc[0]}/hand-over", typed)
    assert answer.status_code == 422
    assert says in text_of(answer)
    assert f'value="{html.escape(typed["label"])}"' in answer.text
    if typed["lifetime"] == "90":
        assert 'name="lifetime" value="90" checked>' in answer.text
    assert 'name="until" type="date"' in answer.text
    assert f'value="{typed.get("until", "")}"' in answer.text
    (record,) = await records(action="credential.hand_over", outcome="refused")
    assert record["service_user_id"] == vkyc[0]


async def test_a_link_may_be_for_a_credential_that_ends_on_a_day(
    operator_at_console: ConsoleClient, operator: httpx.AsyncClient, vkyc: Credential
) -> None:
    day = (datetime.now(UTC) + timedelta(days=40)).date().isoformat()
    form = {"label": "dated", "lifetime": "365", "until": day}
    made = await operator_at_console.post(f"/service-users/{vkyc[0]}/hand-over", form)
    assert made.status_code == 200
    listed = (await operator.get(f"{USERS}/{vkyc[0]}/credentials")).json()["credentials"]
    assert listed[0]["expires_at"].startswith(f"{day}T23:59:59")


async def test_too_many_credentials_are_told_in_the_form(
    operator_at_console: ConsoleClient, vkyc: Credential, offer: Offer
) -> None:
    for _ in range(9):
        await offer()
    place = f"/service-users/{vkyc[0]}/hand-over"
    answer = await operator_at_console.post(place, {"label": "eleventh", "lifetime": "30"})
    assert answer.status_code == 409
    assert "that is the most" in text_of(answer)
    assert 'value="eleventh"' in answer.text
