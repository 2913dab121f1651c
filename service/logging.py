"""Logs: one JSON object a line on standard error, with the time, the level and the event first.

Logs no exception text by itself: an exception may quote what must not be logged.
"""

import json
import logging
import sys
from typing import Final

import msgspec
import structlog

LEVELS: Final = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}


def configure_logging(level: str) -> None:
    """Send structlog's events, and what libraries log from WARNING on, to standard error."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.JSONRenderer(serializer=_to_json),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        logger_factory=structlog.BytesLoggerFactory(sys.stderr.buffer),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_LibraryFormatter())
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)


class _LibraryFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        event = {
            "event": "library_message",
            "library": record.name,
            # The class of an exception, never its text or its locals.
            "error": record.exc_info[0].__name__
            if record.exc_info and record.exc_info[0]
            else None,
            "message": record.getMessage() if record.exc_info is None else None,
            "level": record.levelname.lower(),
        }
        return _to_json(event).decode()


def _to_json(event: object, **_: object) -> bytes:
    # ASCII alone: U+0085 and U+2028 break lines in some viewers, and bidi marks turn them around.
    return json.dumps(msgspec.to_builtins(event, enc_hook=str), separators=(",", ":")).encode()
