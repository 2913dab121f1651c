"""Authorities with one mechanism switched off, and such as only hurry or die at a named place: what
the fault tests need, and what they must be able to notice.

Application factories for `serve_variant.py`; nothing here is for any other use.
"""

import asyncio
from contextlib import suppress
from typing import Any
from unittest.mock import patch

import msgspec
from litestar.types import ASGIApp

from keys import pkcs11
from keys.keyring import KeyRing, RotationPolicy
from keys.signer import KeptKey, LocalCustody
from service import app
from service.authority.audit import AuditRecord
from service.authority.clock import DatabaseClock
from service.authority.errors import AuditUnavailable
from service.authority.model import Subject
from service.settings import Settings
from service.store.signing_keys import SigningKeys
from tests.faults.failpoints import Failpoint, reach
from tests.faults.pace import pace_of_this_process

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


def hurrying() -> ASGIApp:
    """Nothing off: the product, at the pace that the environment gives."""
    _hurry()
    return app.create_app()


def dying() -> ASGIApp:
    """Nothing off, in a hurry: it kills itself at the failpoint that is armed."""
    _hurry()
    with (
        patch.object(app, "SigningKeys", _DyingSigningKeys),
        patch.object(app, "LocalCustody", _DyingCustody),
        patch.object(pkcs11, "Pkcs11Custody", _DyingPkcs11Custody),
    ):
        return app.create_app()


def trusting_its_clock() -> ASGIApp:
    """The correction of the clock off, in a hurry: each process lives in its own time."""
    _hurry()
    with patch.object(app, "DatabaseClock", _UncorrectedClock):
        return app.create_app()


def _hurry() -> None:
    pace = pace_of_this_process()

    def policy(_: Settings) -> RotationPolicy:
        return pace.policy

    # For as long as this process lives: it reads the poll when it has started, too.
    patch.object(app, "rotation_policy", policy).start()
    patch.object(app, "RING_POLL", pace.ring_poll).start()


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


class _DyingCustody(LocalCustody):
    async def new_key(self, bits: int) -> KeptKey:
        reach(Failpoint.ELECTED)
        return await super().new_key(bits)


class _DyingPkcs11Custody(pkcs11.Pkcs11Custody):
    async def new_key(self, bits: int) -> KeptKey:
        reach(Failpoint.ELECTED)
        return await super().new_key(bits)

    async def destroy(self, uri: str) -> None:
        reach(Failpoint.BEFORE_DESTROY)
        await super().destroy(uri)


class _DyingSigningKeys(SigningKeys):
    async def prepare(self, key: KeptKey, record: AuditRecord) -> bool:
        reach(Failpoint.BEFORE_PREPARE)
        taken = await super().prepare(key, record)
        reach(Failpoint.AFTER_PREPARE)
        return taken

    async def activate(
        self, kid: str, active_kid: str | None, policy: RotationPolicy, record: AuditRecord
    ) -> bool:
        reach(Failpoint.BEFORE_ACTIVATE)
        taken = await super().activate(kid, active_kid, policy, record)
        reach(Failpoint.AFTER_ACTIVATE)
        return taken

    async def retire(self, kid: str, record: AuditRecord) -> bool:
        reach(Failpoint.BEFORE_RETIRE)
        taken = await super().retire(kid, record)
        reach(Failpoint.AFTER_RETIRE)
        return taken

    async def destroyed(self, kid: str, record: AuditRecord) -> bool:
        reach(Failpoint.DESTROYED)
        return await super().destroyed(kid, record)


class _UncorrectedClock(DatabaseClock):
    def observe(self, database_time: float, *, sent: float, received: float) -> None:
        """Learn nothing."""
