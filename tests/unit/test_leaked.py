"""What `credentials leaked` takes for a secret, in text of any kind and size."""

import base64
import io

import pytest

from keys.client_secret import checksum
from service.cli import leaked


def test_a_text_that_only_begins_like_basic_is_not_decoded_at_each_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else a megabyte of it would take a second."""
    secret = f"pvs_{'a' * 43}{checksum('a' * 43)}"
    header = base64.b64encode(f"su_{'b' * 24}:{secret}".encode())
    text = b"c3Vf" * 100_000
    decoded: list[bytes] = []

    def counted(encoded: bytes) -> bytes:
        decoded.append(encoded)
        return base64.b64decode(encoded)

    monkeypatch.setattr("service.cli.leaked.b64decode", counted)
    found = leaked.secrets_in(io.BytesIO(text + header + text))
    assert list(found.values()) == [f"{secret[:8]}..."]
    assert decoded == [header]
