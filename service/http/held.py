"""`/api/v1/credentials/confirm`: credentials that are held after a restore, confirmed in bulk.

Decides nothing, and tells of no secret.
"""

from typing import Annotated

from litestar import Controller, post
from litestar.di import NamedDependency
from litestar.params import JSONBody
from msgspec import Meta, Struct

from service.authority.audit import Action
from service.authority.confirmation import Confirmations
from service.authority.model import SERVICE_USER_ID
from service.authority.operators import Operator
from service.http.context import AnyRequest, origin_of
from service.http.signing_keys import ReasonText

ServiceUserId = Annotated[
    str, Meta(pattern=SERVICE_USER_ID, examples=["su_aaaaaaaaaaaaaaaaaaaaaaaa"])
]


class NewConfirmation(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Why, which goes on record; and of which service user: left out, of all of them."""

    reason: ReasonText
    service_user_id: ServiceUserId | None = None


class LeftCredential(Struct, frozen=True, kw_only=True):
    """A credential that is still held: its holder has admin scopes that the caller lacks."""

    id: str
    label: str
    service_user_id: str
    service_user: str


class Confirmation(Struct, frozen=True, kw_only=True):
    """How many were confirmed, and those that were not."""

    confirmed: int
    left: list[LeftCredential]


class HeldCredentialController(Controller):
    """Credentials that are held after a restore."""

    path = "/credentials/confirm"
    tags = ("Service users",)

    @post("/", status_code=200, opt={"action": Action.CREDENTIAL_CONFIRM_ALL})
    async def confirm(
        self,
        data: JSONBody[NewConfirmation],
        request: AnyRequest,
        operator: NamedDependency[Operator],
        confirmations: NamedDependency[Confirmations],
    ) -> Confirmation:
        """Confirm every held credential, each on record. To repeat a call that failed is harmless.

        After a restore nobody can tell which were revoked since the backup: confirm only what you
        know to be good, and revoke what you do not.
        """
        done = await confirmations.confirm_all(
            operator, data.service_user_id, data.reason, origin_of(request.scope)
        )
        return Confirmation(
            confirmed=len(done.confirmed),
            left=[
                LeftCredential(
                    id=each.credential.id,
                    label=each.credential.label,
                    service_user_id=each.service_user.id,
                    service_user=each.service_user.name,
                )
                for each in done.left
            ],
        )
