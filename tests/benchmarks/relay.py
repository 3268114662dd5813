"""Stand between clients and a server, and let every byte take its time: latency where the kernel offers none.

    python tests/benchmarks/relay.py SERVER_PORT SECONDS

prints the port it listens on. What a client sends, and what it is sent, arrives so many seconds later; a connection is
accepted at once, so a client's first answer takes two of these delays, not the four that a handshake would make it.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

CHUNK = 2**18  # bytes


async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay: float) -> None:
    """Pass on what arrives, each piece after the delay and in order."""
    loop = asyncio.get_running_loop()
    pieces: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(256)

    async def deliver() -> None:
        while True:
            due, piece = await pieces.get()
            await asyncio.sleep(due - loop.time())
            if not piece:
                break
            writer.write(piece)
            await writer.drain()

    delivering = asyncio.create_task(deliver())
    with contextlib.suppress(OSError):
        while piece := await reader.read(CHUNK):
            await pieces.put((loop.time() + delay, piece))
    await pieces.put((loop.time() + delay, b""))
    with contextlib.suppress(OSError):
        await delivering
    writer.close()


def relay_to(port: int, delay: float) -> Callable[..., Coroutine[None, None, None]]:
    """Return what serves one connection."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(carry(reader, far_writer, delay), carry(far_reader, writer, delay))

    return serve


async def main() -> None:
    """Relay until killed."""
    port, delay = int(sys.argv[1]), float(sys.argv[2])
    server = await asyncio.start_server(relay_to(port, delay), "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
