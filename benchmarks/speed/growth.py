"""How a step's time grows with what it works on: the stages themselves, one size changed at a time.

The prior's networks are replaced by a stand-in that costs nothing (or are the pocket prior's, which cost the same at
every size), so what grows is our own work. Steps are taken in turn over all sizes of a sweep, at the middle of a stage,
always with shaded renders, which cost the most. Learning rates of nearly zero keep the scene as it is.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import Timing
from pipeline import Config, load_config, load_prior
from pipeline.priors.sources import make_prompts
from stages import STAGES, CoarseStage, FineStage, Guidance
from stages.guidance.guide import Guide
from stages.guidance.prior import ViewContext, resized, scaled_linear_alphas_cumprod
from stages.phases import Recorder, phase, recording

Stage = CoarseStage | FineStage
WARM = 2  # steps before the first measured one
STILL = 1e-12  # learning rate
COMMON = {
    "coarse": [
        "coarse.steps=1000", f"coarse.lr={STILL}", f"coarse.lr_background={STILL}", "coarse.shading.albedo_until=0",
        "coarse.shading.diffuse_probability=1", "coarse.shading.textureless_probability=0",
        "coarse.occupancy.every=1000000",
    ],
    "fine": [
        "fine.steps=1000", f"fine.lr_sdf={STILL}", f"fine.lr_offset={STILL}", f"fine.lr_texture={STILL}",
        "fine.shading.albedo_until=0", "fine.shading.diffuse_probability=1", "fine.shading.textureless_probability=0",
    ],
}  # fmt: skip
STEADY = ["coarse.cameras.distance=[3.2,3.2]", "coarse.cameras.fov_deg=[40,40]", "coarse.cameras.jitter_position=0",
          "coarse.cameras.jitter_target=0"]  # fmt: skip


class StandIn:
    """A prior without networks: images shrunk to the size of latents, and noise that is half of what it is shown."""

    name = "stand-in"
    prediction = "epsilon"
    reads_prompts = False
    reads_t_anywhere = False
    data_range = (-1.0, 1.0)

    def __init__(self, resolution: int, factor: int) -> None:
        self.resolution, self._factor = resolution, factor
        self.alphas_cumprod = scaled_linear_alphas_cumprod()

    def embed(self, prompts: list[str]) -> Tensor:
        return torch.zeros(len(prompts), 1)

    def encode(self, images: Tensor, generator: torch.Generator) -> Tensor:
        return F.avg_pool2d(resized(images.permute(0, 3, 1, 2) * 2 - 1, self.resolution), self._factor)

    def decode(self, x: Tensor) -> Tensor:
        return F.interpolate(x / 2 + 0.5, scale_factor=self._factor).permute(0, 2, 3, 1).clamp(0, 1)

    def predict_noise(self, z_t: Tensor, t: Tensor, embedding: Any, context: ViewContext) -> Tensor:
        return 0.5 * z_t


STAND_INS = {"coarse": (64, 1), "fine": (512, 8)}  # pixels a side, and of a latent, as the pocket priors'


@dataclass(frozen=True)
class Sweep:
    """One size of a stage: `settings(value)` are overrides of the default recipe, `prepare` changes the made stage."""

    stage: str
    name: str
    label: str
    values: tuple[float, ...]
    quick: tuple[float, ...]
    settings: Callable[[float], list[str]]
    linear: bool = False  # whether a straight line is expected, or a power
    prepare: Callable[[Stage, float], None] | None = None


def fill_ball(stage: Stage, share: float) -> None:
    """Make the cells of a ball about the origin the occupied ones; the ball takes `share` of the box."""
    radius = (share * 8 * 3 / (4 * torch.pi)) ** (1 / 3)
    g = len(stage.occupancy.cells)
    centres = (torch.arange(g) + 0.5) * (2 / g) - 1
    x, y, z = torch.meshgrid(centres, centres, centres, indexing="ij")
    stage.occupancy.cells.copy_((x * x + y * y + z * z < radius**2).to(torch.uint8))


def _whole(value: float) -> int:
    return int(value)


SWEEPS = (
    Sweep(
        "coarse", "occupied", "occupied share of the box", (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3), (0.05, 0.2),
        lambda v: [*STEADY, "coarse.early_stop=0", "coarse.min_optical_depth=0"], linear=True, prepare=fill_ball,
    ),
    Sweep(
        "coarse", "pixels", "pixels a side, one view", (64, 128, 256, 512), (16, 32),
        lambda v: [f"coarse.resolution={_whole(v)}", "coarse.views_per_step=1"],
    ),
    Sweep(
        "coarse", "samples", "sampling steps along the diagonal", (40, 80, 160, 320), (24, 48),
        lambda v: [f"coarse.samples={_whole(v)}"],
    ),
    Sweep(
        "coarse", "table", "log2 of a hash level's rows", (13, 15, 17, 19), (10, 12),
        lambda v: [f"coarse.field.log2_table={_whole(v)}"],
    ),
    Sweep(
        "fine", "tets", "cells of the lattice a side, at 64x64 pixels", (32, 48, 64, 96, 128, 192), (8, 12),
        lambda v: [f"fine.tets={_whole(v)}", "fine.resolution=64"],
    ),
    Sweep(
        "fine", "pixels", "pixels a side, one view", (64, 128, 256, 512, 1024), (16, 32),
        lambda v: [f"fine.resolution={_whole(v)}"],
    ),
)  # fmt: skip
QUICK = {
    "coarse": ["coarse.resolution=16", "coarse.samples=24", "coarse.occupancy.resolution=16", "coarse.field.levels=4",
               "coarse.field.log2_table=10", "coarse.field.finest=32"],
    "fine": ["fine.resolution=32", "fine.tets=8", "fine.field.levels=4", "fine.field.log2_table=10",
             "fine.field.finest=32", "fine.detail.levels=1", "fine.detail.log2_table=10", "fine.detail.finest=64"],
}  # fmt: skip


def make(sweep: Sweep, value: float, device: torch.device, networks: str, quick: bool = False) -> Stage:
    """Return a stage of this size in the middle of its course, before its first step.

    Args:
        sweep: what changes.
        value: the size.
        device: where stage and prior live.
        networks: of the prior, "none" for the stand-in, or "pocket".
        quick: whether everything else is small.
    """
    overrides = [*COMMON[sweep.stage], *(QUICK[sweep.stage] if quick else []), *sweep.settings(value)]
    config = load_config(None, overrides, {})
    guidance = guidance_of(config, sweep.stage, device, networks)
    stage = STAGES[sweep.stage].make(getattr(config, sweep.stage), guidance, device, config.seed, None)
    stage.step_index = stage.steps // 2
    if sweep.prepare is not None:
        sweep.prepare(stage, value)
    return stage


def guidance_of(config: Config, stage: str, device: torch.device, networks: str) -> Guide:
    """Return the recipe's guidance under the stand-in or the pocket prior; `networks` as for make."""
    stand_in = networks == "none"
    prior = StandIn(*STAND_INS[stage]) if stand_in else load_prior("pocket", stage=stage, device=device)
    prompts = make_prompts(config)
    generator = torch.Generator().manual_seed(config.seed)
    return Guidance(prior, getattr(config.guidance, stage), prompts, generator)


