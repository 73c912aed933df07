"""The speed benchmark: sweeps of both stages at tiny sizes, fits by hand, runs of a made-up command, tables, plots."""

from __future__ import annotations

import argparse
import json
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch

from benchmarks.environment import read_lines
from benchmarks.speed import full_size, growth, runs, speed, speed_tables
from benchmarks.speed.curves import Curve, fit_label, growth_plot
from benchmarks.speed.growth import SWEEPS, StandIn, fill_ball, make, run_sweep
from stages.guidance.diffusion.prior import load_prior

CPU = torch.device("cpu")


def sweep_of(stage: str, name: str) -> growth.Sweep:
    return next(sweep for sweep in SWEEPS if (sweep.stage, sweep.name) == (stage, name))


def test_the_stand_in_has_the_shapes_of_the_prior_it_stands_for():
    prior = StandIn(64, 8)
    x = prior.encode(torch.full((2, 16, 16, 3), 0.75), torch.Generator())
    assert x.shape == (2, 3, 8, 8) and torch.allclose(x, torch.tensor(0.5))
    assert prior.decode(x).shape == (2, 64, 64, 3) and torch.allclose(prior.decode(x), torch.tensor(0.75))
    assert prior.predict_noise(x, None, None, None).shape == x.shape


@pytest.mark.parametrize("share", [0.05, 0.2, 0.3])
def test_a_ball_takes_the_share_of_the_box_that_was_asked_for(share):
    stage = make(sweep_of("coarse", "occupied"), 0.1, CPU, "none", quick=True)
    fill_ball(stage, share)
    assert stage.occupancy.share == pytest.approx(share, abs=0.02)
    assert set(stage.occupancy.cells.unique().tolist()) == {0, 1}


@pytest.mark.slow
@pytest.mark.parametrize("sweep", SWEEPS, ids=lambda sweep: f"{sweep.stage}.{sweep.name}")
def test_every_sweep_runs_and_says_what_its_steps_worked_on(sweep):
    actual = run_sweep(sweep, device=CPU, runs=1, quick=True)
    assert [line["value"] for line in actual] == list(sweep.quick)
    for line in actual:
        assert line["runs"] == 1 and line["ms_low"] <= line["step_ms"] <= line["ms_high"]
        assert {"render", "guidance", "backward", "optimiser"} <= set(line["phases_ms"])
        assert 0.5 * line["step_ms"] < sum(line["phases_ms"].values()) <= 1.001 * line["step_ms"]
    small, large = (line["facts"] for line in actual)
    axes = {"occupied": "occupied", "pixels": "rays", "samples": "samples", "table": "table_rows", "tets": "faces"}
    assert small[axes[sweep.name]] < large[axes[sweep.name]]


@pytest.mark.slow
def test_steps_leave_the_scene_as_it_is():
    stage = make(sweep_of("coarse", "pixels"), 16, CPU, "none", quick=True)
    before = {name: value.clone() for name, value in stage.field.state_dict().items()}
    stage.step()
    assert all(torch.allclose(value, before[name], atol=1e-9) for name, value in stage.field.state_dict().items())
    fine = make(sweep_of("fine", "tets"), 8, CPU, "none", quick=True)
    faces = {int(fine.step()["faces"]) for _ in range(2)}
    assert len(faces) == 1


def test_published_sizes_are_those_that_were_asked_for():
    assert (min(sweep_of("fine", "tets").values), max(sweep_of("fine", "tets").values)) == (32, 192)
    assert (min(sweep_of("fine", "pixels").values), max(sweep_of("fine", "pixels").values)) == (64, 1024)


