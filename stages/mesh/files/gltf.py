"""Rewriting of glTF features that trimesh ignores silently into plain numbers that it reads.

trimesh takes stored integers for coordinates, a material's texture for unmoved and on the first coordinates, and what a
sparse accessor replaces for zero. plain_gltf writes such numbers out: the same file with other accessors.
"""

from __future__ import annotations

import importlib.util
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np

from stages.errors import UserError
from stages.mesh.files.gltf_file import GltfFile
from stages.mesh.files.gltf_scene import KNOWN, show
from stages.mesh.files.polygons import strips

log = logging.getLogger(__name__)

MOVES, DRACO = "KHR_texture_transform", "KHR_draco_mesh_compression"
TRIANGLES, STRIP, FAN = 4, 5, 6  # primitive modes
LINES = {0: "points", 1: "lines", 2: "lines", 3: "lines"}
_WRAPS = {10497: "repeated", 33071: "clamped", 33648: "mirrored"}
PLAIN: dict[str, Any] = {"name": "vertex colours"}  # a material of nothing but its defaults


def plain_gltf(path: Path) -> tuple[bytes, str] | None:
    """Return (content, "glb" or "gltf") of a file that trimesh would misread, written out; None where it would not.

    Normalised integers become floats (KHR_mesh_quantization), sparse accessors whole ones (glTF 2.0 specification,
    sec. 3.6.2), texture coordinates those that the base colour's texture uses, moved as KHR_texture_transform says,
    strips and fans triangles, morph targets what they weigh; normals are held as the attribute _NORMAL, too.

    Raises: UserError for a file that is not what it says, or needs what is not read.
    """
    file = GltfFile(path)
    needed = [name for name in file.document.get("extensionsRequired", []) if not _is_read(name)]
    if needed:
        raise UserError(
            f"Cannot read the mesh {path}",
            f"it needs {', '.join(needed)}, which this toolkit does not read",
            "pip install DracoPy" if needed == [DRACO] else "save it again as plain glTF, without compression",
        )
    visible = show(file)
    rewrites: dict[tuple[Any, ...], int] = {}  # parts share accessors, and then what they became
    omissions: list[str] = []
    count = 0
    for number, part in enumerate(file.document["meshes"]):
        primitives = [primitive for primitive in part.get("primitives", []) if number in visible]
        primitives = [primitive for primitive in primitives if _is_surface(file, primitive, omissions)]
        file.changed |= len(primitives) != len(part.get("primitives", []))
        part["primitives"] = primitives
        count += len(primitives)
        for primitive in primitives:
            file.changed |= _write_out(file, primitive, rewrites)
    if not count:
        raise file.wrong(
            f"it holds no triangles: {'; '.join(omissions) or 'its meshes are empty'}", "save a triangle mesh"
        )
    for why in omissions:
        log.warning("%s: %s: left out", path.name, why)
    _drop_empty(file)
    _check_materials(file)
    file.embed()
    return file.content() if file.changed else None


def _drop_empty(file: GltfFile) -> None:
    """Take meshes without triangles out of their nodes."""
    empty = {number for number, part in enumerate(file.document["meshes"]) if not part["primitives"]}
    for node in file.document.get("nodes", []):
        if node.get("mesh") in empty:
            del node["mesh"]


def _is_surface(file: GltfFile, primitive: dict[str, Any], omissions: list[str]) -> bool:
    """Whether a primitive has triangles to read, all of which are there; else why not is added to `omissions`."""
    mode, attributes = primitive.get("mode", TRIANGLES), primitive.get("attributes", {})
    if mode in LINES:
        omissions.append(f"a primitive of {LINES[mode]}")
        return False
    if mode not in (TRIANGLES, STRIP, FAN):
        raise file.wrong(f"it has a primitive of mode {mode}, which glTF does not know")
    if "POSITION" not in attributes:
        omissions.append("a primitive without POSITION, which says where its corners are")
        return False
    if "material" in primitive:
        file.item("materials", primitive["material"])
    if DRACO in primitive.get("extensions", {}) and _is_read(DRACO):
        return True
    count = file.item("accessors", attributes["POSITION"])["count"]
    for name, number in attributes.items():
        there = file.item("accessors", number)["count"]
        if there != count:
            raise file.wrong(f"a primitive has {count} positions, and {there} values of {name}")
        if name in ("POSITION", "NORMAL", "COLOR_0") or name.startswith("TEXCOORD"):
            file.numbers(number)
    corners = count
    if "indices" in primitive:
        indices = file.numbers(primitive["indices"])
        corners = len(indices)
        if corners and indices.max() >= count:
            raise file.wrong(f"a face names vertex {indices.max()}, out of bounds: there are {count}, counted from 0")
    if mode == TRIANGLES and corners % 3:
        raise file.wrong(f"a primitive of triangles has {corners} corners, which is no multiple of 3")
    if corners < 3:
        omissions.append(f"a primitive of {corners} corners")
        return False
    return True


