"""Random pictures behind the object, the augmentation that makes it opaque under CLIP (Dream Fields sec. 3.3).

CLIP is content with fog in front of one wall. Behind every copy of a view stands another picture: white noise, a
checkerboard, a Fourier texture, a flat colour or a grey, each blurred by a random amount; only what hides them counts.
Dream Fields mixes the first three in equal parts (arXiv 2112.01455, google-research dreamfields/augment.py), CLIP-Mesh
noise, checkerboard and flat colours (arXiv 2203.13333). Pictures are drawn in sRGB, where their statistics are those
that CLIP sees, and handed on in linear colour. Their numbers do not depend on the size: blur is a share of the side.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import Tensor

from stages.errors import check_shape
from stages.kernels.srgb import srgb_to_linear

KINDS = ("noise", "checkerboard", "fourier", "colour", "grey")
SIDE = 224  # pixels at which the papers' numbers in pixels are meant
REACH = 7 / SIDE  # the blur's kernel reaches this far, as a share of the side: 15 pixels wide at 224
AMPLITUDE, POWER = 0.2, 1.5  # of the Fourier texture's spectrum and of its fall with frequency
GAIN = 0.25  # lucid's images are a quarter of their spectrum's transform
# Square root of the covariance of ImageNet's colours (lucid/optvis/param/color.py), its columns' largest norm made 1.
COLOURS = ((0.26, 0.09, 0.02), (0.27, 0.00, -0.05), (0.27, -0.09, 0.03))


class BackdropSettings(BaseModel):
    """The pictures behind the copies of a view."""

    model_config = ConfigDict(extra="forbid")

    copies: int = Field(0, ge=0, le=64, description="pictures a view is shown on; 0: one flat grey of `background`")
    noise: float = Field(1.0, ge=0, description="share of white noise, relative to the other kinds")
    checkerboard: float = Field(1.0, ge=0, description="share of checkerboards of two random colours")
    fourier: float = Field(1.0, ge=0, description="share of smooth textures with the colours of photographs")
    colour: float = Field(0.0, ge=0, description="share of flat random colours")
    grey: float = Field(0.0, ge=0, description="share of flat greys")
    squares: int = Field(8, ge=1, le=64, description="squares along a side of a checkerboard")
    blur: tuple[float, float] = Field(
        (0.0, 10 / SIDE), description="range of the blur's standard deviation, as a share of the picture's side"
    )
    grey_range: tuple[float, float] = Field((0.35, 1.0), description="sRGB range of the greys, the pocket world's own")

    @field_validator("blur", "grey_range")
    @classmethod
    def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= value[0] <= value[1] <= 1:
            raise ValueError(f"wanted 0 <= low <= high <= 1, got {list(value)}")
        return value

    @model_validator(mode="after")
    def _something(self) -> BackdropSettings:
        if sum(getattr(self, kind) for kind in KINDS) <= 0:
            raise ValueError(f"the shares of {', '.join(KINDS)} are all 0, so there is no picture to draw")
        return self


def random_backdrops(settings: BackdropSettings, count: int, size: int, generator: torch.Generator) -> Tensor:
    """Draw `count` pictures of random kinds and blurs; linear colour [count, size, size, 3], on the CPU."""
    shares = torch.tensor([getattr(settings, kind) for kind in KINDS], dtype=torch.float64)
    kinds = torch.multinomial(shares, count, replacement=True, generator=generator)
    low, high = settings.blur
    deviation = (low + (high - low) * torch.rand(count, generator=generator)) * size
    pictures = torch.empty(count, size, size, 3)
    for k, kind in enumerate(KINDS):
        index = (kinds == k).nonzero()[:, 0]
        if len(index):
            pictures[index] = _draw(kind, settings, len(index), size, generator)
    return srgb_to_linear(blurred(pictures, deviation))


def _draw(kind: str, settings: BackdropSettings, count: int, size: int, generator: torch.Generator) -> Tensor:
    """sRGB pictures [count, size, size, 3] of one kind (flat ones [count, 1, 1, 3])."""
    if kind == "noise":
        return torch.rand(count, size, size, 3, generator=generator)
    if kind == "checkerboard":
        return checkerboards(count, size, settings.squares, generator)
    if kind == "fourier":
        return fourier_textures(count, size, generator)
    if kind == "colour":
        return torch.rand(count, 1, 1, 3, generator=generator)
    low, high = settings.grey_range
    return (low + (high - low) * torch.rand(count, 1, 1, 1, generator=generator)).expand(-1, 1, 1, 3)


def checkerboards(count: int, size: int, squares: int, generator: torch.Generator) -> Tensor:
    """Return checkerboards [count, size, size, 3] of `squares` squares a side, each in two random sRGB colours."""
    colours = torch.rand(count, 2, 3, generator=generator)
    column = torch.arange(size) * squares // size
    odd = (column[:, None] + column[None, :]) % 2  # [size, size]
    return colours[:, odd]


def fourier_textures(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Draw textures [count, size, size, 3] of Gaussian spectra, amplitude ~ frequency^-1.5, sRGB in (0, 1).

    Olah et al. 2018, "Differentiable image parameterizations", as Dream Fields uses it; the contrast is that of 224
    pixels at any size (unscaled, it grows with the root of the size).
    """
    rows, columns = torch.fft.fftfreq(size), torch.fft.rfftfreq(size)
    frequency = (rows[:, None].square() + columns[None, :].square()).sqrt().clamp_min(1 / size)  # cycles a pixel
    scale = size * frequency**-POWER * math.sqrt(SIDE / size)
    parts = AMPLITUDE * torch.randn(2, count, 3, *scale.shape, generator=generator)
    image = GAIN * torch.fft.irfft2(torch.complex(parts[0], parts[1]) * scale, s=(size, size))  # [count, 3, size, size]
    colours = torch.tensor(COLOURS)
    colours = colours / colours.norm(dim=0).max()
    return torch.sigmoid(image.permute(0, 2, 3, 1) @ colours.T)


