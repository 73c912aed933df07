"""Growth curves as SVG: measured points with their spread, and the power or the straight line fitted to them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape

from benchmarks.plots import BOTTOM, HEIGHT, LEFT, PALETTE, RIGHT, TOP, WIDTH, ticks

SAMPLES = 60  # of a fitted curve


@dataclass(frozen=True)
class Curve:
    """points: x, y, low, high, by x. fit: (kind, a, b, r2, from_x) with kind "power" (a x^b) or "line" (a + b x)."""

    label: str
    points: tuple[tuple[float, float, float, float], ...]
    fit: tuple[str, float, float, float, float] | None = None

    def at(self, x: float) -> float:
        """Return the fitted curve at x."""
        kind, a, b, _, _ = self.fit
        return a * x**b if kind == "power" else a + b * x


def fit_label(fit: tuple[str, float, float, float, float]) -> str:
    """Return the fit in words."""
    kind, a, b, r2, _ = fit
    return f"x^{b:.2f} (R2 {r2:.3f})" if kind == "power" else f"{a:.0f} + {b:.0f} x (R2 {r2:.4f})"


def growth_plot(curves: list[Curve], title: str, x_label: str, y_label: str, *, log: bool = True) -> str:
    """Return a stand-alone SVG, on logarithmic axes or on linear ones from zero.

    Raises: ValueError for a point that a logarithmic axis cannot show.
    """
    xs = [p[0] for c in curves for p in c.points]
    ys = [v for c in curves for p in c.points for v in p[1:]]
    if log and min(*xs, *ys) <= 0:
        raise ValueError("points: wanted positive ones on logarithmic axes")
    x0, x1 = (min(xs) / 1.25, max(xs) * 1.25) if log else (0.0, 1.08 * max(xs))
    y0, y1 = (min(ys) / 1.5, max(ys) * 1.5) if log else (0.0, 1.1 * max(ys))

    def to_x(v: float) -> float:
        share = math.log(v / x0) / math.log(x1 / x0) if log else (v - x0) / (x1 - x0)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def to_y(v: float) -> float:
        share = math.log(v / y0) / math.log(y1 / y0) if log else (v - y0) / (y1 - y0)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = [
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="18" font-weight="600">{escape(title)}</text>',
    ]
    for v in sorted(set(xs)) if log else ticks(x0, x1):
        parts.append(f'<line x1="{to_x(v):.1f}" x2="{to_x(v):.1f}" y1="{TOP}" y2="{bottom}" stroke="#e3e7ea"/>')
        parts.append(f'<text x="{to_x(v):.1f}" y="{bottom + 16}" text-anchor="middle">{v:g}</text>')
    for v in ticks(y0, y1, log):
        parts.append(f'<line x1="{LEFT}" x2="{right}" y1="{to_y(v):.1f}" y2="{to_y(v):.1f}" stroke="#e3e7ea"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{to_y(v) + 4:.1f}" text-anchor="end">{v:g}</text>')
    middle = (TOP + bottom) / 2
    parts.append(f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(f'<text transform="translate(14 {middle}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>')
    for k, curve in enumerate(curves):
        parts += _drawn(curve, _colour(k), to_x, to_y, log)
        words = curve.label + (f": {fit_label(curve.fit)}" if curve.fit else "")
        parts.append(f'<rect x="{LEFT + 8}" y="{TOP + 8 + 17 * k}" width="10" height="10" fill="{_colour(k)}"/>')
        parts.append(f'<text x="{LEFT + 24}" y="{TOP + 17 + 17 * k}">{escape(words)}</text>')
    style = "text { font: 12px system-ui, sans-serif; fill: #22282d }"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'role="img" aria-label="{escape(title)}"><style>{style}</style>{"".join(parts)}</svg>\n'
    )


def _colour(k: int) -> str:
    return PALETTE[k % len(PALETTE)]


def _drawn(curve: Curve, colour: str, to_x, to_y, log: bool) -> list[str]:
    parts = []
    if curve.fit is not None:
        low, high = max(curve.fit[4], curve.points[0][0]), curve.points[-1][0]
        steps = [k / (SAMPLES - 1) for k in range(SAMPLES)]
        at = [low * (high / low) ** s if log else low + s * (high - low) for s in steps]
        path = " ".join(f"{to_x(x):.1f},{to_y(curve.at(x)):.1f}" for x in at if curve.at(x) > 0 or not log)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-dasharray="4 3"/>')
    for x, y, low, high in curve.points:
        parts.append(
            f'<line x1="{to_x(x):.1f}" x2="{to_x(x):.1f}" y1="{to_y(low):.1f}" y2="{to_y(high):.1f}" '
            f'stroke="{colour}" stroke-width="1.5" opacity="0.6"/>'
        )
        parts.append(f'<circle cx="{to_x(x):.1f}" cy="{to_y(y):.1f}" r="4" fill="{colour}"/>')
    return parts