def _check_materials(file: GltfFile) -> None:
    """Warn of what base colours' textures say and is not read."""
    document = file.document
    for number in sorted({p["material"] for part in document["meshes"] for p in part["primitives"] if "material" in p}):
        material = document["materials"][number]
        name = material.get("name", "without a name")
        if material.get("alphaMode", "OPAQUE") != "OPAQUE":
            log.warning("the material %s is transparent in parts: it is read as opaque", name)
        texture = material.get("pbrMetallicRoughness", {}).get("baseColorTexture")
        if texture is None:
            continue
        texture = file.item("textures", texture["index"])
        source = texture.get("extensions", {}).get("EXT_texture_webp", texture).get("source")
        uri = None if source is None else file.item("images", source).get("uri")
        if source is None or not (uri is None or uri.startswith("data:") or file.beside(uri) is not None):
            why = "its format is not read" if source is None else f"there is no file {uri}"
            log.warning("the texture of the material %s is left out: %s", name, why)
        elif "sampler" in texture:
            _check_wrap(file, number, name, file.item("samplers", texture["sampler"]))


def _check_wrap(file: GltfFile, material: int, name: str, sampler: dict[str, Any]) -> None:
    """Warn of a texture that neither repeats nor stays within its borders."""
    for part in file.document["meshes"]:
        for primitive in part["primitives"]:
            used = primitive["attributes"].get("TEXCOORD_0")
            if primitive.get("material") != material or used is None or DRACO in primitive.get("extensions", {}):
                continue
            uv = file.numbers(used)
            beyond = [k for k in (0, 1) if uv[:, k].min() < -1e-3 or uv[:, k].max() > 1.001]
            ways = {_WRAPS.get(sampler.get(f"wrap{'ST'[k]}", 10497), "clamped") for k in beyond} - {"repeated"}
            if ways:
                log.warning(
                    "the texture of %s is %s beyond its border: read as repeated", name, " and ".join(sorted(ways))
                )
                return


def _is_read(extension: str) -> bool:
    if extension == DRACO:
        return importlib.util.find_spec("DracoPy") is not None
    return extension in KNOWN or extension.startswith("KHR_materials_")


def _write_out(file: GltfFile, primitive: dict[str, Any], rewrites: dict[tuple[Any, ...], int]) -> bool:
    """Give a primitive plain accessors in the place of those that trimesh would misread; whether there were any."""
    attributes = primitive.get("attributes", {})
    before = (dict(attributes), dict(primitive))
    which, move = _texture_use(file.document, primitive)
    if DRACO in primitive.get("extensions", {}):  # trimesh decodes these later, and by attribute
        if which or move:
            log.warning("a part compressed by Draco has its texture moved or on other coordinates: left out")
        return False

    def plain(number: int, move: tuple[float, ...] | None, colour: bool = False) -> int:
        if move is None and not file.is_odd(number, colour):
            return number
        if (number, move) not in rewrites:
            values = file.numbers(number)
            rewrites[number, move] = file.add(values if move is None else _moved(values, *move))
        return rewrites[number, move]

    used = attributes.get(f"TEXCOORD_{which}")
    attributes.pop("TEXCOORD_0", None)
    if used is not None:
        attributes["TEXCOORD_0"] = plain(used, move)
    for name in sorted({"POSITION", "COLOR_0"} & attributes.keys()):
        attributes[name] = plain(attributes[name], None, colour=name == "COLOR_0")
    if "COLOR_0" in attributes and "material" not in primitive:  # trimesh would cut these to eight bits
        materials = file.document.setdefault("materials", [])
        if PLAIN not in materials:
            materials.append(PLAIN)
        primitive["material"] = materials.index(PLAIN)
    if "indices" in primitive:
        primitive["indices"] = plain(primitive["indices"], None)
    if "NORMAL" in attributes:
        attributes["NORMAL"] = attributes["_NORMAL"] = plain(attributes["NORMAL"], None)
    mode = primitive.get("mode", TRIANGLES)
    if mode != TRIANGLES:
        count = file.document["accessors"][attributes["POSITION"]]["count"]
        around = file.numbers(primitive["indices"])[:, 0] if "indices" in primitive else np.arange(count)
        if mode == STRIP:
            triangles = strips(around.astype(np.uint32))
        else:
            triangles = np.stack([np.full(max(len(around) - 2, 0), around[0]), around[1:-1], around[2:]], 1)
        primitive["indices"] = file.add(triangles.astype(np.uint32).reshape(-1, 1))
        primitive["mode"] = TRIANGLES
    return (attributes, primitive) != before


def _texture_use(document: dict[str, Any], primitive: dict[str, Any]) -> tuple[int, tuple[float, ...] | None]:
    """(number of the coordinates that the base colour's texture uses, its (offset, rotation, scale) or None)."""
    if "material" not in primitive:
        return 0, None
    texture = document["materials"][primitive["material"]].get("pbrMetallicRoughness", {}).get("baseColorTexture", {})
    moved = texture.get("extensions", {}).get(MOVES, {})
    move = (*moved.get("offset", (0, 0)), moved.get("rotation", 0), *moved.get("scale", (1, 1)))
    return moved.get("texCoord", texture.get("texCoord", 0)), None if move == (0, 0, 0, 1, 1) else move


def _moved(uv: np.ndarray, across: float, down: float, angle: float, wide: float, high: float) -> np.ndarray:
    """Texture coordinates [V, 2], v downwards, scaled, turned and moved: KHR_texture_transform, its example's sense."""
    u, v = (uv * (wide, high)).astype(np.float64).T
    turned = math.cos(angle) * u + math.sin(angle) * v, math.cos(angle) * v - math.sin(angle) * u
    return np.add(np.stack(turned, 1), (across, down)).astype(np.float32)
