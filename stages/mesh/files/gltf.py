"""What a glTF file says that trimesh passes over in silence, told to it in plain numbers.

trimesh takes stored integers for coordinates, a material's texture for unmoved and on the first coordinates, and what a
sparse accessor replaces for zero. plain_gltf writes such numbers out: the same file with other accessors.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import logging
import math
import struct
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np

from stages.errors import UserError

log = logging.getLogger(__name__)

MOVES, DRACO = "KHR_texture_transform", "KHR_draco_mesh_compression"
TRIANGLES, FAN = 4, 6  # primitive modes
PLAIN: dict[str, Any] = {"name": "vertex colours"}  # a material of nothing but its defaults
# required extensions that are read, or that say nothing of shape and base colour
READ = {MOVES, "KHR_mesh_quantization", "EXT_texture_webp", "KHR_lights_punctual", "KHR_xmp_json_ld"}
_TYPES = {5120: np.int8, 5121: np.uint8, 5122: np.int16, 5123: np.uint16, 5125: np.uint32, 5126: np.float32}
_COLUMNS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4}


def plain_gltf(path: Path) -> tuple[bytes, str] | None:
    """(content, "glb" or "gltf") of a file that trimesh would misread, written out; None where it would not.

    Normalised integers become floats (KHR_mesh_quantization), sparse accessors whole ones (glTF 2.0 specification,
    sec. 3.6.2), texture coordinates those that the base colour's texture uses, moved as KHR_texture_transform says.

    Raises: UserError for a required extension that is not read; ValueError, KeyError, IndexError for a broken file.
    """
    file = _File(path)
    needed = [name for name in file.document.get("extensionsRequired", []) if not _is_read(name)]
    if needed:
        raise UserError(
            f"Cannot read the mesh {path}",
            f"it needs {', '.join(needed)}, which this toolkit does not read",
            "pip install DracoPy" if needed == [DRACO] else "save it again as plain glTF, without compression",
        )
    done: dict[tuple[Any, ...], int] = {}  # parts share accessors, and then what they became
    changed = False
    for part in file.document.get("meshes", []):
        for primitive in part.get("primitives", []):
            changed |= _write_out(file, primitive, done)
    if any("skin" in node for node in file.document.get("nodes", [])):
        log.warning("%s has a skeleton: its mesh is read as it is stored, before any bone moves it", path.name)
    _check_pictures(file)
    return file.content() if changed else None


def _check_pictures(file: _File) -> None:
    """Warn of base colours' pictures that will not be read."""
    document = file.document
    used = {p["material"] for part in document.get("meshes", []) for p in part["primitives"] if "material" in p}
    for number in sorted(used):
        material = document["materials"][number]
        texture = material.get("pbrMetallicRoughness", {}).get("baseColorTexture")
        if texture is None:
            continue
        texture = document["textures"][texture["index"]]
        source = texture.get("extensions", {}).get("EXT_texture_webp", texture).get("source")
        uri = None if source is None else document["images"][source].get("uri")
        why = "its format is not read" if source is None else f"there is no file {uri}"
        if source is None or not (
            uri is None or uri.startswith("data:") or (file.path.parent / unquote(uri)).is_file()
        ):
            name = material.get("name", "without a name")
            log.warning("the texture of the material %s is left out: %s", name, why)


def _is_read(extension: str) -> bool:
    if extension == DRACO:
        return importlib.util.find_spec("DracoPy") is not None
    return extension in READ or extension.startswith("KHR_materials_")


def _write_out(file: _File, primitive: dict[str, Any], done: dict[tuple[Any, ...], int]) -> bool:
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
        if (number, move) not in done:
            values = file.numbers(number)
            done[number, move] = file.add(values if move is None else _moved(values, *move))
        return done[number, move]

    used = attributes.get(f"TEXCOORD_{which}")
    attributes.pop("TEXCOORD_0", None)
    if used is not None:
        attributes["TEXCOORD_0"] = plain(used, move)
    for name in {"POSITION", "COLOR_0"} & attributes.keys():
        attributes[name] = plain(attributes[name], None, colour=name == "COLOR_0")
    if "COLOR_0" in attributes and "material" not in primitive:  # trimesh would cut these to eight bits
        materials = file.document.setdefault("materials", [])
        if PLAIN not in materials:
            materials.append(PLAIN)
        primitive["material"] = materials.index(PLAIN)
    if "indices" in primitive:
        primitive["indices"] = plain(primitive["indices"], None)
    if primitive.get("mode") == FAN:
        count = file.document["accessors"][attributes["POSITION"]]["count"]
        around = file.numbers(primitive["indices"])[:, 0] if "indices" in primitive else np.arange(count)
        fan = np.stack([np.full(max(len(around) - 2, 0), around[0]), around[1:-1], around[2:]], 1)
        primitive["indices"] = file.add(fan.astype(np.uint32).reshape(-1, 1))
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


