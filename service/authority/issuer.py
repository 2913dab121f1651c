"""Tokens: who gets which, decided on a version and handed out only when that is on record.

Knows no HTTP and no SQL, and holds no private key.
"""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Final, Protocol
from uuid import UUID

from msgspec import UNSET, Struct

from keys.keyring import KeyRing, SigningKey
from keys.secret import Secret
from keys.signer import CustodyError
from keys.token import Actor, Claims, UnsignedToken, unsigned_token
from service import metrics
from service.authority.audit import (
    Action,
    AuditLog,
    AuditRecord,
    Outcome,
    new_record_id,
    personal,
)
from service.authority.client_auth import authenticate
from service.authority.errors import (
    AuditUnavailable,
    Forbidden,
    NotFound,
    OAuthError,
    OAuthErrorCode,
    StoreUnavailable,
    TemporarilyUnavailable,
)
from service.authority.model import (
    CLIENT_ID,
    AccessToken,
    AdminScope,
    ClientAddress,
    Clock,
    Credential,
    ServiceUser,
    Status,
    Subject,
    TokenRequest,
)
from service.authority.operators import KeyRings, Operator, Operators

SIGN_DEADLINE: Final = 2.0
"""Seconds; a signer in an HSM may hang."""


class Directory(Protocol):
    """Reads service users, from memory or from Postgres."""

    async def cached(self, client_id: str) -> Subject:
        """Return what this process last read; a change elsewhere may have overtaken it."""
        ...

    async def fresh(self, client_id: str) -> Subject:
        """Return what is committed now; raise StoreUnavailable."""
        ...


class WholeLog(Protocol):
    """Knows whether the audit log goes on from what was signed."""

    def require(self) -> None:
        """Raise AuditUnavailable unless it was found whole when it was last compared."""
        ...


Reading = tuple[
    Callable[[str], Awaitable[Subject]],
    Callable[[], Awaitable[KeyRing]],
]
"""How to read the subject and the ring: from memory, or from Postgres."""


class Decision(Struct, frozen=True, kw_only=True):
    """What will be answered if, and only if, `record` can be committed."""

    record: AuditRecord
    answer: "Grant | OAuthError"


Decide = Callable[[Subject, SigningKey], Awaitable[Decision]]


class Grant(Struct, frozen=True, kw_only=True):
    """A token that lacks its signature."""

    unsigned: UnsignedToken
    claims: Claims
    key: SigningKey
    credential_expires_at: datetime | None

    async def sign(self) -> AccessToken:
        """Return the token; it must not leave before its record is durable."""
        assert self.key.signer is not None
        async with asyncio.timeout(SIGN_DEADLINE):
            signature = await self.key.signer.sign(self.unsigned.signing_input)
        metrics.signatures.labels(self.key.kid).inc()
        return AccessToken(
            token=Secret(self.unsigned.signed(signature)),
            jti=self.claims.jti,
            expires_in=self.claims.exp - self.claims.iat,
            expires_at=self.claims.exp,
            scope=self.claims.scope,
            credential_expires_at=self.credential_expires_at,
        )


