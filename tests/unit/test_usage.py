"""What it means to revoke a credential, from its uses alone."""

from datetime import UTC, datetime, timedelta

import pytest

from service.authority.model import Credential, new_id
from service.authority.usage import Use, UseStanding, judge

NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)


def days_ago(days: float) -> datetime:
    return NOW - timedelta(days=days)


def credential(label: str, *, made: float, ends_in: float = 300, **further: object) -> Credential:
    return Credential(
        id=new_id("cr"),
        service_user_id="su_aaaaaaaaaaaaaaaaaaaaaaaa",
        label=label,
        secret_sha256=bytes(32),
        created_at=days_ago(made),
        expires_at=NOW + timedelta(days=ends_in),
        **further,  # type: ignore[arg-type]
    )


def standing(old: Credential, *others: Credential, last_use: float | None = None) -> UseStanding:
    uses = {} if last_use is None else {old.id: Use(at=days_ago(last_use))}
    return judge([old, *others], uses, NOW.timestamp())[0].standing


OLD = credential("old", made=100)
NEW = credential("new", made=20)


@pytest.mark.parametrize(
    ("last_use", "expected"),
    [
        (None, UseStanding.SAFE),
        (30, UseStanding.SAFE),
        (20, UseStanding.USED),
        (19, UseStanding.USED),
        (0.1, UseStanding.USED),
    ],
)
def test_what_nothing_used_since_a_newer_one_was_made_is_safe_to_delete(
    last_use: float | None, expected: UseStanding
) -> None:
    assert standing(OLD, NEW, last_use=last_use) is expected


@pytest.mark.parametrize(("last_use", "expected"), [(6.9, "too_early"), (7.1, "safe")])
def test_a_use_within_seven_days_makes_it_too_early_to_tell(last_use: float, expected: str) -> None:
    fresh = credential("fresh", made=1)
    assert standing(OLD, fresh, last_use=last_use).value == expected


@pytest.mark.parametrize(
    "other",
    [
        credential("revoked", made=20, revoked_at=days_ago(1)),
        credential("expired", made=20, ends_in=-1),
        credential("held", made=20, held_at=days_ago(1)),
        credential("offered", made=20, code_ends_at=NOW + timedelta(hours=1)),
        credential("older", made=200),
    ],
    ids=lambda each: each.label,
)
def test_only_a_live_newer_one_takes_its_place(other: Credential) -> None:
    assert standing(OLD, other, last_use=30) is UseStanding.UNREPLACED


def test_one_that_was_handed_over_counts_from_when_it_was_opened() -> None:
    opened = credential("opened", made=20, code_ends_at=days_ago(19), opened_at=days_ago(19.5))
    assert standing(OLD, opened, last_use=19.7) is UseStanding.SAFE
    assert standing(OLD, opened, last_use=19.4) is UseStanding.USED


def test_the_first_live_newer_one_is_what_it_is_compared_with() -> None:
    middle, newest = credential("middle", made=50), credential("newest", made=10)
    judged = judge([newest, middle, OLD], {}, NOW.timestamp())
    assert [each.successor and each.successor.label for each in judged] == [
        None,
        "newest",
        "middle",
    ]


def test_an_archived_use_counts_like_one_that_is_in_the_log() -> None:
    archived = credential("archived", made=400, last_used_at=days_ago(3))
    (judged,) = judge([archived], {}, NOW.timestamp())
    assert judged.last_use == Use(at=days_ago(3))
    assert judged.used_recently


@pytest.mark.parametrize(("ends_in", "expected"), [(29.9, True), (30.1, False), (-1, False)])
def test_a_credential_stands_out_for_thirty_days_before_its_end(
    ends_in: float, expected: bool
) -> None:
    (judged,) = judge([credential("one", made=300, ends_in=ends_in)], {}, NOW.timestamp())
    assert judged.ends_soon is expected
