"""A person is what the portal says, in the forms of ours, and nobody else."""

import re
from datetime import UTC, datetime
from itertools import islice

import msgspec
import pytest

from service.authority.model import NAME, SERVICE_USER_ID, Status
from service.authority.people import Identity, described, names, newcomer

API = "https://tokens.example/api/v1"
ANNA = Identity(issuer="https://login.example", subject="4711", username="anna")
NOW = datetime(2026, 11, 28, tzinfo=UTC)


def test_the_id_is_that_of_issuer_and_subject_alone() -> None:
    assert re.fullmatch(SERVICE_USER_ID, ANNA.service_user_id)
    renamed = msgspec.structs.replace(ANNA, username="other", name="O", email="o@example.com")
    assert renamed.service_user_id == ANNA.service_user_id
    # Also where one ends and the other begins.
    others = [
        msgspec.structs.replace(ANNA, subject="4712"),
        msgspec.structs.replace(ANNA, issuer="https://login.example4", subject="711"),
        msgspec.structs.replace(ANNA, issuer='https://login.example","4', subject="711"),
    ]
    assert len({person.service_user_id for person in [ANNA, *others]}) == 4


@pytest.mark.parametrize(
    ("claims", "name"),
    [
        ({"username": "anna"}, "anna"),
        ({"username": "Anna.Kowalska@bank.example"}, "anna.kowalska"),
        ({"username": "BANK\\anna"}, "bank-anna"),
        ({"username": "", "email": "a.k@bank.example"}, "a.k"),
        ({"username": "", "name": "Zoë Müller"}, "zoe-muller"),
        ({"username": "@bank"}, "person"),
        ({"username": "…"}, "person"),
        ({"username": "安娜"}, "person"),
        ({"username": "su_aaaa"}, "su-aaaa"),
        ({"username": "x" * 300}, "x" * 63),
        ({"username": "\n anna\x00"}, "anna"),
        ({"username": "."}, "person"),
    ],
)
def test_a_name_has_our_form_whatever_it_was(claims: dict[str, str], name: str) -> None:
    offered = list(names(msgspec.structs.replace(ANNA, **claims)))
    assert offered[0] == name
    assert len({*offered}) == len(offered) == 3
    for each in offered:
        assert re.fullmatch(NAME, each)


def test_the_last_name_is_this_persons_alone() -> None:
    other = msgspec.structs.replace(ANNA, subject="4712")
    (_, _, last), (_, _, others) = (tuple(islice(names(who), 3)) for who in (ANNA, other))
    assert last != others
    assert last.endswith(ANNA.service_user_id.removeprefix("su_"))


def test_only_admin_scopes_count_each_once_and_for_the_admin_api_alone() -> None:
    scopes = ("ingest:write", "audit:read", "audit:read", "service-users:read", "coffee:brew")
    person = newcomer(msgspec.structs.replace(ANNA, scopes=scopes), "anna", API, NOW)
    assert person.scopes == ("service-users:read", "audit:read")
    assert person.audiences == (API,)
    assert person.scopes_for(API, API) == person.scopes
    assert person.is_person


def test_what_the_portal_says_later_counts_but_name_and_status_stay() -> None:
    person = newcomer(ANNA, "anna", API, NOW)
    assert described(person, ANNA, API) == person
    disabled = msgspec.structs.replace(person, status=Status.DISABLED, version=7)
    later = Identity(
        issuer=ANNA.issuer,
        subject=ANNA.subject,
        username="operator",
        name="Anna\nKowalska " + "x" * 300,
        email="anna@bank.example",
        scopes=("audit:read",),
    )
    after = described(disabled, later, API)
    assert (after.name, after.status, after.version) == ("anna", Status.DISABLED, 7)
    assert after.owner.startswith("AnnaKowalska")
    assert len(after.owner) == 200
    assert (after.contact, after.scopes) == ("anna@bank.example", ("audit:read",))
