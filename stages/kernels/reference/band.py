"""Plain-torch twin of stages/kernels/band.py: the definition, any device. Letters: N vertices, K = 7 directions."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

# Seven directions in doubled coordinates, each with a positive id offset; their negatives are the other seven.
DIRECTIONS = ((2, 0, 0), (0, 2, 0), (0, 0, 2), (1, 1, 1), (1, 1, -1), (1, -1, 1), (1, -1, -1))
PAIRS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))  # the ends of a tetrahedron's edges


def side_of(resolution: int) -> int:
    """Return the padded doubled coordinates per axis: stepping two out of the lattice never meets a valid id."""
    return 2 * resolution + 4


def shifts(resolution: int) -> list[int]:
    """Return the offset of ids along each direction."""
    side = side_of(resolution)
    return [(x * side + y) * side + z for x, y, z in DIRECTIONS]


def lengths(resolution: int) -> list[float]:
    """Return the length of an edge along each direction, world units."""
    return [math.hypot(*d) / resolution for d in DIRECTIONS]


def _moves() -> tuple[tuple[tuple[int, int], ...], ...]:
    """The twelve tetrahedra that start at a centre: their six edges in the order of PAIRS as (direction, 1 or -1)."""

    def move(start: tuple[int, ...], end: tuple[int, ...]) -> tuple[int, int]:
        step = tuple(b - a for a, b in zip(start, end, strict=True))
        if step in DIRECTIONS:
            return DIRECTIONS.index(step), 1
        return DIRECTIONS.index(tuple(-s for s in step)), -1

    def turned(axis: int, a: int, b: int, c: int) -> tuple[int, ...]:
        place = [0, 0, 0]
        place[axis], place[(axis + 1) % 3], place[(axis + 2) % 3] = a, b, c
        return tuple(place)

    patterns = []
    for axis in range(3):
        around = [turned(axis, 1, *bc) for bc in ((1, 1), (-1, 1), (-1, -1), (1, -1))]  # clockwise seen along +axis
        for i in range(4):
            tet = ((0, 0, 0), turned(axis, 2, 0, 0), around[i], around[(i + 1) % 4])
            patterns.append(tuple(move(tet[a], tet[b]) for a, b in PAIRS))
    return tuple(patterns)


MOVES = _moves()


@cache
def _constant(values: tuple, device: torch.device) -> Tensor:
    return torch.tensor(values, device=device)


def _steps(resolution: int, device: torch.device) -> Tensor:
    """Offsets [2 K] to the neighbours: along each direction, then against each."""
    ahead = shifts(resolution)
    return _constant((*ahead, *(-s for s in ahead)), device)


def _coordinates(ids: Tensor, resolution: int) -> Tensor:
    side = side_of(resolution)
    rest = ids // side
    x = rest // side
    return torch.stack([x, rest - x * side, ids - rest * side], -1)


def dilated(ids: Tensor, resolution: int, rings: int) -> Tensor:
    """Return sorted ids [N] within `rings` lattice edges of any of `ids`, cut at the lattice."""
    ids = torch.unique(ids)
    for _ in range(rings):
        ids = torch.unique(torch.cat([ids, (ids[:, None] + _steps(resolution, ids.device)).reshape(-1)]))
        at = _coordinates(ids, resolution)
        ids = ids[((at >= 0) & (at <= 2 * resolution)).all(-1)]
    return ids


def matched(ids: Tensor, queries: Tensor) -> Tensor:
    """Return the index [Q] int64 into sorted `ids` of each of the sorted `queries`, -1 where there is none."""
    index = torch.searchsorted(ids, queries).clamp_max(len(ids) - 1)
    return torch.where(ids[index] == queries, index, -1)


def neighbours(ids: Tensor, resolution: int) -> tuple[Tensor, Tensor]:
    """Return the index [N, 2 K] int32 of each neighbour, -1 where there is none, and which vertices [N] miss one."""
    around = torch.stack([matched(ids, ids + s) for s in _steps(resolution, ids.device)], -1).int()
    return around, (around < 0).any(-1)


def cells(ids: Tensor, around: Tensor, resolution: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return edges [E, 2], tets [T, 4] and tet_edges [T, 6], int32; see tetrahedra.Band."""
    directions, device = len(DIRECTIONS), ids.device
    present = around[:, :directions] >= 0
    number = present.reshape(-1).cumsum(0, dtype=torch.int32).reshape(present.shape) - 1
    start, k = torch.nonzero(present, as_tuple=True)
    edges = torch.stack([start.int(), around[start, k]], -1)

    way = _constant(MOVES, device)  # [12, 6, 2]
    along, ahead = way.unbind(-1)
    centres = torch.nonzero(_coordinates(ids, resolution)[:, 0] % 2 == 1)  # [C, 1]
    columns = torch.where(ahead > 0, along, directions + along)[:, :3].reshape(-1)
    ends = around[centres, columns].reshape(-1, len(MOVES), 3)
    tets = torch.cat([centres.int()[:, None].expand(-1, len(MOVES), -1), ends], -1)  # [C, 12, 4]
    complete = (ends >= 0).all(-1)
    pattern = torch.nonzero(complete)[:, 1]
    tets = tets[complete]  # [T, 4]
    first, second = _constant(PAIRS, device).unbind(-1)
    owner = torch.where(
        ahead[pattern] > 0, tets[:, first], tets[:, second]
    ).long()  # [T, 6]: an edge is its lower end's
    return edges, tets, number[owner, along[pattern]]


def apart(flags: Tensor, around: Tensor) -> Tensor:
    """Return which vertices [N] bool have a neighbour whose flag [N] bool is another."""
    return ((flags[around.clamp_min(0).long()] != flags[:, None]) & (around >= 0)).any(-1)


def places(ids: Tensor, resolution: int) -> tuple[Tensor, Tensor]:
    """Return world positions [N, 3] float32, and which vertices [N] bool are on the lattice's border."""
    at = _coordinates(ids, resolution)
    return (at.double() / resolution - 1).float(), ((at < 2) | (at > 2 * resolution - 2)).any(-1)


def extended(values: Tensor, known: Tensor, around: Tensor, resolution: int) -> Tensor:
    """Return values [N] float32 with those that are not known made of their neighbours' ring by ring; see band.py."""
    values, known, present, index = values.clone(), known.clone(), around >= 0, around.clamp_min(0).long()
    while not bool(known.all()):
        todo = torch.nonzero(~known)[:, 0]
        best = torch.full((len(todo),), torch.inf, device=values.device)
        sign = torch.ones_like(best)
        for k, length in enumerate(lengths(resolution)):
            for column in (k, k + len(DIRECTIONS)):
                there = index[todo, column]
                away = torch.where(present[todo, column] & known[there], values[there].abs() + length, torch.inf)
                closer = away < best
                sign = torch.where(closer, torch.where(values[there] < 0, -1.0, 1.0), sign)
                best = torch.where(closer, away, best)
        reached = torch.isfinite(best)
        if not bool(reached.any()):
            values[todo] = 2 / resolution
            break
        values[todo[reached]] = (sign * best)[reached]
        known[todo[reached]] = True
    return values
