"""Calls that may hang, such as those of a module in C or of a disk, in a thread of their own.

Repeats nothing, and ends no call that hangs: nobody can.
"""

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import TypeVar

_T = TypeVar("_T")


class StillHanging(TimeoutError):
    """A call that was begun before has not returned for so many `seconds`."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"no answer for {seconds:.0f} s")
        self.seconds = seconds


class OneThread:
    """One call at a time; none waits behind one that hangs.

    A daemon: the end of the process does not wait for a call that never returns.
    """

    def __init__(self, name: str, deadline: float) -> None:
        """`deadline` is in seconds; the thread starts with the first call."""
        self._name = name
        self._deadline = deadline
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._busy_since: float | None = None
        self._started = False

    async def run(self, call: Callable[[], _T]) -> _T:
        """Return what the call returns; raise TimeoutError at the deadline, and StillHanging at
        once while one that was begun before hangs. A call that nobody waits for any more is
        dropped, unless it has begun."""
        busy_since = self._busy_since
        if busy_since is not None and (busy := time.monotonic() - busy_since) > self._deadline:
            raise StillHanging(busy)
        if not self._started:
            self._started = True
            threading.Thread(target=self._work, name=self._name, daemon=True).start()
        future: Future[_T] = Future()
        self._jobs.put(lambda: _settle(future, call))
        async with asyncio.timeout(self._deadline):
            return await asyncio.wrap_future(future)

    def end(self) -> None:
        """Let the thread end once it has done what it was given."""
        self._jobs.put(None)

    def _work(self) -> None:
        while job := self._jobs.get():
            self._busy_since = time.monotonic()
            job()
            # The thread waits long for the next one: nothing of this one, nor of who asked for it,
            # may live as long.
            del job
            self._busy_since = None


def _settle(future: "Future[_T]", call: Callable[[], _T]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = call()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)
