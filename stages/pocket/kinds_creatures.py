"""Creatures and figures of the pocket world, all looking towards +z."""

from __future__ import annotations

import numpy as np

from stages.pocket.palette import Palette, Vary
from stages.pocket.shapes import Colour, Part, arc, box, ellipsoid, frustum, lathe, prism, ring, tube


def _eyes(c: Palette, x: float, y: float, z: float, size: float, iris: Colour | None = None) -> list[Part]:
    """Two eyes; on a white eyeball with a black pupil unless `iris` asks for plain beads of that colour."""
    parts = []
    for side in (-1, 1):
        if iris is not None:
            parts.append(ellipsoid((size, size, size * 0.6), (side * x, y, z), iris, sides=12))
            continue
        parts.append(ellipsoid((size, size * 1.1, size * 0.6), (side * x, y, z), c.trim("white", "slate"), sides=14))
        pupil = c.trim("ink") if c.name != "white" else (0.94, 0.94, 0.94)
        parts.append(ellipsoid((size * 0.55, size * 0.62, size * 0.4), (side * x, y, z + size * 0.42), pupil, sides=10))
    return parts


def snowman(v: Vary, c: Palette) -> list[Part]:
    """Carrot, eyes and buttons on the front, a top hat, a scarf, stick arms."""
    r1, r2, r3 = v(0.62, 0.1), v(0.46, 0.1), v(0.34, 0.1)
    y2 = r1 * 1.8 + r2 * 0.55
    y3 = y2 + r2 * 0.72 + r3 * 0.7
    ink, hat = c.ink, c.trim("dark", "red")
    scarf = c.trim("red", "flame")
    parts = [
        ellipsoid((r1, r1 * 0.92, r1), (0, r1 * 0.9, 0), c.main, sides=28),
        ellipsoid(r2, (0, y2, 0), c.main, sides=26),
        ellipsoid(r3, (0, y3, 0), c.main, sides=24),
        frustum(0.085, 0.0, 0.4, (0, 0, 0), c.trim("orange", "flame", "white"), sides=14)
        .turn("x", 90)
        .move(0, y3 - 0.02, r3 - 0.04),
        ring(r3 * 0.78, 0.1, scarf, sides=24, flat=0.8).move(0, y3 - r3 * 0.78, 0),
        box((0.16, 0.42, 0.1), (0.14, y3 - r3 * 0.78 - 0.2, r2 * 0.86), scarf, bevel=0.03),
        lathe([(0, 0), (r3 * 1.15, 0), (r3 * 1.15, 0.07), (r3 * 0.76, 0.08), (r3 * 0.74, 0.42), (0, 0.42)], hat).move(
            0, y3 + r3 * 0.68, 0
        ),
    ]
    parts += _eyes(c, r3 * 0.38, y3 + r3 * 0.28, r3 * 0.86, 0.062, iris=ink)
    for y in (y2 + 0.02, y2 - 0.2):
        parts.append(ellipsoid(0.068, (-0.04, y, np.sqrt(max(r2**2 - (y - y2) ** 2, 0.01))), ink, sides=10))
    parts.append(ellipsoid(0.068, (-0.04, r1 * 1.15, r1 * 0.96), ink, sides=10))
    for side in (-1, 1):
        path = np.array([(r2 * 0.8, y2, 0), (r2 + 0.22, y2 + 0.14, 0), (r2 + 0.46, y2 + 0.34, 0)]) * (side, 1, 1)
        parts.append(tube(path, (0.075, 0.07, 0.065), c.trim("wood", "cream"), sides=10))
    return parts


