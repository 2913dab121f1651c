"""Tokens made by hand at the console: by whom, and for whom.

Signs nothing and decides no grant: `issuer.py` does. The admin API lets nobody mint for itself: a
token must not beget the next one.
"""

import re
from collections.abc import Sequence
from typing import Final, Protocol

from keys.keyring import SigningKey
from service.authority.errors import Forbidden, NotFound
from service.authority.issuer import (
    Decision,
    Directory,
    Terms,
    TokenIssuer,
    grant,
    integrator,
    mintable,
    narrow,
)
from service.authority.model import (
    CLIENT_ID,
    NAME,
    AccessToken,
    AdminScope,
    ClientAddress,
    Clock,
    Credential,
    ServiceUser,
    Subject,
)
from service.authority.operators import Operator, Operators
from service.authority.sessions import Session

SUGGESTED: Final = 50
"""Names that are offered at a time, however many there are."""
_NAME: Final = re.compile(NAME)
_PREFIX: Final = re.compile(f"(?:{NAME})?")


class Names(Protocol):
    """Knows service users by name. Each method may raise StoreUnavailable."""

    async def id_of(self, name: str) -> str | None:
        """Return the id of who has this name now."""
        ...

    async def names(self, beginning: str, limit: int) -> Sequence[str]:
        """Return the first names that begin like this, in their order."""
        ...


class TokensByHand:
    """What who is signed in may mint: an operator with `tokens:mint` for any integrator, anybody
    else for itself. Each method raises an AdminRefusal, or the errors of a store away."""

    def __init__(
        self,
        *,
        issuer: str,
        api_audience: str,
        token_issuer: TokenIssuer,
        operators: Operators,
        directory: Directory,
        names: Names,
        clock: Clock,
    ) -> None:
        self._terms = Terms(issuer=issuer, api_audience=api_audience)
        self._token_issuer = token_issuer
        self._operators = operators
        self._directory = directory
        self._names = names
        self._clock = clock

    async def service_user(self, session: Session, wanted: str) -> ServiceUser:
        """Return for whom to mint: the one with the id or the name `wanted`, or whoever is signed
        in and no operator, whatever is wanted."""
        operator = session.operator
        if not session.is_operator:
            subject = await self._directory.fresh(operator.service_user.id)
            return of_itself(operator, subject)[0]
        operator.require(AdminScope.TOKENS_MINT)
        if not CLIENT_ID.fullmatch(wanted):
            # As in the admin API, where names are found by reading the list.
            operator.require(AdminScope.SERVICE_USERS_READ)
            found = await self._names.id_of(wanted) if _NAME.fullmatch(wanted) else None
            if found is None:
                raise NotFound("No service user has this name.")
            wanted = found
        return mintable(operator, await self._directory.fresh(wanted))

    async def names(self, session: Session, beginning: str) -> Sequence[str]:
        """Return the first names that begin like this; none to who may not read the list.

        Raise Forbidden for an operator who may mint for nobody.
        """
        if not session.is_operator:
            return []
        session.operator.require(AdminScope.TOKENS_MINT)
        if AdminScope.SERVICE_USERS_READ not in session.operator.scopes:
            return []
        return await self._names.names(beginning, SUGGESTED) if _PREFIX.fullmatch(beginning) else []

    async def mint(
        self,
        session: Session,
        service_user_id: str,
        *,
        scope: str | None,
        resource: str | None,
        origin: ClientAddress,
    ) -> AccessToken:
        """Return a token of `service_user_id` whose record names who is signed in.

        Raise OAuthError for a scope or a resource beyond its grant, and TemporarilyUnavailable.
        """
        if session.is_operator:
            return await self._token_issuer.mint(
                session.operator, service_user_id, scope=scope, resource=resource, origin=origin
            )

        async def decide(subject: Subject, key: SigningKey) -> Decision:
            present = await self._operators.present(session.operator)
            user, credential = of_itself(present, subject)
            audience, granted = narrow(user, scope, resource, self._terms.api_audience)
            return grant(
                user,
                key,
                self._terms,
                self._clock(),
                audience,
                granted,
                origin,
                # So whoever revokes it is told of this token, which is still accepted.
                credential=credential,
                minter=present,
            )

        return await self._token_issuer.issue_from_fresh(service_user_id, decide)


def of_itself(operator: Operator, subject: Subject) -> tuple[ServiceUser, Credential]:
    """Return who may mint for itself without any scope, and with which credential it signed in.

    Raise Forbidden for anybody else's tokens, an operator's, and for who has no credential that
    could be exchanged for such a token: a person who signed in elsewhere.
    """
    if subject.service_user is None or subject.service_user.id != operator.service_user.id:
        raise Forbidden("Tokens of others take the scope tokens:mint.", AdminScope.TOKENS_MINT)
    user = integrator(subject)
    for credential in subject.credentials:
        if credential.id == operator.credential_id:
            return user, credential
    raise Forbidden(f"{user.name} signed in without a credential, and has no tokens to try.")
