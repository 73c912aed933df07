"""From a density field to the first surface of the fine stage: which level, which parts of it, and at what distance.

1. `find_level` samples the density on a regular grid and searches the level set that shows what the volume renderer
   shows: seen along an axis it should cover the rays that lose half of their light, and stand where they lose it. Only
   levels whose largest part is an object qualify. (At a fixed level, or at the mean density, pipelines break most.)
2. `dmtet_from_density` evaluates the field at lattice vertices near that surface, drops floaters, fills what is hidden,
   finds the crossing of each lattice edge by bisection of the field itself (densities are far from linear), and
   stores the distance to the resulting triangles, so that no value is clamped and no crossing sits at an edge's middle.

Letters: G grid points a side; a grid array [G, G, G] is indexed x, y, z at (i + 0.5) 2 / G - 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from scipy import ndimage
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree
from torch import Tensor

from stages.errors import UserError
from stages.kernels.marching import marching_tetrahedra
from stages.mesh.tets.dmtet import DMTet, margin_rings
from stages.mesh.tets.seal import sealed
from stages.mesh.tets.tetrahedra import Band, Lattice, build_band, dilate

Density = Callable[[Tensor], Tensor]

ABSORBED = float(np.log(2))  # optical depth at which half of the light is gone
CHUNK = 1 << 17


class InitialiseSettings(BaseModel):
    """Settings of the first surface from the coarse density."""

    model_config = ConfigDict(extra="forbid")

    samples: int = Field(96, ge=16, le=256, description="grid points a side of the search for the level")
    level: float | None = Field(None, gt=0, description="density of the surface; none: searched")
    candidates: int = Field(32, ge=4, le=256, description="levels tried before the refinement of the best")
    volume: tuple[float, float] = Field((2e-4, 0.6), description="sensible share of the box for the largest part")
    keep: float = Field(0.05, ge=0, le=1, description="parts with less than this share of the largest are dropped")

    @field_validator("volume")
    @classmethod
    def _ordered(cls, volume: tuple[float, float]) -> tuple[float, float]:
        if not 0 < volume[0] < volume[1] < 1:
            raise ValueError(f"wanted 0 < low < high < 1, got {list(volume)}")
        return volume


@dataclass(frozen=True)
class Level:
    """One level of a density grid and what it cuts out.

    Args:
        share: volume of the largest part over the box.
        parts: components kept, dropped: the others.
        rest: volume outside the largest part over all volume at the level.
        match: agreement with the volume render in [0, 1].
        slope: |d ln volume / d ln level|, small on a plateau.
        cut: the part reaches the box's border, where it will be closed.
    """

    level: float
    share: float
    parts: int
    dropped: int
    rest: float
    match: float
    slope: float
    cut: bool


def sample_density(density: Density, samples: int, device: torch.device | str = "cpu") -> np.ndarray:
    """Return the density on the regular grid, [G, G, G] float32. Raises UserError where it is not finite."""
    axis = (torch.arange(samples, device=device) + 0.5) * (2 / samples) - 1
    grid = _evaluate(density, torch.cartesian_prod(axis, axis, axis)).reshape(samples, samples, samples)
    broken = 1 - float(np.isfinite(grid).mean())
    if broken:
        raise UserError(
            "The density field is broken",
            f"{100 * broken:.1f} % of its values are not numbers",
            "run the coarse stage again with a lower coarse.lr or guidance scale",
        )
    return grid


@torch.no_grad()
def _evaluate(density: Density, points: Tensor) -> np.ndarray:
    parts = [density(part).reshape(-1).float().cpu() for part in points.split(CHUNK)]
    return torch.cat(parts).numpy() if parts else np.zeros(0, dtype=np.float32)


def _first_hits(solid: np.ndarray) -> list[np.ndarray]:
    """Index of the first True along each of the six axis directions, G where there is none; six [G, G] arrays."""
    hits = []
    for axis in range(3):
        for flipped in (solid, np.flip(solid, axis)):
            hits.append(np.where(flipped.any(axis), flipped.argmax(axis), solid.shape[0]))
    return hits


def _rendered_hits(grid: np.ndarray) -> list[np.ndarray]:
    """Like _first_hits, at the point where a ray through the density has lost half of its light."""
    hits = []
    for axis in range(3):
        for flipped in (grid, np.flip(grid, axis)):
            deep = np.cumsum(flipped, axis, dtype=np.float32) * np.float32(2 / grid.shape[0]) > ABSORBED
            hits.append(np.where(deep.any(axis), deep.argmax(axis), grid.shape[0]))
    return hits


def _match(true_hits: list[np.ndarray], hits: list[np.ndarray], size: int) -> float:
    """Agreement of two sets of first hits in [0, 1]: 3/4 for the silhouettes' mean overlap (intersection over union),
    1/4 for depth where both hit, an error of an eighth of the box counting fully."""
    overlap, depth = [], []
    for a, b in zip(true_hits, hits, strict=True):
        both, either = (a < size) & (b < size), (a < size) | (b < size)
        overlap.append(both.sum() / max(either.sum(), 1))
        gap = np.minimum(np.abs(a[both] - b[both]) * (8 / size), 1)
        depth.append(1 - gap.mean() if len(gap) else 0.0)
    return float(0.75 * np.mean(overlap) + 0.25 * np.mean(depth))


def _kept_parts(solid: np.ndarray, keep: float) -> tuple[np.ndarray, np.ndarray, int]:
    """Labels [G, G, G] of the kept parts (1.. by size, 0 elsewhere), their sizes, and how many parts there were."""
    labels, count = ndimage.label(solid)
    sizes = np.bincount(labels.reshape(-1), minlength=count + 1)[1:]
    order = np.argsort(-sizes, kind="stable")
    large = order[sizes[order] >= keep * sizes[order[0]]] if count else order
    rank = np.zeros(count + 1, dtype=np.int32)
    rank[large + 1] = np.arange(1, len(large) + 1)
    return rank[labels], sizes[large], count


def examine(grid: np.ndarray, level: float, settings: InitialiseSettings, true_hits: list[np.ndarray]) -> Level:
    """Measure the level set of a density grid; `wanted` is the grid's _rendered_hits."""
    solid = grid > level
    parts, sizes, count = _kept_parts(solid, settings.keep)
    total = int(solid.sum())
    largest = int(sizes[0]) if len(sizes) else 0
    first = parts == 1
    cut = any(first.take(k, axis).any() for axis in range(3) for k in (0, -1))
    higher = int((grid > level * 1.25).sum())
    slope = abs(np.log(max(higher, 0.5) / max(total, 0.5)) / np.log(1.25))
    match = _match(true_hits, _first_hits(parts > 0), grid.shape[0])
    rest = 1 - largest / max(total, 1)
    return Level(level, largest / grid.size, len(sizes), count - len(sizes), rest, match, float(slope), cut)


