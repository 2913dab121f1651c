"""The human portal as an OpenID Connect provider: from a way there to who came back.

Keeps nothing of a sign-in: all of it travels in a cookie of the browser that began it. Decides
nothing about rights.
"""

import asyncio
import hmac
import secrets
import ssl
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from typing import Any, Final, TypeVar, cast
from urllib.parse import quote_plus, urlsplit

import httpx
import msgspec
import structlog
from authlib.oauth2 import rfc7636
from authlib.oauth2.rfc6749 import parameters
from authlib.oidc.core import CodeIDToken
from authlib.oidc.discovery import get_well_known_url
from joserfc import jwt
from joserfc.errors import InvalidKeyIdError
from joserfc.jwk import KeySet
from joserfc.jws import JWSRegistry
from msgspec import Struct

from keys.secret import Secret
from service.authority.model import Clock
from service.authority.people import Identity

T = TypeVar("T")

DEADLINE: Final = 5.0
"""Seconds for one answer of the provider."""
PATIENCE: Final = 10.0
"""Seconds for all answers that one step of a sign-in takes."""
MAX_ANSWER: Final = 262_144
KEPT: Final = 3600.0
"""Seconds for which the provider's description and keys are kept."""
REREAD: Final = 60.0
"""Seconds after which an unknown key is reason enough to read them again."""
TRANSACTION: Final = 600
"""Seconds for which the browser keeps what belongs to a sign-in."""
MAX_SUBJECT: Final = 255

# RFC 8725 §3.1: what the token itself says of its algorithm is never enough. No symmetric one:
# its key would be the client secret.
_ALGORITHMS: Final = (
    *("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"),
    *("ES256", "ES384", "ES512", "EdDSA", "Ed25519"),
)
# RFC 7515 §4: header parameters that are not understood are ignored.
_SIGNATURES: Final = JWSRegistry(algorithms=_ALGORITHMS, strict_check_header=False)

# Authlib says nothing of its types.
_prepare_grant_uri = cast(
    "Callable[..., str]",
    parameters.prepare_grant_uri,  # pyright: ignore[reportUnknownMemberType]
)
_create_s256_code_challenge = cast(
    "Callable[[str], str]",
    rfc7636.create_s256_code_challenge,  # pyright: ignore[reportUnknownMemberType]
)

log = structlog.stdlib.get_logger()


class SignInFailed(Exception):
    """A sign-in came to nothing: `reason` is a stable word for the record, the text is for people.

    It holds nothing that came with the request or from the provider.
    """

    status = HTTPStatus.FORBIDDEN

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


class ProviderUnavailable(SignInFailed):
    """The provider cannot be reached, or does not answer as one."""

    status = HTTPStatus.SERVICE_UNAVAILABLE


class Transaction(Struct, frozen=True, kw_only=True):
    """What one sign-in needs when its browser comes back, and where that goes then.

    Nothing signs it, and it is no secret from the browser that holds it: another site can neither
    read nor set it (`__Host-`), and whoever changes it fails their own sign-in.
    """

    state: str
    nonce: str
    code_verifier: str
    following: str

    @classmethod
    def begin(cls, following: str) -> "Transaction":
        """Return a new one: each value has 256 random bits."""
        state, nonce, code_verifier = (secrets.token_urlsafe(32) for _ in range(3))
        return cls(state=state, nonce=nonce, code_verifier=code_verifier, following=following)

    @classmethod
    def decode(cls, cookie: str) -> "Transaction | None":
        """Return what `encode` made; None for anything else."""
        try:
            return msgspec.json.decode(urlsafe_b64decode(f"{cookie}=="), type=cls)
        except ValueError:
            return None

    def encode(self) -> str:
        """Return it as the value of a cookie."""
        return urlsafe_b64encode(msgspec.json.encode(self)).rstrip(b"=").decode("ascii")


class _Metadata(Struct, frozen=True):
    """What of OpenID Connect Discovery §3 is used here."""

    issuer: str
    authorization_endpoint: str
    token_endpoint: str
    jwks_uri: str
    token_endpoint_auth_methods_supported: tuple[str, ...] = ("client_secret_basic",)
    authorization_response_iss_parameter_supported: bool = False

    @property
    def endpoints(self) -> tuple[str, ...]:
        return self.authorization_endpoint, self.token_endpoint, self.jwks_uri


class _Known(Struct, frozen=True, kw_only=True):
    """The provider as it was when it was read last."""

    metadata: _Metadata
    keys: KeySet
    at: float


class _TokenAnswer(Struct, frozen=True):
    id_token: str
    access_token: str | None = None


