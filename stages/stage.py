"""The protocols that chain stages, a Stage that optimises and an Asset that it hands on; and what all stages share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from stages.guidance.guide import Guide
from stages.mesh.cloud import Cloud
from stages.mesh.mesh import Mesh
from stages.mesh.place import Placement
from stages.optimise import under_prefix
from stages.picture import Picture

Density = Callable[[Tensor], Tensor]  # [N, 3] in [-1, 1]^3 -> [N] >= 0
Albedo = Callable[[Tensor], Tensor]  # [N, 3] in [-1, 1]^3 -> [N, 3] linear RGB in [0, 1]


@dataclass
class Asset:
    """The result of a stage, for the next one or for export; a stage fills what it knows.

    Args:
        density: volume density at points, from a radiance field.
        albedo: linear base colour at points, from any colour field.
        field: the module behind them, for a next stage that inherits its weights.
        cloud: the points that the density was made from, of a stage that draws points.
        mesh: a triangle surface in world coordinates, from a mesh stage or a file.
        background: the module of the environment that the field was trained in front of.
        placement: how a user's mesh came into the scene; what is made of it goes back to its place and size.
        locked: the mesh is the user's own, to be painted and otherwise left as it came.
        picture: of the object, which the next stage holds on to in its one view.
    """

    density: Density | None = None
    albedo: Albedo | None = None
    field: torch.nn.Module | None = None
    cloud: Cloud | None = None
    mesh: Mesh | None = None
    background: torch.nn.Module | None = None
    placement: Placement | None = None
    locked: bool = False
    picture: Picture | None = None


class Stage(Protocol):
    """One optimisation. Deterministic: same constructor arguments and device give the same bytes."""

    name: str
    steps: int  # how many steps the stage takes in all
    step_index: int  # how many have been taken
    times: dict[str, float]  # seconds by phase: render, guidance, backward, optimiser, ...

    def step(self) -> dict[str, float]:
        """Take one optimisation step and return its metrics by name, finite floats."""

    def headline(self, metrics: dict[str, float]) -> str:
        """Return the metric that tells how the stage is doing, as the progress line shows it: 'cover 31 %'."""

    def preview(self) -> np.ndarray:
        """Return a contact sheet of the present state, uint8 sRGB [H, W, 3]; takes no randomness from the run."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything the next step depends on: parameters, moments, grids, generators, step_index. Flat."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over a state_dict, on a freshly constructed stage."""

    def finish(self) -> Asset:
        """Check that there is an object and hand it on; raises UserError with advice if there is none."""


def add_metrics(totals: dict[str, float | Tensor], metrics: Mapping[str, float | Tensor], share: float) -> None:
    """Add the metrics of a part of a step to the step's.

    Args:
        totals: the step's metrics by name, changed in place.
        metrics: the part's.
        share: of the step's views that the part has, in (0, 1].
    """
    for name, value in metrics.items():
        totals[name] = totals.get(name, 0.0) + share * value


def cover_headline(metrics: Mapping[str, float]) -> str:
    """Return the share of the picture that the object covers and what prior or CLIP think of it, for Stage.headline."""
    text = f"cover {100 * metrics['cover']:.0f} %"
    if "agreement_db" in metrics:
        text += f", agreement {metrics['agreement_db']:.1f} dB"
    if "clip" in metrics:
        text += f", CLIP {metrics['clip']:.1f}"
    return text


def contact_sheet(rows: Sequence[Tensor]) -> np.ndarray:
    """Return pictures beside and below each other, uint8 [R H, B W, 3], for Stage.preview.

    Args:
        rows: R batches of pictures [B, H, W, 3], sRGB in [0, 1].
    """
    sheet = torch.cat([torch.cat(list(row), dim=1) for row in rows])
    return sheet.mul(255).round().to(torch.uint8).cpu().numpy()


def guidance_state(guidance: Guide | None) -> dict[str, Tensor]:
    """Return the state of a guidance as guidance.KEY, for Stage.state_dict; empty where there is none."""
    if guidance is None:
        return {}
    return {f"guidance.{key}": value for key, value in guidance.state_dict().items()}


def load_guidance_state(guidance: Guide | None, state: Mapping[str, Tensor]) -> None:
    """Give a guidance its part of a stage's state; inverse of guidance_state."""
    if guidance is not None:
        guidance.load_state_dict(under_prefix(state, "guidance"))
