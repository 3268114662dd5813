from __future__ import annotations

import os
import socket
import threading

from patience import PATIENCE, until

from shpool.engines.lifeline import Lifeline
from shpool.engines.messages import Kind, MessageBuffer, encode
from shpool.pickling import load


def test_what_is_given_back_is_told_before_anything_later_is_read() -> None:
    """The parent takes answers in the order of its calls: a later one must not come before it knows that."""
    ours, theirs = socket.socketpair()
    recalled, recall = os.pipe()
    lifeline = Lifeline(theirs, recalled)
    try:
        ours.sendall(encode(Kind.CALL, 1) + encode(Kind.BATCH, 2))
        assert next(lifeline.messages()).number == 1
        giving = threading.Thread(target=lifeline._give_back)
        with lifeline._writing:  # as while a large result is being sent
            giving.start()
            until(lambda: not lifeline._arrived)
            assert not lifeline._reading.acquire(timeout=0.1)
        giving.join(PATIENCE)
        assert lifeline._reading.acquire(blocking=False)
        [told] = MessageBuffer().feed(ours.recv(4096))
        assert told.kind == Kind.RETURNED
        assert load(told.payload) == [2]
    finally:
        ours.close()
        theirs.close()
        os.close(recalled)
        os.close(recall)
