"""What an OBJ file says that trimesh passes over: concave polygons, which it would cut into fans, and lost pictures."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

log = logging.getLogger(__name__)

BENT = 1e-9  # of a polygon's area: a corner is concave where it turns back by more


def plain_obj(path: Path) -> bytes | None:
    """The content of an OBJ file with its concave polygons cut into triangles by their ears; None where it has none.

    A warning is logged for materials' pictures that are not there.
    """
    lines = path.read_bytes().replace(b"\\\r\n", b" ").replace(b"\\\n", b" ").split(b"\n")
    positions: list[list[bytes]] = []
    polygons: dict[int, list[tuple[int, list[bytes], list[int]]]] = {}  # by corners: line, corners as written, vertices
    libraries, used = [], set()
    try:
        for number, line in enumerate(lines):
            start = line[:2].rstrip()
            if start == b"v":
                positions.append(line.split()[1:4])
            elif start == b"f":
                corners = line.split(b"#")[0].split()[1:]
                if len(corners) > 3:
                    vertices = [int(corner.split(b"/")[0]) for corner in corners]
                    vertices = [v - 1 if v > 0 else v + len(positions) for v in vertices]
                    polygons.setdefault(len(corners), []).append((number, corners, vertices))
            elif line.startswith(b"mtllib"):
                libraries.append(line[6:].strip().decode(errors="replace"))
            elif line.startswith(b"usemtl"):
                used.add(line[6:].strip())
        points = np.array(positions, dtype=np.float64).reshape(-1, 3)
    except ValueError:
        return None  # trimesh says what is wrong with it
    for library in libraries:
        _check_pictures(path.parent, library, used)
    changed = 0
    for group in polygons.values():
        group = [polygon for polygon in group if min(polygon[2]) >= 0 and max(polygon[2]) < len(points)]
        if not group:
            continue
        flat = _flattened(points[np.array([vertices for _, _, vertices in group])])
        for polygon in np.flatnonzero(_concave(flat)):
            number, corners, _ = group[polygon]
            lines[number] = b"\n".join(b"f " + b" ".join(corners[k] for k in ear) for ear in ears(flat[polygon]))
            changed += 1
    if changed:
        log.info("%d concave polygons cut into triangles", changed)
    return b"\n".join(lines) if changed else None


def ears(polygon: np.ndarray) -> list[tuple[int, int, int]]:
    """Return the triangles of a simple counter-clockwise polygon [N, 2] as corners, by ear clipping (Meisters 1975).

    What is left of one that crosses itself, when no ear can be found, becomes a fan.
    """
    rest, triangles = list(range(len(polygon))), []
    while len(rest) > 3:
        ring = polygon[rest]
        before, after = np.roll(ring, 1, axis=0), np.roll(ring, -1, axis=0)
        turn = _cross(ring - before, after - ring)
        for k in np.argsort(-turn):  # the widest first: slivers come last
            if turn[k] <= 0:
                return triangles + [(rest[0], rest[i], rest[i + 1]) for i in range(1, len(rest) - 1)]
            a, b, c = before[k], ring[k], after[k]
            inside = (_cross(b - a, ring - a) >= 0) & (_cross(c - b, ring - b) >= 0) & (_cross(a - c, ring - c) >= 0)
            corner = (ring == a).all(1) | (ring == b).all(1) | (ring == c).all(1)
            if not (inside & ~corner).any():
                break
        else:
            return triangles + [(rest[0], rest[i], rest[i + 1]) for i in range(1, len(rest) - 1)]
        triangles.append((rest[k - 1], rest[k], rest[(k + 1) % len(rest)]))
        del rest[k]
    return [*triangles, tuple(rest)]


def _flattened(corners: np.ndarray) -> np.ndarray:
    """Polygons [P, N, 3] in their own planes [P, N, 2], counter-clockwise (Newell's normals)."""
    corners = corners - corners.mean(1, keepdims=True)
    normal = np.cross(corners, np.roll(corners, -1, axis=1)).sum(1)
    length = np.linalg.norm(normal, axis=1, keepdims=True)
    normal = np.where(length > 0, normal / np.where(length > 0, length, 1), [0, 0, 1.0])
    across = np.cross(normal, np.eye(3)[np.abs(normal).argmin(1)])
    across /= np.linalg.norm(across, axis=1, keepdims=True)
    axes = np.stack([across, np.cross(normal, across)], -1)
    return corners @ axes


def _concave(flat: np.ndarray) -> np.ndarray:
    """Which polygons [P, N, 2] have a corner that turns back."""
    edge = np.roll(flat, -1, axis=1) - flat
    turn = _cross(np.roll(edge, 1, axis=1), edge)
    area = _cross(flat, np.roll(flat, -1, axis=1)).sum(1, keepdims=True) / 2
    return (turn < -BENT * area).any(1)


def _cross(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


def _check_pictures(folder: Path, library: str, used: set[bytes]) -> None:
    """Warn of a material library, or of pictures of materials in use, that are not there."""
    path = folder / library
    if not path.is_file():
        log.warning("the material library %s is not there: its colours are left out", library)
        return
    in_use = False
    for line in path.read_bytes().split(b"\n"):
        words = line.strip().split(None, 1)
        if len(words) < 2:
            continue
        if words[0] == b"newmtl":
            in_use = words[1].strip() in used
        elif in_use and words[0].lower() == b"map_kd":
            names = [words[1].decode(errors="replace"), words[1].split()[-1].decode(errors="replace")]
            if not any((folder / name.replace("\\", "/")).is_file() for name in names):
                log.warning("there is no picture %s: the material's plain colour is taken", names[1])
