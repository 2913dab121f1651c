"""Authorities with one mechanism switched off: what the fault tests must be able to notice.

Application factories for `serve_variant.py`; nothing here is for any other use.
"""

import asyncio
from contextlib import suppress
from typing import Any
from unittest.mock import patch

import msgspec
from litestar.types import ASGIApp

from keys.keyring import KeyRing
from service import app
from service.authority.audit import AuditRecord
from service.authority.errors import AuditUnavailable
from service.authority.model import Subject

COMMIT_DELAY = 0.05
CACHE_LIFETIME = 5.0


def answering_before_commit() -> ASGIApp:
    """P1 off: the token leaves at once, its record is committed a little later."""
    return _created(_AnsweringBeforeCommit)


def deaf() -> ASGIApp:
    """LISTEN off: no process hears of a change; the versions alone must keep P2."""
    return _created(_Deaf)


def trusting_its_cache() -> ASGIApp:
    """P2 off: deaf, a cache of five seconds, and no version in any record to be compared."""
    return _created(_TrustingItsCache)


def keeping_its_first_ring() -> ASGIApp:
    """A rotation's retry off: whoever decided with a key that is active no more never learns."""
    return _created(_KeepingItsFirstRing)


def _created(variant: type[app.Authority]) -> ASGIApp:
    with patch.object(app, "Authority", variant):
        return app.create_app()


class _AnsweringBeforeCommit(app.Authority):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        append = self.audit.append
        commits: set[asyncio.Task[None]] = set()

        async def commit_later(record: AuditRecord) -> None:
            await asyncio.sleep(COMMIT_DELAY)
            with suppress(AuditUnavailable):  # too late to tell anybody: that is the fault
                await append(record)

        async def append_later(record: AuditRecord) -> bool:
            task = asyncio.create_task(commit_later(record))
            commits.add(task)
            task.add_done_callback(commits.discard)
            return True

        self.audit.append = append_later


class _Deaf(app.Authority):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)

        async def hear_nothing() -> None:
            await asyncio.Event().wait()

        self.listener.run = hear_nothing


class _TrustingItsCache(_Deaf):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        append, cached = self.audit.append, self.directory.cached
        good_until: dict[str, float] = {}

        async def append_without_version(record: AuditRecord) -> bool:
            return await append(msgspec.structs.replace(record, version=None))

        async def cached_for_five_seconds(client_id: str) -> Subject:
            now = asyncio.get_running_loop().time()
            if now >= good_until.get(client_id, 0.0):
                self.directory.forget(client_id)
                good_until[client_id] = now + CACHE_LIFETIME
            return await cached(client_id)

        self.audit.append = append_without_version
        self.directory.cached = cached_for_five_seconds


class _KeepingItsFirstRing(_Deaf):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        fresh = self.keys.fresh

        async def fresh_until_it_signs() -> KeyRing:
            ring = self.keys.ring
            return ring if ring.active and ring.pending else await fresh()

        self.keys.fresh = fresh_until_it_signs
