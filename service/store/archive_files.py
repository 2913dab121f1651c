"""Archives as files: `<origin>-<month>.json` and the three compressed files that it names.

Judges no record, and never leaves half an archive under its name.
"""

import gzip
import hashlib
import os
import re
import sys
import tempfile
from base64 import b64encode
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from fcntl import F_SETPIPE_SZ, fcntl
from itertools import chain
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any, Final, TypeVar

import msgspec
from msgspec import Raw

from keys.checkpoint import NoteVerifier
from service.authority.audit.archive import (
    NO_JSON,
    ArchivedFile,
    ArchivedFiles,
    ArchivedLine,
    Manifest,
    PersonalLine,
    Unreadable,
    check_archive,
)
from service.authority.audit.merkle import Node
from service.authority.audit.verify import Claim, Finding, Flaw, LogReport, collector_at_rest
from service.store import unpack
from service.store.whole_lines import LONGEST, whole_lines

# As much as Linux lets anybody set (fs.pipe-max-size): what is unpacked ahead.
_PIPE: Final = 1 << 20
_CHUNK: Final = 1 << 18
_RECORDS: Final = ".ndjson.gz"
_PROOF: Final = "-proof.ndjson.gz"
_PERSONAL: Final = "-personal.ndjson.gz"
_MANIFEST: Final = ".json"
_NOT_IN_A_NAME: Final = re.compile(r"[^A-Za-z0-9.-]+")

Line = TypeVar("Line")
Progress = Callable[[int, int], None]
"""Told how many records of how many are done."""


def archive_name(origin: str, month: str) -> str:
    """Return how the files of an archive begin."""
    return f"{_NOT_IN_A_NAME.sub('_', origin)}-{month}"


def manifest_path(path: Path) -> Path:
    """Return the manifest of an archive, of which `path` is any file."""
    for suffix in (_PROOF, _PERSONAL, _RECORDS):
        if path.name.endswith(suffix):
            return path.with_name(path.name.removesuffix(suffix) + _MANIFEST)
    return path


def read_manifest(path: Path) -> Manifest:
    """Read a manifest; raise Unreadable, also if it names other files than those of its archive."""
    try:
        with path.open("rb") as file:
            content = file.read(LONGEST)
        manifest = msgspec.json.decode(content, type=Manifest)
        if _written(manifest) != content:
            raise ValueError("one is written in another way")
    except (OSError, *NO_JSON) as error:
        raise Unreadable(f"{path} is no manifest of an archive ({error}).") from None
    name = archive_name(manifest.origin, manifest.month)
    named = (manifest.files.records.name, manifest.files.proof.name, manifest.personal)
    if named != (name + _RECORDS, name + _PROOF, name + _PERSONAL):
        raise Unreadable(f"{path} is no manifest of an archive (its files are not {name}…).")
    return manifest


def _written(manifest: Manifest) -> bytes:
    return msgspec.json.format(msgspec.json.encode(manifest)) + b"\n"


def verify_archive(
    path: Path,
    *,
    verifier: NoteVerifier,
    outside: Sequence[Claim],
    on_progress: Progress = lambda done, total: None,
) -> LogReport:
    """Check an archive without any database; raise Unreadable if it has no manifest."""
    manifest = read_manifest(path)
    records, proof = manifest.files.records, manifest.files.proof
    with collector_at_rest():
        report = check_archive(
            manifest,
            verifier=verifier,
            outside=outside,
            records=_counted(
                _lines(path.with_name(records.name), ArchivedLine), manifest.records, on_progress
            ),
            proof=chain.from_iterable(_lines(path.with_name(proof.name), Node)),
            personal=_personal_lines(path.with_name(manifest.personal)),
        )
    changed = [
        Finding(
            flaw=Flaw.EDITED, words=f"{file.name} is not the file that the archive was made of."
        )
        for file in (records, proof)
        if _sha256(path.with_name(file.name)) != file.sha256
    ]
    return msgspec.structs.replace(
        report, findings=[*report.findings, *changed], flaws=report.flaws + len(changed)
    )


