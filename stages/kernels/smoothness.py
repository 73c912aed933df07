"""Roughness of a closed triangle surface: the angles across its edges and its uniform Laplacian, in one pass.

Letters: V vertices, F faces, M edges; `edges` [M, 2] and `sides` [M, 2] as from stages.kernels.marching.mesh_edges.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stages.errors import check_shape
from stages.kernels.backend import choose_backend
from stages.kernels.dispatch import module
from stages.kernels.indices import check_indices
from stages.kernels.reference import smoothness as twin
from stages.kernels.untraced import stepped_over, untraced


def smoothness(
    vertices: Tensor, faces: Tensor, edges: Tensor, sides: Tensor, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Compute two smoothness terms, both means over the mesh, so that neither grows with it.

    bend: mean over the edges of 1 - cos between the normals of the two faces (Magic3D's angular difference of adjacent
    faces), weighted by the smaller of their areas: marching tetrahedra makes slivers, whose normals turn by 1 / height
    when a vertex moves, and the weight (held constant in the gradient) takes exactly that factor out. 0 for a plane.

    rough: mean squared distance of the vertices from the mean of their neighbours (the umbrella operator, Desbrun et
    al. 1999) along the vertex normal, in units of the mean edge length; normal and length are held constant in the
    gradient. Along the normal only, since a vertex of marching tetrahedra moves along its lattice edge: evening out the
    spacing of the vertices would bend a flat surface.

    Args:
        vertices: [V, 3].
        faces: [F, 3] int32.
        edges: [M, 2] int32 of a closed oriented surface.
        sides: [M, 2] int32, the two faces at each edge.
    Returns: bend in [0, 2] and rough >= 0, scalars; 0 where there is no edge. Differentiable in vertices; a face
        without area has no normal, and neither bends nor turns.
    Raises: ValueError naming argument, wanted and got.
    """
    check_shape("vertices", vertices, (None, 3))
    check_shape("faces", faces, (None, 3))
    check_shape("edges", edges, (None, 2))
    check_shape("sides", sides, (edges.shape[0], 2))
    check_indices("faces", faces, len(vertices))
    check_indices("edges", edges, len(vertices))
    check_indices("sides", sides, len(faces))
    backend = choose_backend(backend, vertices, family="marching")
    if backend == "torch":
        return (
            twin.bend(vertices, faces, sides),
            twin.rough(vertices, faces, edges),
        )
    values = untraced(_Smoothness.apply, vertices, faces.int(), edges.int(), sides.int(), backend)
    return values[0], values[1]


class _Smoothness(torch.autograd.Function):
    """Both terms [2]; their gradients come with the values and wait for the backward pass."""

    @staticmethod
    def forward(ctx, vertices, faces, edges, sides, backend):
        values = vertices.new_empty(2, dtype=torch.float64)
        grads = vertices.new_empty(2 if ctx.needs_input_grad[0] else 0, len(vertices), 3)
        module(backend, "smoothness").smoothness(vertices, faces, edges, sides, values, grads)
        ctx.save_for_backward(grads)
        return values.to(vertices.dtype)

    @staticmethod
    @stepped_over
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (grads,) = ctx.saved_tensors
        return (grad[:, None, None] * grads).sum(0), None, None, None, None
