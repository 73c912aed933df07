"""Broken inputs are refused with a reason, and what is killed ends with the same bytes: a little of both."""

import os
import random

import pytest

if os.name != "posix":
    pytest.skip("limits and kills", allow_module_level=True)

from benchmarks.fuzz.fuzz import fault_of, fuzz
from benchmarks.fuzz.inputs import mutated, mutated_json
from benchmarks.kills import kills
from stages.errors import UserError


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["config", "override", "mesh", "run", "model"])
def test_sixty_broken_inputs_of_a_kind_show_no_fault(kind):
    assert fuzz(7, 60, [kind], limit_s=60) == []


@pytest.mark.slow
def test_five_killed_processes_end_with_the_bytes_of_one_left_alone(tmp_path):
    lines = kills(0, 5, tmp_path)
    assert len(lines) == 5 and not any(line["differs"] for line in lines)


def test_every_kind_of_fault_is_seen():
    def refused():
        raise UserError("a", "b", "c")

    def slip():
        try:
            [][0]
        except IndexError as error:
            raise UserError("a", str(error), "c") from error

    def hang():
        while True:
            pass

    assert fault_of(refused) is None and fault_of(lambda: None) is None
    assert "IndexError" in fault_of(slip)[0]
    assert "more than" in fault_of(hang, 0.05)[0]
    assert "ZeroDivisionError" in fault_of(lambda: 1 / 0)[0]
    assert "MemoryError" in fault_of(lambda: bytearray(2**40))[0]


def test_the_same_seed_breaks_an_input_in_the_same_way():
    whole = b'{"a": [1, 2, {"b": "c"}]}'
    for change in (mutated, lambda data, rng: mutated_json(data.decode(), rng)):
        assert [change(whole, random.Random(3)) for _ in range(2)] == [change(whole, random.Random(3))] * 2
        assert len({change(whole, random.Random(seed)) for seed in range(50)}) > 10
