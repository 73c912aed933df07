"""Reading a user's mesh file (GLB, OBJ, PLY, STL, ...) into the toolkit's own Mesh.

Colours become linear: texture pixels and PLY / OBJ vertex colours are sRGB, glTF's COLOR_0 and factors are linear.
"""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stages.errors import UserError
from stages.kernels.srgb import linear_to_srgb, srgb_to_linear
from stages.mesh.files.gltf import plain_gltf
from stages.mesh.files.join import LARGEST, join
from stages.mesh.files.obj import plain_obj
from stages.mesh.measure import face_areas
from stages.mesh.mesh import Mesh

log = logging.getLogger(__name__)

GLTF = (".glb", ".gltf")
GREY = 0.6  # linear colour of a mesh that has none
FINEST = 2**12  # steps of single precision that a mesh must have along its longest side


def read_mesh(path: str | Path) -> Mesh:
    """Return the mesh of a file, all its parts joined in world space, with a texture, vertex colours or plain grey.

    Args:
        path: of a GLB, glTF, OBJ, PLY or STL file.
    Raises: UserError for a missing or unreadable file, and for one that holds no surface: no triangles, triangles
        without area, indices out of range, coordinates that are not finite.
    """
    path = Path(path).expanduser()
    what = f"Cannot read the mesh {path}"
    if not path.is_file():
        why = "it is a folder" if path.is_dir() else "there is no such file"
        raise UserError(what, why, "give the path of a GLB, OBJ, PLY or STL file")
    try:
        parts = _parts(_scene(path, _plain(path)))
        mesh = _joined(parts, linear=path.suffix.lower() in GLTF) if parts else None
    except UserError:
        raise
    except Exception as error:  # each of trimesh's readers raises its own kinds
        reason = str(error).strip().splitlines()
        raise UserError(what, reason[0][:300] if reason else type(error).__name__, "save it again as GLB") from error
    if mesh is None:
        raise UserError(what, "it holds no triangles", "save a triangle mesh; a point cloud has no surface to refine")
    if mesh.faces.min() < 0 or mesh.faces.max() >= len(mesh.vertices):
        raise UserError(what, f"its faces name vertex {mesh.faces.max()} of {len(mesh.vertices)}", "save it again")
    if not np.isfinite(mesh.vertices).all():
        raise UserError(what, "it has coordinates that are not finite numbers", "save it again")
    if face_areas(mesh.vertices, mesh.faces).sum() <= 0:
        raise UserError(what, "its triangles have no area", "save a mesh with a surface")
    far, long = np.abs(mesh.vertices).max(), np.ptp(mesh.vertices, axis=0).max()
    if long < FINEST * np.spacing(far):
        why = f"it is {long:g} units long and {far:g} from the origin, where single precision has steps of "
        raise UserError(what, f"{why}{np.spacing(far):g}", "move it near the origin and save it again")
    return mesh


def _plain(path: Path) -> tuple[bytes, str] | None:
    """(content, format) of a file that trimesh would misread, None for others."""
    kind = path.suffix.lower()
    if kind in GLTF:
        return plain_gltf(path)
    content = plain_obj(path) if kind == ".obj" else None
    return None if content is None else (content, "obj")


def _scene(path: Path, plain: tuple[bytes, str] | None) -> Any:
    """A trimesh scene of a file, or of (content, format) in its place."""
    import trimesh

    if plain is None:
        return trimesh.load_scene(str(path), process=False)
    content, kind = plain
    beside = trimesh.resolvers.FilePathResolver(str(path))
    return trimesh.load_scene(io.BytesIO(content), file_type=kind, resolver=beside, process=False)


def _parts(scene: Any) -> list[tuple[Any, np.ndarray | None]]:
    """The triangle meshes of a trimesh scene in world space, and the vertex colours [V, 3] of those with a material
    beside them, linear; trimesh drops these when it copies a mesh."""
    parts = []
    for node in scene.graph.nodes_geometry:
        transform, name = scene.graph[node]
        source = scene.geometry[name]
        if not len(getattr(source, "faces", ())):
            continue
        part = source.copy()
        part.apply_transform(transform)
        if part.visual.kind == "texture":
            part.visual.material = source.visual.material  # and not a copy of its pictures
        tint = source.visual.vertex_attributes.get("color") if source.visual.kind == "texture" else None
        if tint is not None:
            tint = np.asarray(tint)
            whole = np.iinfo(tint.dtype).max if tint.dtype.kind == "u" else 1
            tint = (tint[:, :3] / whole).astype(np.float32)
        parts.append((part, tint))
    return parts


def _joined(parts: list[tuple[Any, np.ndarray | None]], linear: bool) -> Mesh:
    """All parts as one mesh."""
    pictures: dict[tuple[int, bytes], np.ndarray] = {}  # parts share pictures: one copy of each
    return join([Mesh(*_geometry(part), **_appearance(part, tint, linear, pictures)) for part, tint in parts])


