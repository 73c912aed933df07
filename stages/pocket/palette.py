"""The pocket world's colours and the random variation of its objects."""

from __future__ import annotations

import colorsys

import numpy as np

from stages.pocket.shapes import Colour

COLOURS: dict[str, Colour] = {  # sRGB
    "red": (0.85, 0.10, 0.10),
    "orange": (0.97, 0.50, 0.06),
    "yellow": (0.97, 0.86, 0.12),
    "green": (0.14, 0.60, 0.18),
    "blue": (0.12, 0.26, 0.84),
    "purple": (0.50, 0.16, 0.68),
    "pink": (0.98, 0.56, 0.74),
    "brown": (0.42, 0.25, 0.12),
    "white": (0.92, 0.92, 0.92),
    "black": (0.06, 0.06, 0.06),
    "grey": (0.50, 0.50, 0.50),
    "cyan": (0.12, 0.80, 0.86),
}
TRIM: dict[str, Colour] = {  # the natural colours of secondary parts
    "ink": (0.06, 0.06, 0.06),
    "dark": (0.17, 0.17, 0.19),
    "steel": (0.62, 0.64, 0.67),
    "white": (0.94, 0.94, 0.94),
    "cream": (0.95, 0.89, 0.76),
    "glass": (0.66, 0.85, 0.97),
    "wood": (0.45, 0.28, 0.14),
    "slate": (0.30, 0.30, 0.36),
    "gold": (0.95, 0.74, 0.20),
    "orange": (0.96, 0.50, 0.08),
    "flame": (1.00, 0.72, 0.12),
    "red": (0.82, 0.12, 0.12),
    "rose": (0.95, 0.50, 0.58),
}
DARK = ("black", "brown", "blue", "purple")  # bodies on which black features would be lost
VARIATION = 0.25  # of the full spread: what words alone leave open must stay below what a picture of 64 pixels shows
DISTINCT = 0.32  # least sRGB distance at which a part is told from the body behind it


class Vary:
    """Random factors of an object's proportions; without a generator every factor is 1 (the canonical object).

    Args:
        rng: where the factors come from.
        amount: share of each spread that is used, in [0, 1].
    """

    def __init__(self, rng: np.random.Generator | None, amount: float = VARIATION) -> None:
        self.rng, self.amount = rng, amount

    def __call__(self, value: float, spread: float = 0.18) -> float:
        """`value` times a uniform factor in 1 +- amount spread."""
        return value if self.rng is None else value * (1 + self.amount * spread * (2 * self.rng.random() - 1))


class Palette:
    """The colours of one object: `main` from its caption, trim parts by name, moved apart from `main` if too close.

    `main` is one tuple object: a part is a body part, and takes the pattern, if its colour `is` that object.
    `choices` are the trims taken so far, in order: what a caption's colour decides beside the main colour.
    """

    def __init__(
        self, colour: str, rng: np.random.Generator | None, patterned: bool = False, amount: float = VARIATION
    ) -> None:
        self.name = colour
        self.patterned = patterned
        self.main = _jitter(COLOURS[colour], rng, amount)
        self.choices: list[str] = []

    def trim(self, *names: str) -> Colour:
        """Return the first of these trim colours that differs enough from the main colour, else the farthest."""
        base = np.array(COLOURS[self.name])
        distance = [float(np.linalg.norm(base - TRIM[n])) for n in names]
        distinct = [name for name, d in zip(names, distance, strict=True) if d >= DISTINCT]
        name = distinct[0] if distinct else names[int(np.argmax(distance))]
        self.choices.append(name)
        return TRIM[name]

    @property
    def ink(self) -> Colour:
        """Face features: black, on dark bodies white."""
        self.choices.append("white" if self.name in DARK else "ink")
        return TRIM[self.choices[-1]]

    @property
    def second(self) -> Colour:
        """The pattern's second colour: white, on light bodies black."""
        return self.trim("white", "ink")

    @property
    def mark(self) -> Colour:
        """Labels and badges: the second colour, on patterned bodies one that the pattern does not have."""
        return self.trim("flame", "red") if self.patterned else self.second


def _jitter(colour: Colour, rng: np.random.Generator | None, amount: float) -> Colour:
    if rng is None:
        return tuple(colour)
    h, s, v = colorsys.rgb_to_hsv(*colour)
    dh, ds, dv = amount * (2 * rng.random(3) - 1)
    h, s, v = (h + 0.012 * dh) % 1, min(s * (1 + 0.06 * ds), 1), min(v * (1 + 0.06 * dv), 1)
    return colorsys.hsv_to_rgb(h, s, v)


def srgb_to_linear(colour) -> np.ndarray:
    """Decode sRGB by IEC 61966-2-1, the inverse of kernels.srgb.linear_to_srgb."""
    colour = np.asarray(colour, dtype=np.float64)
    return np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)
