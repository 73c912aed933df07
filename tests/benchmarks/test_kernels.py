"""The kernels' benchmark: inputs, contestants, tiny runs of every case, what is absent, published lines and tables."""

from __future__ import annotations

import json
import sys
import types

import numpy as np
import pytest
import torch

from benchmarks.environment import read_lines
from benchmarks.kernels import kernels, operations, peers
from benchmarks.kernels.kernel_tables import TARGETS, kernels_markdown, on_moved_meshes, rows_of, targets
from benchmarks.kernels.operations import BOTH, FORWARD, QUICK, bumpy_ball, cases
from benchmarks.timing import compare
from stages.mesh.measure import measure
from stages.mesh.mesh import Mesh
from tests.fork_server import ROOT

TINY = operations.Sizes(side=4, per_ray=4, tables=(10, 11), hidden=8, pixels=24, rings=6, cells=8)


@pytest.fixture(scope="module")
def tiny() -> dict[tuple[str, str, str], operations.Case]:
    by_key = {(case.name, case.work, str(case.shapes)): case for case in cases(TINY, "cpu")}
    assert len(by_key) == len(list(cases(TINY, "cpu")))
    return by_key


def test_the_ball_is_closed_faces_outwards_and_has_the_triangles_it_says():
    vertices, triangles = bumpy_ball(6)
    assert len(triangles) == 4 * 6 * 5 and len(vertices) == 5 * 12 + 2
    actual = measure(Mesh(vertices, triangles))
    assert actual.solid and actual.volume > 0
    assert abs(len(bumpy_ball(operations.Sizes().rings)[1]) - 50_000) < 1000


def test_the_published_step_has_262144_samples():
    sizes = operations.Sizes()
    assert 4 * sizes.side**2 * sizes.per_ray == 262_144 and sizes.pixels == 512


def test_points_lie_in_the_box_in_the_order_of_their_rays():
    volume = operations.Volume(TINY, "cpu")
    points = 2 * volume.points - 1
    at = volume.rays_o[volume.samples.rays] + volume.samples.t[:, None] * volume.rays_d[volume.samples.rays]
    assert torch.allclose(points, at.clamp(-1, 1), atol=1e-5)
    assert 0.05 < volume.occupancy.float().mean() < 0.15


@pytest.mark.slow
def test_every_case_gives_the_same_under_both_backends(tiny):
    assert {name for name, _, _ in tiny} == set(kernels.CASES)
    cull = next(case for case in tiny.values() if case.name == "cull")
    survivors, _ = cull.call(kernels.backends("numba", "cpu"))()
    assert 0.2 < len(survivors) / cull.shapes["samples"] < 0.8
    for case in tiny.values():
        ours, twin = (flat(case.call(kernels.backends(name, "cpu"))()) for name in ("numba", "torch"))
        assert len(ours) == len(twin) > 0
        for a, b in zip(ours, twin):
            assert torch.allclose(a.double(), b.double(), rtol=2e-3, atol=2e-3), case.name


def flat(actual) -> list[torch.Tensor]:
    if isinstance(actual, torch.Tensor):
        return [actual.detach()]
    if isinstance(actual, (tuple, list)):
        return [t for part in actual for t in flat(part)]
    return [actual.t, actual.delta, actual.ray_offsets]  # Samples


def test_a_forward_case_records_no_gradients(tiny):
    for case in tiny.values():
        if case.work == FORWARD and case.name in ("hash_encode", "mlp", "composite", "rasterise"):
            assert not any(t.requires_grad for t in flat(case.call(kernels.backends("numba", "cpu"))()))
    both = [case for case in tiny.values() if case.work == BOTH]
    assert all(t.abs().sum() > 0 for t in flat(both[0].call(kernels.backends("numba", "cpu"))()))


def test_a_package_runs_its_own_families_and_ours_the_rest():
    assert kernels.backends("tinycudann", "cuda") == {
        "hash": "tinycudann", "mlp": "tinycudann", "volume": "warp", "raster": "warp", "marching": "warp",
    }  # fmt: skip
    assert set(kernels.backends("torch", "cpu").values()) == {"torch"}


