"""How near an asset looks to its ground truth: pictures and normals of both from the same views, not aligned.

Letters: B views, S pixels a side.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.quality.metrics import LUMA
from benchmarks.quality.render import ALBEDO, COLOUR, Subject, shoot
from stages.cameras import Views, orbit_views
from stages.kernels.srgb import linear_to_srgb

SIDE = 512  # of the pictures in pixels: the fine stage's own
AZIMUTHS, ELEVATION = tuple(22.5 + 45 * k for k in range(8)), 20.0
GRADIENT_FLOOR = 170 / 255**2  # of the gradient's square: below it two flat places are alike (Xue et al., T = 170)


def picture_facts(subject: Subject, truth: Subject) -> dict[str, float]:
    """Compare an asset with its ground truth as both are seen from eight sides at 512x512.

    Returns:
        psnr: dB over the pixels that either of them covers.
        edges: mean gradient similarity over the same pixels, in [0, 1] (Xue et al. 2014, arXiv 1308.3052, eq. 4).
        normal_deg: mean angle in degrees between their normals where both cover a pixel.
    """
    views = orbit_views(list(AZIMUTHS), ELEVATION)
    (rendered, cover), (real, real_cover) = (shoot(s, views, SIDE, COLOUR) for s in (subject, truth))
    either = ((cover > 0) | (real_cover > 0))[..., 0]
    rendered, real = linear_to_srgb(rendered), linear_to_srgb(real)
    both = ((cover > 0.99) & (real_cover > 0.99))[..., 0]
    cosine = (normals_of(subject, views) * normals_of(truth, views)).sum(-1)[both].clamp(-1, 1)
    return {
        "psnr": psnr(rendered, real, either),
        "edges": gradient_similarity(rendered, real, either),
        "normal_deg": float(torch.rad2deg(cosine.acos()).mean()) if bool(both.any()) else math.nan,
    }


def psnr(rendered: Tensor, truth: Tensor, mask: Tensor) -> float:
    """PSNR in dB of pictures [B, S, S, 3] in [0, 1] over the pixels of a mask [B, S, S]; nan for an empty one."""
    if not bool(mask.any()):
        return math.nan
    return float(-10 * torch.log10((rendered - truth)[mask].square().mean().clamp_min(1e-9)))


def gradient_similarity(rendered: Tensor, truth: Tensor, mask: Tensor) -> float:
    """Return the mean gradient magnitude similarity of pictures [B, S, S, 3] over a mask [B, S, S].

    Prewitt gradients of the luma at half the size, as in the paper; 1 for equal pictures, less where an edge is
    missing or too much. The mean, not the paper's deviation, which judges the evenness of a distortion.
    """
    chosen = F.max_pool2d(mask[:, None].float(), 2)[:, 0] > 0
    if not bool(chosen.any()):
        return math.nan
    first, second = _gradient(rendered), _gradient(truth)
    likeness = (2 * first * second + GRADIENT_FLOOR) / (first.square() + second.square() + GRADIENT_FLOOR)
    return float(likeness[chosen].mean())


def _gradient(pictures: Tensor) -> Tensor:
    """Gradient magnitude [B, S/2, S/2] of the luma of pictures [B, S, S, 3]."""
    luma = F.avg_pool2d((pictures @ pictures.new_tensor(LUMA))[:, None], 2)
    prewitt = pictures.new_tensor([[1.0, 0.0, -1.0]] * 3) / 3
    kernels = torch.stack([prewitt, prewitt.T])[:, None]
    return F.conv2d(F.pad(luma, (1, 1, 1, 1), mode="replicate"), kernels).norm(dim=1)


def normals_of(subject: Subject, views: Views) -> Tensor:
    """Return world normals [B, S, S, 3], of unit length where a pixel is covered whole."""
    painted = replace(subject, colours=subject.normals / 2 + 0.5, uv=None, texture=None)
    rendered_normals, _ = shoot(painted, views, SIDE, ALBEDO)
    return F.normalize(2 * rendered_normals - 1, dim=-1)
