"""UV layouts cover every face, no texel twice, with bounded distortion, whoever makes them and however xatlas fails."""

from __future__ import annotations

import importlib.util
import logging
import signal

import numpy as np
import pytest

from stages.errors import UserError
from stages.mesh.clean import decimate
from stages.mesh.measure import adjacent_faces, edges_of, face_areas, label_components
from stages.mesh.mesh import Mesh
from stages.mesh.texture import uv as module
from stages.mesh.texture.charts import unwrap_by_boxes
from stages.mesh.texture.pack import pack
from stages.mesh.texture.texels import double_covered, near_borders, scan
from stages.mesh.texture.uv import LayoutError, check_layout, texel_corners, unwrap
from tests.mesh.mesh_shapes import box, join, make, moved, noisy_blob, sphere, table, tetrahedron, torus


def signed_areas(corners: np.ndarray) -> np.ndarray:
    a, b = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    return (a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]) / 2


def ramp(turns: float = 2.5, steps: int = 160) -> Mesh:
    """A spiral staircase without steps: seen from above it lies over itself, though every face looks up."""
    angle = np.linspace(0, turns * 2 * np.pi, steps)
    rings = [np.stack([r * np.sin(angle), angle * 0.04 - 0.3, r * np.cos(angle)], -1) for r in (0.3, 0.6)]
    i = np.arange(steps - 1)
    a, b, c, d = i, i + 1, steps + i + 1, steps + i
    return make(np.concatenate(rings), np.concatenate([np.stack([a, c, b], -1), np.stack([a, d, c], -1)]))


