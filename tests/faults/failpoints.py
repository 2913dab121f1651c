"""The places between two steps of a rotation where a process can be told to kill itself.

A failpoint is armed by its name in the file that the environment names; only `variants.py` asks.
"""

import os
import signal
from enum import StrEnum
from pathlib import Path
from typing import Final

FILE_VARIABLE: Final = "FAULTS_FAILPOINT_FILE"


class Failpoint(StrEnum):
    """`before` a call is nothing sent yet; `after` it is committed, and the process does not know.

    Between the election and `before-prepare` the private half is made. Where it was made it is
    destroyed between `before-destroy` and `destroyed`, and the store does not know that yet.
    """

    ELECTED = "elected"
    BEFORE_PREPARE = "before-prepare"
    AFTER_PREPARE = "after-prepare"
    BEFORE_ACTIVATE = "before-activate"
    AFTER_ACTIVATE = "after-activate"
    BEFORE_RETIRE = "before-retire"
    AFTER_RETIRE = "after-retire"
    BEFORE_DESTROY = "before-destroy"
    DESTROYED = "destroyed"


def reach(failpoint: Failpoint) -> None:
    """End this process as SIGKILL does, if the failpoint is armed."""
    if Path(os.environ[FILE_VARIABLE]).read_text("utf-8") == failpoint:
        os.kill(os.getpid(), signal.SIGKILL)
