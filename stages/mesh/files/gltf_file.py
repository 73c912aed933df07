"""A glTF file as it lies on the disk: GLB chunks or JSON, buffers beside or within it, accessors as numbers.

Every length that the file promises is held against what is there (glTF 2.0 specification, sec. 3.6 and 4.4).
"""

from __future__ import annotations

import base64
import json
import re
import struct
from pathlib import Path
from typing import Any
from urllib.parse import unquote, unquote_to_bytes

import numpy as np

from stages.errors import UserError
from stages.mesh.files.gltf_schema import check_kinds

_TYPES = {5120: np.int8, 5121: np.uint8, 5122: np.int16, 5123: np.uint16, 5125: np.uint32, 5126: np.float32}
_COLUMNS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4}


class GltfFile:
    """A .glb or .gltf file: its JSON, its numbers, and the same with more of both."""

    def __init__(self, path: Path) -> None:
        """Raises: UserError for a file that is cut off, is not what its header says, or is not glTF 2.0."""
        self.path = path
        with open(path, "rb") as file:
            data = file.read(20)
            self.binary = data[:4] == b"glTF"
            if self.binary:  # textures and vertices, most of the file, come after
                data = self._chunk(data, file)
            else:
                data += file.read()
        try:
            self.document: dict[str, Any] = json.loads(data.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise self.wrong(f"its JSON is broken or cut off: {error}") from None
        if not isinstance(self.document, dict):
            raise self.wrong("its JSON is no object")
        self._check_version()
        check_kinds(self.document, self.wrong)
        self.changed = data.startswith(b"\xef\xbb\xbf")  # trimesh stumbles over a byte-order mark
        self.buffers: dict[int, bytes] = {}

    def wrong(self, why: str, fix: str = "get the whole file again, or save it again as GLB") -> UserError:
        """Return what a file is refused with."""
        return UserError(f"Cannot read the mesh {self.path}", why, fix)

    def _chunk(self, data: bytes, file: Any) -> bytes:
        """The JSON chunk of a GLB whose first 20 bytes are `data`, after a look at the lengths that it promises."""
        size = self.path.stat().st_size
        if size < 20:
            raise self.wrong(f"it is cut off: it has {size} bytes, and a GLB's header 20")
        version, whole, self.length, kind = struct.unpack("<III4s", data[4:20])
        if version != 2:
            raise self.wrong(f"it is a GLB of version {version}, and 2 is read", "save it as glTF 2.0")
        if whole != size:
            end = "it is cut off" if size < whole else "more follows than belongs to it"
            raise self.wrong(f"its header promises {whole} bytes, and it has {size}: {end}")
        if kind != b"JSON" or self.length > size - 20:
            raise self.wrong(f"its first chunk is not JSON of {self.length} bytes, of {size - 20} that follow")
        return file.read(self.length)

    def _check_version(self) -> None:
        asset = self.document.get("asset", {})
        asset = asset if isinstance(asset, dict) else {}
        version = str(asset.get("version", "1.0" if isinstance(self.document.get("meshes"), dict) else ""))
        if not version:
            raise self.wrong("its JSON is no glTF: it has no asset with a version")
        if not version.startswith("2.") or str(asset.get("minVersion", "2.0")) != "2.0":
            its = asset.get("minVersion", version)
            raise self.wrong(f"it is glTF {its}, and 2.0 is read", "convert it to glTF 2.0, in Blender for one")

    def item(self, kind: str, number: int) -> dict[str, Any]:
        """Return an object of the JSON's lists. Raises UserError where there is none of that number."""
        there = self.document.get(kind, [])
        if not isinstance(number, int) or not 0 <= number < len(there):
            raise self.wrong(f"it names number {number} of its {kind}, and there are {len(there)}")
        return there[number]

    def is_odd(self, accessor: int, colour: bool = False) -> bool:
        """Return whether trimesh would misread it: sparse, or normalised where it is not a colour."""
        facts = self.item("accessors", accessor)
        return "sparse" in facts or (facts.get("normalized", False) and not colour)

    def numbers(self, accessor: int) -> np.ndarray:
        """Return an accessor's values [count, columns], normalised ones as floats (glTF sec. 3.6.2 and 3.11)."""
        facts = self.item("accessors", accessor)
        if facts.get("componentType") not in _TYPES or facts.get("type") not in _COLUMNS:
            raise self.wrong(f"accessor {accessor} has numbers of no kind of glTF's")
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
            if count and which.max() >= facts["count"]:
                raise self.wrong(f"sparse accessor {accessor} replaces row {which.max()} of {facts['count']}")
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
        facts = self.item("bufferViews", view)
        buffer = self._buffer(facts["buffer"])
        row = columns * dtype.itemsize
        stride, begin = facts.get("byteStride", row), facts.get("byteOffset", 0)
        end, length = start + (count - 1) * stride + row, facts["byteLength"]
        if count < 1:
            return np.zeros((0, columns), dtype)
        if min(start, stride, begin) < 0 or end > length:
            raise self.wrong(
                f"{count} numbers or rows of them end at byte {end} of bufferView {view}, which has {length}"
            )
        if begin + length > len(buffer):
            text = f"bufferView {view} ends at byte {begin + length} of buffer {facts['buffer']}"
            raise self.wrong(f"{text}, which has {len(buffer)}")
        flat = np.frombuffer(buffer, np.uint8, end - start, begin + start)
        rows = np.lib.stride_tricks.as_strided(flat, (count, row), (stride, 1))
        return np.ascontiguousarray(rows).view(dtype)

    def _buffer(self, number: int) -> bytes:
        """A buffer's bytes, as many as it promises. Raises UserError where it is not there, or shorter."""
        if number not in self.buffers:
            facts = self.item("buffers", number)
            data = self._bytes(number, facts.get("uri"))
            if len(data) < facts["byteLength"]:
                name = f" ({facts['uri'][:80]})" if "uri" in facts and not facts["uri"].startswith("data:") else ""
                raise self.wrong(f"buffer {number}{name} promises {facts['byteLength']} bytes, and has {len(data)}")
            self.buffers[number] = data[: facts["byteLength"]]
        return self.buffers[number]

    def _bytes(self, number: int, uri: str | None) -> bytes:
        if uri is None:
            if number or not self.binary:
                raise self.wrong(f"buffer {number} has no uri: its numbers are not in the file")
            with open(self.path, "rb") as file:
                file.seek(20 + self.length)
                head = file.read(8)
                if len(head) < 8 or head[4:] != b"BIN\0":
                    raise self.wrong("it has no binary chunk, and its buffer 0 is to be there")
                return file.read(struct.unpack("<I", head[:4])[0])
        if uri.startswith("data:"):
            kind, _, text = uri.partition(",")
            try:
                return (
                    base64.b64decode(unquote(text), validate=True)
                    if kind.endswith(";base64")
                    else unquote_to_bytes(text)
                )
            except ValueError as error:
                raise self.wrong(f"the data within buffer {number} are not base64: {error}") from None
        beside = self.beside(uri)
        if beside is None:
            raise self.wrong(
                f"its buffer {uri} is not there", f"put {uri} where the file looks for it, or save it as GLB"
            )
        return beside.read_bytes()

    def beside(self, uri: str) -> Path | None:
        """Return the file that a URI names, None where there is none, or it lies elsewhere than beside this one."""
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", uri):  # http: and the like
            return None
        names = dict.fromkeys((unquote(uri), uri, unquote(uri).replace("\\", "/")))
        return next((place for name in names if (place := self.path.parent / name).is_file()), None)

    def embed(self) -> None:
        """Take into the JSON what has a URI that trimesh does not follow: not base64, or written in codes."""
        for kind in ("buffers", "images"):
            for number, facts in enumerate(self.document.get(kind, [])):
                uri = facts.get("uri")
                if uri is None or (
                    uri.startswith("data:") and uri.partition(",")[0].endswith(";base64") and "%" not in uri
                ):
                    continue
                if not uri.startswith("data:") and (self.path.parent / uri).is_file() and "%" not in uri:
                    continue
                if kind == "images" and not uri.startswith("data:") and self.beside(uri) is None:
                    continue  # warned of with its material
                data = base64.b64encode(self._bytes(number, uri)).decode()
                facts["uri"] = f"data:{facts.get('mimeType', 'application/octet-stream')};base64,{data}"
                self.changed = True