class TokenIssuer:
    """Exchanges credentials for tokens, and mints them for operators."""

    def __init__(
        self,
        *,
        issuer: str,
        api_audience: str,
        directory: Directory,
        keys: KeyRings,
        audit: AuditLog,
        continuity: WholeLog,
        operators: Operators,
        clock: Clock,
    ) -> None:
        self._terms = Terms(issuer=issuer, api_audience=api_audience)
        self._directory = directory
        self._keys = keys
        self._audit = audit
        self._continuity = continuity
        self._operators = operators
        self._clock = clock

    async def exchange(self, request: TokenRequest) -> AccessToken:
        """Return a token whose record is durable (RFC 6749 §4.4).

        Raise OAuthError for a refusal, which is on record too, and TemporarilyUnavailable when
        neither a grant nor a refusal can be proven.
        """

        async def decide(subject: Subject, key: SigningKey) -> Decision:
            return decide_exchange(request, subject, key, self._terms, self._clock())

        return await self.issue(
            request.client_id,
            decide,
            (self._directory.cached, self._keys.cached),
            (self._directory.fresh, self._keys.fresh),
        )

    async def mint(
        self,
        operator: Operator,
        service_user_id: str,
        *,
        scope: str | None,
        resource: str | None,
        origin: ClientAddress,
    ) -> AccessToken:
        """Return a token of `service_user_id`, made by hand; `act.sub` names the operator.

        Raise Forbidden for a service user with an admin scope, OAuthError for a scope or a
        resource beyond its grant, NotFound, and TemporarilyUnavailable.
        """

        async def decide(subject: Subject, key: SigningKey) -> Decision:
            present = await self._operators.present(operator)
            user = mintable(present, subject)
            audience, granted = narrow(user, scope, resource, self._terms.api_audience)
            return grant(
                user, key, self._terms, self._clock(), audience, granted, origin, minter=present
            )

        return await self.issue_from_fresh(service_user_id, decide)

    async def refuse(self, error: OAuthError, origin: ClientAddress) -> None:
        """Put a refusal on record that needed no look at the directory: a malformed request."""
        record = refusal(error, origin, self._clock())
        await self._audit.append_or_count(record)

    async def issue_from_fresh(self, client_id: str, decide: Decide) -> AccessToken:
        """Issue what is never decided from memory, since no commit compares what refuses it."""
        fresh = (self._directory.fresh, self._keys.fresh)
        return await self.issue(client_id, decide, fresh, fresh)

    async def issue(self, client_id: str, decide: Decide, *readings: Reading) -> AccessToken:
        """Decide on the first reading, and on the second if the commit found the first outdated.

        The commit itself has the last word: `append_records_1` in the migrations compares
        version, key, credential and times under the fence.
        """
        try:
            for read_subject, read_ring in readings:
                self._continuity.require()
                subject, ring = await read_subject(client_id), await read_ring()
                if ring.active is None or ring.active.signer is None:
                    raise TemporarilyUnavailable("no key can sign in this process")
                decision = await decide(subject, ring.active)
                if isinstance(decision.answer, OAuthError):
                    if await self._audit.append(decision.record):
                        raise decision.answer
                else:
                    recorded, token = await asyncio.gather(
                        self._audit.append(decision.record), decision.answer.sign()
                    )
                    # Once more: the commit may be in a database that was restored meanwhile. Each
                    # new connection is compared before anything is committed through it.
                    self._continuity.require()
                    if recorded:
                        return token
        except (StoreUnavailable, AuditUnavailable, CustodyError, TimeoutError) as error:
            raise TemporarilyUnavailable(str(error) or "no signature in time") from error
        raise TemporarilyUnavailable("what was decided on changed twice while it was decided")


class SignIn(Struct, frozen=True, kw_only=True):
    """To which sign-in a session goes back: `sid`, and `auth_time` in seconds since the epoch."""

    id: str
    at: int

    @property
    def digest(self) -> str:
        """What stands for it on record: who reads the log must not learn what forms prove with."""
        return hashlib.sha256(b"privyseal session " + self.id.encode()).hexdigest()


class Terms(Struct, frozen=True, kw_only=True):
    """What every token of this authority has in common."""

    issuer: str
    api_audience: str


def decide_exchange(
    request: TokenRequest, subject: Subject, key: SigningKey, terms: Terms, now: float
) -> Decision:
    """Decide one exchange: pure but for the randomness of the `jti`."""
    try:
        principal = authenticate(subject, request.client_secret, now)
        user = principal.service_user
        audience, scope = narrow(user, request.scope, request.resource, terms.api_audience)
    except OAuthError as error:
        record = refusal(error, request.origin, now, client_id=request.client_id, subject=subject)
        return Decision(record=record, answer=error)
    return grant(
        user, key, terms, now, audience, scope, request.origin, credential=principal.credential
    )


def narrow(
    user: ServiceUser, scope: str | None, resource: str | None, api_audience: str
) -> tuple[str, str]:
    """Return the audience and the scope of a token: what was asked for, if it was granted.

    Raise OAuthError: `invalid_target` (RFC 8707 §2) or `invalid_scope` (RFC 6749 §5.2). Admin
    scopes appear only with the admin API's audience, and no other scope does.
    """
    audience = user.audiences[0] if resource is None else resource
    if audience not in user.audiences:
        raise OAuthError(
            OAuthErrorCode.INVALID_TARGET,
            f"This service user may ask for tokens for: {', '.join(user.audiences)}.",
        )
    granted = user.scopes_for(audience, api_audience)
    if scope is None:
        return audience, " ".join(granted)
    requested = scope.split(" ")
    if beyond := [name for name in requested if name not in granted]:
        raise OAuthError(
            OAuthErrorCode.INVALID_SCOPE,
            f"Not granted for {audience}: {beyond[0][:64] or 'an empty scope'}. "
            f"Granted: {' '.join(granted) or 'none'}.",
        )
    return audience, " ".join(name for name in granted if name in requested)


