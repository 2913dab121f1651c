"""`/console/service-users`: the API keys: who may get tokens, and how it is used.

Holds no rule: each act is the API's own.
"""

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import urlencode

from litestar import Controller, Response, get, post
from litestar.di import NamedDependency
from litestar.params import FromQuery

from service.authority.administration import (
    Administration,
    NewServiceUser,
    ServiceUserChange,
)
from service.authority.audit import Action
from service.authority.errors import Conflict, Invalid, PreconditionFailed
from service.authority.hand_over import HandOvers
from service.authority.model import (
    MAX_SEARCH,
    NAME,
    SERVICE_USER_ID,
    SOURCE_SYSTEM,
    AdminScope,
    ServiceUser,
    ServiceUserFilter,
    Status,
)
from service.authority.operators import Operator
from service.authority.usage import MANY_TOKENS, Usage
from service.console.gate import form_of
from service.console.page import page, redirect
from service.console.service_user_form import (
    FIELDS,
    Base,
    Typed,
    blank,
    changed_service_user,
    merged,
    new_service_user,
    read_base,
    read_typed,
    typed_as,
)
from service.http.context import AnyRequest, ServiceUserIdInPath, note, origin_of
from service.http.errors import Refused, status_of

PATH: Final = "/console/service-users"
PAGE_SIZE: Final = 50
SUGGESTED: Final = 50

SCOPES: Final[Mapping[str, str]] = {
    "ingest:write": "bring documents in",
    "search:read": "search the documents of its own system",
    "search:all": "search the documents of every system",
}
"""The scopes that the services of an installation know as a rule, and what they open."""
ADMIN_SCOPES: Final[Mapping[str, str]] = {
    AdminScope.SERVICE_USERS_READ: "see API keys and their use",
    AdminScope.SERVICE_USERS_WRITE: "create, change and disable API keys, and make credentials",
    AdminScope.TOKENS_MINT: "mint a token by hand",
    AdminScope.SIGNING_KEYS_READ: "see the signing keys",
    AdminScope.SIGNING_KEYS_ROTATE: "rotate the signing keys",
    AdminScope.SIGNING_KEYS_REVOKE: "revoke a signing key",
    AdminScope.AUDIT_READ: "read the audit log",
    AdminScope.AUDIT_REPORT: "report calls that were made with tokens, as a service does",
}
_END: Final = re.compile(r"([0-9]{1,12})\.([0-9]{6})\.(cr_[a-z2-7]{24})")


