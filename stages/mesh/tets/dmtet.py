"""DMTet (Shen et al. 2021): signed distances and bounded offsets at lattice vertices, meshed by marching tetrahedra.

Only a band of lattice vertices around the surface holds parameters. Outside the band every vertex has the sign of its
neighbours. `DMTet.step_done` keeps that true after each optimiser step: the rim keeps its signs, and where the surface
has reached the rim the band is laid anew around the surface, values (and the optimiser's moments) carried over. All of
it stays on the parameters' device (stages/kernels/band.py).

How wide the band is: wide enough for a step, see MARGIN, and no wider. Every step marches through all of it and smooths
a gradient over it, which at 128 cells a side costs 190 ms of processor time with two rings and 310 with four; laying it
anew costs 45 ms, once in 15 steps of 0.001.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stages.errors import UserError
from stages.kernels import band
from stages.kernels.lattice import diffuse
from stages.kernels.marching import marching_tetrahedra, mesh_edges
from stages.mesh.tets.tetrahedra import SAFE_MOVE, STRENGTH_PER_CELL, Band, Lattice, dilate

MARGIN = 5e-3  # world units that the surface may move in a step: what Adam takes at fine.lr_sdf's largest default
RING = math.sqrt(0.5)  # cells that a ring of lattice edges reaches at least, along a diagonal of a cell's face
GUARD = 1e-3  # of a cell: smallest distance from zero that a lattice vertex counts for, see marching_tetrahedra
RIM_FLOOR = 1e-2  # of a cell: smallest distance a frozen sign is held at


def margin_rings(lattice: Lattice) -> int:
    """Return the rings of lattice edges between the surface and the rim after the band is laid.

    One ring holds what the surface looks at; those before it hold MARGIN, a length: a step moves the surface by no
    fewer cells because they are small. Two rings up to 282 cells a side, three up to 512.
    """
    return 1 + math.ceil(MARGIN / (RING * lattice.cell))


@dataclass(frozen=True)
class Surface:
    """A closed oriented surface: vertices [V, 3] differentiable in the DMTet's parameters, faces [F, 3] int32,
    edges [M, 2] int32 and the two faces [M, 2] int32 at each."""

    vertices: Tensor
    faces: Tensor
    edges: Tensor
    sides: Tensor


class DMTet:
    """The parameters of one surface. sdf [N] in world units; offset [N, 3] unbounded, see `positions`.

    Args:
        lattice: the lattice.
        ids: [N] sorted lattice vertices, holding every end of a crossing edge and its neighbours.
        sdf: [N] signed distance, negative inside; the lattice's border is forced outside.
        deformation: largest movement of a lattice vertex in cells, below SAFE_MOVE, so no tetrahedron turns over.
    """

    def __init__(
        self, lattice: Lattice, ids: np.ndarray, sdf: np.ndarray, *, deformation: float = 0.24, device="cpu"
    ) -> None:
        if not 0 <= deformation < SAFE_MOVE:
            raise ValueError(f"deformation: wanted 0 <= deformation < {SAFE_MOVE}, got {deformation}")
        self.lattice, self.deformation, self.device = lattice, deformation, torch.device(device)
        values = torch.as_tensor(np.asarray(sdf, dtype=np.float32), device=self.device)
        self.sdf = torch.nn.Parameter(values)
        self.offset = torch.nn.Parameter(torch.zeros(len(ids), 3, device=self.device))
        self.rebuilds = 0
        self._lay(torch.as_tensor(ids, device=self.device))
        self._freeze_rim(torch.where(self._border, torch.ones_like(values), values.sign()))

    @property
    def band(self) -> Band:
        """The band as arrays on the CPU."""
        tensors = (self._ids, self._edges, self._tets, self._tet_edges, self._neighbours, self._border, self._rim)
        return Band(self.lattice, *(tensor.cpu().numpy() for tensor in tensors))

    def _lay(self, ids: Tensor) -> None:
        resolution = self.lattice.resolution
        self._ids, self._edges, self._tets, self._tet_edges = ids, *[None] * 3
        self._neighbours, self._rim = band.neighbours(ids, resolution)
        self._edges, self._tets, self._tet_edges = band.cells(ids, self._neighbours, resolution)
        self._base, self._border = band.places(ids, resolution)
        self._rim_at = torch.nonzero(self._rim)[:, 0]

    def _freeze_rim(self, sign: Tensor) -> None:
        """Hold the rim at `sign` (an exact zero counts as outside), and remember on which side of it the surface is."""
        with torch.no_grad():
            at = self._rim_at
            floor = RIM_FLOOR * self.lattice.cell
            outside = (sign[at] >= 0) | self._border[at]
            value = self.sdf[at]
            self.sdf[at] = torch.where(outside, value.clamp_min(floor), value.clamp_max(-floor))
            self._rim_sign = torch.where(outside, 1.0, -1.0)
        # where the surface must not arrive: edges at the rim, but for the lattice's border. The rim's end of such an
        # edge keeps its sign, so the other end says whether it did.
        growing, inside = self._rim & ~self._border, self.sdf.detach() < 0
        self._watched = torch.nonzero(band.apart(growing, self._neighbours) & ~self._rim)[:, 0]
        self._watched_inside = inside[self._watched]
        self._arrived = bool((band.apart(inside, self._neighbours) & growing).any())

    def positions(self) -> Tensor:
        """Return lattice vertices moved by deformation * cell * offset / sqrt(1 + |offset|^2), [N, 3]."""
        bound = self.deformation * self.lattice.cell
        scale = bound * torch.rsqrt(1 + (self.offset * self.offset).sum(-1, keepdim=True))
        return self._base + self.offset * scale

    def surface(self) -> Surface:
        """Return the zero level set. Raises UserError where it is empty or not finite."""
        if not bool(torch.isfinite(self.sdf).all() & torch.isfinite(self.offset).all()):
            raise UserError(
                "the mesh broke", "its signed distances are not finite", "lower fine.lr_sdf, or the guidance scale"
            )
        vertices, faces, _ = marching_tetrahedra(
            self.positions(), self.sdf, self._edges, self._tets, self._tet_edges, guard=GUARD * self.lattice.cell
        )
        if faces.shape[0] == 0:
            raise UserError(
                "the mesh vanished", "no vertex is inside the surface any more", "lower fine.lr_sdf, or start from a "
                "better coarse result"
            )  # fmt: skip
        return Surface(vertices, faces, *mesh_edges(faces, vertices.shape[0]))

    def spread_gradient(self, length: float) -> None:
        """Smooth the gradient of the signed distances over `length` world units, along the band.

        A silhouette or a highlight moves a few vertices a step. Spread out, it moves the surface around them and the
        vertices off the surface with it, so that distances stay distances and noise averages out (Nicolet et al. 2021).
        """
        if self.sdf.grad is not None and length > 0:
            strength = STRENGTH_PER_CELL * (length / self.lattice.cell) ** 2
            self.sdf.grad = diffuse(self.sdf.grad, self._neighbours, strength)

    def step_done(self, moments: list[Tensor]) -> list[Tensor] | None:
        """Restore the band's invariant after the parameters changed.

        Args:
            moments: tensors [N, ...] that go with the vertices (an optimiser's); new vertices start at zero.
        Returns: the moments of the new band where it was laid anew (the parameters are then other tensors in the same
            Parameter objects), else None.
        """
        with torch.no_grad():
            outward = self.sdf.index_select(0, self._rim_at) * self._rim_sign
            held = outward.clamp_min(RIM_FLOOR * self.lattice.cell) * self._rim_sign
            self.sdf.index_copy_(0, self._rim_at, held)
        inside = self.sdf.detach().index_select(0, self._watched) < 0
        if not self._arrived and torch.equal(inside, self._watched_inside):
            return None
        return self._rebuild(moments)

    def _rebuild(self, moments: list[Tensor]) -> list[Tensor]:
        ids, sdf, resolution = self._ids, self.sdf.detach(), self.lattice.resolution
        core = ids[band.apart(sdf < 0, self._neighbours)]
        self._lay(band.dilated(core, resolution, margin_rings(self.lattice)))
        source = band.matched(ids, self._ids)
        known, index = source >= 0, source.clamp_min(0)
        fresh = torch.nonzero(~known)[:, 0]

        def carry(tensor: Tensor) -> Tensor:
            return tensor.index_select(0, index).index_fill_(0, fresh, 0)

        with torch.no_grad():
            self.sdf.data = band.extended(carry(sdf), known, self._neighbours, resolution)
            self.offset.data = carry(self.offset.data)
        self.sdf.grad = self.offset.grad = None
        self._freeze_rim(self.sdf.detach().sign())
        self.rebuilds += 1
        return [carry(m) for m in moments]

    def state_dict(self) -> dict[str, Tensor]:
        """Return ids, sdf, offset and the rim's signs."""
        return {"ids": self._ids, "sdf": self.sdf.detach(), "offset": self.offset.detach(), "rim_sign": self._rim_sign}

    @classmethod
    def from_state(
        cls, lattice: Lattice, state: dict[str, Tensor], *, deformation: float = 0.24, device="cpu"
    ) -> DMTet:
        """Rebuild a DMTet from its state_dict; the same lattice and deformation give the same bytes."""
        ids, sdf = state["ids"].cpu().numpy(), state["sdf"].cpu().numpy()
        dmtet = cls(lattice, ids, sdf, deformation=deformation, device=device)
        with torch.no_grad():
            dmtet.sdf.copy_(state["sdf"])
            dmtet.offset.copy_(state["offset"])
            dmtet._rim_sign.copy_(state["rim_sign"])
        return dmtet


def from_function(lattice: Lattice, sdf, *, deformation: float = 0.24, device="cpu") -> DMTet:
    """Return a DMTet of a signed distance function that is 1-Lipschitz, such as a sphere's.

    Args:
        sdf: points [N, 3] float32 Tensor in [-1, 1]^3 to [N].
    Raises: UserError where the function has no surface inside the lattice.
    """

    def values(points: np.ndarray) -> np.ndarray:
        return sdf(torch.from_numpy(points.astype(np.float32))).detach().cpu().numpy().astype(np.float32)

    ids = ids_near(lattice, values, lattice.cell)
    distance = values(lattice.positions(ids))
    core = ids[np.abs(distance) <= lattice.cell]
    if not (distance < 0).any() or not len(core):
        raise UserError(
            "no start for the mesh", "the signed distance function is nowhere negative", "give one with an inside"
        )
    ids = dilate(lattice, core, margin_rings(lattice))
    return DMTet(lattice, ids, values(lattice.positions(ids)), deformation=deformation, device=device)


def ids_near(lattice: Lattice, distance, reach: float) -> np.ndarray:
    """Return sorted lattice vertices that hold all those within `reach` of the zeros of a 1-Lipschitz function.

    Found coarse to fine: a box can hold such a vertex only where |distance| at its centre is at most half its diagonal
    and the reach, so the work is proportional to the surface.
    Args:
        distance: points [N, 3] float64 to [N], signed or not.
    """
    centres, half = np.zeros((1, 3)), 1.0
    while half > 2 * lattice.cell:
        half /= 2
        children = np.stack(np.meshgrid(*[[-half, half]] * 3, indexing="ij"), -1).reshape(1, 8, 3)
        centres = (centres[:, None] + children).reshape(-1, 3)
        centres = centres[np.abs(distance(centres)) <= half * np.sqrt(3) + reach]
    # 1e-6: a vertex exactly on the far side of the box [-1, 1]^3 belongs to the last box
    return lattice.ids_in_boxes(centres - half, centres + half + 1e-6)
