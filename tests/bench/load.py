"""Exchanges as fast as a server answers, on a number of connections: one process, little CPU.

Reports what it measured as one JSON line and judges nothing. Reads the credential from standard
input, since arguments are seen by everybody.
"""

import asyncio
import sys
import time
from typing import cast

import click
import msgspec
import uvloop
from msgspec import Struct

from tests.faults.wire import Answer, exchange_request


class Load(Struct, frozen=True, kw_only=True):
    """What one round showed; latencies in milliseconds."""

    connections: int
    seconds: float
    tokens: int
    failures: int
    p50: float
    p99: float

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds


class Client(asyncio.Protocol):
    """Sends the next request from within the callback that completed the last one."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self._transport: asyncio.Transport | None = None
        self._answer = Answer()
        self._sent = 0.0
        self.measuring = False
        self.latencies: list[float] = []
        self.failures = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._send()

    def data_received(self, data: bytes) -> None:
        if not self._answer.feed(data):
            return
        if self.measuring:
            self.latencies.append(time.perf_counter() - self._sent)
            self.failures += self._answer.status != 200
        self._answer = Answer()
        self._send()

    def connection_lost(self, exc: Exception | None) -> None:
        self.failures += self.measuring

    def close(self) -> None:
        self.measuring = False
        if self._transport is not None:
            self._transport.close()

    def _send(self) -> None:
        assert self._transport is not None
        self._sent = time.perf_counter()
        self._transport.write(self._request)


async def measure(port: int, request: bytes, connections: int, warm: float, seconds: float) -> Load:
    """Return what `connections` clients got within `seconds`, after `warm` seconds of the same."""
    loop = asyncio.get_running_loop()
    clients = [Client(request) for _ in range(connections)]
    for client in clients:
        await loop.create_connection(lambda client=client: client, "127.0.0.1", port)
    await asyncio.sleep(warm)
    for client in clients:
        client.measuring = True
    started = time.perf_counter()
    await asyncio.sleep(seconds)
    for client in clients:
        client.close()
    elapsed = time.perf_counter() - started
    latencies = sorted(latency for client in clients for latency in client.latencies)
    failures = sum(client.failures for client in clients)
    return Load(
        connections=connections,
        seconds=elapsed,
        tokens=len(latencies) - failures,
        failures=failures,
        p50=1000 * latencies[len(latencies) // 2],
        p99=1000 * latencies[len(latencies) * 99 // 100],
    )


@click.command()
@click.option("--port", type=int, required=True)
@click.option("--connections", type=int, required=True)
@click.option("--warm", type=float, required=True)
@click.option("--seconds", type=float, required=True)
def main(port: int, connections: int, warm: float, seconds: float) -> None:
    """Print a Load."""
    request = exchange_request(*sys.stdin.read().split())
    load = uvloop.run(measure(port, request, connections, warm, seconds))
    sys.stdout.buffer.write(msgspec.json.encode(load))


if __name__ == "__main__":
    main()
