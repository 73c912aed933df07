"""Vehicles of the pocket world; each drives, sails or flies towards +z (the rocket upwards, its porthole at +z)."""

from __future__ import annotations

import numpy as np

from stages.pocket.palette import Palette, Vary
from stages.pocket.shapes import Part, box, ellipsoid, frustum, lathe, prism, ring, wedge


def _wheels(c: Palette, x: float, zs: tuple[float, ...], radius: float, width: float) -> list[Part]:
    tyre, hub = c.trim("dark", "steel"), c.trim("steel", "dark")
    parts = []
    for z in zs:
        for side in (-1, 1):
            half = [(0, 0), (radius * 0.9, 0), (radius, 0.04)]
            wheel = (
                lathe([*half, *((r, width - y) for r, y in reversed(half))], tyre, sides=20)
                .move(0, -width / 2, 0)
                .turn("z", 90)
            )
            parts.append(wheel.move(side * x, radius, z))
            cap = ellipsoid((0.05, radius * 0.5, radius * 0.5), (side * (x + width / 2), radius, z), hub, sides=12)
            parts.append(cap)
    return parts


def car(v: Vary, c: Palette) -> list[Part]:
    """Headlights and bumper at +z, red tail lights at -z."""
    w, length, h, wheel = v(0.9, 0.1), v(1.9, 0.1), v(0.46, 0.12), v(0.26, 0.1)
    glass, lights = c.trim("glass", "slate"), c.trim("flame", "white")
    base, cab, cz = wheel * 0.75, v(0.34, 0.1), -0.1
    top = base + h
    parts = [box((w, h, length), (0, base + h / 2, 0), c.main, bevel=0.1)]
    parts.append(wedge((w * 0.92, cab, length * 0.56), (0.82, 0.68), (0, top + cab / 2 - 0.02, cz), glass))
    parts.append(box((w * 0.82, 0.13, length * 0.42), (0, top + cab, cz), c.main, bevel=0.03))
    pillar = wedge((w * 0.935, cab, length * 0.1), (0.83, 1.0), (0, top + cab / 2 - 0.01, cz), c.main)
    parts.append(pillar)
    for side in (-1, 1):
        parts.append(ellipsoid((0.12, 0.1, 0.06), (side * w * 0.32, base + h * 0.6, length / 2), lights, sides=14))
        parts.append(box((0.2, 0.11, 0.08), (side * w * 0.33, base + h * 0.62, -length / 2), c.trim("red", "white")))
    parts.append(box((w * 0.3, 0.12, 0.06), (0, base + h * 0.58, length / 2), c.trim("dark", "steel"), bevel=0.01))
    for z in (-1, 1):
        parts.append(box((w * 0.98, 0.1, 0.12), (0, base + 0.07, z * length / 2), c.trim("steel", "dark"), bevel=0.02))
    return parts + _wheels(c, w / 2 - 0.05, (length * 0.31, -length * 0.31), wheel, 0.2)


def bus(v: Vary, c: Palette) -> list[Part]:
    """Windscreen and headlights at +z, rows of windows on the sides."""
    w, length, h, wheel = v(0.85, 0.1), v(2.1, 0.1), v(0.95, 0.1), v(0.2, 0.1)
    glass, white = c.trim("glass", "slate"), c.trim("white", "dark")
    base = wheel * 0.8
    y = base + h * 0.66
    parts = [box((w, h, length), (0, base + h / 2, 0), c.main, bevel=0.09)]
    for side in (-1, 1):
        for i in range(4):
            z = (i - 1.5) * length * 0.215
            parts.append(box((0.06, h * 0.3, length * 0.155), (side * w / 2, y, z), glass, bevel=0.02))
        parts.append(box((0.05, 0.09, length * 0.86), (side * w / 2, base + h * 0.3, 0), white))
        lamp = (side * w * 0.33, base + h * 0.2, length / 2)
        parts.append(ellipsoid((0.1, 0.1, 0.06), lamp, c.trim("flame", "white"), sides=14))
        parts.append(box((0.14, 0.14, 0.06), (side * w * 0.34, base + h * 0.2, -length / 2), c.trim("red", "white")))
    parts.append(box((w * 0.74, h * 0.3, 0.06), (0, y, length / 2), glass, bevel=0.02))
    parts.append(box((w * 0.5, h * 0.09, 0.06), (0, base + h * 0.89, length / 2 - 0.02), white))
    parts.append(box((w * 0.5, h * 0.26, 0.06), (0, y, -length / 2), glass, bevel=0.02))
    parts.append(box((w * 0.98, 0.1, 0.1), (0, base + 0.06, length / 2), c.trim("dark", "steel"), bevel=0.02))
    return parts + _wheels(c, w / 2 - 0.05, (length * 0.3, -length * 0.3), wheel, 0.18)


