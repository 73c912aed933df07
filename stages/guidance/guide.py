"""The Guide protocol, a loss on the renders of a stage: of diffusion (guidance.py) or of a CLIP (clip_guidance.py)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from torch import Tensor

from stages.cameras import Views
from stages.parallel import WHOLE, Part

if TYPE_CHECKING:
    import torch

    from stages.render.shade import Shading
    from stages.render.volume import Radiance


Metric = float | Tensor  # a tensor of one number is still on a device, and read with all others of its step


def metric(value: Tensor) -> Metric:
    """Return a number that a step reports: as it is where reading it would wait for a device, else read."""
    value = value.detach()
    return float(value) if value.device.type == "cpu" else value


@dataclass
class GuidanceOutput:
    """The result of a Guide for the images of a step.

    Args:
        loss: a surrogate whose gradient on the images matters, not its value.
        metrics: finite numbers that do mean something, by name.
        strength: expected size of the gradient, in that of the guidance which the stage's regularisers are weighed
            for; it multiplies them.
    """

    loss: Tensor
    metrics: dict[str, Metric]
    strength: float = 1.0


class Guide(Protocol):
    """A loss on the renders of a stage, with all its randomness in one generator."""

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
        """Return the loss of linear images [B, H, W, 3] in [0, 1] seen from B views.

        Args:
            images: linear colour, differentiable.
            views: their cameras and lights.
            progress: share of the stage done, in [0, 1].
            textureless: whether the images show no colours, which chooses the words.
            backdrop: what the images were composited on, linear [B, H, W, 3].
            shading: what all of them were shaded with; None means plain albedo.
            part: of the step's views that these are.
        """

    def state_dict(self) -> dict[str, Tensor]:
        """Return all that makes a resumed guidance equal to an uninterrupted one."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what state_dict returned."""

    def close(self) -> None:
        """Leave the prior, which may be its caller's, as it was before."""


@runtime_checkable
class CheckingGuide(Protocol):
    """A Guide that finds in a step's metrics what it could not read when it was asked, on a device."""

    def check(self, metrics: dict[str, Metric]) -> None:
        """Raise UserError for predictions that are of no use."""


def check_predictions(guide: Guide | None, metrics: dict[str, Metric]) -> None:
    """Let a guide look at the metrics of a step, now that they are numbers. Raises: UserError as CheckingGuide does."""
    if isinstance(guide, CheckingGuide):
        guide.check(metrics)


@runtime_checkable
class ShapeGuide(Protocol):
    """A Guide that may also know the object of the prompt in 3D."""

    def shape(self) -> Radiance | None:
        """Return the object as density and colour at points; None where it is known in pictures only."""


@runtime_checkable
class WarpedGuide(Protocol):
    """A ShapeGuide whose object in 3D can be moved and stretched, before its first step."""

    def warp(self, matrix: Tensor) -> None:
        """Make the prior see the world through an affine map.

        Args:
            matrix: [4, 4], takes points of the world to points of the object as the prior knows it.
        """


@runtime_checkable
class PromptedGuide(Protocol):
    """A Guide that can say what it was asked for."""

    @property
    def prompt(self) -> str:
        """Return the prompt itself, without words of a view."""


@runtime_checkable
class PicturingGuide(Protocol):
    """A Guide whose prior can draw the prompt."""

    def picture(self, views: Views, *, steps: int, scale: float, generator: torch.Generator) -> Tensor:
        """Return sRGB pictures [B, H, W, 3] in [0, 1] of the prompt seen from B views; see picture.py."""


@runtime_checkable
class EmbeddingGuide(Protocol):
    """A Guide that can compare pictures and words beyond its own loss, in the joint space of a CLIP."""

    @property
    def prompt(self) -> str:
        """Return the prompt itself, without words of a view."""

    def embed(self, images: Tensor) -> Tensor:
        """Return unit vectors [B, D] of linear images [B, H, W, 3] in [0, 1], differentiable in them."""

    def embed_words(self, texts: list[str]) -> Tensor:
        """Return unit vectors [P, D] of texts."""


@runtime_checkable
class ReadingGuide(Protocol):
    """A Guide with a CLIP that can say what it reads in the prompt, for networks that are told so."""

    def read(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return ClipScorer.read_texts of the prompt itself, without words of a view."""
