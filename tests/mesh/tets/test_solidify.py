"""From meshes as files hold them to a DMTet: closed, open, overlapping, inconsistent, thin."""

import numpy as np
import pytest
import torch

from stages.errors import UserError
from stages.mesh.measure import measure
from stages.mesh.mesh import Mesh
from stages.mesh.tets.solidify import SolidifySettings, dmtet_from_mesh
from stages.mesh.tets.tetrahedra import Lattice
from stages.mesh.tree import TriangleTree
from tests.mesh.mesh_shapes import box, join, make, moved, sphere, torus

BALL = sphere(0.7, 40, 20)
VOLUME = 4 / 3 * np.pi * 0.7**3


def started(mesh, tets=24, **settings):
    """The first surface as a mesh, and the facts."""
    dmtet, facts = dmtet_from_mesh(mesh, Lattice(tets), SolidifySettings(**settings))
    with torch.no_grad():
        surface = dmtet.surface()
    return Mesh(surface.vertices.numpy(), surface.faces.numpy()), facts


@pytest.mark.slow
def test_a_closed_mesh_keeps_its_place_and_shape():
    for mesh in (torus(), box((1.2, 0.9, 0.6))):
        surface, facts = started(mesh, 32)
        report = measure(surface)
        assert report.solid and report.euler_number == measure(mesh).euler_number
        assert report.volume == pytest.approx(measure(mesh).volume, rel=0.02)
        assert TriangleTree(mesh.vertices[mesh.faces]).distances(surface.vertices).max() < 0.02
        assert facts.pop("lost") < 0.04  # at the box's edges, which a lattice cuts
        assert facts == {"faces": len(mesh.faces), "missed": 0.0}


@pytest.mark.slow
def test_distances_are_stored_not_signs():
    dmtet, _ = dmtet_from_mesh(BALL, Lattice(24))
    radius = np.linalg.norm(dmtet.lattice.positions(dmtet.band.ids), axis=1)
    np.testing.assert_allclose(dmtet.sdf.detach().numpy(), radius - 0.7, atol=0.02)


@pytest.mark.slow
def test_a_hole_is_closed_and_the_rest_stays_where_it_was():
    centre = BALL.vertices[BALL.faces].mean(1)
    for top in (0.45, 0.0):
        surface, facts = started(Mesh(BALL.vertices, BALL.faces[centre[:, 1] < top]))
        report = measure(surface)
        assert report.solid and report.euler_number == 2 and facts["missed"] == 0
        below = surface.vertices[surface.vertices[:, 1] < top - 0.15]
        np.testing.assert_allclose(np.linalg.norm(below, axis=1), 0.7, atol=0.02)
        cap = np.pi * (0.7 - top) ** 2 * (2 * 0.7 + top) / 3
        assert VOLUME - cap < report.volume + 0.02 and report.volume < VOLUME


@pytest.mark.slow
def test_faces_wound_anyhow_and_corners_of_their_own_make_no_difference():
    plain, _ = started(BALL)
    split = make(BALL.vertices[BALL.faces].reshape(-1, 3), np.arange(3 * len(BALL.faces)).reshape(-1, 3))
    mixed = BALL.faces.copy()
    mixed[np.random.default_rng(0).random(len(mixed)) < 0.5] = mixed[np.random.default_rng(0).random(len(mixed)) < 0.5][
        :, ::-1
    ]
    for other in (split, Mesh(BALL.vertices, mixed), Mesh(BALL.vertices, BALL.faces[:, ::-1])):
        surface, _ = started(other)
        assert measure(surface).volume == pytest.approx(measure(plain).volume, rel=1e-4)


@pytest.mark.slow
def test_overlapping_parts_become_one_body_without_walls_inside():
    both = join(moved(BALL, (-0.15, 0, 0), 0.7), moved(BALL, (0.15, 0, 0), 0.7))
    dmtet, facts = dmtet_from_mesh(both, Lattice(32))
    with torch.no_grad():
        surface = dmtet.surface()
    report = measure(Mesh(surface.vertices.numpy(), surface.faces.numpy()))
    assert report.solid and report.components == 1 and report.euler_number == 2 and facts["missed"] == 0
    points = dmtet.lattice.positions(dmtet.band.ids)
    centre = np.abs(points[:, 0]) < 0.08
    inner = centre & (np.linalg.norm(points[:, 1:], axis=1) < 0.25)  # where the two hidden walls are
    assert not inner.any()  # the band has no vertex there: no wall to keep


