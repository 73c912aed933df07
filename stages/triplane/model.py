"""The networks of the tri-plane system as one module, its folder, and what it is told of a prompt.

FOLDER/config.json          sizes, and the side of both planes
FOLDER/model.safetensors    decoder, base, upsampler, and the mean and spread of the planes, float16
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from stages.networks import load_networks, save_networks
from stages.triplane.diffusion import cosine, guided, x0_of_v
from stages.triplane.field import Decoder
from stages.triplane.planes import resize, roll_out, roll_up
from stages.triplane.unet import TriplaneUNet, UNetShape

LIMIT = 5.0  # of normalised planes: predictions beyond are cut, as RodinHD cuts them


@dataclass(frozen=True)
class Condition:
    """A prompt as a CLIP reads it.

    Args:
        vector: [B, D] embedding, unit length times sqrt(D); of a text or of a picture.
        words: [B, L, W] states of the text's tokens.
        mask: [B, L] bool, which of them there are; none for a picture, or for no prompt at all.
    """

    vector: Tensor
    words: Tensor
    mask: Tensor

    def dropped(self, which: Tensor) -> Condition:
        """Return a copy that says nothing in the rows `which` [B] bool: zeros, and no words."""
        keep = ~which
        return Condition(self.vector * keep[:, None], self.words, self.mask & keep[:, None])

    def with_nothing(self) -> Condition:
        """Return the rows, and behind them as many that say nothing."""
        nothing = self.dropped(torch.ones(len(self.vector), dtype=torch.bool, device=self.vector.device))
        pairs = ((getattr(self, name), getattr(nothing, name)) for name in ("vector", "words", "mask"))
        return Condition(*(torch.cat(pair) for pair in pairs))

    def to(self, device: torch.device) -> Condition:
        """Return a copy on a device."""
        return Condition(self.vector.to(device), self.words.to(device), self.mask.to(device))


@dataclass(frozen=True)
class Sizes:
    """The sizes of all networks.

    Args:
        channels: of the planes. low, high: cells a side of the base's and the upsampler's planes.
        decoder: width of the decoder.
        base, up: UNets.
    """

    channels: int
    low: int
    high: int
    decoder: int
    base: UNetShape
    up: UNetShape


def make_sizes(
    *, vector: int = 96, words: int = 128, channels: int = 8, low: int = 32, base: tuple[int, int] = (48, 112)
) -> Sizes:
    """Return the sizes that the pocket weights have, for a CLIP of `vector` and `words` numbers."""
    high = 2 * low
    first = UNetShape(low, channels, channels, 2, base, 2, (1,), vector, words)
    return Sizes(channels, low, high, 64, first, UNetShape(high, 2 * channels, channels, 2, (24, 56), 1, (), vector))


class TriplaneModel(nn.Module):
    """Decoder, base diffusion and upsampling diffusion. All planes that it takes and gives are normalised.

    Source: Rodin (arXiv 2212.06135).
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.decoder = Decoder(sizes.channels, sizes.decoder)
        self.base, self.up = TriplaneUNet(sizes.base), TriplaneUNet(sizes.up)
        self.register_buffer("mean", torch.zeros(3, sizes.channels, 1, 1))
        self.register_buffer("spread", torch.ones(3, sizes.channels, 1, 1))

    def normalised(self, planes: Tensor) -> Tensor:
        """Return planes [B, 3, C, R, R] with about zero mean and unit variance, rolled out [B, C, R, 3 R]."""
        return roll_out((planes - self.mean) / self.spread)

    def planes(self, rolled: Tensor) -> Tensor:
        """Return the decoder's planes [B, 3, C, R, R] of normalised, rolled-out ones."""
        return roll_up(rolled) * self.spread + self.mean

    def base_x0(self, z_t: Tensor, t: Tensor, condition: Condition, scale: float = 1.0) -> Tensor:
        """Return the base's clean planes of noisy ones [B, C, R, 3 R] at t [B], guided where scale is not 1."""
        alpha_bar = cosine(t)
        if scale == 1:
            v = self.base(z_t, t, condition.vector, condition.words, condition.mask)
        else:
            c = condition.with_nothing()
            v = guided(*self.base(torch.cat([z_t, z_t]), torch.cat([t, t]), c.vector, c.words, c.mask).chunk(2), scale)
        return x0_of_v(v.float(), z_t, alpha_bar).clamp(-LIMIT, LIMIT)

    def up_x0(self, z_t: Tensor, t: Tensor, low: Tensor, condition: Condition) -> Tensor:
        """Return the upsampler's clean planes of noisy ones [B, C, 2 R, 6 R] at t [B], and low ones [B, C, R, 3 R].

        What it predicts is the difference to the low planes, resized: concatenated at the input, added at the output.
        """
        large = roll_out(resize(roll_up(low), self.sizes.high))
        x0 = large + self.up(torch.cat([z_t, large], 1), t, condition.vector)
        return x0.float().clamp(-LIMIT, LIMIT)

    def save(self, folder: Path) -> None:
        """Write the folder; float16."""
        save_networks(self, asdict(self.sizes), folder)


def load_model(folder: Path) -> TriplaneModel:
    """Return the networks of a folder, frozen, float32. Raises: UserError for one that is missing or damaged."""
    return load_networks(lambda values: TriplaneModel(_read_sizes(values)), folder, "triplane", "tri-plane")


def _read_sizes(values: dict) -> Sizes:
    sizes = Sizes(**values)
    shapes = {}
    for name in ("base", "up"):
        shape = UNetShape(**getattr(sizes, name))
        shapes[name] = replace(shape, widths=tuple(shape.widths), attention=tuple(shape.attention))
    return replace(sizes, **shapes)
