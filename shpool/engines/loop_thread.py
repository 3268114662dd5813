"""An asyncio event loop in a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

T = TypeVar("T")


class LoopThread:
    """The loop, as other threads see it.

    Args:
        name: The thread's.
    """

    def __init__(self, name: str) -> None:
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._has_begun = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None  # None before it has begun and once it is to end

    def start(self) -> None:
        """Begin."""
        self._thread.start()
        self._has_begun.wait()

    def soon(self, function: Callable[..., object], *args: object) -> None:
        """Have the loop call a function, as soon as it can; before it has begun and after its end that is left."""
        loop = self._loop
        if loop is not None:
            with contextlib.suppress(RuntimeError):  # closed meanwhile
                loop.call_soon_threadsafe(function, *args)

    def result(self, coroutine: Coroutine[Any, Any, T], seconds: float | None = None) -> T:
        """Run a coroutine in the loop, and wait for its end, or so long.

        Raises:
            concurrent.futures.TimeoutError: It takes longer, and goes on.
            RuntimeError: The loop has ended.
        """
        loop = self._loop
        if loop is None:
            coroutine.close()
            reason = "the event loop has ended"
            raise RuntimeError(reason)
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(seconds)

    def end(self) -> None:
        """Stop the loop, and wait for that; harmless when repeated, or before the start."""
        loop, self._loop = self._loop, None
        if loop is not None:
            loop.call_soon_threadsafe(loop.stop)
            self._thread.join()

    def _run(self) -> None:
        loop = asyncio.new_event_loop()
        asyncio.set_event_loop(loop)
        self._loop = loop
        loop.call_soon(self._has_begun.set)
        try:
            loop.run_forever()
        finally:
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.run_until_complete(loop.shutdown_default_executor())
            loop.close()
