"""The one table of prior sources: what `prior.coarse` and `prior.fine` can name. A new source is a class and a line.

    SOURCES["mine"] = MySource

is all that configuration, checks, runs, `pipeline models list` and `pipeline doctor` need. A key is the whole text of
a source, or its first part up to a colon where that says the kind (`clip:FOLDER`); the empty key stands for all others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pipeline.priors.clips import ClipSource
from pipeline.priors.exact import ReferenceSource
from pipeline.priors.folders import FolderSource
from pipeline.priors.objects import ObjectSource
from pipeline.priors.pocket import PocketSource
from pipeline.priors.source import Ask, Facts, Kept, PriorSource, RunSettings
from stages.errors import UserError
from stages.prompts import ViewPrompts

if TYPE_CHECKING:
    import torch

    from stages.guidance.guide import Guide
    from stages.guidance.prior import Prior

SOURCES: dict[str, type[PriorSource]] = {
    "pocket": PocketSource,
    "reference": ReferenceSource,
    "clip:": ClipSource,
    "python:": ObjectSource,
    "": FolderSource,
}


def parse_source(text: str) -> PriorSource:
    """Return what a text of the configuration stands for; it is checked by `facts`."""
    name, colon, _ = text.partition(":")
    return SOURCES.get(name + colon, SOURCES[""])(text)


def forms() -> tuple[str, ...]:
    """Return how the sources are written, one text a source."""
    return tuple(source.form for source in SOURCES.values() if source.form)


@dataclass(frozen=True)
class StagePrior:
    """A stage's prior, checked and not loaded: what it is asked, and what is known of it."""

    source: PriorSource
    ask: Ask
    facts: Facts

    def announce(self) -> str | None:
        """Return a line on what is downloaded by `fetched`; None for nothing."""
        return self.source.announce(self.ask, self.facts)

    def fetched(self) -> StagePrior:
        """Return the same with all its files on this machine. Raises: UserError where they cannot be had."""
        return replace(self, facts=self.source.fetch(self.ask, self.facts))

    def load(self, device: torch.device, *, keep_text: bool = False) -> Prior:
        """Return the diffusion prior alone, loaded; see PriorSource.load."""
        return self.source.load(self.ask, self.facts, device, keep_text=keep_text)

    def build(self, device: torch.device, kept: Kept | None = None) -> Guide:
        """Return prior, rule and prompts of the stage, loaded; its generator is seeded from the run's seed.

        kept: the priors of stages before, of which one that is the same is used again.
        """
        return self.source.build(self.ask, self.facts, device, kept or Kept())


def make_prompts(config: RunSettings) -> ViewPrompts:
    """Return the words by view of a run."""
    return ViewPrompts(config.prompt, config.negative, config.prompts)


def stage_prior(
    config: RunSettings, stage: str, prompts: ViewPrompts | None = None, prior: Prior | None = None
) -> StagePrior:
    """Return one stage's prior, of which nothing is known yet.

    Args:
        config: of the run.
        stage: its name.
        prompts: the run's words by view; None makes them.
        prior: the object that was handed in for the stage; None for none.
    """
    ask = Ask(stage, config, prompts or make_prompts(config), prior, forms())
    return StagePrior(parse_source(ask.source), ask, Facts())


def check_priors(
    config: RunSettings, stages: Sequence[str] | None = None, priors: Mapping[str, Prior] | None = None
) -> dict[str, StagePrior]:
    """Return the priors of a run by stage, checked before any work; nothing is loaded.

    Args:
        config: of the run.
        stages: those still to be taken; None: all of the run's.
        priors: objects that were handed in, by stage.
    Raises: UserError for priors that cannot be built and for what they cannot be asked.
    """
    prompts, priors = make_prompts(config), priors or {}
    checked: dict[str, StagePrior] = {}
    for stage in config.stages if stages is None else stages:
        prior = stage_prior(config, stage, prompts, priors.get(stage))
        ask, source = prior.ask, prior.source
        if ask.prior is not None and not isinstance(source, ObjectSource):
            raise UserError(
                f"a prior was handed in for {stage} and has no use",
                f"the run's config.yaml says prior.{stage} = {ask.source}",
                "leave it out, or start a new run with it",
            )
        checked[stage] = replace(prior, facts=source.facts(ask))
        if ask.lora is not None and not source.takes_lora:
            raise UserError(
                f"prior.lora does not go with prior.{stage}={ask.source}",
                "only diffusion priors that the run loads can be changed by a LoRA",
                "name the stages it is for: prior.lora_stages=fine",
            )
    _check_autoencoder(checked)
    _check_use(config, prompts)
    return checked


def notices(config: RunSettings, priors: Mapping[str, StagePrior]) -> list[str]:
    """Return what priors have to say, and what a stage of the run leaves aside that another one uses, a line each."""
    prompts = next(iter(priors.values())).ask.prompts
    unused = [
        f"{stage}: the negative prompt is not used at guidance.{stage}.scale=1"
        for stage in _without_negative(config, prompts)
    ]
    return [*dict.fromkeys(line for prior in priors.values() for line in prior.facts.notices), *unused]


def _check_use(config: RunSettings, prompts: ViewPrompts) -> None:
    """Refuse what was asked for and no stage of the run would use."""
    unused = _without_negative(config, prompts)
    if unused and len(unused) == len(config.stages):
        scales = ", ".join(f"guidance.{stage}.scale" for stage in unused)
        raise UserError(
            f'the negative prompt "{next(filter(None, prompts.negatives()))}" has no use here',
            "at guidance scale 1 a prior is asked for the prompt alone",
            f"raise {scales} above 1, or leave the negative prompt out",
        )
    if config.prior.lora is not None and not set(config.prior.lora_stages) & set(config.stages):
        mine, theirs = ",".join(config.stages), ",".join(config.prior.lora_stages) or "none"
        raise UserError(
            f"prior.lora has no use here: {config.prior.lora}",
            f"it is for the stages {theirs} and the run takes {mine}",
            f"leave it out, or name a stage that runs: prior.lora_stages={config.stages[0]}",
        )


def _without_negative(config: RunSettings, prompts: ViewPrompts) -> list[str]:
    """The stages that would not look at the negative prompt; none where there is no such prompt."""
    from stages.guidance.compatibility import uses_negative

    if not any(prompts.negatives()):
        return []
    return [stage for stage in config.stages if not uses_negative(getattr(config.guidance, stage))]


def _check_autoencoder(checked: Mapping[str, StagePrior]) -> None:
    """Another autoencoder that several stages take must not meet the latents of two kinds of model: SDXL's are of SD
    1.5's shape."""
    users: dict[str, dict[str, str]] = {}
    for stage, prior in checked.items():
        chosen = prior.ask.diffusion.autoencoder
        if chosen is not None and prior.facts.latents:
            users.setdefault(chosen, {})[stage] = prior.facts.latents
    for chosen, latents in users.items():
        if len(set(latents.values())) > 1:
            which = ", ".join(f"{stage}: {kind}" for stage, kind in latents.items())
            raise UserError(
                f"prior.diffusion.autoencoder = {chosen}",
                f"both stages would decode with it, and their latents differ ({which})",
                f"give it to the stage that it is for: prior.{next(iter(latents))}_diffusion.autoencoder={chosen}",
            )
