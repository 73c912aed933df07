"""The real stages, tiny, under the reference prior: killed at several moments of both and resumed to the same bytes."""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

if os.name != "posix":
    pytest.skip("kills and forks", allow_module_level=True)

from benchmarks.kills import RECIPE
from pipeline.output.glb import write_glb
from pipeline.runs.checkpoint import load_checkpoint
from stages.mesh.mesh import Mesh

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """A recipe that rebuilds a red block with a blue bump."""
    folder = tmp_path_factory.mktemp("recipe")
    corners = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], np.float32) * [0.5, 0.3, 0.3]
    quads = [[0, 1, 3, 2], [4, 6, 7, 5], [0, 4, 5, 1], [2, 3, 7, 6], [0, 2, 6, 4], [1, 5, 7, 3]]
    faces = np.array([t for a, b, c, d in quads for t in ((a, b, c), (a, c, d))], np.int32)
    colours = np.where(corners[:, :1] > 0, [[0.8, 0.1, 0.1]], [[0.1, 0.1, 0.8]]).astype(np.float32)
    mesh = Mesh(corners.astype(np.float32), faces, colours)
    assert mesh.signed_volume() > 0
    write_glb(mesh, folder / "block.glb")
    (folder / "tiny.yaml").write_text(RECIPE)
    return folder


def arguments(recipe: Path) -> list[str]:
    files = ["--config", str(recipe / "tiny.yaml"), f"reference.mesh={recipe / 'block.glb'}"]
    return ["run", "--prompt", "a block", *files, "--out", "run"]


def metrics(folder: Path) -> list[dict]:
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in entry.items() if key != "seconds"} for entry in entries]


def tensors(folder: Path, stage: str) -> dict[str, bytes]:
    state, _ = load_checkpoint(folder / stage / "checkpoint.safetensors")
    return {name: tensor.contiguous().numpy().tobytes() for name, tensor in state.items()}


@pytest.fixture(scope="module")
def uninterrupted(pipeline, recipe, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    code, _, err = pipeline(*arguments(recipe), cwd=folder).finish()
    assert code == 0, err
    return folder / "run"


def test_tiny_run_ends_with_a_solid_mesh(uninterrupted):
    run = json.loads((uninterrupted / "run.json").read_text())
    assert run["status"] == "finished" and run["export"]["report"]["solid"]
    assert len(metrics(uninterrupted)) == 12 + 9


def test_same_seed_gives_the_same_bytes(pipeline, recipe, uninterrupted, tmp_path):
    code, _, err = pipeline(*arguments(recipe), cwd=tmp_path).finish()
    assert code == 0, err
    assert (tmp_path / "run" / "mesh.glb").read_bytes() == (uninterrupted / "mesh.glb").read_bytes()
    for stage in ("coarse", "fine"):
        assert tensors(tmp_path / "run", stage) == tensors(uninterrupted, stage)


@pytest.mark.parametrize(("stage", "step"), [("coarse", 3), ("coarse", 9), ("fine", 3), ("fine", 6)])
def test_killed_and_resumed_equals_uninterrupted(pipeline, recipe, uninterrupted, tmp_path, stage, step):
    folder = tmp_path / "run"
    process = pipeline(*arguments(recipe), cwd=tmp_path)
    path = folder / stage / "checkpoint.safetensors"
    process.wait_until(lambda: path.exists() and load_checkpoint(path)[1]["step"] >= step)
    process.send_signal(signal.SIGKILL)
    assert process.finish()[0] == -signal.SIGKILL
    assert not (folder / "mesh.glb").exists()
    code, _, err = pipeline("resume", "run", cwd=tmp_path).finish()
    assert code == 0, err
    assert (folder / "mesh.glb").read_bytes() == (uninterrupted / "mesh.glb").read_bytes()
    assert metrics(folder) == metrics(uninterrupted)
    for name in ("coarse", "fine"):
        assert tensors(folder, name) == tensors(uninterrupted, name)


def test_export_of_the_finished_run_writes_the_same_bytes(pipeline, uninterrupted, tmp_path):
    shutil.copytree(uninterrupted, tmp_path / "run")
    code, _, err = pipeline("export", "run", "--format", "glb,obj,ply,stl", "--out", "files", cwd=tmp_path).finish()
    assert code == 0, err
    assert (tmp_path / "files" / "mesh.glb").read_bytes() == (uninterrupted / "mesh.glb").read_bytes()
    assert {path.suffix for path in (tmp_path / "files").iterdir()} == {".glb", ".obj", ".mtl", ".png", ".ply", ".stl"}


def test_coarse_alone_is_exported_as_a_closed_mesh(pipeline, recipe, tmp_path):
    code, _, err = pipeline(*arguments(recipe), "--stages", "coarse", cwd=tmp_path).finish()
    assert code == 0, err
    assert json.loads((tmp_path / "run" / "run.json").read_text())["export"]["report"]["solid"]
