"""`pocket`: the priors that come with the toolkit, 64 x 64 pixels for coarse, latents of 512 x 512 pixels for fine.

Checks need neither torch nor diffusers' five seconds of import: a prompt of unknown words is answered at once.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import stages
from pipeline.priors.clips import clip_words
from pipeline.priors.source import Ask, Facts, Offer, PriorSource, check_guidance
from pipeline.priors.words import check_words
from stages.errors import UserError
from stages.kinds import STAGES

if TYPE_CHECKING:
    import torch

    from stages.guidance.diffusion.settings import DiffusionSettings
    from stages.guidance.prior import Prior

POCKET = Path(stages.__file__).parent / "pocket" / "weights"
_ANOTHER_PRIOR = "Stable Diffusion: --config stable-diffusion prior.coarse=FOLDER_OR_ID prior.fine=FOLDER_OR_ID"
_READER = (  # what check_words says of it
    "the pocket prior",
    f"{_ANOTHER_PRIOR}; --force runs anyway, without the unknown words meaning anything",
)
_PIXELS = {"pixel": "64", "latent": "512"}  # by space
# of prior.diffusion: of a hub, of other files, of Flux, of T5
_OTHERS = ("revision", "variant", "embedded_guidance", "keep_embeddings")


class PocketSource(PriorSource):
    """The prior of a stage's own space; see StageKind.prior_space."""

    form = "pocket"
    takes_lora = True

    def reads(self, stage: str) -> list[str]:
        from stages.guidance.diffusion.settings import DiffusionSettings

        loading = [name for name in DiffusionSettings.model_fields if name not in _OTHERS]
        shared = [f"prior.diffusion.{name}" for name in loading]
        return [f"guidance.{stage}", *shared, f"prior.{stage}_diffusion"]

    def facts(self, ask: Ask) -> Facts:
        """Check the words first, which are the commonest mistake, then what the folder's small files say."""
        from stages.guidance.compatibility import PIXELS, PriorDescription

        folder = pocket_folder(ask.stage)
        words = pocket_words(folder)
        index, scheduler = _read(folder, "model_index.json"), _read(folder, "scheduler/scheduler_config.json")
        if not ask.config.force:
            check_words(ask.config.prompt, words, *_READER)
            more = [*words, *(clip_words(folder / "tokenizer") or [])]  # the view's words, too
            for text in (*ask.config.prompts.per_view.values(), ask.config.prompts.textureless_suffix):
                check_words(text, more, *_READER)
        _check_length(ask, folder)
        data_range = None if "vae" in index else PIXELS
        description = PriorDescription("pocket", str(scheduler.get("prediction_type")), data_range)
        check_guidance(ask, description)
        if ask.lora is not None:
            from stages.guidance.diffusion.plan import make_plan

            make_plan(folder, ask.diffusion, lora=ask.lora)
        return Facts(description, notices=_notices(ask.config.prompt))

    def key(self, ask: Ask) -> object:
        return pocket_folder(ask.stage), _settings(ask, ask.device).dtype, ask.loading

    def load(self, ask: Ask, facts: Facts, device: torch.device, *, keep_text: bool = False) -> Prior:
        from stages.guidance.diffusion.prior import load_prior

        settings, texts = _settings(ask, device), None if keep_text else ask.texts
        return load_prior(pocket_folder(ask.stage), device, settings=settings, prompts=texts, lora=ask.lora)

    @classmethod
    def offers(cls) -> list[Offer]:
        return [
            Offer(
                "pocket",
                "comes with the toolkit",
                stage,
                _PIXELS.get(kind.prior_space, kind.prior_space),
                "< 0.1",
                "Apache-2.0",
                check=lambda stage=stage: _examine(pocket_folder(stage)),
                cost=f"no default prior for {stage}",
            )
            for stage, kind in STAGES.items()
            if kind.prior == "pocket"
        ]


def _settings(ask: Ask, device: torch.device) -> DiffusionSettings:
    """Return how the prior is loaded: in bfloat16 where the cores have it and nothing else is said.

    Twelve prompts came out the same, their fine stages in two thirds of the time. A network that VSD trains stays in
    float32.
    """
    from stages.guidance.diffusion.plan import cores_have_bfloat16
    from stages.guidance.residuals import RULES

    settings, trained = ask.diffusion, "trainable" in RULES[ask.guidance.rule.name].needs
    if settings.dtype != "auto" or device.type != "cpu" or trained or not cores_have_bfloat16():
        return settings
    return settings.with_changes({"dtype": "bfloat16"})


def _notices(prompt: str) -> tuple[str, ...]:
    """Name what no training caption contains in the prompt, though each of its words is known."""
    from stages.pocket.world import oddities

    return tuple(f'the pocket prior never saw the like of "{prompt}": {line}' for line in oddities(prompt))


def pocket_folder(stage: str) -> Path:
    """Return the folder of the pocket prior that a stage listens to."""
    return POCKET / STAGES[stage].prior_space


def pocket_words(folder: Path) -> list[str]:
    """Return the words that the pocket prior in `folder` was trained on."""
    facts = _read(folder, "pocket.json")
    if not isinstance(facts.get("words"), list):
        raise _absent(folder, "its pocket.json lists no words")
    return facts["words"]


def _examine(folder: Path) -> tuple[str, str]:
    if not folder.is_dir():
        return "missing", f"no folder {folder}"
    files = list(folder.rglob("*.safetensors"))
    size = sum(path.stat().st_size for path in files) / 2**20
    return ("ok" if files else "broken"), f"{size:.1f} MB, {len(pocket_words(folder))} words"


def _check_length(ask: Ask, folder: Path) -> None:
    """By the tokenizer's own file: transformers would take a second to import."""
    from tokenizers import Tokenizer

    from stages.prompts import check_length

    limit = _read(folder, "tokenizer/tokenizer_config.json").get("model_max_length")
    if not isinstance(limit, int):
        raise _absent(folder, "its tokenizer_config.json has no model_max_length")
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    except Exception as error:  # tokenizers raises bare Exceptions
        raise _absent(folder, f"tokenizer.json: {error}") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    check_length(ask.texts, lambda text: len(tokenizer.encode(text).ids), limit)


def _read(folder: Path, name: str) -> dict[str, Any]:
    try:
        value = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _absent(folder, f"{type(error).__name__}: {error}") from None
    if not isinstance(value, dict):
        raise _absent(folder, f"{name} holds no JSON object")
    return value


def _absent(folder: Path, why: str) -> UserError:
    return UserError(
        f"the pocket prior {folder} is not there",
        why,
        f"install the toolkit again, make it with `python -m stages.pocket.train`, or take {_ANOTHER_PRIOR}",
    )
