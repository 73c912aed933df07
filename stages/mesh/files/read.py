"""Reading a user's mesh file (GLB, glTF, OBJ, PLY, STL) into the toolkit's own Mesh.

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
from stages.kernels.srgb import srgb_to_linear
from stages.mesh.files.gltf import PLAIN, plain_gltf
from stages.mesh.files.join import join
from stages.mesh.files.kinds import READ, format_of
from stages.mesh.files.obj import read_obj
from stages.mesh.files.picture import GREY, bare_layout, in_one_tile, tinted
from stages.mesh.files.ply import read_ply
from stages.mesh.files.stl import read_stl
from stages.mesh.measure import face_areas
from stages.mesh.mesh import Material, Mesh
from stages.paths import from_home

log = logging.getLogger(__name__)

FINEST = 2**12  # steps of single precision that a mesh must have along its longest side


def read_mesh(path: str | Path) -> Mesh:
    """Return the mesh of a file, all its parts joined in world space, with a texture, vertex colours or plain grey.

    Args:
        path: of a GLB, glTF, OBJ, PLY or STL file.
    Raises: UserError for a missing or unreadable file, and for one that holds no surface: no triangles, triangles
        without area, indices out of range, coordinates that are not finite.

    Example:
        >>> mesh = read_mesh("mug.glb")
    """
    path = from_home(path)
    what = f"Cannot read the mesh {path}"
    if not path.is_file():
        why = "it is a folder" if path.is_dir() else "there is no such file"
        raise UserError(what, why, f"give the path of a file: {READ} are read")
    try:
        parts = _READERS[format_of(path)](path)
        for part in parts:
            _check_colours(part)
        mesh = join(parts) if parts else None
    except UserError:
        raise
    except Exception as error:  # a damaged file's errors are of many kinds
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        why = f"it is damaged, or does not keep to its format ({type(error).__name__}: {reason})"
        raise UserError(what, why, "get the whole file again, or save it as GLB") from error
    if mesh is None:
        raise UserError(what, "it holds no triangles", "save a triangle mesh; a point cloud has no surface to refine")
    if mesh.normals is not None:
        length = np.linalg.norm(mesh.normals.astype(np.float64), axis=1)  # numbers of single precision, squared
        if not (np.abs(length - 1) < 0.01).all():
            log.warning("some of its normals are of no length, or no unit vectors: they follow from the faces instead")
            mesh.normals = None
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


def _check_colours(part: Mesh) -> None:
    """Give vertices grey whose colour is no number, and the nearest colour to those whose colour is beyond 0 and 1."""
    if part.colours is None or ((part.colours >= 0) & (part.colours <= 1)).all():
        return
    strange = ~np.isfinite(part.colours).all(1)
    if strange.any():
        log.warning("%d vertices have a colour that is no number: they are grey", strange.sum())
    beyond = ((part.colours < -1e-4) | (part.colours > 1 + 1e-4)).any(1) & ~strange
    if beyond.any():
        log.warning("%d vertices have a colour beyond 0 and 1: the nearest is taken", beyond.sum())
    part.colours = np.where(strange[:, None], np.float32(GREY), np.clip(part.colours, 0, 1))


def _read_gltf(path: Path) -> list[Mesh]:
    """The parts of a glTF file, read by trimesh."""
    import trimesh

    plain = plain_gltf(path)
    if plain is None:
        return _meshes(_parts(trimesh.load_scene(str(path), process=False)), linear=True)
    content, kind = plain
    beside = trimesh.resolvers.FilePathResolver(str(path))
    scene = trimesh.load_scene(io.BytesIO(content), file_type=kind, resolver=beside, process=False)
    return _meshes(_parts(scene), linear=True)


def _parts(scene: Any) -> list[tuple[Any, np.ndarray | None]]:
    """The triangle meshes of a trimesh scene in world space, and the vertex colours [V, 3] of those with a material
    beside them, linear; trimesh drops these when it copies a mesh. Normals are turned with them."""
    parts = []
    for node in scene.graph.nodes_geometry:
        transform, name = scene.graph[node]
        source = scene.geometry[name]
        if not len(getattr(source, "faces", ())):
            continue
        part = source.copy()
        with np.errstate(all="ignore"):  # numbers that are none are refused with the mesh, by all readers alike
            part.apply_transform(transform)
        if part.visual.kind == "texture":
            part.visual.material = source.visual.material  # and not a copy of its pictures
        normals = getattr(source, "vertex_attributes", {}).get("_NORMAL")
        if normals is not None:
            with np.errstate(all="ignore"):  # normals that are no unit vectors are left out, with a warning
                turned = np.asarray(normals, np.float64) @ np.linalg.pinv(transform[:3, :3])
                length = np.linalg.norm(turned, axis=1, keepdims=True)
                part.vertex_attributes["_NORMAL"] = (turned / np.where(length > 0, length, 1)).astype(np.float32)
        tint = source.visual.vertex_attributes.get("color") if source.visual.kind == "texture" else None
        if tint is not None:
            tint = np.asarray(tint)
            whole = np.iinfo(tint.dtype).max if tint.dtype.kind == "u" else 1
            tint = (tint[:, :3] / whole).astype(np.float32)
        parts.append((part, tint))
    return parts


def _joined(parts: list[tuple[Any, np.ndarray | None]], linear: bool) -> Mesh:
    """Join all parts into one mesh."""
    return join(_meshes(parts, linear))


def _meshes(parts: list[tuple[Any, np.ndarray | None]], linear: bool) -> list[Mesh]:
    pictures: dict[tuple[int, bytes], np.ndarray] = {}  # parts share pictures: one copy of each
    return [
        Mesh(*_geometry(part), **_appearance(part, tint, linear, pictures), **_finish(part)) for part, tint in parts
    ]


def _geometry(part: Any) -> tuple[np.ndarray, np.ndarray]:
    with np.errstate(over="ignore"):  # beyond float32 is infinite, and refused
        return np.asarray(part.vertices).astype(np.float32), np.asarray(part.faces, np.int32)


def _finish(part: Any) -> dict[str, Any]:
    """The normals of a trimesh mesh that a file gave it, and how metallic and rough its material says it is.

    Of a texture of both the mean is taken (glTF 2.0: roughness in green, metalness in blue).
    """
    finish: dict[str, Any] = {"normals": getattr(part, "vertex_attributes", {}).get("_NORMAL")}
    material = getattr(part.visual, "material", None)
    name = getattr(material, "name", None) or ""
    if name and name != PLAIN["name"]:
        finish["materials"] = (Material(name),)
    if type(material).__name__ != "PBRMaterial" or material.name == PLAIN["name"]:
        return finish
    for name, channel in (("metallic", 2), ("roughness", 1)):
        factor = getattr(material, f"{name}Factor")
        finish[name] = 1.0 if factor is None else float(factor)
        picture = material.metallicRoughnessTexture
        if picture is not None:
            finish[name] *= float(np.asarray(picture.convert("RGB"))[..., channel].mean() / 255)
    return finish


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
                pictures[key] = tinted(image, factor)
            return in_one_tile(np.asarray(visual.uv, np.float32), np.asarray(part.faces, np.int32), pictures[key])
        colours = np.tile(factor.astype(np.float32), (vertices, 1)) * (1 if tint is None else tint)
        return {"colours": colours} | ({} if visual.uv is None else bare_layout(visual.uv, part.faces))
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
        factor = np.asarray(factor)  # trimesh's bytes of a linear factor, or the factor itself
        return image, factor[:3] / (255 if factor.dtype.kind == "u" else 1.0)
    diffuse = getattr(material, "diffuse", None)
    if diffuse is None or image is not None:
        return image, np.ones(3)
    return None, srgb_to_linear(torch.from_numpy(np.asarray(diffuse, np.float64)[:3] / 255)).numpy()


_READERS = {".glb": _read_gltf, ".gltf": _read_gltf, ".obj": read_obj, ".ply": read_ply, ".stl": read_stl}
