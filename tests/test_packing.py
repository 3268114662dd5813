from __future__ import annotations

import pytest
from pool_tasks import Unpicklable

from shpool.engines.packing import dump_setup
from shpool.engines.setup import WorkerSetup
from shpool.errors import UnpicklableError


def test_an_initializer_that_cannot_be_pickled_is_named() -> None:
    with pytest.raises(UnpicklableError, match=r"initializer.*this value stays where it is"):
        dump_setup(WorkerSetup(initializer=print, initargs=(Unpicklable(),)))
