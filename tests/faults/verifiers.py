"""Verifiers under test: processes of their own that get every token and say what they think of it.

Never asks one twice, and waits for none: what is paused answers when it goes on.
"""

import asyncio
import json
import os
import signal
import sys
import time
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from tests.faults.live_authority import REPOSITORY

_JOSE: Final = Path(__file__).with_name("jose_verifier.mjs")
_PYTHON: Final = (sys.executable, "-m", "tests.faults.verifier_process")


class Kind(StrEnum):
    """Whose code verifies."""

    OURS = "ours"
    PYJWT = "PyJWKClient"
    JOSE = "jose"


class Purpose(StrEnum):
    """Why a token is shown to a verifier."""

    FRESH = "fresh"
    """It has just been issued: whoever refuses it breaks P3."""
    OLD = "old"
    """Issued a while ago, and live still: the same."""
    REVOKED = "revoked"
    """Its key is revoked: to accept it is right only as long as the keys may be cached."""
    EMERGENCY = "emergency"
    """Fresh, of a key that an emergency promoted unripe: to refuse it is right only so long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """One token as it was shown."""

    token: str
    kid: str
    purpose: Purpose


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a verifier said, and when; `refusal` is empty if it accepted."""

    shown: Shown
    at: float
    refusal: str


@dataclass(slots=True, kw_only=True)
class RunningVerifier:
    """One process. `answers` is everything that it said, in order."""

    name: str
    kind: Kind
    process: asyncio.subprocess.Process
    killed: bool = False
    answers: list[Answer] = field(default_factory=list[Answer])
    _unanswered: deque[Shown] = field(default_factory=deque[Shown])

    def show(self, shown: Shown) -> None:
        """Hand it a token; it answers in its own time."""
        if self.killed:
            return
        assert self.process.stdin is not None
        self.process.stdin.write(f"{shown.token}\n".encode())
        self._unanswered.append(shown)

    def pause(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self.killed = True
        self.process.kill()
        self._unanswered.clear()

    def newest(self, purpose: Purpose) -> str | None:
        """Return its last word on a token shown for this purpose: empty if it accepted."""
        words = (each.refusal for each in reversed(self.answers) if each.shown.purpose is purpose)
        return next(words, None)

    @property
    def unanswered(self) -> int:
        """How many tokens it has not said anything about yet."""
        return len(self._unanswered)

    async def listen(self) -> None:
        """Take its answers until it ends; it may end only by being killed."""
        assert self.process.stdout is not None
        while line := await self.process.stdout.readline():
            if self.killed:
                break
            self.answers.append(
                Answer(
                    shown=self._unanswered.popleft(),
                    at=time.time(),
                    refusal=line.decode().rstrip("\n"),
                )
            )
        if not self.killed:
            status = await self.process.wait()
            raise AssertionError(f"{self.name} ended by itself with status {status}")


@asynccontextmanager
async def running_verifiers(
    kinds: Sequence[Kind], reporters: Sequence[tuple[str, str] | None], **given: Any
) -> AsyncGenerator[list[RunningVerifier]]:
    """Run one verifier of each of `kinds` until the end of the block.

    `reporters` holds, for each, the credential to report with; `given` goes to all.
    """
    verifiers: list[RunningVerifier] = []
    listening: list[asyncio.Task[None]] = []
    try:
        for number, (kind, reporter) in enumerate(zip(kinds, reporters, strict=True)):
            verifier = await _start(f"{kind} {number}", kind, {**given, "reporter": reporter})
            verifiers.append(verifier)
            listening.append(asyncio.create_task(verifier.listen()))
        yield verifiers
    finally:
        for verifier in verifiers:
            with suppress(ProcessLookupError):
                verifier.kill()
            await verifier.process.wait()
        await asyncio.gather(*listening)


async def _start(name: str, kind: Kind, given: dict[str, Any]) -> RunningVerifier:
    process = await asyncio.create_subprocess_exec(
        *(("node", str(_JOSE)) if kind is Kind.JOSE else _PYTHON),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=REPOSITORY,
        env={name: value for name, value in os.environ.items() if "PRIVYSEAL_" not in name},
    )
    assert process.stdin is not None
    process.stdin.write(json.dumps({**given, "kind": kind}).encode() + b"\n")
    return RunningVerifier(name=name, kind=kind, process=process)
