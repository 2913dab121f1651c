"""Tokens that are no tokens, at the admin API (TRIALS J1-J12), and what is issued (J14).

Each forgery is signed with the genuine key and has an issuance record with its own digest, planted
by a superuser: so nothing but the reading of the token itself can refuse it.
"""

import contextlib
import hashlib
import hmac
import json
import socket
import time
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeAlias
from uuid import UUID

import asyncpg
import httpx
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from joserfc import jwt as joserfc_jwt
from joserfc.jwk import KeySet

from keys.verifier import encode_jwks, public_jwk, thumbprint
from service.authority.audit import new_record_id

pytestmark = pytest.mark.anyio

Credential: TypeAlias = tuple[str, str]
Enrol: TypeAlias = Callable[..., Awaitable[Credential]]
Records: TypeAlias = Callable[..., Awaitable[list[dict[str, Any]]]]
SQL: TypeAlias = Callable[..., Awaitable[list[asyncpg.Record]]]
Forge: TypeAlias = Callable[..., str]
Try: TypeAlias = Callable[[Mapping[str, str]], Awaitable[dict[str, int]]]

ME = "/api/v1/service-users/me"
ISSUER = "http://127.0.0.1:8080"
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"

PLANT = """
INSERT INTO audit_records (id, commit_order, recorded_at, action, outcome, service_user_id,
    credential_id, signing_input_sha256, request_id, repeats, details)
SELECT unnest($1::uuid[]), 1, now(), 'token.issue', 'success', $3, c.id, unnest($2::bytea[]),
    '', 1, '{}' FROM credentials c WHERE c.service_user_id = $3
"""


def encode(data: bytes) -> str:
    """base64url without padding (RFC 7515 §2)."""
    return urlsafe_b64encode(data).rstrip(b"=").decode()


def decoded(segment: str) -> bytes:
    """The bytes of a segment."""
    return urlsafe_b64decode(segment + "=" * (-len(segment) % 4))


@pytest.fixture
def genuine_key(rsa_keys: list[RSAPrivateKey]) -> RSAPrivateKey:
    """The active key."""
    return rsa_keys[0]


@pytest.fixture
def claims(operator: httpx.AsyncClient) -> dict[str, Any]:
    """What the operator's real token says."""
    token = operator.headers["authorization"].removeprefix("Bearer ")
    return jwt.decode(token, options={"verify_signature": False})


@pytest.fixture
def forge(claims: dict[str, Any], genuine_key: RSAPrivateKey) -> Forge:
    """Sign the operator's claims under a `jti` of their own, changed as given; `...` leaves out.

    Header and claims may be raw JSON, too; `JTI` in it stands for the `jti`.
    """

    def forged(
        change: Mapping[str, object] | bytes | None = None,
        header: Mapping[str, object] | bytes | None = None,
        key: RSAPrivateKey = genuine_key,
    ) -> str:
        jti = str(new_record_id(time.time()))
        genuine = {"alg": "RS256", "typ": "at+jwt", "kid": thumbprint(key.public_key())}
        parts: list[bytes] = []
        for members, other in ((genuine, header), ({**claims, "jti": jti}, change)):
            if isinstance(other, bytes):
                parts.append(other.replace(b"JTI", jti.encode()))
                continue
            merged = {**members, **(other or {})}
            kept = {name: value for name, value in merged.items() if value is not ...}
            parts.append(json.dumps(kept).encode())
        signing_input = ".".join(map(encode, parts))
        return f"{signing_input}.{encode(key.sign(signing_input.encode(), PKCS1v15(), SHA256()))}"

    return forged


