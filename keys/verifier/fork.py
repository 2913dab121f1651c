"""What must be set right in the child of a fork, to which no thread but one comes along.

It must not start anything in a child: many children only live to become another program.
"""

import os
import weakref
from collections.abc import Callable


def in_forked_child(method: Callable[[], None]) -> None:
    """Call the bound `method` in each child that this process forks, while its object lives."""
    if not hasattr(os, "register_at_fork"):  # Windows knows no fork.
        return
    reference = weakref.WeakMethod(method)

    def call() -> None:
        if (found := reference()) is not None:
            found()

    os.register_at_fork(after_in_child=call)
