"""Every call that a service takes is in the log exactly once, whatever happens to the authority.

The short form takes 600 calls; FAULTS_LONG=1 takes 10,000. Signals no process of the service: that
a kill of it may lose what came since its last write to disk is said in its reference.
"""

import asyncio
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Final

import asyncpg
import httpx
import psutil
import pytest

from service.settings import LOCAL_AUDIENCE
from tests.faults.admin_api import AdminAPI, IssuedCredential
from tests.faults.live_authority import REPOSITORY, LiveAuthority, free_port, live_authority

pytestmark = pytest.mark.anyio

LONG: Final = os.environ.get("FAULTS_LONG") == "1"
CALLS: Final = 10_000 if LONG else 600
RATE: Final = 100 if LONG else 40
"""Calls a second."""
PAUSES: Final = (0.5, 2.0, 12.0) if LONG else (0.5, 2.0)
"""Seconds. A reporter waits ten for an answer."""
CLIENTS: Final = 8
WORKERS: Final = 2
START_DEADLINE: Final = 30.0
SERVING_DEADLINE: Final = 20.0
SETTLED_DEADLINE: Final = 120.0
"""Seconds; a reporter that failed often pauses for up to thirty."""

COUNT_CALLS = """
SELECT request_id, count(*) AS records, min(service_user_id) AS service_user_id,
       min(jti::text) AS jti
  FROM audit_records WHERE action = 'document.search' GROUP BY request_id
"""


@dataclass(slots=True, kw_only=True)
class Findings:
    """What the clients saw, and what was done to the authority meanwhile."""

    statuses: Counter[int] = field(default_factory=Counter[int])
    slowest: float = 0.0
    faults: Counter[str] = field(default_factory=Counter[str])

    def __str__(self) -> str:
        return (
            f"answers {dict(self.statuses)}, the slowest after {self.slowest:.2f} s, "
            f"faults {dict(self.faults)}"
        )


async def test_every_call_is_on_record_once_while_the_authority_is_killed_and_paused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with live_authority(workers=WORKERS) as authority:
        vkyc, reporter = await _enrolled(authority)
        token = await _exchange(authority, vkyc)
        with _service(authority, reporter) as url:
            findings = Findings()
            async with _under_fire(authority, findings):
                await _take_calls(url, token, findings)
            figures = await _settled(url)
        records = await _calls_on_record(authority)
    with capsys.disabled():
        print(
            f"\nAttributed calls: {findings}; recorded {len(records)}, "
            f"recorded before their answer was lost {figures['known']:.0f}, "
            f"retries {figures['retries']:.0f}, lost {figures['lost']:.0f}"
        )
    assert findings.statuses == {200: CALLS}
    assert findings.faults.keys() == {"worker killed", "parent killed", "paused"}
    assert (figures["lost"], figures["refused"]) == (0, 0)
    assert {record["request_id"] for record in records} == {_name(n) for n in range(CALLS)}
    assert {record["records"] for record in records} == {1}
    assert {record["service_user_id"] for record in records} == {vkyc.client_id}
    assert len({record["jti"] for record in records}) == 1


async def _enrolled(authority: LiveAuthority) -> tuple[IssuedCredential, IssuedCredential]:
    admin = await AdminAPI.enter(authority)
    vkyc = await admin.create_credential(
        await admin.create_service_user("vkyc-calls", ["search:read"])
    )
    audiences = [f"{authority.issuer}/api/v1", LOCAL_AUDIENCE]
    reporter = await admin.create_credential(
        await admin.create_service_user("ingest", ["audit:report"], audiences=audiences)
    )
    await admin.leave()
    return vkyc, reporter


async def _exchange(authority: LiveAuthority, credential: IssuedCredential) -> str:
    async with httpx.AsyncClient(timeout=10) as client:
        answer = await client.post(
            f"{authority.issuer}/oauth/token",
            data={"grant_type": "client_credentials"},
            auth=(credential.client_id, credential.client_secret),
        )
    assert answer.status_code == 200, answer.text
    return answer.json()["access_token"]


