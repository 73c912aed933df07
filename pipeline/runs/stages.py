"""The stages by name. Called as an attribute of this module, so that tests put others in their place once for all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from pipeline.config.model import Config
    from stages.stage import Asset, Stage


def check_stages(config: Config) -> None:
    """Raise UserError, before any work, for what a stage of a run has no networks for or cannot draw."""
    from stages.kinds import STAGES

    for name in config.stages:
        STAGES[name].check(getattr(config, name), config.prompt)


def make_stage(
    name: str, settings: Any, guidance: Any, device: torch.device, seed: int, previous: Asset | None
) -> Stage:
    """Make the stage of that name. Weights drawn from torch's global generators are fixed by the seed as well."""
    import torch

    from stages.kinds import STAGES

    torch.default_generator.manual_seed(seed)  # manual_seed would reach for the GPU's on a CPU's run as well
    if torch.device(device).type == "cuda":
        torch.cuda.manual_seed(seed)
    return STAGES[name].make(settings, guidance, device, seed, previous)
