"""What is asked of the audit log in an address: read field by field, and written into the next one.

Knows no record, and not who may read which.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import parse_qsl, urlencode
from uuid import UUID

from msgspec import Struct

from service.authority.audit import Action, Outcome, RecordFilter
from service.authority.model import (
    ACTION,
    CREDENTIAL_ID,
    EXPECTED,
    KID,
    PRINTABLE,
    SERVICE_USER,
    SOURCE_SYSTEM,
)
from service.console.forms import MAX_FIELDS, Form
from service.http.context import AnyRequest
from service.http.errors import Refused

CURSOR: Final = "cursor"

_CURSOR: Final = re.compile(r"[0-9]{1,18}\.[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_DURATION: Final = re.compile(r"([0-9]{1,6}) ?([smhdw])")
_UNITS: Final = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_DATE: Final = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
_TIME: Final = re.compile(
    r"([0-9]{4}-[0-9]{2}-[0-9]{2})[Tt ]([0-9]{2}:[0-9]{2}(:[0-9]{2}(\.[0-9]{1,6})?)?)"
    r" ?(UTC|[Zz]|[+-][0-9]{2}:[0-9]{2})?"
)

Read = Callable[[str, datetime], Any]
"""From what was typed, and the time now, to what is looked for; raises ValueError in words."""


class Filter(Struct, frozen=True, kw_only=True):
    """A field of the filters: its name is that of the API's parameter."""

    name: str
    label: str
    read: Read
    hint: str = ""
    choices: Sequence[str] = ()
    open_choice: bool = False
    """Whether other values than the choices can be typed."""
    of_all: bool = False
    """Whether it is only for who reads the records of all: others it tells nothing, or what they
    are not shown."""
    attribute: str = ""


class Query(Struct, frozen=True, kw_only=True):
    """What an address asks for: the filters as they were typed, and what is wrong with them."""

    typed: Mapping[str, str]
    errors: Mapping[str, str]
    wanted: RecordFilter
    cursor: str | None

    def address(self, path: str, **further: str | None) -> str:
        """Return the address of `path` with the same filters; what is None is left out."""
        fields = {**self.typed, **further}
        query = urlencode({name: value for name, value in fields.items() if value})
        return f"{path}?{query}" if query else path

    def has_any(self, filters: Sequence[Filter]) -> bool:
        """Whether one of these was given, or is wrong."""
        return any(each.name in self.typed for each in filters)


def read_query(request: AnyRequest, now: datetime, offered: Sequence[Filter]) -> Query:
    """Return what the address of a request asks for; empty fields ask for nothing, and neither do
    those that were not offered.

    Raise Refused for an address that no form and no link of the console makes.
    """
    form = _form(request)
    typed: dict[str, str] = {}
    errors: dict[str, str] = {}
    wanted: dict[str, Any] = {}
    for each in offered:
        if not (text := form.text(each.name)):
            continue
        typed[each.name] = text
        try:
            wanted[each.attribute or each.name] = each.read(text, now)
        except ValueError as error:
            errors[each.name] = str(error)
    cursor = form.text(CURSOR) or None
    if cursor and not _CURSOR.fullmatch(cursor):
        raise Refused(HTTPStatus.BAD_REQUEST, "This address leads to no place in the log.")
    return Query(typed=typed, errors=errors, wanted=RecordFilter(**wanted), cursor=cursor)


def _form(request: AnyRequest) -> Form:
    query: bytes = request.scope["query_string"]
    try:
        fields = parse_qsl(
            query.decode("ascii"),
            keep_blank_values=True,
            errors="strict",
            max_num_fields=MAX_FIELDS,
        )
    except ValueError:
        raise Refused(HTTPStatus.BAD_REQUEST, "The address cannot be read.") from None
    return Form(fields)


def _matching(pattern: str, expected: str = "", longest: int = 300) -> Read:
    compiled = re.compile(pattern)

    def read(text: str, _: datetime) -> str:
        # A `$` would let a line end pass.
        if len(text) > longest or not compiled.fullmatch(text):
            raise ValueError(expected or EXPECTED[pattern])
        return text

    return read