FAKE = """
import json, os, pathlib, signal, sys, time
words = sys.argv[1:]
folder = pathlib.Path(words[words.index("--out") + 1])
folder.mkdir()
if "fail=1" in words:
    print("a long story"); sys.exit("what\\nwhy\\nfix")
folder.joinpath("metrics.jsonl").write_text(json.dumps({"stage": "coarse", "step": 1, "seconds": 0.05}) + "\\n")
compiled = pathlib.Path(os.environ.get("NUMBA_CACHE_DIR", folder / "none"))
once = {"imports": 1.0, "kernel cache": 0.5, "compilation": 0.0 if compiled.exists() else 30.0}
if "NUMBA_CACHE_DIR" in os.environ:
    compiled.mkdir(exist_ok=True)
stages = {n: {"steps": 2, "traced_steps": 1, "step_s": 1.0, "step_ms": 500.0, "networks_s": s, "networks_share": s}
          for n, s in (("coarse", 0.75), ("fine", 0.5))}
rows = [{"path": [n, "step", "render"], "calls": 2, "seconds": 0.25} for n in stages]
profile = {"total_s": 9.0, "other_s": 1.0, "once": once, "stages": stages, "networks_share": 0.625, "phases": rows}
if "--profile" in words:
    folder.joinpath("profile").mkdir()
    folder.joinpath("profile", "profile.json").write_text(json.dumps(profile))
record = {"peak_memory_mb": 900.0, "export": {"phases": {"bake": 2.0, "write": 1.0}}}
record["stages"] = {n: {"seconds": 10.0, "steps": 2} for n in stages}
record["threads"] = os.environ["OMP_NUM_THREADS"]
folder.joinpath("run.json").write_text(json.dumps(record))
if "coarse,fine" not in words and "--stages" in words:
    def stop(*_):
        with open(sys.argv[0] + ".stopped", "a") as file:
            print("stopped", file=file)
        sys.exit(130)

    signal.signal(signal.SIGINT, stop)
    print("coarse  1/200", flush=True)
    time.sleep(60)
    sys.exit("nobody stopped me")
print("done")
"""


@pytest.fixture
def command(tmp_path, monkeypatch) -> Path:
    """A made-up `pipeline`, which writes what the real one leaves."""
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    monkeypatch.setattr(runs, "COMMAND", [sys.executable, str(script)])
    return script


def test_the_main_job_is_timed_and_its_profile_read(command):
    facts = runs.main_job([], runs.environment_of(2), profiled=False)
    assert facts["wall_s"] > 0 and facts["peak_memory_mb"] == 900 and facts["export_s"] == 3
    assert facts["stages"]["fine"] == {"seconds": 10.0, "steps": 2} and "profile" not in facts
    profile = runs.main_job([], runs.environment_of(1), profiled=True)["profile"]
    assert profile["networks_share"] == 0.625 and profile["stages"]["coarse"]["networks_share"] == 0.75
    assert profile["step_phases_ms"] == {"coarse": {"render": 125.0}, "fine": {"render": 125.0}}


def test_the_first_start_compiles_into_an_empty_cache_and_the_next_does_not(command):
    facts = runs.first_start([], 1)
    assert facts["compilation_s"] == 30 and facts["again_compilation_s"] == 0 and facts["again_loading_s"] == 0.5


def test_a_later_start_is_stopped_after_its_first_step(command):
    facts = runs.second_start([], 1, times=2)
    assert facts["runs"] == 2 and facts["low_s"] <= facts["to_first_step_s"] <= facts["high_s"]
    assert command.with_name("fake.py.stopped").read_text().split() == 3 * ["stopped"]  # one start warms the caches
    assert facts["first_step_done_s"] - facts["to_first_step_s"] == pytest.approx(0.05, abs=0.011)


def test_a_run_that_breaks_is_told_with_its_last_words(command):
    with pytest.raises(runs.Broken, match="ended with 1:\na long story\nwhat\nwhy\nfix"):
        runs.main_job(["fail=1"], runs.environment_of(1), profiled=False)
    with pytest.raises(runs.Broken, match="a long story"):
        runs.second_start(["fail=1"], 1, 1)


