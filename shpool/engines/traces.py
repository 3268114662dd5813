"""What outposts leave on their process for their time: environment variables, and the root logger's level."""

from __future__ import annotations

import logging
import os
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


class Traces:
    """The traces of all of them.

    How it was before the first of them is kept here, not in them: they end in any order, and each leaves what those
    that are still there want. Of a variable that is the latest one's value; the level lets pass what the most curious
    wants, as each takes its own calls' records from its own level on.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards what follows
        self._wants: dict[object, tuple[Mapping[str, str], int | None]] = {}  # in the order in which they came
        self._former_env: dict[str, str | None] = {}
        self._former_level: int | None = None

    def add(self, outpost: object, env: Mapping[str, str], level: int | None) -> None:
        """Set what an outpost wants."""
        with self._lock:
            self._wants[outpost] = env, level
            for name in env:
                self._former_env.setdefault(name, os.environ.get(name))
            os.environ.update(env)
            if level is not None:
                if self._former_level is None:
                    self._former_level = logging.getLogger().level
                self._set_level()

    def remove(self, outpost: object) -> None:
        """Undo what an outpost wanted, as far as no other wants it."""
        with self._lock:
            env, level = self._wants.pop(outpost, ({}, None))
            for name in env:
                wanted = [others[name] for others, _ in self._wants.values() if name in others]
                _set(name, wanted[-1] if wanted else self._former_env.pop(name))
            if level is not None:
                self._set_level()

    def _set_level(self) -> None:
        former = self._former_level or logging.NOTSET
        levels = [level for _, level in self._wants.values() if level is not None]
        logging.getLogger().setLevel(min([former, *levels]))
        if not levels:
            self._former_level = None


def _set(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value