def boat(v: Vary, c: Palette) -> list[Part]:
    """A tug boat: the bow points to +z, the bridge windows look there, the funnel stands behind."""
    length, w, h = v(2.0, 0.1), v(0.9, 0.12), v(0.5, 0.12)
    deck, white, glass = c.trim("wood", "cream"), c.trim("white", "slate"), c.trim("slate")
    t = np.linspace(0, 1, 9)
    half = w / 2 * np.sqrt(np.maximum(1 - t**2.4, 0))
    z = -0.2 * length + t * 0.7 * length
    # the outline, seen from above, as (x, -z) so that turning it by 90 degrees about x lays it down with z forwards
    right = np.stack([half, z], 1)
    left = np.stack([-half, z], 1)[::-1][1:]
    outline = np.r_[[(w * 0.42, -0.5 * length)], right, left, [(-w * 0.42, -0.5 * length)]]

    def hull(scale_low: float, scale_high: float, y0: float, y1: float, colour) -> Part:
        part = prism(outline, 1.0, colour)
        upper = part.vertices[:, 2:] > 0
        flat = part.vertices[:, :2] * np.where(upper, scale_high, scale_low)
        height = np.where(upper, y1, y0)
        rise = np.where(upper, 0.16 * np.maximum(flat[:, 1:] / (0.5 * length), 0) ** 2, 0.0)
        return Part(np.c_[flat[:, :1], height + rise, flat[:, 1:]], part.faces[:, ::-1], colour)

    cabin, cz = v(0.42, 0.1), -0.12 * length
    parts = [
        hull(0.72, 1.0, 0.0, h, c.main),
        hull(0.96, 1.04, h * 0.52, h * 0.72, white),
        hull(0.985, 1.06, h * 0.86, h * 1.06, c.main),
        hull(0.76, 0.8, h * 0.9, h * 1.1, deck),
        box((w * 0.56, cabin, length * 0.3), (0, h * 1.08 + cabin / 2, cz + 0.12), white, bevel=0.03),
        box((w * 0.7, 0.1, length * 0.38), (0, h * 1.08 + cabin + 0.04, cz + 0.12), c.main, bevel=0.03),
        frustum(0.16, 0.15, 0.46, (0, h * 1.08 + cabin, cz), c.main, sides=20),
        frustum(0.165, 0.165, 0.14, (0, h * 1.08 + cabin + 0.4, cz), c.trim("dark", "white"), sides=20),
        box((w * 0.44, cabin * 0.42, 0.06), (0, h * 1.1 + cabin * 0.58, cz + 0.12 + length * 0.15), glass),
    ]
    for side in (-1, 1):
        for i in (-1, 1):
            porthole = ellipsoid((0.04, 0.1, 0.1), (0, 0, 0), glass, sides=14)
            parts.append(porthole.move(side * w * 0.28, h * 1.1 + cabin * 0.55, cz + 0.12 + i * length * 0.075))
    return parts