def test_a_full_size_run_gives_the_random_model_to_both_stages(command, monkeypatch):
    monkeypatch.setattr(full_size, "write_random_model", lambda folder, size, half: {"unet": 12})
    facts = runs.full_size_run([], "sd21", 1, "cpu")
    assert facts["parameters"] == {"unet": 12} and facts["device_memory_mb"] is None
    assert facts["profile"]["networks_share"] == 0.625 and facts["peak_memory_mb"] == 900


@pytest.mark.slow
def test_the_full_size_is_that_of_stable_diffusion_2_1():
    with torch.device("meta"):
        counts = full_size.parameters(full_size.networks("sd21"))
    assert {name: round(count / 1e6) for name, count in counts.items()} == {"unet": 866, "vae": 84, "text_encoder": 340}


def test_a_random_model_is_a_prior_like_any_other(tmp_path):
    counts = full_size.write_random_model(tmp_path, "tiny", half=False)
    assert min(counts.values()) > 1000
    prior = load_prior(tmp_path, "cpu")
    assert prior.resolution == 64
    x = prior.encode(torch.rand(1, 64, 64, 3), torch.Generator().manual_seed(0))
    eps = prior.predict_noise(x, torch.tensor([500]), prior.embed(["a red mug"]))
    assert x.shape == eps.shape == (1, 4, 8, 8) and eps.isfinite().all()


def line(part: str, **more) -> dict:
    facts = {"benchmark": "speed", "date": "2026-01-02T00:00:00Z", "git": "0123456789abcdef", "device": "cpu"}
    facts |= {"cpu": "a cpu", "cores": 2, "versions": {"torch": "2.13"}, "threads": 2, "part": part}
    return facts | more


def step(stage: str, sweep: str, value: float, ms: float, **more) -> dict:
    about = next((s for s in SWEEPS if (s.stage, s.name) == (stage, sweep)), None)
    facts = {"stage": stage, "sweep": sweep, "value": value, "label": about.label, "linear": about.linear}
    facts |= {"networks": "none", "step_ms": ms, "ms_low": 0.9 * ms, "ms_high": 1.1 * ms, "runs": 5}
    facts |= {"phases_ms": {"surface": ms / 4, "backward": ms / 2, "regularisers": ms / 8}, "facts": {}}
    return line("growth", **facts, **more)


def by_hand() -> list[dict]:
    main = {"wall_s": 150.0, "peak_memory_mb": 1024.0, "export_s": 12.0}
    main["stages"] = {"coarse": {"seconds": 90.0, "steps": 200}, "fine": {"seconds": 40.0, "steps": 60}}
    stages = {n: {"steps": 9, "step_ms": 400.0, "networks_share": s} for n, s in (("coarse", 0.5), ("fine", 0.75))}
    steps = {"coarse": {"render": 100.0, "guidance": 300.0}, "fine": {"surface": 40.0, "guidance": 300.0}}
    profile = {"networks_share": 0.55, "stages": stages, "step_phases_ms": steps}
    return [
        *(step("fine", "tets", n, 20 + 0.01 * max(n, 64) ** 2 if n < 64 else 0.01 * n**2) for n in (32, 64, 128, 192)),
        *(
            step("coarse", "occupied", s, 50 + 1000 * s) | {"facts": {"occupied": s, "samples": 9.0}}
            for s in (0.1, 0.2, 0.3)
        ),
        line("main", profiled=False, **main),
        line("main", profiled=True, **main, profile=profile),
        line("start", which="first", compilation_s=47.0, again_loading_s=0.8, wall_s=99.0),
        line("start", which="later", to_first_step_s=5.0, low_s=4.8, high_s=5.3, first_step_done_s=5.6, runs=3),
    ]


