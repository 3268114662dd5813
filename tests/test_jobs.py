from __future__ import annotations

import itertools
import pickle

import pytest

from shpool.jobs import Job, job_key, make_jobs


def test_keys_name_the_content() -> None:
    base = job_key("m:f", (1, "a"), {"x": 1, "y": 2})
    assert base == job_key("m:f", (1, "a"), {"y": 2, "x": 1})
    others = [job_key("m:g", (1, "a"), {"x": 1, "y": 2}), job_key("m:f", ("1", "a"), {"x": 1, "y": 2})]
    assert base not in others
    assert len(base) == 16


def test_a_key_does_not_depend_on_this_process() -> None:
    """A journal compares keys across runs: sha256 over canonical JSON, never ``hash()``."""
    assert job_key("tiles:fetch", (1,), {"size": 10}) == "e370e826e562075c"


def test_what_has_no_json_form_has_no_key() -> None:
    with pytest.raises(TypeError):
        job_key("m:f", (object(),), {})


def test_jobs_are_made_lazily_and_numbered_from_0() -> None:
    made = make_jobs("m:f", (((number,), {}) for number in itertools.count()))
    first, second = itertools.islice(made, 2)
    assert (first.index, second.index) == (0, 1)
    assert first.key != second.key


def test_a_job_travels() -> None:
    job = Job(0, "key", (1,), {"a": 2})
    assert pickle.loads(pickle.dumps(job)) == job
