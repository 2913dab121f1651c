"""Files that other programs read while they are written.

Knows nothing of what is in them.
"""

import os
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(file: Path) -> Generator[BinaryIO, None, None]:
    """Write what becomes `file` (mode 0600) when the block ends, in one step and durably.

    Whoever reads it sees the old content or the new one; if the block fails the old one stays.
    """
    descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}-")
    try:
        with open(descriptor, "wb") as temporary:
            yield temporary
            temporary.flush()
            os.fsync(descriptor)
        os.replace(name, file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
