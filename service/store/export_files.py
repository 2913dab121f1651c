"""Exports as files: cut into blocks, which several processes examine.

Judges no record: `authority.audit.exported` does.
"""

import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Final

from msgspec import Struct

from service.authority.audit.archive import Unreadable
from service.authority.audit.exported import (
    HEADER_BEGINS,
    Block,
    ExportCheck,
    Heading,
    Pinning,
    examine,
    heading_of,
)
from service.authority.audit.verify import LogReport, Part, collector_at_rest
from service.store.whole_lines import TooLong, whole_lines

CHUNK: Final = 1 << 17
"""Bytes of a block, about: as much as stays in the cache of a processor while it is examined."""
BATCH: Final = 32
"""Blocks that a process is given at a time."""
_NEXT_HEADER: Final = b"\n" + HEADER_BEGINS


class Stretch(Struct, frozen=True, kw_only=True):
    """Where the lines of a block are in a file."""

    path: Path
    start: int
    stop: int
    block: Block


def is_export(path: Path) -> bool:
    """Say whether a file is an export and not of an archive; raise OSError."""
    with path.open("rb") as file:
        # A manifest begins with a line of its own; whatever else an archive has is compressed.
        return file.read(2) == b'{"'


def verify_export(
    path: Path,
    *,
    pinning: Callable[[str], Pinning],
    cuts: Sequence[int],
    processes: int,
    on_progress: Callable[[int], None],
    chunk: int = CHUNK,
) -> list[LogReport]:
    """Check an export without any database; return a report for each log.

    `cuts` are the sizes of the checkpoints that it is compared with, in order. Raise Unreadable if
    it does not begin with a checkpoint or is no text, OSError, and whatever `pinning` raises.
    """
    check = ExportCheck(pinning)
    stretches = _stretches(path, cuts, chunk)
    with ExitStack() as running:
        examined: Iterable[tuple[Stretch, list[Part]]]
        if processes == 1 or path.stat().st_size <= BATCH * chunk:
            examined = map(_examined, stretches)
        else:
            # Not forked from here: a lock that another thread holds would stay locked there.
            server = multiprocessing.get_context("forkserver")
            server.set_forkserver_preload([__name__])
            pool = running.enter_context(server.Pool(processes))
            examined = pool.imap(_examined, stretches, chunksize=BATCH)
        for stretch, parts in examined:
            check.add(stretch.block, parts)
            on_progress(stretch.stop)
    return check.finish()


def _examined(stretch: Stretch) -> tuple[Stretch, list[Part]]:
    with stretch.path.open("rb") as file, collector_at_rest():
        file.seek(stretch.start)
        return stretch, examine(stretch.block, file.read(stretch.stop - stretch.start))


def _stretches(path: Path, cuts: Sequence[int], chunk: int) -> Iterator[Stretch]:
    heading: Heading | None = None
    line, start = 1, 0
    with path.open("rb") as file:
        pieces = whole_lines(iter(partial(file.read, chunk), b""))
        while lines := _next(pieces, line):
            at = 0
            while at < len(lines):
                header = None
                if lines.startswith(HEADER_BEGINS, at):
                    end = lines.find(b"\n", at) + 1 or len(lines)
                    header = lines[at:end]
                    heading = heading_of(header)
                    at, line = end, line + 1
                if heading is None:
                    raise Unreadable("It does not begin with a checkpoint.")
                stop = lines.find(_NEXT_HEADER, max(at - 1, 0)) + 1 or len(lines)
                # The last line of a file may lack its end.
                open_end = at < stop and not lines.endswith(b"\n", at, stop)
                block = Block(
                    heading=heading,
                    header=header,
                    first_line=line,
                    lines=lines.count(b"\n", at, stop) + open_end,
                    cuts=cuts,
                )
                yield Stretch(path=path, start=start + at, stop=start + stop, block=block)
                at, line = stop, line + block.lines
            start += len(lines)


def _next(pieces: Iterator[bytes], line: int) -> bytes:
    try:
        return next(pieces, b"")
    except TooLong as error:
        raise Unreadable(f"From line {line:,} on it is no text: {error}.") from None
