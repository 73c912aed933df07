"""Pictures of materials as textures: their pixels as sRGB bytes, and texture coordinates brought into [0, 1]."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stages.errors import UserError
from stages.kernels.srgb import linear_to_srgb, srgb_to_linear
from stages.mesh.files.join import LARGEST

log = logging.getLogger(__name__)

FARTHEST = 1e5  # tiles from the picture: single precision has 64 steps or so for a tile there
GREY = 0.6  # linear colour of a mesh that has none


def pixels(path: Path) -> np.ndarray:
    """Return a picture file's pixels [H, W, 3] uint8 in sRGB.

    Raises: UserError where it cannot be read.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            return tinted(image, np.ones(3))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        why = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"Cannot read the picture {path}", why[0], "save it again as PNG or JPEG") from error


def tinted(image: Any, factor: np.ndarray) -> np.ndarray:
    """Multiply a picture [H, W, 3] uint8 in sRGB by a linear factor [3]."""
    if image.mode.startswith("I"):  # 16 bits of grey, which PIL would cut at 255
        image = image.point(lambda v: v / 257).convert("L")
    tinted = np.asarray(image.convert("RGB"), np.uint8)
    if np.allclose(factor, 1):
        return tinted
    bright = srgb_to_linear(torch.from_numpy(tinted / 255.0)).numpy() * factor
    return np.round(_to_srgb(bright) * 255).astype(np.uint8)


def bare_layout(uv: Any, faces: Any) -> dict[str, np.ndarray]:
    """Texture coordinates that come without a texture, for one to be painted into; none where they leave [0, 1]."""
    uv = np.asarray(uv, np.float32)
    if not np.isfinite(uv).all() or uv.min() < 0 or uv.max() > 1:
        return {}
    return {"uv": uv, "uv_faces": np.asarray(faces, np.int32)}


def in_one_tile(uv: np.ndarray, faces: np.ndarray, texture: np.ndarray) -> dict[str, np.ndarray]:
    """Return uv [T, 2] in [0, 1], uv_faces and texture of coordinates that may use a repeating texture's other tiles.

    Each face moves by whole tiles; where one reaches over a border, the texture itself is repeated.
    """
    uv = _within_reach(uv)
    if uv.min() >= 0 and uv.max() <= 1:
        return {"uv": uv.astype(np.float32), "uv_faces": faces, "texture": texture}
    corners = uv[faces]  # [F, 3, 2]
    corners -= np.floor(corners.min(axis=1, keepdims=True) + 1e-6)
    tiles = np.maximum(np.ceil(corners.max(axis=(0, 1)) - 1e-6), 1).astype(int)  # across, up
    if tiles.max() > 1:
        texture = _repeated(texture, tiles)
    corners, uv_faces = np.unique(np.clip(corners / tiles, 0, 1).reshape(-1, 2), axis=0, return_inverse=True)
    uv_faces = uv_faces.reshape(-1, 3).astype(np.int32)
    return {"uv": corners.astype(np.float32), "uv_faces": uv_faces, "texture": texture}


def spread(uv: np.ndarray, faces: np.ndarray, texture: np.ndarray, wraps: tuple[str, str]) -> dict[str, np.ndarray]:
    """Return uv [T, 2] in [0, 1], uv_faces and texture of coordinates that leave a picture which is not just repeated.

    The picture is laid out over all tiles that the coordinates touch.
    Args:
        wraps: how the picture goes on across and up: "repeat", "mirror" or "clamp" (its border goes on).
    """
    from PIL import Image

    uv = _within_reach(uv)
    low = np.minimum(np.floor(uv.min(0) + 1e-6), 0).astype(int)
    tiles = np.maximum(np.ceil(uv.max(0) - 1e-6), 1).astype(int) - low
    if (low == 0).all() and (tiles == 1).all():
        return {"uv": np.clip(uv, 0, 1).astype(np.float32), "uv_faces": faces, "texture": texture}
    size = [max(1, min(n, LARGEST // t)) for n, t in zip(texture.shape[1::-1], tiles)]
    if size != list(texture.shape[1::-1]):
        log.warning("the texture goes on over %d x %d tiles; it is kept at %d x %d texels each", *tiles, *size)
        texture = np.asarray(Image.fromarray(texture).resize(size, Image.Resampling.BOX))
    across = _source(size[0], low[0], min(tiles[0], LARGEST), wraps[0])
    up = _source(size[1], low[1], min(tiles[1], LARGEST), wraps[1])
    down = size[1] - 1 - up[::-1]
    fit = np.clip((uv - low) / tiles, 0, 1).astype(np.float32)
    return {"uv": fit, "uv_faces": faces, "texture": np.ascontiguousarray(texture[down][:, across])}


def _within_reach(uv: np.ndarray) -> np.ndarray:
    """Texture coordinates [T, 2] in double precision; those that are no numbers, or far away, are 0."""
    far = ~(np.abs(uv) < FARTHEST)
    if far.any():
        log.warning(
            "%d texture coordinates are no numbers, or more than %g tiles away: taken as 0", far.sum(), FARTHEST
        )
    return np.where(far, 0.0, uv.astype(np.float64))


def _source(size: int, low: int, tiles: int, wrap: str) -> np.ndarray:
    """The texels of a picture [tiles * size] that stand in the tiles from `low` on."""
    place = np.arange(low * size, (low + tiles) * size)
    if wrap == "clamp":
        return np.clip(place, 0, size - 1)
    return (
        np.where((place // size) % 2 == 1, size - 1 - place % size, place % size) if wrap == "mirror" else place % size
    )


def _repeated(texture: np.ndarray, tiles: np.ndarray) -> np.ndarray:
    """The texture [H, W, 3] laid out `tiles` times across and up, made smaller first where that is too large."""
    from PIL import Image

    height, width = texture.shape[:2]
    size = (max(1, min(width, LARGEST // tiles[0])), max(1, min(height, LARGEST // tiles[1])))
    if size != (width, height):
        log.warning("the texture repeats %d x %d times; it is kept at %d x %d texels a tile", *tiles, *size)
        texture = np.asarray(Image.fromarray(texture).resize(size, Image.Resampling.BOX))
    return np.tile(texture, (min(tiles[1], LARGEST), min(tiles[0], LARGEST), 1))


def _to_srgb(linear: np.ndarray) -> np.ndarray:
    return linear_to_srgb(torch.from_numpy(linear)).numpy()
