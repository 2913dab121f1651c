"""Found secrets: whose they are, and their end.

Sees digests only: whoever found a secret tells it to nobody. What was done with a credential is
for the audit log to say, to those who may read that.
"""

from collections.abc import Sequence
from enum import StrEnum
from typing import Final, Protocol

from msgspec import Struct
from msgspec.structs import replace

from service.authority.administration import Administration
from service.authority.errors import Conflict
from service.authority.model import (
    AdminScope,
    ClientAddress,
    LiveTokens,
    OwnedCredential,
    Subject,
)
from service.authority.operators import Operator

REASON: Final = "found leaked"
"""The reason in the record of each such revocation."""


class Holders(Protocol):
    """Finds credentials by their secrets."""

    async def of_secrets(self, secrets_sha256: Sequence[bytes]) -> Sequence[OwnedCredential]:
        """Return those that are known, the ended ones included; raise StoreUnavailable."""
        ...

    async def fresh(self, client_id: str) -> Subject:
        """Return a service user and its credentials as they are now; raise StoreUnavailable."""
        ...


class Fate(StrEnum):
    """What became of a leaked credential."""

    REVOKED = "revoked"
    """By this call, in every process."""
    REVOKED_BEFORE = "revoked_before"
    KEPT = "kept"
    """It was only looked for, or must not be revoked like this: `detail` says why."""


class Leak(Struct, frozen=True, kw_only=True):
    """A credential whose secret was found, what became of it, and which tokens are still live.

    `detail` also names what whoever had the secret may have made with it, and is not revoked.
    """

    owned: OwnedCredential
    fate: Fate
    detail: str
    live_tokens: LiveTokens | None


class Leaks:
    """Ends the credentials of secrets that were found where they must not be."""

    def __init__(self, *, holders: Holders, administration: Administration) -> None:
        self._holders = holders
        self._administration = administration

    async def find(self, operator: Operator, secrets_sha256: Sequence[bytes]) -> list[Leak]:
        """Return the credentials with these secrets, and change nothing."""
        operator.require(AdminScope.SERVICE_USERS_READ)
        return [
            await self._left_alone(owned, "")
            for owned in await self._holders.of_secrets(secrets_sha256)
        ]

    async def revoke(
        self, operator: Operator, secrets_sha256: Sequence[bytes], origin: ClientAddress
    ) -> list[Leak]:
        """Revoke the credentials with these secrets, one after the other, each on record.

        Never that of the caller itself, nor the last that can administer: `detail` says so. When
        this fails half-way, to call it again does the rest.
        """
        operator.require(AdminScope.SERVICE_USERS_WRITE)
        return [
            await self._revoke(operator, owned, origin)
            for owned in await self._holders.of_secrets(secrets_sha256)
        ]

    async def _revoke(
        self, operator: Operator, owned: OwnedCredential, origin: ClientAddress
    ) -> Leak:
        if owned.credential.revoked_at is not None:
            return await self._left_alone(owned, "")
        if owned.credential.id == operator.credential_id:
            return await self._left_alone(
                owned,
                "This is the credential that you call with. Create another one, call with that, "
                "and revoke this one.",
            )
        try:
            revoked, live_tokens = await self._administration.revoke_credential(
                operator, owned.service_user.id, owned.credential.id, origin, reason=REASON
            )
        except Conflict as error:
            return await self._left_alone(owned, error.detail)
        return Leak(
            owned=replace(
                owned, credential=replace(revoked, last_used_at=owned.credential.last_used_at)
            ),
            fate=Fate.REVOKED,
            detail=await self._came_of(owned),
            live_tokens=live_tokens,
        )

    async def _left_alone(self, owned: OwnedCredential, detail: str) -> Leak:
        credential = owned.credential
        return Leak(
            owned=owned,
            fate=Fate.KEPT if credential.revoked_at is None else Fate.REVOKED_BEFORE,
            detail=" ".join(filter(None, (detail, await self._came_of(owned)))),
            live_tokens=await self._administration.live_tokens(
                credential.service_user_id, credential.id
            ),
        )

    async def _came_of(self, owned: OwnedCredential) -> str:
        """Say what is left of the credentials that were made with this one, or with those.

        They are not revoked with it: mostly its true holder made them, and works with them.
        """
        subject = await self._holders.fresh(owned.service_user.id)
        made, left = {owned.credential.id}, list[str]()
        for each in sorted(subject.credentials, key=lambda each: each.created_at):
            if each.succeeds in made:
                made.add(each.id)
                if each.revoked_at is None:
                    left.append(f"{each.label} ({each.id})")
        if not left:
            return ""
        return f"It was rotated to {', '.join(left)}. Unless its holder did that, revoke that too."
