"""The tree of boxes against slow references: closest points one triangle at a time, solid angles summed one by one."""

import numpy as np
import pytest
from trimesh.triangles import closest_point

from stages.mesh.tree import TriangleTree
from tests.mesh.mesh_shapes import box, join, moved, sphere, torus

RNG = np.random.default_rng(0)


def triangles(mesh):
    return mesh.vertices[mesh.faces].astype(np.float64)


def summed_angles(points, corners):
    """Jacobson et al. 2013, eq. 5, without a tree."""
    total = np.zeros(len(points))
    for t in corners:
        a, b, c = (corner - points for corner in t)
        la, lb, lc = (np.linalg.norm(v, axis=1) for v in (a, b, c))
        top = np.einsum("ij,ij->i", a, np.cross(b, c))
        ab, bc, ca = ((u * v).sum(1) for u, v in ((a, b), (b, c), (c, a)))
        total += np.arctan2(top, la * lb * lc + ab * lc + bc * la + ca * lb) / (2 * np.pi)
    return total


@pytest.mark.parametrize("mesh", [box(), sphere(n=12, m=7), join(torus(n=16, m=8), moved(box(), (0.3, 0.2, 0)))])
def test_distances_are_those_to_the_nearest_triangle(mesh):
    corners, points = triangles(mesh), RNG.uniform(-1, 1, (200, 3))
    near = [np.linalg.norm(closest_point(np.repeat(t[None], 200, 0), points) - points, axis=1) for t in corners]
    np.testing.assert_allclose(TriangleTree(corners).distances(points), np.min(near, axis=0), atol=1e-12)


def test_distances_to_degenerate_triangles_are_those_to_their_sides():
    line = np.array([[[0.0, 0, 0], [1, 0, 0], [0.5, 0, 0]], [[2.0, 2, 9]] * 3])
    np.testing.assert_allclose(TriangleTree(line).distances([[0.5, 3, 4], [-3, 0, 4], [2, 2, 8]]), [5, 5, 1])


@pytest.mark.slow
def test_winding_numbers_are_the_summed_solid_angles():
    for mesh in (torus(), sphere(n=20, m=10)):
        points = RNG.uniform(-1, 1, (300, 3))
        actual = TriangleTree(triangles(mesh)).winding_numbers(points)
        np.testing.assert_allclose(actual, summed_angles(points, triangles(mesh)), atol=0.02)


def test_winding_numbers_count_overlapping_parts_and_turn_sign_with_the_faces():
    ball = sphere(0.5)
    both = join(moved(ball, (-0.2, 0, 0)), moved(ball, (0.2, 0, 0)))
    points = [[0, 0, 0], [0.5, 0, 0], [0, 0.9, 0]]
    np.testing.assert_allclose(TriangleTree(triangles(both)).winding_numbers(points), [2, 1, 0], atol=0.02)
    np.testing.assert_allclose(TriangleTree(triangles(both)[:, ::-1]).winding_numbers(points), [-2, -1, 0], atol=0.02)


def test_winding_number_falls_through_one_half_in_the_hole_of_a_hemisphere():
    """Seen from the middle of the rim a hemisphere covers half of the sky."""
    ball = sphere(0.7, 64, 32)
    lower = triangles(ball)[triangles(ball)[:, :, 1].mean(1) < 0]
    actual = TriangleTree(lower).winding_numbers([[0, -0.3, 0], [0, 0, 0], [0, 0.3, 0]])
    assert actual[1] == pytest.approx(0.5, abs=0.02)
    assert actual[0] > 0.6 and actual[2] < 0.4


def test_segments_count_the_triangles_they_cross_and_tell_the_first():
    tree = TriangleTree(triangles(box()))
    start, end = (
        np.array([[-1, 0.1, 0.2], [0, 0.1, 0.2], [0, 0.1, 0.2]]),
        np.array([[1, 0.1, 0.2], [0.4, 0.1, 0.2], [1, 0.1, 0.2]]),
    )
    count, t = tree.hits(start, end)
    assert count.tolist() == [2, 0, 1]
    np.testing.assert_allclose(t, [0.25, 1, 0.5])


@pytest.mark.parametrize("count", [1, 4, 5, 33])
def test_any_number_of_triangles_makes_a_tree(count):
    corners = RNG.uniform(-1, 1, (count, 3, 3))
    points = RNG.uniform(-1, 1, (20, 3))
    tree = TriangleTree(corners)
    near = [np.linalg.norm(closest_point(np.repeat(t[None], 20, 0), points) - points, axis=1) for t in corners]
    np.testing.assert_allclose(tree.distances(points), np.min(near, axis=0), atol=1e-12)
    np.testing.assert_allclose(tree.winding_numbers(points), summed_angles(points, corners), atol=0.05)


def test_no_triangles_are_refused():
    with pytest.raises(ValueError, match="triangles"):
        TriangleTree(np.zeros((0, 3, 3)))
