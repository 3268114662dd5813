from __future__ import annotations

import random

from shpool_cli.keyfield import CallTable


def test_a_table_tells_a_key_with_other_arguments_however_large_it_is() -> None:
    table = CallTable()
    numbers = list(range(10_000))
    random.shuffle(numbers)
    assert all(table.add(str(number), f"arguments of {number}") for number in numbers)
    assert all(table.add(str(number), f"arguments of {number}") for number in numbers)
    assert not any(table.add(str(number), "others") for number in numbers)
