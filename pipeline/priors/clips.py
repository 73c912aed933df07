"""`clip:pocket` and `clip:FOLDER`: a CLIP in the place of a diffusion prior.

A CLIP has neither noise schedule nor rule, so `guidance.clip` sets how it guides and `guidance.coarse` is not read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import stages
from pipeline.priors.source import Ask, Facts, Kept, Offer, PriorSource
from pipeline.priors.words import check_words
from stages.kinds import STAGES
from stages.paths import from_home

if TYPE_CHECKING:
    import torch

    from stages.guidance.guide import Guide

PREFIX = "clip:"
POCKET_CLIP = Path(stages.__file__).parent / "pocket" / "weights" / "clip"  # comes with the toolkit


class ClipSource(PriorSource):
    """A folder with a CLIPModel."""

    form = "clip:pocket, clip:FOLDER"

    def __init__(self, text: str) -> None:
        super().__init__(text)
        name = text.removeprefix(PREFIX).strip()
        self.is_pocket = name == "pocket"
        self.folder = POCKET_CLIP if self.is_pocket else from_home(name).absolute()

    def anchored(self) -> str:
        return self.text if self.is_pocket else f"{PREFIX}{self.folder}"

    def reads(self, stage: str) -> list[str]:
        return ["guidance.clip"]

    def facts(self, ask: Ask) -> Facts:
        """Refuse a folder that is no CLIP, words that it does not know, and prompts that it cannot be asked."""
        from stages.guidance.clip import check_captions, check_clip_folder, load_tokenizer, token_limit
        from stages.guidance.clip_guidance import all_texts, check_prompts

        folder, config = self.folder, ask.config
        check_clip_folder(folder)
        check_prompts(folder.name, ask.prompts)
        known = clip_words(folder)
        if known is not None and not config.force:
            another = f"another CLIP: prior.{ask.stage}=clip:FOLDER; --force runs anyway"
            for text in (config.prompt, *config.prompts.per_view.values(), config.prompts.textureless_suffix):
                check_words(text, known, f"the CLIP {folder}", another)
        tokenizer = load_tokenizer(folder)
        texts = all_texts(ask.prompts, config.guidance.clip)
        check_captions(folder.name, tokenizer, token_limit(folder, tokenizer), texts)
        return Facts()

    def build(self, ask: Ask, facts: Facts, device: torch.device, kept: Kept) -> Guide:
        import torch

        from stages.guidance.clip import ClipScorer
        from stages.guidance.clip_guidance import ClipGuidance

        generator = torch.Generator().manual_seed(ask.config.seed)
        return ClipGuidance(ClipScorer(self.folder, device), ask.config.guidance.clip, ask.prompts, generator)

    @classmethod
    def offers(cls) -> list[Offer]:
        stages = ", ".join(stage for stage, kind in STAGES.items() if kind.prior == "clip:pocket")
        cost = f"no default prior for {stages}"
        about = "a CLIP that comes with the toolkit"
        return [Offer("clip:pocket", about, stages, "64", "< 0.1", "Apache-2.0", check=_examine, cost=cost)]


def clip_words(folder: Path) -> list[str] | None:
    """Return the words of a CLIP whose tokenizer knows whole words alone, as the pocket world's; None for others."""
    try:
        model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
        return [w for w in model["vocab"] if w.isalnum()] if model["type"] == "WordLevel" else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # a tokenizer of other files; loading it says what is wrong, if anything is


def _examine() -> tuple[str, str]:
    if not POCKET_CLIP.is_dir():
        return "missing", f"no folder {POCKET_CLIP}"
    files = list(POCKET_CLIP.glob("*.safetensors"))
    size = sum(path.stat().st_size for path in files) / 2**20
    return ("ok" if files else "broken"), f"{size:.1f} MB, {len(clip_words(POCKET_CLIP) or [])} words"
