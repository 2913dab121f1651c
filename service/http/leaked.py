"""`/api/v1/credentials/leaked`: what to do with secrets that were found.

Takes digests, never secrets, and says nothing of what was done with one: the audit log does.
"""

from base64 import urlsafe_b64decode, urlsafe_b64encode
from datetime import datetime
from typing import Annotated, Final

from litestar import Controller, post
from litestar.di import NamedDependency
from litestar.params import JSONBody
from msgspec import Meta, Struct

from service.authority.audit import Action
from service.authority.leaked import Fate, Leak, Leaks
from service.authority.model import Clock, LiveTokens
from service.authority.operators import Operator
from service.http.context import AnyRequest, origin_of

MAX_DIGESTS: Final = 1000

Digest = Annotated[
    str,
    # The last of 43 characters of base64url holds four bits.
    Meta(
        pattern="^[A-Za-z0-9_-]{42}[AEIMQUYcgkosw048]$",
        examples=["47DEQpj8HBSa-_TImW-5JCeuQeRkm5NMpJWZG3hSuFU"],
    ),
]


class FoundSecrets(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The SHA-256 of each secret, as base64url without padding; with `dry_run` nothing is done."""

    secrets_sha256: Annotated[list[Digest], Meta(min_length=1, max_length=MAX_DIGESTS)]
    dry_run: bool = False


class LeakedCredential(Struct, frozen=True, kw_only=True):
    """A credential, whose it is and whom to call.

    `outcome` is `revoked` (by this call), `revoked_before`, or `kept`, and `detail` says why it had
    to be, and what it was rotated to; `live_tokens` are those that this cannot take back (null:
    unknown).
    """

    secret_sha256: str
    id: str
    label: str
    outcome: Fate
    detail: str
    state: str
    created_at: datetime
    expires_at: datetime
    revoked_at: datetime | None
    last_used_at: datetime | None
    service_user_id: str
    service_user: str
    source_system: str
    owner: str
    contact: str
    live_tokens: LiveTokens | None


class LeakReport(Struct, frozen=True, kw_only=True):
    """What is known of the secrets; `unknown` are of another installation, or were never issued."""

    credentials: list[LeakedCredential]
    unknown: list[str]


class LeakedCredentialController(Controller):
    """Secrets that were found where they must not be."""

    path = "/credentials/leaked"
    tags = ("Service users",)

    @post("/", status_code=200, opt={"action": Action.CREDENTIAL_LEAKED})
    async def leaked(
        self,
        data: JSONBody[FoundSecrets],
        request: AnyRequest,
        operator: NamedDependency[Operator],
        leaks: NamedDependency[Leaks],
        clock: NamedDependency[Clock],
    ) -> LeakReport:
        """Find the credentials of these secrets and revoke them, each on record.

        To revoke takes service-users:write, a dry run service-users:read. The caller's own
        credential is never revoked here. To repeat a call that failed is harmless.
        """
        digests = {text: urlsafe_b64decode(f"{text}=") for text in data.secrets_sha256}
        if data.dry_run:
            found = await leaks.find(operator, list(digests.values()))
        else:
            found = await leaks.revoke(operator, list(digests.values()), origin_of(request.scope))
        known = [_credential(leak, clock()) for leak in found]
        return LeakReport(
            credentials=known,
            unknown=sorted(digests.keys() - {each.secret_sha256 for each in known}),
        )


def _credential(leak: Leak, now: float) -> LeakedCredential:
    credential, user = leak.owned.credential, leak.owned.service_user
    return LeakedCredential(
        secret_sha256=urlsafe_b64encode(credential.secret_sha256).decode().rstrip("="),
        id=credential.id,
        label=credential.label,
        outcome=leak.fate,
        detail=leak.detail,
        state=credential.state(now),
        created_at=credential.created_at,
        expires_at=credential.expires_at,
        revoked_at=credential.revoked_at,
        last_used_at=credential.last_used_at,
        service_user_id=user.id,
        service_user=user.name,
        source_system=user.source_system,
        owner=user.owner,
        contact=user.contact,
        live_tokens=leak.live_tokens,
    )
