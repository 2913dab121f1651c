"""A command as a person sees it: run in a terminal of some width, with what was typed."""

import os
import pty
import re
import subprocess
import sys
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path

PRIVYSEAL = Path(sys.executable).with_name("privyseal")


def at_terminal(
    arguments: Sequence[str], environ: Mapping[str, str], *, columns: int, typed: str
) -> tuple[int, str]:
    """Run `privyseal` in a terminal; return its exit status and what the screen shows."""
    controller, terminal = pty.openpty()
    os.write(controller, typed.encode())
    with subprocess.Popen(
        (PRIVYSEAL, *arguments),
        env={**environ, "COLUMNS": str(columns), "TERM": "xterm"},
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
    ) as process:
        os.close(terminal)
        screen = b"".join(_until_closed(controller)).decode()
    os.close(controller)
    return process.returncode, re.sub(r"\x1b\[[0-9;]*m", "", screen)


def _until_closed(controller: int) -> Generator[bytes, None, None]:
    while True:
        try:
            yield os.read(controller, 65_536)
        except OSError:  # how Linux says that nobody holds the other end any more
            return
