"""Warp kernel behind stages/kernels/lattice.py: one launch an iteration, every vertex by itself, no atomics."""

from __future__ import annotations

import torch
import warp as wp
from torch import Tensor

from stages.kernels.cuda.launch import launch

wp.set_module_options({"enable_backward": False, "fuse_fp": False})


@wp.kernel
def _iterate(
    neighbours: wp.array2d(dtype=wp.int32),
    scale: wp.float32,
    keep: wp.float32,
    add: wp.float32,
    x: wp.array(dtype=wp.float32),
    residual: wp.array(dtype=wp.float32),
    step: wp.array(dtype=wp.float32),
    following: wp.array(dtype=wp.float32),
):
    """x += step, residual -= (I + scale (D - A)) step, following = keep step + add residual."""
    i = wp.tid()
    s = step[i]
    total = wp.float32(0.0)
    degree = int(0)
    for k in range(neighbours.shape[1]):
        j = neighbours[i, k]
        if j >= 0:
            total += step[j]
            degree += 1
    r = residual[i] - (s + scale * (wp.float32(degree) * s - total))
    x[i] = x[i] + s
    residual[i] = r
    following[i] = keep * s + add * r


def diffuse(neighbours: Tensor, values: Tensor, scale: float, coefficients: list, theta: float) -> Tensor:
    """Chebyshev iteration for (I + scale (D - A)) x = values from x = 0; see reference/lattice.py."""
    x, residual, step = torch.zeros_like(values), values.clone(), values / theta
    following = torch.empty_like(values)
    for keep, add in coefficients:
        launch(_iterate, len(values), (neighbours, scale, keep, add, x, residual, step, following))
        step, following = following, step
    return x + step
