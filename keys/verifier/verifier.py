"""Access tokens of trusted issuers, verified without asking the issuer about any of them.

It must not decide what a verified caller may do.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from .fetch import checked_issuer
from .jwks_client import Clock, JWKSClient, Keys, discover
from .jwt import (
    ABSENT,
    DEFAULT_SKEW,
    MAX_LIFETIME,
    InvalidToken,
    SignedClaims,
    UnverifiedJWT,
    parse,
    shown,
    verify,
)
from .reporter import Reporter

_MAX_SKEW = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _TrustedIssuer:
    issuer: str
    audience: str
    jwks: JWKSClient
    clock: Clock
    skew: float
    max_lifetime: int
    reporter: Reporter | None

    def check(self, unverified_jwt: UnverifiedJWT, keys: Keys) -> SignedClaims:
        return verify(
            unverified_jwt,
            keys,
            issuer=self.issuer,
            audience=self.audience,
            now=self.clock(),
            skew=self.skew,
            max_lifetime=self.max_lifetime,
        )


class Verifier:
    """Checks access tokens of one issuer for one audience; `any_of` joins several.

    `issuer` is an origin (https, or http on a loopback address), equal to `iss` letter for letter;
    `audience` is the only `aud` that is accepted. Keys come from `jwks_uri`, which may lie on
    another host; without it, from where the issuer's metadata says (RFC 8414). A JWKSClient in its
    place brings settings of its own. `clock` is in seconds since the epoch, `skew` and
    `max_lifetime` are in seconds.

    Nothing is fetched before the first token comes, unless there is a `reporter`: with it the keys
    are loaded at once, and anew every hour, and the issuer is told which ones they are. A process
    forked later begins to report when it verifies its first token.
    """

    def __init__(
        self,
        issuer: str,
        audience: str,
        jwks_uri: str | JWKSClient | None = None,
        *,
        clock: Clock = time.time,
        skew: float = DEFAULT_SKEW,
        max_lifetime: int = MAX_LIFETIME,
        reporter: Reporter | None = None,
    ) -> None:
        checked_issuer(issuer)
        if not audience:
            raise ValueError("audience: expected text, found none")
        if not 0 <= skew <= _MAX_SKEW:
            raise ValueError(f"skew: expected 0 to {_MAX_SKEW} seconds, found {skew}")
        if max_lifetime <= 0:
            raise ValueError(f"max_lifetime: expected seconds above 0, found {max_lifetime}")
        if jwks_uri is None:
            jwks_uri = JWKSClient(lambda: discover(issuer))
        elif isinstance(jwks_uri, str):
            jwks_uri = JWKSClient(jwks_uri)
        if reporter is not None:
            if reporter.issuer != issuer:
                raise ValueError(f"reporter: expected one to {issuer}, found {reporter.issuer}")
            reporter.watch(jwks_uri)
        self._trusted: Mapping[str, _TrustedIssuer] = {
            issuer: _TrustedIssuer(
                issuer=issuer,
                audience=audience,
                jwks=jwks_uri,
                clock=clock,
                skew=skew,
                max_lifetime=max_lifetime,
                reporter=reporter,
            )
        }

    @classmethod
    def any_of(cls, *verifiers: "Verifier") -> Self:
        """Return one verifier that trusts each issuer on the terms of the verifier it comes from.

        Which terms apply is decided by the token's `iss`, compared letter for letter. Raise
        ValueError without verifiers, or when two of them trust the same issuer.
        """
        trusted = {iss: terms for each in verifiers for iss, terms in each._trusted.items()}
        if not trusted or len(trusted) != sum(len(each._trusted) for each in verifiers):
            raise ValueError("expected verifiers of different issuers")
        joined = cls.__new__(cls)
        joined._trusted = trusted
        return joined

    @property
    def issuers(self) -> frozenset[str]:
        """The issuers whose tokens are accepted."""
        return frozenset(self._trusted)

    def verify(self, token: str) -> SignedClaims:
        """Return what `token` says; raise InvalidToken, or KeysUnavailable if none can be checked.

        Block only while keys must be fetched, for 5 s at most.
        """
        unverified_jwt = parse(token)
        terms = self._terms_for(unverified_jwt)
        return terms.check(unverified_jwt, terms.jwks.keys_for(unverified_jwt.kid))

    async def verify_async(self, token: str) -> SignedClaims:
        """Do as `verify` does, without ever blocking the event loop."""
        unverified_jwt = parse(token)
        terms = self._terms_for(unverified_jwt)
        return terms.check(unverified_jwt, await terms.jwks.keys_for_async(unverified_jwt.kid))

    def stats(self) -> Mapping[str, Mapping[str, float]]:
        """Return the figures of `JWKSClient.stats` and `Reporter.stats` for each issuer."""
        return {
            issuer: {**terms.jwks.stats(), **(terms.reporter.stats() if terms.reporter else {})}
            for issuer, terms in self._trusted.items()
        }

    def reporter_to(self, issuer: str) -> Reporter | None:
        """Return what reports to this issuer, if anything does, and see that it is running."""
        terms = self._trusted.get(issuer)
        if terms is None or terms.reporter is None:
            return None
        terms.reporter.start()
        return terms.reporter

    def start(self) -> None:
        """See that whatever reports is running in this process, which may be a forked one."""
        for issuer in self._trusted:
            self.reporter_to(issuer)

    def _terms_for(self, unverified_jwt: UnverifiedJWT) -> _TrustedIssuer:
        terms = self._trusted.get(unverified_jwt.unverified_iss or "")
        if terms is None:
            expected = " or ".join(f"'{issuer}'" for issuer in sorted(self._trusted))
            found = shown(unverified_jwt.unverified_claims.get("iss", ABSENT))
            raise InvalidToken(f"iss: expected {expected}, found {found}")
        if terms.reporter is not None:
            terms.reporter.start()
        return terms
