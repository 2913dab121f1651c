"""Whatever was done to an export or an archive, the offline check says so in words, and soon."""

import gzip
import hashlib
import json
import re
from base64 import b64encode
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from itertools import repeat
from pathlib import Path
from typing import Any, TypeAlias
from uuid import UUID

import click
import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from keys.checkpoint import Checkpoint, NoteSigner
from service.authority.audit import Outcome, StoredRecord
from service.authority.audit.export import LogHeader, Proven
from service.authority.audit.leaf import Leaf
from service.authority.audit.merkle import Frontier, Node, leaf_hash
from service.authority.audit.verify import Flaw, aligned_levels, complete_root
from service.cli.audit_offline import Pinned, verify_files
from service.http.export import ndjson
from service.store.archive_files import publish, staged_archive
from service.store.whole_lines import LONGEST, TooLong, whole_lines

ORIGIN = "tokens.example/audit/1"
MONTH = "2026-11"
COUNT = 27
BEGIN = datetime(2026, 10, 31, 12, tzinfo=UTC)
APART = timedelta(days=1, hours=6)
# Index -> when its id was drawn: calls that were reported days after they were made.
LATE = {
    1: datetime(2026, 10, 30, tzinfo=UTC),
    3: datetime(2026, 10, 31, tzinfo=UTC),
    25: datetime(2026, 11, 30, tzinfo=UTC),
}
SIGNER = NoteSigner(ORIGIN, Ed25519PrivateKey.from_private_bytes(bytes(32)))
KEPT = 15
"""The size of a checkpoint that was kept outside."""

Line: TypeAlias = dict[str, Any]


def record(index: int) -> tuple[StoredRecord, bytes, list[str]]:
    """Return a record as it is exported, its leaf, and what is personal of it."""
    recorded_at = BEGIN + index * APART + timedelta(microseconds=1)
    milliseconds = int(LATE.get(index, recorded_at).timestamp() * 1000)
    record_id = UUID(int=milliseconds << 80 | 7 << 76 | 2 << 62 | index)
    is_issuance = index % 3 == 0
    salt = hashlib.md5(str(index).encode(), usedforsecurity=False).digest()
    values = [f"192.0.2.{index}", "client\u2028\x85é", f'documents/"{index}"', "retail"]
    personal = hashlib.sha256(salt + msgspec.json.encode(values)).digest()
    token = hashlib.sha256(str(index).encode()).digest()
    common: dict[str, Any] = {
        "action": "token.issue" if is_issuance else "document.ingest",
        "outcome": "success",
        "reason": None,
        "service_user_id": "su_abcdefghijklmnopqrstuvwx",
        "service_user": "vkyc-prod",
        "source_system": "vkyc",
        "version": 3,
        "credential_id": "cr_abcdefghijklmnopqrstuvwx",
        "actor_id": None,
        "actor": None,
        "actor_credential_id": None,
        "kid": "kid",
        "iat": 1_800_000_000 if is_issuance else None,
        "exp": 1_800_000_900 if is_issuance else None,
        "aud": "https://ingest.example",
        "scope": "ingest:write",
        "request_id": f"r-{index}",
        "repeats": 1,
        "details": {"path": "ä/b", "n": [index, {"z": None}]},
    }
    leaf = Leaf(
        id=record_id,
        commit_order=str((1 << 48) + index),
        recorded_at=(recorded_at - datetime.fromtimestamp(0, UTC)) // timedelta(microseconds=1),
        occurred_at=None,
        jti=None if is_issuance else UUID(int=index + 1),
        signing_input_sha256=token,
        personal_sha256=personal,
        **common,
    ).encode()
    exported_common: dict[str, Any] = {**common, "outcome": Outcome.SUCCESS}
    stored = StoredRecord(
        id=record_id,
        cursor=f"{(1 << 48) + index}.{record_id}",
        log_origin=ORIGIN,
        leaf_index=index,
        leaf_hash=leaf_hash(leaf),
        recorded_at=recorded_at,
        occurred_at=None,
        jti=record_id if is_issuance else UUID(int=index + 1),
        signing_input_sha256=token.hex(),
        client_address=values[0],
        user_agent=values[1],
        resource=values[2],
        department=values[3],
        personal_salt=salt.hex(),
        personal_sha256=personal.hex(),
        **exported_common,
    )
    return stored, leaf, values


