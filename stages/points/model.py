"""The networks of the point system as one module, its folder, and what they are told of a prompt.

FOLDER/config.json          sizes
FOLDER/model.safetensors    base, upsampler and signed distance, float16
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from stages.networks import load_networks, save_networks
from stages.points.diffusion import cosine, guided, linear, step_of, x0_of_v
from stages.points.transformer import PointTransformer, SdfNetwork, SdfShape, TransformerShape

LOW, HIGH = 1024, 4096  # points of the base's cloud, and of the whole one


@dataclass(frozen=True)
class Condition:
    """What networks are told.

    Args:
        vector: [B, V] a CLIP's embedding of a text, length sqrt(V); zeros for none.
        grid: [B, L, G] its vision model's tokens of a picture; zeros for none.
    """

    vector: Tensor
    grid: Tensor

    def dropped(self, vectors: Tensor, grids: Tensor) -> Condition:
        """Return a copy without the vectors, and without the grids, of the rows [B] bool."""
        return Condition(self.vector * ~vectors[:, None], self.grid * ~grids[:, None, None])

    def repeat(self, times: int) -> Condition:
        """Return the rows so many times over."""
        return Condition(self.vector.repeat(times, 1), self.grid.repeat(times, 1, 1))

    def with_nothing(self) -> Condition:
        """Return the rows, and behind them as many that say nothing."""
        parts = self.vector, self.grid
        return Condition(*(torch.cat([part, torch.zeros_like(part)]) for part in parts))


@dataclass(frozen=True)
class Sizes:
    """The sizes of all networks."""

    base: TransformerShape
    up: TransformerShape
    sdf: SdfShape


def make_sizes(vector: int = 96, grid: int = 144) -> Sizes:
    """Return the sizes that the pocket weights have, for a CLIP whose embeddings and tokens have so many numbers."""
    base = TransformerShape(128, 6, 4, vector, grid)
    return Sizes(base, TransformerShape(64, 4, 2, vector, grid, low=True), SdfShape(64, 2, 4, 2))


class PointModel(nn.Module):
    """Base diffusion, upsampling diffusion and signed distance; clouds are [B, K, 6] as cloud.channels_of has them.

    Source: Point-E (arXiv 2212.08751).
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.base, self.up = PointTransformer(sizes.base), PointTransformer(sizes.up)
        self.sdf = SdfNetwork(sizes.sdf)
        self.schedules = {"base": cosine(), "up": linear()}

    def x0(
        self, name: str, x: Tensor, sigma: float, condition: Condition, low: Tensor | None = None, scale: float = 1.0
    ) -> Tensor:
        """Return the clean cloud [B, K, 6] of x = x0 + sigma eps, guided where scale is not 1, cut at +-1.

        Args:
            name: "base" or "up". low: [B, M, 6] the cloud that the upsampler is told, guided or not.
        """
        network, alpha_bar = getattr(self, name), self.schedules[name]
        t = torch.full((len(x),), step_of(sigma, alpha_bar), device=x.device)
        z_t = x / (1 + sigma**2) ** 0.5
        if scale == 1:
            return x0_of_v(network(z_t, t, condition.vector, condition.grid, low).float(), x, sigma).clamp(-1, 1)
        c = condition.with_nothing()
        twice = [None if part is None else torch.cat([part, part]) for part in (z_t, t, low)]
        v = network(twice[0], twice[1], c.vector, c.grid, twice[2]).float()
        told, untold = (x0_of_v(part, x, sigma).clamp(-1, 1) for part in v.chunk(2))
        return guided(told, untold, scale).clamp(-1, 1)

    def save(self, folder: Path) -> None:
        """Write the folder; float16."""
        save_networks(self, asdict(self.sizes), folder)


def load_model(folder: Path) -> PointModel:
    """Return the networks of a folder, frozen, float32. Raises: UserError for one that is missing or damaged."""
    return load_networks(lambda values: PointModel(_read_sizes(values)), folder, "points", "point")


def _read_sizes(values: dict) -> Sizes:
    base, up = (TransformerShape(**values[name]) for name in ("base", "up"))
    return Sizes(base, up, SdfShape(**values["sdf"]))
