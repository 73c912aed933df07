"""The reference benchmark: its meshes, its measures on cases worked by hand, and its table."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.spatial import ConvexHull

from benchmarks import rebuild as reference
from benchmarks.rebuild_meshes import MESHES
from benchmarks.report import tables
from pipeline.config.model import load_config
from stages.kernels.srgb import srgb_to_linear
from stages.mesh.measure import measure
from stages.mesh.mesh import Mesh
from stages.ramp import constant
from tests.mesh.mesh_shapes import sphere


@pytest.mark.parametrize("name", MESHES)
def test_each_mesh_is_one_coloured_solid_with_concavities_inside_the_scene(name):
    mesh = MESHES[name]()
    report = measure(mesh)
    assert report.solid and report.components == 1 and report.degenerate_faces == 0
    assert 0.6 < np.linalg.norm(mesh.vertices, axis=1).max() <= 0.8 + 1e-6
    assert report.volume < 0.7 * ConvexHull(mesh.vertices).volume
    assert mesh.colours.min() >= 0 and mesh.colours.max() <= 1
    assert mesh.colours.std(axis=0).min() > 0.1, "each channel varies"


def test_the_knot_and_the_bracket_have_one_hole_and_the_bowl_none():
    assert {name: measure(make()).euler_number for name, make in MESHES.items()} == {"knot": 0, "bowl": 2, "bracket": 0}


def test_compare_counts_silhouettes_and_squares_by_hand():
    target, coverage = srgb_to_linear(torch.full((1, 4, 4, 3), 0.5)), torch.zeros(1, 4, 4, 1)
    coverage[:, :, :2] = 1  # the left half; found is the top half: 4 pixels in both, 12 in either
    actual, image = coverage.transpose(1, 2).contiguous(), target.clone()
    image[:, 0, 0] = float(srgb_to_linear(torch.tensor(0.7)))  # one pixel of 16, 0.2 off in sRGB
    scores = reference.compare(image, actual, target, coverage)
    assert scores["iou"] == pytest.approx(4 / 12)
    assert scores["psnr_db"] == pytest.approx(-10 * math.log10(0.04 / 16), abs=1e-3)
    assert scores["psnr_object_db"] == pytest.approx(-10 * math.log10(0.04 / 12), abs=1e-3)


def test_chamfer_of_a_grown_sphere_is_the_growth_over_the_diagonal():
    ball = sphere(0.5, 128, 64)
    larger = Mesh(1.1 * ball.vertices, ball.faces)
    actual = reference.chamfer(larger, ball, count=20_000)
    assert actual == pytest.approx(0.05 / math.sqrt(3), rel=0.02)
    assert reference.chamfer(ball, ball, count=20_000) < 0.2 * actual


def test_missed_names_what_is_beyond_its_bound():
    good = {"iou": 0.97, "psnr_db": 26.0, "chamfer": 0.01, "watertight": True, "manifold": True, "components": 1}
    assert reference.missed("fine", good) == []
    bad = {"iou": 0.969, "psnr_db": 25.9, "chamfer": 0.011, "watertight": False, "manifold": True, "components": 2}
    assert reference.missed("fine", bad) == ["iou", "psnr_db", "chamfer", "watertight", "components"]
    assert reference.missed("coarse", {"iou": 0.93, "psnr_db": 21.9}) == ["psnr_db"]


def test_the_recipe_asks_the_exact_prior_for_a_constant_gradient():
    config = load_config("reference", [], {})
    assert (config.prior.coarse, config.prior.fine, config.reference.pose) == ("reference", "reference", "exact")
    for settings in (config.guidance.coarse, config.guidance.fine):
        assert settings.scale == 1 and settings.t_min == settings.t_max == constant(settings.t_min.start)


def test_every_stage_is_guided_by_the_mesh_at_the_size_that_it_renders():
    config = load_config("reference", ["coarse.resolution=32", "fine.resolution=48"], {})
    mesh = sphere()
    priors = reference.exact_priors(mesh, config)
    assert {name: prior.resolution for name, prior in priors.items()} == {"coarse": 32, "fine": 48}
    assert all(prior.mesh is mesh for prior in priors.values())
    config = load_config("reference", ["reference.resolution=16"], {"stages": "fine"})
    assert [(name, prior.resolution) for name, prior in reference.exact_priors(mesh, config).items()] == [("fine", 16)]


def test_times_are_those_of_the_stages_own_steps():
    rows = [{"stage": stage, "step": k, "seconds": 0.25} for stage in ("coarse", "fine") for k in (1, 2)]
    stages = {"coarse": {"steps": 2, "seconds": 9.0, "phases": {"render": 0.31}}, "fine": {}}
    times = reference.times_of(SimpleNamespace(record={"stages": stages}, metrics=rows), "coarse")
    assert times == {"steps": 2, "seconds": 0.5, "phases": {"render": 0.3}}


def test_the_table_takes_the_latest_lines_and_marks_what_is_missed():
    common = {"date": "2030-01-02T03:04:05Z", "git": "0123456789abcdef", "cores": 2}
    targets = reference.TARGETS

    def coarse(iou: float, missed: list[str]) -> dict:
        scores = {"iou": iou, "psnr_db": 24.04, "targets": targets["coarse"], "missed": missed}
        return {"mesh": "knot", "stage": "coarse", "seconds": 99.6} | scores | common

    fine = {"mesh": "knot", "stage": "fine", "iou": 0.98, "psnr_db": 25.0, "chamfer": 0.00412, "chamfer_floor": 0.0011}
    fine |= {"watertight": True, "manifold": True, "components": 2, "seconds": 60.2, "targets": targets["fine"]}
    fine |= {"missed": ["psnr_db", "components"]} | common
    text = tables.reference_markdown([coarse(0.5, ["iou"]), coarse(0.951, []), fine])
    rows = text.splitlines()
    assert rows[2] == (
        "| knot | 0.951 | 24.0 dB | 0.980 | **25.0 dB** | 0.0041 | closed, manifold, **2 parts** | 100 s + 60 s |"
    )
    expected = ">= 0.930 | >= 22.0 dB | >= 0.970 | >= 26.0 dB | <= 0.0100 | closed, manifold, 1 part"
    assert rows[3] == f"| wanted | {expected} |  |"
    assert "0.0011" in text and "bold misses" in text and "2030-01-02, revision 0123456789, 2 cores" in text


def test_a_stage_that_was_not_run_is_a_dash_in_the_table():
    line = {"mesh": "bowl", "stage": "coarse", "iou": 0.94, "psnr_db": 23.0, "seconds": 10.0, "missed": []}
    line |= {"targets": reference.TARGETS["coarse"], "date": "2030-01-02", "git": None, "cores": 2}
    assert tables.reference_markdown([line]).splitlines()[2] == "| bowl | 0.940 | 23.0 dB | - | - | - | - | 10 s |"
