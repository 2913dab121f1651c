"""`/api/v1`: service users, credentials, tokens by hand and signing keys, for operators.

Carries requests to the rules and answers back; holds no rule itself.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping
from datetime import datetime
from http import HTTPStatus
from typing import Annotated, Any, Final, TypeVar

import msgspec
from litestar import Controller, HttpMethod, Request, Response, get, patch, post
from litestar.di import NamedDependency
from litestar.params import JSONBody, PathParameter, QueryParameter
from litestar.typing import FieldDefinition
from msgspec import Meta, Struct

from keys.verifier.strict import JSON, json_object
from service.authority.administration import (
    Administration,
    NewCredential,
    NewServiceUser,
    ServiceUserChange,
)
from service.authority.audit import Action, AuditRecord, Outcome, new_record_id, personal
from service.authority.confirmation import Confirmations
from service.authority.errors import Unauthenticated
from service.authority.issuer import TokenIssuer
from service.authority.model import (
    CREDENTIAL_ID,
    KID,
    MAX_SEARCH,
    NAME,
    SCOPE,
    SERVICE_USER_ID,
    SOURCE_SYSTEM,
    Audience,
    Clock,
    Credential,
    LiveTokens,
    ServiceUser,
    ServiceUserFilter,
    Status,
)
from service.authority.operators import Operator, Operators
from service.http.context import note, noted, origin_of
from service.http.errors import NO_STORE, Refused, invalid_body
from service.http.signing_keys import Reason

AnyRequest = Request[Any, Any, Any]

MAX_BODY: Final = 65_536
BODY_DEADLINE: Final = 10.0
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")
_ETAG_FORM: Final = 'expected If-Match: "<version>", as the ETag of the service user has it'

# Litestar reads the constraints of a parameter from its own marker only.
ServiceUserIdInPath = Annotated[str, PathParameter(pattern=SERVICE_USER_ID)]
CredentialIdInPath = Annotated[str, PathParameter(pattern=CREDENTIAL_ID)]
PageSize = Annotated[int, QueryParameter(ge=1, le=200)]
Cursor = Annotated[str, QueryParameter(pattern=f"^$|{NAME}")]
NameQuery = Annotated[str | None, QueryParameter(pattern=NAME)]
SourceSystemQuery = Annotated[str | None, QueryParameter(pattern=SOURCE_SYSTEM)]
SearchQuery = Annotated[
    str | None,
    QueryParameter(
        min_length=1,
        max_length=MAX_SEARCH,
        description="Words that begin a word of name, owner or contact, each of them; or an id.",
    ),
]
StatusQuery = Annotated[Status | None, QueryParameter()]
TokenScope = Annotated[
    str, Meta(max_length=2200, pattern=f"^{SCOPE}( {SCOPE})*$", examples=["ingest:write"])
]


ServiceUserT = TypeVar("ServiceUserT", bound=ServiceUser)


class ChangedServiceUser(ServiceUser, frozen=True, kw_only=True):
    """A service user after a change, and the tokens that this cannot take back (null: unknown)."""

    live_tokens: LiveTokens | None


class ServiceUserPage(Struct, frozen=True, kw_only=True):
    """Service users by name; `next_cursor` leads on, and is null at the end."""

    service_users: list[ServiceUser]
    next_cursor: str | None


class CredentialBody(Struct, frozen=True, kw_only=True):
    """A credential without its secret. `state` is live, offered, held, lapsed, expired or revoked.

    A held one gets no token until an operator confirms it: the database was restored. An offered
    one is handed over: nobody has its secret until its link is opened, before `code_ends_at`; it
    lapsed if nobody did. `succeeds` is the one that its holder made it to replace.
    """

    id: str
    service_user_id: str
    label: str
    state: str
    created_at: datetime
    expires_at: datetime
    revoked_at: datetime | None
    held_at: datetime | None
    code_ends_at: datetime | None
    opened_at: datetime | None
    succeeds: str | None
    last_used_at: datetime | None


class CreatedCredential(CredentialBody, frozen=True, kw_only=True):
    """A credential with its secret, which is shown this once."""

    client_id: str
    client_secret: str


class OfferedCredential(CredentialBody, frozen=True, kw_only=True):
    """A credential that is handed over, with its link, which is shown this once."""

    link: str


class RevokedCredential(CredentialBody, frozen=True, kw_only=True):
    """A revoked credential, and the tokens that this cannot take back (null: unknown)."""

    live_tokens: LiveTokens | None


class CredentialList(Struct, frozen=True, kw_only=True):
    """The credentials of a service user, the newest first."""

    credentials: list[CredentialBody]


class NewToken(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a token by hand shall be; what is left out is as in an exchange."""

    scope: TokenScope | None = None
    resource: Audience | None = None


