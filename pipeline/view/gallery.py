"""The runs of a folder as cards of the page's gallery."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.batch.gallery import picture_of
from pipeline.batch.listing import rows_of
from pipeline.view.follow import is_inside

MOST = 200  # cards on a page
SIDE = 192  # of a card's picture, pixels


@dataclass(frozen=True)
class Card:
    """A run in the gallery; `file` is what shows it best, of that time."""

    run: Path
    prompt: str
    seed: int
    state: str
    file: Path | None
    changed: int

    def picture(self) -> np.ndarray | None:
        """Return its picture, uint8 sRGB [H, W, 3], None without one that can be read."""
        from PIL import Image

        if self.file is None:
            return None
        try:
            with Image.open(self.file) as image:
                image.seek(0)
                shown = image.convert("RGB")
        except (OSError, EOFError, ValueError):
            return None
        shown.thumbnail((2 * SIDE, SIDE))
        return np.asarray(shown)


def cards_of(folder: Path) -> list[Card]:
    """Return the begun runs of a folder, those of a batch in its order. Raises: UserError where it is damaged."""
    cards = []
    for row in rows_of(folder):
        if not (row.folder / "config.yaml").is_file():
            continue
        file = picture_of(row.folder)
        if file is not None and not is_inside(file, row.folder):
            file = None
        changed = 0 if file is None else file.stat().st_mtime_ns
        cards.append(Card(row.folder, row.run.prompt, row.run.seed, row.state, file, changed))
    return cards[:MOST]
