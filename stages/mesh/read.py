"""Reading a user's mesh file (GLB, OBJ, PLY, STL, ...) into the toolkit's own Mesh.

Colours become linear: texture pixels and PLY / OBJ vertex colours are sRGB, glTF's COLOR_0 and factors are linear.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from stages.cameras import linear_to_srgb, srgb_to_linear
from stages.errors import UserError
from stages.mesh.mesh import Mesh

GREY = 0.6  # linear colour of a mesh that has none


def read_mesh(path: str | Path) -> Mesh:
    """Read a mesh file, all its parts joined in world space, with a texture, vertex colours or plain grey.

    Raises: UserError for a missing or unreadable file, one without triangles, or one with non-finite coordinates.
    """
    import trimesh

    path = Path(path).expanduser()
    what = f"Cannot read the mesh {path}"
    if not path.is_file():
        raise UserError(what, "there is no such file", "give the path of a GLB, OBJ, PLY or STL file")
    try:
        scene = trimesh.load_scene(str(path), process=False)
        part = scene.to_mesh() if scene.geometry else None
    except Exception as error:  # each of trimesh's readers raises its own kinds
        reason = str(error).strip().splitlines()
        raise UserError(what, reason[0][:300] if reason else type(error).__name__, "save it again as GLB") from error
    if part is None or len(getattr(part, "faces", ())) == 0:
        raise UserError(what, "it holds no triangles", "save a triangle mesh")
    vertices, faces = np.asarray(part.vertices, np.float32), np.asarray(part.faces, np.int32)
    if not np.isfinite(vertices).all():
        raise UserError(what, "it has coordinates that are not finite numbers", "save it again")
    return Mesh(vertices, faces, **_appearance(part, linear=path.suffix.lower() in (".glb", ".gltf")))


def _appearance(part: Any, linear: bool) -> dict[str, np.ndarray]:
    """The colours, or uv, uv_faces and texture, of a trimesh mesh."""
    visual, vertices = part.visual, len(part.vertices)
    if visual.kind == "texture" and visual.uv is not None:
        image, factor = _base_colour(visual.material)
        if image is not None:
            tinted = np.asarray(image.convert("RGB"), np.uint8)
            if not np.allclose(factor, 1):
                bright = srgb_to_linear(torch.from_numpy(tinted / 255.0)).numpy() * factor
                tinted = np.round(_to_srgb(bright) * 255).astype(np.uint8)
            uv = np.asarray(visual.uv, np.float32)
            inside = bool((uv >= 0).all() and (uv <= 1).all())
            uv = uv if inside else uv - np.floor(uv)  # repeating textures wrap
            return {"uv": uv, "uv_faces": np.asarray(part.faces, np.int32), "texture": tinted}
        return {"colours": np.tile(factor.astype(np.float32), (vertices, 1))}
    if visual.kind == "texture":
        return {"colours": np.tile(_base_colour(visual.material)[1].astype(np.float32), (vertices, 1))}
    if visual.kind in ("vertex", "face"):
        colours = np.asarray(visual.vertex_colors)[:, :3].astype(np.float32) / 255
        return {"colours": colours if linear else srgb_to_linear(torch.from_numpy(colours)).numpy()}
    return {"colours": np.full((vertices, 3), GREY, np.float32)}


def _base_colour(material: Any) -> tuple[Any, np.ndarray]:
    """(base colour image or None, linear factor [3]) of a trimesh material."""
    image = getattr(material, "baseColorTexture", None)
    image = image if image is not None else getattr(material, "image", None)
    factor = getattr(material, "baseColorFactor", None)
    if factor is not None:
        factor = np.asarray(factor, np.float64)[:3]
        return image, factor / 255 if factor.max() > 1 else factor
    diffuse = getattr(material, "diffuse", None)
    if diffuse is None or image is not None:
        return image, np.ones(3)
    return None, srgb_to_linear(torch.from_numpy(np.asarray(diffuse, np.float64)[:3] / 255)).numpy()


def _to_srgb(linear: np.ndarray) -> np.ndarray:
    return linear_to_srgb(torch.from_numpy(linear)).numpy()
