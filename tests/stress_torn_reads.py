"""Torn reads: a writer that rotates records as fast as it can, readers that check each one they are given.

    python tests/stress_torn_reads.py [--seconds 30] [--readers 4]

Prints what each reader counted and exits with 1 if one accepted a record that was never written.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import sys
import time
from contextlib import closing
from typing import Any

from shpool.board import CLOSED, Board, BoardReader, anonymous_board
from shpool.errors import TornBoardError

_SIZES = (900, 60_000)  # bytes: a small JWT, and about the largest record the board takes
_VARIANTS = 64  # records made beforehand, so that the writer does nothing but write


def record(number: int, size: int) -> bytes:
    """Return a payload that tells by itself whether it is whole: its digest, then bytes that depend on its number."""
    body = hashlib.shake_128(b"record %d" % number).digest(size)
    return hashlib.blake2b(body, digest_size=32).digest() + body


def is_whole(payload: bytes) -> bool:
    return hashlib.blake2b(memoryview(payload)[32:], digest_size=32).digest() == payload[:32]


class CountingWord:
    """The version word, with a count of the looks at it: one for each try of a read."""

    def __init__(self, reader: BoardReader) -> None:
        self._word = reader.version_word
        self.looks = 0

    def __getitem__(self, index: int) -> int:
        self.looks += 1
        return self._word[index]

    def release(self) -> None:
        self._word.release()


def read_until_closed(reader: BoardReader) -> dict[str, int]:
    """Read without pause; return the counts."""
    word: Any = CountingWord(reader)
    reader.version_word = word
    counts = {"reads": 0, "retries": 0, "given up": 0, "torn": 0, "backward": 0}
    newest = 0
    while True:
        before = word.looks
        try:
            version, payload = reader.read()
        except TornBoardError:
            counts["given up"] += 1
            continue
        if version == CLOSED:
            return counts
        counts["reads"] += 1
        counts["retries"] += word.looks - before - 1
        counts["torn"] += version > 0 and not is_whole(payload)
        counts["backward"] += version < newest
        newest = version


def run_reader(board: Board, result: int) -> None:
    with closing(board.reader()) as reader:
        os.write(result, json.dumps(read_until_closed(reader)).encode())


def fork_reader(board: Board) -> tuple[int, int]:
    """Start a reader process; return its id and the pipe its counts come from."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            run_reader(board, theirs)
            code = 0
        finally:
            os._exit(code)
    os.close(theirs)
    return pid, ours


def rotate(board: Board, seconds: float) -> int:
    """Post as fast as possible; return how often."""
    rng = random.Random(1)
    payloads = [record(number, rng.randint(*_SIZES)) for number in range(_VARIANTS)]
    give_up, posted = time.monotonic() + seconds, 0
    while time.monotonic() < give_up:
        for payload in payloads:
            board.post(payload, 0.0)
        posted += len(payloads)
    return posted


def counts_of(pid: int, pipe: int) -> dict[str, int]:
    with open(pipe, "rb") as stream:
        text = stream.read()
    os.waitpid(pid, 0)
    counts: dict[str, int] = json.loads(text)
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--readers", type=int, default=4)
    options = parser.parse_args()
    board = anonymous_board()
    try:
        readers = [fork_reader(board) for _ in range(options.readers)]
        posted = rotate(board, options.seconds)
    finally:
        board.close()
    total: dict[str, int] = {}
    for number, reader in enumerate(readers):
        counts = counts_of(*reader)
        print(f"reader {number}: " + ", ".join(f"{count:,} {name}" for name, count in counts.items()))
        total = {name: total.get(name, 0) + count for name, count in counts.items()}
    share = total["retries"] / max(total["reads"] + total["retries"], 1)
    print(f"{posted:,} posts in {options.seconds:g} s; {total['reads']:,} reads, {share:.1%} of the tries repeated")
    print(
        f"torn reads accepted: {total['torn']}; older after newer: {total['backward']}; given up: {total['given up']}"
    )
    is_sound = total["reads"] and not total["torn"] + total["backward"] + total["given up"]
    return 0 if is_sound else 1


if __name__ == "__main__":
    sys.exit(main())
