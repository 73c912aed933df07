"""One run by several processes: the numbers of one process with as many parts, one writer, and no silent end."""

import os
import signal
import socket
from pathlib import Path

import numpy as np
import pytest
import torch

if os.name != "posix":
    pytest.skip("kills and forks", allow_module_level=True)

from pipeline.output.glb import write_glb
from pipeline.runs.checkpoint import load_checkpoint
from stages.mesh.mesh import Mesh
from stages.parallel import WHOLE, Draws, Part, StepParts, agree, any_rank, first_then_others, from_first, splits
from tests.fork_server import Forked

RECIPE = """
prior: {coarse: reference, fine: reference}
reference: {supersample: 1}
checkpoint_every: 3
preview_every: 4
coarse:
  steps: 6
  resolution: 16
  views_per_step: 2
  samples: 32
  field: {levels: 4, log2_table: 10, finest: 32, hidden: 8}
  occupancy: {resolution: 16, every: 4}
  shading: {albedo_until: 0.33}
  preview_size: 16
fine:
  steps: 4
  resolution: 32
  views_per_step: 2
  tets: 12
  detail: {levels: 0}
  initialise: {samples: 24}
  preview_size: 16
export: {texture_size: 64, faces: 500, turntable_frames: 0, unwrap: boxes}
"""


def test_one_process_takes_all_parts():
    parts = list(StepParts(4, 2))
    assert parts == [Part(0, 2, 2, first=True, last=False), Part(1, 2, 2, first=False, last=True)]
    assert list(StepParts(4, 1)) == [Part(views=4)] and not splits(4, 1)
    assert any_rank(True) and not any_rank(False) and from_first(lambda: "a") == first_then_others(lambda: "a")
    agree("nothing", dict)


def test_parts_draw_streams_of_their_own_from_one_step():
    def step(parts: list[Part]) -> list[list[int]]:
        draws = Draws(torch.Generator().manual_seed(3))
        return [[int(torch.randint(9999, (), generator=g)) for g in draws.of_part(part)] for part in parts]

    both = [Part(0, 2, 1, last=False), Part(1, 2, 1, first=False)]
    (a_step, a), (b_step, b) = step(both)
    assert a_step == b_step and a != b
    assert step([Part(1, 2, 1)]) == [[b_step, b]]  # as the process draws that renders the second part alone
    whole = torch.Generator().manual_seed(3)
    assert Draws(whole).of_part(WHOLE) == (whole, whole)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("recipe")
    corners = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], np.float32) * [0.5, 0.4, 0.4]
    quads = [[0, 1, 3, 2], [4, 6, 7, 5], [0, 4, 5, 1], [2, 3, 7, 6], [0, 2, 6, 4], [1, 5, 7, 3]]
    faces = np.array([t for a, b, c, d in quads for t in ((a, b, c), (a, c, d))], np.int32)
    write_glb(Mesh(corners.astype(np.float32), faces, np.full((8, 3), 0.4, np.float32)), folder / "block.glb")
    (folder / "tiny.yaml").write_text(RECIPE)
    return ["--config", str(folder / "tiny.yaml"), f"reference.mesh={folder / 'block.glb'}"]


def two(pipeline, folder: Path, *words: str) -> list[Forked]:
    """Two processes as torchrun starts them, each with a folder for its output; they share FOLDER/run."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in (0, 1):
        own = folder / f"rank{rank}"
        own.mkdir(exist_ok=True)
        facts = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        ranks.append(pipeline(*words, cwd=own, **{name: str(value) for name, value in facts.items()}))
    return ranks


def begin(pipeline, folder: Path, recipe: list[str]) -> list[Forked]:
    return two(pipeline, folder, "run", "--prompt", "a block", "--out", "../run", *recipe)


def tensors(folder: Path, stage: str) -> dict[str, torch.Tensor]:
    return load_checkpoint(folder / stage / "checkpoint.safetensors")[0]


@pytest.fixture(scope="module")
def pair(pipeline, recipe, tmp_path_factory) -> Path:
    """The run of two processes."""
    folder = tmp_path_factory.mktemp("pair")
    first, second = (rank.finish() for rank in begin(pipeline, folder, recipe))
    assert first[0] == second[0] == 0, (first, second)
    assert "done: ../run" in first[1] and second[1:] == ("", "")
    return folder / "run"


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one_with_two_parts(pipeline, recipe, pair, tmp_path):
    words = ["run", "--prompt", "a block", "--out", "run", *recipe, "coarse.accumulate=2", "fine.accumulate=2"]
    code, _, err = pipeline(*words, cwd=tmp_path).finish()
    assert code == 0, err
    for stage in ("coarse", "fine"):
        alone, together = tensors(tmp_path / "run", stage), tensors(pair, stage)
        assert alone.keys() == together.keys()
        for name, value in alone.items():
            assert torch.allclose(together[name].double(), value.double(), rtol=1e-6, atol=1e-6), (stage, name)
    lines = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (tmp_path / "run", pair)]
    assert len(lines[0]) == len(lines[1]) == 10
    assert all('"nonfinite": 0.0' in line for line in lines[1])


@pytest.mark.slow
def test_a_stopped_run_of_two_processes_resumes_to_the_same_bytes(pipeline, recipe, pair, tmp_path):
    ranks = begin(pipeline, tmp_path, recipe)
    ranks[0].wait_until((tmp_path / "run" / "metrics.jsonl").exists)
    ranks[1].send_signal(signal.SIGTERM)  # one is asked, and all stop after the same step
    (code, out, err), (second, *texts) = (rank.finish() for rank in ranks)
    assert (code, second) == (130, 143), (out, err, texts)  # 128 + the signal that each knows of
    assert "pipeline resume ../run" in err and texts == ["", ""]
    assert (tmp_path / "run" / "coarse" / "checkpoint.safetensors").exists()
    done = [rank.finish() for rank in two(pipeline, tmp_path, "resume", "../run")]
    assert [code for code, *_ in done] == [0, 0], done
    assert (tmp_path / "run" / "mesh.glb").read_bytes() == (pair / "mesh.glb").read_bytes()
    for stage in ("coarse", "fine"):
        ours, whole = tensors(tmp_path / "run", stage), tensors(pair, stage)
        assert all(torch.equal(value, ours[name]) for name, value in whole.items())


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_other_with_a_message_and_a_checkpoint(pipeline, recipe, pair, tmp_path, victim):
    ranks = begin(pipeline, tmp_path, [*recipe, "coarse.steps=400"])
    path = tmp_path / "run" / "coarse" / "checkpoint.safetensors"
    ranks[0].wait_until(path.exists)
    ranks[victim].send_signal(signal.SIGKILL)
    results = [rank.finish() for rank in ranks]
    code, _, err = results[1 - victim]
    assert code == 2 and "what: another process of this run ended" in err, results
    assert "is saved" in err and "torchrun --nproc-per-node 2 -m pipeline resume ../run" in err
    assert load_checkpoint(path)[1]["step"] >= 3
    if victim == 1:  # the steps taken before are those of a run that nobody disturbed
        state, meta = load_checkpoint(path)
        assert f"coarse step {meta['step']} of 400 is saved" in err and int(state["step_index"]) == meta["step"]


@pytest.mark.slow
def test_what_no_process_can_do_is_told_once(pipeline, recipe, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").touch()
    first, second = (rank.finish() for rank in begin(pipeline, tmp_path, recipe))
    assert first[0] == second[0] == 2
    assert "already holds files" in first[2] and second[1:] == ("", "")
