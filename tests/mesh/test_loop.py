"""Loop subdivision: hand-worked masks, the limit of regular and irregular vertices, creases, and its matrix."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from stages.mesh.measure import edges_of, measure
from stages.mesh.mesh import Mesh
from stages.mesh.subdivision.loop import (
    as_torch,
    control_of,
    icosphere,
    limit_matrix,
    limit_surface,
    subdivide_linearly,
)

OCTAHEDRON = np.array([[1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1]], np.float64)
OCTAHEDRON_FACES = np.array([[0, 2, 4], [2, 1, 4], [1, 3, 4], [3, 0, 4], [2, 0, 5], [1, 2, 5], [3, 1, 5], [0, 3, 5]])
TETRAHEDRON = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], np.float64)
TETRAHEDRON_FACES = np.array([[0, 1, 2], [0, 3, 1], [0, 2, 3], [1, 3, 2]])


def refined_once(points: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """One step of Loop's scheme for a closed mesh by its textbook rules, vertex by vertex."""
    neighbours = [{int(v) for f in faces if i in f for v in f} - {i} for i in range(len(points))]
    new = []
    for i, neighbour_set in enumerate(neighbours):
        n = len(neighbour_set)
        beta = (5 / 8 - (3 / 8 + math.cos(2 * math.pi / n) / 4) ** 2) / n
        new.append((1 - n * beta) * points[i] + beta * sum(points[j] for j in neighbour_set))
    for a, b in edges_of(faces).pairs:
        c, d = (next(int(v) for v in f if v not in (a, b)) for f in faces if a in f and b in f)
        new.append(3 / 8 * (points[a] + points[b]) + 1 / 8 * (points[c] + points[d]))
    return np.array(new)


def one_step(faces: np.ndarray, vertices: int) -> np.ndarray:
    """The matrix of one subdivision without the projection to the limit."""
    finer, to_limit = limit_surface(faces, vertices, 1)
    return np.linalg.solve(limit_matrix(finer, to_limit.shape[0]).toarray(), to_limit.toarray())


def hexagonal(n: int) -> tuple[np.ndarray, np.ndarray]:
    """A flat patch of (n + 1)^2 vertices with edges of length 1, every inner one of valence 6."""
    row, column = np.mgrid[: n + 1, : n + 1]
    points = np.stack([column + row / 2 - 0.75 * n, row * math.sqrt(3) / 2, np.zeros(row.shape)], -1).reshape(-1, 3)
    at = np.arange((n + 1) ** 2).reshape(n + 1, n + 1)
    a, b, c, d = at[:-1, :-1], at[:-1, 1:], at[1:, :-1], at[1:, 1:]
    faces = np.concatenate([np.stack([a, b, c], -1).reshape(-1, 3), np.stack([b, d, c], -1).reshape(-1, 3)])
    return points, faces


def test_octahedron_moves_as_worked_out_by_hand():
    # valence 4: beta = (5/8 - (3/8)^2) / 4 = 31/256; the four neighbours of a corner sum to 0
    new = one_step(OCTAHEDRON_FACES, 6) @ OCTAHEDRON
    assert np.allclose(new[0], [1 - 4 * 31 / 256, 0, 0])
    assert {tuple(np.round(v, 9)) for v in new[6:]} >= {(0.375, 0.375, 0.0), (-0.375, 0.0, 0.375)}
    # chi = 1 / (4 + 3 / (8 * 31/256)) = 31 / 220, so the limit of a corner is 1 - 4 * 31 / 220 = 24 / 55 of it
    assert np.allclose((limit_surface(OCTAHEDRON_FACES, 6, 0)[1] @ OCTAHEDRON)[0], [24 / 55, 0, 0])


def test_tetrahedron_moves_as_worked_out_by_hand():
    # valence 3: beta = 3/16, neighbours of (1, 1, 1) sum to -(1, 1, 1): 7/16 - 3/16 = 1/4 of it; limit 2/5 - 1/5
    new = one_step(TETRAHEDRON_FACES, 4) @ TETRAHEDRON
    assert np.allclose(new[0], 0.25)
    # an edge's ends and opposite corners: 3/8 * (2, 0, 0) + 1/8 * (-2, 0, 0)
    assert {tuple(np.round(v, 9)) for v in new[4:]} >= {(0.5, 0.0, 0.0), (-0.5, 0.0, 0.0), (0.0, 0.5, 0.0)}
    assert np.allclose((limit_surface(TETRAHEDRON_FACES, 4, 0)[1] @ TETRAHEDRON)[0], 0.2)


@pytest.mark.parametrize("points, faces", [(OCTAHEDRON, OCTAHEDRON_FACES), icosphere(1)], ids=["valence 4", "5 and 6"])
def test_one_step_equals_the_textbook_rules_vertex_by_vertex(points, faces):
    skewed = points @ np.array([[1, 0.3, 0], [0, 1, -0.2], [0.1, 0, 1.5]]) + points**2
    assert np.allclose(one_step(faces, len(points)) @ skewed, refined_once(skewed, faces), atol=1e-12)


