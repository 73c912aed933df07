"""Stripes, spots and checks cut exactly into a surface, so that their edges stay crisp at any resolution.

The surface is cut along the zero levels of functions of position (planes; for spots, on a refined surface, the
distance to the nearest centre). Each crossing edge gets one shared new vertex, so the surface stays closed, and the
faces between the cuts get the two colours.
"""

from __future__ import annotations

import numpy as np

PATTERNS = ("striped", "spotted", "checkered")
STRIPE_MAIN, STRIPE_SECOND = 0.19, 0.15  # band heights; all lengths in units of the normalised object
SPOT_RADIUS, SPOT_SPACING, SPOT_EDGE = 0.115, 0.36, 0.13
CHECK, AROUND = 0.22, 5  # cell height; cells of each colour around the axis


def _edge_keys(faces: np.ndarray, count: int) -> np.ndarray:
    following = np.roll(faces, -1, 1)
    return np.minimum(faces, following) * count + np.maximum(faces, following)  # [F, 3], edge k joins k and k + 1


def refine(vertices: np.ndarray, faces: np.ndarray, longest: float) -> tuple[np.ndarray, np.ndarray]:
    """Halve every edge above `longest` until none is left; neighbours split alike, so no cracks appear."""
    while True:
        count = len(vertices)
        keys = _edge_keys(faces, count)
        a, b = np.divmod(keys, count)
        long = ((vertices[a] - vertices[b]) ** 2).sum(-1) > longest**2
        if not long.any():
            return vertices, faces
        unique = np.unique(keys[long])
        vertices = np.concatenate([vertices, 0.5 * (vertices[unique // count] + vertices[unique % count])])
        middle = count + np.searchsorted(unique, keys)  # valid where `long`
        number = long.sum(1)
        out = [faces[number == 0]]
        for k in range(3):
            i, j = (k + 1) % 3, (k + 2) % 3
            one = (number == 1) & long[:, k]
            f, m = faces[one], middle[one]
            out += [np.stack([f[:, k], m[:, k], f[:, j]], 1), np.stack([m[:, k], f[:, i], f[:, j]], 1)]
            two = (number == 2) & ~long[:, j]  # edges k and i are split: the corner i between them comes off
            f, m = faces[two], middle[two]
            out += [
                np.stack([m[:, k], f[:, i], m[:, i]], 1),
                np.stack([f[:, k], m[:, k], m[:, i]], 1),
                np.stack([f[:, k], m[:, i], f[:, j]], 1),
            ]
        three = number == 3
        f, m = faces[three], middle[three]
        out += [
            np.stack([f[:, 0], m[:, 0], m[:, 2]], 1),
            np.stack([f[:, 1], m[:, 1], m[:, 0]], 1),
            np.stack([f[:, 2], m[:, 2], m[:, 1]], 1),
            m,
        ]
        faces = np.concatenate(out)


def cut(vertices: np.ndarray, faces: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Insert the zero level of `values` [V] (linear along edges): afterwards no face has both signs inside.

    Returns: vertices, faces and values with the new vertices (of value 0) appended.
    """
    values = np.where(np.abs(values) < 1e-3, 1e-3, values)  # a level through a vertex would make sliver faces
    count = len(vertices)
    positive = values > 0
    number = positive[faces].sum(1)
    crossing = (number == 1) | (number == 2)
    if not crossing.any():
        return vertices, faces, values
    f = faces[crossing]
    lone = positive[f] == (number[crossing] == 1)[:, None]  # the corner on its own side
    f = np.take_along_axis(f, (lone.argmax(1)[:, None] + np.arange(3)) % 3, 1)  # lone corner first
    keys = _edge_keys(f, count)[:, [0, 2]]
    unique, inverse = np.unique(keys, return_inverse=True)
    a, b = np.divmod(unique, count)
    t = (values[a] / (values[a] - values[b]))[:, None]
    m = count + inverse.reshape(keys.shape)
    pieces = [
        faces[~crossing],
        np.stack([f[:, 0], m[:, 0], m[:, 1]], 1),
        np.stack([m[:, 0], f[:, 1], f[:, 2]], 1),
        np.stack([m[:, 0], f[:, 2], m[:, 1]], 1),
    ]
    vertices = np.concatenate([vertices, vertices[a] + t * (vertices[b] - vertices[a])])
    return vertices, np.concatenate(pieces), np.concatenate([values, np.zeros(len(unique))])


def _spot_centres(points: np.ndarray) -> np.ndarray:
    """Choose centres [S, 3] by farthest-point sampling of points [P, 3] from the foremost, SPOT_SPACING apart."""
    distance = np.full(len(points), np.inf)
    centres = [points[(points @ [0.11, 0.07, 1.0]).argmax()]]
    while True:
        np.minimum(distance, ((points - centres[-1]) ** 2).sum(1), out=distance)
        if distance.max() <= SPOT_SPACING**2:
            return np.array(centres)
        centres.append(points[distance.argmax()])


def _moved(centres: np.ndarray, canonical: np.ndarray, vertices: np.ndarray, nearest: int = 4) -> np.ndarray:
    """Move centres [S, 3] on the canonical surface along with its vertices [V, 3] to `vertices` [V, 3].

    Farthest-point sampling on every instance anew would scatter the spots: a hair's breadth decides which point is
    the farthest. So they are chosen once, on the canonical object, and follow their nearest vertices.
    """
    distance = np.sqrt(((centres[:, None] - canonical) ** 2).sum(-1))  # [S, V]
    index = np.argsort(distance, 1)[:, :nearest]
    weight = 1 / (np.take_along_axis(distance, index, 1) + 1e-6)
    weight /= weight.sum(1, keepdims=True)
    return centres + (weight[..., None] * (vertices - canonical)[index]).sum(1)


def _spot_level(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Return SPOT_RADIUS minus the distance of points [P, 3] to the nearest spot: [P]."""
    return SPOT_RADIUS - np.sqrt(((points[:, None] - centres) ** 2).sum(-1).min(1))


def _steps(low: float, high: float, first: float, *widths: float) -> np.ndarray:
    """Return positions first, first + widths[0], first + widths[0] + widths[1], ... in turn, inside (low, high)."""
    period = sum(widths)
    starts = np.cumsum([0.0, *widths[:-1]]) + first
    turns = np.arange(np.floor((low - first) / period) - 1, np.ceil((high - first) / period) + 1)
    every = (turns[:, None] * period + starts).reshape(-1)
    return every[(every > low) & (every < high)]


def apply_pattern(
    vertices: np.ndarray,
    faces: np.ndarray,
    pattern: str,
    *,
    canonical: np.ndarray | None = None,
    axis: str = "y",
    square: bool = False,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut `pattern` into a closed surface given in normalised coordinates.

    Args:
        canonical: the same vertices [V, 3] of the unvaried object, which says how many stripes there are and where
            the spots lie; None: this is the unvaried object.
        axis: the object's long axis: stripes follow each other along it from its low end to its high
            one, checks go around it.
        square: checks in the planes of the faces (boxes) instead of around the axis.
    Returns: vertices, faces, and which faces [F] bool carry the second colour; faces of different colour share no
        vertex.
    """
    along, across, other = {"y": (1, 0, 2), "z": (2, 0, 1)}[axis]
    low, high = vertices.min(0), vertices.max(0)
    canonical = vertices if canonical is None else canonical

    def slice_at(k: int, positions: np.ndarray) -> None:
        nonlocal vertices, faces
        for position in positions:
            vertices, faces, _ = cut(vertices, faces, vertices[:, k] - position)

    if pattern == "spotted":
        centres = _moved(_spot_centres(refine(canonical, faces, SPOT_EDGE)[0]), canonical, vertices)
        vertices, faces = refine(vertices, faces, SPOT_EDGE)
        vertices, faces, level = cut(vertices, faces, _spot_level(vertices, centres))
        second = level[faces].sum(1) > 0
    elif pattern == "striped":
        extent, period = high[along] - low[along], STRIPE_MAIN + STRIPE_SECOND
        bands = max(round((np.ptp(canonical[:, along]) - STRIPE_MAIN) / period), 1)
        fit = extent / (bands * period + STRIPE_MAIN)  # main at both ends
        first, widths = low[along] + fit * STRIPE_MAIN, (fit * STRIPE_SECOND, fit * STRIPE_MAIN)
        slice_at(along, _steps(low[along] + 1e-6, high[along] - 1e-6, first, *widths))
        height = np.minimum(vertices[:, along][faces].mean(1), high[along] - 1e-3)  # a flat top: last band
        second = (height - first) % sum(widths) < widths[0]
    elif pattern == "checkered" and square:
        for k in range(3):
            slice_at(k, _steps(low[k], high[k], 0.5 * CHECK, CHECK))
        corners = vertices[faces]
        cell = np.floor(corners.mean(1) / CHECK + 0.5).astype(int)
        normal = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
        cell[np.arange(len(faces)), np.abs(normal).argmax(1)] = 0
        second = cell.sum(1) % 2 == 1
    elif pattern == "checkered":
        slice_at(along, _steps(low[along], high[along], 0.5 * CHECK, CHECK))
        for angle in (np.arange(AROUND) + 0.5) * np.pi / AROUND:  # planes through the axis
            side = vertices[:, across] * np.cos(angle) - vertices[:, other] * np.sin(angle)
            vertices, faces, _ = cut(vertices, faces, side)
        centre = vertices[faces].mean(1)
        sector = np.floor(np.arctan2(centre[:, across], centre[:, other]) * AROUND / np.pi + 0.5).astype(int)
        second = (sector + np.floor(centre[:, along] / CHECK + 0.5).astype(int)) % 2 == 1
    else:
        raise ValueError(f"pattern: wanted one of {PATTERNS}, got {pattern!r}")
    carriers = np.zeros((2, len(vertices)), dtype=bool)
    carriers[1, faces[second]] = carriers[0, faces[~second]] = True
    number = np.cumsum(carriers.reshape(-1)) - 1
    new = number[faces + second[:, None] * len(vertices)]
    return np.concatenate([vertices[carriers[0]], vertices[carriers[1]]]), new, second