def scene_of(case: operations.Case) -> operations.Scene:
    return case.inputs[0]


def test_a_ray_caster_that_answers_right_agrees_and_one_that_does_not_does_not(tiny):
    case = next(case for case in tiny.values() if case.peers == "cast")
    ids = case.inputs[1][0, ..., 3].reshape(-1).long().numpy() - 1
    assert kernels._agreement(peers.Cast(lambda: ids, lambda actual: actual, None), case.inputs[1]) == 1
    wrong = np.where(ids >= 0, -1, 0)
    assert kernels._agreement(peers.Cast(lambda: wrong, lambda actual: actual, None), case.inputs[1]) == 0


@pytest.mark.parametrize("name", peers.ON["cpu"])
def test_every_installed_peer_computes_what_it_is_there_for(tiny, name):
    try:
        peers.probe(name)
    except peers.Absent as reason:
        pytest.skip(f"{name}: {reason} (extra: bench)")
    kind = next(kind for kind, names in peers.HAVE.items() if name in names)
    for case in tiny.values():
        if case.peers == kind:
            contestant = peers.contestant(name, kind, case.inputs, 1)
            if isinstance(contestant, peers.Cast):
                assert kernels._agreement(contestant, case.inputs[1]) > 0.99
                assert contestant.build() is not None
            else:
                assert contestant() is not None


def test_a_peer_that_breaks_on_import_or_on_use_is_absent_with_its_reason(monkeypatch, tiny):
    monkeypatch.setitem(peers.MODULES, "open3d", ("no_such_module_at_all",))
    with pytest.raises(peers.Absent, match="ModuleNotFoundError: No module named 'no_such_module_at_all'"):
        peers.probe("open3d")
    broken = types.ModuleType("nerfacc")
    monkeypatch.setitem(sys.modules, "nerfacc", broken)
    case = next(case for case in tiny.values() if case.peers == "march")
    with pytest.raises(peers.Absent, match=r"AttributeError: .*OccGridEstimator"):
        peers.contestant("nerfacc", "march", case.inputs, 1)


def test_absent_peers_have_lines_and_the_others_are_measured(monkeypatch, tiny):
    case = next(case for case in tiny.values() if case.peers == "cast")
    ids = case.inputs[1][0, ..., 3].reshape(-1).long().numpy() - 1

    def fake(name, kind, inputs, threads):
        if name != "embree":
            raise peers.Absent("ImportError: libfoo")
        return peers.Cast(lambda: ids, lambda actual: actual, lambda: ids)

    monkeypatch.setattr(peers, "contestant", fake)
    monkeypatch.setattr(peers, "probe", lambda name: "1.2")
    lines = kernels.measure_case(case, "cpu", 1, 1e-4)
    absent = {line["contestant"]: line["absent"] for line in lines if "absent" in line}
    assert absent == {"open3d": "ImportError: libfoo", "mitsuba": "ImportError: libfoo"}
    measured = [(line["contestant"], line["work"]) for line in lines if "case" in line]
    assert measured == [("numba", FORWARD), ("torch", FORWARD), ("embree", FORWARD), ("embree", "build")]
    ours, twin, embree, build = [line for line in lines if "case" in line]
    assert "times_ours" not in ours and "times_ours" not in build
    assert twin["times_ours"] == pytest.approx(twin["ms"] / ours["ms"], rel=2e-2)
    assert embree["agreement"] == 1 and embree["version"] == build["version"] == "1.2"
    for line in (ours, twin, embree, build):
        assert line["busy_cores"] >= 0 and "cores" not in line  # which is how many the machine has
        assert line["ms_low"] <= line["ms"] <= line["ms_high"] and line["runs"] >= 3 and line["shapes"] == case.shapes


