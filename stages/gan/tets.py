"""The fixed lattice on which the generator's signed distances live, for a batch of shapes at once (DMTet).

All lattice vertices in a ball around the origin. Its outermost, the rim, are outside of every shape, so that every
surface is closed; see stages/mesh/tets/tetrahedra.py. Letters: B shapes, N lattice vertices, E edges, T tetrahedra.
Signed distances are negative inside, in units of the generator's own: only their zeros and ratios matter.
Source: GET3D (arXiv 2209.11163) sec. 3.1.1 and its appendix; DMTet (Shen et al. 2021).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stages.kernels.marching import marching_tetrahedra
from stages.mesh.tets.tetrahedra import Lattice, build_band

BOX = 0.9  # radius of the ball, world units; objects reach 0.85
DEFORMATION = 0.24  # largest movement of a lattice vertex, cells
GUARD = 1e-3  # smallest distance from zero that a vertex counts for, see marching_tetrahedra
FLOOR = 0.05  # smallest value of the rim


@dataclass(frozen=True)
class Surfaces:
    """The surfaces of a batch as one mesh: vertices [V, 3], faces [F, 3] int32, and whose each vertex is, [V].

    ends [V, 2]: the flat indices into [B N] of the lattice edge that each vertex lies on.
    """

    vertices: Tensor
    faces: Tensor
    owner: Tensor
    ends: Tensor


class TetGrid:
    """The lattice, on a device.

    Args:
        cells: of the lattice along a side of the box.

    coordinates [N, 3] in half cells, places [N, 3] world; rim, centre [N] bool.
    """

    def __init__(self, cells: int, device: torch.device | str = "cpu") -> None:
        lattice = Lattice(cells)
        box = lattice.ids_in_boxes(-np.ones((1, 3)), np.full((1, 3), 1.001))
        band = build_band(lattice, box[np.linalg.norm(lattice.positions(box), axis=1) <= 1])
        places = torch.from_numpy(BOX * lattice.positions(band.ids)).float()
        self.cells, self.cell, self.device = cells, BOX * lattice.cell, torch.device(device)
        self.coordinates = torch.from_numpy(lattice.coordinates(band.ids)).to(device)
        self.places = places.to(device)
        self.rim = torch.from_numpy(band.rim).to(device)
        self.centre = self.places.norm(dim=1) < 1.5 * self.cell
        self._one = [
            torch.from_numpy(part.astype(np.int32)).to(device) for part in (band.edges, band.tets, band.tet_edges)
        ]
        self._many: dict[int, list[Tensor]] = {}

    def __len__(self) -> int:
        return len(self.places)

    def closed(self, sdf: Tensor) -> Tensor:
        """Return signed distances [B, N] with the rim outside."""
        return torch.where(self.rim, sdf.clamp_min(FLOOR), sdf)

    def moved(self, offset: Tensor) -> Tensor:
        """Return the lattice vertices [B, N, 3] moved by DEFORMATION cells * offset / sqrt(1 + |offset|^2)."""
        scale = DEFORMATION * self.cell * torch.rsqrt(1 + offset.square().sum(-1, keepdim=True))
        return self.places + offset * scale

    def surfaces(self, sdf: Tensor, offset: Tensor) -> Surfaces:
        """Return the zero level sets.

        Args:
            sdf: [B, N], each with both signs; offset: [B, N, 3].
        """
        edges, tets, tet_edges = self._repeated(len(sdf))
        flat = sdf.reshape(-1)
        places = self.moved(offset).reshape(-1, 3)
        vertices, faces, crossing = marching_tetrahedra(places, flat, edges, tets, tet_edges, guard=GUARD)
        ends = edges.index_select(0, crossing)
        return Surfaces(vertices, faces, torch.div(ends[:, 0], len(self), rounding_mode="floor").long(), ends.long())

    def _repeated(self, batch: int) -> list[Tensor]:
        """The indices of so many lattices beside each other."""
        if batch not in self._many:
            steps = len(self), len(self), len(self._one[0])
            shift = torch.arange(batch, dtype=torch.int32, device=self.device)[:, None, None]
            parts = zip(self._one, steps, strict=True)
            self._many[batch] = [(part + shift * step).reshape(-1, part.shape[1]) for part, step in parts]
        return self._many[batch]


def rescued(sdf: Tensor, grid: TetGrid) -> tuple[Tensor, Tensor]:
    """Return signed distances that all have a surface, and the loss that brings the lost ones back.

    A shape without a sign change gets its centre pushed inside and its rim outside; that surface has no gradient, but
    the mean |s| of the shape has, which pushes it through zero again. Here with the signs of GET3D turned round:
        s_centre += -1 - max s,  s_rim += 1 - min s.
    Args:
        sdf: [B, N].
    Returns: [B, N]; a scalar, 0 where every shape has a surface.
    Source: GET3D's public code, training/geometry_predictor.
    """
    inside = sdf < 0
    lost = inside.all(1) | ~inside.any(1)  # [B]
    if not bool(lost.any()):
        return sdf, sdf.new_zeros(())
    values = sdf.detach()
    most, least = values.amax(1, keepdim=True), values.amin(1, keepdim=True)
    made = values + grid.centre * (-1 - most) + grid.rim * (1 - least)
    return torch.where(lost[:, None], made, sdf), sdf[lost].abs().mean()


def edge_loss(sdf: Tensor, ends: Tensor) -> Tensor:
    """Return how much the two ends of crossing lattice edges disagree: the cross-entropies of their signs.

    mean over edges of H(sigma(s_i), sign s_j) + H(sigma(s_j), sign s_i), which removes floating faces inside.
    Args:
        sdf: [B, N] or [B N].
        ends: [M, 2] flat indices.
    Source: GET3D eq. 2 (there eq. 4 of the arXiv version), after Munkberg et al. 2022 eq. 8.
    """
    if not len(ends):
        return sdf.sum() * 0
    a, b = sdf.reshape(-1)[ends[:, 0]], sdf.reshape(-1)[ends[:, 1]]
    loss = F.binary_cross_entropy_with_logits
    return loss(a, (b > 0).to(a.dtype)) + loss(b, (a > 0).to(a.dtype))