class ApiKeyController(Controller):
    """Service users: list, create, show, change, disable and enable."""

    path = "/service-users"

    @get("/", opt={"action": Action.SERVICE_USER_LIST})
    async def list(
        self,
        request: AnyRequest,
        operator: NamedDependency[Operator],
        usage: NamedDependency[Usage],
        search: FromQuery[str] = "",
        source_system: FromQuery[str] = "",
        status: FromQuery[str] = "",
        after: FromQuery[str] = "",
    ) -> Response[Any]:
        """List service users by name, those of a search and of filters if there are any."""
        if re.fullmatch(SERVICE_USER_ID, sought := search.strip().lower()):
            return redirect(request, f"{PATH}/{sought}")
        fields = {
            "search": search.strip(),
            "source_system": source_system.strip(),
            "status": status,
        }
        wrong = _wrong_filters(fields)
        good = {key: value for key, value in fields.items() if value and key not in wrong}
        wanted = ServiceUserFilter(
            search=good.get("search", ""),
            source_system=good.get("source_system", ""),
            status=Status(good["status"]) if "status" in good else None,
        )
        beyond = after if re.fullmatch(NAME, after) else ""
        rows = await usage.page(operator, wanted, after=beyond, limit=PAGE_SIZE + 1)
        following = ""
        if len(rows) > PAGE_SIZE:
            more = {**good, "after": rows[PAGE_SIZE - 1].service_user.name}
            following = f"{PATH}?{urlencode(more)}"
        return page(
            request,
            "service_users/list.html",
            status=HTTPStatus.UNPROCESSABLE_ENTITY if wrong else HTTPStatus.OK,
            rows=rows[:PAGE_SIZE],
            fields=fields,
            wrong=wrong,
            is_filtered=bool(good),
            is_first=not beyond,
            first=f"{PATH}?{urlencode(good)}" if good else PATH,
            following=following,
            source_systems=await usage.source_systems(operator, SUGGESTED),
            may_write=AdminScope.SERVICE_USERS_WRITE in operator.scopes,
        )

    @get("/ending", opt={"action": Action.CREDENTIAL_LIST})
    async def ending(
        self,
        request: AnyRequest,
        operator: NamedDependency[Operator],
        usage: NamedDependency[Usage],
        after: FromQuery[str] = "",
    ) -> Response[Any]:
        """List the credentials that end soon and that nothing replaces, the first end first."""
        rows = await usage.ending(operator, after=_end(after), limit=PAGE_SIZE + 1)
        following = ""
        if len(rows) > PAGE_SIZE:
            last = rows[PAGE_SIZE - 1]
            moment = f"{last.expires_at.timestamp():.6f}"
            following = f"{PATH}/ending?after={moment}.{last.credential_id}"
        return page(
            request,
            "service_users/ending.html",
            rows=rows[:PAGE_SIZE],
            is_first=not after,
            following=following,
        )

    @get("/new", opt={"action": Action.SERVICE_USER_CREATE})
    async def ask(
        self,
        request: AnyRequest,
        operator: NamedDependency[Operator],
        administration: NamedDependency[Administration],
        usage: NamedDependency[Usage],
    ) -> Response[Any]:
        """Ask what the new service user shall be."""
        operator.require(AdminScope.SERVICE_USERS_WRITE)
        return page(
            request,
            "service_users/new.html",
            typed=blank(administration.defaults),
            wrong={},
            problem="",
            **await _form_parts(operator, administration, usage),
        )

    @post("/new", opt={"action": Action.SERVICE_USER_CREATE}, status_code=HTTPStatus.OK)
    async def create(
        self,
        request: AnyRequest,
        operator: NamedDependency[Operator],
        administration: NamedDependency[Administration],
        usage: NamedDependency[Usage],
    ) -> Response[Any]:
        """Create a service user, and go on to its page."""
        operator.require(AdminScope.SERVICE_USERS_WRITE)
        typed = read_typed(form_of(request))
        new = new_service_user(typed)
        wrong, problem, status = _all_wrong(request, new)
        if not isinstance(new, dict):
            try:
                user = await administration.create(operator, new, origin_of(request.scope))
            except (Invalid, Conflict) as error:
                wrong, problem, status = beside(request, error)
            else:
                return redirect(request, f"{PATH}/{user.id}?done=created")
        return page(
            request,
            "service_users/new.html",
            status=status,
            typed=typed,
            wrong=wrong,
            taken=status == HTTPStatus.CONFLICT and "name" in wrong,
            problem=problem,
            **await _form_parts(operator, administration, usage),
        )

    @get("/{service_user_id:str}", opt={"action": Action.SERVICE_USER_READ})
    async def read(
        self,
        request: AnyRequest,
        service_user_id: ServiceUserIdInPath,
        operator: NamedDependency[Operator],
        usage: NamedDependency[Usage],
        hand_overs: NamedDependency[HandOvers],
        done: FromQuery[str] = "",
    ) -> Response[Any]:
        """Show a service user, its credentials, and how they are used."""
        return page(
            request,
            "service_users/detail.html",
            of=await usage.of(operator, service_user_id),
            refused_openings=await hand_overs.refused(operator, service_user_id),
            done=done,
            many_tokens=MANY_TOKENS,
            shown=PAGE_SIZE,
            may_write=AdminScope.SERVICE_USERS_WRITE in operator.scopes,
            scopes=operator.scopes,
        )

    @get("/{service_user_id:str}/change", opt={"action": Action.SERVICE_USER_READ})
    async def ask_change(
        self,
        request: AnyRequest,
        service_user_id: ServiceUserIdInPath,
        operator: NamedDependency[Operator],
        administration: NamedDependency[Administration],
        usage: NamedDependency[Usage],
    ) -> Response[Any]:
        """Show the fields of a service user, to be changed."""
        operator.require(AdminScope.SERVICE_USERS_WRITE)
        user = await administration.read(operator, service_user_id)
        return page(
            request,
            "service_users/change.html",
            user=user,
            base=Base.of(user),
            typed=typed_as(user),
            meanwhile=[],
            overtaken=False,
            wrong={},
            problem="",
            **await _form_parts(operator, administration, usage),
        )

    @post(
        "/{service_user_id:str}/change",
        opt={"action": Action.SERVICE_USER_CHANGE},
        status_code=HTTPStatus.OK,
    )
    async def change(
        self,
        request: AnyRequest,
        service_user_id: ServiceUserIdInPath,
        operator: NamedDependency[Operator],
        administration: NamedDependency[Administration],
        usage: NamedDependency[Usage],
    ) -> Response[Any]:
        """Change what was typed over; say what others changed since the form was made."""
        operator.require(AdminScope.SERVICE_USERS_WRITE)
        form = form_of(request)
        typed, base = read_typed(form), read_base(form)
        if base is None:
            raise Refused(HTTPStatus.BAD_REQUEST, "This form was not made here. Open it again.")
        shown: dict[str, Any] = {"base": base, "meanwhile": [], "typed": typed, "overtaken": False}
        change = changed_service_user(typed, base.was)
        wrong, problem, status = _all_wrong(request, change)
        if not isinstance(change, dict):
            try:
                await administration.change(
                    operator, service_user_id, change, base.version, origin_of(request.scope)
                )
            except PreconditionFailed as error:
                note(request.scope, refused=error.reason)
                status = HTTPStatus.PRECONDITION_FAILED
                user = await administration.read(operator, service_user_id)
                shown = _overtaken(typed, base, user)
            except (Invalid, Conflict) as error:
                wrong, problem, status = beside(request, error)
            else:
                return redirect(request, f"{PATH}/{service_user_id}?done=changed")
        return page(
            request,
            "service_users/change.html",
            status=status,
            user=await administration.read(operator, service_user_id),
            wrong=wrong,
            taken=status == HTTPStatus.CONFLICT and "name" in wrong,
            problem=problem,
            **shown,
            **await _form_parts(operator, administration, usage),
        )

    @get("/{service_user_id:str}/disable", opt={"action": Action.SERVICE_USER_READ})
    async def ask_disable(
        self,
        request: AnyRequest,
        service_user_id: ServiceUserIdInPath,
        operator: NamedDependency[Operator],
        usage: NamedDependency[Usage],
    ) -> Response[Any]:
        """Say what it breaks to disable a service user, and ask again."""
        operator.require(AdminScope.SERVICE_USERS_WRITE)
        return await _disabling(request, operator, usage, service_user_id)

    @post(
        "/{service_user_id:str}/disable",
        opt={"action": Action.SERVICE_USER_DISABLE},
        status_code=HTTPStatus.OK,
    )
    async def disable(
        self,
        request: AnyRequest,
        service_user_id: ServiceUserIdInPath,
        operator: NamedDependency[Operator],
        administration: NamedDependency[Administration],
        usage: NamedDependency[Usage],
    ) -> Response[Any]:
        """Disable a service user: from this answer on it gets no token."""
        try:
            await administration.disable(operator, service_user_id, origin_of(request.scope))
        except Conflict as error:
            _, problem, status = beside(request, error)
            return await _disabling(request, operator, usage, service_user_id, problem, status)
        return redirect(request, f"{PATH}/{service_user_id}?done=disabled")

    @post(
        "/{service_user_id:str}/enable",
        opt={"action": Action.SERVICE_USER_ENABLE},
        status_code=HTTPStatus.OK,
    )
    async def enable(
        self,
        request: AnyRequest,
        service_user_id: ServiceUserIdInPath,
        operator: NamedDependency[Operator],
        administration: NamedDependency[Administration],
    ) -> Response[Any]:
        """Enable a service user again."""
        await administration.enable(operator, service_user_id, origin_of(request.scope))
        return redirect(request, f"{PATH}/{service_user_id}?done=enabled")