@pytest.mark.slow
def test_the_command_measures_in_processes_of_their_own_and_publishes(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(ROOT)
    words = ["--only", "diffuse,mesh_edges", "--threads", "1", "--budget", "0.001", "--out", str(tmp_path)]
    monkeypatch.setattr(kernels, "_worker_words", lambda args, n: [*kernels_worker_words(args, n), "--quick"])
    assert kernels.main([*words, "--publish"]) == 0
    lines = read_lines(tmp_path / kernels.FILE)
    measured = [line for line in lines if "case" in line]
    assert [(line["case"], line["contestant"]) for line in measured] == [
        ("mesh_edges", "numba"), ("mesh_edges", "torch"), ("diffuse", "numba"), ("diffuse", "torch"),
    ]  # fmt: skip
    for line in lines:
        assert line["benchmark"] == "kernels" and line["threads"] == 1 and line["versions"]["torch"] and line["date"]
    assert all(line["absent"] for line in lines if "case" not in line)
    out = capfd.readouterr().out
    assert "| diffuse | forward |" in out


kernels_worker_words = kernels._worker_words


def test_the_numbers_of_a_trial_are_not_published(capsys):
    for words in (["--quick", "--publish"], ["--threads", "0"], ["--threads", "one"], ["--only", "fly"]):
        with pytest.raises(SystemExit) as stop:
            kernels.main(words)
        assert stop.value.code == 2
    assert "no such case: fly" in capsys.readouterr().err


def test_cuda_without_a_device_is_refused_in_three_lines(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("os.dup2", lambda *_: None)
    assert kernels.main(["--worker", "--device", "cuda", "--quick"]) == 2
    assert "torch finds no CUDA device" in capsys.readouterr().err


def line(case, work, contestant, ms, ours=None, threads=1, **more) -> dict:
    facts = {"benchmark": "kernels", "date": "2026-01-02T00:00:00Z", "git": "0123456789abcdef", "device": "cpu"}
    facts |= {"cpu": "a cpu", "cores": 2, "versions": {"torch": "2.13", "numba": "0.68"}, "threads": threads}
    facts |= {"case": case, "work": work, "contestant": contestant, "shapes": {"samples": 64}, "runs": 9}
    facts |= {"ms": ms, "ms_low": 0.9 * ms, "ms_high": 1.1 * ms}
    if ours:
        facts |= {"times_ours": ms / ours, "times_ours_low": 0.8 * ms / ours, "times_ours_high": 1.25 * ms / ours}
    return facts | more


def by_hand() -> list[dict]:
    return [
        line("nerf_step", BOTH, "numba", 400.0, shapes={"samples": 64, "log2_table": 15}),
        line("nerf_step", BOTH, "torch", 4800.0, 400.0, runs=3, shapes={"samples": 64, "log2_table": 15}),
        line("nerf_step", BOTH, "numba", 500.0, shapes={"samples": 64, "log2_table": 19}),
        line("nerf_step", BOTH, "torch", 4500.0, 500.0, shapes={"samples": 64, "log2_table": 19}),
        line("rasterise", FORWARD, "numba", 9.0),
        line("rasterise", FORWARD, "torch", 1800.0, 9.0),
        line("rasterise", FORWARD, "open3d", 45.0, 9.0, version="0.20"),
        line("rasterise", FORWARD, "mitsuba", 31.5, 9.0, version="3.9"),
        line("rasterise", "build", "open3d", 50.0, version="0.20"),
        line("rasterise", FORWARD, "numba", 5.0, threads=2),
        {"benchmark": "kernels", "device": "cpu", "threads": 1, "contestant": "kaolin", "absent": "not installed"},
    ]


def test_a_row_holds_what_was_measured_of_one_shape():
    rows = rows_of([line for line in by_hand() if "case" in line])
    assert list(rows) == [
        ("nerf_step", BOTH, "log2_table 15"),
        ("nerf_step", BOTH, "log2_table 19"),
        ("rasterise", FORWARD, ""),
        ("rasterise", "build", ""),
    ]
    assert len(rows["rasterise", FORWARD, ""]) == 5


def test_the_table_shows_ours_the_twin_and_the_others_by_threads():
    text = kernels_markdown(by_hand())
    assert "| nerf_step (log2_table 15) | forward + backward | 400.0 ms | 12.0x | - | - | - | - |" in text
    assert "| rasterise | forward | 9.00 ms | 200x | open3d 5.0x, mitsuba 3.5x | 5.00 ms | - | - |" in text
    assert "| rasterise | build | - | - | open3d 50.0 ms | - | - | - |" in text
    assert "not measured here: kaolin (not installed)" in text
    assert "2026-01-02, revision 0123456789, 2 cores of a cpu" in text and "open3d 0.20" in text


def test_targets_are_met_missed_or_not_measured():
    answers = targets(by_hand())
    assert len(answers) == 3
    assert "log2_table 15, 1 thread, against the torch twin: 12.0x [9.6, 15.0] in 3 runs; wanted >= 10x" in answers[0]
    assert "missed" not in answers[0] and "9.0x" in answers[1] and answers[1].endswith("**missed**")
    assert "against the fastest peer, mitsuba: 3.5x" in answers[2] and "missed" not in answers[2]
    alone = [line for line in by_hand() if line.get("contestant") == "numba"]
    assert all(text.endswith("**not measured**") for text in targets(alone))
    assert {target.case for target in TARGETS} == {"nerf_step", "raster_step", "rasterise"}


def test_on_a_moved_mesh_a_peer_builds_before_it_casts():
    cast = [line("rasterise", FORWARD, name, ms) for name, ms in (("numba", 5.0), ("mitsuba", 10.0), ("open3d", 30.0))]
    build = [line("rasterise", "build", "mitsuba", 90.0), line("rasterise", "build", "open3d", 20.0)]
    (text,) = on_moved_meshes([*cast, *build])
    assert "10.0x the fastest peer with its structure built anew, open3d" in text
    assert on_moved_meshes(cast) == on_moved_meshes(build) == []


def test_publishing_replaces_the_same_measurement_and_keeps_the_others(tmp_path):
    path = tmp_path / "kernels.jsonl"
    kernels.publish(by_hand(), path)
    kernels.publish([line("rasterise", FORWARD, "numba", 8.0), line("march", FORWARD, "kaolin", 1.0)], path)
    lines = read_lines(path)
    assert len(lines) == len(by_hand()) + 1 - 1  # one new, one replaced, one no longer absent
    mine = [entry for entry in lines if (entry["contestant"], entry["case"]) == ("numba", "rasterise")]
    assert [entry["ms"] for entry in mine] == [5.0, 8.0]
    assert not [entry for entry in lines if "absent" in entry]


def test_publishing_drops_old_numbers_of_who_is_absent_now_in_the_cases_measured_again(tmp_path):
    path = tmp_path / "kernels.jsonl"
    kernels.publish([*by_hand(), line("march", FORWARD, "open3d", 2.0)], path)
    gone = {"benchmark": "kernels", "device": "cpu", "threads": 1, "contestant": "open3d", "absent": "not installed"}
    kernels.publish([gone, line("rasterise", FORWARD, "numba", 8.0)], path)
    actual = {(one["contestant"], one.get("case"), one.get("work")) for one in read_lines(path)}
    assert ("open3d", None, None) in actual and ("open3d", "march", FORWARD) in actual
    assert ("open3d", "rasterise", FORWARD) not in actual and ("mitsuba", "rasterise", FORWARD) in actual


def test_a_line_is_shown_for_a_person():
    text = kernels.line_text(by_hand()[1])
    assert "nerf_step" in text and "4800.00 ms" in text and "12.00x" in text and "3 runs" in text
    assert "kaolin is not here: not installed" in kernels.line_text(by_hand()[-1])


def test_quick_sizes_run_through_the_protocol():
    case = next(case for case in cases(QUICK, "cpu") if case.name == "composite" and case.work == BOTH)
    timings = compare({n: case.call(kernels.backends(n, "cpu")) for n in ("numba", "torch")}, budget_s=1e-3)
    assert all(len(timing.runs_s) >= 3 for timing in timings.values())
    assert json.dumps(case.shapes)
