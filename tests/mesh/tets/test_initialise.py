"""From density to the first surface: the level found, floaters and cavities, distances, and refusals."""

import numpy as np
import pytest
import torch

from stages.errors import UserError
from stages.mesh.measure import measure
from stages.mesh.mesh import Mesh
from stages.mesh.tets.initialise import (
    InitialiseSettings,
    distance_to_surface,
    dmtet_from_density,
    find_level,
    sample_density,
)
from stages.mesh.tets.seal import sealed
from stages.mesh.tets.tetrahedra import Lattice
from tests.mesh.mesh_shapes import sphere as sphere_mesh

SMALL = InitialiseSettings(samples=40, candidates=16)


def ball(p, radius=0.5, centre=(0.0, 0.0, 0.0)):
    return (p - torch.tensor(centre)).norm(dim=1) - radius


def ring(p):
    return torch.stack([p[:, [0, 2]].norm(dim=1) - 0.55, p[:, 1]], -1).norm(dim=1) - 0.2


def soft(sdf, sharpness=150.0):
    """A density as a radiance field has it: soft at the surface, large inside."""
    return lambda p: torch.nn.functional.softplus(-sharpness * sdf(p))


def solid(dmtet):
    surface = dmtet.surface()
    report = measure(Mesh(surface.vertices.detach().numpy(), surface.faces.numpy()))
    assert report.solid
    return report


@pytest.mark.parametrize("resolution", [16, 40])
def test_a_soft_torus_becomes_one_torus_of_its_volume(resolution):
    dmtet, level = dmtet_from_density(soft(ring), Lattice(resolution), SMALL)
    actual = solid(dmtet)
    assert actual.components == 1 and actual.euler_number == 0 and level.parts == 1
    exact = 2 * np.pi**2 * 0.55 * 0.2**2
    assert 0.75 * exact < actual.volume < 1.05 * exact


def test_the_level_finds_the_surface_whatever_the_scale_of_the_density():
    """The same ball with densities a hundred times apart, all opaque: the same surface to a voxel."""
    volumes = []
    for peak in (60.0, 6000.0):
        grid = sample_density(lambda p, peak=peak: peak * torch.sigmoid(-400 * ball(p)), 40)
        volumes.append(find_level(grid, SMALL).share * 8)
    for volume in volumes:
        assert abs((volume / (4 / 3 * np.pi)) ** (1 / 3) - 0.5) < 0.06


def test_faint_fog_everywhere_does_not_become_the_object():
    def foggy(p):
        return 0.2 + soft(ball)(p)

    dmtet, level = dmtet_from_density(foggy, Lattice(20), SMALL)
    actual = solid(dmtet)
    assert not level.cut and actual.components == 1 and 0.4 < actual.volume < 0.55
    grid = sample_density(foggy, 40)
    assert (grid > 0.1).all()  # the lowest levels fill the box, so the search did have to climb


def test_where_the_bare_mean_fails_the_search_does_not():
    """A dense core in a thin but opaque body: the mean density cuts out the core alone."""

    def field(p):
        return 20.0 * (ball(p, 0.6) < 0) + 5000.0 * (ball(p, 0.25) < 0)

    grid = sample_density(field, 40)
    mean = float(grid[grid > 1e-5].mean())
    assert mean > 20
    assert 0.9 < find_level(grid, SMALL).share * 8 / (4 / 3 * np.pi * 0.6**3) < 1.1


def test_floaters_are_dropped_and_parts_of_size_are_kept():
    def with_parts(radius):
        def sdf(p):
            return torch.minimum(ball(p, 0.4, (-0.3, 0.0, 0.0)), ball(p, radius, (0.6, 0.3, 0.2)))

        return dmtet_from_density(soft(sdf), Lattice(24), SMALL)

    dmtet, level = with_parts(0.1)
    assert solid(dmtet).components == 1 and level.dropped == 1
    dmtet, level = with_parts(0.25)
    assert solid(dmtet).components == 2 and level.parts == 2 and level.dropped == 0


@pytest.mark.slow
def test_a_floater_that_only_the_lattice_sees_is_dropped_too():
    """A speck between the points of the search grid, close to the body, is a component of the lattice alone."""
    points = (np.arange(40) + 0.5) / 20 - 1

    def sdf(p):
        speck = ball(p, 0.02, (float(points[28] + 0.025), 0.0, 0.0))
        return torch.minimum(ball(p, 0.35), speck)

    grid = sample_density(soft(sdf, 2000.0), 40)
    assert find_level(grid, SMALL).dropped == 0
    assert solid(dmtet_from_density(soft(sdf, 2000.0), Lattice(64), SMALL)[0]).components == 1


@pytest.mark.parametrize("resolution", [16, 40])
def test_cavities_are_filled(resolution):
    def shell(p):
        return torch.maximum(ball(p, 0.6), -ball(p, 0.45))

    actual = solid(dmtet_from_density(soft(shell, 400.0), Lattice(resolution), SMALL)[0])
    assert actual.components == 1 and actual.euler_number == 2
    assert abs(actual.volume / (4 / 3 * np.pi * 0.6**3) - 1) < 0.12