class ArchiveWriter:
    """Writes the files of one archive where they are staged."""

    def __init__(self, directory: Path, origin: str, month: str, files: Sequence[Any]) -> None:
        self._directory = directory
        self._origin, self._month = origin, month
        self._name = archive_name(origin, month)
        self._records, self._proof, self._personal = files
        self.records = 0
        self._first = self._last = 0

    def record(self, leaf_index: int, leaf_hash: bytes, leaf: bytes) -> None:
        """Add a record; they come in the order of the log."""
        if not self.records:
            self._first = leaf_index
        self._last = leaf_index
        self.records += 1
        self._records.write(
            b'{"leaf_index":%d,"leaf_hash":"%s","leaf":%s}\n'
            % (leaf_index, b64encode(leaf_hash), leaf)
        )

    def personal(self, leaf_index: int, salt: bytes, values: Sequence[str]) -> None:
        """Add what is personal of a record: client address, user agent, resource, department."""
        line = PersonalLine(
            leaf_index=leaf_index, salt=salt, values=Raw(msgspec.json.encode(values))
        )
        self._personal.write(msgspec.json.encode(line) + b"\n")

    def proof(self, node: Node) -> None:
        """Add a hash over leaves that are not of this month."""
        self._proof.write(msgspec.json.encode(node) + b"\n")

    def finish(self, checkpoint: bytes) -> Path:
        """Make everything durable where it is staged, once its files are closed; return the
        manifest."""
        manifest = Manifest(
            origin=self._origin,
            month=self._month,
            records=self.records,
            first_index=self._first,
            last_index=self._last,
            checkpoint=checkpoint.decode(),
            files=ArchivedFiles(records=self._file(_RECORDS), proof=self._file(_PROOF)),
            personal=self._name + _PERSONAL,
        )
        path = self._directory / (self._name + _MANIFEST)
        path.write_bytes(_written(manifest))
        for suffix in (_RECORDS, _PROOF, _PERSONAL, _MANIFEST):
            _fsync(self._directory / (self._name + suffix))
        return path

    def _file(self, suffix: str) -> ArchivedFile:
        name = self._name + suffix
        sha256 = _sha256(self._directory / name)
        if sha256 is None:
            raise Unreadable(f"{name} cannot be read again.")
        return ArchivedFile(name=name, sha256=sha256)


@contextmanager
def staged_archive(
    directory: Path, origin: str, month: str
) -> Generator[ArchiveWriter, None, None]:
    """Open an archive to be written in a directory beside the others; see `publish`."""
    staging = directory / f".{archive_name(origin, month)}"
    staging.mkdir(mode=0o700, exist_ok=True)
    name = archive_name(origin, month)
    with ExitStack() as opened:
        files = [
            opened.enter_context(_compressed(staging / (name + suffix)))
            for suffix in (_RECORDS, _PROOF, _PERSONAL)
        ]
        yield ArchiveWriter(staging, origin, month, files)


def publish(staged_manifest: Path) -> Path:
    """Move a staged archive to where it belongs, its manifest last; return the manifest."""
    staging, directory = staged_manifest.parent, staged_manifest.parent.parent
    names = sorted(os.listdir(staging), key=lambda name: name.endswith(_MANIFEST))
    for name in names:
        os.replace(staging / name, directory / name)
    staging.rmdir()
    _fsync(directory)
    return directory / staged_manifest.name


@contextmanager
def _compressed(path: Path) -> Generator[gzip.GzipFile, None, None]:
    # Without name and time of day, the same lines are the same bytes.
    with (
        open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as raw,
        gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0, compresslevel=6) as file,
    ):
        yield file


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def _personal_lines(path: Path) -> Iterator[PersonalLine]:
    """Read what is left of the personal values: a file that is gone was erased."""
    return chain.from_iterable(_lines(path, PersonalLine)) if path.exists() else iter(())


def _lines(path: Path, kind: type[Line]) -> Iterator[Sequence[Line]]:
    """Read compressed lines, piece by piece; raise Unreadable where they end or make no sense."""
    decode, encode = msgspec.json.Decoder(kind).decode_lines, msgspec.json.Encoder().encode_lines
    line = 1
    try:
        for lines in whole_lines(_unpacked(path)):
            decoded = decode(lines)
            # What can be read in two ways is not what was written.
            if encode(decoded) != lines:
                raise ValueError("lines are written in another way")
            yield decoded
            line += len(decoded)
    except (OSError, EOFError, *NO_JSON) as error:
        raise Unreadable(
            f"{path.name} cannot be read to its end (line {line:,} or one behind it: {error})."
        ) from None


def _counted(
    pieces: Iterable[Sequence[Line]], total: int, on_progress: Progress
) -> Iterator[Sequence[Line]]:
    done = 0
    for lines in pieces:
        yield lines
        done += len(lines)
        on_progress(done, total)


def _unpacked(path: Path) -> Iterator[bytes]:
    """Read what a compressed file holds, unpacked beside the check of what came before."""
    command = (sys.executable, "-I", "-S", unpack.__file__, path)
    with (
        tempfile.TemporaryFile() as complaint,
        Popen(command, stdout=PIPE, stderr=complaint) as unpacking,  # noqa: S603
    ):
        assert unpacking.stdout is not None
        with suppress(OSError):  # it is refused to who has many of that size, and only for speed
            fcntl(unpacking.stdout, F_SETPIPE_SZ, _PIPE)
        while len(chunk := unpacking.stdout.read(_CHUNK)) == _CHUNK:
            yield chunk
        if unpacking.wait():
            complaint.seek(0)
            raise EOFError(complaint.read().decode(errors="replace").strip())
        yield chunk
