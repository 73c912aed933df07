"""Diffusion on a band: a dense solve, positive definite, twin against compiled kernels, its length in world units."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch

from stages.kernels.lattice import diffuse
from stages.mesh.tets.tetrahedra import STRENGTH_PER_CELL, Lattice, build_band, dilate
from tests.mesh.mesh_shapes import all_ids

BACKENDS = ("torch", "numba", *(["warp"] if find_spec("warp") else []))


@pytest.fixture(scope="module")
def band():
    lattice = Lattice(8)
    ids = all_ids(lattice)
    distance = np.linalg.norm(lattice.positions(ids), axis=1) - 0.5
    return build_band(lattice, dilate(lattice, ids[np.abs(distance) < 0.2], 1))


def matrix(band, strength: float) -> torch.Tensor:
    a = torch.zeros(len(band), len(band), dtype=torch.float64)
    e = torch.from_numpy(band.edges).long()
    a[e[:, 0], e[:, 1]] = a[e[:, 1], e[:, 0]] = 1
    return torch.eye(len(band), dtype=torch.float64) + strength / 14 * (torch.diag(a.sum(1)) - a)


def values(band, seed: int = 0) -> torch.Tensor:
    return torch.randn(len(band), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("strength", [0.5, 12.0, 150.0])
def test_diffusion_solves_its_system(band, strength):
    v, neighbours = values(band), torch.from_numpy(band.neighbours)
    exact = torch.linalg.solve(matrix(band, strength), v.double())
    close = diffuse(v.double(), neighbours, strength, tolerance=1e-9, backend="torch")
    torch.testing.assert_close(close, exact, rtol=1e-6, atol=1e-7)
    for backend in BACKENDS:
        rough = diffuse(v, neighbours, strength, tolerance=0.1, backend=backend)
        assert (rough - exact).norm() < 0.1 * exact.norm()


@pytest.mark.slow
@pytest.mark.parametrize("strength", [0.5, 12.0, 150.0])
def test_the_cut_iteration_is_symmetric_and_positive_definite(band, strength):
    unit = torch.eye(len(band), dtype=torch.float64)
    neighbours = torch.from_numpy(band.neighbours)
    operator = torch.stack([diffuse(row, neighbours, strength, tolerance=0.1, backend="torch") for row in unit])
    torch.testing.assert_close(operator, operator.T, rtol=1e-9, atol=1e-12)
    assert torch.linalg.eigvalsh(operator).min() > 0


@pytest.mark.parametrize("strength", [0.5, 12.0, 150.0])
def test_compiled_kernels_and_twin_agree(band, strength):
    v, neighbours = values(band, 1), torch.from_numpy(band.neighbours)
    want = diffuse(v, neighbours, strength, backend="torch")
    for backend in BACKENDS[1:]:
        got = diffuse(v, neighbours, strength, backend=backend)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
        assert torch.equal(got, diffuse(v, neighbours, strength, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_constant_stays_and_strength_zero_changes_nothing(band, backend):
    neighbours = torch.from_numpy(band.neighbours)
    constant = diffuse(torch.ones(len(band)), neighbours, 20.0, tolerance=1e-4, backend=backend)
    torch.testing.assert_close(constant, torch.ones(len(band)), rtol=1e-3, atol=1e-3)
    v = values(band)
    assert torch.equal(diffuse(v, neighbours, 0.0, backend=backend), v)


def test_the_strength_of_a_length_gives_that_length():
    """In the bulk (1 - l^2 Laplacian) x = delta has the second moment 6 l^2 whatever the lattice."""
    for resolution in (20, 28):
        lattice = Lattice(resolution)
        full = build_band(lattice, all_ids(lattice))
        p = torch.from_numpy(lattice.positions(full.ids)).double()
        length = 0.12
        delta = torch.zeros(len(full), dtype=torch.float64)
        delta[p.norm(dim=1).argmin()] = 1
        strength = STRENGTH_PER_CELL * (length / lattice.cell) ** 2
        x = diffuse(delta, torch.from_numpy(full.neighbours), strength, tolerance=1e-7, backend="torch")
        assert float(x.sum()) == pytest.approx(1, rel=1e-4)
        assert float((x * p.square().sum(1)).sum()) == pytest.approx(6 * length**2, rel=0.05)


def test_bad_arguments_are_named():
    neighbours = torch.zeros(4, 14, dtype=torch.int32)
    with pytest.raises(ValueError, match="neighbours"):
        diffuse(torch.zeros(5), neighbours, 1.0)
    with pytest.raises(ValueError, match=r"neighbours: wanted indices in \[-1, 4\), got 4 to 4"):
        diffuse(torch.zeros(4), neighbours + 4, 1.0)
    with pytest.raises(ValueError, match="strength"):
        diffuse(torch.zeros(4), neighbours, -1.0)
