"""Household objects, buildings and plants of the pocket world: each function returns the parts of one object.

Units are free (the world normalises), y up, front towards +z. FRONT notes stand in world.KINDS.
"""

from __future__ import annotations

import numpy as np

from stages.pocket.palette import Palette, Vary
from stages.pocket.shapes import Part, arc, box, ellipsoid, frustum, lathe, panel, prism, ring, tube, wedge


def ball(v: Vary, c: Palette) -> list[Part]:
    return [ellipsoid(1.0, (0, 0, 0), c.main, sides=36)]


def cube(v: Vary, c: Palette) -> list[Part]:
    return [box((v(1.0, 0.1), v(1.0, 0.1), v(1.0, 0.1)), (0, 0, 0), c.main, bevel=v(0.05, 0.5))]


def cone(v: Vary, c: Palette) -> list[Part]:
    return [frustum(v(0.62), 0.0, 1.5, (0, 0, 0), c.main, sides=36)]


def donut(v: Vary, c: Palette) -> list[Part]:
    """Stands on its rim, the hole towards +z, sprinkles on the front."""
    tube_radius = v(0.36)
    parts = [ring(0.8, tube_radius, c.main, sides=40).turn("x", 90)]
    trims = (c.trim("white", "ink"), c.trim("red", "flame"), c.trim("flame", "ink"))
    for i in range(18):
        angle, tilt = i * 137.5, (i * 77) % 180
        lean = np.radians((-42, 0, 42)[i % 3])
        r = 0.8 + tube_radius * np.sin(lean)
        spot = ellipsoid((0.135, 0.06, 0.06), (0, 0, 0), trims[i % 3], sides=10).turn("z", tilt)
        spot = spot.move(r, 0, tube_radius * np.cos(lean)).turn("z", angle)
        parts.append(spot)
    return parts


def mug(v: Vary, c: Palette) -> list[Part]:
    """Handle to the object's right (-x), a label on the front."""
    r, h, wall = v(0.55, 0.12), v(1.2, 0.12), 0.09
    profile = [(0, 0), (r * 0.92, 0), (r, 0.07), (r, h), (r - wall, h), (r - wall, wall), (0, wall)]
    handle = tube(arc((v(0.36), 0.36 * h), 80, 280, (-r + 0.02, 0.52 * h, 0)), v(0.095), c.main)
    label = panel(r - 0.03, 0.05, 0.28 * h, 0.76 * h, 76, c.mark)
    return [lathe(profile, c.main, sides=36), handle, label]


def teapot(v: Vary, c: Palette) -> list[Part]:
    """Spout to +x, handle to -x, a badge on the front."""
    w = v(0.78, 0.1)
    angle = np.linspace(-0.42 * np.pi, 0.40 * np.pi, 12)
    profile = [(0, 0), (w * 0.55, 0), *zip(w * np.cos(angle), 0.58 + 0.58 * np.sin(angle), strict=True), (0, 1.13)]
    spout_path = [(0.45, 0.38, 0), (0.8, 0.45, 0), (1.0, 0.66, 0), (1.1, 0.92, 0), (1.24, 1.04, 0)]
    spout = tube(np.array(spout_path) * (v(1.0, 0.1), 1, 1), [0.24, 0.19, 0.14, 0.11, 0.10], c.main)
    handle = tube(arc((v(0.40), 0.38), 62, 298, (-w + 0.05, 0.6, 0)), 0.085, c.main)
    lid = lathe([(0, 1.06), (0.44, 1.06), (0.44, 1.12), (0.3, 1.22), (0, 1.27)], c.main)
    knob = ellipsoid(0.13, (0, 1.34, 0), c.mark, sides=16)
    badge = ellipsoid((0.27, 0.27, 0.06), (0, 0, 0), c.mark, sides=18).turn("x", -3).move(0, 0.6, w - 0.015)
    dot = ellipsoid((0.12, 0.12, 0.05), (0, 0.6, w + 0.04), c.main, sides=14)
    return [lathe(profile, c.main, sides=36), spout, handle, lid, knob, badge, dot]


