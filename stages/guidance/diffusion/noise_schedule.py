"""The noise schedule of a diffusers folder, read from its scheduler's config and never assumed.

Two kinds: discrete variance-preserving ones (DDPM and its samplers: epsilon, v or sample prediction), whose classes
compute alphas_cumprod themselves; and rectified flow, x_t = (1 - sigma) x + sigma eps with velocity eps - x (Liu et
al., arXiv 2209.03003), whose T noise levels are sigma_k = shift(k / T), k = 1..T, given to the network as 1000 sigma.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stages.errors import UserError
from stages.guidance.diffusion.folder import load_part
from stages.guidance.prior import PREDICTIONS, path_alphas_cumprod

FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")


@dataclass(frozen=True)
class NoiseSchedule:
    """T noise levels, the lowest first, and what the network predicts at them.

    Args:
        alphas_cumprod: [T] on the CPU, decreasing; float64 for flows, whose 1 - alphas_cumprod is small at the start.
        prediction: one of PREDICTIONS.
        timesteps: [T] the network's time input, integers or 1000 sigma.
    """

    alphas_cumprod: Tensor
    prediction: str
    timesteps: Tensor

    @property
    def flow(self) -> bool:
        return self.prediction == "flow_prediction"


def load_schedule(folder: Path, class_name: str, image_tokens: int) -> NoiseSchedule:
    """Load the schedule of a folder's scheduler/.

    Args:
        folder: of the model.
        class_name: of the scheduler.
        image_tokens: of one image at the prior's resolution, which moves the noise levels of flows with dynamic
            shifting (Flux).
    Raises: UserError for a damaged or unsupported one.
    """
    import diffusers

    what = f"Cannot load the scheduler of {folder}"
    kind = getattr(diffusers, class_name, None)
    if kind is None:
        raise UserError(what, f"this diffusers has no {class_name}", "update diffusers")
    scheduler = load_part(
        folder, "scheduler", lambda: kind.from_pretrained(folder / "scheduler", local_files_only=True)
    )
    if class_name in FLOW:
        return _checked(_flow(scheduler, image_tokens, what), what)
    alphas_cumprod = getattr(scheduler, "alphas_cumprod", None)
    prediction = scheduler.config.get("prediction_type")
    if alphas_cumprod is None or prediction not in PREDICTIONS[:3]:
        raise UserError(
            what,
            f"{class_name} with prediction type {prediction!r} is neither a discrete variance-preserving schedule "
            "nor a rectified flow that we know",
            f"use a model with one of {', '.join(PREDICTIONS[:3])}, or with {FLOW[0]}",
        )
    alphas_cumprod = torch.as_tensor(alphas_cumprod).detach().float().cpu().clone()
    return _checked(NoiseSchedule(alphas_cumprod, prediction, torch.arange(alphas_cumprod.numel())), what)


def _checked(schedule: NoiseSchedule, what: str) -> NoiseSchedule:
    """The schedule itself. Raises: UserError where its levels are no shares of a picture, grow, or add no noise."""
    levels = schedule.alphas_cumprod
    if levels.numel() < 2:
        raise UserError(what, f"its config gives {levels.numel()} noise levels", "get the folder again")
    if not bool(((levels >= 0) & (levels <= 1)).all() and (levels.diff() <= 0).all() and levels[-1] < 1):
        why = f"its noise levels do not fall within 1 and 0: alpha_bar from {levels[0]:.4g} to {levels[-1]:.4g}"
        raise UserError(what, why, "get the folder again")
    return schedule


def _flow(scheduler: Any, image_tokens: int, what: str) -> NoiseSchedule:
    config = scheduler.config
    if config.get("invert_sigmas"):
        raise UserError(what, "its sigmas run backwards (invert_sigmas)", "use a model whose noise grows with t")
    sigmas = scheduler.sigmas.detach().double().cpu().flip(0)  # the largest comes first there
    if config.get("use_dynamic_shifting"):
        sigmas = scheduler.time_shift(dynamic_shift(config, image_tokens), 1.0, sigmas)
    total = config.num_train_timesteps
    return NoiseSchedule(path_alphas_cumprod(1 - sigmas, sigmas), "flow_prediction", (sigmas * total).float())


def dynamic_shift(config: Any, image_tokens: int) -> float:
    """Return mu, linear in the image's tokens between the config's base and maximum (Stable Diffusion 3 sec. 5.3.2)."""
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    first, last = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return first + (last - first) * (image_tokens - low) / (high - low)