def _line(longest: int) -> Read:
    return _matching(
        PRINTABLE["pattern"], f"Expected up to {longest} characters, one line.", longest
    )


def _outcome(text: str, _: datetime) -> Outcome:
    try:
        return Outcome(text)
    except ValueError:
        raise ValueError(f"Expected {', '.join(Outcome)}.") from None


def _uuid(text: str, _: datetime) -> UUID:
    try:
        return UUID(text)
    except ValueError:
        raise ValueError(
            "Expected the id of a token: 32 hexadecimal digits in five groups."
        ) from None


def _since(text: str, now: datetime) -> datetime:
    return _time(text, now, date=timedelta(0))


def _until(text: str, now: datetime) -> datetime:
    return _time(text, now, date=timedelta(days=1))


def _time(text: str, now: datetime, *, date: timedelta) -> datetime:
    """Read a time in UTC, or a duration back from now; a date is its midnight and `date` more."""
    try:
        if duration := _DURATION.fullmatch(text):
            return now - timedelta(**{_UNITS[duration[2]]: int(duration[1])})
        if _DATE.fullmatch(text):
            return datetime.fromisoformat(text).replace(tzinfo=UTC) + date
        if time := _TIME.fullmatch(text):
            offset = (time[5] or "Z").upper().replace("UTC", "Z")
            return datetime.fromisoformat(f"{time[1]}T{time[2]}{offset}").astimezone(UTC)
    except (ValueError, OverflowError):
        pass
    raise ValueError("Expected 2027-01-31, 2027-01-31 12:00 (UTC), or 30m, 2h, 7d back from now.")


_service_user = _matching(SERVICE_USER)
_credential = _matching(CREDENTIAL_ID)

COMMON: Final = (
    Filter(
        name="service_user",
        label="Service user",
        read=_service_user,
        hint="Name or id: whom it was done to.",
        of_all=True,
    ),
    Filter(
        name="action",
        label="Action",
        read=_matching(ACTION),
        hint="Such as token.issue, or what a service reports.",
        choices=tuple(Action),
        open_choice=True,
    ),
    Filter(name="outcome", label="Outcome", read=_outcome, choices=tuple(Outcome)),
    Filter(
        name="since", label="Since", read=_since, hint="A time in UTC, or 2h, 7d back from now."
    ),
    Filter(name="until", label="Until", read=_until, hint="The same."),
)
FURTHER: Final = (
    Filter(
        name="source_system",
        label="Source system",
        read=_matching(SOURCE_SYSTEM),
        of_all=True,
    ),
    Filter(
        name="credential",
        label="Credential",
        read=_credential,
        hint="cr_…",
        attribute="credential_id",
    ),
    Filter(
        name="actor",
        label="Done or reported by",
        read=_service_user,
        hint="Name or id of a service user.",
    ),
    Filter(
        name="actor_credential",
        label="With the credential",
        read=_credential,
        hint="Of who did or reported it: cr_…",
        attribute="actor_credential_id",
    ),
    Filter(name="reason", label="Reason", read=_line(200), hint="Such as wrong_secret."),
    Filter(name="request_id", label="Request", read=_line(128), hint="X-Request-Id of an answer."),
    Filter(
        name="jti", label="Token", read=_uuid, hint="Its jti: the issuance and all calls with it."
    ),
    Filter(
        name="kid",
        label="Signing key",
        read=_matching(KID),
        hint="Its kid.",
    ),
    Filter(
        name="client_address",
        label="Client address",
        read=_line(64),
        hint="From where.",
        of_all=True,
    ),
    Filter(
        name="user_agent",
        label="User agent",
        read=_line(200),
        hint="With what program: how its name begins.",
        of_all=True,
    ),
    Filter(name="department", label="Department", read=_line(128)),
    Filter(name="resource", label="Resource", read=_line(300), hint="How its name begins."),
)
