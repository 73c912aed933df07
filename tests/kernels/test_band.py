"""Bands of the lattice: compiled kernels and twin to the byte; what they mean is in test_mesh_tetrahedra and _dmtet."""

import numpy as np
import pytest
import torch

from stages.kernels import band
from stages.mesh.tets.tetrahedra import Lattice
from tests.mesh.mesh_shapes import all_ids


def parts(resolution: int, seed: int) -> torch.Tensor:
    """Sorted ids of a random part of a lattice, its corners among them."""
    everything = all_ids(Lattice(resolution))
    kept = np.random.default_rng(seed).random(len(everything)) < (0.1, 0.5, 0.9, 1.0)[seed % 4]
    kept[[0, -1]] = True
    return torch.from_numpy(everything[kept])


def alike(op, *arguments) -> None:
    """The op's results by both backends are of equal dtype, shape and bytes, and in memory of their own."""
    results = [op(*arguments, backend=backend) for backend in ("torch", "numba")]
    pairs = [[x] if isinstance(x, torch.Tensor) else x for x in results]
    for twin, compiled in zip(*pairs, strict=True):
        assert twin.dtype == compiled.dtype and torch.equal(twin, compiled) and compiled.is_contiguous()


@pytest.mark.parametrize("resolution, seed", [(4, 0), (4, 3), (7, 1), (9, 2), (10, 3), (13, 0)])
def test_compiled_band_and_twin_are_of_equal_bytes(resolution, seed):
    ids, g = parts(resolution, seed), torch.Generator().manual_seed(seed)
    around, _ = band.neighbours(ids, resolution, backend="torch")
    flags, known = (torch.rand(len(ids), generator=g) < share for share in (0.5, 0.3))
    values = torch.randn(len(ids), generator=g)
    values[::5] = values[0]  # equally near ones: the first counts
    alike(band.neighbours, ids, resolution)
    alike(band.cells, ids, around, resolution)
    alike(band.places, ids, resolution)
    alike(band.apart, flags, around)
    alike(band.extended, values, known, around, resolution)
    alike(band.extended, values, torch.zeros_like(known), around, resolution)
    alike(band.matched, ids, parts(resolution, seed + 1))
    for rings in range(4):
        few = ids[torch.rand(len(ids), generator=g) < 0.02]
        alike(band.dilated, torch.cat([few, ids[[0, -1, -1]]]), resolution, rings)


def test_vertices_apart_are_the_ends_of_edges_between_them():
    ids = parts(8, 2)
    around, _ = band.neighbours(ids, 8)
    edges, _, _ = band.cells(ids, around, 8)
    flags = torch.rand(len(ids), generator=torch.Generator().manual_seed(0)) < 0.3
    crossing = edges[flags[edges[:, 0]] != flags[edges[:, 1]]]
    assert torch.equal(torch.nonzero(band.apart(flags, around))[:, 0], crossing.unique().long())


def test_vertices_that_no_known_one_reaches_are_outside_by_a_cell():
    ids = parts(8, 0)[:1]
    around, _ = band.neighbours(ids, 8)
    assert band.extended(torch.full((1,), -3.0), torch.zeros(1, dtype=torch.bool), around, 8).tolist() == [0.25]


def test_bad_arguments_of_a_band_are_named():
    ids = parts(4, 3)
    around, _ = band.neighbours(ids, 4)
    with pytest.raises(ValueError, match="ids"):
        band.dilated(ids[None], 4, 1)
    with pytest.raises(ValueError, match="around"):
        band.cells(ids, around[:5], 4)
    with pytest.raises(ValueError, match="known"):
        band.extended(torch.zeros(len(ids)), torch.zeros(3, dtype=torch.bool), around, 4)
