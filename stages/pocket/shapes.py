"""Closed coloured solids from which the pocket world's objects are put together.

Every function returns a Part: one closed surface, counter-clockwise seen from outside, one flat colour. Vertices are
shared where the surface is smooth and split along sharp edges, so that area-weighted vertex normals look right.
Axes: y up, the object's front towards +z. Lengths are in each object's own unit; the world normalises the whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np

Colour = tuple[float, float, float]  # sRGB in [0, 1]
SHARP_COS = np.cos(np.radians(35.0))  # profile corners sharper than this split their ring


@dataclass
class Part:
    """One closed surface of one colour: vertices [V, 3] float64, faces [F, 3] int64, colour sRGB."""

    vertices: np.ndarray
    faces: np.ndarray
    colour: Colour

    def move(self, x: float = 0.0, y: float = 0.0, z: float = 0.0) -> Part:
        return Part(self.vertices + np.array((x, y, z)), self.faces, self.colour)

    def scale(self, x: float, y: float | None = None, z: float | None = None) -> Part:
        """Scale about the origin by positive factors; one number scales all axes."""
        return Part(self.vertices * (x, x if y is None else y, x if z is None else z), self.faces, self.colour)

    def turn(self, axis: str, degrees: float) -> Part:
        """Rotate about a coordinate axis through the origin, right-handed."""
        a, b = {"x": (1, 2), "y": (2, 0), "z": (0, 1)}[axis]
        c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
        out = self.vertices.copy()
        out[:, a] = c * self.vertices[:, a] - s * self.vertices[:, b]
        out[:, b] = s * self.vertices[:, a] + c * self.vertices[:, b]
        return Part(out, self.faces, self.colour)


@cache
def _strip_faces(rows: int, sides: int, skip: tuple[int, ...], poles: tuple[int, ...], closed: bool) -> np.ndarray:
    """Faces between consecutive rings of `sides` vertices; none after a row in `skip`; rows in `poles` are points."""
    faces = []
    j = np.arange(sides)
    k = (j + 1) % sides
    for row in range(rows if closed else rows - 1):
        if row in skip:
            continue
        after = (row + 1) % rows
        a, b, c, d = row * sides + j, row * sides + k, after * sides + k, after * sides + j
        if row not in poles:
            faces.append(np.stack([a, b, c], 1))
        if after not in poles:
            faces.append(np.stack([a, c, d], 1))
    return np.concatenate(faces)


@cache
def _circle(sides: int) -> np.ndarray:
    """Unit circle [sides, 2] as (sin, cos): from +z towards +x."""
    angle = np.arange(sides) * (2 * np.pi / sides)
    return np.stack([np.sin(angle), np.cos(angle)], 1)


def lathe(profile, colour: Colour, sides: int = 28, closed: bool = False) -> Part:
    """Make the surface of revolution about y of (radius, height) pairs, ordered so that the outside goes upwards.

    An open profile starts and ends on the axis (radius 0); a closed one is a loop that stays off the axis.
    """
    profile = np.asarray(profile, dtype=np.float64)
    before = profile - np.roll(profile, 1, 0)
    after = np.roll(before, -1, 0)
    cos = (before * after).sum(1) / np.maximum(np.linalg.norm(before, axis=1) * np.linalg.norm(after, axis=1), 1e-12)
    sharp = cos < SHARP_COS
    if not closed:
        sharp[[0, -1]] = False
    rings = np.repeat(np.arange(len(profile)), np.where(sharp, 2, 1))
    twin = np.concatenate([rings[1:] == rings[:-1], [False]])
    skip = tuple(np.flatnonzero(twin).tolist())
    poles = () if closed else tuple(np.flatnonzero(profile[rings, 0] < 1e-9).tolist())
    if closed and sharp[0]:  # the loop's first corner: its twin ring closes the loop
        raise ValueError("profile: a closed loop must start at a smooth point")
    points = profile[rings]
    circle = _circle(sides)
    vertices = np.empty((len(rings), sides, 3))
    vertices[..., 0] = points[:, :1] * circle[:, 0]
    vertices[..., 1] = points[:, 1:]
    vertices[..., 2] = points[:, :1] * circle[:, 1]
    return Part(vertices.reshape(-1, 3), _strip_faces(len(rings), sides, skip, poles, closed), colour)


@cache
def _unit_sphere(sides: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    angle = np.linspace(-np.pi / 2, np.pi / 2, rows + 1)
    profile = np.stack([np.cos(angle), np.sin(angle)], 1)
    profile[[0, -1], 0] = 0
    part = lathe(profile, (0, 0, 0), sides)
    return part.vertices, part.faces


def ellipsoid(radii, centre, colour: Colour, sides: int = 24) -> Part:
    """Make an axis-aligned ellipsoid; one number for `radii` makes a sphere."""
    vertices, faces = _unit_sphere(sides, sides // 2 + 1)
    return Part(vertices * radii + centre, faces, colour)


def frustum(bottom: float, top: float, height: float, base, colour: Colour, sides: int = 28) -> Part:
    """Make a cylinder, cone or truncated cone on `base`; a radius of 0 is a tip."""
    profile = [(0, 0), (bottom, 0), (top, height), (0, height)]
    if top == 0:
        profile = [(0, 0), *((bottom * (1 - t), height * t) for t in (0, 0.34, 0.67, 1))]
    return lathe(profile, colour, sides).move(*base)


def ring(radius: float, thickness: float, colour: Colour, sides: int = 32, flat: float = 1.0) -> Part:
    """Make a torus around y: centre-line radius, tube radius, tube height factor `flat`."""
    angle = np.arange(16) * (2 * np.pi / 16)
    profile = np.stack([radius + thickness * np.cos(angle), flat * thickness * np.sin(angle)], 1)
    return lathe(profile, colour, sides, closed=True)


@cache
def _box_topology() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Corner signs [24, 3] and axis [24] of each face's four corners; face triangles; bevel triangles."""
    signs, axes, sides = [], [], []
    for axis in range(3):
        for sign in (-1, 1):
            u, v = ((axis + 1) % 3, (axis + 2) % 3) if sign > 0 else ((axis + 2) % 3, (axis + 1) % 3)
            start = len(signs)
            for su, sv in ((-1, -1), (1, -1), (1, 1), (-1, 1)):
                corner = [0, 0, 0]
                corner[axis], corner[u], corner[v] = sign, su, sv
                signs.append(corner)
                axes.append(axis)
            sides += [(start, start + 1, start + 2), (start, start + 2, start + 3)]
    signs, axes = np.array(signs, dtype=np.float64), np.array(axes)
    corners = zip(map(tuple, signs.astype(int).tolist()), axes.tolist(), strict=True)
    index = {corner_axis: i for i, corner_axis in enumerate(corners)}
    bevels = []

    def add(triangle: tuple[int, int, int]) -> None:
        p = signs[list(triangle)] + 0.5 * np.eye(3)[axes[list(triangle)]] * signs[list(triangle)]
        outward = np.dot(np.cross(p[1] - p[0], p[2] - p[0]), p.mean(0)) > 0
        bevels.append(triangle if outward else (triangle[0], triangle[2], triangle[1]))

    for sx in (-1, 1):
        for sy in (-1, 1):
            for sz in (-1, 1):
                add(tuple(index[(sx, sy, sz), a] for a in range(3)))
    for axis in range(3):  # the edge along `axis`, between the faces of the two other axes
        u, v = (axis + 1) % 3, (axis + 2) % 3
        for su in (-1, 1):
            for sv in (-1, 1):
                ends = []
                for s in (-1, 1):
                    corner = [0, 0, 0]
                    corner[axis], corner[u], corner[v] = s, su, sv
                    ends.append(tuple(corner))
                a, b, c, d = index[ends[0], u], index[ends[0], v], index[ends[1], v], index[ends[1], u]
                add((a, b, c))
                add((a, c, d))
    return signs, axes, np.array(sides), np.array(bevels)


