"""Prompt editing: a finished run goes on under another prompt; real stages, tiny, under the reference prior."""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

if os.name != "posix":
    pytest.skip("kills and forks", allow_module_level=True)

from pipeline.config.model import load_config, read_config
from pipeline.output.glb import write_glb
from pipeline.runs.checkpoint import load_checkpoint, read_meta
from pipeline.runs.inputs import check_inputs
from stages.errors import UserError
from stages.mesh.mesh import Mesh

TINY = """
prior: {coarse: reference, fine: reference}
reference: {supersample: 1}
guidance:
  coarse: {scale: 1, t_min: 0.28, t_max: 0.28}
  fine: {scale: 1, t_min: 0.28, t_max: 0.28}
checkpoint_every: 3
preview_every: 100
coarse:
  steps: 30
  resolution: 24
  views_per_step: 2
  samples: 64
  lr: [0.05, 0.005, 0, 1, cosine]
  field: {levels: 6, log2_table: 11, finest: 64, hidden: 16}
  occupancy: {resolution: 32}
  shading: {albedo_until: 1}
  background: {random_probability: 1, grey: [0, 0], tint: 0}   # black: the object alone brings colour
  preview_size: 16
fine:
  steps: 2
  resolution: 48
  tets: 16
  detail: {levels: 0}
  initialise: {samples: 32}
  preview_size: 16
export: {texture_size: 64, faces: 1000, turntable_frames: 0, unwrap: boxes, formats: [glb]}
"""
SHORT = ["coarse.steps=8", "coarse.lr=[0.05, 0.005, 0, 1, cosine]", "fine.steps=2"]


@pytest.fixture(scope="module")
def base(pipeline, tmp_path_factory) -> Path:
    """FOLDER/red: a finished coarse run towards red.glb; green.glb lies beside it."""
    folder = tmp_path_factory.mktemp("base")
    corners = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], np.float32) * [0.5, 0.4, 0.4]
    quads = [[0, 1, 3, 2], [4, 6, 7, 5], [0, 4, 5, 1], [2, 3, 7, 6], [0, 2, 6, 4], [1, 5, 7, 3]]
    faces = np.array([t for a, b, c, d in quads for t in ((a, b, c), (a, c, d))], np.int32)
    for name, colour in {"red": [0.8, 0.05, 0.05], "green": [0.05, 0.8, 0.05]}.items():
        write_glb(Mesh(corners.astype(np.float32), faces, np.tile(np.float32(colour), (8, 1))), folder / f"{name}.glb")
    (folder / "tiny.yaml").write_text(TINY)
    words = ["--config", str(folder / "tiny.yaml"), f"reference.mesh={folder / 'red.glb'}", "--stages", "coarse"]
    code, _, err = pipeline("run", "--prompt", "a red block", *words, "--out", "red", cwd=folder).finish()
    assert code == 0, err
    return folder / "red"


def edit(base: Path, *more: str) -> list[str]:
    green = f"reference.mesh={base.parent / 'green.glb'}"
    return ["run", "--from", str(base), "--prompt", "a green block", "--stages", "coarse,fine", green, *SHORT, *more]


@pytest.fixture(scope="module")
def edited(pipeline, base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("edited")
    code, out, err = pipeline(*edit(base), "--out", "run", cwd=folder).finish()
    assert code == 0, err
    assert "coarse goes on from step 30" in out and '"a red block", as "a green block"' in out
    return folder / "run"


def metrics(folder: Path, stage: str) -> list[dict]:
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in e.items() if k != "seconds"} for e in entries if e["stage"] == stage]


def albedo_of(folder: Path) -> np.ndarray:
    """Mean linear colour of the finished mesh's vertices."""
    import torch

    from stages.mesh.files.read import read_mesh
    from stages.mesh.sample import painted_samples

    mesh = read_mesh(folder / "mesh.glb")
    return painted_samples(mesh, torch.Generator().manual_seed(0))(2000)[1].mean(0).numpy()


