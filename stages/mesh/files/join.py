"""A file's parts as one mesh: vertices one after the other, textures side by side in one picture.

Every part keeps its texture coordinates' layout, moved and scaled into its texture's place; parts that share a picture
share its place, and a part without a texture gets a patch of its mean colour.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from stages.kernels.srgb import linear_to_srgb
from stages.mesh.measure import face_areas
from stages.mesh.mesh import Material, Mesh

log = logging.getLogger(__name__)

LARGEST = 8192  # side of a texture, texels
GUTTER = 4  # texels of a picture's own border laid around it: a filter that looks over the edge meets no neighbour
PATCH = 4  # side of a plain part's patch, texels


def join(parts: list[Mesh]) -> Mesh:
    """Join all parts into one mesh, with a texture where one of them has one, else with vertex colours.

    Args:
        parts: at least one; each with a texture and coordinates in [0, 1], or with colours.
    """
    if len(parts) == 1:
        return replace(parts[0], materials=None, face_materials=None)
    starts = np.cumsum([0] + [len(part.vertices) for part in parts[:-1]])
    vertices = np.concatenate([part.vertices for part in parts])
    faces = np.concatenate([part.faces + start for part, start in zip(parts, starts)]).astype(np.int32)
    rest = _finish(parts) | _materials(parts)
    if all(part.normals is not None for part in parts):
        rest["normals"] = np.concatenate([part.normals for part in parts])
    if all(part.texture is None for part in parts):
        return Mesh(vertices, faces, np.concatenate([part.colours for part in parts]), **rest)
    pictures = [_plain(part.colours) if part.texture is None else part.texture for part in parts]
    texture, places = side_by_side(pictures)
    uv, uv_faces, begin = [], [], 0
    for part, (offset, scale) in zip(parts, places):
        coordinates = np.full((1, 2), 0.5) if part.texture is None else part.uv.astype(np.float64)
        uv.append((coordinates * scale + offset).astype(np.float32))
        uv_faces.append(np.zeros_like(part.faces) + begin if part.texture is None else part.uv_faces + begin)
        begin += len(coordinates)
    layout = {"uv": np.clip(np.concatenate(uv), 0, 1), "uv_faces": np.concatenate(uv_faces).astype(np.int32)}
    return Mesh(vertices, faces, **layout, texture=texture, **rest)


def _materials(parts: list[Mesh]) -> dict[str, Any]:
    """Return the parts' own materials, equal ones once, and the faces of each; nothing where there is only one.

    A part brings its material's name as the first of `materials`, or none.
    """
    names = [part.materials[0].name if part.materials else "" for part in parts]
    own = [Material(name, part.metallic, part.roughness) for name, part in zip(names, parts)]
    distinct = list(dict.fromkeys(own))
    if len(distinct) == 1:
        return {}
    faces = [np.full(len(part.faces), distinct.index(material), np.int32) for part, material in zip(parts, own)]
    named = [replace(m, name=m.name or f"material_{k}") for k, m in enumerate(distinct)]
    return {"materials": tuple(named), "face_materials": np.concatenate(faces)}


def _finish(parts: list[Mesh]) -> dict[str, Any]:
    """Return the metalness and roughness of the parts together, for a surface made anew: their mean by area."""
    with np.errstate(all="ignore"):  # coordinates that are not finite are refused with the mesh
        areas = np.array([face_areas(part.vertices, part.faces).sum() for part in parts])
    finish: dict[str, Any] = {}
    for name in ("metallic", "roughness"):
        values = np.array([np.nan if getattr(part, name) is None else getattr(part, name) for part in parts], float)
        known = np.isfinite(values) & (areas > 0)
        if not known.any():
            continue
        finish[name] = float(np.average(values[known], weights=areas[known]))
    return finish


def side_by_side(pictures: list[np.ndarray]) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
    """Join pictures into one [H, W, 3], equal ones once, with the (offset [2], scale [2]) of each one's coordinates.

    All are made smaller by one factor where they do not fit into 8192 texels a side.
    """
    same: dict[int, int] = {}  # by identity first: hundreds of parts may share one large picture
    tiles: list[np.ndarray] = []
    unlike: dict[tuple, int] = {}
    for picture in pictures:
        if id(picture) not in same:
            content = hashlib.sha256(np.ascontiguousarray(picture)).digest()
            same[id(picture)] = unlike.setdefault((picture.shape, content), len(unlike))
            if len(unlike) > len(tiles):
                tiles.append(picture)
    which = [same[id(picture)] for picture in pictures]
    corners, (width, height) = _shelves(tiles)
    if max(width, height) > LARGEST:
        log.warning("the textures together are %d x %d texels; they are made smaller", width, height)
    while max(width, height) > LARGEST:
        tiles = [_smaller(tile, LARGEST / max(width, height)) for tile in tiles]
        corners, (width, height) = _shelves(tiles)
    whole = np.zeros((height, width, 3), np.uint8)
    places = []
    for tile, (x, y) in zip(tiles, corners):
        h, w = tile.shape[:2]
        room = np.pad(tile, ((GUTTER, GUTTER), (GUTTER, GUTTER), (0, 0)), mode="edge")
        whole[y - GUTTER : y + h + GUTTER, x - GUTTER : x + w + GUTTER] = room
        places.append((np.array([x / width, 1 - (y + h) / height]), np.array([w / width, h / height])))
    return whole, [places[k] for k in which]


def _shelves(tiles: list[np.ndarray]) -> tuple[list[tuple[int, int]], tuple[int, int]]:
    """Upper left corners (x, y) of pictures laid on shelves, the tallest first, and the (width, height) they take."""
    sizes = [(tile.shape[1] + 2 * GUTTER, tile.shape[0] + 2 * GUTTER) for tile in tiles]
    wide = max(max(w for w, _ in sizes), int(sum(w * h for w, h in sizes) ** 0.5))
    corners, x, y, shelf, used = [(0, 0)] * len(tiles), 0, 0, 0, 0
    for k in sorted(range(len(tiles)), key=lambda k: (-sizes[k][1], -sizes[k][0], k)):
        w, h = sizes[k]
        if x and x + w > wide:
            x, y, shelf = 0, y + shelf, 0
        corners[k] = (x + GUTTER, y + GUTTER)
        x, shelf = x + w, max(shelf, h)
        used = max(used, x)
    return corners, (used, y + shelf)


def _smaller(picture: np.ndarray, factor: float) -> np.ndarray:
    from PIL import Image

    size = tuple(max(1, int(n * factor * 0.99)) for n in picture.shape[1::-1])
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BOX))


def _plain(colours: np.ndarray) -> np.ndarray:
    """A patch of the mean of linear vertex colours [V, 3]."""
    if np.ptp(colours, axis=0).max() > 2 / 255:
        log.warning("the mesh mixes textures and vertex colours; the latter are replaced by their mean")
    mean = linear_to_srgb(torch.from_numpy(colours.mean(0))).numpy()
    return np.tile(np.round(mean * 255).astype(np.uint8), (PATCH, PATCH, 1))