@contextmanager
def _service(authority: LiveAuthority, reporter: IssuedCredential) -> Generator[str]:
    """Run the example service, which reports, until the end of the block; yield its address."""
    data_dir = Path(tempfile.mkdtemp(prefix="privyseal-calls-"))
    url = f"http://127.0.0.1:{(port := free_port())}"
    environ = {
        **{name: value for name, value in os.environ.items() if "PRIVYSEAL_" not in name},
        "INGEST_ISSUER": authority.issuer,
        "INGEST_AUDIENCE": LOCAL_AUDIENCE,
        "INGEST_DATA_DIR": str(data_dir / "documents"),
        "INGEST_CLIENT_ID": reporter.client_id,
        "INGEST_CLIENT_SECRET": reporter.client_secret,
        "INGEST_SPOOL_DIR": str(data_dir / "spool"),
    }
    uvicorn = (sys.executable, "-m", "uvicorn", "--app-dir", "deploy/examples/ingest", "app:app")
    log = data_dir / "service.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            (*uvicorn, "--port", str(port), "--no-access-log"),
            env=environ,
            cwd=REPOSITORY,
            stdout=output,
            stderr=output,
        )
    try:
        deadline = time.monotonic() + START_DEADLINE
        while not _answers(f"{url}/healthz"):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        yield url
    finally:
        process.terminate()
        process.wait(10)
        shutil.rmtree(data_dir)


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=1).status_code == 200
    except httpx.TransportError:
        return False


async def _take_calls(url: str, token: str, findings: Findings) -> None:
    numbers = iter(range(CALLS))
    bearer = {"Authorization": f"Bearer {token}"}

    async def calling(client: httpx.AsyncClient) -> None:
        for number in numbers:
            await asyncio.sleep(random.uniform(0, 2 * CLIENTS / RATE))
            begun = time.monotonic()
            answer = await client.get(
                "/api/v1/search?limit=1", headers={"X-Request-Id": _name(number)}
            )
            findings.slowest = max(findings.slowest, time.monotonic() - begun)
            findings.statuses[answer.status_code] += 1

    async with (
        httpx.AsyncClient(base_url=url, headers=bearer, timeout=10) as client,
        asyncio.TaskGroup() as clients,
    ):
        for _ in range(CLIENTS):
            clients.create_task(calling(client))


def _name(number: int) -> str:
    return f"call-{number:05}"


@asynccontextmanager
async def _under_fire(authority: LiveAuthority, findings: Findings) -> AsyncGenerator[None]:
    """Do one thing after another to the authority until the block ends; then let it serve."""
    over = asyncio.Event()
    fire = asyncio.create_task(_fire(authority, findings, over))
    try:
        yield
    finally:
        over.set()
        await fire


async def _fire(authority: LiveAuthority, findings: Findings, over: asyncio.Event) -> None:
    pauses = cycle(PAUSES)

    async def kill_a_worker() -> None:
        victim = random.choice(authority.serving_workers())
        victim.kill()
        async with asyncio.timeout(SERVING_DEADLINE):
            while len(set(authority.serving_workers()) - {victim}) < WORKERS:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        findings.faults["worker killed"] += 1

    async def kill_the_parent() -> None:
        left = authority.kill_parent()
        async with asyncio.timeout(SERVING_DEADLINE):
            while any(map(psutil.Process.is_running, left)) or not authority.port_is_free():  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        await asyncio.to_thread(authority.start)
        findings.faults["parent killed"] += 1

    async def pause() -> None:
        workers = authority.serving_workers()
        # The parent first: it would replace workers that do not answer it.
        processes = [parent for worker in workers[:1] if (parent := worker.parent())] + workers
        for process in processes:
            process.suspend()
        await asyncio.sleep(next(pauses))
        for process in processes:
            process.resume()
        findings.faults["paused"] += 1

    faults = (kill_a_worker, pause, kill_the_parent)
    for done, fault in enumerate(cycle(faults)):
        # Each at least once, however slow this machine is.
        if over.is_set() and done >= len(faults):
            break
        await asyncio.sleep(random.uniform(0.3, 1.5))
        await fault()
    await asyncio.to_thread(authority.wait_until_it_serves)


async def _settled(url: str) -> dict[str, float]:
    """Return the reporter's figures once nothing waits any more."""
    async with httpx.AsyncClient(timeout=10) as client, asyncio.timeout(SETTLED_DEADLINE):
        while True:
            text = (await client.get(f"{url}/metrics")).text
            figures = {
                name: float(value)
                for name, value in re.findall(
                    r"^privyseal_verifier_(?:events|report)_(\w+?)(?:_total)?\{.*\} (\S+)$",
                    text,
                    re.MULTILINE,
                )
            }
            if figures["queued"] == figures["spooled"] == 0:
                return figures
            await asyncio.sleep(0.1)


async def _calls_on_record(authority: LiveAuthority) -> list[asyncpg.Record]:
    connection = await asyncpg.connect(authority.service_dsn.reveal(), timeout=10)
    try:
        return await connection.fetch(COUNT_CALLS)
    finally:
        await connection.close(timeout=5)
