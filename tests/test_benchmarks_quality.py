"""The suite: its prompts, its cells, stopping and going on, the two ends of the scale, the pipeline as a child."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import trimesh

from benchmarks.environment import FOLDER
from benchmarks.quality import quality, systems
from benchmarks.quality.cells import Cell, cells_of, load_result, make_cell
from benchmarks.quality.quality import choose_systems, prior_words
from benchmarks.quality.suite import Suite, load_suite, pocket_suite
from benchmarks.quality.summary import METRICS, as_text, summarise
from benchmarks.quality.systems import Job, find_system, random_blob
from stages.errors import UserError
from stages.mesh.measure import measure
from stages.pocket import world
from stages.pocket.build import build
from tests import tiny_folders
from tests.tiny_clip import openai_like, pocket_like

ENDS = ["--systems", "floor,truth"]


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    return [pocket_like(folder / "small"), openai_like(folder / "other")]


def test_the_pocket_suite_is_what_it_says():
    suite = pocket_suite()
    assert {name: len(group) for name, group in suite.groups.items()} == {
        "held out": 8,
        "faces and fronts": 8,
        "compositions": 8,
    }
    specs = {prompt: world.parse(prompt) for prompt in suite.prompts}
    assert all(world.held_out(specs[p]) for p in suite.groups["held out"])
    assert not any(world.held_out(specs[p]) for p in suite.groups["faces and fronts"])
    assert all(world.true_front(specs[p].kind) for p in suite.groups["faces and fronts"])
    assert all(specs[p].other is not None for p in suite.groups["compositions"])
    assert [len(suite.candidates(look)) for look in ("colour", "textureless")] == [100, 85]


def test_the_quick_suite_has_four_prompts_and_the_same_candidates():
    suite = pocket_suite(quick=True)
    assert len(suite.prompts) == 4
    for look in ("colour", "textureless"):
        assert sorted(suite.candidates(look)) == sorted(pocket_suite().candidates(look))


def test_the_main_job_prompts_are_six_held_out_and_six_trained_of_distinct_kinds():
    suite = load_suite(str(FOLDER / "main_job_prompts.txt"))
    assert {name: len(group) for name, group in suite.groups.items()} == {"held out": 6, "trained": 6}
    assert len({world.parse(p).kind for p in suite.prompts}) == 12
    assert len(suite.candidates("colour")) == 100


def test_a_caption_file_gives_its_own_captions_as_candidates(tmp_path):
    (tmp_path / "mine.txt").write_text("# two captions\na squirrel on a skateboard\n\na bowl of soup  # hot\n")
    suite = load_suite(str(tmp_path / "mine.txt"))
    assert suite.prompts == suite.candidates("colour") == ["a squirrel on a skateboard", "a bowl of soup"]
    (tmp_path / "others.txt").write_text("a red car\n")
    assert load_suite(str(tmp_path / "mine.txt"), tmp_path / "others.txt").candidates("textureless")[-1] == "a car"


def test_missing_and_empty_caption_files_and_unknown_systems_are_refused(tmp_path):
    (tmp_path / "empty.txt").write_text("\n# nothing\n")
    for path in ("empty.txt", "none.txt"):
        with pytest.raises(UserError):
            load_suite(str(tmp_path / path))
    with pytest.raises(UserError, match="magic3d"):
        find_system("magic4d")


def test_every_system_meets_every_prompt_and_seed_once_but_the_truth_needs_one_seed():
    cells = cells_of(pocket_suite(), ["magic3d", "coarse", "truth"], 2)
    assert len(cells) == len(set(cells)) == 24 * 5
    assert cells.index(Cell("coarse", "a red boat", 1)) < cells.index(Cell("magic3d", "a red boat", 1))


def test_the_floor_is_a_solid_that_does_not_know_its_prompt_and_repeats_with_its_seed(tmp_path):
    mesh, _ = find_system("floor").make(Job("a red mug", 3, tmp_path, 1))
    again, _ = find_system("floor").make(Job("a red mug", 3, tmp_path, 1))
    assert measure(mesh).solid
    assert np.array_equal(mesh.vertices, again.vertices)
    assert not np.array_equal(mesh.colours, random_blob(np.random.default_rng(0)).colours)


@pytest.mark.slow
def test_truth_beats_the_floor_in_every_metric_with_ground_truth(tmp_path, clips):
    for system in ("truth", "floor"):
        make_cell(Cell(system, "a red car", 0), tmp_path, [clips[0]], (), 1, False)
    lines = [load_result(Cell(system, "a red car", 0), tmp_path) for system in ("truth", "floor")]
    summary = summarise(lines, load_suite_of(["a red car"], tmp_path), [clips[0]])
    best, worst = (summary["systems"][s]["all"] for s in ("truth", "floor"))
    for name in ("chamfer", "normal_consistency", "f_score", "volume_iou", "saturation_error", "brightness_error"):
        assert METRICS[name].better * (best[name]["mean"] - worst[name]["mean"]) > 0, name
    assert best["janus"]["mean"] == 0
    assert best["detail_ratio"]["mean"] == pytest.approx(1)
    assert best["volume_iou"]["mean"] > 0.98
    assert "floor" in as_text(summary)
    picture = Cell("truth", "a red car", 0).folder(tmp_path) / "gallery.jpg"
    assert picture.stat().st_size > 3000


def load_suite_of(prompts, folder):
    (folder / "prompts.txt").write_text("\n".join(prompts))
    return load_suite(str(folder / "prompts.txt"))


def test_r_precision_counts_what_is_nearest_and_a_failed_run_scores_nothing(tmp_path, clips):
    from stages.guidance.clip import ClipScorer

    suite = load_suite_of(["a red car", "a blue mug"], tmp_path)
    own, other = ClipScorer(clips[0]).embed_texts(["a red car", "a blue mug"]).tolist()
    bare = ClipScorer(clips[0]).embed_texts(["a car", "a mug"]).tolist()
    base = {"date": "2026-01-01", "git": None, "cores": 2, "cpu": "", "device": "cpu", "versions": {}, "options": []}

    def line(system, prompt, colour, geometry):
        looks = {"colour": colour, "textureless": geometry}
        return base | {"system": system, "prompt": prompt, "seed": 0, "clip": {clips[0].name: looks}}

    lines = [
        line("a", "a red car", own, bare[1]),
        line("a", "a blue mug", other, bare[1]),
        line("b", "a red car", other, bare[1]),
        base | {"system": "b", "prompt": "a blue mug", "seed": 0, "failed": "no object"},
    ]
    summary = summarise(lines, suite, [clips[0]])
    a, b = (summary["systems"][s]["all"] for s in "ab")
    assert (a["r_precision_colour"]["mean"], a["r_precision_textureless"]["mean"]) == (100, 50)
    assert (b["r_precision_colour"]["mean"], b["solid"]["mean"]) == (0, 0)
    assert a["clip_colour"]["mean"] == pytest.approx(100, abs=0.01)
    assert summary["systems"]["b"]["failed"] == 1
    (found,) = [c for c in summary["comparisons"] if c["metric"] == "r_precision_colour"]
    assert (found["wins"], found["losses"], found["difference"]["mean"]) == (2, 0, 100)


def suite_command(out, prompts, clips, *more):
    return [
        sys.executable,
        "-m",
        "benchmarks.quality",
        *ENDS,
        "--prompts",
        str(prompts),
        "--seeds",
        "1",
        "--clip",
        ",".join(map(str, clips)),
        "--out",
        str(out),
        *more,
    ]


@pytest.mark.slow
def test_a_killed_suite_keeps_its_finished_cells_and_goes_on(tmp_path, clips, capsys):
    prompts = tmp_path / "two.txt"
    prompts.write_text("a red ball\na blue cube\n")
    out = tmp_path / "out"
    words = [*ENDS, "--prompts", str(prompts), "--seeds", "1", "--clip", ",".join(map(str, clips)), "--out", str(out)]
    first = subprocess.Popen([sys.executable, "-m", "benchmarks.quality", *words], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 900
    while not (finished := list(out.glob("cells/*/*/result.json"))) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert 1 <= len(finished) < 4
    before = {path: path.stat().st_mtime_ns for path in finished}
    assert quality.main(words) == 0
    assert "4 cells" in capsys.readouterr().out
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())
    lines = [json.loads(text) for text in (out / "results.jsonl").read_text().splitlines()]
    assert len(lines) == 4
    assert all(set(line["clip"]) == {clip.name for clip in clips} for line in lines)
    assert set(json.loads((out / "summary.json").read_text())["by_clip"]) == {"small", "other"}
    assert quality.main(words) == 0
    assert "4 finished before" in capsys.readouterr().out
    for other in (["--set", "coarse.steps=3"], ["--budget", "steps=3"]):
        assert quality.main([*words, *other]) == 2
        assert "holds another suite" in capsys.readouterr().err


@pytest.mark.slow
def test_results_are_published_beside_those_of_other_names(tmp_path, clips, monkeypatch):
    prompts, results = tmp_path / "one.txt", tmp_path / "results"
    results.mkdir()
    prompts.write_text("a red ball\n")
    monkeypatch.setattr(quality, "RESULTS", results)
    words = ["--prompts", str(prompts), "--clip", str(clips[0]), "--out", str(tmp_path / "out"), "--publish"]
    for name in ([], ["--name", "ceiling"], ["--name", "ceiling"]):
        assert quality.main([*words, "--systems", "truth", *name]) == 0
    lines = [json.loads(text) for text in (results / "quality.jsonl").read_text().splitlines()]
    assert [line["suite"] for line in lines] == ["one", "ceiling"]
    assert all(json.loads((results / f"quality_{name}.json").read_text())["systems"] for name in ("one", "ceiling"))


def test_a_part_of_a_suite_is_not_published(capsys):
    for part in (["--quick"], ["--limit", "2"]):
        with pytest.raises(SystemExit):
            quality.main(["--publish", *part])
        assert "would take the place of the whole" in capsys.readouterr().err


def test_cells_judged_by_another_clip_of_the_same_name_are_not_mixed(tmp_path, clips, capsys, monkeypatch):
    monkeypatch.setattr(quality, "run_cells", lambda cells, args: [])
    (tmp_path / "one.txt").write_text("a red ball\n")
    words = ["--systems", "truth", "--prompts", str(tmp_path / "one.txt"), "--out", str(tmp_path / "out"), "--clip"]
    folders = [shutil.copytree(clip, tmp_path / str(k) / "clip") for k, clip in enumerate(clips)]
    assert quality.main([*words, str(folders[0])]) == 0
    assert quality.main([*words, str(folders[1])]) == 2
    assert "holds another suite" in capsys.readouterr().err


def test_a_run_that_was_interrupted_has_no_time_and_one_resumed_adds_none_it_made_itself(tmp_path):
    stage = {"seconds": 30.0, "steps": 10, "phases": {}}
    (tmp_path / "run.json").write_text(json.dumps({"stages": {"coarse": stage}}))
    job = Job("a red ball", 0, tmp_path, 1, coarse_run=tmp_path)
    taken = systems._times({"stages": {"fine": stage}, "sessions": [{}]}, 40.0, job)
    assert taken["wall_s"] == 70.0 and taken["coarse_taken_over"]
    own = systems._times({"stages": {"coarse": stage, "fine": stage}, "sessions": [{}, {}]}, 40.0, job)
    assert own["wall_s"] == 40.0 and not own["coarse_taken_over"]
    assert METRICS["wall_s"].value({"cost": taken}, {}) == 70.0
    assert METRICS["wall_s"].value({"cost": own}, {}) is None


def test_a_folder_with_cells_of_another_recipe_is_refused(tmp_path, clips, capsys, monkeypatch):
    recipe, prompts = tmp_path / "mine.yaml", tmp_path / "one.txt"
    recipe.write_text("extends: default\ncoarse: {steps: 3}\n")
    prompts.write_text("a red ball\n")
    monkeypatch.setattr(quality, "run_cells", lambda cells, args: [])
    words = ["--prompts", str(prompts), "--clip", str(clips[0]), "--out", str(tmp_path / "out"), "--systems"]
    assert quality.main([*words, str(recipe)]) == 0
    assert quality.main([*words, f"{recipe},truth"]) == 0  # further systems may join
    recipe.write_text("extends: default\ncoarse: {steps: 4}\n")
    assert quality.main([*words, str(recipe)]) == 2
    assert "cells of other recipes" in capsys.readouterr().err
    assert quality.main([*words, "truth"]) == 0


@pytest.mark.slow
def test_a_cell_that_breaks_is_reported_with_its_traceback_and_the_others_are_made(tmp_path, clips, capsys):
    prompts = tmp_path / "two.txt"
    prompts.write_text("a red ball\na squirrel\n")
    words = ["--systems", "floor", "--prompts", str(prompts), "--clip", str(clips[0]), "--out", str(tmp_path / "out")]
    folder = Cell("floor", "a squirrel", 0).folder(tmp_path / "out")
    (folder / "gallery.jpg").mkdir(parents=True)  # where the cell would write its picture
    assert quality.main([*words, "--seeds", "1"]) == 1
    assert "a squirrel" in capsys.readouterr().err
    assert "gallery.jpg" in (folder / "error.txt").read_text()
    assert len((tmp_path / "out" / "results.jsonl").read_text().splitlines()) == 1


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


@pytest.mark.slow
def test_a_folder_prior_and_two_folder_clips_make_and_judge_both_stages(tmp_path, clips):
    """The whole way of a real model, on folders of random weights: two steps of a full-size recipe's settings."""
    prior = tiny_folders.stable_diffusion(tmp_path / "sd")
    recipe, prompts, out = tmp_path / "tiny.yaml", tmp_path / "own.txt", tmp_path / "out"
    recipe.write_text(
        "extends: stable-diffusion\n"
        "coarse: {steps: 2, resolution: 16, samples: 24, field: {levels: 4, blob_scale: 30}}\n"
        "fine: {steps: 2, resolution: 32, tets: 16}\n"
        "export: {texture_size: 256, faces: 2000}\n"
    )
    prompts.write_text("a squirrel on a skateboard\na bowl of soup\n")
    words = ["--prompts", str(prompts), "--limit", "1", "--seeds", "1", "--prior", str(prior)]
    words += ["--systems", str(recipe), "--clip", ",".join(map(str, clips)), "--out", str(out)]
    assert quality.main(words) == 0
    line = json.loads((out / "results.jsonl").read_text())
    assert set(line["clip"]) == {"small", "other"} and "geometry" not in line
    assert {stage: facts["steps"] for stage, facts in line["cost"]["stages"].items()} == {"coarse": 2, "fine": 2}
    config = (Cell(str(recipe), "a squirrel on a skateboard", 0).folder(out) / "run" / "config.yaml").read_text()
    assert f"fine: {prior}" in config
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary["by_clip"]) == {"small", "other"} and summary["candidates"]["colour"] == 2


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
