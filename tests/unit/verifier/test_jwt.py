"""Tokens that are no tokens (TRIALS J1-J10, J12): each is signed genuinely where that is possible.

It must not reach beyond loopback.
"""

import base64
import hashlib
import hmac
import json
import socket
import timeit
import tracemalloc
from collections.abc import Callable, Mapping
from typing import TypeAlias

import pytest
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from keys.verifier import (
    InvalidToken,
    SignedClaims,
    Verifier,
    encode_jwks,
    public_jwk,
    thumbprint,
)
from keys.verifier.jwt import parse
from keys.verifier.strict import base64url_decode, base64url_encode

Claims: TypeAlias = dict[str, object]
Sign: TypeAlias = Callable[..., str]
Check: TypeAlias = Callable[..., SignedClaims]

NOW = 1_800_000_000
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"


def test_genuine_token_says_what_was_signed(claims: Claims, sign: Sign, check: Check) -> None:
    token = sign({**claims, "act": {"sub": "su_minter"}, "department": ["retail", {"x": 1.5}]})
    signed = check(token)
    assert signed.sub == signed.client_id == claims["sub"]
    assert (signed.iss, signed.aud) == (claims["iss"], claims["aud"])
    assert (signed.iat, signed.exp, signed.jti) == (NOW, NOW + 900, claims["jti"])
    assert signed.scope == {"ingest:write", "search:read"}
    assert (signed.service_user, signed.source_system) == ("vkyc-prod", "vkyc")
    assert signed.act_sub == "su_minter"
    assert signed.claims["department"] == ["retail", {"x": 1.5}]
    signing_input = token.rpartition(".")[0].encode()
    assert signed.signing_input_sha256 == hashlib.sha256(signing_input).digest()


def test_a_token_without_scopes_is_a_token(claims: Claims, sign: Sign, check: Check) -> None:
    assert check(sign({**claims, "scope": ""})).scope == frozenset()


def test_no_repr_and_no_refusal_shows_the_token(claims: Claims, sign: Sign, check: Check) -> None:
    token = sign(claims)
    shown = repr(parse(token)) + repr(check(token))
    for secret in token.split("."):
        assert secret[:40] not in shown
    with pytest.raises(InvalidToken) as refused:
        check(token, now=NOW + 10_000)
    assert token[:40] not in str(refused.value)


@pytest.mark.parametrize(
    "alg",
    [
        *("none", "None", "nOnE", "", "rs256", "RS256 ", None, 256, ["RS256"], ...),
        *("HS256", "HS512", "PS256", "ES256", "RS512", "EdDSA"),
    ],
)
def test_j1_no_alg_but_rs256_is_accepted(
    alg: object, claims: Claims, sign: Sign, check: Check
) -> None:
    token = sign(claims, {"alg": alg})
    unsigned = token.rpartition(".")[0] + "."
    for spelling in (token, unsigned):
        with pytest.raises(InvalidToken, match="alg"):
            check(spelling)


@pytest.mark.parametrize("alg", ["HS256", "RS256"])
@pytest.mark.parametrize(
    "secret", ["pem", "pem crlf", "pem stripped", "der", "modulus", "jwk", "jwks", "empty"]
)
def test_j2_no_public_text_works_as_an_hmac_key(
    secret: str, alg: str, claims: Claims, rsa_key: RSAPrivateKey, check: Check
) -> None:
    public = rsa_key.public_key()
    pem = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    n = public.public_numbers().n
    key = {
        "pem": pem,
        "pem crlf": pem.replace(b"\n", b"\r\n"),
        "pem stripped": pem.strip(),
        "der": public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
        "modulus": n.to_bytes(256, "big"),
        "jwk": json.dumps(public_jwk(public)).encode(),
        "jwks": encode_jwks([public]),
        "empty": b"",
    }[secret]
    header = {"alg": alg, "typ": "at+jwt", "kid": thumbprint(public)}
    signing_input = ".".join(
        base64url_encode(json.dumps(part).encode()) for part in (header, claims)
    )
    mac = hmac.new(key, signing_input.encode(), hashlib.sha256).digest()
    with pytest.raises(InvalidToken, match="signature" if alg == "RS256" else "alg"):
        check(f"{signing_input}.{base64url_encode(mac)}")