def blurred(pictures: Tensor, deviation: Tensor) -> Tensor:
    """Blur pictures [N, H, W, 3], each by its own Gaussian of standard deviation [N] in pixels, mirrored at the border.

    The kernel reaches a thirty-second of the side, as the papers' 15 pixels at 224 do; deviation 0 changes nothing.
    """
    check_shape("deviation", deviation, (len(pictures),))
    count, height, width, _ = pictures.shape
    reach = min(max(round(REACH * max(height, width)), 1), min(height, width) - 1)
    x = torch.arange(-reach, reach + 1, dtype=pictures.dtype)
    kernel = torch.exp(-0.5 * (x / deviation.to(pictures)[:, None].clamp_min(1e-3)).square())
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(3, 0)[:, None, None]  # [3 N, 1, 1, 2 reach + 1]
    planes = pictures.permute(0, 3, 1, 2).reshape(1, 3 * count, height, width)
    planes = F.pad(planes, (reach, reach, reach, reach), mode="reflect")
    planes = F.conv2d(F.conv2d(planes, kernel, groups=3 * count), kernel.transpose(2, 3), groups=3 * count)
    return planes.reshape(count, 3, height, width).permute(0, 2, 3, 1)


def show_on(colour: Tensor, opacity: Tensor, pictures: Tensor) -> Tensor:
    """Return renders over black [B, H, W, 3] with opacity [B, H, W, 1], each on n of the pictures [B n, H, W, 3].

    Returns: [B n, H, W, 3], the n copies of a view beside each other. Differentiable in all three.
    """
    batch, height, width, _ = colour.shape
    check_shape("opacity", opacity, (batch, height, width, 1))
    copies = len(pictures) // max(batch, 1)
    check_shape("pictures", pictures, (batch * copies, height, width, 3))
    stacked = pictures.view(batch, copies, height, width, 3)
    return (colour[:, None] + (1 - opacity)[:, None] * stacked).flatten(0, 1)
