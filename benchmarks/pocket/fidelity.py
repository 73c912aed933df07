"""Measure the priors against the truth, in dB over the object, on renders of held-out captions.

layout     the layout's own picture, by kind of caption: plain, pattern, pair, clay
pixel      x0 predicted from noisy renders at 64x64, by t
latent     x0 predicted from noisy latents of 512x512 renders and decoded, by t; beside it the pixel prior's x0 of
           the same renders, enlarged
autoencoder  decoded latents of 512x512 renders, beside averages over 2x2, 4x4 and 8x8 pixels
ceiling    an instance against the mean of others of its caption in the same view: what words alone allow
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from stages.cameras import CameraSettings, Views, orbit_views, sample_views
from stages.guidance.prior import ViewContext, add_noise, resized, x0_from_eps
from stages.pocket import data, world
from stages.pocket.build import build
from stages.pocket.data import object_psnr
from stages.prompts import view_class
from stages.render.shade import ALBEDO, Shading

TIMES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8, 0.9, 0.97)  # shares of the noise schedule
KINDS = ("plain", "pattern", "pair", "clay")
INSTANCES = 12  # of a caption, for the ceiling


@dataclass(frozen=True)
class Shot:
    """One render: sRGB [S, S, 3] in [0, 1] and how it came about."""

    caption: str
    kind: str  # of KINDS
    picture: Tensor
    views: Views
    under: Tensor  # linear colour of the backdrop [3]
    shading: Shading

    @property
    def words(self) -> str:
        """The caption as the stages ask for it."""
        view = view_class(float(self.views.azimuth_deg), float(self.views.elevation_deg), data.SIDES)
        return f"{self.caption}, {view} view" + (", clay render" if self.shading.textureless else "")

    @property
    def context(self) -> ViewContext:
        return ViewContext(self.views, self.under, self.shading)


def shots(count: int, size: int, cameras: CameraSettings, seed: int) -> list[Shot]:
    """Renders of held-out captions, the four kinds by turns, instances and cameras as in training.

    Args:
        count: how many.
        size: pixels a side.
    """
    renders: list[Shot] = []
    for k in range(count):
        kind, rng = KINDS[k % len(KINDS)], np.random.default_rng([seed, k])
        while True:
            spec = world.sample_spec(rng, split="heldout")
            group = "pair" if spec.other else "plain" if spec.pattern == "plain" else "pattern"
            if kind in (group, "clay"):
                break
        views = sample_views(cameras, 1, torch.Generator().manual_seed(int(rng.integers(2**62))))
        ambient = 1.0 if rng.random() < 0.45 and kind != "clay" else float(rng.uniform(0.3, 0.7))
        shading = Shading(ambient, 1 - ambient, kind == "clay")
        under = torch.from_numpy(data.background(rng)).float()
        picture = _render(spec, rng, views, size, shading, under)
        renders.append(Shot(world.caption(spec), kind, picture, views, under, shading))
    return renders


def _render(spec: world.Spec, rng, views: Views, size: int, shading: Shading, under: Tensor) -> Tensor:
    return torch.from_numpy(data.render(build(spec, rng), views, size, shading, under)).float() / 255


def mean_psnr(pictures: list[Tensor], truth: list[Tensor]) -> float:
    """Return the mean PSNR over the objects of pictures [S, S, 3], in dB."""
    values = [object_psnr(a, b) for a, b in zip(pictures, truth, strict=True)]
    return round(float(np.mean([v for v in values if v is not None])), 2)


@torch.no_grad()
def layout_psnr(prior, renders: list[Shot]) -> dict[str, float]:
    """Return the PSNR of the layout's picture at the renders' size, for all and by kind, in dB."""
    pictures = []
    for shot in renders:
        picture = prior.layout.picture(prior.embed([shot.words]), shot.context)[:, :3]
        pictures.append(resized(picture, len(shot.picture))[0].permute(1, 2, 0))
    result = {"all": mean_psnr(pictures, [s.picture for s in renders])}
    for kind in KINDS:
        members = [k for k, shot in enumerate(renders) if shot.kind == kind]
        result[kind] = mean_psnr([pictures[k] for k in members], [renders[k].picture for k in members])
    return result


@torch.no_grad()
def x0_pictures(prior, renders: list[Shot], share: float, seed: int = 0) -> list[Tensor]:
    """Predict x0 of noisy renders, decoded to sRGB pictures of the prior's own size.

    Args:
        share: of the noise schedule, in (0, 1).
    """
    t = torch.tensor([round(share * (len(prior.alphas_cumprod) - 1))])
    alpha_bar, pictures = prior.alphas_cumprod[t], []
    for k, shot in enumerate(renders):
        generator = torch.Generator().manual_seed(1000 * seed + k)
        x = prior.encode(shot.picture[None], generator)
        z = add_noise(x, torch.randn(x.shape, generator=generator), alpha_bar)
        eps = prior.predict_noise(z, t, prior.embed([shot.words]), shot.context)
        pictures.append(prior.decode(x0_from_eps(eps, z, alpha_bar))[0])
    return pictures


def x0_psnr(prior, renders: list[Shot], times: tuple[float, ...] = TIMES) -> dict[str, float]:
    """Return the PSNR of x0 by share of the noise schedule, at the renders' size; smaller pictures are enlarged."""
    truth = [shot.picture for shot in renders]
    rows = {}
    for share in times:
        pictures = [_enlarged(picture, len(truth[0])) for picture in x0_pictures(prior, renders, share)]
        rows[f"{share:g}"] = mean_psnr(pictures, truth)
    return rows