def test_growth_of_the_fine_stage_is_fitted_where_the_surface_dominates():
    actual = [row for row in by_hand() if row["part"] == "growth" and row["stage"] == "fine"]
    curve = speed_tables.curve_of(actual, "step")
    kind, a, b, r2, low = curve.fit
    assert (kind, low) == ("power", 64)
    assert (a, b, r2) == (pytest.approx(0.01), pytest.approx(2), pytest.approx(1))
    assert curve.at(100) == pytest.approx(100)
    assert fit_label(curve.fit) == "x^2.00 (R2 1.000)"
    assert speed_tables.curve_of(actual, "s", "surface").fit[2] == pytest.approx(2)


def test_growth_with_the_occupied_share_is_fitted_by_a_line():
    actual = [row for row in by_hand() if row["part"] == "growth" and row["stage"] == "coarse"]
    kind, a, b, r2, _ = speed_tables.curve_of(actual, "step").fit
    assert kind == "line" and a == pytest.approx(50) and b == pytest.approx(1000) and r2 == pytest.approx(1)


def test_a_single_size_has_no_fit():
    assert speed_tables.curve_of([step("fine", "pixels", 64, 10.0)], "step").fit is None
    assert "| fine: pixels a side | 2 threads | 10 ms at 64 | 10 ms at 64 | - |" in speed_tables.speed_markdown(
        [step("fine", "pixels", 64, 10.0)]
    )


def test_the_table_says_what_was_asked_for_and_what_is_missed():
    text = speed_tables.speed_markdown(by_hand())
    assert "command to files, 2 threads: 150 s (coarse 90 s, fine 40 s, export 12 s); wanted <= 180 s;" in text
    assert "peak memory 1.0 GB; wanted <= 3 GB\n" in text
    assert "step time inside the prior's networks: 55 % (coarse 50 %, fine 75 %); wanted >= 60 % **missed**" in text
    assert "first run ever: 47 s of compiling kernels; wanted <= 40 s **missed**" in text
    assert "later starts, from command to the first step: 5.0 s [4.8, 5.3]; wanted <= 6 s;" in text
    assert "that step is done at 5.6 s" in text
    assert "| coarse | 400 ms | 25 % | 75 % | - | 50 % |" in text
    assert "| fine: lattice cells a side | 2 threads | 61 ms at 32 | 369 ms at 192 | power 2.00 from 64 |" in text
    assert "| coarse: occupied share | 2 threads | 150 ms at 0.1 | 350 ms at 0.3 | linear, R2 1.0000 |" in text
    assert "2026-01-02, revision 0123456789, 2 cores of a cpu; torch 2.13." in text


def test_the_main_job_is_the_median_of_its_runs_with_their_spread(monkeypatch):
    waits = iter([90.0, 60.0, 66.0, 99.0])
    measure = lambda words, env, profiled: by_hand()[7] | {"wall_s": next(waits), "profiled": profiled}  # noqa: E731
    monkeypatch.setattr(runs, "main_job", measure)
    plain, profiled = speed.main_job(argparse.Namespace(quick=False, threads=1, device="cpu"))
    assert (plain["wall_s"], plain["low_s"], plain["high_s"], plain["runs"]) == (66.0, 60.0, 90.0, 3)
    assert profiled["wall_s"] == 99.0 and profiled["profiled"]
    assert "2 threads: 66 s [60, 90] (coarse" in speed_tables.speed_markdown([plain])


def test_a_full_size_run_says_that_its_weights_are_random():
    stages = {"coarse": {"steps": 9, "step_ms": 90.0, "networks_share": 0.9}}
    facts = {"parameters": {"unet": 866e6}, "device_memory_mb": 8192.0, "profile": {"stages": stages}}
    text = speed_tables.speed_markdown([line("full", **facts)])
    assert "random weights, time only (unet 866 M): coarse 90 ms a step, 90 % in its networks;" in text
    assert "device memory 8.0 GB" in text


