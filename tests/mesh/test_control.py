"""Control meshes: the sphere, and a user's mesh welded and thinned, with its own layout and colours where it can."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from stages.errors import UserError
from stages.mesh.measure import measure
from stages.mesh.mesh import Mesh
from stages.mesh.subdivision.control import control_mesh, control_sphere, welded
from stages.mesh.subdivision.loop import icosphere, limit_matrix, limit_surface

SIZE, PADDING = 64, 2


def ball(levels: int = 2, **changes) -> Mesh:
    points, faces = icosphere(levels)
    return Mesh((0.8 * points).astype(np.float32), faces, **changes)


def split(mesh: Mesh) -> Mesh:
    """Every triangle with corners of its own, as files without shared vertices have them."""
    corners = mesh.faces.reshape(-1)
    faces = np.arange(len(corners), dtype=np.int32).reshape(-1, 3)
    return Mesh(mesh.vertices[corners], faces, None if mesh.colours is None else mesh.colours[corners])


def test_sphere_has_a_round_limit_surface_and_charts_without_overlaps():
    control = control_sphere(0.6, 2, SIZE, PADDING)
    faces, matrix = limit_surface(control.faces, len(control.vertices), 1)
    radius = np.linalg.norm(matrix @ control.vertices, axis=1)
    assert control.vertices.shape == (162, 3) and control.texture is None
    assert abs(radius - 0.6).max() < 0.002 and measure(Mesh(control.vertices, control.faces)).solid
    assert control.uv_faces.shape == control.faces.shape and control.uv.min() >= 0 and control.uv.max() <= 1
    again = control_sphere(0.6, 2, SIZE, PADDING)
    assert all(np.array_equal(getattr(control, k), getattr(again, k)) for k in ("vertices", "faces", "uv", "uv_faces"))


def test_limit_surface_of_a_users_mesh_passes_through_its_vertices():
    control = control_mesh(ball(), 1000, SIZE, PADDING, "boxes")
    points = limit_matrix(control.faces, len(control.vertices)) @ control.vertices
    assert np.allclose(np.linalg.norm(points, axis=1), 0.8, atol=1e-5) and np.ptp(control.vertices) > 1.6


def test_mesh_without_shared_vertices_is_welded_to_a_closed_one():
    mesh = welded(split(ball()))
    report = measure(mesh)
    assert report.solid and report.vertices == 162


def test_faces_that_welding_makes_degenerate_are_dropped_with_their_coordinates():
    vertices = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 0]], np.float32)
    faces, uv_faces = np.array([[0, 1, 2], [0, 3, 1]], np.int32), np.array([[0, 1, 2], [2, 1, 0]], np.int32)
    mesh = welded(Mesh(vertices, faces, uv=np.eye(3, 2, dtype=np.float32), uv_faces=uv_faces))
    assert len(mesh.vertices) == 3 and mesh.uv_faces.tolist() == [[0, 1, 2]]
    assert np.array_equal(mesh.vertices[mesh.faces[0]], vertices[[0, 1, 2]])
    with pytest.raises(UserError, match="start mesh is empty"):
        welded(Mesh(vertices, faces[1:]))


def test_own_layout_and_texture_are_kept_where_they_can_carry_one():
    start = control_sphere(0.6, 1, SIZE, PADDING)
    picture = np.zeros((32, 32, 3), np.uint8)
    picture[:16, :, 0] = 200
    mesh = Mesh(start.vertices, start.faces, uv=start.uv, uv_faces=start.uv_faces, texture=picture)
    control = control_mesh(mesh, 1000, SIZE, PADDING, "boxes")
    assert np.array_equal(control.uv, start.uv) and np.array_equal(control.uv_faces, start.uv_faces)
    assert control.texture.shape == (SIZE, SIZE, 3) and control.texture.dtype == np.float32
    assert np.allclose(control.texture[10, :, 0], 200 / 255) and not control.texture[50].any()


def test_a_mesh_that_faces_inwards_is_turned_with_its_layout():
    start = control_sphere(0.6, 1, SIZE, PADDING)
    picture = np.full((32, 32, 3), 200, np.uint8)
    mesh = Mesh(start.vertices, start.faces, uv=start.uv, uv_faces=start.uv_faces, texture=picture)
    inverted = replace(mesh, faces=mesh.faces[:, ::-1], uv_faces=mesh.uv_faces[:, ::-1])
    one, other = (control_mesh(m, 1000, SIZE, PADDING, "boxes") for m in (mesh, inverted))
    assert np.array_equal(one.faces, other.faces) and np.array_equal(one.uv_faces, other.uv_faces)
    assert np.array_equal(one.vertices, other.vertices)


def test_overlapping_layout_is_made_anew_and_keeps_what_it_showed():
    mesh = ball(2)
    up = (mesh.vertices[:, 1] - mesh.vertices[:, 1].min()) / np.ptp(mesh.vertices[:, 1])
    mesh.uv, mesh.uv_faces = np.stack([np.full_like(up, 0.5), up], -1).astype(np.float32), mesh.faces  # one thin line
    mesh.texture = np.zeros((64, 8, 3), np.uint8)
    mesh.texture[:32, :, 1] = 255  # green above
    control = control_mesh(mesh, 1000, SIZE, PADDING, "boxes")
    assert not np.array_equal(control.uv, mesh.uv)
    height = control.vertices[control.faces].mean(1)[:, 1]
    for face, expected in ((height.argmax(), 1.0), (height.argmin(), 0.0)):
        column, row = (control.uv[control.uv_faces[face]].mean(0) * [SIZE, -SIZE] + [0, SIZE]).astype(int)
        assert control.texture[row, column].tolist() == pytest.approx([0, expected, 0], abs=0.01)


def test_a_dense_mesh_is_thinned_and_keeps_its_colours():
    colours = np.tile(np.float32([0.2, 0.5, 0.8]), (642, 1))
    control = control_mesh(split(ball(3, colours=colours)), 400, SIZE, PADDING, "boxes")
    assert 100 < len(control.faces) <= 400
    assert np.abs(control.texture - control.texture[0, 0]).max() < 0.01
    assert control.texture[0, 0].tolist() == pytest.approx([0.4845, 0.7354, 0.9063], abs=0.01)  # as sRGB
