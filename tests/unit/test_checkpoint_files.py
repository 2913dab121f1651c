"""Checkpoints outside the database: whole or not there, the newest found, and bounded in number."""

import asyncio
import gc
import os
import resource
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from keys.checkpoint import MAX_NOTE_BYTES
from service.store.checkpoint_files import KEPT_DAYS, CheckpointFiles, superseded

pytestmark = pytest.mark.anyio

DAY = datetime(2026, 11, 24, 12, tzinfo=UTC)


def names(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


async def test_what_was_never_kept_is_none(tmp_path: Path) -> None:
    assert await CheckpointFiles(tmp_path).newest() is None
    assert await CheckpointFiles(tmp_path / "not" / "there").newest() is None


async def test_the_newest_is_that_of_the_newest_log_with_the_largest_size(tmp_path: Path) -> None:
    files = CheckpointFiles(tmp_path / "made")
    await files.keep(1, 9, b"nine", DAY)
    await files.keep(1, 100, b"hundred", DAY - timedelta(days=3))
    newest = await files.newest()
    assert newest is not None
    assert (newest.log_number, newest.unverified_note) == (1, b"hundred")
    await files.keep(2, 1, b"a new log", DAY - timedelta(days=9))
    newest = await files.newest()
    assert newest is not None
    assert (newest.log_number, newest.unverified_note) == (2, b"a new log")
    assert newest.place == str(tmp_path / "made" / "0002-00000000000000000001-2026-11-15.txt")


async def test_anybody_may_read_what_is_kept(tmp_path: Path) -> None:
    await CheckpointFiles(tmp_path).keep(1, 9, b"nine", DAY)
    (kept,) = os.scandir(tmp_path)
    assert kept.stat().st_mode & 0o777 == 0o644


async def test_a_checkpoint_that_is_there_is_left_alone(tmp_path: Path) -> None:
    files = CheckpointFiles(tmp_path)
    await files.keep(1, 9, b"nine", DAY)
    await files.keep(1, 9, b"other", DAY)
    newest = await files.newest()
    assert newest is not None
    assert newest.unverified_note == b"nine"


async def test_a_checkpoint_that_was_cut_is_written_once_more(tmp_path: Path) -> None:
    files = CheckpointFiles(tmp_path)
    await files.keep(1, 8, b"eight", DAY - timedelta(days=1))
    await files.keep(1, 9, b"nine", DAY)
    for left in (b"", b"ni"):
        (tmp_path / names(tmp_path)[-1]).write_bytes(left)
        newest = await files.newest()
        assert newest is not None
        assert newest.unverified_note == (left or b"eight")
        await files.keep(1, 9, b"nine", DAY)
        newest = await files.newest()
        assert newest is not None
        assert newest.unverified_note == b"nine"


async def test_no_log_has_a_number_that_a_name_has_no_room_for(tmp_path: Path) -> None:
    files = CheckpointFiles(tmp_path)
    await files.keep(9999, 9, b"nine", DAY)
    with pytest.raises(ValueError, match="9999"):
        await files.keep(10_000, 9, b"nine", DAY)
    assert len(names(tmp_path)) == 1


async def test_what_cannot_be_a_checkpoint_is_none_or_an_error_and_nobody_waits_for_it(
    tmp_path: Path,
) -> None:
    files = CheckpointFiles(tmp_path)
    await files.keep(1, 9, b"nine", DAY)
    (tmp_path / f"0001-{10:020}-9999-99-99.txt").write_bytes(b"on no day")
    newest = await files.newest()
    assert newest is not None
    assert newest.unverified_note == b"nine"
    other = tmp_path / f"0001-{10:020}-2026-11-25.txt"
    os.mkfifo(other)
    with pytest.raises(OSError, match="not a regular file"):
        await files.newest()
    other.unlink()
    other.symlink_to(tmp_path / names(tmp_path)[0])
    with pytest.raises(OSError, match=str(other)):
        await files.newest()
    other.unlink()
    with other.open("wb") as large:
        large.truncate(1 << 40)
    newest = await files.newest()
    assert newest is not None
    assert len(newest.unverified_note) == MAX_NOTE_BYTES + 1


class Hanging(CheckpointFiles):
    """A file system that answers nobody until it is mended."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, deadline=0.05)
        self.mended = threading.Event()
        self.looks = 0

    def _names(self) -> list[str]:
        self.looks += 1
        self.mended.wait(10)
        return super()._names()


async def test_where_the_file_system_hangs_one_thread_does_and_nobody_waits_for_it_twice(
    tmp_path: Path,
) -> None:
    files = Hanging(tmp_path)
    for call in (files.newest, lambda: files.sizes(1), files.newest):
        with pytest.raises(OSError, match=r"^$|no answer"):
            await call()
    started = time.monotonic()
    for _ in range(100):
        with pytest.raises(OSError, match="no answer for"):
            await files.newest()
        # Others have the threads of this process for themselves.
        await asyncio.to_thread(int)
    assert time.monotonic() - started < 5
    assert files.looks == 1
    files.mended.set()
    async with asyncio.timeout(5):
        while True:
            with suppress(OSError):
                assert await files.sizes(1) == []
                break
            await asyncio.sleep(0)


async def test_its_thread_ends_with_it(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    files = CheckpointFiles(tmp_path)
    assert await files.newest() is None
    (thread,) = set(threading.enumerate()) - before
    del files
    gc.collect()
    thread.join(5)
    assert not thread.is_alive()


async def test_a_full_disk_is_left_as_it_was(tmp_path: Path) -> None:
    files = CheckpointFiles(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
    try:
        for _ in range(3):
            with pytest.raises(OSError, match="File too large"):
                await files.keep(1, 9, b"more than ten bytes", DAY)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(tmp_path) == []


async def test_of_each_day_the_last_is_kept_and_an_older_one_that_comes_late_is_not(
    tmp_path: Path,
) -> None:
    files = CheckpointFiles(tmp_path)
    for size in (5, 7, 6):
        await files.keep(1, size, b"", DAY)
        await files.keep(1, size + 10, b"", DAY + timedelta(days=1))
    assert names(tmp_path) == [
        "0001-00000000000000000007-2026-11-24.txt",
        "0001-00000000000000000017-2026-11-25.txt",
    ]


async def test_what_a_killed_process_left_is_no_checkpoint_and_goes_once_it_is_superseded(
    tmp_path: Path,
) -> None:
    files = CheckpointFiles(tmp_path)
    await files.keep(1, 5, b"five", DAY)
    left = tmp_path / ".0001-00000000000000000009-2026-11-24.txt.x7"
    left.write_bytes(b"half of ni")
    other = tmp_path / "README"
    other.write_bytes(b"of the operator's own")
    newest = await files.newest()
    assert newest is not None
    assert newest.unverified_note == b"five"
    await files.keep(1, 8, b"eight", DAY)
    assert left.exists(), "its process may be writing it now"
    await files.keep(1, 10, b"ten", DAY)
    assert names(tmp_path) == ["0001-00000000000000000010-2026-11-24.txt", "README"]


def test_the_directory_is_bounded() -> None:
    days = [
        f"0001-{number:020}-{DAY + timedelta(days=number):%Y-%m-%d}.txt"
        for number in range(KEPT_DAYS + 3)
    ]
    assert superseded(days) == days[:3]


async def test_whoever_reads_while_others_write_finds_a_whole_one_that_never_gets_older(
    tmp_path: Path,
) -> None:
    files = CheckpointFiles(tmp_path)

    async def write(first: int) -> None:
        for size in range(first, 300, 2):
            await files.keep(1, size, b"%d" % size * 500, DAY)

    writers = asyncio.gather(write(1), write(2))
    seen = 0
    while not writers.done():
        newest = await files.newest()
        if newest is not None:
            size = int(newest.place[-35:-15])
            assert newest.unverified_note == b"%d" % size * 500
            assert size >= seen
            seen = size
    await writers
    assert names(tmp_path) == ["0001-00000000000000000299-2026-11-24.txt"]
