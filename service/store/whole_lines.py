"""Cuts what is read in chunks between its lines.

Decodes nothing, and never holds more than a chunk and the longest line that there can be.
"""

from collections.abc import Iterable, Iterator
from typing import Final

LONGEST: Final = 4 << 20
"""Bytes of a line. What lies between two records of an export is on one: with a checkpoint of each
day of the 400 that are kept, and all that a tree has between two of them, that is 2 MB."""


class TooLong(ValueError):
    """A line is longer than any that is written here."""

    def __init__(self) -> None:
        super().__init__(f"a line is longer than {LONGEST >> 20} MiB")


def whole_lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield whole lines, some at a time; the last one may lack its end. Raise TooLong."""
    begun: list[bytes] = []
    length = 0
    for chunk in chunks:
        if end := chunk.rfind(b"\n") + 1:
            yield b"".join((*begun, chunk[:end]))
            begun, length = [], 0
        begun.append(chunk[end:])
        length += len(chunk) - end
        if length > LONGEST:
            raise TooLong
    if length:
        yield b"".join(begun)