def test_a_sheet_is_refused_with_ways_out_and_may_be_thickened():
    sheet = make([[-0.5, 0, -0.5], [0.5, 0, -0.5], [0.5, 0, 0.5], [-0.5, 0, 0.5]], [[0, 2, 1], [0, 3, 2]])
    with pytest.raises(UserError, match="cannot be made a body") as error:
        started(sheet)
    assert "fine.geometry=locked" in error.value.fix and "fine.solidify.shell=1" in error.value.fix
    surface, _ = started(sheet, 32, shell=1.0)
    half = 2 / 32
    assert measure(surface).solid
    assert measure(surface).volume == pytest.approx(2 * half * 1 + np.pi * half**2 * 2, rel=0.1)  # slab and round edges
    np.testing.assert_allclose(np.abs(surface.vertices[:, 1]).max(), half, atol=0.01)


@pytest.mark.slow
def test_a_shell_leaves_closed_parts_alone():
    sheet = make([[-0.9, 0.8, -0.1], [0.9, 0.8, -0.1], [0.9, 0.8, 0.1], [-0.9, 0.8, 0.1]], [[0, 2, 1], [0, 3, 2]])
    surface, _ = started(join(moved(BALL, (0, -0.3, 0), 0.7), sheet), 32, shell=1.0)
    low = surface.vertices[surface.vertices[:, 1] < 0.3] + np.float32([0, 0.3, 0])
    np.testing.assert_allclose(np.linalg.norm(low, axis=1), 0.49, atol=0.02)


@pytest.mark.slow
def test_what_is_lost_to_a_coarse_lattice_is_told():
    needle = moved(box((0.02, 1.6, 0.02)), (0.03, 0, 0.03))  # between the lattice's vertices
    with pytest.raises(UserError, match="encloses no point"):
        started(needle, 16)
    surface, facts = started(join(moved(BALL, (0, 0, 0), 0.5), needle), 16)
    assert 0.02 < facts["missed"] < 0.5 and measure(surface).solid


def plate(thickness):
    """A table top, turned so that no lattice plane is parallel to it."""
    points = box((1.0, thickness, 1.0)).vertices.astype(np.float64)
    turn = np.array([[0.8, 0.6, 0], [-0.6, 0.8, 0], [0, 0, 1]]) @ np.array(
        [[1, 0, 0], [0, 0.96, 0.28], [0, -0.28, 0.96]]
    )
    return make(points @ turn, box().faces)


@pytest.mark.slow
@pytest.mark.parametrize("thickness", [0.06, 0.03, 0.015])
def test_a_plate_thinner_than_a_cell_is_refused_with_the_lattice_that_holds_it(thickness):
    with pytest.raises(UserError, match="cannot be made a body") as error:
        started(plate(thickness), 24)
    assert "of the body would be lost" in error.value.why and "fine.geometry=locked" in error.value.fix
    tets = int(error.value.fix.split("fine.tets=")[1].split(",")[0])
    if thickness == 0.06:
        surface, facts = started(plate(thickness), tets)
        report = measure(surface)
        assert report.solid and report.euler_number == 2 and facts["lost"] < 0.1
        assert report.volume == pytest.approx(measure(plate(thickness)).volume, rel=0.06)


def test_a_plate_that_no_lattice_holds_is_to_be_locked():
    with pytest.raises(UserError) as error:
        started(plate(0.003), 64)
    assert error.value.fix == "paint it as it is with fine.geometry=locked"


def test_a_body_dwarfed_by_the_distance_of_a_crumb_is_refused():
    far = join(moved(BALL, (-0.6, 0, 0), 0.08), moved(BALL, (0.6, 0, 0), 0.005))
    with pytest.raises(UserError) as error:
        started(far, 24)
    assert "its largest part is" in error.value.why and "far away out of the file" in error.value.fix


def test_a_thin_beam_is_refused_and_a_thick_one_kept():
    slim, stout = (moved(box((1.6, width, width)), (0, 0.013, 0.021)) for width in (0.04, 0.2))
    with pytest.raises(UserError, match="cannot be made a body"):
        started(slim, 24)
    surface, facts = started(stout, 24)
    assert measure(surface).solid and facts["lost"] < 0.1


@pytest.mark.slow
def test_small_parts_that_are_lost_are_counted(caplog):
    rods = [moved(box((0.02, 0.3, 0.02)), (x, 0.75, 0.03)) for x in (-0.51, 0.01, 0.47)]
    surface, facts = started(join(moved(BALL, (0, -0.2, 0), 0.8), *rods), 24)
    assert measure(surface).solid and facts["lost"] < 0.1
    assert "3 of 4 parts" in caplog.text


@pytest.mark.slow
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_a_part_without_area_changes_nothing_of_what_is_lost():
    line = make([[0.9, 0, 0], [0.9, 0.1, 0], [0.9, 0.05, 0]], [[0, 1, 2]])
    assert started(join(BALL, line), 24)[1]["lost"] == started(BALL, 24)[1]["lost"]
