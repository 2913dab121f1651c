"""The picture of the signing keys: what stands where, on any screen."""

from datetime import UTC, datetime
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keys.keyring import KeyState
from service.console.timeline import DAY, HOUR, MAX_TICKS, Life, Row, Timeline, timeline

NOW = datetime(2026, 11, 28, 9, tzinfo=UTC).timestamp()


def life(
    kid: str,
    state: KeyState,
    published: float,
    activated: float | None = None,
    ends: float | None = None,
) -> Life:
    """Times in days from now."""
    return Life(
        kid=kid,
        state=state,
        published_at=NOW + published * DAY,
        activated_at=None if activated is None else NOW + activated * DAY,
        ends_at=None if ends is None else NOW + ends * DAY,
    )


LIVES = (
    life("old", KeyState.RETIRED, -70, -40, -9.9),
    life("now", KeyState.ACTIVE, -40, -10),
    life("next", KeyState.PENDING, -10),
)


def drawn(*lives: Life, next_in: float | None = 20.0) -> Timeline:
    """The picture, with the next activation in so many days."""
    return timeline(lives, NOW, None if next_in is None else NOW + next_in * DAY)


def row(picture: Timeline, kid: str) -> Row:
    return next(each for each in picture.rows if each.kid == kid)


def said(of: Row) -> list[str]:
    return [f"{each.state}{' planned' if each.planned else ''}" for each in of.segments]


def test_a_key_is_published_then_signs_then_retires_and_what_comes_is_planned() -> None:
    picture = drawn(*LIVES)
    assert [each.kid for each in picture.rows] == ["old", "now", "next"]
    assert said(row(picture, "now")) == ["pending", "active", "active planned"]
    assert said(row(picture, "next")) == ["pending", "pending planned", "active planned"]
    assert said(row(picture, "old"))[-2:] == ["active", "retiring"]


def test_a_key_signs_until_the_next_one_does() -> None:
    picture = drawn(*LIVES)
    ends = next(each for each in row(picture, "old").segments if each.state is KeyState.ACTIVE)
    begins = next(each for each in row(picture, "now").segments if each.state is KeyState.ACTIVE)
    assert ends.x + ends.width == pytest.approx(begins.x, abs=0.02)
    assert picture.next_activation is not None
    takes_over = row(picture, "next").segments[-1]
    assert takes_over.x == pytest.approx(picture.next_activation.x, abs=0.02)


def test_an_hour_of_retiring_is_seen_beside_months() -> None:
    old = life("old", KeyState.RETIRING, -70, -40, -10 + 1 / 24)
    retiring = row(drawn(old, *LIVES[1:]), "old").segments[-1]
    assert retiring.state is KeyState.RETIRING
    assert retiring.width >= 1.2


def test_a_revoked_key_ends_with_a_mark_and_signs_no_longer_than_that() -> None:
    revoked = row(drawn(life("bad", KeyState.REVOKED, -40, -20, -10), *LIVES[1:]), "bad")
    assert said(revoked) == ["pending", "active"]
    assert revoked.revoked_x == pytest.approx(
        revoked.segments[-1].x + revoked.segments[-1].width, abs=0.02
    )
    never_signed = row(drawn(life("bad", KeyState.REVOKED, -40, None, -30), *LIVES[1:]), "bad")
    assert said(never_signed) == ["pending"]


def test_what_was_ends_where_it_ended_however_short_it_was() -> None:
    minute = 1 / 1440
    picture = drawn(
        life("bad", KeyState.REVOKED, -4 * minute, -3 * minute, -2 * minute),
        life("now", KeyState.ACTIVE, -4 * minute, -2 * minute),
        life("next", KeyState.PENDING, -2 * minute),
    )
    bad = row(picture, "bad")
    assert bad.revoked_x is not None
    assert bad.segments[-1].x + bad.segments[-1].width <= bad.revoked_x + 0.01
    for each in picture.rows:
        for segment in each.segments:
            assert segment.width >= 1.2
            if not segment.planned:
                assert segment.x + segment.width <= picture.now.x + 0.01


def test_a_rotation_that_is_overdue_is_due_now() -> None:
    picture = drawn(*LIVES[1:], next_in=-3)
    assert picture.next_activation is not None
    assert (picture.next_activation.x, picture.next_activation.word) == (
        picture.now.x,
        "next key is due",
    )
    assert said(row(picture, "now")) == ["pending", "active"]
    assert drawn(*LIVES[1:]).next_activation.word == "next key signs 18 Dec"  # type: ignore[union-attr]


def test_without_a_next_key_the_one_that_signs_goes_on() -> None:
    picture = drawn(LIVES[1], next_in=None)
    assert picture.next_activation is None
    assert said(row(picture, "now")) == ["pending", "active", "active planned"]
    assert picture.rows[0].segments[-1].x + picture.rows[0].segments[-1].width == 100


def test_words_stay_inside_and_a_young_ring_is_told_in_hours() -> None:
    assert drawn(*LIVES).now.anchor == "middle" or 30 <= drawn(*LIVES).now.x <= 70
    young = timeline(
        [life("now", KeyState.ACTIVE, 0, 0), life("next", KeyState.PENDING, 0)],
        NOW + 60,
        NOW + 6 * HOUR,
    )
    assert young.now.anchor == "start"
    assert [tick.word for tick in young.ticks] == ["10:00", "12:00", "14:00"]


TIMES = st.floats(-500, 500)


@given(
    st.lists(st.tuples(TIMES, TIMES, TIMES, st.sampled_from(KeyState)), max_size=9),
    st.none() | TIMES,
)
def test_whatever_the_keys_are_nothing_leaves_the_picture(
    keys: list[tuple[float, float, float, KeyState]], next_in: float | None
) -> None:
    lives: list[Life] = []
    for place, (published, further, ends, state) in enumerate(keys):
        published, activated, ended = sorted((published, further, ends))
        lives.append(
            life(
                f"{place}",
                state,
                published,
                None if state is KeyState.PENDING else activated,
                None if state in (KeyState.PENDING, KeyState.ACTIVE) else ended,
            )
        )
    picture = drawn(*lives, next_in=next_in)
    assert len(picture.ticks) <= MAX_TICKS
    for each in picture.rows:
        assert picture.height > each.bar_y > each.word_y
        for segment in each.segments:
            assert segment.width > 0
            assert segment.x >= 0
            assert segment.x + segment.width <= 100.02
    assert all(after.x - before.x > 3 for before, after in pairwise(picture.ticks)), (
        "words of ticks have room"
    )
