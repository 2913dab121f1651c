"""`/api/v1/service-users`: service users, their credentials and tokens by hand, for operators.

Carries requests to the rules and answers back; holds no rule itself.
"""

from collections.abc import Mapping
from datetime import datetime
from http import HTTPStatus
from typing import Annotated, Any, Final, TypeVar

import msgspec
from litestar import Controller, Response, get, patch, post
from litestar.di import NamedDependency
from litestar.params import JSONBody, QueryParameter
from msgspec import Meta, Struct

from service.authority.administration import (
    Administration,
    NewCredential,
    NewServiceUser,
    ServiceUserChange,
)
from service.authority.audit import Action
from service.authority.confirmation import Confirmations
from service.authority.issuer import TokenIssuer
from service.authority.model import (
    MAX_SEARCH,
    NAME,
    SCOPE,
    SOURCE_SYSTEM,
    Audience,
    Clock,
    Credential,
    LiveTokens,
    ServiceUser,
    ServiceUserFilter,
    Status,
)
from service.authority.operators import Operator
from service.http.context import AnyRequest, CredentialIdInPath, ServiceUserIdInPath, origin_of
from service.http.errors import NO_STORE, Refused
from service.http.signing_keys import Reason

_ETAG_FORM: Final = 'expected If-Match: "<version>", as the ETag of the service user has it'

# Litestar reads the constraints of a parameter from its own marker only.
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
        credentials = await administration.credentials(operator, service_user_id)
        now = clock()
        return CredentialList(
            credentials=[credential_body(each, CredentialBody, now) for each in credentials]
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
