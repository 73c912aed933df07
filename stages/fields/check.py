"""Is there an object in a density field: finite, not empty, not fog, not filling its box."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.errors import UserError

SOLID = 5.0  # density per world length that counts as matter: 0.2 lengths of it absorb 63 % of the light


@dataclass(frozen=True)
class Presence:
    """Statistics of a field on a regular grid over the box [-1, 1]^3.

    Args:
        finite: share of densities that are numbers.
        peak: largest density.
        volume: share of the box above SOLID.
        cover: mean opacity of the box seen along its three axes, the largest of the three.
        faces: share of the box's surface layer above SOLID.
    """

    finite: float
    peak: float
    volume: float
    cover: float
    faces: float


@torch.no_grad()
def measure(density: Callable[[Tensor], Tensor], device: torch.device | str = "cpu", cells: int = 64) -> Presence:
    """Sample `density` ([N, 3] -> [N]) at the centres of cells^3 cells."""
    axis = (torch.arange(cells, device=device) + 0.5) * (2 / cells) - 1
    points = torch.cartesian_prod(axis, axis, axis)
    sigma = torch.cat([density(part) for part in points.split(1 << 16)]).reshape(cells, cells, cells)
    finite = torch.isfinite(sigma)
    sigma = torch.where(finite, sigma, torch.zeros_like(sigma))
    solid = sigma > SOLID
    covers = [float((1 - torch.exp(-sigma.sum(d) * 2 / cells)).mean()) for d in range(3)]
    faces = torch.cat([solid.select(d, k).flatten() for d in range(3) for k in (0, -1)])
    return Presence(
        finite=float(finite.double().mean()),
        peak=float(sigma.max()),
        volume=float(solid.double().mean()),
        cover=max(covers),
        faces=float(faces.double().mean()),
    )


def check_object(density: Callable[[Tensor], Tensor], device: torch.device | str = "cpu") -> Presence:
    """Measure the field and raise UserError, with what was measured and what to try, unless it holds an object."""
    p = measure(density, device)
    if p.finite < 1:
        raise UserError(
            "The coarse stage ended with a broken field",
            f"{100 * (1 - p.finite):.1f} % of its densities are not numbers",
            "run again with a lower coarse.lr or guidance scale; for a half-precision prior set its dtype to float32",
        )
    if p.cover < 0.005 or p.peak < SOLID / 5:
        raise UserError(
            "The coarse stage ended with an empty box",
            f"the renders are {100 * p.cover:.2f} % opaque, densest point {p.peak:.2g}",
            "try another seed, a lower coarse.opacity (or 0 with coarse.entropy=1), or more coarse.steps",
        )
    if p.faces > 0.2 or p.volume > 0.5:
        raise UserError(
            "The coarse stage filled its box instead of making an object",
            f"{100 * p.volume:.0f} % of the box is solid, and {100 * p.faces:.0f} % of its faces",
            "try another seed, a higher coarse.opacity, or more coarse.background.random_probability",
        )
    if p.volume < 1e-4:
        raise UserError(
            "The coarse stage ended with fog instead of a surface",
            f"only {100 * p.volume:.3f} % of the box is denser than {SOLID:g}, densest point {p.peak:.2g}",
            "try more coarse.steps, coarse.entropy=1, or another seed",
        )
    return p


def check_draft(stage: str, density: Callable[[Tensor], Tensor], device: torch.device | str = "cpu") -> None:
    """Raise UserError, with what was measured and what to try, unless what a stage's networks drew is an object."""
    p = measure(density, device)
    again = f"try another seed, or more {stage}.steps"
    if p.finite < 1:
        why = f"{100 * (1 - p.finite):.1f} % of its densities are not numbers"
        raise UserError(f"The {stage} stage ended with a broken field", why, f"lower {stage}.scale, or get new weights")
    if p.volume < 1e-4 or p.peak < SOLID:
        why = f"{100 * p.volume:.3f} % of the box is denser than {SOLID:g}, densest point {p.peak:.2g}"
        raise UserError(f"The {stage} stage ended with an empty box", why, again)
    if p.volume > 0.5:
        why = f"{100 * p.volume:.0f} % of the box is solid"
        raise UserError(f"The {stage} stage filled its box instead of making an object", why, again)
