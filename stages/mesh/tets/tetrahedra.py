"""A body-centred cubic lattice of tetrahedra over [-1, 1]^3, of which only a band around a surface ever exists.

The lattice has `resolution` cubic cells a side. Its vertices are the cell corners and the cell centres; its tetrahedra
join two centres across a shared cell face with one edge of that face (12 per cell, all congruent up to reflection: two
edges of length `cell`, four of sqrt(3)/2 `cell`). Each vertex has 14 neighbours.

Doubled coordinates (X, Y, Z) are integers in [0, 2 resolution], all even at a corner and all odd at a centre. A vertex
id is the linear index of its doubled coordinates in a padded cube, so that a neighbour is a constant offset away
and everything below is index arithmetic on sorted ids. Nothing here is as large as the cube.

A band is closed under marching if its rim (vertices with a neighbour outside the band) keeps its signs: see `Band`.
Letters: N vertices, E edges, T tetrahedra of the band.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from stages.kernels import band
from stages.kernels.reference.band import side_of

MAX_RESOLUTION = 512  # ids stay below 2^31 and coordinates far inside float32

# Largest share of `cell` by which every vertex may move with no tetrahedron turning over: half the width of the
# tetrahedron (its two long edges lie on parallel planes half a cell apart).
SAFE_MOVE = 0.25

# Mean over the 14 neighbours of the squared distance along an axis is 4 / 14 cell^2, so the graph Laplacian over 14 is
# minus half of that times the Laplacian: strength s of stages.kernels.lattice.diffuse smooths over sqrt(s / 7) cells.
STRENGTH_PER_CELL = 7.0


@dataclass(frozen=True)
class Lattice:
    """The lattice itself: a resolution, and arithmetic."""

    resolution: int

    def __post_init__(self) -> None:
        if not 4 <= self.resolution <= MAX_RESOLUTION:
            raise ValueError(f"resolution: wanted 4 .. {MAX_RESOLUTION}, got {self.resolution}")

    @property
    def cell(self) -> float:
        """Side of a cell in world units."""
        return 2 / self.resolution

    @property
    def side(self) -> int:
        """Padded doubled coordinates per axis: stepping two out of the lattice never meets a valid id."""
        return side_of(self.resolution)

    def ids(self, coordinates: np.ndarray) -> np.ndarray:
        """Return ids [N] int64 of doubled coordinates [N, 3]; the caller keeps them inside the lattice."""
        x, y, z = (coordinates[..., k].astype(np.int64) for k in range(3))
        return (x * self.side + y) * self.side + z

    def coordinates(self, ids: np.ndarray) -> np.ndarray:
        """Return doubled coordinates [N, 3] int64 of ids [N]."""
        rest, z = np.divmod(ids, self.side)
        x, y = np.divmod(rest, self.side)
        return np.stack([x, y, z], -1)

    def contains(self, coordinates: np.ndarray) -> np.ndarray:
        """Return which doubled coordinates [N, 3] are lattice vertices, [N] bool."""
        inside = ((coordinates >= 0) & (coordinates <= 2 * self.resolution)).all(-1)
        parity = coordinates & 1
        return inside & (parity[..., 0] == parity[..., 1]) & (parity[..., 1] == parity[..., 2])

    def border(self, ids: np.ndarray) -> np.ndarray:
        """Return vertices [N] bool with fewer than 14 neighbours in the lattice: they must stay outside the surface."""
        coordinates = self.coordinates(ids)
        return ((coordinates < 2) | (coordinates > 2 * self.resolution - 2)).any(-1)

    def positions(self, ids: np.ndarray) -> np.ndarray:
        """Return world positions [N, 3] float32 of ids [N]."""
        return (self.coordinates(ids) / self.resolution - 1.0).astype(np.float32)

    def ids_in_boxes(self, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """Return sorted ids of the vertices in a union of half-open world boxes.

        Args:
            low, high: [M, 3] corners; a vertex p belongs to a box where low <= p < high in every axis.
        """
        first = np.clip(np.ceil((low + 1) * self.resolution - 1e-9), 0, 2 * self.resolution + 1).astype(np.int64)
        last = np.clip(np.ceil((high + 1) * self.resolution - 1e-9), 0, 2 * self.resolution + 1).astype(np.int64)
        size = np.maximum(last - first, 0)  # [M, 3]
        count = size.prod(1)
        box = np.repeat(np.arange(len(count)), count)
        k = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        sy, sz = size[box, 1], size[box, 2]
        offset = np.stack([k // (sy * sz), k // sz % sy, k % sz], -1)
        coordinates = first[box] + offset
        return np.unique(self.ids(coordinates[self.contains(coordinates)]))


@dataclass(frozen=True)
class Band:
    """The part of a lattice that exists: vertices near a surface, and every edge and tetrahedron among them.

    ids [N] int64 sorted. edges [E, 2] int32, tets [T, 4] int32 (positively oriented), tet_edges [T, 6] int32 in the
    order 01 02 03 12 13 23: indices into ids and edges. neighbours [N, 14] int32: indices into ids, -1 if missing.
    border [N] bool: on the lattice's border. rim [N] bool: some neighbour is missing (the border included).

    The surface among these tetrahedra is closed as long as no edge between two rim vertices changes sign: any other
    edge has an end with all its neighbours present, hence all tetrahedra around the edge. So the rim's signs are
    frozen, and where the surface comes to touch the rim the band is rebuilt around it (stages/mesh/tets/dmtet.py).
    """

    lattice: Lattice
    ids: np.ndarray
    edges: np.ndarray
    tets: np.ndarray
    tet_edges: np.ndarray
    neighbours: np.ndarray
    border: np.ndarray
    rim: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)


def lookup(ids: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Return the index into sorted `ids` of each of `queries`, or -1; fastest where those are sorted."""
    index = np.searchsorted(ids, queries)
    index[index == len(ids)] = 0
    return np.where(ids[index] == queries, index, -1)


def dilate(lattice: Lattice, ids: np.ndarray, rings: int) -> np.ndarray:
    """Return sorted ids within `rings` lattice edges of any of `ids`, cut at the lattice."""
    return band.dilated(torch.from_numpy(ids), lattice.resolution, rings).numpy()


def build_band(lattice: Lattice, ids: np.ndarray) -> Band:
    """Return edges and tetrahedra among the given vertices, from neighbour offsets alone.

    Args:
        ids: [N] sorted, unique.
    """
    tensor = torch.from_numpy(ids)
    around, rim = band.neighbours(tensor, lattice.resolution)
    cells = (cell.numpy() for cell in band.cells(tensor, around, lattice.resolution))
    return Band(lattice, ids, *cells, around.numpy(), lattice.border(ids), rim.numpy())
