"""The lattice of tetrahedra: its counts by hand, its arithmetic against a slow search, bands against the whole."""

import numpy as np
import pytest

from stages.mesh.tets.tetrahedra import SAFE_MOVE, Lattice, build_band, dilate, lookup
from tests.mesh.mesh_shapes import all_ids

PAIRS = [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]]


@pytest.fixture(scope="module")
def whole():
    lattice = Lattice(6)
    return build_band(lattice, all_ids(lattice))


def sphere_band(resolution: int, radius: float, rings: int = 2):
    lattice = Lattice(resolution)
    ids = all_ids(lattice)
    distance = np.linalg.norm(lattice.positions(ids), axis=1) - radius
    return build_band(lattice, dilate(lattice, ids[np.abs(distance) < lattice.cell], rings))


def test_counts_are_those_of_two_interleaved_cubic_lattices(whole):
    r = 6
    assert len(whole) == (r + 1) ** 3 + r**3
    axial = 3 * r * (r + 1) ** 2 + 3 * (r - 1) * r**2
    assert len(whole.edges) == axial + 8 * r**3
    assert len(whole.tets) == 4 * 3 * (r - 1) * r**2  # four around each shared cell face


def test_every_tetrahedron_is_positive_and_has_a_twelfth_of_a_cell(whole):
    p = whole.lattice.positions(whole.ids)[whole.tets].astype(np.float64)
    volume = np.linalg.det(p[:, 1:] - p[:, :1]) / 6
    np.testing.assert_allclose(volume, whole.lattice.cell**3 / 12, rtol=1e-5)


def test_edges_have_the_two_lengths_of_the_lattice_and_tet_edges_name_the_right_ones(whole):
    p = whole.lattice.positions(whole.ids)
    length = np.linalg.norm(p[whole.edges[:, 0]] - p[whole.edges[:, 1]], axis=1) / whole.lattice.cell
    near_one = np.isclose(length, 1, atol=1e-5)
    assert np.isclose(length[~near_one], np.sqrt(3) / 2, atol=1e-5).all() and near_one.any() and not near_one.all()
    assert len(np.unique(np.sort(whole.edges, 1), axis=0)) == len(whole.edges)
    np.testing.assert_array_equal(np.sort(whole.edges[whole.tet_edges], -1), np.sort(whole.tets[:, PAIRS], -1))


def test_tetrahedra_fit_together_each_inner_triangle_between_two_of_them(whole):
    triangles = np.sort(np.concatenate([np.delete(whole.tets, k, 1) for k in range(4)]), 1)
    faces, count = np.unique(triangles, axis=0, return_counts=True)
    assert count.max() == 2
    assert whole.border[faces[count == 1]].all()  # an open triangle touches only vertices that are forced outside


def test_ids_and_coordinates_are_inverse_and_ids_are_sorted_along_the_axes():
    lattice = Lattice(9)
    ids = all_ids(lattice)
    assert (np.diff(ids) > 0).all()
    c = lattice.coordinates(ids)
    np.testing.assert_array_equal(lattice.ids(c), ids)
    assert lattice.contains(c).all()
    p = lattice.positions(ids)
    assert p.min() == -1 and p.max() == 1
    assert not lattice.contains(np.array([[1, 0, 0], [-1, -1, -1], [19, 19, 19], [2, 2, 20]])).any()


def test_ids_in_boxes_are_found_by_looking_at_every_vertex():
    lattice = Lattice(10)
    rng = np.random.default_rng(0)
    low = rng.uniform(-1.2, 0.9, (20, 3))
    high = low + rng.uniform(0, 0.5, (20, 3))
    p = lattice.positions(all_ids(lattice)).astype(np.float64)
    inside = ((p[:, None] >= low) & (p[:, None] < high)).all(2).any(1)
    np.testing.assert_array_equal(lattice.ids_in_boxes(low, high), all_ids(lattice)[inside])


def test_a_band_is_the_part_of_the_whole_lattice_among_its_vertices():
    lattice = Lattice(8)
    everything = all_ids(lattice)
    full = build_band(lattice, everything)
    ids = everything[np.random.default_rng(1).random(len(everything)) < 0.7]
    band = build_band(lattice, ids)

    def named(band_, cells):
        return {tuple(row) for row in np.sort(band_.ids[cells], 1)}

    mask = np.isin(everything, ids)
    assert named(band, band.tets) == named(full, full.tets[mask[full.tets].all(1)])
    assert named(band, band.edges) == named(full, full.edges[mask[full.edges].all(1)])
    missing = np.zeros(len(everything), dtype=bool)  # which vertices have a neighbour that was left out
    for a, b in ((0, 1), (1, 0)):
        missing[full.edges[~mask[full.edges[:, b]], a]] = True
    np.testing.assert_array_equal(band.rim, (missing | full.border)[mask])


def test_dilate_takes_rings_of_neighbours():
    lattice = Lattice(8)
    full = build_band(lattice, all_ids(lattice))
    expected = lattice.ids(np.array([[8, 8, 8]]))
    assert len(dilate(lattice, expected, 1)) == 15
    mask = np.isin(full.ids, expected)
    for rings in range(1, 4):
        touched = mask[full.edges].any(1)
        mask[full.edges[touched].reshape(-1)] = True
        np.testing.assert_array_equal(dilate(lattice, expected, rings), full.ids[mask])


def test_band_size_grows_with_the_surface_not_with_the_cube():
    sizes = [len(sphere_band(r, 0.6)) for r in (16, 32, 64)]
    assert 3.5 < sizes[2] / sizes[1] < 4.6 and 3.0 < sizes[1] / sizes[0] < 5.0, sizes


def test_lookup_of_missing_ids_is_minus_one():
    ids = np.array([3, 5, 9])
    np.testing.assert_array_equal(lookup(ids, np.array([2, 3, 4, 9, 10])), [-1, 0, -1, 2, -1])


def test_no_tetrahedron_turns_over_while_vertices_move_less_than_the_safe_share(whole):
    rng = np.random.default_rng(2)
    p = whole.lattice.positions(whole.ids).astype(np.float64)
    smallest = []
    for share in (0.999 * SAFE_MOVE, 2 * SAFE_MOVE):
        worst = np.inf
        for _ in range(20):
            move = rng.normal(size=p.shape)
            move *= share * whole.lattice.cell / np.linalg.norm(move, axis=1, keepdims=True)
            q = (p + move)[whole.tets]
            worst = min(worst, np.linalg.det(q[:, 1:] - q[:, :1]).min())
        smallest.append(worst)
    assert smallest[0] > 0 > smallest[1]
    t = p[whole.tets[0]]
    axis = np.cross(t[1] - t[0], t[3] - t[2])
    axis /= np.linalg.norm(axis)
    if (t[2] - t[0]) @ axis < 0:
        axis = -axis
    for share, sign in ((0.999 * SAFE_MOVE, 1), (1.001 * SAFE_MOVE, -1)):
        q = t + share * whole.lattice.cell * axis * np.array([[1], [1], [-1], [-1]])
        assert np.sign(np.linalg.det(q[1:] - q[:1])) == sign  # the bound is exact


@pytest.mark.parametrize("resolution", [3, 513])
def test_resolutions_out_of_range_are_refused(resolution):
    with pytest.raises(ValueError, match="resolution"):
        Lattice(resolution)
