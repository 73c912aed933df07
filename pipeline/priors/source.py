"""The interface of the sources in the table of sources.py, which `prior.coarse` and `prior.fine` name.

A source is asked twice for each stage of a run. `facts` checks it before any work, loading nothing; what it learnt is
kept, and handed to `build` when the stage begins.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from stages.errors import UserError

if TYPE_CHECKING:
    import torch

    from stages.guidance.compatibility import PriorDescription
    from stages.guidance.diffusion.lora import Lora
    from stages.guidance.diffusion.plan import Plan
    from stages.guidance.diffusion.settings import DiffusionSettings
    from stages.guidance.guide import Guide
    from stages.guidance.prior import Prior
    from stages.prompts import ViewPrompts


class RunSettings(Protocol):
    """The part of a run's configuration that a source reads; the groups have an entry for each stage."""

    prompt: str
    negative: str
    seed: int
    device: str
    force: bool
    stages: list[str]
    prior: Any
    guidance: Any
    reference: Any
    prompts: Any


@dataclass(frozen=True)
class Ask:
    """The request of one stage of a run to its prior's source.

    Args:
        stage: its name.
        config: the run's configuration.
        prompts: the words by view, made once for all stages of a run.
        prior: the object that the calling program handed in for the stage; None for none.
        forms: how the sources of the table are written, for the answer to a text that is none of them.
    """

    stage: str
    config: RunSettings
    prompts: ViewPrompts
    prior: Prior | None = None
    forms: tuple[str, ...] = ()

    @property
    def settings(self) -> Any:
        """The settings of the stage itself."""
        return getattr(self.config, self.stage)

    @property
    def guidance(self) -> Any:
        """The guidance settings of the stage."""
        return getattr(self.config.guidance, self.stage)

    @property
    def source(self) -> str:
        """The source as the configuration writes it."""
        return getattr(self.config.prior, self.stage)

    @property
    def lora(self) -> Lora | None:
        """The LoRA that the stage's prior is loaded with. Raises: UserError for a file that is none."""
        chosen = self.config.prior
        if chosen.lora is None or self.stage not in chosen.lora_stages:
            return None
        from stages.guidance.diffusion.lora import Lora

        return Lora(chosen.lora, chosen.lora_scale)

    @property
    def diffusion(self) -> DiffusionSettings:
        """The loading settings of the stage's prior: prior.diffusion with the changes for this stage."""
        changes = self.config.prior.changes(self.stage)
        return self.config.prior.diffusion.with_changes(changes) if changes else self.config.prior.diffusion

    @property
    def loading(self) -> tuple[str, str | None, float]:
        """How the stage's networks are loaded from their files: settings, the LoRA's path and its scale."""
        chosen = self.config.prior
        return self.diffusion.model_dump_json(), None if self.lora is None else chosen.lora, chosen.lora_scale

    @property
    def device(self) -> torch.device:
        """The device of the run."""
        import torch

        return torch.device("cuda" if self.config.device != "cpu" and torch.cuda.is_available() else "cpu")

    @property
    def texts(self) -> list[str]:
        """Every text that the run asks its priors about, the empty one included."""
        return list(dict.fromkeys([*self.prompts.all_texts(), ""]))


@dataclass(frozen=True)
class Facts:
    """The result of checking a source, before anything of it is loaded.

    Args:
        description: of a diffusion prior, what rules and cures ask of it; None for another kind of guidance.
        latents: the kind of model whose latents it has; empty for pixels and where it is not known.
        plan: how its folder will be loaded; None where it is not here yet, or is no folder.
        notices: what the user should know before the run begins, a line each.
    """

    description: PriorDescription | None = None
    latents: str = ""
    plan: Plan | None = None
    notices: tuple[str, ...] = ()


class Kept:
    """The priors that are loaded, for what would load the same: the next stage of a run, the next run of a worker.

    Args:
        most: priors in memory at once, at least 1; the one not used for longest is freed before another is loaded.
    """

    def __init__(self, most: int = 1) -> None:
        self._most = most
        self._priors: dict[object, tuple[Prior, list[str]]] = {}  # with what each has embedded; the latest used last

    def take(self, key: object, texts: list[str], load: Callable[[], Prior]) -> Prior:
        """Return the prior of this key, loaded unless it is kept.

        One that is kept gives the bytes of one newly loaded: texts other than those before are embedded anew, as a
        batch of their own.

        Args:
            key: of what the prior is loaded from and how; None: it is not to be kept.
            texts: every text that it will be asked about.
            load: loads it with these texts embedded; what is kept is a DiffusionPrior.
        """
        if key in self._priors:
            prior, before = self._priors.pop(key)
            if texts != before:
                prior.embed_anew(texts)
        else:
            while len(self._priors) >= self._most:
                del self._priors[next(iter(self._priors))]
            prior = load()
        if key is not None:
            self._priors[key] = prior, texts
        return prior

    def drop(self) -> None:
        """Free the priors."""
        self._priors.clear()


