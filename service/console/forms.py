"""Forms as browsers send them: read one way, or refused in words.

Knows no field of any form, but for those that must never be shown again.
"""

import asyncio
import re
from collections.abc import Sequence
from http import HTTPStatus
from typing import Final
from urllib.parse import parse_qsl

from service.http.context import AnyRequest
from service.http.errors import Refused

CSRF: Final = "csrf"
KEPT: Final = "kept:"
"""In front of a field that waits for a new sign-in."""
BODY_DEADLINE: Final = 10.0
MAX_FIELDS: Final = 200
_NEVER_SHOWN: Final = frozenset({CSRF, "client_secret", "code", "secrets"})
NOT_TYPED: Final = frozenset({"base", "signing", "credential_id"})
"""What a page put into its form for itself: sent once more with it, and nothing to look at."""
_CONTROL: Final = re.compile(r"[\x00-\x09\x0b\x0c\x0e-\x1f\x7f]")


class Form:
    """The fields of one form, in their order."""

    def __init__(self, fields: Sequence[tuple[str, str]]) -> None:
        self._fields = tuple(fields)

    def text(self, name: str) -> str:
        """Return the value of a field without white space around it, empty if it was not sent."""
        values = self.all(name)
        if len(values) > 1:
            raise Refused(HTTPStatus.BAD_REQUEST, f"The field {name} was sent twice.")
        return values[0].strip() if values else ""

    def all(self, name: str) -> list[str]:
        """Return every value of a field, as of check boxes."""
        return [value for field, value in self._fields if field == name]

    def has(self, name: str) -> bool:
        """Whether a field was sent: a check box that is ticked, a button that was pressed."""
        return any(field == name for field, _ in self._fields)

    def shown_again(self) -> list[tuple[str, str]]:
        """Return the fields that may be shown once more: all but secrets."""
        return [(name, value) for name, value in self._fields if name not in _NEVER_SHOWN]

    def kept(self) -> list[tuple[str, str]]:
        """Return the fields that waited for a new sign-in, under their own names."""
        return [
            (name.removeprefix(KEPT), value)
            for name, value in self._fields
            if name.startswith(KEPT) and name.removeprefix(KEPT) not in _NEVER_SHOWN
        ]


async def read_form(request: AnyRequest) -> Form:
    """Return the form of a request; raise Refused for anything else."""
    content_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if content_type != "application/x-www-form-urlencoded":
        raise Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "Expected a form of this console.")
    try:
        async with asyncio.timeout(BODY_DEADLINE):
            body = await request.body()
    except TimeoutError:
        raise Refused(HTTPStatus.REQUEST_TIMEOUT, "The form did not arrive in time.") from None
    try:
        fields = parse_qsl(
            body.decode("ascii"),
            keep_blank_values=True,
            strict_parsing=bool(body),
            errors="strict",
            max_num_fields=MAX_FIELDS,
        )
    except ValueError:
        raise Refused(HTTPStatus.BAD_REQUEST, "The form cannot be read.") from None
    for name, value in fields:
        if _CONTROL.search(name + value):
            raise Refused(HTTPStatus.BAD_REQUEST, "A field must not hold control characters.")
    return Form(fields)