class MintedToken(Struct, frozen=True, kw_only=True):
    """A token by hand, as RFC 6749 §5.1 has it, with its id and its end (NumericDate)."""

    access_token: str
    token_type: str
    expires_in: int
    scope: str
    jti: str
    expires_at: int


class ServiceUserController(Controller):
    """Service users, their credentials, and tokens by hand."""

    path = "/service-users"
    tags = ("Service users",)

    @post("/", opt={"action": Action.SERVICE_USER_CREATE})
    async def create(
        self,
        data: JSONBody[NewServiceUser],
        request: AnyRequest,
        operator: NamedDependency[Operator],
        administration: NamedDependency[Administration],
    ) -> Response[ServiceUser]:
        """Create a service user. It needs a credential before it gets tokens."""
        user = await administration.create(operator, data, origin_of(request.scope))
        location = {"Location": f"/api/v1/service-users/{user.id}"}
        return _tagged(user, HTTPStatus.CREATED, location)

    @get("/", opt={"action": Action.SERVICE_USER_LIST})
    async def list(
        self,
        operator: NamedDependency[Operator],
        administration: NamedDependency[Administration],
        limit: PageSize = 50,
        cursor: Cursor = "",
        name: NameQuery = None,
        search: SearchQuery = None,
        source_system: SourceSystemQuery = None,
        status: StatusQuery = None,
    ) -> ServiceUserPage:
        """List service users by name."""
        users = await administration.page(
            operator,
            ServiceUserFilter(
                name=name or "",
                search=search or "",
                source_system=source_system or "",
                status=status,
            ),
            after=cursor,
            limit=limit + 1,
        )
        return ServiceUserPage(
            service_users=list(users[:limit]),
            next_cursor=users[limit - 1].name if len(users) > limit else None,
        )

    @get("/me", opt={"action": Action.SERVICE_USER_READ})
    async def me(self, operator: NamedDependency[Operator]) -> Response[ServiceUser]:
        """Show the caller itself; this takes no scope."""
        user = operator.service_user
        return _tagged(user)

    @get("/{service_user_id:str}", opt={"action": Action.SERVICE_USER_READ})
    async def read(
        self,
        service_user_id: ServiceUserIdInPath,
        operator: NamedDependency[Operator],
        administration: NamedDependency[Administration],
    ) -> Response[ServiceUser]:
        """Show a service user; its ETag is what a change has to name."""
        user = await administration.read(operator, service_user_id)
        return _tagged(user)

    @patch("/{service_user_id:str}", opt={"action": Action.SERVICE_USER_CHANGE})
    async def change(
        self,
        service_user_id: ServiceUserIdInPath,
        data: JSONBody[ServiceUserChange],
        request: AnyRequest,
        operator: NamedDependency[Operator],
        administration: NamedDependency[Administration],
    ) -> Response[ChangedServiceUser]:
        """Change a service user that nobody else changed since it was read (`If-Match`)."""
        user, live_tokens = await administration.change(
            operator, service_user_id, data, _if_match(request), origin_of(request.scope)
        )
        return _tagged(_changed(user, live_tokens))

    @post(
        "/{service_user_id:str}/disable",
        status_code=200,
        opt={"action": Action.SERVICE_USER_DISABLE},
    )
    async def disable(
        self,
        service_user_id: ServiceUserIdInPath,
        request: AnyRequest,
        operator: NamedDependency[Operator],
        administration: NamedDependency[Administration],
    ) -> Response[ChangedServiceUser]:
        """Disable a service user. From this answer on no process issues it a token."""
        user, live_tokens = await administration.disable(
            operator, service_user_id, origin_of(request.scope)
        )
        return _tagged(_changed(user, live_tokens))

    @post(
        "/{service_user_id:str}/enable", status_code=200, opt={"action": Action.SERVICE_USER_ENABLE}
    )
    async def enable(
        self,
        service_user_id: ServiceUserIdInPath,
        request: AnyRequest,
        operator: NamedDependency[Operator],
        administration: NamedDependency[Administration],
    ) -> Response[ChangedServiceUser]:
        """Enable a disabled service user."""
        user, live_tokens = await administration.enable(
            operator, service_user_id, origin_of(request.scope)
        )
        return _tagged(_changed(user, live_tokens))

    @get("/{service_user_id:str}/credentials", opt={"action": Action.CREDENTIAL_LIST})
    async def credentials(
        self,
        service_user_id: ServiceUserIdInPath,
        operator: NamedDependency[Operator],
        administration: NamedDependency[Administration],
        clock: NamedDependency[Clock],
    ) -> CredentialList:
        """List the credentials of a service user, those that ended included."""
        held = await administration.credentials(operator, service_user_id)
        now = clock()
        return CredentialList(
            credentials=[credential_body(each, CredentialBody, now) for each in held]
        )

    @post("/{service_user_id:str}/credentials", opt={"action": Action.CREDENTIAL_CREATE})
    async def create_credential(
        self,
        service_user_id: ServiceUserIdInPath,
        data: JSONBody[NewCredential],
        request: AnyRequest,
        operator: NamedDependency[Operator],
        administration: NamedDependency[Administration],
        clock: NamedDependency[Clock],
    ) -> Response[CreatedCredential]:
        """Create a credential; the answer holds its secret, which cannot be had again."""
        credential, secret = await administration.create_credential(
            operator, service_user_id, data, origin_of(request.scope)
        )
        body = credential_body(
            credential,
            CreatedCredential,
            clock(),
            client_id=service_user_id,
            client_secret=secret.reveal(),
        )
        return Response(body, status_code=HTTPStatus.CREATED, headers=NO_STORE)

    @post("/{service_user_id:str}/hand-overs", opt={"action": Action.CREDENTIAL_HAND_OVER})
    async def hand_over(
        self,
        service_user_id: ServiceUserIdInPath,
        data: JSONBody[NewCredential],
        request: AnyRequest,
        operator: NamedDependency[Operator],
        administration: NamedDependency[Administration],
        clock: NamedDependency[Clock],
    ) -> Response[OfferedCredential]:
        """Create a credential whose secret only the one who opens the link ever sees.

        The link works once, within 24 hours. Whoever opens it in a browser and presses the button
        gets the secret, which is made then.
        """
        offered = await administration.hand_over(
            operator, service_user_id, data, origin_of(request.scope)
        )
        body = credential_body(
            offered.credential, OfferedCredential, clock(), link=offered.link.reveal()
        )
        return Response(body, status_code=HTTPStatus.CREATED, headers=NO_STORE)

    @post(
        "/{service_user_id:str}/credentials/{credential_id:str}/revoke",
        status_code=200,
        opt={"action": Action.CREDENTIAL_REVOKE},
    )
    async def revoke_credential(
        self,
        service_user_id: ServiceUserIdInPath,
        credential_id: CredentialIdInPath,
        request: AnyRequest,
        operator: NamedDependency[Operator],
        administration: NamedDependency[Administration],
        clock: NamedDependency[Clock],
    ) -> RevokedCredential:
        """Revoke a credential. From this answer on no process issues a token for it."""
        credential, live_tokens = await administration.revoke_credential(
            operator, service_user_id, credential_id, origin_of(request.scope)
        )
        return credential_body(credential, RevokedCredential, clock(), live_tokens=live_tokens)

    @post(
        "/{service_user_id:str}/credentials/{credential_id:str}/confirm",
        status_code=200,
        opt={"action": Action.CREDENTIAL_CONFIRM},
    )
    async def confirm_credential(
        self,
        service_user_id: ServiceUserIdInPath,
        credential_id: CredentialIdInPath,
        data: JSONBody[Reason],
        request: AnyRequest,
        operator: NamedDependency[Operator],
        confirmations: NamedDependency[Confirmations],
        clock: NamedDependency[Clock],
    ) -> CredentialBody:
        """Confirm a credential that is held after a restore: from now on it gets tokens again."""
        credential = await confirmations.confirm(
            operator, service_user_id, credential_id, data.reason, origin_of(request.scope)
        )
        return credential_body(credential, CredentialBody, clock())

    @post("/{service_user_id:str}/tokens", opt={"action": Action.TOKEN_MINT})
    async def mint(
        self,
        service_user_id: ServiceUserIdInPath,
        data: JSONBody[NewToken],
        request: AnyRequest,
        operator: NamedDependency[Operator],
        issuer: NamedDependency[TokenIssuer],
    ) -> Response[MintedToken]:
        """Mint one token by hand, for trying; `act.sub` in it names the caller."""
        token = await issuer.mint(
            operator,
            service_user_id,
            scope=data.scope,
            resource=data.resource,
            origin=origin_of(request.scope),
        )
        body = MintedToken(
            access_token=token.token.reveal(),
            token_type="Bearer",  # noqa: S106
            expires_in=token.expires_in,
            scope=token.scope,
            jti=token.jti,
            expires_at=token.expires_at,
        )
        return Response(body, status_code=HTTPStatus.CREATED, headers=NO_STORE)


