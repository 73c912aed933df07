"""The numbers that say whether a mesh is a body: hand-worked cases, and trimesh as a second opinion."""

from __future__ import annotations

import numpy as np
import pytest
import trimesh

from stages.mesh.measure import adjacent_faces, edges_of, face_components, measure
from stages.mesh.mesh import Mesh
from tests.mesh.mesh_shapes import box, join, make, moved, noisy_blob, sphere, table, tetrahedron, torus


def test_tetrahedron_by_hand():
    report = measure(tetrahedron())
    assert (report.vertices, report.faces, report.components, report.euler_number) == (4, 4, 1, 2)
    assert report.volume == pytest.approx(1 / 6) and report.area == pytest.approx(1.5 + np.sqrt(3) / 2)
    assert report.solid and report.watertight and report.manifold and report.oriented
    assert report.bounds == ((0, 0, 0), (1, 1, 1))


def test_box_volume_and_area():
    report = measure(moved(box((1, 2, 3)), (10, -20, 30)))
    assert report.volume == pytest.approx(6) and report.area == pytest.approx(22) and report.solid


def test_hole_is_counted_by_its_edges():
    report = measure(make(box().vertices, box().faces[1:]))
    assert report.boundary_edges == 3 and not report.watertight and report.manifold and not report.solid


def test_turned_face_is_counted_by_its_edges():
    mesh = box()
    mesh.faces[5] = mesh.faces[5][::-1]
    report = measure(mesh)
    assert report.misoriented_edges == 3 and report.watertight and not report.oriented and not report.solid


def test_inside_out_is_closed_but_not_solid():
    report = measure(make(box().vertices, box().faces[:, ::-1]))
    assert report.watertight and report.oriented and report.volume == pytest.approx(-1) and not report.solid


def test_bodies_that_touch_in_a_vertex_are_not_manifold():
    other = moved(tetrahedron(), (1, 0, 0))
    faces = np.concatenate([tetrahedron().faces, np.array([1, 4, 5, 6])[other.faces]])
    report = measure(make(np.concatenate([tetrahedron().vertices, other.vertices[1:]]), faces))
    assert (report.nonmanifold_vertices, report.nonmanifold_edges, report.components) == (1, 0, 1)
    assert report.watertight and not report.manifold


def test_bodies_that_share_an_edge_are_not_manifold():
    vertices = [[0, 0, 0], [0, 0, 1], [1, 0, 0], [0, 1, 0], [-1, 0, 0], [0, -1, 0]]
    one, other = tetrahedron().faces, tetrahedron().faces
    faces = np.concatenate([np.array([0, 2, 3, 1])[one], np.array([0, 4, 5, 1])[other]])
    report = measure(make(vertices, faces))
    assert report.nonmanifold_edges == 1 and not report.manifold and not report.watertight
    edges = edges_of(make(vertices, faces).faces)
    assert edges.pairs[edges.count == 4].tolist() == [[0, 1]]


def test_degenerate_faces_are_counted():
    vertices = [[0, 0, 0], [1, 0, 0], [0, 1, 0], [2, 0, 0]]
    assert measure(make(vertices, [[0, 1, 2], [0, 1, 1], [0, 1, 3]])).degenerate_faces == 2


def test_unused_vertices_do_not_count():
    mesh = box()
    padded = make(np.concatenate([mesh.vertices, [[np.nan] * 3]]), mesh.faces)
    assert measure(padded) == measure(mesh)


def test_empty_mesh_gives_zeros():
    report = measure(make(np.zeros((0, 3)), np.zeros((0, 3))))
    assert report.faces == 0 and report.volume == 0 and not report.watertight and not report.solid


def test_components_follow_shared_vertices():
    labels = face_components(join(box(), torus(n=8, m=6), box()).faces, 8 + 48 + 8)
    np.testing.assert_array_equal(labels, np.repeat([0, 1, 2], [12, 96, 12]))


@pytest.mark.parametrize(
    "mesh",
    [torus(), sphere(), noisy_blob(20), table(24), join(torus(), moved(box(), (3, 0, 0)))],
    ids=["torus", "sphere", "blob", "table", "two"],
)
def test_trimesh_agrees(mesh):
    report = measure(mesh)
    other = trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)
    assert report.watertight == other.is_watertight and report.oriented == other.is_winding_consistent
    assert report.euler_number == other.euler_number and report.components == other.body_count
    assert report.volume == pytest.approx(other.volume, rel=1e-5) and report.area == pytest.approx(other.area, rel=1e-5)


def test_adjacent_faces_run_through_their_edge_both_ways():
    faces = torus(n=8, m=6).faces
    pairs, inner = adjacent_faces(edges_of(faces))
    assert len(pairs) == len(inner) == 3 * len(faces) // 2
    start = faces.reshape(-1)
    end = np.roll(faces, -1, axis=1).reshape(-1)
    np.testing.assert_array_equal(start[pairs[:, 0]], end[pairs[:, 1]])
    np.testing.assert_array_equal(end[pairs[:, 0]], start[pairs[:, 1]])


def test_report_is_ready_for_json():
    import json

    assert json.loads(json.dumps(measure(box()).as_dict()))["solid"] is True


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e12, 1e30])
def test_normals_do_not_depend_on_the_size_of_a_mesh(size):
    """Nor does numpy warn of products that float32 cannot hold."""
    corners = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], np.float32)
    faces = np.array([[0, 2, 1], [0, 1, 3], [1, 2, 3], [0, 3, 2]], np.int32)
    unit, other = Mesh(corners, faces), Mesh(corners * np.float32(size), faces)
    with np.errstate(all="raise", under="ignore"):
        assert np.abs(other.face_normals() - unit.face_normals()).max() < 1e-6
        assert np.abs(other.vertex_normals() - unit.vertex_normals()).max() < 1e-6
