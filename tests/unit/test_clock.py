"""The clock of a process follows that of Postgres, as far as an answer proves it wrong."""

from hypothesis import given
from hypothesis import strategies as st

from service.authority.clock import DatabaseClock


def test_a_clock_that_has_heard_nothing_is_that_of_the_process() -> None:
    clock = DatabaseClock(lambda: 1000.0)
    assert (clock(), clock.wall(), clock.offset) == (1000.0, 1000.0, 0.0)


def test_an_hour_behind_is_corrected_by_one_answer() -> None:
    clock = DatabaseClock(lambda: 1000.0)
    clock.observe(4600.0, sent=1000.0, received=1000.0)
    assert (clock(), clock.wall()) == (4600.0, 1000.0)


def test_a_slow_answer_that_proves_nothing_moves_nothing() -> None:
    clock = DatabaseClock(lambda: 1000.0)
    clock.observe(1000.2, sent=1000.0, received=1000.0)
    clock.observe(1003.0, sent=1000.0, received=1006.0)
    assert clock.offset == 1000.2 - 1000.0


# Each exchange: how long the question travelled, and the answer.
travels = st.lists(
    st.tuples(st.floats(min_value=0, max_value=6), st.floats(min_value=0, max_value=6)),
    min_size=1,
)


@given(ahead=st.floats(min_value=-7200, max_value=7200), travels=travels)
def test_it_is_never_further_off_than_the_quickest_answer_took(
    ahead: float, travels: list[tuple[float, float]]
) -> None:
    wall = 1_800_000_000.0
    clock = DatabaseClock(lambda: wall)
    for question, answer in travels:
        clock.observe(wall + question + ahead, sent=wall, received=wall + question + answer)
        # What has been proven stays proven.
        quickest = min(sum(travel) for travel in travels[: travels.index((question, answer)) + 1])
        assert abs(clock() - (wall + ahead)) <= quickest + 1e-5


@given(ahead=st.floats(min_value=-7200, max_value=7200), travels=travels)
def test_right_answers_never_move_a_right_clock(
    ahead: float, travels: list[tuple[float, float]]
) -> None:
    wall = 1_800_000_000.0
    clock = DatabaseClock(lambda: wall)
    clock.observe(wall + ahead, sent=wall, received=wall)
    before = clock.offset
    for question, answer in travels:
        clock.observe(wall + question + ahead, sent=wall, received=wall + question + answer)
        assert abs(clock.offset - before) < 1e-5


def test_a_process_clock_that_was_set_is_followed_in_both_directions() -> None:
    wall = [1000.0]
    clock = DatabaseClock(lambda: wall[0])
    for jump in (3600.0, -7200.0, 3600.0):
        wall[0] += jump
        clock.observe(1000.0, sent=wall[0], received=wall[0] + 0.001)
        assert abs(clock() - 1000.0) < 0.002
