"""How an export travels: as NDJSON or CSV, page by page, as fast as its reader takes it.

Decides neither what is in it nor who may have it.
"""

import asyncio
import csv
import io
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from enum import StrEnum
from typing import Any, Final

import msgspec
import structlog
from litestar.types import Receive, Scope, Send

from service.authority.audit import StoredRecord
from service.authority.audit.export import Proven, for_all_readers
from service.http.context import origin_of

STALL: Final = 60.0
"""Seconds for which a reader may take nothing: then its place is for somebody else."""

_encode: Final = msgspec.json.Encoder().encode

COLUMNS: Final = StoredRecord.__struct_fields__
# A spreadsheet takes what begins so for a formula, and formulas can send cells elsewhere.
_FORMULA: Final = ("=", "+", "-", "@", "\t", "\r")

log = structlog.stdlib.get_logger()


class Format(StrEnum):
    """What an export is written as."""

    NDJSON = "ndjson"
    CSV = "csv"


class ExportStream:
    """An ASGI answer. If it cannot be finished the connection is closed in the middle of the
    chunked body (RFC 9112 §8): no reader can take it for the whole."""

    def __init__(self, pages: AsyncGenerator[Sequence[Proven], None], format_: Format) -> None:
        self._pages = pages
        self._format = format_

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._pages) as pages:
            # What is refused or away now still has its proper answer.
            first = await anext(pages)
            sending = asyncio.ensure_future(self._send(first, send))
            leaving = asyncio.ensure_future(_left(receive))
            try:
                await asyncio.wait((sending, leaving), return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in (sending, leaving):
                    task.cancel()
                (error, _) = await asyncio.gather(sending, leaving, return_exceptions=True)
            if isinstance(error, Exception):
                # Class only: the text may quote what must not be logged.
                log.warning(
                    "export_cut",
                    error=type(error).__name__,
                    request_id=origin_of(scope).request_id,
                )

    async def _send(self, first: Sequence[Proven], send: Send) -> None:
        encode = _ENCODERS[self._format]
        await send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [
                    (b"content-type", _MEDIA_TYPES[self._format]),
                    (b"cache-control", b"no-store"),
                    (
                        b"content-disposition",
                        b'attachment; filename="audit-records.%b"' % self._format.encode(),
                    ),
                ],
            }
        )
        if self._format is Format.CSV:
            await _send_body(send, csv_lines([COLUMNS]))
        await _send_body(send, encode(first))
        async for page in self._pages:
            await _send_body(send, encode(page))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send_body(send: Send, body: bytes) -> None:
    async with asyncio.timeout(STALL):
        await send({"type": "http.response.body", "body": body, "more_body": True})


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def ndjson(page: Sequence[Proven]) -> bytes:
    """Return a line a record, each the JSON of a query with `proof` as one member more if there is
    any, and a line a header."""
    return for_all_readers(b"".join(map(_line, page)))


def _line(proven: Proven) -> bytes:
    line = _encode(proven.line)
    if proven.proof:
        line = b'%b,"proof":%b}' % (line[:-1], _encode(proven.proof))
    return line + b"\n"


def as_csv(page: Sequence[Proven]) -> bytes:
    """Return a line a record (RFC 4180), every cell in quotes; null is an empty one."""
    records = [each.line for each in page if isinstance(each.line, StoredRecord)]
    return csv_lines([[_cell(getattr(record, name)) for name in COLUMNS] for record in records])


def csv_lines(rows: Sequence[Sequence[str]]) -> bytes:
    """Write rows whose cells are text already."""
    text = io.StringIO(newline="")
    csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\r\n").writerows(rows)
    return text.getvalue().encode()


def _cell(value: Any) -> str:
    match value:
        case None:
            return ""
        case str():
            text = value
        case dict():
            text = msgspec.json.encode(value).decode()
        case _:
            text = str(msgspec.to_builtins(value))
    return f"'{text}" if text.startswith(_FORMULA) else text


_ENCODERS: Final[dict[Format, Callable[[Sequence[Proven]], bytes]]] = {
    Format.NDJSON: ndjson,
    Format.CSV: as_csv,
}
_MEDIA_TYPES: Final = {
    Format.NDJSON: b"application/x-ndjson",
    Format.CSV: b"text/csv; charset=utf-8; header=present",
}