@pytest.mark.parametrize("points, faces", [(OCTAHEDRON, OCTAHEDRON_FACES), (TETRAHEDRON, TETRAHEDRON_FACES)])
def test_limit_positions_are_where_subdividing_on_and_on_leads(points, faces):
    at_once = limit_surface(faces, len(points), 0)[1] @ points
    for levels in (1, 3):
        later = limit_surface(faces, len(points), levels)[1] @ points
        assert np.allclose(later[: len(points)], at_once, atol=1e-12)  # the old vertices come first
    current, finer, errors = points, faces, []
    for _ in range(3):
        current = refined_once(current, finer)
        finer = limit_surface(finer, len(finer) // 2 + 2, 1)[0]
        errors.append(np.abs(current[: len(points)] - at_once).max())
    assert errors[1] < 0.5 * errors[0] and errors[2] < 0.5 * errors[1] and errors[2] < 0.03


def test_limit_of_a_regular_patch_reproduces_planes_and_shifts_squares_by_a_quarter():
    # the quartic box spline: 1/2 and six times 1/12; x^2 of the six neighbours sums to 3, so x^2 becomes x^2 + 1/4
    points, faces = hexagonal(8)
    values = np.stack([3 + 2 * points[:, 0] - points[:, 1], points[:, 0] ** 2, points[:, 0] * points[:, 1]], -1)
    for levels in (0, 1, 2):
        finer, matrix = limit_surface(faces, len(points), levels)
        place = subdivide_linearly(points, faces, levels)[0]
        far = np.abs(place - points.mean(0)).max(1) < 1.2  # the border's creases do not reach there
        assert far.sum() >= 4
        x, y = (matrix @ points)[far, 0], (matrix @ points)[far, 1]
        assert np.allclose(np.stack([x, y], -1), place[far, :2])  # linear functions stay, so points stay in the plane
        expected = np.stack([3 + 2 * x - y, x**2 + 1 / 4, x * y], -1)
        assert np.allclose((matrix @ values)[far], expected)
        assert finer.max() == len(place) - 1


def test_border_is_the_cubic_b_spline_of_its_vertices_and_corners_stay():
    faces = np.array([[0, 1, 3], [1, 4, 3], [1, 2, 4]])
    matrix = limit_matrix(faces, 5).toarray()
    assert np.allclose(matrix[1], [1 / 6, 2 / 3, 1 / 6, 0, 0])  # 0 - 1 - 2 is its border; 3 and 4 do not count
    step = one_step(faces, 5)
    assert np.allclose(step[1], [1 / 8, 3 / 4, 1 / 8, 0, 0])
    pairs = edges_of(faces).pairs.tolist()
    assert np.allclose(step[5 + pairs.index([0, 1])], [1 / 2, 1 / 2, 0, 0, 0])
    assert np.allclose(step[5 + pairs.index([1, 3])], [1 / 8, 3 / 8, 0, 3 / 8, 1 / 8])
    fan = np.array([[0, 1, 2], [0, 3, 1], [1, 0, 4]])  # three faces at edge 0-1, where more than two creases end
    assert np.allclose(limit_matrix(fan, 5).toarray()[0], [1, 0, 0, 0, 0])


def test_vertex_without_faces_stays_and_rows_sum_to_one():
    matrix = limit_surface(OCTAHEDRON_FACES, 8, 2)[1]
    assert np.allclose(np.asarray(matrix.sum(1)), 1)
    assert matrix[6:8].toarray()[0].tolist() == [0] * 6 + [1, 0]


def test_subdivided_surface_is_closed_and_has_four_faces_for_each():
    faces, matrix = limit_surface(OCTAHEDRON_FACES, 6, 2)
    report = measure(Mesh((matrix @ OCTAHEDRON).astype(np.float32), faces))
    assert (len(faces), matrix.shape) == (128, (66, 6))
    assert report.solid and report.euler_number == 2


def test_texture_coordinates_are_split_in_the_face_order_of_the_surface():
    uv = OCTAHEDRON[:, :2].astype(np.float32)
    split, uv_faces = subdivide_linearly(uv, OCTAHEDRON_FACES, 2)
    faces, _ = limit_surface(OCTAHEDRON_FACES, 6, 2)
    flat, _ = subdivide_linearly(OCTAHEDRON, OCTAHEDRON_FACES, 2)
    assert split.dtype == np.float32 and np.array_equal(uv_faces, faces)  # here both have one topology
    assert np.allclose(split[uv_faces], flat[faces][..., :2])
    corners = flat[faces].mean(1)  # every child lies within its parent
    parents = OCTAHEDRON[OCTAHEDRON_FACES].mean(1).repeat(16, 0)
    assert (np.einsum("fk,fk->f", corners, parents) > 0.1).all()


def test_control_vertices_of_a_mesh_give_it_back():
    points, faces = icosphere(2)
    expected = points * [1, 0.7, 1.2]
    control = control_of(faces, expected)
    assert np.abs(limit_matrix(faces, len(points)) @ control - expected).max() < 1e-12
    assert np.abs(control - expected).max() > 1e-3


def test_icosphere_is_a_closed_unit_sphere_of_642_vertices():
    points, faces = icosphere(3)
    report = measure(Mesh(points.astype(np.float32), faces))
    assert points.shape == (642, 3) and np.allclose(np.linalg.norm(points, axis=1), 1)
    assert report.solid and abs(report.volume - 4 / 3 * math.pi) < 0.05


def test_gradient_of_the_surface_agrees_with_finite_differences():
    matrix = as_torch(limit_surface(OCTAHEDRON_FACES, 6, 2)[1], torch.float64)
    control = torch.from_numpy(OCTAHEDRON.copy()).requires_grad_()
    assert torch.autograd.gradcheck(lambda c: torch.sparse.mm(matrix, c).sin(), (control,))
    assert torch.equal(torch.sparse.mm(matrix, control), torch.sparse.mm(matrix, control))


def test_faces_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"indices in \[0, 5\)"):
        limit_surface(OCTAHEDRON_FACES, 5, 1)
    with pytest.raises(ValueError, match=r"wanted shape \[F, 3\]"):
        limit_surface(np.zeros((0, 3), int), 5, 1)
