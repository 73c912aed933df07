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
        return [f"guidance.{stage}", "prior.diffusion", f"prior.{stage}_diffusion"]

    def facts(self, ask: Ask) -> Facts:
        from stages.guidance.compatibility import PIXELS, PriorDescription
        from stages.guidance.diffusion.hub import cached, check_hub

        path, settings = self.path, ask.diffusion
        folder = path
        if not path.is_dir():
            folder = None if path.exists() else cached(self.text, *_wishes(ask))
        here = folder is not None
        if not here:
            if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", self.text) or self.text.startswith("."):
                raise self._unknown(ask)
            folder = check_hub(self.text, settings.revision)
        plan = _plan(folder, ask, weights=here)
        latent = "vae" in plan.classes
        description = PriorDescription(path.name or self.text, plan.schedule.prediction, None if latent else PIXELS)
        check_guidance(ask, description)
        return Facts(description, plan.family.name if latent else "", plan if here else None)

    def _unknown(self, ask: Ask) -> UserError:
        others = [form for form in ask.forms if form != self.form]
        near = difflib.get_close_matches(self.text, [word for form in others for word in form.split(", ")], 1)
        return UserError(
            f"prior.{ask.stage} = {self.text}",
            f"it is neither {', '.join(others)}, a folder nor a hub id of the form owner/name",
            f"did you mean {near[0]}?" if near else "check the path, relative to where you stand",
        )

    def announce(self, ask: Ask, facts: Facts) -> str | None:
        """Return what will be downloaded; of a folder that is here, the parts that lack the variant asked for."""
        from stages.guidance.diffusion.hub import download_note
        from stages.guidance.diffusion.settings import AUTO

        variant = ask.diffusion.variant
        if facts.plan is None:
            return download_note(self.text, *_wishes(ask))
        lacking = [part for part, stored in facts.plan.variants.items() if variant not in (None, AUTO, stored)]
        return f"no {variant} files of {', '.join(lacking)}: the plain ones are loaded" if lacking else None

    def fetch(self, ask: Ask, facts: Facts) -> Facts:
        from stages.guidance.diffusion.hub import locate

        if facts.plan is not None:
            return facts
        return replace(facts, plan=_plan(locate(self.text, *_wishes(ask)), ask))

    def key(self, ask: Ask) -> object:
        return self.anchored(), ask.loading

    def load(self, ask: Ask, facts: Facts, device: torch.device, *, keep_text: bool = False) -> Prior:
        from stages.guidance.diffusion.prior import load_prior

        settings, texts = ask.diffusion, None if keep_text else ask.texts
        return load_prior(self.text, device, settings=settings, prompts=texts, lora=ask.lora, plan=facts.plan)

    def savings(self, ask: Ask) -> list[str]:
        """In the order of what they save on the known models, by stages.guidance.diffusion.footprint: the autoencoder's
        blocks repeated (half a gigabyte), the denoiser's weights in main memory (1.7 GB to 24 GB); then what costs
        quality."""
        from stages.guidance.residuals import RULES

        settings, rule = ask.diffusion, ask.guidance.rule
        trained = "trainable" in RULES[rule.name].needs  # it trains the prior, or a copy of it
        copied = trained and rule.model == "copy"
        latent = not self.path.is_dir() or (self.path / "vae").is_dir()
        chosen = (
            ("vae_checkpointing", "true", latent and not settings.vae_checkpointing),
            ("offload", "blocks", settings.offload != "blocks" and not trained),
            ("max_batch", "1", settings.max_batch != 1),
            ("dtype", "bfloat16", settings.dtype not in ("float16", "bfloat16") and not copied),
        )
        group = f"prior.{ask.stage}_diffusion" if ask.config.prior.changes(ask.stage) else "prior.diffusion"
        return [f"{group}.{name}={value}" for name, value, useful in chosen if useful]

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


def _wishes(ask: Ask) -> tuple[str | None, str | None, bool]:
    """Revision and variant of a hub id's files, and whether its networks run in half precision."""
    from stages.guidance.diffusion.plan import network_dtype

    settings = ask.diffusion
    return settings.revision, settings.variant, network_dtype(settings, None, ask.device).itemsize == 2


def _plan(folder: Path, ask: Ask, weights: bool = True) -> Plan:
    from stages.guidance.diffusion.plan import make_plan

    lora = ask.lora if weights else None  # its fit is read off the headers of the weights
    return make_plan(folder, ask.diffusion, ask.texts, lora, device=ask.device, weights=weights)
