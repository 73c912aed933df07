"""The module that computes a part of the ops under a backend: reference/ (torch), cpu/ (numba) or cuda/ (Warp).

The modules of a part in cpu/ and cuda/ have functions of the same names and arguments. Ops name the function as an
attribute: `module(backend, "raster").rasterise_forward(clip, triangles, rast)`. torch.compile must not see such a call
(stages/kernels/untraced.py): ops make it inside an autograd function, or in a function of its own.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache, partial
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

_PACKAGES = {"torch": "reference", "numba": "cpu", "warp": "cuda"}
_TAKE_TENSORS = frozenset({"hashgrid", "mlp", "volume"})  # parts whose modules prepare tensors themselves


@cache
def module(backend: str, part: str) -> ModuleType | Prepared:
    """Load the module of a part for a backend, once.

    Args:
        backend: "torch", "numba" or "warp", as choose_backend gives it.
        part: the module's name: "raster", "antialias", "hashgrid", ...
    Returns: the module; for compiled parts that want arrays or contiguous memory, the module as Prepared shows it.
    """
    loaded = importlib.import_module(f"stages.kernels.{_PACKAGES[backend]}.{part}")
    return loaded if backend == "torch" or part in _TAKE_TENSORS else Prepared(loaded, backend == "numba")


class Prepared:
    """A compiled part's module, whose functions take the tensors of autograd.

    Tensors are handed over detached and contiguous, without a copy where they are that already, so that the function
    can also write into them; to numba as numpy arrays, and its arrays come back as tensors. Anything else stays as it
    is.
    """

    def __init__(self, loaded: ModuleType, arrays: bool) -> None:
        self._loaded, self._call = loaded, _on_arrays if arrays else _on_tensors

    def __getattr__(self, name: str) -> Callable:
        return partial(self._call, getattr(self._loaded, name))


def _on_tensors(function: Callable, *arguments):
    return function(*(a.detach().contiguous() if isinstance(a, Tensor) else a for a in arguments))


def _on_arrays(function: Callable, *arguments):
    arrays = (a.detach().contiguous().numpy() if isinstance(a, Tensor) else a for a in arguments)
    result = function(*arrays)
    return tuple(_tensor(part) for part in result) if isinstance(result, tuple) else _tensor(result)


def _tensor(value):
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value
