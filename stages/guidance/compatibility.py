"""Which rule and cure fits which prior: what does not ends here, in the user's terms, before any step.

It is asked twice: before any work, of what a folder says of itself (:class:`Described`), so that a run does not end
after its coarse stage; and of the prior itself once it is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass

from stages.errors import UserError
from stages.guidance.prior import Prior
from stages.guidance.residuals import RULES
from stages.guidance.settings import GuidanceSettings
from stages.guidance.vsd import check_trainable
from stages.prompts import ViewPrompts

WORDLESS = {  # why a rule with this need has no use for a prior that reads no prompts
    "words": "it distils the difference that the prompt makes",
    "trainable": "it needs a network that learns",
}
PIXELS = (-1.0, 1.0)


@dataclass(frozen=True)
class Described:
    """A prior that is not loaded yet: what :func:`check_described` reads of it.

    Defaults are for what is not known, such as of a hub id that is still to be fetched: they rule nothing out.
    """

    name: str
    prediction: str = "epsilon"
    data_range: tuple[float, float] | None = PIXELS
    reads_prompts: bool = True


def _check_wordless(settings: GuidanceSettings, prompts: ViewPrompts, name: str) -> None:
    """Refuse what has no meaning with a prior that reads no prompts, such as the reference prior called `name`."""
    for need, why in WORDLESS.items():
        if need in RULES[settings.rule.name].needs:
            fitting = [other for other, rule in RULES.items() if not rule.needs & WORDLESS.keys()]
            raise UserError(
                f"rule={settings.rule.name} does not fit the prior {name}",
                f"{why}, and this prior reads no prompt",
                f"use rule={', '.join(fitting[:-1])} or {fitting[-1]} with it",
            )
    if prompts.settings.blend != "classes":
        raise UserError(
            f"prompts.blend={prompts.settings.blend} does not fit the prior {name}",
            "it mixes the texts of views, and this prior reads no prompt",
            "set prompts.blend=classes",
        )


def check_fit(prior: Prior, settings: GuidanceSettings, prompts: ViewPrompts) -> None:
    """Raise UserError for a rule or cure that cannot work with this loaded prior or these prompts."""
    check_described(prior, settings, prompts)
    if "trainable" in RULES[settings.rule.name].needs:
        check_trainable(prior, settings.rule)


def check_described(prior: Prior | Described, settings: GuidanceSettings, prompts: ViewPrompts) -> None:
    """As :func:`check_fit`, as far as the settings and what :class:`Described` holds say."""
    name, rule = settings.rule.name, RULES[settings.rule.name]
    if not prior.reads_prompts:
        _check_wordless(settings, prompts, prior.name)
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
    """Whether a stage so guided asks for the negative prompt: at scale 1 only the rules that have a term of their own
    for it do."""
    return settings.scale != 1 or RULES[settings.rule.name].contrast


def data_range(prior: Prior | Described, settings: GuidanceSettings) -> tuple[float, float] | None:
    """The range x0_hat is brought back to, None without a threshold; UserError where the prior's range is not known."""
    if settings.threshold == "none":
        return None
    found = settings.threshold_range or prior.data_range
    if found is None:
        raise UserError(
            f"threshold={settings.threshold} does not fit the prior {prior.name}",
            "its data are latents, whose range is not stated",
            "give threshold_range=[LOW, HIGH] beside it, or set threshold=none for this stage",
        )
    return found
