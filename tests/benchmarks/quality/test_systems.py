"""The systems of the quality suite: the commands that they run, and what they make of a run's end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import trimesh

from benchmarks.quality import systems
from benchmarks.quality.cells import cells_of
from benchmarks.quality.quality import choose_systems, prior_words
from benchmarks.quality.suite import Suite
from benchmarks.quality.systems import Job, find_system, random_blob
from stages.errors import UserError
from stages.mesh.measure import measure
from stages.pocket import world
from stages.pocket.build import build


def suite_of(*prompts):
    return Suite("mine", {"captions": list(prompts)}, [], [])


def test_captions_without_ground_truth_go_without_the_systems_that_need_it():
    known, foreign = suite_of("a red ball"), suite_of("a red ball", "a squirrel on a skateboard")
    assert choose_systems(None, known, False) == ["coarse", "magic3d", "sphere", "reference", "truth", "floor"]
    assert choose_systems(None, foreign, False) == ["coarse", "magic3d", "sphere", "floor"]
    assert choose_systems(None, foreign, True) == ["stable-diffusion:coarse", "stable-diffusion", "floor"]
    for name in ("truth", "reference", "texture"):
        with pytest.raises(UserError, match="no ground truth for 'a squirrel on a skateboard'"):
            choose_systems(f"floor,{name}", foreign, False)


def test_the_floor_is_a_solid_that_does_not_know_its_prompt_and_repeats_with_its_seed(tmp_path):
    mesh, _ = find_system("floor").make(Job("a red mug", 3, tmp_path, 1))
    again, _ = find_system("floor").make(Job("a red mug", 3, tmp_path, 1))
    assert measure(mesh).solid
    assert np.array_equal(mesh.vertices, again.vertices)
    assert not np.array_equal(mesh.colours, random_blob(np.random.default_rng(0)).colours)


@pytest.mark.parametrize("name", ["coarse", "magic3d", "sphere", "texture", "csd", "sds+static"])
def test_what_was_tuned_for_the_pocket_prior_does_not_run_under_another(name):
    assert choose_systems(name, suite_of("a red ball"), False) == [name]
    with pytest.raises(UserError, match="which --prior cannot take from the pocket prior") as error:
        choose_systems(name, suite_of("a red ball"), True)
    assert "stable-diffusion" in error.value.fix


def test_a_prior_replaces_diffusion_models_but_neither_the_exact_prior_nor_a_clip():
    assert prior_words("stable-diffusion", "A,B") == ("prior.coarse=A", "prior.fine=B")
    assert prior_words("stable-diffusion:coarse", "A") == ("prior.coarse=A",)
    assert prior_words("stable-diffusion", None) == prior_words("truth", "A") == ()
    assert prior_words("reference", "A") == prior_words("dreamfields", "A") == prior_words("clip-mesh", "A") == ()


def test_a_recipes_coarse_stage_alone_is_a_system_that_the_whole_recipe_takes_over(tmp_path, fake_pipeline):
    first, whole = find_system("stable-diffusion:coarse"), find_system("stable-diffusion")
    assert whole.begins_as == "stable-diffusion:coarse" and first.begins_as is None
    assert [c.system for c in cells_of(suite_of("a ball"), ["stable-diffusion", "stable-diffusion:coarse"], 1)] == [
        "stable-diffusion:coarse",
        "stable-diffusion",
    ]
    first.make(job(tmp_path / "first"))
    assert fake_pipeline.calls[0][-5:-1] == ["--config", first.recipe, "--stages", "coarse"]
    whole.make(job(tmp_path / "second", coarse_run=tmp_path / "first" / "run"))
    assert fake_pipeline.calls[1][-7:-1] == [
        "--config", whole.recipe, "--stages", "fine", "--from", str(tmp_path / "first/run")
    ]  # fmt: skip
    with pytest.raises(UserError, match="does not begin with a coarse stage"):
        find_system("clip-mesh:coarse")


@pytest.mark.parametrize("name", ["points", "points+fine", "triplane", "triplane+fine", "gan", "gan+fine"])
def test_drafts_are_systems_alone_and_refined(name, tmp_path, fake_pipeline):
    system, stage = find_system(name), name.removesuffix("+fine")
    system.make(job(tmp_path / "cell"))
    assert fake_pipeline.calls[0][-3:-1] == ["--stages", name.replace("+", ",")]
    assert system.recipe == stage and system.stages == (None if "+" in name else (stage,))
    assert (
        prior_words(name, "A,B")
        == {
            "points": ("prior.points=A",),
            "points+fine": ("prior.points=A", "prior.fine=B"),
            "triplane": (),
            "triplane+fine": ("prior.fine=B",),
            "gan": (),
            "gan+fine": ("prior.fine=B",),
        }[name]
    )


@pytest.fixture
def fake_pipeline(monkeypatch):
    """`python -m pipeline` that leaves a run folder; `calls` are its words, `code` its end, `moves` a locked mesh."""
    state = SimpleNamespace(calls=[], code=0, moves=False)

    def run(command, **_):
        state.calls.append(command[3:])
        words = command[3:]
        folder = Path(words[words.index("--out") + 1] if words[0] == "run" else words[1])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text("")
        stages = {"fine": {"seconds": 20.0, "steps": 40, "phases": {"render": 5.0}}}
        if "--from" not in words:
            stages = {"coarse": {"seconds": 10.0, "steps": 100, "phases": {}}, **stages}
        (folder / "run.json").write_text(json.dumps({"stages": stages, "peak_memory_mb": 900, "sessions": [{}]}))
        if state.code == 0 and "--init-mesh" in words and not state.moves:
            shutil.copy(words[words.index("--init-mesh") + 1], folder / "mesh.glb")
        elif state.code == 0:
            trimesh.creation.icosphere(1).export(folder / "mesh.glb")
        return SimpleNamespace(returncode=state.code)

    monkeypatch.setattr(systems.subprocess, "run", run)
    return state


def job(folder, **more):
    folder.mkdir(exist_ok=True)
    return Job("a red mug", 1, folder, 1, ("coarse.steps=5",), **more)


def test_a_system_runs_the_command_a_user_types_and_reports_its_times(tmp_path, fake_pipeline):
    mesh, cost = find_system("magic3d").make(job(tmp_path / "cell"))
    assert fake_pipeline.calls == [
        [
            "run",
            "--prompt",
            "a red mug",
            "--seed",
            "1",
            "--out",
            str(tmp_path / "cell/run"),
            "--stages",
            "coarse,fine",
            "coarse.steps=5",
        ]
    ]
    assert len(mesh.faces) == 80
    assert cost["stages"]["coarse"]["steps_per_s"] == 10
    assert cost["peak_memory_mb"] == 900


def test_a_started_run_is_resumed(tmp_path, fake_pipeline):
    (tmp_path / "cell" / "run").mkdir(parents=True)
    (tmp_path / "cell" / "run" / "config.yaml").write_text("")
    find_system("coarse").make(job(tmp_path / "cell"))
    assert fake_pipeline.calls == [["resume", str(tmp_path / "cell/run")]]


def test_a_taken_over_coarse_stage_counts_in_the_time(tmp_path, fake_pipeline):
    find_system("coarse").make(job(tmp_path / "first"))
    _, cost = find_system("magic3d").make(job(tmp_path / "second", coarse_run=tmp_path / "first" / "run"))
    assert fake_pipeline.calls[1][-5:-1] == ["--stages", "fine", "--from", str(tmp_path / "first/run")]
    assert cost["wall_s"] >= 10
    assert list(cost["stages"]) == ["coarse", "fine"]


def test_fine_only_from_a_sphere_is_one_recipe(tmp_path, fake_pipeline):
    find_system("sphere").make(job(tmp_path / "cell"))
    assert fake_pipeline.calls[0][-3:] == ["--config", "sphere", "coarse.steps=5"]


def test_painting_starts_from_the_truths_shape_in_plain_grey_and_checks_that_it_stays(tmp_path, fake_pipeline):
    mesh, cost = find_system("texture").make(job(tmp_path / "cell"))
    words = fake_pipeline.calls[0]
    assert words[words.index("--config") + 1] == "texture"
    truth = build(world.parse("a red mug"))
    plain = trimesh.load(words[words.index("--init-mesh") + 1], process=False).to_mesh()
    np.testing.assert_array_equal(np.float32(plain.vertices[plain.faces]), truth.vertices[truth.faces])
    picture = np.asarray(plain.visual.material.baseColorTexture.convert("RGB"))
    assert (picture == picture[0, 0, 0]).all() and np.ptp(plain.visual.uv) > 0.5
    assert cost["geometry"] == "untouched" and len(mesh.faces) == len(truth.faces)
    fake_pipeline.moves = True
    with pytest.raises(RuntimeError, match="other triangles"):
        find_system("texture").make(job(tmp_path / "moved"))


def test_no_object_is_a_result_and_a_crash_is_not(tmp_path, fake_pipeline):
    fake_pipeline.code = 2
    with pytest.raises(systems.Failed):
        find_system("magic3d").make(job(tmp_path / "empty"))
    fake_pipeline.code = 1
    with pytest.raises(RuntimeError, match="ended with 1"):
        find_system("magic3d").make(job(tmp_path / "crash"))


def test_the_reference_system_gets_the_ground_truth_as_a_file(tmp_path, fake_pipeline):
    find_system("reference").make(job(tmp_path / "cell"))
    words = fake_pipeline.calls[0]
    path = next(word for word in words if word.startswith("reference.mesh=")).split("=")[1]
    assert words[words.index("--config") + 1] == "reference"
    assert len(trimesh.load(path).faces) == len(build(world.parse("a red mug")).faces)


@pytest.mark.parametrize("name", ["gan", "gan+fine"])
def test_a_prompt_without_a_generator_is_a_result_and_not_a_fault(name, tmp_path):
    with pytest.raises(systems.Failed, match="cannot draw 'a red boat'"):
        systems.find_system(name).make(systems.Job("a red boat", 0, tmp_path, 1))