@pytest.fixture
def attempt(
    client: httpx.AsyncClient, sql: SQL, operator_credential: Credential, records: Records
) -> Try:
    """Plant a record of each token, call with it, and return the statuses."""

    async def tried(tokens: Mapping[str, str]) -> dict[str, int]:
        ids: dict[UUID, bytes] = {}
        for token in tokens.values():
            jti = new_record_id(time.time())
            with contextlib.suppress(LookupError, ValueError, TypeError, RecursionError):
                jti = UUID(str(json.loads(decoded(token.split(".")[1]))["jti"]))
            ids[jti] = hashlib.sha256(token.rpartition(".")[0].encode()).digest()
        await sql(PLANT, list(ids), list(ids.values()), operator_credential[0])
        statuses: dict[str, int] = {}
        for name, token in tokens.items():
            headers = [(b"Authorization", b"Bearer " + token.encode())]
            answer = await client.get(ME, headers=headers)
            statuses[name] = int(answer.status_code)
            if answer.status_code == 401:
                challenge = answer.headers["www-authenticate"]
                assert challenge.startswith('Bearer error="invalid_token"')
                assert answer.headers["content-type"] == "application/problem+json"
                assert token[:60] not in answer.text + challenge or len(token) < 60
        refused = sum(status == 401 for status in statuses.values())
        logged = await records(refused, action="service_user.read", outcome="refused")
        assert {record["reason"] for record in logged} <= {"invalid_token"}
        return statuses

    return tried


def refused(tokens: Mapping[str, object]) -> dict[str, int]:
    """What `attempt` returns when every token is refused."""
    return dict.fromkeys(tokens, 401)


async def test_a_forgery_with_nothing_wrong_is_accepted(
    forge: Forge, attempt: Try, claims: dict[str, Any], rsa_keys: list[RSAPrivateKey]
) -> None:
    ordered = json.dumps({**dict(reversed(claims.items())), "jti": "JTI"}).encode()
    tokens = {
        "plain": forge(),
        "pending key": forge(key=rsa_keys[1]),
        "another claim": forge({"x": 1}),
        "other order": forge(ordered),
    }
    assert await attempt(tokens) == dict.fromkeys(tokens, 200)


async def test_j1_no_alg_but_rs256_is_accepted(forge: Forge, attempt: Try) -> None:
    algs: list[object] = ["none", "None", "nOnE", "", "rs256", "RS256 ", None, 256, ["RS256"], ...]
    algs += ["HS256", "HS512", "PS256", "ES256", "RS512", "EdDSA"]
    tokens: dict[str, str] = {}
    for alg in algs:
        token = forge(None, {"alg": alg})
        tokens[f"{alg}"] = token
        tokens[f"{alg}, unsigned"] = token.rpartition(".")[0] + "."
    assert await attempt(tokens) == refused(tokens)


async def test_j2_no_public_text_works_as_an_hmac_key(
    forge: Forge, attempt: Try, genuine_key: RSAPrivateKey, client: httpx.AsyncClient
) -> None:
    public = genuine_key.public_key()
    pem = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    secrets = {
        "pem": pem,
        "pem crlf": pem.replace(b"\n", b"\r\n"),
        "pem stripped": pem.strip(),
        "der": public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
        "modulus": public.public_numbers().n.to_bytes(256, "big"),
        "jwk": json.dumps(public_jwk(public)).encode(),
        "jwks": (await client.get("/.well-known/jwks.json")).content,
        "other jwks": encode_jwks([public]),
        "empty": b"",
    }
    tokens: dict[str, str] = {}
    for alg in ("HS256", "RS256"):
        for name, secret in secrets.items():
            signing_input = forge(None, {"alg": alg}).rpartition(".")[0]
            mac = hmac.new(secret, signing_input.encode(), hashlib.sha256).digest()
            tokens[f"{alg} {name}"] = f"{signing_input}.{encode(mac)}"
    assert await attempt(tokens) == refused(tokens)


async def test_j3_kid_is_matched_exactly(
    forge: Forge, attempt: Try, rsa_keys: list[RSAPrivateKey]
) -> None:
    kids: list[object] = [..., 7, None, "", "../../dev/null", "' OR 1=1--", "\0", "k" * 1_000_000]
    kids += [thumbprint(rsa_keys[0].public_key()) + " ", thumbprint(rsa_keys[1].public_key())]
    tokens = {f"{kid}"[:50]: forge(None, {"kid": kid}) for kid in kids}
    tokens["a key that is not published"] = forge(key=rsa_keys[2])
    assert await attempt(tokens) == refused(tokens)


