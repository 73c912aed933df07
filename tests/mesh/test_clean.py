"""Cleaning keeps what is an object and drops what is not; decimation never breaks a closed manifold."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest
from scipy.spatial import cKDTree

from stages.errors import UserError
from stages.mesh.clean import check_mesh, decimate, drop_floaters, tidy
from stages.mesh.measure import face_areas, measure
from tests.mesh.mesh_shapes import box, join, make, moved, noisy_blob, sphere, table, tetrahedron, torus


def inside_out(mesh):
    return make(mesh.vertices, mesh.faces[:, ::-1])


def surface_points(mesh, count: int = 40_000):
    random = np.random.default_rng(0)
    areas = face_areas(mesh.vertices, mesh.faces)
    face = random.choice(len(areas), count, p=areas / areas.sum())
    w = random.dirichlet((1, 1, 1), count)
    return np.einsum("nc,nck->nk", w, mesh.vertices[mesh.faces[face]].astype(np.float64))


def distance(a, b) -> float:
    """Largest distance from points of either surface to the other, up to the sampling (about 0.01 here)."""
    p, q = surface_points(a), surface_points(b)
    return max(cKDTree(p).query(q)[0].max(), cKDTree(q).query(p)[0].max())


def test_soup_is_welded_into_a_body():
    mesh = torus()
    soup = make(mesh.vertices[mesh.faces.reshape(-1)], np.arange(3 * len(mesh.faces)).reshape(-1, 3))
    assert measure(soup).boundary_edges == 3 * len(mesh.faces)
    report = measure(tidy(soup))
    assert report.solid and report.vertices == len(mesh.vertices) and report.faces == len(mesh.faces)


def test_welding_does_not_glue_closed_bodies_together():
    touching = join(box(), moved(box(), (1, 1, 0)))  # share an edge in space
    assert measure(tidy(touching)).solid


def test_degenerate_and_repeated_faces_go_and_the_body_stays_closed():
    mesh = box()
    extra = np.concatenate([mesh.faces, [[0, 0, 1], [2, 2, 2]], mesh.faces[:1]])
    result = tidy(make(mesh.vertices, extra))
    assert measure(result).solid and len(result.faces) == 12


def test_body_that_faces_inwards_is_turned():
    assert measure(tidy(inside_out(torus()))).solid


def test_colours_follow_their_vertices():
    mesh = join(box(), moved(box((0.1, 0.1, 0.1)), (3, 0, 0)))
    mesh = replace(mesh, colours=np.linspace(0, 1, 48, dtype=np.float32).reshape(16, 3))
    result = drop_floaters(tidy(mesh))
    np.testing.assert_array_equal(result.colours, mesh.colours[:8])


@pytest.mark.parametrize(
    ("mesh", "word"),
    [
        (make(np.zeros((0, 3)), np.zeros((0, 3))), "empty"),
        (make([[0, 0, 0], [1, 0, 0], [2, 0, 0]], [[0, 1, 2]]), "empty"),
        (make(box().vertices, [[0, 1, 8]]), "damaged"),
        (make(box().vertices, [[0, 1, -1]]), "damaged"),
        (make(np.where(np.arange(8)[:, None] == 3, np.nan, box().vertices), box().faces), "damaged"),
        (replace(box(), colours=np.full((8, 3), np.inf, np.float32)), "damaged"),
        (replace(box(), colours=np.zeros((7, 3), np.float32)), "damaged"),
        (make(np.zeros((4, 2)), [[0, 1, 2]]), "cannot be used"),
    ],
)
def test_broken_meshes_are_refused_with_advice(mesh, word):
    with pytest.raises(UserError, match=word) as error:
        tidy(mesh)
    assert error.value.why and error.value.fix


def test_nan_in_an_unused_vertex_is_no_harm():
    mesh = make(np.concatenate([box().vertices, [[np.nan] * 3]]), box().faces)
    check_mesh(mesh)
    assert len(tidy(mesh).vertices) == 8


def test_floaters_are_dropped_and_large_parts_kept():
    crumbs = [moved(tetrahedron(), (0.9, 0.1 * k, 0.9), 0.03) for k in range(5)]
    result = drop_floaters(join(crumbs[0], torus(), *crumbs[1:], moved(box((0.4, 0.4, 0.4)), (0, 0.6, 0))))
    report = measure(result)
    assert report.components == 2 and report.faces == len(torus().faces) + 12 and report.solid


def test_bubbles_and_hidden_parts_are_dropped():
    shell = join(sphere(0.8), inside_out(sphere(0.7)), sphere(0.5))  # a ball loose in a cavity
    result = drop_floaters(shell)
    assert len(result.faces) == len(sphere().faces)
    assert measure(result).volume == pytest.approx(4.18879 * 0.512, rel=0.03)


def test_part_inside_the_hole_of_a_torus_is_kept():
    assert measure(drop_floaters(join(torus(), moved(sphere(), (0, 0, 0), 0.4)))).components == 2


def test_largest_part_stays_even_if_everything_faces_inwards():
    assert len(drop_floaters(join(inside_out(sphere()), inside_out(box((0.1, 0.1, 0.1))))).faces) == len(sphere().faces)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "budget", "volume", "close"),
    [
        (torus(), 1000, 0.01, 0.03),
        (torus(), 200, 0.06, 0.06),
        (sphere(), 500, 0.01, 0.03),
        (noisy_blob(32), 5000, 0.002, 0.03),
        (noisy_blob(32), 600, 0.01, 0.05),
        (table(48), 9000, 0.001, 0.02),
        (table(48), 1200, 0.002, 0.02),
        (join(torus(), moved(box((0.4, 0.4, 0.4)), (0, 0.6, 0))), 800, 0.01, 0.03),
    ],
    ids=["torus", "torus_few", "sphere", "blob", "blob_few", "table", "table_few", "two_parts"],
)
def test_decimation_keeps_bodies_bodies(mesh, budget, volume, close):
    before, result = measure(mesh), decimate(mesh, budget)
    after = measure(result)
    assert budget - 2 <= after.faces <= budget
    assert before.solid and after.solid
    assert (after.euler_number, after.components) == (before.euler_number, before.components)
    assert after.volume == pytest.approx(before.volume, rel=volume)
    assert distance(mesh, result) < close


def test_decimated_faces_are_not_turned_over():
    result = decimate(sphere(n=96, m=48), 700)
    centres = result.vertices[result.faces].mean(1)
    outwards = np.einsum("ij,ij->i", result.face_normals(), centres / np.linalg.norm(centres, axis=1, keepdims=True))
    assert outwards.min() > 0.9


def test_flat_faces_cost_nothing():
    """A finely meshed box comes down to its corners: quadrics of flat regions must not be singular."""
    n = 12
    grid = np.stack(np.meshgrid(np.arange(n + 1), np.arange(n + 1), indexing="ij"), -1).reshape(-1, 2) / n
    i, j = (g.reshape(-1) for g in np.meshgrid(np.arange(n), np.arange(n), indexing="ij"))
    a, b, c, d = i * (n + 1) + j, (i + 1) * (n + 1) + j, (i + 1) * (n + 1) + j + 1, i * (n + 1) + j + 1
    quad = np.concatenate([np.stack([a, b, c], -1), np.stack([a, c, d], -1)])
    sides = []
    for axis in range(3):
        for end in (0, 1):
            points = np.insert(grid, axis, end, axis=1)
            sides.append(make(points, quad if end == (axis != 1) else quad[:, ::-1]))
    mesh = tidy(join(*sides))
    assert measure(mesh).solid and measure(mesh).volume == pytest.approx(1)
    report = measure(decimate(mesh, 60))
    assert report.solid and report.volume == pytest.approx(1, abs=5e-3) and report.faces <= 60


def test_open_border_keeps_its_outline():
    mesh = sphere(n=64, m=32)
    half = tidy(make(mesh.vertices, mesh.faces[mesh.vertices[mesh.faces][..., 1].min(1) > -1e-6]))
    assert measure(half).boundary_edges == 64
    result = decimate(half, 300)
    report = measure(result)
    assert report.manifold and report.oriented and report.faces <= 300 and report.euler_number == 1
    assert report.bounds[0][1] == pytest.approx(0, abs=0.01)
    assert report.bounds[1][0] == pytest.approx(0.7, abs=0.02)


def test_colours_survive_decimation():
    mesh = sphere(n=96, m=48)
    mesh = replace(mesh, colours=(mesh.vertices * 0.5 + 0.5).astype(np.float32))
    result = decimate(mesh, 1500)
    np.testing.assert_allclose(result.colours, result.vertices * 0.5 + 0.5, atol=0.02)


def test_budget_out_of_reach_is_said_and_nothing_breaks(caplog):
    with caplog.at_level(logging.WARNING):
        result = decimate(torus(), 4)
    assert measure(result).solid and measure(result).euler_number == 0
    assert len(result.faces) > 4 and "cannot be reached" in caplog.text


def test_mesh_under_the_budget_is_left_alone():
    mesh = torus()
    result = decimate(mesh, len(mesh.faces))
    np.testing.assert_array_equal(result.vertices[result.faces], mesh.vertices[mesh.faces])


def test_decimation_is_deterministic_and_leaves_its_input_alone():
    mesh = noisy_blob(20)
    vertices, faces = mesh.vertices.copy(), mesh.faces.copy()
    one, other = decimate(mesh, 1500), decimate(mesh, 1500)
    np.testing.assert_array_equal(one.vertices, other.vertices)
    np.testing.assert_array_equal(one.faces, other.faces)
    np.testing.assert_array_equal(mesh.vertices, vertices)
    np.testing.assert_array_equal(mesh.faces, faces)


def test_surface_with_crowded_edges_is_decimated_without_new_ones():
    fins = join(torus(n=32, m=16), moved(torus(n=32, m=16), (0, 0, 0)))
    fins.faces[len(fins.faces) // 2 :] -= 32 * 16  # twice the same faces: four at every edge
    result = decimate(fins, 100)
    assert len(result.faces) == len(fins.faces)  # nothing allowed, nothing broken