def robot(v: Vary, c: Palette) -> list[Part]:
    """Eyes, mouth grille and a chest panel on the front; an antenna; feet point forwards."""
    steel, dark = c.trim("steel", "dark"), c.trim("dark", "white")
    w, h, d = v(0.86, 0.12), v(0.8, 0.12), v(0.55, 0.12)
    hw, hh = v(0.62, 0.12), v(0.48, 0.12)
    leg = 0.42
    top = leg + h
    hy = top + 0.1 + hh / 2
    front = d / 2
    parts = [
        box((w, h, d), (0, leg + h / 2, 0), c.main, bevel=0.07),
        frustum(0.13, 0.13, 0.2, (0, top - 0.05, 0), steel, sides=16),
        box((hw, hh, 0.48), (0, hy, 0), c.main, bevel=0.07),
        frustum(0.06, 0.05, 0.24, (0, hy + hh / 2 - 0.02, 0), steel, sides=10),
        ellipsoid(0.09, (0, hy + hh / 2 + 0.25, 0), c.trim("red", "flame"), sides=14),
        box((hw * 0.6, 0.09, 0.06), (0, hy - hh * 0.26, 0.24), dark),
        box((w * 0.62, h * 0.46, 0.07), (0, leg + h * 0.57, front), c.trim("white", "dark"), bevel=0.02),
    ]
    for side, colour in ((-1, "red"), (0, "flame"), (1, "ink")):
        at = (side * w * 0.18, leg + h * 0.64, front + 0.04)
        parts.append(ellipsoid((0.075, 0.075, 0.05), at, c.trim(colour, "red"), sides=12))
    for side in (-1, 1):
        at = (side * hw * 0.24, hy + hh * 0.12, 0.24)
        parts.append(ellipsoid((0.11, 0.11, 0.06), at, c.trim("white", "slate"), sides=14))
        pupil = c.trim("ink", "white") if c.name != "white" else (0.94, 0.94, 0.94)
        parts.append(ellipsoid((0.055, 0.055, 0.05), (side * hw * 0.24, hy + hh * 0.12, 0.285), pupil, sides=10))
        ear = frustum(0.1, 0.1, 0.1, (0, 0, 0), steel, sides=14).turn("z", -90 * side)
        parts.append(ear.move(side * (hw / 2 - 0.02), hy, 0))
        parts.append(ellipsoid(0.14, (side * (w / 2 + 0.06), top - 0.16, 0), steel, sides=14))
        parts.append(box((0.18, 0.56, 0.2), (side * (w / 2 + 0.14), top - 0.45, 0), c.main, bevel=0.04))
        parts.append(ellipsoid(0.13, (side * (w / 2 + 0.14), top - 0.78, 0), steel, sides=14))
        parts.append(box((0.22, leg, 0.24), (side * w * 0.26, leg / 2 + 0.05, 0), steel, bevel=0.03))
        parts.append(box((0.3, 0.16, 0.46), (side * w * 0.26, 0.08, 0.08), c.main, bevel=0.05))
    return parts


def cat(v: Vary, c: Palette) -> list[Part]:
    """Sitting, with a light chest and muzzle; the tail curls at the back towards +x."""
    head, body = v(0.42, 0.1), v(0.46, 0.12)
    white, rose = c.trim("white", "rose"), c.trim("rose", "ink")
    hy, hz = 1.22, 0.12
    parts = [
        ellipsoid((body, 0.6, body * 0.95), (0, 0.56, -0.08), c.main, sides=26),
        ellipsoid((body * 0.6, 0.42, 0.2), (0, 0.56, body * 0.95 - 0.22), white, sides=18),
        ellipsoid((head * 1.08, head * 0.92, head * 0.9), (0, hy, hz), c.main, sides=26),
        ellipsoid((0.18, 0.12, 0.12), (0, hy - 0.14, hz + head * 0.8), white, sides=14),
        ellipsoid((0.06, 0.045, 0.05), (0, hy - 0.07, hz + head * 0.8 + 0.1), rose, sides=10),
    ]
    parts += _eyes(c, head * 0.42, hy + 0.08, hz + head * 0.76, 0.1)
    ear = v(0.36, 0.15)
    for side in (-1, 1):
        outer = prism([(-0.18, 0), (0.18, 0), (0, ear)], 0.16, c.main)
        inner = prism([(-0.09, 0.04), (0.09, 0.04), (0, ear * 0.7)], 0.06, rose).move(0, 0, 0.07)
        parts += [p.turn("z", -14 * side).move(side * head * 0.58, hy + head * 0.56, hz) for p in (outer, inner)]
        parts.append(ellipsoid((0.13, 0.34, 0.14), (side * 0.17, 0.3, body * 0.72), c.main, sides=14))
        parts.append(ellipsoid((0.14, 0.1, 0.18), (side * 0.18, 0.1, body * 0.86), white, sides=14))
        parts.append(ellipsoid((0.2, 0.3, 0.34), (side * body * 0.78, 0.28, 0.02), c.main, sides=16))
    tail = arc((0.42, 0.5), -80, 85, (body * 0.7, 0.62, -body * 0.8))
    parts.append(tube(tail, 0.1, c.main, sides=12))
    parts.append(ellipsoid(0.12, tail[-1], white, sides=12))
    return parts


