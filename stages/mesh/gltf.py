"""What a glTF file says that trimesh passes over in silence, read from its JSON."""

from __future__ import annotations

import json
import logging
import struct
from pathlib import Path
from typing import Any

from stages.errors import UserError

log = logging.getLogger(__name__)

MOVES = "KHR_texture_transform"
AS_NUMBERS = ("POSITION", "TEXCOORD_0")  # attributes that trimesh takes as they are stored, normalised or not


def read_document(path: Path) -> dict[str, Any]:
    """The JSON of a .gltf or .glb file (glTF 2.0 specification, sec. 4.4).

    Raises: ValueError for a file that holds none.
    """
    with open(path, "rb") as file:
        data = file.read(20)
        if data[:4] == b"glTF":  # textures and vertices, most of the file, come after
            if len(data) < 20:
                raise ValueError("the file ends in its header")
            length, kind = struct.unpack("<I4s", data[12:20])
            if kind != b"JSON":
                raise ValueError("its first chunk is not JSON")
            data = file.read(length)
        else:
            data += file.read()
    found = json.loads(data)
    if not isinstance(found, dict):
        raise ValueError("its JSON is no object")
    return found


def check_gltf(path: Path) -> None:
    """Refuse what would be read wrongly, and warn of what would be left out.

    Raises: UserError for coordinates stored as normalised integers; ValueError as read_document.
    """
    document = read_document(path)
    accessors = document.get("accessors", [])
    for part in document.get("meshes", []):
        for primitive in part.get("primitives", []):
            used = primitive.get("attributes", {})
            numbers = [accessors[used[name]] for name in AS_NUMBERS if name in used]
            if any(accessor.get("normalized") for accessor in numbers):
                raise UserError(
                    f"Cannot read the mesh {path}",
                    "its coordinates are stored as normalised integers (KHR_mesh_quantization)",
                    "save it again without quantisation",
                )
    for material in document.get("materials", []):
        texture = material.get("pbrMetallicRoughness", {}).get("baseColorTexture", {})
        moved = texture.get("extensions", {}).get(MOVES)
        name = material.get("name", "without a name")
        if moved is not None and any(moved.get(key, plain) != plain for key, plain in _IDENTITY.items()):
            log.warning(
                "the texture of the material %s is moved, turned or scaled (%s), which is left out; bake that into its "
                "texture coordinates", name, MOVES,
            )  # fmt: skip
        if (moved or {}).get("texCoord", texture.get("texCoord", 0)) != 0:
            log.warning("the texture of the material %s lies on its second coordinates; the first are taken", name)


_IDENTITY: dict[str, Any] = {"offset": [0, 0], "rotation": 0, "scale": [1, 1]}