def run_sweep(
    sweep: Sweep, *, device: torch.device, networks: str = "none", runs: int = 5, quick: bool = False
) -> list[dict[str, Any]]:
    """Take steps at all sizes in turn; a result for each.

    Returns: value, step_ms with quartiles, runs, phases_ms (medians, by the step's outermost phases) and facts: what a
        step worked on (samples, faces, ...).
    """
    wait = torch.cuda.synchronize if device.type == "cuda" else None
    values = sweep.quick if quick else sweep.values
    stages = {value: make(sweep, value, device, networks, quick) for value in values}
    steps: dict[float, list[tuple[float, dict[str, float]]]] = {value: [] for value in values}
    facts: dict[float, dict[str, float]] = {}
    for k in range(WARM + runs):
        for value, stage in stages.items():
            listener = Recorder(wait)
            with recording(listener), phase("step"):
                metrics = stage.step()
            spans = listener.spans
            if k >= WARM:
                split = {path[1]: span.seconds for path, span in spans.items() if len(path) == 2}
                steps[value].append((spans["step",].seconds, split))
            facts[value] = facts_of(stage, metrics)
    return [{"value": value, **_result(steps[value]), "facts": facts[value]} for value in values]


def _result(steps: list[tuple[float, dict[str, float]]]) -> dict[str, Any]:
    timing = Timing(tuple(seconds for seconds, _ in steps))
    low, high = timing.quartiles_s
    names = dict.fromkeys(name for _, split in steps for name in split)
    phases = {name: 1e3 * statistics.median(split.get(name, 0.0) for _, split in steps) for name in names}
    return {
        "step_ms": round(1e3 * timing.median_s, 3),
        "ms_low": round(1e3 * low, 3),
        "ms_high": round(1e3 * high, 3),
        "runs": len(steps),
        "phases_ms": {name: round(ms, 3) for name, ms in phases.items()},
    }


def facts_of(stage: Stage, metrics: dict[str, float]) -> dict[str, float]:
    """Return what a step worked on: rays, samples, faces and the like."""
    s = stage.settings
    facts = {"rays": s.views_per_step * s.resolution**2}
    if isinstance(stage, CoarseStage):
        return facts | {
            "samples": metrics["samples"],
            "occupied": round(stage.occupancy.share, 5),
            "table_rows": stage.field.spec.rows,
        }
    return facts | {"faces": metrics["faces"], "band_vertices": len(stage.geometry.dmtet.sdf)}