class _File:
    """A .glb or .gltf file: its JSON, its numbers, and the same with more of both."""

    def __init__(self, path: Path) -> None:
        """Raises: ValueError for a file without JSON."""
        self.path, self.rest = path, b""
        with open(path, "rb") as file:
            data = file.read(20)
            self.binary = data[:4] == b"glTF"
            if self.binary:  # textures and vertices, most of the file, come after
                if len(data) < 20:
                    raise ValueError("the file ends in its header")
                self.length, kind = struct.unpack("<I4s", data[12:20])
                if kind != b"JSON":
                    raise ValueError("its first chunk is not JSON")
                data = file.read(self.length)
            else:
                data += file.read()
        self.document: dict[str, Any] = json.loads(data)
        if not isinstance(self.document, dict):
            raise ValueError("its JSON is no object")
        self.buffers: dict[int, bytes] = {}

    def is_odd(self, accessor: int, colour: bool = False) -> bool:
        """Return whether trimesh would misread it: sparse, or normalised where it is not a colour."""
        facts = self.document["accessors"][accessor]
        return "sparse" in facts or (facts.get("normalized", False) and not colour)

    def numbers(self, accessor: int) -> np.ndarray:
        """An accessor's values [count, columns], normalised ones as floats (specification, sec. 3.6.2 and 3.11)."""
        facts = self.document["accessors"][accessor]
        dtype, columns = np.dtype(_TYPES[facts["componentType"]]), _COLUMNS[facts["type"]]
        if "bufferView" in facts:
            values = self._view(facts["bufferView"], facts.get("byteOffset", 0), dtype, facts["count"], columns).copy()
        else:
            values = np.zeros((facts["count"], columns), dtype)
        if "sparse" in facts:
            sparse = facts["sparse"]
            rows, other, count = sparse["indices"], sparse["values"], sparse["count"]
            kind = np.dtype(_TYPES[rows["componentType"]])
            which = self._view(rows["bufferView"], rows.get("byteOffset", 0), kind, count, 1)[:, 0]
            values[which] = self._view(other["bufferView"], other.get("byteOffset", 0), dtype, count, columns)
        if facts.get("normalized", False):
            values = np.maximum(values / np.iinfo(dtype).max, -1).astype(np.float32)
        return values

    def add(self, values: np.ndarray) -> int:
        """Return the number of a new accessor of values [count, columns]."""
        data = np.ascontiguousarray(values).tobytes()
        uri = "data:application/octet-stream;base64," + base64.b64encode(data).decode()
        self.document["buffers"].append({"uri": uri, "byteLength": len(data)})
        self.document["bufferViews"].append({"buffer": len(self.document["buffers"]) - 1, "byteLength": len(data)})
        component = next(code for code, kind in _TYPES.items() if kind == values.dtype)
        shape = next(name for name, columns in _COLUMNS.items() if columns == values.shape[1])
        new = {"bufferView": len(self.document["bufferViews"]) - 1, "componentType": component}
        self.document["accessors"].append(new | {"type": shape, "count": len(values)})
        return len(self.document["accessors"]) - 1

    def content(self) -> tuple[bytes, str]:
        """Return the whole file as it is now, and its format."""
        text = json.dumps(self.document).encode()
        if not self.binary:
            return text, "gltf"
        text += b" " * (-len(text) % 4)
        body = struct.pack("<I4s", len(text), b"JSON") + text + self.path.read_bytes()[20 + self.length :]
        return struct.pack("<4sII", b"glTF", 2, 12 + len(body)) + body, "glb"

    def _view(self, view: int, start: int, dtype: np.dtype, count: int, columns: int) -> np.ndarray:
        """`count` rows [count, columns] of a buffer view, from byte `start` of it."""
        facts = self.document["bufferViews"][view]
        buffer = self._buffer(facts["buffer"])
        begin, row = facts.get("byteOffset", 0) + start, columns * dtype.itemsize
        stride = facts.get("byteStride", row)
        end = begin + (count - 1) * stride + row
        if min(begin, stride) < 0 or end > len(buffer):
            raise ValueError("its numbers end in the midst")
        flat = np.frombuffer(buffer, np.uint8, end - begin, begin)
        rows = np.lib.stride_tricks.as_strided(flat, (count, row), (stride, 1))
        return np.ascontiguousarray(rows).view(dtype)

    def _buffer(self, number: int) -> bytes:
        if number not in self.buffers:
            uri = self.document["buffers"][number].get("uri")
            if uri is None:
                with open(self.path, "rb") as file:
                    file.seek(20 + self.length)
                    size, kind = struct.unpack("<I4s", file.read(8))
                    if kind != b"BIN\0":
                        raise ValueError("its second chunk holds no numbers")
                    self.buffers[number] = file.read(size)
            elif uri.startswith("data:"):
                self.buffers[number] = base64.b64decode(uri.split(",", 1)[1])
            else:
                self.buffers[number] = (self.path.parent / unquote(uri)).read_bytes()
        return self.buffers[number]