def beside(
    request: AnyRequest, error: Invalid | Conflict
) -> tuple[dict[str, str], str, HTTPStatus]:
    """Return a refusal as it is shown beside a field, or over the form, and its status; it goes on
    record like one that has a page of its own."""
    note(request.scope, refused=error.reason)
    field = error.pointer.strip("/")
    if field in FIELDS or field in ("expires_at", "label"):
        return {field: error.detail}, "", status_of(error)
    return {}, error.detail, status_of(error)


def _all_wrong(
    request: AnyRequest, asked: NewServiceUser | ServiceUserChange | dict[str, str]
) -> tuple[Mapping[str, str], str, HTTPStatus]:
    """Return the faults of the fields, if that is what was found."""
    if not isinstance(asked, dict):
        return {}, "", HTTPStatus.OK
    note(request.scope, refused=Invalid.reason)
    return asked, "", HTTPStatus.UNPROCESSABLE_ENTITY


async def _form_parts(
    operator: Operator, administration: Administration, usage: Usage
) -> dict[str, Any]:
    return {
        "names": FIELDS,
        "known_scopes": SCOPES,
        "admin_scopes": ADMIN_SCOPES,
        "defaults": administration.defaults,
        # Whoever only writes has nothing to choose from, and may type.
        "source_systems": await usage.source_systems(operator, SUGGESTED)
        if AdminScope.SERVICE_USERS_READ in operator.scopes
        else [],
    }


