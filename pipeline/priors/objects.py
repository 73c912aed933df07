"""A prior object handed in from Python, in the place of a source.

`prior.coarse: python:NAME` in a run's config.yaml says that the stage listens to an object of that name. No file holds
it, so that whoever goes on with the run hands it in again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pipeline.config.model import PYTHON_PREFIX
from stages.errors import UserError
from stages.guidance.prior import Prior

if TYPE_CHECKING:
    from pipeline.config.model import Config

_PROTOCOL = (*Prior.__annotations__, *(name for name in vars(Prior) if not name.startswith("_")))


def is_object_source(source: str) -> bool:
    """Whether a prior's source stands for an object of a Python program."""
    return source.startswith(PYTHON_PREFIX)


def source_of(prior: Prior) -> str:
    """What the configuration calls a prior object."""
    return f"{PYTHON_PREFIX}{prior.name}"


def check_protocol(stage: str, prior: Any) -> None:
    """Raise UserError for an object that is no stages.guidance.prior.Prior."""
    absent = [name for name in _PROTOCOL if not hasattr(prior, name)]
    if absent:
        raise UserError(
            f"the prior for {stage} cannot be used: {prior!r:.80}",
            f"it has no {', '.join(absent)}",
            "hand in an object with all that stages.guidance.prior.Prior names, or a source such as 'pocket'",
        )


def check_object(config: Config, stage: str, priors: Mapping[str, Prior]) -> None:
    """Refuse, before any work, a run whose object is missing, is another one, or does not fit the stage's guidance."""
    from stages.guidance.compatibility import check_fit
    from stages.prompts import ViewPrompts

    source, name = getattr(config.prior, stage), getattr(config.prior, stage).removeprefix(PYTHON_PREFIX)
    if stage not in priors:
        raise UserError(
            f"prior.{stage} = {source} is missing",
            f"the stage listens to an object {name!r} of a Python program, which no file holds",
            f"hand it in again: resume(FOLDER, prior={{{stage!r}: OBJECT}}), or generate(..., prior=...) for a new run",
        )
    if source_of(priors[stage]) != source:
        raise UserError(
            f"the prior for {stage} is called {priors[stage].name!r}",
            f"the run listens to one called {name!r}",
            "hand in that one",
        )
    check_fit(
        priors[stage], getattr(config.guidance, stage), ViewPrompts(config.prompt, config.negative, config.prompts)
    )


def check_no_object(config: Config, stage: str, priors: Mapping[str, Prior]) -> None:
    """Refuse an object for a stage that listens to a source."""
    if stage in priors:
        raise UserError(
            f"a prior was handed in for {stage} and has no use",
            f"the run's config.yaml says prior.{stage} = {getattr(config.prior, stage)}",
            "leave it out, or start a new run with it",
        )
