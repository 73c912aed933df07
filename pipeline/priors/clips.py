"""A CLIP in the place of a diffusion prior: `prior.coarse=clip:pocket`, or clip: and a CLIPModel folder.

It is the source that decides, since nothing else tells what is asked: a CLIP has neither noise schedule nor rule, so
`guidance.clip` sets how it guides and `guidance.coarse` is not read. Checks load no model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import stages
from pipeline.config.model import CLIP_PREFIX
from pipeline.priors.words import check_words

if TYPE_CHECKING:
    import torch

    from pipeline.config.model import Config
    from stages.guidance.clip_guidance import ClipGuidance

POCKET = Path(stages.__file__).parent / "pocket" / "weights"  # the models that come with the toolkit
POCKET_CLIP = POCKET / "clip"


def clip_folder(source: str) -> Path | None:
    """The folder that a prior's source names as a CLIP; None for a diffusion prior's source."""
    if not source.startswith(CLIP_PREFIX):
        return None
    name = source.removeprefix(CLIP_PREFIX).strip()
    return POCKET_CLIP if name == "pocket" else Path(name).expanduser().absolute()


def check_clip(config: Config, stage: str, folder: Path) -> None:
    """Refuse, before any work, a folder that is no CLIP, words it does not know, and prompts it cannot be asked."""
    from stages.guidance.clip import check_captions, check_clip_folder, load_tokenizer, token_limit
    from stages.guidance.clip_guidance import asked_texts, check_prompts
    from stages.prompts import ViewPrompts

    check_clip_folder(folder)
    prompts = ViewPrompts(config.prompt, config.negative, config.prompts)
    check_prompts(folder.name, prompts)
    known = clip_words(folder)
    if known is not None and not config.force:
        another = f"another CLIP: prior.{stage}=clip:FOLDER; --force runs anyway"
        for text in (config.prompt, *config.prompts.per_view.values(), config.prompts.textureless_suffix):
            check_words(text, known, f"the CLIP {folder}", another)
    tokenizer = load_tokenizer(folder)
    check_captions(folder.name, tokenizer, token_limit(folder, tokenizer), asked_texts(prompts, config.guidance.clip))


def clip_words(folder: Path) -> list[str] | None:
    """The words of a CLIP whose tokenizer knows whole words alone, as the pocket world's; None for all others."""
    try:
        model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
        return [w for w in model["vocab"] if w.isalnum()] if model["type"] == "WordLevel" else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # a tokenizer of other files; loading it says what is wrong, if anything is


def build_clip_guidance(config: Config, stage: str, folder: Path, device: torch.device) -> ClipGuidance:
    """CLIP and prompts of one stage; its generator is the stage's own, seeded from the run's seed."""
    import torch

    from stages.guidance.clip import ClipScorer
    from stages.guidance.clip_guidance import ClipGuidance
    from stages.prompts import ViewPrompts

    prompts = ViewPrompts(config.prompt, config.negative, config.prompts)
    generator = torch.Generator().manual_seed(config.seed)
    return ClipGuidance(ClipScorer(folder, device), config.guidance.clip, prompts, generator)
