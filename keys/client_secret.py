"""The form of a client secret: by which one is told from any other text.

Makes none, and stores none.
"""

import re
from typing import Final
from zlib import crc32

# 43 characters of base62 hold 256 bits; 6 more hold a CRC-32, so that a scanner of source code
# finds leaked secrets without guessing. No character needs escaping in a URL, a form or Basic.
SECRET_FORM: Final = re.compile("pvs_([0-9A-Za-z]{43})([0-9A-Za-z]{6})")
_BASE62: Final = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def checksum(random: str) -> str:
    """Return the CRC-32 of the random part, as the six characters that end a secret."""
    return base62(crc32(random.encode("ascii")), 6)


def base62(number: int, length: int) -> str:
    """Return the last `length` digits of a number to the base of 62."""
    digits: list[str] = []
    for _ in range(length):
        number, digit = divmod(number, 62)
        digits.append(_BASE62[digit])
    return "".join(reversed(digits))