async def test_j4_j5_a_token_brings_no_key_and_no_extension(
    forge: Forge, attempt: Try, rsa_keys: list[RSAPrivateKey]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/jwks"
        headers: list[dict[str, object]] = [
            {"jku": url},
            {"x5u": url},
            {"jwk": public_jwk(rsa_keys[2].public_key())},
            {"x5c": [url]},
            {"crit": ["exp"], "exp": 1},
            {"crit": []},
            {"crit": ["b64"], "b64": True},
            {"b64": False},
            {"zip": "DEF"},
            {"cty": "JWT"},
        ]
        tokens = {f"{header}": forge(None, header) for header in headers}
        tokens |= {
            f"{header}, own key": forge(None, header, key=rsa_keys[2]) for header in headers[:4]
        }
        assert await attempt(tokens) == refused(tokens)
        with pytest.raises(BlockingIOError):
            listener.accept()


async def test_j6_ambiguous_json_is_refused(
    forge: Forge, attempt: Try, claims: dict[str, Any], genuine_key: RSAPrivateKey
) -> None:
    kid = thumbprint(genuine_key.public_key())
    parts = {
        "claims": json.dumps({**claims, "jti": "JTI"})[1:-1].encode(),
        "header": json.dumps({"alg": "RS256", "typ": "at+jwt", "kid": kid})[1:-1].encode(),
    }
    forms = {
        "duplicate": b'{%b,"kid":"k","aud":"a","kid":"k"}',
        "duplicate of a known one": b'{"aud":"x","kid":"x",%b}',
        "duplicate by escape": b'{"\\u0061ud":"x","k\\u0069d":"x",%b}',
        "a list": b"[{%b}]",
        "two objects": b"{%b}{}",
        "trailing comma": b"{%b,}",
        "byte order mark": b"\xef\xbb\xbf{%b}",
        "invalid UTF-8": b'{%b,"x":"\xff"}',
        "lone surrogate": b'{%b,"x":"\\ud800"}',
        "NaN": b'{%b,"x":NaN}',
        "2,000 deep": b'{%b,"x":' + b"[" * 2000 + b"]" * 2000 + b"}",
        "100,000 deep": b'{%b,"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "5,000 digits": b'{%b,"x":' + b"9" * 5000 + b"}",
    }
    tokens: dict[str, str] = {}
    for name, form in forms.items():
        tokens[f"claims: {name}"] = forge(form % parts["claims"])
        tokens[f"header: {name}"] = forge(None, form % parts["header"])
    for encoding in ("utf-16", "utf-16-le", "utf-32"):
        raw = b"{%b}" % parts["claims"]
        tokens[encoding] = forge(raw.decode().encode(encoding))
    assert await attempt(tokens) == refused(tokens)


async def test_j7_any_other_form_is_refused(forge: Forge, attempt: Try) -> None:
    token = forge()
    header, payload, signature = token.split(".")
    last = ALPHABET.index(signature[-1])
    tokens = {
        "stripped signature": f"{header}.{payload}.",
        "cut signature": token[:-4],
        "one segment": header,
        "two segments": f"{header}.{payload}",
        "four segments": f"{token}.{signature}",
        "two dots": "..",
        "JSON serialization": json.dumps(
            {"payload": payload, "protected": header, "signature": signature}
        ),
        "five-part JWE": f"{header}.{payload}.{payload}.{signature}.{signature}",
        "JWS in JWS": f"{header}.{encode(token.encode())}.{signature}",
        "padding": f"{token}==",
        "padded header": f"{header}=.{payload}.{signature}",
        "standard alphabet": f"{header}.{payload}.{signature[:-1]}+",
        "leading space": f" {token}",
        "trailing space": f"{token} ",
        "trailing newline": f"{token}\n",
        "inner tab": f"{header}.\t{payload}.{signature}",
        "zero width space": f"{token}\N{ZERO WIDTH SPACE}",
        "non-ASCII": f"{token}\xe9",
        "NUL": f"{token}\0",
        "unused bits": token[:-1] + ALPHABET[last ^ 1],
        "twice": f"{token} {token}",
        "list": f"{token},{token}",
    }
    statuses = await attempt({**tokens, "genuine": token})
    assert statuses == {**refused(tokens), "genuine": 200}


async def test_j8_what_is_larger_than_8_kib_is_refused_at_once(
    forge: Forge, attempt: Try, client: httpx.AsyncClient
) -> None:
    tokens = {f"{size}": forge({"pad": "x" * size}) for size in (6200, 10_000, 1_000_000)}
    assert await attempt({"fitting": forge({"pad": "x" * 5000}), **tokens}) == {
        "fitting": 200,
        **refused(tokens),
    }
    huge = {"Authorization": "Bearer " + "a" * 10_000_000}
    started = time.perf_counter()
    assert (await client.get(ME, headers=huge)).status_code == 401
    assert time.perf_counter() - started < 2


async def test_j9_times_are_whole_seconds_within_the_cap_and_the_skew(
    forge: Forge, attempt: Try, claims: dict[str, Any]
) -> None:
    iat, now = claims["iat"], int(time.time())
    values: list[object] = ["1800000000", float(iat), True, None, [iat], {}, ..., -1, 0, 2**63]
    tokens = {
        f"{name} {value}": forge({name: value}) for name in ("iat", "exp") for value in values
    }
    tokens |= {
        "lifetime above the cap": forge({"exp": iat + 3601}),
        "lifetime of nothing": forge({"exp": iat}),
        "ended": forge({"iat": now - 1000, "exp": now - 61}),
        "not yet issued": forge({"iat": now + 90, "exp": now + 990}),
        "not before": forge({"nbf": now + 90}),
        "nbf as text": forge({"nbf": "0"}),
        "NaN": forge(json.dumps({**claims, "jti": "JTI", "exp": float("nan")}).encode()),
        "infinity": forge(json.dumps({**claims, "jti": "JTI", "exp": float("inf")}).encode()),
    }
    good = {
        "lifetime of the cap": forge({"exp": iat + 3600}),
        "ended within the skew": forge({"iat": now - 1000, "exp": now - 40}),
        "issued within the skew": forge({"iat": now + 40, "exp": now + 940}),
    }
    assert await attempt({**tokens, **good}) == {**refused(tokens), **dict.fromkeys(good, 200)}


async def test_j10_a_token_for_another_context_is_refused(
    forge: Forge, attempt: Try, rsa_keys: list[RSAPrivateKey], claims: dict[str, Any]
) -> None:
    audience = f"{ISSUER}/api/v1"
    audiences: list[object] = [ISSUER, f"{audience}/", audience[:-1], "", [], None, ...]
    changes: list[dict[str, object]] = [
        *({"iss": iss} for iss in (f"{ISSUER}/", ISSUER[:-1], ISSUER.upper(), [ISSUER], None, ...)),
        *({"aud": [audience, *more]} for more in ([], ["http://127.0.0.1:8081"])),
        *({"aud": aud} for aud in audiences),
        {"aud": f"{audience} http://127.0.0.1:8081"},
        *({"client_id": client_id} for client_id in ("su_other", "", None, ...)),
        *({"sub": sub} for sub in ("su_other", "", 7, ...)),
        {"sub": "su_" + "a" * 24, "client_id": "su_" + "a" * 24},
        *({"jti": jti} for jti in (..., 7, "", "x", "{JTI}")),
        *({"scope": scope} for scope in (..., ["audit:read"], " audit:read", "a  b", "a\tb")),
        *({"service_user": name} for name in (..., "", "a\r\nb")),
        *({"act": act} for act in ("su_minter", {}, {"sub": ""}, None)),
    ]
    tokens = {json.dumps(c, default=str): forge(c) for c in changes}
    typs: list[object] = ["JWT", "AT+JWT", "application/at+jwt", "at+jwt ", "", None, ...]
    tokens |= {f"typ {typ}": forge(None, {"typ": typ}) for typ in typs}
    tokens["staging's key"] = forge(key=rsa_keys[3])
    ours = {"kid": thumbprint(rsa_keys[0].public_key())}
    tokens["staging's key under our kid"] = forge(None, ours, key=rsa_keys[3])
    assert await attempt(tokens) == refused(tokens)


async def test_j12_no_other_number_is_the_signature(
    forge: Forge, attempt: Try, genuine_key: RSAPrivateKey
) -> None:
    signing_input, _, signature = forge().rpartition(".")
    n = genuine_key.public_key().public_numbers().n
    s = int.from_bytes(decoded(signature), "big")
    tokens = {
        f"{name} in {size}": f"{signing_input}.{encode(number.to_bytes(size, 'big'))}"
        for name, number in {
            "0": 0,
            "1": 1,
            "n-1": n - 1,
            "n": n,
            "n+1": n + 1,
            "s+n": s + n,
        }.items()
        for size in (1, 256, 257)
        if number < 256**size
    }
    assert len(tokens) >= 13
    assert await attempt(tokens) == refused(tokens)


_SCOPES = st.lists(
    st.from_regex(r"[a-z][a-z0-9:._-]{0,63}", fullmatch=True), min_size=0, max_size=8, unique=True
)


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    source_system=st.from_regex(r"[a-z][a-z0-9_]{0,62}", fullmatch=True),
    scopes=_SCOPES,
    lifetime=st.integers(60, 3600),
    audiences=st.lists(
        st.from_regex(
            r"https://[a-z0-9.]{1,20}(/[A-Za-z0-9._~!$&'()*+,;=@%-]{0,20})?", fullmatch=True
        ),
        min_size=1,
        max_size=3,
        unique=True,
    ),
    chosen=st.integers(0, 2),
    asked_for=st.sets(st.integers(0, 7)),
)
async def test_j14_every_issued_token_is_one_for_others_too(
    source_system: str,
    scopes: list[str],
    lifetime: int,
    audiences: list[str],
    chosen: int,
    asked_for: set[int],
    client: httpx.AsyncClient,
    enrol: Enrol,
) -> None:
    name = f"user-{time.time_ns()}"
    credential = await enrol(
        name,
        source_system=source_system,
        scopes=scopes,
        audiences=audiences,
        token_lifetime=lifetime,
    )
    audience = audiences[chosen % len(audiences)]
    asked = [scope for number, scope in enumerate(scopes) if number in asked_for]
    form = {"grant_type": "client_credentials", "resource": audience, "scope": " ".join(asked)}
    jwks = (await client.get("/.well-known/jwks.json")).json()
    before = int(time.time())
    tokens = [
        (await client.post("/oauth/token", auth=credential, data=form)).json()["access_token"]
        for _ in range(2)
    ]
    jtis: set[str] = set()
    for token in tokens:
        key = jwt.PyJWKSet.from_dict(jwks)[jwt.get_unverified_header(token)["kid"]]
        claims = jwt.decode(token, key, algorithms=["RS256"], audience=audience, issuer=ISSUER)
        assert joserfc_jwt.decode(token, KeySet.import_key_set(jwks)).claims == claims
        jtis.add(claims["jti"])
        assert claims["sub"] == claims["client_id"] == credential[0]
        assert (claims["service_user"], claims["source_system"]) == (name, source_system)
        assert claims["exp"] - claims["iat"] == lifetime
        assert before - 1 <= claims["iat"] <= time.time() + 1
        assert claims["scope"].split() == [s for s in scopes if s in asked or not asked]
    assert len(jtis) == 2
