"""The two protocols that chain stages: a Stage optimises, an Asset is what it hands on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from stages.mesh.mesh import Mesh
from stages.mesh.place import Placement

Density = Callable[[Tensor], Tensor]  # [N, 3] in [-1, 1]^3 -> [N] >= 0
Albedo = Callable[[Tensor], Tensor]  # [N, 3] in [-1, 1]^3 -> [N, 3] linear RGB in [0, 1]


@dataclass
class Asset:
    """What a stage hands to the next one or to export; a stage fills what it knows.

    density: volume density at points, from a radiance field.
    albedo: linear base colour at points, from any colour field.
    field: the module behind them, for a next stage that inherits its weights.
    mesh: a triangle surface in world coordinates, from a mesh stage or a file.
    background: the module of the environment that the field was trained in front of.
    placement: how a user's mesh came into the scene; what is made of it goes back to its place and size.
    locked: the mesh is the user's own, to be painted and otherwise left as it came.
    """

    density: Density | None = None
    albedo: Albedo | None = None
    field: torch.nn.Module | None = None
    mesh: Mesh | None = None
    background: torch.nn.Module | None = None
    placement: Placement | None = None
    locked: bool = False


class Stage(Protocol):
    """One optimisation. Deterministic: same constructor arguments and device give the same bytes."""

    name: str
    steps: int  # how many steps the stage takes in all
    step_index: int  # how many have been taken
    times: dict[str, float]  # seconds by phase: render, guidance, backward, optimiser, ...

    def step(self) -> dict[str, float]:
        """Take one optimisation step; returns metrics by name, finite floats."""

    def headline(self, metrics: dict[str, float]) -> str:
        """The number that means something, as the progress line shows it: 'cover 31 %'."""

    def preview(self) -> np.ndarray:
        """A contact sheet of the present state, uint8 sRGB [H, W, 3]; takes no randomness from the run."""

    def state_dict(self) -> dict[str, Tensor]:
        """Everything the next step depends on: parameters, moments, grids, generators, step_index. Flat."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Inverse of state_dict on a freshly constructed stage."""

    def finish(self) -> Asset:
        """Check that there is an object and hand it on; raises UserError with advice if there is none."""
