"""An ingest service that knows who sends a document from the token alone: an example to copy.

It must not ask the authority about a request, nor believe what a request says of its sender.
"""

import asyncio
import contextlib
import hashlib
import json
import os
import re
import sys
import uuid
from collections.abc import AsyncGenerator, Mapping
from dataclasses import asdict, dataclass, field, fields
from http import HTTPStatus
from pathlib import Path
from typing import Any, BinaryIO, Self, cast
from urllib.parse import urlencode

from privyseal_verifier import BearerMiddleware, Reporter, Verifier, describe, require_scope
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Message, Receive

SCOPE = "ingest:write"
SEARCH_SCOPE = "search:read"
SEARCH_ALL_SCOPE = "search:all"
DEPARTMENT_HEADER = "X-Approver-Department"
MAX_BODY = 10 * 1024 * 1024  # bytes of the whole request: the file and what surrounds it
MAX_METADATA = 16 * 1024  # bytes
UPLOAD_DEADLINE = 60.0  # seconds
MAX_FOUND = 100
MAX_SEARCHED = 10_000  # documents, the newest; a real service has an index

GAUGES = ("keys", "age_seconds", "events_queued", "events_spooled", "report_age_seconds")

_BLOCK = 64 * 1024
_IDENTIFIER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Whose tokens are accepted, and where documents go."""

    issuer: str
    audience: str
    jwks_uri: str | None
    """None: where the issuer's metadata says (RFC 8414)."""
    data_dir: Path
    client_id: str | None
    """With the secret: whose credential reports every call to the issuer. None: no reports."""
    client_secret: str | None = field(repr=False)
    spool_dir: Path | None
    """Where reports wait while the issuer is away. None: in memory."""

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Self:
        """Read `INGEST_*`; the defaults are those of an authority on the same machine.

        Raise ValueError for a variable that nobody reads: a misspelt setting must not be silent.
        """
        known = {
            *("INGEST_ISSUER", "INGEST_AUDIENCE", "INGEST_JWKS_URI", "INGEST_DATA_DIR"),
            *("INGEST_CLIENT_ID", "INGEST_CLIENT_SECRET", "INGEST_SPOOL_DIR"),
        }
        given = {name for name in environ if name.startswith("INGEST_")}
        if unknown := sorted(given - known):
            raise ValueError(f"{unknown[0]}: expected one of {', '.join(sorted(known))}")
        client_id = environ.get("INGEST_CLIENT_ID") or None
        client_secret = environ.get("INGEST_CLIENT_SECRET") or None
        spool_dir = environ.get("INGEST_SPOOL_DIR")
        if (client_id is None) != (client_secret is None):
            raise ValueError("expected INGEST_CLIENT_ID and INGEST_CLIENT_SECRET, found one")
        if spool_dir and client_id is None:
            raise ValueError("INGEST_SPOOL_DIR: expected INGEST_CLIENT_ID as well, found none")
        return cls(
            issuer=environ.get("INGEST_ISSUER") or "http://127.0.0.1:8080",
            audience=environ.get("INGEST_AUDIENCE") or "http://127.0.0.1:8081",
            jwks_uri=environ.get("INGEST_JWKS_URI") or None,
            data_dir=Path(environ.get("INGEST_DATA_DIR") or "var/ingest"),
            client_id=client_id,
            client_secret=client_secret,
            spool_dir=Path(spool_dir) if spool_dir else None,
        )

    def reporter(self) -> Reporter | None:
        """Return what reports to the issuer, if there is a credential for it."""
        if self.client_id is None or self.client_secret is None:
            return None
        return Reporter(self.issuer, self.client_id, self.client_secret, spool=self.spool_dir)


class NotAccepted(Exception):
    """A document that is not taken; the text says what was expected and what was found."""

    def __init__(self, status: HTTPStatus, error: str, description: str) -> None:
        super().__init__(description)
        self.status = status
        self.error = error


