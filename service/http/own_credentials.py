"""`/api/v1/service-users/me/credentials`: what a service user does about its own credentials.

Takes no scope, and tells of nobody else.
"""

from http import HTTPStatus

from litestar import Controller, Response, get, post
from litestar.di import NamedDependency
from litestar.params import JSONBody
from msgspec import Struct

from service.authority.audit import Action
from service.authority.model import Clock, Label
from service.authority.operators import Operator
from service.authority.own_credentials import OwnCredentials
from service.http.admin import CreatedCredential, CredentialBody, CredentialList, credential_body
from service.http.context import AnyRequest, origin_of
from service.http.errors import NO_STORE


class NewSuccessor(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What to call the successor."""

    label: Label


class RotatedCredential(CreatedCredential, frozen=True, kw_only=True):
    """The successor with its secret, which is shown this once, and what it succeeds."""

    old: CredentialBody


class OwnCredentialController(Controller):
    """The caller's own credentials."""

    path = "/service-users/me/credentials"
    tags = ("Service users",)

    @get("/", opt={"action": Action.CREDENTIAL_LIST})
    async def list(
        self,
        operator: NamedDependency[Operator],
        own_credentials: NamedDependency[OwnCredentials],
        clock: NamedDependency[Clock],
    ) -> CredentialList:
        """List the caller's own credentials, those that ended included; this takes no scope."""
        held = await own_credentials.credentials(operator)
        now = clock()
        return CredentialList(
            credentials=[credential_body(each, CredentialBody, now) for each in held]
        )

    @post("/rotate", opt={"action": Action.CREDENTIAL_ROTATE})
    async def rotate(
        self,
        data: JSONBody[NewSuccessor],
        request: AnyRequest,
        operator: NamedDependency[Operator],
        own_credentials: NamedDependency[OwnCredentials],
        clock: NamedDependency[Clock],
    ) -> Response[RotatedCredential]:
        """Replace the credential behind the caller's token: that one ends in 7 days.

        The successor lives as long as the old one was made for. Its label is one that no other
        live credential of the caller has, but for those that were rotated. This takes no scope.
        """
        rotated = await own_credentials.rotate(operator, data.label, origin_of(request.scope))
        now = clock()
        body = credential_body(
            rotated.successor,
            RotatedCredential,
            now,
            client_id=operator.service_user.id,
            client_secret=rotated.secret.reveal(),
            old=credential_body(rotated.old, CredentialBody, now),
        )
        return Response(body, status_code=HTTPStatus.CREATED, headers=NO_STORE)
