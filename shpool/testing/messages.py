"""HTTP/1.1 messages (RFC 9112), as much as a loopback server needs; no input or output here."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class Request:
    """One request; header names are lower case."""

    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes
    keep_alive: bool

    @property
    def path(self) -> str:
        """The target without its query."""
        return urlsplit(self.target).path

    def query(self, name: str, default: str) -> str:
        """Return one parameter of the query."""
        return parse_qs(urlsplit(self.target).query).get(name, [default])[0]

    def form(self) -> dict[str, str]:
        """Return the fields of a form-encoded body."""
        return {name: values[0] for name, values in parse_qs(self.body.decode("ascii", "replace")).items()}


@dataclass(frozen=True)
class Response:
    """One answer.

    Attributes:
        status: HTTP status.
        body: Content.
        headers: Fields; ``Content-Length`` is added.
        cut_at: Close the connection after so many bytes of the content.
        stall_at: Send nothing more after so many bytes of the content.
    """

    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    cut_at: int | None = None
    stall_at: int | None = None

    @property
    def is_cut_short(self) -> bool:
        """Tell whether not all of the content is sent."""
        return self.cut_at is not None or self.stall_at is not None

    @classmethod
    def of_json(cls, status: int, content: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> Response:
        """Return an answer that carries a JSON object."""
        return cls(status, json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})})

    def encode(self, *, head_only: bool = False) -> bytes:
        """Return the bytes to send; without the body in answer to HEAD."""
        try:
            phrase = HTTPStatus(self.status).phrase
        except ValueError:
            phrase = "Unknown"
        lines = [f"HTTP/1.1 {self.status} {phrase}", f"Content-Length: {len(self.body)}"]
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        head = ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
        if head_only:
            return head
        sent = min(len(self.body) if at is None else at for at in (self.cut_at, self.stall_at))
        return head + self.body[:sent]


def take_request(buffer: bytearray) -> Request | None:
    r"""Take the first whole request off the buffer; None while its end has not arrived.

    Raises:
        ValueError: The bytes are no HTTP/1 request, or have a body of unknown length.

    >>> buffer = bytearray(b"GET /tiles/1 HTTP/1.1\r\nHost: loopback\r\n\r\nGET")
    >>> take_request(buffer).path, buffer
    ('/tiles/1', bytearray(b'GET'))
    """
    end = buffer.find(b"\r\n\r\n")
    if end < 0:
        return None
    request_line, *lines = buffer[:end].decode("latin-1").split("\r\n")
    method, target, version = request_line.split(" ")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if not version.startswith("HTTP/1.") or "transfer-encoding" in headers:
        msg = "neither other protocols nor chunked requests are understood here"
        raise ValueError(msg)
    body_end = end + 4 + int(headers.get("content-length", "0"))
    if len(buffer) < body_end:
        return None
    body = bytes(buffer[end + 4 : body_end])
    del buffer[:body_end]
    keep_alive = version == "HTTP/1.1" and headers.get("connection", "").lower() != "close"
    return Request(method, target, headers, body, keep_alive)
