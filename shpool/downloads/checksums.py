"""Checksums of files: those that were given, those that servers send, and whether the content has them.

Servers send them as ``Repr-Digest`` (RFC 9530), ``Digest`` (RFC 3230) or ``Content-MD5`` (RFC 1864).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_SIZES = {"sha256": 64, "md5": 32, "sha512": 128}  # hex digits
_SERVER_NAMES = {"sha-256": "sha256", "sha-512": "sha512", "md5": "md5"}
_HEADERS = frozenset({"digest", "repr-digest", "content-md5"})
_STRONGEST_FIRST = (
    "sha256",
    "sha512",
    "md5",
)  # sha256 before sha512: as good here, and many processors have it in hardware
_MEMBER = re.compile(r"\s*([A-Za-z0-9-]+)\s*=\s*:?([A-Za-z0-9+/=]+):?\s*")
_HEX_DIGITS = "0123456789abcdef"
_HTTP_OK = 200
_BLOCK = 1 << 20  # bytes read at once


def checked_digest(algorithm: str, text: str) -> str:
    """Return a checksum in the form ``hexdigest()`` gives.

    Raises:
        ValueError: It is none of that algorithm.

    >>> checked_digest("md5", "D41D8CD98F00B204E9800998ECF8427E")
    'd41d8cd98f00b204e9800998ecf8427e'
    """
    digest = text.strip().lower()
    if len(digest) != _SIZES[algorithm] or digest.strip(_HEX_DIGITS):
        msg = f"{algorithm} is {_SIZES[algorithm]} hex digits, not {text!r}"
        raise ValueError(msg)
    return digest


def sent_digests(fields: Mapping[str, str], status: int) -> dict[str, str]:
    """Return the strongest checksum of the whole file that an answer's header states, by algorithm.

    ``Content-MD5`` covers the bytes of the answer, which are the whole file only with status 200.

    >>> sent_digests({"repr-digest": "sha-256=:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=:"}, 200)["sha256"][:8]
    'e3b0c442'
    """
    if fields.keys().isdisjoint(_HEADERS):
        return {}
    found: dict[str, str] = {}
    members = [*_members(fields.get("digest", "")), *_members(fields.get("repr-digest", ""))]
    if status == _HTTP_OK:
        members.insert(0, ("md5", fields.get("content-md5", "")))
    for name, encoded in members:
        algorithm = _SERVER_NAMES.get(name.lower())
        digest = _decoded(encoded)
        if algorithm is not None and len(digest) == _SIZES[algorithm]:
            found[algorithm] = digest
    for algorithm in _STRONGEST_FIRST:
        if algorithm in found:
            return {algorithm: found[algorithm]}
    return {}


def _members(header: str) -> Iterable[tuple[str, str]]:
    for part in header.split(",") if header else ():
        match = _MEMBER.fullmatch(part)
        if match is not None:
            yield match[1], match[2]


def _decoded(text: str) -> str:
    try:
        return base64.b64decode(text, validate=True).hex()
    except (binascii.Error, ValueError):
        return ""


class Hashers:
    """Compute the checksums a file must have while its bytes go by.

    Args:
        expected: Pairs of algorithm and hex digest; one algorithm may come twice.
    """

    def __init__(self, expected: Iterable[tuple[str, str]]) -> None:
        self._expected = [*expected]
        self._running: dict[str, Any] = {}
        self.restart()

    def restart(self) -> None:
        """Begin again before the first byte."""
        self._running = {name: hashlib.new(name, usedforsecurity=False) for name, _ in self._expected}

    def update(self, chunks: Iterable[bytes]) -> None:
        """Take more bytes."""
        for running in self._running.values():
            for chunk in chunks:
                running.update(chunk)

    def read(self, descriptor: int) -> None:
        """Take all bytes of an open file, from its start."""
        offset = 0
        while self._running and (block := os.pread(descriptor, _BLOCK, offset)):
            self.update([block])
            offset += len(block)

    def mismatch(self) -> str:
        """Return in words which checksum the bytes do not have; empty when they have all."""
        for name, digest in self._expected:
            found = self._running[name].hexdigest()
            if found != digest:
                return f"its {name} is {found}, not {digest}"
        return ""


def has_digests(path: str, expected: Iterable[tuple[str, str]]) -> bool:
    """Tell whether a file can be read and has these checksums."""
    hashers = Hashers(expected)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        hashers.read(descriptor)
    finally:
        os.close(descriptor)
    return not hashers.mismatch()