@pytest.mark.parametrize(
    ("kid", "reason"),
    [
        (..., "header"),
        (7, "kid: expected printable text"),
        (None, "kid: expected printable text"),
        ("", "kid: expected printable text"),
        ("\0", "kid: expected printable text"),
        ("../../dev/null", "published keys"),
        ("' OR 1=1--", "published keys"),
        ("k" * 65, "kid: expected at most 64"),
        ("k" * 1_000_000, "expected at most 8192"),
    ],
)
def test_j3_kid_is_matched_exactly_or_refused(
    kid: object, reason: str, claims: Claims, sign: Sign, check: Check
) -> None:
    with pytest.raises(InvalidToken, match=reason):
        check(sign(claims, {"kid": kid}))


def test_j3_kid_with_another_case_or_of_another_issuer_is_unknown(
    claims: Claims, sign: Sign, check: Check, rsa_key: RSAPrivateKey, other_key: RSAPrivateKey
) -> None:
    for kid in (thumbprint(rsa_key.public_key()).swapcase(), thumbprint(other_key.public_key())):
        with pytest.raises(InvalidToken, match="published keys"):
            check(sign(claims, {"kid": kid}))


@pytest.mark.parametrize("member", ["jku", "x5u", "jwk", "x5c"])
def test_j4_a_token_cannot_bring_its_own_key(
    member: str,
    claims: Claims,
    sign: Sign,
    other_key: RSAPrivateKey,
    rsa_key: RSAPrivateKey,
    serve: Callable[[Mapping[str, bytes]], str],
) -> None:
    origin = serve({"/jwks": encode_jwks([rsa_key.public_key()])})
    verifier = Verifier("https://tokens.example.com", str(claims["aud"]), f"{origin}/jwks")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/jwks"
        value = {"jwk": public_jwk(other_key.public_key()), "x5c": [url]}.get(member, url)
        with pytest.raises(InvalidToken, match=f"found 'alg, .*{member}"):
            verifier.verify(sign(claims, {member: value}, key=other_key))
        with pytest.raises(BlockingIOError):
            listener.accept()


@pytest.mark.parametrize(
    "extension",
    [
        {"crit": ["exp"], "exp": NOW},
        {"crit": []},
        {"crit": ["b64"], "b64": True},
        {"b64": False},
        {"b64": False, "crit": ["b64"]},
        {"zip": "DEF"},
        {"cty": "JWT"},
    ],
)
def test_j5_no_header_extension_is_accepted(
    extension: Mapping[str, object], claims: Claims, sign: Sign, check: Check
) -> None:
    with pytest.raises(InvalidToken, match="header: expected exactly alg, kid, typ"):
        check(sign(claims, extension))


