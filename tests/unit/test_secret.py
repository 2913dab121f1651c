"""A secret shows itself only to `reveal()`."""

import copy
import json
import pickle

import msgspec
import pytest

from keys.secret import Secret

CANARY = "canary-5f0c"


def test_a_secret_reveals_what_it_was_given() -> None:
    assert Secret(CANARY).reveal() == CANARY


def test_no_way_of_printing_a_secret_shows_it() -> None:
    class Holder(msgspec.Struct):
        secret: Secret

    secret = Secret(CANARY)
    shown = [repr(secret), str(secret), f"{secret}", f"{secret!r:>40}", "%s" % secret]  # noqa: UP031
    shown += [format(secret, ">40"), repr(Holder(secret=secret)), repr([secret])]
    assert not any(CANARY in text for text in shown)


@pytest.mark.parametrize("encode", [pickle.dumps, copy.deepcopy, json.dumps, msgspec.json.encode])
def test_a_secret_cannot_be_serialized_or_copied(encode: object) -> None:
    assert callable(encode)
    with pytest.raises(TypeError) as refusal:
        encode(Secret(CANARY))
    assert CANARY not in str(refusal.value)


def test_secrets_compare_by_value_and_only_with_secrets() -> None:
    assert Secret(CANARY) == Secret(CANARY)
    assert Secret(CANARY) != Secret("other")
    assert Secret(CANARY) != CANARY
    assert len({Secret(CANARY), Secret(CANARY)}) == 1
