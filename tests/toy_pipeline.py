"""Toy stages for the `pipeline` command: the real configuration, loop, checkpoints and files, no optimisation.

TOY_STEP_S makes each step last, TOY_NAN_AT breaks one, TOY_EMPTY names a stage that ends without an object.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import numpy as np
import torch

from pipeline.priors.source import Facts, PriorSource
from stages.errors import UserError
from stages.mesh.mesh import Mesh
from stages.stage import Asset

_CORNERS = 0.5 * np.array([[1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1]], np.float32)
_FACES = np.array([[0, 2, 4], [2, 1, 4], [1, 3, 4], [3, 0, 4], [2, 0, 5], [1, 2, 5], [3, 1, 5], [0, 3, 5]], np.int32)


def octahedron() -> Mesh:
    """A closed grey mesh inside the scene."""
    return Mesh(_CORNERS.copy(), _FACES, np.full((6, 3), 0.5, np.float32))


class ToyStage:
    """A random walk of an octahedron's corners; every step depends on all before it and on the generator."""

    def __init__(self, name: str, steps: int, seed: int, previous: Asset | None) -> None:
        self.name, self.steps, self.step_index = name, steps, 0
        self.times = {"render": 0.0}
        self.generator = torch.Generator().manual_seed(seed)
        self.walk = torch.zeros(6, 3)
        if previous is not None:
            self.walk += torch.from_numpy(previous.mesh.vertices - _CORNERS)

    def step(self) -> dict[str, float]:
        time.sleep(float(os.environ.get("TOY_STEP_S", "0")))
        self.walk = 0.9 * self.walk + 0.01 * torch.randn(6, 3, generator=self.generator)
        self.step_index += 1
        self.times["render"] += 0.001
        size = float(self.walk.abs().mean())
        return {"size": float("nan") if os.environ.get("TOY_NAN_AT") == str(self.step_index) else size}

    def headline(self, metrics: dict[str, float]) -> str:
        return f"size {metrics['size']:.3f} [m]"

    def preview(self) -> np.ndarray:
        return np.full((8, 8, 3), self.step_index % 256, np.uint8)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {
            "walk": self.walk,
            "twin": self.walk,
            "generator": self.generator.get_state(),
            "step": torch.tensor(self.step_index),
        }

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.walk = state["walk"]
        self.generator.set_state(state["generator"])
        self.step_index = int(state["step"])

    def finish(self) -> Asset:
        if os.environ.get("TOY_EMPTY") == self.name:
            more = ", or more coarse.steps" if self.name == "coarse" else ""
            raise UserError(f"{self.name} made no object", "the volume is empty", f"try another seed{more}")
        mesh = octahedron()
        mesh.vertices += self.walk.numpy()
        return Asset(mesh=mesh)


class NoPrior(PriorSource):
    """A source without a prior, for stages that listen to none."""

    form = "pocket"

    def reads(self, stage) -> list[str]:
        return [f"guidance.{stage}", "reference"]

    def facts(self, ask) -> Facts:
        return Facts()

    def build(self, ask, facts, device, kept) -> None:
        return None


def install(put: Callable[[object, str, object], None] = setattr) -> None:
    """Put the toys where the real stages, priors and mesh cleaning are called; `put` may be monkeypatch.setattr."""
    from pipeline.output import asset
    from pipeline.priors import sources
    from pipeline.runs import stages

    def make_toy(name, settings, guidance, device, seed, previous) -> ToyStage:
        return ToyStage(name, settings.steps, seed, previous)

    put(sources, "SOURCES", sources.SOURCES | {"pocket": NoPrior, "reference": NoPrior})
    put(stages, "make_stage", make_toy)
    put(asset, "finished_mesh", lambda asset, settings, initialise, facts: asset.mesh)
