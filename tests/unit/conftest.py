"""Values that the unit tests share: a service user, its secret, an origin, a key that signs.

Checks nothing and touches no store.
"""

from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

from keys.keyring import KeyState, SigningKey
from keys.secret import Secret
from keys.signer import LocalSigner
from keys.verifier import thumbprint
from service.authority.client_auth import new_secret, secret_sha256
from service.authority.model import ClientAddress, Credential, ServiceUser, Status

NOW = 1_800_000_000.0


@pytest.fixture(scope="session")
def now() -> float:
    """The time of every decision, in seconds since the epoch."""
    return NOW


@pytest.fixture(scope="session")
def origin() -> ClientAddress:
    return ClientAddress(address="192.0.2.7", user_agent="curl/8", request_id="request-1")


@pytest.fixture(scope="session")
def secret() -> Secret:
    """The secret of `credential`."""
    return new_secret()


@pytest.fixture(scope="session")
def user() -> ServiceUser:
    return ServiceUser(
        id="su_abcdefghijklmnopqrstuvwx",
        name="vkyc-prod",
        source_system="vkyc",
        owner="Video identification",
        contact="vkyc@bank.example",
        description="",
        scopes=("ingest:write", "search:read"),
        audiences=("https://ingest.example", "https://search.example"),
        token_lifetime=900,
        status=Status.ACTIVE,
        version=3,
        created_at=datetime.fromtimestamp(NOW, UTC) - timedelta(days=100),
    )


@pytest.fixture(scope="session")
def credential(user: ServiceUser, secret: Secret) -> Credential:
    return Credential(
        id="cr_abcdefghijklmnopqrstuvwx",
        service_user_id=user.id,
        label="first",
        secret_sha256=secret_sha256(secret),
        created_at=user.created_at,
        expires_at=datetime.fromtimestamp(NOW, UTC) + timedelta(days=200),
    )


@pytest.fixture(scope="session")
def active_key(rsa_keys: list[RSAPrivateKey]) -> Generator[SigningKey, None, None]:
    """A key that signs tokens of up to an hour."""
    public_key = rsa_keys[0].public_key()
    with ThreadPoolExecutor(1) as executor:
        yield SigningKey(
            kid=thumbprint(public_key),
            state=KeyState.ACTIVE,
            public_key=public_key,
            published_at=NOW - 200_000,
            activated_at=NOW - 100_000,
            lifetime_cap=3600,
            is_attested=True,
            signer=LocalSigner(rsa_keys[0], executor),
        )


@pytest.fixture(scope="session")
def signing_key(rsa_keys: list[RSAPrivateKey]) -> Callable[..., SigningKey]:
    """Make a key of a given kid and state; which RSA key it is does not matter."""

    def make(kid: str, state: KeyState, **fields: float | int | None) -> SigningKey:
        fields.setdefault("published_at", NOW)
        fields.setdefault("is_attested", True)
        return SigningKey(kid=kid, state=state, public_key=rsa_keys[0].public_key(), **fields)  # type: ignore[arg-type]

    return make
