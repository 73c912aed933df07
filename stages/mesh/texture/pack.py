"""Rectangles into a square with a skyline: the packing of our own UV charts (Jylänki 2010, skyline bottom-left)."""

from __future__ import annotations

import numpy as np


def _place(sizes: list[tuple[int, int]], side: int) -> list[tuple[int, int]] | None:
    """Lower left corners of rectangles (width, height) in a side x side square, or None if they do not fit."""
    skyline = [[0, 0, side]]  # x, height, width; left to right, no gaps
    places = []
    for width, height in sizes:
        best = None
        for i, (x, _, _) in enumerate(skyline):
            if x + width > side:
                break
            top, j, left = 0, i, width
            while left > 0:
                top = max(top, skyline[j][1])
                left -= skyline[j][2]
                j += 1
            if top + height <= side and (best is None or (top, x) < best[:2]):
                best = (top, x, i)
        if best is None:
            return None
        top, x, i = best
        places.append((x, top))
        left = width
        while left > 0:  # the new level replaces what it stands on
            if skyline[i][2] <= left:
                left -= skyline[i][2]
                del skyline[i]
            else:
                skyline[i][0] += left
                skyline[i][2] -= left
                left = 0
        skyline.insert(i, [x, top + height, width])
        if i + 1 < len(skyline) and skyline[i + 1][1] == top + height:
            skyline[i][2] += skyline.pop(i + 1)[2]
        if i > 0 and skyline[i - 1][1] == top + height:
            skyline[i - 1][2] += skyline.pop(i)[2]
    return places


def pack(sizes: np.ndarray, side: int, padding: int) -> tuple[np.ndarray, float]:
    """Return positions and one common scale that put rectangles into a square of `side` texels.

    Args:
        sizes: [N, 2] width and height >= 0, any unit.
        padding: least distance between rectangles, in texels.
    Returns: lower left corners [N, 2] in texels, and texels per unit; the largest scale found by bisection.
    Raises: ValueError if the rectangles do not fit at any scale (too many for `padding`).
    """
    sizes = np.asarray(sizes, dtype=np.float64)
    order = np.lexsort((np.arange(len(sizes)), -sizes[:, 0], -sizes[:, 1]))

    def attempt(scale: float) -> list[tuple[int, int]] | None:
        boxes = np.ceil(sizes[order] * scale).astype(np.int64) + 1 + padding
        if boxes.max() > side or boxes.prod(axis=1).sum() > side * side:
            return None
        return _place([(int(w), int(h)) for w, h in boxes], side)

    low, places = 0.0, attempt(0.0)
    if places is None:
        raise ValueError(f"{len(sizes)} charts with {padding} texels around each do not fit into {side} x {side}")
    high = side / np.sqrt(max(float(sizes.prod(axis=1).sum()), float(sizes.max()) ** 2, 1e-30))
    for _ in range(12):
        middle = (low + high) / 2
        denser = attempt(middle)
        if denser is None:
            high = middle
        else:
            low, places = middle, denser
        if low > 0 and high - low < 0.01 * low:
            break
    corners = np.empty((len(sizes), 2))
    corners[order] = np.asarray(places, dtype=np.float64) + padding / 2 + 0.5
    return corners, low