def _geometry(part: Any) -> tuple[np.ndarray, np.ndarray]:
    with np.errstate(over="ignore"):  # beyond float32 is infinite, and refused
        return np.asarray(part.vertices).astype(np.float32), np.asarray(part.faces, np.int32)


def _appearance(
    part: Any, tint: np.ndarray | None, linear: bool, pictures: dict[tuple[int, bytes], np.ndarray]
) -> dict[str, np.ndarray]:
    """The colours, or uv, uv_faces and texture, of a trimesh mesh; `tint` multiplies a material's plain colour.

    pictures: by image and factor, those made so far; their images must stay alive.
    """
    visual, vertices = part.visual, len(part.vertices)
    if visual.kind == "texture":
        image, factor = _base_colour(visual.material)
        if image is not None and visual.uv is not None:
            if tint is not None and not np.allclose(tint, 1):
                log.warning("the vertex colours that tint a texture are left out; bake them into the texture")
            key = (id(image), np.asarray(factor, np.float64).tobytes())
            if key not in pictures:
                pictures[key] = _tinted(image, factor)
            return _in_one_tile(np.asarray(visual.uv, np.float32), np.asarray(part.faces, np.int32), pictures[key])
        colours = np.tile(factor.astype(np.float32), (vertices, 1)) * (1 if tint is None else tint)
        return {"colours": colours} | ({} if visual.uv is None else _bare_layout(visual.uv, part.faces))
    if visual.kind in ("vertex", "face"):
        colours = np.asarray(visual.vertex_colors)[:, :3].astype(np.float32) / 255
        return {"colours": colours if linear else srgb_to_linear(torch.from_numpy(colours)).numpy()}
    return {"colours": np.full((vertices, 3), GREY, np.float32)}


def _tinted(image: Any, factor: np.ndarray) -> np.ndarray:
    """A picture [H, W, 3] uint8 in sRGB, times a linear factor [3]."""
    if image.mode.startswith("I"):  # 16 bits of grey, which PIL would cut at 255
        image = image.point(lambda v: v / 257).convert("L")
    tinted = np.asarray(image.convert("RGB"), np.uint8)
    if np.allclose(factor, 1):
        return tinted
    bright = srgb_to_linear(torch.from_numpy(tinted / 255.0)).numpy() * factor
    return np.round(_to_srgb(bright) * 255).astype(np.uint8)


def _bare_layout(uv: Any, faces: Any) -> dict[str, np.ndarray]:
    """Texture coordinates that come without a texture, for one to be painted into; none where they leave [0, 1]."""
    uv = np.asarray(uv, np.float32)
    if not np.isfinite(uv).all() or uv.min() < 0 or uv.max() > 1:
        return {}
    return {"uv": uv, "uv_faces": np.asarray(faces, np.int32)}


def _in_one_tile(uv: np.ndarray, faces: np.ndarray, texture: np.ndarray) -> dict[str, np.ndarray]:
    """uv [T, 2] in [0, 1], uv_faces and texture of coordinates that may use a repeating texture's other tiles.

    Each face moves by whole tiles; where one reaches over a border, the texture itself is repeated.
    """
    uv = np.nan_to_num(uv.astype(np.float64))
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


def _repeated(texture: np.ndarray, tiles: np.ndarray) -> np.ndarray:
    """The texture [H, W, 3] laid out `tiles` times across and up, made smaller first where that is too large."""
    from PIL import Image

    height, width = texture.shape[:2]
    size = (max(1, min(width, LARGEST // tiles[0])), max(1, min(height, LARGEST // tiles[1])))
    if size != (width, height):
        log.warning("the texture repeats %d x %d times; it is kept at %d x %d texels a tile", *tiles, *size)
        texture = np.asarray(Image.fromarray(texture).resize(size, Image.Resampling.BOX))
    return np.tile(texture, (min(tiles[1], LARGEST), min(tiles[0], LARGEST), 1))


def _base_colour(material: Any) -> tuple[Any, np.ndarray]:
    """(base colour image or None, linear factor [3]) of a trimesh material."""
    image = getattr(material, "baseColorTexture", None)
    image = image if image is not None else getattr(material, "image", None)
    factor = getattr(material, "baseColorFactor", None)
    if factor is not None:
        factor = np.asarray(factor)  # trimesh's bytes of a linear factor, or the factor itself
        return image, factor[:3] / (255 if factor.dtype.kind == "u" else 1.0)
    diffuse = getattr(material, "diffuse", None)
    if diffuse is None or image is not None:
        return image, np.ones(3)
    return None, srgb_to_linear(torch.from_numpy(np.asarray(diffuse, np.float64)[:3] / 255)).numpy()


def _to_srgb(linear: np.ndarray) -> np.ndarray:
    return linear_to_srgb(torch.from_numpy(linear)).numpy()
