"""Geometry metrics on boxes and balls whose volumes, distances and overlaps are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import trimesh

from benchmarks.quality import geometry
from benchmarks.quality.geometry import (
    Alignment,
    compare,
    self_intersections,
    surface_points,
    uv_collapsed,
    uv_stretch,
    volume_iou,
)
from stages.mesh.mesh import Mesh
from stages.pocket import world
from stages.pocket.build import build


def of(part: trimesh.Trimesh) -> Mesh:
    return Mesh(part.vertices.astype(np.float32), part.faces.astype(np.int32))


def box(size=(1.0, 1.0, 1.0), centre=(0.0, 0.0, 0.0)) -> Mesh:
    return of(trimesh.creation.box(size, trimesh.transformations.translation_matrix(centre)))


def ball(radius: float = 0.5, centre=(0.0, 0.0, 0.0)) -> Mesh:
    part = trimesh.creation.icosphere(4, radius)
    part.apply_translation(centre)
    return of(part)


def join(*meshes: Mesh) -> Mesh:
    starts = np.cumsum([0, *(len(m.vertices) for m in meshes)])[:-1]
    return Mesh(
        np.concatenate([m.vertices for m in meshes]),
        np.concatenate([m.faces + s for m, s in zip(meshes, starts, strict=True)]).astype(np.int32),
    )


def turned(mesh: Mesh, yaw: float, scale: float = 1.0, shift=(0.0, 0.0, 0.0)) -> Mesh:
    return Mesh(Alignment(yaw, scale, shift)(mesh.vertices).astype(np.float32), mesh.faces)


def test_winding_numbers_of_overlapping_balls_add_up():
    both = join(ball(0.5), ball(0.5, (0.5, 0, 0)))
    points = np.array([[0.25, 0, 0], [-0.3, 0, 0], [0.8, 0, 0], [2, 0, 0], [0, 0.6, 0]])
    assert geometry.winding_numbers(both, points).tolist() == [2, 1, 1, 0, 0]


def test_winding_numbers_agree_with_the_ball_everywhere():
    points = np.random.default_rng(0).uniform(-1, 1, (4000, 3))
    radius = np.linalg.norm(points, axis=1)
    clear = np.abs(radius - 0.7) > 0.01
    inside = geometry.winding_numbers(ball(0.7), points)
    assert (inside[clear] == (radius < 0.7)[clear]).all()


def test_winding_number_is_negative_in_a_mesh_turned_inside_out():
    cube = box()
    assert geometry.winding_numbers(Mesh(cube.vertices, cube.faces[:, ::-1]), np.zeros((1, 3))).tolist() == [-1]


def test_iou_of_two_boxes_that_share_half():
    assert volume_iou(box(), box(centre=(0.5, 0, 0))) == pytest.approx(1 / 3, abs=0.01)
    assert volume_iou(box(), box(centre=(2, 0, 0))) == 0
    assert volume_iou(box(), box()) == 1


def test_points_inside_another_part_are_no_surface():
    points, _ = surface_points(join(ball(0.5), ball(0.2)), 3000, np.random.default_rng(0))
    assert np.linalg.norm(points, axis=1).min() > 0.45
    assert len(points) == 3000


def test_surface_points_are_spread_by_area_and_carry_outward_normals():
    slab = box((2.0, 1.0, 0.5))
    points, normals = surface_points(slab, 8000, np.random.default_rng(0))
    on_top = (normals @ [0, 0, 1] > 0.99).mean()
    assert on_top == pytest.approx(2.0 / 7.0, abs=0.01)  # 2 x 1 of 2 (2 + 1 + 0.5)
    assert ((points * normals).sum(1) > 0).all()


def test_chamfer_of_concentric_balls_is_the_difference_of_their_radii():
    result = compare(ball(0.5), ball(0.6), aligned=False)
    diagonal = math.sqrt(3) * 1.2
    assert result["chamfer"] == pytest.approx(0.1 / diagonal, rel=0.03)
    assert result["normal_consistency"] == pytest.approx(1, abs=0.01)
    assert result["volume_iou"] == pytest.approx((0.5 / 0.6) ** 3, abs=0.02)
    assert result["f_score"] == 0  # 0.048 of the diagonal apart


def test_f_score_of_half_a_match():
    # precision: the faces of one of two far boxes are matched, 1/2; recall 1; harmonic mean 2/3
    result = compare(join(box(), box(centre=(9, 0, 0))), box(), aligned=False)
    assert result["f_score"] == pytest.approx(2 / 3, abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("yaw", [0.0, 40.0, 133.0, -90.0])
def test_a_turned_scaled_and_moved_copy_keeps_its_distance(yaw):
    truth = build(world.parse("a red teapot"))
    here = compare(truth, truth, points=2000)
    moved = compare(turned(truth, yaw, 0.8, (0.1, -0.2, 0.05)), truth, points=2000)
    assert moved["chamfer"] == pytest.approx(here["chamfer"], abs=0.001)
    assert moved["volume_iou"] > 0.95
    assert moved["scale"] == pytest.approx(1 / 0.8, rel=0.01)
    assert (moved["yaw_deg"] + yaw + 180) % 360 - 180 == pytest.approx(0, abs=1)
    assert here["chamfer"] < 0.005  # 0.0021 at the default number of points


@pytest.mark.slow
def test_truth_is_better_than_another_object_in_every_number():
    truth, other = build(world.parse("a red chair")), build(world.parse("a red teapot"))
    best, worse = compare(truth, truth, points=2000), compare(other, truth, points=2000)
    assert worse["chamfer"] > 4 * best["chamfer"]
    assert all(worse[k] < best[k] - 0.1 for k in ("normal_consistency", "f_score", "volume_iou"))


def test_an_empty_mesh_scores_nothing():
    empty = Mesh(np.zeros((0, 3), np.float32), np.zeros((0, 3), np.int32))
    result = compare(empty, ball())
    assert (result["chamfer"], result["f_score"], result["volume_iou"]) == (math.inf, 0, 0)


@pytest.mark.slow
def test_self_intersections_of_two_crossing_triangles_and_of_a_ball():
    cross = Mesh(
        np.array([[-1, 0, -1], [1, 0, -1], [0, 0, 1], [0, -1, -0.5], [0, 1, -0.5], [0, 0, 0.4]], np.float32),
        np.array([[0, 1, 2], [3, 4, 5]], np.int32),
    )
    assert self_intersections(cross) == 1
    assert self_intersections(ball()) == 0
    assert self_intersections(join(ball(), ball(0.5, (5, 0, 0)))) == 0
    assert self_intersections(join(ball(), ball(0.5, (0.3, 0, 0)))) > 20


def test_self_intersections_agree_with_testing_every_pair():
    rng = np.random.default_rng(1)
    soup = Mesh(rng.uniform(-1, 1, (90, 3)).astype(np.float32), np.arange(90, dtype=np.int32).reshape(-1, 3))
    corners = soup.vertices.astype(float)[soup.faces]

    def crosses(f, g):
        for one, two in ((f, g), (g, f)):
            for k in range(3):
                p, d = one[k], one[(k + 1) % 3] - one[k]
                system = np.stack([d, two[0] - two[1], two[0] - two[2]], -1)
                t, u, v = np.linalg.solve(system, two[0] - p)
                if 0 < t < 1 and u > 0 and v > 0 and u + v < 1:
                    return True
        return False

    slow = sum(crosses(corners[i], corners[j]) for i in range(30) for j in range(i + 1, 30))
    assert self_intersections(soup) == slow > 0


def flat_square(uv) -> Mesh:
    vertices = np.array([[0, 0, 0], [2, 0, 0], [2, 2, 0], [0, 2, 0]], np.float32)
    faces = np.array([[0, 1, 2], [0, 2, 3]], np.int32)
    return Mesh(vertices, faces, uv=np.array(uv, np.float32), uv_faces=faces)


def test_uv_stretch_of_an_even_map_is_one_and_of_a_squeezed_one_is_known():
    assert uv_stretch(flat_square([[0, 0], [1, 0], [1, 1], [0, 1]])) == pytest.approx(1)
    # s squeezed to a half: singular values 4 and 2, L2 = sqrt((16 + 4) / 2), areas 1/2 and 4
    squeezed = uv_stretch(flat_square([[0, 0], [0.5, 0], [0.5, 1], [0, 1]]))
    assert squeezed == pytest.approx(math.sqrt(10) * math.sqrt(0.5 / 4))
    assert math.isnan(uv_stretch(box()))


def test_faces_that_collapsed_in_the_texture_are_counted_by_their_surface():
    whole, half = ([[0, 0], [1, 0], [1, 1], [0, 1]], [[0, 0], [1, 0], [1, 1], [1, 1]])
    assert (uv_collapsed(flat_square(whole)), uv_collapsed(flat_square(half))) == (0, pytest.approx(0.5))
    assert uv_stretch(flat_square(half)) == pytest.approx(1)  # of what is mapped
    nothing = flat_square([[0, 0]] * 4)
    assert uv_collapsed(nothing) == 1 and math.isnan(uv_stretch(nothing))
    assert math.isnan(uv_collapsed(box()))
