"""`python:NAME`: a prior object of a Python program.

`prior.coarse: python:NAME` in a run's config.yaml says that the stage listens to an object of that name. No file holds
it, so that whoever goes on with the run hands it in again.
"""

from __future__ import annotations

from typing import Any

from pipeline.priors.source import Ask, Facts, PriorSource
from stages.errors import UserError
from stages.guidance.prior import Prior

PREFIX = "python:"
_PROTOCOL = (*Prior.__annotations__, *(name for name in vars(Prior) if not name.startswith("_")))


class ObjectSource(PriorSource):
    """An object that meets stages.guidance.prior.Prior, used as it is."""

    def facts(self, ask: Ask) -> Facts:
        """Refuse a run whose object is missing, is another one, or does not fit the stage's guidance."""
        from stages.guidance.compatibility import PriorDescription, check_compatibility

        name, prior = self.text.removeprefix(PREFIX), ask.prior
        if prior is None:
            raise UserError(
                f"prior.{ask.stage} = {self.text} is missing",
                f"the stage listens to an object {name!r} of a Python program, which no file holds",
                f"hand it in again: resume(FOLDER, prior={{{ask.stage!r}: OBJECT}}), or generate(..., prior=...) for a "
                "new run",
            )
        if source_of(prior) != self.text:
            raise UserError(
                f"the prior for {ask.stage} is called {prior.name!r}",
                f"the run listens to one called {name!r}",
                "hand in that one",
            )
        check_compatibility(prior, ask.guidance, ask.prompts)
        return Facts(PriorDescription(prior.name, prior.prediction, prior.data_range, prior.reads_prompts))


def source_of(prior: Prior) -> str:
    """Return what the configuration calls a prior object."""
    return f"{PREFIX}{prior.name}"


def check_protocol(stage: str, prior: Any) -> None:
    """Raise UserError for an object that is no stages.guidance.prior.Prior."""
    absent = [name for name in _PROTOCOL if not hasattr(prior, name)]
    if absent:
        raise UserError(
            f"the prior for {stage} cannot be used: {prior!r:.80}",
            f"it has no {', '.join(absent)}",
            "hand in an object with all that stages.guidance.prior.Prior names, or a source such as 'pocket'",
        )