def mintable(operator: Operator, subject: Subject) -> ServiceUser:
    """Return the service user for whom this operator may mint; raise NotFound or Forbidden."""
    operator.require(AdminScope.TOKENS_MINT)
    return integrator(subject)


def integrator(subject: Subject) -> ServiceUser:
    """Return the service user if tokens of it may be minted at all; raise NotFound or Forbidden."""
    user = subject.service_user
    if user is None:
        raise NotFound("There is no such service user.")
    if user.admin_scopes:
        raise Forbidden(
            f"{user.name} holds {min(user.admin_scopes)}, a scope of the admin API. Tokens of "
            "whoever holds one are not made by hand."
        )
    if user.is_person:
        raise Forbidden(f"{user.name} is a person: tokens are for machines.")
    if user.status is not Status.ACTIVE:
        raise Forbidden(f"{user.name} is disabled. Enable it first.")
    return user


def grant(
    user: ServiceUser,
    key: SigningKey,
    terms: Terms,
    now: float,
    audience: str,
    scope: str,
    origin: ClientAddress,
    *,
    credential: Credential | None = None,
    minter: Operator | None = None,
    signed_in: SignIn | None = None,
) -> Decision:
    """Return the token to sign and the record that must be durable before it leaves."""
    if key.lifetime_cap is None:
        raise ValueError(f"key {key.kid} has no lifetime cap: it was never activated")
    record_id: UUID = new_record_id(now)
    iat = int(now)
    claims = Claims(
        iss=terms.issuer,
        sub=user.id,
        client_id=user.id,
        aud=audience,
        exp=iat + min(user.token_lifetime, key.lifetime_cap),
        iat=iat,
        jti=str(record_id),
        scope=scope,
        service_user=user.name,
        source_system=user.source_system,
        sid=UNSET if signed_in is None else signed_in.id,
        auth_time=UNSET if signed_in is None else signed_in.at,
        act=UNSET if minter is None else Actor(sub=minter.service_user.id),
    )
    unsigned = unsigned_token(key.kid, claims)
    record = AuditRecord(
        id=record_id,
        action=Action.TOKEN_ISSUE if minter is None else Action.TOKEN_MINT,
        outcome=Outcome.SUCCESS,
        service_user_id=user.id,
        service_user=user.name,
        source_system=user.source_system,
        version=user.version,
        credential_id=credential.id if credential else None,
        kid=key.kid,
        iat=claims.iat,
        exp=claims.exp,
        aud=audience,
        scope=scope,
        signing_input_sha256=unsigned.sha256,
        details={} if signed_in is None else {"session": signed_in.digest},
        **({} if minter is None else minter.as_actor()),
        **personal(origin),
    )
    return Decision(
        record=record,
        answer=Grant(
            unsigned=unsigned,
            claims=claims,
            key=key,
            credential_expires_at=credential.expires_at
            if credential is not None and credential.ends_soon(now)
            else None,
        ),
    )


def refusal(
    error: OAuthError,
    origin: ClientAddress,
    now: float,
    *,
    client_id: str | None = None,
    subject: Subject | None = None,
) -> AuditRecord:
    """Return the record of a refused exchange.

    A `client_id` that does not have the form of one is left out: it may be a secret that was put
    into the wrong field.
    """
    user = subject.service_user if subject else None
    known_form = client_id is not None and CLIENT_ID.fullmatch(client_id) is not None
    return AuditRecord(
        id=new_record_id(now),
        action=Action.TOKEN_ISSUE,
        outcome=Outcome.REFUSED,
        reason=error.reason,
        service_user_id=client_id if known_form else None,
        service_user=user.name if user else None,
        source_system=user.source_system if user else None,
        version=subject.version if subject and known_form else None,
        **personal(origin),
    )
