"""Small SVG plots for the report: points with error bars, linear or logarithmic; marks differ in shape and colour."""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape

PALETTE = ("#1f6fb4", "#d9731a", "#2a9d55", "#8e4bb0", "#b8302a", "#6b7680", "#1a9ba8", "#c2a300")
MARKS = ("circle", "square", "diamond", "triangle")
WIDTH, HEIGHT = 560, 340
LEFT, RIGHT, TOP, BOTTOM = 62, 18, 30, 48


@dataclass(frozen=True)
class Point:
    """A labelled mean with its intervals; `colour` indexes the palette."""

    label: str
    x: float
    y: float
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None
    colour: int = 0


def ticks(low: float, high: float, log: bool = False, count: int = 6) -> list[float]:
    """Return round numbers within [low, high]: 1, 2, 5 times powers of ten."""
    if log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        return [m * 10.0**k for k in powers for m in (1, 2, 5) if low <= m * 10.0**k <= high]
    raw = (high - low) / count
    unit = 10 ** math.floor(math.log10(raw))
    step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def scatter(points: list[Point], title: str, x_label: str, y_label: str, *, log_x: bool = False) -> str:
    """An SVG of labelled points; error bars where a point has ranges. Points without a finite x or y are left out."""
    points = [p for p in points if math.isfinite(p.x) and math.isfinite(p.y) and (p.x > 0 or not log_x)]
    if not points:
        return ""
    x0, x1 = _limits([v for p in points for v in (p.x, *(p.x_range or ()))], log_x)
    y0, y1 = _limits([v for p in points for v in (p.y, *(p.y_range or ()))], False)

    def to_x(v: float) -> float:
        share = math.log(v / x0) / math.log(x1 / x0) if log_x else (v - x0) / (x1 - x0)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def to_y(v: float) -> float:
        return HEIGHT - BOTTOM - (v - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<text x="{LEFT}" y="18" font-weight="600">{escape(title)}</text>']
    for v in ticks(x0, x1, log_x):
        parts.append(
            f'<line x1="{to_x(v):.1f}" x2="{to_x(v):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="#e3e7ea"/>'
        )
        parts.append(f'<text x="{to_x(v):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{v:g}</text>')
    for v in ticks(y0, y1):
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{to_y(v):.1f}" y2="{to_y(v):.1f}" stroke="#e3e7ea"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{to_y(v) + 4:.1f}" text-anchor="end">{v:g}</text>')
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>'
    )
    parts.append(
        f'<text transform="translate(14 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>"
    )
    for p in points:
        colour, x, y = PALETTE[p.colour % len(PALETTE)], to_x(p.x), to_y(p.y)
        for low, high, across in ((*(p.x_range or (p.x, p.x)), True), (*(p.y_range or (p.y, p.y)), False)):
            if low != high:
                ends = (to_x(max(low, x0)), to_x(high), y, y) if across else (x, x, to_y(low), to_y(high))
                parts.append(
                    '<line x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}" '.format(*ends)
                    + f'stroke="{colour}" stroke-width="1.5" opacity="0.6"/>'
                )
        parts.append(_mark(MARKS[p.colour % len(MARKS)], x, y, colour))
        left = x > WIDTH - 120
        parts.append(
            f'<text x="{x + (-9 if left else 9):.1f}" y="{y - 7:.1f}" text-anchor="{"end" if left else "start"}" '
            f'font-weight="600" style="fill:{colour}">{escape(p.label)}</text>'
        )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}</svg>'
    )


def standalone(figure: str) -> str:
    """Return a figure of `scatter` as a file of its own: with its namespace, letters and a white ground."""
    style = "text{font:12px sans-serif;fill:#333}"
    ground = f'<style>{style}</style><rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>'
    head, body = figure.split(">", 1)
    return f'{head} xmlns="http://www.w3.org/2000/svg">{ground}{body}\n'


def _limits(values: list[float], log: bool) -> tuple[float, float]:
    values = [v for v in values if math.isfinite(v) and (v > 0 or not log)]
    low, high = min(values), max(values)
    if log:
        return low / 1.4, high * 1.4
    pad = 0.08 * (high - low) or max(abs(high) * 0.1, 0.5)
    return low - pad, high + pad


def _mark(kind: str, x: float, y: float, colour: str) -> str:
    if kind == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{colour}"/>'
    if kind == "square":
        return f'<rect x="{x - 4.5:.1f}" y="{y - 4.5:.1f}" width="9" height="9" fill="{colour}"/>'
    corners = {"diamond": [(0, -6), (6, 0), (0, 6), (-6, 0)], "triangle": [(0, -6), (6, 5), (-6, 5)]}[kind]
    path = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
    return f'<polygon points="{path}" fill="{colour}"/>'
