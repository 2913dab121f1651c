"""Batches of events on disk, so that they outlive an authority's absence and a service's crash.

It must not judge events: a line is a line.
"""

import errno
import fcntl
import logging
import os
import secrets
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path

from .events import uuid7
from .fork import in_forked_child

MAX_BYTES = 64 * 1024 * 1024

_CLOSED = -1
_FOLDER = "spool-"

_logger = logging.getLogger(__name__)


class Spool:
    """A directory, shared by the processes of one reporter: a folder each, a file each batch.

    Folders are named `spool-…` and files `….jsonl`; whatever else lies there is left alone.

    The folder is locked (flock) while its process lives. Whoever starts adopts the batches of
    those who do not live any more. A batch is written once, fsynced, and removed when all of it
    is settled; who dies in between leaves it to be sent again. Folders are 0700, files 0600.

    `events` says how many wait on disk. `write` may run beside the other methods; these are for
    one thread. `clock` is in seconds since the epoch. The constructor raises OSError where the
    directory cannot be used.
    """

    def __init__(
        self, directory: Path, *, clock: Callable[[], float], max_bytes: int = MAX_BYTES
    ) -> None:
        self._clock = clock
        self._max_bytes = max_bytes
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(directory):  # so that nobody adopts a folder that is not locked yet
            self._folder = directory / f"{_FOLDER}{secrets.token_urlsafe(16)}"
            self._folder.mkdir(mode=0o700)
            self._lock = _lock(self._folder, fcntl.LOCK_EX)
            # A child's copy of the lock would outlive the process that the folder belongs to.
            in_forked_child(self._let_go)
            for other in sorted(directory.glob(f"{_FOLDER}*")):
                if other != self._folder and other.is_dir() and not other.is_symlink():
                    self._adopt(other)
        # Oldest first, with their sizes in bytes and in events; guarded, with the sums of both.
        self._guard = threading.Lock()
        self._batches = {path: self._measured(path) for path in sorted(_batches_in(self._folder))}
        self._bytes = sum(size for size, _ in self._batches.values())
        self.events = sum(events for _, events in self._batches.values())

    def write(self, lines: Sequence[bytes]) -> None:
        """Keep a batch durably; raise OSError if that cannot be, ENOSPC when the spool is full."""
        data = b"".join(line + b"\n" for line in lines)
        if self._bytes + len(data) > self._max_bytes:
            raise OSError(errno.ENOSPC, "the spool is full")
        path = self._folder / f"{uuid7(self._clock())}.jsonl"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with open(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(descriptor)
            os.fsync(self._lock)  # the folder itself, which holds the name
        except OSError:
            path.unlink(missing_ok=True)
            raise
        with self._guard:
            self._batches[path] = (len(data), len(lines))
            self._bytes += len(data)
            self.events += len(lines)

    def oldest(self, max_events: int, max_bytes: int) -> tuple[list[Path], list[bytes]]:
        """Return the oldest batches that fit together, one at least if there is one: their paths
        and their lines, torn ones too; for each event of a file that cannot be read an empty line.
        """
        paths: list[Path] = []
        lines: list[bytes] = []
        with self._guard:
            batches = [*islice(self._batches.items(), max_events)]
        for path, (size, events) in batches:
            max_events, max_bytes = max_events - events, max_bytes - size
            if paths and (max_events < 0 or max_bytes < 0):
                break
            paths.append(path)
            try:
                lines += self._read(path).splitlines()
            except OSError:
                lines += [b""] * events
        return paths, lines

    def remove(self, paths: Sequence[Path]) -> None:
        """Forget these batches."""
        for path in paths:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                # It is settled: to send it again would change nothing.
                _logger.warning("a batch stays in the spool: %s", error)
            with self._guard:
                size, events = self._batches.pop(path, (0, 0))
                self._bytes -= size
                self.events -= events

    def close(self) -> None:
        """Let another process adopt what is left."""
        with suppress(OSError):
            self._folder.rmdir()
        self._let_go()

    def _let_go(self) -> None:
        if self._lock != _CLOSED:
            os.close(self._lock)
            self._lock = _CLOSED

    def _measured(self, path: Path) -> tuple[int, int]:
        try:
            data = self._read(path)
        except OSError:
            return 0, 1
        return len(data), len(data.splitlines())

    def _read(self, path: Path) -> bytes:
        """Return a batch; raise OSError also for what was none: it would take any memory."""
        with path.open("rb") as file:
            data = file.read(self._max_bytes + 1)
        if len(data) > self._max_bytes:
            raise OSError(errno.EFBIG, "larger than the spool", str(path))
        return data

    def _adopt(self, other: Path) -> None:
        try:
            lock = _lock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return  # It lives, or is not ours.
        try:
            for batch in _batches_in(other):
                batch.rename(self._folder / batch.name)
            other.rmdir()
        except OSError as error:
            _logger.warning("a spool was not adopted: %s", error)
        finally:
            os.close(lock)


def _batches_in(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*.jsonl") if path.is_file() and not path.is_symlink()]


def _lock(folder: Path, how: int) -> int:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, how)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


@contextmanager
def _locked(folder: Path) -> Generator[None]:
    lock = _lock(folder, fcntl.LOCK_EX)
    try:
        yield
    finally:
        # Not only closed: a child that was forked meanwhile holds a copy, and would hold the lock.
        fcntl.flock(lock, fcntl.LOCK_UN)
        os.close(lock)
