"""The torch twin of the sRGB transfer curve (IEC 61966-2-1): its definition, on any device and in any float."""

from __future__ import annotations

import torch
from torch import Tensor

KNEE = 0.0031308  # below, the curve is a line


def linear_to_srgb(linear: Tensor) -> Tensor:
    """See srgb.py."""
    linear = linear.clamp(0, 1)
    return torch.where(linear <= KNEE, 12.92 * linear, 1.055 * linear.clamp_min(KNEE) ** (1 / 2.4) - 0.055)
