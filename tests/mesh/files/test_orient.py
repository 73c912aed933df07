"""Faces made to agree, and the copies that are shaded: by hand on boxes, spheres and a Moebius strip."""

import numpy as np

from stages.mesh.measure import measure
from stages.mesh.mesh import Mesh
from stages.mesh.orient import creased, one_sided, smooth_normals, turned, welded_faces
from tests.mesh.mesh_shapes import box, join, make, moved, sphere


def flipped(mesh, which):
    faces = mesh.faces.copy()
    faces[which] = faces[which][:, ::-1]
    return Mesh(mesh.vertices, faces)


def apply(mesh):
    over = turned(mesh.vertices, mesh.faces)
    return flipped(mesh, over)


def split_corners(mesh):
    """Every face with vertices of its own, as in an STL file."""
    return make(mesh.vertices[mesh.faces].reshape(-1, 3), np.arange(3 * len(mesh.faces)).reshape(-1, 3))


def test_randomly_wound_faces_agree_and_face_outwards_again():
    ball = sphere(n=16, m=9)
    mixed = flipped(ball, np.random.default_rng(0).random(len(ball.faces)) < 0.5)
    assert not measure(mixed).oriented
    np.testing.assert_array_equal(apply(mixed).faces, ball.faces)


def test_a_mesh_turned_inside_out_is_turned_back():
    cube = box()
    assert turned(cube.vertices, cube.faces[:, ::-1]).all()


def test_a_consistent_mesh_with_a_cavity_is_left_alone():
    hollow = join(box(), flipped(moved(box(), (0, 0, 0), 0.5), slice(None)))
    assert not turned(hollow.vertices, hollow.faces).any()


def test_each_part_is_faced_outwards_by_itself():
    one, two = flipped(box(), [0, 1, 2]), flipped(moved(box(), (3, 0, 0)), [5])
    assert measure(apply(join(one, two))).volume == 2


def test_a_moebius_strip_is_survived():
    n = 12
    angle = np.arange(n) * 2 * np.pi / n
    rim = [(1 + s * 0.2 * np.cos(angle / 2)) for s in (-1, 1)]
    points = [
        np.stack([r * np.cos(angle), s * 0.2 * np.sin(angle / 2), r * np.sin(angle)], -1) for r, s in zip(rim, (-1, 1))
    ]
    faces = []
    for k in range(n):
        a, b = k, k + n
        c, d = ((k + 1), (k + 1 + n)) if k + 1 < n else (n, 0)  # the last pair meets the first one crossed
        faces += [[a, c, b], [c, d, b]]
    assert turned(np.concatenate(points), np.array(faces)).shape == (2 * n,)


def test_a_shaded_copy_of_a_split_sphere_is_smooth_and_of_a_cube_is_sharp():
    ball = sphere(n=32, m=16)
    shaded = creased(split_corners(ball))
    assert len(shaded.vertices) == len(ball.vertices)
    np.testing.assert_array_equal(shaded.vertices[shaded.faces], ball.vertices[ball.faces])
    radial = shaded.vertices / np.linalg.norm(shaded.vertices, axis=1, keepdims=True)
    assert (shaded.vertex_normals() * radial).sum(1).min() > 0.995
    cube = creased(box())
    assert len(cube.vertices) == 24
    assert np.allclose(np.abs(cube.vertex_normals()).max(1), 1)


def test_a_shaded_copy_faces_outwards_whatever_the_file_says():
    ball = sphere(n=16, m=9)
    shaded = creased(flipped(ball, [3, 4, 5]))
    radial = shaded.vertices[shaded.faces].mean(1)
    assert ((shaded.face_normals() * radial).sum(1) > 0).all()


def test_normals_of_a_split_sphere_are_smooth_and_outward_at_the_files_own_vertices():
    ball = flipped(split_corners(sphere(n=32, m=16)), [1, 7])
    normals = smooth_normals(ball)
    radial = ball.vertices / np.linalg.norm(ball.vertices, axis=1, keepdims=True)
    assert normals.dtype == np.float32
    assert (normals * radial).sum(1).min() > 0.995


def small(x):
    return moved(box(), (x, 0, 0), 0.5)


def test_a_part_apart_that_faces_inwards_is_turned_and_a_cavity_is_not():
    parts = [box(), flipped(small(3), slice(None)), small(-3), flipped(small(0), slice(None))]
    over = turned(*_parts(*parts)).reshape(4, 12)
    assert over.all(1).tolist() == [False, True, False, False] and not over[[0, 2, 3]].any()


def test_an_inverted_part_that_reaches_out_of_another_is_turned():
    assert turned(*_parts(box(), flipped(moved(box(), (0.9, 0.1, 0.2), 0.7), slice(None))))[12:].all()


def test_open_parts_are_judged_about_their_own_middles():
    """Two bowls back to back, wound rightly: about the middle between them both seem to face inwards."""
    ball = sphere(n=16, m=9)
    bowl = Mesh(ball.vertices, ball.faces[(ball.vertices[ball.faces][..., 0] <= 1e-6).all(1)])
    mirrored = Mesh(bowl.vertices * [-1, 1, 1], bowl.faces[:, ::-1])
    for apart in (0.0, 3.0, 10.0):
        vertices, faces = _parts(moved(bowl, (apart, 0, 0)), moved(mirrored, (-apart, 0, 0)))
        assert not turned(vertices, faces).any(), apart
        assert turned(vertices, faces[:, ::-1]).all(), apart


def test_a_surface_written_for_both_sides_counts_once_and_a_wall_between_rooms_twice():
    cube = box()
    both = join(cube, flipped(cube, slice(None)))
    _, faces = welded_faces(both)
    assert one_sided(faces).tolist() == [True] * 12 + [False] * 12
    rooms = join(box(), moved(box(), (1, 0, 0)))  # boxes have unit sides: one wall in common
    _, faces = welded_faces(rooms)
    assert one_sided(faces).all()
    assert one_sided(welded_faces(join(both, rooms))[1]).sum() >= 24


def _parts(*meshes):
    whole = join(*meshes)
    return whole.vertices, whole.faces
