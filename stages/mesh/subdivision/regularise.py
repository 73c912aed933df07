"""Smoothness of a surface whose vertices move freely: the whole uniform Laplacian, tangential part included.

The surface of marching tetrahedra, whose vertices do not, has stages/kernels/smoothness.py.
"""

from __future__ import annotations

from torch import Tensor

from stages.errors import check_shape
from stages.kernels.reference.smoothness import umbrella


def laplacian(vertices: Tensor, edges: Tensor) -> Tensor:
    """Return the mean squared distance of the vertices from the mean of their neighbours, in mean edge lengths.

    The uniform Laplacian (Desbrun et al. 1999, umbrella operator); its tangential part evens out the spacing of the
    vertices. The edge length is held constant in the gradient.

    Args:
        vertices: [V, 3].
        edges: [M, 2], at least one.
    Returns: a scalar >= 0. Differentiable in vertices.
    """
    check_shape("vertices", vertices, (None, 3))
    check_shape("edges", edges, (None, 2))
    return umbrella(vertices, edges).square().sum(-1).mean()
