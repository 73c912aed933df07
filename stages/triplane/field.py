"""The decoder that all objects share, and the field that a tri-plane is with it: density and colour at points.

Rodin decodes a density; ours is fitted to occupancy at points (stages/pocket/train/triplane/fit.py), so the density is
that of a solid where the decoder says inside. N points, C channels of a plane.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.kernels.srgb import srgb_to_linear
from stages.triplane.planes import BOX, features_at

DENSITY = 80.0  # of a solid, per world length: half of the light is gone after 0.009
SHARPNESS = 2.0  # of the density's rise: what the occupancy's logits are multiplied by


class Decoder(nn.Module):
    """Occupancy logit and sRGB colour from the features of a tri-plane.

    The features are given with their sines and cosines at two octaves, as Rodin's Fourier encoding of them.

    Args:
        channels: of the planes.
        width: of the two hidden layers.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(5 * channels, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.out = nn.Linear(width, 4)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits [...] and sRGB colours [..., 3] in [0, 1] of features [..., C]."""
        waves = [function(octave * features) for octave in (1, 2) for function in (torch.sin, torch.cos)]
        out = self.out(self.hidden(torch.cat([features, *waves], -1)))
        return out[..., 0], out[..., 1:].sigmoid()


class TriplaneField(nn.Module):
    """A RadianceField (stages/render/volume.py) of one object.

    Args:
        planes: [3, C, R, R], differentiable or not.
        decoder: shared, frozen or not.
    """

    def __init__(self, planes: Tensor, decoder: Decoder) -> None:
        super().__init__()
        self.planes, self.decoder = planes, decoder

    def features(self, points: Tensor) -> Tensor:
        """Return the planes' features [N, C] at points [N, 3]."""
        return features_at(self.planes[None], points[None])[0]

    def density(self, points: Tensor, features: Tensor | None = None) -> Tensor:
        """Return the density [N] at points [N, 3]; none outside of the planes' box."""
        features = self.features(points) if features is None else features
        return _density(self.decoder(features)[0], points)

    def albedo(self, points: Tensor) -> Tensor:
        """Return linear colours [N, 3] in [0, 1] at points [N, 3]."""
        return srgb_to_linear(self.decoder(self.features(points))[1])

    def forward(self, points: Tensor, known: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return density [N] and linear colours [N, 3] at points [N, 3]. `known` is read again, for its gradient."""
        logits, colours = self.decoder(self.features(points))
        return _density(logits, points), srgb_to_linear(colours)

    @torch.enable_grad()
    def density_and_normal(self, points: Tensor, known: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return density [N], unit normals [N, 3] and linear colours [N, 3]; normals have no gradient."""
        places = points.detach().requires_grad_(True)
        logits, colours = self.decoder(self.features(places))
        (slope,) = torch.autograd.grad(logits.sum(), places, retain_graph=True)
        return _density(logits, points), F.normalize(-slope, dim=-1), srgb_to_linear(colours)


def _density(logits: Tensor, points: Tensor) -> Tensor:
    inside = points.abs().amax(-1) < BOX
    return torch.where(inside, DENSITY * torch.sigmoid(SHARPNESS * logits), torch.zeros_like(logits))