def duck(v: Vary, c: Palette) -> list[Part]:
    """A bath duck: beak at +z, tail tip up at -z, wings at the sides."""
    body, head = v(0.62, 0.1), v(0.4, 0.1)
    hy, hz = 0.98, 0.34
    beak = c.trim("orange", "red")
    parts = [
        ellipsoid((body, 0.48, 0.84), (0, 0.46, 0), c.main, sides=28),
        ellipsoid(head, (0, hy, hz), c.main, sides=26),
        ellipsoid((0.3, 0.32, 0.3), (0, 0.72, 0.3), c.main, sides=18),
        frustum(0.3, 0.0, 0.56, (0, 0, 0), c.main, sides=18).turn("x", -50).move(0, 0.56, -0.62),
        ellipsoid((0.2, 0.06, 0.24), (0, hy - 0.03, hz + head + 0.06), beak, sides=16),
        ellipsoid((0.17, 0.06, 0.18), (0, hy - 0.12, hz + head + 0.02), beak, sides=16),
    ]
    eyes = []
    at = (head * 0.52, hy + head * 0.3, hz + head * 0.76)
    for part in _eyes(c, 0.0, 0.0, 0.0, 0.09)[:2]:
        eyes += [part.turn("y", side * 32).move(side * at[0], *at[1:]) for side in (-1, 1)]
    for side in (-1, 1):
        wing = ellipsoid((0.12, 0.25, 0.44), (0, 0, 0), c.main, sides=18).turn("x", 14)
        parts.append(wing.move(side * body * 0.94, 0.56, -0.08))
    return parts + eyes


def fish(v: Vary, c: Palette) -> list[Part]:
    """Swims towards +z: eyes and lips there, tail fin at -z."""
    w, h, length = v(0.42, 0.12), v(0.58, 0.1), v(0.95, 0.08)
    fins = c.trim("flame", "orange", "white")
    parts = [
        ellipsoid((w, h, length), (0, 0, 0), c.main, sides=30),
        ellipsoid((0.15, 0.13, 0.1), (0, -0.08, length - 0.03), c.trim("rose", "red"), sides=14),
    ]
    tail = [(-0.30, -0.06), (-0.30, 0.06), (-0.95, v(0.52)), (-0.80, 0.0), (-0.95, -v(0.52))]
    dorsal = [(0.35, 0.3), (0.3, 0.62), (-0.12, 0.86), (-0.5, 0.66), (-0.45, 0.3)]
    belly = [(-0.4, -0.3), (-0.42, -0.62), (-0.1, -0.78), (0.16, -0.55), (0.1, -0.3)]
    stretch = length / 0.95
    for outline, depth in ((tail, 0.14), (dorsal, 0.12), (belly, 0.12)):
        points = [(x * stretch - (0.55 * stretch if outline is tail else 0), y * h / 0.58) for x, y in outline]
        parts.append(prism(points, depth, fins).turn("y", -90))
    for side in (-1, 1):
        fin = prism([(-0.1, 0.08), (-0.38, -0.08), (-0.3, -0.3), (0.12, -0.2), (0.0, -0.06)], 0.09, fins)
        parts.append(fin.turn("y", -90).turn("y", -24 * side).move(side * w * 1.02, -0.08, 0.1))
        eye, pupil = _eyes(c, 0, 0, 0, 0.13)[:2]
        at = (side * w * 0.76, h * 0.22, length * 0.56)
        parts += [p.turn("y", side * 66).move(*at) for p in (eye, pupil)]
    return parts
