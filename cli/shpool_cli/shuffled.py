"""Jobs in random order, however many there are: they wait in a temporary file, and only their places in memory."""

from __future__ import annotations

import pickle
import random
import tempfile
from array import array
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from shpool.jobs import Job


def shuffled(jobs: Iterable[Job]) -> Iterator[Job]:
    """Yield the jobs in an order that is another one each time; 8 bytes of memory a job."""
    with tempfile.TemporaryFile() as file:
        places = array("Q")
        for job in jobs:
            places.append(file.tell())
            pickle.dump(job, file, protocol=5)
        random.shuffle(places)
        for place in places:
            file.seek(place)
            yield pickle.load(file)