def test_hidden_insides_are_filled_and_what_one_can_see_or_enter_stays_open():
    at = np.indices((40, 40, 40)) - 19.5
    radius = np.linalg.norm(at, axis=0)
    shell = (radius < 16) & (radius > 12)
    pinhole = shell & ~((abs(at[0]) < 1) & (abs(at[1]) < 1) & (at[2] > 0))  # two points wide
    filled = sealed(pinhole)
    assert filled[radius <= 12].mean() > 0.95 and not filled[radius >= 16].any()  # but for lines of sight
    assert (filled[pinhole]).all()

    bowl = shell & (at[1] < 0)
    assert (sealed(bowl) == bowl).all()
    door = shell & ~((abs(at[0]) < 2) & (abs(at[1]) < 2) & (at[2] > 0))  # four wide, round a corner all is reached
    assert (sealed(door) == door).all()
    slot = (abs(at).max(0) < 10) & ~((abs(at[0]) < 1) & (at[1] > -5))  # two wide, seen from above
    assert (sealed(slot) == slot).all()
    for axis in range(3):
        assert (sealed(np.moveaxis(pinhole, 2, axis)) == np.moveaxis(filled, 2, axis)).all()


def test_values_are_signed_distances_not_clamped_densities():
    density = soft(ball, 1e4)  # a wall: a clamped density would put every crossing at the middle of its edge
    dmtet, level = dmtet_from_density(density, Lattice(32), SMALL)
    sdf = dmtet.sdf.detach()
    p = torch.from_numpy(dmtet.lattice.positions(dmtet.band.ids))
    assert (sdf - ball(p)).abs().max() < 0.08 * dmtet.lattice.cell
    radius = dmtet.surface().vertices.detach().norm(dim=1)
    assert radius.std() < 0.004 and abs(radius.mean() - 0.5) < 0.006
    assert sdf.abs().max() > 1.5 * dmtet.lattice.cell


def test_an_object_that_leaves_the_box_is_cut_and_closed():
    dmtet, level = dmtet_from_density(soft(lambda p: ball(p, 0.7, (0.6, 0.0, 0.0))), Lattice(20), SMALL)
    actual = solid(dmtet)
    assert level.cut and actual.components == 1 and actual.bounds[1][0] > 0.9


def test_a_given_level_is_taken():
    _, level = dmtet_from_density(soft(ball), Lattice(16), InitialiseSettings(samples=40, level=20.0))
    assert level.level == 20.0


@pytest.mark.parametrize(
    ("density", "why"),
    [
        (lambda p: torch.zeros(len(p)), "no ray through the density"),
        (lambda p: 0.05 * (ball(p) < 0).float(), "no ray through the density"),
        (lambda p: torch.full((len(p),), 50.0), "fills the box"),
        (lambda p: 5000.0 * (ball(p, 0.06) < 0).float(), "is a speck"),
        (lambda p: 1000.0 * (torch.sin(12 * p).prod(1) > 0.4).float(), "is in pieces"),
        (lambda p: torch.where(p[:, 0] > 0, torch.nan, 1.0), "50.0 % of its values are not numbers"),
    ],
)
def test_what_is_no_object_is_refused_with_the_reason(density, why):
    with pytest.raises(UserError, match=why) as raised:
        dmtet_from_density(density, Lattice(16), SMALL)
    assert raised.value.fix


def test_the_same_density_gives_the_same_bytes():
    first, second = (dmtet_from_density(soft(ring), Lattice(20), SMALL)[0] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))


def test_distance_to_surface_is_that_of_all_triangles():
    mesh = sphere_mesh(0.5, 16, 12)
    points = np.random.default_rng(0).uniform(-0.7, 0.7, (60, 3)).astype(np.float32)
    points = points[np.abs(np.linalg.norm(points, axis=1) - 0.5) < 0.12]
    assert len(points) > 10
    actual = distance_to_surface(points, mesh.vertices, mesh.faces)
    corners = mesh.vertices[mesh.faces].astype(np.float64)
    g = np.linspace(0, 1, 60)
    u, v = (x.reshape(-1) for x in np.meshgrid(g, g))
    u, v = u[u + v <= 1], v[u + v <= 1]
    samples = np.einsum("kp,fkc->fpc", np.stack([1 - u - v, u, v]), corners).reshape(-1, 3)
    slow = np.array([np.linalg.norm(samples - p, axis=1).min() for p in points])
    np.testing.assert_allclose(actual, slow, atol=2e-3)
    assert (actual <= slow + 1e-6).all()  # dense samples can only be further away


def test_a_vertex_of_no_face_is_no_surface():
    """Crossings at the end of a band may have none; where fog filled the box, they were infinitely far away."""
    mesh = sphere_mesh(0.5, 16, 12)
    points = np.random.default_rng(0).uniform(-1, 1, (200, 3)).astype(np.float32)
    stray = np.concatenate([points[:50] + 1e-3, mesh.vertices]).astype(np.float32)
    expected = distance_to_surface(points, mesh.vertices, mesh.faces)
    np.testing.assert_array_equal(distance_to_surface(points, stray, mesh.faces + 50), expected)


def test_settings_are_checked():
    with pytest.raises(ValueError, match="low < high"):
        InitialiseSettings(volume=(0.5, 0.1))
    with pytest.raises(ValueError):
        InitialiseSettings(surprise=1)