def rocket(v: Vary, c: Palette) -> list[Part]:
    """Nose up; the porthole and a badge are on the front, one of the four fins points right at it."""
    r, h, nose = v(0.4, 0.12), v(1.2, 0.1), v(0.52)
    trim, steel, glass = c.trim("white", "red"), c.trim("steel", "dark"), c.trim("glass", "slate")
    t = np.linspace(0, 1, 9)
    body = [(0, 0), *zip(r * (0.74 + 0.26 * np.sin(np.pi * (0.12 + 0.72 * t)) ** 0.8), h * t, strict=True)]
    top = body[-1][0]
    parts = [
        lathe([*body, (0, h)], c.main, sides=32),
        lathe(
            [
                (0, 0),
                (top * 1.03, 0),
                *((top * np.cos(a), nose * np.sin(a)) for a in (0.35, 0.7, 1.05, 1.3)),
                (0, nose),
            ],
            c.main,
            sides=32,
        ).move(0, h - 0.02, 0),
        frustum(top * 1.07, top * 1.04, 0.12, (0, h - 0.07, 0), trim, sides=32),
        lathe([(0, 0), (0.3, 0), (0.2, 0.2), (0, 0.2)], steel, sides=24).move(0, -0.16, 0),
        lathe(
            [(0, -0.34), (0.1, -0.22), (0.17, -0.08), (0.14, 0.04), (0, 0.06)], c.trim("flame", "orange"), sides=16
        ).move(0, -0.14, 0),
    ]
    span = v(0.42)
    fin = prism([(0, 0.0), (span, -0.28), (span, 0.1), (0, 0.52)], 0.12, trim).move(r * 0.74, 0, 0)
    parts += [fin.turn("y", a) for a in (45, 135, 225, 315)]
    z = r * 0.99
    parts += [
        ring(0.19, 0.055, steel, sides=24).turn("x", 90).move(0, h * 0.66, z),
        ellipsoid((0.18, 0.18, 0.05), (0, h * 0.66, z), glass, sides=18),
        ellipsoid((0.1, 0.1, 0.05), (0, h * 0.3, z), trim, sides=14),
    ]
    return parts


def airplane(v: Vary, c: Palette) -> list[Part]:
    """Nose and propeller at +z, wings along x, tail at -z."""
    r, length, span = v(0.3, 0.12), v(2.0, 0.08), v(2.1, 0.1)
    glass, steel, dark = c.trim("glass", "slate"), c.trim("steel", "dark"), c.trim("dark", "steel")
    t = np.linspace(0, 1, 10)
    radii = r * np.interp(t, [0, 0.35, 0.75, 0.93, 1], [0.35, 0.85, 1.0, 0.86, 0.6])
    body = [(0, 0), *zip(radii, length * t, strict=True), (0, length)]
    white = c.trim("white", "red")
    wing = [(-span / 2, -0.12), (0, -0.24), (span / 2, -0.12), (span / 2, 0.18), (0, 0.26), (-span / 2, 0.18)]
    tail = [(-0.45, -0.1), (0.45, -0.1), (0.45, 0.12), (0, 0.18), (-0.45, 0.12)]
    fin = [(-0.05, 0.0), (0.36, 0.0), (0.14, 0.52), (-0.1, 0.52)]
    parts = [
        lathe(body, c.main, sides=24).turn("x", 90).move(0, 0, -length / 2),
        prism(wing, 0.12, c.main, bevel=0.03).turn("x", 90).move(0, -0.06, 0.16),
        prism(tail, 0.09, c.main).turn("x", 90).move(0, 0.08, -length / 2 + 0.14),
        prism(fin, 0.1, c.main).turn("y", -90).move(0, 0.1, -length / 2 + 0.06),
        ellipsoid((r * 0.62, r * 0.6, 0.34), (0, r * 0.8, 0.34), glass, sides=18),
        ellipsoid((0.13, 0.13, 0.16), (0, 0, length / 2 + 0.02), white, sides=14),
        box((0.12, 0.92, 0.05), (0, 0, length / 2 + 0.06), dark, bevel=0.02).turn("z", 35),
    ]
    for side in (-1, 1):
        x = side * span * 0.27
        tip = box((0.14, 0.14, 0.34), (side * span / 2, -0.06, 0.2), white, bevel=0.04)
        engine = lathe([(0, 0), (0.11, 0), (0.13, 0.2), (0.12, 0.4), (0, 0.4)], steel, sides=16)
        parts += [engine.turn("x", 90).move(x, -0.16, 0.06), tip]
    return parts
