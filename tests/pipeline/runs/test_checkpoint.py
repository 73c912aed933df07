"""Checkpoints are read whole or refused, whatever happens to the file meanwhile."""

import itertools
import os
import threading

import pytest
import torch

from pipeline.runs.checkpoint import STEPS, load_checkpoint, read_meta, save_checkpoint
from stages.errors import UserError


def test_a_file_replaced_while_it_is_read_is_the_old_or_the_new(tmp_path):
    path, stop = tmp_path / "checkpoint.safetensors", threading.Event()
    paths = []
    for step in range(2):
        save_checkpoint(path, {name: torch.full((2000,), float(step)) for name in "abcdef"}, {"step": step})
        paths.append(path.read_bytes())

    def replace():
        for data in itertools.cycle(paths):
            (tmp_path / "next").write_bytes(data)
            os.replace(tmp_path / "next", path)
            if stop.is_set():
                break

    writer = threading.Thread(target=replace)
    writer.start()
    try:
        events = []
        for _ in range(1000):
            state, meta = load_checkpoint(path)
            assert all((tensor == meta["step"]).all() for tensor in state.values())
            events.append(meta["step"])
    finally:
        stop.set()
        writer.join()
    assert 0 in events and 1 in events


def test_state_and_meta_come_back(tmp_path):
    state = {"x": torch.randn(3, 4), "none": torch.zeros(0, 2), "n": torch.arange(5), "h": torch.ones(2).bfloat16()}
    save_checkpoint(tmp_path / "c", state, {"step": 3, "name": "\u00e9"})
    back, meta = load_checkpoint(tmp_path / "c")
    assert meta["step"] == 3 and meta["name"] == "\u00e9" and read_meta(tmp_path / "c") == meta
    assert all(torch.equal(back[name], tensor) and back[name].dtype == tensor.dtype for name, tensor in state.items())
    back["x"].add_(1)  # what is loaded may be trained on


@pytest.mark.parametrize("data", [b"", b"\x05", b"\xff" * 40, b"\x02" + b"\0" * 7 + b"{}", b"\x02" + b"\0" * 7 + b"[]"])
def test_other_bytes_are_damaged(tmp_path, data):
    (tmp_path / "c").write_bytes(data)
    for read in (load_checkpoint, read_meta):
        with pytest.raises(UserError, match="damaged checkpoint"):
            read(tmp_path / "c")


@pytest.mark.parametrize(
    "change",
    [
        {"step": "3"},
        {"steps": None},
        {"seconds": []},
        {"phases": 1},
        {"settings": 2},
        {"settings": [1]},
        {"upstream": 1},
    ],
)
def test_facts_of_another_kind_are_damaged(tmp_path, change):
    save_checkpoint(tmp_path / "c", {"x": torch.ones(2)}, {"step": 3, "steps": 4} | change)
    for read in (load_checkpoint, read_meta):
        with pytest.raises(UserError, match=f"damaged checkpoint .*its {next(iter(change))} is"):
            read(tmp_path / "c")


@pytest.mark.parametrize(
    "notes", ["NaN", '"x"', "[]", '{"pipeline": 7}', '{"pipeline": "7"}', '{"other": "{}"}', '{"pipeline": "{"}']
)
def test_a_header_without_facts_is_damaged(tmp_path, notes):
    header = f'{{"__metadata__": {notes}}}'.encode()
    (tmp_path / "c").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(UserError, match="damaged checkpoint") as error:
        read_meta(tmp_path / "c")
    assert "facts" in error.value.why or "Expecting" in error.value.why


def test_facts_that_are_needed_and_not_there_are_told(tmp_path):
    save_checkpoint(tmp_path / "c", {"x": torch.ones(2)}, {"step": 3})
    assert read_meta(tmp_path / "c")["step"] == 3
    with pytest.raises(UserError, match="it does not say its steps"):
        read_meta(tmp_path / "c", needs=STEPS)
