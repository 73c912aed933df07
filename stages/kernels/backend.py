"""Which implementation of a kernel runs: chosen by name, or by device and dtype for "auto"."""

from __future__ import annotations

import torch
from torch import Tensor

BACKENDS = {
    "auto": "numba for float32 tensors on the CPU, torch for everything else",
    "torch": "the plain-torch twin: the definition, any device, float32 or float64",
    "numba": "compiled CPU kernels, float32 only",
}


def choose_backend(backend: str, *tensors: Tensor) -> str:
    """Resolve a backend name to "torch" or "numba" for these tensors.

    Args:
        backend: a key of BACKENDS.
        tensors: the floating point arguments of the op; they must share one device and one dtype.

    Raises: ValueError for an unknown name, and where "numba" is asked for what it does not compute.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: unknown name {backend!r}, have {', '.join(sorted(BACKENDS))}")
    on_cpu = all(t.device.type == "cpu" for t in tensors)
    single = all(t.dtype == torch.float32 for t in tensors)
    if backend == "auto":
        return "numba" if on_cpu and single else "torch"
    if backend == "numba" and not (on_cpu and single):
        got = ", ".join(f"{str(t.dtype).removeprefix('torch.')} on {t.device}" for t in tensors)
        raise ValueError(f"backend: 'numba' takes float32 tensors on the CPU, got {got}")
    return backend