def find_level(grid: np.ndarray, settings: InitialiseSettings) -> Level:
    """Return the density level whose largest parts look most like the volume render of the grid.

    Levels are tried on a geometric scale, then between the neighbours of the best. A level qualifies if its largest
    part has a sensible volume and holds at least half of all that is solid. One that reaches the border of the box,
    where it will be cut, is taken only where all that do not match less than 0.8 times as well. Among levels that match
    equally well (to 0.01) the highest wins: half-lit rays graze the fog around a surface, so the best match is too
    large (a robot's volume by 8 %, of the flattest plateau by 15 %, of the highest level by 2 %).
    Raises: UserError with what was found where no level qualifies.
    """
    peak = float(grid.max())
    true_hits = _rendered_hits(grid)
    if peak <= 0 or not any((hit < grid.shape[0]).any() for hit in true_hits):
        raise UserError(
            "There is nothing to make a mesh of",
            f"no ray through the density loses half of its light (densest point {peak:.2g})",
            "train the coarse stage longer, with a lower coarse.opacity or another seed",
        )
    low, high = settings.volume

    def qualifies(level: Level) -> bool:
        return low <= level.share <= high and level.rest <= 0.5

    def best(levels: list[Level]) -> Level | None:
        fit = [x for x in levels if qualifies(x)]
        top = max((x.match for x in fit), default=0)
        whole = [x for x in fit if not x.cut]
        if whole and max(x.match for x in whole) >= 0.8 * top:
            fit, top = whole, max(x.match for x in whole)
        return max((x for x in fit if x.match >= top - 0.01), key=lambda x: x.level, default=None)

    def tried(levels: np.ndarray) -> list[Level]:
        return [examine(grid, float(x), settings, true_hits) for x in levels]

    if settings.level is not None:
        scale = np.array([settings.level])
    else:
        scale = np.geomspace(max(1e-4 * peak, 1e-2 * min(peak, 1)), 0.95 * peak, settings.candidates)
    levels = tried(scale)
    chosen = best(levels)
    if chosen is None:
        raise _no_level(levels, settings)
    if settings.level is None:
        ratio = scale[1] / scale[0]
        chosen = best([*levels, *tried(chosen.level * np.geomspace(1 / ratio, ratio, 7)[1:-1])])
    return chosen


