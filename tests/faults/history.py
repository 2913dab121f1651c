"""What was done to one service user and what its clients saw, and whether the two fit together.

Pure: knows one monotonic clock, that of the test's own process, and no server.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

Scopes = frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """What is in force for one service user."""

    active: bool = True
    scopes: Scopes
    live: frozenset[str] = frozenset()

    def outcome(self, credential_id: str) -> Scopes | None:
        """Return the scopes that an exchange gets, None where it must be refused."""
        return self.scopes if self.active and credential_id in self.live else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Act:
    """One administrative act: in force from somewhere between `begun` and `answered` on."""

    kind: str
    begun: float
    answered: float
    after: State


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """One exchange as its client saw it; `scopes` is None for a 401."""

    credential_id: str
    begun: float
    ended: float
    scopes: Scopes | None


@dataclass(slots=True, kw_only=True)
class Verdict:
    """How many exchanges no order of events can explain."""

    exchanges: int = 0
    refused: int = 0
    decided: int = 0
    """Exchanges that only one outcome can explain: those that prove something."""
    forbidden_tokens: int = 0
    wrong_refusals: int = 0

    def __add__(self, other: "Verdict") -> "Verdict":
        return Verdict(
            exchanges=self.exchanges + other.exchanges,
            refused=self.refused + other.refused,
            decided=self.decided + other.decided,
            forbidden_tokens=self.forbidden_tokens + other.forbidden_tokens,
            wrong_refusals=self.wrong_refusals + other.wrong_refusals,
        )


@dataclass(slots=True, kw_only=True)
class History:
    """One service user: its acts, one after the other, and the exchanges beside them."""

    initial: State
    acts: list[Act] = field(default_factory=list[Act])
    exchanges: list[Exchange] = field(default_factory=list[Exchange])

    @property
    def now(self) -> State:
        """What is in force after the last act."""
        return self.acts[-1].after if self.acts else self.initial

    def judge(self) -> Verdict:
        """Hold each exchange against every state that can have been in force while it ran.

        Right is an outcome that one of them explains. So what began after an act was answered
        must obey it, until the next act begins; a fresh credential works from its answer on.
        """
        verdict = Verdict()
        for exchange in self.exchanges:
            explained = {
                state.outcome(exchange.credential_id) for state in self._possible(exchange)
            }
            right = exchange.scopes in explained
            verdict += Verdict(
                exchanges=1,
                refused=exchange.scopes is None,
                decided=len(explained) == 1,
                forbidden_tokens=not right and exchange.scopes is not None,
                wrong_refusals=not right and exchange.scopes is None,
            )
        return verdict

    def _possible(self, exchange: Exchange) -> Iterator[State]:
        if not self.acts or self.acts[0].answered >= exchange.begun:
            yield self.initial
        for index, act in enumerate(self.acts):
            overtaken = (
                index + 1 < len(self.acts) and self.acts[index + 1].answered < exchange.begun
            )
            if act.begun <= exchange.ended and not overtaken:
                yield act.after
