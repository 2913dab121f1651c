"""A value that must not be seen: it prints, formats and compares without showing itself.

It must not be the place where a secret is parsed, checked or stored.
"""

import hmac
from typing import NoReturn


class Secret:
    """A string that only `reveal()` shows.

    Its `repr`, `str` and formatted form are the same fixed word; comparing two takes a time that
    does not depend on where they differ; it cannot be pickled, and msgspec cannot encode it.
    """

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """Return the secret itself: for the call that needs it, never for a variable to keep."""
        return self._value

    def __repr__(self) -> str:
        return "Secret(hidden)"

    def __str__(self) -> str:
        return repr(self)

    def __format__(self, format_spec: str) -> str:
        return repr(self)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Secret):
            return NotImplemented
        return hmac.compare_digest(self._value.encode(), other._value.encode())

    def __hash__(self) -> int:
        return hash(self._value)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Secret cannot be pickled or copied: reveal() it where it is needed")