def _no_level(levels: list[Level], settings: InitialiseSettings) -> UserError:
    low, high = settings.volume
    near = min(levels, key=lambda x: abs(np.log(max(x.share, 1e-9) / np.sqrt(low * high))) + 4 * x.rest)
    if near.share > high:
        why, fix = "fills the box", "raise coarse.opacity, or train the coarse stage longer"
    elif near.share < low:
        why, fix = "is a speck", "lower coarse.opacity, train the coarse stage longer, or try another seed"
    else:
        why, fix = "is in pieces", "train the coarse stage longer, or try another seed"
    return UserError(
        "No density level gives an object to refine",
        f"of {len(levels)} levels the most sensible, {near.level:.3g}, {why}: its largest part is "
        f"{100 * near.share:.3f} % of the box and {100 * (1 - near.rest):.0f} % of all that is solid",
        fix + "; or set fine.initialise.level by hand",
    )


def dmtet_from_density(
    density: Density,
    lattice: Lattice,
    settings: InitialiseSettings | None = None,
    *,
    deformation: float = 0.24,
    device: torch.device | str = "cpu",
) -> tuple[DMTet, Level]:
    """Return the DMTet of the best level set of a density: see the module's docstring.

    Args:
        density: points [N, 3] on `device` in [-1, 1]^3 to [N] >= 0.
        lattice: where the signed distances live; its cell may be finer or coarser than the search grid's.
    Raises: UserError where the density is not finite or holds no object.
    """
    settings = settings or InitialiseSettings()
    grid = sample_density(density, settings.samples, device)
    level = find_level(grid, settings)
    parts, _, _ = _kept_parts(grid > level.level, settings.keep)
    voxel = 2 / settings.samples
    body = sealed(parts > 0)
    rough = np.where(body, 0.5 - ndimage.distance_transform_edt(body), ndimage.distance_transform_edt(~body) - 0.5)
    rough = (rough * voxel).astype(np.float32)

    near = 2 * voxel + lattice.cell  # the lattice decides for itself this close to the rough surface
    at = np.argwhere(np.abs(rough) < near + 2 * voxel + lattice.cell) * voxel - 1
    band = build_band(lattice, lattice.ids_in_boxes(at - 1e-6, at + voxel + 1e-6))
    points = lattice.positions(band.ids)
    coarse = ndimage.map_coordinates(rough, (points.T + 1) / voxel - 0.5, order=1, mode="nearest")
    nearest = tuple(np.clip(((points.T + 1) / voxel).astype(np.int64), 0, settings.samples - 1))
    cavity = (body & (parts == 0))[nearest]
    close = np.abs(coarse) < near
    sampled = np.full(len(band), np.nan, dtype=np.float32)
    sampled[close] = _evaluate(density, torch.from_numpy(points[close]).to(device))
    raw = (np.where(close, sampled > level.level, coarse < 0) | cavity) & ~band.border
    inside = _one_body(band, raw, coarse < -near, (coarse > near) | band.border, settings.keep)

    vertices, faces = _bisected_surface(band, inside, raw, density, level.level, device)
    crossing = inside[band.edges[:, 0]] != inside[band.edges[:, 1]]
    core = band.ids[np.unique(band.edges[crossing])]
    ids = dilate(lattice, core, margin_rings(lattice))
    sign = np.where(_carried(ids, band.ids, inside, rough, lattice), -1, 1)
    distance = distance_to_surface(lattice.positions(ids), vertices, faces)
    return DMTet(lattice, ids, sign * distance, deformation=deformation, device=device), level


