"""Batches on a Ray cluster of two worker processes on this machine."""

import json
import os
import socket
import sys

import pytest

from pipeline import cli
from pipeline.batch import batch
from pipeline.batch.workers import make_engine
from stages.errors import UserError
from tests.pipeline.batch.test_batch import SETTINGS, kill_once, prompts_file, same_bytes, slow_toys  # noqa: F401


def test_ray_absent_is_told_in_three_lines(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    words = ["batch", str(prompts_file(tmp_path, "a red mug")), "--out", str(tmp_path / "out"), "--engine", "ray"]
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    told = capsys.readouterr().err
    assert stop.value.code == 2 and len(told.strip().splitlines()) == 3 and "cluster" in told


def test_a_dead_address_is_told_in_three_lines(tmp_path):
    pytest.importorskip("ray", reason="extra cluster")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(UserError, match="no Ray cluster answers"):
        make_engine("ray", 1, 1, tmp_path, address)


def test_an_unknown_engine_and_an_address_without_ray_are_refused(tmp_path):
    with pytest.raises(UserError, match="no engine is called slurm"):
        make_engine("slurm", 1, 1, tmp_path)
    with pytest.raises(UserError, match="has no use here"):
        make_engine("local", 1, 1, tmp_path, "127.0.0.1:6379")


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="kills")
def test_a_run_whose_ray_worker_is_killed_is_resumed_to_the_bytes_of_a_local_batch(tmp_path, monkeypatch, slow_toys):  # noqa: F811
    pytest.importorskip("ray", reason="extra cluster")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # Ray's own is 15, with which a busy machine takes half an hour
    path, out = prompts_file(tmp_path, "a mug", "a bug", "a cat"), tmp_path / "ray"
    killer = kill_once(out / "a-mug-0.pids", out / "a-mug-0/coarse/checkpoint.safetensors")
    rows = batch.run_batch(path, out, overrides=SETTINGS, engine="ray", workers=2)
    killer.join()
    assert [row.state for row in rows] == ["done", "failed", "done"]
    assert "ValueError: a bug" in rows[1].error
    pids = {name: (out / f"{name}.pids").read_text().split() for name in ("a-mug-0", "a-bug-0", "a-cat-0")}
    assert len(set(pids["a-mug-0"])) == 2, "another worker process took the killed one's place"
    assert len(json.loads((out / "a-mug-0/run.json").read_text())["sessions"]) == 2, "it was resumed"
    assert len({pid for each in pids.values() for pid in each}) == 3, "two workers, and the one that was killed"
    monkeypatch.setenv("TOY_STEP_S", "0")
    batch.run_batch(prompts_file(tmp_path, "a mug", "a cat"), tmp_path / "local", overrides=SETTINGS, workers=1)
    for name in ("a-mug-0", "a-cat-0"):
        assert same_bytes(out / name, tmp_path / "local" / name)
