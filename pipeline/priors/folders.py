"""A diffusers folder or a hub id: whatever no other source of the table is called.

A folder must be whole, read the prompts without cutting them and fit the LoRA; so must a hub id's, once it is on this
machine. What is still to be fetched must be had.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.priors.source import Ask, Facts, Offer, PriorSource, check_guidance
from stages.errors import UserError
from stages.paths import from_home

if TYPE_CHECKING:
    import torch

    from stages.guidance.diffusion.plan import Plan
    from stages.guidance.prior import Prior


class FolderSource(PriorSource):
    """A model of the diffusers library."""

    form = "a diffusers folder or a hub id"
    takes_lora = True

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.path = from_home(text)

    def anchored(self) -> str:
        return str(self.path.absolute()) if self.path.is_dir() else self.text

    def reads(self, stage: str) -> list[str]:
        return [f"guidance.{stage}", "prior.diffusion"]

    def facts(self, ask: Ask) -> Facts:
        from stages.guidance.compatibility import PIXELS, PriorDescription
        from stages.guidance.diffusion.families import family_of
        from stages.guidance.diffusion.folder import cached, check_hub

        path, settings = self.path, ask.config.prior.diffusion
        folder = path
        if not path.is_dir():
            folder = None if path.exists() else cached(self.text, settings.revision, settings.variant)
        if folder is not None:
            plan = _plan(folder, ask)
            space = None if "vae" in plan.classes else PIXELS
            description = PriorDescription(path.name or self.text, plan.schedule.prediction, space)
            check_guidance(ask, description)
            return Facts(description, plan.family.name if "vae" in plan.classes else "", plan)
        if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", self.text) or self.text.startswith("."):
            raise self._unknown(ask)
        family, parts = family_of(check_hub(self.text, settings.revision))
        latent = "vae" in parts
        description = PriorDescription(path.name, data_range=None if latent else PIXELS)
        check_guidance(ask, description)
        return Facts(description, family.name if latent else "")

    def _unknown(self, ask: Ask) -> UserError:
        others = [form for form in ask.forms if form != self.form]
        near = difflib.get_close_matches(self.text, [word for form in others for word in form.split(", ")], 1)
        return UserError(
            f"prior.{ask.stage} = {self.text}",
            f"it is neither {', '.join(others)}, a folder nor a hub id of the form owner/name",
            f"did you mean {near[0]}?" if near else "check the path, relative to where you stand",
        )

    def fetch(self, ask: Ask, facts: Facts) -> Facts:
        from stages.guidance.diffusion.folder import locate

        if facts.plan is not None:
            return facts
        settings = ask.config.prior.diffusion
        return replace(facts, plan=_plan(locate(self.text, settings.revision, settings.variant), ask))

    def load(self, ask: Ask, facts: Facts, device: torch.device, *, keep_text: bool = False) -> Prior:
        from stages.guidance.diffusion.prior import load_prior

        settings, texts = ask.config.prior.diffusion, None if keep_text else ask.texts
        return load_prior(self.text, device, settings=settings, prompts=texts, lora=ask.lora, plan=facts.plan)

    def savings(self, ask: Ask) -> list[str]:
        """In the order of what they save on the known models, by stages.guidance.diffusion.footprint: the autoencoder's
        blocks repeated (half a gigabyte), the denoiser's weights in main memory (1.7 GB to 24 GB); then what costs
        quality."""
        from stages.guidance.residuals import RULES

        settings, rule = ask.config.prior.diffusion, ask.guidance.rule
        trained = "trainable" in RULES[rule.name].needs  # it trains the prior, or a copy of it
        copied = trained and rule.model == "copy"
        latent = not self.path.is_dir() or (self.path / "vae").is_dir()
        chosen = (
            ("vae_checkpointing", "true", latent and not settings.vae_checkpointing),
            ("offload", "blocks", settings.offload != "blocks" and not trained),
            ("max_batch", "1", settings.max_batch != 1),
            ("dtype", "bfloat16", settings.dtype not in ("float16", "bfloat16") and not copied),
        )
        return [f"prior.diffusion.{name}={value}" for name, value, useful in chosen if useful]

    @classmethod
    def offers(cls) -> list[Offer]:
        from stages.guidance.diffusion.presets import PRESETS

        return [
            Offer(
                preset.id,
                preset.family,
                preset.stages,
                str(preset.resolution),
                f"{preset.stay_gb:g} + {preset.text_gb:g}",
                preset.licence,
                preset.status,
                preset.instead,
            )
            for preset in PRESETS
        ]


def _plan(folder: Path, ask: Ask) -> Plan:
    from stages.guidance.diffusion.plan import make_plan

    return make_plan(folder, ask.config.prior.diffusion, ask.texts, ask.lora)
