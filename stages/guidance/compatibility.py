"""Checks that a rule and its settings work with a prior and the prompts, before any step.

They are made twice: before any work, on the description of a prior that is not loaded (:class:`PriorDescription`), so
that a run does not end after its coarse stage; and on the prior itself once it is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass

from stages.errors import UserError
from stages.guidance.prior import Prior
from stages.guidance.residuals import RULES
from stages.guidance.settings import GuidanceSettings
from stages.guidance.vsd import check_trainable
from stages.prompts import ViewPrompts

NEEDS_PROMPTS = {  # why a rule with this need does not work with a prior that reads no prompts
    "words": "it distils the difference that the prompt makes",
    "trainable": "it needs a network that learns",
}
PIXELS = (-1.0, 1.0)


@dataclass(frozen=True)
class PriorDescription:
    """The facts about a prior that is not loaded yet, for :func:`check_description`.

    The defaults stand for what is not known, such as of a hub id that is still to be fetched: they rule nothing out.

    Args:
        name: as messages call it.
        prediction: of PREDICTIONS.
        data_range: of x; None where it is not known.
        reads_prompts: whether its predictions depend on the prompt.
    """

    name: str
    prediction: str = "epsilon"
    data_range: tuple[float, float] | None = PIXELS
    reads_prompts: bool = True


def _check_without_prompts(settings: GuidanceSettings, prompts: ViewPrompts, name: str) -> None:
    """Refuse what has no meaning with a prior called `name` that reads no prompts."""
    for need, why in NEEDS_PROMPTS.items():
        if need in RULES[settings.rule.name].needs:
            usable = [other for other, rule in RULES.items() if not rule.needs & NEEDS_PROMPTS.keys()]
            raise UserError(
                f"rule={settings.rule.name} does not fit the prior {name}",
                f"{why}, and this prior reads no prompt",
                f"use rule={', '.join(usable[:-1])} or {usable[-1]} with it",
            )
    if prompts.settings.blend != "classes":
        raise UserError(
            f"prompts.blend={prompts.settings.blend} does not fit the prior {name}",
            "it mixes the texts of views, and this prior reads no prompt",
            "set prompts.blend=classes",
        )


def check_compatibility(prior: Prior, settings: GuidanceSettings, prompts: ViewPrompts) -> None:
    """Raise UserError for a rule or setting that does not work with this loaded prior or these prompts."""
    check_description(prior, settings, prompts)
    if "trainable" in RULES[settings.rule.name].needs:
        check_trainable(prior, settings.rule)


def check_description(prior: Prior | PriorDescription, settings: GuidanceSettings, prompts: ViewPrompts) -> None:
    """Raise UserError as :func:`check_compatibility`, from the settings and a description alone."""
    name, rule = settings.rule.name, RULES[settings.rule.name]
    if not prior.reads_prompts:
        _check_without_prompts(settings, prompts, prior.name)
    if "invertible" in rule.needs and prior.prediction == "sample":
        raise UserError(
            f"rule={name} does not fit the prior {prior.name}",
            "its inversion starts at the clean image, where noise cannot be read off the clean image that this prior "
            "predicts (prediction type sample): an error in x0 counts 1 / sigma times, about 30",
            "use a prior that predicts epsilon, v or flow, or rule=sds or csd",
        )
    if "negative" in rule.needs and not any(prompts.negatives()):
        raise UserError(
            f"rule={name} has no negative prompt",
            "it tells the model's own bias by a prompt of bad pictures; without one it is csd but at low noise",
            'give one, such as negative="blurry, low quality", or use rule=csd',
        )
    if prompts.settings.blend == "perp_neg" and not uses_negative(settings):
        raise UserError(
            "prompts.blend=perp_neg does not fit scale=1",
            "Perp-Neg turns the direction of guidance, and at scale 1 there is none",
            "raise the guidance scale, or set prompts.blend=interpolated",
        )
    data_range(prior, settings)


def uses_negative(settings: GuidanceSettings) -> bool:
    """Return whether these settings read the negative prompt: at scale 1 only rules with a term for it do."""
    return settings.scale != 1 or RULES[settings.rule.name].contrast


def data_range(prior: Prior | PriorDescription, settings: GuidanceSettings) -> tuple[float, float] | None:
    """Return the range that x0_hat is clamped to; None without a threshold.

    Raises: UserError where the prior's range is not known.
    """
    if settings.threshold == "none":
        return None
    limits = settings.threshold_range or prior.data_range
    if limits is None:
        raise UserError(
            f"threshold={settings.threshold} does not fit the prior {prior.name}",
            "its data are latents, whose range is not stated",
            "give threshold_range=[LOW, HIGH] beside it, or set threshold=none for this stage",
        )
    return limits
