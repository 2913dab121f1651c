"""One address in front of several instances: each new connection goes to one of them at random.

Understands no HTTP, repeats nothing and knows no health: what one instance does wrong, its clients
see.
"""

import asyncio
import random
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Final

_CHUNK: Final = 65_536


@asynccontextmanager
async def balancer(port: int, instance_ports: Sequence[int]) -> AsyncGenerator[None]:
    """Listen on `port` of 127.0.0.1 until the end of the block."""

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream_reader, upstream_writer = await asyncio.open_connection(
            "127.0.0.1", random.choice(instance_ports)
        )
        await asyncio.gather(
            _pump(reader, upstream_writer), _pump(upstream_reader, writer), return_exceptions=True
        )

    server = await asyncio.start_server(forward, "127.0.0.1", port)
    try:
        yield
    finally:
        server.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError):
        while data := await reader.read(_CHUNK):
            writer.write(data)
            await writer.drain()
    writer.close()
