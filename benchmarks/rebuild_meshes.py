"""Three closed coloured meshes with concavities for the reference benchmark; none is of the pocket world.

All are made from closed forms: solid (watertight, manifold, outward), y up, in the sphere of radius 0.8, with smooth
and abrupt colour changes in linear RGB at the vertices.
"""

from __future__ import annotations

import numpy as np

from stages.mesh.mesh import Mesh


def knot(around: int = 320, across: int = 28) -> Mesh:
    """A trefoil tube whose thickness and colour change along it: deep undercuts, strands passing behind strands."""
    s = np.arange(around) * 2 * np.pi / around
    centre = np.stack([np.sin(s) + 2 * np.sin(2 * s), np.cos(s) - 2 * np.cos(2 * s), -1.3 * np.sin(3 * s)], -1)
    tangent = np.roll(centre, -1, 0) - np.roll(centre, 1, 0)
    tangent /= np.linalg.norm(tangent, axis=1, keepdims=True)
    outward = centre - 0.7 * tangent * (centre * tangent).sum(1, keepdims=True)
    outward -= tangent * (outward * tangent).sum(1, keepdims=True)
    outward /= np.linalg.norm(outward, axis=1, keepdims=True)
    side = np.cross(tangent, outward)
    radius = 0.62 + 0.12 * np.cos(3 * s)
    v = np.arange(across) * 2 * np.pi / across
    ring = np.cos(v)[None, :, None] * outward[:, None] + np.sin(v)[None, :, None] * side[:, None]
    points = centre[:, None] + radius[:, None, None] * ring
    phase = 2 * np.pi * np.arange(3) / 3
    hue = 0.42 + 0.36 * np.cos(s[:, None, None] - phase)
    stripes = np.where((np.arange(around) // 16 % 2 == 0)[:, None, None], 1.0, 0.45)
    colours = np.broadcast_to(hue * stripes, points.shape)
    i, j = np.meshgrid(np.arange(around), np.arange(across), indexing="ij")
    a, b = i * across + j, (i + 1) % around * across + j
    c, d = (i + 1) % around * across + (j + 1) % across, i * across + (j + 1) % across
    faces = np.concatenate([np.stack([a, b, c], -1).reshape(-1, 3), np.stack([a, c, d], -1).reshape(-1, 3)])
    return _fit(points.reshape(-1, 3), faces, colours.reshape(-1, 3))


def bowl(around: int = 128) -> Mesh:
    """Return a footed bowl, blue outside with a white band, orange inside: one sees into a deep concavity."""
    angle = np.linspace(0, np.pi / 2, 25)
    outer = np.stack([0.75 * np.sin(angle), -0.6 * np.cos(angle)], -1)
    outer = outer[outer[:, 0] > 0.28]
    foot = np.array([[0.0, -0.74], [0.1, -0.74], [0.2, -0.74], [0.3, -0.74], [0.31, -0.72], [0.28, -0.6]])
    lip = np.array([[0.75, 0.02], [0.72, 0.05], [0.69, 0.05], [0.66, 0.02]])
    inner = np.stack([0.66 * np.sin(angle), -0.5 * np.cos(angle)], -1)[::-1]
    profile = np.concatenate([foot, outer, lip, inner])  # from the pole below, up outside, down inside
    height, inside = profile[:, 1], np.arange(len(profile)) >= len(foot) + len(outer) + 3
    blue, white, orange = np.array([0.05, 0.12, 0.55]), np.array([0.8, 0.8, 0.75]), np.array([0.8, 0.28, 0.04])
    colour = np.where(((height > -0.3) & (height < -0.12))[:, None], white, blue)
    colour = np.where(inside[:, None], orange, colour)
    points, colours = [], []
    u = np.arange(around) * 2 * np.pi / around
    middle = profile[1:-1]
    for (r, y), c in zip(middle, colour[1:-1], strict=True):
        points.append(np.stack([r * np.sin(u), np.full(around, y), r * np.cos(u)], -1))
        spots = np.where((np.cos(6 * u) > 0.5)[:, None] & (c == orange).all(), c * [0.9, 0.5, 1.0], c)
        colours.append(spots)
    rings = len(middle)
    poles = np.array([[0, profile[0, 1], 0], [0, profile[-1, 1], 0]])
    points, colours = np.concatenate([*points, poles]), np.concatenate([*colours, colour[[0]], colour[[-1]]])
    k, n = np.arange(around), (np.arange(around) + 1) % around
    faces = [np.stack([np.full(around, rings * around), n, k], -1)]
    for ring in range(rings - 1):
        a, b, c, d = ring * around + k, ring * around + n, (ring + 1) * around + n, (ring + 1) * around + k
        faces += [np.stack([a, b, c], -1), np.stack([a, c, d], -1)]
    last = (rings - 1) * around
    faces.append(np.stack([np.full(around, rings * around + 1), last + k, last + n], -1))
    return _fit(points, np.concatenate(faces), colours)


def bracket(per_side: int = 24, depth: int = 14) -> Mesh:
    """An L-shaped bracket with a round hole through its corner block: flat faces, sharp edges, a re-entrant corner."""
    outline = np.array([[0, 0], [1.2, 0], [1.2, 0.42], [0.42, 0.42], [0.42, 1.2], [0, 1.2]])
    hole, radius, width, rings = np.array([0.21, 0.21]), 0.13, 0.6, 12
    edge = []
    for a, b in zip(outline, np.roll(outline, -1, 0), strict=True):
        edge.append(a + (b - a) * (np.arange(per_side) / per_side)[:, None])
    edge = np.concatenate(edge)  # [N, 2] counter-clockwise
    n = len(edge)
    towards = edge - hole
    inner = hole + radius * towards / np.linalg.norm(towards, axis=1, keepdims=True)
    share = (np.arange(rings + 1) / rings)[:, None, None]
    collars = hole + (inner - hole) * np.array([1.2, 1.3])[:, None, None]  # an abrupt change of colour lies between
    disc = np.concatenate([inner[None], collars[:1], collars[1] + share * (edge - collars[1])])  # hole to outline
    # a closed ring of loops: front disc outwards, outer wall back, back disc inwards, hole wall forward
    z = width * (0.5 - np.arange(depth + 1) / depth)
    front = [np.column_stack([loop, np.full(n, z[0])]) for loop in disc]
    wall = [np.column_stack([edge, np.full(n, level)]) for level in z[1:-1]]
    back = [np.column_stack([loop, np.full(n, z[-1])]) for loop in disc[::-1]]
    bore = [np.column_stack([inner, np.full(n, level)]) for level in z[1:-1][::-1]]
    loops = np.stack([*front, *wall, *back, *bore])  # [L, N, 3]
    count = len(loops)
    red, yellow, green, dark = ([0.65, 0.06, 0.05], [0.75, 0.6, 0.08], [0.08, 0.4, 0.16], [0.06, 0.06, 0.08])
    x, y, level = loops[..., 0:1], loops[..., 1:2], loops[..., 2:3]
    colours = np.where(x > y, red + (np.array(yellow) - red) * np.clip(x / 1.2, 0, 1), green)
    colours = np.where((np.abs(level) < 0.1) & (y > 0.7), [0.75, 0.75, 0.8], colours)
    colours = np.where(np.linalg.norm(loops[..., :2] - hole, axis=-1, keepdims=True) < 1.25 * radius, dark, colours)
    k, following = np.arange(n), (np.arange(n) + 1) % n
    faces = []
    for i in range(count):
        a, b = i * n + k, i * n + following
        c, d = (i + 1) % count * n + following, (i + 1) % count * n + k
        faces += [np.stack([a, c, b], -1), np.stack([a, d, c], -1)]
    return _fit(loops.reshape(-1, 3), np.concatenate(faces), colours.reshape(-1, 3))


def _fit(points: np.ndarray, faces: np.ndarray, colours: np.ndarray, radius: float = 0.8) -> Mesh:
    """Centre the box on the origin, scale to `radius`, turn all faces outwards together."""
    points = points - (points.min(0) + points.max(0)) / 2
    points = points * (radius / np.linalg.norm(points, axis=1).max())
    mesh = Mesh(points.astype(np.float32), faces.astype(np.int32), colours.astype(np.float32))
    if mesh.signed_volume() < 0:
        mesh.faces = np.ascontiguousarray(mesh.faces[:, [0, 2, 1]])
    return mesh


MESHES = {"knot": knot, "bowl": bowl, "bracket": bracket}
