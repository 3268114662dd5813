from __future__ import annotations

import itertools
import random

from shpool.jobs import Job, make_jobs
from shpool_cli.shuffled import shuffled


def jobs(count: int) -> list[Job]:
    return list(make_jobs("tests:f", (((number,), {"text": "ü" * number}) for number in range(count))))


def test_every_job_comes_once_and_as_it_was() -> None:
    given = jobs(100)
    assert sorted(shuffled(given), key=lambda job: job.index) == given


def test_the_order_is_another_one_each_time() -> None:
    given = jobs(100)
    orders = {tuple(job.index for job in shuffled(given)) for _ in range(3)}
    assert len(orders) == 3


def test_each_job_may_come_first() -> None:
    random.seed(4711)
    assert {next(shuffled(jobs(4))).index for _ in range(200)} == {0, 1, 2, 3}


def test_none_are_none() -> None:
    assert list(shuffled([])) == []


def test_the_input_is_read_to_its_end_before_the_first_comes() -> None:
    source = iter(jobs(10))
    next(shuffled(source))
    assert next(source, None) is None


def test_a_consumer_that_leaves_closes_the_file() -> None:
    """A file left to the garbage collector would be a warning, which is an error here."""
    stream = shuffled(itertools.islice(jobs(10), 10))
    next(stream)
    stream.close()  # type: ignore[attr-defined]  # it is a generator
