"""View-dependent prompts: which words a camera adds to the prompt, and takes from it (DreamFusion sec. 3.2.2).

Classes by camera: overhead above 60 deg of elevation; else front within 45 deg of azimuth 0, back beyond 135, side
between. The object faces +z with y up, so its own left is towards +x: a camera at azimuth 90 sees the left side.

Cures for faces on all sides (Janus): prompts and negative prompts by hand for each class, words of the prompt that
contradict the view dropped, and texts mixed by azimuth, with Perp-Neg or without (`blend`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from stages.cameras import Views
from stages.errors import UserError

CLASSES = ("front", "side", "left side", "right side", "back", "overhead")

# What a prompt may say that a view cannot show. Hong et al. (arXiv 2303.15413) find such words by asking a
# masked language model how likely the view is beside each word; this list is the same idea without the model, and
# `contradictions` adds to it.
_LOOKS = "facial eyed smiling smirking grinning laughing winking frowning crying licking yawning".split()
_FACE = [
    "tongue out",
    *"""face faces eye eyes mouth nose beak snout muzzle smile smiles smirk grin grins teeth tongue""".split(),
    *_LOOKS,
]
_FROM_THE_FRONT = ["front view", "frontal", "front-facing", "facing forward", "facing front", "portrait", "headshot"]
_FROM_THE_FRONT += [f"{verb} at the {who}" for verb in ("looking", "staring") for who in ("camera", "viewer")]
_FROM_THE_FRONT += ["facing the camera", "facing the viewer"]
_FROM_THE_SIDE = ["side view", "in profile", "profile view", "from the side", "seen from the side"]
_FROM_BEHIND = ["back view", "rear view", "from behind", "seen from behind", "from the back", "seen from the back"]
_FROM_ABOVE = ["overhead view", "top view", "from above", "seen from above", "bird's eye view", "top-down view"]
CONTRADICTIONS: dict[str, list[str]] = {
    "front": [*_FROM_THE_SIDE, *_FROM_BEHIND, *_FROM_ABOVE],
    "side": [*_FROM_THE_FRONT, *_FROM_BEHIND, *_FROM_ABOVE],
    "back": [*_FROM_THE_FRONT, *_FROM_THE_SIDE, *_FROM_ABOVE, *_FACE],
    "overhead": [*_FROM_THE_FRONT, *_FROM_THE_SIDE, *_FROM_BEHIND],
}


class PromptSettings(BaseModel):
    """Settings of the words that views add to the prompt."""

    model_config = ConfigDict(extra="forbid")

    view_words: bool = Field(True, description="add the view's words to the prompt")
    position: Literal["suffix", "prefix"] = Field("suffix", description="'..., front view' or 'front view of ...'")
    sides: bool = Field(False, description="tell left from right: 'left side view' and 'right side view'")
    front_deg: float = Field(45.0, gt=0, le=180, description="front up to this azimuth on either side, degrees")
    back_deg: float = Field(135.0, gt=0, le=180, description="back beyond this azimuth on either side, degrees")
    overhead_deg: float = Field(60.0, gt=-90, le=90, description="overhead above this elevation, degrees")
    textureless_suffix: str = Field("", description="added to the prompt of textureless renders, ', clay render'")
    per_view: dict[str, str] = Field({}, description="whole prompt by view class, in place of the made one")
    per_view_negative: dict[str, str] = Field({}, description="negative prompt by view class, in place of the common")
    debias: bool = Field(False, description="drop the prompt's words that the view contradicts: 'smiling' from behind")
    contradictions: dict[str, list[str]] = Field({}, description="debias: more words or phrases to drop, by view class")
    blend: Literal["classes", "interpolated", "perp_neg"] = Field(
        "classes", description="text of a view: its class's; embeddings mixed by azimuth; mixed, and Perp-Neg"
    )
    perp_neg: float = Field(1.0, ge=0, le=10, description="perp_neg: factor on the published negative weights")

    def unread(self) -> set[str]:
        """Return the settings that nothing reads as the others stand."""
        off = {"contradictions": not self.debias, "perp_neg": self.blend != "perp_neg"}
        return {name for name, unread in off.items() if unread}

    @field_validator("per_view", "per_view_negative", "contradictions")
    @classmethod
    def _check_classes(cls, value: dict[str, str] | dict[str, list[str]]) -> dict[str, str] | dict[str, list[str]]:
        for name, texts in value.items():
            if name not in CLASSES:
                raise ValueError(f"unknown view class {name!r}; allowed: {', '.join(CLASSES)}")
            if not texts or not all(text.strip() for text in ([texts] if isinstance(texts, str) else texts)):
                raise ValueError(f"the text of view class {name!r} is empty")
        return value

    @model_validator(mode="after")
    def _check_sides(self) -> PromptSettings:
        for name in (*self.per_view, *self.per_view_negative, *self.contradictions):
            if name.endswith(" side") and not self.sides:
                raise ValueError(f"view class {name!r} needs sides: true; without it both sides are 'side'")
        return self

    @model_validator(mode="after")
    def _check_blend(self) -> PromptSettings:
        if self.blend != "classes" and not self.view_words and not self.per_view:
            raise ValueError(f"blend: {self.blend} has nothing to mix with view_words: false and no per_view")
        return self


def view_class(azimuth_deg: float, elevation_deg: float, settings: PromptSettings | None = None) -> str:
    """Return the class of a camera: front, side (or left side / right side), back or overhead."""
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


def without_contradictions(prompt: str, view: str, more: dict[str, list[str]] | None = None) -> str:
    """Return the prompt without the words that a view contradicts.

    A dropped noun takes its 'with ...' or 'and ...' along: "a smiling cat with big eyes" from behind is "a cat", and
    "a knight and a smiling princess" keeps its princess. Nothing is dropped if nothing would be left.

    Args:
        prompt: the user's words.
        view: a class of CLASSES.
        more: further words or phrases by class; those of "side" count for both sides.
    """
    kinds = {view, "side"} if view.endswith("side") else {view}
    phrases = [p for kind in sorted(kinds) for p in [*CONTRADICTIONS.get(kind, []), *(more or {}).get(kind, [])]]
    text = prompt
    for phrase in sorted(dict.fromkeys(phrases), key=len, reverse=True):
        word = r"\s+".join(re.escape(part) for part in phrase.split())
        led = rf"(?:\s*,)?\s*\b(?:with|and|showing)\s+(?:(?!with\b|and\b)[\w'-]+\s+){{0,3}}?{word}(?![\w'-])"
        led += r"(?=\s*(?:[,.;]|$|(?:with|and)\b))" if phrase in _LOOKS else ""  # else a noun follows, which stays
        text = re.sub(led, " ", text, flags=re.IGNORECASE)
        text = re.sub(rf"\b(an?)\s+{word}[\s,]+(?=(\w))", _article, text, flags=re.IGNORECASE)
        text = re.sub(rf"(?<![\w'-]){word}(?![\w'-])(?:\s+of\b)?", " ", text, flags=re.IGNORECASE)
    text = re.sub(r"\s+(?=[,.;])|^[\s,;]+", "", " ".join(text.split()))
    text = re.sub(r"([,;])(?:\s*[,;])+", r"\1", text).rstrip(" ,;")
    text = re.sub(r",?\s+(?:with|and|showing|of)(?=,|$)", "", text)
    words = [word for word in re.findall(r"\w+", text.lower()) if word not in ("a", "an", "the", "of", "with", "and")]
    return text if words else prompt


def _article(match: re.Match[str]) -> str:
    """The article of a dropped word as the next word wants it."""
    article = "an" if match[2].lower() in "aeiou" else "a"
    return (article.capitalize() if match[1][0] == "A" else article) + " "


def azimuth_blend(azimuth_deg: float, sides: bool = False) -> tuple[str, str, float]:
    """Return the two classes that a view lies between, and the share r of the first.

    Front - side over |azimuth| 0 to 90 deg, side - back over 90 to 180; as stable-dreamfusion and threestudio do.
    """
    azimuth = (azimuth_deg + 180) % 360 - 180
    side = ("left side" if azimuth > 0 else "right side") if sides else "side"
    away = abs(azimuth) / 90
    return ("front", side, 1 - away) if away < 1 else (side, "back", 2 - away)


def perp_neg_weights(azimuth_deg: float) -> tuple[float, float]:
    """Return Perp-Neg's weights (<= 0) of the two classes of :func:`azimuth_blend` as negatives (arXiv 2304.04968).

    f(r; a, b, c) = a exp(-b r) + c with threestudio's constants. From the front the side is pushed away and from the
    side the front, each at 1.57; from behind the side is pushed away at 0.39 and the front, which takes the second
    place there, at 1.97.
    """

    def f(r: float, a: float, b: float, c: float) -> float:
        return -max(a * math.exp(-b * r) + c, 0.0)

    away = abs((azimuth_deg + 180) % 360 - 180) / 90
    if away < 1:
        return f(1 - away, 4, 0.5, -2.426), f(away, 4, 0.5, -2.426)
    return f(2 - away, 1, 0.5, -0.606), f(2 - away, 1, 0.5, 0.967)


@dataclass(frozen=True)
class ViewText:
    """The texts of one view; its embedding is share * text + (1 - share) * other.

    Args:
        text: the prompt with the view's words.
        other: the text that it is mixed with.
        share: in [0, 1]; 1 is the text alone.
        negative: what to move away from.
        perp_neg: Perp-Neg's negative texts, each with its weight <= 0.
    """

    text: str
    other: str
    share: float
    negative: str
    perp_neg: tuple[tuple[str, float], ...] = ()


class ViewPrompts:
    """All texts that a run can give its prior, and which of them each view needs.

    Args:
        prompt: the user's words.
        negative: what to move away from; empty means the unconditional model.
        settings: how the view and the shading enter the words.
    Raises: UserError for an empty prompt.

    Example:
        >>> ViewPrompts("a red mug").text("back")
        'a red mug, back view'
    """

    def __init__(self, prompt: str, negative: str = "", settings: PromptSettings | None = None) -> None:
        if not prompt.strip():
            raise UserError("The prompt is empty", "there is nothing to make", 'write --prompt "a red mug"')
        self.prompt, self.negative = prompt.strip(), negative.strip()
        self.settings = settings or PromptSettings()

    def text(self, view: str | None, textureless: bool = False) -> str:
        """Return the prompt of a view class; of None without view words."""
        s = self.settings
        text = self.prompt
        by_hand = _of_class(s.per_view, view)
        if by_hand is not None:
            text = by_hand
        elif view is not None:
            if s.debias:
                text = without_contradictions(text, view, s.contradictions)
            if s.view_words:
                body = text.rstrip(" ,.;")
                text = f"{body}, {view} view" if s.position == "suffix" else f"{view} view of {body}"
        return text + s.textureless_suffix if textureless else text

    def negative_text(self, view: str) -> str:
        """Return the negative prompt of a view class."""
        by_hand = _of_class(self.settings.per_view_negative, view)
        return self.negative if by_hand is None else by_hand

    def negatives(self) -> list[str]:
        """Return the negative prompts of all classes, empty ones included, without repetition."""
        views = ("front", "left side", "right side", "back", "overhead")
        return list(dict.fromkeys([self.negative, *(self.negative_text(view) for view in views)]))

    def classes(self, views: Views) -> list[str]:
        """Return the view class of each view."""
        views = views.on_host
        pairs = zip(views.azimuth_deg.tolist(), views.elevation_deg.tolist(), strict=True)
        return [view_class(azimuth, elevation, self.settings) for azimuth, elevation in pairs]

    def texts(self, views: Views, textureless: bool = False) -> list[str]:
        """Return the prompt of each view's class, whatever the blend."""
        return [self.text(view, textureless) for view in self.classes(views)]

    def view_texts(self, views: Views, textureless: bool = False) -> list[ViewText]:
        """Return the texts of each view: its class's, or the mixture that its azimuth gives."""
        s = self.settings
        texts, views = [], views.on_host
        for view, azimuth in zip(self.classes(views), views.azimuth_deg.tolist(), strict=True):
            prompt, negative = self.text(view, textureless), self.negative_text(view)
            if s.blend == "classes" or view == "overhead":
                texts.append(ViewText(prompt, prompt, 1.0, negative))
                continue
            first, second, share = azimuth_blend(azimuth, s.sides)
            ends = self.text(first, textureless), self.text(second, textureless)
            perp_neg: tuple[tuple[str, float], ...] = ()
            if s.blend == "perp_neg":
                negatives = ends if second != "back" else (ends[0], self.text("front", textureless))
                weights = perp_neg_weights(azimuth)
                perp_neg = tuple((text, s.perp_neg * w) for text, w in zip(negatives, weights, strict=True))
            texts.append(ViewText(*ends, share, negative, perp_neg))
        return texts

    def all_texts(self) -> list[str]:
        """Return every text that any view can need, the negatives first, without repetition."""
        sides = ("left side", "right side") if self.settings.sides else ("side",)
        views = ("front", *sides, "back", "overhead")
        texts = self.negatives()
        for textureless in (False, True):
            texts += [self.text(view, textureless) for view in views]
        return list(dict.fromkeys(texts))


def _of_class(texts: dict[str, str], view: str | None) -> str | None:
    """Return the text of a class, that of "side" for a side without its own; None without any."""
    if view in ("left side", "right side") and view not in texts:
        view = "side"
    return texts[view].strip() if view in texts else None


def check_length(texts: list[str], count: Callable[[str], int], limit: int) -> None:
    """Refuse texts that a text encoder would cut, since what it cuts first are the view words at the end.

    Args:
        texts: prompts.
        count: tokens of a text, special tokens included.
        limit: what the encoder takes.
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
