"""View-dependent prompts: which words a camera adds to the prompt (DreamFusion sec. 3.2.2).

Classes by camera: overhead above 60 deg of elevation; else front within 45 deg of azimuth 0, back beyond 135, side
between. The object faces +z with y up, so its own left is towards +x: a camera at azimuth 90 sees the left side.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from stages.cameras import Views
from stages.errors import UserError

CLASSES = ("front", "side", "left side", "right side", "back", "overhead")


class PromptSettings(BaseModel):
    """How views change the words of the prompt."""

    model_config = ConfigDict(extra="forbid")

    view_words: bool = Field(True, description="add the view's words to the prompt")
    position: Literal["suffix", "prefix"] = Field("suffix", description="'..., front view' or 'front view of ...'")
    sides: bool = Field(False, description="tell left from right: 'left side view' and 'right side view'")
    front_deg: float = Field(45.0, gt=0, le=180, description="front up to this azimuth on either side, degrees")
    back_deg: float = Field(135.0, gt=0, le=180, description="back beyond this azimuth on either side, degrees")
    overhead_deg: float = Field(60.0, gt=-90, le=90, description="overhead above this elevation, degrees")
    textureless_suffix: str = Field("", description="added to the prompt of textureless renders, ', clay render'")
    per_view: dict[str, str] = Field({}, description="whole prompt by view class, in place of the made one")

    @field_validator("per_view")
    @classmethod
    def _known_classes(cls, value: dict[str, str]) -> dict[str, str]:
        for name, text in value.items():
            if name not in CLASSES:
                raise ValueError(f"unknown view class {name!r}; allowed: {', '.join(CLASSES)}")
            if not text.strip():
                raise ValueError(f"the prompt of view class {name!r} is empty")
        return value


def view_class(azimuth_deg: float, elevation_deg: float, settings: PromptSettings | None = None) -> str:
    """The class of a camera: front, side (or left side / right side), back or overhead."""
    settings = settings or PromptSettings()
    if elevation_deg > settings.overhead_deg:
        return "overhead"
    azimuth = (azimuth_deg + 180) % 360 - 180
    if abs(azimuth) < settings.front_deg:
        return "front"
    if abs(azimuth) > settings.back_deg:
        return "back"
    if not settings.sides:
        return "side"
    return "left side" if azimuth > 0 else "right side"


class ViewPrompts:
    """All texts a run can ask its prior for, and which of them each view needs.

    Args:
        prompt: the user's words. negative: what to move away from; empty means the unconditional model.
        settings: how the view and the shading enter the words.
    """

    def __init__(self, prompt: str, negative: str = "", settings: PromptSettings | None = None) -> None:
        if not prompt.strip():
            raise UserError("The prompt is empty", "there is nothing to make", 'write --prompt "a red mug"')
        self.prompt, self.negative = prompt.strip(), negative.strip()
        self.settings = settings or PromptSettings()

    def text(self, view: str | None, textureless: bool = False) -> str:
        """The prompt of one view class; None for a prompt without view words."""
        s = self.settings
        text = self.prompt
        if view is not None and view in s.per_view:
            text = s.per_view[view].strip()
        elif view is not None and view in ("left side", "right side") and "side" in s.per_view:
            text = s.per_view["side"].strip()
        elif view is not None and s.view_words:
            body = text.rstrip(" ,.;")
            text = f"{body}, {view} view" if s.position == "suffix" else f"{view} view of {body}"
        return text + s.textureless_suffix if textureless else text

    def classes(self, views: Views) -> list[str]:
        """View class of each view."""
        pairs = zip(views.azimuth_deg.tolist(), views.elevation_deg.tolist(), strict=True)
        return [view_class(azimuth, elevation, self.settings) for azimuth, elevation in pairs]

    def texts(self, views: Views, textureless: bool = False) -> list[str]:
        """The prompt of each view."""
        return [self.text(view, textureless) for view in self.classes(views)]

    def all_texts(self) -> list[str]:
        """Every text any view can need, the negative first, without repetition."""
        sides = ("left side", "right side") if self.settings.sides else ("side",)
        texts = [self.negative]
        for textureless in (False, True):
            texts += [self.text(view, textureless) for view in ("front", *sides, "back", "overhead")]
        return list(dict.fromkeys(texts))


def check_length(texts: list[str], count: Callable[[str], int], limit: int) -> None:
    """Refuse texts that a text encoder would cut, since what it cuts first are the view words at the end.

    Args:
        texts: prompts. count: tokens of a text, special tokens included. limit: what the encoder takes.
    Raises: UserError naming the longest text, its length and how much is too much.
    """
    lengths = [count(text) for text in texts]
    longest = max(range(len(texts)), key=lengths.__getitem__, default=None)
    if longest is not None and lengths[longest] > limit:
        raise UserError(
            "The prompt is too long for the prior's text encoder",
            f"{texts[longest]!r} is {lengths[longest]} tokens and the encoder reads {limit}; "
            "the view words at its end would be cut off",
            f"shorten the prompt by about {lengths[longest] - limit} tokens (a word is one or two)",
        )