RECORDS = [record(index) for index in range(COUNT)]
HASHES = [leaf_hash(leaf) for _, leaf, _ in RECORDS]


def note_of(hashes: Sequence[bytes]) -> bytes:
    frontier = Frontier()
    for each in hashes:
        frontier.append(each)
    return Checkpoint(origin=ORIGIN, size=len(hashes), root=frontier.root()).signed(SIGNER)


NOTE = note_of(HASHES)


def roots(start: int, stop: int, hashes: Sequence[bytes] = HASHES) -> list[Node]:
    """Return the nodes over these neighbours."""
    nodes: list[Node] = []
    for level in aligned_levels(start, stop):
        leaves = hashes[start : start + (1 << level)]
        nodes.append(Node(level=level, index=start >> level, hash=complete_root(leaves)))
        start += 1 << level
    return nodes


def exported(indexes: Sequence[int]) -> bytes:
    """Write an export of these records."""
    header = LogHeader(log_origin=ORIGIN, checkpoint=NOTE.decode())
    stops = [*indexes, COUNT]
    lines = [Proven(line=header, proof=roots(0, stops[0]))]
    lines += [
        Proven(line=RECORDS[index][0], proof=roots(index + 1, stop))
        for index, stop in zip(indexes, stops[1:], strict=True)
    ]
    return ndjson(lines)


WHOLE = exported(range(COUNT))
SOME = exported([0, 1, 5, 12, 26])

IN_MONTH = [2, *range(4, 26)]


def archived(directory: Path, indexes: Sequence[int] = IN_MONTH) -> Path:
    """Write an archive of these records, as if they were all of their month; return its
    manifest."""
    with staged_archive(directory, ORIGIN, MONTH) as writer:
        at = 0
        for index in indexes:
            for node in roots(at, index):
                writer.proof(node)
            stored, leaf, values = RECORDS[index]
            writer.record(index, HASHES[index], leaf)
            writer.personal(index, bytes.fromhex(stored.personal_salt or ""), values)
            at = index + 1
        for node in roots(at, COUNT):
            writer.proof(node)
    return publish(writer.finish(NOTE))


