"""`pipeline run --profile`: the split by hand-made phases, the traced steps, and a real run that it does not change."""

import json
import sys
import threading
import time
from pathlib import Path

import pytest

from pipeline.cli import main
from pipeline.config.model import load_config
from pipeline.profile.record import Profile, phase_events, traced_steps
from pipeline.profile.summary import split_of, table_of
from pipeline.runs.checkpoint import load_checkpoint
from stages.phases import Span, phase
from tests import toy_pipeline
from tests.tiny_folders import pocket_latent, pocket_pixel

TINY = """
checkpoint_every: 3
preview_every: 4
coarse:
  steps: 4
  resolution: 32
  views_per_step: 2
  samples: 48
  field: {levels: 6, log2_table: 11, finest: 32, hidden: 16}
  occupancy: {resolution: 16}
  shading: {albedo_until: 0.5}
  preview_size: 16
fine:
  steps: 3
  resolution: 64
  tets: 12
  detail: {levels: 1, log2_table: 11, finest: 64}
  initialise: {samples: 32}
  preview_size: 16
export: {texture_size: 64, faces: 500, turntable_frames: 0, unwrap: boxes}
"""


def spans(**seconds: float) -> dict[tuple[str, ...], Span]:
    """Spans by paths whose parts are joined by __, visited once, or N times as name_xN."""
    by_name = {}
    for key, value in seconds.items():
        name, _, calls = key.partition("_x")
        by_name[tuple(part.replace("_", " ") for part in name.split("__"))] = Span(int(calls or 1), value)
    return by_name


def by_hand() -> dict:
    """Ten seconds: 2 of imports, 1 of compilation and a cache of 0.25 in a step that takes 5.25 with them."""
    return split_of(
        spans(
            imports=2.0,
            coarse=6.0,
            coarse__step_x4=5.25,
            coarse__step__render_x4=1.75,
            coarse__step__render__kernel_cache=1.25,
            coarse__step__render__kernel_cache__compilation=1.0,
            coarse__step__guidance_x4=2.5,
            coarse__step__guidance__networks_x8=2.0,
            coarse__step__backward_x4=1.0,
            coarse__step__backward__networks_x4=0.5,
            coarse__traced_step=0.5,
            coarse__traced_step__networks=0.25,
            export=1.5,
        ),
        10.0,
    )


def test_what_happens_once_is_taken_out_of_the_phases_around_it():
    facts = by_hand()
    seconds = {tuple(row["path"]): row["seconds"] for row in facts["phases"]}
    assert facts["once"] == {"imports": 2.0, "kernel cache": 0.25, "compilation": 1.0}
    assert seconds["coarse", "step", "render"] == pytest.approx(0.5)
    assert seconds["coarse", "step"] == pytest.approx(4.0)
    assert seconds["coarse",] == pytest.approx(4.75)
    assert facts["other_s"] == pytest.approx(0.5)
    assert sum(facts["once"].values()) + seconds["coarse",] + 1.5 + facts["other_s"] == pytest.approx(10)


def test_the_share_of_the_networks_is_that_of_the_steps_forward_and_backward():
    facts = by_hand()
    assert facts["stages"] == {
        "coarse": {
            "steps": 4,
            "traced_steps": 1,
            "step_s": 4.0,
            "step_ms": 1000.0,
            "networks_s": 2.5,
            "networks_share": 0.625,
        }
    }
    assert facts["networks_share"] == 0.625


def test_networks_within_networks_count_once():
    facts = split_of(spans(fine=2.0, fine__step=2.0, fine__step__networks=1.0, fine__step__networks__networks=1.0), 2)
    assert facts["stages"]["fine"]["networks_s"] == 1.0


def test_what_a_stage_does_once_in_its_first_step_is_no_part_of_its_steps():
    first = spans(fine__step__initialise=3.0, fine__step__initialise__imports=1.0)
    facts = split_of(spans(fine=6.0, fine__step_x2=5.0) | first | spans(fine__step__networks=1.5), 6)
    seconds = {tuple(row["path"]): row["seconds"] for row in facts["phases"]}
    assert seconds["fine", "initialise"] == 2.0 and seconds["fine", "step"] == 2.0 and facts["once"]["imports"] == 1.0
    assert facts["stages"]["fine"]["networks_share"] == 0.75
    assert seconds["fine",] == 5.0