def _enlarged(picture: Tensor, size: int) -> Tensor:
    if len(picture) == size:
        return picture
    larger = F.interpolate(picture.permute(2, 0, 1)[None], (size, size), mode="bicubic", align_corners=False)
    return larger[0].permute(1, 2, 0).clamp(0, 1)


@torch.no_grad()
def autoencoder_psnr(prior, renders: list[Shot]) -> dict[str, float]:
    """Return the PSNR of decoded latents, and of averages over squares of pixels enlarged again, in dB."""
    truth = [shot.picture for shot in renders]
    round_trips = [prior.decode(prior.encode(p[None], torch.Generator().manual_seed(0)))[0] for p in truth]
    rows = {"autoencoder": mean_psnr(round_trips, truth)}
    for factor in (2, 4, 8):
        small = [F.avg_pool2d(p.permute(2, 0, 1)[None], factor)[0].permute(1, 2, 0) for p in truth]
        rows[f"{factor}x average"] = mean_psnr([_enlarged(p, len(q)) for p, q in zip(small, truth, strict=True)], truth)
    return rows


def ceiling(count: int, seed: int) -> dict[str, float]:
    """Return the PSNR of instances against the mean of INSTANCES - 1 others of their caption, by kind and for all."""
    rows: dict[str, list[float]] = {}
    for shot in shots(count, 64, data.COARSE_CAMERAS, seed):
        spec, rest = world.parse(shot.caption), []
        for k in range(INSTANCES):
            rng = np.random.default_rng([seed, k, 5])
            rest.append(_render(spec, rng, shot.views, 64, shot.shading, shot.under))
        value = object_psnr(torch.stack(rest[1:]).mean(0), rest[0])
        if value is not None:
            rows.setdefault(shot.kind, []).append(value)
            rows.setdefault("all", []).append(value)
    return {kind: round(float(np.mean(values)), 2) for kind, values in rows.items()}


@torch.no_grad()
def draw_layouts(prior, path: Path, size: int = 64, azimuths: int = 8) -> None:
    """Draw every kind from all sides as one PNG: the layout's picture above the canonical object's; colours vary."""
    colours, views = list(world.COLOURS), orbit_views([360 * k / azimuths for k in range(azimuths)], 20.0)
    under, rows = torch.full((3,), 0.35), []
    for k, kind in enumerate(world.KINDS):
        spec = world.Spec(kind, colours[k % len(colours)])
        embedding = prior.embed([world.caption(spec)]).expand(azimuths, -1, -1)
        drawings = prior.layout.picture(embedding, ViewContext(views, under, ALBEDO))[:, :3]
        pictures = resized(drawings, size).permute(0, 2, 3, 1)
        truth = torch.stack([_render(spec, None, views[v], size, ALBEDO, under) for v in range(azimuths)])
        rows += [torch.cat(list(pictures), 1), torch.cat(list(truth), 1)]
    half = len(rows) // 2
    sheet = torch.cat([torch.cat(rows[:half], 0), torch.cat(rows[half:], 0)], 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((sheet.clamp(0, 1) * 255).round().byte().numpy()).save(path, optimize=True)


def measure_fidelity(pixel, latent, out: Path, *, count: int = 96, large: int = 24, seed: int = 777) -> dict[str, Any]:
    """Run all measurements of this module for the two priors; writes out/pocket_layout.png.

    Args:
        count: renders at 64x64.
        large: renders at 512x512.
    """
    small = shots(count, 64, data.COARSE_CAMERAS, seed)
    big = shots(large, 512, data.FINE_CAMERAS, seed + 1)
    row: dict[str, Any] = {"ceiling": ceiling(count // 2, seed), "pixel": x0_psnr(pixel, small)}
    if pixel.layout is not None:
        row["layout"] = layout_psnr(pixel, small)
        draw_layouts(pixel, out / "pocket_layout.png")
    lower = tuple(t for t in TIMES if t <= 0.65)
    row["latent"], row["pixel enlarged"] = x0_psnr(latent, big, lower), x0_psnr(pixel, big, lower)
    return row | {"autoencoder": autoencoder_psnr(latent, big)}
