"""CLIPs in the place of priors: what a name means, what is refused before any work, runs of the two recipes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.config.model import load_config, read_config
from pipeline.output.glb import write_glb
from pipeline.priors.clips import POCKET_CLIP, ClipSource, clip_words
from pipeline.priors.sources import check_priors, parse_source, stage_prior
from pipeline.runs.run import resume_run, start_run
from pipeline.runs.stages import make_stage
from stages.errors import UserError
from stages.guidance.clip_guidance import ClipGuidance
from stages.mesh.files.read import read_mesh
from stages.pocket import world
from tests.tiny_clip import openai_like, pocket_like
from tests.toy_pipeline import octahedron

SMALL_DREAM = ["coarse.steps=4", "coarse.resolution=16", "coarse.views_per_step=2", "coarse.samples=48"]
SMALL_DREAM += ["coarse.field.levels=6", "coarse.field.log2_table=11", "coarse.field.finest=32"]
SMALL_DREAM += ["coarse.occupancy.resolution=16"]
SMALL_MESH = ["clipmesh.steps=4", "clipmesh.resolution=24", "clipmesh.views_per_step=2", "clipmesh.control=1"]
SMALL_MESH += ["clipmesh.texture_size=32", "clipmesh.padding=2", "export.turntable_frames=0", "preview_every=2"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return pocket_like(tmp_path_factory.mktemp("clips") / "tiny")


def config(recipe=None, *overrides: str, **flags):
    return load_config(recipe, list(overrides), flags)


def test_names_of_clips_and_of_other_priors(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not any(isinstance(parse_source(text), ClipSource) for text in ("pocket", "some/model", "C:/clip"))
    assert parse_source("clip:pocket").folder == POCKET_CLIP
    assert parse_source("clip: here/it").folder == tmp_path / "here/it"
    chosen = config(None, "prior.coarse=clip:here/it", "prior.fine=clip:pocket")
    assert chosen.prior.coarse == f"clip:{tmp_path}/here/it" and chosen.prior.fine == "clip:pocket"


def test_pocket_clip_is_there_and_knows_the_worlds_words():
    assert set(world.words()) <= set(clip_words(POCKET_CLIP))


def test_clip_of_byte_tokens_knows_every_word(tmp_path):
    folder = openai_like(tmp_path)
    assert clip_words(folder) is None
    check_priors(config(None, f"prior.coarse=clip:{folder}", stages="coarse", prompt="a zebra"))


def test_unknown_words_are_named_with_the_known_ones_and_the_way_out(tiny):
    chosen = config("dreamfields", f"prior.coarse=clip:{tiny}", prompt="a rad mug and a zebra")
    with pytest.raises(UserError, match="cannot read") as error:
        check_priors(chosen)
    assert "'rad'" in error.value.why and "'zebra'" in error.value.why and "mug" in error.value.why
    assert "rad -> red" in error.value.fix and "--force" in error.value.fix
    check_priors(chosen.model_copy(update={"force": True}))


@pytest.mark.parametrize(
    ("overrides", "what", "why"),
    [
        (["prior.coarse=clip:nowhere"], "Cannot load the CLIP", "no such folder"),
        (["negative=ugly"], "cannot be asked", "negative prompt"),
        (["prompts.view_words=true", "prompts.blend=interpolated"], "cannot be asked", "blend"),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(tiny, overrides, what, why):
    with pytest.raises(UserError, match=what) as error:
        check_priors(config("dreamfields", f"prior.coarse=clip:{tiny}", *overrides))
    assert why in error.value.why


def test_a_prompt_longer_than_the_clip_reads_is_refused_before_any_work(tmp_path):
    folder = openai_like(tmp_path / "bytes")  # a byte is a token, of which it reads 40
    fine = ["prior.fine=clip:" + str(folder), "prompts.view_words=true", "prompts.textureless_suffix="]
    check_priors(config(None, *fine, prompt="a blue car on a yellow table"))
    with pytest.raises(UserError, match="too long for the CLIP bytes") as error:
        check_priors(config(None, *fine, prompt="a striped blue car on a yellow table"))
    assert "right side view" in error.value.why and "reads 40" in error.value.why


def test_unknown_words_of_prompts_by_view_are_named_for_a_clip_too(tiny):
    view = ["prompts.view_words=true", "prompts.per_view.back=a red zebra"]
    with pytest.raises(UserError, match='cannot read "a red zebra"'):
        check_priors(config("dreamfields", f"prior.coarse=clip:{tiny}", *view))


def test_folder_that_is_no_clip_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UserError, match="Cannot load the CLIP"):
        check_priors(config("clip-mesh", f"prior.clipmesh=clip:{tmp_path}"))


@pytest.mark.slow
def test_clip_mesh_refines_a_users_mesh_in_its_own_place(tiny, tmp_path):
    far = octahedron()
    far.vertices = 3 * far.vertices + np.float32([7, 0, 0])
    write_glb(far, tmp_path / "mine.glb")
    small = [f"prior.clipmesh=clip:{tiny}", *SMALL_MESH, "clipmesh.lr_vertices=1e-4"]
    folder = start_run(config(None, *small, stages="clipmesh", init_mesh=str(tmp_path / "mine.glb")), tmp_path / "run")
    (tmp_path / "mine.glb").unlink()
    mesh = read_mesh(folder / "mesh.glb")
    assert len(mesh.faces) == 4 * len(far.faces)
    assert np.allclose((mesh.vertices.min(0) + mesh.vertices.max(0)) / 2, [7, 0, 0], atol=0.05)
    assert np.allclose(np.abs(mesh.vertices - [7, 0, 0]).max(), 1.5, atol=0.05)  # and of its size
    first = (folder / "mesh.glb").read_bytes()
    (folder / "mesh.glb").unlink()
    resume_run(folder)
    assert (folder / "mesh.glb").read_bytes() == first
    with pytest.raises(UserError, match=r"Cannot read the mesh .*mine.glb"):
        start_run(config(None, *small, stages="clipmesh", init_mesh=str(tmp_path / "mine.glb")), tmp_path / "again")
    with pytest.raises(UserError, match="has no use here") as error:
        start_run(config(None, init_mesh=str(tmp_path / "mine.glb")), tmp_path / "again")
    assert "--stages clipmesh" in error.value.fix


def test_clipmesh_alone_takes_its_own_recipe():
    assert config(None, stages="clipmesh") == config("clip-mesh")


def test_guidance_of_a_clip_has_its_own_settings_and_words(tiny):
    chosen = config("clip-mesh", f"prior.clipmesh=clip:{tiny}", prompt="a blue car")
    guidance = stage_prior(chosen, "clipmesh").build(torch.device("cpu"))
    assert isinstance(guidance, ClipGuidance) and guidance.settings.crop == (1.0, 1.0)
    assert guidance.prompts.prompt == "a blue car" and guidance.scorer.name == "tiny"
    assert "blue" in guidance.settings.textureless_without


def test_recipe_of_clip_mesh_leaves_out_every_colour_and_pattern_of_the_world():
    from stages.pocket.palette import COLOURS
    from stages.pocket.pattern import PATTERNS

    left_out = config("clip-mesh").guidance.clip.textureless_without
    assert set(left_out) == {*COLOURS, *PATTERNS}


@pytest.mark.parametrize("stages", ["coarse,clipmesh", "clipmesh,coarse", "fine,clipmesh", "clipmesh,clipmesh"])
def test_clipmesh_stands_alone(stages):
    with pytest.raises(UserError) as error:
        config(None, stages=stages)
    assert "coarse,fine; or points,fine; or triplane,fine; or gan,fine; or clipmesh" in error.value.why


@pytest.mark.slow
def test_clipmesh_has_no_use_for_another_run(tiny, tmp_path):
    folder = start_run(config("clip-mesh", f"prior.clipmesh=clip:{tiny}", *SMALL_MESH), tmp_path / "first")
    again = config(None, stages="clipmesh", from_run=str(folder))
    with pytest.raises(UserError, match="has no use here"):
        start_run(again, tmp_path / "second")


@pytest.mark.slow
def test_dream_fields_recipe_takes_finite_steps_under_a_clip(tiny):
    chosen = config("dreamfields", f"prior.coarse=clip:{tiny}", *SMALL_DREAM)
    assert chosen.coarse.transmittance.weight == 0.5 and chosen.coarse.backdrops.copies > 1
    guidance = stage_prior(chosen, "coarse").build(torch.device("cpu"))
    results = []
    for _ in range(2):
        guidance.generator.manual_seed(0)
        stage = make_stage("coarse", chosen.coarse, guidance, torch.device("cpu"), 0, None)
        results.append([stage.step() for _ in range(2)])
    assert results[0] == results[1]
    assert results[0][0].keys() >= {"clip", "cover", "grad_norm"} and results[0][0]["grad_norm"] > 0
    assert "orientation" not in results[0][0]  # no normals are computed


@pytest.mark.slow
def test_clip_mesh_recipe_runs_to_a_textured_file_and_is_restored_to_the_same_bytes(tiny, tmp_path):
    import trimesh

    chosen = config("clip-mesh", f"prior.clipmesh=clip:{tiny}", *SMALL_MESH, seed=4)
    folder = start_run(chosen, tmp_path / "run")
    assert read_config(folder) == chosen
    first = (folder / "mesh.glb").read_bytes()
    part = trimesh.load_scene(folder / "mesh.glb", process=False).to_mesh()
    assert len(part.faces) == 320 and part.visual.material.baseColorTexture.size == (32, 32)
    record = json.loads((folder / "run.json").read_text())
    assert record["status"] == "finished" and record["export"]["unwrap"] == "own"
    assert record["stages"]["clipmesh"]["step"] == 4 and (folder / "clipmesh/previews/000004.png").is_file()
    (folder / "mesh.glb").unlink()
    resume_run(folder)
    assert (folder / "mesh.glb").read_bytes() == first
    lines = [json.loads(line) for line in Path(folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4] and all("clip" in line for line in lines)