def test_where_every_step_was_traced_they_stand_for_themselves():
    facts = split_of(spans(fine=2.0, fine__traced_step=2.0, fine__traced_step__networks=0.5), 2)
    assert facts["stages"]["fine"]["networks_share"] == 0.25
    assert facts["stages"]["fine"]["steps"] == 0 and "fine: all steps were traced" in table_of(facts)


def test_the_table_shows_shares_of_run_and_steps_and_says_what_they_come_to():
    text = table_of(by_hand())
    row = next(line for line in text.splitlines() if line.strip().startswith("guidance"))
    assert row.split() == ["guidance", "2.50", "25.0", "%", "62.5", "%", "4", "625.0"]
    compiled = next(line for line in text.splitlines() if line.startswith("compiling kernels"))
    assert compiled.split() == ["compiling", "kernels", "1.00", "10.0", "%"]
    assert "step time inside the prior's networks: coarse 62 %" in text
    assert "coarse: traced steps, which are slower and left out of the shares: 1" in text
    assert "no step was taken" in table_of(split_of(spans(export=1.0), 2))


@pytest.mark.parametrize(
    ("steps", "traced"), [(1, [0]), (2, [1]), (3, [2]), (4, [2, 3]), (12, [7, 8, 9]), (200, [158, 159, 160])]
)
def test_at_most_half_of_the_steps_are_traced_and_they_lie_late(steps, traced):
    assert list(traced_steps(steps)) == traced


