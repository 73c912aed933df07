"""Guidance by CLIP: the cosine of a render and its words, as the systems before diffusion used it.

A Guide (guide.py), as stages/guidance/guidance.py's Guidance is, so every stage takes either. Dream Fields (arXiv
2112.01455 eq. 6) and CLIP-Mesh (arXiv 2203.13333 eq. 3) minimise
    loss = -weight * mean over images of cos(CLIP(random crop of the image), CLIP(words))
Loss convention: a mean of cosines, about 0.3, not the sum over pixels of the diffusion priors' losses. A stage's other
weights must be of that size: the recipes of both systems set them.
A CLIP that guides a run has been optimised against and cannot judge it; benchmarks.quality leaves its scores out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor

from stages.cameras import Views
from stages.errors import UserError, check_shape
from stages.guidance.clip import ClipScorer
from stages.guidance.guide import GuidanceOutput, metric
from stages.parallel import WHOLE, Draws, Part
from stages.phases import backward_phase, phase
from stages.prompts import ViewPrompts, without_contradictions

if TYPE_CHECKING:
    from stages.render.shade import Shading

TEXTURELESS = "textureless"  # key of these words in without_contradictions; no view class has that name


class ClipGuidanceSettings(BaseModel):
    """Settings of the guidance by a CLIP."""

    model_config = ConfigDict(extra="forbid")

    weight: float = Field(1.0, gt=0, description="weight of the mean cosine")
    crops: int = Field(1, ge=1, le=32, description="random crops of each image")
    crop: tuple[float, float] = Field(
        (0.9, 0.9), description="range of the side of a random crop, as a share of the image's; 1, 1: the whole image"
    )
    textureless_without: list[str] = Field(
        [], description="words left out of the prompt of textureless renders, as the colours of a CLIP that minds them"
    )

    @field_validator("crop")
    @classmethod
    def _shares(cls, crop: tuple[float, float]) -> tuple[float, float]:
        if not 0 < crop[0] <= crop[1] <= 1:
            raise ValueError(f"wanted 0 < low <= high <= 1, got {list(crop)}")
        return crop


class ClipGuidance:
    """A Guide (guide.py): the mean cosine between renders and their prompts under a CLIP.

    Args:
        scorer: the CLIP.
        settings: crops and weight.
        prompts: the texts of a run by view.
        generator: on the CPU, and of this guidance alone: all its randomness.
    Raises: UserError for a negative prompt or mixed prompts, which a cosine cannot use, and texts that are too long.
    Source: Dream Fields (arXiv 2112.01455) eq. 6, CLIP-Mesh (arXiv 2203.13333) eq. 3.
    """

    def __init__(
        self, scorer: ClipScorer, settings: ClipGuidanceSettings, prompts: ViewPrompts, generator: torch.Generator
    ) -> None:
        check_prompts(scorer.name, prompts)
        self.scorer, self.settings, self.prompts, self.generator = scorer, settings, prompts, generator
        self._draws = Draws(generator)
        scorer.embed_texts(all_texts(prompts, settings))

    def __call__(
        self,
        images: Tensor,
        views: Views,
        progress: float,
        textureless: bool = False,
        *,
        backdrop: Tensor | None = None,
        shading: Shading | None = None,
        part: Part = WHOLE,
    ) -> GuidanceOutput:
        """Return the loss of linear images [B, H, W, 3] in [0, 1] seen from B views; metric `clip`: 100 mean cosine.

        Arguments as Guide has them; progress, backdrop and shading are not used.
        """
        check_shape("images", images, (len(views), None, None, 3))
        _, generator = self._draws.of_part(part)
        texts = self.prompts.texts(views, textureless)
        if textureless:
            texts = [textureless_prompt(text, self.settings) for text in texts]
        with phase("crop"):
            crops = random_crops(images, self.settings.crop, self.settings.crops, generator)
        with phase("networks"):
            image_embeddings = self.scorer.embed_images(crops)  # [B crops, D]
            text_embeddings = self.scorer.embed_texts(texts).repeat_interleave(self.settings.crops, 0)
            backward_phase("networks", crops, image_embeddings)
        cosine = (image_embeddings * text_embeddings).sum(-1).mean()
        return GuidanceOutput(-self.settings.weight * cosine, {"clip": 100 * metric(cosine)})

    @property
    def prompt(self) -> str:
        """Return the prompt itself, without words of a view."""
        return self.prompts.prompt

    def embed(self, images: Tensor) -> Tensor:
        """Return ClipScorer.embed_images."""
        return self.scorer.embed_images(images)

    def embed_words(self, texts: list[str]) -> Tensor:
        """Return ClipScorer.embed_texts."""
        return self.scorer.embed_texts(texts)

    def read(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return ClipScorer.read_texts of the prompt itself, without words of a view."""
        return self.scorer.read_texts([self.prompt])

    def state_dict(self) -> dict[str, Tensor]:
        """Return the generator's state: all that makes a resumed guidance equal to an uninterrupted one."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what state_dict returned."""
        self.generator.set_state(state["generator"].cpu())

    def close(self) -> None:
        """Do nothing: the CLIP was not changed."""


def textureless_prompt(text: str, settings: ClipGuidanceSettings) -> str:
    """Return a prompt without the words that textureless renders cannot show."""
    return without_contradictions(text, TEXTURELESS, {TEXTURELESS: settings.textureless_without})


def all_texts(prompts: ViewPrompts, settings: ClipGuidanceSettings) -> list[str]:
    """Return every text that a stage can give the CLIP, without repetition."""
    texts = prompts.all_texts()
    return list(dict.fromkeys([*texts, *(textureless_prompt(text, settings) for text in texts)]))


def check_prompts(clip: str, prompts: ViewPrompts) -> None:
    """Raise UserError for prompts that a diffusion prior can use and the CLIP called `clip` cannot."""
    what = f"The CLIP {clip} cannot be asked that"
    if any(prompts.negatives()):
        raise UserError(what, "it has no negative prompt: a cosine is not guided away from words", "leave it empty")
    if prompts.settings.blend != "classes":
        raise UserError(
            what, f"prompts.blend={prompts.settings.blend} mixes a diffusion prior's texts", "prompts.blend=classes"
        )


def random_crops(images: Tensor, share: tuple[float, float], count: int, generator: torch.Generator) -> Tensor:
    """Cut square crops at random places, `count` of each image, all of one random side (Dream Fields sec. 3.2).

    Args:
        images: [B, S, S, C].
        share: range of the crop's side, as a share of S, in (0, 1].
        count: crops of an image.
        generator: on the CPU.
    Returns: [B count, n, n, C], the crops of an image beside each other; the images themselves where n = S.
    """
    batch, _, width, channels = images.shape
    check_shape("images", images, (batch, width, width, channels))
    draws = torch.rand(1 + 2 * batch * count, generator=generator)
    low, high = share
    side = max(1, round(float(low + (high - low) * draws[0]) * width))
    repeated = images.repeat_interleave(count, 0) if count > 1 else images
    if side >= width:
        return repeated
    corners = (draws[1:] * (width - side + 1)).long().clamp_max(width - side).view(2, -1)  # [2, B count]
    places = enumerate(corners.T.tolist())
    return torch.stack([repeated[k, row : row + side, column : column + side] for k, (row, column) in places])
