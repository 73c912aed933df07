"""Build the coloured mesh of a spec of the pocket world, with the place of each single object."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from stages.mesh.mesh import Mesh
from stages.pocket.palette import VARIATION, Palette, Vary, srgb_to_linear
from stages.pocket.pattern import apply_pattern
from stages.pocket.shapes import Part
from stages.pocket.world import KINDS, RADIUS, Spec


@dataclass
class _Solid:
    """Concatenated parts: vertices [V, 3], faces [F, 3], sRGB colours [V, 3]."""

    vertices: np.ndarray
    faces: np.ndarray
    colours: np.ndarray

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        return self.vertices.min(0), self.vertices.max(0)

    def fit(self, radius: float) -> _Solid:
        """Move the bounding box's centre to the origin and scale the farthest vertex to `radius`."""
        low, high = self.bounds()
        vertices = self.vertices - 0.5 * (low + high)
        scale = radius / np.sqrt((vertices**2).sum(1).max())
        return _Solid(vertices * scale, self.faces, self.colours)

    def move(self, offset) -> _Solid:
        return _Solid(self.vertices + np.asarray(offset), self.faces, self.colours)


def _join(solids: list[_Solid]) -> _Solid:
    starts = np.cumsum([0, *(len(s.vertices) for s in solids[:-1])])
    return _Solid(
        np.concatenate([s.vertices for s in solids]),
        np.concatenate([s.faces + start for s, start in zip(solids, starts, strict=True)]),
        np.concatenate([s.colours for s in solids]),
    )


def _solid_of(part: Part) -> _Solid:
    return _Solid(part.vertices, part.faces, np.broadcast_to(np.asarray(part.colour), part.vertices.shape))


def _single(spec: Spec, rng: np.random.Generator | None, variation: float) -> _Solid:
    """Build one object at radius RADIUS."""
    palette = Palette(spec.colour, rng, spec.pattern != "plain", variation)
    parts = KINDS[spec.kind].make(Vary(rng, variation), palette)
    whole = _join([_solid_of(p) for p in parts]).fit(RADIUS)
    if spec.pattern == "plain":
        return whole
    canonical = _join([_solid_of(p) for p in KINDS[spec.kind].make(Vary(None), palette)]).fit(RADIUS)
    main = np.repeat([p.colour is palette.main for p in parts], [len(p.vertices) for p in parts])
    body, rest = _pick(whole, main), _pick(whole, ~main)
    axis = "z" if spec.kind == "fish" else "y"
    options = {"canonical": canonical.vertices[main], "axis": axis, "square": spec.kind == "cube"}
    vertices, faces, second = apply_pattern(body.vertices, body.faces, spec.pattern, **options)
    colours = np.empty_like(vertices)
    colours[faces] = np.where(second[:, None, None], palette.second, palette.main)
    return _join([_Solid(vertices, faces, colours), rest])


def _pick(solid: _Solid, keep: np.ndarray) -> _Solid:
    """Return the parts of a solid whose vertices are in keep [V] bool."""
    number = np.cumsum(keep) - 1
    return _Solid(solid.vertices[keep], number[solid.faces[keep[solid.faces[:, 0]]]], solid.colours[keep])


def _on(top: _Solid, below: _Solid, kind: str) -> _Solid:
    """Return `top` on `below`, scaled to the room there."""
    low, high = below.bounds()
    size = high - low
    height, z, room = high[1], 0.5 * (low[2] + high[2]), 0.86 * min(size[0], size[2])
    if kind == "chair":  # on the seat, in front of the back rest
        seat = below.vertices[below.vertices[:, 2] > high[2] - 0.1 * size[2], 1].max()
        height, z, room = seat, z + 0.06 * size[2], 0.84 * min(size[0], size[2])
    elif kind == "car":  # on the roof, a little behind the middle
        z, room = z - 0.05 * size[2], 1.0 * size[0]
    elif kind == "table":
        room = 1.0 * min(size[0], size[2])
    low, high = top.bounds()
    extent = high - low
    scale = min(room / max(extent[0], extent[2]), 1.15 * room / extent[1])
    centre = 0.5 * (low + high)
    vertices = (top.vertices - (centre[0], low[1], centre[2])) * scale + (0, height - 0.01 * room, z)
    return _join([_Solid(vertices, top.faces, top.colours), below])


def _beside(left: _Solid, right: _Solid) -> _Solid:
    """Return `left` at -x and `right` at +x on one floor, with a narrow gap between them."""
    (low, high), (low2, _) = left.bounds(), right.bounds()
    return _join([left.move((-high[0] - 0.05, -low[1], 0)), right.move((-low2[0] + 0.05, -low2[1], 0))])


def build(spec: Spec, rng: np.random.Generator | None = None, variation: float = VARIATION) -> Mesh:
    """Build the coloured mesh of a spec, colours linear.

    Args:
        rng: varies proportions and colours a little; None gives the canonical object, the caption's ground truth.
        variation: how much of the full spread, in [0, 1]; 1 for what is conditioned on pictures, not on words alone.
    Returns: closed parts, overlapping freely; bounding box centred at the origin, farthest vertex at RADIUS.
    """
    return build_placed(spec, rng, variation)[0]


def build_placed(
    spec: Spec, rng: np.random.Generator | None = None, variation: float = VARIATION
) -> tuple[Mesh, np.ndarray, np.ndarray]:
    """:func:`build`, and where each single object of the spec stands in it.

    Returns: the mesh; [O, 4] scale and offset x, y, z of each object: a point p of the object alone, as `build`
        makes it, is at scale p + offset, and a single object has (1, 0, 0, 0); [O, 6] low and high corner of the box
        of each object alone.
    """
    solids = [_single(o, rng, variation) for o in spec.objects()]
    if spec.relation == "on":
        solid = _on(*solids, spec.other.kind).fit(RADIUS)
    elif spec.relation == "next to":
        solid = _beside(*solids).fit(RADIUS)
    else:
        solid = solids[0].fit(RADIUS)
    colours = srgb_to_linear(solid.colours).astype(np.float32)
    mesh = Mesh(solid.vertices.astype(np.float32), solid.faces.astype(np.int32), np.ascontiguousarray(colours))
    boxes = np.array([np.concatenate(s.bounds()) for s in solids])
    return mesh, _placements(solid.vertices, [len(s.vertices) for s in solids]), boxes


def _placements(vertices: np.ndarray, counts: list[int]) -> np.ndarray:
    """Return scale and offset [O, 4] of the objects that have `counts` vertices [V, 3] one after another."""
    rows = []
    for part in np.split(vertices, np.cumsum(counts)[:-1]):
        centre = 0.5 * (part.min(0) + part.max(0))
        rows.append([np.sqrt(((part - centre) ** 2).sum(1).max()) / RADIUS, *centre])
    return np.array(rows)