def _overtaken(typed: Typed, base: Base, user: ServiceUser) -> dict[str, Any]:
    """Return the form once more: what was typed, over what others made of the rest."""
    now = Base.of(user)
    meanwhile = [
        {
            "name": name,
            "was": base.was.shown(name),
            "now": now.was.shown(name),
            "mine": typed.shown(name) if typed.differs(base.was, name) else None,
        }
        for name in FIELDS
        if now.was.differs(base.was, name)
    ]
    return {
        "base": now,
        "meanwhile": meanwhile,
        "typed": merged(typed, base.was, now.was),
        "overtaken": True,
    }


async def _disabling(
    request: AnyRequest,
    operator: Operator,
    usage: Usage,
    service_user_id: str,
    problem: str = "",
    status: HTTPStatus = HTTPStatus.OK,
) -> Response[Any]:
    return page(
        request,
        "service_users/disable.html",
        status=status,
        of=await usage.of(operator, service_user_id),
        problem=problem,
        many_tokens=MANY_TOKENS,
    )


def _wrong_filters(fields: Mapping[str, str]) -> dict[str, str]:
    wrong: dict[str, str] = {}
    if len(fields["search"]) > MAX_SEARCH:
        wrong["search"] = f"Expected up to {MAX_SEARCH} characters."
    if fields["source_system"] and not re.fullmatch(SOURCE_SYSTEM, fields["source_system"]):
        wrong["source_system"] = "No source system is called that."
    if fields["status"] and fields["status"] not in set(Status):
        wrong["status"] = "There is no such status."
    return wrong


def _end(cursor: str) -> tuple[datetime, str] | None:
    """Return the place of a cursor; whatever is none of ours leads to the first page."""
    if (match := _END.fullmatch(cursor)) is None:
        return None
    seconds = min(int(match[1]), 10**11)
    moment = datetime.fromtimestamp(seconds, UTC).replace(microsecond=int(match[2]))
    return moment, match[3]
