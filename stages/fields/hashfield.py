"""The coarse scene: a hash-grid radiance field with one small head for density and one for albedo.

Source: Magic3D's coarse field (arXiv 2211.10440) in threestudio's open form, with analytic normals.
    raw(p)     = head_density(features(p)) + blob(p),    blob(p) = blob_scale (1 - |p| / blob_radius)
    sigma(p)   = density_scale softplus(raw(p))          density per world length, on [-1, 1]^3
    normal(p)  = - grad sigma / |grad sigma|             = - grad raw / |grad raw|, since softplus' > 0
    albedo(p)  = sigmoid(head_albedo(features(p)))       linear RGB; or clamped, see stages/fields/clamped.py
grad raw is the blob's gradient plus J(p)^T d head / d features (stages/kernels/hashgrid.py), written out: a loss
on normals reaches table and head by ordinary differentiation, without a second derivative of the network.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from stages.errors import check_shape
from stages.fields.clamped import before_clamping, clamped
from stages.kernels.density import hash_density
from stages.kernels.grid import HashGridSpec
from stages.kernels.hashgrid import hash_encode, hash_encode_both
from stages.kernels.mlp import mlp
from stages.ramp import Ramp, constant


class FieldSettings(BaseModel):
    """Shape of the hash-grid field; lengths in world units of the box [-1, 1]^3."""

    model_config = ConfigDict(extra="forbid")

    levels: int = Field(16, ge=1, le=32, description="levels of the hash grid, two features each")
    log2_table: int = Field(15, ge=10, le=22, description="log2 of the rows a level may have")
    base: int = Field(16, ge=2, le=512, description="cells a side of the coarsest level")
    finest: int = Field(256, ge=2, le=8192, description="cells a side of the finest level; 256 is below a 64x64 pixel")
    hidden: int = Field(32, ge=4, le=256, description="hidden units of each head")
    density_scale: float = Field(
        2.0, gt=0, description="factor on the density; published recipes have a box twice ours"
    )
    blob_scale: float = Field(10.0, ge=0, description="raw density added at the centre (Magic3D: 10)")
    blob_radius: float = Field(0.5, gt=0, le=2, description="radius at which the blob's bias crosses zero")
    albedo: Literal["sigmoid", "clamped"] = Field(
        "sigmoid", description="how colours are kept in [0, 1]; clamped ones can leave a bound, sigmoid ones burn in"
    )
    bands: Ramp = Field(
        constant(1.0),
        gt=0,
        le=1,
        description="share of the levels that is on, coarse ones first; 1: all from the start",
    )

    @model_validator(mode="after")
    def _ordered(self) -> FieldSettings:
        if self.finest < self.base:
            raise ValueError(f"finest: wanted at least base = {self.base}, got {self.finest}")
        return self

    def spec(self) -> HashGridSpec:
        return HashGridSpec(levels=self.levels, log2_table=self.log2_table, base=self.base, finest=self.finest)


class DetailSettings(BaseModel):
    """Finer hash levels that the colour field gets for this stage."""

    model_config = ConfigDict(extra="forbid")

    levels: int = Field(4, ge=0, le=16, description="levels added, from twice the coarse field's finest; 0: none")
    log2_table: int = Field(17, ge=10, le=22, description="log2 of the rows a level may have")
    finest: int = Field(1024, ge=16, le=8192, description="cells a side of the finest level")


class Head(nn.Module):
    """One-hidden-layer perceptron; uniform initialisation in +-1 / sqrt(fan in), drawn from the generator."""

    def __init__(self, inputs: int, hidden: int, outputs: int, generator: torch.Generator) -> None:
        super().__init__()

        def uniform(*shape: int, fan_in: int) -> nn.Parameter:
            return nn.Parameter((2 * torch.rand(*shape, generator=generator) - 1) / math.sqrt(fan_in))

        self.w1, self.b1 = uniform(hidden, inputs, fan_in=inputs), nn.Parameter(torch.zeros(hidden))
        self.w2, self.b2 = uniform(outputs, hidden, fan_in=hidden), nn.Parameter(torch.zeros(outputs))

    def weights(self, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return arguments of the mlp op; a mask [I] switches inputs off by scaling the first layer's columns."""
        return (self.w1 if mask is None else self.w1 * mask), self.b1, self.w2, self.b2

    def widened(self, inputs: int) -> Head:
        """Return the same function with `inputs` more inputs, which it ignores until trained (zero columns)."""
        wide = Head(1, 1, 1, torch.Generator())
        wide.w1 = nn.Parameter(torch.nn.functional.pad(self.w1.detach(), (0, inputs)))
        wide.b1, wide.w2, wide.b2 = (nn.Parameter(v.detach().clone()) for v in (self.b1, self.w2, self.b2))
        return wide


