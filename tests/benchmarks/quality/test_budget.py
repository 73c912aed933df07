"""The same effort for every system: what a run costs, the steps that use a budget up, and energy counters."""

from __future__ import annotations

import json

import pytest

from benchmarks.quality import quality, systems
from benchmarks.quality.budget import (
    Budget,
    Cost,
    as_options,
    cost_of,
    fitted_steps,
    options_by_system,
    own_steps,
    read_budget,
)
from benchmarks.quality.summary import METRICS
from benchmarks.speed.energy import energy_j, joules_between, packages
from pipeline.config.listing import leaves
from pipeline.config.model import load_config
from stages.errors import UserError
from tests.toy_pipeline import octahedron


@pytest.mark.parametrize("text", ["60", "seconds", "seconds=", "steps=0", "steps=-3", "minutes=1", "seconds=nan"])
def test_other_words_are_no_budget(text):
    with pytest.raises(UserError, match="--budget"):
        read_budget(text)


def test_a_systems_steps_are_those_of_the_stages_it_runs():
    both = own_steps("magic3d", ("coarse.steps=30", "fine.steps=10"))
    assert both == {"coarse": 30, "fine": 10}
    assert own_steps("coarse", ("coarse.steps=30",)) == {"coarse": 30}
    assert list(own_steps("sphere", ())) == ["fine"]
    assert list(own_steps("clip-mesh", ())) == ["clipmesh"]
    assert own_steps("truth", ()) == own_steps("floor", ()) == {}


@pytest.mark.parametrize("system", ["magic3d", "sds+hifa", "clip-mesh"])
def test_a_budget_changes_the_steps_of_a_recipe_and_nothing_of_its_shape(system):
    steps = own_steps(system, ())
    words = as_options(fitted_steps(system, steps, Budget("steps", 3 * sum(steps.values())), None))
    recipe = systems.find_system(system).recipe
    whole, longer = (dict(leaves(load_config(recipe, [*options], {}))) for options in ((), words))
    assert {key for key in whole if whole[key] != longer[key]} == {f"{stage}.steps" for stage in steps}