def charts_of(uv_faces: np.ndarray) -> np.ndarray:
    pairs, _ = adjacent_faces(edges_of(uv_faces))
    return label_components(len(uv_faces), pairs // 3)[1]


def test_scan_agrees_with_testing_every_texel_centre():
    random = np.random.default_rng(1)
    corners = random.uniform(0, 20, (40, 3, 2))
    centres = np.stack(np.meshgrid(np.arange(20), np.arange(20)), -1).reshape(-1, 2) + 0.5
    for f in range(len(corners)):
        p = corners[f : f + 1] if signed_areas(corners[f : f + 1])[0] > 0 else corners[f : f + 1, ::-1]
        ends = [np.broadcast_to(p[0, k % 3], centres.shape) for k in range(4)]
        sides = [signed_areas(np.stack([ends[k], ends[k + 1], centres], 1)) for k in range(3)]
        expected = centres[(np.stack(sides) > 0).all(0)]
        actual = [np.stack([column, row], -1) + 0.5 for _, row, column in scan(corners[f : f + 1])]
        actual = np.concatenate(actual) if actual else np.zeros((0, 2))
        assert {tuple(p) for p in actual} == {tuple(p) for p in expected}


def test_shared_edges_belong_to_one_face_even_through_texel_centres():
    size = 24
    grid = np.stack(np.meshgrid(np.arange(size + 1), np.arange(size + 1), indexing="ij"), -1).reshape(-1, 2) * 1.0
    grid += 0.5  # vertices on texel centres: the worst case
    i, j = (g.reshape(-1) for g in np.meshgrid(np.arange(size), np.arange(size), indexing="ij"))
    a, b, c, d = i * (size + 1) + j, (i + 1) * (size + 1) + j, (i + 1) * (size + 1) + j + 1, i * (size + 1) + j + 1
    corners = grid[np.concatenate([np.stack([a, b, c], -1), np.stack([a, c, d], -1)])]
    pairs, covered = double_covered(corners)
    assert len(pairs) == 0 and covered == size * size


def test_double_cover_is_found():
    square = np.array([[[0, 0], [8, 0], [8, 8]], [[0, 0], [8, 8], [0, 8]], [[2, 2], [4, 2], [4, 4]]], dtype=float)
    pairs, covered = double_covered(square)
    assert covered == 64 and len(pairs) >= 1 and {tuple(p) for p in pairs.tolist()} <= {(0, 2), (1, 2)}


def test_texels_near_a_border_by_hand():
    corners = np.array([[[4.0, 4], [12, 4], [4, 12]]])
    actual = {(int(r), int(c)): d for _, row, column, _, distance in near_borders(corners, np.array([0]), 1.5)
             for r, c, d in zip(row, column, distance)}  # fmt: skip
    assert actual[(3, 5)] == pytest.approx(0.5) and actual[(2, 5)] == pytest.approx(1.5)
    assert (1, 5) not in actual and (5, 5) in actual and actual[(3, 3)] == pytest.approx(np.sqrt(0.5))


@pytest.mark.parametrize("count", [1, 7, 150])
def test_packed_rectangles_keep_their_distance(count):
    sizes = np.random.default_rng(count).uniform(0.01, 1, (count, 2)) ** 2
    places, scale = pack(sizes, 256, 4)
    low, high = places, places + sizes * scale
    assert low.min() >= 2 and high.max() <= 254
    apart = np.maximum(low[:, None] - high[None], low[None] - high[:, None]).max(-1)
    assert apart[~np.eye(count, dtype=bool)].min(initial=np.inf) >= 4
    assert (sizes * scale).prod(1).sum() > (0.25 if count > 1 else 0) * 256**2


def test_too_many_rectangles_are_refused():
    with pytest.raises(ValueError, match="do not fit"):
        pack(np.full((1000, 2), 0.1), 64, 4)


MESHES = {
    "box": box(),
    "tetrahedron": tetrahedron(),
    "torus": torus(),
    "sphere": sphere(),
    "table": table(24),
    "ramp": ramp(),
    "two_parts": join(torus(n=24, m=12), moved(box(), (2, 0, 0))),
    "blob": decimate(noisy_blob(28, 0.09), 5000),
    "open": make(sphere().vertices, sphere().faces[:700]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_box_charts_cover_everything_once(name):
    mesh, size, padding = MESHES[name], 512, 4
    uv, uv_faces, charts = unwrap_by_boxes(mesh, size, padding)
    assert uv.min() >= 0 and uv.max() <= 1 and uv.dtype == np.float32 and uv_faces.dtype == np.int32
    assert check_layout(mesh, uv, uv_faces, size) > 0.2
    corners = texel_corners(uv, uv_faces, size)
    assert len(double_covered(corners)[0]) == 0
    areas = signed_areas(corners)
    assert (areas > 0).all()  # none lost, none mirrored
    share = areas / face_areas(mesh.vertices, mesh.faces)
    share /= areas.sum() / face_areas(mesh.vertices, mesh.faces).sum()
    assert share.min() > 0.15 and share.max() < 2.5
    # Charts keep their distance: grown by just under half the padding, none reaches a texel of another.
    owner = charts_of(uv_faces)
    assert owner.max() + 1 == charts
    edges = edges_of(uv_faces)
    borders = np.flatnonzero(edges.count[edges.of_half_edge] == 1)
    reached = near_borders(corners, borders, padding / 2 - 0.1)
    texels, who = (
        np.concatenate(p) for p in zip(*[(r * size + c, owner[borders[e] // 3]) for e, r, c, _, _ in reached])
    )
    pairs = np.unique(np.stack([texels, who], -1), axis=0)
    assert len(np.unique(pairs[:, 0])) == len(pairs)


def test_a_surface_over_itself_is_cut_until_it_is_not():
    assert unwrap_by_boxes(ramp(), 512, 4)[2] >= 3


def test_box_charts_are_few_and_the_same_every_time():
    mesh = torus()
    one, other = unwrap_by_boxes(mesh, 512, 4), unwrap_by_boxes(mesh, 512, 4)
    assert one[2] <= 14 and unwrap_by_boxes(box(), 512, 4)[2] == 6
    np.testing.assert_array_equal(one[0], other[0])
    np.testing.assert_array_equal(one[1], other[1])


def test_faces_without_area_are_no_obstacle():
    mesh = box()
    vertices = np.concatenate([mesh.vertices, mesh.vertices[[0, 2]].mean(0, keepdims=True)])
    faces = np.concatenate([mesh.faces, [[0, 8, 2]]])  # a crack along an edge
    uv, uv_faces, _ = unwrap_by_boxes(make(vertices, faces), 256, 4)
    assert np.isfinite(uv).all() and len(uv_faces) == 13


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("xatlas") is None, reason="xatlas is not installed")
@pytest.mark.parametrize("name", ["torus", "blob", "table"])
def test_xatlas_layout_is_used_where_it_is_good(name):
    mesh = MESHES[name]
    atlas = unwrap(mesh, 512)
    assert (atlas.method, atlas.note) == ("xatlas", "") and 0.3 < atlas.coverage < 1
    double, covered = double_covered(texel_corners(atlas.uv, atlas.uv_faces, 512))
    assert len(double) <= 1e-3 * covered  # its own: a few texels on rough meshes
    # The same corner of the mesh may have several texture coordinates, but never the other way round.
    pairs = np.unique(np.stack([atlas.uv_faces.reshape(-1), mesh.faces.reshape(-1)], -1), axis=0)
    assert len(np.unique(pairs[:, 0])) == len(pairs)
    again = unwrap(mesh, 512)
    np.testing.assert_array_equal(atlas.uv, again.uv)
    np.testing.assert_array_equal(atlas.uv_faces, again.uv_faces)


FAILURES = {
    "crash": ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "signal 11"),
    "error": ("raise RuntimeError('no such mesh')", "RuntimeError: no such mesh"),
    "endless": ("import time; time.sleep(60)", "longer than 3 s on the clock"),
    "silent": ("", "no readable result"),
    "overlapping": (
        "import sys, numpy as np\nfrom safetensors.numpy import load_file, save_file\n"
        "f = load_file(sys.argv[1])['faces']; t = np.array([[0, 0], [64, 0], [0, 64]], dtype=np.float32)\n"
        "save_file({'texels': t, 'uv_faces': np.tile(np.arange(3, dtype=np.int32), (len(f), 1)),\n"
        "           'shape': np.array([64, 64, 1])}, sys.argv[2])",
        "overlap",
    ),
}


@pytest.mark.skipif(importlib.util.find_spec("xatlas") is None, reason="xatlas is not installed")
@pytest.mark.parametrize("kind", FAILURES)
def test_own_charts_step_in_when_xatlas_fails(kind, tmp_path, monkeypatch, caplog):
    source, reason = FAILURES[kind]
    worker = tmp_path / "worker.py"
    worker.write_text(source)
    monkeypatch.setattr(module, "WORKER", worker)
    limit = 0.3 if kind == "endless" else 60
    with caplog.at_level(logging.WARNING):
        atlas = unwrap(torus(n=24, m=12), 256, time_limit_s=limit)
    assert atlas.method == "boxes" and reason in atlas.note and reason in caplog.text
    with pytest.raises(UserError, match=reason):
        unwrap(torus(n=24, m=12), 256, method="xatlas", time_limit_s=limit)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("xatlas") is None, reason="xatlas is not installed")
@pytest.mark.skipif(not hasattr(signal, "SIGXCPU"), reason="this system has no limit on computing time")
def test_xatlas_is_stopped_by_its_computing_time():
    with pytest.raises(UserError, match="took longer than 1"):
        unwrap(torus(n=160, m=80), 512, method="xatlas", time_limit_s=1)


def test_own_charts_step_in_when_xatlas_is_missing(monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    atlas = unwrap(box(), 256)
    assert atlas.method == "boxes" and "not installed" in atlas.note


def test_texture_too_small_for_the_charts_is_said():
    crumbs = join(*[moved(tetrahedron(), (0.2 * k, 0, 0), 0.1) for k in range(40)])
    with pytest.raises(UserError, match="do not fit") as error:
        unwrap(crumbs, 16, method="boxes")
    assert "texture_size" in error.value.fix


@pytest.mark.parametrize(
    ("uv", "reason"),
    [
        ([[0, 0], [1, 0], [0, np.nan]], "not all within"),
        ([[0, 0], [1.5, 0], [0, 1]], "not all within"),
        ([[0.2, 0.2], [0.2, 0.2], [0.2, 0.2]], "no texels"),
    ],
)
def test_unusable_layouts_are_recognised(uv, reason):
    mesh = make([[0, 0, 0], [1, 0, 0], [0, 1, 0]], [[0, 1, 2]])
    with pytest.raises(LayoutError, match=reason):
        check_layout(mesh, np.asarray(uv, np.float32), mesh.faces, 64)


def test_starved_faces_are_recognised():
    mesh = make([[0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0]], [[0, 1, 2], [1, 3, 2]])
    uv = np.array([[0, 0], [0.9, 0], [0, 0.9], [0.46, 0.46]], np.float32)
    with pytest.raises(LayoutError, match=r"50\.0 % of the surface"):
        check_layout(mesh, uv, mesh.faces, 64)


def test_overlapping_faces_are_recognised():
    mesh = make([[0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0]], [[0, 1, 2], [1, 3, 2]])
    uv = np.array([[0, 0], [0.9, 0], [0, 0.9], [0.1, 0.1]], np.float32)  # the second face folded over
    with pytest.raises(LayoutError, match="twice"):
        check_layout(mesh, uv, mesh.faces, 64)
