"""The form of a service user: what was typed, what is wrong with it, and what it asks for.

Decides only the form of each field, as the API states it; what may be done, the rules decide.
"""

import re
from collections.abc import Mapping
from typing import Any, Final, TypeVar, cast, get_type_hints

import msgspec
from msgspec import Struct

from service.authority.administration import Defaults, NewServiceUser, ServiceUserChange
from service.authority.model import (
    AUDIENCE,
    EXPECTED,
    NAME,
    SCOPE,
    SOURCE_SYSTEM,
    Audience,
    Scope,
    ServiceUser,
)
from service.console.forms import Form

T = TypeVar("T", bound=Struct)

FIELDS: Final[Mapping[str, str]] = {
    "name": "Name",
    "source_system": "Source system",
    "owner": "Owner",
    "contact": "Contact",
    "description": "Description",
    "scopes": "Scopes",
    "audiences": "Audiences",
    "token_lifetime": "Token lifetime",
}
"""Every field, in the order of the page, and what it is called there."""

_EXPECTED: Final[Mapping[str, str]] = {
    "name": EXPECTED[NAME],
    "source_system": EXPECTED[SOURCE_SYSTEM],
    "owner": "Expected up to 200 characters.",
    "contact": "Expected up to 200 characters.",
    "description": "Expected up to 1000 characters.",
    "scopes": "Expected up to 32 scopes.",
    "audiences": "Expected 1 to 8 audiences.",
    "token_lifetime": "Expected a whole number of seconds from 60 to 3600.",
    "label": "Expected 1 to 100 characters.",
}
_EACH: Final[Mapping[str, tuple[Any, str]]] = {
    "scopes": (Scope, f"is no scope. {EXPECTED[f'^{SCOPE}$']}"),
    "audiences": (Audience, f"is no audience. {EXPECTED[AUDIENCE]}"),
}
_SHOWN: Final = 60


class Typed(Struct, frozen=True, kw_only=True):
    """The fields as a person sees and types them."""

    name: str = ""
    source_system: str = ""
    owner: str = ""
    contact: str = ""
    description: str = ""
    scopes: list[str] = []
    audiences: list[str] = []
    token_lifetime: str = ""

    def shown(self, name: str) -> str:
        """Return a field in one line."""
        value: str | list[str] = getattr(self, name)
        return value if isinstance(value, str) else " ".join(value)

    def differs(self, other: "Typed", name: str) -> bool:
        """Whether a field says something else; no order of scopes means anything."""
        mine, theirs = getattr(self, name), getattr(other, name)
        return set(mine) != set(theirs) if name == "scopes" else mine != theirs


class Base(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the fields were when the form was made, and at which version: it comes back with it."""

    version: int
    was: Typed

    @classmethod
    def of(cls, user: ServiceUser) -> "Base":
        """Return what a service user is now."""
        return cls(version=user.version, was=typed_as(user))

    def as_text(self) -> str:
        """Return what a hidden field holds."""
        return msgspec.json.encode(self).decode()


def blank(defaults: Defaults) -> Typed:
    """Return the form of a new service user."""
    return Typed(audiences=[defaults.audience], token_lifetime=str(defaults.token_lifetime))


def typed_as(user: ServiceUser) -> Typed:
    """Return the form of one that is on record."""
    return Typed(
        name=user.name,
        source_system=user.source_system,
        owner=user.owner,
        contact=user.contact,
        description=user.description,
        scopes=list(user.scopes),
        audiences=list(user.audiences),
        token_lifetime=str(user.token_lifetime),
    )


def read_typed(form: Form) -> Typed:
    """Return what was typed."""
    scopes = [scope.strip() for scope in form.all("scope")] + form.text("other_scopes").split()
    return Typed(
        **{name: one_line(form, name) for name in FIELDS if name not in ("scopes", "audiences")},
        scopes=list(dict.fromkeys(scope for scope in scopes if scope)),
        audiences=list(dict.fromkeys(form.text("audiences").split())),
    )


def read_base(form: Form) -> Base | None:
    """Return what the form was made of, None if that is not what it says."""
    try:
        return msgspec.json.decode(form.text("base"), type=Base)
    except msgspec.MsgspecError:
        return None


def one_line(form: Form, name: str) -> str:
    """Return a field as one line: nothing that is kept holds a line break."""
    return " ".join(form.text(name).split())


def new_service_user(typed: Typed) -> NewServiceUser | dict[str, str]:
    """Return what was asked for, or what is wrong, by field."""
    return checked(NewServiceUser, _values(typed, set(FIELDS)))


def changed_service_user(typed: Typed, was: Typed) -> ServiceUserChange | dict[str, str]:
    """Return the difference that was asked for, or what is wrong, by field."""
    return checked(
        ServiceUserChange, _values(typed, {name for name in FIELDS if typed.differs(was, name)})
    )


def merged(mine: Typed, was: Typed, theirs: Typed) -> Typed:
    """Return what I typed over what others did meanwhile: mine where I changed something."""
    return Typed(
        **{name: getattr(mine if mine.differs(was, name) else theirs, name) for name in FIELDS}
    )


def checked(kind: type[T], values: Mapping[str, object]) -> T | dict[str, str]:
    """Return the struct of these values, or what is wrong with each that is."""
    kinds = get_type_hints(kind, include_extras=True)
    wrong = {
        name: says for name, value in values.items() if (says := _fault(name, value, kinds[name]))
    }
    return wrong or msgspec.convert(values, kind)


def _values(typed: Typed, names: set[str]) -> dict[str, object]:
    values: dict[str, object] = {name: getattr(typed, name) for name in FIELDS if name in names}
    if re.fullmatch("[0-9]{1,9}", lifetime := typed.token_lifetime) and "token_lifetime" in names:
        values["token_lifetime"] = int(lifetime)
    return values


def _fault(name: str, value: object, kind: Any) -> str:
    if name in _EACH:
        each, says = _EACH[name]
        for member in cast("list[str]", value):
            if not fits(member, each):
                return f"“{member[:_SHOWN]}” {says}"
    return "" if fits(value, kind) else _EXPECTED[name]


def fits(value: object, kind: Any) -> bool:
    """Whether a value has the stated form."""
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError:
        return False
    return True
