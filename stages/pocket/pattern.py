"""Stripes, spots and checks cut exactly into a surface, so that their edges stay crisp at any resolution.

The surface is refined, then cut along the zero level of a scalar function of position (each crossing edge gets one
shared new vertex, so the surface stays closed), and the faces on the two sides get the two colours.
"""

from __future__ import annotations

import numpy as np

PATTERNS = ("striped", "spotted", "checkered")
STRIPE, SPOT_RADIUS, SPOT_SPACING, CHECK = 0.17, 0.115, 0.36, 0.22  # in units of the normalised object
AROUND = 5  # periods of the checks around the axis


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
            out += [np.stack([m[:, k], f[:, i], m[:, i]], 1), np.stack([f[:, k], m[:, k], m[:, i]], 1),
                    np.stack([f[:, k], m[:, i], f[:, j]], 1)]
        three = number == 3
        f, m = faces[three], middle[three]
        out += [np.stack([f[:, 0], m[:, 0], m[:, 2]], 1), np.stack([f[:, 1], m[:, 1], m[:, 0]], 1),
                np.stack([f[:, 2], m[:, 2], m[:, 1]], 1), m]
        faces = np.concatenate(out)


def cut(vertices: np.ndarray, faces: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Insert the zero level of `values` [V] (linear along edges): afterwards no face has both signs inside."""
    values = np.where(np.abs(values) < 1e-3, 1e-3, values)  # a level through a vertex would make sliver faces
    count = len(vertices)
    positive = values > 0
    number = positive[faces].sum(1)
    crossing = (number == 1) | (number == 2)
    f = faces[crossing]
    lone = positive[f] == (number[crossing] == 1)[:, None]  # the corner on its own side
    first = lone.argmax(1)
    f = np.take_along_axis(f, (first[:, None] + np.arange(3)) % 3, 1)  # lone corner first
    keys = _edge_keys(f, count)[:, [0, 2]]
    unique, inverse = np.unique(keys, return_inverse=True)
    a, b = np.divmod(unique, count)
    t = np.clip(values[a] / (values[a] - values[b]), 0.02, 0.98)[:, None]
    vertices = np.concatenate([vertices, vertices[a] + t * (vertices[b] - vertices[a])])
    m = count + inverse.reshape(keys.shape)
    pieces = [faces[~crossing], np.stack([f[:, 0], m[:, 0], m[:, 1]], 1),
              np.stack([m[:, 0], f[:, 1], f[:, 2]], 1), np.stack([m[:, 0], f[:, 2], m[:, 1]], 1)]
    return vertices, np.concatenate(pieces)


def _spots(points: np.ndarray) -> np.ndarray:
    """Spot centres by farthest-point sampling, starting from the foremost point."""
    centres = [points[(points @ [0.11, 0.07, 1.0]).argmax()]]
    distance = ((points - centres[0]) ** 2).sum(1)
    while distance.max() > SPOT_SPACING**2:
        centres.append(points[distance.argmax()])
        distance = np.minimum(distance, ((points - centres[-1]) ** 2).sum(1))
    return np.stack(centres)


def apply_pattern(
    vertices: np.ndarray, faces: np.ndarray, pattern: str, axis: str = "y", square: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut `pattern` into a surface given in normalised coordinates.

    Args:
        axis: the object's long axis: stripes follow each other along it, checks go around it.
        square: checks in the planes of the faces (boxes) instead of around the axis.
    Returns: vertices, faces, and which faces [F] bool carry the second colour; faces of different colour share no
        vertex.
    """
    vertices, faces = refine(vertices, faces, 0.11)
    along, across, other = {"y": (1, 0, 2), "z": (2, 0, 1)}[axis]

    def stripes(p: np.ndarray, width: float) -> np.ndarray:
        return np.cos(np.pi * p / width)

    def around(p: np.ndarray) -> np.ndarray:
        return np.sin(AROUND * np.arctan2(p[:, across], p[:, other]) + 0.5 * np.pi)

    if pattern == "spotted":
        centres = _spots(vertices)

        def level(p: np.ndarray) -> np.ndarray:
            squared = (p**2).sum(1)[:, None] + (centres**2).sum(1) - 2 * p @ centres.T
            return SPOT_RADIUS - np.sqrt(np.maximum(squared.min(1), 0))

        levels = [level]
    elif pattern == "striped":
        levels = [lambda p: stripes(p[:, along], STRIPE)]
    elif pattern == "checkered" and square:
        levels = [lambda p, k=k: stripes(p[:, k], CHECK) for k in range(3)]
    elif pattern == "checkered":
        levels = [lambda p: stripes(p[:, along], CHECK), around]
    else:
        raise ValueError(f"pattern: wanted one of {PATTERNS}, got {pattern!r}")
    for level in levels:
        vertices, faces = cut(vertices, faces, level(vertices))
    corners = vertices[faces]  # [F, 3, 3]
    centre = corners.mean(1)
    signs = np.stack([level(centre) > 0 for level in levels])  # [levels, F]
    if pattern == "checkered" and square:
        normal = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
        signs[np.abs(normal).argmax(1), np.arange(len(faces))] = False
    second = signs.sum(0) % 2 == 1
    used = np.unique(np.concatenate([faces[second], faces[~second] + len(vertices)]))
    new = np.where(second[:, None], faces, faces + len(vertices))
    return vertices[used % len(vertices)], np.searchsorted(used, new), second