def vase(v: Vary, c: Palette) -> list[Part]:
    belly, neck, lip = v(0.52), v(0.22), v(0.36)
    t = np.linspace(0, 1, 15)
    knots = np.interp(t, [0, 0.32, 0.74, 1], [0, 1, 2, 3])
    widths = np.array([0.34, belly, neck, lip])
    low = np.minimum(knots.astype(int), 2)
    blend = knots - low
    blend = blend * blend * (3 - 2 * blend)
    radii = widths[low] * (1 - blend) + widths[low + 1] * blend
    outside = list(zip(radii, t * 1.7, strict=True))
    inside = [(lip - 0.08, 1.7), (neck - 0.06, 1.3), (0, 1.2)]
    return [lathe([(0, 0), *outside, *inside], c.main, sides=36)]


def chair(v: Vary, c: Palette) -> list[Part]:
    """Back rest at -z: a sitter faces +z."""
    w, d, leg, seat, back = v(0.95, 0.12), v(0.9, 0.12), v(0.15), v(0.72), v(0.95)
    parts = [box((w, 0.16, d), (0, seat, 0), c.main, bevel=0.04)]
    x, z = w / 2 - leg / 2, d / 2 - leg / 2
    parts += [box((leg, seat, leg), (sx * x, seat / 2, sz * z), c.main) for sx in (-1, 1) for sz in (-1, 1)]
    parts += [box((leg, back, leg * 0.9), (sx * x, seat + back / 2, -z), c.main) for sx in (-1, 1)]
    parts.append(box((w, back * 0.52, 0.12), (0, seat + back * 0.76, -z), c.main, bevel=0.03))
    return parts


def table(v: Vary, c: Palette) -> list[Part]:
    w, d, leg, h = v(1.7, 0.12), v(1.2, 0.12), v(0.19), v(0.85)
    x, z = w / 2 - leg * 0.75, d / 2 - leg * 0.75
    parts = [box((w, 0.15, d), (0, h + 0.075, 0), c.main, bevel=0.04)]
    return parts + [box((leg, h, leg), (sx * x, h / 2, sz * z), c.main) for sx in (-1, 1) for sz in (-1, 1)]


def lamp(v: Vary, c: Palette) -> list[Part]:
    steel, bulb = c.trim("steel", "dark"), c.trim("flame", "white")
    r, top, h = v(0.62, 0.12), v(0.34), v(0.72, 0.12)
    shade = lathe([(0, 0.14), (r * 0.7, 0.14), (r - 0.06, 0.0), (r, 0.0), (top, h), (0, h)], c.main, sides=36)
    return [
        lathe([(0, 0), (0.42, 0), (0.42, 0.1), (0.15, 0.2), (0, 0.2)], c.main),
        frustum(0.12, 0.12, 0.8, (0, 0.15, 0), steel, sides=16),
        shade.move(0, 0.78, 0),
        ellipsoid((0.22, 0.24, 0.22), (0, 0.82, 0), bulb, sides=18),
        ellipsoid(0.09, (0, 0.82 + h, 0), steel, sides=12),
    ]


def candle(v: Vary, c: Palette) -> list[Part]:
    """A dish with a ring handle at -x carries the candle."""
    gold = c.trim("gold", "steel")
    r, h = v(0.36, 0.12), v(1.1, 0.12)
    flame = [(0, 0), (0.11, 0.07), (0.15, 0.16), (0.12, 0.28), (0.06, 0.4), (0, 0.5)]
    parts = [
        lathe([(0, 0), (0.46, 0), (0.56, 0.14), (0.51, 0.14), (0.44, 0.07), (0, 0.07)], gold),
        ring(0.15, 0.055, gold, sides=18).turn("x", 90).move(-0.65, 0.13, 0),
        lathe([(0, 0.04), (r, 0.04), (r, h - 0.05), (r - 0.06, h), (0, h - 0.03)], c.main, sides=32),
        frustum(0.05, 0.045, 0.18, (0, h - 0.06, 0), c.trim("ink"), sides=10),
        lathe(flame, c.trim("flame", "orange"), sides=18).move(0, h + 0.06, 0),
    ]
    for at, drop in ((0.5, 0.30), (2.6, 0.42), (4.4, 0.24)):
        x, z = r * np.sin(at), r * np.cos(at)
        parts.append(ellipsoid((0.07, drop, 0.07), (x * 0.97, h - drop * 0.85, z * 0.97), c.main, sides=12))
    return parts


