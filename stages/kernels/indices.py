"""Range checks of index tensors, each tensor looked at once: a look at CUDA memory would wait for the device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from stages.kernels.untraced import untraced

_extents = WeakIdKeyDictionary()  # tensor -> (its version, lowest, highest)


def extent(tensor: Tensor) -> tuple[int, int]:
    """Return the lowest and highest value of a tensor that is not empty, or the bounds of set_extent.

    Waits for the device the first time and after torch changed the tensor in place (not after a change through numpy or
    `.data`, which torch does not count); a tensor made in inference mode is looked at every time.
    """
    version = None if tensor.is_inference() else tensor._version
    cached = _extents.get(tensor)
    if version is None or cached is None or cached[0] != version:
        low, high = torch.stack(torch.aminmax(tensor)).tolist()
        cached = (version, low, high)
        if version is not None:
            _extents[tensor] = cached
    return cached[1:]


def set_extent(tensor: Tensor, low: int, high: int) -> Tensor:
    """State that a tensor's values lie in [low, high], so that no check reads them; returns the tensor."""
    untraced(_remember, tensor, low, high)
    return tensor


def _remember(tensor: Tensor, low: int, high: int) -> None:
    if not tensor.is_inference():
        _extents[tensor] = (tensor._version, low, high)


def check_indices(name: str, tensor: Tensor, stop: int, start: int = 0) -> None:
    """Raise ValueError naming argument, wanted and got unless all values are whole numbers in [start, stop)."""
    if tensor.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name}: wanted dtype int32, got {str(tensor.dtype).removeprefix('torch.')}")
    if tensor.numel():
        low, high = untraced(extent, tensor)
        if low < start or high >= stop:
            raise ValueError(f"{name}: wanted indices in [{start}, {stop}), got {low} to {high}")