def _carried(ids: np.ndarray, known: np.ndarray, inside: np.ndarray, rough: np.ndarray, lattice: Lattice) -> np.ndarray:
    """Return which ids are inside: as decided where known, by the rough distance further away."""
    index = np.minimum(np.searchsorted(known, ids), len(known) - 1)
    have = known[index] == ids
    where = (lattice.positions(ids).T + 1) * (rough.shape[0] / 2) - 0.5
    return np.where(have, inside[index], ndimage.map_coordinates(rough, where, order=1, mode="nearest") < 0)


def _components(band: Band, chosen: np.ndarray, anchors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Components [N] among `chosen` vertices (-1 for others), all `anchors` joined into one; sizes by component."""
    links = band.edges[chosen[band.edges].all(1)]
    anchored = np.flatnonzero(anchors & chosen)
    if len(anchored):
        links = np.concatenate([links, np.stack([np.full(len(anchored), anchored[0]), anchored], -1)])
    graph = coo_matrix((np.ones(len(links), dtype=np.int8), (links[:, 0], links[:, 1])), shape=(len(band),) * 2)
    _, labels = connected_components(graph, directed=False)
    sizes = np.bincount(labels[chosen], minlength=labels.max() + 1)
    return np.where(chosen, labels, -1), sizes


def _one_body(band: Band, raw: np.ndarray, deep: np.ndarray, far: np.ndarray, keep: float) -> np.ndarray:
    """Inside flags [N] without floaters (parts below `keep` of the largest) and without enclosed cavities.

    deep, far: vertices well inside and well outside the body; the former are never floaters, the latter never cavities.
    """
    labels, sizes = _components(band, raw, np.zeros(len(band), dtype=bool))
    if not raw.any():
        raise UserError(
            "The first surface is empty",
            f"no vertex of the lattice of {band.lattice.resolution} cells a side lies inside it",
            "raise fine.tets, or lower fine.initialise.level",
        )
    large = sizes >= keep * sizes.max()
    large[labels[raw & deep]] = True
    inside = raw & large[labels]
    labels, _ = _components(band, ~inside, far)
    outer = np.zeros(labels.max() + 1, dtype=bool)
    outer[labels[far & ~inside]] = True
    return inside | ~outer[labels]


def _bisected_surface(
    band: Band, inside: np.ndarray, raw: np.ndarray, density: Density, level: float, device: torch.device | str
) -> tuple[np.ndarray, np.ndarray]:
    """Vertices [V, 3] where the density itself crosses the level on the lattice's edges, and faces [F, 3]."""
    ends, faces = crossing_edges(band, inside)
    a, b = (torch.from_numpy(band.lattice.positions(band.ids[side])) for side in ends.T)
    t = bisect(a, b, density, level, device)
    moved = (raw != inside)[ends].any(1) | (raw[ends[:, 0]] == raw[ends[:, 1]])
    t[torch.from_numpy(moved)] = 0.5  # an end of a dropped or filled part: the density has no crossing to find
    return (a + (b - a) * t[:, None]).numpy(), faces


def crossing_edges(band: Band, inside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the edges of a band that the surface of `inside` [N] crosses, and the triangles between the crossings.

    Returns: ends [V, 2], indices into the band, the inside end first; faces [F, 3] into ends.
    Raises: UserError where there is no triangle.
    """
    cells = [torch.from_numpy(x) for x in (band.edges, band.tets, band.tet_edges)]
    points = torch.from_numpy(band.lattice.positions(band.ids))
    sdf = torch.from_numpy(np.where(inside, np.float32(-1), np.float32(1)))
    _, faces, crossing = marching_tetrahedra(points, sdf, *cells, guard=1e-6)
    if not len(faces):
        raise UserError("The first surface is empty", "its parts do not meet the lattice", "raise fine.tets")
    ends = band.edges[crossing.numpy()]
    flip = ~inside[ends[:, 0]]
    ends[flip] = ends[flip][:, ::-1]
    return ends, faces.numpy()


def bisect(a: Tensor, b: Tensor, density: Density, level: float, device: torch.device | str) -> Tensor:
    """Return where on the segments from a [V, 3], denser than the level, to b [V, 3] it is crossed: t [V], to 1/512."""
    low, high = torch.zeros(len(a)), torch.ones(len(a))
    for _ in range(8):
        middle = (low + high) / 2
        value = _evaluate(density, (a + (b - a) * middle[:, None]).to(device))
        dense = torch.from_numpy(value > level)
        low, high = torch.where(dense, middle, low), torch.where(dense, high, middle)
    return (low + high) / 2


def distance_to_surface(points: np.ndarray, vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Return the unsigned distance [N] float32 from points to the triangles that touch their nearest vertex.

    Exact but for points whose nearest triangle does not touch the nearest vertex, which takes triangles much larger
    than their neighbours; marching tetrahedra makes none.
    Args:
        points: [N, 3].
        vertices: [V, 3]; one that no face uses does not count.
        faces: [F, 3].
    """
    used = np.unique(faces)
    _, nearest = cKDTree(vertices[used]).query(points)
    nearest = used[nearest]
    order = np.argsort(faces.reshape(-1), kind="stable")
    start = np.concatenate([[0], np.cumsum(np.bincount(faces.reshape(-1), minlength=len(vertices)))])
    count = start[nearest + 1] - start[nearest]
    best = np.full(len(points), np.inf)
    for k in range(int(count.max())):
        row = np.flatnonzero(count > k)
        triangle = vertices[faces[order[start[nearest[row]] + k] // 3]].astype(np.float64)  # [n, 3, 3]
        best[row] = np.minimum(best[row], _to_triangle(points[row].astype(np.float64), triangle))
    return best.astype(np.float32)


def _to_triangle(p: np.ndarray, triangle: np.ndarray) -> np.ndarray:
    """Distance [N] from points [N, 3] to triangles [N, 3, 3]: to the plane inside, to the nearest side elsewhere."""
    normal = np.cross(triangle[:, 1] - triangle[:, 0], triangle[:, 2] - triangle[:, 0])
    length = np.linalg.norm(normal, axis=1)
    over = length > 1e-18
    distance = np.full(len(p), np.inf)
    for k in range(3):
        a, b = triangle[:, k], triangle[:, (k + 1) % 3]
        side = b - a
        t = np.einsum("ij,ij->i", p - a, side) / np.maximum(np.einsum("ij,ij->i", side, side), 1e-300)
        distance = np.minimum(distance, np.linalg.norm(p - a - np.clip(t, 0, 1)[:, None] * side, axis=1))
        over &= np.einsum("ij,ij->i", np.cross(side, p - a), normal) >= 0
    height = np.abs(np.einsum("ij,ij->i", p - triangle[:, 0], normal)) / np.maximum(length, 1e-300)
    return np.where(over, height, distance)
