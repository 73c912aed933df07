"""The shape of a hash grid: how many cells, features and table rows each level has."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class HashGridSpec:
    """Shape of a hash grid: cells a side grow geometrically from `base` to `finest`.

    Levels whose (cells + 1)^3 vertices fit into 2^log2_table rows are stored densely, the others are hashed.
    The default suits 64x64 renders: 256 cells over the box are finer than a pixel of any training view.
    """

    levels: int = 16
    features: int = 2
    log2_table: int = 15
    base: int = 16
    finest: int = 256

    def __post_init__(self) -> None:
        for name, low, high in (("levels", 1, 32), ("features", 1, 8), ("log2_table", 4, 24), ("base", 1, 1 << 14)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name}: wanted {low} .. {high}, got {getattr(self, name)}")
        if not self.base <= self.finest <= 1 << 16:
            raise ValueError(f"finest: wanted base = {self.base} .. 65536, got {self.finest}")

    @cached_property
    def resolutions(self) -> tuple[int, ...]:
        """Cells a side of each level."""
        growth = (self.finest / self.base) ** (1 / max(self.levels - 1, 1))
        return tuple(round(self.base * growth**level) for level in range(self.levels))

    @cached_property
    def dense(self) -> tuple[bool, ...]:
        """Whether each level has one row per vertex."""
        return tuple((r + 1) ** 3 <= 1 << self.log2_table for r in self.resolutions)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """First row of each level, and the number of rows as the last entry; L + 1 values."""
        total = [0]
        for resolution, dense in zip(self.resolutions, self.dense, strict=True):
            total.append(total[-1] + ((resolution + 1) ** 3 if dense else 1 << self.log2_table))
        return tuple(total)

    @property
    def rows(self) -> int:
        """T."""
        return self.offsets[-1]

    @property
    def width(self) -> int:
        """L * F, the length of an encoding."""
        return self.levels * self.features

    def initial_table(self, generator: torch.Generator, scale: float = 1e-4) -> Tensor:
        """Table [T, F] uniform in +-scale (tiny-cuda-nn's 1e-4: a field starts as its bias, not as noise)."""
        return scale * (2 * torch.rand(self.rows, self.features, generator=generator) - 1)