def box(size, centre, colour: Colour, bevel: float = 0.0) -> Part:
    """Make an axis-aligned box; `bevel` (a length) rounds its edges."""
    signs, axes, sides, bevels = _box_topology()
    half = 0.5 * np.asarray(size, dtype=np.float64)
    if bevel <= 0:
        return Part(signs * half + centre, sides, colour)
    bevel = min(bevel, 0.45 * 2 * half.min())
    inset = np.full((24, 3), bevel)
    inset[np.arange(24), axes] = 0
    return Part(signs * (half - inset) + centre, np.concatenate([sides, bevels]), colour)


def wedge(size, top, centre, colour: Colour, shift: float = 0.0) -> Part:
    """Make a box whose top face is scaled to `top` = (x, z) factors and moved by `shift` along z, as for roofs."""
    part = box(size, (0, 0, 0), colour)
    upper = part.vertices[:, 1] > 0
    part.vertices[upper] = part.vertices[upper] * (top[0], 1, top[1]) + (0, 0, shift)
    return part.move(*centre)


def prism(polygon, depth: float, colour: Colour, bevel: float = 0.0) -> Part:
    """Extrude a counter-clockwise (x, y) polygon, star-shaped about its mean, along z to +-depth / 2.

    `bevel` shrinks the polygon about its mean at both ends by that length over the same length of depth.
    """
    polygon = np.asarray(polygon, dtype=np.float64)
    n, centre = len(polygon), polygon.mean(0)
    inner = centre + (polygon - centre) * (1 - bevel / np.linalg.norm(polygon - centre, axis=1, keepdims=True))
    h = depth / 2
    rings = (
        [(inner, -h), (polygon, bevel - h), (polygon, h - bevel), (inner, h)]
        if bevel > 0
        else [(polygon, -h), (polygon, h)]
    )
    vertices, faces = [], []
    count = 0
    j, k = np.arange(n), (np.arange(n) + 1) % n
    for (p, z), (q, w) in pairwise(rings):  # every side quad keeps its own four corners
        quads = np.stack(
            [np.c_[p, np.full(n, z)], np.c_[p[k], np.full(n, z)], np.c_[q[k], np.full(n, w)], np.c_[q, np.full(n, w)]],
            1,
        )
        vertices.append(quads.reshape(-1, 3))
        base = count + 4 * j
        faces += [np.stack([base, base + 1, base + 2], 1), np.stack([base, base + 2, base + 3], 1)]
        count += 4 * n
    for p, z, front in ((inner, -h, False), (inner, h, True)):
        vertices.append(np.r_[np.c_[p, np.full(n, z)], [[*centre, z]]])
        fan = np.stack([np.full(n, count + n), count + (j if front else k), count + (k if front else j)], 1)
        faces.append(fan)
        count += n + 1
    return Part(np.concatenate(vertices), np.concatenate(faces), colour)


