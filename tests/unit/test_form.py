"""The form of the token endpoint is read one way, or refused in words."""

from urllib.parse import parse_qsl, urlencode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.authority.errors import OAuthErrorCode
from service.http.token import MAX_PARAMETERS, Malformed, form_decode, parse_form

# What may travel: any text but control characters.
texts = st.text(
    st.characters(codec="utf-8", exclude_characters=[*map(chr, range(32)), "\x7f"]), max_size=30
)


def refused(body: bytes) -> Malformed:
    with pytest.raises(Malformed) as refusal:
        parse_form(body)
    return refusal.value


@given(parameters=st.dictionaries(texts, texts, max_size=MAX_PARAMETERS))
def test_what_a_browser_or_library_encodes_is_read_as_it_was(parameters: dict[str, str]) -> None:
    read = parse_form(urlencode(parameters).encode("ascii"))
    # RFC 6749 §3.1: a parameter without a value is as if it had not been sent.
    assert read == {name: value for name, value in parameters.items() if value}


@given(text=texts)
def test_raw_utf8_and_escapes_in_either_case_mean_the_same(text: str) -> None:
    for form in ("%%%02x", "%%%02X"):
        assert form_decode("".join(form % byte for byte in text.encode("utf-8")).encode()) == text
    raw = text.replace("%", "%25").replace("+", "%2B").encode("utf-8")
    assert form_decode(raw) == text


@given(body=st.binary(max_size=200))
def test_any_bytes_are_read_as_the_standard_library_does_or_refused(body: bytes) -> None:
    try:
        form = parse_form(body)
    except Malformed:
        return
    assert form == dict(parse_qsl(body.decode("utf-8")))
    everything = "".join((*form.keys(), *form.values()))
    assert not any(character < " " or character == "\x7f" for character in everything)


@pytest.mark.parametrize("bad", [b"%", b"%4", b"%G1", b"%1g", b"%%41", b"a%", b"%-1", b"%u0041"])
def test_a_bad_escape_is_refused(bad: bytes) -> None:
    assert "percent" in refused(b"scope=" + bad).description
    assert "percent" in refused(bad + b"=x").description


@pytest.mark.parametrize(
    "bad", [b"%ff", b"\xff", b"%c0%80", b"%ed%a0%80", b"%f4%90%80%80", b"%c3", b"\xc3"]
)
def test_bytes_that_are_no_utf8_are_refused(bad: bytes) -> None:
    assert "UTF-8" in refused(b"scope=a" + bad).description


@pytest.mark.parametrize("number", [*range(32), 127])
def test_control_characters_are_refused_raw_or_escaped(number: int) -> None:
    for bad in (bytes([number]), b"%%%02x" % number):
        assert "control characters" in refused(b"scope=a" + bad).description


@given(
    name=st.sampled_from(["grant_type", "client_id", "client_secret", "scope", "unknown"]),
    values=st.tuples(texts, texts),
)
def test_no_parameter_may_be_given_twice(name: str, values: tuple[str, str]) -> None:
    body = urlencode([(name, value) for value in values]).encode("ascii")
    refusal = refused(body)
    assert refusal.code is OAuthErrorCode.INVALID_REQUEST
    assert "twice" in refusal.description


def test_an_escaped_name_is_the_same_name() -> None:
    assert "twice" in refused(b"client_id=a&client%5Fid=b").description


def test_a_second_resource_is_an_invalid_target() -> None:
    # RFC 8707 §2.
    refusal = refused(b"resource=https://a.example&resource=https://b.example")
    assert refusal.code is OAuthErrorCode.INVALID_TARGET


def test_the_number_of_parameters_is_bounded() -> None:
    pairs = [f"p{number}=1" for number in range(MAX_PARAMETERS + 1)]
    assert len(parse_form("&".join(pairs[:-1]).encode())) == MAX_PARAMETERS
    assert str(MAX_PARAMETERS) in refused("&".join(pairs).encode()).description


def test_a_refusal_repeats_nothing_of_what_was_sent() -> None:
    canary = b"canary-2f60"
    for body in (b"client_secret=%ff" + canary, canary + b"=1&" + canary + b"=2", canary + b"%"):
        assert "canary" not in refused(body).description
