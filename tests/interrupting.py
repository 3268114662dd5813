"""Calls that are interrupted, as by a signal's handler: at any step of the interpreter."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType


def interrupted(call: Callable[[], object], step: int, by: Callable[[], object]) -> bool:
    """Make a call, and another one in the middle of it.

    Args:
        call: What is interrupted.
        step: Before which of the steps of functions written in Python, from 0.
        by: Called there, once.

    Returns:
        Whether there are so many steps.
    """
    steps = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal steps
        frame.f_trace_opcodes = True
        if event == "opcode":
            if steps == step:
                sys.settrace(None)
                by()
                sys.settrace(trace)
            steps += 1
        return trace

    former = sys.gettrace()
    sys._getframe().f_trace_opcodes = True  # Python 3.12 looks for that here only
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(former)
    return steps > step