@pytest.mark.slow
def test_an_edit_starts_with_the_object_there_and_changes_its_colour(base, edited):
    before, after = metrics(base, "coarse"), metrics(edited, "coarse")
    assert [m["step"] for m in after] == list(range(1, 9))
    assert after[0]["cover"] == pytest.approx(before[-1]["cover"], rel=0.35)  # other views, the same object
    red, green = albedo_of(base), albedo_of(edited)
    assert red[0] > red[1] + 0.1
    assert green[1] - green[0] > red[1] - red[0] + 0.1, (red, green)


@pytest.mark.slow
def test_the_runs_settings_lie_under_the_edits_and_the_commands_over_both(base, edited):
    theirs, ours = read_config(base), read_config(edited)
    assert ours.prompt == "a green block" and ours.from_run == str(base)
    assert ours.coarse.field == theirs.coarse.field and ours.coarse.opacity == theirs.coarse.opacity
    recipe = load_config("edit", [], {})
    assert ours.guidance.coarse.t_max == recipe.guidance.coarse.t_max != theirs.guidance.coarse.t_max
    assert ours.coarse.shading.albedo_until == 0 and ours.coarse.steps == 8
    assert load_config(str(edited), [], {}) == ours  # fed back, the recipe is not laid over it again


@pytest.mark.slow
def test_an_edit_killed_and_resumed_without_its_source_has_the_same_bytes(pipeline, base, edited, tmp_path):
    source = shutil.copytree(base, tmp_path / "source")
    for name in ("red.glb", "green.glb"):
        shutil.copy(base.parent / name, tmp_path / name)
    process = pipeline(*edit(source), "--out", "run", cwd=tmp_path)
    checkpoint = tmp_path / "run" / "coarse" / "checkpoint.safetensors"
    process.wait_until(lambda: checkpoint.exists() and read_meta(checkpoint)["step"] >= 3)
    process.send_signal(signal.SIGKILL)
    assert process.finish()[0] == -signal.SIGKILL
    assert not (tmp_path / "run" / "mesh.glb").exists()
    shutil.rmtree(source)
    code, _, err = pipeline("resume", "run", cwd=tmp_path).finish()
    assert code == 0, err
    assert (tmp_path / "run" / "mesh.glb").read_bytes() == (edited / "mesh.glb").read_bytes()
    for stage in ("coarse", "fine"):
        assert metrics(tmp_path / "run", stage) == metrics(edited, stage)
        ours, theirs = (load_checkpoint(f / stage / "checkpoint.safetensors")[0] for f in (tmp_path / "run", edited))
        assert ours.keys() == theirs.keys() and all(bool((ours[k] == theirs[k]).all()) for k in ours)


@pytest.mark.slow
def test_an_edit_can_be_edited(edited):
    start = check_inputs(load_config(None, [], {"from_run": str(edited), "prompt": "a blue block"}))
    assert list(start.copies) == ["start/checkpoint.safetensors"] and '"a green block", as "a blue block"' in start.note


@pytest.mark.parametrize(
    "change", ["coarse.field.hidden=8", "coarse.background.hidden=8", "coarse.occupancy.resolution=16"]
)
def test_a_field_of_another_shape_cannot_be_gone_on_with(base, change):
    with pytest.raises(UserError, match="differs from") as error:
        check_inputs(load_config(None, [change], {"from_run": str(base)}))
    assert "config.yaml" in error.value.fix


@pytest.mark.slow
def test_an_unfinished_run_cannot_be_edited(base, tmp_path):
    source = shutil.copytree(base, tmp_path / "source")
    (source / "coarse" / "checkpoint.safetensors").unlink()
    with pytest.raises(UserError, match="no finished coarse stage") as error:
        check_inputs(load_config(None, [], {"from_run": str(source)}))
    assert "pipeline resume" in error.value.fix