def tube(path, radius, colour: Colour, binormal=(0.0, 0.0, 1.0), sides: int = 12) -> Part:
    """Make a round tube with flat caps along a planar curve [N, 3]; `binormal` is the normal of its plane.

    radius: one number or one per point.
    """
    path = np.asarray(path, dtype=np.float64)
    binormal = np.asarray(binormal, dtype=np.float64)
    tangent = np.gradient(path, axis=0)
    tangent /= np.linalg.norm(tangent, axis=1, keepdims=True)
    normal = np.cross(tangent, binormal)
    radius = np.broadcast_to(np.asarray(radius, dtype=np.float64), (len(path),))
    circle = _circle(sides)
    # sin along normal, cos along binormal: with the tangent as "up" this is the lathe's orientation
    rings = path[:, None] + radius[:, None, None] * (circle[:, :1] * normal[:, None] + circle[:, 1:] * binormal)
    ends = [np.repeat(path[i][None], sides, 0) for i in (0, -1)]
    rows = [ends[0], rings[0], *rings, rings[-1], ends[1]]
    n = len(rows)
    return Part(np.concatenate(rows), _strip_faces(n, sides, (1, n - 3), (0, n - 1), False), colour)


def arc(radius, start_deg: float, stop_deg: float, centre=(0.0, 0.0, 0.0), points: int = 14) -> np.ndarray:
    """Return points [points, 3] of a circle or ellipse arc in the xy plane; `radius` is a number or (rx, ry)."""
    rx, ry = (radius, radius) if np.isscalar(radius) else radius
    angle = np.radians(np.linspace(start_deg, stop_deg, points))
    return np.stack([rx * np.cos(angle), ry * np.sin(angle), np.zeros(points)], 1) + np.asarray(centre)


def panel(
    radius: float,
    thickness: float,
    y0: float,
    y1: float,
    width_deg: float,
    colour: Colour,
    at_deg: float = 0.0,
    top_radius: float | None = None,
    steps: int = 8,
) -> Part:
    """Make a curved plate on a cylinder or cone about y, facing `at_deg` (0 is +z, 90 is +x)."""
    angle = np.radians(at_deg + np.linspace(-width_deg / 2, width_deg / 2, steps + 1))
    out = np.stack([np.sin(angle), np.zeros_like(angle), np.cos(angle)], 1)
    top_radius = radius if top_radius is None else top_radius
    lo, hi = out * radius, out * top_radius
    lo_out, hi_out = out * (radius + thickness), out * (top_radius + thickness)
    for p, y in ((lo, y0), (lo_out, y0), (hi, y1), (hi_out, y1)):
        p[:, 1] = y
    vertices, faces = [], []
    count, i = 0, np.arange(steps)
    for a, b in ((lo_out, hi_out), (hi_out, hi), (hi, lo), (lo, lo_out)):
        vertices += [a, b]
        p, q = count + i, count + steps + 1 + i
        faces += [np.stack([p, p + 1, q + 1], 1), np.stack([p, q + 1, q], 1)]
        count += 2 * (steps + 1)
    for end, quad in ((0, (lo, lo_out, hi_out, hi)), (-1, (lo_out, lo, hi, hi_out))):
        vertices.append(np.stack([p[end] for p in quad]))
        faces.append(np.array([[0, 1, 2], [0, 2, 3]]) + count)
        count += 4
    return Part(np.concatenate(vertices), np.concatenate(faces), colour)
