"""A record has one encoding, the one written down, and another implementation agrees with it."""

import hashlib
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec
import pytest
import rfc8785
from hypothesis import given
from hypothesis import strategies as st

from service.authority.audit.leaf import MAX_INTEGER, Leaf, NotEncodable
from service.authority.audit.merkle import leaf_hash
from service.authority.audit.record import Action, AuditRecord, Outcome, personal
from service.authority.model import ClientAddress

WRITTEN_DOWN = Path(__file__).parents[2] / "deploy" / "decisions" / "audit-log-encoding.md"

EXAMPLE = Leaf(
    action="token.issue",
    actor=None,
    actor_credential_id=None,
    actor_id=None,
    aud="https://ingest.example.com",
    commit_order="281474976711656",
    credential_id="cr_example",
    details={},
    exp=1_800_000_900,
    iat=1_800_000_000,
    id=UUID("01a31c5c-5b00-7000-8000-000000000001"),
    jti=None,
    kid="example",
    occurred_at=None,
    outcome="success",
    personal_sha256=bytes(range(32)),
    reason=None,
    recorded_at=1_800_000_000_123_456,
    repeats=1,
    request_id="r-1",
    scope="ingest:write",
    service_user="vkyc-prod",
    service_user_id="su_example",
    signing_input_sha256=bytes(range(32, 64)),
    source_system="vkyc",
    version=3,
)

texts = st.text(st.characters(exclude_categories=["Cs"]))
integers = st.integers(-MAX_INTEGER, MAX_INTEGER)
names = st.text(st.characters(max_codepoint=127), max_size=8)
values = st.recursive(
    st.none() | st.booleans() | integers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=4),
    max_leaves=10,
)
digests = st.none() | st.binary(min_size=32, max_size=32)
leaves = st.builds(
    Leaf,
    commit_order=st.integers(1, 2**63 - 1).map(str),
    details=st.dictionaries(names, values, max_size=4),
    personal_sha256=digests,
    signing_input_sha256=digests,
    v=st.just(1),
    **dict.fromkeys(("action", "outcome", "request_id"), texts),
    **dict.fromkeys(
        (
            *("actor", "actor_credential_id", "actor_id", "aud", "credential_id", "kid", "reason"),
            *("scope", "service_user", "service_user_id", "source_system"),
        ),
        st.none() | texts,
    ),
    **dict.fromkeys(("exp", "iat", "occurred_at", "version"), st.none() | integers),
    **dict.fromkeys(("recorded_at", "repeats"), integers),
)


@given(leaves)
def test_another_implementation_of_rfc_8785_encodes_a_leaf_to_the_same_bytes(leaf: Leaf) -> None:
    assert leaf.encode() == rfc8785.dumps(msgspec.to_builtins(leaf))


@given(leaves)
def test_a_leaf_can_be_read_back_whole(leaf: Leaf) -> None:
    assert msgspec.json.decode(leaf.encode(), type=Leaf) == leaf


@given(leaves, st.randoms(use_true_random=False))
def test_the_order_in_which_details_are_kept_does_not_matter(leaf: Leaf, random: Any) -> None:
    items = list(leaf.details.items())
    random.shuffle(items)
    assert msgspec.structs.replace(leaf, details=dict(items)).encode() == leaf.encode()


def test_the_example_that_is_written_down_is_what_the_code_does() -> None:
    block = re.search(r"```\n(.*)```", WRITTEN_DOWN.read_text(), re.DOTALL)
    assert block is not None
    example, hashed = block[1].split("\n\n")
    assert EXAMPLE.encode().decode() == example.replace("\n", "")
    assert leaf_hash(EXAMPLE.encode()).hex() == hashed.strip()


def test_every_member_is_written_down_and_no_other() -> None:
    rows = re.findall(r"^\| (`.*?) \|", WRITTEN_DOWN.read_text(), re.MULTILINE)
    written = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert written == set(Leaf.__struct_fields__)


@pytest.mark.parametrize("name", [name for name in Leaf.__struct_fields__ if name != "v"])
def test_every_member_changes_the_leaf(name: str) -> None:
    another: Any = {"another": 1} if name == "details" else "another"
    changed = msgspec.structs.replace(EXAMPLE, **{name: another})
    assert changed.encode() != EXAMPLE.encode()


NOT_CANONICAL: list[dict[Any, Any]] = [
    {"a": 1.0},
    {"a": [{"b": float("nan")}]},
    {"a": MAX_INTEGER + 1},
    {"a": {"b": -MAX_INTEGER - 1}},
    {"é": 1},
    {"a": {"\U0001f600": 1}},
    {1: "a"},
]


@pytest.mark.parametrize("details", [*NOT_CANONICAL, {"a": b"bytes"}, {"a": {1, 2}}])
def test_what_has_no_canonical_form_is_refused(details: dict[str, Any]) -> None:
    with pytest.raises(NotEncodable):
        msgspec.structs.replace(EXAMPLE, details=details).encode()


@pytest.mark.parametrize("details", NOT_CANONICAL)
def test_no_record_can_be_made_that_would_stop_the_log(details: dict[str, Any]) -> None:
    """Whoever writes it, and before anything is committed."""
    record = AuditRecord(id=EXAMPLE.id, action=Action.AUDIT_QUERY, outcome=Outcome.SUCCESS)
    with pytest.raises(NotEncodable):
        msgspec.structs.replace(record, details=details)
    with pytest.raises(NotEncodable):
        AuditRecord(id=EXAMPLE.id, action="a.b", outcome=Outcome.SUCCESS, details=details)


def test_a_record_may_hold_what_the_store_gets_as_text() -> None:
    details = {"since": datetime(2027, 1, 31, tzinfo=UTC), "jti": EXAMPLE.id, "is": Outcome.FAILED}
    AuditRecord(id=EXAMPLE.id, action="a.b", outcome=Outcome.SUCCESS, details=details)


def test_nothing_personal_is_in_the_leaf_but_its_digest_can_be_recomputed() -> None:
    origin = ClientAddress(address="192.0.2.7", user_agent="curl/8 \u001fé", request_id="r-1")
    fields = personal(origin, resource="urn:x", department="retail")
    values = rfc8785.dumps(["192.0.2.7", "curl/8 \u001fé", "urn:x", "retail"])
    assert fields["personal_sha256"] == hashlib.sha256(fields["salt"] + values).digest()
    leaf = msgspec.structs.replace(EXAMPLE, personal_sha256=fields["personal_sha256"])
    assert not any(word in leaf.encode() for word in (b"192.0.2.7", b"curl", b"urn:x", b"retail"))
