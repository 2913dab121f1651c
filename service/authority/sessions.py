"""Sessions of the console: a token of our own, short-lived and on record, that goes back to a
sign-in.

Keeps nothing: the cookie is all that there is, and what it says is judged anew at every request.
"""

import secrets
from typing import Final, Protocol

import msgspec
from msgspec import Struct

from keys.keyring import SigningKey
from service.authority.audit import (
    Action,
    AuditLog,
    AuditRecord,
    Outcome,
    new_record_id,
    personal,
)
from service.authority.client_auth import authenticate
from service.authority.errors import OAuthError, OAuthErrorCode, Unauthenticated
from service.authority.issuer import (
    Decision,
    SignIn,
    Terms,
    TokenIssuer,
    grant,
    refusal,
)
from service.authority.model import (
    AccessToken,
    ClientAddress,
    Clock,
    Credential,
    ServiceUser,
    Subject,
    TokenRequest,
)
from service.authority.operators import Operator, Operators

SESSION: Final = 8 * 3600
"""Seconds after which whoever signed in has to do it again."""
LIFETIME: Final = 900
"""Seconds that a session's token lives at most; half-way it is renewed by whatever is asked for."""


class Session(Struct, frozen=True, kw_only=True):
    """Who is signed in, since when, and until when without asking for anything."""

    operator: Operator
    signed_in: SignIn
    expires_at: int

    @property
    def ends_at(self) -> int:
        """When it takes a new sign-in, in seconds since the epoch."""
        return self.signed_in.at + SESSION

    @property
    def service_user(self) -> ServiceUser:
        """Who is signed in."""
        return self.operator.service_user

    @property
    def is_operator(self) -> bool:
        """Whether it may administer anything; an integrator sees only itself, and so does a service
        that reports."""
        return not self.operator.only_reports

    @property
    def has_nothing(self) -> bool:
        """Whether it is a person whom the portal grants nothing: one who has nothing to see."""
        return self.service_user.is_person and not self.is_operator


class SignOuts(Protocol):
    """Finds what is on record of sessions that ended."""

    async def is_ended(self, session: str) -> bool:
        """Whether whoever signed in has signed out; raise StoreUnavailable."""
        ...


class Sessions:
    """Signs in, recognizes, renews and ends. Each raises TemporarilyUnavailable, StoreUnavailable
    or AuditUnavailable while nothing can be read or put on record."""

    def __init__(
        self,
        *,
        issuer: str,
        console_audience: str,
        token_issuer: TokenIssuer,
        operators: Operators,
        audit: AuditLog,
        sign_outs: SignOuts,
        clock: Clock,
    ) -> None:
        self._terms = Terms(issuer=issuer, api_audience=console_audience)
        self._audience = console_audience
        self._token_issuer = token_issuer
        self._operators = operators
        self._audit = audit
        self._sign_outs = sign_outs
        self._clock = clock

    async def sign_in(self, request: TokenRequest) -> AccessToken:
        """Return the token of a new session; raise OAuthError for a credential that is refused.

        Never from memory: who was just disabled is told so here, not at the next click.
        """

        async def decide(subject: Subject, key: SigningKey) -> Decision:
            now = self._clock()
            try:
                principal = authenticate(subject, request.client_secret, now)
            except OAuthError as error:
                record = refusal(
                    error, request.origin, now, client_id=request.client_id, subject=subject
                )
                return Decision(record=record, answer=error)
            return self._granted(
                principal.service_user, principal.credential, key, self._new(), request.origin
            )

        return await self._token_issuer.issue_from_fresh(request.client_id, decide)

    async def sign_in_without_credential(
        self, service_user_id: str, origin: ClientAddress
    ) -> AccessToken:
        """Return the token of a new session for a person who proved elsewhere who they are.

        Raise OAuthError for who is disabled here, on record.
        """

        async def decide(subject: Subject, key: SigningKey) -> Decision:
            person = subject.service_user
            if person is not None and person.is_person and person.is_active:
                return self._granted(person, None, key, self._new(), origin)
            error = OAuthError(
                OAuthErrorCode.INVALID_CLIENT,
                f"{person.name if person else service_user_id} is disabled here. Ask an operator.",
                reason="service_user_disabled",
            )
            record = refusal(
                error, origin, self._clock(), client_id=service_user_id, subject=subject
            )
            return Decision(record=record, answer=error)

        return await self._token_issuer.issue_from_fresh(service_user_id, decide)

    async def authenticate(self, unverified_token: str) -> Session:
        """Return whose session this is; raise Unauthenticated once it takes a new sign-in."""
        operator, claims = await self._operators.verified(unverified_token, self._audience)
        try:
            signed_in = SignIn(
                id=msgspec.convert(claims.claims.get("sid"), str),
                at=msgspec.convert(claims.claims.get("auth_time"), int),
            )
        except msgspec.ValidationError:
            raise Unauthenticated("This token goes back to no sign-in.") from None
        session = Session(operator=operator, signed_in=signed_in, expires_at=claims.exp)
        if self._clock() >= session.ends_at:
            raise Unauthenticated("Signed in 8 hours ago: it takes a new sign-in.", has_ended=True)
        if await self._sign_outs.is_ended(signed_in.digest):
            raise Unauthenticated("You signed out of this session.", has_ended=True)
        return session

    def is_due(self, session: Session) -> bool:
        """Whether the token of this session should be renewed with the next answer."""
        return self._clock() >= min(session.expires_at, session.ends_at) - LIFETIME / 2 and (
            session.expires_at < session.ends_at
        )

    async def renewed(self, session: Session, origin: ClientAddress) -> AccessToken:
        """Return a new token of the same session; raise Unauthenticated if its source is gone."""

        async def decide(subject: Subject, key: SigningKey) -> Decision:
            operator = await self._operators.present(session.operator)
            credential = next(
                (each for each in subject.credentials if each.id == operator.credential_id), None
            )
            return self._granted(operator.service_user, credential, key, session.signed_in, origin)

        return await self._token_issuer.issue_from_fresh(session.service_user.id, decide)

    async def end(self, session: Session, origin: ClientAddress) -> None:
        """Sign out: once this returns, no copy of a token of this session opens anything."""
        user = session.service_user
        record = AuditRecord(
            id=new_record_id(self._clock()),
            action=Action.TOKEN_END_SESSION,
            outcome=Outcome.SUCCESS,
            service_user_id=user.id,
            service_user=user.name,
            source_system=user.source_system,
            credential_id=session.operator.credential_id,
            details={"session": session.signed_in.digest},
            # Whatever changed meanwhile, it ends.
            **{**session.operator.as_actor(), "actor_version": None},
            **personal(origin),
        )
        await self._audit.append(record)

    def _granted(
        self,
        user: ServiceUser,
        credential: Credential | None,
        key: SigningKey,
        signed_in: SignIn,
        origin: ClientAddress,
    ) -> Decision:
        now = self._clock()
        lifetime = min(LIFETIME, int(signed_in.at + SESSION - now))
        return grant(
            msgspec.structs.replace(user, token_lifetime=max(lifetime, 1)),
            key,
            self._terms,
            now,
            self._audience,
            " ".join(sorted(user.admin_scopes)),
            origin,
            credential=credential,
            signed_in=signed_in,
        )

    def _new(self) -> SignIn:
        return SignIn(id=secrets.token_urlsafe(16), at=int(self._clock()))