AMBIGUOUS = {
    "duplicate member": (b'{"X":1,"exp":1800000900}', "duplicate"),
    "duplicate by escape": (b'{"X":1,"\\u0065xp":1800000900}', "duplicate"),
    "duplicate inside": (b'{"X":1,"act":{"sub":"a","sub":"b"}}', "duplicate"),
    "list": (b'["X"]', "JSON object"),
    "string": (b'"X"', "JSON object"),
    "null": (b"null", "JSON object"),
    "nothing": (b"", "expected JSON"),
    "two objects": (b'{"X":1}{"X":1}', "expected JSON"),
    "trailing comma": (b'{"X":1,}', "expected JSON"),
    "byte order mark": (b'\xef\xbb\xbf{"X":1}', "expected JSON"),
    "utf-16": ('{"X":1}'.encode("utf-16"), "UTF-8"),
    "utf-16 without mark": ('{"X":1}'.encode("utf-16-le"), "expected JSON"),
    "invalid utf-8": (b'{"X":"\xff"}', "UTF-8"),
    "surrogate in utf-8": (b'{"X":"\xed\xa0\x80"}', "UTF-8"),
    "lone surrogate": (b'{"X":"\\ud800"}', "surrogate"),
    "lone surrogate in a name": (b'{"\\uDC00":1}', "surrogate"),
    "nan": (b'{"X":NaN}', "NaN"),
    "infinity": (b'{"X":-Infinity}', "Infinity"),
    "float beyond a double": (b'{"Y":1e999}', "finite"),
    "33 deep": (b'{"X":' + b"[" * 33 + b"]" * 33 + b"}", "nesting"),
    "2,700 deep": (b'{"X":' + b"[" * 2700 + b"]" * 2700 + b"}", "nesting"),
    "100,000 deep": (b'{"X":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "8192"),
    "5,000 digits": (b'{"X":' + b"9" * 5000 + b"}", "32 characters"),
}


@pytest.mark.parametrize("part", ["header", "claims"])
@pytest.mark.parametrize(("json_text", "reason"), AMBIGUOUS.values(), ids=AMBIGUOUS.keys())
def test_j6_ambiguous_json_is_refused(
    json_text: bytes, reason: str, part: str, claims: Claims, sign: Sign, check: Check
) -> None:
    genuine = json.dumps(claims).encode()
    members = {"header": b'"alg":"RS256","exp":0', "claims": genuine.strip(b"{}")}[part]
    ambiguous = json_text.replace(b'"X":1', members)
    token = sign(genuine, ambiguous) if part == "header" else sign(ambiguous)
    with pytest.raises(InvalidToken, match=reason):
        check(token)


def test_j6_a_surrogate_pair_is_a_whole_character(claims: Claims, sign: Sign, check: Check) -> None:
    raw = json.dumps({**claims, "note": "\N{KEY}"}).encode()
    assert b"\\ud83d\\udd11" in raw
    assert check(sign(raw)).claims["note"] == "\N{KEY}"


def _misshapen(token: str) -> dict[str, str]:
    header, payload, signature = token.split(".")
    return {
        "stripped signature": f"{header}.{payload}.",
        "cut signature": token[:-4],
        "one segment": header,
        "two segments": f"{header}.{payload}",
        "four segments": f"{token}.{signature}",
        "empty": "",
        "two dots": "..",
        "JSON serialization": json.dumps(
            {"payload": payload, "protected": header, "signature": signature}
        ),
        "five-part JWE": f"{header}.{payload}.{payload}.{signature}.{signature}",
        "JWS in JWS": f"{header}.{base64url_encode(token.encode())}.{signature}",
        "padding": f"{header}.{payload}.{signature}==",
        "padded header": f"{header}=.{payload}.{signature}",
        "standard alphabet": token.replace("-", "+").replace("_", "/"),
        "leading space": f" {token}",
        "trailing newline": f"{token}\n",
        "inner tab": f"{header}.\t{payload}.{signature}",
        "zero width space": f"{token}\N{ZERO WIDTH SPACE}",
        "full-width stop": "\N{FULLWIDTH FULL STOP}".join((header, payload, signature)),
        "non-ASCII": f"{token}\xe9",
        "NUL": f"{token}\0",
        # 256 octets leave four unused bits in the last character.
        "unused bits": token[:-1] + ALPHABET[ALPHABET.index(token[-1]) + 1],
        "Bearer": f"Bearer {token}",
    }


@pytest.mark.parametrize("form", _misshapen("eyJh.eyJp.QA"))
def test_j7_any_other_form_is_refused(form: str, claims: Claims, sign: Sign, check: Check) -> None:
    # A signature with both characters that the standard alphabet spells differently.
    token = next(
        token
        for nonce in range(1000)
        if {"-", "_"} <= set((token := sign({**claims, "nonce": nonce})).rpartition(".")[2])
    )
    check(token)
    with pytest.raises(InvalidToken):
        check(_misshapen(token)[form])


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_j7_a_token_has_exactly_one_accepted_spelling(
    data: st.DataObject, claims: Claims, sign: Sign, check: Check
) -> None:
    token = sign(claims)
    start = data.draw(st.integers(0, len(token)))
    end = data.draw(st.integers(start, min(start + 3, len(token))))
    put = data.draw(
        st.text(
            alphabet=st.one_of(st.sampled_from(ALPHABET + "=+/. \t\n"), st.characters()), max_size=3
        )
    )
    other = token[:start] + put + token[end:]
    if other == token:
        check(other)
    else:
        with pytest.raises(InvalidToken):
            check(other)


def test_j7_every_other_last_character_of_each_segment_is_refused(
    claims: Claims, sign: Sign, check: Check
) -> None:
    token = sign(claims)
    ends = [position for position, character in enumerate(token + ".") if character == "."]
    for end in ends:
        for character in set(ALPHABET) - {token[end - 1]}:
            with pytest.raises(InvalidToken):
                check(token[: end - 1] + character + token[end:])


@given(text=st.text(alphabet=ALPHABET + "=+/ \n\xe9", max_size=12))
def test_j7_base64url_is_read_only_as_it_would_be_written(text: str) -> None:
    try:
        data = base64url_decode(text)
    except ValueError:
        return
    assert base64.urlsafe_b64encode(data).decode().rstrip("=") == text


def test_j8_size_is_bounded_before_any_decoding(claims: Claims, sign: Sign, check: Check) -> None:
    def padded(size: int) -> str:
        spare = size - len(sign({**claims, "pad": ""}))
        return sign({**claims, "pad": "x" * (spare * 3 // 4)})

    assert len(padded(1024)) <= 1024

    def refused_or_accepted(token: str) -> None:
        if len(token) <= 1024:
            check(token)
        else:
            with pytest.raises(InvalidToken, match="expected at most 8192 characters"):
                check(token)

    for size in (1024, 1024**2, 10 * 1024**2):
        token = padded(size)
        microseconds = min(timeit.repeat(lambda t=token: refused_or_accepted(t), number=1)) * 1e6
        tracemalloc.start()
        refused_or_accepted(token)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        print(f"J8: {len(token)} characters: {microseconds:.0f} µs, {peak} bytes at most")
        assert peak < 64 * 1024


def test_j8_a_token_of_just_8_kib_is_accepted(claims: Claims, sign: Sign, check: Check) -> None:
    bare = len(sign({**claims, "pad": ""}))
    sizes = {
        len(t): t
        for n in range(6)
        if (t := sign({**claims, "pad": "x" * ((8192 - bare) * 3 // 4 - n)}))
    }
    fitting = max(size for size in sizes if size <= 8192)
    assert fitting > 8188
    check(sizes[fitting])
    with pytest.raises(InvalidToken, match="8192"):
        check(sign({**claims, "pad": "x" * ((8192 - bare) * 3 // 4 + 3)}))


@pytest.mark.parametrize("name", ["exp", "iat"])
@pytest.mark.parametrize(
    "value",
    [
        *(str(NOW + 5), NOW + 5.0, 1.8e9, True, False, None, [NOW], {}),
        *(-1, 0, 2**63, 10**31),
    ],
)
def test_j9_a_time_is_whole_seconds_within_reason(
    name: str, value: object, claims: Claims, sign: Sign, check: Check
) -> None:
    with pytest.raises(InvalidToken, match=r"^(exp|iat): expected"):
        check(sign({**claims, name: value}))


@pytest.mark.parametrize("name", ["exp", "iat"])
@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e400", "9" * 40])
def test_j9_a_time_that_is_no_number_is_refused(
    name: str, literal: str, claims: Claims, sign: Sign, check: Check
) -> None:
    raw = json.dumps({**claims, name: "HERE"}).replace('"HERE"', literal).encode()
    with pytest.raises(InvalidToken, match="claims: expected"):
        check(sign(raw))


@pytest.mark.parametrize("name", ["exp", "iat"])
def test_j9_a_time_must_be_there(name: str, claims: Claims, sign: Sign, check: Check) -> None:
    with pytest.raises(InvalidToken, match=f"{name}: expected whole seconds since 1970, found not"):
        check(sign({**claims, name: ...}))


@pytest.mark.parametrize(
    ("iat", "exp", "now", "accepted"),
    [
        (NOW, NOW + 900, NOW + 959, True),
        (NOW, NOW + 900, NOW + 960, False),
        (NOW, NOW + 900, NOW + 961, False),
        (NOW, NOW + 900, NOW - 61, False),
        (NOW, NOW + 900, NOW - 60, True),
        (NOW, NOW + 900, NOW - 59, True),
        (NOW, NOW + 3599, NOW, True),
        (NOW, NOW + 3600, NOW, True),
        (NOW, NOW + 3601, NOW, False),
        (NOW, NOW + 1, NOW, True),
        (NOW, NOW, NOW, False),
        (NOW, NOW - 1, NOW, False),
    ],
)
def test_j9_times_hold_to_the_second(
    iat: int, exp: int, now: int, accepted: bool, claims: Claims, sign: Sign, check: Check
) -> None:
    token = sign({**claims, "iat": iat, "exp": exp})
    if accepted:
        assert check(token, now=now).exp == exp
    else:
        with pytest.raises(InvalidToken, match=r"^(exp|iat): expected"):
            check(token, now=now)


def test_j9_an_nbf_is_heeded(claims: Claims, sign: Sign, check: Check) -> None:
    check(sign({**claims, "nbf": NOW + 60}))
    for later in (NOW + 61, 2**63, str(NOW), 1.5, True, None):
        with pytest.raises(InvalidToken, match="nbf: expected"):
            check(sign({**claims, "nbf": later}))


ELSEWHERE: list[tuple[str, object]] = [
    ("iss", "https://tokens.example.com/"),
    ("iss", "https://tokens.example.co"),
    ("iss", "https://tokens.example.com.evil.example"),
    ("iss", "https://Tokens.example.com"),
    ("iss", "http://tokens.example.com"),
    ("iss", ["https://tokens.example.com"]),
    ("iss", None),
    ("iss", ...),
    ("aud", ["https://ingest.example.com"]),
    ("aud", ["https://ingest.example.com", "https://other.example.com"]),
    ("aud", "https://ingest.example"),
    ("aud", "https://ingest.example.com/"),
    ("aud", "https://other.example.com https://ingest.example.com"),
    ("aud", "https://other.example.com"),
    ("aud", ""),
    ("aud", []),
    ("aud", ...),
    ("client_id", "su_another"),
    ("client_id", ...),
    ("sub", "su_another"),
    ("sub", ...),
    ("sub", 7),
    ("jti", ...),
    ("jti", "0199F0A0-1111-7222-8333-444444444444"),
    ("jti", "0199f0a0111172228333444444444444"),
    ("jti", "{0199f0a0-1111-7222-8333-444444444444}"),
    ("jti", "0199f0a0-1111-7222-8333-444444444444\n"),
    ("scope", ...),
    ("scope", ["ingest:write"]),
    ("scope", "ingest:write  search:read"),
    ("scope", " ingest:write"),
    ("scope", "ingest:write\tsearch:read"),
    ("scope", 'ingest:"write"'),
    ("scope", "ingest:wr\xefte"),
    ("service_user", ""),
    ("service_user", ...),
    ("service_user", "vkyc\r\nX-Evil: 1"),
    ("source_system", ""),
    ("source_system", ["vkyc"]),
    ("act", "su_minter"),
    ("act", {}),
    ("act", {"sub": ""}),
    ("act", None),
]


@pytest.mark.parametrize(("name", "value"), ELSEWHERE)
def test_j10_a_claim_that_does_not_fit_is_refused_by_name(
    name: str, value: object, claims: Claims, sign: Sign, check: Check
) -> None:
    named = "client_id" if value == "su_another" else name
    with pytest.raises(InvalidToken, match=f"^{named}: (sub: )?expected .*, found "):
        check(sign({**claims, name: value}))


@pytest.mark.parametrize(
    "typ",
    ["JWT", "at+JWT", "AT+JWT", "application/at+jwt", "at+jwt ", "secevent+jwt", "", None, ...],
)
def test_j10_typ_is_at_jwt_and_nothing_else(
    typ: object, claims: Claims, sign: Sign, check: Check
) -> None:
    with pytest.raises(InvalidToken, match="typ"):
        check(sign(claims, {"typ": typ}))


def test_j10_the_key_of_staging_opens_nothing_in_production(
    claims: Claims, sign: Sign, check: Check, rsa_key: RSAPrivateKey, other_key: RSAPrivateKey
) -> None:
    with pytest.raises(InvalidToken, match="published keys"):
        check(sign(claims, key=other_key))
    with pytest.raises(InvalidToken, match="signature: expected one by key"):
        check(sign(claims, {"kid": thumbprint(rsa_key.public_key())}, key=other_key))


@pytest.mark.parametrize("value", ["0", "1", "n-1", "n", "n+1", "s+n"])
def test_j12_no_other_number_is_the_signature(
    value: str, claims: Claims, sign: Sign, check: Check, rsa_key: RSAPrivateKey
) -> None:
    token = sign(claims)
    signing_input, _, encoded = token.rpartition(".")
    n = rsa_key.public_key().public_numbers().n
    s = int.from_bytes(base64url_decode(encoded), "big")
    number = {"0": 0, "1": 1, "n-1": n - 1, "n": n, "n+1": n + 1, "s+n": s + n}[value]
    for size in {256, 257, max(1, (number.bit_length() + 7) // 8)}:
        if number < 256**size:
            signature = base64url_encode(number.to_bytes(size, "big"))
            with pytest.raises(InvalidToken, match="signature"):
                check(f"{signing_input}.{signature}")


def test_a_refusal_keeps_to_the_characters_of_a_description(
    claims: Claims, sign: Sign, check: Check
) -> None:
    with pytest.raises(InvalidToken) as refused:
        check(sign({**claims, "aud": 'a"b\\c\r\nd\xe9' + "e" * 1000}))
    assert str(refused.value).startswith(
        "aud: expected 'https://ingest.example.com', found 'a?b?c??d?eee"
    )
    assert len(str(refused.value)) < 200