def gatekeeper(
    operators: Operators,
) -> Callable[[AnyRequest], Awaitable[Response[None] | None]]:
    """Return what stands before every admin route: first who calls, then what was sent."""

    async def let_in(request: AnyRequest) -> Response[None] | None:
        note(request.scope, operator=await operators.authenticate(_bearer_token(request)))
        if request.method == HttpMethod.OPTIONS:
            return _options(request)
        await check_form(request)
        return None

    return let_in


def _options(request: AnyRequest) -> Response[None]:
    # The framework's own answer forgets the methods that it registered first.
    path = request.scope["path_template"]
    methods = next(route.methods for route in request.app.routes if route.path_format == path)
    allow = ", ".join(sorted(methods))
    return Response(None, status_code=HTTPStatus.NO_CONTENT, headers={"Allow": allow})


async def operator_of(request: AnyRequest) -> Operator:
    """Return who calls, as the gatekeeper found it."""
    return noted(request.scope, "operator")


async def check_form(request: AnyRequest) -> None:
    """Refuse what the framework would take: other content types, doubled JSON members, "900" for
    900, unknown or doubled query parameters, and control characters in any string."""
    handler = request.route_handler
    parameters = dict(handler.parsed_fn_signature.parameters)
    for dependency in handler.resolve_dependencies().values():
        parameters.update(dependency.parsed_fn_signature.parameters)
    parameters = {_sent_name(name, field): field for name, field in parameters.items()}
    known = {name for name, field in parameters.items() if field.has_default}
    names = [name for name, _ in request.query_params.multi_items()]
    if unknown := sorted(set(names) - known):
        raise Refused(HTTPStatus.BAD_REQUEST, f"Unknown query parameter: {unknown[0][:40]!a}.")
    if len(set(names)) != len(names):
        raise Refused(HTTPStatus.BAD_REQUEST, "Each query parameter may be given once.")
    if any(_CONTROL.search(value) for value in request.query_params.values()):
        raise Refused(HTTPStatus.BAD_REQUEST, "Parameters must not hold control characters.")
    for name, value in request.query_params.items():
        field = parameters[name]
        kinds = {field.annotation, *(inner.annotation for inner in field.inner_types)}
        # The framework takes the word for None: a filter that holds nothing back.
        if value.lower() == "null" and str not in kinds:
            raise Refused(HTTPStatus.BAD_REQUEST, f"Leave {name} out instead of sending null.")
    if "data" not in parameters:
        return
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "Expected Content-Type: application/json.")
    try:
        async with asyncio.timeout(BODY_DEADLINE):
            raw = await request.body()
    except TimeoutError:
        raise Refused(
            HTTPStatus.REQUEST_TIMEOUT, f"The body did not arrive within {BODY_DEADLINE:.0f} s."
        ) from None
    form = parameters["data"].annotation
    if len(raw) <= MAX_BODY:
        _check_body(raw, form)
    else:
        # It takes longer than the event loop may stand still.
        await asyncio.to_thread(_check_body, raw, form)


