"""The spool takes what is its own, and nothing else that lies in its directory."""

import time
from pathlib import Path

import pytest

from keys.verifier.spool import Spool


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory that other things lie in, too."""
    directory = tmp_path / "spool"
    for name in ("uploads", "spool-dead"):
        (directory / name).mkdir(parents=True)
        (directory / name / "contract.pdf").write_bytes(b"a contract")
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "data.jsonl").write_bytes(b"data")
    (directory / "spool-link").symlink_to(victim)
    (directory / "spool-dead" / "link.jsonl").symlink_to(victim / "data.jsonl")
    (directory / "spool-dead" / "folder.jsonl").mkdir()
    (directory / "spool-dead" / "batch.jsonl").write_bytes(b"one\ntwo\n")
    return directory


def test_batches_of_a_dead_process_are_adopted_and_nothing_else_is_touched(
    directory: Path, tmp_path: Path
) -> None:
    spool = Spool(directory, clock=time.time)
    assert spool.events == 2
    paths, lines = spool.oldest(10, 1000)
    assert lines == [b"one", b"two"]
    spool.remove(paths)
    assert spool.events == 0
    assert (directory / "uploads" / "contract.pdf").read_bytes() == b"a contract"
    assert (directory / "spool-dead" / "contract.pdf").read_bytes() == b"a contract"
    assert (directory / "spool-dead" / "folder.jsonl").is_dir()
    assert (tmp_path / "victim" / "data.jsonl").read_bytes() == b"data"


def test_a_batch_that_cannot_be_removed_is_forgotten_all_the_same(directory: Path) -> None:
    spool = Spool(directory, clock=time.time)
    (path,), _ = spool.oldest(10, 1000)
    path.unlink()
    path.mkdir()
    spool.remove([path])
    assert spool.events == 0


def test_what_is_larger_than_the_spool_is_not_read_and_counts_as_one_event(directory: Path) -> None:
    with (directory / "spool-dead" / "a.jsonl").open("wb") as large:
        large.truncate(1 << 40)
    spool = Spool(directory, clock=time.time, max_bytes=1000)
    assert spool.events == 3
    paths, lines = spool.oldest(10, 1000)
    assert lines == [b"", b"one", b"two"]
    spool.remove(paths)
    assert spool.events == 0
    spool.write([b"three"])