class Provider:
    """One provider, and this installation as its client."""

    def __init__(
        self,
        *,
        issuer: str,
        client_id: str,
        client_secret: Secret | None,
        name: str,
        scopes_claim: str,
        callback: str,
        clock: Clock,
        clock_skew: int,
    ) -> None:
        self.name = name
        self._issuer = issuer
        self._client_id = client_id
        self._client_secret = client_secret
        self._scopes_claim = scopes_claim
        self._callback = callback
        self._clock = clock
        self._clock_skew = clock_skew
        # Takes 20 ms: not in the middle of a sign-in. The machine's authorities, or SSL_CERT_FILE.
        self._tls = ssl.create_default_context()
        self._known: _Known | None = None
        self._reading = asyncio.Lock()

    async def way_there(self, transaction: Transaction) -> str:
        """Return the address at the provider where people sign in; raise ProviderUnavailable."""
        metadata = (await self._in_time(self._read(KEPT))).metadata
        return _prepare_grant_uri(
            metadata.authorization_endpoint,
            client_id=self._client_id,
            response_type="code",
            redirect_uri=self._callback,
            scope="openid profile email",
            state=transaction.state,
            nonce=transaction.nonce,
            code_challenge=_create_s256_code_challenge(transaction.code_verifier),
            code_challenge_method="S256",
        )

    async def who_came_back(
        self, answer: Mapping[str, str], transaction: Transaction | None
    ) -> Identity:
        """Return who signed in, by the parameters of the redirect back (RFC 6749 §4.1.2).

        Raise SignInFailed for anything that is not the provider's answer to this very transaction.
        """
        if transaction is None or not hmac.compare_digest(
            answer.get("state", "").encode(), transaction.state.encode()
        ):
            raise SignInFailed(
                "wrong_state",
                "This sign-in was not begun in this browser, took more than 10 minutes, or was "
                "used already. Begin again.",
            )
        return await self._in_time(self._who(answer, transaction))

    async def _who(self, answer: Mapping[str, str], transaction: Transaction) -> Identity:
        metadata = (await self._read(KEPT)).metadata
        # RFC 9207 §2.4: no other provider may answer in the place of this one.
        silent = None if metadata.authorization_response_iss_parameter_supported else self._issuer
        if answer.get("iss", silent) != self._issuer:
            raise self._unproven("another issuer answered, or none")
        if answer.get("error") == "access_denied":
            raise SignInFailed(
                "provider_denied", f"{self.name} did not let you in, or you left it. Begin again."
            )
        if "error" in answer or not answer.get("code"):
            log.warning("provider_answered_with_error", error=answer.get("error", "")[:64])
            raise SignInFailed(
                "provider_error",
                f"{self.name} answered with an error instead of saying who you are. Begin again; "
                "if that does not help, tell an operator.",
            )
        tokens = await self._exchange(metadata, answer["code"], transaction.code_verifier)
        return self._identity(await self._claims(tokens, transaction.nonce))

    async def _exchange(self, metadata: _Metadata, code: str, verifier: str) -> _TokenAnswer:
        form = {
            "grant_type": "authorization_code",
            "code": code,
            "redirect_uri": self._callback,
            "code_verifier": verifier,
        }
        authentication: httpx.BasicAuth | None = None
        if self._client_secret is None:
            form["client_id"] = self._client_id
        elif "client_secret_basic" in metadata.token_endpoint_auth_methods_supported:
            # RFC 6749 §2.3.1: both are encoded first.
            authentication = httpx.BasicAuth(
                quote_plus(self._client_id), quote_plus(self._client_secret.reveal())
            )
        else:
            form |= {"client_id": self._client_id, "client_secret": self._client_secret.reveal()}
        status, body = await self._ask(
            "POST", metadata.token_endpoint, data=form, auth=authentication
        )
        if HTTPStatus.BAD_REQUEST <= status < HTTPStatus.INTERNAL_SERVER_ERROR:
            log.warning("provider_refused_code", status=status)
            raise SignInFailed(
                "provider_refused",
                f"{self.name} did not say who you are. Begin again; if that does not help, tell an "
                "operator.",
            )
        if status != HTTPStatus.OK:
            raise self._unavailable("token endpoint", f"status {status}")
        try:
            return msgspec.json.decode(body, type=_TokenAnswer)
        except ValueError:
            raise self._unavailable("token endpoint", "no answer of RFC 6749 §5.1") from None

    async def _claims(self, tokens: _TokenAnswer, nonce: str) -> dict[str, Any]:
        """Return the claims of an ID token that holds (OpenID Connect Core §3.1.3.7)."""
        token = await self._signed(tokens.id_token)
        claims: Any = CodeIDToken(
            token.claims,
            token.header,
            options={
                "iss": {"essential": True, "value": self._issuer},
                "aud": {"essential": True, "value": self._client_id},
                "sub": {"essential": True},
                "nonce": {"essential": True, "value": nonce},
            },
            params={
                "client_id": self._client_id,
                "nonce": nonce,
                "access_token": tokens.access_token,
            },
        )
        try:
            claims.validate(now=int(self._clock()), leeway=self._clock_skew)
        except Exception as error:
            # Whatever it trips over proves nothing.
            raise self._unproven(type(error).__name__) from None
        return token.claims

    async def _signed(self, id_token: str) -> jwt.Token:
        for age in (KEPT, REREAD):
            keys = (await self._read(age)).keys
            try:
                return jwt.decode(id_token, keys, registry=_SIGNATURES)
            except InvalidKeyIdError:
                continue  # the provider may have rotated its keys
            except Exception as error:
                raise self._unproven(type(error).__name__) from None
        raise self._unproven("the key is unknown")

    def _identity(self, claims: Mapping[str, Any]) -> Identity:
        subject: str = claims["sub"]
        # OpenID Connect Core §2: at most 255 ASCII characters.
        if not (0 < len(subject) <= MAX_SUBJECT and subject.isascii() and subject.isprintable()):
            raise self._unproven("the subject is none")
        scopes = claims.get(self._scopes_claim)
        if isinstance(scopes, str):
            scopes = scopes.split()
        listed = cast("list[object]", scopes) if isinstance(scopes, list) else []
        return Identity(
            issuer=self._issuer,
            subject=subject,
            username=_text(claims, "preferred_username"),
            name=_text(claims, "name"),
            email=_text(claims, "email"),
            # RFC 6749 §3.3: ASCII.
            scopes=tuple(scope for scope in listed if isinstance(scope, str) and scope.isascii()),
        )

    async def _read(self, age: float) -> _Known:
        """Return description and keys of the provider, not older than `age` seconds."""
        async with self._reading:
            known = self._known
            if known is None or not 0 <= self._clock() - known.at < age:
                known = self._known = await self._read_now()
            return known

    async def _read_now(self) -> _Known:
        at = self._clock()
        body = await self._get(get_well_known_url(self._issuer, external=True))
        try:
            metadata = msgspec.json.decode(body, type=_Metadata)
            schemes = {urlsplit(address).scheme for address in metadata.endpoints}
        except ValueError:
            raise self._unavailable("discovery", "no OpenID Connect metadata") from None
        if metadata.issuer != self._issuer:
            raise self._unavailable("discovery", "it is another issuer's")
        # Without TLS only if the settings allowed that: an issuer on loopback.
        if not schemes <= {"https", urlsplit(self._issuer).scheme}:
            raise self._unavailable("discovery", "an endpoint has no https")
        body = await self._get(metadata.jwks_uri)
        try:
            keys = KeySet.import_key_set(msgspec.json.decode(body))
        except Exception as error:
            # Whatever it trips over is no set of keys.
            raise self._unavailable("jwks", type(error).__name__) from None
        return _Known(metadata=metadata, keys=keys, at=at)

    async def _get(self, address: str) -> bytes:
        status, body = await self._ask("GET", address)
        if status != HTTPStatus.OK:
            raise self._unavailable(address, f"status {status}")
        return body

    async def _ask(self, method: str, address: str, **request: Any) -> tuple[int, bytes]:
        """Return status and body of an answer that is short and quick; follow no redirect."""
        # Unpacked by nobody here, so that it cannot grow.
        headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
        body = bytearray()
        try:
            async with (
                asyncio.timeout(DEADLINE),
                httpx.AsyncClient(verify=self._tls, timeout=DEADLINE, headers=headers) as client,
                client.stream(method, address, **request) as answer,
            ):
                async for chunk in answer.aiter_raw():
                    body += chunk
                    if len(body) > MAX_ANSWER:
                        raise self._unavailable(address, "the answer has no end")
                return answer.status_code, bytes(body)
        # A port beyond 65,535 is an OverflowError, maybe in a group.
        except (
            *(httpx.HTTPError, httpx.InvalidURL, TimeoutError),
            *(OverflowError, ExceptionGroup),
        ) as error:
            raise self._unavailable(address, type(error).__name__) from None

    async def _in_time(self, step: Awaitable[T]) -> T:
        try:
            async with asyncio.timeout(PATIENCE):
                return await step
        except TimeoutError:
            raise self._unavailable("sign-in", "TimeoutError") from None

    def _unavailable(self, where: str, why: str) -> ProviderUnavailable:
        log.warning("provider_unavailable", where=where, why=why)
        return ProviderUnavailable(
            "provider_unavailable",
            f"{self.name} does not answer as it should just now. Begin again in a minute.",
        )

    def _unproven(self, why: str) -> SignInFailed:
        log.warning("provider_not_believed", why=why)
        return SignInFailed(
            "provider_not_believed",
            f"What {self.name} said of you cannot be verified. Begin again; if that does not help, "
            "tell an operator: the log of this server says why.",
        )


def _text(claims: Mapping[str, Any], name: str) -> str:
    value = claims.get(name)
    # JSON may hold one half of a surrogate pair, which nothing that is kept here may.
    return value.encode("utf-8", "ignore").decode() if isinstance(value, str) else ""
