"""Operators: from a bearer token of our own to who calls, and what that one may do now.

A signature alone opens nothing here: the token's own issuance record must be found, and the
service user and the credential behind it must be live.
"""

import hmac
from collections.abc import Awaitable, Callable
from typing import Any, Final, Protocol, TypeVar
from uuid import UUID

from msgspec import Struct

from keys.keyring import KeyRing
from keys.verifier import InvalidToken, SignedClaims, UnknownKey, decode
from keys.verifier.jwt import ExpiredToken
from service.authority.errors import Forbidden, TemporarilyUnavailable, Unauthenticated
from service.authority.model import (
    ADMIN_SCOPES,
    AdminScope,
    Clock,
    Credential,
    ServiceUser,
    Status,
    UnrecordedToken,
)

T = TypeVar("T")

_REPORTING: Final = frozenset({AdminScope.AUDIT_REPORT})


class Issuance(Struct, frozen=True, kw_only=True):
    """What is on record of one issued token, and how its holder stands now.

    `credential_id` is null for who signed in elsewhere and has none; `credential` is null once
    there is no such credential.
    """

    signing_input_sha256: bytes
    service_user: ServiceUser
    credential_id: str | None
    credential: Credential | None


class Issuances(Protocol):
    """Finds issuance records."""

    async def issuance(self, jti: UUID) -> Issuance | None:
        """Return what is committed now; raise StoreUnavailable."""
        ...


class KeyRings(Protocol):
    """Reads the ring of signing keys, from memory or from Postgres."""

    async def cached(self) -> KeyRing:
        """Return the ring that this process last read."""
        ...

    async def fresh(self) -> KeyRing:
        """Return the ring that is committed now; raise StoreUnavailable."""
        ...


class Operator(Struct, frozen=True, kw_only=True):
    """Who calls; `scopes` is what the token says and the service user still has."""

    service_user: ServiceUser
    credential_id: str | None
    jti: UUID
    scopes: frozenset[str]

    @property
    def only_reports(self) -> bool:
        """Whether there is nothing that it may administer or read; it may report."""
        return self.scopes <= _REPORTING

    def require(self, scope: AdminScope) -> None:
        """Raise Forbidden unless this operator holds `scope`."""
        if scope not in self.scopes:
            raise Forbidden(f"This takes a token with the scope {scope}.", scope)

    def require_all(self, scopes: frozenset[str]) -> None:
        """Raise Forbidden unless this operator holds each of `scopes`: no road leads upwards."""
        if beyond := sorted(scopes - self.scopes):
            raise Forbidden(
                f"Only who holds {beyond[0]} may give or keep it for someone else.", beyond[0]
            )

    def as_actor(self) -> dict[str, Any]:
        """Return the fields of an audit record that say who acted, and on which version."""
        return {
            "actor_id": self.service_user.id,
            "actor": self.service_user.name,
            "actor_version": self.service_user.version,
            "actor_credential_id": self.credential_id,
        }


class Operators:
    """Authenticates the callers of the admin API and of the console."""

    def __init__(
        self,
        *,
        issuer: str,
        api_audience: str,
        keys: KeyRings,
        issuances: Issuances,
        clock: Clock,
        clock_skew: float,
    ) -> None:
        self._issuer = issuer
        self._api_audience = api_audience
        self._keys = keys
        self._issuances = issuances
        self._clock = clock
        self._clock_skew = clock_skew

    async def authenticate(self, unverified_token: str) -> Operator:
        """Return whose token this is; raise Unauthenticated, or StoreUnavailable."""
        return (await self.verified(unverified_token, self._api_audience))[0]

    async def verified(self, unverified_token: str, audience: str) -> tuple[Operator, SignedClaims]:
        """Return whose token for `audience` this is, and what it says."""
        try:
            claims = await self._claims(unverified_token, audience)
        except InvalidToken as error:
            raise Unauthenticated(str(error), has_ended=isinstance(error, ExpiredToken)) from error
        jti = UUID(claims.jti)
        issuance = await self._issuances.issuance(jti)
        if (
            issuance is None
            or issuance.service_user.id != claims.sub
            or not hmac.compare_digest(issuance.signing_input_sha256, claims.signing_input_sha256)
        ):
            raise Unauthenticated(
                "This token was not issued here: no record of it exists.",
                unrecorded=UnrecordedToken(
                    jti=jti,
                    kid=claims.kid,
                    issued_at=claims.iat,
                    signing_input_sha256=claims.signing_input_sha256,
                    signature=unverified_token.rpartition(".")[2],
                ),
            )
        return self._operator(jti, issuance, frozenset(claims.scope)), claims

    async def _claims(self, unverified_token: str, audience: str) -> SignedClaims:
        try:
            return self._decoded(unverified_token, audience, await self._keys.cached())
        except UnknownKey:
            # An emergency's new key signs at once, maybe in a process that heard of it before.
            return self._decoded(unverified_token, audience, await self._keys.fresh())

    def _decoded(self, unverified_token: str, audience: str, ring: KeyRing) -> SignedClaims:
        return decode(
            unverified_token,
            ring.published,
            issuer=self._issuer,
            audience=audience,
            now=self._clock(),
            skew=self._clock_skew,
        )

    async def present(self, operator: Operator) -> Operator:
        """Return the same operator as of now; raise Unauthenticated if it is live no more."""
        issuance = await self._issuances.issuance(operator.jti)
        if issuance is None:
            raise Unauthenticated("This token was not issued here: no record of it exists.")
        return self._operator(operator.jti, issuance, operator.scopes)

    async def decided_on_current(
        self, operator: Operator, act: Callable[[Operator], Awaitable[T | None]]
    ) -> T:
        """Return what `act` did; it returns None if what it decided on changed meanwhile.

        It is asked once more then, for the operator as of now. Raise TemporarilyUnavailable if
        everything changed a second time.
        """
        if (done := await act(operator)) is not None:
            return done
        if (done := await act(await self.present(operator))) is not None:
            return done
        raise TemporarilyUnavailable("what was decided on changed twice while it was decided")

    def _operator(self, jti: UUID, issuance: Issuance, scopes: frozenset[str]) -> Operator:
        user, credential = issuance.service_user, issuance.credential
        if user.status is not Status.ACTIVE:
            raise Unauthenticated(f"The service user {user.name} is disabled.")
        if issuance.credential_id is not None and not (
            credential is not None and credential.is_live(self._clock())
        ):
            raise Unauthenticated(
                "The credential behind this token was revoked, has ended or is held."
            )
        return Operator(
            service_user=user,
            credential_id=issuance.credential_id,
            jti=jti,
            scopes=scopes & ADMIN_SCOPES & user.admin_scopes,
        )
