"""One time for all processes: the process clock, corrected by its offset to Postgres.

Never asks for the time over the network by itself; whoever talks to Postgres anyway reports it.
"""

from collections.abc import Callable


class DatabaseClock:
    """Calling it returns seconds since the epoch, as Postgres would say, within a round trip."""

    def __init__(self, wall: Callable[[], float]) -> None:
        self._wall = wall
        self.offset = 0.0
        """Seconds that Postgres is ahead of this process."""

    def __call__(self) -> float:
        return self._wall() + self.offset

    def wall(self) -> float:
        """Return the uncorrected time, to be handed back to `observe`."""
        return self._wall()

    def observe(self, database_time: float, *, sent: float, received: float) -> None:
        """Learn from an answer of Postgres: its time was read between `sent` and `received`.

        The offset moves only as far as the answer proves it wrong, so that slow answers, which
        prove little, do not make the clock jump.
        """
        self.offset = min(max(self.offset, database_time - received), database_time - sent)
