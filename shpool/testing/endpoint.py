"""One loopback port that speaks HTTP/1.1 with keep-alive, and can be told to misbehave.

Everything here runs on one event loop: nothing needs a lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import deque
from typing import TYPE_CHECKING, Any, cast

from shpool.testing.messages import Request, Response, take_request

if TYPE_CHECKING:
    from collections.abc import Callable

_BACKLOG = 256  # connections that may wait to be accepted: more than the 64 workers of the largest test


class Endpoint:
    """A listening port, its connections, and the faults it was told to show.

    Args:
        answer: Makes the answer to a request.
        record: Told of each request and its answer, before that is sent.
    """

    def __init__(self, answer: Callable[[Request], Response], record: Callable[[Request, Response], None]) -> None:
        self.port = 0
        self.delay = 0.0
        self.always: Response | None = None
        self.next_answers: deque[Response] = deque()
        self._answer = answer
        self._record = record
        self._hanging = False
        self._server: asyncio.Server | None = None
        self._reserved: socket.socket | None = None
        self._connections: set[_Connection] = set()
        self._held: list[tuple[_Connection, Request]] = []

    async def open(self) -> None:
        """Begin to listen, on the port held before if there was one."""
        if self._server is not None:
            return
        sock, self._reserved = self._reserved or _bound_socket(0), None
        self.port = sock.getsockname()[1]
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Connection(self), sock=sock, backlog=_BACKLOG)

    async def refuse(self) -> None:
        """Close the listening socket and all connections; keep the port, without listening, from others."""
        if self._server is None:
            return
        await self.close()
        self._reserved = _bound_socket(self.port)

    async def close(self) -> None:
        """Close everything this port holds open."""
        if self._reserved is not None:
            self._reserved.close()
            self._reserved = None
        if self._server is not None:
            self._server.close()
            self._server = None
            await _accepted()
        for connection in list(self._connections):
            connection.abort()
        self._held.clear()
        while self._connections:  # noqa: ASYNC110 - the loop reports lost connections in its next turn
            await asyncio.sleep(0)

    async def set(self, **faults: Any) -> None:  # noqa: ANN401 - of this class's own public attributes
        """Set attributes between two answers."""
        vars(self).update(faults)

    async def hang(self, on: bool) -> None:  # noqa: FBT001 - the state to take is the whole message
        """Accept requests without answering; once off, answer those whose clients are still there."""
        self._hanging = on
        if not on:
            held, self._held = self._held, []
            for connection, request in held:
                self.receive(connection, request)

    def receive(self, connection: _Connection, request: Request) -> None:
        """Answer a request, now or later, as the faults say."""
        if self._hanging:
            self._held.append((connection, request))
        elif self.delay > 0:
            asyncio.get_running_loop().call_later(self.delay, self._respond, connection, request)
        else:
            self._respond(connection, request)

    def add(self, connection: _Connection) -> None:
        """Take note of a new connection."""
        self._connections.add(connection)

    def remove(self, connection: _Connection) -> None:
        """Forget a lost connection and what it has asked."""
        self._connections.discard(connection)
        self._held = [(other, request) for other, request in self._held if other is not connection]

    def _respond(self, connection: _Connection, request: Request) -> None:
        if connection not in self._connections:
            return  # the client has gone: a login nobody receives must not be counted
        fault = self.next_answers.popleft() if self.next_answers else self.always
        response = fault or self._answer(request)
        self._record(request, response)
        connection.send(request, response)


class _Connection(asyncio.Protocol):
    """One client's connection: requests are answered in the order they came."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._buffer = bytearray()
        self._transport: asyncio.Transport | None = None
        self._is_waiting = False  # a request is with the endpoint

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._endpoint.add(self)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the signature of asyncio.Protocol
        self._endpoint.remove(self)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        self._serve_next()

    def send(self, request: Request, response: Response) -> None:
        if self._transport is None or self._transport.is_closing():
            return
        self._transport.write(response.encode(head_only=request.method == "HEAD"))
        if response.is_cut_short:
            if response.stall_at is None:
                self._transport.close()  # once what was written is sent
            return
        self._is_waiting = False
        if request.keep_alive:
            self._serve_next()
        else:
            self._transport.close()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def _serve_next(self) -> None:
        if self._is_waiting:
            return
        try:
            request = take_request(self._buffer)
        except ValueError:
            self.abort()
            return
        if request is not None:
            self._is_waiting = True
            self._endpoint.receive(self, request)


async def _accepted() -> None:
    """Wait until connections that are being accepted are made: only then can they be closed."""
    quiet = 0  # turns of the loop in a row: a call to accept may be due, and makes a task
    for _ in range(100):
        await asyncio.sleep(0)
        under_way = asyncio.all_tasks() - {asyncio.current_task()}
        if under_way:
            await asyncio.wait(under_way, timeout=0.1)
        quiet = 0 if under_way else quiet + 1
        if quiet > 2:  # noqa: PLR2004 - the call, the task it makes, the connection that makes
            return


def _bound_socket(port: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    with contextlib.ExitStack() as on_error:
        on_error.callback(sock.close)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # the port's old connections may linger
        sock.bind(("127.0.0.1", port))
        on_error.pop_all()
    return sock
