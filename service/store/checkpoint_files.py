"""Checkpoints as files in CHECKPOINT_DIR: where a database that was restored cannot reach them.

Verifies nothing, and keeps no secret: anybody may read a checkpoint.
"""

import errno
import os
import re
import stat
import tempfile
import weakref
from collections.abc import Iterable
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Final

from keys.checkpoint import MAX_NOTE_BYTES
from keys.one_thread import OneThread
from service.authority.audit.continuity import OutsideNote
from service.authority.restore import MAX_LOG_NUMBER

DEADLINE: Final = 5.0
"""Seconds; a file system may hang."""

KEPT_DAYS: Final = 400
"""Days whose last checkpoint is kept beside the newest: with a year's, an auditor can compare what
the log said a year ago. It bounds the directory."""

# Sorted by name they are sorted by log, then by size.
_NAME: Final = re.compile(r"([0-9]{4})-([0-9]{20})-([0-9]{4}-[0-9]{2}-[0-9]{2})\.txt")


class CheckpointFiles:
    """Implements `authority.audit.continuity.OutsideCheckpoints`; many processes may share it.

    Where the file system hangs, so does a thread that is for nothing else.
    """

    def __init__(self, directory: Path, *, deadline: float = DEADLINE) -> None:
        """`deadline` is in seconds: a look that takes longer raises OSError."""
        self._directory = directory
        self._thread = OneThread("checkpoints", deadline)
        weakref.finalize(self, self._thread.end)

    async def newest(self) -> OutsideNote | None:
        """Return the file of the newest log that has the largest size; raise OSError.

        An empty one is none: a disk that failed leaves such, and `keep` mends it.
        """
        return await self._thread.run(self._newest)

    async def keep(self, log_number: int, size: int, note: bytes, signed_at: datetime) -> None:
        """Write a checkpoint whole or not at all, and drop what it makes superfluous; raise
        OSError."""
        if log_number > MAX_LOG_NUMBER:
            raise ValueError(f"expected the number of a log up to {MAX_LOG_NUMBER}: {log_number}")
        day = signed_at.astimezone(UTC).date().isoformat()
        name = f"{log_number:04}-{size:020}-{day}.txt"
        await self._thread.run(lambda: self._keep(name, note))

    async def sizes(self, log_number: int) -> list[int]:
        """Return the sizes of those that are kept of a log, in order; raise OSError."""
        names = await self._thread.run(self._names)
        return [int(name[5:25]) for name in names if int(name[:4]) == log_number]

    def _newest(self) -> OutsideNote | None:
        for name in reversed(self._names()):
            path = self._directory / name
            try:
                note = _read(path)
            except FileNotFoundError:
                # Another process has kept a newer one meanwhile, and tidied up.
                return self._newest()
            if note:
                return OutsideNote(log_number=int(name[:4]), unverified_note=note, place=str(path))
        return None

    def _keep(self, name: str, note: bytes) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        if name not in self._names() or _is_cut(self._directory / name, note):
            _write(self._directory, name, note)
        for superfluous in superseded(os.listdir(self._directory)):
            (self._directory / superfluous).unlink(missing_ok=True)

    def _names(self) -> list[str]:
        try:
            return sorted(filter(_is_name, os.listdir(self._directory)))
        except FileNotFoundError:
            return []


def superseded(names: Iterable[str]) -> list[str]:
    """Return which files need not be kept: all checkpoints but the last of each day, for KEPT_DAYS
    days, and what a process that was killed has left of older ones."""
    names = sorted(names)
    found = [match for match in map(_NAME.fullmatch, filter(_is_name, names)) if match]
    last_of_day = {(log, day): match[0] for match in found for log, _, day in [match.groups()]}
    kept = list(last_of_day.values())[-KEPT_DAYS:]
    return [match[0] for match in found if match[0] not in kept] + [
        name for name in names if name.startswith(".") and kept and name[1:] < kept[-1]
    ]


def _is_name(name: str) -> bool:
    if (match := _NAME.fullmatch(name)) is None:
        return False
    try:
        date.fromisoformat(match[3])
    except ValueError:
        return False
    return True


def _read(path: Path) -> bytes:
    """Return what a regular file begins with: a byte more than a checkpoint may have, at most."""
    # A pipe would be waited for, and a link may lead anywhere.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        return file.read(MAX_NOTE_BYTES + 1)


def _is_cut(path: Path, note: bytes) -> bool:
    """Whether a file is but the beginning of this note; anything else is evidence, and stays."""
    try:
        found = _read(path)
    except FileNotFoundError:
        return False
    return found != note and note.startswith(found)


def _write(directory: Path, name: str, note: bytes) -> None:
    with tempfile.NamedTemporaryFile(dir=directory, prefix=f".{name}.", delete=False) as staging:
        try:
            staging.write(note)
            staging.flush()
            os.fchmod(staging.fileno(), 0o644)
            os.fsync(staging.fileno())
        except BaseException:
            # Where the disk is full, each attempt would leave one.
            Path(staging.name).unlink(missing_ok=True)
            raise
    try:
        os.replace(staging.name, directory / name)
    except FileNotFoundError:
        # Another process has kept a newer one meanwhile, and tidied up.
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
