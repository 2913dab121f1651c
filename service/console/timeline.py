"""The signing keys as a picture: a bar for each, from its publication to its end.

Pure: it reads no clock and knows no template. Places are percentages of the width, so that the
picture fits every screen and its words keep their size.
"""

import math
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from typing import Final

from msgspec import Struct

from keys.keyring import KeyState

MINUTE: Final = 60
HOUR: Final = 3600
DAY: Final = 86_400
MAX_TICKS: Final = 5
_STEPS: Final = (
    *(minutes * MINUTE for minutes in (10, 15, 30)),
    *(hours * HOUR for hours in (1, 2, 3, 6, 12)),
    *(days * DAY for days in (1, 2, 7, 14, 28, 56, 112, 364)),
)
_LEAST: Final = 1.2
"""Percent: what lasted an hour is seen beside what lasted a month."""
_EDGE: Final = 8.0
"""Percent from either side within which no tick has room for its word."""

_MARKS: Final = 44
_ROW: Final = 42
_WORD: Final = 12
_BAR: Final = 20
_AXIS: Final = 22


class Life(Struct, frozen=True, kw_only=True):
    """What happened to one key; times are seconds since the epoch.

    `ends_at` is when it was published no more, or will be; None if nobody can say yet.
    """

    kid: str
    state: KeyState
    published_at: float
    activated_at: float | None
    ends_at: float | None


class Segment(Struct, frozen=True, kw_only=True):
    """A stretch of a bar; what is `planned` has not come yet."""

    state: KeyState
    planned: bool
    x: float
    width: float


class Row(Struct, frozen=True, kw_only=True):
    """One key: the height of its word and of its bar, and where it was revoked, if it was."""

    kid: str
    state: KeyState
    word_y: int
    bar_y: int
    segments: Sequence[Segment]
    revoked_x: float | None


class Mark(Struct, frozen=True, kw_only=True):
    """A moment with a word; `anchor` is that of SVG, so that no word leaves the picture."""

    x: float
    anchor: str
    word: str


class Timeline(Struct, frozen=True, kw_only=True):
    """All of it; `rows_end` and `height` are in pixels."""

    rows: Sequence[Row]
    now: Mark
    next_activation: Mark | None
    ticks: Sequence[Mark]
    rows_end: int
    height: int


def timeline(lives: Iterable[Life], now: float, next_activation: float | None) -> Timeline:
    """Return the picture of these keys; the newest stands below.

    At any time exactly one key signs: so a key signed until the next one was activated. One that
    is active will until `next_activation`, and that may be overdue.
    """
    lives = sorted(lives, key=lambda life: (life.published_at, life.kid))
    change = None if next_activation is None else max(next_activation, now)
    window = _window(lives, now, change)
    signing_ends = _signing_ends(lives, change)
    rows = [
        _row(place, life, signing_ends.get(life.kid), now, change, window)
        for place, life in enumerate(lives)
    ]
    rows_end = _MARKS + _ROW * len(rows)
    return Timeline(
        rows=rows,
        now=_mark(now, "now", window),
        next_activation=None
        if change is None
        else _mark(
            change,
            f"next key signs {_day(change)}" if change > now else "next key is due",
            window,
        ),
        ticks=_ticks(window),
        rows_end=rows_end,
        height=rows_end + _AXIS,
    )


class _Window(Struct, frozen=True, kw_only=True):
    start: float
    end: float

    def x(self, at: float) -> float:
        """Return where a moment is; what lies outside is at the edge."""
        share = (at - self.start) / (self.end - self.start)
        return round(100 * min(max(share, 0.0), 1.0), 2)


def _window(lives: Sequence[Life], now: float, change: float | None) -> _Window:
    """Of the keys of the past the end is enough: they must not make the present small."""
    starts = [
        life.ends_at if life.ends_at is not None and life.ends_at <= now else life.published_at
        for life in lives
    ]
    start = min([now, *starts])
    end = max(now, change or now)
    span = max(end - start, HOUR)
    return _Window(start=start - span * 0.02, end=end + span * 0.15)


def _signing_ends(lives: Sequence[Life], change: float | None) -> dict[str, float | None]:
    signed = sorted(
        ((life.activated_at, life) for life in lives if life.activated_at is not None),
        key=lambda pair: pair[0],
    )
    ends: dict[str, float | None] = {}
    for (_, life), (following, _) in pairwise(signed):
        ends[life.kid] = following if life.ends_at is None else min(following, life.ends_at)
    if signed:
        last = signed[-1][1]
        # Of a past that is cut off: nobody knows more of it than that it ended.
        ends[last.kid] = change if last.state is KeyState.ACTIVE else last.ends_at
    return ends


def _row(
    place: int,
    life: Life,
    signing_ends: float | None,
    now: float,
    change: float | None,
    window: _Window,
) -> Row:
    endless = window.end
    spans: list[tuple[KeyState, float, float]] = []
    if life.activated_at is None:
        ends = life.ends_at if life.ends_at is not None else (change or endless)
        spans.append((KeyState.PENDING, life.published_at, ends))
        if life.state is KeyState.PENDING and change is not None:
            spans.append((KeyState.ACTIVE, change, endless))
    else:
        ends = signing_ends if signing_ends is not None else endless
        spans.append((KeyState.PENDING, life.published_at, life.activated_at))
        spans.append((KeyState.ACTIVE, life.activated_at, ends))
        if life.ends_at is not None and life.ends_at > ends:
            spans.append((KeyState.RETIRING, ends, life.ends_at))
    return Row(
        kid=life.kid,
        state=life.state,
        word_y=_MARKS + _ROW * place + _WORD,
        bar_y=_MARKS + _ROW * place + _BAR,
        segments=[segment for span in spans for segment in _segments(*span, now, window)],
        revoked_x=window.x(life.ends_at)
        if life.state is KeyState.REVOKED and life.ends_at is not None
        else None,
    )


def _segments(
    state: KeyState, start: float, end: float, now: float, window: _Window
) -> Iterable[Segment]:
    """Cut a stretch where it leaves what was for what is planned.

    What is too short to be seen grows away from now: nothing that was reaches beyond its end.
    """
    for planned, begins, ends in (
        (False, start, min(end, now)),
        (True, max(start, now), end),
    ):
        if ends <= begins or ends <= window.start or begins >= window.end:
            continue
        x, right = window.x(begins), window.x(ends)
        width = max(right - x, _LEAST)
        x = min(x, 100 - width) if planned else max(right - width, 0)
        yield Segment(state=state, planned=planned, x=round(x, 2), width=round(width, 2))


def _mark(at: float, word: str, window: _Window) -> Mark:
    x = window.x(at)
    return Mark(x=x, anchor="start" if x < 30 else "end" if x > 70 else "middle", word=word)


def _ticks(window: _Window) -> Sequence[Mark]:
    span = window.end - window.start
    step = next((step for step in _STEPS if span / step <= MAX_TICKS), _STEPS[-1])
    first = math.ceil(window.start / step) * step
    moments = [first + step * place for place in range(int((window.end - first) // step) + 1)]
    return [
        Mark(x=x, anchor="middle", word=_day(at) if step >= DAY else _clock(at))
        for at in moments
        if _EDGE <= (x := window.x(at)) <= 100 - _EDGE
    ]


def _day(at: float) -> str:
    moment = datetime.fromtimestamp(at, UTC)
    return f"{moment.day} {moment:%b}"


def _clock(at: float) -> str:
    return f"{datetime.fromtimestamp(at, UTC):%H:%M}"