def test_imports_are_a_phase_once_and_in_this_thread_alone(tmp_path, monkeypatch):
    for name in ("first_of_its_kind", "second_of_its_kind"):
        (tmp_path / f"{name}.py").write_text("import json\nimport time\ntime.sleep(0.01)\nvalue = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    plain = __import__
    with Profile() as profile:
        with phase("outer"):
            import first_of_its_kind  # noqa: F401
            from first_of_its_kind import value  # noqa: F401

        def elsewhere() -> None:
            import second_of_its_kind  # noqa: F401

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    actual = profile.recorder.spans["outer", "imports"]
    assert actual.calls == 1 and actual.seconds >= 0.01
    assert set(profile.recorder.spans) == {("outer",), ("outer", "imports")}
    assert __import__ is plain
    assert {"first_of_its_kind", "second_of_its_kind"} <= set(sys.modules)


def test_kernels_that_compile_are_a_phase_of_their_own(tmp_path):
    import numba
    import torch

    with Profile() as profile:
        config = load_config(None, [], {})
        with profile.of_run(tmp_path, config, torch.device("cpu"), lambda text: None), phase("coarse"):
            numba.njit(lambda x: x + 1)(1)
    facts = json.loads((tmp_path / "profile" / "profile.json").read_text())
    assert facts["once"]["compilation"] > 0
    assert profile.recorder.spans["coarse", "kernel cache", "compilation"].calls == 1


def test_phases_become_events_of_a_trace():
    start, *_, event = phase_events([(("coarse", "step"), 2.0, 0.5)], 1e6)
    assert start["args"]["name"] == "phases"
    assert (event["name"], event["ph"], event["ts"], event["dur"]) == ("step", "X", 3e6, 5e5)
    assert event["args"]["path"] == "coarse / step"


def test_an_interrupted_run_leaves_its_profile(tmp_path, monkeypatch, capsys):

    toy_pipeline.install(monkeypatch.setattr)
    monkeypatch.setenv("TOY_NAN_AT", "9")
    with pytest.raises(SystemExit) as stop:
        main(["run", "coarse.steps=10", "export.turntable_frames=0", "--out", str(tmp_path / "run"), "--profile"])
    assert stop.value.code == 2
    facts = json.loads((tmp_path / "run" / "profile" / "profile.json").read_text())
    assert facts["stages"]["coarse"]["steps"] == 6 and facts["stages"]["coarse"]["traced_steps"] == 3
    assert "run.trace.json" in capsys.readouterr().out


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, Path]:
    """A run of both stages under tiny random priors, without and with --profile."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "tiny.yaml").write_text(TINY)
    priors = [f"prior.coarse={pocket_pixel(folder / 'pixel')}", f"prior.fine={pocket_latent(folder / 'latent')}"]
    for name, words in (("plain", []), ("profiled", ["--profile"])):
        with pytest.raises(SystemExit) as stop:
            main(["run", "--config", str(folder / "tiny.yaml"), *priors, "--out", str(folder / name), *words])
        assert stop.value.code == 0
    return folder / "plain", folder / "profiled"


@pytest.mark.slow
def test_profiling_changes_no_byte_of_what_is_made(runs):
    plain, profiled = runs
    assert not (plain / "profile").exists()
    assert (plain / "mesh.glb").read_bytes() == (profiled / "mesh.glb").read_bytes()
    for stage in ("coarse", "fine"):
        states = [load_checkpoint(run / stage / "checkpoint.safetensors")[0] for run in runs]
        assert states[0].keys() == states[1].keys()
        for name, tensor in states[0].items():
            assert tensor.numpy().tobytes() == states[1][name].numpy().tobytes(), name
    lines = [
        [{k: v for k, v in json.loads(t).items() if k != "seconds"} for t in (r / "metrics.jsonl").open()] for r in runs
    ]
    assert lines[0] == lines[1]


@pytest.mark.slow
def test_a_profile_holds_every_phase_and_the_share_of_the_networks(runs):
    facts = json.loads((runs[1] / "profile" / "profile.json").read_text())
    paths = {tuple(row["path"]): row for row in facts["phases"]}
    for stage, names in (("coarse", ["occupancy"]), ("fine", ["surface"])):
        for name in ("views", "render", "guidance", "regularisers", "backward", "optimiser", *names):
            assert (stage, "step", name) in paths, name
        for name in ("load_prior", "construct", "step", "preview", "checkpoint", "finish"):
            assert (stage, name) in paths, name
        assert (stage, "step", "guidance", "rule", "networks") in paths
        assert 0 < facts["stages"][stage]["networks_share"] < 1
    assert {("export", name) for name in ("extract", "clean", "decimate", "unwrap", "bake", "write")} <= set(paths)
    assert ("fine", "step", "guidance", "encode", "networks") in paths
    assert ("fine", "step", "backward", "networks") in paths  # through the autoencoder
    assert not [p for p in paths if p[:3] == ("coarse", "step", "backward") and len(p) > 3]  # pixels have none
    assert facts["stages"]["coarse"]["steps"] == 2 and facts["stages"]["fine"]["traced_steps"] == 1
    steps = paths["fine", "step"]["seconds"]
    parts = sum(row["seconds"] for path, row in paths.items() if path[:2] == ("fine", "step") and len(path) == 3)
    assert 0.8 * steps <= parts <= steps * (1 + 1e-3)
    assert facts["other_s"] >= 0 and facts["total_s"] < time.perf_counter()


@pytest.mark.slow
def test_a_trace_has_the_operators_of_each_phase_where_the_phase_is(runs):
    trace = json.loads((runs[1] / "profile" / "fine.trace.json").read_text())["traceEvents"]
    phases = [event for event in trace if event.get("cat") == "phase"]
    operators = [event for event in trace if event.get("name") == "aten::convolution"]
    assert [event["name"] for event in phases].count("traced step") == 1
    inside = [event for event in phases if event["name"] == "networks"]
    assert len(inside) == 3  # encode, predict, and back through the encoder
    slack = 1000  # microseconds between the two clocks
    for event in operators:
        assert any(p["ts"] - slack <= event["ts"] <= p["ts"] + p["dur"] + slack for p in inside)
    whole = json.loads((runs[1] / "profile" / "run.trace.json").read_text())["traceEvents"]
    names = {event["name"] for event in whole}
    assert {"coarse", "fine", "export", "step", "traced step", "write"} <= names and "networks" not in names