def test_cost_splits_a_run_into_its_steps_and_the_rest(tmp_path):
    lines = [{"stage": "coarse", "step": k, "seconds": s} for k, s in enumerate([5.0, 0.5, 0.5, 0.5], 1)]
    lines += [{"stage": "fine", "step": 1, "seconds": 2.0}, {"stage": "fine", "step": 2, "seconds": 2.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    cost = cost_of(tmp_path, 20.0)
    assert cost == Cost(14.0, {"coarse": 0.5, "fine": 2.0})  # the first step's 4.5 s beyond a usual one are fixed
    assert cost.total_s({"coarse": 4, "fine": 2}) == 20.0


def default_steps() -> dict[str, int]:
    config = load_config(None, [], {})
    return {stage: getattr(config, stage).steps for stage in ("coarse", "fine")}


def test_a_budget_of_steps_is_shared_as_the_recipe_shares_its_own():
    assert fitted_steps("magic3d", {"coarse": 200, "fine": 60}, Budget("steps", 130), None) == {
        "coarse": 100,
        "fine": 30,
    }
    assert fitted_steps("magic3d", {"coarse": 200, "fine": 2}, Budget("steps", 20), None)["fine"] == 1


def test_a_budget_of_seconds_is_used_up_by_the_fitted_steps():
    cost, steps = Cost(14.0, {"coarse": 0.25, "fine": 0.5}), {"coarse": 200, "fine": 60}
    for seconds in (30, 54, 200):
        fitted = fitted_steps("magic3d", steps, Budget("seconds", seconds), cost)
        assert cost.total_s(fitted) == pytest.approx(seconds, abs=0.4)
        assert fitted["coarse"] / fitted["fine"] == pytest.approx(200 / 60, rel=0.05)
    with pytest.raises(UserError, match="too little") as error:
        fitted_steps("magic3d", steps, Budget("seconds", 14), cost)
    assert "14 s here" in error.value.why


def test_steps_are_settled_once_and_trials_are_made_of_the_systems_that_optimise(tmp_path, monkeypatch, capsys):
    jobs = []

    def make(job):
        jobs.append(job)
        if "fine.steps=1" in job.options:
            raise systems.Failed("no object")
        (job.folder / "run").mkdir(parents=True)
        lines = [{"stage": "coarse", "seconds": 0.25}] * 200 + [{"stage": "fine", "seconds": 0.5}] * 60
        (job.folder / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return octahedron(), {"wall_s": 90.0}

    whole = systems.System(make, "both stages", recipe="default")
    monkeypatch.setitem(systems.SYSTEMS, "magic3d", whole)
    (tmp_path / "trials" / "magic3d" / "run").mkdir(parents=True)  # what an interrupted trial left
    options = {"magic3d": ("coarse.views_per_step=1",), "truth": ()}
    words = (Budget("seconds", 50), options, "a red mug", tmp_path, 1)
    actual = options_by_system(*words)
    fitted = fitted_steps("magic3d", default_steps(), words[0], Cost(10.0, {"coarse": 0.25, "fine": 0.5}))
    assert actual == {"magic3d": tuple(f"{stage}.steps={n}" for stage, n in fitted.items()), "truth": ()}
    assert len(jobs) == 2 and jobs[1].options == ("coarse.views_per_step=1",)
    assert "to see what its steps take" in capsys.readouterr().out
    assert options_by_system(*words) == actual and len(jobs) == 2


@pytest.mark.slow
def test_cells_of_a_budget_get_their_systems_steps_and_share_no_coarse_stage(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(quality, "run_cells", lambda cells, args: calls.append(args) or [])
    prompts = tmp_path / "one.txt"
    prompts.write_text("a red ball\n")
    words = ["--prompts", str(prompts), "--systems", "coarse,magic3d,truth", "--budget", "steps=26", "--out"]
    assert quality.main([*words, str(tmp_path / "out")]) == 0
    shared = fitted_steps("magic3d", default_steps(), Budget("steps", 26), None)
    assert sum(shared.values()) == 26
    assert calls[0].words == {
        "coarse": ("coarse.steps=26",),
        "magic3d": tuple(f"{stage}.steps={n}" for stage, n in shared.items()),
        "truth": (),
    }
    assert not calls[0].take_over
    assert json.loads((tmp_path / "out" / "suite.json").read_text())["suite"].endswith("-steps-26")


@pytest.mark.slow
def test_a_quick_suite_takes_a_share_of_every_recipes_steps(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(quality, "run_cells", lambda cells, args: calls.append((cells, args)) or [])
    assert quality.main(["--quick", "--out", str(tmp_path / "out")]) == 0
    cells, args = calls[0]
    assert len({c.prompt for c in cells}) == 4 and {c.seed for c in cells} == {0}
    assert args.take_over and not args.options
    for system in ("coarse", "magic3d", "sphere", "reference"):
        recipe_steps = own_steps(system, ())
        assert args.words[system] == tuple(f"{stage}.steps={round(0.6 * n)}" for stage, n in recipe_steps.items())
    assert args.words["truth"] == args.words["floor"] == ()
    assert quality.main(["--out", str(tmp_path / "out")]) == 2  # not into the same folder


def counter(root, name, value):
    (root / name).mkdir(exist_ok=True)
    (root / name / "energy_uj").write_text(str(value))
    (root / name / "max_energy_range_uj").write_text("1000000000")


def test_a_counter_that_starts_again_is_followed():
    assert joules_between(10, 3_000_010, 1 << 32) == 3
    assert joules_between(9_000_000, 1_000_000, 10_000_000) == 2


def test_energy_is_that_of_whole_packages_between_the_ends(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.speed.energy.shutil.which", lambda name: None)
    for name in ("intel-rapl:0", "intel-rapl:1", "intel-rapl:0:0"):
        counter(tmp_path, name, 5_000_000)
    assert [p.name for p in packages(tmp_path)] == ["intel-rapl:0", "intel-rapl:1"]
    with energy_j(tmp_path) as actual:
        counter(tmp_path, "intel-rapl:0", 9_000_000)
        counter(tmp_path, "intel-rapl:1", 999_000_000)
        counter(tmp_path, "intel-rapl:0:0", 7_000_000)
    assert actual == {"cpu": pytest.approx(4 + 994)}


def test_power_of_gpus_is_summed_over_time(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.speed.energy.shutil.which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr("benchmarks.speed.energy._gpu_watts", lambda: 100.0)
    with energy_j(tmp_path) as actual:
        pass
    assert 0 <= actual["gpu"] < 50 and "cpu" not in actual


def test_a_gpu_that_stops_answering_has_no_energy(tmp_path, monkeypatch):
    answers = iter([100.0])
    monkeypatch.setattr("benchmarks.speed.energy.shutil.which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr("benchmarks.speed.energy._gpu_watts", lambda: next(answers, None))
    with energy_j(tmp_path) as actual:
        pass
    assert actual == {}


def test_without_counters_there_is_no_energy(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.speed.energy.shutil.which", lambda name: None)
    with energy_j(tmp_path) as actual:
        pass
    assert actual == {}
    assert METRICS["energy_kj"].value({"cost": {"wall_s": 3.0}}, {}) is None
    assert METRICS["energy_kj"].value({"cost": {"energy_j": {"cpu": 1500.0, "gpu": 500.0}}}, {}) == 2.0
