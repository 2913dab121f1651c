"""`/api/v1/signing-keys`: the published keys, and what operators do with them.

Shows no private half; decides nothing about a key.
"""

from datetime import UTC, datetime

from litestar import Controller, get, post
from litestar.di import NamedDependency
from litestar.params import JSONBody
from msgspec import Struct

from keys.keyring import KeyState, SigningKey
from service.authority.audit import Action
from service.authority.evidence import VerifierInstance
from service.authority.key_administration import KeyAdministration, Revocation, Rotation
from service.authority.model import ReasonText
from service.authority.operators import Operator
from service.http.context import AnyRequest, KidInPath, origin_of


class SigningKeyBody(Struct, frozen=True, kw_only=True):
    """The public side of a signing key's life."""

    kid: str
    state: KeyState
    bits: int
    published_at: datetime
    may_sign_from: datetime | None
    activated_at: datetime | None
    rotate_at: datetime | None
    rotation_asked_at: datetime | None
    """When an operator asked for the rotation away from this key."""
    publish_until: datetime | None
    verifiers: list[VerifierInstance] | None
    """Of the next key: the verifiers heard from in the last two hours, and whether they have it."""


class SigningKeyList(Struct, frozen=True, kw_only=True):
    """The published keys, in the order of their publication."""

    signing_keys: list[SigningKeyBody]


class Reason(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Why; it goes on record."""

    reason: ReasonText


class SigningKeyController(Controller):
    """Signing keys."""

    path = "/signing-keys"
    tags = ("Signing keys",)

    @get("/", opt={"action": Action.SIGNING_KEY_LIST})
    async def list(
        self,
        operator: NamedDependency[Operator],
        key_administration: NamedDependency[KeyAdministration],
    ) -> SigningKeyList:
        """List the published keys: the next one, the one that signs, those that did."""
        keys = await key_administration.published(operator)
        verifiers = list(await key_administration.verifiers(operator))
        return SigningKeyList(
            signing_keys=[
                _shown(key, key_administration.may_sign_from(key), verifiers) for key in keys
            ]
        )

    @post("/rotate", status_code=200, opt={"action": Action.SIGNING_KEY_ROTATE})
    async def rotate(
        self,
        data: JSONBody[Reason],
        request: AnyRequest,
        operator: NamedDependency[Operator],
        key_administration: NamedDependency[KeyAdministration],
    ) -> Rotation:
        """Rotate as soon as the next key was published long enough; the answer says when."""
        return await key_administration.rotate(operator, data.reason, origin_of(request.scope))

    @post("/revoke-all", status_code=200, opt={"action": Action.SIGNING_KEY_REVOKE_ALL})
    async def revoke_all(
        self,
        data: JSONBody[Reason],
        request: AnyRequest,
        operator: NamedDependency[Operator],
        key_administration: NamedDependency[KeyAdministration],
    ) -> Revocation:
        """Revoke every published key and put two new ones in, of which one signs at once."""
        return await key_administration.revoke_all(operator, data.reason, origin_of(request.scope))

    @post("/{kid:str}/revoke", status_code=200, opt={"action": Action.SIGNING_KEY_REVOKE})
    async def revoke(
        self,
        kid: KidInPath,
        data: JSONBody[Reason],
        request: AnyRequest,
        operator: NamedDependency[Operator],
        key_administration: NamedDependency[KeyAdministration],
    ) -> Revocation:
        """Revoke a key. From this answer on no process signs with it."""
        return await key_administration.revoke(operator, kid, data.reason, origin_of(request.scope))


def _shown(
    key: SigningKey, may_sign_from: datetime | None, verifiers: list[VerifierInstance]
) -> SigningKeyBody:
    return SigningKeyBody(
        kid=key.kid,
        state=key.state,
        bits=key.public_key.key_size,
        published_at=_datetime(key.published_at),
        may_sign_from=may_sign_from,
        activated_at=_optional_datetime(key.activated_at),
        rotate_at=_optional_datetime(key.rotate_at),
        rotation_asked_at=_optional_datetime(key.released_at),
        publish_until=_optional_datetime(key.publish_until),
        verifiers=verifiers if key.state is KeyState.PENDING else None,
    )


def _datetime(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def _optional_datetime(seconds: float | None) -> datetime | None:
    return None if seconds is None else _datetime(seconds)