@dataclass(frozen=True, slots=True, kw_only=True)
class Metadata:
    """What an integrator says about a document."""

    source_tag: str
    external_id: str
    document_category: str
    department: str

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read exactly the four members; raise NotAccepted for anything else."""
        expected = [field.name for field in fields(cls)]
        try:
            parsed: object = json.loads(text, object_pairs_hook=_distinct)
        except (ValueError, RecursionError) as error:
            raise _bad_metadata(f"expected a JSON object, found other text ({error})") from None
        if not isinstance(parsed, dict):
            raise _bad_metadata(f"expected a JSON object, found {_shown(parsed)}")
        members = cast("dict[str, object]", parsed)
        if {*members} != {*expected}:
            found = _shown(", ".join(members))
            raise _bad_metadata(f"expected exactly {', '.join(expected)}, found {found}")
        return cls(**{name: _identifier(name, members[name]) for name in expected})


@dataclass(frozen=True, slots=True, kw_only=True)
class Attribution:
    """Who brought which document. Who is told by the token, and `jti` leads to its audit record."""

    document_id: str
    service_user: str
    service_user_id: str
    source_system: str
    jti: str
    department: str
    document_category: str
    external_id: str
    size: int
    sha256: str


class Ingest:
    """Takes documents into `data_dir`, each under a new name with its attribution beside it."""

    def __init__(self, data_dir: Path) -> None:
        data_dir.mkdir(parents=True, exist_ok=True)
        self._data_dir = data_dir

    async def upload(self, request: Request) -> Response:
        """Answer 201 once document and attribution are on disk."""
        describe(request.scope, action="document.ingest", resource="documents")
        caller = require_scope(request.scope, SCOPE)  # before a byte of the body is read
        _require_multipart(request)
        department = _department(request)
        describe(request.scope, department=department)
        bounded = Request(request.scope, _at_most(MAX_BODY, request.receive))
        try:
            async with (
                asyncio.timeout(UPLOAD_DEADLINE),
                bounded.form(max_files=1, max_fields=1, max_part_size=MAX_METADATA) as form,
            ):
                file, metadata = _file(form.get("file")), _metadata(form.get("metadata"))
                if metadata.source_tag != caller.source_system:
                    raise NotAccepted(
                        HTTPStatus.FORBIDDEN,
                        "source_not_allowed",
                        f"source_tag: expected {_shown(caller.source_system)}, which is the "
                        f"token's source_system, found {_shown(metadata.source_tag)}",
                    )
                if metadata.department != department:
                    raise NotAccepted(
                        HTTPStatus.UNPROCESSABLE_ENTITY,
                        "department_mismatch",
                        f"{DEPARTMENT_HEADER}: expected {_shown(metadata.department)}, which is "
                        f"the metadata's department, found {_shown(department)}",
                    )
                document_id = uuid.uuid4().hex
                describe(request.scope, resource=f"documents/{document_id}")
                size, sha256 = await run_in_threadpool(self._store_file, document_id, file.file)
        except UnicodeError:
            raise NotAccepted(
                HTTPStatus.BAD_REQUEST,
                "invalid_request",
                "Content-Type: expected charset=utf-8 or none, found another",
            ) from None
        except TimeoutError:
            raise NotAccepted(
                HTTPStatus.REQUEST_TIMEOUT,
                "invalid_request",
                f"expected the whole request within {UPLOAD_DEADLINE:.0f} s, found a part of it",
            ) from None
        attribution = Attribution(
            document_id=document_id,
            service_user=caller.service_user,
            service_user_id=caller.sub,
            source_system=caller.source_system,
            jti=caller.jti,
            department=department,
            document_category=metadata.document_category,
            external_id=metadata.external_id,
            size=size,
            sha256=sha256,
        )
        await run_in_threadpool(self._store_attribution, attribution)
        return JSONResponse(asdict(attribution), HTTPStatus.CREATED)

    async def search(self, request: Request) -> Response:
        """Answer with the attributions that match, newest first: those of the caller's source
        system, or of all with the scope `search:all`.
        """
        describe(request.scope, action="document.search", resource="documents")
        caller = require_scope(request.scope, SEARCH_SCOPE)
        wanted, limit = _query(request)
        describe(
            request.scope,
            resource=f"documents?{urlencode(wanted)}",
            department=wanted.get("department", ""),
        )
        if SEARCH_ALL_SCOPE not in caller.scope:
            wanted["source_system"] = caller.source_system
        found = await run_in_threadpool(self._find, wanted, limit)
        return JSONResponse({"documents": [asdict(attribution) for attribution in found]})

    def _find(self, wanted: Mapping[str, str], limit: int) -> list[Attribution]:
        with os.scandir(self._data_dir) as entries:
            written = [
                (entry.stat().st_mtime_ns, entry.path)
                for entry in entries
                if entry.name.endswith(".json")
            ]
        found: list[Attribution] = []
        for _, path in sorted(written, reverse=True)[:MAX_SEARCHED]:
            stored = json.loads(Path(path).read_bytes())
            if wanted.items() <= stored.items():
                found.append(Attribution(**stored))
                if len(found) == limit:
                    break
        return found

    def _store_file(self, document_id: str, source: BinaryIO) -> tuple[int, str]:
        """Copy block by block; return the size in bytes and the SHA-256 in hexadecimal."""
        digest, size = hashlib.sha256(), 0
        with (self._data_dir / document_id).open("xb") as target:
            while block := source.read(_BLOCK):
                digest.update(block)
                size += target.write(block)
            target.flush()
            os.fsync(target.fileno())
        return size, digest.hexdigest()

    def _store_attribution(self, attribution: Attribution) -> None:
        """Write it whole or not at all: a document without one was never accepted."""
        path = self._data_dir / f"{attribution.document_id}.json"
        unfinished = path.with_suffix(".part")
        with unfinished.open("x", encoding="utf-8") as target:
            json.dump(asdict(attribution), target)
            target.flush()
            os.fsync(target.fileno())
        unfinished.rename(path)


def create_app(settings: Settings) -> Starlette:
    """Put the service together. It reaches the issuer before the first token only to report."""
    reporter = settings.reporter()
    verifier = Verifier(settings.issuer, settings.audience, settings.jwks_uri, reporter=reporter)
    ingest = Ingest(settings.data_dir)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncGenerator[None, None]:
        yield
        if reporter is not None:
            await run_in_threadpool(reporter.close)

    async def healthz(_: Request) -> Response:
        return JSONResponse({"alive": True})

    async def metrics(_: Request) -> Response:
        return PlainTextResponse(prometheus_text(verifier.stats()))

    return Starlette(
        routes=[
            Route("/api/v1/ingest", ingest.upload, methods=["POST"]),
            Route("/api/v1/search", ingest.search),
            Route("/healthz", healthz),
            Route("/metrics", metrics),
        ],
        middleware=[
            Middleware(BearerMiddleware, verifier=verifier, exempt_paths=("/healthz", "/metrics"))
        ],
        exception_handlers={
            NotAccepted: _answer_not_accepted,
            HTTPException: _answer_http_exception,
            ClientDisconnect: _answer_nobody,
        },
        lifespan=lifespan,
    )


def prometheus_text(stats: Mapping[str, Mapping[str, float]]) -> str:
    """Return the verifier's figures, issuer by issuer, in Prometheus' text format."""
    lines: list[str] = []
    for name in sorted({name for figures in stats.values() for name in figures}):
        gauge = name in GAUGES
        metric = f"privyseal_verifier_{name}" if gauge else f"privyseal_verifier_{name}_total"
        lines.append(f"# TYPE {metric} {'gauge' if gauge else 'counter'}")
        lines += [
            f'{metric}{{issuer="{issuer}"}} {float(figures[name])}'.replace(" inf", " +Inf")
            for issuer, figures in stats.items()
        ]
    return "\n".join(lines) + "\n"


def _require_multipart(request: Request) -> None:
    found = request.headers.get("content-type", "")
    if found.partition(";")[0].strip().lower() != "multipart/form-data":
        raise NotAccepted(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            "invalid_request",
            f"Content-Type: expected multipart/form-data, found {_shown(found)}",
        )


def _department(request: Request) -> str:
    found = request.headers.getlist(DEPARTMENT_HEADER)
    if len(found) != 1:
        raise NotAccepted(
            HTTPStatus.UNPROCESSABLE_ENTITY,
            "department_mismatch",
            f"{DEPARTMENT_HEADER}: expected one, found {len(found)}",
        )
    return found[0]


def _query(request: Request) -> tuple[dict[str, str], int]:
    names = ("external_id", "document_category", "department", "limit")
    given = request.query_params.multi_items()
    parameters = dict(given)
    if len(parameters) != len(given) or not parameters.keys() <= {*names}:
        raise _bad_query(f"expected each of {', '.join(names)} at most once, found others")
    limit = parameters.pop("limit", str(MAX_FOUND))
    if not re.fullmatch("[1-9][0-9]{0,2}", limit) or int(limit) > MAX_FOUND:
        raise _bad_query(f"limit: expected 1 to {MAX_FOUND}, found {_shown(limit)}")
    for name, value in parameters.items():
        if not _IDENTIFIER.fullmatch(value):
            raise _bad_query(
                f"{name}: expected up to 128 letters, digits or . _ : -, found {_shown(value)}"
            )
    return parameters, int(limit)


def _at_most(limit: int, receive: Receive) -> Receive:
    received = 0

    async def receive_bounded() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > limit:
            raise NotAccepted(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                "invalid_request",
                f"expected a request of at most {limit} bytes, found more",
            )
        return message

    return receive_bounded


def _file(part: UploadFile | str | None) -> UploadFile:
    if not isinstance(part, UploadFile):
        raise NotAccepted(
            HTTPStatus.UNPROCESSABLE_ENTITY,
            "invalid_request",
            f"file: expected a part with a file name, found {'text' if part else 'none'}",
        )
    return part


def _metadata(part: UploadFile | str | None) -> Metadata:
    if not isinstance(part, str):
        raise _bad_metadata(f"expected a part with text, found {'a file' if part else 'none'}")
    return Metadata.from_json(part)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a member is there twice")
    return members


def _identifier(name: str, value: object) -> str:
    if not isinstance(value, str) or not _IDENTIFIER.fullmatch(value):
        raise _bad_metadata(
            f"{name}: expected up to 128 letters, digits or . _ : -, found {_shown(value)}"
        )
    return value


def _bad_metadata(description: str) -> NotAccepted:
    return NotAccepted(
        HTTPStatus.UNPROCESSABLE_ENTITY, "invalid_metadata", f"metadata: {description}"
    )


def _bad_query(description: str) -> NotAccepted:
    return NotAccepted(HTTPStatus.UNPROCESSABLE_ENTITY, "invalid_query", f"query: {description}")


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


async def _answer_not_accepted(_: Request, error: Exception) -> Response:
    assert isinstance(error, NotAccepted)
    return JSONResponse({"error": error.error, "error_description": str(error)}, error.status)


async def _answer_http_exception(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    content = {"error": "invalid_request", "error_description": error.detail}
    return JSONResponse(content, error.status_code, error.headers)


async def _answer_nobody(_: Request, error: Exception) -> Response:
    return Response(status_code=HTTPStatus.BAD_REQUEST)  # the client has gone away


try:
    app = create_app(Settings.from_environ(os.environ))
except ValueError as error:
    sys.exit(f"These settings (INGEST_...) cannot be used: {error}")