def test_plots_are_pictures_of_every_sweep():
    svgs = speed_tables.plots(by_hand())
    assert set(svgs) == {"speed_fine_tets", "speed_coarse_occupied"}
    for svg in svgs.values():
        assert ElementTree.fromstring(svg).tag.endswith("svg")
    assert svgs["speed_fine_tets"].count("<polyline") == 4 and "x^2.00" in svgs["speed_fine_tets"]
    assert svgs["speed_coarse_occupied"].count("<circle") == 3 and "50 + 1000 x" in svgs["speed_coarse_occupied"]


def test_a_fitted_curve_goes_through_its_points():
    points = tuple((x, x**2, x**2, x**2) for x in (1.0, 10.0))
    root = ElementTree.fromstring(growth_plot([Curve("c", points, ("power", 1.0, 2.0, 1.0, 1.0))], "t", "x", "y"))
    ends = root.find("{*}polyline").get("points").split()
    circles = [(c.get("cx"), c.get("cy")) for c in root.iter("{http://www.w3.org/2000/svg}circle")]
    assert [tuple(end.split(",")) for end in (ends[0], ends[-1])] == circles
    with pytest.raises(ValueError, match="logarithmic"):
        growth_plot([Curve("c", ((1.0, 0.0, 0.0, 0.0),))], "t", "x", "y")


def test_publishing_replaces_the_same_measurement_and_draws(tmp_path):
    speed.publish(by_hand(), tmp_path)
    speed.publish([step("fine", "tets", 64, 99.0), step("fine", "tets", 96, 200.0)], tmp_path)
    lines = read_lines(tmp_path / speed.FILE)
    assert len(lines) == len(by_hand()) + 1
    assert [row["step_ms"] for row in lines if row.get("value") == 64] == [99.0]
    assert {path.name for path in tmp_path.glob("*.svg")} == {"speed_fine_tets.svg", "speed_coarse_occupied.svg"}


@pytest.mark.slow
def test_the_command_measures_the_parts_asked_for(command, capsys, monkeypatch):
    monkeypatch.setattr(speed, "STARTS", 1)
    words = ["--parts", "growth,start,main", "--sweeps", "fine.tets", "--quick", "--threads", "1", "--runs", "1"]
    assert speed.main(words) == 0
    out = capsys.readouterr().out
    assert "fine tets" in out and "first run ever: 30 s" in out and "main job, from command to files, 1 threads" in out
    assert "| fine: lattice cells a side | 1 threads |" in out


def test_a_run_that_breaks_ends_the_command_and_keeps_what_was_measured(command, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(speed, "_words", lambda args: ["fail=1"] if args.parts == ["start", "main"] else [])
    assert speed.main(["--parts", "start,main", "--threads", "1"]) == 1
    assert "ended with 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["--parts", "growth,fly"], "fly: wanted growth, start, main, full"),
        (["--quick", "--publish"], "mean nothing"),
        (["--threads", "0"], "at least 1"),
    ],
)
def test_mistyped_words_are_answered(words, answer, capsys):
    with pytest.raises(SystemExit) as stop:
        speed.main(words)
    assert stop.value.code == 2 and answer in capsys.readouterr().err


def test_what_this_machine_does_not_have_is_refused_in_three_lines(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert speed.main(["--parts", "full"]) == 2
    assert "needs a GPU" in capsys.readouterr().err
    assert speed.main(["--device", "cuda"]) == 2
    assert "torch finds no CUDA device" in capsys.readouterr().err
    assert speed.main(["--parts", "growth", "--threads", "4096", "--quick"]) == 2
    assert "cannot use 4096 threads" in capsys.readouterr().err


def test_a_line_is_shown_for_a_person():
    text = speed.line_text(step("fine", "tets", 64, 12.5))
    assert "fine tets" in text and "12.5 ms" in text
    text = speed.line_text(by_hand()[-1])
    assert "start later" in text and "to_first_step_s 5.0" in text and json.dumps(by_hand()[-1])
