"""Checkpoints as files in CHECKPOINT_DIR: where a database that was restored cannot reach them.

Verifies nothing, and keeps no secret: anybody may read a checkpoint.
"""

import asyncio
import os
import re
import tempfile
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from service.authority.audit.continuity import OutsideNote

DEADLINE: Final = 5.0
"""Seconds; a file system may hang."""

KEPT_DAYS: Final = 400
"""Days whose last checkpoint is kept beside the newest: with a year's, an auditor can compare what
the log said a year ago. It bounds the directory."""

# Sorted by name they are sorted by log, then by size.
_NAME: Final = re.compile(r"([0-9]{4})-([0-9]{20})-([0-9]{4}-[0-9]{2}-[0-9]{2})\.txt")


class CheckpointFiles:
    """Implements `authority.audit.continuity.OutsideCheckpoints`; many processes may share it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    async def newest(self) -> OutsideNote | None:
        """Return the file of the newest log that has the largest size; raise OSError."""
        async with asyncio.timeout(DEADLINE):
            return await asyncio.to_thread(self._newest)

    async def keep(self, log_number: int, size: int, note: bytes, signed_at: datetime) -> None:
        """Write a checkpoint whole or not at all, and drop what it makes superfluous; raise
        OSError."""
        day = signed_at.astimezone(UTC).date().isoformat()
        name = f"{log_number:04}-{size:020}-{day}.txt"
        async with asyncio.timeout(DEADLINE):
            await asyncio.to_thread(self._keep, name, note)

    async def sizes(self, log_number: int) -> list[int]:
        """Return the sizes of those that are kept of a log, in order; raise OSError."""
        async with asyncio.timeout(DEADLINE):
            names = await asyncio.to_thread(self._names)
        return [int(name[5:25]) for name in names if int(name[:4]) == log_number]

    def _newest(self) -> OutsideNote | None:
        while names := self._names():
            path = self._directory / names[-1]
            try:
                note = path.read_bytes()
            except FileNotFoundError:
                # Another process has kept a newer one meanwhile, and tidied up.
                continue
            return OutsideNote(log_number=int(names[-1][:4]), unverified_note=note, place=str(path))
        return None

    def _keep(self, name: str, note: bytes) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        if name not in self._names():
            _write(self._directory, name, note)
        for superfluous in superseded(os.listdir(self._directory)):
            (self._directory / superfluous).unlink(missing_ok=True)

    def _names(self) -> list[str]:
        try:
            return sorted(filter(_NAME.fullmatch, os.listdir(self._directory)))
        except FileNotFoundError:
            return []


def superseded(names: Iterable[str]) -> list[str]:
    """Return which files need not be kept: all checkpoints but the last of each day, for KEPT_DAYS
    days, and what a process that was killed has left of older ones."""
    names = sorted(names)
    found = [match for match in map(_NAME.fullmatch, names) if match]
    last_of_day = {(log, day): match[0] for match in found for log, _, day in [match.groups()]}
    kept = list(last_of_day.values())[-KEPT_DAYS:]
    return [match[0] for match in found if match[0] not in kept] + [
        name for name in names if name.startswith(".") and kept and name[1:] < kept[-1]
    ]


def _write(directory: Path, name: str, note: bytes) -> None:
    with tempfile.NamedTemporaryFile(dir=directory, prefix=f".{name}.", delete=False) as staging:
        staging.write(note)
        staging.flush()
        os.fchmod(staging.fileno(), 0o644)
        os.fsync(staging.fileno())
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
