"""The device that a model is trained on, its numbers, and a pool of renders that is kept there."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


def device_of(args: argparse.Namespace) -> torch.device:
    """Return the device of --device. Raises: SystemExit for CUDA where torch finds none."""
    name = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch finds no CUDA device; leave it out to train on the CPU")
    return torch.device(name)


def placed(values: np.ndarray, device: torch.device) -> Tensor:
    """Return an array, which may be mapped from a file and read-only, as a tensor on a device."""
    return torch.from_numpy(np.array(values)).to(device)


def pool_rows(pool: np.ndarray, device: torch.device) -> Callable[[np.ndarray], Tensor]:
    """Return a function from indices [B] to those rows of a pool, on the device.

    On the CPU they are read from the file that the pool is mapped from; elsewhere the whole pool is kept on the device.
    """
    if device.type == "cpu":
        return lambda index: placed(pool[index], device)
    on_device = placed(pool, device)
    return lambda index: on_device[placed(index, device)]


def bfloat16(device: torch.device | str = "cpu") -> torch.autocast:
    """Return a context of bfloat16 networks where this CPU multiplies such numbers, of float32 elsewhere."""
    fast = torch.device(device).type == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return torch.autocast("cpu", torch.bfloat16, enabled=bool(fast))
