"""Diffusion over the graph of a band of lattice vertices. Letters: N vertices, K directions to neighbours."""

from __future__ import annotations

from torch import Tensor

from stages.errors import check_shape
from stages.kernels.backend import choose_backend
from stages.kernels.dispatch import module
from stages.kernels.indices import check_indices
from stages.kernels.reference import lattice as twin
from stages.kernels.untraced import untraced


def diffuse(
    values: Tensor, neighbours: Tensor, strength: float, *, tolerance: float = 0.1, backend: str = "auto"
) -> Tensor:
    """Solve (I + strength (D - A) / K) x = values approximately: D degrees, A adjacency of the graph.

    As a preconditioner it turns a gradient at scattered vertices into a smooth displacement (Nicolet et al. 2021,
    "Large steps in inverse rendering of geometry", eq. 10). The Chebyshev iteration is cut when no eigenvector
    is off by more than `tolerance`, so the result is a symmetric positive definite function of the values: a descent
    direction stays one.

    Args:
        values: [N].
        neighbours: [N, K] int32, -1 where there is none; if i lists j, then j lists i.
        strength: >= 0, the squared smoothing length over that of the lattice; 0 returns the values.
    Returns: [N]. Not differentiable.
    Raises: ValueError naming argument, wanted and got.
    """
    check_shape("values", values, (None,))
    check_shape("neighbours", neighbours, (values.shape[0], None))
    if not strength >= 0 or not 0 < tolerance < 1:
        raise ValueError(f"strength, tolerance: wanted >= 0 and in (0, 1), got {strength} and {tolerance}")
    if strength == 0:
        return values.detach().clone()
    check_indices("neighbours", neighbours, len(values), start=-1)
    backend = choose_backend(backend, values, family="marching")
    if backend == "torch":
        return twin.diffuse(values.detach(), neighbours, strength, tolerance)
    pairs, theta = twin.chebyshev(strength, tolerance)
    scale = strength / neighbours.shape[1]
    return untraced(_diffuse, backend, neighbours.int(), values, scale, pairs, theta)


def _diffuse(backend: str, neighbours: Tensor, values: Tensor, *constants) -> Tensor:
    return module(backend, "lattice").diffuse(neighbours, values, *constants)
