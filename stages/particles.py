"""Several coarse fields under one guidance: the particles of variational score distillation.

ProlificDreamer (arXiv 2305.16213 alg. 1) lets n scenes share the score that vsd learns, so that it is the score of a
distribution and not of one scene; each step takes one of them. With another rule they are n independent tries.
"""

from __future__ import annotations

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from stages.coarse import CoarseSettings, CoarseStage
from stages.errors import UserError
from stages.guidance.guide import Guide
from stages.optimise import under_prefix
from stages.stage import Asset

SMOOTHING = 0.9  # of the running agreement by which a particle is chosen


class ParticleSettings(CoarseSettings):
    """Settings of the coarse stage without its guidance, and the number of its fields."""

    particles: int = Field(1, ge=1, le=16, description="fields optimised in turn under one guidance; they share steps")
    particle: int | None = Field(
        None, ge=0, description="which of several is handed on; none: the one the prior agrees with best"
    )


def make_coarse(
    settings: ParticleSettings,
    guidance: Guide | None,
    device: torch.device,
    seed: int,
    previous: Asset | None = None,
) -> CoarseStage | ParticleStage:
    """Return the coarse stage of these settings: of one field, or of several.

    Args:
        settings: of every field, and their number.
        guidance: see stages/guidance/guidance.py; None where the stage only loads and finishes.
        device: where fields and renders live.
        seed: of the first field.
        previous: see CoarseStage.
    Raises: UserError as CoarseStage and ParticleStage.
    """
    kind = CoarseStage if settings.particles == 1 else ParticleStage
    return kind(settings, guidance, device, seed, previous)


class ParticleStage:
    """A Stage (stages/stage.py) of several coarse stages that take its steps in turn, under one guidance.

    Args:
        settings: of every particle, and their number; `steps` counts the steps of all of them together.
        guidance: which the particles share; None where the stage only loads and finishes.
        device: where fields and renders live.
        seed: of the first particle; the others' follow from it.
        previous: see CoarseStage; all particles begin with it.
    Raises: UserError for steps that cannot be shared equally, and for a chosen particle that does not exist.

    Example:
        >>> stage = ParticleStage(ParticleSettings(steps=400, particles=2), guidance, torch.device("cpu"), seed=0)
    """

    name = "coarse"

    def __init__(
        self,
        settings: ParticleSettings,
        guidance: Guide | None,
        device: torch.device,
        seed: int,
        previous: Asset | None = None,
    ) -> None:
        n = settings.particles
        if settings.steps % n:
            raise UserError(
                "coarse.particles does not divide coarse.steps",
                f"{settings.steps} steps cannot be shared equally among {n} particles",
                f"set coarse.steps={settings.steps + n - settings.steps % n}",
            )
        if settings.particle is not None and settings.particle >= n:
            raise UserError(
                f"coarse.particle={settings.particle} is not there",
                f"there are {n} particles, counted from 0",
                f"choose 0 to {n - 1}, or leave it out to take the one the prior agrees with best",
            )
        self.settings, self.steps, self.times = settings, settings.steps, {}
        each = settings.model_copy(update={"steps": settings.steps // n})
        seeds = [(seed + 7919 * k) % 2**31 for k in range(n)]
        self.members = [CoarseStage(each, guidance, device, member_seed, previous) for member_seed in seeds]
        for member in self.members:
            member.times = self.times
        self.agreement = torch.full((n,), float("nan"), dtype=torch.float64)

    @property
    def step_index(self) -> int:
        """Steps taken by all particles."""
        return sum(member.step_index for member in self.members)

    def step(self) -> dict[str, float]:
        """Take a step of the particle whose turn it is; returns its metrics and its number."""
        k = self.step_index % len(self.members)
        metrics = self.members[k].step()
        if "agreement_db" in metrics:
            old, new = float(self.agreement[k]), metrics["agreement_db"]
            self.agreement[k] = new if old != old else SMOOTHING * old + (1 - SMOOTHING) * new
        return metrics | {"particle": float(k)}

    def headline(self, metrics: dict[str, float]) -> str:
        """Return the coarse stage's headline, and which particle it is of."""
        return f"particle {int(metrics['particle'])}: {self.members[0].headline(metrics)}"

    def preview(self) -> np.ndarray:
        """Return the particles' contact sheets, one below the other."""
        return np.concatenate([member.preview() for member in self.members])

    def state_dict(self) -> dict[str, Tensor]:
        """Return the particles' states by number, and once the guidance that they share."""
        state: dict[str, Tensor] = {"agreement": self.agreement.clone()}
        for k, member in enumerate(self.members):
            for key, value in member.state_dict().items():
                state[key if key.startswith("guidance.") else f"particle{k}.{key}"] = value
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over a state_dict, on a freshly constructed stage."""
        self.agreement = state["agreement"].clone()
        shared = {key: value for key, value in state.items() if key.startswith("guidance.")}
        for k, member in enumerate(self.members):
            member.load_state_dict(under_prefix(state, f"particle{k}") | shared)

    def finish(self) -> Asset:
        """Return the chosen particle's object, or the one that the prior agrees with best.

        Raises: UserError where that, or where none, is an object.
        """
        if self.settings.particle is not None:
            return self.members[self.settings.particle].finish()
        order = torch.nan_to_num(self.agreement, nan=float("-inf")).argsort(descending=True, stable=True).tolist()
        failed: UserError | None = None
        for k in order:
            try:
                return self.members[k].finish()
            except UserError as error:
                failed = failed or error
        raise UserError(f"No particle is an object; the best: {failed.what}", failed.why, failed.fix)