class Check:
    """Runs the offline check of a file, and says how it ended: the flaws, or the refusal."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __call__(self, path: Path, *outside: bytes) -> set[Flaw] | str:
        notes = [(f"kept {number}", note) for number, note in enumerate(outside)]
        pinned = Pinned(keys={ORIGIN: SIGNER.verifier}, unverified_notes=notes)
        try:
            verdict = verify_files([path], pinned)
        except click.ClickException as refused:
            return refused.message
        return {finding.flaw for report in verdict.reports for finding in report.findings}

    def export(self, content: bytes, *outside: bytes) -> set[Flaw] | str:
        path = self.directory / "export.ndjson"
        path.write_bytes(content)
        return self(path, *outside)


@pytest.fixture
def check(tmp_path: Path) -> Check:
    return Check(tmp_path)


@pytest.fixture(scope="module")
def module_check(tmp_path_factory: pytest.TempPathFactory) -> Check:
    return Check(tmp_path_factory.mktemp("hostile"))


def edited(content: bytes, old: bytes, new: bytes) -> bytes:
    assert content.count(old) >= 1, old
    return content.replace(old, new, 1)


def test_what_nobody_touched_is_whole(check: Check, tmp_path: Path) -> None:
    assert check.export(WHOLE, note_of(HASHES[:KEPT])) == set()
    assert check.export(WHOLE.removesuffix(b"\n")) == set()
    assert check.export(SOME) == set()
    assert check(archived(tmp_path)) == set()


# What was never signed


def invented(index: int) -> Proven:
    stored, leaf, _ = RECORDS[index]
    leaf = edited(leaf, b'"scope":"ingest:write"', b'"scope":"everything"')
    return Proven(line=replace(stored, scope="everything", leaf_hash=leaf_hash(leaf)))


@pytest.mark.parametrize("genuine", [0, KEPT])
def test_a_file_that_never_has_the_size_of_its_own_checkpoint_is_not_whole(
    check: Check, genuine: int
) -> None:
    """Invented records, and a proof whose last node is over the end of the log and more."""
    header = Proven(line=LogHeader(log_origin=ORIGIN, checkpoint=NOTE.decode()))
    known = [Proven(line=stored) for stored, _, _ in RECORDS[:genuine]]
    forged = invented(genuine)
    at, proof = genuine + 1, list[Node]()
    while at < COUNT:
        level = (at & -at).bit_length() - 1
        proof.append(Node(level=level, index=at >> level, hash=bytes(32)))
        at += 1 << level
    assert at > COUNT
    content = ndjson([header, *known, replace(forged, proof=proof)])
    kept = [note_of(HASHES[:KEPT])] if genuine else []
    assert check.export(content, *kept) == {Flaw.REWRITTEN}
    # One that cannot be compared with does not make it less wrong.
    assert check.export(content, note_of(HASHES[: COUNT - 1])) == {Flaw.REWRITTEN}


def test_nothing_may_stand_behind_what_was_signed(check: Check, tmp_path: Path) -> None:
    more = Node(level=0, index=COUNT, hash=bytes(32))
    last = Proven(line=RECORDS[-1][0], proof=[more])
    content = b"".join(WHOLE.splitlines(keepends=True)[:-1]) + ndjson([last])
    assert check.export(content) == {Flaw.REWRITTEN}
    manifest = archived(tmp_path)
    node = msgspec.json.encode(more) + b"\n"
    repack(manifest, "proof", lambda lines: lines + node)
    assert check(manifest) == {Flaw.REWRITTEN}
    # Neither may it be over less, or over nothing.
    repack(manifest, "proof", lambda _: b"")
    repack(manifest, "records", lambda _: b"")
    assert Flaw.MISSING in flaws(check(manifest))


def flaws(ended: set[Flaw] | str) -> set[Flaw]:
    assert isinstance(ended, set), ended
    return ended


# One spelling


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"action":"token.issue"', b'"action":"key.destroy","action":"token.issue"'),
        (b'"n":[0,', b'"n":"nothing","n":[0,'),
        (b'"n":[0,', b'"n":[0.0,'),
        (b'"n":[0,', b'"n": [0,'),
        (b'"scope":"ingest:write"', b'"scope":"ingest\\u003awrite"'),
        (b'.000001Z"', b'.0000010Z"'),
        (b'"repeats":1,', b'"repeats":1.0,'),
        (
            b'"client_address":"192.0.2.0"',
            b'"client_address":"192.0.2.9","client_address":"192.0.2.0"',
        ),
        (b'}\n{"id"', b'}\r\n{"id"'),
        (b'}\n{"id"', b'}\r{"id"'),
        (b'}\n{"id"', b',"proof":[]}\n{"id"'),
        (b'","cursor"', b'",\r"cursor"'),
        (b'"jti":"', b'"jti":null,"jti":"'),
        (b"\n{", b"\n\n{"),
    ],
)
def test_a_line_that_could_be_read_in_two_ways_was_edited(
    check: Check, old: bytes, new: bytes
) -> None:
    at = WHOLE.index(b"\n")
    content = WHOLE[:at] + edited(WHOLE[at:], old, new)
    assert Flaw.EDITED in flaws(check.export(content))


@pytest.mark.parametrize("member", ["personal_salt", "personal_sha256", "signing_input_sha256"])
def test_a_digest_has_one_spelling(check: Check, member: str) -> None:
    found = re.search(rf'"{member}":"([0-9a-f]+)"'.encode(), WHOLE)
    assert found is not None
    digits = found[1]
    for other in (digits.upper(), digits[:2] + b" " + digits[2:]):
        assert other != digits
        assert flaws(check.export(edited(WHOLE, digits, other))) >= {Flaw.EDITED}


def test_an_issuance_shows_its_jti(check: Check) -> None:
    content = re.sub(
        rb'"jti":"[^"]+","kid":"kid","iat":1', b'"jti":null,"kid":"kid","iat":1', WHOLE
    )
    assert content != WHOLE
    assert Flaw.EDITED in flaws(check.export(content))


def test_a_header_has_one_spelling_too(check: Check) -> None:
    for old, new in (
        (b'{"log_origin":', b'{"log_origin":"other.example/audit/1","log_origin":'),
        (b'"checkpoint":', b'"checkpoint":"none","checkpoint":'),
        (b'"checkpoint":"tokens', b'"checkpoint":"\\u0074okens'),
        (b'\\n"}\n', b'\\n"}\r\n'),
    ):
        assert "makes no sense" in str(check.export(edited(WHOLE, old, new)))


# Archives


def repack(manifest: Path, which: str, change: Callable[[bytes], bytes]) -> None:
    """Change the lines of a file, and make the manifest fit."""
    said = json.loads(manifest.read_text())
    name = said["personal"] if which == "personal" else said["files"][which]["name"]
    path = manifest.with_name(name)
    path.write_bytes(gzip.compress(change(gzip.decompress(path.read_bytes()))))
    if which != "personal":
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        manifest.write_text(manifest.read_text().replace(said["files"][which]["sha256"], digest))


def test_a_record_of_the_month_that_is_there_as_a_hash_only_was_left_out(
    check: Check, tmp_path: Path
) -> None:
    for left_out in (8, 9, 23):
        others = [index for index in IN_MONTH if index != left_out]
        assert check(archived(tmp_path, others)) == {Flaw.MISSING}
    # At both ends records of another month stand between: of these the file alone cannot tell.
    assert check(archived(tmp_path, [index for index in IN_MONTH if index not in (5, 25)])) == set()


def test_a_record_of_another_month_does_not_belong_there(check: Check, tmp_path: Path) -> None:
    assert check(archived(tmp_path, [2, 3, *IN_MONTH[1:]])) == {Flaw.INSERTED}


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (b'"records": 23', b'"records": 22', {Flaw.EDITED}),
        (b'"first_index": 2', b'"first_index": 0', {Flaw.EDITED}),
        (b'"last_index": 25', b'"last_index": 26', {Flaw.EDITED}),
        (b'"records": 23', b'"records": -1', "no manifest"),
        (b'"records": 23', b'"records": 1' + b"0" * 40, "no manifest"),
        (b'"records": 23', b'"records": 22,\n  "records": 23', "no manifest"),
        (b'"month": "2026-11"', b'"month": "2026-10"', "no manifest"),
        (b'"month": "2026-11"', b'"month": "x"', "no manifest"),
        (b'"personal": "', b'"personal": "../', "no manifest"),
        (b'"personal": "', b'"personal": "\\u0000', "no manifest"),
        (b'"name": "tokens', b'"name": "/tokens', "no manifest"),
        (b'"proof": {', b'"other": {', "no manifest"),
        (b'"checkpoint": "', b'"checkpoint": "\\ud800', "no manifest"),
        (b'"checkpoint": "', b'"checkpoint": "\xff', "no manifest"),
        (b'"month": "2026-11"', b'"month": ' + b"[" * 100_000, "no manifest"),
    ],
)
def test_what_a_manifest_says_is_compared(
    check: Check, tmp_path: Path, old: bytes, new: bytes, said: set[Flaw] | str
) -> None:
    manifest = archived(tmp_path)
    manifest.write_bytes(edited(manifest.read_bytes(), old, new))
    ended = check(manifest)
    assert ended == said if isinstance(said, set) else str(said) in str(ended)


def test_a_manifest_with_the_name_of_another_month_is_of_none_of_its_records(
    check: Check, tmp_path: Path
) -> None:
    manifest = archived(tmp_path)
    for path in list(tmp_path.iterdir()):
        path.rename(path.with_name(path.name.replace(MONTH, "2026-10")))
    moved = manifest.with_name(manifest.name.replace(MONTH, "2026-10"))
    moved.write_text(moved.read_text().replace(MONTH, "2026-10"))
    assert Flaw.INSERTED in flaws(check(moved))


def test_personal_values_stand_once_and_where_they_belong(check: Check, tmp_path: Path) -> None:
    manifest = archived(tmp_path)
    invented = b'{"leaf_index":%d,"salt":"AAAA","values":["192.0.2.99","curl","","retail"]}\n'
    for index, behind in ((4, 2), (3, 1), (99, len(IN_MONTH)), (2, 1)):

        def insert(lines: bytes, index: int = index, behind: int = behind) -> bytes:
            whole = lines.splitlines(keepends=True)
            return b"".join([*whole[:behind], invented % index, *whole[behind:]])

        repack(manifest, "personal", insert)
        assert check(manifest) == {Flaw.PERSONAL}, (index, behind)
        archived(tmp_path)


def test_a_line_of_an_archive_has_one_spelling(check: Check, tmp_path: Path) -> None:
    for which, old, new in (
        ("records", b'{"leaf_index":4', b'{"leaf_index":3,"leaf_index":4'),
        ("records", b'"leaf":', b'"leaf":{"action":"none"},"leaf":'),
        ("records", b"}\n", b"}\r\n"),
        ("records", b"}\n", b"}\n\n"),
        ("proof", b'"index":', b'"index":7,"index":'),
        ("personal", b'"values":', b'"values":["none"],"values":'),
    ):
        manifest = archived(tmp_path)
        repack(manifest, which, lambda lines, old=old, new=new: edited(lines, old, new))
        assert check(manifest) == {Flaw.MISSING}, (which, new)


# Words, and soon


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"leaf_index":4', b'"leaf_index":' + b"9" * 4300),
        (b'"leaf_index":4', b'"leaf_index":-4'),
        (b'"details":{', b'"details":{"x":' + b"[" * 100_000 + b"]" * 100_000 + b","),
        (b'"details":{', b'"details":{"x":' + b"[" * 900 + b"]" * 900 + b","),
        (b'"details":{', b'"details":{"x":' + b"9" * 4000 + b","),
        (b'"details":{', b'"details":{"x":"\\ud800",'),
        (b'"scope":"', b'"scope":"\xff'),
        (b'"version":3', b'"version":' + b"9" * 40),
        (b'"id":"', b'"id":"zzz'),
        (b'"id":"', b'"id":"' + b"x" * 100_000),
        (b'"request_id":"', b'"' + b"x" * 100_000 + b'":1,"request_id":"'),
    ],
)
def test_what_no_record_holds_is_told_in_words(
    check: Check, tmp_path: Path, old: bytes, new: bytes
) -> None:
    at = WHOLE.index(b"\n")
    assert flaws(check.export(WHOLE[:at] + edited(WHOLE[at:], old, new)))
    manifest = archived(tmp_path)
    repack(manifest, "records", lambda lines: edited(lines, old, new))
    assert flaws(check(manifest))


def test_a_number_that_is_none_is_no_place_in_the_order_of_commits(
    check: Check, tmp_path: Path
) -> None:
    for digits in ("x", "9" * 5000):
        manifest = archived(tmp_path)
        order = f'"commit_order":"{(1 << 48) + 4}"'.encode()
        other = f'"commit_order":"{digits}"'.encode()
        repack(
            manifest, "records", lambda lines, order=order, other=other: edited(lines, order, other)
        )
        assert flaws(check(manifest)) == {Flaw.EDITED}


@pytest.mark.parametrize(
    ("level", "index", "digest"),
    [
        (-3, 0, bytes(32)),
        (63, 0, bytes(32)),
        (4000, 1, bytes(32)),
        (10**20, 1, bytes(32)),
        (62, 5, bytes(32)),
        (0, -1, bytes(32)),
        (0, 0, bytes(31)),
    ],
)
def test_a_node_that_no_tree_has_is_told_in_words(
    check: Check, tmp_path: Path, level: int, index: int, digest: bytes
) -> None:
    hash_ = b64encode(digest).decode()
    node = f'{{"level":{level},"index":{index},"hash":"{hash_}"}}'.encode()
    at = WHOLE.index(b"}\n")
    assert flaws(check.export(WHOLE[:at] + b',"proof":[' + node + b"]" + WHOLE[at:]))
    manifest = archived(tmp_path)
    repack(manifest, "proof", lambda lines: node + b"\n" + lines)
    assert flaws(check(manifest)) == {Flaw.MISSING}


def test_a_proof_of_many_nodes_is_one_finding(check: Check) -> None:
    node = msgspec.json.encode(Node(level=0, index=0, hash=bytes(32)))
    proof = b",".join(repeat(node, 40_000))
    at = WHOLE.index(b"}\n")
    content = WHOLE[:at] + b',"proof":[' + proof + b"]" + WHOLE[at:]
    assert len(content) < LONGEST
    assert flaws(check.export(content)) == {Flaw.EDITED}


def test_no_more_is_read_of_a_line_than_the_longest_has() -> None:
    read = 0

    def endless() -> Any:
        nonlocal read
        while True:
            read += 1 << 18
            yield b"x" * (1 << 18)

    with pytest.raises(TooLong):
        list(whole_lines(endless()))
    assert read <= LONGEST + (1 << 18)
    assert list(whole_lines([b"a", b"b\nc\nd", b"", b"\n", b"e"])) == [b"ab\nc\n", b"d\n", b"e"]


def test_a_line_without_an_end_is_named(check: Check, tmp_path: Path) -> None:
    blanks = b" " * (2 * LONGEST)
    said = check.export(WHOLE + blanks)
    assert f"From line {COUNT + 2} on it is no text" in str(said)
    manifest = archived(tmp_path)
    repack(manifest, "records", lambda lines: lines + blanks)
    assert Flaw.MISSING in flaws(check(manifest))


# At random


def mutations(content: bytes) -> st.SearchStrategy[bytes]:
    """Bytes that were changed, cut out, doubled, moved or put in, at some places."""
    place = st.integers(0, len(content))

    def mutated(steps: list[tuple[int, int, bytes, int]]) -> bytes:
        changed = content
        for start, length, put, kind in steps:
            taken = changed[start : start + length]
            rest = changed[start + length :]
            changed = changed[:start] + (put, b"", taken * 2, taken + put)[kind] + rest
        return changed

    put = st.one_of(
        st.binary(max_size=4),
        st.sampled_from([b"\n", b"\r", b",", b'"', b"0", b"null", b"{}", b"[", b" ", b"\\u0000"]),
    )
    step = st.tuples(place, st.integers(0, 400), put, st.integers(0, 3))
    small = st.tuples(place, st.integers(0, 1), put, st.integers(0, 3))
    return st.lists(st.one_of(small, step), min_size=1, max_size=3).map(mutated)


@settings(max_examples=300, deadline=None)
@given(content=st.one_of(mutations(WHOLE), mutations(SOME)))
def test_an_export_with_other_bytes_is_never_whole(module_check: Check, content: bytes) -> None:
    # The last line may lack its end.
    is_same = content in (WHOLE, WHOLE[:-1], SOME, SOME[:-1])
    assert bool(module_check.export(content)) is not is_same


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_an_archive_with_other_bytes_is_never_whole(module_check: Check, data: Any) -> None:
    manifest = archived(module_check.directory)
    said = json.loads(manifest.read_text())
    which = data.draw(st.sampled_from(["manifest", "packed", "records", "proof", "personal"]))
    if which in ("manifest", "packed"):
        names = [said["files"]["records"]["name"], said["files"]["proof"]["name"]]
        path = (
            manifest
            if which == "manifest"
            else manifest.with_name(data.draw(st.sampled_from(names)))
        )
        before = path.read_bytes()
        after = data.draw(mutations(before))
        path.write_bytes(after)
        is_same = before == after
    else:
        name = said["personal"] if which == "personal" else said["files"][which]["name"]
        before = gzip.decompress(manifest.with_name(name).read_bytes())
        after = data.draw(mutations(before))
        repack(manifest, which, lambda _: after)
        kept = set(before.splitlines(keepends=True))
        left = after.splitlines(keepends=True)
        # Lines of the personal file may be erased.
        is_same = after == before or (which == "personal" and kept >= set(left))
    ended = module_check(manifest)
    assert ended or is_same


PERSONAL = ("client_address", "user_agent", "resource", "department", "personal_salt")
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=5),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_an_export_with_another_value_is_never_whole(module_check: Check, data: Any) -> None:
    lines = [json.loads(line) for line in WHOLE.split(b"\n")[:-1]]
    line = data.draw(st.sampled_from(lines))
    before = dict(line)
    for member in data.draw(st.sets(st.sampled_from(sorted(line)), min_size=1, max_size=3)):
        other = data.draw(st.sampled_from(lines[1:]))
        line[member] = data.draw(st.one_of(VALUES, st.just(other.get(member))))
    is_erased = line == {**before, **dict.fromkeys(PERSONAL)}
    content = b"".join(map(spelt, lines))
    assert module_check.export(content) or content == WHOLE or is_erased


def spelt(line: Line) -> bytes:
    """Write a line as an export has it."""
    text = msgspec.json.encode(line)
    for end in "\x85\u2028\u2029":
        text = text.replace(end.encode(), b"\\u%04x" % ord(end))
    return text + b"\n"