def without_gradient(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return a field's function of points [N, 3] without gradients, 131,072 points at a time to bound its memory."""

    def call(points: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([function(part) for part in points.split(1 << 17)])

    return call


class HashField(nn.Module):
    """Density, normals and albedo at world points [N, 3] in [-1, 1]^3.

    Args:
        settings: sizes and initial values.
        generator: on the CPU; draws all initial values.
    """

    def __init__(self, settings: FieldSettings, generator: torch.Generator) -> None:
        super().__init__()
        self.settings, self.spec = settings, settings.spec()
        self.table = nn.Parameter(self.spec.initial_table(generator))
        self.density_head = Head(self.spec.width, settings.hidden, 1, generator)
        self.albedo_head = Head(self.spec.width, settings.hidden, 3, generator)
        self.register_buffer("bands", torch.ones(self.spec.width))
        self.register_buffer("ball", torch.tensor(settings.blob_scale))  # zero once another shape is begun with
        self.detail_spec: HashGridSpec | None = None
        self.detail: nn.Parameter | None = None
        self._annealed = True  # whatever the bands are
        self.set_progress(0.0)

    def set_progress(self, progress: float) -> None:
        """Switch finer levels on one after another, each fading in, as `bands` says (coarse-to-fine training)."""
        on, were_on = self.settings.bands.at(progress) * self.spec.levels, not self._annealed
        self._annealed = on < self.spec.levels
        if were_on and not self._annealed:
            return
        levels = (on - torch.arange(self.spec.levels)).clamp(0, 1)
        self.bands.copy_(levels.repeat_interleave(self.spec.features))

    @property
    def _mask(self) -> Tensor | None:
        return self.bands if self._annealed else None

    def features(self, points: Tensor, known: Tensor | None = None) -> Tensor:
        """Return hash features [N, W]; `known` are those of a pass without gradients over the same points."""
        check_shape("points", points, (None, 3))
        return hash_encode(0.5 * (points + 1), self.table, self.spec, known=known)

    def _features_with_detail(self, points: Tensor, features: Tensor | None) -> Tensor:
        check_shape("points", points, (None, 3))
        unit = 0.5 * (points + 1)
        if features is None:
            return hash_encode_both(unit, (self.table, self.detail), (self.spec, self.detail_spec))
        return torch.cat([features, hash_encode(unit, self.detail, self.detail_spec)], -1)

    def density(self, points: Tensor, features: Tensor | None = None) -> Tensor:
        """Return sigma [N]."""
        features = self.features(points) if features is None else features
        raw = mlp(features, *self.density_head.weights(self._mask))[:, 0]
        return self._activated(raw, points)

    def albedo(self, points: Tensor, features: Tensor | None = None) -> Tensor:
        """Return linear albedo [N, 3]; does not evaluate the density."""
        mask = self._mask
        if self.detail is None:
            features = self.features(points) if features is None else features
        else:
            features = self._features_with_detail(points, features)
            mask = None if mask is None else nn.functional.pad(mask, (0, self.detail_spec.width), value=1.0)
        return self._coloured(mlp(features, *self.albedo_head.weights(mask)))

    def _coloured(self, raw: Tensor) -> Tensor:
        return clamped(raw) if self.settings.albedo == "clamped" else torch.sigmoid(raw)

    def start_albedo(self, colour: Tensor) -> None:
        """Make one linear colour [3] the field's, before it is trained: the albedo head's bias."""
        raw = before_clamping if self.settings.albedo == "clamped" else torch.logit
        with torch.no_grad():
            self.albedo_head.b2.copy_(raw(colour))

    def forward(self, points: Tensor, known: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return sigma [N] and albedo [N, 3]; `known` features as in :meth:`features`."""
        features = self.features(points, known)
        if self.detail is not None:
            return self.density(points, features), self.albedo(points, features)
        # Both heads as one perceptron: their gradients by the features need not be added up afterwards.
        heads = zip(self.density_head.weights(self._mask), self.albedo_head.weights(self._mask), strict=True)
        w1, b1, w2, b2 = heads
        raw = mlp(features, torch.cat(w1), torch.cat(b1), torch.block_diag(*w2), torch.cat(b2))
        density, albedo = raw.split([1, 3], -1)
        return self._activated(density[:, 0], points), self._coloured(albedo)

    def density_and_normal(self, points: Tensor, known: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return sigma [N], unit normals [N, 3] out of the density, and albedo [N, 3]; `known` as in :meth:`features`.

        Not differentiable in: points. A normal shrinks to zero where the gradient vanishes.
        """
        check_shape("points", points, (None, 3))
        weights = self.density_head.weights(self._mask)
        features, raw, gradient = hash_density(0.5 * (points + 1), self.table, self.spec, weights, known=known)
        gradient = 0.5 * gradient  # [N, 3] per world length
        radius = points.norm(dim=-1, keepdim=True).clamp_min(1e-6)
        gradient = gradient - (self.ball / self.settings.blob_radius) * points / radius
        normal = -gradient * torch.rsqrt(gradient.square().sum(-1, keepdim=True) + 1e-6)
        return self._activated(raw, points), normal, self.albedo(points, features)

    def _activated(self, raw: Tensor, points: Tensor) -> Tensor:
        s = self.settings
        blob = self.ball * (1 - points.norm(dim=-1) / s.blob_radius)
        return s.density_scale * nn.functional.softplus(raw + blob)

    def albedo_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of colour alone: table, albedo head, and the detail table if there is one.

        The table also carries the density, so train a deep copy whose density is no longer asked for.
        """
        return [self.table, *self.albedo_head.parameters(), *([] if self.detail is None else [self.detail])]

    def add_detail(self, generator: torch.Generator, levels: int = 4, log2_table: int = 17, finest: int = 1024) -> None:
        """Give albedo finer hash levels of its own (twice `finest` of the field up to `finest` cells a side).

        The head gets zero weights for them, so the colours do not change until they are trained.
        """
        if self.detail is not None:
            raise ValueError("detail: the field already has a detail table")
        self.detail_spec = HashGridSpec(
            levels=levels, log2_table=log2_table, base=min(2 * self.spec.finest, finest), finest=finest
        )
        self.detail = nn.Parameter(self.detail_spec.initial_table(generator, scale=1e-2).to(self.table.device))
        self.albedo_head = self.albedo_head.widened(self.detail_spec.width)
