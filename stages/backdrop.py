"""Backdrops of a step's renders, and the pictures that guidance is given.

The background is the learned environment (stages/fields/background.py). A backdrop is whatever stands behind the object
in a picture: that environment, a flat colour, or one of several pictures (Dream Fields' augmentation).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from stages.cameras import Views
from stages.fields.backdrops import show_on
from stages.render.volume import VolumeImages

Under = Tensor | Callable[[Tensor], Tensor]  # as render_field takes it


@dataclass(frozen=True)
class GuideInputs:
    """The inputs of guidance for a render.

    Args:
        colour: [N, H, W, 3] linear.
        views: N views.
        backdrop: [N, H, W, 3] what the colours were composited over, without gradient.
    """

    colour: Tensor
    views: Views
    backdrop: Tensor


class Backdrop(Protocol):
    """The backdrop of the B views of a step, or of a part of it."""

    @property
    def under(self) -> Under:
        """The colour or environment that the renderer composites over."""

    def part(self, index: slice) -> Backdrop:
        """Return the backdrop of these views."""

    def show(self, images: VolumeImages, views: Views) -> GuideInputs:
        """Return guidance's inputs from renders over `under`; differentiable in their colour and opacity."""


class PlainBackdrop:
    """One backdrop a view, which the renderer itself composites over.

    Args:
        under: linear colours [B, 1, 1, 3], or the environment, a function of unit directions [R, 3] -> [R, 3].
    """

    def __init__(self, under: Under) -> None:
        self.under = under

    def part(self, index: slice) -> PlainBackdrop:
        """Return the backdrop of these views."""
        return PlainBackdrop(self.under[index]) if isinstance(self.under, Tensor) else self

    def show(self, images: VolumeImages, views: Views) -> GuideInputs:
        """Return the renders as they are."""
        return GuideInputs(images.colour, views, images.backdrop.detach())


class PictureBackdrop:
    """Several pictures behind copies of each view; the view is rendered once, over black.

    Args:
        pictures: [B * copies, H, W, 3] linear, those of a view beside each other, on the renders' device.
        copies: pictures a view.
    """

    def __init__(self, pictures: Tensor, copies: int) -> None:
        self.pictures, self.copies = pictures, copies
        self.under = torch.zeros(3)

    def part(self, index: slice) -> PictureBackdrop:
        """Return the backdrop of these views."""
        return PictureBackdrop(self.pictures[index.start * self.copies : index.stop * self.copies], self.copies)

    def show(self, images: VolumeImages, views: Views) -> GuideInputs:
        """Return each render once on each of its pictures."""
        colour = show_on(images.colour, images.opacity, self.pictures)
        return GuideInputs(colour, views[torch.arange(len(views)).repeat_interleave(self.copies)], self.pictures)
