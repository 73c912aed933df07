"""A CLIP in the place of a diffusion prior: `prior.coarse=clip:pocket`, or clip: and a CLIPModel folder.

It is the source that decides, since nothing else tells what is asked: a CLIP has neither noise schedule nor rule, so
`guidance.clip` sets how it guides and `guidance.coarse` is not read. Checks load no model.
"""

from __future__ import annotations

import difflib
import json
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from stages.errors import UserError

if TYPE_CHECKING:
    import torch

    from pipeline.config import Config
    from stages.guidance.clip_guidance import ClipGuidance

PREFIX = "clip:"
POCKET_CLIP = Path(__file__).resolve().parent.parent / "stages" / "pocket" / "weights" / "clip"


def clip_folder(source: str) -> Path | None:
    """The folder that a prior's source names as a CLIP; None for a diffusion prior's source."""
    if not source.startswith(PREFIX):
        return None
    name = source.removeprefix(PREFIX).strip()
    return POCKET_CLIP if name == "pocket" else Path(name).expanduser().absolute()


def anchored(source: str) -> str:
    """The source of a CLIP with its folder made absolute; other sources as they are."""
    folder = clip_folder(source)
    return source if folder in (None, POCKET_CLIP) else f"{PREFIX}{folder}"


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
        for text in (config.prompt, *config.prompts.per_view.values(), config.prompts.textureless_suffix):
            _check_words(text, known, stage, folder)
    tokenizer = load_tokenizer(folder)
    check_captions(folder.name, tokenizer, token_limit(folder, tokenizer), asked_texts(prompts, config.guidance.clip))


def clip_words(folder: Path) -> list[str] | None:
    """The words of a CLIP whose tokenizer knows whole words alone, as the pocket world's; None for all others."""
    try:
        model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
        return [w for w in model["vocab"] if w.isalnum()] if model["type"] == "WordLevel" else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # a tokenizer of other files; loading it says what is wrong, if anything is


def _check_words(prompt: str, known: list[str], stage: str, folder: Path) -> None:
    from pipeline.priors import unknown_words

    unknown = unknown_words(prompt, known)
    if not unknown:
        return
    near = {word: difflib.get_close_matches(word, known, 1, 0.66) for word in unknown}
    meant = ", ".join(f"{word} -> {match[0]}" for word, match in near.items() if match)
    raise UserError(
        f'the CLIP {folder} cannot read "{prompt}"',
        f"it does not know {', '.join(map(repr, unknown))}; its {len(known)} words are:\n"
        + textwrap.fill(" ".join(sorted(known)), 100),
        (f"did you mean {meant}? " if meant else "")
        + f"use its words, or another CLIP: prior.{stage}=clip:FOLDER; --force runs anyway",
    )


def build_clip_guidance(config: Config, stage: str, folder: Path, device: torch.device) -> ClipGuidance:
    """CLIP and prompts of one stage; its generator is the stage's own, seeded from the run's seed."""
    import torch

    from stages.guidance.clip import ClipScorer
    from stages.guidance.clip_guidance import ClipGuidance
    from stages.prompts import ViewPrompts

    prompts = ViewPrompts(config.prompt, config.negative, config.prompts)
    generator = torch.Generator().manual_seed(config.seed)
    return ClipGuidance(ClipScorer(folder, device), config.guidance.clip, prompts, generator)
