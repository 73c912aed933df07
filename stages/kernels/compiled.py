"""One call for the two compiled backends: cpu_<part>.py (numba, on numpy arrays) and cuda_<part>.py (Warp, on tensors).

The modules of a part have functions of the same names and arguments.
"""

from __future__ import annotations

import importlib

import numpy as np
import torch
from torch import Tensor

from stages.kernels.untraced import stepped_over

_MODULES = {"numba": "cpu", "warp": "cuda"}


@stepped_over
def run(backend: str, part: str, function: str, *arguments):
    """Run a function of a part's module for a backend.

    Args:
        backend: "numba" or "warp". part: "raster", "antialias", ...: which module.
        arguments: tensors are handed over detached and contiguous, without a copy where they are that already, so
            that the function can also write into them; anything else as it is.
    Returns: what the function returns, arrays as tensors.
    """
    module = importlib.import_module(f"stages.kernels.{_MODULES[backend]}_{part}")
    tensors = (a.detach().contiguous() if isinstance(a, Tensor) else a for a in arguments)
    if backend == "warp":
        return getattr(module, function)(*tensors)
    found = getattr(module, function)(*(a.numpy() if isinstance(a, Tensor) else a for a in tensors))
    return tuple(_tensor(f) for f in found) if isinstance(found, tuple) else _tensor(found)


def _tensor(value):
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value
