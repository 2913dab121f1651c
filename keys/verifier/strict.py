"""JSON and base64url as RFC 8259 and RFC 4648 have them, with exactly one accepted reading.

It must not repair or guess: what is unclear is refused with ValueError, in words.
"""

import base64
import json
import math
from typing import TypeAlias, cast

JSON: TypeAlias = "str | int | float | bool | list[JSON] | dict[str, JSON] | None"

_DEPTH = 32
_DIGITS = 32  # More than 2^63 needs, far fewer than int() takes long over.


def base64url_encode(data: bytes) -> str:
    """Return base64url without padding (RFC 7515 §2)."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def base64url_decode(text: str) -> bytes:
    """Decode base64url; raise ValueError unless `text` is the one spelling of its bytes."""
    try:
        data = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except ValueError:
        raise ValueError("expected base64url without padding") from None
    # The decoder skips foreign characters and unused bits; encoding again shows either.
    if base64url_encode(data) != text:
        raise ValueError("expected base64url in its canonical spelling, without padding")
    return data


def json_object(data: bytes) -> dict[str, JSON]:
    """Parse one JSON object in UTF-8; raise ValueError for all that parsers disagree on.

    Refused: duplicate members, NaN and Infinity, lone surrogates, nesting deeper than 32, numbers
    of more than 32 characters or beyond a double, and anything that is no object.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError("expected UTF-8") from None
    try:
        value = cast(JSON, _DECODER.decode(text))
    except RecursionError:
        raise ValueError(f"expected nesting of at most {_DEPTH}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"expected JSON, found none at character {error.pos}") from None
    if not isinstance(value, dict):
        raise ValueError("expected a JSON object")
    _check_depth(value)
    if "\\u" in text:
        _check_surrogates(value)
    return value


def _check_depth(value: JSON) -> None:
    level = [value]
    for _ in range(_DEPTH + 1):
        inner: list[JSON] = []
        for item in level:
            if isinstance(item, dict):
                inner.extend(item.values())
            elif isinstance(item, list):
                inner.extend(item)
        if not inner:
            return
        level = inner
    raise ValueError(f"expected nesting of at most {_DEPTH}")


def _check_surrogates(value: JSON) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("expected whole characters, found a lone surrogate") from None


def _members(pairs: list[tuple[str, JSON]]) -> dict[str, JSON]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("expected each member once, found a duplicate")
    return members


def _integer(text: str) -> int:
    if len(text) > _DIGITS:
        raise ValueError(f"expected numbers of at most {_DIGITS} characters, found {len(text)}")
    return int(text)


def _float(text: str) -> float:
    if len(text) > _DIGITS or not math.isfinite(value := float(text)):
        raise ValueError(f"expected finite numbers of at most {_DIGITS} characters")
    return value


def _constant(name: str) -> None:
    raise ValueError(f"expected JSON, found {name}")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_members, parse_int=_integer, parse_float=_float, parse_constant=_constant
)