def hat(v: Vary, c: Palette) -> list[Part]:
    """Top hat, the buckle of its band on the front."""
    r, brim, h = v(0.52, 0.1), v(0.98, 0.1), v(0.9)
    crown = [(0, 0.08), (brim, 0.06), (brim, 0.14), (r + 0.04, 0.16), (r, 0.22), (r * 1.06, h + 0.1), (0, h + 0.1)]
    band, buckle = c.trim("white", "dark"), c.trim("gold", "red")
    return [
        lathe(crown, c.main, sides=36),
        lathe([(0, 0.18), (r + 0.05, 0.18), (r + 0.06, 0.40), (0, 0.40)], band, sides=36),
        box((0.36, 0.32, 0.1), (0, 0.30, r + 0.06), buckle, bevel=0.02),
        box((0.18, 0.14, 0.1), (0, 0.30, r + 0.08), c.trim("dark"), bevel=0.0),
    ]


def mushroom(v: Vary, c: Palette) -> list[Part]:
    cream, dots = c.trim("cream", "wood"), c.second
    r, h, stem = v(0.85, 0.1), v(0.68), v(0.30)
    angle = np.linspace(0, np.pi / 2, 9)
    profile = [(0, 0.1), (r * 0.6, 0.06), *zip(r * np.cos(angle), h * np.sin(angle), strict=True)]
    profile[-1] = (0, h)
    parts = [
        lathe([(0, 0), (stem * 1.25, 0), (stem * 1.3, 0.1), (stem, 0.4), (stem * 0.9, 0.85), (0, 0.85)], cream),
        lathe(profile, c.main, sides=36).move(0, 0.72, 0),
    ]
    for azimuth, up in ((0, 38), (62, 28), (118, 44), (180, 30), (236, 42), (300, 30), (90, 82)):
        a, e = np.radians(azimuth), np.radians(up)
        centre = (r * np.cos(e) * np.sin(a), 0.72 + h * np.sin(e), r * np.cos(e) * np.cos(a))
        parts.append(ellipsoid((0.19, 0.15, 0.19), np.multiply(centre, (0.9, 0.96, 0.9)), dots, sides=12))
    return parts


def tree(v: Vary, c: Palette) -> list[Part]:
    """A fir: a trunk and three tiers."""
    base, trunk = v(0.8, 0.12), v(0.21)
    parts = [frustum(trunk, trunk * 0.9, 0.6, (0, 0, 0), c.trim("wood", "slate"), sides=16)]
    for i, (shrink, y) in enumerate(((1.0, 0.5), (0.8, 0.92), (0.58, 1.32))):
        parts.append(frustum(base * shrink, 0.0, 0.85 - 0.08 * i, (0, y, 0), c.main, sides=28))
    return parts