def _sent_name(name: str, field: FieldDefinition) -> str:
    """Return what a parameter is called in the query: `from` can be no name in Python."""
    sent_as = field.kwarg_definition
    return (isinstance(sent_as, QueryParameter) and sent_as.name) or name


def _check_body(raw: bytes, form: Any) -> None:
    try:
        body = json_object(raw)
    except ValueError as error:
        raise Refused(HTTPStatus.BAD_REQUEST, f"The body is no JSON object: {error}.") from None
    # RFC 8259 §7: one below U+0020 can only be written as an escape.
    if (b"\\" in raw or b"\x7f" in raw) and any(map(_CONTROL.search, _strings(body))):
        raise Refused(HTTPStatus.BAD_REQUEST, "Strings must not hold control characters.")
    try:
        msgspec.convert(body, form)
    except msgspec.ValidationError as error:
        raise invalid_body(error) from None


def refusal_record(scope: Mapping[str, Any], now: float) -> AuditRecord:
    """Return the record of a refused administrative request."""
    operator: Operator | None = noted(scope, "operator")  # type: ignore[arg-type]
    path = scope.get("path_params", {})
    service_user_id = path.get("service_user_id", "")
    return AuditRecord(
        id=new_record_id(now),
        action=scope["route_handler"].opt["action"],
        outcome=Outcome.REFUSED,
        reason=noted(scope, "refused"),  # type: ignore[arg-type]
        service_user_id=_if_formed(SERVICE_USER_ID, service_user_id),
        credential_id=_if_formed(CREDENTIAL_ID, path.get("credential_id")),
        kid=_if_formed(KID, path.get("kid")),
        actor_id=operator.service_user.id if operator else None,
        actor=operator.service_user.name if operator else None,
        actor_credential_id=operator.credential_id if operator else None,
        **personal(origin_of(scope)),  # type: ignore[arg-type]
    )


