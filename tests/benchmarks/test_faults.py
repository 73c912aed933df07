"""Broken inputs are refused with a reason, and what is killed ends with the same bytes: a little of both."""

import os
import random
import time
from functools import cache

import pytest

if os.name != "posix":
    pytest.skip("limits and kills", allow_module_level=True)

from benchmarks.fuzz.changes import mutated, mutated_json, mutated_mesh
from benchmarks.fuzz.fuzz import Report, ending_of, fuzz
from benchmarks.fuzz.samples import mesh_samples
from benchmarks.kills import kills
from stages.errors import UserError
from stages.mesh.files.read import read_mesh

KINDS = pytest.mark.parametrize("kind", ["config", "override", "mesh", "run", "model", "clip", "lora"])


@cache
def sixty(kind: str) -> Report:
    """What became of sixty broken inputs of a kind."""
    return fuzz(8, 60, [kind], limit_s=60)


@pytest.mark.slow
@KINDS
def test_sixty_broken_inputs_of_a_kind_show_no_fault(kind):
    assert sixty(kind).faults == []


@pytest.mark.slow
def test_five_killed_processes_end_with_the_bytes_of_one_left_alone(tmp_path):
    lines = list(kills(0, 5, tmp_path))
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

    assert ending_of(refused).how == "refused" and ending_of(lambda: None).how == "taken"
    for read, words in (
        (slip, "IndexError"),
        (hang, "more than"),
        (lambda: time.sleep(9), "more than"),
        (lambda: 1 / 0, "ZeroDivisionError"),
        (lambda: bytearray(2**40), "MemoryError"),
    ):
        ending = ending_of(read, 0.05)
        assert ending.how == "fault" and words in ending.what


def test_the_same_seed_breaks_an_input_in_the_same_way():
    whole = b'{"a": [1, 2, {"b": "c"}]}'
    for change in (mutated, lambda data, rng: mutated_json(data.decode(), rng)):
        assert [change(whole, random.Random(3)) for _ in range(2)] == [change(whole, random.Random(3))] * 2
        assert len({change(whole, random.Random(seed)) for seed in range(50)}) > 10


@pytest.mark.slow
@KINDS
def test_broken_inputs_get_past_the_first_check(kind):
    report = sixty(kind)
    assert report.taken[kind] >= 3
    assert len(report.refusals[kind]) >= 4
    assert report.refusals[kind].most_common(1)[0][1] <= 36, report.line(kind)


def test_what_is_changed_keeps_its_lengths_and_checksums(tmp_path):
    samples = mesh_samples(tmp_path / "meshes")
    for name, files in samples.items():
        (tmp_path / name).write_bytes(files[name])
        for beside, content in files.items():
            (tmp_path / beside).write_bytes(content)
        assert len(read_mesh(tmp_path / name).faces) >= 12
    glb = samples["scene.glb"]["scene.glb"]
    whole = [mutated_mesh(glb, ".glb", random.Random(seed)) for seed in range(40)]
    assert sum(len(data) == int.from_bytes(data[8:12], "little") for data in whole) > 25
    with pytest.raises(UserError, match="wanted"):
        for data in whole:
            (tmp_path / "scene.glb").write_bytes(data)
            read_mesh(tmp_path / "scene.glb")
