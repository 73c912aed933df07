"""Small generators in a folder."""

from __future__ import annotations

from pathlib import Path

import torch

from stages.gan.generator import GanSizes
from stages.gan.model import GanModel, Sizes

TINY = GanSizes(latent=8, width=8, layers=2, channels=(8, 8), features=4, hidden=4, cells=10)
CLASSES, OTHERS = ("car", "mug"), ("robot",)


def tiny_networks(folder: Path, seed: int = 0) -> Path:
    """A folder of random generators of cars and mugs: lumpy balls in colours of their latents."""
    torch.manual_seed(seed)
    GanModel(Sizes(TINY, CLASSES, OTHERS)).save(folder)
    return folder
