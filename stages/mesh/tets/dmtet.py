"""DMTet (Shen et al. 2021): signed distances and bounded offsets at lattice vertices, meshed by marching tetrahedra.

Only a band of lattice vertices around the surface holds parameters. Outside the band every vertex has the sign of its
neighbours. `DMTet.step_done` keeps that true after each optimiser step: the rim keeps its signs, and where the surface
has reached the rim the band is laid anew around the surface, values (and the optimiser's moments) carried over.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stages.errors import UserError
from stages.kernels.lattice import diffuse
from stages.kernels.marching import marching_tetrahedra, mesh_edges
from stages.mesh.tets.tetrahedra import (
    DIRECTIONS,
    SAFE_MOVE,
    STRENGTH_PER_CELL,
    Band,
    Lattice,
    build_band,
    dilate,
    lookup,
)

MARGIN = 2  # rings of lattice edges between the surface and the rim after the band is laid
GUARD = 1e-3  # of a cell: smallest distance from zero that a lattice vertex counts for, see marching_tetrahedra
RIM_FLOOR = 1e-2  # of a cell: smallest distance a frozen sign is held at


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
        self._lay(build_band(lattice, ids))
        self._freeze_rim(torch.where(self._border, torch.ones_like(values), values.sign()))

    def _lay(self, band: Band) -> None:
        def tensor(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array).to(self.device)

        self.band = band
        self._edges, self._tets, self._tet_edges = tensor(band.edges), tensor(band.tets), tensor(band.tet_edges)
        self._neighbours = tensor(band.neighbours)
        self._base = tensor(self.lattice.positions(band.ids))
        self._border, self._rim_at = tensor(band.border), tensor(np.flatnonzero(band.rim))
        growing = band.rim & ~band.border
        at_end = growing[band.edges].any(1)
        self._last_edges = tensor(band.edges[at_end].T.copy())  # where the surface must not arrive

    def _freeze_rim(self, sign: Tensor) -> None:
        """Hold the rim at `sign` (an exact zero counts as outside)."""
        with torch.no_grad():
            at = self._rim_at
            floor = RIM_FLOOR * self.lattice.cell
            outside = (sign[at] >= 0) | self._border[at]
            value = self.sdf[at]
            self.sdf[at] = torch.where(outside, value.clamp_min(floor), value.clamp_max(-floor))
            self._rim_sign = torch.where(outside, 1.0, -1.0)

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

    def crossing_ends(self) -> tuple[Tensor, Tensor]:
        """Return the two lattice vertices [K] of every edge that changes sign."""
        inside = self.sdf.detach() < 0
        a, b = self._edges[:, 0], self._edges[:, 1]
        crossing = inside[a] != inside[b]
        return a[crossing].long(), b[crossing].long()

    def step_done(self, moments: list[Tensor]) -> list[Tensor] | None:
        """Restore the band's invariant after the parameters changed.

        Args:
            moments: tensors [N, ...] that go with the vertices (an optimiser's); new vertices start at zero.
        Returns: the moments of the new band where it was laid anew (the parameters are then other tensors in the same
            Parameter objects), else None.
        """
        with torch.no_grad():
            at, floor = self._rim_at, RIM_FLOOR * self.lattice.cell
            self.sdf[at] = (self.sdf[at] * self._rim_sign).clamp_min(floor) * self._rim_sign
        start, end = (self.sdf.detach().index_select(0, at) < 0 for at in self._last_edges)
        if torch.equal(start, end):
            return None
        return self._rebuild(np.unique(torch.cat(self.crossing_ends()).cpu().numpy()), moments)

    def _rebuild(self, core: np.ndarray, moments: list[Tensor]) -> list[Tensor]:
        old_ids, old_sdf = self.band.ids, self.sdf.detach().cpu().numpy()
        ids = dilate(self.lattice, old_ids[core], MARGIN)
        source = lookup(old_ids, ids)
        sdf = extend(self.lattice, ids, np.where(source >= 0, old_sdf[source], 0), source >= 0)
        inherits = torch.from_numpy(source >= 0).to(self.device)
        index = torch.from_numpy(np.maximum(source, 0)).to(self.device)

        def carry(tensor: Tensor) -> Tensor:
            return tensor[index] * inherits.reshape(-1, *[1] * (tensor.dim() - 1))

        with torch.no_grad():
            self.sdf.data = torch.from_numpy(sdf).to(self.device)
            self.offset.data = carry(self.offset.data)
        self.sdf.grad = self.offset.grad = None
        self._lay(build_band(self.lattice, ids))
        self._freeze_rim(self.sdf.detach().sign())
        self.rebuilds += 1
        return [carry(m) for m in moments]

    def state_dict(self) -> dict[str, Tensor]:
        """Return ids, sdf, offset and the rim's signs."""
        ids = torch.from_numpy(self.band.ids)
        return {"ids": ids, "sdf": self.sdf.detach(), "offset": self.offset.detach(), "rim_sign": self._rim_sign}

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


def extend(lattice: Lattice, ids: np.ndarray, sdf: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Return values [N] float32 where not `known`: the sign of the neighbours, farther from zero by the edge between.

    Ring by ring, so that the result does not depend on any order. A vertex that no known one reaches is outside.
    """
    sdf, known = sdf.astype(np.float32).copy(), known.copy()
    while not known.all():
        todo = np.flatnonzero(~known)
        best = np.full(len(todo), np.inf, dtype=np.float32)
        sign = np.ones(len(todo), dtype=np.float32)
        for d in DIRECTIONS:
            length = np.float32(np.linalg.norm(d) * lattice.cell / 2)
            for way in (1, -1):
                there = lookup(ids, ids[todo] + way * lattice.ids(d))
                usable = (there >= 0) & known[there]
                distance = np.where(usable, np.abs(sdf[there]) + length, np.inf).astype(np.float32)
                closer = distance < best
                best[closer] = distance[closer]
                sign[closer] = np.where(sdf[there[closer]] < 0, -1, 1)
        reached = np.isfinite(best)
        if not reached.any():
            sdf[todo] = np.float32(lattice.cell)
            break
        sdf[todo[reached]] = sign[reached] * best[reached]
        known[todo[reached]] = True
    return sdf


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
    ids = dilate(lattice, core, MARGIN)
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
