"""Vertices and cells of a narrow band of the body-centred cubic lattice of stages/mesh/tets/tetrahedra.py.

Lattice vertices are ids: linear indices of doubled coordinates in a padded cube, so that a neighbour is a constant
offset away. Everything is index arithmetic, on the device of the ids: compiled on the CPU, plain torch elsewhere, with
equal results. Nothing here is differentiable. Letters: N vertices, E edges, T tetrahedra; `resolution`: cells a side.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stages.errors import check_shape
from stages.kernels.backend import choose_backend
from stages.kernels.dispatch import module
from stages.kernels.untraced import untraced


def dilated(ids: Tensor, resolution: int, rings: int, *, backend: str = "auto") -> Tensor:
    """Return the sorted ids of all vertices within some lattice edges of the given ones, cut at the lattice.

    Args:
        ids: [M] int64, in the lattice.
        rings: lattice edges, >= 0.
    """
    check_shape("ids", ids, (None,))
    return _call("dilated", backend, ids, resolution, rings)


def matched(ids: Tensor, queries: Tensor, *, backend: str = "auto") -> Tensor:
    """Return the index [Q] int64 into ids of each query, -1 where there is none.

    Args:
        ids: [N] int64, sorted, unique, at least one.
        queries: [Q] int64, sorted.
    """
    check_shape("ids", ids, (None,))
    check_shape("queries", queries, (None,))
    return _call("matched", backend, ids, queries)


def neighbours(ids: Tensor, resolution: int, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Return the index [N, 14] int32 of each vertex's neighbours, -1 where missing, and which [N] bool miss one.

    Args:
        ids: [N] int64, sorted, unique.
    """
    check_shape("ids", ids, (None,))
    return _call("neighbours", backend, ids, resolution)


def cells(ids: Tensor, around: Tensor, resolution: int, *, backend: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
    """Return edges [E, 2], tetrahedra [T, 4] and their edges [T, 6] among the vertices, int32; see tetrahedra.Band.

    Args:
        ids: [N] int64, sorted, unique.
        around: [N, 14] int32, as `neighbours` returns it.
    """
    check_shape("ids", ids, (None,))
    check_shape("around", around, (ids.shape[0], 14))
    return _call("cells", backend, ids, around, resolution)


def places(ids: Tensor, resolution: int, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Return world positions [N, 3] float32, and which vertices [N] bool lie on the lattice's border.

    Args:
        ids: [N] int64.
    """
    check_shape("ids", ids, (None,))
    return _call("places", backend, ids, resolution)


def apart(flags: Tensor, around: Tensor, *, backend: str = "auto") -> Tensor:
    """Return which vertices [N] bool have a neighbour with another flag.

    Args:
        flags: [N] bool.
        around: [N, 14] int32, as `neighbours` returns it.
    """
    check_shape("flags", flags, (None,))
    check_shape("around", around, (flags.shape[0], 14))
    return _call("apart", backend, flags, around)


def extended(values: Tensor, known: Tensor, around: Tensor, resolution: int, *, backend: str = "auto") -> Tensor:
    """Return values [N] float32 where not `known`: the sign of the neighbours, farther from zero by the edge between.

    Ring by ring, so that the result does not depend on any order: of several neighbours the one nearest to zero counts,
    of equally near ones the first. A vertex that no known one reaches is outside by a cell.
    Args:
        values: [N] float32 signed distances, world units.
        known: [N] bool.
        around: [N, 14] int32, as `neighbours` returns it.
    """
    check_shape("values", values, (None,))
    check_shape("known", known, (values.shape[0],))
    check_shape("around", around, (values.shape[0], 14))
    return _call("extended", backend, values, known, around, resolution)


def _call(name: str, backend: str, *arguments):
    """Call a kernel where the family `marching` has numba for float32 tensors on this device, else the twin."""
    backend = choose_backend(backend, torch.empty(0, device=arguments[0].device), family="marching")
    function = getattr(module("numba" if backend == "numba" else "torch", "band"), name)
    return untraced(function, *arguments)