@dataclass(frozen=True)
class Offer:
    """A prior that can be named, a row of `pipeline models list`; with a check, of `pipeline doctor` as well.

    Args:
        text: what to write as prior.STAGE.
        family: what it is.
        stages: those it is for, by commas.
        pixels: side of the images it works at.
        memory: GB of its weights.
        licence: of the weights.
        status: here, or how it is to be had.
        instead: the text of another that took its place.
        check: state and detail for the doctor (see doctor.py); None where nothing of it has to be installed.
        cost: what its absence costs.
    """

    text: str
    family: str
    stages: str
    pixels: str
    memory: str
    licence: str
    status: str = "here"
    instead: str = ""
    check: Callable[[], tuple[str, str]] | None = None
    cost: str = ""


class PriorSource:
    """A source; those of the table say what they do otherwise.

    Args:
        text: as the configuration has it, paths from where the user stands or absolute.
    """

    form: ClassVar[str] = ""  # how it is written, for help and errors; empty where no user writes it
    takes_lora: ClassVar[bool] = False  # whether a LoRA can change its networks

    def __init__(self, text: str) -> None:
        self.text = text

    def anchored(self) -> str:
        """Return the text with its path absolute, so that a run can be resumed from anywhere."""
        return self.text

    def reads(self, stage: str) -> list[str]:
        """Return the settings that it reads for a stage and others may not, or groups of them, by dotted key."""
        return [f"guidance.{stage}"]

    def facts(self, ask: Ask) -> Facts:
        """Return what is known of it, having loaded nothing. Raises: UserError where the stage cannot use it."""
        raise NotImplementedError

    def fetch(self, ask: Ask, facts: Facts) -> Facts:
        """Return the facts once all its files are on this machine. Raises: UserError where they cannot be had."""
        return facts

    def announce(self, ask: Ask, facts: Facts) -> str | None:
        """Return a line on what `fetch` will download; None for nothing, or where that is not known."""
        return None

    def load(self, ask: Ask, facts: Facts, device: torch.device, *, keep_text: bool = False) -> Prior:
        """Return its diffusion prior, loaded.

        Args:
            ask: the stage's.
            facts: what `facts` returned for it.
            device: where the networks live.
            keep_text: whether texts beyond the run's may be asked of it later.
        Raises: UserError for a source that has no diffusion prior.
        """
        raise UserError(
            f"{self.text} is no diffusion prior", "it guides a stage in another way", "name a prior, such as pocket"
        )

    def key(self, ask: Ask) -> object:
        """Return what the loaded prior depends on beside texts and device, for a next stage or run to use it as well;
        None: it is loaded anew."""
        return None

    def build(self, ask: Ask, facts: Facts, device: torch.device, kept: Kept) -> Guide:
        """Return the stage's guidance, loaded; its generator is the stage's own, seeded from the run's seed."""
        import torch

        from stages.guidance.guidance import Guidance

        key = self.key(ask)
        key = None if key is None else (key, str(device))
        prior = ask.prior or kept.take(key, ask.texts, lambda: self.load(ask, facts, device))
        generator = torch.Generator().manual_seed(ask.config.seed)
        return Guidance(prior, ask.guidance, ask.prompts, generator, release_text=ask.prior is None)

    def savings(self, ask: Ask) -> list[str]:
        """Return the settings of its own that would save memory, most first, as one writes them."""
        return []

    @classmethod
    def offers(cls) -> list[Offer]:
        """Return the priors that can be named so."""
        return []


def check_guidance(ask: Ask, description: PriorDescription) -> None:
    """Raise UserError for what a stage's guidance asks of a prior and cannot have, as far as is known of it."""
    from stages.guidance.compatibility import check_description
    from stages.guidance.diffusion.plan import network_dtype
    from stages.guidance.residuals import RULES
    from stages.guidance.vsd import check_loading

    settings, loading = ask.guidance, ask.diffusion
    check_description(description, settings, ask.prompts)
    if "trainable" in RULES[settings.rule.name].needs:  # the network itself is looked at once it is there
        check_loading(description.name, settings.rule, loading.offload, network_dtype(loading, None, ask.device))