def house(v: Vary, c: Palette) -> list[Part]:
    """Door, two windows and a round gable window on the front, a chimney at the back."""
    w, h, d, roof = v(1.3, 0.12), v(0.95, 0.12), v(1.1, 0.12), v(0.6)
    glass = c.trim("glass", "slate")
    door, frame = c.trim("wood", "cream"), c.trim("white", "dark")
    eave = 0.1
    gable = [(-w / 2, h - 0.02), (w / 2, h - 0.02), (0, h + roof)]
    parts = [box((w, h, d), (0, h / 2, 0), c.main), prism(gable, d, c.main)]
    slope = np.hypot(w / 2, roof)
    angle = np.degrees(np.arctan2(roof, w / 2))
    for side in (-1, 1):
        # a body-coloured slab on a slightly larger trim-coloured one: the colour shows from above, the edge all round
        for thick, rim, colour in ((0.1, 0.0, frame), (0.135, -0.06, c.main)):
            size = (slope + eave + rim, thick, d + 2 * eave + 2 * rim)
            slab = box(size, (-size[0] / 2 + 0.04, thick / 2, 0), colour)
            slab = slab.turn("z", angle) if side < 0 else slab.turn("y", 180).turn("z", -angle)
            parts.append(slab.move(0, h + roof, 0))
    ridge = frustum(0.085, 0.085, d + 2 * eave, (0, 0, 0), frame, sides=10).turn("x", 90)
    parts.append(ridge.move(0, h + roof + 0.06, -d / 2 - eave))
    front = d / 2
    parts += [
        box((0.3, 0.56, 0.08), (0, 0.28, front), door, bevel=0.01),
        ellipsoid(0.035, (0.09, 0.28, front + 0.05), c.trim("gold", "steel"), sides=8),
        box((0.2, 0.42, 0.2), (w * 0.26, h + roof * 0.75, -d * 0.22), c.trim("wood", "slate")),
    ]

    def window(x: float, y: float, z: float, turn: float, s: float = 0.28) -> list[Part]:
        outer = box((s + 0.09, s + 0.09, 0.05), (0, 0, 0), frame)
        inner = box((s, s, 0.08), (0, 0, 0), glass)
        return [p.turn("y", turn).move(x, y, z) for p in (outer, inner)]

    for side in (-1, 1):
        parts += window(side * w * 0.33, h * 0.58, front, 0)
        parts += window(side * w / 2, h * 0.55, 0, 90)
    parts += [ellipsoid((0.13, 0.13, 0.06), (0, h + roof * 0.32, front), glass, sides=16)]
    parts += window(0, h * 0.55, -front, 0)
    return parts


def castle(v: Vary, c: Palette) -> list[Part]:
    """Four round towers with pointed roofs around a keep; the gate and a shield are on the front."""
    half, r, tall, wall = v(0.62, 0.1), v(0.25, 0.12), v(1.15, 0.12), v(0.72, 0.12)
    tiles, ink = c.trim("slate", "cream"), c.trim("dark", "cream")
    parts = [box((2 * half, wall, 2 * half), (0, wall / 2, 0), c.main)]
    step = 2 * half / 5
    for turn in (0, 90, 180, 270):
        for i in range(1, 5):
            merlon = box((step * 0.5, 0.14, 0.12), (-half + step * i, wall + 0.06, half - 0.06), c.main)
            parts.append(merlon.turn("y", turn))
        parts.append(
            box((0.1, 0.24, 0.06), (0, wall * 0.58, half + 0.0), ink).turn("y", turn)
            if turn
            else box((0.46, 0.34, 0.08), (0, 0.17, half), ink)
        )
    arch = frustum(0.23, 0.23, 0.08, (0, 0, 0), ink, sides=20).turn("x", 90).move(0, 0.34, half - 0.04)
    parts.append(arch)
    shield = [(-0.13, 0.1), (-0.11, -0.06), (0, -0.16), (0.11, -0.06), (0.13, 0.1)]
    parts.append(prism(shield, 0.1, c.trim("gold", "red")).move(0, wall + 0.02, half))
    for sx in (-1, 1):
        for sz in (-1, 1):
            x, z = sx * half, sz * half
            tower = [(0, 0), (r, 0), (r, tall - 0.16), (r * 1.18, tall - 0.1), (r * 1.18, tall), (0, tall)]
            parts.append(lathe(tower, c.main, sides=20).move(x, 0, z))
            parts.append(frustum(r * 1.12, 0, v(0.48), (x, tall - 0.01, z), tiles, sides=20))
            parts.append(box((0.09, 0.2, 0.08), (x, tall * 0.66, z + sz * (r - 0.02)), ink))
    keep = v(0.42, 0.1)
    parts.append(box((keep, 1.2, keep), (0, 0.6, -0.1), c.main))
    parts.append(wedge((keep * 1.15, 0.4, keep * 1.15), (0.02, 0.02), (0, 1.39, -0.1), tiles))
    parts.append(box((0.13, 0.18, 0.06), (0, 1.02, keep / 2 - 0.1), ink))
    return parts
