"""`python unpack.py FILE`: write what a gzip file holds to standard output.

A program of its own, since a thread would take turns with who reads it; imports nothing of ours, so
that it starts at once. Exits with 1, saying why, unless the file is one whole gzip member.
"""

import sys
import zlib
from typing import BinaryIO, Final

CHUNK: Final = 1 << 14
# zlib: the largest window, and a gzip header.
GZIP: Final = 16 + zlib.MAX_WBITS


def unpack(packed: BinaryIO, to: BinaryIO) -> None:
    """Write it in pieces; raise OSError, zlib.error, EOFError."""
    unpacking = zlib.decompressobj(wbits=GZIP)
    while chunk := packed.read(CHUNK):
        to.write(unpacking.decompress(chunk))
    if not unpacking.eof or unpacking.unused_data:
        raise EOFError("the compressed data has no end, or more than one")


if __name__ == "__main__":
    try:
        with open(sys.argv[1], "rb") as file:
            unpack(file, sys.stdout.buffer)
            sys.stdout.flush()
    except BrokenPipeError:
        sys.exit(1)  # nobody wants the rest
    except (OSError, EOFError, zlib.error) as error:
        sys.exit(str(error))
