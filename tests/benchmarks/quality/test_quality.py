"""The suite: its prompts, its cells, stopping and going on, the two ends of the scale, the pipeline as a child."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from benchmarks.environment import FOLDER
from benchmarks.quality import pictures, quality, systems
from benchmarks.quality.cells import Cell, cells_of, load_result, make_cell
from benchmarks.quality.suite import load_suite, pocket_suite
from benchmarks.quality.summary import METRICS, as_text, summarise
from benchmarks.quality.systems import Job, find_system
from stages.errors import UserError
from stages.pocket import world
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


@pytest.mark.slow
def test_truth_beats_the_floor_in_every_metric_with_ground_truth(tmp_path, clips, monkeypatch):
    monkeypatch.setattr(pictures, "SIDE", 64)  # of pictures that none of the metrics below is measured on
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
    own_times, other = ClipScorer(clips[0]).embed_texts(["a red car", "a blue mug"]).tolist()
    bare = ClipScorer(clips[0]).embed_texts(["a car", "a mug"]).tolist()
    base = {"date": "2026-01-01", "git": None, "cores": 2, "cpu": "", "device": "cpu", "versions": {}, "options": []}

    def line(system, prompt, colour, geometry):
        looks = {"colour": colour, "textureless": geometry}
        return base | {"system": system, "prompt": prompt, "seed": 0, "clip": {clips[0].name: looks}}

    lines = [
        line("a", "a red car", own_times, bare[1]),
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
    (actual,) = [c for c in summary["comparisons"] if c["metric"] == "r_precision_colour"]
    assert (actual["wins"], actual["losses"], actual["difference"]["mean"]) == (2, 0, 100)


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
    times = systems._times({"stages": {"fine": stage}, "sessions": [{}]}, 40.0, job)
    assert times["wall_s"] == 70.0 and times["coarse_taken_over"]
    times_own = systems._times({"stages": {"coarse": stage, "fine": stage}, "sessions": [{}, {}]}, 40.0, job)
    assert times_own["wall_s"] == 40.0 and not times_own["coarse_taken_over"]
    assert METRICS["wall_s"].value({"cost": times}, {}) == 70.0
    assert METRICS["wall_s"].value({"cost": times_own}, {}) is None


@pytest.mark.slow
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