def _bearer_token(request: AnyRequest) -> str:
    # RFC 6750 §2.1; the query and the body are no places for a token.
    headers = request.headers.getall("authorization", [])
    if len(headers) != 1:
        raise Unauthenticated("Expected one Authorization header: Bearer and an access token.")
    scheme, _, token = headers[0].partition(" ")
    if scheme.lower() != "bearer" or not token:
        raise Unauthenticated("Expected the scheme Bearer and an access token.")
    return token


def _strings(value: JSON) -> Iterator[str]:
    match value:
        case str():
            yield value
        case dict():
            for name, member in value.items():
                yield name
                yield from _strings(member)
        case list():
            for member in value:
                yield from _strings(member)
        case _:
            pass


def _if_formed(pattern: str, value: object) -> str | None:
    # What has not the form of an id may be a secret that was put into the wrong place.
    return value if isinstance(value, str) and re.fullmatch(pattern, value) else None


def _if_match(request: AnyRequest) -> int:
    etag = request.headers.get("if-match")
    if etag is None:
        raise Refused(HTTPStatus.PRECONDITION_REQUIRED, f"If-Match is missing: {_ETAG_FORM}.")
    version = etag.removeprefix('"').removesuffix('"')
    if f'"{version}"' != etag or not (version.isascii() and version.isdecimal()):
        raise Refused(HTTPStatus.BAD_REQUEST, f"If-Match is no version: {_ETAG_FORM}.")
    return int(version[:18])


def _tagged(
    user: ServiceUserT,
    status: HTTPStatus = HTTPStatus.OK,
    headers: Mapping[str, str] | None = None,
) -> Response[ServiceUserT]:
    etag = {"ETag": f'"{user.version}"'}
    return Response(user, status_code=status, headers={**NO_STORE, **etag, **(headers or {})})


def _changed(user: ServiceUser, live_tokens: LiveTokens | None) -> ChangedServiceUser:
    return ChangedServiceUser(**msgspec.structs.asdict(user), live_tokens=live_tokens)


def credential_body(credential: Credential, kind: type[Any], now: float, **members: Any) -> Any:
    """Return a credential as answers show it: with its state, without its secret's digest."""
    fields = msgspec.structs.asdict(credential)
    del fields["secret_sha256"]
    return kind(state=credential.state(now), **fields, **members)
